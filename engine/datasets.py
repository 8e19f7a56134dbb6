r"""Loads the data set that a run's settings name: `load_data(args, rt)` -> data_lt.LongTailData.

    shapes                  drawn by images/shapes.py
    cifar10, cifar100       torchvision's folder (downloaded if missing), or train/<class>/* and
                            test/<class>/* with the images of a class in their original order
    imagenet_lt, inat18     lists of files, lines `path label`; the images stay on disk
    folder                  a user's own: train/<class>/* and test/<class>/* (or val/), or one
                            folder of classes and --holdout

`args` is any object with the attributes dataset, imb, imb_type, data_dir, img_size, holdout,
train_list, test_list, skip_bad and, if test images are cropped, eval_crop; white, if the level of
deep images is known (images/decode.py). What fits into the memory budget is held as uint8 tensors
on the training device; other images are streamed from disk. All files that cannot be used are
listed before training starts.
"""
import functools
import os
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

from data_lt import (DATASETS, LISTS, LongTailData, head_mid_tail, load_shapes, long_tailed_counts,
                     long_tailed_indices)
from engine.runtime import barrier
from images.decode import Stream, check, read_all, sides, white_level
from images.files import DataError, hold_out, list_file, list_folder, natural, refuse, shown

LIST_NAMES = {
    "imagenet_lt": ("ImageNet_LT_train.txt", "ImageNet_LT_test.txt"),
    "inat18": ("iNaturalist18_train.txt", "iNaturalist18_val.txt"),
}
last_loaded = {}        # {what defines it: LongTailData}, at most one


# ---- Loading -------------------------------------------------------------------------------------

def load_data(args, rt):
    """The data set of these settings on rt.device. DataError with a text that says what to do.

    The main process loads first, so that a download happens once. The last data set is kept:
    teacher and student of the same data read it once.
    """
    if not rt.main:
        barrier(rt)
    try:
        return load(args, rt)
    finally:
        if rt.main:
            barrier(rt)


def load(args, rt):
    """load_data for one process."""
    dataset, root, imb, kind = args.dataset, args.data_dir, args.imb, args.imb_type
    if dataset not in DATASETS:
        raise DataError(f"unknown data set {dataset!r}: choose one of {', '.join(DATASETS)}")
    if imb is None and dataset in ("shapes", "cifar10", "cifar100"):
        imb = 100
    if dataset == "shapes":
        return load_shapes(imb, kind).to(rt.device)
    fingerprint = ""
    if dataset.startswith("cifar") and not os.path.isdir(os.path.join(root, "train")):
        num_classes = int(dataset.removeprefix("cifar"))
        read = functools.partial(load_cifar, root, num_classes, imb, kind, args.holdout)
    else:
        train, test, label = find_files(args, imb)
        fingerprint = train.fingerprint(root) + test.fingerprint(root)
        read = functools.partial(read_files, args, label, train, test, fingerprint, rt)
    key = (dataset, os.path.abspath(root), imb, kind, args.holdout, args.skip_bad,
           image_sizes(args), fingerprint, getattr(args, "white", None), rt.device)
    if key not in last_loaded:
        last_loaded.clear()
        last_loaded[key] = read().to(rt.device)
    return last_loaded[key]


def find_files(args, imb):
    """(training Files, test Files, label) of a data set of image files; nothing is decoded."""
    if args.dataset == "folder":
        train, test = own_folder(args.data_dir, imb, args.imb_type, args.holdout)
        return train, test, shown(os.path.basename(os.path.abspath(args.data_dir)))
    if args.dataset in LISTS:
        train, test = listed_set(args.dataset, args.data_dir, (args.train_list, args.test_list))
        return train, test, LISTS[args.dataset][0]
    num_classes = int(args.dataset.removeprefix("cifar"))
    train, test = cifar_folder(args.data_dir, num_classes, imb, args.imb_type, args.holdout,
                               args.skip_bad)
    return train, test, cifar_label(num_classes, args.holdout)


def image_sizes(args):
    """Sides of the squares that training and test images are resized to when they are read."""
    if args.dataset in ("folder", *LISTS):
        return args.img_size, round(args.img_size / getattr(args, "eval_crop", 1.0))
    return 32, 32


def read_files(args, label, train, test, fingerprint, rt):
    """Decode the images, or check them and leave them on disk -> LongTailData on the CPU.

    DataError with a list of all files that cannot be used; with --skip-bad it is printed, and they
    are left out.
    """
    ignored = train.ignored + test.ignored
    if ignored:
        endings = ", ".join(f"{n} {ending}" for ending, n in sorted(ignored.items()))
        rt.print(f"Ignored, not images: {endings}")
    train_size, test_size = image_sizes(args)
    needed = 3 * (len(train) * train_size ** 2 + len(test) * test_size ** 2)                # bytes
    on_disk = args.dataset in LISTS or needed > memory_budget(rt)
    white = white_level(train, test, rt.print, getattr(args, "white", None))
    train, test = replace(train, white=white), replace(test, white=white)
    splits, problems = [], train.problems + test.problems
    for files, size in ((train, train_size), (test, test_size)):
        if on_disk:
            good, bad = check(files, thorough=args.dataset not in LISTS)
            images = Stream(files.keep(good), size)
        else:
            images, good, bad = read_all(files, size, exact=args.dataset.startswith("cifar"))
        splits.append((images, files.labels[good]))
        problems += bad
    refuse(problems, args.skip_bad, rt.print)
    data = sort_classes(args.dataset, label, *splits, train.class_names, fingerprint)
    return replace(data, white=white)


def sort_classes(dataset, label, train, test, class_names, fingerprint=None):
    """LongTailData with the classes in descending count; classes without images are left out.

    train, test: (images, labels) with the data set's own class numbers. DataError if one is empty.
    """
    (x, y), (test_x, test_y) = train, test
    for purpose, labels in (("train", y), ("test", test_y)):
        if len(labels) == 0:
            raise DataError(f"{label} has no images to {purpose} on")
    counts = np.bincount(y, minlength=len(class_names))
    ids = descending(counts)[:(counts > 0).sum()]
    number = np.full(len(class_names), -1)                      # the data set's number -> ours
    number[ids] = np.arange(len(ids))
    known = np.where(number[test_y] >= 0)[0]
    if len(known) < len(test_y):
        test_x = test_x.keep(known) if isinstance(test_x, Stream) else test_x[known]
        test_y = test_y[known]
    counts = counts[ids].tolist()
    return LongTailData(
        dataset, label, x, torch.from_numpy(number[y]), test_x, torch.from_numpy(number[test_y]),
        [class_names[k] for k in ids], counts, head_mid_tail(dataset, counts), ids.tolist(),
        fingerprint or f"{counts} {len(test_y)}")


def descending(counts):
    """Class numbers in order of descending count; ties in their own order."""
    return np.argsort(-counts, kind="stable")


def total_memory():
    """Bytes of memory of this machine, or of its container; 16 GiB where that is unknown."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        machine = 2 ** 34
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            return min(machine, int(file.read()))
    except (ValueError, OSError):                               # "max", or no such file
        return machine


def memory_budget(rt):
    """Bytes that a data set may take: 40 % of this process's share of the memory.

    On a GPU also at most 40 % of what is free there.
    """
    memory = total_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if rt.device.type == "cuda":
        memory = min(memory, torch.cuda.mem_get_info(rt.device)[0])
    return 0.4 * memory


# ---- CIFAR ---------------------------------------------------------------------------------------

def load_cifar(root, num_classes, imb=100, kind="exp", holdout=None):
    """CIFAR from torchvision's folder `root`, downloaded if it is missing -> LongTailData.

    holdout: test on this fraction of each class's training images instead of the test set; the
    long tail is cut from the rest. DataError if there are no files and they cannot be downloaded.
    """
    from torchvision import datasets
    existed = os.path.isdir(root)
    cifar = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[num_classes]
    try:
        train = cifar(root, train=True, download=True)
        test = cifar(root, train=False, download=True)
    except Exception as error:                  # no network, no space, a damaged archive, ...
        if not existed and os.path.isdir(root) and not os.listdir(root):
            os.rmdir(root)                      # torchvision creates it before it tries
        raise DataError(
            f"CIFAR-{num_classes} is not under {root} and could not be downloaded ({error}); put "
            "torchvision's folder or train/<class>/*, test/<class>/* there, or name its place "
            "with --data-dir") from None
    x, y = train.data, np.array(train.targets)                  # uint8 (N,32,32,3), (N,)
    test_x, test_y = test.data, np.array(test.targets)
    kept, held_out = select_cifar(y, num_classes, imb, kind, holdout)
    if holdout:
        test_x, test_y = x[held_out], y[held_out]
    return sort_classes(f"cifar{num_classes}", cifar_label(num_classes, holdout),
                        (channels_first(x[kept]), y[kept]), (channels_first(test_x), test_y),
                        train.classes)


def cifar_folder(root, num_classes, imb, kind, holdout, skip_bad):
    """(training Files, test Files) of CIFAR as `root/train/<class>/*` and `root/test/<class>/*`.

    With the files of each class in the original order the selection is the published one. Only
    the selected files are decoded later. holdout: see load_cifar.
    """
    train = list_folder(os.path.join(root, "train"))
    test = list_folder(os.path.join(root, "test"))
    for files, split in ((train, "train"), (test, "test")):
        if len(files.class_names) != num_classes:
            raise DataError(f"{os.path.join(root, split)} has {len(files.class_names)} class "
                            f"folders, {num_classes} are expected")
    if train.class_names != test.class_names:
        unpaired = sorted(set(train.class_names) ^ set(test.class_names), key=natural)
        raise DataError(f"train and test under {root} have different classes: "
                        + ", ".join(unpaired[:5]))
    if not skip_bad:
        refuse(train.problems + test.problems, skip=False, say=None)
    kept, held_out = select_cifar(train.labels, num_classes, imb, kind, holdout)
    if holdout:
        test = train.keep(held_out)
    return train.keep(kept), test


def select_cifar(labels, num_classes, imb, kind, holdout):
    """Indices of the long-tailed training images, and of those held out for testing or None."""
    kept, held_out = np.arange(len(labels)), None
    if holdout:
        kept, held_out = split_holdout(labels, holdout)
    counts = long_tailed_counts(len(kept) / num_classes, num_classes, imb, kind)
    return kept[long_tailed_indices(labels[kept], counts)], held_out


def split_holdout(labels, fraction):
    """(kept, held out) indices: the last `fraction` of each class is held out."""
    held_out = []
    for k in range(max(labels) + 1):
        members = np.where(labels == k)[0]
        held_out.append(members[round((1 - fraction) * len(members)):])
    held_out = np.concatenate(held_out)
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def cifar_label(num_classes, holdout):
    return f"CIFAR-{num_classes} validation" if holdout else f"CIFAR-{num_classes}"


def channels_first(images):
    """uint8 array (N,H,W,3) -> tensor (N,3,H,W)."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


# ---- A user's own folder -------------------------------------------------------------------------

def own_folder(root, imb, kind, holdout):
    """(training Files, test Files) of `root/train` and `root/test` (or `val`), or of one folder.

    One folder of classes is split by `holdout`. imb: None, or the imbalance to make by leaving
    images out. DataError if there is nothing to test on.
    """
    train_root, test_root = root, None
    if os.path.isdir(os.path.join(root, "train")):
        train_root = os.path.join(root, "train")
        for name in ("val", "test"):            # test, if there are both
            if os.path.isdir(os.path.join(root, name)):
                test_root = os.path.join(root, name)
    train = list_folder(train_root)
    if holdout and test_root:
        raise DataError(f"{shown(root)} has images to test on in {os.path.basename(test_root)}/: "
                        "leave --holdout out")
    if holdout:
        train, test = hold_out(train, holdout, train_root)
        test = replace(test, problems=[], ignored=Counter())    # training's are the same
    elif test_root:
        test = renumber(list_folder(test_root), train.class_names, test_root, train_root)
    else:
        raise DataError(f"{shown(root)} has no images to test on: put some into train/<class>/ and "
                        "some into test/<class>/ (or val/), or keep a part of each class for that "
                        "with --holdout 0.2")
    if imb is not None:
        counts = train.counts()
        order = descending(counts)
        limits = long_tailed_counts(counts.max(), len(counts), imb, kind)
        counts[order] = np.minimum(counts[order], limits)
        train = train.keep(np.sort(long_tailed_indices(train.labels, counts)))
    return train, test


def renumber(test, class_names, test_root, train_root):
    """Test Files with the class numbers of training; a class unknown there is a problem."""
    known = {name: k for k, name in enumerate(class_names)}
    problems = [f"class {name} of {shown(test_root)} is not in {shown(train_root)}"
                for name in test.class_names if name not in known]
    number = np.array([known.get(name, -1) for name in test.class_names])
    labels = number[test.labels]
    test = replace(test, labels=labels, class_names=class_names, problems=test.problems + problems)
    return test.keep(labels >= 0)


@dataclass
class Survey:
    """What is in a user's own folder, before it is read."""
    images: int         # for training
    classes: int
    side: int           # median of the images' shorter sides, in pixels


def survey(args):
    """Survey of a user's own folder. DataError if no image in it can be read."""
    return survey_folder(args.data_dir, args.imb, args.imb_type, args.holdout)


@functools.cache
def survey_folder(root, imb, kind, holdout):
    train, _ = own_folder(root, imb, kind, holdout)
    shorter_sides = sides(train)
    if len(shorter_sides) == 0:
        raise DataError(f"{shown(root)} has no image that can be read")
    return Survey(len(train), int((train.counts() > 0).sum()), int(np.median(shorter_sides)))


# ---- Lists ---------------------------------------------------------------------------------------

def listed_set(dataset, root, lists):
    """(training Files, test Files) of two list files.

    lists: their paths; None for the published name under root.
    """
    num_classes = LISTS[dataset][1]
    paths = [path or os.path.join(root, name) for path, name in zip(lists, LIST_NAMES[dataset])]
    train, test = [list_file(path, root, num_classes) for path in paths]
    missing = np.where(train.counts() == 0)[0].tolist()
    if missing:
        numbers = ", ".join(str(k) for k in missing[:10])
        if len(missing) > 10:
            numbers += ", ..."
        train.problems.append(f"{shown(paths[0])} has no image of {len(missing)} classes: "
                              + numbers)
    return train, test


# ---- For people ----------------------------------------------------------------------------------

def describe(data, args):
    """CIFAR-10-LT (imb 100, 12,406 images, 10 classes of 5000 to 50)."""
    imb = data.imb if args.imb is None else args.imb
    return (f"{data.label} (imb {imb:.4g}, {len(data.train_labels):,} images, {data.num_classes} "
            f"classes of {max(data.counts)} to {min(data.counts)})")


def print_data_summary(data, args, rt):
    """For a user's own folder: print what is in it and what follows from that, one paragraph."""
    if args.dataset != "folder":
        return
    found = survey(args)
    tests = torch.bincount(data.test_labels.cpu(), minlength=data.num_classes).tolist()
    untested = [name for name, n in zip(data.class_names, tests) if n == 0]
    coarse = sum(0 < n < 10 for n in tests)
    head, mid, tail = (len(data.groups[group]) for group in ("head", "mid", "tail"))
    sentences = [
        f"{describe(data, args)}, the largest '{data.class_names[0]}', the smallest "
        f"'{data.class_names[-1]}'; {len(data.test_labels):,} images to test on.",
        f"Groups by training images: head (more than 100) {head} classes, mid (20 to 100) {mid}, "
        f"tail (fewer than 20) {tail}.",
    ]
    if untested:
        sentences.append("Without a test image, so without an accuracy: "
                         f"{', '.join(untested[:10])}.")
    if coarse:
        sentences.append(f"{coarse} classes have fewer than 10 test images: their accuracies are "
                         "coarse.")
    patches = f" in patches of {args.patch_size} px" if hasattr(args, "patch_size") else ""
    sentences += [
        f"Half of the images are at least {found.side} px on their shorter side; of the central "
        f"square {args.img_size} px{patches} are used.",
        f"{args.epochs} epochs make {args.epochs * found.images:,} samples.",
        f"(Recipe {args.recipe}; --img-size, --epochs and all other settings can be given.)",
    ]
    rt.print(" ".join(sentences))
