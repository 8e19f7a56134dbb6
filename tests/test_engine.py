"""engine.py: schedules, averages, evaluation, checkpoints and the run folder against formulas and loops."""
import argparse
import os
import re
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from torch import nn

import engine
import run_folder
from conftest import ROOT

CPU = engine.Runtime(torch.device("cpu"))


def test_learning_rate_at_the_published_drw_epochs():
    """The published rule gives these rates when DRW starts; a cosine clock that starts after the warm-up would not."""
    for peak, epochs, drw, rate in ((2.5e-4, 1200, 1100, 1.41e-5), (5e-4, 1400, 1200, 3.43e-5), (5e-4, 1000, 900, 2.20e-5)):
        assert engine.cosine_lr(drw, epochs, peak, 5) == pytest.approx(rate, rel=5e-3)


def test_warm_up_is_linear_from_its_start_and_the_cosine_ends_at_the_minimum():
    assert engine.cosine_lr(0, 100, 1e-3, 5) == pytest.approx(1e-6)
    assert engine.cosine_lr(2.5, 100, 1e-3, 5) == pytest.approx((1e-6 + 1e-3) / 2)
    assert engine.cosine_lr(100, 100, 1e-3, 5) == pytest.approx(1e-5)
    assert engine.cosine_lr(50, 100, 1e-3, 5) == pytest.approx((1e-5 + 1e-3) / 2)


@pytest.mark.parametrize("cpu, faster", [
    ("vendor_id : GenuineIntel\nflags : avx512f", False), ("vendor_id : GenuineIntel\nflags : avx512_bf16 avx512_fp16", False),
    ("vendor_id : GenuineIntel\nflags : avx512_bf16 amx_bf16", True), ("vendor_id : AuthenticAMD\nflags : avx512f", False),
    ("vendor_id : AuthenticAMD\nflags : avx2 avx512_bf16", True), ("Features : fp asimd bf16 i8mm", True)])
def test_bfloat16_is_for_processors_that_multiply_it_faster(cpu, faster, monkeypatch):
    """Intel's avx512_bf16 without amx_bf16 would train at two thirds of float32's speed."""
    monkeypatch.setattr(engine, "cpu_info", lambda pattern: re.search(pattern, cpu))
    assert engine.has_bf16(torch.device("cpu")) is faster
    assert engine.setup("cpu").amp is (torch.bfloat16 if faster else None)


def test_step_seeds_replay_and_differ_in_every_part_of_the_key():
    """A collision (say of step and rank added up) would give two ranks the same augmentation."""
    def draw(*key):
        engine.seed_step(*key)
        return torch.rand(4).tolist()
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 0)]
    draws = [draw(*k) for k in keys]
    assert draws == [draw(*k) for k in keys]
    assert len({tuple(d) for d in draws}) == len(keys)


@pytest.mark.parametrize("ending, code", [(None, 0), (engine.UserError("no"), 2), (SystemExit(143), 143), (SystemExit(), 0)])
def test_one_of_several_processes_ends_at_once_with_its_code(ending, code, monkeypatch):
    """Python's own ending of a process, which gloo's threads now and then abort (tried with two processes: 11 times of 25), or
    a code that is lost on the way."""
    def main():
        if ending:
            raise ending

    def leave(code):
        raise RuntimeError(f"left with {code}")
    monkeypatch.setattr(engine.dist, "is_initialized", lambda: True)
    destroyed = []
    monkeypatch.setattr(engine.dist, "destroy_process_group", lambda: destroyed.append(1))
    monkeypatch.setattr(engine, "leave", leave)
    with pytest.raises(RuntimeError, match=f"left with {code}"):
        engine.run_main(main)
    assert len(destroyed) == (code == 0)                                  # after an error NCCL's may wait for the others


def test_leaving_loses_neither_words_nor_code():
    """Output that is still in Python's hands, what others want done at the end, or the exit code."""
    code = "import atexit, engine; atexit.register(print, 'last'); print('first'); engine.leave(3)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.split(), done.returncode) == (["first", "last"], 3), done.stderr


def test_ema_is_the_running_average_of_weights_and_of_batchnorms_statistics():
    """Another decay, a decay of the wrong one; the last weights' statistics beside the mean of the weights."""
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = engine.EMA(net, 0.9)
    by_hand = {"0.weight": net[0].weight.detach().clone(), "1.running_mean": torch.zeros(2)}
    for step in range(3):
        with torch.no_grad():
            net[0].weight.add_(step + 1.0)
            net[1].running_mean.fill_(step + 1.0)
        ema.update(net)
        by_hand = {name: 0.9 * mean + 0.1 * net.state_dict()[name] for name, mean in by_hand.items()}
    ema.update(net, torch.tensor(1.0))                                    # a bad step: nothing
    for name, mean in by_hand.items():
        torch.testing.assert_close(ema.model.state_dict()[name], mean)


def test_evaluation_equals_a_loop_over_images():
    """Groups are means of class recalls, overall is plain top-1: with unequal test counts the two differ."""
    torch.manual_seed(0)
    labels = torch.tensor([0] * 7 + [1] * 2 + [2] * 5 + [3])
    images = torch.randint(0, 256, (len(labels), 3, 4, 4), dtype=torch.uint8)
    weight = torch.randn(3 * 4 * 4, 4)
    groups = {"head": [0], "mid": [1, 2], "tail": [3]}
    result = engine.evaluate(lambda x: {"avg": x.flatten(1) @ weight}, images, labels, groups, CPU, batch=4)["avg"]

    right = [[] for _ in range(4)]
    for image, label in zip(images, labels.tolist()):
        right[label].append(int((image.float().flatten() / 255 @ weight).argmax()) == label)
    recall = [100 * sum(r) / len(r) for r in right]
    assert result["per_class"] == pytest.approx(recall, abs=0.006)
    assert result["overall"] == pytest.approx(100 * sum(map(sum, right)) / len(labels), abs=1e-3)
    assert result["mid"] == pytest.approx((recall[1] + recall[2]) / 2, abs=1e-3)


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path):
    """Without the temporary file a crash in the middle would destroy the only checkpoint."""
    path = tmp_path / "last.pt"
    run_folder.save_checkpoint(path, model={}, config={}, epoch=1)

    def half(f):
        f.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run_folder.write_atomically(path, half)
    assert run_folder.load_checkpoint(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile_code_ran",)


@pytest.mark.parametrize("make", [
    lambda p: p.write_bytes(b""),
    lambda p: p.write_bytes(b"not a checkpoint at all"),
    lambda p: p.write_text("<html>404</html>"),
    lambda p: torch.save(torch.zeros(3), p),
    lambda p: torch.save({"weights": 1}, p),
    lambda p: torch.save({"model": Hostile(), "config": {}}, p),
    lambda p: None,
], ids=["empty", "text", "html", "tensor", "other keys", "pickled code", "missing"])
def test_what_is_no_checkpoint_is_refused_in_one_line(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "x.pt")
    with pytest.raises(engine.UserError) as error:
        run_folder.load_checkpoint(str(tmp_path / "x.pt"))
    assert "\n" not in str(error.value) and "x.pt" in str(error.value)
    assert not (tmp_path / "hostile_code_ran").exists()


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "last.pt"
    run_folder.save_checkpoint(path, model={"w": torch.zeros(1000)}, config={})
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(engine.UserError, match="not a readable checkpoint"):
        run_folder.load_checkpoint(path)


def test_recipe_rows_are_overridden_by_flags_and_name_the_run():
    recipes = {"paper": {"a": dict(lr=0.1, batch=8)}, "cpu": {"a": dict(lr=0.2, batch=4), "b": dict(lr=0.3, batch=2)}}
    parser = argparse.ArgumentParser()
    engine.add_recipe_flags(parser, recipes, {"lr": "rate", "batch": "size"})
    args = parser.parse_args(["--lr", "0.5"])
    args.recipe, args.dataset = "auto", "a"
    assert engine.resolve_recipe(args, recipes, CPU) == (dict(lr=0.2, batch=4), "_lr0.5")
    assert (args.recipe, args.lr, args.batch) == ("cpu", 0.5, 4)
    args.recipe, args.dataset = "paper", "b"
    with pytest.raises(engine.UserError, match="no paper recipe for b"):
        engine.resolve_recipe(args, recipes, CPU)


def test_a_user_error_ends_with_code_2_and_one_line_but_a_bug_keeps_its_traceback(capsys):
    def wrong():
        raise engine.UserError("do this instead")
    with pytest.raises(SystemExit) as stop:
        engine.run_main(wrong)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: do this instead\n"
    with pytest.raises(ZeroDivisionError):
        engine.run_main(lambda: 1 / 0)


def test_durations_read_naturally():
    assert [engine.duration(s) for s in (12, 204, 20160, 1100000)] == ["12 s", "3.4 min", "5.6 h", "12.7 days"]


def share_of(rank):
    """What process `rank` brings to gather: rows that differ in number, type and shape, and none of them zero."""
    generator = torch.Generator().manual_seed(rank)
    floats = 1 + torch.rand(2 + 3 * rank, 4, generator=generator)
    return {"floats": floats, "doubles": floats.double()[:5 - 4 * rank, None], "labels": torch.arange(4 - rank) + 10 * rank + 1,
            "as many": floats[:2], "none of rank 0": floats[:3 * rank], "a column": floats[:, 1], "transposed": floats[:2].T}


def gather_a_share(rank, folder):
    """Process `rank` of two: what gather gives it goes to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
                                         timeout=timedelta(minutes=2))
    rt = engine.Runtime(torch.device("cpu"), rank, 2)
    torch.save({name: engine.gather(rows, rt) for name, rows in share_of(rank).items()}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()
    engine.leave()


def test_one_process_gathers_its_own_rows():
    """A copy, or a call to a process group that is not there."""
    rows = torch.rand(3, 2)
    assert engine.gather(rows, CPU) is rows


def test_two_processes_gather_rank_0s_rows_then_rank_1s(tmp_path):
    """Padding left in, rows cut to the smaller share, a rank's own rows first, or int64 labels turned into floats."""
    torch.multiprocessing.spawn(gather_a_share, args=(str(tmp_path),), nprocs=2)
    zero, one = share_of(0), share_of(1)
    for rank in (0, 1):
        gathered = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert gathered.keys() == zero.keys()
        for name, rows in gathered.items():
            assert rows.dtype == zero[name].dtype and torch.equal(rows, torch.cat([zero[name], one[name]])), name
