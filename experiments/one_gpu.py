r"""The first thing to run on a GPU: does the code work there, is it right, how fast, and how good?

    python -m experiments.one_gpu --data-dir data --minutes 10 --out runs/one_gpu
    python -m experiments.one_gpu --only agree speed       some of the stages
    python -m experiments.one_gpu --device cpu             the same stages on a CPU, in small
    python -m experiments.one_gpu --commands               the commands; runs nothing

machine    GPU, driver, torch, CPU, memory
agree      a plain ViT on the GPU in float32 and bfloat16, beside the CPU; the test that needs a
           GPU; a teacher that is stopped and resumed, beside an undisturbed one
speed      training steps, see experiments/steps.py
teachers   ours, and the paper's LDAM-DRW-SAM
students   ours and the paper's method, ViT-S at 32 px, for as many epochs as there is time

Each stage has a share of the minutes; what it leaves over goes to the next ones. OUT/report.md
grows meanwhile, OUT/logs/ has what is printed. What fails or takes too long is named there, and the
next command begins. One process at a time, since several slow each other down. The same --out again
skips finished runs. CIFAR, where it is missing, is downloaded within the minutes of `agree`.
"""
import argparse
import glob
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

import torch

from engine import runtime
from engine.evaluation import COLUMNS
from engine.records import read_json, read_log
from engine.runtime import (ENDS_WITH_PARENT, PRECISIONS, Runtime, UserError, one_line,
                            watched_signals)
from engine.settings import SHORTEST
from experiments.ablate import STUDENT, TEACHER, is_finished
from images.machine import total_memory

SHARES = {"machine": 0.02, "agree": 0.26, "speed": 0.16, "teachers": 0.24, "students": 0.32}
GRACE = 15                  # seconds from SIGTERM, at which training saves, to SIGKILL
BEGINNING = 10              # seconds of a child before its --minutes begin: imports
WHOLE = 90                  # seconds with which our teacher has all epochs of its recipe on a GPU
COMPILING = 50              # seconds without which torch.compile is not tried
SIZE = {"cuda": "--model small --img-size 32 --patch-size 4 --batch 256 --micro-batch 256",
        "cpu": "--model micro --img-size 32 --patch-size 8 --batch 64 --micro-batch 64"}
# The paper's crops and learning rate are for 224 px and batches of 1,024.
AT_32_PX = "--crop padded --eval-crop 1 --lr 5e-4"
# Runs that should agree: what, its folder, that of its reference, and how far their accuracies may
# be apart, percent points (re-weighting makes those of the last pair jump); and their losses.
PAIRS = [("float32", "same_float32", "same_cpu", 5.0),
         ("bfloat16", "same_bfloat16", "same_cpu", 5.0),
         ("stopped, resumed", "resumed", "undisturbed", 10.0)]
LOSS_APART = 0.05                           # a share
RUNS = {"teachers": ("teacher_ours", "teacher_paper"), "students": ("ours", "paper")}


# ---- Commands ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Command:
    name: str               # of its log
    text: str               # what follows `python`
    folder: str = ""        # of a training run
    seconds: float = 0      # that the commands before it leave
    least: float = 0        # seconds: with less it is not begun
    needs: str = ""         # the run folder of its teacher
    stopped: bool = False   # SIGTERM after its first epoch
    gpu: str = ""           # the only one that it may see


def commands(stage, options, seconds):
    """The Commands of a stage of so many seconds, in their order."""
    if stage == "agree":
        return agree_commands(options)
    if stage == "speed":
        steps = f"-m experiments.steps {common_flags(options)} {device_flags(options)} "
        steps += f"--seconds {min(3, 0.1 * options.minutes):.1f}"
        compiled = f"{steps} --only resnet32 small --compile"
        return [Command("steps", steps), Command("compiled", compiled, least=COMPILING),
                Command("graphs", f"{compiled} --graphs", least=COMPILING)]
    if stage == "teachers":
        return teacher_commands(options, seconds)
    if stage == "students":
        return student_commands(options, seconds)
    return []


def agree_epochs(options):
    return max(1, min(3, round(options.minutes / 5)))


def agree_commands(options):
    epochs = agree_epochs(options)
    same = (f"{STUDENT} --recipe cpu --method vit --model micro --batch 256 --micro-batch 256 "
            f"--epochs {epochs} --warmup-epochs 0 --drw-epoch {epochs}")
    short = (f"{TEACHER} --recipe cpu --epochs 2 --drw-epoch 1 --batch 128 --eval-every 2 "
             f"{device_flags(options)}")
    tests = "-m pytest -q -p no:xdist -o addopts= tests/test_operations.py -k gpu"
    return [training(options, "same_float32", f"{same} --device {options.device} --amp none"),
            training(options, "same_bfloat16", f"{same} --device {options.device} --amp bf16"),
            training(options, "same_cpu", f"{same} --device cpu --amp none"),
            Command("tests", tests, gpu=visible(options.device)),
            training(options, "undisturbed", short),
            training(options, "resumed", short, log="stopped", stopped=True),
            training(options, "resumed", short, begin="--resume")]


def visible(device):
    """CUDA_VISIBLE_DEVICES with which a process sees the GPU `device` alone; "" for the CPU.

    UserError for one that is not there.
    """
    if device == "cpu":
        return ""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = shown.split(",") if shown else list(map(str, range(64)))
    if not re.fullmatch(r"cuda(:\d+)?", device) or int(device[5:] or 0) >= len(numbers):
        raise UserError(f"--device is cuda, cuda:N of a GPU that is there, or cpu, not {device}")
    return numbers[int(device[5:] or 0)]


def teacher_commands(options, seconds):
    first, second = 0.4 * seconds, 0.6 * seconds
    ours = f"{TEACHER} --recipe ours {device_flags(options)}"
    if options.device == "cpu" or first < WHOLE:
        ours += f" {minutes(first)}"
    paper = f"{TEACHER} --recipe paper {device_flags(options)} {minutes(second)}"
    return [training(options, "teacher_ours", ours),
            training(options, "teacher_paper", paper, seconds=second)]


def student_commands(options, seconds):
    """Both are of one size, which is the gpu recipe's, and have half of the time each."""
    size = SIZE["cpu" if options.device == "cpu" else "cuda"]
    ours = f"--recipe ours {size}" if options.device == "cpu" else "--recipe gpu"
    planned = []
    for name, recipe in (("ours", ours), ("paper", f"--recipe paper {size} {AT_32_PX}")):
        teacher = os.path.join(options.out, f"teacher_{name}")
        flags = (f"{STUDENT} {recipe} --teacher {shlex.quote(teacher)} {device_flags(options)} "
                 f"{minutes(seconds / 2)}")
        planned.append(training(options, name, flags, needs=teacher, seconds=seconds / 2))
    return planned


def training(options, name, command, log=None, begin="--overwrite", **more):
    """The Command of a run in OUT/name."""
    folder = os.path.join(options.out, name)
    text = f"{command} {common_flags(options)} --out {shlex.quote(folder)} {begin}"
    return Command(log or name, text, folder, **more)


def common_flags(options):
    return shlex.join(["--dataset", options.dataset, "--imb", f"{options.imb:g}", "--data-dir",
                       options.data_dir, "--seed", str(options.seed)])


def device_flags(options):
    return f"--device {options.device} --amp {options.amp}"


def minutes(seconds):
    """The --minutes of a run that is to end within so many seconds."""
    return f"--minutes {max(SHORTEST, (0.9 * seconds - BEGINNING) / 60):.2f}"


# ---- Running -------------------------------------------------------------------------------------

def attempt(command, limit, log):
    """Run a command if it can be; what went wrong, or ""."""
    if command.needs and not is_finished(command.needs):
        return f"not begun: {command.needs} is not finished"
    if limit <= command.least:
        return "not begun: too little time is left"
    return run(command, limit, log)


def run(command, limit, log):
    """Run a command as a child for at most `limit` seconds; what went wrong, or "".

    log: the file for what it prints. Whatever ends this function ends the child.
    """
    deadline, asked = time.monotonic() + limit, False
    before = last_logged(command.folder)        # of an earlier call
    with open(log, "w") as file:
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": command.gpu} if command.gpu else {})
        child = subprocess.Popen([sys.executable, *shlex.split(command.text)], stdout=file,
                                 env=environment, stderr=subprocess.STDOUT,
                                 preexec_fn=ENDS_WITH_PARENT)
        try:
            while child.poll() is None and time.monotonic() < deadline:
                if command.stopped and not asked and last_logged(command.folder) > before:
                    child.terminate()
                    asked = True
                time.sleep(0.05)
            late = child.poll() is None
        finally:
            end(child)
    code = child.returncode
    if late:
        return f"stopped at its time limit, {limit:.0f} s"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if command.stopped and code == 0:
        return "ended before it could be stopped"
    if code and not (asked and code == 128 + signal.SIGTERM):
        return f"exit code {code}: {last_line(log)}"
    return ""


def end(child):
    """Ask a child to end, at which training saves; kill it GRACE seconds later."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def last_logged(folder):
    """When an epoch was last logged in a run folder, in ns; 0: never."""
    log = os.path.join(folder, "log.jsonl")
    if not os.path.exists(log) or os.path.getsize(log) == 0:
        return 0
    return os.stat(log).st_mtime_ns


def check_earlier_runs(options):
    """UserError if OUT has runs of other data, seed or device, which would pass for this call's."""
    for path in sorted(glob.glob(os.path.join(glob.escape(options.out), "*", "config.json"))):
        folder = os.path.dirname(path)
        config = read_json(folder, "config.json")
        expected = {name: getattr(options, name) for name in ("dataset", "imb", "seed", "device")}
        if os.path.basename(folder) == "same_cpu":
            expected["device"] = "cpu"
        if "agree" in options.only and os.path.basename(folder).startswith("same_"):
            expected["epochs"] = agree_epochs(options)
        for name, value in expected.items():
            if config.get(name) != value:
                raise UserError(f"{folder} is a run with --{name} {config.get(name)}: choose "
                                "another --out")


def lines_of(log):
    """What a command has printed; nothing if it was not begun."""
    if not os.path.exists(log):
        return []
    with open(log, errors="replace") as file:
        return [line for line in file.read().split("\n") if line.strip()]


def last_line(log):
    return one_line((lines_of(log) or ["nothing was printed"])[-1])


class Report:
    """OUT/report.md, and the same on stdout. problems: what failed or did not fit, so far."""

    def __init__(self, folder):
        self.folder, self.problems = folder, []
        os.makedirs(os.path.join(folder, "logs"), exist_ok=True)

    def write(self, *lines):
        """Add lines, which are in the file when this returns."""
        with open(os.path.join(self.folder, "report.md"), "a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
        print(*lines, sep="\n", flush=True)

    def log(self, name):
        return os.path.join(self.folder, "logs", f"{name}.txt")


def run_stage(stage, options, seconds, report):
    """Run a stage's commands, and write its section of the report."""
    deadline, planned = time.monotonic() + seconds, []
    report.write("", f"## {stage}", "")
    for command in commands(stage, options, seconds):
        if command.folder and is_finished(command.folder):
            report.write(f"- {command.name}: finished before")
        else:
            planned.append(command)
    for i, command in enumerate(planned):
        start = time.monotonic()
        with suppress(FileNotFoundError):
            os.remove(report.log(command.name))         # of an earlier call
        limit = deadline - start - sum(later.seconds for later in planned[i + 1:])
        problem = attempt(command, limit, report.log(command.name))
        if problem:
            report.problems.append(f"{command.name}: {problem}")
        report.write(f"- {command.name}: {problem or 'done'}, {time.monotonic() - start:.0f} s, "
                     f"`python {command.text}`")
    try:
        lines = section(stage, options, report)
    except Exception as error:                  # a damaged file must not end the other stages
        lines = [f"No table: {one_line(error)}"]
        report.problems.append(f"{stage}: no table ({one_line(error)})")
    report.write("", *lines)


def run_stages(options):
    """All stages; then, whatever has ended them, what came of them."""
    check_earlier_runs(options)
    report, began, took = Report(options.out), time.monotonic(), []
    report.write(f"# {options.device}, {options.minutes:g} minutes, "
                 f"{time.strftime('%Y-%m-%d %H:%M')}")

    def stop(number, _):
        report.problems.append(f"{signal.Signals(number).name} has ended the script")
        sys.exit(128 + number)
    for number in watched_signals():
        signal.signal(number, stop)
    try:
        for i, stage in enumerate(options.only):
            start = time.monotonic()
            left = began + 60 * options.minutes - start
            share = SHARES[stage] / sum(SHARES[name] for name in options.only[i:])
            run_stage(stage, options, share * left, report)
            took.append(f"{stage} {time.monotonic() - start:.0f} s")
    finally:
        names = [*RUNS["teachers"], *RUNS["students"]]
        report.write("", "## All results", "", *results_table(options, names), "",
                     f"Time: {', '.join(took)}.", "", "What failed or did not fit:", "",
                     *[f"- {problem}" for problem in report.problems or ["nothing"]])


# ---- Sections of the report ----------------------------------------------------------------------

def section(stage, options, report):
    """A stage's tables, as lines of markdown."""
    if stage == "machine":
        return machine_table()
    if stage == "agree":
        return agreement_table(options, report)
    if stage == "speed":
        tables = [[line for line in lines_of(report.log(name)) if line.startswith("|")]
                  for name in ("steps", "compiled", "graphs")]
        heading = next((table[:2] for table in tables if table), [])
        return heading + [row for table in tables for row in table[2:]]
    return results_table(options, RUNS[stage])


def machine_table():
    """What there is. The GPU is asked by nvidia-smi, for this process leaves it to its children."""
    fields = ("name,driver_version,memory.total,memory.used,utilization.gpu,power.limit,"
              "clocks.max.sm")
    try:
        asked = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
                               capture_output=True, text=True, timeout=20)
        gpus = [f"| GPU: {fields.replace(',', ', ')} | {one_line(line)} |"
                for line in (asked.stdout or asked.stderr).splitlines() if line.strip()]
    except (OSError, subprocess.TimeoutExpired) as error:
        gpus = [f"| GPU | nvidia-smi cannot be run: {one_line(error)} |"]
    return ["| what | here |", "| --- | --- |", *gpus,
            f"| torch, CUDA, cuDNN | {torch.__version__}, {torch.version.cuda}, "
            f"{torch.backends.cudnn.version()} |",
            f"| CPU | {Runtime(torch.device('cpu')).hardware()}; the machine has "
            f"{os.cpu_count()} |",
            f"| memory | {total_memory() / 2 ** 30:.0f} GiB |",
            f"| Python, system | {platform.python_version()}, {platform.platform()} |"]


def agreement_table(options, report):
    """Each run beside its reference: loss and accuracy of the last epoch, and the verdict."""
    lines = ["| run | loss | accuracy | loss of the reference | accuracy | apart | verdict |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for title, *names, most in PAIRS:
        folders = [os.path.join(options.out, name) for name in names]
        if not all(map(is_finished, folders)):
            lines.append(f"| {title} | - | - | - | - | - | not finished |")
            continue
        (loss, points), (other_loss, other_points) = map(last_epoch, folders)
        apart, points_apart = (loss - other_loss) / other_loss, points - other_points
        agrees = abs(apart) <= LOSS_APART and abs(points_apart) <= most      # NaN does not
        if not agrees:
            report.problems.append(f"{title}: differs from {names[1]}")
        lines.append(f"| {title} | {loss:.4f} | {points:.1f} | {other_loss:.4f} | "
                     f"{other_points:.1f} | {apart:+.2%}, {points_apart:+.1f} points | "
                     f"{'agrees' if agrees else 'DIFFERS'} |")
    return [*lines, "", f"The test that needs a GPU: {last_line(report.log('tests'))}"]


def last_epoch(folder):
    """(loss, percent of right answers) of a finished run's last epoch."""
    record = read_log(folder)[-1]
    return record["loss"], record["avg"]["overall"]


def results_table(options, names):
    """Accuracies of these runs in percent: of one that is not finished, its last evaluation's."""
    lines = ["| run | epochs | overall | head | mid | tail | minutes | images/s |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name in names:
        lines += result_rows(name, os.path.join(options.out, name))
    return lines


def result_rows(name, folder):
    """The row of a run, and one of its averaged weights, if it has them."""
    if not last_logged(folder):
        return [f"| {name} | none |{' - |' * 6}"]
    try:
        epochs, log = read_json(folder, "config.json")["epochs"], read_log(folder)
        result = read_json(folder, "result.json") if is_finished(folder) else {}
    except UserError as error:                  # a damaged file
        return [f"| {name} | {one_line(error)} |{' - |' * 6}"]
    seconds = sum(epoch["seconds"] for epoch in log)
    unevaluated = [epoch for epoch in log if "avg" not in epoch]        # the clock goes on there
    speed = statistics.median(epoch["images_per_second"] for epoch in unevaluated or log)
    rows = []
    for head, title in (("avg", name), ("ema", f"{name}, averaged weights")):
        evaluations = [each[head] for each in (*log, result) if head in each]
        cells = ["-"] * len(COLUMNS)
        if evaluations:
            cells = [f"{evaluations[-1][column]:.1f}" for column in COLUMNS]
        if evaluations or head == "avg":
            rows.append(f"| {title} | {len(log)} of {epochs} | {' | '.join(cells)} | "
                        f"{seconds / 60:.1f} | {speed:.0f} |")
    return rows


# ---- The script ----------------------------------------------------------------------------------

def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m experiments.one_gpu", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10", choices=("cifar10", "cifar100"))
    parser.add_argument("--imb", type=float, default=100.0, help="imbalance [100]")
    parser.add_argument("--data-dir", default="data", help="CIFAR's folder [data]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0, help="of all stages [10]")
    parser.add_argument("--out", default="runs/one_gpu", help="for report and runs [runs/one_gpu]")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu [cuda]")
    parser.add_argument("--amp", default="auto", choices=("auto", *PRECISIONS.values()),
                        metavar="TYPE", help="auto, bf16, fp16 (for a T4, a V100) or none [auto]")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES), metavar="STAGE",
                        help=f"of {', '.join(SHARES)} [all]")
    parser.add_argument("--commands", action="store_true", help="print the commands; run nothing")
    options = parser.parse_args(argv)
    if not 0 < options.minutes < math.inf:
        raise UserError(f"--minutes must be above 0, not {options.minutes}")
    options.only = [stage for stage in SHARES if stage in options.only]
    return options


def main():
    options = parse()
    if options.commands:
        for stage in options.only:
            share = SHARES[stage] / sum(SHARES[name] for name in options.only)
            for command in commands(stage, options, 60 * options.minutes * share):
                print(f"python {command.text}")
    elif options.device != "cpu" and not torch.cuda.is_available():
        raise UserError("this torch sees no GPU: --device cpu tries the stages on a CPU")
    else:
        run_stages(options)


if __name__ == "__main__":
    runtime.run_main(main)
