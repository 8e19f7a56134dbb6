r"""Image files: find them, find what is wrong with them before training starts, decode them.

Two ways to say which image is of which class: folders, `root/<class>/**`, and lists, lines `relative/path label`. Both give a
`Files`: paths and labels in two arrays, so that a million images cost no million Python objects.

What people's folders hold, and what becomes of it:

    grayscale, palette, CMYK, YCbCr, 1 bit      converted to RGB                 transparent        laid on white
    16 bit                                      the upper 8 bits                 animated           the first frame
    EXIF orientation                            turned upright                   one pixel, odd shapes    resized like any other
    empty, truncated, no image, floating point, over 179 million pixels, cannot be read         listed as a problem
    links that lead in a circle                 followed once                    names that are not UTF-8      shown escaped

Decoding is C code that leaves Python's lock, so threads share the work: no worker processes, no copies between them.
"""
import hashlib
import os
import re
import sys
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff", ".gif")
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
warnings.simplefilter("ignore", Image.DecompressionBombWarning)           # twice its limit is an error, and a problem here
warnings.filterwarnings("ignore", module="PIL")                           # odd notes in a file, said without its path


class DataError(ValueError):
    """Something about the data that a person can put right; the message says what to do."""


@dataclass
class Files:
    """Images on disk, and what is wrong with them."""
    paths: np.ndarray                                                     # (N,) bytes, as the system knows them
    labels: np.ndarray                                                    # (N,) int64, into class_names
    class_names: list
    problems: list = field(default_factory=list)                          # a line of text each, with the path
    passed_over: Counter = field(default_factory=Counter)                 # endings of files that are not taken for images

    def __len__(self):
        return len(self.paths)

    def keep(self, chosen):
        """The same with only the images of an index array or a mask."""
        return Files(self.paths[chosen], self.labels[chosen], self.class_names, self.problems, self.passed_over)

    def names(self, root):
        """Paths below root, bytes (so that a folder may be moved)."""
        return [os.path.relpath(path, os.fsencode(root)) for path in self.paths]

    def fingerprint(self, root):
        """16 hexadecimal digits that change with any file's name, size or class."""
        found = hashlib.sha256()
        for name, path, label in zip(self.names(root), self.paths, self.labels):
            size = os.path.getsize(path) if os.path.exists(path) else -1
            found.update(name + f" {size} {self.class_names[label]}\n".encode())
        return found.hexdigest()[:16]

    def counts(self):
        """Images per class, (K,)."""
        return np.bincount(self.labels, minlength=len(self.class_names))


def shown(path):
    """A path, bytes or text, for people and files: what is not UTF-8 is escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def natural(name):
    """Sort key that puts class 2 before class 10; the name itself settles ties such as 1 and 01."""
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts], name


def refuse(problems, skip, said):
    """Raise DataError with the list of problems; with `skip` say them by said(text) and go on."""
    if not problems:
        return
    if len(problems) == 1 and not skip:
        raise DataError(f"{problems[0]}; mend it, or go on without it with --skip-bad")
    lines = [f"  {p}" for p in problems[:50]] + [f"  and {len(problems) - 50} more"] * (len(problems) > 50)
    text = f"{len(problems)} problem{'s' * (len(problems) > 1)} with the data:\n" + "\n".join(lines)
    if not skip:
        raise DataError(f"{text}\nMend them, or go on without them with --skip-bad")
    said(f"--skip-bad: going on without these.\n{text}")


# ---- Which files ---------------------------------------------------------------------------------------------------------

def list_folder(root):
    """`root/<class>/**` -> Files, classes and files in natural order; hidden files and other kinds of file are passed over.

    Raises DataError if there is no such folder or nothing in it. A class without images is kept, as a problem.
    """
    if not os.path.isdir(root):
        raise DataError(f"there is no folder {shown(root)}")
    classes = sorted((e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")), key=natural)
    if not classes:
        raise DataError(f"{shown(root)} has no class folders: images are expected as "
                        f"{shown(os.path.join(root, '<class>', '*.jpg'))}")
    paths, labels, problems, names, passed_over = [], [], [], [shown(c) for c in classes], Counter()
    where = [(s.st_dev, s.st_ino) for s in map(os.stat, [root, *(os.path.join(root, name) for name in classes)])]
    for k, name in enumerate(classes):
        outside = {place for place in where if place != where[1 + k]}
        found = sorted(walk(os.path.join(root, name), problems, passed_over, outside), key=natural)
        if not found:
            problems.append(f"class folder {shown(os.path.join(root, name))} has no images")
        paths += map(os.fsencode, found)
        labels += [k] * len(found)
    return Files(np.array(paths, dtype=np.bytes_), np.array(labels, dtype=np.int64), names, problems, passed_over)


def walk(folder, problems, passed_over, outside=frozenset()):
    """Paths of all image files below a folder; a folder that links lead to twice is entered once.

    outside: (device, inode) of folders that are a problem to come to: the root and the other classes. passed_over: a Counter
    of the other files' endings.
    """
    been, found, to_do = set(), [], [folder]
    while to_do:
        folder = to_do.pop()
        try:
            here = os.stat(folder)
            if (here.st_dev, here.st_ino) in outside:
                problems.append(f"{shown(folder)} is a link out of its class")
                continue
            if (here.st_dev, here.st_ino) in been:
                continue
            been.add((here.st_dev, here.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            problems.append(f"{shown(folder)}: {error.strerror}")
            continue
        for entry in entries:
            if os.path.isdir(entry.path) and not entry.name.startswith("."):   # False for a link to itself
                to_do.append(entry.path)
            elif entry.name.lower().endswith(IMAGE_FILES) and not entry.name.startswith("."):
                found.append(entry.path)
            elif not entry.name.startswith("."):
                passed_over[os.path.splitext(entry.name)[1].lower() or "without ending"] += 1
    return found


def list_file(path, root, num_classes):
    """Lines `relative/path label` -> Files, in the lines' order, paths under root; labels are numbers below num_classes.

    Lines that are none are problems; so are files listed twice. Raises DataError if the list cannot be read or is empty.
    """
    try:
        with open(path, "rb") as f:
            lines = f.read().splitlines()
    except OSError as error:
        raise DataError(f"cannot read the list {shown(path)}: {error.strerror}") from None
    paths, labels, problems, seen, folder = [], [], [], {}, os.path.join(os.fsencode(root), b"")
    for number, line in enumerate(lines, 1):
        words = line.rsplit(None, 1)
        if not words:
            continue
        if len(words) < 2 or not words[1].isdigit() or len(words[1]) > 9 or int(words[1]) >= num_classes:
            problems.append(f"{shown(path)}, line {number}: {shown(line[:80])!r} is not a path and a class from 0 to "
                            f"{num_classes - 1}")
            continue
        image = words[0].lstrip()
        if seen.setdefault(image, number) != number:
            problems.append(f"{shown(path)}, line {number}: {shown(image)} is listed in line {seen[image]} already")
            continue
        paths.append(folder + image)
        labels.append(int(words[1]))
    if not paths and not problems:
        raise DataError(f"the list {shown(path)} is empty: lines 'relative/path label' are expected")
    names = list(map(str, range(num_classes)))
    return Files(np.array(paths, dtype=np.bytes_), np.array(labels, dtype=np.int64), names, problems)


def hold_out(files, share, root):
    """Split a class at a time: (training, test) Files, by a hash of every file's name: the same for every run.

    A class gives round(share * n) of its n images to the test set, at least one, but never its last one to train on. With more
    images in the folder the others stay where they are, but for one or two of a class that its larger share takes.
    """
    rank = np.array([hashlib.sha256(name).hexdigest() for name in files.names(root)])
    test = np.zeros(len(files), dtype=bool)
    for k, n in enumerate(files.counts()):
        mine = np.where(files.labels == k)[0]
        test[mine[rank[mine].argsort()][:min(max(1, round(share * n)), n - 1)] if n > 1 else []] = True
    return files.keep(~test), files.keep(test)


# ---- What is wrong with them ---------------------------------------------------------------------------------------------

ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND"}                    # how whole JPEG and PNG files begin and end


def looks_whole(path):
    """Does a file begin and end as JPEG and PNG files do? A few microseconds; raises OSError if it cannot be read."""
    with open(path, "rb", buffering=0) as f:
        begin = f.read(4)
        end = next((end for start, end in ENDS.items() if begin.startswith(start)), None)
        if end is None:
            return False
        f.seek(max(0, os.fstat(f.fileno()).st_size - 64))
        return end in f.read(64)


def problem(path, thorough=False):
    """What is wrong with an image file, a line of text, or None. Not thorough: decoded only if it does not look whole."""
    try:
        if thorough or not looks_whole(path):
            read_image(path)
    except Image.UnidentifiedImageError:
        return f"{shown(path)}: {'no image that can be read' if os.path.getsize(path) else 'empty'}"
    except Image.DecompressionBombError:
        return f"{shown(path)}: has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels"
    except OSError as error:                                              # the system's, or PIL's for a truncated file
        return f"{shown(path)}: {error.strerror or error}"
    except Exception as error:                                            # damaged files raise nearly anything
        return f"{shown(path)}: {error or type(error).__name__}"


def check(files, thorough=False):
    """Look at every file, by threads: (mask of the good ones, problems)."""
    with workers() as pool:
        found = list(pool.map(lambda path: problem(path, thorough), files.paths, chunksize=256))
    return np.array([p is None for p in found], dtype=bool), [p for p in found if p is not None]


# ---- Decoding ------------------------------------------------------------------------------------------------------------

def upright(image):
    """A PIL image of any mode -> RGB, turned as its EXIF orientation says. Raises ValueError for floating-point pixels."""
    if image.mode == "F":
        raise ValueError("holds floating-point pixels; save it with 8 or 16 bits")
    if image.mode.startswith("I"):                                        # 16 bit: PIL's own conversion would clip it
        levels = np.asarray(image)
        image = Image.fromarray((levels >> 8 if levels.max() > 255 else levels).astype(np.uint8))
    image.load()
    ImageOps.exif_transpose(image, in_place=True)                         # without a copy where there is nothing to turn
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(path):
    """Decode a file -> PIL RGB image, upright. Raises OSError, ValueError or another error for what is no whole image."""
    with Image.open(path) as image:
        return upright(image)


def read_square(path, size, box=None):
    """Decode the largest central square of a file, or box(W, H), at size x size -> uint8 (3,size,size). Raises as read_image.

    box: a function of the upright image's size that gives (left, top, right, bottom) in pixels. JPEG files are decoded at an
    eighth, a quarter or half of their size where that is twice what is wanted; resizing is torch's, which is faster than
    PIL's and differs by rounding.
    """
    with Image.open(path) as image:
        W, H = image.size[::-1] if image.getexif().get(0x0112) in (5, 6, 7, 8) else image.size        # the sides are swapped
        left, top, right, bottom = (box or central_square)(W, H)
        enough = 2 * size / min(right - left, bottom - top)               # twice what is wanted, to be shrunk smoothly
        image.draft(image.mode, [max(1, int(side * enough)) for side in image.size])         # JPEG's; nothing for others
        image = upright(image)
    x, y = image.size[0] / W, image.size[1] / H                           # 1, or what of the size was decoded
    left, top = min(round(left * x), image.size[0] - 1), min(round(top * y), image.size[1] - 1)
    image = image.crop((left, top, max(left + 1, round(right * x)), max(top + 1, round(bottom * y))))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if pixels.shape[1:] == (size, size):
        return pixels
    return F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0]


def workers():
    """Threads for decoding; torch must not start as many again in each of them."""
    torch.get_num_threads()             # settles this thread's own number: not yet asked for, it would become 1 with theirs
    return ThreadPoolExecutor(THREADS, initializer=lambda: torch.set_num_threads(1))


def central_square(W, H):
    side = min(W, H)
    left, top = (W - side) // 2, (H - side) // 2
    return left, top, left + side, top + side


def read_all(files, size, exact=False):
    """Decode the files' central squares by threads -> (uint8 (n,3,size,size) of the good ones, mask (N,) of them, problems).

    exact: an image that is not size x size is a problem.
    """
    out, problems = torch.empty(len(files), 3, size, size, dtype=torch.uint8), [None] * len(files)

    def one(i):
        try:
            if not exact:
                out[i] = read_square(files.paths[i], size)
            elif (image := read_image(files.paths[i])).size == (size, size):
                out[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            else:
                problems[i] = f"{shown(files.paths[i])}: is {image.size[0]}x{image.size[1]}, not {size}x{size}"
        except Exception:                                                 # say it in words
            problems[i] = problem(files.paths[i], thorough=True) or f"{shown(files.paths[i])}: cannot be decoded"
    with workers() as pool:
        list(pool.map(one, range(len(files))))
    good = np.array([p is None for p in problems], dtype=bool)
    return out if good.all() else out[torch.from_numpy(good)], good, [p for p in problems if p is not None]


class Stream:
    """Images that stay on disk, for sets that memory cannot hold: `stream[index]` is what a tensor of them would give.

    Central squares, uint8 (n,3,size,size) on `device`. For training see `batches`. A file that cannot be decoded although it
    looked whole becomes a gray image, once with a line that names it: hours of training are worth more than it.
    """

    def __init__(self, files, size, device="cpu", pool=None):
        self.files, self.size, self.device = files, size, torch.device(device)
        self.pool, self.failed = pool or workers(), set()

    def __len__(self):
        return len(self.files)

    @property
    def shape(self):
        return torch.Size((len(self), 3, self.size, self.size))

    def to(self, device):
        return Stream(self.files, self.size, device, self.pool)

    def read(self, i, out, box=None, mirror=False):
        """Write one image to out (3,size,size)."""
        path = self.files.paths[i]
        try:
            pixels = read_square(path, self.size, box)
        except Exception as error:                                        # damaged files raise nearly anything
            if path not in self.failed:
                self.failed.add(path)
                print(f"{shown(path)} cannot be decoded ({error}); gray instead", file=sys.stderr, flush=True)
            pixels = torch.full((3, self.size, self.size), 128, dtype=torch.uint8)
        out.copy_(pixels.flip(2) if mirror else pixels)                   # here, by one thread: torch's many would spin

    def __getitem__(self, index):
        index = index.tolist() if torch.is_tensor(index) else range(*index.indices(len(self)))
        return self.done(self.submit([(i,) for i in index]))

    def submit(self, draws):
        """Begin to read images; draws: (number, and if wanted box, mirror) of each -> (the batch to be, its readers)."""
        batch = torch.empty(len(draws), 3, self.size, self.size, dtype=torch.uint8)
        return batch, [self.pool.submit(self.read, i, out, *how) for (i, *how), out in zip(draws, batch)]

    def done(self, submitted):
        """The batch that was submitted, whole, on the device."""
        batch, readers = submitted
        for reader in readers:
            reader.result()
        return batch.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else batch

    def batches(self, steps, key=None, ahead=4):
        """(step, index (b,)) in, (step, index, images (b,3,size,size)) out: random boxes, mirrored or not, decoded ahead.

        The boxes of a step follow from (*key, step) alone; without a key they are the central squares. A generator of this
        kind holds up to `ahead` decoded batches.
        """
        waiting = deque()
        for step, index in steps:
            rng = np.random.default_rng([*(key or ()), step])
            draws = [(i, random_box(rng), rng.random() < 0.5) if key else (i,) for i in index.tolist()]
            waiting.append((step, index, self.submit(draws)))
            if len(waiting) > ahead:
                step, index, submitted = waiting.popleft()
                yield step, index, self.done(submitted)
        for step, index, submitted in waiting:
            yield step, index, self.done(submitted)


def random_box(rng, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """The box of a random resized crop, as a function of (W, H); its numbers are drawn now. See augment.random_resized_crop."""
    areas, aspects, place = rng.uniform(*scale, 10), np.exp(rng.uniform(*np.log(ratio), 10)), rng.random(2)

    def box(W, H):
        for area, aspect in zip(areas * W * H, aspects):
            w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 1 <= w <= W and 1 <= h <= H:
                left, top = int(place[0] * (W - w + 1)), int(place[1] * (H - h + 1))
                break
        else:                                                             # the largest central box within the ratios
            w, h = min(W, max(1, round(H * ratio[1]))), min(H, max(1, round(W / ratio[0])))
            left, top = (W - w) // 2, (H - h) // 2
        return left, top, left + w, top + h
    return box


def sides(files, at_most=200):
    """Shorter side in pixels of (up to) so many images spread over the files, an array; unreadable ones are left out."""
    found = []
    for path in files.paths[np.linspace(0, len(files) - 1, min(at_most, len(files))).astype(int)]:
        try:
            with Image.open(path) as image:
                found.append(min(image.size))
        except Exception:                                                 # damaged files raise nearly anything
            continue
    return np.array(found)
