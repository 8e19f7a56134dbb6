r"""Tables of runs: each row a command of train_student.py, over several seeds, beside the published numbers.

    python ablate.py table2                               the methods, CIFAR-10-LT, imbalance 100, seed 0
    python ablate.py table5 --imb 50 --seeds 0 1 2        further flags go to every run
    python ablate.py table1 --show                        only the table of what has been run, nothing is trained
    python ablate.py table2 --commands                    only the commands

Runs that are finished are skipped, one that was stopped goes on, teachers are shared. The table says how many seeds stand
behind a number; two or more give mean and standard deviation. It is printed as markdown.

table1   what the teacher is asked about (the paper's Table 1, without re-weighting here)
table2   the methods that the paper compares on a ViT, from its Table 2
table5   the parts of DeiT-LT, one after the other
table6   sizes of the student
modes    DeiT's modes of distillation on balanced images, 20 epochs, beside a course report's (see the README)
"""
import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys

import engine
import train_student
import train_teacher

# A row: title, flags, the head that is read, published: overall accuracy on (CIFAR-10 imb 100, 50, CIFAR-100 imb 100, 50).
UNMIXED = "--mixup 0 --cutmix 0"
TABLES = {
    "table1": [
        ("in-distribution teacher, mixed", "--method deit", "avg", (70.2,)),
        ("DeiT-LT's teacher, sees weak images, not mixed", f"--beta 0 --teacher-sees weak {UNMIXED}", "avg", (54.2,)),
        ("DeiT-LT's teacher, sees strong images, not mixed", f"--beta 0 {UNMIXED}", "avg", (69.6,)),
        ("DeiT-LT's teacher, sees strong images, mixed", "--beta 0", "avg", (79.4,))],
    "table2": [
        ("ViT", "--method vit", "avg", (62.6, 70.1, 35.0, 39.0)),
        ("ViT, cRT", "--method vit-crt", "avg", (68.9, 74.5, 38.9, 42.2)),
        ("DeiT", "--method deit", "avg", (70.2, 77.5, 31.3, 39.1)),
        ("DeiT-III", "--method deit-iii", "avg", (59.1, 68.2, 38.1, 44.1)),
        ("DeiT-LT (LDAM-DRW-SAM)", "", "avg", (84.8, 87.5, 52.0, 54.1)),
        ("DeiT-LT (PaCo-SAM)", "--teacher paco", "avg", (87.5, 89.8, 55.6, 60.5))],
    "table5": [
        ("DeiT", "--method deit", "avg", (70.2, None, 31.3)),
        ("+ teacher out of its distribution", "--beta 0 --teacher-rho 0", "avg", (84.5, None, 48.9)),
        ("+ DRW", "--teacher-rho 0", "avg", (87.3, None, 54.5)),
        ("+ SAM for the teacher", "", "avg", (87.5, None, 55.6))],
    "table6": [
        (f"DeiT-LT {model}", f"--model {model}", "avg", published) for model, published in
        (("tiny", (80.8, None, 49.3)), ("small", (85.5, None, 54.3)), ("base", (87.5, None, 55.6)))],
}
# The modes have one teacher, plain cross-entropy on the same balanced images. Soft: DeiT's temperature and alpha.
MODES_TEACHER = "--imb 1 --loss ce --rho 0 --epochs 10 --drw-epoch 10"
ONE, TWO = (f"--method deit --teacher MODES_TEACHER{tokens}" for tokens in (" --tokens 1", ""))
TABLES["modes"] = [(title, f"--imb 1 --epochs 20 --drw-epoch 20 {UNMIXED} {flags}", head, (published,)) for
                   title, flags, head, published in (
    ("none", "--method vit", "avg", 67.69),
    ("usual: soft, one token", f"{ONE} --distill soft --tau 3 --alpha 0.1", "avg", 68.85),
    ("hard, one token", ONE, "avg", 40.19),
    ("hard, two tokens: class embedding", TWO, "cls", 61.69),
    ("hard, two tokens: distil embedding", TWO, "dist", 8.07),
    ("hard, two tokens: both", TWO, "avg", 46.11),
    ("soft, two tokens: class embedding", f"{TWO} --distill soft --tau 3", "cls", None),
    ("soft, two tokens: distil embedding", f"{TWO} --distill soft --tau 3", "dist", None),
    ("soft, two tokens: both", f"{TWO} --distill soft --tau 3", "avg", 69.19))]
PUBLISHED_FOR = (("cifar10", 100), ("cifar10", 50), ("cifar100", 100), ("cifar100", 50))


def folder_of(argv, rt):
    """(Run folder of a command of train_student.py, its settings); None for a folder that an earlier run must name."""
    args = train_student.parse(argv)
    if first := train_student.first_run(args):
        train_student.resolve(first, rt)
        if not os.path.exists(os.path.join(first.out, "result.json")):
            return None, first
        train_student.go_on_with(args, first)
    train_student.resolve(args, rt)
    return args.out, args


def plan(table, common, seeds, rt):
    """[(title, head, published, [(script, argv), ...])] of a table: every command in full, a teacher's before its students'."""
    shared, like = [], train_student.parse(common)
    for flag in ("dataset", "imb", "data_dir", "recipe", "device", "amp"):                # what a teacher must have alike
        if (value := getattr(like, flag)) is not None:
            shared.append(f"{engine.flag(flag)}={value}")
    rows = []
    for title, flags, head, published in TABLES[table]:
        commands = []
        for seed in seeds:
            argv = [*flags.split(), *common, "--seed", str(seed)]
            if "MODES_TEACHER" in argv:
                teacher = [*shared, *MODES_TEACHER.split(), "--seed", str(seed)]
                settings = train_teacher.parse(teacher)
                train_teacher.resolve(settings, rt)
                commands.append(("train_teacher.py", teacher))
                argv[argv.index("MODES_TEACHER")] = settings.out
            commands.append(("train_student.py", argv))
        rows.append((title, head, published, commands))
    return rows


def read(folder, head):
    """(Accuracies of a head, how often the teacher was right in the mixed stage or None) of a run; None if not finished."""
    try:
        with open(os.path.join(folder, "result.json")) as f:
            result = json.load(f)
    except (TypeError, FileNotFoundError):
        return None
    with open(os.path.join(folder, "log.jsonl")) as f:
        right = [r["teacher_accuracy"] for r in map(json.loads, f) if "teacher_accuracy" in r and not r["drw"]]
    return result[head] | {"teacher": statistics.mean(right) if right else None}


def spread(values):
    """"71.2 ± 0.4" of some numbers, "71.2" of one, "-" of none."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def as_markdown(rows, column, name):
    """The table: a line per row of (title, published, [accuracies of each seed])."""
    lines = [f"| | overall | head | mid | tail | teacher right | seeds | {name} |", "| --- " * 8 + "|"]
    for title, published, found in rows:
        value = published[column] if published and column is not None and column < len(published) else None
        cells = [spread([r[key] for r in found]) for key in (*engine.COLUMNS, "teacher")]
        lines.append(f"| {title} | {' | '.join(cells)} | {len(found)} | {'-' if value is None else value} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--show", action="store_true", help="print the table of what there is; train nothing")
    parser.add_argument("--commands", action="store_true", help="print the commands; train nothing")
    options, common = parser.parse_known_args()
    if "--out" in common or "--seed" in common:
        raise engine.UserError("every run has a folder and a seed of its own: --seeds, and no --out")
    like = train_student.parse(common)
    rt, here = engine.setup(like.device, like.amp), os.path.dirname(os.path.abspath(__file__))
    rows = plan(options.table, common, options.seeds, rt)
    for script, argv in dict.fromkeys((s, tuple(a)) for *_, commands in rows for s, a in commands):
        if options.commands:
            print(f"python {script} {shlex.join(argv)}")
        elif not options.show:
            done = script == "train_student.py" and read(folder_of(argv, rt)[0], "avg")
            if not done:
                status = subprocess.run([sys.executable, os.path.join(here, script), *argv, "--resume"]).returncode
                if status:                                                    # it has said why; the same command goes on
                    sys.exit(status)
    if not options.commands:
        found = [(title, published, [r for script, argv in commands if script == "train_student.py" and
                                     (r := read(folder_of(argv, rt)[0], head))]) for title, head, published, commands in rows]
        engine.resolve_data(like)
        balanced = options.table == "modes"
        column = 0 if balanced else next((i for i, k in enumerate(PUBLISHED_FOR) if k == (like.dataset, like.imb)), None)
        print(as_markdown(found, column, "course report" if balanced else "paper"))


if __name__ == "__main__":
    engine.run_main(main)
