"""Numbers that are not finite: the step is left out, to the bit; float16's loss scale, with SAM; a run that is lost ends."""
import json

import pytest
import torch
from torch import nn

import engine
import run_folder
import train_student
import train_teacher
from conftest import script
from sam import SAM, frozen_batchnorm_statistics

pytestmark = pytest.mark.usefixtures("no_pictures")
CPU = engine.Runtime(torch.device("cpu"))
FP16 = engine.Runtime(torch.device("cpu"), amp=torch.float16)


def a_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def an_optimizer(name, net):
    if name == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=0.01, fused=True)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, fused=True)
    for p in net.parameters():
        sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


def train(optimizer_name, batches, rt=CPU, rho=0.0, spoil=lambda step, which, loss: loss):
    """Guarded steps on the batches; spoil(step, pass, loss) may break a loss. Returns network, optimizer, guard."""
    net = a_net()
    base = an_optimizer(optimizer_name, net)
    sam, guard = SAM(base, rho), engine.Guard(net, base, rt)
    for step, (x, y) in enumerate(batches):
        guard.begin()
        guard.backward(spoil(step, 1, nn.functional.cross_entropy(net(x), y)))
        guard.check()
        if rho > 0:
            sam.first_step()
            with frozen_batchnorm_statistics(net):
                guard.backward(spoil(step, 2, nn.functional.cross_entropy(net(x), y)))
            guard.check()
            sam.second_step()
        else:
            base.step()
            base.zero_grad()
        guard.end()
    return net, base, guard


def some_batches(n=6):
    torch.manual_seed(1)
    return [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(n)]


def assert_same(one, other):
    torch.testing.assert_close(one[0].state_dict(), other[0].state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(one[1].state_dict()["state"], other[1].state_dict()["state"], rtol=0, atol=0)


@pytest.mark.parametrize("bad", [[0], [3], [2, 3], [5]])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_bad_step_is_as_if_it_had_not_been(optimizer, bad):
    """Poisoned weights, moments or BatchNorm statistics; a counted Adam step; torch's unset momentum after a bad first step."""
    batches = some_batches()
    spoiled = [(x * torch.inf if i in bad else x, y) for i, (x, y) in enumerate(batches)]
    got = train(optimizer, spoiled)
    assert_same(got, train(optimizer, [b for i, b in enumerate(batches) if i not in bad]))
    assert int(got[2].counts["skipped"]) == len(bad)


@pytest.mark.parametrize("which", [1, 2])
def test_either_pass_of_sam_may_be_bad(which):
    """Weights left at w + NaN, or a step by the first pass's gradient."""
    batches = some_batches()
    got = train("sgd", batches, rho=0.1, spoil=lambda step, p, loss: loss * torch.nan if (step, p) == (2, which) else loss)
    assert_same(got, train("sgd", batches[:2] + batches[3:], rho=0.1))


def test_a_bad_loss_with_good_gradients_counts():
    """Only the gradients looked at: a loss of inf whose gradient is clamped away."""
    batches = some_batches()
    got = train("adamw", batches, spoil=lambda step, p, loss: loss + torch.inf if step == 1 else loss)
    assert_same(got, train("adamw", batches[:1] + batches[2:]))


@pytest.mark.parametrize("optimizer, rho", [("adamw", 0), ("sgd", 0), ("sgd", 0.1)])
def test_the_scale_of_the_loss_changes_nothing_where_nothing_underflows(optimizer, rho):
    """A pass of SAM whose gradient is not brought back to its true scale. Powers of two are exact: equal to the bit."""
    assert_same(train(optimizer, some_batches(), FP16, rho), train(optimizer, some_batches(), CPU, rho))


def test_the_scale_halves_after_a_bad_step_and_doubles_after_many_good_ones(monkeypatch):
    """PyTorch's GradScaler, with the same growth interval, is the reference."""
    monkeypatch.setattr(engine.Guard, "GROWTH", 4)
    bad = {0, 1, 6, 7, 17}
    scaler, p = torch.amp.GradScaler("cpu", growth_interval=4), nn.Parameter(torch.ones(1))
    reference = torch.optim.SGD([p], lr=0.1)
    for step in range(24):
        p.grad = None
        scaler.scale(p.sum() * (torch.inf if step in bad else 1)).backward()
        scaler.step(reference)
        scaler.update()
        guard = train("sgd", some_batches(step + 1), FP16, spoil=lambda s, _, loss: loss * torch.inf if s in bad else loss)[2]
        assert float(guard.counts["scale"]) == scaler.get_scale(), step


def test_small_gradients_survive_float16():
    """Without the scale, a gradient below 6e-8 is nothing in float16; with it, it is right to float16's three digits."""
    weight = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    net = nn.ParameterList([weight])
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    guard = engine.Guard(net, torch.optim.SGD(net.parameters(), lr=1, fused=True), FP16)

    def loss():
        return (x @ weight.T).float().square().mean() * 1e-6
    loss().backward()
    true, weight.grad = weight.grad, None
    with FP16.autocast():
        unscaled = loss()
    unscaled.backward()
    lost, weight.grad = weight.grad, None
    guard.begin()
    with FP16.autocast():
        scaled = loss()
    guard.backward(scaled)
    guard.check()
    assert (lost - true).norm() > 0.2 * true.norm() and (weight.grad - true).norm() < 0.01 * true.norm()


def test_an_optimizer_that_cannot_leave_a_step_out_is_refused():
    """It would take the bad step without a word."""
    net = a_net()
    with pytest.raises(ValueError, match="fused"):
        engine.Guard(net, torch.optim.SGD(net.parameters(), lr=0.1), CPU)


# ---- In the scripts ------------------------------------------------------------------------------------------------------

FLAGS = {"teacher": "--img-size 16 --batch 32 --imb 4 --amp none --epochs 2 --drw-epoch 1 --eval-every 2".split(),
         "paco": "--loss paco --img-size 16 --batch 32 --imb 4 --amp none --epochs 2 --queue 50 --eval-every 2".split(),
         "student": ("--method vit --model micro --batch 32 --micro-batch 16 --imb 4 --amp none --epochs 2 "
                      "--eval-every 2").split()}


def nan_loss_at(steps, monkeypatch):
    """Multiply the loss of these (epoch, step) by NaN, wherever it is computed."""
    seed_step, backward, now = engine.seed_step, engine.Guard.backward, []
    monkeypatch.setattr(engine, "seed_step", lambda *key: now.append(key[1:3]) or seed_step(*key))
    monkeypatch.setattr(engine.Guard, "backward",
                        lambda guard, loss: backward(guard, loss * torch.nan if now[-1] in steps else loss))


@pytest.mark.parametrize("kind", FLAGS)
def test_a_run_steps_over_a_bad_loss_and_says_so(kind, tiny_cifar, tmp_path, monkeypatch, capsys):
    """A mean loss of NaN in the log, a network of NaN at the end, a queue of NaN, or a step left out without a word."""
    module = train_student if kind == "student" else train_teacher
    nan_loss_at({(0, 2)}, monkeypatch)
    script(module, monkeypatch, *FLAGS[kind], "--data-dir", tiny_cifar, "--out", tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["skipped"] for r in log] == [1, 1] and all(0 < r["loss"] < 100 for r in log)
    state = run_folder.load_checkpoint(str(tmp_path / "run"))
    assert all(v.isfinite().all() for v in (state.get("paco") or state["model"]).values())


@pytest.mark.parametrize("kind", FLAGS)
def test_a_lost_run_ends_with_advice_and_a_good_checkpoint(kind, tiny_cifar, tmp_path, monkeypatch, capsys):
    """Hours of NaN; or the weights of NaN over the last good checkpoint. --resume --force then goes on."""
    module = train_student if kind == "student" else train_teacher
    flags = [*FLAGS[kind], "--data-dir", tiny_cifar, "--out", tmp_path / "run", "--save-every", "1"]
    with monkeypatch.context() as patch:
        nan_loss_at({(1, s) for s in range(1, 100)}, patch)
        patch.setattr(engine.Guard, "LIMIT", 3)
        with pytest.raises(SystemExit) as stopped:
            script(module, patch, *flags)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and "epoch 2, step" in err and "learning rate" in err
    state = run_folder.load_checkpoint(str(tmp_path / "run"))
    assert all(v.isfinite().all() for v in state["model"].values())
    script(module, monkeypatch, *flags, "--resume", "--force", "--lr", "0.001")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "--lr" in result["forced"][0] and 0 <= result["avg"]["overall"] <= 100


def test_float16_trains(tiny_cifar, tmp_path, monkeypatch):
    """--amp fp16 that overflows for ever, or learns nothing: after the first steps the loss is that of float32, nearly."""
    losses = {}
    for amp in ("fp16", "none"):
        out = tmp_path / amp
        script(train_student, monkeypatch, *FLAGS["student"], "--data-dir", tiny_cifar, "--imb", 24, "--out", out, "--amp", amp)
        record = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
        losses[amp] = record["loss"]
        assert record["skipped"] <= 3
    assert losses["fp16"] == pytest.approx(losses["none"], rel=0.05)
