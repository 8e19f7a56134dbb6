r"""Which image files are the same image: copies, links, second names.

    in training and test            a problem; the test image is left out
    in two classes                  a problem; both are left out, for nobody knows which is right
    twice in one class              said

Only files of equal size are opened, only those that also end alike are read.
"""
import hashlib
import os
import stat
from dataclasses import replace

import numpy as np

from images.files import shown


def without_copies(train, test, keep=False):
    """(training, test) Files without images that are in both, or in two classes of one.

    What was found is added to problems and remarks. `content` says which of the rest are equal.
    keep: for a published set, whose copies belong to it: they are only said.
    """
    paths = np.concatenate([train.paths, test.paths])
    labels = np.concatenate([train.labels, test.labels])
    content = np.arange(len(paths))
    problems, again = {}, 0                                     # {image: line}
    for images in map(np.array, same_files(paths)):
        content[images] = images[0]
        trained, tested = images[images < len(train)], images[images >= len(train)]
        for part in (trained, tested):
            classes = np.unique(labels[part])
            if len(classes) > 1:
                first, second = part[0], part[labels[part] != labels[part[0]]][0]
                for i in part:
                    other = second if labels[i] == labels[first] else first
                    problems[i] = (f"{shown(paths[i])}: the same image as {shown(paths[other])}, "
                                   "in another class")
            elif len(part) > 1:
                again += len(part) - 1
        if len(trained):
            for i in tested:
                problems[i] = (f"{shown(paths[i])}: the same image as {shown(paths[trained[0]])}, "
                               "which is trained on")
    remarks = []
    if again:
        remarks.append(f"Images that are copies of another of their class, all used: {again:,}.")
    if keep and problems:
        tested = sum(i >= len(train) for i in problems)
        remarks.append(f"As published, {len(problems):,} images, {tested:,} of them to test on, "
                       "are also in another class or in training and test.")
        problems = {}
    good = np.ones(len(paths), dtype=bool)
    good[list(problems)] = False
    train = replace(train, content=content[:len(train)], remarks=train.remarks + remarks,
                    problems=train.problems + [problems[i] for i in sorted(problems)])
    test = replace(test, content=content[len(train):])
    return train.keep(good[:len(train)]), test.keep(good[len(train):])


def same_files(paths):
    """Lists of two or more indices of files with the same content, links to one file among them.

    Files that are empty, not regular or not readable are the same as no other.
    """
    groups = [range(len(paths))]
    for key in (size, ending, digest):
        groups = [part for group in groups for part in divide(group, paths, key)]
    return groups


def divide(group, paths, key):
    """Lists of two or more files of a group whose key(path) is the same and not empty."""
    parts = {}
    for i in group:
        try:
            parts.setdefault(key(paths[i]), []).append(i)
        except (OSError, ValueError):                           # ValueError: a NUL in the name
            continue
    return [part for value, part in parts.items() if value and len(part) > 1]


def size(path):
    """Bytes of a regular file; 0 for what is none."""
    status = os.stat(path)
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def ending(path):
    """The last 4 KiB of a file: compressed images differ there."""
    with open(path, "rb", buffering=0) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        return file.read(4096)


def digest(path):
    """A hash of a whole file."""
    content = hashlib.blake2b(digest_size=16)
    with open(path, "rb", buffering=0) as file:
        while block := file.read(2 ** 20):
            content.update(block)
    return content.digest()
