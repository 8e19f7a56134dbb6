r"""Image files decoded, and what is wrong with them found before training starts.

    grayscale, palette, CMYK, YCbCr, 1 bit      converted to RGB
    transparent                                 laid on white
    16 or 32 bit gray (deep)                    0 to the white level of the data set, see WHITES
    16 bit color                                the upper 8 bits
    EXIF orientation                            turned upright
    animated                                    the first frame
    one pixel, odd shapes                       resized like any other
    empty, truncated, none of FORMATS, no regular file, floating point, more than 179 million
    pixels, not readable                        listed as a problem

Threads share the work: no worker processes, no copies between them. Decoding and resizing are C
code that releases Python's lock. Opening a file, and moving its pixels from PIL to torch, hold it,
for a JPEG file of 500 x 375 px about a third of the time: more than three threads gain little.
"""
import os
import stat
import sys
import threading
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile

from images.files import DataError, shown
from images.machine import cpus

THREADS = cpus()

Image.init()                                    # OPEN then has all formats of this PIL
FORMATS = [name for name in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF")
           if name in Image.OPEN]               # no other decoder ever sees a file
# More is an error of PIL's, and a problem here.
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS
LARGE = 2 ** 24                                 # pixels that are not copied as a whole
Image.core.set_block_size(2 ** 26)      # bytes; of smaller blocks glibc keeps some for each thread
ImageFile.MAXBLOCK = 2 ** 20            # bytes that PIL reads and exports at a time, not 64 KB
warnings.filterwarnings("ignore", module="PIL")         # remarks on a file, without its path

# White levels of 8, 10, 12, 14 and 16 bits. A deep file does not say which it means, so a data set
# has one for all: the smallest that no deep training image exceeds. Other levels are clamped; the
# upper 8 bits are kept.
WHITES = (255, 1023, 4095, 16383, 65535)

EXIF_ORIENTATION, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 274, 262, 339      # numbers of tags
TURNS = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
         5: Image.TRANSPOSE, 6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}
ON_ITS_SIDE = (Image.TRANSPOSE, Image.ROTATE_270, Image.TRANSVERSE, Image.ROTATE_90)


# ---- What is wrong with them ---------------------------------------------------------------------

JPEG = b"\xff\xd8"
ENDS = {JPEG: b"\xff\xd9", b"\x89PNG": b"IEND"}            # how JPEG and PNG files begin and end


def looks_whole(path):
    """Does it begin and end as JPEG and PNG files do? Microseconds; OSError if it is unreadable."""
    require_file(path)
    with open(path, "rb", buffering=0) as file:
        begin = file.read(4)
        for start, end in ENDS.items():
            if begin.startswith(start):
                file.seek(max(0, os.fstat(file.fileno()).st_size - 64))
                return end in file.read(64)
    return False


def problem(path, thorough=False):
    """What is wrong with an image file, a line of text, or None.

    Not thorough: the image is decoded only if the file does not look whole.
    """
    try:
        if thorough or not looks_whole(path):
            read_square(path, 32)
    except Exception as error:                  # damaged files raise nearly anything
        return f"{shown(path)}: {reason(error)}"
    return None


def reason(error):
    """Why a file cannot be read, as one line for people."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image that can be read"
    if isinstance(error, Image.DecompressionBombError):
        return f"has more than {MAX_PIXELS / 1e6:.0f} million pixels"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return shown(" ".join(text.split())[:200])


def check(files, thorough=False):
    """Look for problems in all files, by threads: (mask of the good ones, problems)."""
    def check_one(path):
        return problem(path, thorough)
    results = map_by_threads(check_one, files.paths)
    good = np.array([result is None for result in results], dtype=bool)
    return good, [result for result in results if result is not None]


# ---- Levels of deep images -----------------------------------------------------------------------

def is_deep(image):
    """Does an open image have levels of which the file does not say which one is white?"""
    return image.mode.startswith("I") and not states_white(image)


def states_white(image):
    """Is an open image a PGM file that states its white level? PIL scales its levels to 65535.

    65535 itself is what any 16-bit file states.
    """
    decoder_args = image.tile[0][3]             # a raw mode, or a tuple of it and the white level
    return (image.format == "PPM" and isinstance(decoder_args, tuple)
            and decoder_args[-1] != WHITES[-1])


def is_deep_color(image):
    """Is an open image's color stored in 16 bits, of which PIL reads the upper 8?"""
    # BMP files have BGR;16, three colors in 16 bits.
    return image.mode[0] != "I" and any(";16" in str(tile[3]) and "BGR;16" not in str(tile[3])
                                        for tile in image.tile)


def levels(image):
    """The pixels (H,W) of an open deep image, integers of any kind."""
    pixels = np.asarray(image)
    if image.format == "TIFF" and image.mode == "I" and not is_signed(image):
        return pixels.view(np.uint32)           # which PIL reads as signed
    return pixels


def is_signed(image):
    """Does an open TIFF image have signed integers?"""
    return 2 in image.tag_v2.get(TIFF_SAMPLE_FORMAT, ())


def eight_bits(image, white):
    """A deep PIL image -> mode L: levels are clamped to 0..white, their upper 8 bits kept."""
    if states_white(image):
        white = WHITES[-1]
    deep = levels(image)
    pixels = np.clip(deep, 0, white)
    if image.format == "TIFF" and image.tag_v2.get(TIFF_PHOTOMETRIC) == 0:
        pixels = white - pixels                 # its 0 is white, which PIL minds in 8 bits only
    pixels >>= white.bit_length() - 8
    pixels = pixels.astype(np.uint8)
    if "transparency" in image.info:            # a level of a PNG file
        pixels[deep == image.info["transparency"]] = 255
    return Image.fromarray(pixels)


def extremes(path):
    """(lowest, highest) level of a deep image file, () for 16-bit color; None for other files."""
    try:
        require_file(path)
        with open(path, "rb", buffering=0) as file:
            if file.read(2) == JPEG:            # never deep, and most files of large sets
                return None
        with opened(path) as image:
            if is_deep_color(image):
                return ()
            if not is_deep(image):
                return None
            with budget.take(image.size):
                pixels = levels(image)
                return int(pixels.min()), int(pixels.max())
    except Exception:                           # it will be listed as a problem
        return None


def all_extremes(paths):
    """The `extremes` of all files with 16 bits among these, and how many have 16-bit color."""
    found = map_by_threads(extremes, paths)
    return [pair for pair in found if pair], found.count(())


def white_level(train, test, say, white=None):
    """The white level of a data set's deep images: see WHITES. It is told by say(text).

    train, test: Files. white: the level that is known already, of a network's own data.
    """
    deep, colors = all_extremes(train.paths)
    if white is None:
        highest = max((high for _, high in deep), default=WHITES[-1])
        white = next((level for level in WHITES if highest <= level), WHITES[-1])
    tested, more = all_extremes(test.paths)
    say_levels(deep + tested, colors + more, white, say)
    return white


def say_levels(deep, colors, white, say):
    """Tell by say(text) how deep images are read. deep, colors: of `all_extremes`."""
    outside = sum(low < 0 or high > white for low, high in deep)
    if deep:
        say(f"{images_have(len(deep))} 16-bit levels; 0 to {white} becomes 0 to 255")
        highest = max(high for _, high in deep)
        if highest < white // 8:
            say(f"their highest level is {highest}, so they become nearly black")
    if colors:
        say(f"{images_have(colors)} 16-bit color; 0 to 65535 becomes 0 to 255")
    if outside:
        say(f"{images_have(outside)} levels below 0 or above {white}, which become 0 or 255")


def images_have(n):
    return "1 image has" if n == 1 else f"{n} images have"


# ---- Decoding ------------------------------------------------------------------------------------

class Budget:
    """Pixels that all threads together may decode at a time; who asks for more waits."""

    def __init__(self, pixels):
        self.pixels, self.free, self.changed = pixels, pixels, threading.Condition()

    @contextmanager
    def take(self, size):
        """Have W * H pixels while the block runs; a larger image has them all."""
        pixels = min(size[0] * size[1], self.pixels)
        with self.changed:
            self.changed.wait_for(lambda: pixels <= self.free)
            self.free -= pixels
        try:
            yield
        finally:
            with self.changed:
                self.free += pixels
                self.changed.notify_all()


budget = Budget(MAX_PIXELS)


def require_file(path):
    """OSError for an empty file, and for a folder, pipe or device, which may never end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    if status.st_size == 0:
        raise OSError("empty")


def opened(path):
    """A file as a PIL image that is not decoded yet. OSError if it is none of FORMATS."""
    require_file(path)
    image = Image.open(path, formats=FORMATS)
    # Else PIL maps the file into memory: uncompressed TIFF images on their side become another
    # picture then, and a file that is cut meanwhile ends the process.
    image.filename = ""
    return image


def turn(image):
    """How PIL must transpose an open image, or None; also where its metadata cannot be read."""
    try:
        return TURNS.get(image.getexif().get(EXIF_ORIENTATION))
    except Exception:                           # damaged metadata raise nearly anything
        return None


def upright(image, white):
    """Decode an open image and turn it as its EXIF orientation says, in a mode of 8 bits or fewer.

    white: level of deep images. ValueError for floating-point and signed 8-bit pixels.
    """
    if image.mode == "F":
        raise ValueError("holds floating-point pixels; save it with 8 or 16 bits")
    if image.mode == "L" and image.format == "TIFF" and is_signed(image):
        raise ValueError("holds signed 8-bit pixels; save it with unsigned ones")
    decoded = eight_bits(image, white) if image.mode.startswith("I") else image
    decoded.load()
    transposition = turn(image)     # not earlier: PIL turns TIFF images itself when it decodes them
    return decoded if transposition is None else decoded.transpose(transposition)


def rgb(image):
    """A decoded PIL image of any mode -> RGB, on white where it is transparent."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(path, white=WHITES[-1]):
    """Decode a file -> PIL RGB image, upright. OSError, ValueError or another for damaged files.

    white: the level of deep images that becomes 255.
    """
    with opened(path) as image, budget.take(image.size):
        return rgb(upright(image, white))


def read_square(path, size, box=None, white=WHITES[-1]):
    """Decode the largest central square of a file, or a box, at size x size -> uint8 (3,size,size).

    box: function of the upright image's (W, H) that returns (left, top, right, bottom) in pixels.
    torch resizes, faster than PIL and equal but for rounding. white and errors: see read_image.
    """
    box = box or central_square
    image = opened(path)
    whole = place = None
    if image.format in ("JPEG", "MPO"):
        whole = upright_size(image)
        place = box(*whole)
        draft(image, size, place)
    # A progressive JPEG file's coefficients are all held, however small it is decoded.
    progressive = whole and image.info.get("progressive")
    with budget.take(whole if progressive else image.size), image:
        image = upright(image, white)
        place = scaled(place, whole, image.size) if whole else box(*image.size)
        image = cropped(image, place, 2 * size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if pixels.shape[1:] == (size, size):
        return pixels
    return F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0]


def cropped(image, box, side):
    """The box of a decoded image as RGB. What is LARGE is shrunk, to no less than `side` pixels.

    Band by band, so that a few times its memory are not needed.
    """
    left, top, right, bottom = box
    w, h = right - left, bottom - top
    factor = min(w, h) // side if w * h > LARGE else 1
    if factor <= 1:
        return rgb(image.crop(box))
    small = Image.new("RGB", (-(-w // factor), -(-h // factor)))
    for y in range(0, h, factor):
        band = image.crop((left, top + y, right, min(top + y + factor, bottom)))
        small.paste(rgb(band).reduce(factor), (0, y // factor))
    # The last column and row may be of fewer pixels.
    return small.resize(small.size, Image.BICUBIC, box=(0, 0, w / factor, h / factor))


def upright_size(image):
    """(W, H) that an open image has once it is turned upright."""
    return image.size[::-1] if turn(image) in ON_ITS_SIDE else image.size


def draft(image, size, box):
    """Let PIL decode a JPEG file smaller if that is enough for a box of it at size x size.

    An eighth, a quarter or half, where that is at least twice what is wanted.
    """
    left, top, right, bottom = box
    scale = 2 * size / min(right - left, bottom - top)
    image.draft(image.mode, [max(1, int(side * scale)) for side in image.size])


def scaled(box, whole, size):
    """A box of a whole image (W, H) in the pixels of the same decoded at `size`; not empty."""
    left, top, right, bottom = box
    x, y = size[0] / whole[0], size[1] / whole[1]       # 1, unless JPEG was decoded smaller
    left, top = min(round(left * x), size[0] - 1), min(round(top * y), size[1] - 1)
    return left, top, max(left + 1, round(right * x)), max(top + 1, round(bottom * y))


def central_square(W, H):
    """(left, top, right, bottom) of the largest central square."""
    side = min(W, H)
    left, top = (W - side) // 2, (H - side) // 2
    return left, top, left + side, top + side


def workers(processes=1):
    """Threads for decoding, a share of the CPUs; torch must not start as many again in each."""
    def one_thread():
        torch.set_num_threads(1)
    torch.get_num_threads()     # fixes this thread's own number, which would become 1 as well
    return ThreadPoolExecutor(max(1, THREADS // processes), initializer=one_thread)


def map_by_threads(function, items):
    """[function(item) of each item of a sequence], by threads.

    A task is a part of the items: one for each file would take more memory than its name does.
    """
    size = max(1, min(256, len(items) // (8 * THREADS)))

    def part(start):
        return [function(item) for item in items[start:start + size]]
    with workers() as pool:
        parts = pool.map(part, range(0, len(items), size))
        return [result for results in parts for result in results]


def read_all(files, size, exact=False):
    """Decode the central squares of all files by threads.

    Returns (uint8 (n,3,size,size) of the good ones, mask (N,) of them, problems).
    exact: an image that is not size x size is a problem.
    """
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)

    def read_one(i):
        """Fills images[i]; returns its problem or None."""
        path = files.paths[i]
        try:
            if exact:
                image = read_image(path, files.white)
                if image.size != (size, size):
                    return f"{shown(path)}: is {image.size[0]}x{image.size[1]}, not {size}x{size}"
                images[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            else:
                images[i] = read_square(path, size, white=files.white)
        except Exception as error:              # damaged files raise nearly anything
            return f"{shown(path)}: {reason(error)}"

    results = map_by_threads(read_one, range(len(files)))
    good = np.array([result is None for result in results], dtype=bool)
    if not good.all():
        kept = np.flatnonzero(good)
        for k, i in enumerate(kept):            # in place: there may be no memory for a copy
            images[k] = images[i]
        images = images[:len(kept)]
    return images, good, [result for result in results if result is not None]


# ---- Images that stay on disk --------------------------------------------------------------------

class Stream:
    """Images on disk, for sets that memory cannot hold; indexed like a tensor of them.

    stream[index]: central squares, uint8 (n,3,size,size) on `device`. For training see `batches`.
    A file that cannot be decoded although it looked whole becomes a gray image, with one line that
    names it: hours of training are worth more than one image. DataError if more than ten, and more
    than one in a hundred, can no longer be opened: a disk is gone.
    """

    def __init__(self, files, size, device="cpu", pool=None):
        self.files, self.size, self.device = files, size, torch.device(device)
        # In every step, beside those of the other processes that torchrun has started here.
        self.pool = pool or workers(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.failed, self.gone = set(), 0

    def __len__(self):
        return len(self.files)

    @property
    def shape(self):
        return torch.Size((len(self), 3, self.size, self.size))

    def to(self, device):
        return Stream(self.files, self.size, device, self.pool)

    def keep(self, chosen):
        """The same with only the images of an index array or a mask."""
        return Stream(self.files.keep(chosen), self.size, self.device, self.pool)

    def read(self, i, out, box=None, mirror=False):
        """Write image i to out (3,size,size)."""
        path = self.files.paths[i]
        try:
            pixels = read_square(path, self.size, box, self.files.white)
        except Exception as error:              # damaged files raise nearly anything
            if path not in self.failed:
                self.failed.add(path)
                print(f"{shown(path)} cannot be decoded ({reason(error)}); gray instead",
                      file=sys.stderr, flush=True)
                self.gone += getattr(error, "errno", None) is not None
                if self.gone > max(10, len(self) // 100):
                    raise DataError(f"{self.gone} images can no longer be read, such as "
                                    f"{shown(path)}; when the disk is there again, repeat the "
                                    "command, for training with --resume") from None
            pixels = torch.full((3, self.size, self.size), 128, dtype=torch.uint8)
        out.copy_(pixels.flip(2) if mirror else pixels)

    def __getitem__(self, index):
        if torch.is_tensor(index):
            numbers = index.tolist()
        else:
            numbers = range(*index.indices(len(self)))
        return self.finish(self.submit([(i,) for i in numbers]))

    def submit(self, draws):
        """Start to read a batch; draws: (i,) or (i, box, mirror) of each image.

        Returns (the batch to be, its readers).
        """
        batch = torch.empty(len(draws), 3, self.size, self.size, dtype=torch.uint8)
        readers = [self.pool.submit(self.read, i, out, *how)
                   for (i, *how), out in zip(draws, batch)]
        return batch, readers

    def finish(self, submitted):
        """Wait for a submitted batch and return it, on the device."""
        batch, readers = submitted
        for reader in readers:
            reader.result()
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        return batch

    def batches(self, steps, key=None, ahead=4):
        """(step, index (b,)) in -> (step, index, images (b,3,size,size)) out, decoded ahead.

        key: random boxes, mirrored or not, that depend on (*key, step) alone; None: the central
        squares. Up to `ahead` decoded batches are held.
        """
        waiting = deque()
        for step, index in steps:
            draws = [(i,) for i in index.tolist()]
            if key is not None:
                rng = np.random.default_rng([*key, step])
                draws = [(i, random_box(rng), rng.random() < 0.5) for (i,) in draws]
            waiting.append((step, index, self.submit(draws)))
            if len(waiting) > ahead:
                step, index, submitted = waiting.popleft()
                yield step, index, self.finish(submitted)
        for step, index, submitted in waiting:
            yield step, index, self.finish(submitted)


def random_box(rng, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """The box of a random resized crop as a function of (W, H); see augment.random_resized_crop.

    Its numbers are drawn from rng now, not when it is called.
    """
    shares = rng.uniform(*scale, 10).tolist()
    aspects = np.exp(rng.uniform(*np.log(ratio), 10)).tolist()
    x, y = rng.random(2).tolist()

    def box(W, H):
        for share, aspect in zip(shares, aspects):
            area = share * W * H
            w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 1 <= w <= W and 1 <= h <= H:
                left, top = int(x * (W - w + 1)), int(y * (H - h + 1))
                return left, top, left + w, top + h
        w = min(W, max(1, round(H * ratio[1])))         # the largest central box within `ratio`
        h = min(H, max(1, round(W / ratio[0])))
        left, top = (W - w) // 2, (H - h) // 2
        return left, top, left + w, top + h
    return box


def sides(files, limit=200):
    """Shorter sides in pixels, an array, of up to `limit` images spread over the files.

    Files that cannot be read are left out.
    """
    shorter_sides = []
    spread = np.linspace(0, len(files) - 1, min(limit, len(files))).astype(int)
    for path in files.paths[spread]:
        try:
            with opened(path) as image:
                shorter_sides.append(min(image.size))
        except Exception:                       # damaged files raise nearly anything
            continue
    return np.array(shorter_sides)
