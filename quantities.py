r"""What the figures measure: tensors in, numbers out. Nothing here draws, prints or reads files; analyze.py does.

    attention_rollout         Figures 1a and 5     how much each patch reaches the CLS and DIST tokens
    effective_patches, cover  (ours)               is a map narrow, and does it mark what the prediction rests on?
    attention_distance        Figure 4b            how far the heads look, in pixels
    feature_rank              Figure 4c            directions that hold 99 % of the features
    reconstruction_error      Figure 1b            what is lost with fewer directions
    entropy                   Figure 3             how unsure a prediction is
    combinations              (ours)               one prediction out of two heads, the paper's way and others
    loss_along                Section 3.2          how fast the loss rises around the weights
    calibration_error, bootstrap  (ours)           is a network as often right as it says, and how sure are its accuracies?

The figures are those of DeiT-LT (Rangwani et al., CVPR 2024, arXiv 2404.02900). Its authors published no code for them: where
the paper leaves a choice open, the usual definition is taken, and its source is named.
Shapes: B images of S px, H heads, N = G x G patches of P px, T = N + leading tokens (CLS, DIST), d features, K classes.
"""
import numpy as np
import torch


# ---- Attention -----------------------------------------------------------------------------------------------------------

def attention_rollout(attentions):
    """How much each token of the input reaches each token of the output (Abnar and Zuidema 2020, arXiv 2005.00928).

        A_l = mean over heads,  R = Â_L ... Â_1,  Â_l = (A_l + I) / 2

    The identity stands for the residual branch. attentions: per block (B,H,T,T), rows sum to 1 -> R (B,T,T), rows sum to 1.
    """
    T = attentions[0].shape[-1]
    rollout = torch.eye(T, device=attentions[0].device)
    for attention in attentions:
        rollout = (attention.float().mean(dim=1) + torch.eye(T, device=rollout.device)) / 2 @ rollout
    return rollout


@torch.no_grad()
def token_maps(net, images):
    """Attention rollout of the leading tokens over the image: {"cls": (B,G,G), "dist": (B,G,G)}, G patches a side.

    The columns of CLS and DIST themselves are left out. images (B,3,S,S) in [0,1].
    """
    _, attentions = net.forward_features(images, return_attention=True)
    rollout = attention_rollout(attentions)
    G = net.img_size // net.patch_size
    names = ["cls", "dist"][:net.num_tokens]
    return {name: rollout[:, i, net.num_tokens:].unflatten(1, (G, G)) for i, name in enumerate(names)}


def effective_patches(maps):
    """exp of the entropy of maps (B,G,G) >= 0 -> (B,): N for a map that is even, 1 for one that marks a single patch."""
    return entropy(maps.flatten(1).log()).exp()


def cover(images, maps, share=0.25):
    """Images (B,3,S,S) in which the `share` of the patches with the highest value of maps (B,G,G) has the image's mean colour.

    If the prediction suffers more from this than from covering patches at random, the map marks what it rests on: the deletion
    test of Petsiuk et al. 2018, arXiv 1806.07421, with one share.
    """
    B, G, P = len(maps), maps.shape[-1], images.shape[-1] // maps.shape[-1]
    top = maps.flatten(1).topk(round(share * G * G), dim=1).indices       # (B, covered patches)
    mask = torch.zeros(B, G * G, dtype=torch.bool, device=maps.device).scatter_(1, top, True).view(B, 1, G, G)
    mask = mask.repeat_interleave(P, dim=2).repeat_interleave(P, dim=3)   # (B,1,S,S)
    return torch.where(mask, images.mean(dim=(2, 3), keepdim=True), images)


def patch_distances(G, P):
    """Distances in pixels between the centres of all patches, row by row: (G*G, G*G)."""
    side = torch.arange(G, dtype=torch.float32) * P
    centres = torch.cartesian_prod(side, side)                            # (N,2)
    return torch.cdist(centres, centres)


def attention_distance(attention, G, P):
    """Mean attention distance of every head in pixels: (B,H,T,T) -> (H,) (Raghu et al. 2021, arXiv 2108.08810).

        mean over images and patches i of  sum_j a_ij |c_i - c_j|,      c = centre of a patch

    Only patches look and are looked at: the leading tokens have no place, their rows and columns are left out and the remaining
    rows scaled to sum to 1. Uniform attention over 14 x 14 patches of 16 px gives 116.5 px, the identity 0.
    """
    between = attention[:, :, -G * G:, -G * G:].float()                   # (B,H,T,T) -> (B,H,N,N)
    between = between / between.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return (between * patch_distances(G, P).to(between.device)).sum(dim=-1).mean(dim=(0, 2))


# ---- Features ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def block_tokens(net, images):
    """CLS and, where there is one, DIST as they leave each block: images (B,3,S,S) -> (depth, B, leading tokens, d)."""
    seen = []
    hooks = [block.register_forward_hook(lambda module, inputs, out: seen.append(out[:, :net.num_tokens]))
             for block in net.blocks]
    try:
        net(images)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)


def reconstruction_error(features):
    """Share of the features' squared length that their best m directions lose, m = 0..min(n,d): (n,d) -> (min(n,d)+1,).

        X: features, of each row its own mean subtracted,  X = U S V^T,   error_m = 1 - sum_{i<=m} s_i^2 / sum_i s_i^2

    Eckart and Young: no m directions lose less. Features that are all constant have no error.
    """
    X = features.double() - features.double().mean(dim=1, keepdim=True)
    squares = torch.linalg.svdvals(X).square()                            # (min(n,d),), falling
    lost = squares.sum() - torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    return (lost / squares.sum().clamp(min=1e-300)).clamp(min=0)


def feature_rank(features, kept=0.99):
    """Fewest directions that hold more than `kept` of the squared singular values: (n,d) -> whole number, 0 for constant rows.

    Andriushchenko et al. 2023, arXiv 2305.16292 ("Sharpness-aware minimization leads to low-rank features"), in whose code,
    too, each row's own mean is subtracted, not the mean of the rows.
    """
    return int((reconstruction_error(features) >= 1 - kept).sum())


# ---- Predictions ---------------------------------------------------------------------------------------------------------

def entropy(logits):
    """-sum_k p_k ln p_k of p = softmax(logits), in nats: (B,K) -> (B,), from 0 (certain) to ln K (no idea)."""
    log_p = logits.float().log_softmax(dim=1)
    return -(log_p.exp() * log_p.clamp(min=-1e30)).sum(dim=1)             # 0 ln 0 = 0


def combinations(cls_logits, dist_logits, counts):
    """Predictions from two heads' logits (B,K): {name: scores (B,K)}; counts (K,): training images of each class.

    logits: the paper's mean. equal spread: each head's logits divided by their standard deviation over the image's classes, so
    that neither is louder. probabilities: mean of the softmaxes. balanced CLS: CLS - ln pi, pi_k = n_k / N, which by Bayes'
    rule is the CLS of equally frequent classes (logit adjustment after training, Menon et al., arXiv 2007.07314); with counts
    None, for a CLS whose loss was adjusted and which is so already, these are left out.
    """
    cls, dist = cls_logits.double(), dist_logits.double()
    equal = lambda logits: logits / logits.std(dim=1, keepdim=True)
    heads = {"CLS": cls}
    if counts is not None:
        prior = torch.as_tensor(counts, dtype=torch.double, device=cls.device)
        heads["balanced CLS"] = cls - (prior / prior.sum()).log()
    means = {}
    for name, logits in heads.items():
        means |= {f"{name} + DIST, logits": logits + dist, f"{name} + DIST, equal spread": equal(logits) + equal(dist),
                  f"{name} + DIST, probabilities": logits.softmax(dim=1) + dist.softmax(dim=1)}
    return heads | {"DIST": dist} | means


# ---- Weights -------------------------------------------------------------------------------------------------------------

def length(tensors):
    """Euclidean length of a list of tensors, taken together."""
    return torch.linalg.vector_norm(torch.stack([t.detach().norm() for t in tensors]))


def gradient_direction(losses, params):
    """Where SAM climbs (Foret et al. 2021, arXiv 2010.01412): g / ||g||, one norm over all parameters. A list of tensors.

    losses: an iterable of scalars whose sum is the loss; one that makes them as it goes needs memory for one graph only.
    """
    total = [torch.zeros_like(p) for p in params]
    for loss in losses:
        for t, g in zip(total, torch.autograd.grad(loss, params)):
            t += g
    norm = length(total)
    return [t / norm for t in total]


def random_direction(params):
    """Gaussian, each filter as long as the weights' own (Li et al. 2018, arXiv 1712.09913), so that scale does not matter.

    A filter: what an index of the first dimension selects. Vectors (biases, BatchNorm) are not moved. The whole is as long as
    all matrices and kernels together. A list of tensors, drawn from torch's global generator.
    """
    def scaled(w):
        d, rest = torch.randn_like(w), tuple(range(1, w.ndim))
        norms = [torch.linalg.vector_norm(x, dim=rest, keepdim=True) for x in (w.detach(), d)]
        return d * norms[0] / norms[1]
    return [scaled(w) if w.ndim > 1 else torch.zeros_like(w) for w in params]


@torch.no_grad()
def loss_along(loss, params, direction, radii):
    """loss() at the weights w + r * direction for every r of `radii`, stacked: (len(radii), ...). w comes back to the bit."""
    before, out = [p.clone() for p in params], []
    try:
        for r in radii:
            for p, w, d in zip(params, before, direction):
                p.copy_(w + r * d)
            out.append(loss())
    finally:
        for p, w in zip(params, before):
            p.copy_(w)
    return torch.stack(out)


# ---- How sure ------------------------------------------------------------------------------------------------------------

def calibration_error(confidence, right, bins=15):
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599), a fraction.

        ECE = sum over bins b of  n_b / N |accuracy of b - mean confidence of b|,    bins of equal width in confidence

    confidence (N,) in [0,1]: the largest probability; right (N,): was that class the true one?
    """
    b = (confidence.double() * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.double).index_add_(0, b, right.double() - confidence.double())
    return float(gap.abs().sum() / len(right))


def bootstrap(right, labels, groups, resamplings=1000, share=0.95):
    """How far accuracies would scatter on other test images: ({"overall", "head", ...: percent} low, the same high).

    Every class is resampled with replacement from its own test images; `share` of the resamplings lie between low and high.
    right, labels (N,); groups {name: class numbers}. It says nothing of other seeds or other training images.
    """
    rng, K = np.random.default_rng(0), sum(map(len, groups.values()))
    n = np.bincount(labels.numpy(), minlength=K)
    hits = rng.binomial(n, np.bincount(labels.numpy(), right.numpy(), minlength=K) / np.maximum(n, 1), (resamplings, K))
    accuracies = {"overall": hits.sum(axis=1) / n.sum()}
    tested = {name: [k for k in classes if n[k]] for name, classes in groups.items()}
    accuracies |= {name: (hits[:, ks] / n[ks]).mean(axis=1) for name, ks in tested.items() if ks}
    ends = (1 - share) / 2, (1 + share) / 2
    return tuple({name: float(100 * np.quantile(a, end)) for name, a in accuracies.items()} for end in ends)
