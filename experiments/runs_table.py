r"""A CSV table of finished runs: one row for each run folder.

    python -m experiments.runs_table results/runs.csv runs/teacher_cifar10_imb100_cpu_s0 ...
    python -m experiments.runs_table results/runs.csv runs/* --note "two at a time"

A row replaces the row of the same name (the folder's) and keeps its note unless --note is given.

overall, head, mid, tail    accuracy in percent at the last epoch: mean of the heads' logits
cls_, dist_, ema_, both_    the same of one head, of the averaged weights, of student and teacher
clean_, mixed_              a teacher on its own training images, clean, or augmented and mixed:
                            accuracy (%), entropy (nats)
teacher_right               how often the teacher's label was that of the image (if mixed: of its
                            larger part), percent, mean of the epochs before --drw-epoch
cosine                      of the CLS and DIST features after the last epoch, mean over test images
settings                    that the command (or --finetune) changed and that have no column
"""
import argparse
import csv
import io
import os
import shlex
import sys

from engine.checkpoints import write_atomically
from engine.records import read_json, read_log, teacher_right
from engine.runtime import UserError, run_main

HEADS = {"cls": "cls", "dist": "dist", "ema": "ema", "both": "avg+teacher"}     # in result.json
GROUPS = ("overall", "head", "mid", "tail", "balanced", "macro_f1")
COLUMNS = ["name", "kind", "data", "dataset", "imb", "recipe", "method", "model", "teacher",
           "epochs", "seed", *GROUPS, *(f"{head}_{group}" for head in HEADS for group in GROUPS),
           "clean_accuracy", "clean_entropy", "mixed_accuracy", "mixed_entropy",
           "teacher_right", "cosine", "settings", "seconds", "minutes", "hardware", "amp_dtype",
           "torch", "date", "command", "per_class", "note"]
AS_IN_RESULT = "imb recipe method model epochs seed seconds hardware date command".split()
# Settings with a column of their own, and those that change how a run goes but not its result.
NOT_LISTED = {"dataset", "imb", "seed", "recipe", "method", "loss", "model", "arch", "teacher",
              "epochs", "amp", "device", "data_dir", "out", "resume", "overwrite", "force",
              "save_every", "eval_every", "compile", "checkpointing", "skip_bad"}
OF_ITS_TEACHER = {"imb_type", "minutes", "holdout", "holdout_by", "train_list", "test_list",
                  "list_columns", "groups", "img_size", "teacher_rho"}
SET_BY_FINETUNE = {"finetune", "img_size", "lr", "warmup_epochs", "weight_decay", "drw_epoch"}


def settings(config, command, kind):
    """{name: value} of the settings that the command changed, with the values of config.json."""
    flags = [word.split("=")[0] for word in shlex.split(command) if word.startswith("--")]
    names = {flag.removeprefix("--").replace("-", "_") for flag in flags}
    names |= {name.removeprefix("no_") for name in names}
    if kind == "teacher" and "train_student" in command:    # most of the flags are the student's
        names = {name.removeprefix("teacher_") for name in names if name in OF_ITS_TEACHER}
        # Only these get theirs from the student (flags_of_teacher).
        if (config.get("dataset"), config.get("recipe")) != ("folder", "ours"):
            names.discard("img_size")
    if config.get("finetune"):
        names |= SET_BY_FINETUNE
    return {name: value for name, value in config.items()
            if name in names - NOT_LISTED and value is not None}


def row_of(folder):
    """{column: value} of a run. UserError if it is not finished, or a file is damaged."""
    config, result = read_json(folder, "config.json"), read_json(folder, "result.json")
    log = read_log(folder)
    kind = "teacher" if "arch" in config else "student"
    teachers = [os.path.basename(path.rstrip("/")) for path in (result["teacher"] or "").split(",")]
    row = {name: result.get(name) for name in AS_IN_RESULT} | result["avg"]
    row |= {"name": os.path.basename(os.path.abspath(folder)), "kind": kind,
            "data": result["dataset"], "dataset": config["dataset"], "teacher": ",".join(teachers),
            "minutes": round(result["seconds"] / 60, 1), "torch": config["versions"]["torch"]}
    for head, name in HEADS.items():
        for group, accuracy in result.get(name, {}).items():
            row[f"{head}_{group}"] = accuracy
    for images, measured in result.get("training_images", {}).items():
        for quantity, value in measured.items():
            row[f"{images}_{quantity}"] = value
    row["per_class"] = " ".join(map(str, result.get("per_class", {}).get("avg", [])))
    right = teacher_right(log)
    if right is not None:
        row["teacher_right"] = round(right, 1)
    row["cosine"] = log[-1].get("cosine")
    changed = settings(config, result["command"], kind).items()
    row["settings"] = " ".join(f"{name}={value}" for name, value in changed)
    if "amp_dtype" in config:
        dtype = str(config["amp_dtype"]).removeprefix("torch.")
        row["amp_dtype"] = "float32" if dtype == "None" else dtype
    return {name: value for name, value in row.items() if value == value}       # not NaN


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", metavar="TABLE.csv")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder")
    parser.add_argument("--note", help="a remark on these runs")
    options = parser.parse_args(argv)
    rows = {}
    if os.path.exists(options.table):
        with open(options.table, newline="", encoding="utf-8-sig") as file:     # Excel's mark
            table = csv.DictReader(file)
            if "name" not in (table.fieldnames or ()) or set(table.fieldnames) - set(COLUMNS):
                raise UserError(f"{options.table} is no table of runs: its columns are others")
            rows = {row["name"]: row for row in table}
    names = [os.path.basename(os.path.abspath(folder)) for folder in options.runs]
    if len(set(names)) < len(names):
        raise UserError("two of these folders have the same name, which would be one row")
    for folder in options.runs:
        try:
            row = row_of(folder)
        except UserError as error:
            print(f"{folder} is left out, no finished run: {error}", file=sys.stderr)
            continue
        row["note"] = options.note
        if options.note is None:
            row["note"] = rows.get(row["name"], {}).get("note")
        rows[row["name"]] = row
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[name] for name in sorted(rows))
    write_atomically(options.table, lambda file: file.write(text.getvalue().encode()))
    print(f"{options.table}: {len(rows)} runs")


if __name__ == "__main__":
    run_main(main)
