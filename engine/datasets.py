r"""Loads the data set that a run's settings name: `load_data(args, rt)` -> data_lt.LongTailData.

    shapes                  drawn by images/shapes.py
    cifar10, cifar100       torchvision's folder (downloaded if missing), or train/<class>/* and
                            test/<class>/* with the images of a class in their original order
    imagenet_lt, inat18     lists of files, lines `path label`; the images stay on disk
    folder                  a user's own: train/<class>/* and test/<class>/* (or val/), or one
                            folder of classes and --holdout (images/layout.py), or a list of
                            images (images/lists.py)

`args` is any object with the attributes dataset, imb, imb_type, data_dir, img_size, holdout,
holdout_by, train_list, test_list, list_columns, skip_bad and, if test images are cropped,
eval_crop; groups, if given; white, if the level of deep images is known (images/decode.py). What
fits into the memory budget is held as uint8 tensors on the training device; other images are
streamed from disk. All files that cannot be used are listed before training starts.
"""
import functools
import math
import os
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

from data_lt import (DATASETS, LISTS, LongTailData, load_shapes, long_tailed_counts,
                     long_tailed_indices)
from engine.groups import group_classes, groups_text
from engine.runtime import barrier
from engine.settings import own_name
from images.copies import without_copies
from images.decode import Stream, check, problem, read_all, sides, white_level
from images.files import (DataError, Files, ignored_text, list_folder, natural, refuse, shown,
                          some, subfolders)
from images.holdout import group_names, hold_out
from images.layout import (better_root, check_classes, find_splits, refuse_layout, renumber,
                           split_of, with_images)
from images.lists import find_listed
from images.machine import total_memory
from images.near_copies import MOST, nearly_the_same, remark_on

LIST_NAMES = {
    "imagenet_lt": ("ImageNet_LT_train.txt", "ImageNet_LT_test.txt"),
    "inat18": ("iNaturalist18_train.txt", "iNaturalist18_val.txt"),
}
PUBLISHED_COUNTS = {"imagenet_lt": (115_846, 50), "inat18": (437_513, 3)}   # train; test per class
last_loaded = {}        # {what defines it: LongTailData}, of one data set


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
    if dataset == "shapes":
        return load_shapes(imb, kind).to(rt.device)
    fingerprint = ""
    if not has_files(args):
        num_classes = int(dataset.removeprefix("cifar"))
        read = functools.partial(load_cifar, root, num_classes, imb, kind, args.holdout)
    else:
        train, test, label = find_files(args)
        fingerprint = train.fingerprint(root) + test.fingerprint(root)
        read = functools.partial(read_files, args, label, train, test, fingerprint, rt)
    key = (dataset, os.path.abspath(root), imb, kind, args.holdout, image_sizes(args), fingerprint)
    white = getattr(args, "white", None)
    if (key, args.skip_bad, white) not in last_loaded:
        last_loaded.clear()
        data = read().to(rt.device)
        # Without --skip-bad nothing was bad: with it, and by the level found, it is the same data.
        for skip_bad in (args.skip_bad, True):
            for level in (white, data.white):
                last_loaded[key, skip_bad, level] = data
    data = last_loaded[key, args.skip_bad, white]
    if data.train_labels.device.type != rt.device.type:     # a run on a GPU; its picture is not
        data = data.to(rt.device)
    if getattr(args, "groups", None):
        return replace(data, groups=group_classes(dataset, data.counts, args.groups))
    return data


def has_files(args):
    """Is the data set one of image files, which may change?"""
    made = args.dataset == "shapes"
    return not made and (not args.dataset.startswith("cifar") or is_cifar_folder(args.data_dir))


def fingerprint_of_files(args):
    """The fingerprint that the data of these (filled) settings would have; nothing is decoded."""
    train, test, _ = find_files(args)
    return train.fingerprint(args.data_dir) + test.fingerprint(args.data_dir)


def find_files(args):
    """(training Files, test Files, label) of a data set of image files; nothing is decoded."""
    if args.dataset == "folder":
        train, test = own_folder(*own_settings(args))
        return train, test, own_name(args)
    if args.dataset in LISTS:
        return listed_set(args.dataset, args.data_dir, (args.train_list, args.test_list),
                          args.list_columns, args.holdout, args.holdout_by)
    return cifar_folder(args.data_dir, int(args.dataset.removeprefix("cifar")), args.imb,
                        args.imb_type, args.holdout, args.skip_bad)


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
    for remark in train.remarks + test.remarks:
        rt.print(remark)
    ignored = train.ignored + test.ignored
    if ignored:
        rt.print(ignored_text(ignored))
    train_size, test_size = image_sizes(args)
    needed = 3 * (len(train) * train_size ** 2 + len(test) * test_size ** 2)                # bytes
    on_disk = args.dataset in LISTS or needed > memory_budget(rt)
    white = white_level(train, test, rt.print, getattr(args, "white", None))
    train, test = replace(train, white=white), replace(test, white=white)
    splits, kept, problems = [], [], train.problems + test.problems
    for files, size in ((train, train_size), (test, test_size)):
        if on_disk:
            good, bad = check(files, thorough=args.dataset not in LISTS)
            images = Stream(files.keep(good), size)
        else:
            images, good, bad = read_all(files, size, exact=args.dataset.startswith("cifar"))
        splits.append((images, files.labels[good]))
        kept.append(files.keep(good))
        problems += bad
    refuse(problems, args.skip_bad, rt.print)
    if problems and args.dataset != "folder":
        label = unpublished(label)
    data = sort_classes(args.dataset, label, *splits, train.class_names, fingerprint)
    missing = sorted(set(train.class_names) - set(data.class_names), key=natural)
    if missing:
        rt.print(f"Without an image to train on, so left out, also in testing: {some(missing)}.")
    if rt.main and not args.dataset.startswith("cifar"):
        say_near_copies(*kept, *splits, args, rt)
    return replace(data, white=white)


def say_near_copies(train, test, trained, tested, args, rt):
    """Print a line if many test images look nearly like a training image.

    train, test: Files; trained, tested: (images, labels) of them. Large sets on disk are left out.
    """
    images = [trained[0], tested[0]]
    if isinstance(images[0], Stream):
        images = [Stream(files, 32) for files in (train, test)]     # decoded small, so fast
    if len(train) + len(test) <= (MOST // 4 if isinstance(images[0], Stream) else MOST):
        pairs = nearly_the_same(images[0], trained[1], images[1], tested[1])
        line = remark_on(train, test, pairs, args.data_dir, args.holdout, args.holdout_by)
        if line:
            rt.print(line)


def sort_classes(dataset, label, train, test, class_names, fingerprint=None):
    """LongTailData with the classes in descending count; classes without images are left out.

    train, test: (images, labels) with the data set's own class numbers. DataError if one is empty,
    or if there are fewer than two classes to train on.
    """
    (x, y), (test_x, test_y) = train, test
    for purpose, labels in (("train", y), ("test", test_y)):
        if len(labels) == 0:
            raise DataError(f"{label} has no images to {purpose} on")
    counts = np.bincount(y, minlength=len(class_names))
    ids = descending(counts)[:(counts > 0).sum()]
    if len(ids) < 2:
        raise DataError(f"{label} has images of only one class to train on: {class_names[ids[0]]}")
    number = np.full(len(class_names), -1, np.int64)            # the data set's number -> ours
    number[ids] = np.arange(len(ids))
    known = np.where(number[test_y] >= 0)[0]
    if len(known) < len(test_y):
        test_x = test_x.keep(known) if isinstance(test_x, Stream) else test_x[known]
        test_y = test_y[known]
        if len(test_y) == 0:
            raise DataError(f"{label} has no test images of the classes that are trained on")
    counts = counts[ids].tolist()
    return LongTailData(
        dataset, label, x, torch.from_numpy(number[y]), test_x, torch.from_numpy(number[test_y]),
        [class_names[k] for k in ids], counts, group_classes(dataset, counts),
        own_numbers(dataset, class_names, ids), fingerprint or f"{counts} {len(test_y)}")


def own_numbers(dataset, class_names, ids):
    """The data set's own numbers of the classes `ids`: lists name classes by theirs."""
    if dataset in LISTS and all(name.isdecimal() for name in class_names):
        return [int(class_names[k]) for k in ids]
    return ids.tolist()


def descending(counts):
    """Class numbers in order of descending count; ties in their own order."""
    return np.argsort(-counts, kind="stable")


def memory_budget(rt):
    """Bytes that a data set may take: 40 % of this process's share of the memory.

    On a GPU also at most 40 % of what is free there.
    """
    memory = total_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", rt.world))
    if rt.device.type == "cuda":
        memory = min(memory, torch.cuda.mem_get_info(rt.device)[0])
    return 0.4 * memory


# ---- CIFAR ---------------------------------------------------------------------------------------

NOT_PUBLISHED = " not as published"
CIFAR_NAMES = {
    10: "airplane automobile bird cat deer dog frog horse ship truck",
    100: "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus "
         "butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach "
         "couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster "
         "house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree "
         "motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear "
         "pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket "
         "rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar "
         "sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip "
         "turtle wardrobe whale willow_tree wolf woman worm"}


def is_cifar_folder(root):
    """Is CIFAR in folders `root/train/<class>`, in contrast to torchvision's files?"""
    return os.path.isdir(root) and any(split_of(name) == "train" for name in subfolders(root)[0])


def load_cifar(root, num_classes, imb=100, kind="exp", holdout=None):
    """CIFAR from torchvision's folder `root`, downloaded if it is missing -> LongTailData.

    holdout: test on this fraction of each class's training images instead of the test set; the
    long tail is cut from the rest. DataError if there are no files and they cannot be downloaded.
    """
    from torchvision import datasets
    existed, place = os.path.isdir(root), shown(root)
    cifar = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[num_classes]
    missing = not os.path.isdir(os.path.join(root, cifar.base_folder))
    if existed and missing:
        n = len(with_images(root))
        if n == num_classes:
            refuse_layout(root, f"{place} has {num_classes} folders of images but no train/",
                          f"Move them into {place}/train and images to test on into "
                          f"{place}/test/<class>; or use --dataset folder --holdout 0.2")
        if n > 1 and os.path.basename(os.path.abspath(root)) != "data":     # of several data sets
            refuse_layout(root, f"{place} has {n} folders of images, and CIFAR is not there",
                          "For your own images: --dataset folder. CIFAR is downloaded into a "
                          "folder without images.")
    if missing:                                 # minutes of silence where there is no network
        print(f"CIFAR-{num_classes} is not under {place}: downloading it", flush=True)
    try:
        train = cifar(root, train=True, download=True)
        test = cifar(root, train=False, download=True)
    except Exception as error:                  # no network, no space, a damaged archive, ...
        if not existed and os.path.isdir(root) and not os.listdir(root):
            os.rmdir(root)                      # torchvision creates it before it tries
        if os.path.isdir(os.path.join(root, cifar.base_folder)):
            raise DataError(f"the files of CIFAR-{num_classes} under {place} are damaged or not "
                            f"complete, and could not be downloaded ({error})") from None
        below = better_root(root) if os.path.isdir(root) else None
        advice = f" {shown(below)}" if below and is_cifar_folder(below) else ""
        raise DataError(
            f"CIFAR-{num_classes} is not under {place} and could not be downloaded ({error}); put "
            "torchvision's folder or train/<class>/*, test/<class>/* there, or name its place "
            f"with --data-dir{advice}") from None
    # These are the published images: torchvision has compared their MD5 sums.
    x, y = train.data, np.array(train.targets)                  # uint8 (N,32,32,3), (N,)
    test_x, test_y = test.data, np.array(test.targets)
    kept, held_out = select_cifar(y, num_classes, imb, kind, holdout)
    if holdout:
        test_x, test_y = x[held_out], y[held_out]
    return sort_classes(f"cifar{num_classes}", cifar_label(num_classes, holdout),
                        (channels_first(x[kept]), y[kept]), (channels_first(test_x), test_y),
                        train.classes)


def cifar_folder(root, num_classes, imb, kind, holdout, skip_bad):
    """(training Files, test Files, label) of CIFAR as `root/train/<class>/*` and `root/test/...`.

    With the files of each class in the original order the selection is the published one. Only
    the selected files are decoded later. holdout: see load_cifar; `root/test` is not needed then.
    """
    train_root, test_root, remarks = find_splits(root)
    train = list_folder(train_root)
    test = Files(train.paths[:0], train.labels[:0], train.class_names)
    if test_root:
        test = list_folder(test_root)
    elif not holdout:
        raise DataError(". ".join([f"there are no folders of images in "
                                   f"{shown(os.path.join(root, 'test'))}",
                                   *(remark.removesuffix(".") for remark in remarks)]))
    for files, folder in ((train, train_root), (test, test_root or train_root)):
        if len(files.class_names) != num_classes:
            raise DataError(f"{shown(folder)} has {len(files.class_names)} class folders, CIFAR "
                            f"has {num_classes}; for your own images: --dataset folder")
    if train.class_names != test.class_names:
        unpaired = sorted(set(train.class_names) ^ set(test.class_names), key=natural)
        raise DataError(f"train and test under {shown(root)} have different classes: "
                        f"{some(unpaired)}; rename folders until they agree")
    if not skip_bad:
        refuse(train.problems + test.problems, skip=False, say=None)
    label = cifar_label(num_classes, holdout)
    difference = cifar_difference(train.class_names, train.counts(),
                                  None if holdout else test.counts())
    if difference:
        remarks.append(f"This is not the published {label}: {difference}.")
        label = unpublished(label)
    kept, held_out = select_cifar(train.labels, num_classes, imb, kind, holdout)
    if holdout:
        test = replace(train.keep(held_out), problems=[], ignored=Counter())
    train, test = without_copies(train.keep(kept), test, keep=not difference)
    return replace(train, remarks=remarks + train.remarks), test, label


def cifar_difference(class_names, counts, test_counts=None):
    """What is not as in the published CIFAR of this many classes, a line of text, or None.

    counts, test_counts: images per class. Names may differ in upper and lower case.
    """
    names = CIFAR_NAMES[len(class_names)].split()
    for number, (name, published) in enumerate(zip(class_names, names)):
        if name.lower() != published:
            return f"class {number} is {name}, not {published}"
    for what, numbers, total in (("train", counts, 50000), ("test", test_counts, 10000)):
        for k, n in enumerate(numbers if numbers is not None else ()):
            if n != total // len(names):
                return f"{names[k]} has {n} images to {what} on, not {total // len(names)}"
    return None


def unpublished(label):
    """The name in tables of a set that is not the published one of that name."""
    return label if label.endswith(NOT_PUBLISHED) else label + NOT_PUBLISHED


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

def own_settings(args):
    """The arguments of own_folder, from the settings."""
    return (args.data_dir, args.imb, args.imb_type, args.holdout, args.holdout_by,
            (args.train_list, args.test_list), args.list_columns)


def own_folder(root, imb, kind, holdout, holdout_by=None, lists=(None, None), columns=None):
    """(training Files, test Files) of folders to train and to test on, or of lists, or of one.

    One folder of classes, or one list, is split by `holdout`, groups as `holdout_by` names them.
    imb: None, or the imbalance to make by leaving images out. DataError for a layout or list that
    is not understood, if there is nothing to test on, or for an imbalance that cannot be made.
    """
    if lists[0]:
        train, test, base = find_listed(*lists, root, columns, holdout_by)
        train, test = split_listed(train, test, base, lists[0], holdout, holdout_by)
    else:
        train, test = split_folder(root, holdout, holdout_by)
    if imb is not None and len(train):          # if none is left, the caller says why
        train = make_tail(train, imb, kind, root)
    return train, test


def split_folder(root, holdout, holdout_by):
    """own_folder for folders: (training Files, test Files)."""
    train_root, test_root, remarks = find_splits(root)
    if holdout and test_root:
        raise DataError(f"{shown(root)} has images to test on in "
                        f"{shown(os.path.basename(test_root))}/: leave --holdout out, or say "
                        "--holdout 0 if a run has one")
    remarks += check_classes(root, train_root)
    train = replace(list_folder(train_root), remarks=remarks)
    if test_root:
        test = renumber(list_folder(test_root), train.class_names, test_root, train_root)
    elif holdout:
        test = Files(train.paths[:0], train.labels[:0], train.class_names)
    else:
        raise DataError(f"{shown(root)} has no images to test on: put some into train/<class>/ and "
                        "some into test/<class>/ (or val/), or keep a part of each class for that "
                        "with --holdout 0.2"
                        + "".join(f". {remark.removesuffix('.')}" for remark in remarks))
    train, test = without_copies(train, test)
    if holdout:
        groups = group_names(train, holdout_by, root) if holdout_by else None
        train, test = hold_out(train, holdout, train_root, groups)
        check_held_out(train, test, train_root, groups)
    return train, test


def split_listed(train, test, base, name, holdout, holdout_by, published=False):
    """(training Files, test Files) of a list of this name, split by `holdout` if test is None."""
    if holdout and test is not None:
        raise DataError(f"{shown(name)} has images to test on: leave --holdout out, or say "
                        "--holdout 0 if a run has one")
    if test is None and not holdout:
        raise DataError(f"{shown(name)} has no images to test on: give it a column split that says "
                        "train or test, or name a --test-list, or keep a part of each class for "
                        "that with --holdout 0.2")
    given = test if test is not None else train.keep(slice(0))
    train, given = without_copies(train, given, keep=published)
    if test is not None:
        return train, given
    groups = group_names(train, holdout_by, base) if holdout_by else None
    train, test = hold_out(train, holdout, base, groups)
    check_held_out(train, test, name, groups)
    return train, test


def check_held_out(train, test, place, groups):
    """DataError if no class could be split."""
    if len(train) and not len(test):
        what = "different images" if groups is None else "groups"
        raise DataError(f"no class of {shown(place)} has two {what}, one to train and one to test "
                        "on, as --holdout needs")


def make_tail(train, imb, kind, root):
    """Leave out images until this imbalance is reached. DataError if the tail is longer already."""
    counts = train.counts()
    order = descending(counts)[:(counts > 0).sum()]
    largest, smallest = counts[order[0]], counts[order[-1]]
    limits = long_tailed_counts(largest, len(order), imb, kind)
    if smallest < limits[-1]:
        possible = math.ceil(largest / smallest)
        raise DataError(f"--imb {imb:g} cannot be made of {shown(root)}, whose imbalance is "
                        f"{largest / smallest:.4g} ({largest} to {smallest} images to train on): "
                        f"leave --imb out, or use --imb {possible} or more")
    counts[order] = np.minimum(counts[order], limits)
    return train.keep(np.sort(long_tailed_indices(train.labels, counts)))


@dataclass
class Survey:
    """What is in a user's own folder, before it is read."""
    images: int         # for training
    classes: int
    side: int           # median of the images' shorter sides, in pixels


def survey(args):
    """Survey of a user's own folder. DataError if no image in it can be read."""
    return survey_folder(args.train_list or args.data_dir, own_settings(args))


@functools.cache
def survey_folder(place, settings):
    train, _ = own_folder(*settings)
    shorter_sides = sides(train)
    if len(shorter_sides) == 0:
        first = train.problems or [problem(path) for path in train.paths[:1]]
        lines = [f"{shown(place)} has no image that can be used", *filter(None, first[:1])]
        raise DataError("; ".join(lines))
    return Survey(len(train), int((train.counts() > 0).sum()), int(np.median(shorter_sides)))


# ---- Lists ---------------------------------------------------------------------------------------

def listed_set(dataset, root, lists, columns=None, holdout=None, holdout_by=None):
    """(training Files, test Files, label) of two list files.

    lists: their paths; None for the published name under root. Other lists may have other classes.
    """
    label, _ = LISTS[dataset]
    usual = [os.path.join(root, name) for name in LIST_NAMES[dataset]]
    train_list = lists[0] or usual[0]
    train, test, base = find_listed(train_list, lists[1], root, columns, holdout_by,
                                    otherwise=None if holdout else usual[1])
    difference = "a part is held out"
    if not holdout:
        difference = lists_difference(dataset, train.counts(), test.counts())
    if difference:
        train.remarks.append(f"These are not the published lists of {label}: {difference}.")
        label = unpublished(label)
    train, test = split_listed(train, test, base, train_list, holdout, holdout_by,
                               published=not difference)
    return train, test, label


def lists_difference(dataset, counts, test_counts):
    """What is not as in the published lists, a line of text, or None."""
    _, num_classes = LISTS[dataset]
    published, per_class = PUBLISHED_COUNTS[dataset]
    if len(counts) != num_classes:
        return f"{len(counts):,} classes, not {num_classes:,}"
    if sum(counts) != published:
        return f"{sum(counts):,} images to train on, not {published:,}"
    for k, n in enumerate(test_counts):
        if n != per_class:
            return f"class {k} has {n} images to test on, not {per_class}"
    return None


# ---- For people ----------------------------------------------------------------------------------

def describe(data, args):
    """CIFAR-10 (imb 100, 12,406 images, 10 classes of 5000 to 50); the actual imbalance."""
    imb = f"{data.imb:.4g}"
    if args.imb is not None and abs(data.imb / args.imb - 1) > 0.01:
        imb += f" for --imb {args.imb:g}"
    return (f"{data.label} (imb {imb}, {len(data.train_labels):,} images, {data.num_classes} "
            f"classes of {max(data.counts)} to {min(data.counts)})")


def print_data_summary(data, args, rt):
    """For a user's own folder: print what is in it and what follows from that, one paragraph."""
    if args.dataset != "folder":
        return
    found = survey(args)
    tests = torch.bincount(data.test_labels.cpu(), minlength=data.num_classes).tolist()
    untested = [name for name, n in zip(data.class_names, tests) if n == 0]
    coarse = sum(0 < n < 10 for n in tests)
    sentences = [
        f"{describe(data, args)}, the largest '{data.class_names[0]}', the smallest "
        f"'{data.class_names[-1]}'; {len(data.test_labels):,} images to test on.",
        groups_text(data.counts, data.groups),
    ]
    if untested:
        sentences.append("Without a test image, so without an accuracy: "
                         f"{some(untested, most=10)}.")
    if coarse:
        sentences.append(f"{coarse} of {data.num_classes} classes have fewer than 10 test images: "
                         "their accuracies are coarse.")
    patches = f" in patches of {args.patch_size} px" if hasattr(args, "patch_size") else ""
    sentences.append(f"Half of the images are at least {found.side} px on their shorter side; of "
                     f"the central square {args.img_size} px{patches} are used.")
    if getattr(args, "minutes", None) is None:
        samples = args.epochs * len(data.train_labels)
        sentences.append(f"{args.epochs} epochs make {samples:,} samples.")
    sentences.append(f"(Recipe {args.recipe}; --img-size, --epochs and all other settings can be "
                     "given.)")
    rt.print(" ".join(sentences))
