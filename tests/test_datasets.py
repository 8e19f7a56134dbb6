"""engine/datasets.py: CIFAR, folders and lists of known pixels, and what people get wrong."""
import io
import json
import os
import pickle
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.datasets.cifar
from PIL import Image

import data_lt
from engine import datasets
from engine.runtime import Runtime
from image_folders import close, damage, deepen, make_folder, make_lists, picture, write_files
from images import machine
from images.decode import Stream
from images.files import DataError


class Recorder(Runtime):
    """A runtime on the CPU that remembers what was printed."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.printed = []

    def print(self, text):
        self.printed.append(text)


def settings(dataset, data_dir, **changes):
    defaults = dict(imb=None, imb_type="exp", img_size=32, holdout=None, holdout_by=None,
                    train_list=None, test_list=None, list_columns=None, skip_bad=False)
    return SimpleNamespace(dataset=dataset, data_dir=str(data_dir), **(defaults | changes))


def load(dataset, data_dir, rt=None, **changes):
    return datasets.load_data(settings(dataset, data_dir, **changes), rt or Recorder())


@pytest.fixture
def offline(monkeypatch):
    """torchvision cannot download anything."""
    def download(*args, **more):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", download)


# ---- CIFAR ---------------------------------------------------------------------------------------

NAMES = [f"kind{k}" for k in range(1, 11)]      # kind10 is last, the alphabet puts it second


def pixels(n, seed):
    return np.random.RandomState(seed).randint(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def as_tensor(images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def write_folder(root, split, images, labels, names=NAMES):
    """root/split/<class>/<i>.png, numbered within each class from 0 on, not zero-padded."""
    counts = [0] * len(names)
    for image, k in zip(images, labels):
        folder = root / split / names[k]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{counts[k]}.png")
        counts[k] += 1


@pytest.fixture
def cifar(tmp_path):
    """12 training and 2 test images of each of 10 classes."""
    write_folder(tmp_path, "train", pixels(120, 0), np.arange(120) % 10)
    write_folder(tmp_path, "test", pixels(20, 1), np.arange(20) % 10)
    return tmp_path


def published_selection(labels, counts):
    """As the published code writes it, with NumPy's global generator."""
    np.random.seed(0)
    kept = []
    for k, n in enumerate(counts):
        members = np.where(labels == k)[0]
        np.random.shuffle(members)
        kept.extend(members[:n])
    return kept


def test_a_folder_loads_the_published_selection_of_its_images(cifar):
    """Class 10 before class 2, file 10 before file 2, height and width or the colors exchanged,
    labels of other images."""
    data, labels = load("cifar10", cifar, imb=4), np.arange(120) % 10
    assert data.counts == [12, 10, 8, 7, 6, 5, 4, 4, 3, 3]
    assert torch.bincount(data.train_labels).tolist() == data.counts
    kept = published_selection(labels, data.counts)
    assert torch.equal(data.train_images, as_tensor(pixels(120, 0)[kept]))
    assert data.train_labels.tolist() == labels[kept].tolist()
    by_class = np.argsort(np.arange(20) % 10, kind="stable")
    assert torch.equal(data.test_images, as_tensor(pixels(20, 1)[by_class]))
    assert data.test_labels.tolist() == [k for k in range(10) for _ in range(2)]
    assert data.class_names == NAMES and data.name == "cifar10"
    assert data.train_images.dtype == data.test_images.dtype == torch.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64


def test_step_imbalance_reaches_the_data(cifar):
    assert load("cifar10", cifar, imb=3, imb_type="step").counts == [12] * 5 + [4] * 5


def test_holding_images_out_of_cifar_leaves_the_test_set_alone(cifar):
    """An image both trained and tested on, the real test set used, a part of the long tail instead
    of the whole class."""
    data, labels = load("cifar10", cifar, imb=3, holdout=0.25), np.arange(120) % 10
    assert data.counts[0] == 9 and data.counts[-1] == 3
    assert torch.bincount(data.test_labels).tolist() == [3] * 10
    held_out = np.concatenate([np.where(labels == k)[0][9:] for k in range(10)])

    def as_set(images):
        return {image.numpy().tobytes() for image in images}
    everything = as_set(as_tensor(pixels(120, 0)))
    assert as_set(data.test_images) == as_set(as_tensor(pixels(120, 0)[held_out]))
    assert as_set(data.train_images) <= everything - as_set(data.test_images)
    assert data.label == "CIFAR-10 validation not as published"


def write_torchvision(root, K, train, test, names):
    """The pickled files of the original archives: a row is 1024 reds, greens, then blues."""
    def write(name, images, labels):
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
        label_key = "labels" if K == 10 else "fine_labels"
        content = {"data": rows, label_key: labels.tolist(), "coarse_labels": [0] * len(labels)}
        (root / name).write_bytes(pickle.dumps(content))
    root = root / ("cifar-10-batches-py" if K == 10 else "cifar-100-python")
    root.mkdir(parents=True)
    if K == 10:
        for i, part in enumerate(np.array_split(np.arange(len(train[0])), 5), start=1):
            write(f"data_batch_{i}", train[0][part], train[1][part])
        write("test_batch", *test)
        (root / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    else:
        write("train", *train)
        write("test", *test)
        (root / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))


@pytest.mark.parametrize("K, n, holdout", [(10, 12, None), (100, 3, None), (10, 12, 0.25)])
def test_torchvisions_files_and_a_folder_give_the_same_data(tmp_path, monkeypatch, K, n, holdout):
    """The order within a class is all that the selection may depend on; colors read as rows."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    names = [f"kind{k}" for k in range(K)]
    labels = np.random.RandomState(2).permutation(np.repeat(np.arange(K), n))
    train, test = (pixels(K * n, 3), labels), (pixels(K, 4), np.arange(K))
    write_torchvision(tmp_path / "files", K, train, test, names)
    write_folder(tmp_path / "folder", "train", *train, names)
    write_folder(tmp_path / "folder", "test", *test, names)
    balanced = load(f"cifar{K}", tmp_path / "files", imb=1)
    assert balanced.counts == [n] * K
    a = load(f"cifar{K}", tmp_path / "files", imb=2, holdout=holdout)   # not the one before
    b = load(f"cifar{K}", tmp_path / "folder", imb=2, holdout=holdout)
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    for field in ("counts", "class_names", "class_ids", "groups"):
        assert getattr(a, field) == getattr(b, field), field
    assert b.label == f"{a.label} not as published"         # torchvision would have found that out
    if not holdout:
        kept = published_selection(labels, a.counts)
        assert torch.equal(a.train_images, as_tensor(train[0][kept])) and sum(a.counts) < K * n


def test_images_are_read_once_for_teacher_and_student_but_again_when_they_change(cifar,
                                                                                 monkeypatch):
    """Everything decoded twice; old images under changed files or for other settings."""
    reads, read_all = [], datasets.read_all
    monkeypatch.setattr(datasets, "read_all", lambda *args, **how: reads.append(args)
                        or read_all(*args, **how))
    first = load("cifar10", cifar, imb=4)
    again = load("cifar10", cifar, imb=4, img_size=224)         # CIFAR is not resized when read
    assert again is first and len(reads) == 2                   # training and test
    analysed = load("cifar10", cifar, imb=4, skip_bad=True, white=first.white)
    assert analysed is first and len(reads) == 2                # as the picture of a run asks
    assert load("cifar10", cifar, imb=4, white=255) is not first
    assert load("cifar10", cifar, imb=2).counts[-1] == 6
    Image.new("RGB", (32, 32)).save(cifar / "test" / "kind1" / "9.png")
    assert len(load("cifar10", cifar, imb=2).test_labels) == 21


# ---- Is it the published set? --------------------------------------------------------------------

PUBLISHED_10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                "truck")


def changed(values, k, value):
    return [*values[:k], value, *values[k + 1:]]


@pytest.mark.parametrize("names, counts, test_counts, difference", [
    (PUBLISHED_10, [5000] * 10, [1000] * 10, None),
    ([name.title() for name in PUBLISHED_10], [5000] * 10, None, None),
    (sorted(changed(PUBLISHED_10, 1, "car")), [5000] * 10, [1000] * 10,
     "class 1 is bird, not automobile"),
    (changed(PUBLISHED_10, 9, "lorry"), [5000] * 10, [1000] * 10, "class 9 is lorry, not truck"),
    ([*map(str, range(10))], [5000] * 10, [1000] * 10, "class 0 is 0, not airplane"),
    (PUBLISHED_10, changed([5000] * 10, 2, 5001), None,
     "bird has 5001 images to train on, not 5000"),
    (PUBLISHED_10, [5000] * 10, changed([1000] * 10, 3, 999),
     "cat has 999 images to test on, not 1000")])
def test_what_is_not_the_published_cifar_is_found(names, counts, test_counts, difference):
    """Another selection, under the published name: a class called otherwise sorts elsewhere, and
    its number decides how many images it keeps; an extra file moves the shuffle."""
    assert datasets.cifar_difference(names, counts, test_counts) == difference


def test_damaged_files_of_cifar_are_not_called_missing(tmp_path, offline):
    """Somebody who looks for the right --data-dir, and has it."""
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"half")
    with pytest.raises(DataError, match="are damaged or not complete"):
        load("cifar10", tmp_path)


def test_the_names_of_cifar_100_are_in_their_order():
    names = datasets.CIFAR_NAMES[100].split()
    assert len(names) == 100 and names == sorted(names)
    assert (names[23], names[58], names[90]) == ("cloud", "pickup_truck", "train")
    assert datasets.cifar_difference(names, [500] * 100, [100] * 100) is None
    assert "not 500" in datasets.cifar_difference(names, [5000] * 100, [100] * 100)


def test_a_folder_of_other_classes_is_not_called_cifar(cifar, monkeypatch):
    """A result of other images in a table of published ones; images that are missing from it."""
    rt = Recorder()
    assert load("cifar10", cifar, rt, imb=4).label == "CIFAR-10 not as published"
    assert rt.printed == ["This is not the published CIFAR-10: class 0 is kind1, not airplane."]
    monkeypatch.setattr(datasets, "cifar_difference", lambda *_: None)
    datasets.last_loaded.clear()
    rt = Recorder()
    assert load("cifar10", cifar, rt, imb=4).label == "CIFAR-10" and not rt.printed
    (cifar / "train" / "kind1" / "5.png").write_text("no image")
    assert load("cifar10", cifar, imb=1, skip_bad=True).label == "CIFAR-10 not as published"


def test_copies_in_the_published_cifar_stay_and_are_said(cifar, monkeypatch):
    """CIFAR-100 has eighteen pairs: without them it is another set. A user's own has problems."""
    shutil.copy(cifar / "train" / "kind1" / "5.png", cifar / "test" / "kind3" / "1.png")
    shutil.copy(cifar / "train" / "kind1" / "6.png", cifar / "train" / "kind2" / "1.png")
    with pytest.raises(DataError, match="3 problems"):
        load("cifar10", cifar, imb=1)
    monkeypatch.setattr(datasets, "cifar_difference", lambda *_: None)
    rt = Recorder()
    assert len(load("cifar10", cifar, rt, imb=1).test_labels) == 20
    assert rt.printed == ["As published, 3 images, 1 of them to test on, are also in another class "
                          "or in training and test."]


def test_lists_are_compared_with_the_published_ones():
    difference = datasets.lists_difference
    large = [115_846 - 999, *[1] * 999]
    assert difference("imagenet_lt", large, [50] * 1000) is None
    assert difference("inat18", [437_513 - 8141, *[1] * 8141], [3] * 8142) is None
    expected = "437,512 images to train on, not 437,513"
    assert difference("inat18", [437_512 - 8141, *[1] * 8141], [3] * 8142) == expected
    expected = "class 7 has 20 images to test on, not 50"
    assert difference("imagenet_lt", large, changed([50] * 1000, 7, 20)) == expected
    assert difference("imagenet_lt", [500] * 200, [50] * 200) == "200 classes, not 1,000"


# ---- What people get wrong with CIFAR ------------------------------------------------------------

def message(dataset, data_dir, **changes):
    """What loading ends with: one line, or one, a drawing of the folder and one."""
    with pytest.raises(DataError) as error:
        load(dataset, data_dir, **({"imb": 1} | changes))
    first, *drawing = str(error.value).splitlines()
    assert not drawing or first.endswith(":") and drawing[0] == f"  {data_dir}/"
    return str(error.value)


def test_a_missing_test_folder_is_named(cifar):
    (cifar / "test").rename(cifar / "tests")
    assert f"{cifar} has train/ and beside it images in tests:" in message("cifar10", cifar)
    (cifar / "tests").rename(cifar / ".tests")
    assert message("cifar10", cifar) == (
        f"there are no folders of images in {cifar / 'test'}")


def test_folders_of_cifar_have_names_in_any_case_and_training_alone_can_be_split(cifar):
    """{Train,Test}: a download of the whole data set into a folder that has it."""
    expected = load("cifar10", cifar, imb=3, holdout=0.25)
    (cifar / "train").rename(cifar / "Training")
    (cifar / "test").rename(cifar / "VAL")
    assert load("cifar10", cifar, imb=4).counts[0] == 12
    shutil.rmtree(cifar / "VAL")
    alone = load("cifar10", cifar, imb=3, holdout=0.25)
    assert torch.equal(alone.train_images, expected.train_images)
    assert torch.equal(alone.test_images, expected.test_images)


def test_classes_without_train_are_not_passed_over(cifar, offline):
    """CIFAR downloaded into a folder of ten classes, which it is trained on instead; advice for the
    folder above."""
    assert message("cifar10", cifar / "train").startswith(
        f"{cifar / 'train'} has 10 folders of images but no train/:")
    (cifar / "in").mkdir()
    for split in ("train", "test"):
        (cifar / split).rename(cifar / "in" / split)
    text = message("cifar10", cifar)
    assert text.endswith(f"name its place with --data-dir {cifar / 'in'}")


def test_cifar_is_not_downloaded_among_photographs(tmp_path, offline):
    """--dataset folder forgotten: hours of CIFAR; a folder data/ of several sets refused."""
    write_files(tmp_path / "photos", {"ant": 3, "bee": 3, "fly": 3})
    text = message("cifar10", tmp_path / "photos")
    assert "3 folders of images, and CIFAR is not there" in text and "--dataset folder" in text
    (tmp_path / "photos").rename(tmp_path / "data")
    assert "no network" in message("cifar10", tmp_path / "data")


def test_a_folder_without_classes_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    assert f"{tmp_path / 'train'} has no class folders" in message("cifar10", tmp_path)


def test_an_empty_class_is_named(cifar):
    for file in (cifar / "train" / "kind3").iterdir():
        file.rename(file.with_suffix(".txt"))
    assert f"{cifar / 'train' / 'kind3'} has no images" in message("cifar10", cifar)


def test_a_wrong_number_of_classes_is_named(cifar):
    for split in ("train", "test"):
        shutil.rmtree(cifar / split / "kind10")
    expected = f"{cifar / 'train'} has 9 class folders, CIFAR has 10; for your own"
    assert message("cifar10", cifar).startswith(expected)


def test_classes_that_differ_between_train_and_test_are_named(cifar):
    (cifar / "test" / "kind4").rename(cifar / "test" / "sort4")
    expected = f"train and test under {cifar} have different classes: kind4, sort4; "
    expected += "rename folders until they agree"
    assert message("cifar10", cifar) == expected


@pytest.mark.parametrize("how", ["not an image", "cut off"])
def test_an_image_that_cannot_be_read_is_named(cifar, how):
    """In a folder of 60,000 files a traceback from inside PIL helps nobody."""
    path = cifar / "train" / "kind7" / "5.png"
    path.write_bytes(b"hello" if how == "not an image" else path.read_bytes()[:900])
    assert message("cifar10", cifar).startswith(f"{path}: ")


def test_an_image_of_another_size_is_named_with_its_width_and_height(cifar):
    path = cifar / "test" / "kind2" / "1.png"
    Image.new("RGB", (40, 24)).save(path)
    assert message("cifar10", cifar).startswith(f"{path}: is 40x24, not 32x32")


def test_an_unknown_data_set_is_refused(tmp_path):
    expected = ("unknown data set 'mnist': choose one of cifar10, cifar100, shapes, folder, "
                "imagenet_lt, inat18")
    assert message("mnist", tmp_path) == expected


def test_a_download_that_fails_says_where_to_put_the_files(tmp_path, offline, capsys):
    """The usual first run on a machine without a network. It leaves no empty folder behind."""
    text = message("cifar100", tmp_path / "nothing")
    assert capsys.readouterr().out.endswith("nothing: downloading it\n")
    assert f"CIFAR-100 is not under {tmp_path / 'nothing'}" in text
    assert "no network" in text and "--data-dir" in text and not (tmp_path / "nothing").exists()


# ---- A user's own folder -------------------------------------------------------------------------

def test_all_that_is_wrong_is_listed_at_once(tmp_path):
    """One complaint a run, ten runs to find all; or a crash in epoch 3."""
    expected = damage(make_folder(tmp_path))
    with pytest.raises(DataError) as error:
        load("folder", tmp_path)
    text = str(error.value)
    for name, words in expected.items():
        line, = [line for line in text.splitlines() if name in line]
        assert words in line
    assert text.startswith(f"{len(expected)} problems") and "--skip-bad" in text


def test_skip_bad_continues_with_the_good_ones(tmp_path):
    """Labels shifted against the images after some are left out; a class without images that stays
    in the network."""
    damage(make_folder(tmp_path))
    rt = Recorder()
    data = load("folder", tmp_path, rt, skip_bad=True)
    assert "continuing without" in rt.printed[0] and "9 problems" in rt.printed[0]
    assert data.class_names == ["apple pie", "Bär", "c,3"] and data.counts == [6, 5, 4]
    assert len(data.test_labels) == 6
    for k in range(3):
        for i, image in enumerate(data.train_images[data.train_labels == k]):
            source = picture(36, 40, seed=100 * k + i)
            expected = source.resize((32, 32), Image.BICUBIC, (0, 2, 36, 38))
            assert close(image.permute(1, 2, 0), expected, by=5)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_class_that_loses_all_its_images_leaves(on_disk, tmp_path, monkeypatch):
    """Names and numbers of the classes behind it must close up, in memory and on disk."""
    make_folder(tmp_path)
    for file in (tmp_path / "train" / "Bär").iterdir():
        file.write_text("no image")
    if on_disk:
        monkeypatch.setattr(datasets, "total_memory", lambda: 0)
    rt = Recorder()
    data = load("folder", tmp_path, rt, skip_bad=True)
    assert data.class_names == ["apple pie", "c,3"] and data.counts == [6, 4]
    assert "Without an image to train on, so left out, also in testing: Bär." in rt.printed
    assert data.test_labels.tolist() == [0, 0, 1, 1] and len(data.test_images[:]) == 4
    expected = picture(36, 40, seed=1200).resize((32, 32), Image.BICUBIC, (0, 2, 36, 38))
    assert close(data.test_images[2:3][0].permute(1, 2, 0), expected, by=5)


def test_links_in_a_circle_end(tmp_path):
    """A search that never ends, an image that is there forty times, a class lost for a link to
    itself."""
    make_folder(tmp_path)
    os.symlink(tmp_path / "train" / "c,3", tmp_path / "train" / "c,3" / "again")
    os.symlink("self", tmp_path / "train" / "c,3" / "self")
    assert load("folder", tmp_path).counts == [6, 5, 4]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_whose_folder_is_gone_is_a_problem(split, tmp_path):
    """A disk that is not mounted: classes that are lost, or never tested, without a word."""
    make_folder(tmp_path)
    os.rename(tmp_path / split / "Bär", tmp_path / "elsewhere")
    os.symlink(tmp_path / "nowhere", tmp_path / split / "Bär")
    with pytest.raises(DataError, match="class folder .*Bär is a link to nothing"):
        load("folder", tmp_path)


def test_what_is_passed_over_is_counted(tmp_path):
    """A class in an archive, or in a folder that is taken for a run's, without a word."""
    root = make_folder(tmp_path)
    (root / "train" / "owl.zip").touch()
    for folder in ("owl", "Bär/more"):
        (root / "train" / folder).mkdir()
        for name in ("config.json", "result.json", "0.jpg"):
            (root / "train" / folder / name).touch()
    rt = Recorder()
    load("folder", root, rt)
    assert rt.printed == ["Ignored, not images: 1 .zip, 1 folder more of runs, "
                          "1 folder owl of runs"]


@pytest.mark.parametrize("to", ["", "apple pie"])
def test_a_link_out_of_its_class_is_a_problem(to, tmp_path):
    """Images of one class that are trained as another's."""
    make_folder(tmp_path)
    os.symlink(tmp_path / "train" / to, tmp_path / "train" / "Bär" / "up")
    with pytest.raises(DataError, match="link out of its class"):
        load("folder", tmp_path)
    assert load("folder", tmp_path, skip_bad=True).counts == [6, 5, 4]


@pytest.mark.parametrize("holdout", [None, 0.2])
def test_other_files_are_counted_once(holdout, tmp_path):
    """A folder of .heic ignored without a word; counted for training and test although it is there
    once."""
    root = make_folder(tmp_path)
    for name in ("a.heic", "b.heic", "c.TXT", ".hidden"):
        (root / "train" / "Bär" / name).touch()
    rt = Recorder()
    load("folder", root / "train" if holdout else root, rt, holdout=holdout)
    assert rt.printed == ["Ignored, not images: 2 .heic, 1 .txt"]


@pytest.mark.parametrize("budget", [1e9, 0])
def test_deep_pictures_of_a_folder_have_one_white_level(budget, tmp_path, monkeypatch):
    """12 bits nearly black; held and streamed pictures that differ; a rule that nobody is told, or
    that is lost; test pictures by a rule of their own; a network asked by another than its own."""
    monkeypatch.setattr(datasets, "memory_budget", lambda rt: budget)
    deepen(make_folder(tmp_path))
    Image.fromarray(np.full((40, 36), 50000, dtype=np.uint16)).save(
        tmp_path / "test" / "apple pie" / "bright.png")
    rt = Recorder()
    data = load("folder", tmp_path, rt)
    assert data.white == 4095
    assert rt.printed == ["22 images have 16-bit levels; 0 to 4095 becomes 0 to 255",
                          "1 image has levels below 0 or above 4095, which become 0 or 255"]
    assert torch.equal(data.train_images[0::2], data.train_images[1::2])    # 8 bits and 16 bits
    assert (data.test_images[:].amin((1, 2, 3)) == 255).sum() == 1
    load("folder", tmp_path, rt)
    assert len(rt.printed) == 2
    dark = load("folder", tmp_path, white=65535)
    assert dark.white == 65535
    assert close(data.train_images[0::2] // 16, dark.train_images[1::2], by=1)


def test_names_that_are_not_utf_8(tmp_path):
    """Files of an old archive: a UnicodeError when the name is printed, or saved as JSON."""
    make_folder(tmp_path)
    for split in ("train", "test"):
        folder = os.fsencode(tmp_path / split)
        os.rename(os.path.join(folder, b"c,3"), os.path.join(folder, b"caf\xe9"))
    names = load("folder", tmp_path).class_names
    assert "caf\\xe9" in names and json.loads(json.dumps(names)) == names
    open(os.path.join(os.fsencode(tmp_path / "train"), b"caf\xe9", b"\xff.jpg"), "w").close()
    with pytest.raises(DataError, match=r"\\xff.jpg"):
        load("folder", tmp_path)


def test_an_image_to_test_on_that_is_trained_on_ends_the_run_or_is_left_out(tmp_path):
    """What is found, and said to nobody; a test image left out, and labels moved against images."""
    make_folder(tmp_path)
    shutil.copy(tmp_path / "train" / "c,3" / "0.png", tmp_path / "test" / "Bär" / "00.png")
    with pytest.raises(DataError, match="00.png: the same image as .*0.png, which is trained on"):
        load("folder", tmp_path)
    rt = Recorder()
    data = load("folder", tmp_path, rt, skip_bad=True)
    assert data.counts == [6, 5, 4] and data.test_labels.tolist() == [1, 1, 0, 0, 2, 2]
    assert "which is trained on" in rt.printed[0]
    expected = picture(36, 40, seed=1100).resize((32, 32), Image.BICUBIC, (0, 2, 36, 38))
    assert close(data.test_images[:1][0].permute(1, 2, 0), expected, by=5)


def test_images_of_one_class_are_refused(tmp_path):
    """A class of damaged images left out, and the other is always right."""
    make_folder(tmp_path, classes=("cat", "dog"))
    for file in (tmp_path / "train" / "cat").iterdir():
        file.write_text(f"no image {file.name}")
    with pytest.raises(DataError, match="images of only one class to train on: dog"):
        load("folder", tmp_path, skip_bad=True)


def test_images_that_are_all_left_out_are_not_called_unreadable(tmp_path):
    """A survey of nothing, and the wrong reason."""
    for name in "ab":
        (tmp_path / name).mkdir()
        picture().save(tmp_path / name / "x.png")
    with pytest.raises(DataError, match="has no image that can be used; .*, in another class$"):
        datasets.survey(settings("folder", tmp_path, holdout=0.2))


# ---- Imbalance -----------------------------------------------------------------------------------

IMBALANCE_80 = {"train/a": 160, "train/b": 20, "train/c": 2, "test/a": 1, "test/b": 1, "test/c": 1}


@pytest.mark.parametrize("kind", ["exp", "step"])
@pytest.mark.parametrize("imb", [1, 10, 53])
def test_an_imbalance_below_that_of_the_folder_is_refused(imb, kind, tmp_path):
    """--imb 10 that changes nothing, and a name, a result and a figure that say 10."""
    write_files(tmp_path, IMBALANCE_80)
    with pytest.raises(DataError, match=f"--imb {imb} cannot be made .* imbalance is 80") as error:
        datasets.own_folder(str(tmp_path), imb, kind, None)
    possible = int(re.search(r"use --imb (\d+) or more", str(error.value))[1])
    train, _ = datasets.own_folder(str(tmp_path), possible, kind, None)
    assert train.counts().tolist() == ([160, 17, 2] if kind == "exp" else [160, 2, 2])


def test_advice_for_an_imbalance_that_is_too_large_works(tmp_path):
    write_files(tmp_path, IMBALANCE_80)
    with pytest.raises(DataError, match="lower --imb to 160 or less"):
        datasets.own_folder(str(tmp_path), 200, "exp", None)
    assert datasets.own_folder(str(tmp_path), 160, "exp", None)[0].counts().min() == 1


def test_an_empty_class_does_not_change_the_tail_of_the_others(tmp_path):
    write_files(tmp_path, IMBALANCE_80 | {"train/0": 0})
    train, _ = datasets.own_folder(str(tmp_path), 80, "exp", None)
    assert train.counts().tolist() == [0, 160, 17, 2]


@pytest.mark.parametrize("imb, words", [(100, "imb 100"), (99.5, "imb 100"), (None, "imb 100"),
                                        (30, "imb 100 for --imb 30"), (60, "imb 100 for --imb 60")])
def test_the_imbalance_that_is_told_is_the_actual_one(imb, words):
    """100 images to 1 that are called 60."""
    data = SimpleNamespace(label="mine", imb=100.0, train_labels=[0] * 101, num_classes=2,
                           counts=[100, 1])
    expected = f"mine ({words}, 101 images, 2 classes of 100 to 1)"
    assert datasets.describe(data, settings("folder", "", imb=imb)) == expected


def test_classes_come_in_order_of_count_ties_in_their_own(tmp_path):
    """An unstable sort; names that stay in the order of the folders."""
    for name, n in {"a": 2, "b": 5, "c": 2, "d": 5, "e": 9}.items():
        (tmp_path / name).mkdir()
        for i in range(n):
            picture(8, 8, seed=ord(name) * 10 + i).save(tmp_path / name / f"{i}.png")
    data = load("folder", tmp_path, holdout=0.2)
    assert data.class_names == ["e", "b", "d", "a", "c"] and data.class_ids == [4, 1, 3, 0, 2]
    many = datasets.descending(np.array([3, 5] * 100)).tolist()
    assert many == [*range(1, 200, 2), *range(0, 200, 2)]


def test_classes_of_training_and_test_are_matched_by_name(tmp_path):
    """Numbered by their own folders, test images of the second class would count as the first."""
    make_folder(tmp_path)
    shutil.rmtree(tmp_path / "test" / "apple pie")
    data = load("folder", tmp_path)
    tested = [data.class_names[k] for k in data.test_labels.tolist()]
    assert tested == ["Bär", "Bär", "c,3", "c,3"]


@pytest.mark.parametrize("make, changes, words", [
    (lambda root: None, {}, "no folders of images"),
    (lambda root: make_folder(root) and shutil.rmtree(root / "test"), {}, "--holdout 0.2"),
    (make_folder, {"holdout": 0.2}, "leave --holdout out")])
def test_a_folder_that_cannot_be_split_says_what_to_do(make, changes, words, tmp_path):
    make(tmp_path)
    with pytest.raises(DataError, match=words):
        load("folder", tmp_path, **changes)


def test_the_test_folder_may_be_called_val_and_imb_makes_a_tail(tmp_path):
    """--imb that adds images, or leaves the selection to chance."""
    make_folder(tmp_path, n=12)
    os.rename(tmp_path / "test", tmp_path / "val")
    data = load("folder", tmp_path, imb=4)
    assert data.counts == [12, 6, 3] and len(data.test_labels) == 6


def test_the_summary_of_a_folder_says_what_is_in_it(tmp_path):
    """The paragraph that a user checks a run by: counts, groups, sizes, classes without tests."""
    root = make_folder(tmp_path / "my pictures", n=12, size=(90, 70)) / "train"
    (root / "only one").mkdir()
    picture(90, 70, seed=300).save(root / "only one" / "x.png")
    args = settings("folder", root, holdout=0.2, patch_size=8, epochs=3, recipe="cpu")
    rt = Recorder()
    datasets.print_data_summary(datasets.load_data(args, rt), args, rt)
    text, = rt.printed
    for words in ("train (imb 10, 28 images, 4 classes of 10 to 1), the largest 'apple pie', the "
                  "smallest 'only one'; 6 images to test on",
                  "head: 1 of 10 or more; mid: 2 of 8 to 9; tail: 1 of 1 or fewer.",
                  "Without a test image, so without an accuracy: only one.",
                  "3 of 4 classes have fewer than 10 test images",
                  "at least 70 px", "32 px in patches of 8 px", "3 epochs make 84 samples",
                  "Recipe cpu"):
        assert words in text, words
    survey = datasets.survey(args)
    assert (survey.images, survey.classes, survey.side) == (28, 4, 70)


# ---- Memory --------------------------------------------------------------------------------------

def test_a_folder_too_large_for_memory_stays_on_disk(tmp_path, monkeypatch):
    """The system's killer in place of an epoch; other images for the same command on a machine of
    less memory: random boxes as of the large sets, which a folder's recipes would crop again."""
    make_folder(tmp_path)
    in_memory = load("folder", tmp_path)
    monkeypatch.setattr(datasets, "total_memory", lambda: 0)
    datasets.last_loaded.clear()
    streamed = load("folder", tmp_path)
    with monkeypatch.context() as patch:                    # the same data again are not read again
        patch.setattr(datasets, "read_files", lambda *args: 1 / 0)
        assert load("folder", tmp_path).train_images is streamed.train_images
    datasets.last_loaded.clear()
    assert isinstance(streamed.train_images, Stream)
    assert streamed.fingerprint == in_memory.fingerprint
    assert torch.equal(streamed.train_images[:4], in_memory.train_images[:4])
    steps = list(enumerate(torch.arange(7).split(3)))
    pairs = zip(in_memory.batches(steps, (0, 1, 0)), streamed.batches(steps, (0, 1, 0)),
                strict=True)
    for (step, x, y), (same_step, same_x, same_y) in pairs:
        assert step == same_step and torch.equal(x, same_x) and torch.equal(y, same_y)


@pytest.fixture
def control_group(tmp_path, monkeypatch):
    """control_group(file, text) writes a limit of the group job/step, where this process is."""
    monkeypatch.setattr(machine, "GROUPS", str(tmp_path))
    own = "11:memory:/slurm/job\n4:cpu,cpuacct:/\n0::/job/step\n"
    monkeypatch.setattr(machine, "open", lambda path: io.StringIO(own) if path.startswith("/proc")
                        else open(path), raising=False)

    def write(file, text):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    return write


@pytest.mark.parametrize("file", ["memory.max", "job/memory.max", "job/step/memory.max",
                                  "memory/memory.limit_in_bytes",
                                  "memory/slurm/memory.limit_in_bytes"])
def test_memory_is_that_of_the_container_or_job(file, control_group):
    """A container of 8 GiB on a machine of 512, filled as if it were the machine."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    control_group("job/step/memory.max", "max\n")
    assert machine.total_memory() == whole
    control_group(file, "4096\n")
    assert machine.total_memory() == 4096


def test_cpus_are_those_of_the_quota(control_group, monkeypatch):
    """64 threads in a container that gets the time of two CPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    control_group("cpu.max", "max 100000\n")
    assert machine.cpus() == 64
    control_group("job/cpu.max", "150000 100000\n")
    assert machine.cpus() == 2
    control_group("job/cpu.max", "1000 100000\n")
    assert machine.cpus() == 1


@pytest.mark.parametrize("device, processes, free, budget", [
    ("cpu", 1, 0, 400), ("cpu", 4, 0, 100), ("cuda", 1, 500, 200), ("cuda", 4, 500, 100)])
def test_the_budget_is_that_of_one_process_and_its_gpu(device, processes, free, budget,
                                                       monkeypatch):
    """Eight processes that each fill two fifths of one machine; a GPU that is asked to hold what
    its machine can."""
    monkeypatch.setattr(datasets, "total_memory", lambda: 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))
    assert datasets.memory_budget(Runtime(torch.device(device))) == budget


# ---- Lists ---------------------------------------------------------------------------------------

def test_a_listed_set_keeps_the_map_of_its_classes(tmp_path, monkeypatch):
    """Ties out of order, a number without images that stays, a test label that is not renumbered,
    test images not of the size that the test crop is cut from."""
    monkeypatch.setitem(data_lt.LISTS, "imagenet_lt", ("ImageNet-LT", 5))
    make_lists(tmp_path)
    rt = Recorder()
    data = load("imagenet_lt", tmp_path, rt, eval_crop=0.875)
    assert data.label == "ImageNet-LT not as published"
    assert rt.printed == ["These are not the published lists of ImageNet-LT: 4 classes, not 5."]
    assert data.class_ids == [1, 3, 0, 4] and data.class_names == ["1", "3", "0", "4"]
    assert data.counts == [9, 9, 4, 1]
    assert data.train_images.shape == (23, 3, 32, 32)
    assert data.test_images.shape == (8, 3, 37, 37)             # 32 / 0.875
    assert data.test_labels.tolist() == [2, 2, 0, 0, 1, 1, 3, 3]
    steps = [(0, torch.arange(23))]
    one, = data.batches(steps, (0, 0, 0))
    other, = data.batches(steps, (0, 1, 0))
    assert not torch.equal(one[1], other[1]) and torch.equal(one[2], data.train_labels)


def write_list(root, name, counts, header="", row="{image} {label}\n"):
    """Pictures and a list of them, n of each label of `counts`."""
    lines = [header]
    for label, n in counts.items():
        for i in range(n):
            image = f"{name}_{label}_{i}.png"
            seed = 1000 * (name == "test") + 100 * list(counts).index(label) + i
            picture(40, 40, seed).save(root / image)
            lines.append(row.format(image=image, label=label))
    (root / f"{name}.txt").write_text("".join(lines))
    return str(root / f"{name}.txt")


def test_a_test_set_of_other_classes_is_refused():
    """A mean over no images at the end of the first epoch."""
    train, test = (torch.zeros(3, 3, 1, 1), np.array([0, 0, 1])), (torch.zeros(2, 3, 1, 1),
                                                                   np.array([2, 2]))
    with pytest.raises(DataError, match="mine has no test images of the classes that are trained"):
        datasets.sort_classes("folder", "mine", train, test, list("abc"))


@pytest.mark.parametrize("ids", [("0", "1", "2"), ("17", "900", "5000"), ("cat", "dog", "n0144")])
def test_a_published_name_may_have_other_lists(ids, tmp_path):
    """Tiny-ImageNet-LT, or a subset, refused, or called ImageNet-LT; classes without an image for
    the numbers between."""
    lists = [write_list(tmp_path, name, dict(zip(ids, counts)))
             for name, counts in (("train", (3, 6, 4)), ("test", (2, 2, 2)))]
    rt = Recorder()
    data = load("imagenet_lt", tmp_path, rt, train_list=lists[0], test_list=lists[1])
    assert rt.printed == ["These are not the published lists of ImageNet-LT: 3 classes, not 1,000."]
    assert data.label == "ImageNet-LT not as published" and data.counts == [6, 4, 3]
    assert data.class_names == [ids[1], ids[2], ids[0]]
    assert data.class_ids == ([int(ids[k]) for k in (1, 2, 0)] if ids[0].isdecimal() else [1, 2, 0])
    assert data.test_labels.tolist() == [2, 2, 0, 0, 1, 1]
    held = load("imagenet_lt", tmp_path, rt, train_list=lists[0], holdout=0.3)
    assert held.counts == [4, 3, 2] and held.label == data.label
    own = load("imagenet_lt", tmp_path, rt, train_list=lists[0], test_list=lists[1], groups="5,4")
    assert own.groups == {"head": [0], "mid": [1], "tail": [2]}
    (tmp_path / "test.txt").write_text("test_0.png 1\n")
    with pytest.raises(DataError, match="class 1 of .*test.txt is not in .*train.txt"):
        load("imagenet_lt", tmp_path, train_list=write_list(tmp_path, "train", {"0": 2, "2": 3}),
             test_list=lists[1])


def test_own_images_may_come_by_a_table(tmp_path):
    """A data set's name that is not its own; images of a class under another label; a list that is
    split although it says how."""
    path = write_list(tmp_path, "mine", {"Bär": 3, "an apple": 5}, "image;label\n",
                      "{image};{label}\n")
    with pytest.raises(DataError, match="mine.txt has no images to test on: .*--holdout 0.2"):
        load("folder", "nowhere", train_list=path)
    data = load("folder", "nowhere", train_list=path, holdout=0.3)
    assert (data.label, data.counts, data.class_names) == ("mine", [3, 2], ["an apple", "Bär"])
    everything = torch.cat([data.train_images, data.test_images])
    labels = torch.cat([data.train_labels, data.test_labels]).tolist()
    for k, (n, seed) in enumerate(((5, 100), (3, 0))):
        for i in range(n):
            expected = picture(40, 40, seed + i).resize((32, 32), Image.BICUBIC)
            alike = [labels[j] for j, image in enumerate(everything)
                     if close(image.permute(1, 2, 0), expected)]
            assert alike == [k]
    assert datasets.survey(settings("folder", "nowhere", train_list=path, holdout=0.3)).images == 5
    assert load("folder", "nowhere", train_list=path, holdout=0.3, imb=3).counts == [3, 1]
    lines = (tmp_path / "mine.txt").read_text().splitlines()
    rows = [line + f";{'test' if i % 3 == 0 else 'train'}" for i, line in enumerate(lines[1:])]
    rows = ["image;label;split", *rows, "gone.png;Bär;train"]
    (tmp_path / "mine.txt").write_text("\n".join(rows))
    with pytest.raises(DataError, match="leave --holdout out"):
        load("folder", tmp_path, train_list=path, holdout=0.3)
    with pytest.raises(DataError, match="gone.png: No such file"):
        load("folder", tmp_path, train_list=path)
    data = load("folder", tmp_path, train_list=path, skip_bad=True)
    assert data.counts == [3, 2] and len(data.test_labels) == 3


@pytest.mark.parametrize("on_disk", [False, True])
def test_near_duplicates_of_a_hold_out_are_said(on_disk, tmp_path, monkeypatch):
    """Nine frames of ten known from training, and an accuracy that is believed; said again where
    the frames of a video are on one side."""
    if on_disk:
        monkeypatch.setattr(datasets, "total_memory", lambda: 0)
    for k in range(2):
        (tmp_path / f"class{k}").mkdir()
        for video in range(8):
            for i in range(4):
                frame = picture(64, 64, seed=100 * k + video).crop((i // 2, 0, 62, 63))
                frame.save(tmp_path / f"class{k}" / f"v{video}_{i}.png")
    rt = Recorder()
    load("folder", tmp_path, rt, holdout=0.25, skip_bad=True)
    line = rt.printed[-1]
    assert "test images look nearly the same as a training image" in line
    assert r"Use --holdout-by 'v(\d+)_\d+'" in line
    rt = Recorder()
    load("folder", tmp_path, rt, holdout=0.25, holdout_by=r"(v\d+)_", skip_bad=True)
    assert not any("nearly the same" in line for line in rt.printed)
    rt = Recorder()
    load("folder", tmp_path, rt, holdout=0.25, holdout_by=r"(\d)\.png", skip_bad=True)
    assert "another pattern may be needed" in rt.printed[-1]


def test_files_that_stay_on_disk_are_read_to_their_ends(tmp_path, monkeypatch):
    """Files damaged in the middle, for which gray images would be trained."""
    make_folder(tmp_path)
    path = tmp_path / "train" / "c,3" / "0.png"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle:middle + 40] = bytes(40)                 # it begins and ends as before
    path.write_bytes(content)
    monkeypatch.setattr(datasets, "total_memory", lambda: 0)
    datasets.last_loaded.clear()
    with pytest.raises(DataError, match="0.png"):
        load("folder", tmp_path)


@pytest.mark.parametrize("changes", [dict(holdout=0.25), dict(imb_type="step"), dict(imb=3)])
def test_other_settings_are_other_data(changes, tmp_path, monkeypatch):
    """The images that the last run of the same process had loaded."""
    asked, x, y = [], torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.tensor([0])
    data = data_lt.LongTailData("a", "a", x, y, x, y, ["a"], [1], dict(head=[0], mid=[], tail=[]))

    def load_cifar(*given):
        asked.append(given)
        return data
    monkeypatch.setattr(datasets, "load_cifar", load_cifar)
    monkeypatch.setattr(datasets, "last_loaded", {})
    for each in ({}, changes):
        load("cifar10", tmp_path, **({"imb": 2} | each))
    assert len(asked) == 2


def test_images_are_held_only_if_three_times_their_bytes_fit(tmp_path, monkeypatch):
    """Memory that is filled to the last byte: the system kills the run."""
    make_folder(tmp_path)                                   # 15 and 6 images
    needed = 3 * 32 ** 2 * 21
    for budget, on_disk in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(datasets, "memory_budget", lambda rt: budget)
        datasets.last_loaded.clear()
        assert isinstance(load("folder", tmp_path).train_images, Stream) == on_disk
