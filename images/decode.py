r"""Image files decoded, and what is wrong with them found before training starts.

    grayscale, palette, CMYK, YCbCr, 1 bit      converted to RGB
    transparent                                 laid on white
    16 bit                                      the upper 8 bits
    EXIF orientation                            turned upright
    animated                                    the first frame
    one pixel, odd shapes                       resized like any other
    empty, truncated, no image, floating point, more than 179 million pixels, not readable
                                                listed as a problem

Decoding is C code that releases Python's lock, so threads share the work: no worker processes, no
copies between them.
"""
import os
import sys
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from images.files import shown

THREADS = os.cpu_count() or 1
if hasattr(os, "sched_getaffinity"):
    THREADS = len(os.sched_getaffinity(0))      # the CPUs that this process may use

# Twice the limit of this warning is an error of PIL's, and a problem here.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module="PIL")         # remarks on a file, without its path


# ---- What is wrong with them ---------------------------------------------------------------------

ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND"}      # how JPEG and PNG files begin and end


def looks_whole(path):
    """Does it begin and end as JPEG and PNG files do? Microseconds; OSError if it is unreadable."""
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
            read_image(path)
    except Image.UnidentifiedImageError:
        reason = "no image that can be read" if os.path.getsize(path) else "empty"
    except Image.DecompressionBombError:
        reason = f"has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels"
    except OSError as error:                    # the system's, or PIL's for a truncated file
        reason = error.strerror or error
    except Exception as error:                  # damaged files raise nearly anything
        reason = str(error) or type(error).__name__
    else:
        return None
    return f"{shown(path)}: {reason}"


def check(files, thorough=False):
    """Look for problems in all files, by threads: (mask of the good ones, problems)."""
    def check_one(path):
        return problem(path, thorough)
    with workers() as pool:
        results = list(pool.map(check_one, files.paths))
    good = np.array([result is None for result in results], dtype=bool)
    return good, [result for result in results if result is not None]


# ---- Decoding ------------------------------------------------------------------------------------

def upright(image):
    """A PIL image of any mode -> RGB, turned as its EXIF orientation says.

    ValueError for floating-point pixels.
    """
    if image.mode == "F":
        raise ValueError("holds floating-point pixels; save it with 8 or 16 bits")
    if image.mode.startswith("I"):              # 16 bit: PIL's own conversion would clip it
        pixels = np.asarray(image)
        if pixels.max() > 255:
            pixels = pixels >> 8
        image = Image.fromarray(pixels.astype(np.uint8))
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if transparent:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(path):
    """Decode a file -> PIL RGB image, upright. OSError, ValueError or another for damaged files."""
    with Image.open(path) as image:
        return upright(image)


def read_square(path, size, box=None):
    """Decode the largest central square of a file, or a box, at size x size -> uint8 (3,size,size).

    box: function of the upright image's (W, H) that returns (left, top, right, bottom) in pixels.
    JPEG files are decoded at an eighth, a quarter or half of their size where that is at least
    twice what is wanted. torch resizes, faster than PIL and equal but for rounding. Raises as
    read_image does.
    """
    with Image.open(path) as image:
        W, H = image.size
        if image.getexif().get(0x0112) in (5, 6, 7, 8):         # EXIF: it lies on its side
            W, H = H, W
        left, top, right, bottom = (box or central_square)(W, H)
        scale = 2 * size / min(right - left, bottom - top)
        image.draft(image.mode, [max(1, int(side * scale)) for side in image.size])     # JPEG only
        image = upright(image)
    w, h = image.size
    x, y = w / W, h / H                                         # 1, unless JPEG was decoded smaller
    left, top = min(round(left * x), w - 1), min(round(top * y), h - 1)
    right, bottom = max(left + 1, round(right * x)), max(top + 1, round(bottom * y))
    image = image.crop((left, top, right, bottom))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if pixels.shape[1:] == (size, size):
        return pixels
    return F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0]


def central_square(W, H):
    """(left, top, right, bottom) of the largest central square."""
    side = min(W, H)
    left, top = (W - side) // 2, (H - side) // 2
    return left, top, left + side, top + side


def workers():
    """Threads for decoding; torch must not start as many again in each of them."""
    def one_thread():
        torch.set_num_threads(1)
    torch.get_num_threads()     # fixes this thread's own number, which would become 1 as well
    return ThreadPoolExecutor(THREADS, initializer=one_thread)


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
                image = read_image(path)
                if image.size != (size, size):
                    return f"{shown(path)}: is {image.size[0]}x{image.size[1]}, not {size}x{size}"
                images[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            else:
                images[i] = read_square(path, size)
        except Exception:                       # damaged files raise nearly anything
            return problem(path, thorough=True) or f"{shown(path)}: cannot be decoded"

    with workers() as pool:
        results = list(pool.map(read_one, range(len(files))))
    good = np.array([result is None for result in results], dtype=bool)
    if not good.all():
        images = images[torch.from_numpy(good)]
    return images, good, [result for result in results if result is not None]


# ---- Images that stay on disk --------------------------------------------------------------------

class Stream:
    """Images on disk, for sets that memory cannot hold; indexed like a tensor of them.

    stream[index]: central squares, uint8 (n,3,size,size) on `device`. For training see `batches`.
    A file that cannot be decoded although it looked whole becomes a gray image, with one line that
    names it: hours of training are worth more than one image.
    """

    def __init__(self, files, size, device="cpu", pool=None):
        self.files, self.size, self.device = files, size, torch.device(device)
        self.pool = pool or workers()
        self.failed = set()

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
            pixels = read_square(path, self.size, box)
        except Exception as error:              # damaged files raise nearly anything
            if path not in self.failed:
                self.failed.add(path)
                print(f"{shown(path)} cannot be decoded ({error}); gray instead", file=sys.stderr,
                      flush=True)
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
    areas = rng.uniform(*scale, 10)
    aspects = np.exp(rng.uniform(*np.log(ratio), 10))
    x, y = rng.random(2)

    def box(W, H):
        for area, aspect in zip(areas * W * H, aspects):
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
            with Image.open(path) as image:
                shorter_sides.append(min(image.size))
        except Exception:                       # damaged files raise nearly anything
            continue
    return np.array(shorter_sides)
