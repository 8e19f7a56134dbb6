"""Two machines: an agent of torchrun on each, of which one dies and is started again."""
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

import train_student
from several_processes import free_port
from tiny_runs import checkpoint, read, records

AGENT = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--nnodes=2",
         "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=test"]
ALONE = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
         "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
# 39 steps an epoch, of a second or two.
RUN = [train_student.__file__, *("--dataset shapes --recipe cpu --device cpu --method vit --epochs "
                                 "10 --eval-every 10 --save-every 15 --img-size 16").split()]
# Else torch 2.14 gives an agent that joins later no address to meet at (results/README.md).
SETTINGS = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
LIMIT = 600             # seconds for what takes 20 to 60 on an idle machine


class Agent:
    """torchrun in a process of its own; what it and its worker print is added to a file."""

    def __init__(self, command, log):
        self.log = log
        with open(log, "a") as file:
            self.process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file,
                                            env=os.environ | SETTINGS)

    def wait_until(self, condition):
        end = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def succeeds(self):
        assert self.process.wait(LIMIT) == 0, self.log.read_text()

    def kill(self):
        """kill -9 of the agent and of its worker, as the loss of their machine."""
        pid = self.process.pid
        workers = []
        with suppress(FileNotFoundError):                           # it has ended by itself
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            workers = list(map(int, children.split()))
        self.process.kill()
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        self.process.wait()
        return workers


@pytest.fixture
def start(tmp_path):
    """start(name, command) -> an Agent that does not outlive the test."""
    agents = []

    def start(name, command):
        agents.append(Agent(command, tmp_path / f"{name}.log"))
        return agents[-1]
    yield start
    for agent in agents:
        agent.kill()


def answers(port):
    """Does somebody listen at this port of this machine?"""
    with closing(socket.socket()) as s:
        return s.connect_ex(("localhost", port)) == 0


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers under /proc")
def test_a_machine_that_dies_is_replaced(start, tmp_path):
    """One process that goes on from the checkpoint and one that refuses to, or begins again: each
    agent counts its own restarts, and the new one has none. Steps twice or left out."""
    undisturbed = start("undisturbed", [*ALONE, *RUN, "--out", tmp_path / "undisturbed"])
    undisturbed.succeeds()

    port, run = free_port(), tmp_path / "run"
    command = [*AGENT, f"--rdzv-endpoint=localhost:{port}", *RUN, "--out", run]
    first = start("first", command)                 # the one that must live: it has the store
    first.wait_until(lambda: answers(port))
    second = start("second", command)
    first.wait_until(lambda: len(records(run)) >= 2 if (run / "log.jsonl").exists() else False)
    assert second.kill()
    done = len(records(run))
    assert done < 9, "it was killed too late to say anything"
    third = start("third", command)
    first.succeeds()
    third.succeeds()

    logs = [records(folder) for folder in (tmp_path / "undisturbed", run)]
    for record in logs[0] + logs[1]:
        del record["seconds"], record["images_per_second"]
    assert len(logs[1]) == 10 and logs[0] == logs[1]
    assert checkpoint(run)["world"] == 2 and (run / "result.json").exists()
    command = read(run, "result.json")["command"]
    assert command.startswith("torchrun --nnodes=2 --nproc_per_node=1 train_student.py ")
