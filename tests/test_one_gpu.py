"""The one-GPU script: its commands, its time limits, what a failed stage leaves, a small version.

And the measured steps, experiments/steps.py.
"""
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_student
import train_teacher
from conftest import ROOT, script
from engine import datasets, runtime, settings
from engine.evaluation import COLUMNS
from engine.runtime import Runtime, UserError, run_main
from experiments import ablate, one_gpu, steps
from experiments.one_gpu import Command
from pretended_gpu import GPU, PretendedGPU, short_resnet  # noqa: F401: a fixture

CPU = Runtime(torch.device("cpu"))


def options_of(*flags):
    return one_gpu.parse([*map(str, flags)])


def all_commands(options):
    """Every Command, of a machine that takes all of the time."""
    return [command for stage in options.only for command in one_gpu.commands(
        stage, options, 60 * options.minutes * one_gpu.SHARES[stage])]


def finish(folder, loss, accuracy, epochs=2):
    """Write the files of a finished run."""
    Path(folder).mkdir(parents=True)
    accuracies = dict.fromkeys(COLUMNS, accuracy)
    (Path(folder) / "result.json").write_text(json.dumps({"avg": accuracies}))
    unfinished(folder, loss, epochs, epochs, accuracy)


def unfinished(folder, loss, done, epochs, accuracy):
    """Write the files of a run that has `done` epochs: 1 percent after the first, then `accuracy`,
    and no evaluation after the last one of a run that is not finished."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "config.json").write_text(json.dumps({"epochs": epochs}))
    record = {"loss": loss, "seconds": 30.0, "images_per_second": 100.0}
    first, later = ({"avg": dict.fromkeys(COLUMNS, each)} for each in (1.0, accuracy))
    log = [record | first, *[record | later] * (done - 1)]
    if done < epochs:
        log[-1] = record
    text = "".join(json.dumps(epoch) + "\n" for epoch in log)
    (Path(folder) / "log.jsonl").write_text(text)


# ---- Commands ------------------------------------------------------------------------------------

@pytest.mark.parametrize("device, minutes", [("cuda", 10), ("cuda", 1), ("cpu", 10), ("cpu", 0.1)])
def test_every_command_is_understood_and_has_its_own_folder(device, minutes, monkeypatch):
    """A flag that was renamed, settings that exclude each other, a run in another's folder."""
    monkeypatch.setattr(steps, "matmul_peak", lambda rt: 1e12)
    monkeypatch.setattr(steps, "measure_step", lambda *_: "")
    options = options_of("--device", device, "--minutes", minutes, "--out", "some where/out")
    rt, folders = Runtime(torch.device(device)), []
    for command in all_commands(options):
        program, flags = ablate.split(command.text)
        if program in (ablate.STUDENT, ablate.TEACHER):
            train = train_student if program == ablate.STUDENT else train_teacher
            assert train.parse(flags).out == command.folder
            assert flags[-1] in ("--overwrite", "--resume")
            assert ablate.resolved(command.text, rt).out == command.folder
            folders.append(command.folder)
        elif program == "-m experiments.steps":
            monkeypatch.setattr(runtime, "setup", lambda *_: rt)
            script(steps, monkeypatch, *flags)
        else:
            assert program == "-m pytest"
    names = ["same_float32", "same_bfloat16", "same_cpu", "undisturbed", "resumed", "resumed",
             "teacher_ours", "teacher_paper", "ours", "paper"]
    assert folders == [f"some where/out/{name}" for name in names]


def test_a_precision_is_that_of_all_runs_but_those_that_compare_two():
    """float32's report of a T4, which is for float16."""
    told = {command.name: "--amp fp16" in command.text
            for command in all_commands(options_of("--amp", "fp16"))}
    compared = {"same_float32", "same_bfloat16", "same_cpu", "tests"}
    assert told == {name: name not in compared for name in told}


def test_runs_are_what_the_report_says_of_them():
    """A comparison on one device, a student by the other's teacher, methods of two sizes."""
    by_name = {command.name: command for command in all_commands(options_of("--seed", 3))}
    settings = {}
    for name, command in by_name.items():
        program, flags = ablate.split(command.text)
        if program == ablate.STUDENT:
            settings[name] = train_student.parse(flags)
            train_student.resolve(settings[name], Runtime(torch.device("cuda")))
    same = [settings[f"same_{name}"] for name in ("float32", "bfloat16", "cpu")]
    assert [args.device for args in same] == ["cuda", "cuda", "cpu"]
    assert [args.amp for args in same] == ["none", "bf16", "none"]
    for name, recipe in (("ours", "gpu"), ("paper", "paper")):
        args = settings[name]
        assert args.teacher == by_name[name].needs == f"runs/one_gpu/teacher_{name}"
        assert (args.recipe, args.model, args.img_size, args.patch_size, args.batch,
                args.micro_batch, args.crop) == (recipe, "small", 32, 4, 256, 256, "padded")
        assert args.seed == 3 and args.minutes > 1
    differ = {name for name, value in vars(same[0]).items() if vars(same[2])[name] != value}
    assert differ == {"out", "device"}


def test_the_tests_that_are_run_on_a_gpu_exist():
    """A file or a test that was renamed: pytest would find nothing to run."""
    command, = [command for command in all_commands(options_of()) if command.name == "tests"]
    path = next(word for word in command.text.split() if word.endswith(".py"))
    marked = re.findall(r'reason="needs a GPU[^"]*"\)\ndef (\w+)', (ROOT / path).read_text())
    assert marked and all(command.text.split()[-1] in name for name in marked)


@pytest.mark.parametrize("device, shown, expected", [
    ("cuda", None, "0"), ("cuda:1", None, "1"), ("cuda:1", "3,5", "5"), ("cpu", "3", "")])
def test_the_test_that_needs_a_gpu_sees_the_one_that_is_measured(device, shown, expected,
                                                                 monkeypatch, tmp_path):
    """Another GPU, or none, since the tests hide all."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert one_gpu.visible(device) == expected
    code = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    one_gpu.run(Command("x", python(code), gpu=expected), 30, tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text().strip() == (expected or shown or "None")
    command, = [command for command in all_commands(options_of("--device", device))
                if command.name == "tests"]
    assert command.gpu == expected
    with pytest.raises(UserError, match="that is there"):
        one_gpu.visible("cuda:x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="that is there"):
        one_gpu.visible("cuda:1")


@pytest.mark.parametrize("minutes", [3, 10, 60])
def test_the_minutes_of_runs_fit_into_their_stage(minutes):
    """Runs that are all stopped at the limit, or that leave most of their time."""
    options = options_of("--minutes", minutes)
    for stage in ("teachers", "students"):
        seconds = 60 * minutes * one_gpu.SHARES[stage]
        planned = one_gpu.commands(stage, options, seconds)
        asked = [float(n) for command in planned
                 for n in re.findall(r"--minutes (\S+)", command.text)]
        assert 0.4 * seconds < 60 * sum(asked) + 2 * one_gpu.BEGINNING <= 0.95 * seconds
        assert all(command.seconds < seconds for command in planned)


def test_our_teacher_has_its_recipes_epochs_where_there_is_time():
    """Other epochs than the recipe's on a GPU; 40 of them in seconds that are too few, or a CPU."""
    def asks(*flags):
        options = options_of(*flags)
        command = one_gpu.commands("teachers", options, 60 * options.minutes * 0.24)[0]
        return "--minutes" in command.text
    assert not asks("--minutes", 30)
    assert asks("--minutes", 2) and asks("--minutes", 10, "--device", "cpu")


# ---- Time ----------------------------------------------------------------------------------------

def test_time_that_a_stage_leaves_goes_to_the_next(monkeypatch, tmp_path):
    """Minutes that pass unused; more than there are; shares of stages that are not asked for."""
    clock, given = [0.0], []

    def run_stage(stage, options, seconds, report):
        given.append(seconds)
        clock[0] += 0.5 * seconds
    monkeypatch.setattr(one_gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(one_gpu, "run_stage", run_stage)
    monkeypatch.setattr(one_gpu, "watched_signals", list)
    one_gpu.run_stages(options_of("--out", tmp_path, "--only", "students", "agree", "teachers"))
    shares = [one_gpu.SHARES[name] for name in ("agree", "teachers", "students")]
    first = 600 * shares[0] / sum(shares)
    second = (600 - first / 2) * shares[1] / sum(shares[1:])
    assert given == pytest.approx([first, second, 600 - first / 2 - second / 2])


@pytest.fixture
def report(tmp_path):
    return one_gpu.Report(str(tmp_path / "out"))


def python(code):
    return "-c " + shlex.quote(code)


HANGS = python("import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); "
               "time.sleep(60)")


def test_a_command_leaves_the_time_of_the_later_ones(monkeypatch, report):
    """A first student that takes the second one's half."""
    monkeypatch.setattr(one_gpu, "GRACE", 0.1)
    monkeypatch.setattr(one_gpu, "section", lambda *_: [])
    monkeypatch.setattr(one_gpu, "commands", lambda *_: [
        Command("first", HANGS), Command("second", python("print(1)"), seconds=59)])
    began = time.monotonic()
    one_gpu.run_stage("students", options_of(), 60, report)
    assert report.problems == ["first: stopped at its time limit, 1 s"]
    assert time.monotonic() - began < 20


def test_what_is_not_begun(tmp_path):
    """A student that stops at once since its teacher is missing; seconds too few to compile."""
    log = tmp_path / "log.txt"
    needs = Command("x", python("print(1)"), needs=str(tmp_path / "teacher"))
    assert "teacher is not finished" in one_gpu.attempt(needs, 30, log)
    assert "too little time" in one_gpu.attempt(Command("x", python("print(1)"), least=40), 30, log)
    assert "too little time" in one_gpu.attempt(Command("x", python("print(1)")), -1, log)
    assert not log.exists()
    finish(tmp_path / "teacher", 1.0, 50.0)
    assert one_gpu.attempt(needs, 30, log) == ""


def test_a_run_is_stopped_after_its_first_epoch(tmp_path):
    """Never stopped, stopped before there is anything to resume, or its exit code taken for a
    failure; a run that has ended by itself, which nothing can be learned from."""
    code = f"""
import signal, sys, time
def save(*_):
    print("saved")
    sys.exit(143)
signal.signal(15, save)
time.sleep(0.5)
with open({str(tmp_path / 'log.jsonl')!r}, "w") as file:
    file.write("x")
"""
    log = tmp_path / "log.txt"
    command = Command("x", python(code + "time.sleep(60)"), str(tmp_path), stopped=True)
    assert one_gpu.run(command, 30, log) == ""
    assert log.read_text() == "saved\n"
    assert one_gpu.run(command, 30, log) == ""      # though an earlier call has left an epoch
    assert log.read_text() == "saved\n"
    command = Command("x", python("print(1)"), str(tmp_path / "nothing"), stopped=True)
    assert one_gpu.run(command, 30, log) == "ended before it could be stopped"


# ---- Whatever happens, what came before is in the report -----------------------------------------

def some_fail(stage, options, seconds):
    """Commands of a stage in place of the script's: all that can happen to one."""
    return {
        "machine": [Command("fine", python("print(1)"))],
        "agree": [Command("dies", python("import os; os.kill(os.getpid(), 9)")),
                  Command("after", python("print(2)"))],
        "speed": [Command("steps", python("print('| a row |', flush=True); import time; "
                                          "time.sleep(60)"))],
        "teachers": [Command("fails", python("raise SystemExit('no memory')"))],
        "students": [Command("again", python("print(3)"))],
    }[stage]


def test_a_stage_that_fails_or_hangs_ends_neither_the_report_nor_the_next(monkeypatch, tmp_path):
    monkeypatch.setattr(one_gpu, "commands", some_fail)
    monkeypatch.setattr(one_gpu, "GRACE", 0.2)
    monkeypatch.setattr(one_gpu, "watched_signals", list)
    monkeypatch.setattr(one_gpu, "agreement_table", lambda *_: 1 / 0)
    # Seconds for a Python that prints: 12, 12, 4, 16 and 16.
    shares = {"machine": 0.2, "agree": 0.2, "speed": 0.07, "teachers": 0.27, "students": 0.26}
    monkeypatch.setattr(one_gpu, "SHARES", shares)
    one_gpu.run_stages(options_of("--out", tmp_path, "--minutes", 1, "--device", "cpu"))
    rest = (tmp_path / "report.md").read_text()
    expected = ["## machine", "- fine: done", "| CPU |",
                "## agree", "- dies: killed by SIGKILL", "- after: done", "No table: division by",
                "## speed", "- steps: stopped at its time limit", "\n| a row |",
                "## teachers", "- fails: exit code 1: no memory", "| teacher_ours |",
                "## students", "- again: done", "| paper |", "## All results", "| ours |",
                "What failed or did not fit:\n\n- dies: killed by SIGKILL\n- agree: no table",
                "- steps: stopped", "- fails: exit code 1"]
    for part in expected:
        assert part in rest, part
        rest = rest.partition(part)[2]


def hangs_later(stage, options, seconds):
    waiting = """
import signal, sys, time
def save(*_):
    time.sleep(0.5)
    sys.exit(print("saved"))
signal.signal(15, save)
print("begun", flush=True)
time.sleep(60)
"""
    return [Command("first", python("print(1)")) if stage == "machine"
            else Command("waits", python(waiting))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_script_itself_is_killed(number, monkeypatch, tmp_path):
    """A finished stage that is in the report at the end only; a run that goes on without it, or
    that nobody waits for while it saves."""
    if number == signal.SIGKILL and not sys.platform.startswith("linux"):
        pytest.skip("prctl is Linux's")
    monkeypatch.setattr(one_gpu, "commands", hangs_later)
    monkeypatch.setattr(sys, "argv", ["one_gpu.py", "--device", "cpu", "--out", str(tmp_path)])
    parent = multiprocessing.get_context("fork").Process(target=run_main, args=(one_gpu.main,))
    parent.start()
    log = tmp_path / "logs" / "waits.txt"
    wait_for(lambda: log.exists() and "begun" in log.read_text())
    os.kill(parent.pid, number)
    parent.join(30)
    if number == signal.SIGKILL:
        wait_for(lambda: "saved" in log.read_text())
    assert log.read_text() == "begun\nsaved\n"
    text = (tmp_path / "report.md").read_text()
    assert "- first: done" in text and "| CPU |" in text
    if number == signal.SIGTERM:
        assert parent.exitcode == 128 + number
        assert "Time: machine" in text and "- SIGTERM has ended the script" in text


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- Tables --------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss, accuracy, verdict", [
    (2.0, 50.0, "agrees"), (2.05, 47.0, "agrees"), (2.2, 50.0, "DIFFERS"), (1.8, 50.0, "DIFFERS"),
    (2.0, 40.0, "DIFFERS"), (math.nan, 50.0, "DIFFERS")])
def test_a_difference_is_seen(loss, accuracy, verdict, report):
    """A loss that is NaN, too low or too high; an accuracy that is not compared."""
    options = options_of("--out", report.folder)
    finish(f"{report.folder}/same_cpu", 2.0, 50.0)
    finish(f"{report.folder}/same_float32", loss, accuracy)
    table = one_gpu.agreement_table(options, report)
    assert table[2].endswith(f"| {verdict} |") and table[3].endswith("| not finished |")
    assert report.problems == ["float32: differs from same_cpu"] * (verdict == "DIFFERS")


def test_two_trainings_of_the_same_that_jump_apart_agree(report):
    """2.7 points were between two runs of one command on one GPU: they may be twice that."""
    options = options_of("--out", report.folder)
    finish(f"{report.folder}/undisturbed", 11.0, 25.0)
    finish(f"{report.folder}/resumed", 10.9, 32.0)
    assert one_gpu.agreement_table(options, report)[-3].endswith("| agrees |")


def test_results_of_finished_and_of_other_runs(tmp_path):
    """A stopped run's numbers that are lost, or taken for those of a finished one."""
    finish(tmp_path / "ours", 1.0, 61.25, epochs=4)
    unfinished(tmp_path / "paper", 1.0, 3, 10, 33.0)
    options = options_of("--out", tmp_path)
    rows = one_gpu.results_table(options, ("ours", "paper", "teacher_ours"))[2:]
    assert rows[0] == f"| ours | 4 of 4 |{' 61.2 |' * 4} 2.0 | 100 |"
    assert rows[1] == f"| paper | 3 of 10 |{' 33.0 |' * 4} 1.5 | 100 |"
    assert rows[2].startswith("| teacher_ours | ") and rows[2].endswith(" - | - | - | - | - | - |")
    log = (tmp_path / "paper" / "log.jsonl").read_text().replace('"avg"', '"ema"', 2)
    (tmp_path / "paper" / "log.jsonl").write_text(log)
    rows = one_gpu.results_table(options, ("paper",))[2:]
    assert rows == [f"| paper | 3 of 10 |{' - |' * 4} 1.5 | 100 |",
                    f"| paper, averaged weights | 3 of 10 |{' 33.0 |' * 4} 1.5 | 100 |"]


def test_the_machine_with_a_gpu_and_without(monkeypatch):
    """A machine without nvidia-smi that ends the script; two GPUs, of which one is shown."""
    def of(run):
        monkeypatch.setattr(one_gpu.subprocess, "run", run)
        return one_gpu.machine_table()

    def missing(*_, **__):
        raise FileNotFoundError(2, "no such file")
    two = SimpleNamespace(stdout="A100, 550\nA100, 550\n", stderr="")
    assert any("cannot be run" in line for line in of(missing))
    assert sum("| A100, 550 |" in line for line in of(lambda *_, **__: two)) == 2


def test_a_machine_without_a_gpu(monkeypatch, capsys):
    """A traceback, or minutes of failing commands."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(one_gpu, "run_stages", lambda options: 1 / 0)
    with pytest.raises(SystemExit) as stop:
        script(one_gpu, monkeypatch)
    assert stop.value.code == 2 and "--device cpu" in capsys.readouterr().err


# ---- The measured steps --------------------------------------------------------------------------

@pytest.fixture
def cells(tiny_cifar, short_resnet, monkeypatch):
    """cells(*flags) -> the cells of a row of the table of steps, on the CPU, by a peak of 1e12."""
    for module in (train_teacher, train_student):           # measure_step replaces it
        monkeypatch.setattr(module, "compiled", module.compiled)

    def cells(program, *flags, rt=CPU, **more):
        flags = [*"--dataset cifar10 --imb 12 --recipe cpu --data-dir".split(), str(tiny_cifar),
                 *map(str, flags)]
        row = steps.measure_step(program, flags, 0, 1e12, rt, **more)
        return [cell.strip() for cell in row.strip("|").split("|")]
    return cells


def test_steps_are_the_training_scripts_own(cells):
    """SAM's second pass, or a micro-batch, that is not in the step; images counted twice."""
    sam = cells(ablate.TEACHER, "--batch", 8)
    plain = cells(ablate.TEACHER, "--batch", 8, "--rho", 0)
    assert sam[0] == "resnet32, 32 px, SAM" and plain[0] == "resnet32, 32 px"
    assert 1.6 < float(sam[4]) / float(plain[4]) < 2.4
    small = "--model", "micro", "--batch", 8
    one = cells(ablate.STUDENT, *small)
    two = cells(ablate.STUDENT, *small, "--micro-batch", 4)
    assert one[0] == "micro, 32 px, patch 8" and 1.5 < float(two[4]) / float(one[4]) < 2.1
    for row in (sam, plain, one, two):
        assert row[1] == "8" and row[5] == "-"
        assert float(row[2]) == pytest.approx(8000 / float(row[3]), rel=0.1)


def test_steps_are_compiled_as_asked(cells, monkeypatch):
    """A row that says CUDA graphs and has none."""
    modes = []

    def not_compiled(model, mode, dynamic):
        modes.append(mode)
        return model
    monkeypatch.setattr(torch, "compile", not_compiled)
    flags = ablate.TEACHER, "--batch", 8, "--rho", 0, "--compile"
    assert cells(*flags)[0] == "resnet32, 32 px, compiled"
    assert cells(*flags, mode="reduce-overhead")[0] == "resnet32, 32 px, compiled, graphs"
    assert modes == [None, "reduce-overhead"]


def test_measured_batches_have_no_end():
    """The end of an epoch before enough is measured.

    And a network so slow that its first steps must do."""
    meter = steps.Meter(CPU, 0.0)
    given = meter.remaining_steps(0, ["first", "second"])
    assert [next(given) for _ in range(3)] == [(0, "first"), (1, "second"), (2, "first")]
    meter.count = 10
    meter.begin_epoch(0)
    for step in range(3):
        meter.after_step(0, step, None, None)
    assert meter.count == 3


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_steps_of_the_table(device):
    """Settings that exclude each other; another network than the table's row says."""
    resolved = {}
    for name, (program, flags, on_cpu) in steps.STEPS.items():
        module = train_teacher if program == ablate.TEACHER else train_student
        args = module.parse(f"{flags} {on_cpu if device == 'cpu' else ''}".split())
        module.resolve(args, Runtime(torch.device(device)))
        resolved[name] = args
    assert resolved["resnet32"].rho > 0 and resolved["fast"].arch == "fast"
    sizes = [(args.model, args.img_size, args.patch_size, args.batch, args.micro_batch)
             for name, args in resolved.items() if name in ("mini", "small", "gpu", "base")]
    if device == "cpu":
        assert [size[:3] for size in sizes] == [("mini", 32, 8), ("small", 32, 4),
                                                ("small", 32, 4), ("tiny", 224, 16)]
    else:
        assert resolved["resnet32"].batch == 128
        assert sizes == [("mini", 32, 8, 64, 64), ("small", 32, 4, 256, 256),
                         ("small", 32, 4, 256, 256), ("base", 224, 16, 1024, 128)]


def event(name, device, microseconds, annotation=False, children=()):
    return SimpleNamespace(
        name=name, device_type=SimpleNamespace(name=device), is_user_annotation=annotation,
        cpu_children=children, time_range=SimpleNamespace(elapsed_us=lambda: microseconds))


class Profiler:
    """In place of torch's profiler on a GPU: two steps of two kernels of 1 ms each."""
    def __init__(self, activities):
        assert activities == [torch.profiler.ProfilerActivity.CUDA]

    def start(self):
        pass

    def stop(self):
        pass

    def events(self):
        return [*[event("gemm", "CUDA", 1000)] * 4, event("Memcpy HtoD", "CUDA", 5000),
                event("Optimizer.step#SGD.step", "CUDA", 5000, annotation=True),
                event("cudaLaunchKernel", "CPU", 5000)]


def test_operators_on_a_cpu():
    """An operator that is counted with those that it consists of; those of two steps for one."""
    leaf = event("aten::addmm", "CPU", 1)
    linear = event("aten::linear", "CPU", 1, children=[leaf])
    meter = steps.Meter(CPU, 0.0)
    meter.profiler = SimpleNamespace(
        events=lambda: [linear, leaf, event("Optimizer.step", "CPU", 1)] * steps.PROFILED)
    operators, seconds = meter.launches()
    assert operators == 1 and math.isnan(seconds)


def test_a_profiler_that_sees_no_kernel_counts_none():
    """A GPU that is 0 % busy, where the profiler has no rights."""
    meter = steps.Meter(Runtime(GPU), 0.0)
    meter.profiler = SimpleNamespace(events=lambda: [event("cudaLaunchKernel", "CPU", 1)])
    assert all(map(math.isnan, meter.launches()))


@pytest.mark.parametrize("program", [ablate.TEACHER, ablate.STUDENT])
def test_a_step_on_a_gpu(program, cells, monkeypatch):
    """A tensor on the CPU; copies, launches or annotations that count as kernels; time of two
    steps for one; memory of the step before."""
    called = []
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(0.002))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2 ** 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 ** 34, 2 ** 34))
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: called.append(name))
    monkeypatch.setattr(datasets, "last_loaded", {})
    flags = ("--img-size", 8) if program == ablate.TEACHER else ("--model", "micro")
    with PretendedGPU():
        row = cells(program, *flags, "--batch", 8, rt=Runtime(GPU))
    assert row[4] == "2" and row[7] == "3.0" and "reset_peak_memory_stats" in called
    busy = 2 / float(row[3])
    assert float(row[5].removesuffix("%")) / 100 == pytest.approx(busy, rel=0.05, abs=0.006)


def test_a_step_that_fails_is_a_row(monkeypatch, capsys):
    """A GPU with too little memory for the largest network, which ends the table."""
    monkeypatch.setattr(steps, "matmul_peak", lambda rt: 1e12)

    def measure_step(program, flags, seconds, peak, rt, mode):
        if "--patch-size" in flags:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return "| a row |"
    monkeypatch.setattr(steps, "measure_step", measure_step)
    script(steps, monkeypatch, "--device", "cpu", "--only", "fast", "small", "base")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2::2] == ["| a row |"] * 2
    assert lines[3].startswith("| small | failed: CUDA out of memory. Tried to allocate | - |")
    assert {line.count("|") for line in (lines[0], lines[1], lines[3])} == {9}


# ---- A small version, end to end -----------------------------------------------------------------

class Forked:
    """subprocess.Popen by a fork, in which torch, which takes seconds to import, is there."""

    def __init__(self, words, stdout, **_):
        self.process = multiprocessing.get_context("fork").Process(
            target=be_python, args=(words[1:], stdout.fileno()))
        self.process.start()

    def poll(self):
        return self.process.exitcode

    @property
    def returncode(self):
        return self.process.exitcode

    def terminate(self):
        self.process.terminate()

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("", timeout)


def be_python(words, output):
    """What `python words` does, for a script or module of this project."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
    if words[0] == "-m":
        words = words[1:]
    sys.argv = words
    run_main(import_module(words[0].removesuffix(".py")).main)


def popen(words, **more):
    """A real child for pytest only."""
    return subprocess.Popen(words, **more) if "pytest" in words else Forked(words, **more)


def test_a_small_version(tiny_cifar, tmp_path, monkeypatch, no_pictures, short_resnet):
    """Each stage on a CPU, tiny images: a resumed run that differs, a number that is not found."""
    seed_step = runtime.seed_step

    def slow_in_the_second_epoch(*key):                 # there is time to stop it
        time.sleep(0.2 * (key[1] == 1))
        seed_step(*key)
    monkeypatch.setattr(runtime, "seed_step", slow_in_the_second_epoch)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(one_gpu, "subprocess", SimpleNamespace(
        Popen=popen, run=subprocess.run, STDOUT=subprocess.STDOUT,
        TimeoutExpired=subprocess.TimeoutExpired))
    monkeypatch.setattr(settings, "SHORTEST", 0.01)
    monkeypatch.setattr(one_gpu, "minutes", lambda seconds: "--minutes 0.01")
    monkeypatch.setattr(one_gpu, "COMPILING", 1000)
    monkeypatch.setattr(steps, "matmul_peak", lambda rt: 1e12)
    few = {name: step for name, step in steps.STEPS.items() if name not in ("small", "gpu", "base")}
    monkeypatch.setattr(steps, "STEPS", few)
    out = tmp_path / "out"
    flags = ("--device", "cpu", "--data-dir", tiny_cifar, "--imb", 12, "--minutes", 5,
             "--out", out)
    script(one_gpu, monkeypatch, *flags)
    text = (out / "report.md").read_text()
    assert not re.search(r"exit code|killed|time limit,|No table", text)
    problems = text.partition("did not fit:\n\n")[2].splitlines()
    assert problems == [f"- {name}: not begun: too little time is left"
                        for name in ("compiled", "graphs")]
    assert text.count("| agrees |") == 3
    for line in text.splitlines():
        if line.startswith(("| float32", "| stopped, resumed")):
            assert "| +0.00%, +0.0 points | agrees |" in line
    assert "1 skipped" in text or "1 passed" in text
    for name in ("teacher_ours", "teacher_paper", "ours", "paper"):
        rows = re.findall(rf"\| {name} \|(.*)\|", text)
        assert len(rows) == 2 and rows[0] == rows[1]            # its stage's, and at the end
        assert re.fullmatch(r" (\d+) of \1 \|( \d+\.\d \|){5} \d+ ", rows[0])
    assert re.search(r"\| fast, 32 px \| 16 \| \d+ ", text)
    saved = json.loads((out / "ours" / "result.json").read_text())
    assert saved["teacher"] == str(out / "teacher_ours")
    with pytest.raises(SystemExit):                             # other data would go by its name
        script(one_gpu, monkeypatch, *flags, "--seed", 1)
    # Again: nothing is trained, everything is still said.
    monkeypatch.setattr(one_gpu, "run", lambda *_: "")
    script(one_gpu, monkeypatch, *flags, "--only", "teachers", "students")
    again = (out / "report.md").read_text().removeprefix(text)
    assert again.count(": finished before") == 4 and again.count("| ours |") == 2
