r"""Long-tailed data: few common classes, many rare ones, and a balanced test set.

    n_k = floor(n_max * imb^(-k / (K - 1))),  k = 0..K-1                   (1)    imb = n_max / n_min

Class-balanced loss (1901.05555) and LDAM (1906.07413) made CIFAR long-tailed so, and everyone since. The published code calls
the inverse, 0.01, the imbalance factor; here it is `imb = 100`. The "step" variant keeps n_max for the first half of the
classes and n_max / imb for the rest. Counts at imb = 100:

    CIFAR-10   5000 2997 1796 1077 645 387 232 139 83 50     total 12,406
    CIFAR-100   500  477  455  434 ...  5   5   5   5        total 10,847

Which images: of class k, the first n_k after one shuffle with NumPy's legacy generator seeded 0, class after class. That picks
the same images as the published code, the same for every run seed, and the set for imb = 100 lies inside that for imb = 50.

Groups: CIFAR-10 head/mid/tail = classes 0-2 / 3-6 / 7-9, CIFAR-100 0-35 / 36-70 / 71-99 (the published splits).
Inside the project classes are numbered by descending training count; `class_names` keeps what people call them.

Everything here fits in memory: uint8 (N,3,H,W) tensors, moved to the training device once, cut into batches by index tensors.
An epoch's order depends only on (seed, epoch), so any process can work out any step of any epoch.
"""
import os
import re
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

PUBLISHED_GROUPS = {  # classes in head, mid, tail
    "cifar10": (3, 4, 3), "cifar100": (36, 35, 29), "shapes": (3, 4, 3),
}
DATASETS = ("cifar10", "cifar100", "shapes")
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff")


class DataError(ValueError):
    """Something about the data that a person can put right; the message says what to do."""


# ---- Which images --------------------------------------------------------------------------------------------------------

def long_tailed_counts(n_max, num_classes, imb=100, kind="exp"):
    """Training images per class, a list of K ints: equation (1) for kind "exp", two levels for "step".

    n_max: images of the largest class; imb >= 1, where 1 is balanced. Raises DataError for other values.
    """
    if not imb >= 1:                                                      # also catches NaN
        raise DataError(f"the imbalance factor (--imb) is n_max / n_min and must be at least 1, not {imb:g}")
    f = 1 / imb
    if kind == "exp":
        counts = [int(n_max * f ** (k / max(num_classes - 1, 1))) for k in range(num_classes)]        # (1)
    elif kind == "step":
        half = num_classes // 2
        counts = [int(n_max)] * half + [int(n_max * f)] * (num_classes - half)
    else:
        raise DataError(f"the kind of imbalance must be exp or step, not {kind!r}")
    if min(counts) == 0:
        raise DataError(f"imbalance {imb:g} leaves class {counts.index(0)} without a training image; lower --imb")
    return counts


def long_tailed_indices(labels, counts):
    """Positions of the images to keep: for each class in turn, the first counts[k] of its shuffled positions.

    labels: array (N,). The private RandomState(0) gives the published selection and leaves NumPy's global generator alone.
    Raises DataError if a class has fewer images than asked for.
    """
    labels, rng, kept = np.asarray(labels), np.random.RandomState(0), []
    for k, n in enumerate(counts):
        positions = np.where(labels == k)[0]
        if len(positions) < n:
            raise DataError(f"class {k} has {len(positions)} images, {n} are needed")
        rng.shuffle(positions)
        kept.append(positions[:n])
    return np.concatenate(kept)


def head_mid_tail(dataset, counts):
    """Groups of class numbers, {"head": [...], "mid": [...], "tail": [...]}, for classes in order of descending count.

    The published split where `dataset` has one for this many classes, else by training images: head > 100, mid 20..100,
    tail < 20 (a group may be empty).
    """
    sizes = PUBLISHED_GROUPS.get(dataset, ())
    if sum(sizes) != len(counts):
        head, tail = sum(n > 100 for n in counts), sum(n < 20 for n in counts)
        sizes = (head, len(counts) - head - tail, tail)
    a, b = sizes[0], sizes[0] + sizes[1]
    classes = list(range(len(counts)))
    return {"head": classes[:a], "mid": classes[a:b], "tail": classes[b:]}


# ---- Order of an epoch ---------------------------------------------------------------------------------------------------

def epoch_generator(seed, epoch):
    """A generator that depends on (seed, epoch) alone."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1))


def shuffled(n, seed, epoch):
    """Every image once: a permutation of 0..n-1, LongTensor (n,)."""
    return torch.randperm(n, generator=epoch_generator(seed, epoch))


def repeated_augmentation(n, seed, epoch, repeats=3):
    """DeiT's repeated augmentation (arXiv 1901.09335): each image `repeats` times in a row, about n/repeats images an epoch.

    The permutation with every entry repeated, cut to the largest multiple of 256 below n (to n if n < 256, where the
    published sampler is empty). On CIFAR-10-LT an epoch is thus 12,288 samples of 4,096 images. LongTensor.
    """
    kept = n // 256 * 256 if n >= 256 else n
    return shuffled(n, seed, epoch).repeat_interleave(repeats)[:kept]


def class_balanced(labels, seed, epoch):
    """As many draws as there are images, with replacement: a class uniformly, then an image of it. LongTensor (N,)."""
    labels = torch.as_tensor(labels, device="cpu")
    weight = 1 / torch.bincount(labels).double()[labels]
    return torch.multinomial(weight, len(labels), replacement=True, generator=epoch_generator(seed, epoch))


def steps_per_epoch(n, batch):
    """Batches of at most `batch` samples that n samples make."""
    return -(-n // batch)


def shard(order, batch, rank=0, world=1):
    """Cut an epoch's order into global batches and give this process its part of each: a list of LongTensors.

    Batches differ by at most one image (no tiny last one), processes share each batch without overlap, and together they see
    exactly the images that one process would: order (n,) -> steps_per_epoch(n, batch) tensors of about batch / world.
    Raises DataError if that leaves a process without an image.
    """
    if len(order) // steps_per_epoch(len(order), batch) < world:
        raise DataError(f"a batch of {batch} is too small for {world} processes")
    return [part[rank::world] for part in torch.tensor_split(order, steps_per_epoch(len(order), batch))]


# ---- The built-in set ----------------------------------------------------------------------------------------------------

SHAPES_MAX, SHAPES_TEST = 1000, 100  # training images of the largest class at any imb; test images per class


def bar(u, v, half_width, half_height):
    return np.minimum(half_width - np.abs(u), half_height - np.abs(v))


def polygon(u, v, n):
    theta = np.arctan2(u, -v) % (2 * np.pi / n) - np.pi / n               # angle from the middle of the nearest side
    return np.cos(np.pi / n) - np.hypot(u, v) * np.cos(theta)


def star(u, v, points=5, inner=0.45):
    theta = np.abs((np.arctan2(u, -v) + np.pi / points) % (2 * np.pi / points) - np.pi / points)
    x, y = np.hypot(u, v) * np.cos(theta), np.hypot(u, v) * np.sin(theta)
    tip, notch = np.array([1.0, 0.0]), inner * np.array([np.cos(np.pi / points), np.sin(np.pi / points)])
    edge = notch - tip
    return -(edge[0] * (tip[1] - y) - (tip[0] - x) * edge[1]) / np.hypot(*edge)


# Class name -> how far point (u, v) lies inside the shape (negative outside); shapes fill about the unit circle, v points down.
# The order is that of the training counts: "disc" is the most common class, "arrow" the rarest.
SHAPES = {
    "disc": lambda u, v: 0.9 - np.hypot(u, v),
    "square": lambda u, v: bar(u, v, 0.78, 0.78),
    "triangle": lambda u, v: polygon(u, v, 3),
    "cross": lambda u, v: np.maximum(bar(u, v, 0.3, 0.95), bar(u, v, 0.95, 0.3)),
    "ring": lambda u, v: 0.2 - np.abs(np.hypot(u, v) - 0.72),
    "star": lambda u, v: star(u, v),
    "crescent": lambda u, v: np.minimum(0.95 - np.hypot(u, v), np.hypot(u - 0.45, v) - 0.75),
    "hourglass": lambda u, v: np.minimum(0.9 - np.abs(v), 0.15 + 0.75 * np.abs(v) - np.abs(u)),
    "tee": lambda u, v: np.maximum(bar(u, v + 0.65, 0.85, 0.27), bar(u, v - 0.15, 0.27, 0.8)),
    "arrow": lambda u, v: np.maximum(bar(u, v - 0.4, 0.22, 0.55), polygon(u / 0.85, (v + 0.35) / 0.65, 3) * 0.65),
}


def paint(image, inside, color):
    """Lay `color` over (H,W,3) where `inside` (H,W), the distance inside the edge in pixels, is positive; soft edges."""
    cover = np.clip(inside + 0.5, 0, 1)[..., None]
    return image * (1 - cover) + color * cover


def turned(x, y, angle):
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def draw_one(inside, rng, size):
    """One image (3,size,size), uint8, of the shape that `inside` describes."""
    y, x = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5, indexing="ij")
    color, (left, right) = rng.uniform(0.5, 1, 3), rng.uniform(0, 0.5, (2, 3))       # bright on dark, any hue
    along, _ = turned(x - size / 2, y - size / 2, rng.uniform(0, 2 * np.pi))
    mix = np.clip(along / size + 0.5, 0, 1)[..., None]
    image = left * (1 - mix) + right * mix

    def blob(image):
        dx, dy = turned(x - rng.uniform(0, size), y - rng.uniform(0, size), rng.uniform(0, np.pi))
        return paint(image, rng.uniform(1, 3) - np.hypot(dx, dy / rng.uniform(0.3, 1)), rng.random(3))

    for _ in range(4):
        image = blob(image)
    radius = size * rng.uniform(0.28, 0.42)
    cx, cy = rng.uniform(0.9 * radius, size - 0.9 * radius, 2)
    u, v = turned((x - cx) / radius, (y - cy) / radius, np.deg2rad(rng.uniform(-30, 30)))
    image = paint(image, inside(u, v) * radius, color)
    image = blob(image)                                                   # the last blob may cover a part of the shape
    image = image + rng.normal(0, 0.06, image.shape)
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8).transpose(2, 0, 1)


def draw_shapes(counts, split, size=32):
    """Draw counts[k] images of shape k -> (uint8 (N,3,size,size), labels (N,)). The same call gives the same images.

    A bright shape of random place, size, tilt and colour lies on a dark background of two colours, among five blobs of any
    colour, under noise. split 0 (training) and 1 (test) draw from different streams, and a class's first images are the
    same whatever its count.
    """
    images, labels = [], []
    for k, (n, inside) in enumerate(zip(counts, SHAPES.values())):
        rng = np.random.default_rng([split, k])
        drawn = [draw_one(inside, rng, size) for _ in range(n)]
        images.append(np.stack(drawn))
        labels.append(np.full(n, k))
    return torch.from_numpy(np.concatenate(images)), np.concatenate(labels)


# ---- Loading -------------------------------------------------------------------------------------------------------------

@dataclass
class LongTailData:
    """A data set in memory. Images uint8 (N,3,H,W), labels int64 (N,), classes in order of descending training count."""
    name: str                   # what --dataset was
    label: str                  # what to call it in a table
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    class_names: list
    counts: list                # training images per class
    groups: dict                # {"head": [class numbers], "mid": ..., "tail": ...}
    class_ids: list = None      # the data set's own number of each class; None: the same as here

    def __post_init__(self):
        if self.class_ids is None:
            self.class_ids = list(range(self.num_classes))

    @property
    def num_classes(self):
        return len(self.counts)

    def to(self, device):
        """The same data with its four tensors on `device`."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{n: getattr(self, n).to(device) for n in names})


def natural(name):
    """Sort key that puts class 2 before class 10; the name itself settles ties such as 1 and 01."""
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts], name


def list_image_folder(folder):
    """`folder/<class>/*` -> (class names, one sorted list of file paths per class). Raises DataError for a missing one."""
    if not os.path.isdir(folder):
        raise DataError(f"there is no folder {folder}")
    names = sorted((e.name for e in os.scandir(folder) if e.is_dir()), key=natural)
    if not names:
        raise DataError(f"{folder} has no class folders: images are expected as {os.path.join(folder, '<class>', '*.jpg')}")
    files = []
    for name in names:
        inside = os.listdir(os.path.join(folder, name))
        images = sorted((f for f in inside if f.lower().endswith(IMAGE_FILES)), key=natural)
        if not images:
            raise DataError(f"class folder {os.path.join(folder, name)} has no images: remove it or fill it")
        files.append([os.path.join(folder, name, f) for f in images])
    return names, files


def read_images(paths, size):
    """Image files -> uint8 (N,3,size,size). Raises DataError naming the file that cannot be read or has another size."""
    out = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    for i, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except Exception as error:                                        # PIL raises many kinds for damaged files
            raise DataError(f"cannot read image {path}: {error}") from None
        if pixels.shape != (size, size, 3):
            raise DataError(f"image {path} is {pixels.shape[1]}x{pixels.shape[0]}, not {size}x{size}")
        out[i] = pixels
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


def load_cifar_folder(root, num_classes, imb, kind):
    """CIFAR as `root/train/<class>/*` and `root/test/<class>/*`, files in the original order within each class.

    The selection needs only the order within a class, so it is the published one. Only the chosen files are decoded.
    """
    splits = []
    for split in ("train", "test"):
        names, files = list_image_folder(os.path.join(root, split))
        if len(names) != num_classes:
            raise DataError(f"{os.path.join(root, split)} has {len(names)} class folders, {num_classes} are expected")
        splits.append((names, files))
    (names, train), (test_names, test) = splits
    if names != test_names:
        odd = sorted(set(names) ^ set(test_names), key=natural)
        raise DataError(f"train and test under {root} have different classes: {', '.join(odd[:5])}")
    counts = long_tailed_counts(sum(map(len, train)) / num_classes, num_classes, imb, kind)
    train_files = [f for files in train for f in files]
    train_labels = np.repeat(np.arange(num_classes), [len(f) for f in train])
    kept = long_tailed_indices(train_labels, counts)
    test_labels = np.repeat(np.arange(num_classes), [len(f) for f in test])
    return (read_images([train_files[i] for i in kept], 32), train_labels[kept],
            read_images([f for files in test for f in files], 32), test_labels, names, counts,
            train_files[0].lower().endswith((".jpg", ".jpeg")))


def load_cifar_torchvision(root, num_classes, imb, kind):
    """CIFAR from torchvision's folder under `root`, downloaded there if it is missing. Raises DataError if that fails."""
    from torchvision import datasets
    was_there = os.path.isdir(root)
    cls = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[num_classes]
    try:
        train, test = (cls(root, train=t, download=True) for t in (True, False))
    except Exception as error:                                            # no network, no space, a damaged archive
        if not was_there and os.path.isdir(root) and not os.listdir(root):
            os.rmdir(root)                                                # torchvision makes it before it tries
        raise DataError(f"CIFAR-{num_classes} is not under {root} and could not be downloaded ({error}); put torchvision's "
                        f"folder or train/<class>/*, test/<class>/* there, or name its place with --data-dir") from None
    counts = long_tailed_counts(len(train.targets) / num_classes, num_classes, imb, kind)
    kept = long_tailed_indices(train.targets, counts)
    to_tensor = lambda a: torch.from_numpy(np.ascontiguousarray(a)).permute(0, 3, 1, 2).contiguous()
    return (to_tensor(train.data[kept]), np.asarray(train.targets)[kept], to_tensor(test.data), np.asarray(test.targets),
            train.classes, counts, False)


def load_data(dataset, imb=100, kind="exp", data_dir="data"):
    """Load one of "shapes", "cifar10", "cifar100" with long-tailed training counts -> LongTailData on the CPU.

    data_dir (CIFAR): torchvision's folder (downloaded into if empty), or a folder with train/<class>/* and test/<class>/*.
    Raises DataError with a line that says what to do.
    """
    if dataset == "shapes":
        counts = long_tailed_counts(SHAPES_MAX, len(SHAPES), imb, kind)
        test_counts = [SHAPES_TEST] * len(SHAPES)
        train, test = draw_shapes(counts, split=0), draw_shapes(test_counts, split=1)
        arrays, label = (*train, *test, list(SHAPES), counts), "shapes"
    elif dataset in ("cifar10", "cifar100"):
        num_classes = int(dataset[5:])
        load = load_cifar_folder if os.path.isdir(os.path.join(data_dir, "train")) else load_cifar_torchvision
        *arrays, jpeg = load(data_dir, num_classes, imb, kind)
        label = f"CIFAR-{num_classes}" + (" (JPEG copy)" if jpeg else "")
    else:
        raise DataError(f"unknown data set {dataset!r}: choose shapes, cifar10 or cifar100")
    x, y, test_x, test_y, names, counts = arrays
    return LongTailData(dataset, label, x, torch.as_tensor(y).long(), test_x, torch.as_tensor(test_y).long(), list(names),
                        list(counts), head_mid_tail(dataset, counts))
