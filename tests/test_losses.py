"""losses.py against published numbers, against each formula written as a loop in float64, and by
finite differences."""
import io
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

import data_lt
import losses
import train_teacher
from engine.runtime import Runtime
from losses import (LDAMLoss, PaCo, PaCoLoss, VSLoss, class_balanced_weights, cross_entropy,
                    distillation_loss, drw_weights, focal_loss, soft_distillation,
                    teacher_label_distribution)

C10_100 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
C10_50 = [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]
C100_100 = [int(500 * 0.01 ** (c / 99)) for c in range(100)]
C100_50 = [int(500 * 0.02 ** (c / 99)) for c in range(100)]


def randn(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


LOGITS, OTHER = randn(4, 3, seed=1), randn(4, 3, seed=2)                  # B = 4, K = 3
LABELS, TEACHER = torch.tensor([2, 0, 0, 1]), torch.tensor([1, 1, 0, 2])
SOFT = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5], [0.4, 0.0, 0.6]],
                    dtype=torch.float64)
WEIGHT = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)


def log_softmax(row):
    """One row of logits -> list, in Python's float64."""
    row = torch.as_tensor(row).tolist()
    return [v - math.log(sum(math.exp(u) for u in row)) for v in row]


def looped_cross_entropy(logits, labels, weight):
    """sum_i w[t_i] * -log p_i[t_i] / sum_i w[t_i]"""
    pairs = [(float(weight[t]), -log_softmax(row)[t]) for row, t in zip(logits, labels.tolist())]
    return sum(w * loss for w, loss in pairs) / sum(w for w, _ in pairs)


def looped_soft_cross_entropy(logits, target):
    """-sum_k target_k log p_k, mean over the rows."""
    rows = zip(logits, target.tolist())
    return sum(-t * lp for z, row in rows for t, lp in zip(row, log_softmax(z))) / len(logits)


# ---- class weights ----

@pytest.mark.parametrize("counts, published", [
    (C10_100, dict(enumerate([.0506, .0769, .1211, .1950, .3188, .5246, .8683, 1.4426, 2.4092,
                              3.9927]))),
    (C10_50, dict(enumerate([.0890, .1267, .1853, .2761, .4168, .6344, .9695, 1.4894, 2.2923,
                             3.5206]))),
    (C100_100, {0: .0449, 35: .2244, 70: 1.1530, 99: 4.3783}),
    (C100_50, {0: .0789, 99: 3.8494})])
def test_class_balanced_weights_are_the_published_ones(counts, published):
    """Another beta, 1 / n instead of 1 / E, a missing normalisation, float32 inside (which
    shifts the fourth digit)."""
    assert sum(counts) in (12_406, 13_996, 10_847, 12_608)  # the counts above are the protocol's
    weights = class_balanced_weights(counts)
    assert weights.shape == (len(counts),) and weights.dtype == torch.float32
    for k, w in published.items():
        assert weights[k].item() == pytest.approx(w, abs=6e-5)  # printed with four decimals


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.9999])
def test_class_balanced_weights_are_their_formula_and_sum_to_K(beta):
    """A sum of 1 or a mean of w over images; the sum of a geometric series, n terms, is the
    independent route to E_k."""
    counts = [40, 7, 3, 1]
    weights = class_balanced_weights(torch.tensor(counts), beta)
    # (1 - beta^n) / (1 - beta) = 1 + beta + ... + beta^(n-1)
    effective = [sum(beta ** i for i in range(n)) for n in counts]
    expected = [4 / e / sum(1 / f for f in effective) for e in effective]
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)
    assert weights.sum().item() == pytest.approx(4)


def test_beta_0_gives_ones():
    """0^n is 0: before the switch the published schedule uses beta = 0 and expects no weighting
    at all."""
    assert class_balanced_weights(C10_100, beta=0).tolist() == pytest.approx([1] * 10)


def test_a_class_without_images_has_no_weight():
    """An infinite weight, which would make NaN of all of them."""
    with pytest.raises(ValueError, match="at least one"):
        class_balanced_weights([5, 0, 1])


def test_drw_switches_exactly_at_its_epoch():
    """Off by one epoch, or an always-on weighting. Epochs count from 0."""
    assert drw_weights(C10_100, 0, 1100) is None and drw_weights(C10_100, 1099, 1100) is None
    for epoch in (1100, 1101, 1199):
        assert torch.equal(drw_weights(C10_100, epoch, 1100), class_balanced_weights(C10_100))
    expected = class_balanced_weights(C10_100, beta=0.9)
    assert torch.equal(drw_weights(C10_100, 5, 5, beta=0.9), expected)
    assert drw_weights(C10_100, 1100, 1100, beta=0) is None


# ---- cross-entropy and distillation ----

def test_soft_cross_entropy_is_its_formula():
    """A sum or a mean over classes instead of a mean over images."""
    expected = looped_soft_cross_entropy(LOGITS, SOFT)
    assert cross_entropy(LOGITS, SOFT).item() == pytest.approx(expected, abs=1e-12)


def test_class_numbers_stand_for_their_one_hot_rows():
    """Two code paths that disagree: mixing off would change the loss."""
    onehot = torch.eye(3, dtype=torch.float64)[LABELS]
    numbers, rows = cross_entropy(LOGITS, LABELS), cross_entropy(LOGITS, onehot)
    torch.testing.assert_close(numbers, rows, rtol=0, atol=1e-12)


def test_loss_of_a_perfect_student_is_the_entropy_of_its_targets():
    """The known minimum, with no gradient left: p = target. For hard labels it is 0."""
    target = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]], dtype=torch.float64)
    logits = target.log().requires_grad_()
    loss = cross_entropy(logits, target)
    loss.backward()
    entropy = (1.5 * math.log(2) + 0.8 * math.log(1.25) + 0.2 * math.log(10)) / 2
    assert loss.item() == pytest.approx(entropy, abs=1e-12) and logits.grad.abs().max() < 1e-12
    assert cross_entropy(100 * torch.eye(3)[TEACHER], TEACHER).item() < 1e-30


def test_weighted_mean_divides_by_the_sum_of_weights():
    """On paper: p of the label is 3/4 with w = 3 and 1/2 with w = 1, so (3 ln(4/3) + ln 2) / 4;
    not / 2."""
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], dtype=torch.float64)
    weight = torch.tensor([3.0, 1.0], dtype=torch.float64)
    loss = cross_entropy(logits, torch.tensor([0, 1]), weight)
    assert loss.item() == pytest.approx((3 * math.log(4 / 3) + math.log(2)) / 4, abs=1e-12)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_weighted_cross_entropy_is_its_formula(weight):
    """Weights of the wrong class, ignored, or that do anything when they are None or all equal."""
    expected = looped_cross_entropy(LOGITS, TEACHER, [1, 1, 1] if weight is None else weight)
    loss = cross_entropy(LOGITS, TEACHER, weight)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    equal = cross_entropy(LOGITS, TEACHER, torch.full((3,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(equal, cross_entropy(LOGITS, TEACHER))


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation_is_hintons(tau, weight):
    """KL the other way round or cross-entropy in its place, a missing tau^2, a mean over B * K
    entries instead of over B images; weights of the student's class."""
    total = weights = 0.0
    for s, t in zip(LOGITS / tau, OTHER / tau):
        q, p = log_softmax(s), log_softmax(t)
        w = 1.0 if weight is None else weight[p.index(max(p))].item()
        weights += w
        total += w * sum(math.exp(p[k]) * (p[k] - q[k]) for k in range(3))
    expected = total * tau ** 2 / weights
    loss = soft_distillation(LOGITS, OTHER, tau, weight)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("target", [LABELS, SOFT])
def test_total_is_1_minus_alpha_labels_plus_alpha_teacher(alpha, target):
    """alpha on the wrong term, heads or labels swapped, class weights on the label term."""
    loss, cls, dist = distillation_loss(LOGITS, OTHER, target, TEACHER, alpha=alpha, weight=WEIGHT)
    onehot = target if target.dim() == 2 else torch.eye(3)[target]
    expected_cls = looped_soft_cross_entropy(LOGITS, onehot)
    expected_dist = looped_cross_entropy(OTHER, TEACHER, WEIGHT)
    assert cls.item() == pytest.approx(expected_cls, abs=1e-12)
    assert dist.item() == pytest.approx(expected_dist, abs=1e-12)
    expected = (1 - alpha) * expected_cls + alpha * expected_dist
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_a_teacher_of_logits_is_followed_softly():
    """Hard labels from them after all, or tau or the weights not passed on."""
    teacher = LOGITS.flip(1)
    loss, cls, dist = distillation_loss(LOGITS, OTHER, SOFT, teacher, 0.25, WEIGHT, tau=3.0)
    assert cls.item() == cross_entropy(LOGITS, SOFT).item()
    assert dist.item() == soft_distillation(OTHER, teacher, 3.0, WEIGHT).item()
    assert loss.item() == pytest.approx(0.75 * cls.item() + 0.25 * dist.item(), abs=1e-12)


def test_default_is_deits_half_and_half_without_weights():
    """Another default alpha, or a default weighting."""
    loss = distillation_loss(LOGITS, OTHER, LABELS, TEACHER)[0]
    expected = [looped_cross_entropy(LOGITS, LABELS, [1, 1, 1]),
                looped_cross_entropy(OTHER, TEACHER, [1, 1, 1])]
    assert loss.item() == pytest.approx(sum(expected) / 2, abs=1e-12)


def test_each_head_gets_the_gradient_of_its_own_term():
    """softmax minus target, worked out on paper: (1 - alpha)(p - y) / B for CLS, alpha w[y_t] (p
    - e_t) / sum w for DIST."""
    cls, dist = LOGITS.clone().requires_grad_(), OTHER.clone().requires_grad_()
    distillation_loss(cls, dist, SOFT, TEACHER, alpha=0.3, weight=WEIGHT)[0].backward()
    w = WEIGHT[TEACHER][:, None]
    expected = 0.7 * (LOGITS.softmax(1) - SOFT) / 4
    torch.testing.assert_close(cls.grad, expected, rtol=0, atol=1e-12)
    expected = 0.3 * w * (OTHER.softmax(1) - torch.eye(3)[TEACHER]) / w.sum()
    torch.testing.assert_close(dist.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_label_distribution_of_a_batch_is_a_mean_over_its_images(tau):
    """A sum, hard labels from soft ones, or tau left out: logits adjusted by another prior."""
    hard = teacher_label_distribution(torch.tensor([2, 0, 0, 2, 2]), 4, tau)
    assert hard.tolist() == pytest.approx([0.4, 0, 0.6, 0])
    soft = teacher_label_distribution(LOGITS, 3, tau)
    rows = [log_softmax(row / tau) for row in LOGITS]
    expected = [sum(math.exp(row[k]) for row in rows) / 4 for k in range(3)]
    assert soft.tolist() == pytest.approx(expected, abs=1e-12)
    half = LOGITS.to(torch.bfloat16)
    expected = teacher_label_distribution(half.float(), 3, tau)
    assert torch.equal(teacher_label_distribution(half, 3, tau), expected)


# ---- LDAM ----

def test_ldam_margins_are_the_published_ones():
    """Another power than 1/4, or m_max given to the commonest class. Counts n and 16 n: margins
    1 : 1/2."""
    published = [.158, .180, .204, .232, .264, .300, .341, .387, .440, .500]
    # printed with three decimals
    assert LDAMLoss(C10_100).margins.tolist() == pytest.approx(published, abs=6e-4)
    assert LDAMLoss([160, 10], max_margin=0.3).margins.tolist() == pytest.approx([0.15, 0.3])
    assert LDAMLoss([10, 160], max_margin=0.3).margins.tolist() == pytest.approx([0.3, 0.15])


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_ldam_is_its_formula(weight):
    """A margin of every class instead of the label's, without the scale, added instead of taken
    away, or applied twice."""
    counts, s = [160, 10, 30], 20.0
    margins = [0.3 * (10 / n) ** 0.25 for n in counts]
    shifted = (LOGITS * 5).clone()
    for i, t in enumerate(LABELS.tolist()):
        shifted[i, t] -= s * margins[t]
    expected = looped_cross_entropy(shifted, LABELS, [1, 1, 1] if weight is None else weight)
    loss = LDAMLoss(counts, max_margin=0.3, scale=s)(LOGITS * 5, LABELS, weight)
    assert loss.item() == pytest.approx(expected, abs=1e-5)  # the margins are kept in float32


def test_ldam_defaults_and_a_margin_on_paper():
    """Two classes of 50 images, m = 1/2, s = 30: a lead of exactly 15 is just enough, and costs
    ln 2."""
    loss = LDAMLoss([50, 50])
    assert loss(torch.tensor([[15.0, 0.0]]), torch.tensor([0])).item() == pytest.approx(math.log(2))
    assert loss(torch.tensor([[15.0, 0.0]]), torch.tensor([1])).item() == pytest.approx(30)


# ---- precision and gradients ----

LOSSES = {
    "cross_entropy": lambda z: cross_entropy(z, SOFT.to(z)),
    "cross_entropy, class numbers": lambda z: cross_entropy(z, LABELS),
    "cross_entropy, weighted": lambda z: cross_entropy(z, TEACHER, WEIGHT.to(z)),
    "soft_distillation, student": lambda z: soft_distillation(z, OTHER.to(z), tau=2.0),
    "soft_distillation, teacher": lambda z: soft_distillation(OTHER.to(z), z, tau=2.0),
    "distillation_loss":
        lambda z: distillation_loss(z, z.flip(0), SOFT.to(z), TEACHER, weight=WEIGHT.to(z))[0],
    "ldam": lambda z: LDAMLoss([160, 10, 30], scale=5.0)(z, LABELS, WEIGHT.to(z)),
    "vector scaling": lambda z: VSLoss([160, 10, 30])(z, LABELS, WEIGHT.to(z)),
    "focal": lambda z: focal_loss(z, LABELS, WEIGHT.to(z), gamma=2.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    """A term that is detached or computed in float32 although its logits are float64."""
    assert gradcheck(LOSSES[name], LOGITS.clone().requires_grad_())


HALF_LOSSES = {  # as in a step under autocast: only logits are half
    "cross_entropy": lambda z: cross_entropy(z, SOFT.float()),
    "cross_entropy, weighted": lambda z: cross_entropy(z, TEACHER, WEIGHT.float()),
    "soft_distillation": lambda z: soft_distillation(z, z.flip(0), tau=2.0),
    "distillation_loss":
        lambda z: distillation_loss(z, z.flip(0), SOFT.float(), TEACHER, weight=WEIGHT.float())[0],
    "ldam": lambda z: LDAMLoss([160, 10, 30], scale=5.0)(z, LABELS, WEIGHT.float()),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", HALF_LOSSES)
def test_half_precision_logits_are_computed_in_float32(name, autocast, dtype):
    """A softmax in 8 bits. The loss of half logits must be that of the same numbers in float32,
    to the last bit."""
    logits = (20 * LOGITS).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = HALF_LOSSES[name](logits)
    assert loss.dtype == torch.float32 and torch.equal(loss, HALF_LOSSES[name](logits.float()))
    assert loss.to(dtype).float() != loss  # half precision could not even hold it


def test_ldam_margins_follow_the_loss_to_its_device():
    """Margins left behind on the CPU when the loss moves: they are a buffer, not a plain
    attribute."""
    assert LDAMLoss(C10_100).to("meta").margins.is_meta


# ---- vector scaling, logit adjustment, focal ----

@pytest.mark.parametrize("gamma, tau", [(0.3, 1.0), (0.0, 1.0), (0.0, 0.0)])
def test_vector_scaling_equals_its_formula(gamma, tau):
    """CE(z_k / (n_max/n_k)^gamma + tau ln pi_k); a prior added with the wrong sign, or counts
    for frequencies, would differ."""
    counts = [100, 20, 4]
    shifted = [[v / (100 / n) ** gamma + tau * math.log(n / 124) for v, n in zip(row, counts)]
               for row in LOGITS.tolist()]
    expected = looped_cross_entropy(shifted, LABELS, WEIGHT)
    loss = VSLoss(counts, gamma, tau)(LOGITS, LABELS, WEIGHT)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_focal_loss_equals_its_formula_with_the_weight_inside_the_exponent():
    each = [-w * log_softmax(row)[y] for row, y, w in zip(LOGITS, LABELS, WEIGHT[LABELS].tolist())]
    expected = sum((1 - math.exp(-l)) ** 2 * l for l in each) / 4
    loss = focal_loss(LOGITS, LABELS, WEIGHT, gamma=2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    plain = F.cross_entropy(LOGITS, LABELS)
    assert focal_loss(LOGITS, LABELS, gamma=0.0).item() == pytest.approx(plain.item())


# ---- PaCo: the loss ----

PACO_COUNTS = [60, 25, 10, 5]                                             # K = 4


def looped_paco(logits, v, target, bank, bank_labels, counts, alpha, beta, gamma, temperature):
    """The published formula, anchor by anchor and row by row, in Python's float64."""
    logits, v, bank = (t.double().tolist() for t in (logits, v, bank))
    target, bank_labels, total = target.tolist(), bank_labels.tolist(), 0.0
    for i, (z, anchor, y) in enumerate(zip(logits, v, target)):
        s = [u + math.log(n / sum(counts)) for u, n in zip(z, counts)]
        t = [sum(p * q for p, q in zip(anchor, row)) / temperature for row in bank]
        pairs = sum(math.exp(t[a]) for a in range(len(bank)) if a != i)
        log_d = math.log(sum(map(math.exp, s)) + gamma * pairs)
        positives = [a for a in range(len(bank)) if a != i and bank_labels[a] == y]
        pairs = sum(t[a] - log_d for a in positives)
        total -= (beta * (s[y] - log_d) + alpha * pairs) / (beta + alpha * len(positives))
    return total / len(target)


def paco_batch(seed, B=5, d=6, queue=7, dtype=torch.float64):
    """(logits, v, target, bank, bank_labels): unit rows, but for the last two, shorter, of label
    -1."""
    def unit(n, s):
        return F.normalize(randn(n, d, seed=s), dim=1).to(dtype)
    g = torch.Generator().manual_seed(seed)
    target, older = torch.randint(4, (B,), generator=g), torch.randint(4, (queue,), generator=g)
    older[-2:] = -1
    v, rows = unit(B, 10 * seed + 1), unit(queue, 10 * seed + 3)
    rows[-2:] *= 0.7
    logits, keys = randn(B, 4, seed=10 * seed).to(dtype), unit(B, 10 * seed + 2)
    return logits, v, target, torch.cat([v, keys, rows]), torch.cat([target, target, older])


PACO_SETTINGS = [                                           # alpha, beta, gamma, temperature
    (0.01, 1.0, 1.0, 0.05), (0.05, 1.0, 1.0, 0.2), (1.0, 1.0, 0.5, 0.5), (0.3, 0.5, 2.0, 0.1),
    (0.3, 1.0, 0.0, 0.2), (0.0, 1.0, 1.0, 0.2), (0.5, 0.0, 1.0, 0.3)]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("settings", PACO_SETTINGS)
def test_paco_loss_is_its_formula(settings, seed):
    """Self-pairs kept, own keys dropped, logits divided by T, another prior or normaliser, rows
    of -1 that leave D_i or are taken for a class (the last one, by negative indices)."""
    batch = paco_batch(seed)
    expected = looped_paco(*batch, PACO_COUNTS, *settings)
    loss = PaCoLoss(PACO_COUNTS, *settings)(*batch)
    assert loss.item() == pytest.approx(expected, rel=1e-6)             # ln pi is kept in float32


def test_paco_without_pairs_is_logit_adjustment():
    """alpha = gamma = 0: what remains is the class term with the log prior, whatever the anchors
    and their scale are."""
    logits, v, target, bank, labels = paco_batch(4)
    for gamma in (0.0, 0):  # also as an integer, whose logarithm is -inf
        loss = PaCoLoss(PACO_COUNTS, alpha=0.0, gamma=gamma)(logits, v, target, bank, labels)
        adjusted = VSLoss(PACO_COUNTS, gamma=0)(logits, target)
        assert loss.item() == pytest.approx(adjusted.item(), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_gradients_of_paco_are_those_of_finite_differences(gamma):
    """A detached bank, or NaN from the masked diagonal or from gamma = 0: v is anchor and row of
    the bank at once."""
    logits, v, target, bank, labels = paco_batch(6, B=3, d=3, queue=5)
    loss = PaCoLoss(PACO_COUNTS, alpha=0.3, gamma=gamma, temperature=0.5)
    inputs = logits.requires_grad_(), v.clone().requires_grad_()
    assert gradcheck(lambda z, u: loss(z, u, target, torch.cat([u, bank[3:]]), labels), inputs)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_paco_computes_in_float32(dtype, autocast):
    """Cosines or logits in 8 bits: the loss of half logits is that of the same numbers in
    float32, to the last bit. Defaults other than those published for CIFAR-100."""
    logits, v, target, bank, labels = paco_batch(7, dtype=torch.float32)
    logits, loss = (20 * logits).to(dtype), PaCoLoss(PACO_COUNTS)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = loss(logits, v, target, bank, labels)
    full = loss(logits.float(), v, target, bank, labels)
    assert value.dtype == torch.float32 and torch.equal(value, full)
    expected = looped_paco(logits, v, target, bank, labels, PACO_COUNTS, 0.01, 1, 1, 0.05)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_paco_does_not_overflow():
    """exp() before log(): e^200 has no float32."""
    logits, v, target, bank, labels = paco_batch(8, dtype=torch.float32)
    for batch, T in ((logits * 50, 0.05), (logits, 0.005)):
        loss = PaCoLoss(PACO_COUNTS, temperature=T)(batch, v, target, bank, labels).item()
        expected = looped_paco(batch, v, target, bank, labels, PACO_COUNTS, 0.01, 1, 1, T)
        assert loss > 50 and loss == pytest.approx(expected, rel=1e-5)


# ---- PaCo: key encoder and queue ----

class PooledNet(nn.Module):
    """As small as a teacher can be: images (B,3,S,S) -> 12 means -> 8 features (with BatchNorm)
    -> 4 logits."""

    def __init__(self, img_size=2):
        super().__init__()
        self.img_size = img_size
        self.features = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 8),
                                      nn.BatchNorm1d(8), nn.Tanh())
        self.classifier = nn.Linear(8, 4)

    def forward(self, x, return_features=False):
        features = self.features(x)
        logits = self.classifier(features)
        return (logits, features) if return_features else logits


def small_paco(seed=0, queue=5, momentum=0.9, dtype=torch.float64):
    torch.manual_seed(seed)
    return PaCo(PooledNet(), 8, dim=3, queue=queue, momentum=momentum).to(dtype)


def disturb(paco, seed):
    """Move every parameter and running statistic of the query side, as an optimizer and its
    passes would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in (paco.net, paco.projection):
            for t in module.state_dict().values():
                if t.is_floating_point():
                    t.add_(torch.rand(t.shape, generator=g, dtype=torch.float64))
                else:
                    t.add_(seed)


def parameters(*modules):
    """Copies of all parameters."""
    return [p.detach().clone() for module in modules for p in module.parameters()]


def images(seed, B=6, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(B, 3, 2, 2, generator=g, dtype=torch.float64).to(dtype)


def pointers(module):
    return {t.data_ptr() for t in module.state_dict().values()}


def key_buffers(paco):
    return [b.clone() for m in (paco.key_net, paco.key_projection) for b in m.buffers()]


def equal(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_the_key_encoder_starts_as_the_query_encoder_and_is_never_trained():
    """Another initialisation, shared instead of copied tensors, or key parameters in reach of
    the optimizer."""
    paco = small_paco()
    query, key = (paco.net, paco.projection), (paco.key_net, paco.key_projection)
    for a, b in zip(query, key):
        assert equal(list(a.state_dict().values()), list(b.state_dict().values()))
        assert not pointers(a) & pointers(b)
        assert all(p.requires_grad for p in a.parameters())
        assert not any(p.requires_grad for p in b.parameters())
    logits, v = paco(images(0))
    (logits.sum() + v.sum()).backward()
    assert all(p.grad is not None for m in query for p in m.parameters())
    assert all(p.grad is None for m in key for p in m.parameters())


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 0.999, 1.0])
def test_keys_move_every_key_parameter_once_by_the_lerp_and_nothing_else(momentum):
    """Momentum on the wrong side, a second step, a forgotten projection, a moved query encoder
    or copied statistics."""
    paco = small_paco(momentum=momentum).eval()  # in eval mode no pass moves a statistic
    for step in range(3):
        disturb(paco, step + 1)
        q, k = parameters(paco.net, paco.projection), parameters(paco.key_net, paco.key_projection)
        buffers, queue = key_buffers(paco), paco.queue.clone()
        paco.keys(images(step))
        for before, leader, after in zip(k, q, parameters(paco.key_net, paco.key_projection)):
            moved = momentum * before + (1 - momentum) * leader
            torch.testing.assert_close(after, moved, rtol=0, atol=1e-14)
        assert equal(q, parameters(paco.net, paco.projection)) and torch.equal(queue, paco.queue)
        assert equal(buffers, key_buffers(paco))
        assert not any(map(torch.equal, paco.key_net.buffers(), paco.net.buffers()))


def test_keys_are_unit_vectors_of_the_key_encoder_after_its_step_and_without_gradient():
    """Keys of the old key encoder, of the query encoder or not normalised; a graph that the key
    view's pass leaves behind."""
    paco, x = small_paco(momentum=0.7), images(1)
    disturb(paco, 1)
    old = paco.unit(paco.key_projection, paco.key_net.features(x))
    query = paco.unit(paco.projection, paco.net.features(x)).detach()
    keys = paco.keys(x)
    assert keys.shape == (6, 3) and not keys.requires_grad
    ones = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(keys.norm(dim=1), ones, rtol=0, atol=1e-12)
    hidden = paco.key_projection(paco.key_net.features(x)).detach()
    torch.testing.assert_close(keys, hidden / hidden.norm(dim=1, keepdim=True), rtol=0, atol=1e-12)
    assert (keys - old).abs().max() > 1e-3 and (keys - query).abs().max() > 1e-3


def test_with_momentum_0_keys_are_the_anchors_of_the_same_images():
    """A key encoder that encodes before it follows, or whose BatchNorm normalises with running
    statistics."""
    paco, x = small_paco(momentum=0.0), images(2)
    disturb(paco, 2)
    logits, v = paco(x)
    assert v.requires_grad and torch.equal(logits, paco.net(x))
    torch.testing.assert_close(paco.keys(x), v.detach(), rtol=0, atol=1e-12)
    assert paco.key_net.features[3].num_batches_tracked == 1
    assert paco.key_projection[1].num_batches_tracked == 1


def test_anchors_and_keys_are_projected_in_float32_under_autocast():
    """A projection or a normalisation in bfloat16: lengths would be 1 to two digits, and the
    loss divides cosines by T."""
    paco, x = small_paco(dtype=torch.float32), images(3, dtype=torch.float32)
    features = randn(6, 8, seed=3).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, v = paco(x)
        keys, projected = paco.keys(x), paco.unit(paco.projection, features)
    assert logits.dtype == torch.bfloat16                                 # autocast was really on
    for rows in (v, keys, projected):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(6), rtol=0, atol=1e-6)
    assert torch.equal(projected, paco.unit(paco.projection, features.float()))


def test_bank_is_anchors_then_keys_then_the_queue():
    """Another order (the loss masks the diagonal of the first B rows), anchors detached, or
    labels of other rows."""
    paco, keys, y = small_paco(), randn(2, 3, seed=1), torch.tensor([3, 1])
    paco.enqueue(randn(2, 3, seed=2), torch.tensor([0, 2]))
    v = randn(2, 3, seed=3).requires_grad_()
    bank, labels = paco.bank(v, keys, y)
    assert torch.equal(bank, torch.cat([v, keys, paco.queue]))
    assert labels.tolist() == [3, 1, 3, 1, 0, 2, -1, -1, -1]
    weight = randn(9, 3, seed=4)
    (bank * weight).sum().backward()
    assert torch.equal(v.grad, weight[:2])


@pytest.mark.parametrize("sizes", [[1] * 8, [2] * 5, [5, 5], [3, 5, 1, 4], [7], [2, 12, 3],
                                   [0, 2, 0]])
def test_the_queue_is_a_list_with_the_newest_first(sizes):
    """A pointer that wraps wrongly when the batch does not divide the queue or is larger, or
    labels that go out of step."""
    paco, rows, labels, count = small_paco(queue=5), [[0.0] * 3] * 5, [-1] * 5, 0
    assert paco.queue.tolist() == rows and paco.queue_labels.tolist() == labels
    assert paco.queue_labels.dtype == torch.int64
    for n in sizes:
        numbers = range(count + 1, count + n + 1)  # each key is told apart by its number
        keys = torch.tensor([[k, -k, k / 2] for k in numbers], dtype=torch.float64).view(n, 3)
        y = torch.tensor([k % 4 for k in numbers], dtype=torch.long)
        paco.enqueue(keys, y)
        rows, labels, count = (keys.tolist() + rows)[:5], (y.tolist() + labels)[:5], count + n
        assert paco.queue.tolist() == rows and paco.queue_labels.tolist() == labels


def test_the_queue_keeps_copies():
    """A view of the step's keys, which would hold its graph or change with it."""
    paco, keys = small_paco(), randn(3, 3, seed=1).requires_grad_()
    paco.enqueue(keys, torch.zeros(3, dtype=torch.long))
    before = paco.queue.clone()
    keys.data.zero_()
    assert torch.equal(paco.queue, before) and not paco.queue.requires_grad
    assert before[:3].abs().min() > 0


def test_an_empty_queue_adds_one_to_every_denominator_for_each_place():
    """Empty places that attract or repel: rows of zeros are e^0 = 1 in D_i and nobody's
    positives, so no gradient either."""
    paco, loss = small_paco(queue=9), PaCoLoss(PACO_COUNTS, alpha=0.3, gamma=0.5, temperature=0.2)
    logits, v, target, bank, labels = paco_batch(9)
    paco.queue = paco.queue.new_zeros(9, 6)                               # keys of 6 numbers here
    value = loss(logits, v, target, *paco.bank(v, bank[5:10], target))
    expected, T = 0.0, 0.2
    for i, y in enumerate(target.tolist()):
        s = [z + math.log(n / 100) for z, n in zip(logits[i].tolist(), PACO_COUNTS)]
        t = {a: float(v[i] @ bank[a]) / T for a in range(10) if a != i}   # anchors and keys alone
        log_d = math.log(sum(map(math.exp, s)) + 0.5 * (sum(map(math.exp, t.values())) + 9))
        pairs = [t[a] - log_d for a in t if target[a % 5] == y]
        expected -= (s[y] - log_d + 0.3 * sum(pairs)) / (1 + 0.3 * len(pairs)) / 5
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_a_saved_paco_goes_on_as_the_one_that_was_not_interrupted():
    """A queue, its labels or the key encoder missing from the state: a resumed run would start
    with other contrasts."""
    paco, other, file = small_paco(seed=0), small_paco(seed=1), io.BytesIO()
    disturb(paco, 1)
    paco.enqueue(paco.keys(images(1, B=3)), torch.tensor([1, 2, 3]))
    torch.save(paco.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for p in (paco, other):
        disturb(p, 2)
        p.enqueue(p.keys(images(2, B=2)), torch.tensor([0, 3]))
    assert paco.queue_labels.tolist() == [0, 3, 1, 2, 3] and paco.queue.norm(dim=1).min() > 0.99
    a, b = paco.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert {name.split(".")[0] for name in a} == {"net", "projection", "key_net", "key_projection",
                                                  "queue", "queue_labels"}


# ---- PaCo: the training loop, with SAM ----

def copied(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.fixture
def recorded_training(monkeypatch):
    """train_teacher.train on random images: f(*flags) -> (PaCo, its events in order).

    An event has `before` and `after`, states of the whole PaCo, and what the call was given.
    """
    record = SimpleNamespace(paco=None, events=[])

    def add(name, before, **tensors):
        tensors = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        event = SimpleNamespace(name=name, before=before, after=copied(record.paco), **tensors)
        record.events.append(event)

    class RecordedPaCo(PaCo):
        def __init__(self, *args):
            super().__init__(*args)
            record.paco = self

        def keys(self, x):
            before = copied(self)
            keys = super().keys(x)
            add("keys", before, keys=keys)
            return keys

        def enqueue(self, keys, labels):
            before = copied(self)
            super().enqueue(keys, labels)
            add("enqueue", before, keys=keys, labels=labels)

    class RecordedLoss(PaCoLoss):
        def forward(self, logits, v, target, bank, labels):
            add("loss", copied(record.paco), v=v, target=target, bank=bank, labels=labels)
            return super().forward(logits, v, target, bank, labels)

    def train(*flags):
        monkeypatch.setattr(losses, "PaCo", RecordedPaCo)
        monkeypatch.setattr(losses, "PaCoLoss", RecordedLoss)
        g = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (24, 3, 16, 16), generator=g, dtype=torch.uint8)
        y = torch.randint(4, (24,), generator=g)
        groups = {"head": [0], "mid": [1], "tail": [2, 3]}
        data = data_lt.LongTailData("x", "x", pixels, y, pixels, y, list("abcd"),
                                    y.bincount().tolist(), groups)
        rt = Runtime(torch.device("cpu"))
        args = train_teacher.parse(["--dataset", "cifar10", "--loss", "paco", "--recipe", "cpu",
                                    "--img-size", "16", *flags])
        train_teacher.resolve(args, rt)
        run = SimpleNamespace(
            start_epoch=0, start=lambda *args: None, begin_epoch=lambda epoch: None,
            remaining_steps=lambda epoch, batches: enumerate(batches),
            after_step=lambda *args: None, after_epoch=lambda *args, **more: None)
        train_teacher.train(args, data, PooledNet(args.img_size), rt, run)
        return record.paco, record.events
    return train


def is_statistic(name):
    return "running" in name or "tracked" in name


def weights_of(state, starts):
    """The parameters in a state whose names start so."""
    return {k: t for k, t in state.items() if k.startswith(starts) and not is_statistic(k)}


def statistics_of(state, starts):
    """BatchNorm's statistics in a state."""
    return {k: t for k, t in state.items() if k.startswith(starts) and is_statistic(k)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def batches_seen(statistics):
    return {int(tensor) for name, tensor in statistics.items() if "tracked" in name}


QUERY, KEY = ("net.", "projection."), ("key_net.", "key_projection.")


@pytest.mark.parametrize("rho", [0.5, 0.0])
def test_a_step_takes_keys_once_and_gives_both_passes_of_sam_the_same(recorded_training, rho):
    """Keys, queue or BatchNorm statistics that move twice a step, between the passes, or from
    w + e instead of from w."""
    flags = "--epochs 2 --batch 8 --queue 13 --projection 3 --key-momentum 0.9 --lr 0.1".split()
    paco, events = recorded_training("--rho", str(rho), *flags)
    names = ["keys", *["loss"] * (2 if rho else 1), "enqueue"]
    assert [event.name for event in events] == names * 6                # 2 epochs of 24 / 8 steps
    steps = [events[i:i + len(names)] for i in range(0, len(events), len(names))]
    rows, labels, earlier = torch.zeros(13, 3), torch.full((13,), -1), None
    for number, (keys, *passes, enqueue) in enumerate(steps, start=1):
        w = weights_of(keys.before, QUERY)
        if earlier:                     # nothing moves between steps
            assert same(weights_of(earlier, KEY), weights_of(keys.before, KEY))
            assert same(weights_of(earlier, QUERY), w)
        for name, moved in weights_of(keys.after, KEY).items():         # the key encoder follows w
            by_hand = 0.9 * keys.before[name].double() + 0.1 * w[name.removeprefix("key_")].double()
            torch.testing.assert_close(moved.double(), by_hand, rtol=1e-6, atol=1e-7)
        for event in (*passes, enqueue):                                # once
            assert same(weights_of(event.after, KEY), weights_of(keys.after, KEY))
            assert same(statistics_of(event.after, KEY), statistics_of(keys.after, KEY))
        assert batches_seen(statistics_of(keys.after, KEY)) == {number}

        first = passes[0]
        for event in passes:                                            # the same keys and queue
            assert torch.equal(event.bank, torch.cat([event.v, keys.keys, rows]))
            assert torch.equal(event.target, first.target)
            assert torch.equal(event.labels, torch.cat([event.target, event.target, labels]))
            assert same(statistics_of(event.after, QUERY), statistics_of(first.after, QUERY))
        assert same(weights_of(first.after, QUERY), w)
        moved, before = statistics_of(first.after, QUERY), statistics_of(keys.before, QUERY)
        assert not any(torch.equal(moved[k], before[k]) for k in moved)    # by the first pass alone
        assert batches_seen(moved) == {number}
        if rho:
            perturbed = weights_of(passes[1].after, QUERY)
            e = torch.cat([(perturbed[k] - w[k]).flatten() for k in w])
            assert e.norm().item() == pytest.approx(rho, rel=1e-4)
            assert not torch.equal(first.v, passes[1].v)

        assert torch.equal(enqueue.before["queue"], rows) and torch.equal(enqueue.keys, keys.keys)
        rows = torch.cat([keys.keys, rows])[:13]
        labels = torch.cat([first.target, labels])[:13]
        assert torch.equal(enqueue.after["queue"], rows)
        assert torch.equal(enqueue.after["queue_labels"], labels)
        earlier = enqueue.after
    assert same(statistics_of(paco.state_dict(), QUERY), statistics_of(earlier, QUERY))
    assert all(p.grad is None for m in (paco.key_net, paco.key_projection) for p in m.parameters())
