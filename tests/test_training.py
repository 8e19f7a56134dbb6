"""engine/training.py: learning rate, averaged weights, and steps that are not finite."""
import pytest
import torch
from torch import nn

from engine.runtime import Runtime, UserError
from engine.training import EMA, FiniteScaler, cosine_lr, micro_batches
from sam import SAM, frozen_batchnorm_statistics

CPU = Runtime(torch.device("cpu"))
FP16 = Runtime(torch.device("cpu"), amp=torch.float16)


# ---- Learning rate -------------------------------------------------------------------------------

@pytest.mark.parametrize("peak, epochs, drw, rate", [
    (2.5e-4, 1200, 1100, 1.41e-5), (5e-4, 1400, 1200, 3.43e-5), (5e-4, 1000, 900, 2.20e-5)])
def test_learning_rate_at_the_published_drw_epochs(peak, epochs, drw, rate):
    """A cosine that starts after the warm-up, or ends at another minimum than 1e-5."""
    assert cosine_lr(drw, epochs, peak, 5) == pytest.approx(rate, rel=5e-3)


def test_no_learning_rate_is_above_the_peak():
    """Ten times the rate that was asked for, at the end of a careful fine-tuning."""
    assert all(cosine_lr(t, 10, 1e-7, 2) == pytest.approx(1e-7) for t in range(11))
    assert cosine_lr(1, 10, 0.0, 2) == cosine_lr(9, 10, 0.0, 2) == 0


# ---- Averaged weights ----------------------------------------------------------------------------

def test_ema_averages_weights_and_batchnorm_statistics():
    """Another decay; 1 - decay in its place; statistics that are not averaged."""
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = EMA(net, 0.9)
    by_hand = {"0.weight": net[0].weight.detach().clone(), "1.running_mean": torch.zeros(2)}
    for step in range(3):
        with torch.no_grad():
            net[0].weight.add_(step + 1.0)
            net[1].running_mean.fill_(step + 1.0)
        ema.update()
        now = net.state_dict()
        by_hand = {name: 0.9 * mean + 0.1 * now[name] for name, mean in by_hand.items()}
    ema.update(torch.tensor(0.0))                               # a step that was undone: nothing
    for name, mean in by_hand.items():
        torch.testing.assert_close(ema.model.state_dict()[name], mean)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())


def test_a_step_of_the_ema_builds_no_state_dict():
    """Two of them a step, hundreds of tensors each by name, in Python, while a GPU waits."""
    net = nn.Linear(2, 1)
    ema = EMA(net, 0.5)
    net.state_dict = ema.model.state_dict = None
    ema.update()


def test_ema_goes_on_from_a_loaded_state():
    """An average of tensors that loading has replaced: it would never move again."""
    net = nn.Linear(2, 1)
    ema = EMA(net, 0.5)
    ema.load_state_dict({"weight": torch.full((1, 2), 8.0), "bias": torch.zeros(1)})
    with torch.no_grad():
        net.weight.fill_(4.0)
    ema.update()
    assert ema.model.weight.tolist() == [[6.0, 6.0]]


# ---- Steps that are not finite -------------------------------------------------------------------

def new_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def new_optimizer(name, net):
    if name == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=0.01, fused=True)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, fused=True)
    for p in net.parameters():
        sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


def unchanged(step, which, loss):
    return loss


def train(optimizer_name, batches, rt=CPU, rho=0.0, spoil=unchanged, extra=()):
    """Steps on the batches; spoil(step, pass of SAM, loss) may break a loss.

    Returns the network, the optimizer and the scaler.
    """
    net = new_net()
    optimizer = new_optimizer(optimizer_name, net)
    sam, scaler = SAM(optimizer, rho), FiniteScaler(net, optimizer, rt, *extra)
    for step, (x, y) in enumerate(batches):
        scaler.scale(spoil(step, 1, nn.functional.cross_entropy(net(x), y))).backward()
        scaler.unscale_()
        if rho > 0:
            sam.first_step()
            with frozen_batchnorm_statistics(net):
                loss = spoil(step, 2, nn.functional.cross_entropy(net(x), y))
                scaler.scale(loss).backward()
            scaler.unscale_()
            sam.second_step()
        else:
            scaler.step(optimizer)
            optimizer.zero_grad()
        for tensor in extra:
            tensor.add_(1 if x.isfinite().all() else torch.nan)
        finite = scaler.update()
        assert finite.item() in (0, 1)
    return net, optimizer, scaler


def some_batches(n=6):
    torch.manual_seed(1)
    return [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(n)]


def assert_same(one, other):
    for a, b in ((one[0].state_dict(), other[0].state_dict()),
                 (one[1].state_dict()["state"], other[1].state_dict()["state"])):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [[0], [3], [2, 3], [5]])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_that_is_not_finite_leaves_no_trace(optimizer, bad):
    """Poisoned weights, moments or BatchNorm statistics; a counted Adam step; unset momentum."""
    batches = some_batches()
    spoiled = [(x * torch.inf if i in bad else x, y) for i, (x, y) in enumerate(batches)]
    got = train(optimizer, spoiled)
    assert_same(got, train(optimizer, [b for i, b in enumerate(batches) if i not in bad]))
    assert got[2].skipped == len(bad)


def test_extra_tensors_are_restored_too():
    """A teacher's label frequencies that stay NaN after one bad step, and every later loss too."""
    extra = torch.zeros(3), torch.zeros(2, dtype=torch.double)      # of two types
    batches = [(x * torch.inf if i == 2 else x, y) for i, (x, y) in enumerate(some_batches())]
    train("adamw", batches, extra=extra)
    assert extra[0].tolist() == [5, 5, 5] and extra[1].tolist() == [5, 5]


def test_a_tensor_in_another_memory_format_keeps_its_elements_places():
    """A frozen kernel in channels_last whose numbers change places with every step."""
    start = torch.arange(24.0).view(2, 3, 2, 2)
    extra = start.contiguous(memory_format=torch.channels_last)
    batches = [(x * torch.inf if i == 2 else x, y) for i, (x, y) in enumerate(some_batches())]
    train("adamw", batches, extra=(extra,))
    assert torch.equal(extra, start + 5) and extra.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("which", [1, 2])
def test_either_pass_of_sam_may_be_bad(which):
    """Weights left at w + NaN, or a step by the first pass's gradient."""
    def spoil(step, p, loss):
        return loss * torch.nan if (step, p) == (2, which) else loss
    batches = some_batches()
    got = train("sgd", batches, rho=0.1, spoil=spoil)
    assert_same(got, train("sgd", batches[:2] + batches[3:], rho=0.1))


def test_a_bad_loss_with_good_gradients_counts():
    """Only the gradients looked at: an infinite loss whose gradient is finite."""
    def spoil(step, p, loss):
        return loss + torch.inf if step == 1 else loss
    batches = some_batches()
    got = train("adamw", batches, spoil=spoil)
    assert_same(got, train("adamw", batches[:1] + batches[2:]))


def test_a_bad_gradient_with_a_good_loss_counts():
    """Only the loss looked at: the gradient of sqrt(0) is infinite."""
    net = new_net()
    optimizer = new_optimizer("adamw", net)
    scaler = FiniteScaler(net, optimizer, CPU)
    before = net[0].weight.detach().clone()
    scaler.scale((net[0].weight * 0).abs().sum().sqrt()).backward()
    scaler.unscale_()
    scaler.step(optimizer)
    assert scaler.update().item() == 0 and torch.equal(net[0].weight, before)


@pytest.mark.parametrize("optimizer, rho", [("adamw", 0), ("sgd", 0), ("sgd", 0.1)])
def test_the_scale_of_the_loss_changes_nothing_where_nothing_underflows(optimizer, rho):
    """A pass of SAM whose gradient keeps the scale. Powers of two are exact: equal to the bit."""
    scaled = train(optimizer, some_batches(), FP16, rho)
    assert_same(scaled, train(optimizer, some_batches(), CPU, rho))


def test_the_scale_follows_torchs_rule(monkeypatch):
    """GradScaler with the same growth interval is the reference, over growth and halving."""
    monkeypatch.setattr(FiniteScaler, "GROWTH", 4)
    bad = {0, 1, 6, 7, 17}
    reference, p = torch.amp.GradScaler("cpu", growth_interval=4), nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD([p], lr=0.1)
    net = nn.Linear(1, 1)
    scaler = FiniteScaler(net, torch.optim.SGD(net.parameters(), lr=0.1, fused=True), FP16)
    for step in range(24):
        factor = torch.inf if step in bad else 1
        p.grad = None
        reference.scale(p.sum() * factor).backward()
        reference.step(sgd)
        reference.update()
        net.zero_grad()
        scaler.scale(net.weight.sum() * factor).backward()
        scaler.unscale_()
        scaler.update()
        assert float(scaler.counts["scale"]) == reference.get_scale(), step


def test_a_run_that_goes_on_in_float16_begins_with_its_scale():
    """The 1 of a float32 run as the scale: small gradients are 0 for tens of thousands of steps."""
    def scaler(rt, scale=None):
        net = nn.Linear(1, 1)
        made = FiniteScaler(net, torch.optim.SGD(net.parameters(), lr=1, fused=True), rt)
        if scale:
            made.counts["scale"].fill_(scale)
        return made
    for before, now, expected in ((CPU, FP16, 2 ** 16), (FP16, FP16, 8), (FP16, CPU, 8)):
        resumed = scaler(now)
        resumed.load_state_dict(scaler(before, 8 if before is FP16 else None).state_dict())
        assert float(resumed.counts["scale"]) == expected


def test_small_gradients_survive_float16():
    """Below 6e-8 a float16 gradient is 0; scaled it is right to float16's three digits."""
    weight = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    net = nn.ParameterList([weight])
    scaler = FiniteScaler(net, torch.optim.SGD(net.parameters(), lr=1, fused=True), FP16)

    def loss():
        return (x @ weight.T).float().square().mean() * 1e-6

    def gradient():
        found, weight.grad = weight.grad, None
        return found
    loss().backward()
    true = gradient()
    with FP16.autocast():
        plain, scaled = loss(), loss()
    plain.backward()
    lost = gradient()
    scaler.scale(scaled).backward()
    scaler.unscale_()
    assert (lost - true).norm() > 0.2 * true.norm()
    assert (weight.grad - true).norm() < 0.01 * true.norm()


def test_an_optimizer_that_cannot_skip_a_step_is_refused():
    """It would take the bad step without a word."""
    net = new_net()
    with pytest.raises(ValueError, match="fused"):
        FiniteScaler(net, torch.optim.SGD(net.parameters(), lr=0.1), CPU)


def test_a_lost_run_ends_after_ten_bad_steps_in_a_row():
    """Hours of NaN; or an end because of ten bad steps that were not in a row."""
    bad = [(x * torch.inf, y) for x, y in some_batches(9)]
    train("adamw", bad)[2].stop_if_lost(0, 8, 0.01)                         # nine are not ten
    train("adamw", bad + some_batches(1) + bad)[2].stop_if_lost(0, 18, 0.01)
    with pytest.raises(UserError):
        train("adamw", bad + bad[:1])[2].stop_if_lost(0, 9, 0.01)
    lost = train("adamw", bad + bad)[2]
    with pytest.raises(UserError, match="epoch 3, step 18.* 18 .*learning rate 0.01.*--lr"):
        lost.stop_if_lost(2, 17, 0.01)


def test_micro_batches_fit():
    """A larger one than fits; as many for each of two processes as for one."""
    assert micro_batches(23, 3, 1, 1) == 8              # batches of 8 images
    assert micro_batches(90, 3, 2, 8) == 2              # 15 images for each process
