"""losses.py against published numbers, against each formula written as a loop in float64, and by finite differences."""
import math

import pytest
import torch
from torch.autograd import gradcheck

from losses import (LDAMLoss, VSLoss, class_balanced_weights, distillation_loss, drw_weights, focal_loss, soft_cross_entropy,
                    soft_distillation, weighted_cross_entropy)

C10_100 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
C10_50 = [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]
C100_100 = [int(500 * 0.01 ** (c / 99)) for c in range(100)]
C100_50 = [int(500 * 0.02 ** (c / 99)) for c in range(100)]


def randn(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGITS, OTHER = randn(4, 3, seed=1), randn(4, 3, seed=2)                  # B = 4, K = 3
LABELS, TEACHER = torch.tensor([2, 0, 0, 1]), torch.tensor([1, 1, 0, 2])
SOFT = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5], [0.4, 0.0, 0.6]], dtype=torch.float64)
WEIGHT = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)


def log_softmax(row):
    """One row of logits -> list, in Python's float64."""
    row = torch.as_tensor(row).tolist()
    return [v - math.log(sum(math.exp(u) for u in row)) for v in row]


def looped_cross_entropy(logits, labels, weight):
    """sum_i w[t_i] * -log p_i[t_i] / sum_i w[t_i]"""
    pairs = [(float(weight[t]), -log_softmax(row)[t]) for row, t in zip(logits, labels.tolist())]
    return sum(w * loss for w, loss in pairs) / sum(w for w, _ in pairs)


# ---- class weights ----

@pytest.mark.parametrize("counts, published", [
    (C10_100, dict(enumerate([.0506, .0769, .1211, .1950, .3188, .5246, .8683, 1.4426, 2.4092, 3.9927]))),
    (C10_50, dict(enumerate([.0890, .1267, .1853, .2761, .4168, .6344, .9695, 1.4894, 2.2923, 3.5206]))),
    (C100_100, {0: .0449, 35: .2244, 70: 1.1530, 99: 4.3783}),
    (C100_50, {0: .0789, 99: 3.8494})])
def test_class_balanced_weights_are_the_published_ones(counts, published):
    """Another beta, 1 / n instead of 1 / E, a missing normalisation, float32 inside (which shifts the fourth digit)."""
    assert sum(counts) in (12_406, 13_996, 10_847, 12_608)                # the counts above are the protocol's
    weights = class_balanced_weights(counts)
    assert weights.shape == (len(counts),) and weights.dtype == torch.float32
    for k, w in published.items():
        assert weights[k].item() == pytest.approx(w, abs=6e-5)            # printed with four decimals


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.9999])
def test_class_balanced_weights_are_their_formula_and_sum_to_K(beta):
    """A sum of 1 or a mean of w over images; the sum of a geometric series, n terms, is the independent route to E_k."""
    counts = [40, 7, 3, 1]
    weights = class_balanced_weights(torch.tensor(counts), beta)
    effective = [sum(beta ** i for i in range(n)) for n in counts]        # (1 - beta^n) / (1 - beta) = 1 + beta + beta^2 + ...
    expected = [4 / e / sum(1 / f for f in effective) for e in effective]
    assert weights.tolist() == pytest.approx(expected, rel=1e-6) and weights.sum().item() == pytest.approx(4)


def test_beta_0_gives_ones():
    """0^n is 0: before the switch the published schedule uses beta = 0 and expects no weighting at all."""
    assert class_balanced_weights(C10_100, beta=0).tolist() == pytest.approx([1] * 10)


def test_drw_switches_exactly_at_its_epoch():
    """Off by one epoch, or an always-on weighting. Epochs count from 0."""
    assert drw_weights(C10_100, 0, 1100) is None and drw_weights(C10_100, 1099, 1100) is None
    for epoch in (1100, 1101, 1199):
        assert torch.equal(drw_weights(C10_100, epoch, 1100), class_balanced_weights(C10_100))
    assert torch.equal(drw_weights(C10_100, 5, 5, beta=0.9), class_balanced_weights(C10_100, beta=0.9))


# ---- cross-entropy and distillation ----

def test_soft_cross_entropy_is_its_formula():
    """A sum or a mean over classes instead of a mean over images."""
    expected = sum(-t * lp for row, target in zip(LOGITS, SOFT.tolist()) for t, lp in zip(target, log_softmax(row))) / 4
    assert soft_cross_entropy(LOGITS, SOFT).item() == pytest.approx(expected, abs=1e-12)


def test_class_numbers_stand_for_their_one_hot_rows():
    """Two code paths that disagree: mixing off would change the loss."""
    onehot = torch.eye(3, dtype=torch.float64)[LABELS]
    torch.testing.assert_close(soft_cross_entropy(LOGITS, LABELS), soft_cross_entropy(LOGITS, onehot), rtol=0, atol=1e-12)


def test_loss_of_a_perfect_student_is_the_entropy_of_its_targets():
    """The known minimum, with no gradient left: p = target. For hard labels it is 0."""
    target = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]], dtype=torch.float64)
    logits = target.log().requires_grad_()
    loss = soft_cross_entropy(logits, target)
    loss.backward()
    entropy = (1.5 * math.log(2) + 0.8 * math.log(1.25) + 0.2 * math.log(10)) / 2
    assert loss.item() == pytest.approx(entropy, abs=1e-12) and logits.grad.abs().max() < 1e-12
    assert weighted_cross_entropy(100 * torch.eye(3)[TEACHER], TEACHER).item() < 1e-30


def test_weighted_mean_divides_by_the_sum_of_weights():
    """On paper: p of the label is 3/4 with w = 3 and 1/2 with w = 1, so (3 ln(4/3) + ln 2) / 4; not / 2."""
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], dtype=torch.float64)
    weight = torch.tensor([3.0, 1.0], dtype=torch.float64)
    loss = weighted_cross_entropy(logits, torch.tensor([0, 1]), weight)
    assert loss.item() == pytest.approx((3 * math.log(4 / 3) + math.log(2)) / 4, abs=1e-12)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_weighted_cross_entropy_is_its_formula(weight):
    """Weights of the wrong class, ignored, or that do anything when they are None or all equal."""
    expected = looped_cross_entropy(LOGITS, TEACHER, [1, 1, 1] if weight is None else weight)
    assert weighted_cross_entropy(LOGITS, TEACHER, weight).item() == pytest.approx(expected, abs=1e-12)
    equal = torch.full((3,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(weighted_cross_entropy(LOGITS, TEACHER, equal), weighted_cross_entropy(LOGITS, TEACHER))


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation_is_deits(tau):
    """KL the other way round, a missing tau^2, division by B instead of by B * K."""
    expected = 0.0
    for s, t in zip(LOGITS / tau, OTHER / tau):
        q, p = log_softmax(s), log_softmax(t)
        expected += sum(math.exp(p[k]) * (p[k] - q[k]) for k in range(3))
    expected *= tau ** 2 / (4 * 3)
    assert soft_distillation(LOGITS, OTHER, tau).item() == pytest.approx(expected, abs=1e-12)


def test_soft_distillation_of_equals_is_0_and_of_others_is_not():
    """Cross-entropy in place of KL. A constant added to a row of logits is the same distribution."""
    assert soft_distillation(LOGITS, LOGITS + 5, tau=2.0).item() == pytest.approx(0, abs=1e-12)
    assert soft_distillation(LOGITS, OTHER).item() > 0.1


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("target", [LABELS, SOFT])
def test_total_is_1_minus_alpha_labels_plus_alpha_teacher(alpha, target):
    """alpha on the wrong term, heads or labels swapped, class weights on the label term."""
    loss, cls, dist = distillation_loss(LOGITS, OTHER, target, TEACHER, alpha=alpha, weight=WEIGHT)
    onehot = target if target.dim() == 2 else torch.eye(3)[target]
    expected_cls = sum(-t * lp for row, rows in zip(LOGITS, onehot.tolist()) for t, lp in zip(rows, log_softmax(row))) / 4
    expected_dist = looped_cross_entropy(OTHER, TEACHER, WEIGHT)
    assert cls.item() == pytest.approx(expected_cls, abs=1e-12) and dist.item() == pytest.approx(expected_dist, abs=1e-12)
    assert loss.item() == pytest.approx((1 - alpha) * expected_cls + alpha * expected_dist, abs=1e-12)


def test_default_is_deits_half_and_half_without_weights():
    """Another default alpha, or a default weighting."""
    loss = distillation_loss(LOGITS, OTHER, LABELS, TEACHER)[0]
    expected = (looped_cross_entropy(LOGITS, LABELS, [1] * 3) + looped_cross_entropy(OTHER, TEACHER, [1] * 3)) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_each_head_gets_the_gradient_of_its_own_term():
    """softmax minus target, worked out on paper: (1 - alpha)(p - y) / B for CLS, alpha w[y_t] (p - e_t) / sum w for DIST."""
    cls, dist = LOGITS.clone().requires_grad_(), OTHER.clone().requires_grad_()
    distillation_loss(cls, dist, SOFT, TEACHER, alpha=0.3, weight=WEIGHT)[0].backward()
    w = WEIGHT[TEACHER][:, None]
    torch.testing.assert_close(cls.grad, 0.7 * (LOGITS.softmax(1) - SOFT) / 4, rtol=0, atol=1e-12)
    torch.testing.assert_close(dist.grad, 0.3 * w * (OTHER.softmax(1) - torch.eye(3)[TEACHER]) / w.sum(), rtol=0, atol=1e-12)


# ---- LDAM ----

def test_ldam_margins_are_the_published_ones():
    """Another power than 1/4, or m_max given to the commonest class. Counts n and 16 n: margins 1 : 1/2."""
    published = [.158, .180, .204, .232, .264, .300, .341, .387, .440, .500]
    assert LDAMLoss(C10_100).margins.tolist() == pytest.approx(published, abs=6e-4)          # printed with three decimals
    assert LDAMLoss([160, 10], max_margin=0.3).margins.tolist() == pytest.approx([0.15, 0.3])
    assert LDAMLoss([10, 160], max_margin=0.3).margins.tolist() == pytest.approx([0.3, 0.15])


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_ldam_is_its_formula(weight):
    """A margin of every class instead of the label's, without the scale, added instead of taken away, or applied twice."""
    counts, s = [160, 10, 30], 20.0
    margins = [0.3 * (10 / n) ** 0.25 for n in counts]
    shifted = (LOGITS * 5).clone()
    for i, t in enumerate(LABELS.tolist()):
        shifted[i, t] -= s * margins[t]
    expected = looped_cross_entropy(shifted, LABELS, [1, 1, 1] if weight is None else weight)
    loss = LDAMLoss(counts, max_margin=0.3, scale=s)(LOGITS * 5, LABELS, weight)
    assert loss.item() == pytest.approx(expected, abs=1e-5)               # the margins are kept in float32


def test_ldam_defaults_and_a_margin_on_paper():
    """Two classes of 50 images, m = 1/2, s = 30: a lead of exactly 15 is just enough, and costs ln 2."""
    loss = LDAMLoss([50, 50])
    assert loss(torch.tensor([[15.0, 0.0]]), torch.tensor([0])).item() == pytest.approx(math.log(2))
    assert loss(torch.tensor([[15.0, 0.0]]), torch.tensor([1])).item() == pytest.approx(30)


# ---- precision and gradients ----

LOSSES = {
    "soft_cross_entropy": lambda z: soft_cross_entropy(z, SOFT.to(z)),
    "soft_cross_entropy, class numbers": lambda z: soft_cross_entropy(z, LABELS),
    "weighted_cross_entropy": lambda z: weighted_cross_entropy(z, TEACHER, WEIGHT.to(z)),
    "soft_distillation, student": lambda z: soft_distillation(z, OTHER.to(z), tau=2.0),
    "soft_distillation, teacher": lambda z: soft_distillation(OTHER.to(z), z, tau=2.0),
    "distillation_loss": lambda z: distillation_loss(z, z.flip(0), SOFT.to(z), TEACHER, weight=WEIGHT.to(z))[0],
    "ldam": lambda z: LDAMLoss([160, 10, 30], scale=5.0)(z, LABELS, WEIGHT.to(z)),
    "vector scaling": lambda z: VSLoss([160, 10, 30])(z, LABELS, WEIGHT.to(z)),
    "focal": lambda z: focal_loss(z, LABELS, WEIGHT.to(z), gamma=2.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    """A term that is detached or computed in float32 although its logits are float64."""
    assert gradcheck(LOSSES[name], LOGITS.clone().requires_grad_())


HALF_LOSSES = {                                                           # as in a step under autocast: only logits are half
    "soft_cross_entropy": lambda z: soft_cross_entropy(z, SOFT.float()),
    "weighted_cross_entropy": lambda z: weighted_cross_entropy(z, TEACHER, WEIGHT.float()),
    "soft_distillation": lambda z: soft_distillation(z, z.flip(0), tau=2.0),
    "distillation_loss": lambda z: distillation_loss(z, z.flip(0), SOFT.float(), TEACHER, weight=WEIGHT.float())[0],
    "ldam": lambda z: LDAMLoss([160, 10, 30], scale=5.0)(z, LABELS, WEIGHT.float()),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", HALF_LOSSES)
def test_half_precision_logits_are_computed_in_float32(name, autocast, dtype):
    """A softmax in 8 bits. The loss of half logits must be that of the same numbers in float32, to the last bit."""
    logits = (20 * LOGITS).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = HALF_LOSSES[name](logits)
    assert loss.dtype == torch.float32 and torch.equal(loss, HALF_LOSSES[name](logits.float()))
    assert loss.to(dtype).float() != loss                                 # half precision could not even hold it


def test_ldam_margins_follow_the_loss_to_its_device():
    """Margins left behind on the CPU when the loss moves: they are a buffer, not a plain attribute."""
    assert LDAMLoss(C10_100).to("meta").margins.is_meta


# ---- vector scaling, logit adjustment, focal -----------------------------------------------------------------------------

def softmax_loss(z, y):
    return math.log(sum(math.exp(v) for v in z)) - z[y]


@pytest.mark.parametrize("gamma, tau", [(0.3, 1.0), (0.0, 1.0), (0.0, 0.0)])
def test_vector_scaling_equals_its_formula(gamma, tau):
    """CE(z_k / (n_max/n_k)^gamma + tau ln pi_k); a prior added with the wrong sign, or counts for frequencies, would differ."""
    counts, labels, w = [100, 20, 4], [0, 2, 1, 2], [0.5, 1.0, 1.5]
    z = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = weights = 0.0
    for row, y in zip(z.tolist(), labels):
        shifted = [v / (100 / n) ** gamma + tau * math.log(n / 124) for v, n in zip(row, counts)]
        total, weights = total + w[y] * softmax_loss(shifted, y), weights + w[y]
    loss = VSLoss(counts, gamma, tau)(z, torch.tensor(labels), torch.tensor(w, dtype=torch.float64))
    assert loss.item() == pytest.approx(total / weights, rel=1e-6)


def test_focal_loss_equals_its_formula_with_the_weight_inside_the_exponent():
    z = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels, w = [0, 2, 1, 2], [0.5, 1.0, 1.5]
    each = [w[y] * softmax_loss(row, y) for row, y in zip(z.tolist(), labels)]
    expected = sum((1 - math.exp(-l)) ** 2 * l for l in each) / 4
    loss = focal_loss(z, torch.tensor(labels), torch.tensor(w, dtype=torch.float64), gamma=2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert focal_loss(z, torch.tensor(labels), gamma=0.0).item() == pytest.approx(
        sum(softmax_loss(row, y) for row, y in zip(z.tolist(), labels)) / 4)              # gamma = 0: cross-entropy
