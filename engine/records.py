r"""The text files of a run, config.json, result.json and log.jsonl: one writer and one reader each.

JSON lacks NaN, the accuracy of what was not measured: it is written as null. What is read is
checked, for people edit these files and disks damage them.
"""
import json
import math
import os
import sys

from engine.checkpoints import is_number, write_atomically
from engine.runtime import UserError
from engine.settings import Interval


# ---- Writing -------------------------------------------------------------------------------------

def is_nan(value):
    return isinstance(value, float) and math.isnan(value)


def null_for_nan(data):
    """The same values with None for NaN, which JSON lacks: accuracies of what was not measured."""
    if isinstance(data, dict):
        return {key: null_for_nan(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [null_for_nan(value) for value in data]
    return None if is_nan(data) else data


def save_json(path, data):
    """Write plain values as JSON, atomically; NaN becomes null."""
    text = json.dumps(null_for_nan(data), indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def as_line(record):
    """An epoch's record as a line of log.jsonl."""
    return json.dumps(null_for_nan(record)) + "\n"


# ---- Reading -------------------------------------------------------------------------------------

def nan_for_null(read):
    """The way back, json's object_hook: NaN for null in lists and in accuracies.

    A dict is one of accuracies if it has "overall". Elsewhere null stays None.
    """
    restored = {}
    for key, value in read.items():
        if isinstance(value, list):
            value = [math.nan if x is None else x for x in value]
        elif value is None and "overall" in read:
            value = math.nan
        restored[key] = value
    return restored


def teacher_right(log):
    """Percent of images that a student's teacher labelled right: mean of the epochs before DRW.

    None for a student without a teacher.
    """
    right = [epoch["teacher_accuracy"] for epoch in log
             if epoch.get("teacher_accuracy") is not None and not epoch["drw"]]
    return sum(right) / len(right) if right else None


LARGEST_JSON = 2 ** 28          # bytes; a log of 1,400 epochs has half a million


# An example value of each field that this project reads back: an Interval of numbers, whole ones
# if its ends are; a tuple lists alternatives. A dict has the names shown, and others as "" shows.
NUMBER, COUNT = Interval(-1e300, 1e300), Interval(0, 2 ** 62)
PERCENT = Interval(0.0, 100.0), math.nan
HEAD = {"overall": PERCENT, "": (PERCENT, COUNT, [PERCENT])}        # COUNT: of predicted classes
EXAMPLES = {
    "config.json": {"dataset": "", "epochs": 0, "seed": 0, "counts": [Interval(1, 2 ** 62)],
                    "classes": [""], "class_groups": {"": [0]}, "versions": {"": ""}},
    "result.json": {"dataset": "", "recipe": "", "method": "", "model": "", "command": "",
                    "hardware": "", "date": "", "teacher": ("", None), "epochs": COUNT,
                    "seed": COUNT, "imb": Interval(1.0, 1e300), "seconds": Interval(0.0, 1e300),
                    "cls": HEAD, "dist": HEAD, "avg": HEAD, "ema": HEAD, "teacher_avg": {"": 0.0},
                    "avg+teacher": {"": 0.0}, "per_class": {"avg": [PERCENT], "": [PERCENT]},
                    "training_images": {"": {"": 0.0}}},
    "log.jsonl": {"epoch": COUNT, "drw": False, "loss": (NUMBER, math.nan, None), "lr": NUMBER,
                  "cosine": (Interval(-1.01, 1.01), None), "cls": HEAD, "dist": HEAD, "avg": HEAD},
}
MEND = "put back a copy of it, or remove it and --resume writes it again"
MEASURED = 0.0, None, {"": (0.0, [0.0])}        # other fields of a log: numbers, or a head's


def is_like(value, example):
    """Is a value of the same kind as the example, down to its numbers and texts?"""
    if isinstance(example, Interval):
        return is_number(value, example.low, example.high)
    if is_nan(example):
        return is_nan(value)
    if isinstance(example, tuple):
        return any(is_like(value, each) for each in example)
    if isinstance(example, dict):
        return (isinstance(value, dict) and example.keys() - {""} <= value.keys()
                and all(is_like(each, example.get(key, example.get("")))
                        for key, each in value.items()))
    if isinstance(example, list):
        return isinstance(value, list) and all(is_like(each, example[0]) for each in value)
    if isinstance(example, float):
        return isinstance(value, (int, float))
    return isinstance(value, type(example))


class Fields(dict):
    """A JSON object of a run's file, `source`; asking for what it lacks is a UserError."""
    source = ""

    def having(self, *names):
        """This object. UserError if it lacks one of the names."""
        for name in names:
            self[name]
        return self

    def __missing__(self, key):
        raise UserError(f"{self.source} has no {key!r}: it is damaged, or of another program")


def read_json(folder, name):
    """A run's config.json or result.json, a dict. UserError if there is none, or it is damaged."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        raise UserError(f"{folder} has no {name}: it is no run folder, or its run is not finished; "
                        "continue it with --resume")
    data = parse(read_bytes(path), path)
    if data is None:
        raise UserError(f"{path} is damaged: it holds no JSON object; {MEND}")
    for key, value in data.items():
        if key in EXAMPLES[name] and (value == [] or not is_like(value, EXAMPLES[name][key])):
            raise UserError(f"{path} is damaged: its {key!r} cannot be {value!r:.50}; {MEND}")
    return data


def read_log(folder):
    """The epochs of a run, a list of one dict each. UserError if there are none, or damaged ones.

    Half a line at the end, of an epoch that is just being written or of a writer that was killed,
    is left out with a line on stderr.
    """
    path = os.path.join(folder, "log.jsonl")
    log = read_log_lines(path)
    if log and log[-1] is None:
        print(f"{path}: its last line is damaged and left out", file=sys.stderr, flush=True)
        log.pop()
    if None in log:
        raise UserError(f"{path} is damaged in line {log.index(None) + 1}: mend or remove the line")
    if not log:
        raise UserError(f"{folder} has no log.jsonl with an epoch in it: name the folder of a run")
    return log


def read_log_lines(path):
    """The lines of a log.jsonl, a dict for each, None for one that is no epoch's."""
    text = read_bytes(path) if os.path.exists(path) else b""
    if not text:
        return []
    records = [parse(line, path) for line in text.removesuffix(b"\n").split(b"\n")]
    like = EXAMPLES["log.jsonl"]
    return [record if record and all(is_like(value, like.get(key, MEASURED))
                                     for key, value in record.items()) else None
            for record in records]


def read_bytes(path):
    """A JSON file's bytes. UserError for what cannot be one."""
    if not os.path.isfile(path) or os.path.getsize(path) > LARGEST_JSON:
        raise UserError(f"{path} is no file of a run: not a regular file, or too large for one")
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def parse(text, path):
    """JSON (bytes) as Fields of this path; None if it is no object."""
    def restore(read):
        fields = Fields(nan_for_null(read))
        fields.source = path
        return fields
    try:
        data = json.loads(text, object_hook=restore)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
