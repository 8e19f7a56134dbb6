"""images/layout.py: which folders are classes, and for what; and that every advice works."""
import os
import re
import unicodedata

import pytest

from engine.datasets import own_folder
from image_folders import write_files
from images.files import DataError, shown
from images.layout import split_of
from images.lists import find_listed

TWO = ("cat", "dog")


def folders(*places, classes=TWO, n=4):
    return {f"{place}/{name}" if place else name: n for place in places for name in classes}


def load(root, holdout=None):
    """(class names, training images, test images, remarks) of a folder of one's own."""
    train, test = own_folder(str(root), None, "exp", holdout)
    return train.class_names, len(train), len(test), train.remarks


def refusal(root, holdout=None):
    with pytest.raises(DataError) as error:
        own_folder(str(root), None, "exp", holdout)
    return str(error.value)


def test_pictures_of_an_unknown_format_are_named(tmp_path):
    """A telephone's .heic files in the right layout: "no folders of images", and nobody knows why.
    """
    write_files(tmp_path, folders(""))
    for file in list(tmp_path.rglob("*.jpg")):
        file.rename(file.with_suffix(".HEIC"))
    assert "no folders of images (ignored, not images: 8 .heic)" in refusal(tmp_path, 0.2)


@pytest.mark.parametrize("train, test", [
    ("train", "test"), ("Train", "Test"), ("TRAIN", "VAL"), ("training", "validation"),
    ("Training Set", "valid"), ("train_images", "Testing"), ("trainset", "test-set"),
    ("train2017", "val2017"), ("trn", "tst")])
def test_folders_to_train_and_to_test_on_are_known_by_their_names(train, test, tmp_path):
    """Two classes called Train and Test, told apart to 100 %."""
    write_files(tmp_path, folders(train, test))
    assert load(tmp_path) == (["cat", "dog"], 8, 8, [])


def test_other_names_are_classes():
    for name in ("trainer", "trains", "testament", "contest", "validated", "class_train", "va", ""):
        assert split_of(name) is None


def test_of_val_and_test_the_second_is_used_and_that_is_said(tmp_path):
    write_files(tmp_path, folders("train") | folders("Val", n=2) | folders("test", n=3))
    names, trained, tested, remarks = load(tmp_path)
    assert (trained, tested) == (8, 6)
    assert remarks == [f"{tmp_path / 'Val'} is not used; {tmp_path / 'test'} is."]


@pytest.mark.parametrize("test", [{"test": 2}, {"test": 0}, {"test/cat": 0, "test/dog": 0}])
def test_a_folder_without_classes_to_test_on_is_not_used_and_that_is_said(test, tmp_path):
    """test/ without labels, as contests have it: val/ that is passed over, a --holdout that is
    refused though nothing else is there."""
    remark = f"{tmp_path / 'test'} has no class folders of images: it is not used."
    write_files(tmp_path, folders("train") | test)
    assert "--holdout 0.2" in refusal(tmp_path)
    assert load(tmp_path, 0.25) == (["cat", "dog"], 6, 2, [remark])
    write_files(tmp_path, folders("val", n=3))
    assert load(tmp_path) == (["cat", "dog"], 8, 6, [remark])


def test_a_folder_of_other_names_to_test_on_is_not_used_and_that_is_said(tmp_path):
    """Tiny-ImageNet's test/images/*: refused with advice that is refused in its turn."""
    remark = f"{tmp_path / 'test'} has none of the classes of {tmp_path / 'train'}: it is not used."
    write_files(tmp_path, folders("train") | {"test/images": 5})
    assert refusal(tmp_path).endswith(f"--holdout 0.2. {remark[:-1]}")
    assert load(tmp_path, 0.25) == (["cat", "dog"], 6, 2, [remark])
    write_files(tmp_path, folders("val", n=3))
    assert load(tmp_path) == (["cat", "dog"], 8, 6, [remark])


def test_a_class_of_locks_hides_no_other(tmp_path):
    """door/lock/*.jpg taken for the folder of a run, and the class door left out."""
    write_files(tmp_path, {"door/lock": 4, "window": 4, "wall": 4})
    assert load(tmp_path, 0.25)[:2] == (["door", "wall", "window"], 9)


@pytest.mark.parametrize("train, test", [
    ("seg_train", "seg_test"), ("images_train", "images_val"), ("Train (1)", "Test (1)"),
    ("01_train", "02_test"), ("MyTrain", "MyValidation"), ("train_32x32", "test_32x32")])
@pytest.mark.parametrize("inner", ["", "/again"])
def test_splits_of_longer_names_are_refused_with_advice_that_works(train, test, inner, tmp_path):
    """Two classes, seg_train and seg_test, told apart to 100 %."""
    write_files(tmp_path, folders(train + inner, test + inner))
    assert f"rename them to train and test; if they are classes, rename {train} to" in refusal(
        tmp_path, 0.25)
    if not inner:
        os.rename(tmp_path / train, tmp_path / "train")
        os.rename(tmp_path / test, tmp_path / "test")
        assert load(tmp_path) == (["cat", "dog"], 8, 8, [])


def test_classes_may_have_train_and_test_in_their_names(tmp_path):
    write_files(tmp_path, {"train station": 4, "test tube": 4, "train_val": 4, "bullet-train": 4})
    assert len(load(tmp_path, 0.25)[0]) == 4


@pytest.mark.parametrize("layout, place", [
    (folders("my_images"), "my_images"), (folders("a/b/c"), "a/b/c"),
    (folders("data/train", "data/test"), "data"), (folders("data/Training"), "data"),
    (folders("data") | {"empty": 0}, "data")])
@pytest.mark.parametrize("holdout", [None, 0.25])
def test_a_folder_above_the_right_one_is_refused_and_the_right_one_named(layout, place, holdout,
                                                                         tmp_path):
    """One class, my_images, recognised to 100 %."""
    write_files(tmp_path, layout)
    text = refusal(tmp_path, holdout)
    assert f"{tmp_path} has only one folder of images, so fewer than two classes:" in text
    assert f"\n  {tmp_path}/\n" in text                                         # the drawing
    better = re.search(r"Use --data-dir (\S+)$", text)[1]
    assert better == str(tmp_path / place)
    holdout = None if "data/test/cat" in layout else 0.25
    assert load(better, holdout)[0] == ["cat", "dog"]


def move(*pairs):
    """A function that renames folders below a root."""
    def follow(root):
        for old, new in pairs:
            (root / new).parent.mkdir(parents=True, exist_ok=True)
            os.rename(root / old, root / new)
    return follow


@pytest.mark.parametrize("layout, words, follow", [
    (folders("", classes=("car", "bus", "train")),
     "has train/ and beside it images in bus, car: | rename it, for example to class_train",
     move(("train", "class_train"))),
    (folders("train") | folders("", classes=("bird",)),
     "has train/ and beside it images in bird: | move the others into it",
     move(("bird", "train/bird"))),
    (folders("train") | folders("", classes=("bird",)),
     "has train/ and beside it images in bird: | or out of",
     move(("bird", "../bird"))),
    (folders("", classes=("test", "car", "bus")),
     "has test/ but no train/: | rename it, for example to class_test",
     move(("test", "class_test"))),
    (folders("val", "test"), "has test/ but no train/: | Put images to train on into",
     move(("val", "train"))),
    (folders("train", "Train"), "has Train, train: | Keep one", move(("Train", "../Train"))),
    (folders("train/all", "test/all"), "has only one folder of images | Move the folders of ROOT/"
     "train/all up into ROOT/train",
     move(("train/all", "a"), ("train", "../train"), ("a", "train"),
          ("test/all", "b"), ("test", "../test"), ("b", "test"))),
    (folders("cat", "dog", classes=("train", "test")),
     "ROOT/cat holds test, train | belong in ROOT/train/cat and ROOT/test/cat",
     move(*((f"{name}/{split}", f"{split}/{name}") for name in TWO for split in ("train", "test")),
          ("cat", "../cat"), ("dog", "../dog")))])
def test_a_mixture_is_refused_with_advice_that_works(layout, words, follow, tmp_path):
    """A class called train that hides the others; classes or splits that are silently left out;
    a command that is advised and fails."""
    root = write_files(tmp_path / "in", layout)
    text = refusal(root)
    for part in words.replace("ROOT", str(root)).split(" | "):
        assert part in text
    assert f"\n  {root}/\n" in text
    follow(root)
    names, trained, tested, remarks = load(root, None if (root / "test").exists() else 0.25)
    assert len(names) >= 2 and trained >= 6 and tested >= 2 and not remarks


@pytest.mark.parametrize("layout", [{}, {"cat": 0, "dog": 0}, {"cat": 3}, {".": 3}, {"train": 3},
                                    {"train/cat": 3, "test/cat": 3}, {"cat": 3, "dog": 0}])
def test_fewer_than_two_classes_are_refused(layout, tmp_path):
    """A network of one class that is always right."""
    text = refusal(write_files(tmp_path, layout), None if "test/cat" in layout else 0.25)
    assert "so fewer than two classes:" in text and "/<class>/*.jpg" in text


def test_what_is_no_folder_is_named(tmp_path):
    """An archive that is not unpacked: "there is no folder" of a name that is there."""
    (tmp_path / "x.zip").touch()
    assert refusal(tmp_path / "x.zip") == (
        f"{tmp_path / 'x.zip'} is no folder: unpack it if it is an archive")


def test_a_share_of_single_images_is_refused(tmp_path):
    """A folder that has images to test on, told that it has none, with no word of --holdout."""
    write_files(tmp_path, folders("", n=1))
    assert "two different images, one to train and one to test on" in refusal(tmp_path, 0.5)


def test_a_drawing_is_short(tmp_path):
    """A thousand folders on the screen, after which nobody sees the advice."""
    write_files(tmp_path, {f"train/{k}/{i}": 1 for k in range(9) for i in range(9)} | {"cat": 1})
    lines = refusal(tmp_path).splitlines()
    assert len(lines) == 17 and lines[-2] == "      ..." and lines[-1].startswith("If train is")


def test_training_images_alone_can_be_split(tmp_path):
    """Advice, --holdout 0.2, that another check refuses."""
    write_files(tmp_path, folders("train"))
    assert "--holdout 0.2" in refusal(tmp_path)
    assert load(tmp_path, 0.25)[1:3] == (6, 2)
    write_files(tmp_path, folders("Testing"))
    assert "in Testing/: leave --holdout out" in refusal(tmp_path, 0.25)
    assert load(tmp_path)[1:3] == (8, 8)


@pytest.mark.parametrize("layout, place", [
    (folders("") | {".": 2}, "."), (folders("train", "test") | {"train": 2}, "train"),
    (folders("train", "test") | {"test": 2}, "test")])
def test_images_in_no_class_are_a_problem(layout, place, tmp_path):
    """Images that are left out, and nobody knows."""
    write_files(tmp_path, layout)
    train, test = own_folder(str(tmp_path), None, "exp", None if "test" in str(layout) else 0.25)
    problem, = train.problems + test.problems
    assert problem == f"images in {tmp_path / place} itself, in no class folder: 0.jpg, 1.jpg"


def test_images_beside_train_and_test_are_said(tmp_path):
    write_files(tmp_path, folders("train", "test") | {".": 7})
    remark, = load(tmp_path)[3]
    names = "0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 2 more"
    assert remark == f"Images in {tmp_path} itself are not used: {names}."
    write_files(tmp_path, {"new/in": 1})
    assert load(tmp_path)[3] == [f"Images in new of {tmp_path} are not used.", remark]


@pytest.mark.parametrize("place", ["run", "runs/a", "runs/b/c", "cat/run", "train", "test/run",
                                   "."])
def test_a_run_among_the_images_is_no_class(place, tmp_path):
    """A class of the pictures that a run has drawn; other data, so no --resume, after each run."""
    write_files(tmp_path, folders("") | {f"{place}/pictures": 2})
    if place != ".":
        for name in ("config.json", "log.jsonl"):
            (tmp_path / place / name).touch()
        write_files(tmp_path, {place: 2})
    else:
        os.rename(tmp_path / "pictures", tmp_path / "run")
        for file in (tmp_path / "run").iterdir():
            file.unlink()
        (tmp_path / "run" / "lock").touch()                 # of a run that is about to begin
    names, trained, tested, remarks = load(tmp_path, 0.25)
    assert names == ["cat", "dog"] and (trained, tested) == (6, 2) and not remarks


def test_folders_in_classes_count_as_theirs_and_that_is_said_where_it_may_be_wrong(tmp_path):
    """cat/2020/x.jpg that is lost; splits of unusual names, or groups of classes, that become
    classes without a word."""
    write_files(tmp_path / "years", {"cat/2020/may": 2, "cat/2021": 2, "dog": 4})
    assert load(tmp_path / "years", 0.25) == (["cat", "dog"], 6, 2, [])
    write_files(tmp_path / "splits", folders("first", "second"))
    names, *_, remarks = load(tmp_path / "splits", 0.25)
    assert names == ["first", "second"]
    assert remarks == ["Classes are first, second; folders in them count as theirs: cat, dog."]
    write_files(tmp_path / "groups", {"animal/cat": 4, "animal/dog": 4, "plant/tree": 4})
    assert load(tmp_path / "groups", 0.25)[3] == [
        "Classes are animal, plant; folders in them count as theirs: cat, dog, tree."]


def test_unicode_forms_of_a_name_are_one_class(tmp_path):
    """Test images of a folder that a Mac has packed: unknown classes."""
    decomposed = unicodedata.normalize("NFD", "Bär")
    write_files(tmp_path, {f"train/{decomposed}": 3, "train/dog": 3, "test/Bär": 2, "test/dog": 2})
    assert load(tmp_path) == (["Bär", "dog"], 6, 4, [])
    write_files(tmp_path, {"train/Bär": 3})
    assert "has 2 folders called Bär, in different Unicode forms" in refusal(tmp_path)


@pytest.mark.parametrize("other", ["Cat", "cat ", "CAT"])
def test_names_that_differ_in_case_or_blanks_are_named(other, tmp_path):
    write_files(tmp_path, {"train/cat": 3, "train/dog": 3, f"test/{other}": 2, "test/dog": 2})
    _, test = own_folder(str(tmp_path), None, "exp", None)
    problem, = test.problems
    assert problem.startswith(f"class {shown(other)} of {tmp_path / 'test'} is not in ")
    assert problem.endswith("; if it is cat, rename one of the two")
    os.rename(tmp_path / "test" / other, tmp_path / "test" / "cat")
    assert load(tmp_path)[1:] == (6, 4, [])
    write_files(tmp_path, {f"train/{other}": 3, f"test/{other}": 1})
    remark, = load(tmp_path)[3]
    assert "are taken for 2 classes" in remark


def test_names_of_a_list_that_hardly_differ_are_named(tmp_path):
    """Two classes of one kind of animal, in silence."""
    (tmp_path / "list.csv").write_text("image,label\na.jpg,cat\nb.jpg,Cat\nc.jpg,dog\n")
    train, _, _ = find_listed(str(tmp_path / "list.csv"), None, str(tmp_path))
    assert train.remarks == ["Cat, cat are taken for 2 classes."]
