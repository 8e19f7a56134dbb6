"""Every command of analyze.py on runs that were trained, from end to end."""
import importlib.util
import json

import pytest
import torch

import analyze
from conftest import script
from engine.networks import load_network
from finished_runs import rows_of
from tiny_runs import read, records

pytest_plugins = ["tiny_runs"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_eval_repeats_what_the_run_reported(kind, teacher_run, student_run, tmp_path, monkeypatch,
                                            capsys):
    """A checkpoint of another epoch, a teacher that is given other images, roughly (bfloat16)."""
    folder = {"teacher": teacher_run, "student": student_run}[kind]
    script(analyze, monkeypatch, "eval", folder, "--out", tmp_path / "per_class.csv")
    result, rows = read(folder, "result.json"), rows_of(tmp_path / "per_class.csv")
    for head in {"cls", "dist", "avg"} & result.keys():
        accuracies = [float(row[head]) for row in rows]
        assert accuracies == pytest.approx(result["per_class"][head], abs=17)   # an image of six
        assert sum(accuracies) == pytest.approx(sum(result["per_class"][head]), abs=34)
    if kind == "teacher":
        out = capsys.readouterr().out
        names = {"clean": "clean", "mixed": "augmented and mixed"}
        for kind, shown in result["training_images"].items():
            assert f"{names[kind]} {shown['accuracy']:.1f} % right" in out


@pytest.mark.parametrize("command, kind", [
    ("rank", "student"), ("diversity", "student"), ("imbalance", "student"), ("curves", "student"),
    ("curves", "teacher"), ("entropy", "teacher"), ("sharpness", "teacher")])
def test_every_figure_is_drawn(command, kind, teacher_run, student_run, tmp_path, monkeypatch,
                               capsys):
    """A setting, a key of the log or of the result that training writes otherwise than it is read.

    What is drawn is tested in test_figures.py. The report below draws the other figures.
    """
    folder = {"teacher": teacher_run, "student": student_run}[kind]
    script(analyze, monkeypatch, command, folder, "--out", tmp_path / "figure.png", *(
        ["--images", 20] if command in ("rank", "entropy", "sharpness") else []))
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)
    assert len(capsys.readouterr().out.splitlines()) >= 4       # a table and two paths
    if command == "rank":
        assert len(json.loads((tmp_path / "figure.json").read_text())["rank"]) == 4
        return
    rows = rows_of(tmp_path / "figure.csv")
    if command == "curves":
        assert [float(row["loss"]) for row in rows] == [r["loss"] for r in records(folder)]
    if command == "diversity":
        cosines = [r["cosine"] for r in records(folder)]
        assert [1 - float(row["cosine distance"]) for row in rows] == pytest.approx(cosines)


def test_a_report_of_a_student_leaves_nothing_out(student_run, tmp_path, monkeypatch):
    script(analyze, monkeypatch, "report", student_run, "--out", tmp_path / "report.html",
           "--images", 20)
    page = (tmp_path / "report.html").read_text()
    assert "Left out" not in page and page.count("data:image/png;base64") == 11


@pytest.mark.parametrize("kind, flags", [
    pytest.param("teacher", [], marks=pytest.mark.slow), ("student", ["--mirror"])])
def test_an_exported_network_is_the_network_for_any_number_of_images(
        kind, flags, teacher_run, student_run, tmp_path, monkeypatch, capsys):
    """A batch size frozen into the file, normalisation or a head left out, --mirror forgotten."""
    folder = {"teacher": teacher_run, "student": student_run}[kind]
    script(analyze, monkeypatch, "export", folder, "--out", tmp_path / "m", *flags)
    assert "logits agree" in capsys.readouterr().out
    extra = {"class_names.json": ""}
    program = torch.export.load(str(tmp_path / "m.pt2"), extra_files=extra).module()
    net = load_network(str(folder)).net
    x = torch.rand(7, 3, net.img_size, net.img_size)
    with torch.no_grad():
        if kind == "teacher":
            logits = net(x)
        else:
            logits = (sum(net(x)) + sum(net(x.flip(-1)))) / 4   # CLS and DIST, both sides
        torch.testing.assert_close(program(x), logits, rtol=1e-3, atol=1e-3)
    assert json.loads(extra["class_names.json"]) == [f"class{k}" for k in range(10)]
    onnx = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
    assert (tmp_path / "m.onnx").exists() == onnx
