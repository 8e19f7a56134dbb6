"""images/decode.py: whatever people keep in their folders is read rightly, or named."""
import io
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from conftest import ROOT
from image_folders import close, make_folder, picture
from images import decode, files


def read(path, size, box=None):
    """(S,S,3), or the whole picture for size None."""
    if size is None:
        return decode.read_image(path)
    return decode.read_square(path, size, box).permute(1, 2, 0)


# ---- Reading -------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA"])
def test_every_kind_of_color_is_read_as_rgb(mode, tmp_path):
    """A network fed one channel, or four; palette numbers taken for brightness."""
    source = picture().convert(mode)
    path = tmp_path / ("x.jpg" if mode in ("CMYK", "YCbCr") else "x.png")
    source.save(path, quality=100)
    image = decode.read_image(path)
    assert image.mode == "RGB" and close(image, source.convert("RGB"), by=6)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bits_keep_their_upper_8(ending, tmp_path):
    """PIL's own conversion clips everything above 255 to white."""
    values = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(values).save(tmp_path / f"x.{ending}")
    assert (np.asarray(decode.read_image(tmp_path / f"x.{ending}"))[..., 1] == values // 256).all()


def test_transparent_pixels_become_white(tmp_path):
    """What hides under transparency may be anything, often black: an outline that nobody sees."""
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, 4:] = 10, 20, 30, 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = np.asarray(decode.read_image(tmp_path / "x.png"))
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
    assert close(decode.read_image(tmp_path / "x.gif"), frames[0].convert("RGB"))


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
    for how, place in ((None, decode.central_square(640, 480)), (box, box(640, 480))):
        pils = whole.resize((size, size), Image.BICUBIC, place)
        assert close(read(tmp_path / "x.jpg", size, how), pils, by=2)
        assert close(read(tmp_path / "x.png", size, how), pils, by=1)


def test_reading_leaves_the_main_thread_its_threads(tmp_path):
    """The decoders' one thread each may become that of a process which has not used its own yet:
    training on one core."""
    folder = os.fspath(make_folder(tmp_path) / "train")
    code = f"""if True:
        import torch
        from images import decode, files
        decode.read_all(files.list_folder({folder!r}), 32)
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
    bad = {path.name for path in tmp_path.iterdir() if decode.problem(path)}
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
        reason = decode.problem(path, thorough=True)
        if reason is not None:
            refused += 1
            assert reason.startswith(str(path)) and "\n" not in reason
        one = files.Files(np.array([os.fsencode(path)]), np.array([0]), ["a"])
        images, good, problems = decode.read_all(one, 32)
        assert len(images) == good.sum() == 1 - len(problems) and images.shape[1:] == (3, 32, 32)
        assert decode.Stream(one, 32)[:1].shape == (1, 3, 32, 32)
    assert refused > 50


# ---- Streams -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stream_files(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("stream"), n=9, size=(90, 70))
    return files.list_folder(folder / "train")


def test_a_stream_is_indexed_like_a_tensor(stream_files):
    stream = decode.Stream(stream_files, 32)
    images, good, _ = decode.read_all(stream_files, 32)
    assert stream.shape == images.shape and good.all()
    assert torch.equal(stream[torch.tensor([5, 0, 5])], images[[5, 0, 5]])
    assert torch.equal(stream[:4], images[:4])
    assert torch.equal(stream.keep(np.array([7, 2]))[:], images[[7, 2]])


def test_boxes_follow_from_seed_epoch_and_step_alone(stream_files):
    """A resumed run that sees other crops; the same crop in every epoch; every image of a batch
    cropped alike."""
    stream, steps = decode.Stream(stream_files, 32), list(enumerate(torch.arange(24).split(5)))
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
    ours = np.array([decode.random_box(rng)(W, H) for _ in range(n)])
    theirs = np.array([RandomResizedCrop.get_params(picture_, (0.08, 1), (3 / 4, 4 / 3))
                       for _ in range(n)])
    assert ours.min() >= 0 and ours[:, 2].max() <= W and ours[:, 3].max() <= H
    left, top, right, bottom = ours.T
    ours = np.stack([top, left, bottom - top, right - left], axis=1)        # torchvision's order
    deciles = [np.quantile(boxes, np.arange(0.1, 1, 0.1), axis=0) for boxes in (ours, theirs)]
    assert np.abs(deciles[0] - deciles[1]).max() < 15
    assert decode.random_box(rng)(1000, 10)[1::2] == (0, 10)     # central, of the widest ratio


def test_a_file_that_breaks_later_is_gray_and_named_once(stream_files, tmp_path, capsys):
    """A disk that fails in epoch 3: hours are worth more than one picture."""
    (tmp_path / "x.jpg").write_text("gone")
    paths = np.array([os.fsencode(tmp_path / "x.jpg"), stream_files.paths[0]])
    stream = decode.Stream(files.Files(paths, np.array([0, 0]), ["a"]), 16)
    images = stream[torch.tensor([0, 1, 0])]
    assert (images[[0, 2]] == 128).all() and (images[1] != 128).any()
    assert capsys.readouterr().err.count("cannot be decoded") == 1
