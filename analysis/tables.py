"""Rows (dicts with the same keys) as text, CSV or markdown, and files that are written at once."""
import csv
import json
import math
import os
import sys
from io import StringIO

from engine.checkpoints import read_json, write_atomically
from engine.evaluation import COLUMNS
from engine.networks import short_name


def as_text(rows):
    """Rows as an aligned text table; a column of text is left-aligned, of numbers right-aligned."""
    lines = [list(rows[0])]
    lines += [[str(value) for value in row.values()] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    is_text = [isinstance(value, str) for value in rows[0].values()]
    text = []
    for line in lines:
        cells = [cell.ljust(width) if left else cell.rjust(width)
                 for cell, width, left in zip(line, widths, is_text)]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def as_csv(rows):
    """Rows as CSV text; a row may lack some of the columns."""
    text, columns = StringIO(), {}
    for row in rows:
        columns |= row                                              # a dict keeps the order
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(numbers):
    return json.dumps(numbers, indent=1) + "\n"


def write(path, content):
    """Write bytes or text; returns the path."""
    if isinstance(content, str):
        content = content.encode()
    write_atomically(path, lambda file: file.write(content))
    return path


def print_runs(folders):
    """A markdown table with a line for each finished run; the others are named on stderr."""
    columns = ["run", "data", *COLUMNS, "epochs", "seed", "minutes", "hardware", "date", "command"]
    print(markdown(columns))
    print(markdown(["---"] * len(columns)))
    for folder in folders:
        if not os.path.exists(os.path.join(folder, "result.json")):
            print(f"{folder}: no finished run", file=sys.stderr)
            continue
        result = read_json(folder, "result.json")
        accuracies = [result["avg"][column] for column in COLUMNS]
        print(markdown([
            f"`{short_name(folder)}`",
            f"{result['dataset']}, imb {result['imb']:g}",
            *("-" if math.isnan(a) else f"{a:.1f}" for a in accuracies),
            result["epochs"], result["seed"], f"{result['seconds'] / 60:.0f}", result["hardware"],
            result.get("date", ""), f"`{result['command']}`"]))


def markdown(cells):
    return f"| {' | '.join(map(str, cells))} |"
