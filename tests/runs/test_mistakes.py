"""A person's mistakes: one line that says what to do, exit code 2, and nothing left behind.

Settings that exclude each other: tests/test_settings.py.
"""
import shutil

import pytest
from PIL import Image

import analyze
import train_student
import train_teacher
from images import shapes
from tiny_runs import STUDENT, TEACHER

pytest_plugins = ["tiny_runs"]


@pytest.fixture
def nothing_left(tmp_path, monkeypatch):
    """The working folder; after the test no run must have been begun in it."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("module, flags, words", [
    (train_teacher, "--imb 0", "--imb"), (train_student, "--imb 1000 --method vit", "lower --imb"),
    (train_teacher, "--rho nan", "--rho must be"), (train_teacher, "--device gpu", "--device is"),
    (train_student, "--patch-size 5", "multiple of"),
    (train_teacher, "--arch resnet18 --img-size 16 --amp bf16", "down to one pixel"),
    (train_teacher, "--arch resnet50 --img-size 16 --amp bf16", "down to one pixel"),
    (train_student, "--epochs 0", "--epochs must be at least 1"),
    (train_student, "--stem conv --img-size 24 --patch-size 12", "for 12 px"),
    (train_student, "--teacher none.pt", "no checkpoint none.pt"),
    (train_student, "--method vit --teacher paco", "--teacher would have no effect"),
    (train_student, "--dataset shapes --recipe paper", "no paper recipe")])
def test_flags(module, flags, words, tiny_cifar, nothing_left, refused):
    """A traceback from somewhere below; a folder that the next command stumbles over."""
    common = TEACHER if module is train_teacher else STUDENT
    error = refused(module, *common, "--data-dir", tiny_cifar, *flags.split())
    assert words in error


def test_images_that_are_not_there(nothing_left, refused, monkeypatch):
    """An empty data folder that the next command takes for CIFAR."""
    def no_network(*args, **more):
        raise OSError("no network")
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    assert "--data-dir" in refused(train_teacher, *TEACHER, "--data-dir", "nowhere")
    assert not (nothing_left / "nowhere").exists()


def test_images_that_cannot_be_read(tiny_cifar, nothing_left, refused):
    """A picture that is left out without a word; a class that is empty."""
    shutil.copytree(tiny_cifar, "broken")
    (nothing_left / "broken" / "test" / "class3" / "0.png").write_bytes(b"not a picture")
    flags = [*TEACHER, "--data-dir", "broken"]
    assert "class3" in refused(train_teacher, *flags)
    shutil.rmtree(nothing_left / "broken" / "train" / "class5")
    (nothing_left / "broken" / "train" / "class5").mkdir()
    assert "class5 has no images" in refused(train_teacher, *flags)


def test_a_teacher_that_is_none(nothing_left, tiny_cifar, student_run, refused):
    """A text file, a student: hours later, or as a teacher whose labels mean nothing."""
    (nothing_left / "text.pt").write_text("hello")
    flags = [*STUDENT, "--data-dir", tiny_cifar, "--teacher"]
    assert "not a readable checkpoint" in refused(train_student, *flags, "text.pt")
    assert "is not a teacher" in refused(train_student, *flags, student_run)
    assert "--teacher is empty" in refused(train_student, *flags, "")


def test_a_teacher_of_other_classes(nothing_left, teacher_run, refused, monkeypatch):
    """Labels 0 to 9 of a hundred classes, or of ten others."""
    monkeypatch.setattr(shapes, "SHAPES_MAX", 20)
    monkeypatch.setattr(shapes, "SHAPES_TEST", 2)
    for split in ("train", "test"):
        for k in range(100):
            folder = nothing_left / "hundred" / split / str(k)
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (k, len(split), 0)).save(folder / "0.png")
    flags = [*STUDENT, "--teacher", teacher_run, "--imb", "1", "--dataset"]
    error = refused(train_student, *flags, "cifar100", "--data-dir", "hundred")
    assert "10 classes, the data have 100" in error
    error = refused(train_student, *flags, "shapes", "--imb", "10")
    assert "knows other classes" in error


def test_a_picture_of_a_run_that_is_not_finished(nothing_left, student_run, refused):
    """A picture of half a run, or a traceback of a file that is missing."""
    (nothing_left / "half").mkdir()
    shutil.copy(student_run / "last.pt", "half")
    assert "not finished" in refused(analyze, "summary", "half")
