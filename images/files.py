r"""Which image files there are, and of which class: folders of classes.

`root/<class>/**` gives a `Files`: paths and labels in two arrays, so that a million images need no
million Python objects. Lists of files (images/lists.py) give the same.

    links that lead in a circle                 followed once
    names that are not UTF-8, control codes     shown escaped, see `shown`
    names in two Unicode forms                  compared as NFC; two folders of one are an error
    a run's folder among the images             passed over
"""
import hashlib
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

IMAGE_FILES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".ppm", ".pgm",
               ".pbm", ".pnm", ".webp", ".tif", ".tiff", ".gif", ".avif")
# Folders in which systems keep thumbnails and deleted files (NAS, macOS, Windows, Linux).
SYSTEM_FOLDERS = ("@eadir", "@__thumb", "@recycle", "#recycle", "__macosx", "$recycle.bin",
                  "system volume information", "lost+found")
RUN_FILES = {"config.json", "log.jsonl", "result.json", "last.pt", "lock", "overwriting"}


class DataError(ValueError):
    """Something about the data that a person can put right; the message says what to do."""


@dataclass
class Files:
    """Images on disk, and what is wrong with them."""
    paths: np.ndarray                                   # (N,) bytes
    labels: np.ndarray                                  # (N,) int64, into class_names
    class_names: list
    problems: list = field(default_factory=list)        # a line of text each, with the path
    ignored: Counter = field(default_factory=Counter)   # endings of other files, folders left out
    white: int = 65535                                  # see images.decode.WHITES
    remarks: list = field(default_factory=list)         # lines of text that are only said
    content: np.ndarray = None      # (N,) a number that files of the same content share
    group: np.ndarray = None        # (N,) text, of a list's column: what belongs together
    columns: tuple = ()             # names of a list's columns
    base: str = None                # the folder that a list's paths are relative to

    def __post_init__(self):
        if self.content is None:
            self.content = np.arange(len(self.paths))

    def __len__(self):
        return len(self.paths)

    def keep(self, chosen):
        """The same with only the images of an index array or a mask."""
        group = None if self.group is None else self.group[chosen]
        return replace(self, paths=self.paths[chosen], labels=self.labels[chosen],
                       content=self.content[chosen], group=group)

    def names(self, root):
        """Paths relative to root with /, bytes: a folder may be moved, also from Windows."""
        root, separator = os.fsencode(root), os.fsencode(os.sep)
        begin = os.path.join(root, b"")             # cut off: relpath is slow
        names = (os.path.normpath(path[len(begin):]) if root and path.startswith(begin)
                 else os.path.relpath(path, root) for path in self.paths)
        return [name.replace(separator, b"/") for name in names]

    def fingerprint(self, root):
        """16 hexadecimal digits that change with any file's name, size or class.

        Names are relative to root, or for a list's images to what the list's paths are relative to.
        """
        digest = hashlib.sha256()
        for name, path, label in zip(self.names(self.base or root), self.paths, self.labels):
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
        raise DataError(f"{problems[0]}; repair it, or continue without it with --skip-bad")
    lines = [f"  {problem}" for problem in problems[:50]]
    if len(problems) > 50:
        lines.append(f"  and {len(problems) - 50} more")
    number = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    text = "\n".join([f"{number} with the data:", *lines])
    if not skip:
        raise DataError(f"{text}\nRepair them, or continue without them with --skip-bad")
    say(f"--skip-bad: continuing without these.\n{text}")


# ---- Which files ---------------------------------------------------------------------------------

def is_image(name):
    """Is a file of this name taken for an image?"""
    return name.lower().endswith(IMAGE_FILES)


def is_folder(entry):
    """Is an os.DirEntry a folder, or a link to one? False for errors."""
    try:
        return entry.is_dir()
    except OSError:                                     # a link to itself
        return False


def is_lost(entry):
    """Is an os.DirEntry a link to nothing, or to itself, with a name that no image has?"""
    return entry.is_symlink() and not os.path.exists(entry.path) and not is_image(entry.name)


def are_of_a_run(entries):
    """Are these os.DirEntries those of a run's folder?"""
    names = {entry.name for entry in entries}
    about_to_begin = names == {"lock"} and not is_folder(entries[0])
    return len(RUN_FILES & names) >= 2 or about_to_begin


def ignored_text(ignored):
    """The Counter of files that are left out, for people."""
    endings = ", ".join(f"{n} {ending}" for ending, n in sorted(ignored.items()))
    return f"Ignored, not images: {endings}"


def is_run(folder):
    """Is this a run's folder, or one that holds nothing but runs?"""
    try:
        entries = list(os.scandir(folder))
    except OSError:                                     # walk makes a problem of it
        return False
    if are_of_a_run(entries):
        return True
    inner = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    return (bool(inner) and not any(is_image(entry.name) for entry in entries)
            and all(map(is_run, inner)))


def subfolders(root, ignored=None):
    """(names of the folders in root, in natural order, names of the images in it).

    Links to nothing are among the folders. Runs are left out, see also left_out; ignored (Counter)
    is added to. DataError if there is no such folder.
    """
    ignored = Counter() if ignored is None else ignored
    folders, images = [], []
    try:
        for entry in os.scandir(root):
            if left_out(entry, ignored):
                continue
            if is_lost(entry):
                folders.append(entry.name)
            elif is_folder(entry):
                if is_run(entry.path):
                    ignored[f"folder {shown(entry.name)} of runs"] += 1
                else:
                    folders.append(entry.name)
            elif is_image(entry.name):
                images.append(entry.name)
            else:
                ignored[ending(entry.name)] += 1
    except FileNotFoundError:
        raise DataError(f"there is no folder {shown(root)}") from None
    except NotADirectoryError:
        raise DataError(f"{shown(root)} is no folder: unpack it if it is an archive") from None
    except OSError as error:
        raise DataError(f"cannot read {shown(error.filename)}: {error.strerror}") from None
    return sorted(folders, key=natural), sorted(images)


def list_folder(root):
    """`root/<class>/**` -> Files; classes and files in natural order, see left_out.

    DataError if there is no such folder, no class in it, or one class twice. A class without images
    is kept, as a problem; images beside the class folders are a problem.
    """
    ignored = Counter()
    classes, beside = subfolders(root, ignored)
    if not classes:
        raise DataError(f"{shown(root)} has no class folders: images are expected as "
                        f"{shown(os.path.join(root, '<class>', '*.jpg'))}")
    names = [class_name(name) for name in classes]
    for name, n in Counter(names).items():
        if n > 1:
            raise DataError(f"{shown(root)} has {n} folders called {name}, in different Unicode "
                            "forms; make them one folder")
    folders = [os.path.join(root, name) for name in classes]
    places = {}                                     # {identity: the folder, rather than a link}
    for folder in sorted((root, *folders), key=os.path.islink):
        if os.path.exists(folder):
            places.setdefault(identity(folder), folder)
    paths, labels, problems = [], [], []
    if beside:
        problems.append(f"images in {shown(root)} itself, in no class folder: {some(beside)}")
    for k, folder in enumerate(folders):
        if not os.path.exists(folder):
            problems.append(f"class folder {shown(folder)} is a link to nothing")
            continue
        here = identity(folder)
        if places[here] != folder:
            problems.append(f"class folder {shown(folder)} is the same as {shown(places[here])}")
            continue
        images = sorted(walk(folder, problems, ignored, set(places) - {here}), key=natural)
        if not images:
            problems.append(f"class folder {shown(folder)} has no images")
        paths += [os.fsencode(path) for path in images]
        labels += [k] * len(images)
    return Files(np.array(paths, dtype=np.bytes_), np.array(labels, dtype=np.int64), names,
                 problems, ignored)


def some(names, most=5):
    """The first five names, or `most`, for people: a, b, c, d, e and 7 more."""
    names = [shown(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def identity(folder):
    """(device, inode): the same for a folder and for a link to it."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def ending(name):
    """How the name of a file that is no image ends, for people."""
    return os.path.splitext(name)[1].lower() or "without ending"


def left_out(entry, ignored):
    """Is an os.DirEntry hidden, or a folder of SYSTEM_FOLDERS? Folders and images are counted."""
    hidden = entry.name.startswith(".")
    if is_folder(entry):
        hidden = hidden or entry.name.lower() in SYSTEM_FOLDERS
        if hidden:
            ignored[f"folder {shown(entry.name)}"] += 1
    elif hidden and is_image(entry.name):
        ignored["hidden"] += 1
    return hidden


def walk(folder, problems, ignored, elsewhere=frozenset()):
    """Yield all image files below a folder, which is entered once however many links lead to it.

    elsewhere: identities of the root and the other classes, to which a link is a problem.
    problems (list) and ignored (Counter of what is left out) are added to.
    """
    visited, waiting = set(), [folder]
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
            if are_of_a_run(entries):
                ignored[f"folder {shown(os.path.basename(folder))} of runs"] += 1
                continue
        except OSError as error:
            problems.append(f"{shown(folder)}: {error.strerror}")
            continue
        for entry in entries:
            if left_out(entry, ignored):
                continue
            if is_folder(entry):
                waiting.append(entry.path)
            elif is_image(entry.name):
                yield entry.path
            else:
                ignored["link to nothing" if is_lost(entry) else ending(entry.name)] += 1
