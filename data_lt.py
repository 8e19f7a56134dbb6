r"""Long-tailed data: few frequent classes, many rare ones, and a balanced test set.

    n_k = floor(n_max * imb^(-k / (K - 1))),  k = 0..K-1,  imb = n_max / n_min              (1)

Class-balanced loss (1901.05555) and LDAM (1906.07413) made CIFAR long-tailed by (1); their code
calls the inverse, 0.01, the imbalance factor. The "step" variant has n_max images in the first half
of the classes and n_max / imb in the rest. Class after class is shuffled by NumPy's legacy
generator, seeded once with 0, and its first n_k images are kept: those of the published code.

    imb = 100    CIFAR-10   5000 2997 1796 1077 645 387 232 139 83 50      total 12,406
                 CIFAR-100   500  477  455  434 ...  5   5   5   5         total 10,847

Classes are numbered by descending training count. Files are read by engine/datasets.py.
"""
from dataclasses import dataclass, replace

import numpy as np
import torch

from images import shapes
from images.decode import Stream
from images.files import DataError

PUBLISHED_GROUPS = {                # number of classes in head, mid and tail
    "cifar10": (3, 4, 3), "cifar100": (36, 35, 29), "shapes": (3, 4, 3),
    "imagenet_lt": (390, 445, 165), "inat18": (842, 3701, 3599),
}
LISTS = {"imagenet_lt": ("ImageNet-LT", 1000), "inat18": ("iNaturalist 2018", 8142)}
DATASETS = ("cifar10", "cifar100", "shapes", "folder", *LISTS)      # LISTS: read from list files


# ---- Which images --------------------------------------------------------------------------------

def long_tailed_counts(n_max, num_classes, imb=100, kind="exp"):
    """Training images per class, a list of K ints: (1) for kind "exp", two values for "step".

    n_max: images of the largest class; imb >= 1, where 1 is balanced. DataError for other values.
    """
    if not imb >= 1:                                                    # true for NaN as well
        raise DataError(f"--imb is n_max / n_min and must be at least 1, not {imb:g}")
    if kind == "exp":
        exponents = [k / max(num_classes - 1, 1) for k in range(num_classes)]
    elif kind == "step":
        exponents = [int(k >= num_classes // 2) for k in range(num_classes)]
    else:
        raise DataError(f"the kind of imbalance must be exp or step, not {kind!r}")
    counts = [int(n_max * (1 / imb) ** e + 1e-9) for e in exponents]    # (1)  49 * (1 / 49) is < 1
    if min(counts) == 0:
        raise DataError(f"imbalance {imb:g} leaves class {counts.index(0)} without a training "
                        f"image; lower --imb to {n_max:g} or less")
    return counts


def long_tailed_indices(labels, counts):
    """Which of the images with these labels (N,) to keep: counts[k] of class k, class after class.

    RandomState(0) gives the published selection without touching NumPy's global generator.
    DataError if a class has too few images.
    """
    rng = np.random.RandomState(0)
    kept = []
    for k, n in enumerate(counts):
        members = np.where(np.asarray(labels) == k)[0]
        if len(members) < n:
            raise DataError(f"class {k} has {len(members)} images, {n} are needed")
        rng.shuffle(members)
        kept.append(members[:n])
    return np.concatenate(kept)


def published_groups(dataset):
    """{"head": [class numbers], "mid": ..., "tail": ...} of classes in descending count."""
    head, mid, tail = PUBLISHED_GROUPS[dataset]
    classes = list(range(head + mid + tail))
    return {"head": classes[:head], "mid": classes[head:head + mid], "tail": classes[head + mid:]}


# ---- The order of an epoch -----------------------------------------------------------------------

def epoch_generator(seed, epoch):
    """The generator of an epoch's order. spawn_key: no step gets its seed (runtime.seed_step)."""
    key = np.random.SeedSequence([seed, epoch], spawn_key=(1,)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(key) >> 1)             # 63 bits, as in seed_step


def shuffled(n, seed, epoch):
    """Every image once: a permutation of 0..n-1, LongTensor (n,)."""
    return torch.randperm(n, generator=epoch_generator(seed, epoch))


def repeated_augmentation(n, seed, epoch, repeats=3):
    """DeiT's repeated augmentation (1901.09335): images `repeats` times in a row. LongTensor.

    Cut to the largest multiple of 256 not above n (to n if n < 256, where the published sampler is
    empty): an epoch of CIFAR-10-LT has 12,288 samples of 4,096 distinct images.
    """
    length = n // 256 * 256 if n >= 256 else n
    return shuffled(n, seed, epoch).repeat_interleave(repeats)[:length]


def steps_per_epoch(n, batch):
    """Number of batches of at most `batch` samples that n samples are cut into."""
    return -(-n // batch)                           # n / batch, rounded up


def shard(order, batch, rank=0, world=1, micro_batches=1):
    """This process's part of each global batch of an epoch: LongTensor (steps, size).

    order (n,) is cut into steps_per_epoch(n, batch) batches of one size, a multiple of processes
    and micro-batches (so it may exceed `batch` a little): a GPU chooses its kernels only once. The
    last batches repeat the order's first images, as torch's DistributedSampler does.
    """
    n, steps = len(order), steps_per_epoch(len(order), batch)
    micro_batch = -(-n // (steps * world * micro_batches))      # its images, rounded up
    size = micro_batch * world * micro_batches
    return order[torch.arange(steps * size) % n].view(steps, size)[:, rank::world]


# ---- A data set ----------------------------------------------------------------------------------

@dataclass
class LongTailData:
    """Images uint8 (N,3,H,W), labels int64 (N,), classes in descending training count."""
    name: str                       # one of DATASETS
    label: str                      # its name in tables
    train_images: torch.Tensor      # or a Stream from disk, which is indexed alike
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    class_names: list
    counts: list                    # training images per class
    groups: dict                    # of class numbers: head, mid, tail
    class_ids: list = None          # the data set's own number of each class; None: 0..K-1
    fingerprint: str = ""           # changes with the data
    white: int = 65535              # of 16-bit images: the level that becomes 255

    def __post_init__(self):
        if self.class_ids is None:
            self.class_ids = list(range(self.num_classes))

    @property
    def num_classes(self):
        return len(self.counts)

    @property
    def imb(self):
        """The actual n_max / n_min."""
        return max(self.counts) / min(self.counts)

    def to(self, device):
        """The same data with images and labels on `device`."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def batches(self, steps, key):
        """steps, pairs (step, index (b,)) -> (step, images (b,3,H,W), labels (b,)) on the device.

        Files are decoded ahead; of LISTS also cropped, seed (*key, step). key: seed, epoch, rank.
        """
        device = self.train_labels.device
        if isinstance(self.train_images, Stream):
            crop_key = key if self.name in LISTS else None
            for step, index, images in self.train_images.batches(steps, crop_key):
                yield step, images, self.train_labels[index.to(device, non_blocking=True)]
        else:
            for step, index in steps:
                index = index.to(device, non_blocking=True)
                yield step, self.train_images[index], self.train_labels[index]


def load_shapes(imb=100, kind="exp"):
    """The built-in set, images/shapes.py -> LongTailData."""
    names = list(shapes.SHAPES)
    counts = long_tailed_counts(shapes.SHAPES_MAX, len(names), imb, kind)
    x, y = shapes.draw_shapes(counts, split=0)
    test_x, test_y = shapes.draw_shapes([shapes.SHAPES_TEST] * len(names), split=1)
    y, test_y = torch.from_numpy(y), torch.from_numpy(test_y)
    return LongTailData("shapes", "shapes", x, y, test_x, test_y, names, counts,
                        published_groups("shapes"), fingerprint=f"{counts} {len(test_y)}")
