"""--compile: few graphs for any number of steps, the same losses, a line where it cannot be."""
import functools
import os
import tempfile

import pytest
import torch
import torch._dynamo

import train_student
import train_teacher
from engine.run_folder import Run
from several_processes import run
from tiny_runs import PLAIN, STUDENT, TEACHER, records, train

pytest_plugins = ["tiny_runs", "several_processes"]
# 89 images in four steps of 23.
FLAGS = {train_teacher: [*TEACHER, "--batch", "26"],
         train_student: [*STUDENT, *("--batch 26 --micro-batch 26 --drop-path 0 --stem "
                                     "fast").split()]}
GRAPHS = {train_teacher: 2, train_student: 1}       # SAM's second pass has one of its own


@pytest.fixture
def graphs(monkeypatch):
    """List that grows at each epoch's end by the number of graphs of the network until then."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    numbers, after_epoch = [], Run.after_epoch

    def counted(*given, **more):
        one_line_function = 1                       # of check_compiler
        found = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        numbers.append(found - one_line_function)
        after_epoch(*given, **more)
    monkeypatch.setattr(Run, "after_epoch", counted)
    yield numbers
    torch._dynamo.reset()


@pytest.fixture
def compared(teacher_run, tiny_cifar, tmp_path, monkeypatch, graphs):
    """compared(script) -> (losses without --compile, losses with it): [first step's, epochs']."""
    first, after_step = [], Run.after_step

    def noted(run, epoch, step, values, finite):
        if epoch == step == 0:
            first.append(values[0].item())
        after_step(run, epoch, step, values, finite)
    monkeypatch.setattr(Run, "after_step", noted)

    def compared(module):
        flags = [*FLAGS[module], "--data-dir", tiny_cifar]
        if module is train_student:
            flags += ["--teacher", teacher_run]
        for name, more in (("eager", []), ("compiled", ["--compile"])):
            graphs.clear()
            train(module, *flags, *more, "--out", tmp_path / name)
        means = [[r["loss"] for r in records(tmp_path / name)] for name in ("eager", "compiled")]
        return [first[0], *means[0]], [first[1], *means[1]]
    return compared


@pytest.mark.parametrize("module", FLAGS)
def test_the_number_of_graphs_does_not_grow(module, compared, graphs, monkeypatch):
    """A graph for each size of batch, or for each step: minutes of compiling where there should be
    seconds. (Here they are traced, and computed as they are.)"""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    eager, compiled = compared(module)
    assert graphs == [GRAPHS[module]] * 2
    assert compiled == pytest.approx(eager, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("module", FLAGS)
def test_a_compiled_network_learns_the_same(module, compared, graphs, tmp_path, monkeypatch):
    """Another network than the one that is trained; a compiler that does not end, for which minutes
    are enough on two slow cores."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "nothing_compiled_before"))
    eager, compiled = compared(module)
    assert graphs == [GRAPHS[module]] * 2
    assert compiled[0] == pytest.approx(eager[0], rel=1e-4)
    assert compiled == pytest.approx(eager, rel=3e-2)       # steps of SAM enlarge roundings


def without_a_compiler():
    """In a process of its own."""
    os.environ["PATH"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    os.environ.pop("CXX", None)


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("module, flags", [("train_student", PLAIN), ("train_teacher", TEACHER)])
def test_without_a_compiler_a_line_says_so(module, flags, tiny_cifar, tmp_path):
    """A traceback of a hundred lines, after the data are read; a run that is overwritten first."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{}")
    code, printed = run(1, tmp_path / "log", module, *flags, "--compile", "--overwrite",
                        "--data-dir", tiny_cifar, "--out", tmp_path / "run",
                        prepare=without_a_compiler)
    assert code == 2, printed
    line, = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "--compile does not work here" in line and "C++ compiler" in line
    assert "Traceback" not in printed and (tmp_path / "run" / "result.json").exists()
