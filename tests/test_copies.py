"""images/copies.py: the same image in training and test, in two classes, or twice in one."""
import os
import shutil

import numpy as np
import pytest

from engine import datasets
from engine.datasets import own_folder
from image_folders import write_files
from images import copies
from images.files import Files
from images.holdout import hold_out

LAYOUT = {"train/cat": 3, "train/dog": 3, "test/cat": 2, "test/dog": 2}


def load(root, holdout=None):
    return own_folder(str(root), None, "exp", holdout)


@pytest.mark.parametrize("how", [shutil.copy, os.symlink, os.link])
@pytest.mark.parametrize("second, problems, trained, tested, remarks", [
    ("test/cat/z.jpg", ["test/cat/z.jpg"], 6, 4, 0),
    ("test/dog/z.jpg", ["test/dog/z.jpg"], 6, 4, 0),
    ("train/dog/z.jpg", ["train/cat/1.jpg", "train/dog/z.jpg"], 5, 4, 0),
    ("train/cat/in/z.jpg", [], 7, 4, 1)])
def test_an_image_that_is_there_twice(how, second, problems, trained, tested, remarks, tmp_path):
    """An accuracy on images that were trained on; one image, two labels."""
    write_files(tmp_path, LAYOUT)
    (tmp_path / "train/cat/in").mkdir()
    how(tmp_path / "train/cat/1.jpg", tmp_path / second)
    train, test = load(tmp_path)
    assert [line.split(": the same image as ")[0] for line in train.problems] == [
        str(tmp_path / path) for path in problems]
    assert (len(train), len(test), len(train.remarks)) == (trained, tested, remarks)
    left = {os.fsdecode(path) for path in np.concatenate([train.paths, test.paths])}
    assert not left & {str(tmp_path / path) for path in problems}
    if remarks:
        assert train.remarks == ["Images that are copies of another of their class, all used: 1."]


def test_test_images_of_two_classes_are_a_problem(tmp_path):
    write_files(tmp_path, LAYOUT)
    shutil.copy(tmp_path / "test/cat/0.jpg", tmp_path / "test/dog/z.jpg")
    train, test = load(tmp_path)
    assert len(train.problems) == 2 and len(train) == 6 and len(test) == 3
    assert train.problems[0] == (f"{tmp_path}/test/cat/0.jpg: the same image as "
                                 f"{tmp_path}/test/dog/z.jpg, in another class")


@pytest.mark.parametrize("alias, target", [
    ("train/kitty", "train/cat"), ("train/a", "train/cat"), ("train/all", "train")])
def test_a_second_name_of_a_class_is_a_problem(alias, target, tmp_path):
    """Every image in two classes, of which a network can be right on half. The link goes, whether
    it sorts before or after the folder."""
    write_files(tmp_path, LAYOUT)
    os.symlink(tmp_path / target, tmp_path / alias)
    train, test = load(tmp_path)
    assert train.problems == [f"class folder {tmp_path / alias} is the same as {tmp_path / target}"]
    assert [name for name, n in zip(train.class_names, train.counts()) if n] == ["cat", "dog"]
    assert len(train) == 6 and len(test) == 4


def test_a_test_folder_that_is_the_training_folder_is_all_problems(tmp_path):
    write_files(tmp_path, {"train/cat": 3, "train/dog": 3})
    os.symlink("train", tmp_path / "test")
    train, test = load(tmp_path)
    assert len(train.problems) == 6 and len(test) == 0 and len(train) == 6


def test_only_equal_content_is_equal(tmp_path):
    """Files of equal size, or of equal end, that are taken for one image; empty files, pipes (which
    are not opened: that would wait for ever) and names without a file, which are damaged, not
    equal."""
    contents = {"a": b"x" * 9000, "b": b"y" + b"x" * 8999, "c": b"x" * 9000, "d": b"z" * 9000,
                "e": b"", "f": b"", "g": b"x" * 8999}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in ("h", "i"):
        os.mkfifo(tmp_path / name)
    names = [*"abcdefghi", "missing", "missing", "n\0l", "n\0l", "."]
    paths = [os.fsencode(tmp_path / name) for name in names]
    assert copies.same_files(paths) == [[0, 2]]


def test_few_files_are_opened(tmp_path, monkeypatch):
    """A read of all images before the first is trained on."""
    opened = []
    monkeypatch.setattr(copies, "open", lambda path, *how, **more: opened.append(path)
                        or open(path, *how, **more), raising=False)
    paths = []
    for i in range(20):
        paths.append(os.fsencode(tmp_path / str(i)))
        (tmp_path / str(i)).write_bytes(b"x" * (i + 1))
    assert copies.same_files(paths) == [] and opened == []
    (tmp_path / "7").write_bytes(b"y" * 9)
    assert copies.same_files(paths) == [] and sorted(opened) == sorted([paths[7], paths[8]])


def test_a_part_that_is_held_out_shares_no_image_with_the_rest(tmp_path):
    """Tested on what was trained on under another name; a rare class of copies that is all held
    out."""
    write_files(tmp_path, {"cat": 10, "dog": 10, "owl": 1})
    for i in range(10):                                 # of each cat another, three of a dog
        shutil.copy(tmp_path / f"cat/{i}.jpg", tmp_path / f"cat/again {i}.jpg")
    for i in range(3):
        shutil.copy(tmp_path / "dog/4.jpg", tmp_path / f"dog/again {i}.jpg")
    shutil.copy(tmp_path / "owl/0.jpg", tmp_path / "owl/again.jpg")
    for holdout, counts in ((0.2, [4, 3, 0]), (0.5, [10, 6, 0]), (0.9, [18, 12, 0])):
        train, test = load(tmp_path, holdout)
        assert not train.problems + test.problems and len(train) + len(test) == 35
        assert not set(train.content) & set(test.content)
        assert test.counts().tolist() == counts


def test_without_copies_the_held_out_part_is_the_same_as_ever():
    """Another test set for the same command, because of numbers that no image shares."""
    paths = np.array([f"/root/{i}".encode() for i in range(40)])
    whole = Files(paths, np.repeat([0, 1], 20), ["a", "b"], content=np.arange(40) + 7)
    _, test = hold_out(whole, 0.2, "/root")
    assert [path.decode() for path in test.paths.tolist()] == [
        f"/root/{i}" for i in (8, 9, 13, 17, 23, 28, 29, 39)]


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("train, test, problems", [
    ("", "b/0.jpg 1", 1), ("", "a/../b/0.jpg 1", 1), ("link.jpg 2", "", 2), ("copy.jpg 2", "", 2),
    ("", "copy.jpg 0", 1)])
def test_lists_that_share_images(train, test, problems, published, tmp_path, monkeypatch):
    """As in folders. The published lists stay as they are: what is said then is a line."""
    write_files(tmp_path, {"a": 3, "b": 3, "t": 2})
    os.symlink(tmp_path / "b/0.jpg", tmp_path / "link.jpg")
    shutil.copy(tmp_path / "b/0.jpg", tmp_path / "copy.jpg")
    listed = [f"a/{i}.jpg 0" for i in range(3)] + [f"b/{i}.jpg 1" for i in range(3)]
    (tmp_path / "ImageNet_LT_train.txt").write_text("\n".join([*listed, train]))
    (tmp_path / "ImageNet_LT_test.txt").write_text("\n".join(["t/0.jpg 0", "t/1.jpg 1", test]))
    monkeypatch.setitem(datasets.LISTS, "imagenet_lt", ("ImageNet-LT", 3))
    if published:
        monkeypatch.setattr(datasets, "lists_difference", lambda *_: None)
    trained, tested, label = datasets.listed_set("imagenet_lt", str(tmp_path), (None, None))
    found = [line for line in trained.problems if "the same image as" in line]
    all_images = 8 + (train != "") + (test != "")
    if published:
        assert not found and len(trained) + len(tested) == all_images and label == "ImageNet-LT"
        assert trained.remarks[-1].startswith(f"As published, {problems} images, ")
    else:
        assert len(found) == problems and len(trained) + len(tested) == all_images - problems
