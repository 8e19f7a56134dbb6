"""Small runs on the images of tiny_cifar, and what the tests of whole runs ask of them.

A plugin of pytest: test files name it in `pytest_plugins` and get its fixtures.
"""
import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import train_student
import train_teacher
from conftest import script
from engine import runtime

# 89 images, 24 of the most frequent class, 2 of the rarest; 3 steps an epoch; 60 test images.
DATA = "--dataset cifar10 --imb 12 --recipe cpu --device cpu".split()
LENGTH = "--epochs 2 --warmup-epochs 0 --batch 30 --eval-every 1".split()
TEACHER = [*DATA, *LENGTH, "--drw-epoch", "1", "--img-size", "8"]
PACO = [*DATA, *LENGTH, *"--loss paco --queue 50 --img-size 8".split()]
STUDENT = [*DATA, *LENGTH, *("--model micro --img-size 16 --drw-epoch 1 --micro-batch 15 "
                             "--ema 0.9 --drop-path 0.1").split()]
WITHOUT_SAM = ["--rho", "0"]        # half of a teacher's time, where no run is compared with it
PLAIN = [*DATA, *LENGTH, *"--method vit --model micro --img-size 16".split()]


def train(module, *flags):
    """Run a training script in this process, without a picture at its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_student, "draw_summary", lambda folder: None)
        script(module, patch, *flags)


def read(folder, name):
    return json.loads((Path(folder) / name).read_text())


def records(folder):
    """The epochs of a run's log."""
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def checkpoint(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


# ---- Shared runs ---------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def teacher_run(tiny_cifar, tmp_path_factory):
    """Run folder of an LDAM-DRW-SAM teacher."""
    folder = tmp_path_factory.mktemp("shared") / "teacher"
    train(train_teacher, *TEACHER, "--data-dir", tiny_cifar, "--out", folder)
    return folder


@pytest.fixture(scope="session")
def paco_run(tiny_cifar, tmp_path_factory):
    """Run folder of a PaCo-SAM teacher."""
    folder = tmp_path_factory.mktemp("shared") / "paco"
    train(train_teacher, *PACO, "--data-dir", tiny_cifar, "--out", folder)
    return folder


@pytest.fixture(scope="session")
def student_run(teacher_run, tiny_cifar, tmp_path_factory):
    """Run folder of a DeiT-LT student by teacher_run."""
    folder = tmp_path_factory.mktemp("shared") / "student"
    train(train_student, *STUDENT, "--data-dir", tiny_cifar, "--teacher", teacher_run, "--out",
          folder)
    return folder


@pytest.fixture
def shared_run(request, tiny_cifar):
    """shared_run(kind) -> (script, its flags but for --out, folder); teacher, paco or student."""
    def shared_run(kind):
        folder = request.getfixturevalue(f"{kind}_run")
        if kind == "student":
            flags = [*STUDENT, "--teacher", str(request.getfixturevalue("teacher_run"))]
            return train_student, [*flags, "--data-dir", str(tiny_cifar)], folder
        flags = PACO if kind == "paco" else TEACHER
        return train_teacher, [*flags, "--data-dir", str(tiny_cifar)], folder
    return shared_run


class OneClass(torch.nn.Module):
    """A teacher that gives every image the label 7."""
    img_size, origin, calls = 16, [], 0

    def forward(self, x):
        assert x.shape[1:] == (3, 16, 16) and 0 <= x.min() and x.max() <= 1
        self.calls += 1
        return torch.eye(10)[torch.full((len(x),), 7)] * 20


# ---- What happens to runs ------------------------------------------------------------------------

@pytest.fixture
def refused(monkeypatch, capsys):
    """refused(script, *flags) -> the one line with which it must end, with exit code 2."""
    def refused(module, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            script(module, monkeypatch, *flags)
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and len(error.splitlines()) == 1, error
        assert error.startswith("error: ")
        return error
    return refused


class Killed(Exception):
    """No code expects it: as if the process had been killed."""


@contextmanager
def killed_at(epoch, step):
    """The run inside dies before this step."""
    seed_step = runtime.seed_step

    def dying(*key):
        if key[1:3] == (epoch, step):
            raise Killed
        seed_step(*key)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runtime, "seed_step", dying)
        yield


@pytest.fixture
def steps_done(monkeypatch):
    """List that grows by (epoch, step) of every step that is taken."""
    steps, seed_step = [], runtime.seed_step

    def recorded(*key):
        if key[1:3] not in steps[-1:]:          # a teacher's step seeds for both passes of SAM
            steps.append(key[1:3])
        seed_step(*key)
    monkeypatch.setattr(runtime, "seed_step", recorded)
    return steps


def assert_same_run(one, other):
    """Equal to the bit: weights, averages, PaCo's queue, optimizer, log (but for times)."""
    a, b = checkpoint(one), checkpoint(other)
    for part in ("model", "ema", "paco", "optimizer", "scaler", "teacher_prior"):
        torch.testing.assert_close(a.get(part), b.get(part), rtol=0, atol=0,
                                   msg=lambda text, part=part: f"{part}: {text}")
    logs = [records(folder) for folder in (one, other)]
    for record in logs[0] + logs[1]:
        del record["seconds"], record["images_per_second"]
    assert logs[0] == logs[1]
