r"""Which folder of a data set is to train on, which to test on, and which folders are classes.

    root/<class>/**                     one folder of classes
    root/train/<class>/**               also training, trainset, train_images, train2017, ...
    root/test/<class>/** or root/val    also testing, validation, valid, eval, ...; in any case

A test folder without class folders is not used. What may mean something else, seg_train beside
seg_test, is refused: the message draws what was found and says what to do.
Hidden folders and runs are passed over.
"""
import os
import re
import unicodedata
from collections import Counter
from dataclasses import replace

import numpy as np

from images.files import DataError, ignored_text, shown, some, subfolders, walk

SPLIT = re.compile(r"(?:(?P<train>train|training|trn)|(?P<val>val|valid|validation|dev)|"
                   r"(?P<test>test|testing|tst|eval|evaluation))"
                   r"(?:[ _-]*(?:set|split|data|images))?(?:[ _-]*\d+)?", re.IGNORECASE)


def split_of(name):
    """What a folder of this name is for: "train", "val", "test", or None: a class."""
    match = SPLIT.fullmatch(name.strip())
    return match and match.lastgroup


def find_splits(root):
    """(folder to train on, folder to test on or None, remarks) of the data in `root`.

    Without folders of these names, root itself is to train on. DataError for a mixture.
    """
    folders, beside = subfolders(root)
    found, others, place = {}, [], shown(root)
    for name in folders:
        if split_of(name):
            found.setdefault(split_of(name), []).append(name)
        elif has_images(os.path.join(root, name)):
            others.append(name)
    if not found:
        refuse_pair(root, others)
        return root, None, []
    for names in found.values():
        if len(names) > 1:
            refuse_layout(root, f"{place} has {some(names)}", "Keep one of them.")
    if "train" not in found:
        name = shown([*found.values()][0][0])
        refuse_layout(root, f"{place} has {name}/ but no train/",
                      f"Put images to train on into {place}/train/<class>; or, if {name} is a "
                      f"class, rename it, for example to class_{name}.")
    train_root, test_root, remarks = os.path.join(root, found["train"][0]), None, []
    known = {plain(name) for name in with_images(train_root)}
    for purpose in ("test", "val"):                     # test, if there are both
        for name in found.get(purpose, ()):
            folder = os.path.join(root, name)
            classes = with_images(folder)
            if not classes:
                remarks.append(f"{shown(folder)} has no class folders of images: it is not used.")
            elif known and not known & set(map(plain, classes)):
                remarks.append(f"{shown(folder)} has none of the classes of {shown(train_root)}: "
                               "it is not used.")
            elif test_root:
                remarks.append(f"{shown(folder)} is not used; {shown(test_root)} is.")
            else:
                test_root = folder
    if others and test_root and set(subfolders(train_root)[0]) & set(subfolders(test_root)[0]):
        remarks.append(f"Images in {some(others)} of {place} are not used.")
    elif others:
        train = shown(found["train"][0])
        refuse_layout(root, f"{place} has {train}/ and beside it images in {some(others)}",
                      f"If {train} is a class, rename it, for example to class_{train}; if it "
                      f"holds the images to train on, move the others into it or out of {place}; "
                      f"images to test on belong in {place}/test.")
    if beside:
        remarks.append(f"Images in {place} itself are not used: {some(beside)}.")
    return train_root, test_root, remarks


def refuse_pair(root, names):
    """DataError if two folders differ only as train and test do: seg_train, seg_test."""
    alike = {}                              # {their other words: {"train": folder, "test": folder}}
    for name in names:
        words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
        others = tuple(word.casefold() for word in words if not split_of(word))
        for word in words:
            if split_of(word):
                alike.setdefault(others, {})[split_of(word)] = name
    for found in alike.values():
        if "train" in found and len(set(found.values())) > 1:
            refuse_layout(root, f"{shown(root)} has {some(found.values())}",
                          "If they hold the images to train and to test on, rename them to train "
                          f"and test; if they are classes, rename {shown(found['train'])} to a "
                          "name without that word.")


def check_classes(root, train_root):
    """Remarks on the class folders in train_root, which is root or its folder to train on.

    DataError for fewer than two with images, or for classes that are split each for itself.
    """
    classes = with_images(train_root)
    place = shown(train_root)
    if len(classes) < 2:
        found, ignored = "only one folder of images", Counter()
        if not classes:
            found = "no folders of images"
            if not any(True for _ in walk(train_root, [], ignored)) and ignored:
                found += f" ({ignored_text(ignored).lower()})"
        below = better_root(train_root)
        if below and train_root == root:
            advice = f"Use --data-dir {shown(below)}"
        elif below:
            advice = f"Move the folders of {shown(below)} up into {place}."
        else:
            advice = f"Images are expected as {place}/<class>/*.jpg, two classes at least."
        refuse_layout(root, f"{place} has {found}, so fewer than two classes", advice)
    remarks = alike_remarks(classes)
    inner = [set(with_images(os.path.join(train_root, name))) for name in classes]
    for name, folders in zip(classes, inner):
        purposes = {split_of(folder) for folder in folders}
        if "train" in purposes and purposes & {"val", "test"}:
            name = shown(name)
            refuse_layout(root, f"{place}/{name} holds {some(sorted(folders))}",
                          f"For these images alone use --data-dir {place}/{name}. If {name} is a "
                          f"class, its images belong in {shown(root)}/train/{name} and "
                          f"{shown(root)}/test/{name}.")
    if all(inner):
        remarks.append(f"Classes are {some(classes)}; folders in them count as theirs: "
                       f"{some(sorted(set.union(*inner)))}.")
    return remarks


def alike_remarks(class_names):
    """A line of text for each group of classes whose names hardly differ."""
    alike = {}
    for name in class_names:
        alike.setdefault(plain(name), []).append(name)
    return [f"{some(names)} are taken for {len(names)} classes."
            for names in alike.values() if len(names) > 1]


def plain(name):
    """A class's name without upper case, blanks, hyphens and underscores, in one Unicode form."""
    return re.sub(r"\\x20|[\s_-]", "", unicodedata.normalize("NFKC", name).casefold())


def renumber(test, class_names, test_root, train_root):
    """Test Files with the class numbers of training; a class unknown there is a problem."""
    known = {name: k for k, name in enumerate(class_names)}
    alike = {plain(name): name for name in class_names}
    problems = []
    for name in test.class_names:
        if name not in known:
            line = f"class {name} of {shown(test_root)} is not in {shown(train_root)}"
            if plain(name) in alike:
                line += f"; if it is {alike[plain(name)]}, rename one of the two"
            problems.append(line)
    number = np.array([known.get(name, -1) for name in test.class_names], dtype=np.int64)
    labels = number[test.labels]
    test = replace(test, labels=labels, class_names=class_names, problems=test.problems + problems)
    return test.keep(labels >= 0)


def better_root(folder):
    """The nearest folder below, down a line of only folders, that can be used; or None."""
    only = with_images(folder)
    while len(only) == 1:
        folder = os.path.join(folder, only[0])
        only = with_images(folder)
        if len(only) > 1 or any(map(split_of, only)):
            return folder
    return None


def with_images(folder):
    """Names of the folders in a folder that have images in them, at any depth."""
    return [name for name in subfolders(folder)[0] if has_images(os.path.join(folder, name))]


def has_images(folder):
    """Is there an image in a folder, at any depth?"""
    return any(True for _ in walk(folder, [], Counter()))


def refuse_layout(root, reason, advice):
    """Raise DataError with a drawing of the folder, fifteen lines at most."""
    lines = tree(root, shown(root))
    if len(lines) > 15:
        lines[14:] = ["      ..."]
    raise DataError("\n".join([f"{reason}:", *lines, advice]))


def tree(folder, name, depth=4):
    """A folder as it was found, lines of text: its folders and how many images lie in each."""
    folders, images = subfolders(folder)
    lines = [f"  {name}/" + (f"  {len(images)} images" if images else "")]
    if depth == 1:
        return lines
    for inner in folders[:5]:
        below = tree(os.path.join(folder, inner), shown(inner), depth - 1)
        lines += ["    " + line for line in below]
    if len(folders) > 5:
        lines.append(f"      and {len(folders) - 5} more folders")
    return lines
