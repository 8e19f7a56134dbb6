"""sam.py against steps done on paper, SGD and backpropagation written in NumPy, and itself
interrupted or split."""
import copy
import io
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from sam import SAM, frozen_batchnorm_statistics


def small_net(batchnorm=True, dtype=torch.float32):
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(8) if batchnorm else nn.Tanh()
    return nn.Sequential(nn.Linear(6, 8), middle, nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def batches(n, dtype=torch.float32, size=12):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 6, generator=g, dtype=dtype),
             torch.randint(3, (size,), generator=g)) for _ in range(n)]


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=0.05)


def sam_step(model, sam, x, y):
    F.cross_entropy(model(x), y).backward()
    sam.first_step()
    with frozen_batchnorm_statistics(model):
        F.cross_entropy(model(x), y).backward()
    sam.second_step()


def snapshot(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- the step itself ----

def test_one_step_on_a_quadratic_by_hand():
    """L = (3 a^2 + 4 b^2) / 2 at (1, 1): g = (3, 4), ||g|| = 5, rho = 1/2 climbs to (1.3, 1.4),
    where g = (3.9, 5.6). Catches a step along g itself, one norm per tensor, a base step from w
    + e, or one with the first gradient."""
    a, b = (nn.Parameter(torch.tensor(1.0, dtype=torch.float64)) for _ in range(2))
    sam = SAM(torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1), rho=0.5)
    ((3 * a ** 2 + 4 * b ** 2) / 2).backward()
    assert sam.first_step().item() == pytest.approx(5)
    assert (a.item(), b.item()) == pytest.approx((1.3, 1.4), abs=1e-12)
    assert a.grad is None and b.grad is None
    ((3 * a ** 2 + 4 * b ** 2) / 2).backward()
    sam.second_step()
    assert (a.item(), b.item()) == pytest.approx((1 - 0.39, 1 - 0.56), abs=1e-12)
    assert a.grad is None and b.grad is None


def test_training_a_network_equals_sam_written_in_numpy():
    """Momentum or weight decay that act at w + e, in e, or twice. Backpropagation, SAM and SGD
    here are all by hand."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 4)), rng.normal(size=(7, 2))
    shapes = [(5, 4), (5,), (2, 5), (2,)]
    w = [rng.normal(size=s) for s in shapes]

    def gradient(w):
        """L = |o - y|^2 / (2 B) with o = W2 tanh(W1 x + b1) + b2."""
        W1, b1, W2, b2 = w
        h = np.tanh(x @ W1.T + b1)
        d_o = (h @ W2.T + b2 - y) / len(x)
        d_h = d_o @ W2 * (1 - h ** 2)
        return [d_h.T @ x, d_h.sum(0), d_o.T @ h, d_o.sum(0)]

    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    for p, value in zip(net.parameters(), w):
        p.data = torch.tensor(value)
    sam, momentum = SAM(sgd(net), rho=0.3), [0.0] * 4
    for _ in range(6):
        for step in (sam.first_step, sam.second_step):
            ((net(torch.tensor(x)) - torch.tensor(y)) ** 2).sum().div(2 * len(x)).backward()
            step()
        g = gradient(w)
        length = math.sqrt(sum((t ** 2).sum() for t in g))
        g = gradient([p + 0.3 * t / length for p, t in zip(w, g)])
        momentum = [0.9 * m + t + 0.05 * p for m, t, p in zip(momentum, g, w)]
        w = [p - 0.1 * m for p, m in zip(w, momentum)]
        for p, expected in zip(net.parameters(), w):
            np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rho", [0.05, 0.8])
def test_perturbation_has_length_rho_over_all_parameters_together(rho):
    """A norm per tensor (length rho * sqrt(tensors)), parameters without a gradient that move, a
    wrong direction."""
    net = small_net(dtype=torch.float64)
    net[0].bias.requires_grad_(False)  # frozen: no gradient, no move
    before = snapshot(net)
    x, y = batches(1, torch.float64)[0]
    F.cross_entropy(net(x), y).backward()
    grads = [p.grad.clone() for p in net.parameters() if p.requires_grad]
    SAM(sgd(net), rho).first_step()
    moves = [p.detach() - before[name] for name, p in net.named_parameters()]
    assert math.sqrt(sum((m ** 2).sum().item() for m in moves)) == pytest.approx(rho, rel=1e-9)
    moves = [m for (name, _), m in zip(net.named_parameters(), moves)
             if name != "0.bias" or m.any()]
    assert len(moves) == len(grads)
    for m, g in zip(moves, grads):
        torch.testing.assert_close(m / m.norm(), g / g.norm())


def test_zero_gradient_makes_no_nan():
    """0 / 0 in rho * g / ||g||, at an exact minimum or for a loss that a class does not reach."""
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    SAM(torch.optim.SGD([p], lr=0.1), rho=0.5).first_step()
    assert torch.equal(p, torch.ones(3))


def test_weights_come_back_bit_for_bit():
    """Returning by subtracting e: (w + e) - e is not w in float32, and the error would add up
    over a training run."""
    net, (x, y) = small_net(), batches(1)[0]
    before = snapshot(net)
    F.cross_entropy(net(x), y).backward()
    sam = SAM(sgd(net), rho=0.8)
    w, g = net[0].weight.detach().clone(), net[0].weight.grad.clone()
    norm = sam.first_step()
    e = g * (0.8 / norm)
    assert not torch.equal(w + e - e, w)  # here the difference would show
    assert not torch.equal(net[0].weight, w)
    sam.restore()
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]), name


def test_rho_0_is_the_base_optimizer_bit_for_bit():
    """Any trace of the first pass: in weights, momentum, BatchNorm buffers or counters."""
    net = small_net()
    plain = copy.deepcopy(net)
    sam, optimizer = SAM(sgd(net), rho=0), sgd(plain)
    for x, y in batches(4):
        sam_step(net, sam, x, y)
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert_same_bits(snapshot(net), snapshot(plain))


# ---- BatchNorm in the second pass ----

def test_second_pass_leaves_batchnorm_statistics_alone_but_normalises_with_the_batch():
    """Statistics of perturbed weights leaking into evaluation; or the fix gone too far, running
    statistics used in pass 2."""
    net, (x, y) = small_net(), batches(1)[0]
    net(x), net(2 * x)  # statistics that are not those of x
    before, in_training = snapshot(net), net(x).detach()
    net.load_state_dict(before)
    with frozen_batchnorm_statistics(net):
        inside = net(x)
    assert_same_bits(snapshot(net), before)  # running_mean, running_var, num_batches_tracked
    assert torch.equal(inside, in_training)
    assert (inside - copy.deepcopy(net).eval()(x)).abs().max() > 0.01   # evaluation's is another
    net(x)  # and afterwards they move again
    assert net[1].num_batches_tracked == before["1.num_batches_tracked"] + 1
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])


def test_batchnorm_statistics_move_again_after_a_failed_second_pass():
    """Statistics frozen for the rest of the run by an exception."""
    net = small_net()
    with pytest.raises(ZeroDivisionError):
        with frozen_batchnorm_statistics(net):
            1 / 0
    net(batches(1)[0][0])
    assert net[1].num_batches_tracked == 1


def test_a_layer_that_never_tracked_statistics_still_does_not():
    """track_running_stats switched on for a BatchNorm built without: it has no buffers to
    update."""
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False))
    with frozen_batchnorm_statistics(net):
        net(batches(1)[0][0])
    assert net[1].track_running_stats is False


# ---- saving and misuse ----

def test_saved_and_restored_equals_not_stopping_bit_for_bit():
    """A lost momentum buffer or rho. The file is read with weights_only=True, as the project
    reads every file."""
    data = batches(5)
    straight = small_net()
    sam = SAM(sgd(straight), rho=0.5)
    for i, (x, y) in enumerate(data):
        if i == 2:
            sam.rho = 0.2  # rho changes during training (REFERENCE: steps)
        if i == 3:
            file = io.BytesIO()
            torch.save({"model": straight.state_dict(), "sam": sam.state_dict()}, file)
        sam_step(straight, sam, x, y)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = small_net()
    sam = SAM(sgd(resumed, lr=123.0), rho=0.9)
    resumed.load_state_dict(saved["model"])
    sam.load_state_dict(saved["sam"])
    for x, y in data[3:]:
        sam_step(resumed, sam, x, y)
    assert_same_bits(snapshot(resumed), snapshot(straight))


def test_steps_out_of_order_are_errors_that_lose_nothing():
    """Weights saved or abandoned at w + e, where nobody would notice."""
    net, (x, y) = small_net(), batches(1)[0]
    sam = SAM(sgd(net), rho=0.5)
    for too_early in (sam.second_step, sam.restore):
        with pytest.raises(RuntimeError):
            too_early()
    before = [p.detach().clone() for p in net.parameters()]
    F.cross_entropy(net(x), y).backward()
    sam.first_step()
    perturbed = [p.detach().clone() for p in net.parameters()]
    F.cross_entropy(net(x), y).backward()
    for too_late in (sam.first_step, sam.state_dict):
        with pytest.raises(RuntimeError):
            too_late()
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), perturbed))
    sam.restore()
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), before))
    sam.state_dict()
    with pytest.raises(ValueError):
        SAM(sgd(net), rho=-0.1)


def test_learning_rate_schedulers_reach_the_base_optimizer():
    """A wrapper with a copy of the groups: the schedule would turn a knob that nothing reads."""
    net, (x, y) = small_net(), batches(1)[0]
    sam = SAM(sgd(net), rho=0.5)
    for group in sam.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in net.parameters()]
    sam_step(net, sam, x, y)
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), before))


# ---- mixed precision and several processes ----

def test_bfloat16_autocast_needs_nothing_special():
    """Weights or the perturbation falling to bfloat16: with 8 bits neither the length rho nor
    the way back is exact."""
    net, (x, y) = small_net(), batches(1)[0]
    sam = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.5)

    def gradient():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = net(x)
        assert logits.dtype == torch.bfloat16                             # autocast was really on
        F.cross_entropy(logits.float(), y).backward()
        return [p.grad.clone() for p in net.parameters()]

    w = [p.detach().clone() for p in net.parameters()]
    g = gradient()
    length = math.sqrt(sum((t.double() ** 2).sum().item() for t in g))
    sam.first_step()
    for p, value, t in zip(net.parameters(), w, g):
        assert p.dtype == torch.float32
        torch.testing.assert_close(p.detach(), value + t * (0.5 / length), rtol=0, atol=1e-6)
    g = gradient()
    sam.second_step()
    for p, value, t in zip(net.parameters(), w, g):
        torch.testing.assert_close(p.detach(), value - 0.1 * t, rtol=0, atol=1e-7)


def test_processes_that_average_gradients_do_what_one_does_with_the_whole_batch():
    """Processes that climb in directions of their own (m-sharpness), or that drift apart. Averaged
    here as DistributedDataParallel does; tests/runs/test_processes.py has real processes."""
    whole, *parts = (small_net(batchnorm=False, dtype=torch.float64) for _ in range(3))
    sam, *sams = (SAM(sgd(net), rho=0.8) for net in (whole, *parts))
    for x, y in batches(3, torch.float64):
        sam_step(whole, sam, x, y)
        for step in ("first_step", "second_step"):
            for rank, net in enumerate(parts):
                F.cross_entropy(net(x[rank::2]), y[rank::2]).backward()
            for p, q in zip(*(net.parameters() for net in parts)):
                p.grad = q.grad = (p.grad + q.grad) / 2
            for one in sams:
                getattr(one, step)()
    assert_same_bits(*(net.state_dict() for net in parts))
    for name, expected in whole.state_dict().items():
        torch.testing.assert_close(parts[0].state_dict()[name], expected, rtol=0, atol=1e-12)
