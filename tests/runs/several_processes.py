"""Training scripts in several processes, which share one import of torch.

A server process imports everything once and forks the processes of each job (it has trained
nothing itself: a fork after a backward pass fails where there is a GPU).
"""
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train_student
from conftest import ROOT
from engine import runtime

HERE = Path(__file__).parent
PRELOADED = ["several_processes", "tiny_runs", "torch._dynamo"]     # the optimizers import the last
FORKS = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="session")
def server():
    """The server runs from here on, with everything imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, HERE.parent, HERE))))
        patch.setenv("OMP_NUM_THREADS", "1")
        FORKS.set_forkserver_preload(PRELOADED)
        multiprocessing.forkserver.ensure_running()


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def begin(log):
    """Start of a new process: a group of its own; what it prints is added to a file."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def run_script(module, flags, prepare):
    """The main of a training script, after prepare(); without a picture at the end."""
    train_student.draw_summary = print
    torch.set_num_threads(1)
    sys.argv = [f"{module}.py", *flags]
    if prepare:
        prepare()
    runtime.run_main(importlib.import_module(module).main)


def one_of_several(log, rank, processes, port, *script):
    """One process, with the environment that torchrun gives it. script: see run_script."""
    begin(log)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                      LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="localhost",
                      MASTER_PORT=str(port))
    run_script(*script)


def under_torchrun(log, processes, *script):
    """torchrun itself, but that it forks its workers instead of starting Python anew."""
    begin(log)
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id="test",
                          rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
                          monitor_interval=0.1, start_method="fork")
    elastic_launch(config, run_script)(*script)


class Job:
    """A process that runs target(log, *args)."""

    def __init__(self, target, log, *args):
        self.log, self.process = Path(log), FORKS.Process(target=target, args=(str(log), *args))
        self.process.start()

    def wait_until(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.process.is_alive(), self.log.read_text()
            time.sleep(0.02)

    def children(self):
        """Process ids; under Linux."""
        pid = self.process.pid
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def end(self, seconds=120):
        """(exit code, what was printed) once it has ended by itself."""
        self.process.join(seconds)
        if self.process.is_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail(f"it goes on and on: {self.log.read_text()}")
        return self.process.exitcode, self.log.read_text()


# ---- What tests call -----------------------------------------------------------------------------

def start(log, module, *flags):
    """A Job of a script alone."""
    return Job(one_of_several, log, 0, 1, free_port(), module, list(map(str, flags)), None)


def start_torchrun(processes, log, module, *flags):
    """A Job of torchrun; its children are the script's processes."""
    return Job(under_torchrun, log, processes, module, list(map(str, flags)), None)


def run(processes, log, module, *flags, prepare=None):
    """(largest exit code, what was printed) of a script in so many processes.

    prepare: a function that each of them calls first.
    """
    port, flags = free_port(), list(map(str, flags))
    jobs = [Job(one_of_several, log, rank, processes, port, module, flags, prepare)
            for rank in range(processes)]
    codes, texts = zip(*[job.end() for job in jobs])
    return max(codes), texts[-1]
