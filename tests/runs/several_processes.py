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


def write_to(log):
    """Send what this process prints to a file, after what other processes have written there."""
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


def one_of_several(rank, processes, port, log, module, flags, prepare):
    """One process of a job, with the environment that torchrun gives it."""
    write_to(log)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                      LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="localhost",
                      MASTER_PORT=str(port))
    run_script(module, flags, prepare)


def launch(processes, log, module, *flags, prepare=None):
    """(largest exit code, what was printed) of a script in so many processes."""
    port, flags = free_port(), list(map(str, flags))
    jobs = [FORKS.Process(target=one_of_several, args=(rank, processes, port, str(log), module,
                                                       flags, prepare))
            for rank in range(processes)]
    for job in jobs:
        job.start()
    end = time.monotonic() + 200
    for job in jobs:
        job.join(max(0, end - time.monotonic()))
    hanging = [job for job in jobs if job.is_alive()]
    for job in hanging:
        job.kill()
    assert not hanging, Path(log).read_text()
    return max(job.exitcode for job in jobs), Path(log).read_text()


# ---- Under torchrun ------------------------------------------------------------------------------

def torchrun(processes, log, module, flags):
    """torchrun itself, but that it forks its workers instead of starting Python anew."""
    write_to(log)
    os.setsid()
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id="test",
                          rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
                          monitor_interval=0.1, start_method="fork")
    elastic_launch(config, run_script)(module, flags, None)


class Torchrun:
    """A job under torchrun; what it prints goes to a file."""

    def __init__(self, processes, log, module, *flags):
        self.log, flags = Path(log), list(map(str, flags))
        self.process = FORKS.Process(target=torchrun, args=(processes, str(log), module, flags))
        self.process.start()

    def wait_until(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.process.is_alive(), self.log.read_text()
            time.sleep(0.02)

    def workers(self):
        pid = self.process.pid
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def end(self, seconds=60):
        """(exit code, what was printed) once the job has ended by itself."""
        self.process.join(seconds)
        if self.process.is_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail(self.log.read_text())
        return self.process.exitcode, self.log.read_text()
