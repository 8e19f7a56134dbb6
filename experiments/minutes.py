r"""What some minutes buy: our teacher and student, a plain ViT and a plain ResNet-18, side by side.

    python -m experiments.minutes --dataset folder --data-dir fish --minutes 5 10 30 60

Runs one command after the other and prints a markdown table. Finished runs are skipped, one that
was stopped is resumed; further flags go to every run. The minutes are those of the whole run,
loading included; the student's include its teacher. Timings want an idle machine.

Balanced: mean of the classes' accuracies; head, mid, tail: of their classes; macro F1: mean of the
classes' F1; accuracy: of the test images. Of a balanced test set macro F1 is not kept.
"""
import argparse
import math
import os
import shlex

import train_student
import train_teacher
from engine import runtime
from engine.evaluation import main_accuracy
from engine.records import read_json
from engine.runtime import UserError
from engine.settings import SHORTEST, TEACHER_SHARE
from experiments import resnet18
from experiments.ablate import STUDENT, TEACHER, is_finished, resolved, run, split

RESNET18 = "-m experiments.resnet18"
# Name, command, and which of the run's networks it is.
ROWS = [("ResNet-18, 64 px", RESNET18, "avg"),
        ("our teacher", f"{TEACHER} --recipe ours", "avg"),
        ("plain ViT", f"{STUDENT} --recipe ours --method vit", "avg"),
        ("ours, the student", f"{STUDENT} --recipe ours", "avg"),
        ("ours, its teacher", f"{STUDENT} --recipe ours", "teacher_avg"),
        ("ours, both", f"{STUDENT} --recipe ours", "avg+teacher")]
COLUMNS = ("head", "mid", "tail", "macro_f1", "overall")


def table_row(minutes, name, folder, head):
    """A line of markdown for one network of a finished run."""
    result, config = read_json(folder, "result.json"), read_json(folder, "config.json")
    if head == "teacher_avg":
        config = read_json(result["teacher"], "config.json")
    numbers = result[head] | {"balanced": main_accuracy(result[head])}
    values = [numbers.get(column, math.nan) for column in ("balanced", *COLUMNS)]
    cells = ["-" if math.isnan(value) else f"{value:.1f}" for value in values]
    return f"| {minutes:g} | {name} | {config['epochs']} | {' | '.join(cells)} |"


def settings_of(command, rt):
    """All settings of a row's command, the run folder `out` among them."""
    program, flags = split(command)
    if program == RESNET18:
        return resnet18.resolved(train_teacher.parse(flags), rt)
    return resolved(command, rt)


def check(minutes, settings):
    """UserError for flags that each run needs of its own, or minutes that share a teacher."""
    if settings.out or settings.recipe != "auto":
        raise UserError("--out, --recipe: every run has its own here")
    for more in minutes:
        if more < SHORTEST:
            raise UserError(f"--minutes must be at least {SHORTEST:g}, not {more:g}")
        if f"{TEACHER_SHARE * more:g}" in [f"{each:g}" for each in minutes]:    # folders' names
            raise UserError(f"--minutes {more:g}: the teacher of its student would be that of "
                            f"{TEACHER_SHARE * more:g} minutes, trained already: choose others")


def check_teacher(args):
    """UserError if the teacher is there already: its student would have its minutes as well."""
    teacher = getattr(args, "teacher", None)
    begun = os.path.exists(os.path.join(args.out, "config.json"))
    if teacher and not begun and is_finished(teacher):
        raise UserError(f"{teacher} is trained already, and its minutes would be its student's "
                        "too: remove that folder")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m experiments.minutes", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 10, 30, 60],
                        help="default: 5 10 30 60")
    parser.add_argument("--show", action="store_true", help="print the table; train nothing")
    options, common = parser.parse_known_args()
    train_teacher.parse(common)                             # refuses flags of the student alone
    settings = train_student.parse(common)
    check(options.minutes, settings)
    rt = runtime.setup(settings.device, settings.amp)
    lines = ["| minutes | network | epochs | balanced | head | mid | tail | macro F1 | accuracy |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for minutes in options.minutes:
        for name, command, head in ROWS:
            command = f"{command} {shlex.join([*common, f'--minutes={minutes:g}'])}"
            args = settings_of(command, rt)
            if not is_finished(args.out, args) and not options.show:
                check_teacher(args)
                run({command: args})
            if is_finished(args.out, args):
                lines.append(table_row(minutes, name, args.out, head))
    print("\n".join(lines))


if __name__ == "__main__":
    runtime.run_main(main)
