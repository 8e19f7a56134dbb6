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

Your own folder of images ("folder") and the two large sets ("imagenet_lt", "inat18") are as imbalanced as they are; their
classes are put into order of count, ties in the data's own order, and `class_ids` keeps the data's own numbers.

What fits in memory is held there as uint8 (N,3,H,W) tensors, moved to the training device once and cut into batches by index
tensors; the large sets stay on disk (image_files.Stream). An epoch's order depends only on (seed, epoch), so any process can
work out any step of any epoch.
"""
import functools
import os
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

from image_files import DataError, Stream, check, hold_out, list_file, list_folder, natural, read_all, refuse, shown, sides

PUBLISHED_GROUPS = {  # classes in head, mid, tail
    "cifar10": (3, 4, 3), "cifar100": (36, 35, 29), "shapes": (3, 4, 3), "imagenet_lt": (390, 445, 165),
    "inat18": (842, 3701, 3599),
}
LISTS = {"imagenet_lt": ("ImageNet-LT", 1000), "inat18": ("iNaturalist 2018", 8142)}
DATASETS = ("cifar10", "cifar100", "shapes", "folder", *LISTS)


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
    """A data set. Images uint8 (N,3,H,W), labels int64 (N,), classes in order of descending training count."""
    name: str                   # what --dataset was
    label: str                  # what to call it in a table
    train_images: torch.Tensor  # or a Stream, which is indexed alike
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    class_names: list
    counts: list                # training images per class
    groups: dict                # {"head": [class numbers], "mid": ..., "tail": ...}
    class_ids: list = None      # the data set's own number of each class; None: the same as here
    fingerprint: str = ""       # of the names and sizes of all files, or of the numbers of images

    def __post_init__(self):
        if self.class_ids is None:
            self.class_ids = list(range(self.num_classes))

    @property
    def num_classes(self):
        return len(self.counts)

    @property
    def imb(self):
        """n_max / n_min as it is."""
        return max(self.counts) / min(self.counts)

    def to(self, device):
        """The same data with its images and labels on `device`."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{n: getattr(self, n).to(device) for n in names})

    def batches(self, steps, key):
        """(step, index (b,)) in -> (step, images (b,3,H,W), labels (b,)) out, on the device.

        Of LISTS random boxes that follow from (*key, step); else the images as they are, in memory or on disk.
        """
        streamed, key = isinstance(self.train_images, Stream), key if self.name in LISTS else None
        for step, index, *images in (self.train_images.batches(steps, key) if streamed else steps):
            index = index.to(self.train_labels.device, non_blocking=True)
            yield step, images[0] if streamed else self.train_images[index], self.train_labels[index]


def by_count(counts):
    """The data's own class numbers in order of descending count; ties in their own order."""
    return np.argsort(-np.asarray(counts), kind="stable")


def set_aside(labels, share):
    """(kept, held): numbers of the images to train on, and of the last `share` of each class, class by class."""
    classes = [np.where(labels == k)[0] for k in range(max(labels) + 1)]
    held = np.concatenate([members[round((1 - share) * len(members)):] for members in classes])
    return np.setdiff1d(np.arange(len(labels)), held), held


def cifar_folder(root, num_classes, imb, kind, holdout, skip_bad, say):
    """CIFAR as `root/train/<class>/*` and `root/test/<class>/*`, files in the original order within each class.

    The selection needs only the order within a class, so it is the published one. Only the chosen files are decoded.
    With holdout, that share of each class's training images is the test set, and the long tail is cut from the others.
    """
    train, test = (list_folder(os.path.join(root, split)) for split in ("train", "test"))
    for files, split in ((train, "train"), (test, "test")):
        if len(files.class_names) != num_classes:
            raise DataError(f"{os.path.join(root, split)} has {len(files.class_names)} class folders, {num_classes} are "
                            "expected")
    if train.class_names != test.class_names:
        odd = sorted(set(train.class_names) ^ set(test.class_names), key=natural)
        raise DataError(f"train and test under {root} have different classes: {', '.join(odd[:5])}")
    if not skip_bad:
        refuse(train.problems + test.problems, False, say)
    if holdout:
        kept, held = set_aside(train.labels, holdout)
        train, test = train.keep(kept), train.keep(held)
    kept = long_tailed_indices(train.labels, long_tailed_counts(len(train) / num_classes, num_classes, imb, kind))
    jpeg = train.paths[0].lower().endswith((b".jpg", b".jpeg"))
    return train.keep(kept), test, f"CIFAR-{num_classes}" + " (JPEG copy)" * jpeg + " validation" * bool(holdout)


def cifar_torchvision(root, num_classes, imb, kind, holdout):
    """CIFAR from torchvision's folder under `root`, downloaded there if it is missing. Raises DataError if that fails.

    holdout: see cifar_folder. Returns (images, labels) of training and of test, class names.
    """
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
    (x, y), (test_x, test_y) = ((split.data, np.asarray(split.targets)) for split in (train, test))
    if holdout:
        others, held = set_aside(y, holdout)
        x, y, test_x, test_y = x[others], y[others], x[held], y[held]
    kept = long_tailed_indices(y, long_tailed_counts(len(y) / num_classes, num_classes, imb, kind))
    to_tensor = lambda a: torch.from_numpy(np.ascontiguousarray(a)).permute(0, 3, 1, 2).contiguous()
    return (to_tensor(x[kept]), y[kept]), (to_tensor(test_x), test_y), train.classes


def own_folder(root, imb, kind, holdout):
    """Files of training and of test: `root/train` and `root/test` (or `val`), or one folder of classes and `holdout`.

    imb: None, or the imbalance to make by leaving images out. Raises DataError if there is nothing to test on.
    """
    inside = lambda name: os.path.join(root, name)
    split = next((name for name in ("test", "val") if os.path.isdir(inside(name))), None)
    root_train = inside("train") if os.path.isdir(inside("train")) else root
    train = list_folder(root_train)
    if holdout and split and root_train != root:
        raise DataError(f"{shown(root)} has images to test on in {split}/: leave --holdout out")
    if holdout:
        train, test = hold_out(train, holdout, root_train)
        test = replace(test, problems=[], passed_over=Counter())          # training's are the same
    elif split and root_train != root:
        test = list_folder(inside(split))
        known = {name: k for k, name in enumerate(train.class_names)}
        test.problems += [f"class {name} of {shown(inside(split))} is not in {shown(root_train)}"
                          for name in test.class_names if name not in known]
        number = np.array([known.get(name, -1) for name in test.class_names])
        test = replace(test, labels=number[test.labels], class_names=train.class_names).keep(number[test.labels] >= 0)
    else:
        raise DataError(f"{shown(root)} has no images to test on: put some into train/<class>/ and some into test/<class>/ (or "
                        "val/), or keep a part of each class for that with --holdout 0.2")
    if imb is not None:
        order = by_count(train.counts())
        most = long_tailed_counts(train.counts().max(), len(order), imb, kind)
        counts = train.counts()
        counts[order] = np.minimum(counts[order], most)
        train = train.keep(np.sort(long_tailed_indices(train.labels, counts)))
    return train, test


@dataclass
class Survey:
    """What a folder of one's own holds, before it is read: training images, classes, median of the images' shorter sides."""
    images: int
    classes: int
    side: int


@functools.cache
def survey(root, imb, kind, holdout):
    """Survey of a folder, see own_folder. Raises DataError if there is no image in it that can be read."""
    train, _ = own_folder(root, imb, kind, holdout)
    found = sides(train)
    if not len(found):
        raise DataError(f"{shown(root)} has no image that can be read")
    return Survey(len(train), int((train.counts() > 0).sum()), int(np.median(found)))


def listed_set(dataset, root, lists):
    """Files of training and of test by two list files; `lists`: their paths, None for the published names under root."""
    paths = [path or os.path.join(root, name) for path, name in zip(lists, LIST_NAMES[dataset])]
    train, test = (list_file(path, root, LISTS[dataset][1]) for path in paths)
    if missing := np.where(train.counts() == 0)[0].tolist():
        train.problems.append(f"{shown(paths[0])} has no image of {len(missing)} classes: {str(missing[:10])[1:-1]}"
                              + ", ..." * (len(missing) > 10))
    return train, test


LIST_NAMES = {"imagenet_lt": ("ImageNet_LT_train.txt", "ImageNet_LT_test.txt"),
              "inat18": ("iNaturalist18_train.txt", "iNaturalist18_val.txt")}


def load_data(dataset, imb=None, kind="exp", data_dir="data", size=32, test_size=None, holdout=None, lists=(None, None),
              skip_bad=False, say=print, room=None):
    """Load one of DATASETS -> LongTailData on the CPU.

    imb: n_max / n_min, default 100 for CIFAR and shapes, and for "folder" what it is. data_dir: for CIFAR torchvision's folder
    (downloaded into if empty) or one with train/<class>/* and test/<class>/*; for "folder" see own_folder, for the large sets
    listed_set. size, test_size: side of the squares that "folder" and the large sets are cut to, for training and for tests.
    room: bytes that all images of a "folder" may take, or they stay on disk, as the large sets' do (default: memory()'s 40 %).
    Bad files are refused together, before anything else is done with them, or with skip_bad left out and said by say(text).
    Raises DataError with a text that says what to do.
    """
    imb = 100 if imb is None and dataset in ("shapes", "cifar10", "cifar100") else imb
    num_classes, label = int(dataset[5:]) if dataset.startswith("cifar") else None, dataset
    if dataset == "shapes":
        counts = long_tailed_counts(SHAPES_MAX, len(SHAPES), imb, kind)
        return in_order(dataset, label, draw_shapes(counts, split=0), draw_shapes([SHAPES_TEST] * len(SHAPES), split=1), SHAPES)
    if num_classes and not os.path.isdir(os.path.join(data_dir, "train")):
        label = f"CIFAR-{num_classes}" + " validation" * bool(holdout)
        return in_order(dataset, label, *cifar_torchvision(data_dir, num_classes, imb, kind, holdout))
    if num_classes:
        train, test, label = cifar_folder(data_dir, num_classes, imb, kind, holdout, skip_bad, say)
        size = test_size = 32
    elif dataset == "folder":
        label = shown(os.path.basename(os.path.abspath(data_dir)))
        train, test = own_folder(data_dir, imb, kind, holdout)
    elif dataset in LISTS:
        label = LISTS[dataset][0]
        train, test = listed_set(dataset, data_dir, lists)
    else:
        raise DataError(f"unknown data set {dataset!r}: choose one of {', '.join(DATASETS)}")
    both, problems = [], train.problems + test.problems
    if others := ", ".join(f"{n} {ending}" for ending, n in sorted((train.passed_over + test.passed_over).items())):
        say(f"Passed over, not taken for images: {others}")
    needed = 3 * (len(train) * size ** 2 + len(test) * (test_size or size) ** 2)
    for files, side in ((train, size), (test, test_size or size)):
        if dataset in LISTS or needed > (0.4 * memory() if room is None else room):
            good, bad = check(files, thorough=dataset not in LISTS)
            images = Stream(files.keep(good), side)
        else:
            images, good, bad = read_all(files, side, exact=num_classes is not None)
        both.append((images, files.labels[good]))
        problems += bad
    refuse(problems, skip_bad, say)
    return in_order(dataset, label, *both, train.class_names, train.fingerprint(data_dir) + test.fingerprint(data_dir))


def memory():
    """Bytes of memory of this machine, or of the container that this is; where that cannot be asked, 16 GiB."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        machine = 2 ** 34
    try:
        with open("/sys/fs/cgroup/memory.max") as limit:
            return min(machine, int(limit.read()))
    except (ValueError, OSError):                                         # "max", or no such file
        return machine


def in_order(dataset, label, train, test, class_names, fingerprint=""):
    """(images, labels) of training and of test -> LongTailData, classes by descending count, those without images left out."""
    (x, y), (test_x, test_y) = train, test
    y, test_y, names = np.asarray(y), np.asarray(test_y), list(class_names)
    counts = np.bincount(y, minlength=len(names))
    if not len(y) or not len(test_y):
        raise DataError(f"{label} has no images to {'test' if len(y) else 'train'} on")
    ids = by_count(counts)[:int((counts > 0).sum())]
    number = np.full(len(names), -1)
    number[ids] = np.arange(len(ids))                                     # the data's class number -> ours
    known = number[test_y] >= 0
    if not known.all():
        kept = np.where(known)[0]
        test_x = Stream(test_x.files.keep(kept), test_x.size) if isinstance(test_x, Stream) else test_x[torch.as_tensor(kept)]
    counts = counts[ids].tolist()
    return LongTailData(dataset, label, x, torch.from_numpy(number[y]), test_x, torch.from_numpy(number[test_y[known]]),
                        [names[k] for k in ids], counts, head_mid_tail(dataset, counts), ids.tolist(),
                        fingerprint or f"{counts} {len(test_y)}")
