"""images/decode.py: whatever people keep in their folders is read rightly, or named."""
import io
import os
import random
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision.transforms import RandomResizedCrop

from conftest import ROOT
from image_folders import close, make_folder, picture, write_pgm, write_tiff
from images import decode, files
from pil_reference import same_distribution


def read(path, size, box=None):
    """(S,S,3), or the whole picture for size None."""
    if size is None:
        return decode.read_image(path)
    return decode.read_square(path, size, box).permute(1, 2, 0)


def lying(image, orientation):
    """A picture as a camera saves it that notes this EXIF orientation."""
    turn = {1: None, 2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
            5: Image.TRANSPOSE, 6: Image.ROTATE_90, 7: Image.TRANSVERSE,
            8: Image.ROTATE_270}[orientation]
    return image if turn is None else image.transpose(turn)


def files_of(*paths):
    """Files of one class."""
    encoded = np.array([os.fsencode(path) for path in paths])
    return files.Files(encoded, np.zeros(len(paths), dtype=int), ["a"])


def png_chunk(name, content):
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def no_files():
    return files_of("none").keep(np.zeros(1, dtype=bool))


# ---- Reading -------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA"])
def test_every_kind_of_color_is_read_as_rgb(mode, tmp_path):
    """A network fed one channel, or four; palette numbers taken for brightness."""
    source = picture().convert(mode)
    path = tmp_path / ("x.jpg" if mode in ("CMYK", "YCbCr") else "x.png")
    source.save(path, quality=100)
    image = decode.read_image(path)
    assert image.mode == "RGB" and close(image, source.convert("RGB"), by=6)


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
    lying(upright, orientation).save(tmp_path / "x.jpg", exif=exif, quality=95)
    box, expected = (200, 20, 360, 180), upright
    if size is not None:
        expected = upright.resize((size, size), Image.BICUBIC, box)
    assert close(read(tmp_path / "x.jpg", size, lambda W, H: box), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif", "lzw.tif", "gray.tif", "webp", "deep.png",
                                    "deep.tif", "deep.big.tif", "deep.wide.tif", "mpo"])
def test_equal_pictures_have_equal_pixels(ending, orientation, tmp_path):
    """A format whose reader has turned the picture already, or one that nobody turns: a square cut
    from the wrong place, or squeezed. Whole, as a square, by a box, streamed."""
    rng, exif = np.random.RandomState(0), Image.Exif()
    exif[0x0112] = orientation
    pixels = rng.randint(0, 256, (30, 48, 3), dtype=np.uint8)
    if "deep" in ending or "gray" in ending:
        pixels[...] = pixels[..., :1]
    upright, path = Image.fromarray(pixels), tmp_path / f"x.{ending}"
    saved = lying(upright, orientation)
    levels = np.asarray(saved)[..., 0].astype(np.uint16) * 257
    if ending == "deep.png":
        Image.fromarray(levels).save(path, exif=exif)
    elif ending.startswith("deep"):
        kind = {"deep.tif": "<u2", "deep.big.tif": ">u2", "deep.wide.tif": "<i4"}[ending]
        write_tiff(path, levels.astype(kind), orientation=orientation)
    elif ending == "gray.tif":
        saved.convert("L").save(path, exif=exif)
    elif ending == "mpo":
        saved.save(path, exif=exif, quality=100, subsampling=0, save_all=True,
                   append_images=[saved])
    else:
        saved.save(path, exif=exif, lossless=True,
                   compression="tiff_lzw" if ending == "lzw.tif" else None)
    upright.save(tmp_path / "right.png")
    by = 4 if ending == "mpo" else 1e-9
    for box in (None, lambda W, H: (W - 17, 3, W, 20)):
        for size in (17, 30):
            assert close(read(path, size, box), read(tmp_path / "right.png", size, box), by)
    assert close(decode.read_image(path), upright, by)
    both = files_of(path, tmp_path / "right.png")
    assert decode.sides(both).tolist() == [30, 30]
    for images in (decode.read_all(both, 20)[0], decode.Stream(both, 20)[:]):
        assert close(images[0], images[1], by)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_an_orientation_may_stand_in_xmp_and_be_unreadable_in_exif(ending, tmp_path):
    """Half of a data set lies on its side; a whole picture refused for a damaged remark."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    upright, path = picture(60, 40), tmp_path / f"x.{ending}"
    saved, info = lying(upright, 6), None
    if ending == "png":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    saved.save(path, xmp=xmp, pnginfo=info, quality=95)
    assert close(read(path, 40), read_whole_square(upright))
    upright.save(path, exif=b"Exif\0\0no directory", quality=95)
    assert close(read(path, 40), read_whole_square(upright))


def read_whole_square(image):
    return image.crop((10, 0, 50, 40))


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


def read_slowly(path, size, box):
    """What read_square returns, (3,S,S), written without regard to speed."""
    image = decode.opened(path)
    whole = decode.upright_size(image) if image.format in ("JPEG", "MPO") else None
    if whole:
        decode.draft(image, size, box(*whole))
    image = decode.upright(image, 65535)
    place = decode.scaled(box(*(whole or image.size)), whole or image.size, image.size)
    pixels = torch.from_numpy(np.array(decode.rgb(image.crop(place)))).permute(2, 0, 1)
    if pixels.shape[1:] == (size, size):
        return pixels
    return F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0]


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "gif", "bmp", "tif", "ppm"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "1"])
def test_reading_fast_changes_no_pixel(ending, mode, tmp_path):
    """A short cut that takes channels for pixels, or other rows, in some kind of file; another
    decoder's rounding. All kinds of JPEG compression, every orientation, odd sizes."""
    rng = np.random.default_rng(0)
    for i in range(24):
        size = int(rng.integers(1, 200)), int(rng.integers(1, 200))
        path, exif = tmp_path / f"{i}.{ending}", Image.Exif()
        exif[0x0112] = i % 9
        try:
            picture(*size, seed=i).convert(mode).save(
                path, quality=int(rng.integers(20, 100)), subsampling=i % 3,
                progressive=i % 2 == 0, exif=exif if i % 3 else Image.Exif())
        except (OSError, ValueError):           # not a mode of this format
            pytest.skip(f"{ending} has no {mode}")
        for box in (decode.central_square, decode.random_box(rng)):
            for side in (8, 40, min(size)):
                assert torch.equal(decode.read_square(path, side, box),
                                   read_slowly(path, side, box)), (i, size, side)


def test_python_does_each_thing_once(tmp_path, monkeypatch):
    """Python's lock held longer, so that threads wait for each other: the box computed twice, the
    pixels exported in pieces."""
    rng, calls = np.random.default_rng(0), []
    noise = Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8))
    noise.save(tmp_path / "x.jpg", quality=90)
    noise.save(tmp_path / "x.png")

    def counted(name, function):
        def count(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)
        return count

    class Encoder:
        def __init__(self, encoder):
            self.encode = counted("encode", encoder.encode)
            self.setimage, self.cleanup = encoder.setimage, encoder.cleanup
    encoder = Image._getencoder
    monkeypatch.setattr(Image, "_getencoder", lambda *args: Encoder(encoder(*args)))
    for ending in ("jpg", "png"):
        calls.clear()
        decode.read_square(tmp_path / f"x.{ending}", 224, counted("box", lambda W, H: (0, 0, W, H)))
        assert sorted(calls) == ["box", "encode"]


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


# ---- Levels of deep pictures ---------------------------------------------------------------------

def deep_ramp(white):
    """Levels (16,64) from 0 to white, and the 8-bit levels that they are."""
    eight = np.arange(1024).reshape(16, 64) // 4
    step = (white + 1) // 256
    return (eight * step + (step - 1)).astype(np.uint16), eight


@pytest.mark.parametrize("white", [255, 1023, 4095, 16383, 65535])
@pytest.mark.parametrize("ending", ["png", "tif", "big.tif", "signed.tif", "wide.tif", "saved.pgm"])
def test_a_data_set_of_deep_pictures_has_one_white_level(white, ending, tmp_path):
    """A scale for each file, so that a dark picture becomes as bright as a bright one, or clips (as
    PIL's own conversion does above 255); 12 bits nearly black. All decoders, and the stream."""
    levels, eight = deep_ramp(white)
    kind = {"signed.tif": "<i4", "big.tif": ">u2", "wide.tif": "<u4"}.get(ending, "<u2")
    for name, part in (("bright", levels), ("dark", levels // 8)):
        path = tmp_path / f"{name}.{ending}"
        if ending.endswith("tif"):
            write_tiff(path, part.astype(kind))
        else:
            Image.fromarray(part).save(path)
    eight_bits = tmp_path / "eight.png"
    Image.fromarray(eight.astype(np.uint8)).save(eight_bits)
    both = files_of(tmp_path / f"dark.{ending}", tmp_path / f"bright.{ending}", eight_bits)
    said = []
    both.white = decode.white_level(both, no_files(), said.append)
    assert both.white == white
    assert said == [f"2 images have 16-bit levels; 0 to {white} becomes 0 to 255"]
    dark, bright = (np.asarray(decode.read_image(path, white)) for path in both.paths[:2])
    assert (bright == eight[..., None]).all()
    assert (dark == (levels // 8 >> white.bit_length() - 8)[..., None]).all()
    images = decode.read_all(both, 16)[0]
    assert torch.equal(images[1], images[2]) and not torch.equal(images[0], images[1])
    for stream in (decode.Stream(both, 16), decode.Stream(both, 16).keep(np.arange(3)).to("cpu")):
        assert torch.equal(stream[:], images)


@pytest.mark.parametrize("kind, levels, expected", [
    ("<i4", [-70000, -1, 0, 256, 65535, 65536, 2 ** 31 - 1], [0, 0, 0, 1, 255, 255, 255]),
    ("<u4", [0, 255, 256, 65536, 2 ** 31, 2 ** 32 - 1], [0, 0, 1, 255, 255, 255]),
    ("<i2", [-32768, -1, 0, 256, 32767], [0, 0, 0, 1, 127]),
    (">i2", [-32768, -1, 0, 256, 32767], [0, 0, 0, 1, 127])])
def test_levels_beyond_black_and_white_are_those(kind, levels, expected, tmp_path):
    """Levels modulo 256; the darkest become the brightest; nobody is told."""
    write_tiff(tmp_path / "x.tif", np.array([levels], dtype=kind))
    one, said = files_of(tmp_path / "x.tif"), []
    assert decode.white_level(one, no_files(), said.append) in (32767, 65535)
    assert np.asarray(decode.read_image(tmp_path / "x.tif"))[0, :, 0].tolist() == expected
    assert said[1:] == ["1 image has levels below 0 or above 65535, which become 0 or 255"]


def test_the_white_level_is_that_of_training(tmp_path):
    """A brighter test picture that changes what is learned; a rule that a network's new pictures
    do not keep; a JPEG or 8-bit file decoded in vain, or a damaged one that ends it."""
    write_tiff(tmp_path / "train.tif", deep_ramp(4095)[0])
    write_tiff(tmp_path / "test.tif", deep_ramp(65535)[0])
    picture().save(tmp_path / "x.jpg")
    picture().save(tmp_path / "y.png")
    (tmp_path / "z.png").write_bytes((tmp_path / "y.png").read_bytes()[:60])
    train = files_of(tmp_path / "x.jpg", tmp_path / "train.tif", tmp_path / "z.png",
                     tmp_path / "nowhere.tif")
    test = files_of(tmp_path / "test.tif", tmp_path / "y.png")
    said = []
    assert decode.white_level(train, test, said.append) == 4095
    assert said == ["2 images have 16-bit levels; 0 to 4095 becomes 0 to 255",
                    "1 image has levels below 0 or above 4095, which become 0 or 255"]
    assert decode.white_level(train, test, said.append, white=65535) == 65535
    assert said[2:] == ["2 images have 16-bit levels; 0 to 65535 becomes 0 to 255"]
    with pytest.MonkeyPatch.context() as patch:                 # nothing else is said or decoded
        patch.setattr(Image.Image, "load", None)
        eight = files_of(tmp_path / "x.jpg", tmp_path / "y.png")
        assert decode.white_level(eight, eight, None) == 65535


@pytest.mark.parametrize("white", [1000, 1023, 4095])
def test_a_pgm_file_states_its_white_level(white, tmp_path):
    """PIL scales it to 16 bits: with 12-bit files of another format it would be 16 times brighter,
    or they 16 times darker."""
    levels = np.linspace(0, white, 64).round().astype(np.uint16)[None]
    write_pgm(tmp_path / "x.pgm", levels, white)
    write_tiff(tmp_path / "y.tif", deep_ramp(4095)[0])
    both = files_of(tmp_path / "x.pgm", tmp_path / "y.tif")
    assert decode.white_level(both, no_files(), [].append) == 4095
    for level in (255, 4095, 65535):
        pixels = np.asarray(decode.read_image(tmp_path / "x.pgm", level))[0, :, 0]
        assert np.abs(pixels - 255.0 * levels[0] / white).max() <= 1


def test_color_of_16_bits_is_said(tmp_path):
    """Color of 12 bits in 16 that becomes black without a word. PIL cannot write it."""
    (tmp_path / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">2I5B", 1, 1, 16, 2, 0, 0, 0))
        + png_chunk(b"IDAT", zlib.compress(struct.pack(">B3H", 0, 4095, 0, 65535)))
        + png_chunk(b"IEND", b""))
    assert np.asarray(decode.read_image(tmp_path / "x.png")).tolist() == [[[15, 0, 255]]]
    color, said = files_of(tmp_path / "x.png"), []
    assert decode.white_level(color, color, said.append) == 65535
    assert said == ["2 images have 16-bit color; 0 to 65535 becomes 0 to 255"]
    (tmp_path / "x.bmp").write_bytes(           # 5 bits of each color, all of them in 16 bits
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 70, 0, 54, 40, 2, 2, 1, 16, 0, 8, 0, 0, 0, 0)
        + struct.pack("<4H", 0, 31, 992, 31744))
    assert np.asarray(decode.read_image(tmp_path / "x.bmp"))[0].max() == 255
    assert decode.all_extremes(files_of(tmp_path / "x.bmp").paths) == ([], 0)


def test_a_deep_tiff_whose_0_is_white_is_no_negative(tmp_path):
    """Radiographs are saved so; PIL turns them over in 8 bits only."""
    levels, eight = deep_ramp(4095)
    write_tiff(tmp_path / "x.tif", 4095 - levels, photometric=0)
    assert (np.asarray(decode.read_image(tmp_path / "x.tif", 4095))[..., 0] == eight).all()


def test_a_transparent_level_of_a_deep_png_is_white(tmp_path):
    levels = np.array([[0, 300, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "x.png", transparency=300)
    assert np.asarray(decode.read_image(tmp_path / "x.png"))[0, :, 0].tolist() == [0, 255, 255]


def test_signed_8_bit_pixels_are_a_problem(tmp_path):
    """PIL reads -1 as 255."""
    write_tiff(tmp_path / "x.tif", np.array([[-1, 1]], dtype="i1"))
    assert "signed 8-bit" in decode.problem(tmp_path / "x.tif")


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


def all_doors(path):
    """What each way to read an image file says of it, None where it is read."""
    one = files_of(path)
    yield decode.problem(path)
    yield decode.problem(path, thorough=True)
    for good, problems in (decode.check(one), decode.read_all(one, 8)[1:],
                           decode.read_all(one, 8, exact=True)[1:]):
        yield problems[0] if problems else None
        assert good.tolist() == [not problems]
    assert decode.white_level(one, one, None) == 65535 and decode.sides(one).sum() >= 0
    assert decode.Stream(one, 8)[:1].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_files_are_opened(kind, tmp_path):
    """A pipe that no one writes to is waited for, for ever; /dev/zero never ends."""
    path = tmp_path / "x.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        os.symlink("/dev/zero", path)
    assert set(all_doors(path)) == {f"{path}: not a regular file"}


@pytest.mark.parametrize("kind", ["EPS", "PDF", "JPEG2000", "ICO", "PCX", "SGI", "TGA", "DDS"])
def test_only_known_formats_are_decoded(kind, tmp_path, monkeypatch):
    """Ghostscript started by a file that is called x.png; decoders that nobody looks after."""
    def start(*args, **kwargs):
        raise AssertionError(f"started {args}")
    monkeypatch.setattr(subprocess, "check_call", start)
    monkeypatch.setattr(subprocess, "Popen", start)
    path = tmp_path / "x.png"
    picture().save(path, kind)
    assert set(all_doors(path)) == {f"{path}: no image that can be read"}


@pytest.mark.parametrize("kind", ["text.png", "size.png", "size.gif", "tags.tif", "size.tif"])
def test_bombs_are_problems(kind, tmp_path):
    """A small file that takes gigabytes; an error that ends the run."""
    path = tmp_path / f"x.{kind}"
    picture().save(path)
    content = path.read_bytes()
    if kind == "text.png":                                      # 80 KB that become 80 MB
        text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))
        content = content[:33] + text + content[33:]
    elif kind == "size.png":
        header = png_chunk(b"IHDR", struct.pack(">II", 60_000, 60_000) + content[24:29])
        content = content[:8] + header + content[33:]
    elif kind == "size.gif":
        content = content[:6] + b"\xff\xff\xff\xff" + content[10:]
    elif kind == "tags.tif":                                    # values that no file holds
        at = struct.unpack("<I", content[4:8])[0]
        tags = b"".join(struct.pack("<HHII", 256 + i, 4, 2 ** 31, 8) for i in range(40))
        content = content[:at] + struct.pack("<H", 40) + tags + bytes(4)
    else:
        write_tiff(path, np.zeros((30, 40), dtype=np.uint8))
        content = path.read_bytes()
        for tag, side in ((256, 40), (257, 30)):
            content = content.replace(struct.pack("<HHII", tag, 4, 1, side),
                                      struct.pack("<HHII", tag, 4, 1, 2 ** 17))
    path.write_bytes(content)
    _, *thorough = all_doors(path)
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in thorough[::2])


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
        one = files_of(path)
        images, good, problems = decode.read_all(one, 32)
        assert len(images) == good.sum() == 1 - len(problems) and images.shape[1:] == (3, 32, 32)
        assert decode.Stream(one, 32)[:1].shape == (1, 3, 32, 32)
    assert refused > 50


# ---- Memory --------------------------------------------------------------------------------------

def test_all_threads_together_hold_a_bounded_number_of_pixels(tmp_path, monkeypatch):
    """Every thread decodes a huge picture: gigabytes from files of a few KB. A picture of more than
    the budget waits until it is alone; all come through."""
    held, most = [0], []
    budget, lock, whole = decode.Budget(10_000), threading.Lock(), decode.upright

    def upright(image, white):
        pixels = image.size[0] * image.size[1]
        with lock:
            held[0] += pixels
            most.append((held[0], pixels))
        time.sleep(0.005)
        with lock:
            held[0] -= pixels
        return whole(image, white)
    monkeypatch.setattr(decode, "budget", budget)
    monkeypatch.setattr(decode, "upright", upright)
    monkeypatch.setattr(decode, "THREADS", 8)
    paths = []
    for i, side in enumerate([60, 70, 80, 120, 10, 20, 30] * 4):
        paths.append(tmp_path / f"{i}.png")
        picture(side, side).save(paths[-1])
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:99])    # returns its own
    images, good, _ = decode.read_all(files_of(*paths), 8)
    assert good.sum() == 27 and budget.free == 10_000
    assert all(total <= max(10_000, own) for total, own in most)
    assert any(total > own for total, own in most)              # more than one at a time


def test_a_jpeg_counts_as_what_is_decoded_of_it(tmp_path, monkeypatch):
    """Photographs that wait for each other although an eighth is decoded; a progressive file, whose
    coefficients are all held, that does not."""
    taken = []

    class Spy(decode.Budget):
        def take(self, size):
            taken.append(size)
            return super().take(size)
    monkeypatch.setattr(decode, "budget", Spy(10 ** 6))
    for progressive in (False, True):
        picture(800, 640).save(tmp_path / "x.jpg", progressive=progressive)
        decode.read_square(tmp_path / "x.jpg", 32)
    assert taken == [(100, 80), (800, 640)]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "1", "L"])
def test_a_large_picture_is_shrunk_band_by_band(mode, tmp_path, monkeypatch):
    """Bands in the wrong places, or the last one lost; a palette averaged."""
    source = picture(317, 251).convert(mode)
    source.save(tmp_path / "x.png")
    for box in (None, lambda W, H: (40, 30, 291, 201), lambda W, H: (3, 3, 250, 250)):
        expected = read(tmp_path / "x.png", 20, box)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode, "LARGE", 1000)
            assert close(read(tmp_path / "x.png", 20, box), expected, by=5 if mode == "1" else 2)


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


def test_half_of_the_images_of_a_batch_are_mirrored(stream_files, monkeypatch):
    """None, all, or in a mirrored batch all; one that is upside down."""
    monkeypatch.setattr(decode, "random_box", lambda rng: lambda W, H: (0, 0, W, H))
    stream = decode.Stream(stream_files, 32)
    (_, _, images), = stream.batches([(0, torch.full((200,), 3))], (0, 0, 0))
    plain, mirrored = images[0], images[0].flip(2)
    assert not torch.equal(plain, mirrored)
    same = [torch.equal(x, plain) for x in images]
    assert all(s or torch.equal(x, mirrored) for s, x in zip(same, images))
    assert 60 < sum(same) < 140
    assert any(torch.equal(decode.read_square(stream.files.paths[3], 32, lambda W, H: (0, 0, W, H),
                                              stream.files.white), x) for x in (plain, mirrored))


def test_the_boxes_have_the_published_distribution():
    """Against torchvision's RandomResizedCrop, decile by decile; aspect ratios that are uniform,
    not their logarithms; and the box where nothing fits."""
    torch.manual_seed(0)
    W, H, n, rng, picture_ = 500, 375, 6000, np.random.default_rng(0), torch.empty(3, 375, 500)
    ours = np.array([decode.random_box(rng)(W, H) for _ in range(n)])
    theirs = np.array([RandomResizedCrop.get_params(picture_, (0.08, 1), (3 / 4, 4 / 3))
                       for _ in range(n)])
    assert ours.min() >= 0 and ours[:, 2].max() <= W and ours[:, 3].max() <= H
    left, top, right, bottom = ours.T
    ours = np.stack([top, left, bottom - top, right - left], axis=1)        # torchvision's order
    deciles = [np.quantile(boxes, np.arange(0.1, 1, 0.1), axis=0) for boxes in (ours, theirs)]
    assert np.abs(deciles[0] - deciles[1]).max() < 15
    assert same_distribution(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2])
    assert decode.random_box(rng)(1000, 10)[1::2] == (0, 10)     # central, of the widest ratio


def test_the_boxes_of_a_key_stay_what_they_are():
    """A run resumed with a faster version sees other crops: the last bit of a root decides."""
    def box(rng, W, H):
        areas = rng.uniform(0.08, 1, 10) * W * H
        aspects = np.exp(rng.uniform(*np.log((3 / 4, 4 / 3)), 10))
        x, y = rng.random(2)
        for area, aspect in zip(areas, aspects):
            w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 1 <= w <= W and 1 <= h <= H:
                left, top = int(x * (W - w + 1)), int(y * (H - h + 1))
                return left, top, left + w, top + h
    for seed in range(3000):
        W, H = 300 + seed % 70, 300 + seed % 31
        expected = box(np.random.default_rng(seed), W, H)
        assert decode.random_box(np.random.default_rng(seed))(W, H) == expected


def test_a_file_that_breaks_later_is_gray_and_named_once(stream_files, tmp_path, capsys):
    """A disk that fails in epoch 3: hours are worth more than one picture."""
    (tmp_path / "x.jpg").write_text("gone")
    stream = decode.Stream(files_of(tmp_path / "x.jpg", stream_files.paths[0]), 16)
    images = stream[torch.tensor([0, 1, 0])]
    assert (images[[0, 2]] == 128).all() and (images[1] != 128).any()
    assert capsys.readouterr().err.count("cannot be decoded") == 1


def test_files_that_are_gone_end_it(tmp_path):
    """A disk that is unplugged: a network trained, and judged, on gray. Ten may go; damaged ones
    are not gone."""
    damaged = [tmp_path / f"damaged {i}.png" for i in range(20)]
    for path in damaged:
        picture().save(path)
        path.write_bytes(path.read_bytes()[:200])
    gone = [tmp_path / f"{i}.png" for i in range(11)]
    assert (decode.Stream(files_of(*gone[:10], *damaged), 16)[:] == 128).all()
    with pytest.raises(files.DataError, match="^11 images can no longer be read, .* --resume$"):
        decode.Stream(files_of(*gone), 16)[:]


def test_a_hundredth_of_the_images_may_be_gone(tmp_path):
    """A run on a million files that ends at the eleventh unreadable one."""
    picture(8, 8).save(tmp_path / "x.png")
    gone = [tmp_path / f"{i}.png" for i in range(12)]
    stream = decode.Stream(files_of(*gone, *[tmp_path / "x.png"] * 1200), 8)
    assert (stream[:12] == 128).all()


def test_sides_are_of_all_classes(tmp_path):
    """Those of the first files, which are of one class."""
    for i in range(8):
        picture(*((20, 20) if i < 4 else (90, 80))).save(tmp_path / f"{i}.png")
    found = decode.sides(files_of(*(tmp_path / f"{i}.png" for i in range(8))), limit=4)
    assert sorted(found) == [20, 20, 80, 80]
