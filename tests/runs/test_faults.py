"""Long fault tests: kill -9 at random moments, a signal to torchrun. `python -m pytest -m slow`"""
import argparse
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

import conftest
from conftest import ROOT
from engine.checkpoints import load_checkpoint
from engine.runtime import UserError
from tiny_runs import assert_same_run, checkpoint

pytest_plugins = ["tiny_runs"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0"]
# Long enough for a kill or a signal to come before the end: epochs of 6 steps.
LONGER = {"teacher": ["--epochs", "100", "--drw-epoch", "20", "--batch", "15"],
          "paco": ["--epochs", "60", "--batch", "15"],
          "student": ["--epochs", "200", "--drw-epoch", "20", "--batch", "15"]}


def begin(module, flags, folder, *more, torchrun=()):
    """A script in a process of its own, or under torchrun."""
    command = [sys.executable, *torchrun, ROOT / f"{module.__name__}.py", *flags, "--eval-every",
               "10", "--out", folder, *more]
    return subprocess.Popen(list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", LONGER)
def test_killed_at_20_random_moments(kind, shared_run, tmp_path):
    """kill -9 while starting, training, evaluating or writing: every restart goes on, to the end of
    the undisturbed run."""
    module, flags, _ = shared_run(kind)
    flags = [*flags, *LONGER[kind], "--save-every", "1"]
    began = time.monotonic()
    undisturbed = begin(module, flags, tmp_path / "undisturbed")
    while not (tmp_path / "undisturbed" / "last.pt").exists():
        assert undisturbed.poll() is None, undisturbed.communicate()
        time.sleep(0.01)
    first_save = time.monotonic() - began           # seconds on this machine, as busy as it is
    finish(undisturbed)
    draw, killed_at = random.Random(0), []
    for kill in range(20):
        process = begin(module, flags, tmp_path / "run", "--resume")
        time.sleep(draw.uniform(0.5, 2) * first_save)
        assert process.poll() is None, f"it ended after {kill} kills: {process.communicate()}"
        process.kill()
        process.communicate()
        with suppress(UserError):
            state = load_checkpoint(str(tmp_path / "run"))
            killed_at.append((state["epoch"], state["step"]))
    assert killed_at == sorted(killed_at) and len(set(killed_at)) > 5      # it got on in between
    print(kind, "killed at", killed_at)
    finish(begin(module, flags, tmp_path / "run", "--resume"))
    assert_same_run(tmp_path / "undisturbed", tmp_path / "run")


@pytest.mark.slow
def test_two_processes_stopped_by_a_signal_to_torchrun_go_on(shared_run, tmp_path):
    """A process that ends before the other has saved; sums of one process taken for those of both;
    BatchNorm statistics that differ between the processes."""
    module, flags, _ = shared_run("teacher")
    flags = [*flags, *LONGER["teacher"], "--batch", "30", "--epochs", "40"]
    finish(begin(module, flags, tmp_path / "undisturbed", torchrun=TORCHRUN))
    stopped = begin(module, flags, tmp_path / "run", "--save-every", "1", torchrun=TORCHRUN)
    while not (tmp_path / "run" / "last.pt").exists():
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    out, err = stopped.communicate(timeout=120)
    assert "--resume goes on from there" in out, err
    state = checkpoint(tmp_path / "run")
    assert state["epoch"] < 39 and len(state["sums"]) == 2
    finish(begin(module, flags, tmp_path / "run", "--resume", torchrun=TORCHRUN))
    assert_same_run(tmp_path / "undisturbed", tmp_path / "run")


@pytest.mark.slow
def test_torchruns_processes_stop_when_it_is_killed(shared_run, tmp_path):
    """Orphans that hold the GPUs and the folder, and that nobody sees; or a stop without a save."""
    module, flags, _ = shared_run("teacher")
    job = begin(module, [*flags, *LONGER["teacher"]], tmp_path / "run", "--batch", "30", "--epochs",
                "5000", "--save-every", "1", torchrun=TORCHRUN)
    while not (tmp_path / "run" / "last.pt").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    job.kill()
    out, err = job.communicate(timeout=120)             # until its processes have ended: their pipe
    assert "--resume goes on from there" in out, err
    assert checkpoint(tmp_path / "run")["epoch"] < 4999
    assert not (tmp_path / "run" / "lock").exists()


def test_slow_tests_wait_until_they_are_asked_for(request):
    """Half an hour of fault tests in everybody's test run, or fault tests that never run again."""
    if not request.config.option.markexpr:
        assert not any(item.get_closest_marker("slow") for item in request.session.items)

    class Item(str):
        name = ""

        def get_closest_marker(self, name):
            return self == name

    def selected(expression):
        items, left_out = [Item("slow"), Item("fast")], []
        hook = argparse.Namespace(pytest_deselected=lambda items: left_out.extend(items))
        option = argparse.Namespace(markexpr=expression)
        conftest.pytest_collection_modifyitems(argparse.Namespace(option=option, hook=hook), items)
        return items, left_out
    assert selected("") == (["fast"], ["slow"])
    assert selected("slow") == (["slow", "fast"], [])       # pytest itself leaves the fast ones out
