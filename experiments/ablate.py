r"""Tables of runs over several seeds, beside the published numbers: each row is a command.

    python -m experiments.ablate main --seeds 0 1 2         ViT, DeiT-LT and ours, means of 3 seeds
    python -m experiments.ablate table5 --imb 50            further flags go to every run
    python -m experiments.ablate table1 --show              the table of finished runs; no training
    python -m experiments.ablate table2 --commands          the commands; no training

Runs one command after the other. Finished runs are skipped, those that were stopped are resumed,
teachers are shared. A signal to this process reaches its runs, which save; then all end.

--jobs N runs so many at a time, each with its share of the CPU's threads, and what it prints in a
file beside its folder, runs/NAME.txt: for small runs, which leave a GPU idle. Memory is not shared
out. A run whose teacher another one trains waits for it.

Printed as markdown: accuracies in percent, mean and standard deviation over the finished seeds.
"teacher right": percent of training images whose teacher label is that of the image (if mixed: of
its larger part), mean of the epochs before --drw-epoch.

main     ViT, DeiT-LT (LDAM-DRW-SAM) and ours, at the length of the cpu recipe
table1   the teacher and its input (the paper's Table 1; here without re-weighting)
table2   the methods that the paper compares on a ViT, of its Table 2
table5   the parts of DeiT-LT, added one by one
table6   sizes of the student
ours     --recipe ours, and changes of its student taken back; 20 epochs
modes    DeiT's modes of distillation on balanced images, beside a course report's; 20 epochs
"""
import argparse
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import train_student
import train_teacher
from data_lt import LISTS
from engine import runtime
from engine.datasets import fingerprint_of_files, has_files, load_data
from engine.evaluation import TITLES, columns
from engine.networks import retrained
from engine.past_run import real_paths
from engine.records import read_json, read_log, teacher_right
from engine.runtime import ENDS_WITH_PARENT, UserError, watched_signals
from engine.settings import CARRIED, DATA_SETTINGS, NOT_RESUMED, as_flags, flag, resolve_data
from experiments import crt, deit3
from images.files import DataError
from images.machine import cpus

# Seconds between two looks at the runs. A terminal's Ctrl-C reaches them directly, too: handed on
# within a second it counts as the same.
POLL = 0.1


@dataclass(frozen=True)
class Row:
    title: str
    command: str                # what follows `python`
    head: str = "avg"           # whose accuracies are shown: cls, dist or avg
    published: tuple = ()       # overall accuracies, percent, as PUBLISHED_FOR; None: not published


# ---- Tables --------------------------------------------------------------------------------------

STUDENT, TEACHER = "train_student.py", "train_teacher.py"
CRT, DEIT3 = "-m experiments.crt", "-m experiments.deit3"
NOT_MIXED = "--mixup 0 --cutmix 0"
# Its teacher is named, for a --teacher given to the whole table would replace it.
DEIT = f"{STUDENT} --method deit --teacher strong"

MAIN = [
    Row("ViT", f"{STUDENT} --method vit --recipe cpu", "avg", (62.6, 70.1, 35.0, 39.0)),
    Row("DeiT-LT, CLS", f"{STUDENT} --recipe cpu", "cls"),
    Row("DeiT-LT, DIST", f"{STUDENT} --recipe cpu", "dist"),
    Row("DeiT-LT, average", f"{STUDENT} --recipe cpu", "avg", (84.8, 87.5, 52.0, 54.1)),
    Row("ours, CLS", f"{STUDENT} --recipe ours", "cls"),
    Row("ours, DIST", f"{STUDENT} --recipe ours", "dist"),
    Row("ours, average", f"{STUDENT} --recipe ours", "avg"),
    Row("ours without a teacher", f"{STUDENT} --method vit --recipe ours"),
]
TABLE1 = [
    Row("in-distribution teacher, mixed images", DEIT, "avg", (70.2,)),
    Row("DeiT-LT's teacher, weak images, not mixed",
        f"{STUDENT} --beta 0 --teacher-view weak {NOT_MIXED}", "avg", (54.2,)),
    Row("DeiT-LT's teacher, strong images, not mixed",
        f"{STUDENT} --beta 0 {NOT_MIXED}", "avg", (69.6,)),
    Row("DeiT-LT's teacher, strong images, mixed", f"{STUDENT} --beta 0", "avg", (79.4,)),
]
TABLE2 = [
    Row("ViT", f"{STUDENT} --method vit", "avg", (62.6, 70.1, 35.0, 39.0)),
    Row("ViT, cRT", CRT, "avg", (68.9, 74.5, 38.9, 42.2)),
    Row("DeiT", DEIT, "avg", (70.2, 77.5, 31.3, 39.1)),
    Row("DeiT-III", DEIT3, "avg", (59.1, 68.2, 38.1, 44.1)),
    Row("DeiT-LT (LDAM-DRW-SAM)", STUDENT, "avg", (84.8, 87.5, 52.0, 54.1)),
    Row("DeiT-LT (PaCo-SAM)", f"{STUDENT} --teacher paco", "avg", (87.5, 89.8, 55.6, 60.5)),
]
TABLE5 = [
    Row("DeiT", DEIT, "avg", (70.2, None, 31.3)),
    Row("+ out-of-distribution teacher", f"{STUDENT} --beta 0 --teacher-rho 0", "avg",
        (84.5, None, 48.9)),
    Row("+ DRW", f"{STUDENT} --teacher-rho 0", "avg", (87.3, None, 54.5)),
    Row("+ SAM for the teacher", STUDENT, "avg", (87.5, None, 55.6)),
]
TABLE6 = [
    Row("DeiT-LT tiny", f"{STUDENT} --model tiny", "avg", (80.8, None, 49.3)),
    Row("DeiT-LT small", f"{STUDENT} --model small", "avg", (85.5, None, 54.3)),
    Row("DeiT-LT base", f"{STUDENT} --model base", "avg", (87.5, None, 55.6)),
]
# The stem, the soft labels, the adjusted loss and the learning rate of ours, each as in cpu.
OURS_20 = f"{STUDENT} --recipe ours --epochs 20"
OURS = [
    Row("ours", OURS_20),
    Row("another convolutional stem, not from the teacher", f"{OURS_20} --stem conv"),
    Row("without a convolutional stem", f"{OURS_20} --stem patch"),
    Row("hard labels", f"{OURS_20} --distill hard"),
    Row("re-weighting, no logit adjustment", f"{OURS_20} --no-logit-adjustment --beta 0.9999"),
    Row("half the learning rate", f"{OURS_20} --lr 0.0005"),
]

# The teacher of `modes`: plain cross-entropy on the students' balanced images.
MODES_TEACHER = f"{TEACHER} --imb 1 --loss ce --rho 0 --epochs 10 --drw-epoch 10"


def modes(teacher):
    """Rows of the table `modes`, for the teacher in this run folder.

    "usual" is DeiT's soft loss: temperature 3, a tenth of the loss. DeiT divides it by the number
    of classes, 10, too: 0.9 CE + 0.1 KL / 10, here alpha = 0.01 / 0.91. The report's has
    temperature 2 and half of the loss, and its students always two tokens before one shared head.
    """
    plain = f"{STUDENT} --imb 1 --epochs 20 {NOT_MIXED}"
    hard = f"{plain} --method deit --teacher {teacher}"
    hard_one = f"{hard} --tokens 1"
    soft = f"{hard} --distill soft --tau 2"
    soft_one = f"{hard_one} --distill soft --tau 3 --alpha 0.011"
    return [
        Row("none", f"{plain} --method vit", "avg", (67.69,)),
        Row("usual: soft, one token", soft_one, "avg", (68.85,)),
        Row("hard, one token", hard_one, "avg", (40.19,)),
        Row("hard, two tokens: class embedding", hard, "cls", (61.69,)),
        Row("hard, two tokens: distil embedding", hard, "dist", (8.07,)),
        Row("hard, two tokens: both", hard, "avg", (46.11,)),
        Row("soft, two tokens: class embedding", soft, "cls"),
        Row("soft, two tokens: distil embedding", soft, "dist"),
        Row("soft, two tokens: both", soft, "avg", (69.19,)),
    ]


TABLES = {"main": MAIN, "table1": TABLE1, "table2": TABLE2, "table5": TABLE5, "table6": TABLE6,
          "ours": OURS, "modes": modes}
# Data set and imbalance of each number in Row.published.
PUBLISHED_FOR = [("cifar10", 100), ("cifar10", 50), ("cifar100", 100), ("cifar100", 50)]
PUBLISHED_FOR_MODES = [("cifar10", 1)]
PUBLISHED_BY = {"table5": "paper, by PaCo", "table6": "paper, by PaCo-SAM",
                "modes": "course report"}


# ---- Commands and their run folders --------------------------------------------------------------

def split(command):
    """(program, flags): "-m experiments.crt --imb 9" -> ("-m experiments.crt", ["--imb", "9"])."""
    words = shlex.split(command)
    n = 2 if words[0] == "-m" else 1
    return " ".join(words[:n]), words[n:]


def student_settings(command):
    """The settings that a student's command gives; those of its recipe are None."""
    program, flags = split(command)
    if program == DEIT3:
        return deit3.parse(flags)
    if program == CRT:
        args = crt.parse(flags)
        args.method = "vit"                                 # of its first run
        return args
    return train_student.parse(flags)


def resolved(command, rt):
    """All settings of a command, `out` among them. UserError for settings that cannot be."""
    program, flags = split(command)
    if program == TEACHER:
        args = train_teacher.parse(flags)
        train_teacher.resolve(args, rt)
        return args
    args = student_settings(command)
    train_student.resolve(args, rt)
    if program == CRT:
        args = crt.second_run(args)
        train_student.resolve(args, rt)
    return args


def is_finished(folder, args=None):
    """Is there a result in a run folder?

    args: settings that it is to have. UserError if it has others, which its folder's name does not
    tell (a recipe, or the default of one, may have changed), or if its teacher was trained again.
    """
    if not os.path.exists(os.path.join(folder, "result.json")):
        return False
    if args:
        config = read_json(folder, "config.json")
        free = {*NOT_RESUMED, "amp", "teacher", "finetune"}
        if args.minutes is not None:                        # these were measured
            free |= set(args.fitted.split(","))
        other = [flag(name) for name in sorted(vars(args).keys() - free)
                 if name in config and config[name] != getattr(args, name)]
        other += [flag(name) for name in ("teacher", "finetune")
                  if name in config
                  and real_paths(config[name]) != real_paths(getattr(args, name, None))]
        if retrained(config):
            other.append("--teacher, which has been trained again since")
        if has_files(args):
            with suppress(DataError):                       # no images here: a table is shown
                if config.get("fingerprint") not in (None, fingerprint(args)):
                    other.append("--data-dir, or other files in it")
        if other:
            raise UserError(f"{folder} is a finished run with another {', '.join(other)}: remove "
                            "it, or run this table in another folder")
    return True


fingerprints = {}       # {which data: fingerprint of their files}


def fingerprint(args):
    """Of the files that these settings name, which are looked at once."""
    key = tuple(str(getattr(args, name)) for name in (*DATA_SETTINGS, "data_dir"))
    if key not in fingerprints:
        fingerprints[key] = fingerprint_of_files(args)
    return fingerprints[key]


def plan(table, common, seeds, rt):
    """(teacher commands to run first, [(Row, [command of each seed])]) of a table.

    common: flags of every run, a list. UserError for one that the rows set themselves.
    """
    given = train_student.parse(common)
    if table in ("table1", "table2", "table5", "table6", "modes"):      # of the paper's method
        if given.recipe in ("ours", "gpu"):
            raise UserError(f"{table} is about the paper's method: --recipe paper or cpu")
        if given.recipe == "auto" and given.dataset == "folder" and rt.device.type == "cpu":
            common = [*common, "--recipe", "cpu"]           # by itself it would be ours
    if table == "ours" and given.dataset == "shapes":
        raise UserError("ours: on shapes the recipe has another stem and learning rate")
    if table == "modes" and given.dataset not in ("cifar10", "shapes"):
        raise UserError("modes: its --alpha 0.011 is DeiT's loss for ten classes, so --dataset "
                        "cifar10 or shapes")
    rows = TABLES[table]
    if given.dataset in LISTS:                              # no recipe of PaCo's is for them
        rows = [row for row in rows if "--teacher paco" not in row.command]
    teachers, tables = [], []                               # tables: [[command of each row]]
    for seed in seeds:
        flags = [*common, "--seed", str(seed)]
        if table == "modes":
            shared = as_flags(train_student.parse(flags), (*CARRIED, "recipe"))
            teachers.append(f"{MODES_TEACHER} {shlex.join(shared)}")
            rows = modes(resolved(teachers[-1], rt).out)
        check_common_flags(common, rows)
        tables.append([f"{row.command} {shlex.join(flags)}" for row in rows])
    return teachers, list(zip(rows, zip(*tables)))


def check_common_flags(common, rows):
    """UserError for a common flag in which the rows differ, or that each run needs of its own."""
    given, default = vars(train_student.parse(common)), vars(train_student.parse([]))
    settings = [vars(student_settings(row.command)) for row in rows]
    own = {"out", "seed", "minutes"}    # by which rows that share a teacher would get more time
    if any(each["method"] != "deit-lt" for each in settings) or any(r.head != "avg" for r in rows):
        own |= {"distill", "tokens"}
    for name in given:
        if len({each[name] for each in settings}) > 1:
            own.add(name)
    if settings[0]["recipe"] != default["recipe"]:          # the table is about one recipe
        own.add("recipe")
    mistaken = [flag(name) for name in sorted(own) if given[name] != default[name]]
    if mistaken:
        raise UserError(f"{', '.join(mistaken)}: every run has its own here (seeds: --seeds)")


# ---- Running -------------------------------------------------------------------------------------

def folders(args):
    """Run folders in which the run with these settings trains: cRT's trains a plain ViT first.

    (Not its teacher's: runs that share one wait for it themselves.)
    """
    if getattr(args, "method", None) == "vit-crt":
        return {args.finetune, args.out}
    return {args.out}


def begin(command, args, jobs):
    """Start or resume a command as a child process; one of several prints to a file of its own."""
    environment, output, more = dict(os.environ), nullcontext(), ""
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cpus() // jobs)))
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        output, more = open(f"{args.out}.txt", "a"), f" >> {args.out}.txt"
    with output as file:
        print(f"python {command}{more}", flush=True)
        return subprocess.Popen([sys.executable, *shlex.split(command), "--resume"], stdout=file,
                                stderr=file, env=environment, preexec_fn=ENDS_WITH_PARENT)


def run(runs, jobs=1):
    """Run {command: settings} to the end, `jobs` at a time; finished ones are skipped.

    A signal to this process is handed on to its runs. After a signal, or once a run has failed, no
    other is begun; when those that still train have saved, this process ends as the run did, or
    as the signal asks.
    """
    waiting, running = dict(runs), {}                       # running: {child process: settings}
    received, handed_on, status = [], 0, 0                  # signals; how many of them; exit code
    handlers = {number: signal.signal(number, lambda number, _: received.append(number))
                for number in watched_signals()}
    try:
        while running or waiting and not (status or received):
            for command, args in list(waiting.items()):
                if len(running) == jobs or status or received:
                    break
                if is_finished(args.out):
                    del waiting[command]
                elif not folders(args) & set().union(*map(folders, running.values())):
                    running[begin(command, args, jobs)] = waiting.pop(command)
            while handed_on < len(received):
                for child in running:
                    child.send_signal(received[handed_on])
                handed_on += 1
            for child in [child for child in running if child.poll() is not None]:
                args, code = running.pop(child), child.returncode
                if code and not (status or received):
                    status = code if code > 0 else 128 - code       # below 0: ended by this signal
                    if jobs > 1:
                        print(f"exit code {status}: see {args.out}.txt; the other runs save and "
                              "end", file=sys.stderr, flush=True)
                    for other in running:
                        other.terminate()
            time.sleep(POLL)
    finally:
        for child in running:                               # after an error here
            child.terminate()
        for child in running:
            child.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        sys.exit(128 + received[0])
    if status:
        sys.exit(status)


# ---- The table -----------------------------------------------------------------------------------

def read(folder, head):
    """Accuracies of a head in a finished run, and "teacher": how often it was right, or None."""
    return read_json(folder, "result.json")[head] | {"teacher": teacher_right(read_log(folder))}


def spread(values):
    """"71.2 ± 0.4" of some numbers, "71.2" of one, "-" of none; None and NaN are left out."""
    values = [value for value in values if value is not None and not math.isnan(value)]
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def published_column(table, command):
    """Which number of Row.published is for a command's data; None if none is."""
    args = student_settings(command)
    resolve_data(args)
    columns = PUBLISHED_FOR_MODES if table == "modes" else PUBLISHED_FOR
    if args.imb_type != "exp" or args.holdout or (args.dataset, args.imb) not in columns:
        return None
    return columns.index((args.dataset, args.imb))


def as_markdown(measured, column, source):
    """The table: a line for each of `measured`, (Row, [accuracies of each finished seed])."""
    finished = [each for _, accuracies in measured for each in accuracies]
    shown = [*columns(dict(enumerate(finished))), "teacher"]
    titles = [*(TITLES.get(name, name) for name in shown[:-1]), "teacher right", "seeds", source]
    lines = [f"| | {' | '.join(titles)} |", f"| --- |{' --- |' * len(titles)}"]
    for row, accuracies in measured:
        published = None
        if column is not None and column < len(row.published):
            published = row.published[column]
        cells = [row.title, *(spread([each.get(name) for each in accuracies]) for name in shown),
                 str(len(accuracies))]
        cells.append("-" if published is None else str(published))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ablate", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time [1]")
    parser.add_argument("--show", action="store_true", help="print the table; train nothing")
    parser.add_argument("--commands", action="store_true", help="print the commands; train nothing")
    options, common = parser.parse_known_args()
    if options.jobs < 1:
        raise UserError("--jobs is 1 or more")
    settings = train_student.parse(common)
    rt = runtime.setup(settings.device, settings.amp)
    seeds = list(dict.fromkeys(options.seeds))              # each once
    teachers, rows = plan(options.table, common, seeds, rt)

    # What cannot be, or is finished with other settings, is said now, not after hours of others.
    commands = [*teachers, *(command for _, by_seed in rows for command in by_seed)]
    runs = {command: resolved(command, rt) for command in commands}     # rows of the same run: once
    if options.commands:
        print("\n".join(f"python {command}" for command in runs))
        return
    for args in runs.values():
        is_finished(args.out, args)
    missing = [args for args in runs.values() if not is_finished(args.out)]
    if missing and not options.show:
        if options.jobs > 1 and not has_files(missing[0]):
            load_data(missing[0], rt)                       # CIFAR, downloaded by one process
        students = [command for command in runs if command not in teachers]
        for group in (teachers, students):
            run({command: runs[command] for command in group}, options.jobs)

    measured = []
    for row, by_seed in rows:
        finished = [runs[command].out for command in by_seed if is_finished(runs[command].out)]
        measured.append((row, [read(folder, row.head) for folder in finished]))
    column = published_column(options.table, rows[0][1][0])
    print(as_markdown(measured, column, PUBLISHED_BY.get(options.table, "paper")))


if __name__ == "__main__":
    runtime.run_main(main)
