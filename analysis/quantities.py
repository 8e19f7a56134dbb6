r"""What the figures measure: tensors in, numbers out. Nothing here draws, prints or reads files.

    attention_rollout         Figures 1a, 5   how much each patch contributes to CLS and to DIST
    effective_patches, cover  (ours)          is a map narrow, and does the prediction rest on it?
    attention_distance        Figure 4b       how far the heads look, in pixels
    feature_rank              Figure 4c       directions that hold 99 % of the features
    reconstruction_error      Figure 1b       what is lost with fewer directions
    combinations              (ours)          one prediction out of two heads, in several ways
    loss_along                Section 3.2     how fast the loss rises around the weights
    calibration_error         (ours)          is a network right as often as it is confident?
    wilson                    (ours)          what a class's accuracy may be, by few test images
    bootstrap                 (ours)          how far a mean scatters with classes and test images

The figures are those of DeiT-LT (Rangwani et al., CVPR 2024, arXiv 2404.02900), whose authors
published no code for them. Where the paper leaves a choice open, the usual definition is taken and
its source named. The entropy of Figure 3 is engine.evaluation.entropy.

Shapes: B images of S px, H heads, N = G x G patches of P px, T = N + leading tokens (CLS, DIST),
d features, K classes.
"""
import math

import numpy as np
import torch

from engine.evaluation import entropy


# ---- Attention -----------------------------------------------------------------------------------

def attention_rollout(attentions):
    """How much each input token contributes to each output token (Abnar and Zuidema 2020).

        R = Â_L ... Â_1,      Â_l = (A_l + I) / 2,      A_l = mean over heads

    The identity stands for the residual branch (arXiv 2005.00928). attentions: per block (B,H,T,T),
    whose rows sum to 1. Returns R (B,T,T), whose rows sum to 1.
    """
    T = attentions[0].shape[-1]
    identity = torch.eye(T, device=attentions[0].device)
    rollout = identity
    for attention in attentions:
        mean = attention.float().mean(dim=1)                        # (B,H,T,T) -> (B,T,T)
        rollout = (mean + identity) / 2 @ rollout
    return rollout


@torch.no_grad()
def token_maps(net, images):
    """Attention rollout of the leading tokens over the image: {"cls": (B,G,G), "dist": (B,G,G)}.

    images (B,3,S,S) in [0,1]. The columns of CLS and DIST themselves are left out.
    """
    _, attentions = net.forward_features(images, return_attention=True)
    rollout = attention_rollout(attentions)                         # (B,T,T)
    G = net.img_size // net.patch_size
    names = ("cls", "dist")[:net.num_tokens]
    maps = rollout[:, :net.num_tokens, net.num_tokens:].unflatten(2, (G, G))    # (B,tokens,G,G)
    return dict(zip(names, maps.unbind(dim=1)))


def effective_patches(maps):
    """exp of the entropy of maps (B,G,G) >= 0 -> (B,): N for an even map, 1 for a single patch."""
    return entropy(maps.flatten(1).log()).exp()


def cover(images, maps, fraction=0.25):
    """Paint the patches with the highest map values in the image's mean colour.

    images (B,3,S,S), maps (B,G,G); `fraction` of the G x G patches are covered. If a prediction
    suffers more from this than from random patches, it rests on what the map marks: the deletion
    test of Petsiuk et al. 2018, arXiv 1806.07421, at one fraction.
    """
    B, G, P = len(maps), maps.shape[-1], images.shape[-1] // maps.shape[-1]
    top = maps.flatten(1).topk(round(fraction * G * G), dim=1).indices          # (B, covered)
    mask = torch.zeros(B, G * G, dtype=torch.bool, device=maps.device)
    mask = mask.scatter_(1, top, True).view(B, 1, G, G)
    mask = mask.repeat_interleave(P, dim=2).repeat_interleave(P, dim=3)         # (B,1,S,S)
    return torch.where(mask, images.mean(dim=(2, 3), keepdim=True), images)


def patch_distances(G, P):
    """Distances in pixels between the centres of all patches, row by row: (G*G, G*G)."""
    side = torch.arange(G, dtype=torch.float32) * P
    centres = torch.cartesian_prod(side, side)                      # (N,2)
    return torch.cdist(centres, centres)


def attention_distance(attention, G, P):
    """Mean attention distance of every head in pixels: (B,H,T,T) -> (H,) (Raghu et al. 2021).

        mean over images and patches i of  sum_j a_ij |c_i - c_j|,      c = centre of a patch

    Between patches only (arXiv 2108.08810): the leading tokens have no place in the image. Their
    rows and columns are left out, and the remaining rows are rescaled to sum to 1. Uniform
    attention over 14 x 14 patches of 16 px gives 116.5 px, the identity 0.
    """
    between = attention[:, :, -G * G:, -G * G:].float()             # (B,H,T,T) -> (B,H,N,N)
    between = between / between.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    distances = patch_distances(G, P).to(between.device)            # (N,N)
    return (between * distances).sum(dim=-1).mean(dim=(0, 2))


# ---- Features ------------------------------------------------------------------------------------

@torch.no_grad()
def block_tokens(net, images):
    """CLS and, where there is one, DIST as they leave each block: (depth, B, leading tokens, d).

    images (B,3,S,S) in [0,1].
    """
    outputs = []

    def keep(module, inputs, output):
        outputs.append(output[:, :net.num_tokens])                  # (B,T,d) -> (B,leading,d)
    hooks = [block.register_forward_hook(keep) for block in net.blocks]
    try:
        net(images)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(outputs)


def reconstruction_error(features):
    """Fraction of the features' squared length that their best m directions lose, for every m.

        X = features minus each row's own mean = U S V^T
        error_m = 1 - sum_{i<=m} s_i^2 / sum_i s_i^2

    (n,d) -> (min(n,d)+1,), for m = 0 ... min(n,d). Eckart and Young: no m directions lose less.
    Features that are all constant have no error. On the CPU: GPUs are slow at this in float64.
    """
    X = features.double().cpu()
    X = X - X.mean(dim=1, keepdim=True)
    squares = torch.linalg.svdvals(X).square()                      # (min(n,d),), descending
    kept = torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    total = squares.sum()
    return ((total - kept) / total.clamp(min=1e-300)).clamp(min=0)


def feature_rank(features, kept=0.99):
    """Fewest directions that hold more than `kept` of the squared singular values: (n,d) -> int.

    0 for constant rows. Andriushchenko et al. 2023, arXiv 2305.16292 ("Sharpness-aware minimization
    leads to low-rank features"); their code too subtracts each row's mean, not the mean row.
    """
    return int((reconstruction_error(features) >= 1 - kept).sum())


# ---- Predictions ---------------------------------------------------------------------------------

def combinations(cls_logits, dist_logits, counts):
    """Predictions from two heads' logits (B,K): {name: scores (B,K)}.

    logits: the paper's mean. equal spread: each head's logits divided by their standard deviation
    over the classes, so that neither head outweighs the other (left out for two classes).
    probabilities: sum of the softmaxes.
    balanced CLS: CLS - ln pi, pi_k = n_k / N, which by Bayes' rule is the CLS of equally frequent
    classes (logit adjustment after training, Menon et al. 2021, arXiv 2007.07314).

    counts (K,): training images of each class. None leaves balanced CLS out: for a student whose
    loss was adjusted, so that its CLS is balanced already.
    """
    cls, dist = cls_logits.double(), dist_logits.double()
    heads = {"CLS": cls}
    if counts is not None:
        counts = torch.as_tensor(counts, dtype=torch.double, device=cls.device)
        heads["balanced CLS"] = cls - (counts / counts.sum()).log()
    means = {}
    for name, logits in heads.items():
        means[f"{name} + DIST, logits"] = logits + dist
        if cls.shape[1] > 2:        # of two logits it would keep only which is the larger
            means[f"{name} + DIST, equal spread"] = equal_spread(logits) + equal_spread(dist)
        means[f"{name} + DIST, probabilities"] = logits.softmax(dim=1) + dist.softmax(dim=1)
    return heads | {"DIST": dist} | means


def equal_spread(logits):
    """Logits (B,K) with a standard deviation of 1 over the classes of each image."""
    return logits / logits.std(dim=1, keepdim=True)


# ---- Weights -------------------------------------------------------------------------------------

def norm(tensors):
    """Euclidean norm of a list of tensors, taken together as one vector."""
    return torch.linalg.vector_norm(torch.stack([t.detach().norm() for t in tensors]))


def gradient_direction(losses, params):
    """The direction in which SAM climbs, g / ||g||, one norm over all parameters: list of tensors.

    Foret et al. 2021, arXiv 2010.01412. losses: an iterable of scalars whose sum is the loss; a
    generator that computes them one by one needs memory for one graph only.
    """
    gradient = [torch.zeros_like(p) for p in params]
    for loss in losses:
        for total, g in zip(gradient, torch.autograd.grad(loss, params)):
            total += g
    length = norm(gradient)
    return [g / length for g in gradient]


def random_direction(params):
    """Gaussian noise, each filter as long as the weights' own filter: list of tensors.

    Li et al. 2018, arXiv 1712.09913: so the scale of the weights does not matter. A filter is what
    one index of the first dimension selects. Vectors (biases, BatchNorm) are not moved. Drawn from
    torch's global generator. As long as all matrices and kernels of params together.
    """
    direction = []
    for w in params:
        if w.ndim < 2:
            direction.append(torch.zeros_like(w))
            continue
        d, rest = torch.randn_like(w), tuple(range(1, w.ndim))
        wanted = torch.linalg.vector_norm(w.detach(), dim=rest, keepdim=True)
        direction.append(d * wanted / torch.linalg.vector_norm(d, dim=rest, keepdim=True))
    return direction


@torch.no_grad()
def loss_along(loss, params, direction, radii):
    """loss() at the weights w + r * direction for every r of `radii`, stacked: (len(radii), ...).

    w is put back bit for bit.
    """
    before, losses = [p.clone() for p in params], []
    try:
        for r in radii:
            for p, w, d in zip(params, before, direction):
                p.copy_(w + r * d)
            losses.append(loss())
    finally:
        for p, w in zip(params, before):
            p.copy_(w)
    return torch.stack(losses)


# ---- Uncertainty ---------------------------------------------------------------------------------

BINS = 15       # of confidences in [0,1], of equal width


def reliability(confidence, right):
    """[(images, mean confidence, share that is right)] of every bin of confidence that has images.

    confidence (N,): the largest probability. right (N,): was that class the true one?
    """
    b, rows = (confidence.double() * BINS).long().clamp(0, BINS - 1), []
    for k in b.unique():
        own = b == k
        rows.append((int(own.sum()), float(confidence[own].double().mean()),
                     float(right[own].double().mean())))
    return rows


def calibration_error(confidence, right):
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599), in [0,1].

        ECE = sum over bins b of  n_b / N |accuracy of b - mean confidence of b|

    confidence, right (N,): see reliability.
    """
    bins = reliability(confidence, right)
    return sum(n * abs(share - mean) for n, mean, share in bins) / len(right)


def wilson(right, total):
    """95 % interval of a proportion of few images (Wilson 1927): (low, high) in percent.

        (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n),      p = right / n

    right, total: numbers of images. NaN without images. 2 of 3 right: 20.8 to 93.9 %.
    """
    if total == 0:
        return math.nan, math.nan
    z, p, n = 1.96, right / total, total
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    ends = [(p + z * z / (2 * n) + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    return max(0.0, 100 * ends[0]), min(100.0, 100 * ends[1])           # but for rounding


def bootstrap(answers, labels, groups):
    """How far accuracies would scatter on other test images: (low, high), {name: percent} each.

    answers (N,): predicted classes, -1: none. labels (N,); groups {name: class numbers}. 95 % of
    1,000 resamplings lie between low and high. Images are resampled with replacement within their
    class, which is all for "overall". The means over classes, "balanced", "macro_f1" and the groups
    that have test images, take their classes with replacement as well: how far they would scatter
    with other classes of the kind. Resampling makes nothing of images that are all right, or all
    wrong: then the interval is Wilson's, of all images of the group. It says nothing about other
    seeds or training images.
    """
    rng, K = np.random.default_rng(0), sum(map(len, groups.values()))
    order = np.argsort(labels.numpy(), kind="stable")               # class after class
    labels, answers = labels.numpy()[order], answers.numpy()[order]
    n = np.bincount(labels, minlength=K)                            # test images of each class
    first = np.cumsum(n) - n
    tested = {name: [k for k in classes if n[k]] for name, classes in groups.items()}
    tested = {name: classes for name, classes in tested.items() if classes}
    every = sum(tested.values(), [])
    found = {name: [] for name in ("overall", "balanced", "macro_f1", *tested)}
    for _ in range(1000):
        drawn = answers[first[labels] + (rng.random(len(labels)) * n[labels]).astype(int)]
        right = np.bincount(labels[drawn == labels], minlength=K)
        given = np.bincount(drawn[drawn >= 0], minlength=K)
        recall, f1 = right / np.maximum(n, 1), 2 * right / np.maximum(given + n, 1)
        found["overall"].append(right.sum() / n.sum())
        classes = rng.choice(every, len(every))
        found["balanced"].append(recall[classes].mean())
        found["macro_f1"].append(f1[classes].mean())
        for name, classes in tested.items():
            found[name].append(recall[rng.choice(classes, len(classes))].mean())

    low, high = ({name: float(100 * np.quantile(values, q)) for name, values in found.items()}
                 for q in (0.025, 0.975))
    right = np.bincount(labels[answers == labels], minlength=K)
    together = dict.fromkeys(("overall", "balanced", "macro_f1"), every) | tested
    for name, classes in together.items():
        if right[classes].sum() in (0, n[classes].sum()):
            low[name], high[name] = wilson(int(right[classes].sum()), int(n[classes].sum()))
    return low, high
