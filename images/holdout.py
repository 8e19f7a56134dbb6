r"""Which images are kept for testing, where a data set does not say.

    hold_out(files, 0.2, root)              a share of each class, by a hash of each file's name
    hold_out(files, 0.2, root, groups)      the same, but whole groups: tracks, plates, patients

Frames of one video or pictures of one patient are nearly the same picture. With some of them in
training, an accuracy says how well a network knows these again, not how well it does on new ones.
"""
import functools
import hashlib
import os
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np

from images.files import DataError, shown, some

CHOICE = 15         # units of each part that are tried on the other side, for a class
ROUNDS = 20         # of moves for a class


# ---- What belongs together -----------------------------------------------------------------------

def group_names(files, by, root):
    """The group of each image as --holdout-by says, (N,) text; "" for one that has none.

    by: the column of a list that `files` were read with, or a regular expression that is searched
    in the path relative to root; its first group, or the whole match, is the name. DataError for
    an invalid pattern, one that matches no path, or one group of all images.
    """
    if files.group is not None:
        names = files.group
    else:
        try:
            pattern = re.compile(by)
        except re.error as error:
            raise DataError(f"--holdout-by {by!r} is not a valid regular expression: "
                            f"{error}") from None
        names = np.array([matched(pattern, os.fsdecode(name)) for name in files.names(root)])
    example = shown(files.names(root)[0]) if len(files) else "none"
    if not any(names):
        columns = f"; the columns of the list are {some(files.columns)}" if files.columns else ""
        raise DataError(f"--holdout-by {by!r} matches no image: it is searched in paths such as "
                        f"{example}, and its first (group) is what belongs together{columns}")
    if len(set(names)) == 1 and all(names):
        raise DataError(f"--holdout-by {by!r} puts all images into one group, "
                        f"{shown(names[0])!r}: its first (group) must differ between images that "
                        f"do not belong together, in paths such as {example}")
    return names


def matched(pattern, path):
    """The first group of a pattern in a path, or the whole match; "" where it does not fit."""
    match = pattern.search(path)
    if match is None:
        return ""
    return next((group for group in match.groups() if group), match.group())


def units_of(order, content, groups):
    """Numbers of what must stay on one side, (N,): a group, and files of the same content.

    They are numbered as they first occur in `order` (N,), an order of the images.
    """
    first, parent = {}, list(range(len(order)))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i
    for i in order:
        keys = [content[i]]
        if groups is not None and groups[i]:
            keys.append(str(groups[i]))
        for key in keys:
            parent[root(i)] = root(first.setdefault(key, i))
    number = {}
    units = np.empty(len(order), dtype=np.int64)
    for i in order:
        units[i] = number.setdefault(root(i), len(number))
    return units


# ---- Which part is for testing -------------------------------------------------------------------

def hold_out(files, fraction, root, groups=None):
    """Split into (training, test) Files by a hash of each file's name, or of its group's.

    The split is the same for every run. Of n images of a class, round(fraction * n) are for
    testing, at least one, but never the last one that is left to train on. Files of the same
    content are in one part, and then the shares are as near to `fraction` as that allows. Without
    these, more images in the folder move at most one or two of a class to the other part.

    groups (N,): see group_names. A group is in one part, too, with all of its classes. A class of
    one group, or of one content, is trained on.
    """
    names = files.names(root)
    if groups is not None:
        names = [os.fsencode(group) or name for group, name in zip(groups, names)]
    # The name's hash, then the place in the list, so that equal names stay side by side.
    order = np.array([hashlib.sha256(name).hexdigest() for name in names]).argsort(kind="stable")
    units = units_of(order, files.content, groups)
    counts, parts = files.counts(), composition(units, files.labels)
    target = np.minimum(np.maximum(1, np.round(fraction * counts)), counts - 1)
    held, is_test = np.zeros(len(counts)), np.zeros(len(parts), dtype=bool)
    for unit, part in enumerate(parts):
        if all(held[k] + n <= target[k] for k, n in part):
            is_test[unit] = True
            for k, n in part:
                held[k] += n
    if any(n > 1 for part in parts for _, n in part):       # a unit may not fit, though it should
        is_test = improved(tuple(parts), tuple(is_test.tolist()), tuple(counts.tolist()), fraction)
    remarks = remarks_on(files, groups, units, is_test) if groups is not None else []
    test = replace(files.keep(is_test[units]), problems=[], ignored=Counter(), remarks=[])
    train = replace(files, remarks=files.remarks + remarks).keep(~is_test[units])
    return train, test


def composition(units, labels):
    """For each unit the classes in it and their images, a tuple of (class, n)."""
    parts = [()] * (int(units.max()) + 1 if len(units) else 0)
    pairs, numbers = np.unique(np.stack([units, labels], axis=1), axis=0, return_counts=True)
    for (unit, k), n in zip(pairs.tolist(), numbers.tolist()):
        parts[unit] += ((k, n),)
    return parts


@functools.lru_cache(maxsize=4)     # a set is surveyed, and loaded for teacher and student
def improved(parts, is_test, counts, fraction):
    """is_test (units,) after moves of units that bring the shares nearer to `fraction`.

    Classes with few units come first. For each, a few moves at a time are tried, at most ROUNDS
    times: all that are possible where up to ten units differ, else single ones and pairs.
    """
    is_test, counts = np.array(is_test, dtype=bool), np.array(counts)
    held = np.zeros(len(counts))
    for unit in np.flatnonzero(is_test):
        for k, n in parts[unit]:
            held[k] += n
    of_class = [[] for _ in counts]
    for unit, part in enumerate(parts):
        for k, _ in part:
            of_class[k].append(unit)
    several = np.array([len(units) > 1 for units in of_class])
    number = {}
    kinds = [number.setdefault(part, len(number)) for part in parts]
    tables = [np.array(part).T for part in parts]               # classes, images
    settled = set()                                             # choices without a gain by now
    for k in sorted(np.flatnonzero(several), key=lambda k: len(of_class[k])):
        for _ in range(ROUNDS):
            choice = to_choose_from(of_class[k], kinds, is_test)
            if tuple(choice) in settled:
                break
            change = np.zeros((len(choice), len(counts)))
            for row, unit in zip(change, choice):
                classes, images = tables[unit]
                row[classes] = -images if is_test[unit] else images
            touched = np.flatnonzero(change.any(axis=0))
            moves = possible_moves(len(choice))
            gain = gains(moves @ change[:, touched], held[touched], counts[touched],
                         several[touched], fraction)
            best = gain.argmax()
            if gain[best] <= 0:
                settled.add(tuple(choice))
                break
            held += moves[best] @ change
            is_test[[unit for unit, moved in zip(choice, moves[best]) if moved]] ^= True
            settled.clear()
    return is_test


def to_choose_from(units, kinds, is_test):
    """Up to CHOICE units of each part, of those that are alike two: enough to choose from."""
    alike, sides, choice = Counter(), Counter(), []
    for unit in units:
        side = bool(is_test[unit])
        alike[kinds[unit], side] += 1
        if alike[kinds[unit], side] <= 2 and sides[side] < CHOICE:
            sides[side] += 1
            choice.append(unit)
    return choice


@functools.cache
def possible_moves(n):
    """Which of n units change sides, (moves,n) of 0 and 1: any up to ten units, else one or two."""
    most = n if n <= 10 else 2
    moves = [move for size in range(1, most + 1) for move in combinations(range(n), size)]
    table = np.zeros((len(moves), n))
    for row, move in zip(table, moves):
        row[list(move)] = 1
    return table


def gains(changes, held, counts, several, fraction):
    """By how much the classes' errors fall for each row of changes (moves,K) to held (K,).

    Rounded, so that equal moves are equal on every machine. several (K,): has a class two units?
    """
    def error(n):
        """Distance from the share that was asked for; worse: nothing to train or to test on."""
        distance = np.abs(n / counts - fraction) + ((n == 0) & several)
        return np.where(n == counts, np.inf, distance)
    return np.round(error(held).sum() - error(held + changes).sum(axis=1), 9)


def remarks_on(files, groups, units, is_test):
    """Lines for people on a hold-out by groups."""
    named = np.array([bool(group) for group in groups])
    n, held_out = len(set(groups[named])), len(set(groups[named & is_test[units]]))
    images, tested = files.counts(), files.keep(is_test[units]).counts()
    shares = [100 * t / n for t, n in zip(tested, images) if t]
    remarks = [f"--holdout-by: {named.sum():,} images in {n:,} groups, of which {held_out:,} are "
               "held out" + (f": {min(shares):.0f} to {max(shares):.0f} % of each tested class."
                             if shares else ".")]
    if n == named.sum():
        remarks.append("--holdout-by: every image is a group of its own, so nothing is kept "
                       "together; is that the part of the name that was meant?")
    if not named.all():
        example = shown(files.paths[np.argmin(named)])
        remarks.append(f"--holdout-by: {(~named).sum():,} images are in no group, each by itself: "
                       f"the first is {example}.")
    single = [name for k, name in enumerate(files.class_names)
              if images[k] and len(set(units[files.labels == k])) == 1]
    if single:
        remarks.append("Of one group each, so only trained on, not tested: "
                       f"{some(single, most=50)}.")
    return remarks
