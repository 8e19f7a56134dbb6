"""Rows (dicts with the same keys) as text, CSV or markdown, and files that are written at once."""
import csv
import math
import os
import re
import sys
from io import StringIO

from analysis.loading import run_result
from engine.checkpoints import write_atomically
from engine.evaluation import TITLES, columns
from engine.networks import short_name
from engine.runtime import UserError
from images.files import shown, visible


def as_text(rows):
    """Rows as an aligned text table; a column of text is left-aligned, of numbers right-aligned."""
    columns = columns_of(rows)
    values = [[row.get(column, "") for column in columns] for row in rows]
    lines = [columns] + [["-" if value != value else str(value) for value in row]      # NaN
                         for row in values]
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    is_text = [isinstance(rows[0].get(column), str) for column in columns]
    text = []
    for line in lines:
        cells = [cell.ljust(width) if left else cell.rjust(width)
                 for cell, width, left in zip(line, widths, is_text)]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def columns_of(rows):
    """The names of all columns, in the order in which they come first."""
    return list(dict.fromkeys(column for row in rows for column in row))


def as_csv(rows):
    """Rows as CSV text; a row may lack some of the columns."""
    text = StringIO()
    writer = csv.DictWriter(text, columns_of(rows), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({column: csv_cell(value) for column, value in row.items()})
    return text.getvalue()


def csv_cell(value):
    """The value, or its visible text with a "'" before what a spreadsheet takes for a formula.

    Where the comma is the decimal sign, a cell begins after each ";" too; Asian spreadsheets take
    the wide forms of the signs as well.
    """
    if not isinstance(value, str):
        return value
    return re.sub(r"(^|;)(?=\s*[=+\-@\uff1d\uff0b\uff0d\uff20])", r"\1'", visible(value))


def beside(path, name):
    """Where a file of this name is kept: in a run folder, or beside a file, x.pth -> x_name."""
    if os.path.isdir(path):
        return os.path.join(path, name)
    return f"{os.path.splitext(path)[0]}_{name}"


def is_device(path):
    """Is it a device or a folder, where no file can be put? (/dev/stdout is a link.)"""
    return (os.path.exists(path) and not os.path.isfile(path)
            or os.path.abspath(path).startswith("/dev/"))


def write(path, content):
    """Write bytes or text; returns the path. UserError if it cannot be written."""
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")       # paths that are not UTF-8
    if not is_device(path):
        write_atomically(path, lambda file: file.write(content))
        return path
    try:                                        # not replaced by a file, as the other way would
        with open(path, "wb") as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path


def print_runs(folders, rt):
    """A markdown table with a line for each finished run; the others are named on stderr.

    UserError if there is none.
    """
    results = {}
    for folder in folders:
        if not os.path.exists(os.path.join(folder, "result.json")):
            print(f"{shown(folder)}: no finished run", file=sys.stderr)
            continue
        try:
            results[folder] = run_result(folder, "dataset", "imb", "avg", "epochs", "seed",
                                         "seconds", "hardware", "command")
        except UserError as error:
            print(visible(str(error)), file=sys.stderr)
    if not results:
        raise UserError("none of these is a finished run")
    shown_columns = columns({folder: result["avg"] for folder, result in results.items()})
    names = ["run", "data", *(TITLES.get(column, column) for column in shown_columns), "epochs",
             "seed", "minutes", "hardware", "date", "command"]
    rt.print(markdown(names))
    rt.print(markdown(["---"] * len(names)))
    for folder, result in results.items():
        accuracies = [result["avg"].get(column, math.nan) for column in shown_columns]
        rt.print(markdown([
            code(short_name(folder)),
            plain(f"{result['dataset']}, imb {result['imb']:g}"),
            *("-" if math.isnan(a) else f"{a:.1f}" for a in accuracies),
            result["epochs"], result["seed"], f"{result['seconds'] / 60:.0f}",
            plain(result["hardware"]), plain(str(result.get("date", ""))),
            code(result["command"])]))


def markdown(cells):
    return f"| {' | '.join(map(str, cells))} |"


def plain(text):
    """Text as a cell of a markdown table, in which it begins no markup and no other cell."""
    return re.sub(r"([\\`*<\[|])", r"\\\1", text)


def code(text):
    """Text as code in a cell of a markdown table."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, blank = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{blank}{text}{blank}{fence}".replace("|", r"\|")
