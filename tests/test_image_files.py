"""Whatever people keep in their folders: read rightly, or named before training starts."""
import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import analyze
import data_lt
import engine
import image_files
import run_folder
import train_student
import train_teacher
from conftest import ROOT, script
from image_files import DataError


def picture(w=40, h=30, seed=0):
    """A smooth random RGB picture, without two equal corners."""
    small = np.random.RandomState(seed).randint(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((w, h), Image.BICUBIC)


def read(path, size, box=None):
    """(S,S,3), or the whole image."""
    return image_files.read_image(path) if size is None else image_files.read_square(path, size, box).permute(1, 2, 0)


def close(image, other, by=3):
    return np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).mean() < by


# ---- Reading -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA"])
def test_every_kind_of_colour_is_read_as_rgb(mode, tmp_path):
    """A network fed one channel, or four; palette numbers taken for levels."""
    source = picture().convert(mode)
    path = tmp_path / ("x.jpg" if mode in ("CMYK", "YCbCr") else "x.png")
    source.save(path, quality=100)
    image = image_files.read_image(path)
    assert image.mode == "RGB" and close(image, source.convert("RGB"), by=6)


@pytest.mark.parametrize("kind", ["uint16 png", "uint16 tif"])
def test_16_bits_keep_their_upper_8(kind, tmp_path):
    """PIL's own conversion clips everything above 255 to white."""
    levels = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    path = tmp_path / f"x.{kind[-3:]}"
    Image.fromarray(levels).save(path)
    assert (np.asarray(image_files.read_image(path))[..., 1] == levels // 256).all()


def test_the_transparent_is_laid_on_white(tmp_path):
    """What hides under transparency may be anything, often black: an outline that no person sees."""
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, 4:] = 10, 20, 30, 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = np.asarray(image_files.read_image(tmp_path / "x.png"))
    assert (image[:, :4] == 255).all() and (image[:, 4:] == (10, 20, 30)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [None, 20, 100])
def test_photographs_are_turned_upright(orientation, size, tmp_path):
    """Telephones save every picture lying down, and a note which way is up. Also when JPEG is decoded small, by a box."""
    upright, exif = picture(400, 240), Image.Exif()
    exif[0x0112] = orientation
    back = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE, 6: Image.ROTATE_90,
            7: Image.TRANSVERSE, 8: Image.ROTATE_270}
    lying = upright.transpose(back[orientation]) if orientation > 1 else upright
    lying.save(tmp_path / "x.jpg", exif=exif, quality=95)
    box = (200, 20, 360, 180)
    image = read(tmp_path / "x.jpg", size, lambda W, H: box)
    assert close(image, upright if size is None else upright.resize((size, size), Image.BICUBIC, box))


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [picture(seed=i).convert("P") for i in range(3)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert close(image_files.read_image(tmp_path / "x.gif"), frames[0].convert("RGB"))


@pytest.mark.parametrize("w, h", [(1, 1), (1, 500), (3000, 2), (31, 32)])
def test_odd_shapes_are_cut_to_a_square(w, h, tmp_path):
    """A picture of one pixel, or a strip, that makes an empty crop or gigabytes."""
    picture(w, h).save(tmp_path / "x.png")
    assert read(tmp_path / "x.png", 32).shape == (32, 32, 3)


@pytest.mark.parametrize("size", [16, 50, 120, 700])
def test_small_decoding_of_jpeg_is_near_the_whole(size, tmp_path):
    """JPEG decoded at an eighth of its size although more is needed, or a box in the wrong pixels."""
    whole = picture(640, 480)
    whole.save(tmp_path / "x.jpg", quality=95)
    whole.save(tmp_path / "x.png")
    for box in (None, lambda W, H: (W // 4, H // 3, W // 4 + 200, H // 3 + 150)):
        jpg, png = (read(tmp_path / f"x.{kind}", size, box) for kind in ("jpg", "png"))
        pils = whole.resize((size, size), Image.BICUBIC, (box or image_files.central_square)(640, 480))
        assert close(jpg, pils, by=2) and close(png, pils, by=1)


# ---- Finding what is wrong -----------------------------------------------------------------------------------------------

def a_folder(root, n=6, size=(36, 40), classes=("apple pie", "Bär", "c,3")):
    """root/train and root/test, n - k and 2 images of class k."""
    for split in ("train", "test"):
        for k, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n - k if split == "train" else 2):
                picture(*size, seed=10 * k + i).save(folder / f"{i}.{'jpg' if i % 2 else 'png'}", quality=95)
    return root


def load(root, said=None, **settings):
    return data_lt.load_data("folder", data_dir=str(root), say=(lambda text: said.append(text)) if said is not None else print,
                             **settings)


def damage(root):
    """Spoil a folder in every way; {file name: words that its line must have}."""
    folder = root / "train" / "apple pie"
    Image.new("RGB", (64, 64)).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:60])
    picture(300, 300).save(folder / "half.jpg")
    (folder / "half.jpg").write_bytes((folder / "half.jpg").read_bytes()[:3000])
    (folder / "text.jpg").write_text("this is no image")
    (folder / "empty.png").touch()
    Image.fromarray(np.random.rand(8, 8).astype(np.float32)).save(folder / "float.tif")
    Image.new("1", (14000, 14000)).save(folder / "huge.png")
    os.symlink(folder / "nowhere.png", folder / "lost.png")
    (root / "train" / "void").mkdir()
    (root / "test" / "unknown").mkdir()
    picture().save(root / "test" / "unknown" / "u.png")
    return {"cut.png": "truncated", "half.jpg": "truncated", "text.jpg": "no image", "empty.png": "empty",
            "float.tif": "floating-point", "huge.png": "179 million pixels", "lost.png": "No such file",
            "void": "has no images", "unknown": "is not in"}


def test_all_that_is_wrong_is_listed_at_once(tmp_path):
    """One complaint a run, ten runs to find all; or a crash in epoch 3."""
    expected = damage(a_folder(tmp_path))
    with pytest.raises(DataError) as error:
        load(tmp_path)
    text = str(error.value)
    for name, words in expected.items():
        line, = [line for line in text.splitlines() if name in line]
        assert words in line
    assert text.startswith(f"{len(expected)} problems") and "--skip-bad" in text


def test_skip_bad_goes_on_with_the_good_ones(tmp_path):
    """Labels shifted against the images after some are left out; a class without images that stays in the network."""
    damage(a_folder(tmp_path))
    said = []
    data = load(tmp_path, said, skip_bad=True)
    assert "going on without" in said[0] and data.class_names == ["apple pie", "Bär", "c,3"] and data.counts == [6, 5, 4]
    assert len(data.test_labels) == 6
    for k, name in enumerate(data.class_names):
        for i, image in enumerate(data.train_images[data.train_labels == k]):
            expected = picture(36, 40, seed=10 * k + i).resize((32, 32), Image.BICUBIC, (0, 2, 36, 38))
            assert close(image.permute(1, 2, 0), expected, by=5)


def test_a_class_that_loses_all_its_images_leaves(tmp_path):
    """Names and numbers of the classes behind it must close up."""
    a_folder(tmp_path)
    for file in (tmp_path / "train" / "Bär").iterdir():
        file.write_text("no image")
    data = load(tmp_path, [], skip_bad=True)
    assert data.class_names == ["apple pie", "c,3"] and data.counts == [6, 4] and data.test_labels.tolist() == [0, 0, 1, 1]


def test_links_in_a_circle_end(tmp_path):
    """A search that never comes back, an image that is there forty times, a class lost for a link to itself."""
    a_folder(tmp_path)
    os.symlink(tmp_path / "train" / "c,3", tmp_path / "train" / "c,3" / "again")
    os.symlink("self", tmp_path / "train" / "c,3" / "self")
    assert load(tmp_path).counts == [6, 5, 4]


@pytest.mark.parametrize("to", ["", "apple pie"])
def test_a_link_out_of_its_class_is_a_problem(to, tmp_path):
    """Images of one class that are trained as another's."""
    a_folder(tmp_path)
    os.symlink(tmp_path / "train" / to, tmp_path / "train" / "Bär" / "up")
    with pytest.raises(DataError, match="link out of its class"):
        load(tmp_path)
    assert load(tmp_path, [], skip_bad=True).counts == [6, 5, 4]


@pytest.mark.parametrize("holdout", [None, 0.2])
def test_other_files_are_counted_once(holdout, tmp_path):
    """A folder of .heic passed over without a word; counted for training and test although it is there once."""
    root = a_folder(tmp_path)
    for name in ("a.heic", "b.heic", "c.TXT", ".hidden"):
        (root / "train" / "Bär" / name).touch()
    said = []
    load(root / "train" if holdout else root, said, holdout=holdout)
    assert said == ["Passed over, not taken for images: 2 .heic, 1 .txt"]


def test_names_that_are_not_utf_8(tmp_path):
    """Files of an old archive: a UnicodeError when the name is printed, or saved as JSON."""
    folder = os.fsencode(a_folder(tmp_path) / "train")
    os.rename(os.path.join(folder, b"c,3"), os.path.join(folder, b"caf\xe9"))
    os.rename(os.path.join(os.fsencode(tmp_path / "test"), b"c,3"), os.path.join(os.fsencode(tmp_path / "test"), b"caf\xe9"))
    data = load(tmp_path)
    assert "caf\\xe9" in data.class_names and json.loads(json.dumps(data.class_names)) == data.class_names
    open(os.path.join(folder, b"caf\xe9", b"\xff.jpg"), "w").close()
    with pytest.raises(DataError, match=r"\\xff.jpg"):
        load(tmp_path)


@pytest.mark.parametrize("line", ["a.jpg", "a.jpg x", "a.jpg -1", "a.jpg 3", "a.jpg 1.5", "7", "a.jpg ١",
                                  "a.jpg " + "1" * 5000])
def test_a_list_file_names_its_bad_lines(line, tmp_path):
    """A label that is none; one beyond the classes; a path alone. Blank lines and paths with blanks are fine."""
    (tmp_path / "list.txt").write_text(f"b c.jpg 0\n\n{line}\nd.jpg\t2\r\n")
    files = image_files.list_file(tmp_path / "list.txt", "/root", 3)
    assert files.paths.tolist() == [b"/root/b c.jpg", b"/root/d.jpg"] and files.labels.tolist() == [0, 2]
    assert len(files.problems) == 1 and "line 3" in files.problems[0]


def test_a_list_file_names_what_it_lists_twice(tmp_path):
    (tmp_path / "list.txt").write_text("a.jpg 0\nb.jpg 1\na.jpg 1\n")
    files = image_files.list_file(tmp_path / "list.txt", "/root", 3)
    assert len(files) == 2 and "line 3: a.jpg is listed in line 1 already" in files.problems[0]


def test_the_quick_check_finds_what_decoding_finds(tmp_path):
    """A truncated file that looks whole from its first bytes; a whole one that is refused for what comes behind its end."""
    for kind in ("jpg", "png", "webp", "bmp"):
        picture(200, 200).save(tmp_path / f"good.{kind}")
        data = (tmp_path / f"good.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(data[:len(data) // 2])
    (tmp_path / "more.jpg").write_bytes((tmp_path / "good.jpg").read_bytes() + b"\0" * 500)
    bad = {path.name for path in tmp_path.iterdir() if image_files.problem(path)}
    assert bad == {"cut.jpg", "cut.png", "cut.webp", "cut.bmp"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "bmp", "tif", "webp", "ppm"])
def test_1500_damaged_files_are_read_or_named(kind, tmp_path, capfd):
    """Bytes changed, cut out, put in or off, mostly at the start: never another error, a crash of the decoder, or gigabytes."""
    draw, whole, path, bad = random.Random(0), io.BytesIO(), tmp_path / f"x.{kind}", 0
    picture(64, 48).save(whole, {"jpg": "jpeg", "tif": "tiff"}.get(kind, kind))
    for _ in range(1500):
        data = bytearray(whole.getvalue())
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(min(len(data), draw.choice([16, 64, 10 ** 6])))
            how = draw.randrange(4)
            data[at:at + (0, 1, draw.randint(1, 20), len(data))[how]] = bytes(
                draw.randrange(256) for _ in range((draw.randint(1, 9), 1, 0, 0)[how]))
            data = data or bytearray(b"x")
        path.write_bytes(data)
        said = image_files.problem(path, thorough=True)
        bad += said is not None
        assert said is None or said.startswith(str(path)) and "\n" not in said
        files = image_files.Files(np.array([os.fsencode(path)]), np.array([0]), ["a"])
        images, good, problems = image_files.read_all(files, 32)
        assert len(images) == good.sum() == 1 - len(problems) and images.shape[1:] == (3, 32, 32)
        assert image_files.Stream(files, 32)[:1].shape == (1, 3, 32, 32)
    print(f"{kind}: {bad} of 1500 refused")
    assert bad > 50


@pytest.mark.slow
def test_2000_damaged_lists_are_read_or_named(tmp_path):
    """A line that is no path and label must never become an image of another class, or another error."""
    draw, good = random.Random(0), b"".join(b"folder %d/image_%d.jpg %d\n" % (i % 7, i, i % 5) for i in range(40))
    path = tmp_path / "list.txt"
    truth = {line.rsplit(b" ", 1)[0]: int(line.rsplit(b" ", 1)[1]) for line in good.splitlines()}
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(draw.randint(1, 6)):
            at = draw.randrange(len(data))
            data[at:at + draw.randint(0, 3)] = bytes(draw.randrange(256) for _ in range(draw.randint(0, 3)))
        path.write_bytes(data)
        try:
            files = image_files.list_file(path, "", 5)
        except DataError:
            continue
        assert files.labels.max(initial=0) < 5 and len(files) + len(files.problems) >= 30
        same = [truth[p] == k for p, k in zip(files.paths.tolist(), files.labels.tolist()) if p in truth]
        assert sum(same) >= len(same) - 6                                 # a changed digit is a changed class
        assert all(str(path) in p for p in files.problems)


# ---- Folders and splits --------------------------------------------------------------------------------------------------

def test_classes_come_in_order_of_count_ties_in_their_own(tmp_path):
    """An unstable sort; names that stay in the order of the folders."""
    for name, n in {"a": 2, "b": 5, "c": 2, "d": 5, "e": 9}.items():
        (tmp_path / name).mkdir()
        for i in range(n):
            picture(8, 8, seed=i).save(tmp_path / name / f"{i}.png")
    data = load(tmp_path, holdout=0.2)
    assert data.class_names == ["e", "b", "d", "a", "c"] and data.class_ids == [4, 1, 3, 0, 2]


def test_a_held_out_share_is_stratified_seeded_and_leaves_something_to_train_on(tmp_path):
    """A rare class that is all in one part; another test set for another run; an image in both parts."""
    labels = np.repeat([0, 1, 2, 3], [100, 8, 2, 1])
    files = image_files.Files(np.array([f"/root/{i}".encode() for i in range(111)]), labels, list("abcd"))
    train, test = image_files.hold_out(files, 0.2, "/root")
    assert test.counts().tolist() == [20, 2, 1, 0] and train.counts().tolist() == [80, 6, 1, 1]
    assert set(train.paths) | set(test.paths) == set(files.paths) and not set(train.paths) & set(test.paths)
    places = test.paths[:20].astype("U").tolist()
    assert max(int(p[6:]) for p in places) > 60 and min(int(p[6:]) for p in places) < 40   # from all over the class

    fewer = files.keep(np.arange(111) != 50)                              # another image in the folder, or one less
    before, after = (set(image_files.hold_out(f, 0.2, "/root")[1].paths) for f in (fewer, files))
    assert len(before - {files.paths[50]} - after) <= 1 and len(after - before) <= 1
    elsewhere = [path.replace(b"/root", b"/elsewhere") for path in files.paths.tolist()]
    moved = image_files.Files(np.array(elsewhere), files.labels, files.class_names)
    assert image_files.hold_out(moved, 0.2, "/elsewhere")[1].paths.tolist() == [
        p.replace(b"/root", b"/elsewhere") for p in test.paths.tolist()]


@pytest.mark.parametrize("make, settings, words", [
    (lambda root: None, {}, "no class folders"),
    (lambda root: (root / "cat").mkdir(), {}, "--holdout"),
    (lambda root: a_folder(root), {"holdout": 0.2}, "leave --holdout out")])
def test_a_folder_that_cannot_be_split_says_what_to_do(make, settings, words, tmp_path):
    make(tmp_path)
    with pytest.raises(DataError, match=words):
        load(tmp_path, **settings)


def test_the_validation_folder_may_be_called_val_and_imb_makes_a_tail(tmp_path):
    """--imb that adds images, or leaves the selection to chance."""
    a_folder(tmp_path, n=12)
    os.rename(tmp_path / "test", tmp_path / "val")
    data = load(tmp_path, imb=4)
    assert data.counts == [12, 6, 3] and len(data.test_labels) == 6


def test_reading_leaves_the_main_thread_its_threads(tmp_path):
    """The decoders' "one thread each" becoming that of a process which has not used its own yet: a training on one core."""
    root = a_folder(tmp_path)
    code = f"""if True:
        import torch, image_files
        image_files.read_all(image_files.list_folder({os.fspath(root / "train")!r}), 32)
        print(torch.get_num_threads())"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "2"},
                         capture_output=True, text=True)
    assert out.stdout.split() == ["2"], out.stdout + out.stderr


# ---- Streams -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stream_files(tmp_path_factory):
    return image_files.list_folder(a_folder(tmp_path_factory.mktemp("stream"), n=9, size=(90, 70)) / "train")


def test_a_stream_is_indexed_like_a_tensor(stream_files):
    stream = image_files.Stream(stream_files, 32)
    images, good, _ = image_files.read_all(stream_files, 32)
    assert stream.shape == images.shape and good.all()
    assert torch.equal(stream[torch.tensor([5, 0, 5])], images[[5, 0, 5]]) and torch.equal(stream[:4], images[:4])


def test_boxes_follow_from_seed_epoch_and_step_alone(stream_files):
    """A resumed run that sees other crops; the same crop in every epoch; every image of a batch cropped alike."""
    stream, steps = image_files.Stream(stream_files, 32), list(enumerate(torch.arange(24).split(5)))
    whole = [images for _, _, images in stream.batches(steps, (0, 1, 0))]
    resumed = [images for _, _, images in stream.batches(steps[3:], (0, 1, 0), ahead=1)]
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], resumed)) and len(resumed) == 2
    assert not torch.equal(whole[0], next(stream.batches(steps, (0, 2, 0)))[2])
    twice, = [images for _, _, images in stream.batches([(0, torch.tensor([3, 3]))], (0, 0, 0))]
    assert not torch.equal(twice[0], twice[1])


def test_the_boxes_have_the_published_distribution():
    """Against torchvision's RandomResizedCrop: place, width and height, decile by decile; and the box where nothing fits."""
    torch.manual_seed(0)
    W, H, n, rng = 500, 375, 4000, np.random.default_rng(0)
    ours = np.array([image_files.random_box(rng)(W, H) for _ in range(n)])
    theirs = np.array([RandomResizedCrop.get_params(torch.empty(3, H, W), (0.08, 1), (3 / 4, 4 / 3)) for _ in range(n)])
    assert ours.min() >= 0 and ours[:, 2].max() <= W and ours[:, 3].max() <= H
    left, top, right, bottom = ours.T
    ours = np.stack([top, left, bottom - top, right - left], axis=1)      # as torchvision says it
    deciles = [np.quantile(boxes, np.arange(0.1, 1, 0.1), axis=0) for boxes in (ours, theirs)]
    assert np.abs(deciles[0] - deciles[1]).max() < 15
    assert image_files.random_box(rng)(1000, 10)[1::2] == (0, 10)         # nothing fits: the central crop of the widest ratio


def test_a_file_that_breaks_later_is_gray_and_named_once(stream_files, tmp_path, capsys):
    """A disk that fails in epoch 3: hours are worth more than one picture."""
    (tmp_path / "x.jpg").write_text("gone")
    files = image_files.Files(np.array([os.fsencode(tmp_path / "x.jpg"), stream_files.paths[0]]), np.array([0, 0]), ["a"])
    images = image_files.Stream(files, 16)[torch.tensor([0, 1, 0])]
    err = capsys.readouterr().err
    assert (images[[0, 2]] == 128).all() and (images[1] != 128).any() and err.count("cannot be decoded") == 1


# ---- List files ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def lists(tmp_path, monkeypatch):
    """A small ImageNet-LT: 5 classes, of 4, 9, 0, 9 and 1 images; its flags."""
    monkeypatch.setitem(data_lt.LISTS, "imagenet_lt", ("ImageNet-LT", 5))
    (tmp_path / "pictures").mkdir()
    lines = {"train": [], "test": []}
    for split, counts in (("train", (4, 9, 0, 9, 1)), ("test", (2, 2, 0, 2, 2))):
        for k, n in enumerate(counts):
            for i in range(n):
                picture(80, 60, seed=100 * k + i).save(tmp_path / "pictures" / f"{split}_{k}_{i}.jpg", quality=95)
                lines[split].append(f"pictures/{split}_{k}_{i}.jpg {k}")
        (tmp_path / f"ImageNet_LT_{split}.txt").write_text("\n".join(lines[split]) + "\n")
    return ["--dataset", "imagenet_lt", "--data-dir", tmp_path, "--skip-bad"]


def test_a_listed_set_keeps_the_map_of_its_classes(lists):
    """Ties out of order, a class without images that stays, a test label that is not renumbered."""
    said = []
    data = data_lt.load_data("imagenet_lt", data_dir=str(lists[3]), size=32, test_size=36, skip_bad=True, say=said.append)
    assert data.class_ids == [1, 3, 0, 4] and data.class_names == ["1", "3", "0", "4"] and data.counts == [9, 9, 4, 1]
    assert data.train_images.shape == (23, 3, 32, 32) and data.test_images.shape == (8, 3, 36, 36)
    assert data.test_labels.tolist() == [2, 2, 0, 0, 1, 1, 3, 3] and "no image of 1 classes: 2" in said[0]


def test_training_from_list_files(lists, tmp_path, monkeypatch, capsys):
    """Teacher and student of the large sets' recipes, made small; a run killed in an epoch goes on with the same crops."""
    small = "--img-size 32 --epochs 2 --drw-epoch 1 --batch 8 --amp none".split()
    script(train_teacher, monkeypatch, *lists, *small, "--arch", "resnet32", "--img-size", "16", "--out",
           tmp_path / "teacher")
    student = [*lists, *small, "--model", "micro", "--patch-size", "8", "--teacher", tmp_path / "teacher", "--micro-batch", "4",
               "--eval-every", "2", "--repeats", "1", "--save-every", "1"]
    script(train_student, monkeypatch, *student, "--out", tmp_path / "whole")
    assert "by training images" in capsys.readouterr().out
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert set(result["by_count"]["avg"]) >= {"head", "mid", "tail"} and result["dataset"] == "ImageNet-LT"

    seed_step = engine.seed_step
    with monkeypatch.context() as patch:
        patch.setattr(engine, "seed_step", lambda *key: 1 / (key[1:3] != (1, 1)) and seed_step(*key))
        with pytest.raises(ZeroDivisionError):
            script(train_student, patch, *student, "--out", tmp_path / "run")
    script(train_student, monkeypatch, *student, "--out", tmp_path / "run", "--resume")
    whole, run = (run_folder.load_checkpoint(str(tmp_path / name)) for name in ("whole", "run"))
    torch.testing.assert_close(whole["model"], run["model"], rtol=0, atol=0)


def test_lists_of_the_real_size_are_read_in_seconds(tmp_path):
    """A second loop over 437,513 lines; a Python object for each of them that stays."""
    lines = [f"train_val2018/Aves/{i % 8142}/{i:032x}.jpg {i % 8142}\n" for i in range(437513)]
    (tmp_path / "list.txt").write_text("".join(lines))
    start = time.perf_counter()
    files = image_files.list_file(tmp_path / "list.txt", "/data/inat", 8142)
    assert len(files) == 437513 and not files.problems and time.perf_counter() - start < 20
    assert files.paths.nbytes < 40e6


# ---- The scripts ---------------------------------------------------------------------------------------------------------

SHORT = "--model micro --epochs 2 --drw-epoch 1 --eval-every 2 --batch 8".split()


def test_training_on_a_folder_of_ones_own(tmp_path, monkeypatch, capsys):
    """From a folder to a result: the paragraph, the choice of sizes, class names in the checkpoint."""
    root = a_folder(tmp_path / "my pictures", n=12, size=(90, 70))
    run = tmp_path / "run"
    script(train_student, monkeypatch, "--dataset", "folder", "--data-dir", root, "--method", "vit", "--out", run, *SHORT)
    out = capsys.readouterr().out
    assert "my pictures (imb 1.2, 33 images, 3 classes of 12 to 10)" in out and "64 px" in out and "'apple pie'" in out
    state = run_folder.load_checkpoint(str(run))
    assert state["class_names"] == ["apple pie", "Bär", "c,3"] and state["config"]["img_size"] == 64
    assert json.loads((run / "result.json").read_text())["imb"] == 1.2


def test_from_a_folder_to_predictions_and_on(tmp_path, monkeypatch, capsys):
    """The newcomer's way, every command of it, with what is awkward: a class of one image, none of it to test on; holdout."""
    root = a_folder(tmp_path / "in", n=12, size=(40, 44)) / "train"
    (root / "only one").mkdir()
    picture(40, 44).save(root / "only one" / "x.png")
    monkeypatch.chdir(tmp_path)
    short = train_teacher.LDAM_CPU | dict(epochs=2, drw_epoch=1, batch=16, img_size=40)
    monkeypatch.setitem(train_teacher.RECIPES["cpu"], "folder", lambda seen: short)
    script(train_student, monkeypatch, "--dataset", "folder", "--data-dir", root, "--holdout", "0.2", "--out", "run", *SHORT)
    out = capsys.readouterr().out
    assert "Without a test image, so without an accuracy: only one" in out and "Picture: run/summary.png" in out
    teacher = run_folder.load_checkpoint("runs/teacher_train_cpu_s0")
    assert teacher["config"]["img_size"] == 40 and teacher["class_names"][-1] == "only one"
    assert "NaN" not in (tmp_path / "run" / "result.json").read_text() + (tmp_path / "run" / "log.jsonl").read_text()
    for command, *flags in (["eval"], ["report"], ["export"]):
        script(analyze, monkeypatch, command, "run", *flags)
    script(analyze, monkeypatch, "predict", "--checkpoint", "run", root / "Bär", "--csv", "p.csv")
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 12
    script(train_student, monkeypatch, "--finetune", "run", "--img-size", "64", "--seed", "3")
    assert (tmp_path / "runs" / "run_finetuned64_seed3" / "result.json").exists()

    picture(40, 44, seed=99).save(root / "Bär" / "new.png")               # the data change: nobody goes on with them unawares
    for more in (["--out", "run", "--resume"], ["--out", "another"]):     # the student, and the teacher that it would ask
        with pytest.raises(SystemExit):
            script(train_student, monkeypatch, "--dataset", "folder", "--data-dir", root, "--holdout", "0.2", *more, *SHORT,
                   "--epochs", "3", "--force")
        assert "was trained on other images" in capsys.readouterr().err
    script(analyze, monkeypatch, "eval", "run")
    assert "have changed" in capsys.readouterr().err


def test_finetuning_keeps_the_network(tmp_path, monkeypatch, capsys):
    a_folder(tmp_path / "in")
    script(train_student, monkeypatch, "--dataset", "folder", "--data-dir", tmp_path / "in", "--method", "vit", "--out",
           tmp_path / "run", *SHORT)
    for flag, other in (("--model", "mini"), ("--patch-size", "4"), ("--method", "deit-lt")):
        with pytest.raises(SystemExit):
            script(train_student, monkeypatch, "--finetune", tmp_path / "run", flag, other, "--out", tmp_path / "wrong")
        assert f"keeps {flag}" in capsys.readouterr().err and not (tmp_path / "wrong").exists()


def test_a_folder_too_large_for_memory_stays_on_disk(tmp_path, monkeypatch):
    """The system's killer in place of an epoch; other images for the same command on a machine of less memory: the random
    boxes of the large sets, which the recipes for folders would crop again."""
    a_folder(tmp_path)
    in_memory = load(tmp_path)
    monkeypatch.setattr(data_lt, "memory", lambda: 0)
    streamed = load(tmp_path)
    assert isinstance(streamed.train_images, image_files.Stream) and streamed.fingerprint == in_memory.fingerprint
    assert torch.equal(streamed.train_images[:4], in_memory.train_images[:4])
    steps = list(enumerate(torch.arange(7).split(3)))
    for (step, x, y), (number, levels, labels) in zip(*(data.batches(steps, (0, 1, 0)) for data in (in_memory, streamed)),
                                                      strict=True):
        assert step == number and torch.equal(x, levels) and torch.equal(y, labels)


@pytest.mark.parametrize("limit, container", [("4096\n", True), ("max\n", False)])
def test_memory_is_that_of_the_container(limit, container, monkeypatch):
    """A container of 8 GiB on a machine of 512, filled as if it were the machine."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(data_lt, "open", lambda path: io.StringIO(limit), raising=False)
    assert data_lt.memory() == (4096 if container else machine)


@pytest.mark.parametrize("device, processes, free, room", [("cpu", 1, 0, 400), ("cpu", 4, 0, 100), ("cuda", 1, 500, 200),
                                                           ("cuda", 4, 500, 100)])
def test_room_for_images_is_that_of_one_process_and_its_gpu(device, processes, free, room, monkeypatch):
    """Eight processes that each fill two fifths of one machine; a GPU that is asked to hold what its machine can."""
    monkeypatch.setattr(data_lt, "memory", lambda: 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))
    assert engine.room(engine.Runtime(torch.device(device))) == room


def test_a_bad_folder_ends_before_anything_is_written(tmp_path, monkeypatch, capsys):
    damage(a_folder(tmp_path / "in"))
    with pytest.raises(SystemExit) as stopped:
        script(train_student, monkeypatch, "--dataset", "folder", "--data-dir", tmp_path / "in", "--out", tmp_path / "run",
               *SHORT)
    assert stopped.value.code == 2 and "9 problems" in capsys.readouterr().err and not Path(tmp_path / "run").exists()
