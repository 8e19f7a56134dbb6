r"""One self-contained HTML page about a network: result, every figure that applies, settings.

    build(path, network, args, data, rt, ...)    -> the page of a run or a file, a str
    page(title, lead, sections)                  -> any page; a Section has text, a table, a picture

Pictures are inlined as base64, so that nothing is fetched when the page is read. Colours follow the
reader's light or dark setting; pictures keep their white ground.
"""
import base64
import math
import os
import re
from dataclasses import dataclass
from functools import partial
from html import escape

from analysis import accuracy, calibration, drawing, figures, loading, quantities, run_figures
from engine.datasets import describe
from engine.evaluation import TITLES, columns, predicted
from engine.networks import short_name, teacher_files
from engine.records import is_nan
from engine.runtime import UserError
from images.files import DataError, visible


# ---- What the page of a network holds ------------------------------------------------------------

SHOWN, MISTAKES = 20, 18    # confused pairs in the table, and mistakes in the picture
HEADINGS = {    # figure -> its heading, by kind of network; figures that do not apply are left out
    "student": {"curves": "Training curves", "diversity": "How CLS and DIST diverge",
                "attention": "Where the tokens look", "distance": "How far the heads look",
                "rank": "Rank of the features", "augment": "What the student trains on",
                "agreement": "Does the student follow its teacher?"},
    "teacher": {"curves": "Training curves", "entropy": "How sure the teacher is",
                "sharpness": "Flatness of the minimum"},
}


def build(path, network, args, data, rt, labels, flags, load_flags):
    """The report of a Network, its settings and its data (loading.load), an HTML page.

    labels, flags, load_flags: of figures.draw.
    """
    results = accuracy.accuracies(network, args, data, rt)
    means = "Accuracy on the test set; head, mid and tail are means over the classes of a group."
    recorded = recorded_rows(path, network, data, load_flags["data_flags"])
    if recorded:
        results = {"teacher_avg": recorded["teacher_avg"]} | results | recorded
        means += " The teacher, and both together: as the run has measured them at its end."
    logits = accuracy.test_logits(network, data, rt)
    answers = predicted(logits)
    text = ("Recall with its 95 % interval, precision and F1 are of the prediction; a class of few "
            "test images has a wide interval.")
    if network.teacher is not None:
        text += " The picture is of the student alone, these are of student and teacher together."
    by_class = {head: result for head, result in results.items() if "per_class" in result}
    rows = [{TITLES.get(column, column): value for column, value in row.items()}
            for row in accuracy.class_rows(by_class, data, answers)]
    per_class = Section("Accuracy per class", text, rows, folded=True)
    sections, left_out = [Section("Result", means, result_rows(results)), per_class], []
    calibrated = calibration.calibrate(network, args, data, rt, logits)

    def draw_classes():
        per_class.picture = drawing.as_png(run_figures.class_accuracy(by_class, data))

    def draw_answers():
        sections.extend(answer_sections(logits, calibrated, data))

    def draw(name, heading):
        paths, names = [path], labels
        if figures.FIGURES[name][1] == "log":
            paths = logged(path, network)
            names = labels if len(paths) == 1 else None
        figure = figures.draw(name, paths, rt, names, flags, load_flags)
        picture = drawing.as_png(drawing.without_text(figure.figure))
        sections.append(Section(heading, figure.note, figure.table, picture, folded=True))
    drawings = {"accuracy per class": draw_classes, "answers and their probabilities": draw_answers}
    for name, heading in HEADINGS[network.kind].items():
        drawings[name] = partial(draw, name, heading)
    for name, draw_section in drawings.items():
        rt.print(f"{name} ...")
        try:
            draw_section()
        except Exception as error:              # whatever it is, the other sections are right
            left_out.append({"figure": name, "why": why(error)})
            drawing.plt.close("all")
    if network.config:
        settings = [{"setting": name, "value": str(value)}
                    for name, value in sorted(network.config.items())]
        sections.append(Section("Settings", "", settings))
    if left_out:
        text = "What does not apply to this network, or could not be drawn."
        sections.append(Section("Left out", text, left_out))
    return page(short_name(path), f"{network.what}; on {describe(data, args)}.", sections)


def logged(path, network):
    """The runs whose logs a page shows: a student's, without its teacher's; of teachers all."""
    files = teacher_files(path)
    if network.kind == "student" and network.configs:
        return [files[network.configs.index(network.config)]]
    return files


def answer_sections(logits, calibrated, data):
    """The confusion matrix, how sure the network is, and where it is sure and wrong.

    logits (N,K): of the prediction on the test images. calibrated: their calibration.Calibration.
    """
    answers, labels = predicted(logits), data.test_labels.cpu()
    confusion = accuracy.confusion(answers, labels, data.num_classes)
    text = "A row for each true class. Below: the pairs that are confused most often."
    sections = [Section("Confusion matrix", text,
                        accuracy.confusion_rows(confusion, data.class_names)[:SHOWN],
                        drawing.as_png(run_figures.confusion_matrix(confusion, data)))]
    temperature = f"temperature {calibrated.temperature:.3g}"
    after = "each half by the other's temperature" if calibrated.halves else temperature
    panels = {"as trained": quantities.reliability(calibrated.before, calibrated.right),
              after: quantities.reliability(calibrated.after, calibrated.right)}
    text = ("Test images by the probability of the network's answer. Bars: how often it is right; "
            "on the dashed line, probabilities mean what they say. " + calibrated.text)
    sections.append(Section("What the probabilities mean", text,
                            picture=drawing.as_png(run_figures.reliability(panels))))
    confidence = calibration.confidence(logits / calibrated.temperature)        # as predict has it
    index, rows = accuracy.confident_mistakes(answers, confidence, data, MISTAKES)
    if rows:
        text = ("Test images on which the network is wrong, those first of which it is most sure "
                f"({temperature}).")
        images = data.test_images[index.to(data.test_labels.device)]
        sections.append(Section("The most confident mistakes", text, rows,
                                drawing.as_png(run_figures.mistakes(images, rows)), folded=True))
    return sections


def why(error):
    """Why there is no figure, one line: what a person can put right, or which exception it was."""
    text = " ".join(str(error).split())
    if isinstance(error, (UserError, DataError)):
        return text
    return f"drawing it failed with {type(error).__name__}: {text}"


def recorded_rows(path, network, data, data_flags):
    """{"teacher_avg", "avg+teacher": accuracies} of a finished student's result.json; else {}.

    {} too where the data or their groups are not those of the run, or its teacher is asked here.
    "per_class" is left out where the run has not kept it.
    """
    if network.kind != "student" or network.teacher is not None or network.unfinished != "":
        return {}
    if not os.path.exists(os.path.join(path, "result.json")):
        return {}
    groups = network.config.get("groups")
    if (network.data != data.fingerprint or loading.names_other_data(network, data_flags)
            or data_flags.get("groups", groups) != groups):
        return {}
    result, rows = loading.run_result(path), {}
    per_class = result.get("per_class", {})
    for name in ("teacher_avg", "avg+teacher"):
        if name not in result:
            return {}
        rows[name] = result[name]
        if len(per_class.get(name, ())) == data.num_classes:
            rows[name] = rows[name] | {"per_class": per_class[name]}
    return rows


def result_rows(results):
    """A row for each head of a student with both tokens, and for its teacher and both together, if
    they are there; for other networks, one row.
    """
    names, rows = drawing.head_names(results), []
    for head in results:
        if head not in names and head not in TITLES:
            continue                                        # CLS, where it is all of the student
        row = {"prediction of": names.get(head) or TITLES[head]}
        rows.append(row | {f"{TITLES.get(column, column)} %":
                           round(results[head].get(column, math.nan), 1)
                           for column in columns(results)})
    return rows


# ---- HTML ----------------------------------------------------------------------------------------

STYLE = """
:root { --ground: #fbfaf8; --card: #ffffff; --ink: #1d1f23; --soft: #5c616b;
        --line: #e2dfd9; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15171b; --card: #1e2126; --ink: #e8e6e3; --soft: #a3a8b1;
          --line: #33373e; --accent: #6cb8e6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
       font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .4rem; }
p { margin: .4rem 0; max-width: 48rem; }
.lead, .soft { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; margin: 1.2rem 0 1.6rem;
      font-size: .92rem; }
a { color: var(--accent); text-decoration: none; }
a:hover, a:focus { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
          padding: 1.25rem; margin: 1.25rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums;
        margin: .7rem 0; }
th, td { padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line); text-align: left;
         white-space: nowrap; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 16rem; }
th { color: var(--soft); font-weight: 600; }
.number { text-align: right; }
figure { margin: .9rem 0 .2rem; background: #ffffff; border-radius: 8px; padding: .5rem;
         overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
details summary { cursor: pointer; color: var(--accent); font-size: .92rem; margin-top: .6rem; }
@media print { section { break-inside: avoid; } }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body><main>
<h1>{title}</h1>
<p class="lead">{lead}</p>
<nav>{links}</nav>
{body}</main></body>
</html>
"""


@dataclass
class Section:
    title: str
    text: str = ""
    table: list = None          # rows: dicts with the same keys
    picture: bytes = None       # PNG
    folded: bool = False        # show the table only when the reader opens it


def html(text):
    """Text as HTML: markup and what is not seen is escaped."""
    return escape(visible(text))


def page(title, lead, sections):
    """The whole page, a str. All text is taken as text, not as HTML."""
    links, body = "", ""
    for section in sections:
        anchor = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-")
        links += f'<a href="#{anchor}">{html(section.title)}</a>'
        body += f'<section id="{anchor}">{section_html(section)}</section>\n'
    return PAGE.format(title=html(title), lead=html(lead), links=links, body=body, style=STYLE)


def section_html(section):
    parts = [f"<h2>{html(section.title)}</h2>"]
    if section.picture:
        data = base64.b64encode(section.picture).decode()
        parts.append(f'<figure><img alt="{html(section.title)}" '
                     f'src="data:image/png;base64,{data}"></figure>')
    if section.text:
        parts.append(f'<p class="soft">{html(section.text)}</p>')
    if section.table:
        table = f'<div class="wide">{table_html(section.table)}</div>'
        if section.folded:
            table = f"<details><summary>Numbers</summary>{table}</details>"
        parts.append(table)
    return "\n".join(parts)


def table_html(rows):
    """Rows as a table; numbers are right-aligned."""
    head = "".join(f'<th class="{cell_class(value)}">{html(key)}</th>'
                   for key, value in rows[0].items())
    body = ""
    for row in rows:
        texts = {key: "-" if is_nan(value) else str(value) for key, value in row.items()}
        cells = [f'<td class="{cell_class(value)}">{html(texts[key])}</td>'
                 for key, value in row.items()]
        body += f"<tr>{''.join(cells)}</tr>\n"
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>\n</table>"


def cell_class(value):
    """The CSS class of a cell."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number"
    return "long" if len(str(value)) > 40 else "text"
