"""analyze.py: its commands on finished runs, its flags, what it writes where, and its mistakes."""
import csv
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import pytest
import torch

import analyze
from analysis import accuracy, drawing, loading, run_figures, tables, tensorboard
from conftest import ROOT, script
from engine.checkpoints import save_checkpoint
from engine.evaluation import COLUMNS
from engine.runtime import UserError
from finished_runs import RT, read_lines, read_result, rows_of, runs  # noqa: F401: a fixture

PNG = b"\x89PNG\r\n\x1a\n"


# ---- Numbers -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["deit-lt", "teacher"])
def test_eval_prints_and_writes_the_runs_own_accuracies(name, runs, tmp_path, monkeypatch, capsys):
    """Another crop or head, a class's row under another's name, training images of a student."""
    script(analyze, monkeypatch, "eval", runs[name], "--out", tmp_path / "x_per_class.csv")
    out, result = capsys.readouterr().out, read_result(runs[name])
    printed = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    heads = list(result["per_class"])
    for head in heads:
        assert [float(cell) for cell in printed[head]] == pytest.approx(
            [result[head][column] for column in COLUMNS], abs=0.051)
    rows = rows_of(tmp_path / "x_per_class.csv")
    assert [row["class"] for row in rows] == [f"class{k}" for k in range(10)]
    assert [int(row["training images"]) for row in rows][::9] == [24, 6]
    for head in heads:
        assert [float(row[head]) for row in rows] == result["per_class"][head]
    assert "for means over classes of the classes too): overall" in out
    assert "Expected calibration error" in out
    hits = round(6 * result["per_class"]["avg"][9] / 100)
    assert printed["class9"][:3] == ["6", "6", str(hits)]           # images: train, test, right
    if name == "teacher":
        clean = result["training_images"]["clean"]
        assert f"clean {clean['accuracy']:.1f} % right, entropy {clean['entropy']:.2f}" in out
    else:
        assert "on its training images: " not in out
    wrong = {row["class"]: 0 for row in rows}
    for row in rows_of(tmp_path / "x_confusion.csv"):
        wrong[row["class"]] += int(row["images"])
        assert row["of"] == "6" and row["class"] != row["predicted"]
    assert [100 - 100 * n / 6 for n in wrong.values()] == pytest.approx(
        result["per_class"]["avg"], abs=0.01)
    assert out.splitlines()[-3:] == [str(tmp_path / "x_per_class.csv"),
                                     str(tmp_path / "x_confusion.csv"),
                                     str(runs[name] / "calibration.json")]


def test_mirror_images_leave_the_plain_tables_alone(runs, tmp_path, monkeypatch):
    """per_class.csv of a plain eval, written over with the accuracies of image and mirror image."""
    script(analyze, monkeypatch, "eval", runs["vit"], "--out", tmp_path)
    plain = {name: (tmp_path / name).read_bytes() for name in ("per_class.csv", "confusion.csv")}
    script(analyze, monkeypatch, "eval", runs["vit"], "--out", tmp_path, "--mirror")
    assert {path.name for path in tmp_path.iterdir()} == {
        *plain, "mirror_per_class.csv", "mirror_confusion.csv"}
    assert all((tmp_path / name).read_bytes() == text for name, text in plain.items())


def test_eval_says_how_sure_to_be():
    """Confidence of the true class for that of the predicted one; a softmax that nobody trained."""
    logits = torch.tensor([[0.75, 0.25], [0.75, 0.25]]).log()
    labels, groups = torch.tensor([0, 1]), {"head": [0], "mid": [1], "tail": []}
    text = accuracy.uncertainty_text(logits, labels, groups)
    assert "mean confidence 75.0 %" in text
    assert "head 20.7 to 100.0, mid 0.0 to 79.3" in text and "binary" not in text
    assert "binary cross-entropy" in accuracy.uncertainty_text(logits, labels, groups, binary=True)


def test_heads_are_those_of_the_run(runs, tmp_path, monkeypatch, capsys):
    """Another head, mean or crop than what the run reported; a prior of other data."""
    script(analyze, monkeypatch, "heads", runs["deit-lt"], "--out", tmp_path / "heads.csv")
    assert "CIFAR-10 not as published (imb 4)" in capsys.readouterr().out
    rows, result = rows_of(tmp_path / "heads.csv"), read_result(runs["deit-lt"])["per_class"]
    for way, head in (("CLS", "cls"), ("DIST", "dist"), ("CLS + DIST, logits", "avg")):
        assert [float(row[way]) for row in rows] == result[head]
    assert "balanced CLS" in rows[0]
    network, args, data = loading.load(str(runs["deit-lt"]), RT)
    balanced = accuracy.head_combinations(network, args, data, RT)["balanced CLS"]
    others = replace(data, counts=[1] * 10)     # of other frequencies than those of its training
    assert accuracy.head_combinations(network, args, others, RT)["balanced CLS"] == balanced
    args.logit_adjustment = True                                # its CLS is balanced by its loss
    assert "balanced CLS" not in accuracy.head_combinations(network, args, data, RT)
    with pytest.raises(SystemExit):
        script(analyze, monkeypatch, "heads", runs["vit"])
    assert "has no DIST token" in capsys.readouterr().err


def test_a_class_without_test_images_leaves_its_columns_to_numbers():
    """Numbers that hang to the left when the first class has none."""
    none = dict.fromkeys(("recall", "precision", "F1", "recall low", "recall high"), math.nan)
    rows = [{"class": "a", "training images": 9, "test images": 0, "right": 0} | none,
            {"class": "b", "training images": 1, "test images": 4, "right": 1, "recall": 25.0,
             "precision": 50.0, "F1": 33.33, "recall low": 4.6, "recall high": 69.9}]
    _, first, second = accuracy.class_text(rows, "x.csv").splitlines()
    assert second.split()[-6:] == ["25.0", "50.0", "33.3", "4.6", "to", "69.9"]
    assert first.index("-") + 1 == second.index("25.0") + 4


def test_runs_are_listed_as_they_ended(runs, tmp_path, monkeypatch, capsys):
    """Another head than the average, a column that slips, a number for what was not measured."""
    result = read_result(runs["teacher"])
    result["avg"]["tail"] = None
    (tmp_path / "no tail").mkdir()
    (tmp_path / "no tail" / "result.json").write_text(json.dumps(result))
    folders = [runs["teacher"], runs["deit-lt"], tmp_path / "no tail", tmp_path]
    script(analyze, monkeypatch, "runs", *folders)
    out, err = capsys.readouterr()
    title, _, *lines = [line.strip("| ").split(" | ") for line in out.splitlines()]
    for name, line in zip(("teacher", "deit-lt", "no tail"), lines, strict=True):
        row = dict(zip(title, line, strict=True))
        result = read_result(runs.get(name, tmp_path / name))
        assert row["run"] == f"`{name}`" and row["command"] == "`python train.py --imb 4`"
        assert row["data"] == "CIFAR-10 not as published, imb 4"
        assert row["minutes"] == "2" and row["seed"] == "0"
        shown = [None if row[c] == "-" else float(row[c]) for c in COLUMNS]
        assert shown == [pytest.approx(result["avg"][c], abs=0.051) for c in COLUMNS]
    assert err == f"{tmp_path}: no finished run\n"
    with pytest.raises(SystemExit):
        script(analyze, monkeypatch, "runs", tmp_path)
    assert "none of these is a finished run" in capsys.readouterr().err


# ---- Damaged runs --------------------------------------------------------------------------------

def damaged(runs, tmp_path, name, change, epoch=1):
    """A copy of deit-lt's text files, in one of which `change` has altered the JSON object.

    epoch: which line of the log.
    """
    for each in ("result.json", "config.json", "log.jsonl"):
        (tmp_path / each).write_text((runs["deit-lt"] / each).read_text())
    objects, place = [(tmp_path / name).read_text()], 0
    if name == "log.jsonl":
        objects, place = objects[0].splitlines(), epoch
    data = json.loads(objects[place])
    change(data)
    objects[place] = json.dumps(data)
    (tmp_path / name).write_text("\n".join(objects) + "\n")
    return tmp_path


DAMAGE = [(name, key, value) for name, key, values in [
    ("result.json", "imb", ["x", None, 0, -4, 10 ** 400, math.inf, math.nan, [], True]),
    ("result.json", "avg", [None, 3, [], {}, {"overall": "x"}, {"overall": 101}]),
    ("result.json", "seed", ["0", None, 1.5]), ("result.json", "method", [None, 5, {}, ["\n"]]),
    ("config.json", "counts", [None, [], 5, ["x"], [5, -1], [5, 0], {}]),
    ("config.json", "dataset", [None, 5]),
    ("log.jsonl", "epoch", [None, "1", -1, 0, 2, 1.5, 10 ** 400, math.inf]),
    ("log.jsonl", "loss", ["x", [], {}, 10 ** 400]), ("log.jsonl", "lr", [None, "x", math.nan]),
    ("log.jsonl", "drw", [None, "x", 3]), ("log.jsonl", "cosine", ["x", [], 5, math.nan]),
    ("log.jsonl", "avg", [3, {}, {"overall": -1}, {"overall": 5, "tail": "x"}]),
] for value in values]


@pytest.mark.parametrize("name, key, value", DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_files_of_a_run_are_named(name, key, value, runs, events, tmp_path, monkeypatch,
                                          capsys):
    """A traceback, or a picture of a number that cannot be, for a run whose files are damaged."""
    folder = damaged(runs, tmp_path, name, lambda data: data.update({key: value}))
    commands = {"result.json": ["imbalance"], "config.json": ["curves"],
                "log.jsonl": ["curves", "diversity", "tensorboard"]}[name]
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            script(analyze, monkeypatch, command, folder)
        run_figures.plt.close("all")
        line, = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and name in line and len(line) < 300


@pytest.mark.parametrize("key", ["epoch", "loss", "lr", "drw"])
def test_a_log_that_lacks_a_column_is_named(key, runs, tmp_path):
    folder = damaged(runs, tmp_path, "log.jsonl", lambda data: data.pop(key))
    with pytest.raises(UserError, match=f"log.jsonl.* '{key}'"):
        loading.run_log(folder)


def test_what_was_not_measured_is_left_out(runs, events, tmp_path, monkeypatch, capsys):
    """A traceback for a loss that was NaN, or for a log without any head."""
    monkeypatch.setattr(drawing, "as_png", lambda figure: b"")

    def change(data):
        data["loss"] = None
        for head in ("cls", "dist", "avg"):
            data.pop(head)
    folder = damaged(runs, tmp_path, "log.jsonl", change, epoch=2)
    for command in ("curves", "diversity", "tensorboard"):
        script(analyze, monkeypatch, command, folder)
    assert [row["loss"] for row in rows_of(folder / "curves.csv")] == ["2.5", "2.0", "nan"]
    assert [row["epoch"] for row in rows_of(folder / "diversity.csv")] == ["2"]
    assert events[str(folder)]["loss"] == [(1, 2.5), (2, 2.0)]
    first = (folder / "log.jsonl").read_text().splitlines()[0]      # no epoch was evaluated
    (folder / "log.jsonl").write_text(first + "\n")
    capsys.readouterr()
    script(analyze, monkeypatch, "curves", folder)
    assert capsys.readouterr().out.splitlines()[1].split() == [folder.name, "1", "False", "2.5",
                                                               "3.0e-03"]


def test_a_damaged_run_costs_no_other_its_row(runs, tmp_path, monkeypatch, capsys):
    folder = damaged(runs, tmp_path, "result.json", lambda data: data.update(seconds="x"))
    script(analyze, monkeypatch, "runs", folder, runs["vit"])
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3 and "`vit`" in out
    assert "result.json is damaged" in err and "seconds" in err and len(err.splitlines()) == 1


def test_a_summary_needs_accuracies_of_its_own_classes(runs, tmp_path):
    """Accuracies drawn under the names of other classes; a traceback for a teacher's result."""
    net, args, data = loading.load_kind("student", str(runs["vit"]), RT)
    subject = loading.Subject("", str(tmp_path), net, args, data)
    result = read_result(runs["deit-lt"])
    result["per_class"]["dist"].pop()
    with pytest.raises(UserError, match="it has dist on 9 classes, the run has 10"):
        run_figures.summary(subject, result, [])
    for per_class in (None, {}, {"cls": [1.0]}, {"avg": 3}, {"avg": ["x"]}, {"avg": [101]}):
        result["per_class"] = per_class
        (tmp_path / "result.json").write_text(json.dumps(result))
        with pytest.raises(UserError, match="result.json.*per_class"):
            loading.run_result(tmp_path, "per_class")


# ---- TensorBoard ---------------------------------------------------------------------------------

@pytest.fixture
def events(monkeypatch):
    """What a pretended TensorBoard package is given: {folder: {name: [(step, value)]}}."""
    written = {}

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert purge_step == 0              # or a run written twice would have two curves
            self.numbers = written.setdefault(folder, {})

        def add_scalar(self, name, value, step):
            self.numbers.setdefault(name, []).append((step, value))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.numbers["closed"] = True
    module = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return written


def test_tensorboard_gets_every_epoch(runs, events, tmp_path, monkeypatch, capsys):
    """Steps from zero, heads under one name, NaN or lists, two runs in one folder."""
    script(analyze, monkeypatch, "tensorboard", runs["deit-lt"])
    log, written = read_lines(runs["deit-lt"]), events[str(runs["deit-lt"])]
    assert written["loss"] == [(1, 2.5), (2, 2.0), (3, 1.5)] and written["closed"]
    assert written["dist/tail"] == [(epoch + 1, log[epoch]["dist"]["tail"]) for epoch in (1, 2)]
    assert written["drw"] == [(1, 0.0), (2, 0.0), (3, 1.0)]
    assert f"tensorboard --logdir {runs['deit-lt']}" in capsys.readouterr().out
    script(analyze, monkeypatch, "tensorboard", runs["vit"], runs["teacher"], "--out", tmp_path)
    assert {str(tmp_path / "vit"), str(tmp_path / "teacher")} <= events.keys()
    with pytest.raises(SystemExit):             # a/vit and b/vit would be one folder
        script(analyze, monkeypatch, "tensorboard", runs["vit"], runs["vit"], "--out", tmp_path)
    assert "two of the runs are called vit" in capsys.readouterr().err
    record = {"loss": 1, "cosine": None, "avg": {"tail": math.nan, "head": 2.0, "per_class": [1.0]}}
    assert tensorboard.scalars(record) == {"loss": 1.0, "avg/head": 2.0}


def test_tensorboard_reads_what_was_written(runs, tmp_path):
    """A second writing that doubles the points of the first."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for _ in range(2):
        tensorboard.write_events(str(runs["vit"]), str(tmp_path))
    points = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(point.step, point.value) for point in points] == [(1, 2.5), (2, 2.0), (3, 1.5)]


# ---- Pictures ------------------------------------------------------------------------------------

def test_outputs_go_into_the_run_folder_or_where_out_says(runs, tmp_path, monkeypatch, capsys):
    """The numbers written over the picture, or into the second run's folder."""
    script(analyze, monkeypatch, "imbalance", runs["vit"], runs["deit-lt"])
    script(analyze, monkeypatch, "imbalance", runs["vit"], "--out", tmp_path / "a.b")
    written = [runs["vit"] / "imbalance.png", runs["vit"] / "imbalance.csv", tmp_path / "a.b.png",
               tmp_path / "a.b.csv"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "/" in line]
    assert lines == list(map(str, written))
    assert [path.read_bytes().startswith(PNG) for path in written] == [True, False, True, False]

    def path(name, *given, out=None, mirror=False):
        return analyze.output_path(SimpleNamespace(runs=given, out=out, mirror=mirror), name)
    assert path("heads.csv", str(tmp_path)) == str(tmp_path / "heads.csv")
    assert path("heads.csv", "a/x.pth") == "a/x_heads.csv"
    assert path("per_class.csv", f"{tmp_path},b/x.pth,c") == str(
        tmp_path / "with_x.pth+c_per_class.csv")
    assert path("per_class.csv", "a,b", out="c.csv") == path(
        "per_class.csv", "a,b", out="c.csv", mirror=True) == "c.csv"
    assert path("per_class.csv", "a/x.pth", mirror=True) == "a/x_mirror_per_class.csv"
    assert path("per_class.csv", f"{tmp_path},b", mirror=True) == str(
        tmp_path / "with_b_mirror_per_class.csv")
    assert [analyze.confusion_path(name) for name in ("d/per_class.csv", "x_per_class.csv", "y.csv")
            ] == ["d/confusion.csv", "x_confusion.csv", "y_confusion.csv"]


WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None            # importing it raises ImportError
sys.modules["torch.utils.tensorboard"] = None
import analyze
import train_student
from engine.runtime import run_main
train_student.draw_summary({student!r})
for command in {commands}:
    sys.argv = ["analyze.py", *command]
    try:
        run_main(analyze.main)
    except SystemExit as stop:
        print(command[0], "ends with", stop.code)
"""


def test_numbers_need_no_matplotlib(runs, tiny_cifar, tmp_path):
    """A prediction on a server that stops for want of a drawing package; a traceback."""
    student, image = str(runs["vit"]), str(tiny_cifar / "test" / "class2" / "0.png")
    commands = [["eval", student, "--out", str(tmp_path / "per_class.csv")],
                ["predict", "--checkpoint", student, image], ["runs", student],
                ["heads", str(runs["deit-lt"]), "--out", str(tmp_path / "heads.csv")],
                ["curves", student, "--out", str(tmp_path / "curves.png")],
                ["tensorboard", student]]
    code = WITHOUT_MATPLOTLIB.format(commands=commands, student=student)
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    errors = [line for line in process.stderr.splitlines() if line.startswith("error")]
    assert errors == ["error: pictures need a package: pip install matplotlib",
                      "error: this needs a package: pip install tensorboard"]
    assert "Traceback" not in process.stderr and "probabilities are calibrated" in process.stderr
    assert re.findall(r".* ends with .*", process.stdout) == ["curves ends with 2",
                                                              "tensorboard ends with 2"]
    assert "No picture (pictures need a package: pip install matplotlib)" in process.stdout
    assert f"{image}: class2" in process.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"per_class.csv", "confusion.csv",
                                                          "heads.csv"}


def test_numbers_draw_nothing(runs, tiny_cifar, tmp_path):
    """A server on which predict, eval, export or a training script imports what only figures need;
    seen in what is loaded, not in whether it works without."""
    image = str(tiny_cifar / "test" / "class2" / "0.png")
    commands = [["predict", "--checkpoint", str(runs["vit"]), image],
                ["eval", str(runs["vit"]), "--out", str(tmp_path / "p.csv")],
                ["export", str(runs["vit"]), "--out", str(tmp_path / "m")]]
    code = ("import sys, analyze, train_student, train_teacher\n"
            "from engine.runtime import run_main\n"
            f"for command in {commands}:\n"
            "    sys.argv = ['analyze.py', *command]\n"
            "    run_main(analyze.main)\n"
            "drawing = ('matplotlib', 'torch.utils.tensorboard', 'analysis.drawing')\n"
            "print('loaded:', [name for name in drawing if name in sys.modules])\n")
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.endswith("loaded: []\n"), process.stderr


# ---- Loading -------------------------------------------------------------------------------------

def test_a_file_from_elsewhere_is_tested_on_the_data_that_the_flags_name(runs, tiny_cifar):
    """A folder thinned out to CIFAR's imbalance, another crop than is usual for the size."""
    network = SimpleNamespace(config={}, num_classes=10, white=65535, kind="student",
                              net=SimpleNamespace(img_size=224))
    args = loading.settings_of(network, "x.pth", {})
    assert (args.dataset, args.imb, args.img_size) == ("cifar10", 100, 224)
    assert args.eval_crop == 224 / 256
    for name in ("folder", "imagenet_lt"):
        assert loading.settings_of(network, "x.pth", {"dataset": name}).imb is None
    network.num_classes = 100
    assert loading.settings_of(network, "x.pth", {}).dataset == "cifar100"
    network.num_classes = 7
    with pytest.raises(UserError, match="7 classes, neither .* 100: name its --dataset"):
        loading.settings_of(network, "x.pth", {})
    network.config = {"dataset": "shapes", "imb": 50.0, "img_size": 32, "eval_crop": 1.0}
    args = loading.settings_of(network, "run", {"imb": 10.0})
    assert (args.dataset, args.imb, args.eval_crop) == ("shapes", 10, 1)
    flags = {"data_dir": str(tiny_cifar), "imb": 4.0}
    network, args, data = loading.load(str(runs["file.pth"]), RT, flags)
    assert network.class_names == data.class_names and data.counts[0] == 24


def test_images_that_have_changed_are_pointed_out(runs, tiny_cifar, tmp_path, capsys):
    """Accuracies on images that were trained on, without a word."""
    state = torch.load(runs["vit"] / "last.pt", weights_only=True)
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run" / "last.pt", **state | {"data": "another fingerprint"})
    loading.load(str(tmp_path / "run"), RT)
    assert "have changed since it was trained" in capsys.readouterr().err
    loading.load(str(tmp_path / "run"), RT, {"imb": 2.0})                       # asked for
    loading.load(str(runs["vit"]), RT, {"data_dir": str(tiny_cifar)})
    assert capsys.readouterr().err == ""
    for flags in ({"data_dir": str(tiny_cifar)}, {"imb": 4.0},                  # not asked for
                  {"holdout": 0.3}):            # asked for, but most of these were trained on
        loading.load(str(tmp_path / "run"), RT, flags)
        assert "have changed since it was trained" in capsys.readouterr().err


def test_a_class_without_test_images_has_no_f1():
    """An F1 of 0 that macro F1 leaves out, so that the column's mean is another number."""
    data = SimpleNamespace(class_names=["a", "b"], counts=[5, 2], num_classes=2,
                           test_labels=torch.tensor([0, 0, 0]))
    a, b = accuracy.class_rows({}, data, torch.tensor([0, 1, 0]))
    assert a["F1"] == 80 and math.isnan(b["F1"]) and b["precision"] == 0


def test_a_run_whose_images_have_moved_is_told_how_to_go_on(runs, tiny_cifar, tmp_path):
    """"There is no folder": which, and what to do?"""
    state = torch.load(runs["vit"] / "last.pt", weights_only=True)
    state["config"] |= {"data_dir": str(tmp_path / "gone")}
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run" / "last.pt", **state)
    with pytest.raises(UserError, match=r"gone.*in training: --data-dir says where they are now"):
        loading.load(str(tmp_path / "run"), RT)
    loading.load(str(tmp_path / "run"), RT, {"data_dir": str(tiny_cifar)})


def test_flags_that_name_other_data():
    """The run's own setting taken for another; a folder that has moved; held-out images of a file
    whose training nobody knows."""
    run = SimpleNamespace(config={"dataset": "folder", "imb": None, "holdout": 0.2})
    for flags in ({}, {"data_dir": "x"}, {"groups": "5,2"}, {"holdout": 0.2, "dataset": "folder"}):
        assert not loading.names_other_data(run, flags)
    for flags in ({"imb": 10.0}, {"holdout": 0.3}, {"test_list": "x"}, {"dataset": "cifar10"},
                  {"data_dir": "x", "holdout_by": "y"}):
        assert loading.names_other_data(run, flags)
    file = SimpleNamespace(config={})
    assert not loading.names_other_data(file, {"dataset": "cifar10", "imb": 10.0})
    assert loading.names_other_data(file, {"dataset": "folder", "holdout": 0.2})


def test_norm_and_size_go_to_the_files_from_elsewhere(runs, tiny_cifar, tmp_path):
    """A student's images normalised as its teacher's file needs it; a flag without any effect."""
    torch.save(torch.load(runs["teacher"] / "last.pt", weights_only=True)["model"],
               tmp_path / "t.pth")
    (tmp_path / "t.classes.txt").write_text("\n".join(f"class{k}" for k in range(10)))
    run, path = str(runs["vit"]), f"{runs['vit']},{tmp_path / 't.pth'}"
    flags = dict(norm="imagenet", size=24)
    own = loading.load_alone(run, RT).net
    for network in (loading.load_alone(path, RT, **flags), loading.load(path, RT, **flags)[0]):
        assert torch.equal(network.net.mean, own.mean) and network.net.img_size == own.img_size
        assert network.teacher.mean.flatten().tolist() == pytest.approx((0.485, 0.456, 0.406))
        assert network.teacher.img_size == 24
    for path in (run, f"{run},{runs['teacher']}"):
        with pytest.raises(UserError, match="a run says its own"):
            loading.load_alone(path, RT, norm="imagenet")
    found = loading.load_networks("teacher", [str(runs["teacher"]), str(tmp_path / "t.pth")], RT,
                                  norm="imagenet", data_flags=dict(data_dir=str(tiny_cifar), imb=4))
    means = [subject.net.mean.flatten()[0].item() for subject in found]
    assert means == pytest.approx([0.4914, 0.485])


def test_a_run_on_another_data_set_leaves_its_own_settings_behind(runs):
    """--imb 100 of CIFAR that thins somebody's photographs."""
    network = loading.load_alone(str(runs["vit"]), RT)
    assert loading.settings_of(network, "x", {}).imb == network.config["imb"] is not None
    args = loading.settings_of(network, "x", dict(dataset="folder", data_dir="mine"))
    assert args.imb is None and args.data_dir == "mine" and args.epochs == network.config["epochs"]


@pytest.mark.parametrize("config, flags, words", [
    ({"dataset": "folder"}, {"test_list": "new.csv"}, "--test-list and --list-columns go with a"),
    ({}, {"train_list": "mine.csv"}, "--train-list is for --dataset folder"),
    ({"dataset": "folder"}, {"holdout": 20.0}, "--holdout must be"),
    ({"dataset": "folder"}, {"holdout_by": "x"}, "--holdout-by says what --holdout keeps"),
    ({"dataset": "shapes"}, {"holdout": 0.2}, "--holdout is not for --dataset shapes")])
def test_data_flags_that_would_do_nothing_are_refused(config, flags, words):
    """The old test images evaluated in place of a new list's; all images but one of each class to
    test on."""
    network = SimpleNamespace(config=config, num_classes=10, white=255, kind="teacher",
                              net=SimpleNamespace(img_size=32))
    with pytest.raises(UserError, match=words):
        loading.settings_of(network, "run", flags)


def test_a_run_that_held_images_out_may_be_tested_on_others():
    """--holdout 0 refused as out of range, or for the --holdout-by that the run has."""
    config = {"dataset": "folder", "holdout": 0.2, "holdout_by": "group"}
    network = SimpleNamespace(config=config, num_classes=10, white=255, kind="teacher",
                              net=SimpleNamespace(img_size=32))
    args = loading.settings_of(network, "run", {"holdout": 0.0})
    assert args.holdout is None and args.holdout_by is None
    assert loading.settings_of(network, "run", {}).holdout == 0.2


def test_labels_are_what_distinguishes_names():
    """Labels that are empty or the same for two runs would make a legend useless."""
    label = loading.legend_labels
    paths = ["runs/vit_mini_cifar10_s0", "runs/deit-lt_mini_cifar10_s0/"]
    assert label(paths) == ["vit", "deit-lt"]
    names = ["teacher_s0", "teacher_s0_rho0"]                   # the first would be empty
    assert label([f"a/{names[0]}", f"b/{names[1]}"]) == names
    assert label(["runs/alone"]) == [""]                        # a legend of one says nothing
    assert label(["a/vit", "b/vit", "b/x"]) == ["a/vit", "b/vit", "b/x"]
    assert label(["a\x1b", "b"]) == [r"a\x1b", "b"]
    logs = loading.load_logs(["runs/a", "runs/b"], ["ours", "theirs"])
    assert [(log.label, log.path) for log in logs] == [("ours", "runs/a"), ("theirs", "runs/b")]


# ---- Tables --------------------------------------------------------------------------------------

def test_text_tables_line_up():
    """A value under another column's heading: numbers end where it ends, text begins there."""
    rows = [{"run": "a", "value": 1.5, "n": 10}, {"run": "longer", "value": 22.25, "n": 7}]
    assert tables.as_text(rows).splitlines() == ["run     value   n",
                                                 "a         1.5  10",
                                                 "longer  22.25   7"]


def test_csv_has_every_column_of_every_row():
    """A column that the first row lacks: epochs without an accuracy come first."""
    text = tables.as_csv([{"epoch": 1}, {"epoch": 2, "tail": 5.5}, {"epoch": 3, "a, b": 'c "d"'}])
    assert text.splitlines()[:3] == ['epoch,tail,"a, b"', "1,,", "2,5.5,"]
    assert list(csv.DictReader(text.splitlines()))[2]["a, b"] == 'c "d"'


@pytest.mark.parametrize("text, cell", [
    ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"), ("+1", "'+1"), ("-x.jpg", "'-x.jpg"),
    ("@SUM(A1)", "'@SUM(A1)"), ("\t=1", r"\x09=1"), ("\rx\n", "\\x0dx\n"), ("  =1", "'  =1"),
    ("a;=1;b", "a;'=1;b"), ("\uff1d1", "'\uff1d1"), ("a=b-c+d@e", "a=b-c+d@e"), ("a;b", "a;b"),
    (-1.5, "-1.5"), (True, "True"), ('a "b", c', 'a "b", c')])
def test_no_cell_of_a_csv_is_a_formula(text, cell):
    """A class's name that a spreadsheet runs; a number that becomes a text, a name that changes."""
    rows = list(csv.reader(StringIO(tables.as_csv([{"class": text, "n": 1}]), newline="")))
    assert rows == [["class", "n"], [cell, "1"]]


def test_cells_of_markdown_stay_cells():
    """A name that begins a cell, a code, a link or a tag; a code that ends too early."""
    assert tables.plain("a|b <i> [x](y) *z* `q` my_set") == (
        r"a\|b \<i> \[x](y) \*z\* \`q\` my_set")
    assert tables.code("a|b") == r"`a\|b`" and tables.code("a`b") == "`` a`b ``"
    assert tables.code(r"\x1b") == r"`\x1b`"


def test_a_text_table_may_lack_cells():
    """A value under the heading of a column that its row lacks; a table without rows."""
    text = tables.as_text([{"run": "a", "loss": 1.5}, {"run": "b", "tail": 5, "loss": 2.5}])
    assert text.splitlines() == ["run  loss  tail", "a     1.5", "b     2.5     5"]
    text = tables.as_text([{"run": "a", "tail": math.nan}])         # as in the other tables
    assert text.splitlines() == ["run  tail", "a       -"]


# ---- Outputs that cannot be written --------------------------------------------------------------

def test_settings_that_matplotlib_does_not_know(runs):
    """A traceback about somebody's MPLBACKEND."""
    process = subprocess.run([sys.executable, "analyze.py", "curves", str(runs["vit"])], cwd=ROOT,
                             env=os.environ | {"MPLBACKEND": "x"}, capture_output=True, text=True)
    assert process.stderr.startswith("error: matplotlib's settings: ") and process.returncode == 2


@pytest.mark.parametrize("flags, message", [
    (["--out", "{tmp}/none/x.png"], "there is no folder {tmp}/none"),
    (["--csv", "{tmp}/none/x.csv"], "there is no folder {tmp}/none"),
    (["--csv", "{tmp}"], "{tmp}: it is a folder"), (["--out", "{tmp}/folder/"], "{tmp}/folder"),
    (["--out", "/proc/x.png"], "/proc")])
def test_outputs_are_tried_before_the_work(flags, message, runs, tmp_path, monkeypatch, capsys):
    """Minutes of work that are lost for a folder that is not there; a traceback."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != "/proc")   # root may write there
    for command in analyze.COMMANDS:
        monkeypatch.setitem(analyze.COMMANDS, command, None)                # all work
    given = [flag.format(tmp=tmp_path) for flag in flags]
    command = ("predict", "x.png", "--checkpoint") if "--csv" in flags else ("curves",)
    with pytest.raises(SystemExit) as stop:
        script(analyze, monkeypatch, *command, runs["vit"], *given)
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message.format(tmp=tmp_path) in line


def test_devices_are_written_to_not_replaced(tmp_path):
    """/dev/stdout as a file of its own, for good; a full disk that is a traceback."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    tables.write(str(tmp_path / "pipe"), "text")
    assert os.read(reader, 9) == b"text" and not (tmp_path / "pipe").is_file()
    os.close(reader)
    with pytest.raises(UserError, match="cannot write /dev/full: No space left"):
        tables.write("/dev/full", "text")
    with pytest.raises(UserError, match="Is a directory"):
        tables.write(str(tmp_path), "text")


# ---- Mistakes ------------------------------------------------------------------------------------

@pytest.mark.parametrize("command, run_of, flags, message", [
    ("attention", ["teacher"], [], "is not a student"),
    ("sharpness", ["vit"], [], "is not a teacher"),
    ("curves", ["file.pth"], [], "has no log.jsonl"),
    ("imbalance", ["file.pth"], [], "has no result.json"),
    ("diversity", ["vit"], [], "no distances of CLS and DIST"),
    ("distance", ["vit"], ["--classes", "cow"], "there is no cow; the classes are class0"),
    ("attention", ["vit"], ["--index", "60"], "numbered from 0 to 59"),
    ("attention", ["vit"], ["--columns", "0"], "--columns must be from 1 to 100"),
    ("attention", ["vit"], ["--images", "0"], "--images must be at least 1"),
    ("attention", ["vit"], ["--seed", "-1"], "--seed must be from 0 to 1e+09"),
    ("augment", ["file.pth"], [], "does not say how its student was trained"),
    ("summary", ["file.pth"], [], "has no result.json"),
    ("summary", ["teacher"], [], "is not a student"),
    ("eval", ["vit"], ["--groups", "5,2"], "--groups is for your own data: cifar10 has published"),
    ("curves", [], [], "name one run folder or checkpoint file, or more"),
    ("augment", ["vit", "deit-lt"], [], "name one run folder or checkpoint file"),
    ("curves", ["vit", "deit-lt"], ["--labels", "a"], "one name for each of the 2 runs"),
    ("tensorboard", ["file.pth"], [], "has no log.jsonl"),
    ("predict", ["vit"], ["--checkpoint", "x", "--out", "x.csv"], "--out is not for predict"),
    ("runs", ["vit"], ["--out", "x"], "where it is --csv, nor for runs"),
    ("eval", ["vit"], ["--csv", "x.csv"], "--csv is for predict, not for eval"),
    ("export", ["vit"], ["--topk", "3"], "--topk is for predict, not for export"),
    ("export", ["vit"], ["--min-probability", "0"], "--min-probability is for predict, not for"),
    ("rank", ["vit"], ["--mirror"], "--mirror is for eval, predict, export, not for rank"),
])
def test_mistakes_end_with_one_line(command, run_of, flags, message, runs, tiny_cifar, monkeypatch,
                                    capsys):
    """A traceback, or a picture of something else, in place of a line that says what to do; an
    hour's predictions that are printed and not kept; a flag without any effect."""
    folders = [runs[name] for name in run_of]
    data = ["--data-dir", tiny_cifar, "--imb", 4]
    with pytest.raises(SystemExit) as stop:
        script(analyze, monkeypatch, command, *folders, *data, *flags)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message in error.splitlines()[-1]
    assert "Traceback" not in error


def test_help_fits_on_two_screens(monkeypatch, capsys):
    """A flag that nobody explains, a command that is not in the list."""
    script(analyze, monkeypatch, "--help")
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 100 and max(map(len, text.splitlines())) <= 100
    assert all(f"analyze.py {command} " in text for command in analyze.COMMANDS)
