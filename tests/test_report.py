"""The HTML page: whole by itself, with every figure that applies, and text taken as text."""
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch

import analyze
from analysis import drawing, figures, loading, report, run_figures, tables
from analysis.calibration import Calibration
from conftest import script
from engine.runtime import UserError
from finished_runs import RT, read_result, runs  # noqa: F401: a fixture
from images.files import DataError

ANSWERS = ["Confusion matrix", "What the probabilities mean", "The most confident mistakes"]
PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """What a browser would fetch for a page, its texts, and its tables: {title: [[cell]]}."""

    def __init__(self, page):
        super().__init__()
        self.fetched, self.texts, self.tables, self.title, self.tag = [], [], {}, "", ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tag = tag
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action"):
                self.fetched += [] if value.startswith(("data:", "#")) else [value]
        if tag == "tr":
            self.tables.setdefault(self.title, []).append([])
        if tag in ("td", "th"):
            self.tables[self.title][-1].append("")

    def handle_data(self, text):
        self.texts.append(text)
        if self.tag == "h2":
            self.title = text
        elif self.tag in ("td", "th"):
            self.tables[self.title][-1][-1] += text

    def handle_endtag(self, tag):
        self.tag = ""


def test_a_page_is_whole_and_holds_what_it_was_given():
    """A picture, style or font from outside; text taken for HTML; a column lost."""
    rows = [{"class": "<b>cat</b> & dog", "right %": 12.5, "n": 3}]
    html = report.page("run <1>", "lead & more", [
        report.Section("A section", "text", rows, PNG), report.Section("Other", table=rows),
        report.Section("Folded", table=rows, folded=True)])
    page = Page(html)
    assert page.fetched == [] and not re.search(r"url\(|@import|<script", html)
    table = [["class", "right %", "n"], ["<b>cat</b> & dog", "12.5", "3"]]
    assert page.tables == {"A section": table, "Other": table, "Folded": table}
    assert "<b>cat" not in html and {"run <1>", "lead & more", "text"} <= set(page.texts)
    assert html.count("data:image/png;base64,iVBORw0KGgo=") == 1
    assert 'href="#a-section"' in html and 'id="a-section"' in html
    assert html.count("<details>") == 1 < html.index("<details>") > html.index("Folded</h2>")


@pytest.fixture
def quick_figures(monkeypatch):
    """Figures without drawing: only who was asked for which, [(command, labels, flags)]."""
    asked = []

    def draw(command, paths, rt, labels, flags, load_flags):
        kind = figures.FIGURES[command][1]
        asked.append((command, kind, paths))
        if kind == "log" and paths[0].endswith(".pth"):
            raise report.UserError("has no log.jsonl")
        figure = drawing.plt.figure(figsize=(1, 1))
        return drawing.Figure(figure, [{"figure": command}], [], f"how to read {command}")
    monkeypatch.setattr(figures, "draw", draw)
    return asked


@pytest.mark.parametrize("name, sections", [
    ("deit-lt", ["Result", "Accuracy per class", *ANSWERS, "Training curves",
                 "How CLS and DIST diverge", "Where the tokens look", "How far the heads look",
                 "Rank of the features", "What the student trains on",
                 "Does the student follow its teacher?", "Settings"]),
    ("teacher", ["Result", "Accuracy per class", *ANSWERS[:2], "Training curves",
                 "How sure the teacher is", "Flatness of the minimum", "Settings"]),
    ("file.pth", ["Result", "Accuracy per class", *ANSWERS, "Where the tokens look",
                  "How far the heads look", "Rank of the features", "What the student trains on",
                  "Does the student follow its teacher?", "Left out"])])
def test_a_report_holds_what_applies(name, sections, runs, tiny_cifar, quick_figures, tmp_path,
                                     monkeypatch):
    """A figure lost, or one that does not apply and ends the report; another result or setting."""
    script(analyze, monkeypatch, "report", runs[name], "--out", tmp_path / "report.html",
           "--data-dir", tiny_cifar, "--imb", 4)
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert re.findall(r"<h2>(.*?)</h2>", html) == sections and page.fetched == []
    without_picture = {"Result", "Settings", "Left out"}
    assert html.count("data:image/png;base64,iVBOR") == len(set(sections) - without_picture)
    assert [command for command, _, _ in quick_figures] == list(
        report.HEADINGS["teacher" if name == "teacher" else "student"])
    if name == "file.pth":
        assert [row[0] for row in page.tables["Left out"][1:]] == ["curves", "diversity"]
        return
    result = read_result(runs[name])
    rows = {row[0]: [float(cell) for cell in row[1:]] for row in page.tables["Result"][1:]}
    names = {"cls": "CLS", "dist": "DIST", "avg": "average"}
    if name == "teacher":
        names = {"avg": "the network"}
    assert set(rows) == set(names.values())
    for head, shown in names.items():
        columns = [result[head][column] for column in ("overall", "head", "mid", "tail")]
        assert rows[shown] == pytest.approx(columns, abs=0.051)
    titles, *per_class = page.tables["Accuracy per class"]
    for k, cells in enumerate(per_class):
        row = dict(zip(titles, cells, strict=True))
        accuracies = {head: result["per_class"][head][k] for head in result["per_class"]}
        assert row["class"] == f"class{k}"
        assert {head: float(row[head]) for head in accuracies} == accuracies
        assert float(row["recall"]) == accuracies["avg"] and row["test images"] == "6"
        assert float(row["recall low"]) < float(row["recall high"])
        assert {"precision", "F1"} < set(row)
    assert ["seed", "0"] in page.tables["Settings"]


def test_the_page_says_which_probabilities_are_as_trained(runs, monkeypatch):
    """Those with the temperature under that title."""
    panels = {}
    monkeypatch.setattr(run_figures, "reliability", lambda given: panels.update(given))
    monkeypatch.setattr(drawing, "as_png", lambda figure: PNG)
    data = loading.load(str(runs["vit"]), RT)[2]
    logits, n = torch.eye(10)[data.test_labels], len(data.test_labels)
    for source, title in (("some images", "temperature 2"),
                          ("60 held-out images", "each half by the other's temperature")):
        panels.clear()
        found = Calibration(2.0, source, torch.full((n,), 2.0), torch.full((n,), 0.9),
                            torch.full((n,), 0.6), torch.ones(n, dtype=torch.bool))
        report.answer_sections(logits, found, data)
        mean = {title: rows[0][1] for title, rows in panels.items()}
        assert mean == {"as trained": pytest.approx(0.9), title: pytest.approx(0.6)}


def test_confident_mistakes_have_the_probabilities_of_predict(runs, monkeypatch):
    """Those by the temperature of the other half of the held-out images, under the name of the one
    that predict uses: another number for the same picture."""
    monkeypatch.setattr(drawing, "as_png", lambda figure: PNG)
    data = loading.load(str(runs["vit"]), RT)[2]
    n = len(data.test_labels)
    logits = 3 * torch.eye(10)[(data.test_labels + 1) % 10]
    found = Calibration(0.5, f"{n} held-out images", torch.full((n,), 9.0), torch.full((n,), 0.9),
                        torch.full((n,), 0.1), torch.zeros(n, dtype=torch.bool))
    *_, mistakes = report.answer_sections(logits, found, data)
    p = float((logits[0] / 0.5).softmax(dim=0).max())
    assert [row["probability"] for row in mistakes.table] == pytest.approx([p] * 18, abs=1e-4)
    assert mistakes.text.endswith("of which it is most sure (temperature 0.5).")


@pytest.mark.parametrize("kept", [True, False])
def test_a_students_report_has_its_teachers_recorded_rows(kept, runs, quick_figures, tmp_path,
                                                          monkeypatch):
    """A page that says nothing of the student's teacher, which may be the better network; a
    teacher's accuracies of other data or other groups; a result without its classes."""
    folder = tmp_path / "run"
    shutil.copytree(runs["deit-lt"], folder)
    result = read_result(folder)
    extra = {"teacher_avg": 71.0, "avg+teacher": 82.0}
    for name, percent in extra.items():
        result[name] = dict.fromkeys(("overall", "head", "mid", "tail"), percent) | {"margin": 3.0}
        if kept:
            result["per_class"][name] = [percent] * 10
    (folder / "result.json").write_text(json.dumps(result))

    def page(*flags):
        script(analyze, monkeypatch, "report", folder, "--out", tmp_path / "r.html", *flags)
        return Page((tmp_path / "r.html").read_text())
    own = page()
    rows = {row[0]: row[1:] for row in own.tables["Result"][1:]}
    assert list(rows) == ["teacher", "CLS", "DIST", "average", "avg + teacher"]
    assert rows["teacher"] == ["71.0"] * 4 and rows["avg + teacher"] == ["82.0"] * 4
    assert any("as the run has measured them" in text for text in own.texts)
    per_class = [dict(zip(own.tables["Accuracy per class"][0], row))
                 for row in own.tables["Accuracy per class"][1:]]
    assert [row.get("teacher") for row in per_class] == ["71.0" if kept else None] * 10
    rows = page("--imb", 2).tables["Result"][1:]
    assert [row[0] for row in rows] == ["CLS", "DIST", "average"]
    network, _, data = loading.load(str(folder), RT)
    assert report.recorded_rows(str(folder), network, data, {}).keys() == extra.keys()
    assert report.recorded_rows(str(folder), network, data, {"groups": "20,10"}) == {}


def test_a_report_of_a_student_with_its_teacher_shows_the_students_training(
        runs, quick_figures, tmp_path, monkeypatch):
    """A search for the log of "RUN,TEACHER", or of the teacher where that is named first; of
    several teachers, a label for one of two curves."""
    student, teacher = str(runs["deit-lt"]), str(runs["teacher"])
    for path in (f"{student},{teacher}", f"{teacher},{student}"):
        quick_figures.clear()
        script(analyze, monkeypatch, "report", path, "--out", tmp_path / "report.html",
               "--labels", "both")
        logs = {command: paths for command, kind, paths in quick_figures if kind == "log"}
        assert logs == {"curves": [student], "diversity": [student]}
        assert {tuple(paths) for _, kind, paths in quick_figures if kind != "log"} == {(path,)}
    monkeypatch.setattr(report, "HEADINGS", {"teacher": {"curves": "C"}})
    quick_figures.clear()
    script(analyze, monkeypatch, "report", f"{teacher},{teacher}", "--out", tmp_path / "r.html")
    assert quick_figures == [("curves", "log", [teacher, teacher])]


def test_hostile_names_are_text(tmp_path):
    """Markup in a title, a table's head or a picture's description; a page that cannot be written
    for a path that is not UTF-8; text that runs backwards."""
    name = "\"><img src=x onerror=a>'\udcff\u202e\x1b"
    html = report.page(name, name, [report.Section(name, name, [{name: name}], PNG, folded=True)])
    assert "<img src=x" not in html and "\u202e" not in html and "\x1b" not in html
    assert Page(html).fetched == []
    tables.write(str(tmp_path / "x.html"), html)
    assert r"\xff" in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize("error, text", [
    (UserError("no such\ntoken"), "no such token"), (DataError("no image"), "no image"),
    (ValueError("\n^ bad formula"), "drawing it failed with ValueError: ^ bad formula"),
    (MemoryError(), "drawing it failed with MemoryError: ")])
def test_one_figure_that_fails_costs_no_other(error, text, runs, quick_figures, tmp_path,
                                              monkeypatch):
    """A report of ten minutes that is lost for one picture, or that hides which one is missing."""
    draw = figures.draw

    def failing(command, *given):
        if command == "distance":
            raise error
        return draw(command, *given)
    monkeypatch.setattr(figures, "draw", failing)
    monkeypatch.setattr(run_figures, "class_accuracy", lambda *_: 1 / 0)
    script(analyze, monkeypatch, "report", runs["vit"], "--out", tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert page.tables["Left out"][1:] == [
        ["accuracy per class", "drawing it failed with ZeroDivisionError: division by zero"],
        ["distance", text]]
    assert {"Result", "Accuracy per class", "Where the tokens look", "Rank of the features",
            "What the student trains on", "Settings"} < set(page.tables)


def test_a_report_draws_its_figures_of_the_run(runs, tmp_path, monkeypatch):
    """A real figure with its words left in the picture, or a refusal that ends the report."""
    monkeypatch.setattr(report, "HEADINGS", {"student": {"diversity": "D", "distance": "Far"}})
    script(analyze, monkeypatch, "report", runs["vit"], "--out", tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.tables["Far"]) == 1 + 6                     # six blocks
    assert any(text.startswith("A dot per head") for text in page.texts)
    assert page.tables["Left out"][1][0] == "diversity"
    assert "no distances of CLS and DIST" in page.tables["Left out"][1][1]
