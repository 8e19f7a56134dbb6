"""images/files.py: whatever people keep in their folders is read rightly, or named."""
import io
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from conftest import ROOT
from image_folders import close, make_folder, picture
from images import files
from images.files import DataError


def read(path, size, box=None):
    """(S,S,3), or the whole picture for size None."""
    if size is None:
        return files.read_image(path)
    return files.read_square(path, size, box).permute(1, 2, 0)


# ---- Reading -------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA"])
def test_every_kind_of_color_is_read_as_rgb(mode, tmp_path):
    """A network fed one channel, or four; palette numbers taken for brightness."""
    source = picture().convert(mode)
    path = tmp_path / ("x.jpg" if mode in ("CMYK", "YCbCr") else "x.png")
    source.save(path, quality=100)
    image = files.read_image(path)
    assert image.mode == "RGB" and close(image, source.convert("RGB"), by=6)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bits_keep_their_upper_8(ending, tmp_path):
    """PIL's own conversion clips everything above 255 to white."""
    values = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(values).save(tmp_path / f"x.{ending}")
    assert (np.asarray(files.read_image(tmp_path / f"x.{ending}"))[..., 1] == values // 256).all()


def test_transparent_pixels_become_white(tmp_path):
    """What hides under transparency may be anything, often black: an outline that nobody sees."""
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, 4:] = 10, 20, 30, 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = np.asarray(files.read_image(tmp_path / "x.png"))
    assert (image[:, :4] == 255).all() and (image[:, 4:] == (10, 20, 30)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [None, 20, 100])
def test_photographs_are_turned_upright(orientation, size, tmp_path):
    """Phones save every picture lying down, with a note which way is up. Also when a JPEG is
    decoded small, by a box."""
    upright, exif = picture(400, 240), Image.Exif()
    exif[0x0112] = orientation
    turn = {1: None, 2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
            5: Image.TRANSPOSE, 6: Image.ROTATE_90, 7: Image.TRANSVERSE,
            8: Image.ROTATE_270}[orientation]
    saved = upright if turn is None else upright.transpose(turn)
    saved.save(tmp_path / "x.jpg", exif=exif, quality=95)
    box, expected = (200, 20, 360, 180), upright
    if size is not None:
        expected = upright.resize((size, size), Image.BICUBIC, box)
    assert close(read(tmp_path / "x.jpg", size, lambda W, H: box), expected)


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [picture(seed=i).convert("P") for i in range(3)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert close(files.read_image(tmp_path / "x.gif"), frames[0].convert("RGB"))


@pytest.mark.parametrize("w, h", [(1, 1), (1, 500), (3000, 2), (31, 32)])
def test_odd_shapes_are_cut_to_a_square(w, h, tmp_path):
    """A picture of one pixel, or a strip, that makes an empty crop or gigabytes."""
    picture(w, h).save(tmp_path / "x.png")
    assert read(tmp_path / "x.png", 32).shape == (32, 32, 3)


@pytest.mark.parametrize("size", [16, 50, 120, 700])
def test_a_jpeg_decoded_small_is_near_the_whole_one(size, tmp_path):
    """An eighth of the size decoded although more is needed; a box in the wrong pixels."""
    whole = picture(640, 480)
    whole.save(tmp_path / "x.jpg", quality=95)
    whole.save(tmp_path / "x.png")

    def box(W, H):
        return W // 4, H // 3, W // 4 + 200, H // 3 + 150
    for how, place in ((None, files.central_square(640, 480)), (box, box(640, 480))):
        pils = whole.resize((size, size), Image.BICUBIC, place)
        assert close(read(tmp_path / "x.jpg", size, how), pils, by=2)
        assert close(read(tmp_path / "x.png", size, how), pils, by=1)


def test_names_sort_naturally_and_never_fail():
    """Comparing a number with a word is an error in Python, and so is int("²"), although
    "²".isdigit()."""
    names = ["10", "2", "b", "a10", "a2", "a", "2b", "", "1.5", "1.10", "5²"]
    expected = ["", "1.5", "1.10", "2", "2b", "5²", "10", "a", "a2", "a10", "b"]
    assert sorted(names, key=files.natural) == expected


def test_reading_leaves_the_main_thread_its_threads(tmp_path):
    """The decoders' one thread each may become that of a process which has not used its own yet:
    training on one core."""
    folder = os.fspath(make_folder(tmp_path) / "train")
    code = f"""if True:
        import torch
        from images import files
        files.read_all(files.list_folder({folder!r}), 32)
        print(torch.get_num_threads())"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert out.stdout.split() == ["2"], out.stdout + out.stderr


# ---- Finding what is wrong -----------------------------------------------------------------------

def test_the_quick_check_finds_what_decoding_finds(tmp_path):
    """A truncated file that looks whole from its first bytes; a whole one that is refused for what
    follows its end."""
    for ending in ("jpg", "png", "webp", "bmp"):
        picture(200, 200).save(tmp_path / f"good.{ending}")
        content = (tmp_path / f"good.{ending}").read_bytes()
        (tmp_path / f"cut.{ending}").write_bytes(content[:len(content) // 2])
    (tmp_path / "more.jpg").write_bytes((tmp_path / "good.jpg").read_bytes() + b"\0" * 500)
    bad = {path.name for path in tmp_path.iterdir() if files.problem(path)}
    assert bad == {"cut.jpg", "cut.png", "cut.webp", "cut.bmp"}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "bmp", "tif", "webp", "ppm"])
def test_1500_damaged_files_are_read_or_named(ending, tmp_path, capfd):
    """Bytes changed, removed, inserted or the rest cut off, mostly at the start: never another
    error, a crash of the decoder, or gigabytes."""
    draw, whole, path, refused = random.Random(0), io.BytesIO(), tmp_path / f"x.{ending}", 0
    picture(64, 48).save(whole, {"jpg": "jpeg", "tif": "tiff"}.get(ending, ending))
    for _ in range(1500):
        content = bytearray(whole.getvalue())
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(min(len(content), draw.choice([16, 64, 10 ** 6])))
            removed, inserted = draw.choice([
                (0, draw.randint(1, 9)), (1, 1), (draw.randint(1, 20), 0), (len(content), 0)])
            content[at:at + removed] = bytes(draw.randrange(256) for _ in range(inserted))
            content = content or bytearray(b"x")
        path.write_bytes(content)
        reason = files.problem(path, thorough=True)
        if reason is not None:
            refused += 1
            assert reason.startswith(str(path)) and "\n" not in reason
        one = files.Files(np.array([os.fsencode(path)]), np.array([0]), ["a"])
        images, good, problems = files.read_all(one, 32)
        assert len(images) == good.sum() == 1 - len(problems) and images.shape[1:] == (3, 32, 32)
        assert files.Stream(one, 32)[:1].shape == (1, 3, 32, 32)
    assert refused > 50


@pytest.mark.slow
def test_2000_damaged_lists_are_read_or_named(tmp_path):
    """A line that is no path and label must never become an image of another class, or another
    error."""
    draw, path = random.Random(0), tmp_path / "list.txt"
    lines = [b"folder %d/image_%d.jpg %d\n" % (i % 7, i, i % 5) for i in range(40)]
    truth = {line.rsplit(b" ", 1)[0]: int(line.rsplit(b" ", 1)[1]) for line in lines}
    for _ in range(2000):
        content = bytearray(b"".join(lines))
        for _ in range(draw.randint(1, 6)):
            at, inserted = draw.randrange(len(content)), draw.randint(0, 3)
            content[at:at + draw.randint(0, 3)] = bytes(draw.randrange(256)
                                                        for _ in range(inserted))
        path.write_bytes(content)
        try:
            found = files.list_file(path, "", 5)
        except DataError:
            continue
        assert found.labels.max(initial=0) < 5 and len(found) + len(found.problems) >= 30
        right = [truth[name] == k for name, k in zip(found.paths.tolist(), found.labels.tolist())
                 if name in truth]
        assert sum(right) >= len(right) - 6                     # a changed digit: another class
        assert all(str(path) in problem for problem in found.problems)


# ---- Lists and splits ----------------------------------------------------------------------------

@pytest.mark.parametrize("line", ["a.jpg", "a.jpg x", "a.jpg -1", "a.jpg 3", "a.jpg 1.5", "7",
                                  "a.jpg ١", "a.jpg " + "1" * 5000])
def test_a_list_file_names_its_bad_lines(line, tmp_path):
    """A label that is none; one beyond the classes; a path alone. Blank lines and paths with blanks
    are fine."""
    (tmp_path / "list.txt").write_text(f"b c.jpg 0\n\n{line}\nd.jpg\t2\r\n")
    found = files.list_file(tmp_path / "list.txt", "/root", 3)
    assert found.paths.tolist() == [b"/root/b c.jpg", b"/root/d.jpg"]
    assert found.labels.tolist() == [0, 2]
    assert len(found.problems) == 1 and "line 3" in found.problems[0]


def test_a_list_file_names_what_it_lists_twice(tmp_path):
    """One image as two classes."""
    (tmp_path / "list.txt").write_text("a.jpg 0\nb.jpg 1\na.jpg 1\n")
    found = files.list_file(tmp_path / "list.txt", "/root", 3)
    assert len(found) == 2 and "line 3: a.jpg is listed in line 1 already" in found.problems[0]


@pytest.mark.parametrize("content, words", [(None, "No such file"), ("\n", "is empty")])
def test_a_list_that_cannot_be_used_is_refused(content, words, tmp_path):
    if content is not None:
        (tmp_path / "list.txt").write_text(content)
    with pytest.raises(DataError, match=words):
        files.list_file(tmp_path / "list.txt", "/root", 3)


def test_long_lists_are_read_in_seconds(tmp_path):
    """A loop over all lines for every line; a Python object for each of them that stays. (The
    largest published list has 437,513 lines.)"""
    lines = [f"train_val2018/Aves/{i % 8142}/{i:032x}.jpg {i % 8142}\n" for i in range(100_000)]
    (tmp_path / "list.txt").write_text("".join(lines))
    start = time.process_time()
    found = files.list_file(tmp_path / "list.txt", "/data/inat", 8142)
    assert len(found) == 100_000 and not found.problems and time.process_time() - start < 5
    assert found.paths.nbytes < 9e6


def test_a_held_out_part_is_stratified_fixed_and_leaves_something_to_train_on():
    """A rare class that is all in one part; another test set for another run or another place; an
    image in both parts."""
    def folder(root):
        labels = np.repeat([0, 1, 2, 3], [100, 8, 2, 1])
        paths = np.array([f"{root}/{i}".encode() for i in range(111)])
        return files.Files(paths, labels, list("abcd"))
    whole = folder("/root")
    train, test = files.hold_out(whole, 0.2, "/root")
    assert test.counts().tolist() == [20, 2, 1, 0] and train.counts().tolist() == [80, 6, 1, 1]
    assert set(train.paths) | set(test.paths) == set(whole.paths)
    assert not set(train.paths) & set(test.paths)
    numbers = [int(path.split(b"/")[-1]) for path in test.paths.tolist()]
    assert max(numbers[:20]) > 60 and min(numbers[:20]) < 40    # from all over the class

    train, _ = files.hold_out(whole, 0.9, "/root")
    assert train.counts().tolist() == [10, 1, 1, 1]

    fewer = whole.keep(np.arange(111) != 50)                    # an image more or less
    before = set(files.hold_out(fewer, 0.2, "/root")[1].paths)
    after = set(test.paths)
    assert len(before - {whole.paths[50]} - after) <= 1 and len(after - before) <= 1
    moved = files.hold_out(folder("/elsewhere"), 0.2, "/elsewhere")[1]
    assert [int(path.split(b"/")[-1]) for path in moved.paths.tolist()] == numbers


# ---- Streams -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stream_files(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("stream"), n=9, size=(90, 70))
    return files.list_folder(folder / "train")


def test_a_stream_is_indexed_like_a_tensor(stream_files):
    stream = files.Stream(stream_files, 32)
    images, good, _ = files.read_all(stream_files, 32)
    assert stream.shape == images.shape and good.all()
    assert torch.equal(stream[torch.tensor([5, 0, 5])], images[[5, 0, 5]])
    assert torch.equal(stream[:4], images[:4])
    assert torch.equal(stream.keep(np.array([7, 2]))[:], images[[7, 2]])


def test_boxes_follow_from_seed_epoch_and_step_alone(stream_files):
    """A resumed run that sees other crops; the same crop in every epoch; every image of a batch
    cropped alike."""
    stream, steps = files.Stream(stream_files, 32), list(enumerate(torch.arange(24).split(5)))
    whole = [images for _, _, images in stream.batches(steps, (0, 1, 0))]
    resumed = [images for _, _, images in stream.batches(steps[3:], (0, 1, 0), ahead=1)]
    assert len(resumed) == 2
    for a, b in zip(whole[3:], resumed):
        assert torch.equal(a, b)
    assert not torch.equal(whole[0], next(stream.batches(steps, (0, 2, 0)))[2])
    twice, = [images for _, _, images in stream.batches([(0, torch.tensor([3, 3]))], (0, 0, 0))]
    assert not torch.equal(twice[0], twice[1])
    steps = [(0, torch.tensor([3])), (1, torch.tensor([3]))]
    first, second = [images for _, _, images in stream.batches(steps, (0, 0, 0))]
    assert not torch.equal(first, second)


def test_the_boxes_have_the_published_distribution():
    """Against torchvision's RandomResizedCrop, decile by decile; and the box where nothing fits."""
    torch.manual_seed(0)
    W, H, n, rng, picture_ = 500, 375, 3000, np.random.default_rng(0), torch.empty(3, 375, 500)
    ours = np.array([files.random_box(rng)(W, H) for _ in range(n)])
    theirs = np.array([RandomResizedCrop.get_params(picture_, (0.08, 1), (3 / 4, 4 / 3))
                       for _ in range(n)])
    assert ours.min() >= 0 and ours[:, 2].max() <= W and ours[:, 3].max() <= H
    left, top, right, bottom = ours.T
    ours = np.stack([top, left, bottom - top, right - left], axis=1)        # torchvision's order
    deciles = [np.quantile(boxes, np.arange(0.1, 1, 0.1), axis=0) for boxes in (ours, theirs)]
    assert np.abs(deciles[0] - deciles[1]).max() < 15
    assert files.random_box(rng)(1000, 10)[1::2] == (0, 10)     # central, of the widest ratio


def test_a_file_that_breaks_later_is_gray_and_named_once(stream_files, tmp_path, capsys):
    """A disk that fails in epoch 3: hours are worth more than one picture."""
    (tmp_path / "x.jpg").write_text("gone")
    paths = np.array([os.fsencode(tmp_path / "x.jpg"), stream_files.paths[0]])
    stream = files.Stream(files.Files(paths, np.array([0, 0]), ["a"]), 16)
    images = stream[torch.tensor([0, 1, 0])]
    assert (images[[0, 2]] == 128).all() and (images[1] != 128).any()
    assert capsys.readouterr().err.count("cannot be decoded") == 1
