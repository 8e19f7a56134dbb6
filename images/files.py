r"""Which image files there are, and of which class: folders, and lists of files.

`root/<class>/**`, or a list with lines `relative/path label`. Both give a `Files`: paths and labels
in two arrays, so that a million images need no million Python objects.

    links that lead in a circle                 followed once
    names that are not UTF-8, control codes     shown escaped, see `shown`

images/decode.py reads them.
"""
import hashlib
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff", ".gif")


class DataError(ValueError):
    """Something about the data that a person can put right; the message says what to do."""


@dataclass
class Files:
    """Images on disk, and what is wrong with them."""
    paths: np.ndarray                                   # (N,) bytes
    labels: np.ndarray                                  # (N,) int64, into class_names
    class_names: list
    problems: list = field(default_factory=list)        # a line of text each, with the path
    ignored: Counter = field(default_factory=Counter)   # endings of files that are not images

    def __len__(self):
        return len(self.paths)

    def keep(self, chosen):
        """The same with only the images of an index array or a mask."""
        return Files(self.paths[chosen], self.labels[chosen], self.class_names, self.problems,
                     self.ignored)

    def names(self, root):
        """Paths relative to root, bytes (so that a folder may be moved)."""
        return [os.path.relpath(path, os.fsencode(root)) for path in self.paths]

    def fingerprint(self, root):
        """16 hexadecimal digits that change with any file's name, size or class."""
        digest = hashlib.sha256()
        for name, path, label in zip(self.names(root), self.paths, self.labels):
            size = os.path.getsize(path) if os.path.exists(path) else -1
            digest.update(name + f" {size} {self.class_names[label]}\n".encode())
        return digest.hexdigest()[:16]

    def counts(self):
        """Images per class, (K,)."""
        return np.bincount(self.labels, minlength=len(self.class_names))


def shown(name):
    r"""A path or a name, bytes or text, as one line of text for people.

    Escaped are bytes that are not UTF-8, line breaks, blanks at the ends and what else `visible`
    escapes: "\x1b[2J", "\x0a", "\u202e". What has been shown already stays as it is.
    """
    return re.sub(r"\A\s+|\s+\Z|\n", lambda blank: "".join(map(escape, blank[0])),
                  visible(os.fsdecode(name)))


def class_name(name):
    """A class's name as it is kept, compared and written: shown, in one Unicode form (NFC)."""
    return shown(unicodedata.normalize("NFC", os.fsdecode(name)))


def visible(text):
    """Text with all characters escaped that a terminal would obey, or that nobody sees.

    Control and format characters, line separators, surrogates; line breaks are kept.
    """
    hidden = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    return text.translate({ord(c): escape(c) for c in hidden - {"\n"}})


def escape(character):
    r"""A character as Python writes it in a string: \x1b, \u202e."""
    code = ord(character)
    if 0xdc80 <= code <= 0xdcff:        # os.fsdecode's surrogate for a byte that is not UTF-8
        code -= 0xdc00
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def natural(name):
    """Sort key that puts class 2 before class 10; the name itself settles ties such as 1 and 01."""
    parts = []
    for part in re.split(r"(\d+)", name):
        if part.isdecimal():
            parts.append((0, int(part), ""))
        elif part:
            parts.append((1, 0, part))
    return parts, name


def refuse(problems, skip, say):
    """Raise DataError with the list of problems; with `skip` say(text) them and return."""
    if not problems:
        return
    if len(problems) == 1 and not skip:
        raise DataError(f"{problems[0]}; repair it, or continue without it by --skip-bad")
    lines = [f"  {problem}" for problem in problems[:50]]
    if len(problems) > 50:
        lines.append(f"  and {len(problems) - 50} more")
    number = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    text = "\n".join([f"{number} with the data:", *lines])
    if not skip:
        raise DataError(f"{text}\nRepair them, or continue without them by --skip-bad")
    say(f"--skip-bad: continuing without these.\n{text}")


# ---- Which files ---------------------------------------------------------------------------------

def list_folder(root):
    """`root/<class>/**` -> Files; classes and files in natural order, hidden files left out.

    DataError if there is no such folder or no class in it. A class without images is kept, as a
    problem.
    """
    if not os.path.isdir(root):
        raise DataError(f"there is no folder {shown(root)}")
    classes = [entry.name for entry in os.scandir(root)
               if entry.is_dir() and not entry.name.startswith(".")]
    classes.sort(key=natural)
    if not classes:
        raise DataError(f"{shown(root)} has no class folders: images are expected as "
                        f"{shown(os.path.join(root, '<class>', '*.jpg'))}")
    folders = [os.path.join(root, name) for name in classes]
    identities = [identity(folder) for folder in (root, *folders)]
    paths, labels, problems, ignored = [], [], [], Counter()
    for k, folder in enumerate(folders):
        elsewhere = set(identities) - {identities[1 + k]}
        images = walk(folder, problems, ignored, elsewhere)
        if not images:
            problems.append(f"class folder {shown(folder)} has no images")
        images.sort(key=natural)
        paths += [os.fsencode(path) for path in images]
        labels += [k] * len(images)
    names = [class_name(name) for name in classes]
    return Files(np.array(paths, dtype=np.bytes_), np.array(labels, dtype=np.int64), names,
                 problems, ignored)


def identity(folder):
    """(device, inode): the same for a folder and for a link to it."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def walk(folder, problems, ignored, elsewhere=frozenset()):
    """Paths of all image files below a folder, which is entered once however many links lead to it.

    elsewhere: identities of the root and the other classes, to which a link is a problem.
    problems (list) and ignored (Counter of the endings of other files) are added to.
    """
    visited, images, waiting = set(), [], [folder]
    while waiting:
        folder = waiting.pop()
        try:
            here = identity(folder)
            if here in elsewhere:
                problems.append(f"{shown(folder)} is a link out of its class")
                continue
            if here in visited:
                continue
            visited.add(here)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            problems.append(f"{shown(folder)}: {error.strerror}")
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):               # False for a link to itself
                waiting.append(entry.path)
            elif entry.name.lower().endswith(IMAGE_FILES):
                images.append(entry.path)
            else:
                ending = os.path.splitext(entry.name)[1].lower()
                ignored[ending or "without ending"] += 1
    return images


def list_file(path, root, num_classes):
    """Lines `relative/path label` -> Files in the lines' order, paths under root.

    Labels are numbers below num_classes. Other lines are problems, and so are files listed twice.
    DataError if the list cannot be read or is empty.
    """
    try:
        with open(path, "rb") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise DataError(f"cannot read the list {shown(path)}: {error.strerror}") from None
    paths, labels, problems, first_line = [], [], [], {}
    folder = os.path.join(os.fsencode(root), b"")
    for number, line in enumerate(lines, 1):
        words = line.rsplit(None, 1)
        if not words:
            continue
        image, label = words[0].lstrip(), words[-1]
        is_label = len(words) == 2 and label.isdigit() and len(label) < 10
        if not is_label or int(label) >= num_classes:
            problems.append(f"{shown(path)}, line {number}: {shown(line[:80])!r} is not a path and "
                            f"a class from 0 to {num_classes - 1}")
        elif image in first_line:
            problems.append(f"{shown(path)}, line {number}: {shown(image)} is listed in line "
                            f"{first_line[image]} already")
        else:
            first_line[image] = number
            paths.append(folder + image)
            labels.append(int(label))
    if not paths and not problems:
        raise DataError(f"the list {shown(path)} is empty: lines 'relative/path label' are "
                        "expected")
    names = [str(k) for k in range(num_classes)]
    return Files(np.array(paths, dtype=np.bytes_), np.array(labels, dtype=np.int64), names,
                 problems)


def hold_out(files, fraction, root):
    """Split class by class into (training, test) Files by a hash of each file's name.

    The split is the same for every run. Of n images of a class, round(fraction * n) are for
    testing, at least one, but never the last one that is left to train on. More images in the
    folder move at most one or two of a class from one part to the other.
    """
    order = np.array([hashlib.sha256(name).hexdigest() for name in files.names(root)])
    is_test = np.zeros(len(files), dtype=bool)
    for k, n in enumerate(files.counts()):
        members = np.where(files.labels == k)[0]
        members = members[order[members].argsort()]
        if n > 1:
            is_test[members[:min(max(1, round(fraction * n)), n - 1)]] = True
    return files.keep(~is_test), files.keep(is_test)
