"""From a trained network to predictions of pictures, and to files for other programs."""
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import analyze
from analysis import accuracy, loading, predict
from conftest import script
from engine.evaluation import predicted
from engine.networks import Network, joined
from engine.runtime import UserError
from finished_runs import RT, rows_of, runs  # noqa: F401: a fixture
from images import decode, files


class ByColour(nn.Module):
    """Knows tiny_cifar's classes, which are planes of one colour each. Float images -> logits."""
    img_size = 32

    def __init__(self, data):
        super().__init__()
        planes = data.test_images.float().mean(dim=(2, 3)) / 255
        self.colours = torch.stack([planes[data.test_labels == k].mean(dim=0) for k in range(10)])

    def forward(self, x):
        return -5 * torch.cdist(x.mean(dim=(2, 3)), self.colours)


@pytest.fixture
def by_colour(runs):
    _, _, data = loading.load(str(runs["teacher"]), RT)
    return Network(ByColour(data), "teacher", "by colour", {}, data.class_names)


# ---- Predictions ---------------------------------------------------------------------------------

def test_predictions_of_files_folders_and_patterns(by_colour, tiny_cifar, tmp_path, monkeypatch,
                                                   capsys):
    """Classes in another order, images shifted against their names by a bad one, a batch lost."""
    for k in range(10):
        for i in range(2):
            image = Image.open(tiny_cifar / "test" / f"class{k}" / f"{i}.png").resize((70, 64))
            image.save(tmp_path / f"class{k} {i}.jpg")
    (tmp_path / "class3 0.jpg").write_text("no image")
    monkeypatch.setattr(predict.predict, "__defaults__", (5, 8, 1.0, None))     # batches of 8
    monkeypatch.setattr(loading, "load_network", lambda *_: by_colour)
    table = tmp_path / "p.csv"
    script(analyze, monkeypatch, "predict", "--checkpoint", "x", tmp_path, "--topk", 3,
           "--csv", table)
    out, err = capsys.readouterr()
    rows = rows_of(table)
    assert len(rows) == 19 and "class3 0.jpg: no image" in err
    for row, line in zip(rows, out.splitlines()):
        assert row["class"] in row["image"].rsplit("/", 1)[1]
        p = [float(row[f"probability{rank}"]) for rank in ("", " 2", " 3")]
        assert 1 > p[0] > p[1] >= p[2] > 0
        assert line == (f"{row['image']}: {row['class']} {100 * p[0]:.1f} %, "
                        f"{row['class 2']} {100 * p[1]:.1f} %, {row['class 3']} {100 * p[2]:.1f} %")
    pattern = predict.find_images([str(tmp_path / "class1 *.jpg"), str(table)])
    assert pattern == [str(tmp_path / f"class1 {i}.jpg") for i in range(2)] + [str(table)]
    assert len(predict.find_images([str(tmp_path)])) == 20


def test_each_image_is_predicted_once(tiny_cifar, tmp_path, monkeypatch, capsys):
    """An image that counts twice, a folder that a pattern names and that is not searched, or that
    cannot be read without a word."""
    image = tiny_cifar / "test" / "class1" / "0.png"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").write_bytes(image.read_bytes())
    (tmp_path / "-y.png").write_bytes(image.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert predict.find_images(["-y.png", "*", "in", "in/x.png"]) == ["-y.png", "in/x.png"]
    for name in ("a.heic", "b.heic"):
        (tmp_path / "in" / name).touch()
    assert predict.find_images(["in"]) == ["in/x.png"]
    assert capsys.readouterr().err == "Ignored, not images: 2 .heic\n"

    def unreadable(path):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "scandir", unreadable)
    assert predict.find_images(["-y.png", "in"]) == ["-y.png"]
    assert capsys.readouterr().err == "in: Permission denied\n"


def test_hostile_names_reach_neither_terminal_nor_spreadsheet(runs, tiny_cifar, tmp_path,
                                                              monkeypatch, capsys):
    """A checkpoint's class or a picture's name that the terminal obeys, or a spreadsheet."""
    state = torch.load(runs["vit"] / "last.pt", weights_only=True)
    state["class_names"] = ["=cmd|calc!A0", "\x1b[2J\n", *map(str, range(8))]
    torch.save(state, tmp_path / "x.pt")
    path = tmp_path / "\x1b]0;a\u202e.png"
    path.write_bytes((tiny_cifar / "test" / "class1" / "0.png").read_bytes())
    script(analyze, monkeypatch, "predict", "--checkpoint", tmp_path / "x.pt", path, "--topk", 10,
           "--csv", tmp_path / "p.csv")
    out, text = capsys.readouterr().out, (tmp_path / "p.csv").read_text()
    for shown in (out, text):
        assert len(shown.splitlines()) == 2 and not {"\x1b", "\u202e"} & set(shown)
        assert r"\x1b[2J\x0a" in shown and r"\x1b]0;a\u202e.png" in shown
    assert ",'=cmd|calc!A0," in text


def test_levels_of_deep_pictures_are_told(by_colour, tmp_path, capsys):
    """12-bit pictures for a network of 8-bit ones, which sees black; 16 bits for one of 12, which
    sees white: a class and a probability without a word."""
    dark = Image.fromarray(np.random.RandomState(0).randint(0, 4000, (9, 9)).astype(np.uint16))
    dark.save(tmp_path / "x.png")
    list(predict.predict(by_colour, [str(tmp_path)], RT))
    err = capsys.readouterr().err
    assert "16-bit levels; 0 to 65535" in err and "nearly black" in err
    by_colour.white = 1023
    list(predict.predict(by_colour, [str(tmp_path)], RT))
    err = capsys.readouterr().err
    assert "levels below 0 or above 1023" in err and "nearly black" not in err


def test_an_unfinished_network_is_named(runs, tiny_cifar, tmp_path, monkeypatch, capsys):
    """Predictions of a training that was stopped after its first epoch, like any other."""
    state = torch.load(runs["vit"] / "last.pt", weights_only=True)
    torch.save(state | dict(epoch=1, step=0), tmp_path / "x.pt")
    picture = tiny_cifar / "test" / "class1" / "0.png"
    script(analyze, monkeypatch, "predict", "--checkpoint", tmp_path / "x.pt", picture)
    assert "x.pt is not finished: epoch 1 of 3" in capsys.readouterr().err
    script(analyze, monkeypatch, "predict", "--checkpoint", runs["vit"], picture)
    assert "not finished" not in capsys.readouterr().err


def test_one_class_has_one_probability(tiny_cifar):
    """topk beyond the classes, of a network that knows one."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1))
    net.img_size = 32
    path = str(tiny_cifar / "test" / "class7" / "0.png")
    row, = predict.predict(Network(net, "teacher", "", {}, ["only"]), [path], RT, topk=5)
    assert row == {"image": path, "class": "only", "probability": 1.0}


def test_a_network_without_class_names_predicts_numbers(by_colour, tiny_cifar):
    """The name of another class, or an error, for files from elsewhere."""
    by_colour.class_names = None
    path = str(tiny_cifar / "test" / "class7" / "0.png")
    row, = predict.predict(by_colour, [path], RT, topk=99)
    assert row["image"] == path and row["class"] == "7" and len(row) == 1 + 2 * 10


@pytest.mark.parametrize("name", ["teacher", "deit-lt", "vit"])
def test_predictions_are_those_of_the_evaluation(name, runs, tiny_cifar, monkeypatch):
    """Another resize, crop, normalisation or head than that of the reported accuracy."""
    network, args, data = loading.load(str(runs[name]), RT)
    monkeypatch.setattr(predict, "images_at_a_time", lambda images: 25)
    logits = predict.logits_of(network, data.test_images, torch.arange(60), RT)
    paths = [path.decode() for path in files.list_folder(tiny_cifar / "test").paths]
    rows = predict.predict(network, paths, RT, topk=10)
    reported = accuracy.accuracies(network, args, data, RT)["avg"]["overall"]
    right = 100 * (logits.argmax(dim=1) == data.test_labels).float().mean()
    assert float(right) == pytest.approx(reported, abs=0.01)
    if name != "vit":               # 37 and 16 px: of files by PIL, of the evaluation from 32 px
        same = [row["class"] == data.class_names[k] for row, k in zip(rows, logits.argmax(dim=1))]
        assert sum(same) >= 57
        return
    ranks = ["", *(f" {rank}" for rank in range(2, 11))]
    for row, p in zip(rows, logits.softmax(dim=1)):
        ours = {row[f"class{rank}"]: row[f"probability{rank}"] for rank in ranks}
        assert [ours[name] for name in data.class_names] == pytest.approx(p.tolist(), abs=1e-3)


class NotFinite(ByColour):
    """Says NaN of class3, and +inf of class4."""

    def forward(self, x):
        logits = super().forward(x)
        logits[logits.argmax(dim=1) == 3, 5] = float("nan")
        logits[logits.argmax(dim=1) == 4, 4] = float("inf")
        return logits


def test_an_answer_that_is_not_finite_is_no_class(runs, tiny_cifar, capsys):
    """NaN probabilities with the name of class 0 before them; or all images of the batch lost."""
    _, _, data = loading.load(str(runs["teacher"]), RT)
    network = Network(NotFinite(data), "teacher", "by colour", {}, data.class_names)
    paths = [str(tiny_cifar / "test" / f"class{k}" / "0.png") for k in range(10)]
    rows = predict.predict(network, paths, RT)
    assert [row["image"] for row in rows] == [p for p in paths if p[-7] not in "34"]
    assert len(capsys.readouterr().err.splitlines()) == 2
    with pytest.raises(UserError, match="none of the images"):
        list(predict.predict(network, paths[3:5], RT))


def test_predictions_come_with_each_batch(by_colour, tiny_cifar, monkeypatch):
    """Thousands of pictures without a word, and none for the time if it is stopped."""
    read, read_all = [], decode.read_all

    def counted(encoded, size):
        read.append(len(encoded.paths))
        return read_all(encoded, size)

    monkeypatch.setattr(decode, "read_all", counted)
    rows = predict.predict(by_colour, [str(tiny_cifar / "test" / "class7")], RT, batch=2)
    assert next(rows)["class"] == "class7" and read == [2]
    assert len(list(rows)) == sum(read) - 1


def test_what_cannot_be_read_is_said_to_be_missing(by_colour, tiny_cifar, tmp_path, capsys):
    """A table with fewer rows than pictures, after a remark that could be a mere warning."""
    (tmp_path / "x.png").write_bytes(b"no picture")
    good = str(tiny_cifar / "test" / "class7" / "0.png")
    row, = predict.predict(by_colour, [str(tmp_path / "x.png"), good], RT)
    assert row["image"] == good
    assert capsys.readouterr().err == f"{tmp_path / 'x.png'}: no image that can be read; left out\n"


def test_what_is_not_finite_is_neither_right_nor_sure():
    """A confidence of NaN for the whole test set, or an image counted in the row before its own."""
    logits = torch.tensor([[9.0, 0], [float("nan"), 0], [0, 9.0], [float("inf"), 0]])
    labels = torch.tensor([0, 0, 1, 1])
    text = accuracy.uncertainty_text(logits, labels, {"head": [0], "tail": [1]})
    assert "mean confidence 50.0 %" in text and "nan" not in text
    confusion = accuracy.confusion(predicted(logits), labels, 2)
    assert confusion.tolist() == [[1, 0], [0, 1]]


def test_a_file_is_decoded_at_the_size_of_the_evaluation():
    """The centre cut from another square: a run states its crop, a teacher's is the whole image."""
    def size(side, **config):
        net = nn.Module()
        net.img_size = side
        return loading.decoded_size(Network(net, "student", "", config))
    assert size(224) == 256 and size(32) == 32                  # files from elsewhere
    assert size(224, eval_crop=1.0) == 224 and size(32, eval_crop=0.875) == 37
    assert size(128, arch="resnet32", loss="ce") == 128


@pytest.mark.parametrize("flags, message", [
    (["x.jpg"], "--checkpoint"), (["--checkpoint", "{vit}", "nowhere/*.jpg"], "nowhere"),
    (["--checkpoint", "{vit}", "{text}"], "none of the images"),
    (["--checkpoint", "{vit}", "{empty}"], "there are no images in"),
    (["--checkpoint", "{vit}"], "name the images")])
def test_a_prediction_of_nothing_says_why(flags, message, runs, tmp_path, monkeypatch, capsys):
    """A traceback, or an empty table that looks like an answer."""
    (tmp_path / "x.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    paths = dict(vit=runs["vit"], text=tmp_path / "x.jpg", empty=tmp_path / "empty")
    with pytest.raises(SystemExit) as stopped:
        script(analyze, monkeypatch, "predict", *(flag.format(**paths) for flag in flags))
    assert stopped.value.code == 2 and message in capsys.readouterr().err


# ---- Mirror images -------------------------------------------------------------------------------

def test_a_mirrored_network_does_not_care_which_side_is_left(runs, tiny_cifar, tmp_path,
                                                             monkeypatch):
    """Answers about files that keep to one side. (Which mean: test_networks.py.)"""
    folder = str(runs["teacher"])
    image = Image.open(tiny_cifar / "test" / "class2" / "0.png")
    image.save(tmp_path / "left.png")
    image.transpose(Image.FLIP_LEFT_RIGHT).save(tmp_path / "right.png")
    left, right = predict.predict(loading.load_alone(folder, RT), [str(tmp_path)], RT)
    assert abs(left["probability"] - right["probability"]) > 2e-3
    script(analyze, monkeypatch, "predict", "--checkpoint", folder, tmp_path, "--mirror", "--csv",
           tmp_path / "p.csv")
    left, right = rows_of(tmp_path / "p.csv")
    assert left["class"] == right["class"]
    assert float(left["probability"]) == pytest.approx(float(right["probability"]), abs=1e-3)


# ---- Export --------------------------------------------------------------------------------------

def test_an_export_that_differs_is_refused():
    """Files that another program would trust: 1 % off, or not a number."""
    expected = torch.tensor([1.0, 2.0])
    for logits in (torch.tensor([1.0, 2.01]), torch.tensor([1.0, torch.nan])):
        with pytest.raises(UserError, match="other logits"):
            predict.agreement(logits, expected, "x")
    assert predict.agreement(expected, expected, "x") == "logits agree to within 0 of the largest"


def test_norm_and_size_reach_the_network(runs, tiny_cifar, tmp_path, monkeypatch):
    """Flags that are taken and not used: every prediction from other pixel statistics."""
    asked, load_alone = [], loading.load_alone

    def recorded(*given, **more):
        asked.append(given[2:4])
        return load_alone(*given, **more)
    monkeypatch.setattr(loading, "load_alone", recorded)
    monkeypatch.setattr(predict, "ONNX", ("no_such_package",))
    flags = ["--norm", "half", "--size", 32]
    script(analyze, monkeypatch, "predict", "--checkpoint", runs["file.pth"],
           tiny_cifar / "test" / "class1" / "0.png", *flags)
    script(analyze, monkeypatch, "export", runs["file.pth"], *flags, "--out", tmp_path / "m")
    assert asked == [("half", 32)] * 2
    options = SimpleNamespace(norm="half", size=24, mirror=True,
                              **dict.fromkeys(loading.DATA_FLAGS))
    assert analyze.load_flags(options) == dict(data_flags={}, norm="half", size=24, mirror=True)


def test_student_and_teacher_are_both_mirrored(runs):
    """--mirror of RUN,TEACHER for the student alone."""
    both = loading.load_alone(f"{runs['vit']},{runs['teacher']}", RT, mirror=True)
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(both.teacher(x), both.teacher(x.flip(3)))


def test_networks_of_different_data_have_no_counts_together(runs):
    """The first one's class frequencies, or data, for all of them."""
    one, two = (loading.load_alone(str(runs[name]), RT) for name in ("vit", "teacher"))
    two.counts, two.data = [1] * 10, "others"
    together = joined([one, two], "p")
    assert together.counts is None and together.data == "+".join(sorted([one.data, "others"]))
