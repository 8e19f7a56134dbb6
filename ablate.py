r"""Tables of runs: each row a command of train_student.py, over several seeds, beside the published numbers.

    python ablate.py main --seeds 0 1 2                   ViT, DeiT-LT and ours, with the means over three seeds
    python ablate.py table2                               the methods, CIFAR-10-LT, imbalance 100, seed 0
    python ablate.py table5 --imb 50 --seeds 0 1 2        further flags go to every run
    python ablate.py table1 --show                        only the table of what has been run, nothing is trained
    python ablate.py table2 --commands                    only the commands

Runs that are finished are skipped, one that was stopped goes on, teachers are shared; a signal reaches the run, which saves.
The table says how many seeds stand behind a number; two or more give mean and standard deviation. It is printed as markdown.
"teacher right": how often the teacher's labels were the images' (of mixed ones the larger part's) while images were mixed.

main     ViT, DeiT-LT (LDAM-DRW-SAM) and ours, at the cpu recipe's length
table1   what the teacher is asked about (the paper's Table 1, without re-weighting here)
table2   the methods that the paper compares on a ViT, from its Table 2
table5   the parts of DeiT-LT, one after the other
table6   sizes of the student
ours     --recipe best, and each of its changes taken back, 20 epochs
modes    DeiT's modes of distillation on balanced images, 20 epochs, beside a course report's (see the README)
search   the cpu recipe, its neighbours, and how --recipe best was found: on held-out training images, 20 epochs
"""
import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys

import engine
import train_student
import train_teacher

# A row: title, flags, the head that is read, published: overall accuracy on (CIFAR-10 imb 100, 50, CIFAR-100 imb 100, 50).
UNMIXED = "--mixup 0 --cutmix 0"
HEADS = (("CLS", "cls"), ("DIST", "dist"), ("average", "avg"))
TABLES = {
    "main": [
        ("ViT", "--method vit --recipe cpu", "avg", (62.6, 70.1, 35.0, 39.0)),
        *((f"DeiT-LT, {title}", "--recipe cpu", head, (84.8, 87.5, 52.0, 54.1) * (head == "avg")) for title, head in HEADS),
        *((f"ours, {title}", "--recipe best", head, ()) for title, head in HEADS),
        ("ours without a teacher", "--method vit --recipe best", "avg", ())],
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
# The stem, the soft labels, the adjusted loss and the learning rate of ours, each as the cpu recipe has it instead.
TABLES["ours"] = [(title, f"--recipe best --epochs 20 --drw-epoch 13 {flags}".strip(), "avg", ()) for title, flags in (
    ("ours", ""), ("without the convolutional stem", "--stem patch"), ("hard labels", "--distill hard --alpha 0.5"),
    ("re-weighting, no logit adjustment", "--adjust none --beta 0.9999"), ("half the learning rate", "--lr 0.0005"))]
# The modes have one teacher, plain cross-entropy on the same balanced images. "usual" is DeiT's: temperature 3, a tenth of the
# loss, which divides by images and classes; the report's soft loss (temperature 2, half of it) divides by images alone.
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
# The cpu recipe, its neighbours and how ours was found: a third of the epochs, on images held out of the training set.
SHORT, LA = "--recipe cpu --holdout 0.1 --epochs 20 --drw-epoch 13", "--adjust both --beta 0"
SOFT = "--distill soft --alpha 0.909"
TABLES["search"] = [(flags.replace("--", "") or "cpu recipe", f"{SHORT} {flags}", "avg", ()) for flags in (
    "", "--lr 0.00025", "--lr 0.001", "--lr 0.002", "--batch 32", "--batch 128 --lr 0.001", "--magnitude 5", "--erasing 0",
    "--drw-epoch 7", "--drw-epoch 17", "--patch-size 4", "--model tiny", "--model micro", SOFT, LA, "--stem conv",
    f"--stem conv {LA}", f"--stem conv {LA} --lr 0.001", f"--stem conv {LA} {SOFT}", f"--stem conv2 {LA}",
    f"--stem conv2 {LA} --lr 0.001", f"--stem conv2 {LA} {SOFT} --lr 0.001")]
PUBLISHED_FOR = (("cifar10", 100), ("cifar10", 50), ("cifar100", 100), ("cifar100", 50))
PUBLISHED_AS = {"table5": "paper, by PaCo", "table6": "paper, by PaCo-SAM", "modes": "course report"}


def folder_of(argv, rt):
    """Run folder of a command of train_student.py; None where the run that it goes on with must be there first."""
    args = train_student.parse(argv)
    if first := train_student.first_run(args):
        train_student.resolve(first, rt)
        if not os.path.exists(os.path.join(first.out, "result.json")):
            return None
        train_student.go_on_with(args, first)
    train_student.resolve(args, rt)
    return args.out


def plan(table, common, seeds, rt):
    """[(title, head, published, [(script, argv), ...])] of a table: every command in full, a teacher's before its students'.

    Raises UserError for a common flag in which the table's rows differ, or that each run needs of its own.
    """
    like, default, *differing = (train_student.parse(argv) for argv in
                                 (common, [], *(flags.split() for _, flags, *_ in TABLES[table])))
    own = {"out", "seed"} | {key for key in vars(like) if len({getattr(args, key) for args in differing}) > 1}
    own |= {"recipe"} if differing[0].recipe != default.recipe else set()                             # search is about one
    if mistaken := [engine.flag(key) for key in sorted(own) if getattr(like, key) != getattr(default, key)]:
        raise engine.UserError(f"{', '.join(mistaken)}: every run has its own here (seeds: --seeds)")
    shared = engine.as_flags(like, (*train_student.DATA, "data_dir", "recipe", "device", "amp"))      # a teacher's too
    rows = []
    for title, flags, head, published in TABLES[table]:
        commands = []
        for seed in seeds:
            argv = [*flags.split(), *common, "--seed", str(seed)]
            if "MODES_TEACHER" in argv:
                teacher = [*MODES_TEACHER.split(), *shared, "--seed", str(seed)]
                settings = train_teacher.parse(teacher)
                train_teacher.resolve(settings, rt)
                commands.append(("train_teacher.py", teacher))
                argv[argv.index("MODES_TEACHER")] = settings.out
            commands.append(("train_student.py", argv))
        rows.append((title, head, published, commands))
    return rows


def finished(script, argv, rt):
    """Run folder of a command if it is finished, else None."""
    if script == "train_student.py":
        folder = folder_of(argv, rt)
    else:
        args = train_teacher.parse(argv)
        train_teacher.resolve(args, rt)
        folder = args.out
    return folder if folder and os.path.exists(os.path.join(folder, "result.json")) else None


def run(script, argv):
    """Run a command to its end, as a process that gets this one's signals. Exits as it does if it fails."""
    child = subprocess.Popen([sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), script), *argv,
                              "--resume"])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: child.send_signal(number))
    if status := child.wait():                                            # it has said why; the same command goes on
        sys.exit(abs(status))


def read(folder, head):
    """Accuracies of a head in a finished run, and how often the teacher was right in the mixed stage ("teacher", or None)."""
    with open(os.path.join(folder, "result.json")) as f:
        accuracies = json.load(f)[head]
    with open(os.path.join(folder, "log.jsonl")) as f:
        right = [r["teacher_accuracy"] for r in map(json.loads, f) if "teacher_accuracy" in r and not r["drw"]]
    return accuracies | {"teacher": statistics.mean(right) if right else None}


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--show", action="store_true", help="print the table of what there is; train nothing")
    parser.add_argument("--commands", action="store_true", help="print the commands; train nothing")
    options, common = parser.parse_known_args()
    like = train_student.parse(common)
    rt = engine.setup(like.device, like.amp)
    rows = plan(options.table, common, options.seeds, rt)
    for script, argv in dict.fromkeys((script, tuple(argv)) for *_, commands in rows for script, argv in commands):
        if options.commands:
            print(f"python {script} {shlex.join(argv)}")
        elif not options.show and not finished(script, argv, rt):
            run(script, argv)
    if options.commands:
        return
    found = [(title, published, [read(folder, head) for script, argv in commands if script == "train_student.py" and
                                 (folder := finished(script, argv, rt))]) for title, head, published, commands in rows]
    engine.resolve_data(like)
    as_published = (like.imb_type, like.holdout) == ("exp", None)
    key = (like.dataset, 100 if options.table == "modes" else like.imb)
    column = next((i for i, k in enumerate(PUBLISHED_FOR) if k == key and as_published), None)
    print(as_markdown(found, column, PUBLISHED_AS.get(options.table, "paper")))


if __name__ == "__main__":
    engine.run_main(main)
