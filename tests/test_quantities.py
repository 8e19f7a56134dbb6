"""What the figures measure: definitions on cases with a known answer."""
import math

import pytest
import torch
import torch.nn.functional as F

from analysis import quantities
from sam import SAM
from vit import MODELS


# ---- Attention -----------------------------------------------------------------------------------

def test_rollout_of_known_attentions():
    """The residual's half, the order of the product, the mean over heads: by hand."""
    eye = torch.eye(3).expand(1, 2, 3, 3)
    uniform = torch.full((1, 2, 3, 3), 1 / 3)
    assert torch.allclose(quantities.attention_rollout([eye, eye]), torch.eye(3)[None])
    halves = (torch.eye(3) + 1 / 3)[None] / 2
    assert torch.allclose(quantities.attention_rollout([uniform]), halves)
    first = torch.tensor([[0.5, 0.5], [0.0, 1.0]]).expand(1, 1, 2, 2)
    second = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 2, 2)
    # (A1 + I)/2 = [.75 .25; 0 1], (A2 + I)/2 = [1 0; .25 .75]; their product A2 A1:
    expected = torch.tensor([[0.75, 0.25], [0.1875, 0.8125]])
    assert torch.allclose(quantities.attention_rollout([first, second])[0], expected)
    heads = torch.stack([torch.eye(2), torch.eye(2).flip(0)])[None]     # on average 1/2 everywhere
    expected = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    assert torch.allclose(quantities.attention_rollout([heads])[0], expected)


def test_token_maps_lay_each_tokens_row_over_the_image():
    """CLS and DIST taken for patches, or rows and columns of the image exchanged."""
    net = MODELS["micro"](img_size=24, patch_size=8)
    look = torch.eye(11).expand(1, 1, 11, 11).clone()
    look[0, 0, 1] = F.one_hot(torch.tensor(2 + 2), 11).float()  # DIST: third patch of the first row
    net.forward_features = lambda images, return_attention: (None, [look])
    maps = quantities.token_maps(net, torch.zeros(1, 3, 24, 24))
    expected = torch.zeros(1, 3, 3)
    expected[0, 0, 2] = 0.5
    assert torch.equal(maps["dist"], expected) and maps["cls"].abs().max() == 0


def test_effective_patches_counts_them():
    """A sum for a mean, or a map that is not normalised: k equal patches are k, at any scale."""
    maps = torch.zeros(3, 2, 2)
    maps[0], maps[1, 0], maps[2, 1, 1] = 0.1, 7.0, 0.3
    assert torch.allclose(quantities.effective_patches(maps), torch.tensor([4.0, 2.0, 1.0]))


def test_cover_greys_the_patches_that_are_marked_most():
    """The least marked covered, or a transposed mask: of four patches the upper right one is."""
    images = torch.rand(2, 3, 4, 4)
    maps = torch.tensor([[[0.1, 0.9], [0.2, 0.3]]]).expand(2, 2, 2)
    covered = quantities.cover(images, maps, fraction=0.25)
    mean = images.mean(dim=(2, 3))[..., None, None].expand(2, 3, 2, 2)
    assert torch.equal(covered[:, :, :2, 2:], mean)
    assert torch.equal(covered[:, :, 2:], images[:, :, 2:])
    assert torch.equal(covered[:, :, :2, :2], images[:, :, :2, :2])


def test_attention_distance_of_known_attentions():
    """Patches for pixels, leading tokens kept, rows not rescaled, heads averaged away."""
    N = 196
    even, itself = torch.full((1, 1, N, N), 1 / N), torch.eye(N).expand(1, 1, N, N)
    both = torch.cat([even, itself], dim=1)                     # two heads
    distance = quantities.attention_distance(both, G=14, P=16)
    assert distance.tolist() == pytest.approx([116.5, 0.0], abs=0.05)
    # 2 x 2 patches of 8 px behind CLS and DIST. Patch 0 gives half of its attention to CLS, a
    # quarter to itself and to its right neighbour, 8 px away: 4 px. Patch 3 looks at patch 0,
    # 8 sqrt 2 px away; patches 1 and 2 at themselves. Mean of the four.
    a = torch.eye(6).view(1, 1, 6, 6).clone()
    a[0, 0, 2] = torch.tensor([0.5, 0, 0.25, 0.25, 0, 0])
    a[0, 0, 5] = torch.tensor([0, 0, 1.0, 0, 0, 0])
    expected = (4 + 8 * math.sqrt(2)) / 4
    assert quantities.attention_distance(a, G=2, P=8).item() == pytest.approx(expected, rel=1e-6)
    distances = quantities.patch_distances(2, 8)[0].tolist()
    assert distances == pytest.approx([0, 8, 8, 8 * math.sqrt(2)])


# ---- Features ------------------------------------------------------------------------------------

def orthonormal(n, d, seed=0):
    """d orthonormal columns (n,d), orthogonal to ones too: subtracting a mean changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d + 1, generator=generator, dtype=torch.float64)
    x[:, 0] = 1
    return torch.linalg.qr(x).Q[:, 1:]


def test_rank_and_reconstruction_error_of_a_matrix_with_known_singular_values():
    """Singular values not squared, the share of 99 % off by one, the wrong mean subtracted.

    Squares 60, 30, 9.5, 0.5: 99.5 % in three directions, 90 in two. Unsquared, it would take four.
    """
    squares = torch.tensor([60.0, 30.0, 9.5, 0.5], dtype=torch.float64)
    X = orthonormal(50, 4) * squares.sqrt() @ orthonormal(20, 4, seed=1).T      # (50,20)
    error = quantities.reconstruction_error(X)
    assert error[:5].tolist() == pytest.approx([1, 0.4, 0.1, 0.005, 0], abs=1e-9)
    assert len(error) == 21 and quantities.feature_rank(X) == 3
    assert quantities.feature_rank(X, kept=0.5) == 1
    assert quantities.feature_rank(X, kept=0.9999) == 4
    # a constant per row is subtracted, a common vector is not; a constant image has no direction
    assert quantities.feature_rank(X + torch.arange(50.0)[:, None]) == 3
    assert quantities.feature_rank(0 * X + orthonormal(20, 1)[:, 0]) == 1
    assert quantities.feature_rank(0 * X + 5) == 0


def test_block_tokens_are_the_residual_stream():
    """Wrong tokens, blocks in another order, hooks that stay: normed, the last give the logits."""
    net = MODELS["micro"](img_size=32, patch_size=8, num_classes=10).eval()
    x = torch.rand(2, 3, 32, 32)
    tokens = quantities.block_tokens(net, x)
    assert tokens.shape == (6, 2, 2, 96)                        # blocks, images, tokens, features
    assert torch.allclose(net.head_dist(net.norm(tokens[-1])[:, 1]), net(x)[1], atol=1e-5)
    leading = [net.cls_token.expand(2, -1, -1), net.dist_token.expand(2, -1, -1)]
    patches = net.patch_embed((x - net.mean) / net.std).flatten(2).mT   # (2,16,96)
    first = net.blocks[0](torch.cat([*leading, patches], dim=1) + net.pos_embed)
    assert torch.allclose(tokens[0], first[:, :2], atol=1e-5)
    assert not any(block._forward_hooks for block in net.blocks)


# ---- Weights -------------------------------------------------------------------------------------

def bowl():
    """(loss, parameters): 1/2 sum h_i w_i^2 with h = (1, 4, 9), at w = (2; 1, 0), two tensors."""
    a, b = (torch.tensor(values, dtype=torch.float64, requires_grad=True)
            for values in ([2.0], [1.0, 0.0]))

    def loss():
        return 0.5 * (a.square().sum() + 4 * b[0] ** 2 + 9 * b[1] ** 2)
    return loss, [a, b]


def test_the_loss_around_a_bowl_is_its_gradient_and_hessian():
    """Steps that add up instead of starting from w, or a weight that is not put back.

    L(w + r d) = L(w) + r g.d + r^2/2 d.Hd = 4 + r 0.6 * 2 + r^2/2 (0.36 + 0.64 * 9), with
    d = (0.6; 0, 0.8).
    """
    loss, params = bowl()
    before = [p.detach().clone() for p in params]
    d = [torch.tensor([0.6], dtype=torch.float64), torch.tensor([0.0, 0.8], dtype=torch.float64)]
    losses = quantities.loss_along(loss, params, d, [0, 0.1, 1, 0])
    assert losses.tolist() == pytest.approx([4 + 1.2 * r + 3.06 * r * r for r in (0, 0.1, 1, 0)])
    assert all(torch.equal(p, b) for p, b in zip(params, before))


def test_the_gradient_direction_is_the_one_that_sam_climbs():
    """A norm per parameter, or parts of the loss that replace each other: g = (2; 4, 0)."""
    loss, params = bowl()
    direction = quantities.gradient_direction((loss() / 2 for _ in range(2)), params)
    expected = [2 / math.sqrt(20), 4 / math.sqrt(20), 0]
    assert torch.cat(direction).tolist() == pytest.approx(expected)
    before = [p.detach().clone() for p in params]
    climber = SAM(torch.optim.SGD(params, lr=1.0), rho=0.3)
    loss().backward()
    climber.first_step()
    for p, b, d in zip(params, before, direction):
        assert torch.allclose(p.detach(), b + 0.3 * d)


def test_random_directions_are_as_long_as_the_filters():
    """One length for the whole tensor, or biases that move."""
    torch.manual_seed(0)
    scales = torch.tensor([0.1, 1, 10, 100]).view(4, 1, 1, 1)
    w, bias = torch.randn(4, 3, 5, 5) * scales, torch.randn(4)
    d, moved = quantities.random_direction([w, bias])
    assert torch.allclose(d.flatten(1).norm(dim=1), w.flatten(1).norm(dim=1)) and not moved.any()
    assert F.cosine_similarity(d.flatten(1), w.flatten(1)).abs().max() < 0.5
    together = torch.cat([w.flatten(), bias]).norm().item()
    assert quantities.norm([w, bias]).item() == pytest.approx(together)


# ---- Predictions ---------------------------------------------------------------------------------

def test_a_balanced_head_is_the_likelihood_of_bayes_rule():
    """The prior added: p(y|x) = p(x|y) pi_y / p(x), so CLS - ln pi is ln p(x|y) + a constant."""
    torch.manual_seed(0)
    likelihood, counts = torch.rand(6, 3, dtype=torch.double), [70, 20, 10]
    prior = torch.tensor([0.7, 0.2, 0.1])
    cls = (likelihood * prior).log() + torch.randn(6, 1, dtype=torch.double)
    scores = quantities.combinations(cls, torch.zeros(6, 3), counts)
    right = likelihood / likelihood.sum(dim=1, keepdim=True)
    torch.testing.assert_close(scores["balanced CLS"].softmax(dim=1), right)
    torch.testing.assert_close(scores["balanced CLS + DIST, logits"].softmax(dim=1), right)
    torch.testing.assert_close(scores["balanced CLS + DIST, probabilities"], right + 1 / 3)


def test_heads_are_combined_as_their_names_say():
    """Of a loud CLS and a quiet DIST: logits follow the loud one, equal spread does not."""
    cls, dist = torch.tensor([[30.0, 0.0, 29.0]]), torch.tensor([[-2.0, 1.0, 3.0]])
    scores = quantities.combinations(cls, dist, [1, 1, 1])
    expected = torch.tensor([[28.0, 1, 32]], dtype=torch.double)
    torch.testing.assert_close(scores["CLS + DIST, logits"], expected)
    louder = quantities.combinations(100 * cls, dist, [1, 1, 1])["CLS + DIST, equal spread"]
    torch.testing.assert_close(scores["CLS + DIST, equal spread"], louder)
    probabilities = scores["CLS + DIST, probabilities"]
    assert 0 < probabilities.min() and probabilities.sum() == pytest.approx(2)
    unchanged = scores["balanced CLS"].softmax(dim=1)           # equal counts: nothing to balance
    torch.testing.assert_close(unchanged, cls.double().softmax(dim=1))
    adjusted = quantities.combinations(cls, dist, None)         # by its loss, so not once more
    assert set(adjusted) == {name for name in scores if "balanced" not in name}
    assert all(torch.equal(value, scores[name]) for name, value in adjusted.items())


# ---- Uncertainty ---------------------------------------------------------------------------------

def test_the_calibration_error_is_that_of_a_loop_over_its_bins():
    """An image in another bin; the gap of a bin's means, not weighted by the bin's images."""
    generator = torch.Generator().manual_seed(0)
    confidence, coin = torch.rand(2, 200, generator=generator)
    right, expected = coin < confidence ** 2, 0
    for k in range(15):
        own = [(p, hit) for p, hit in zip(confidence.tolist(), right.tolist())
               if k / 15 <= p < (k + 1) / 15]
        expected += abs(sum(hit for _, hit in own) - sum(p for p, _ in own)) / 200
    assert quantities.calibration_error(confidence, right) == pytest.approx(expected, abs=1e-9)
    assert sum(n for n, _, _ in quantities.reliability(confidence, right)) == 200


def test_overall_scatters_as_the_binomial():
    """Resampled labels (too wide), other percentiles: n images scatter by sqrt(p (1 - p) / n)."""
    labels = torch.arange(4).repeat_interleave(torch.tensor([400, 400, 1000, 0]))
    answers = torch.full((1800,), -1)
    answers[:200], answers[400:800], answers[800:900] = 0, 1, 2         # 50 %, 100 %, 10 %
    shuffled = torch.randperm(1800, generator=torch.Generator().manual_seed(0))
    low, high = quantities.bootstrap(answers[shuffled], labels[shuffled],
                                     {"head": [0], "mid": [1, 3], "tail": [2]})
    for name, p, n in (("head", 0.5, 400), ("tail", 0.1, 1000)):         # one class each
        half = 100 * 1.96 * (p * (1 - p) / n) ** 0.5
        assert low[name] == pytest.approx(100 * p - half, abs=0.7)
        assert high[name] == pytest.approx(100 * p + half, abs=0.7)
    assert (low["mid"], high["mid"]) == quantities.wilson(400, 400)     # not 100 to 100
    assert low["overall"] < 100 * 700 / 1800 < high["overall"]
    width = 2 * 1.96 * (400 * 0.25 + 1000 * 0.09) ** 0.5        # in images
    assert (high["overall"] - low["overall"]) / 100 * 1800 == pytest.approx(width, rel=0.1)


def test_means_over_classes_scatter_with_classes_and_images():
    """Images only, which for a few classes of many images is far too sure; classes only; the F1 of
    other answers than those that were drawn.

    C classes of n images: variance (variance of p between classes + mean of p (1 - p) / n) / C.
    """
    n = 10
    p = torch.tensor([0.2, 0.5, 0.9] * 10)                              # of 30 classes
    labels = torch.arange(30).repeat_interleave(n)
    right = torch.arange(30 * n) % n < (p * n).round().long().repeat_interleave(n)
    answers = torch.where(right, labels, -1)                            # -1: precision is 1
    low, high = quantities.bootstrap(answers, labels, {"head": [*range(30)], "tail": []})
    variance = (p.var(unbiased=False) + (p * (1 - p)).mean() / n) / 30
    assert high["balanced"] - low["balanced"] == pytest.approx(
        200 * 1.96 * variance.item() ** 0.5, rel=0.1)
    assert high["head"] - low["head"] == pytest.approx(high["balanced"] - low["balanced"], rel=0.1)
    f1 = (2 * p / (1 + p)).mean().item() * 100
    assert low["macro_f1"] < f1 < high["macro_f1"] and "tail" not in low
    assert high["overall"] - low["overall"] == pytest.approx(
        200 * 1.96 * ((p * (1 - p)).mean().item() / 300) ** 0.5, rel=0.1)


@pytest.mark.parametrize("right, total, low, high", [
    (2, 3, 20.77, 93.85), (0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0), (50, 100, 40.38, 59.62)])
def test_wilsons_interval(right, total, low, high):
    """The normal interval, which for 0 of 10 is 0 to 0. Solved from |p - q| = z sqrt(q (1 - q) / n)
    for the ends q, by bisection."""
    found = quantities.wilson(right, total)
    assert found == pytest.approx((low, high), abs=0.01)
    for q in (found[0] / 100, found[1] / 100):
        distance = abs(right / total - q)
        assert distance == pytest.approx(1.96 * (q * (1 - q) / total) ** 0.5, abs=1e-6)
    assert all(math.isnan(end) for end in quantities.wilson(0, 0))


def test_a_group_without_test_images_has_no_range():
    """NaN, or an empty group that ends the evaluation."""
    low, high = quantities.bootstrap(torch.tensor([0, -1]), torch.tensor([0, 0]),
                                     {"head": [0], "tail": [1]})
    assert set(low) == set(high) == {"overall", "balanced", "macro_f1", "head"}
