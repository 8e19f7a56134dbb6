"""Several processes: the losses of one, a process that dies, a disk that is full for one, every test image once."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import data_lt
import engine
from conftest import ROOT

FLAGS = "--imb 4 --batch 32 --amp none --device cpu".split()
NOTHING_RANDOM = """
import augment
from torch import nn

def without_batchnorm(net):                                               # its statistics are those of a process's own part
    for name, child in net.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(net, name, nn.GroupNorm(4, child.num_features))
        without_batchnorm(child)
    return net

new_network = train_teacher.new_network
train_teacher.new_network = lambda *given: without_batchnorm(new_network(*given))
train_teacher.views = lambda images, args: (augment.resize(augment.to_float(images), args.img_size), None)
train_student.strong_augment = lambda images, args: augment.to_float(images)
"""


def begin(processes, folder, module, prelude, *flags):
    """Start a script on so many processes, with some code before its main."""
    folder.mkdir(exist_ok=True)
    launch = folder / "launch.py"
    launch.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                      "import engine, run_folder, train_student, train_teacher\n"
                      f"{prelude}\nengine.run_main({module}.main)\n")
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, *(torchrun if processes > 1 else []), launch, *FLAGS, *flags, "--out", folder / "run"]
    return subprocess.Popen(list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def log(folder):
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("module, flags", [
    ("train_teacher", "--img-size 16 --loss ce --epochs 2 --drw-epoch 2 --eval-every 2 --rho 0.05 --lr 0.02"),
    ("train_student", "--method vit --model micro --patch-size 8 --epochs 3 --drw-epoch 3 --eval-every 3 --micro-batch 8 "
                      "--mixup 0 --cutmix 0 --ema 0.9")])
def test_two_processes_give_the_losses_of_one(module, flags, tiny_cifar, tmp_path):
    """Gradients summed instead of averaged, an accumulation that synchronises too early, SAM climbing on a part's gradient,
    a sampler that repeats images: all would change the losses. Without what is random, or of a part (BatchNorm)."""
    runs, flags = {}, [*flags.split(), "--data-dir", tiny_cifar]
    jobs = {processes: begin(processes, tmp_path / str(processes), module, NOTHING_RANDOM, *flags) for processes in (1, 2)}
    for processes, job in jobs.items():
        _, err = job.communicate(timeout=200)
        assert job.returncode == 0, err
        weights = torch.load(tmp_path / str(processes) / "run" / "last.pt", weights_only=True)
        runs[processes] = [r["loss"] for r in log(tmp_path / str(processes))], weights
    assert runs[1][0] == pytest.approx(runs[2][0], rel=2e-3) and runs[1][0][0] != pytest.approx(runs[1][0][1], rel=1e-2)
    for part in ("model", "ema"):
        torch.testing.assert_close(runs[1][1].get(part), runs[2][1].get(part), rtol=5e-2, atol=5e-3)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds torchrun's workers under /proc")
def test_a_process_that_dies_ends_the_job_with_a_message(tiny_cifar, tmp_path):
    """The others would wait for it for half an hour; the checkpoint stays."""
    job = begin(2, tmp_path, "train_teacher", "", "--img-size", 16, "--epochs", 500, "--save-every", 1, "--data-dir",
                tiny_cifar)
    end = time.time() + 120
    while not (tmp_path / "run" / "last.pt").exists():
        assert time.time() < end and job.poll() is None, job.communicate()
        time.sleep(0.1)
    os.kill(children(job.pid)[-1], signal.SIGKILL)
    killed = time.time()
    _, err = job.communicate(timeout=60)
    assert job.returncode != 0 and time.time() - killed < 60 and "SIGKILL" in err
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["world"] == 2


def test_a_disk_that_is_full_for_the_writer_ends_all_with_one_line(tiny_cifar, tmp_path):
    """The others' tracebacks of a lost connection would hide the line that matters, or they would hang."""
    full = "def full(*args, **kw): raise OSError(28, os.strerror(28))\nrun_folder.save_checkpoint = full"
    job = begin(2, tmp_path, "train_teacher", full, "--epochs", 1, "--data-dir", tiny_cifar)
    _, err = job.communicate(timeout=120)
    assert err.count("error: cannot write in") == 1 and "No space left" in err and "train_teacher.py" not in err


@pytest.mark.parametrize("world", [2, 3, 7, 30])
def test_any_number_of_processes_tests_every_image_once(world, monkeypatch):
    """Images repeated to make equal parts, as DistributedSampler does, or dropped; a process without any image."""
    labels = torch.arange(20) % 4
    images = labels.view(20, 1, 1, 1).expand(20, 3, 4, 4).to(torch.uint8)
    monkeypatch.setattr(engine, "all_sum", lambda tensor, rt: tensor)     # each process's own part
    seen = []
    monkeypatch.setattr(engine, "accuracies", lambda correct, total, groups: seen.append(correct))
    for rank in range(world):
        rt = engine.Runtime(torch.device("cpu"), rank, world)
        engine.evaluate(lambda x: {"avg": nn.functional.one_hot((255 * x[:, 0, 0, 0]).round().long(), 4)}, images, labels,
                        {"head": [0, 1], "mid": [2], "tail": [3]}, rt, batch=3)
    assert len(seen) == world and torch.stack(seen).sum(dim=0).tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize("n, batch, world", [(100, 16, 2), (101, 16, 3), (1000, 64, 4), (7, 4, 2)])
def test_processes_share_an_epoch_without_overlap(n, batch, world):
    """An image that two processes see, or none; steps that only one of them takes, which would hang the others."""
    order = data_lt.shuffled(n, 3, 1)
    parts = [data_lt.shard(order, batch, rank, world) for rank in range(world)]
    assert len({len(p) for p in parts}) == 1
    together = torch.cat([torch.cat(step) for step in zip(*parts)])
    assert sorted(together.tolist()) == list(range(n))
