r"""Which image files there are, and of which class: lists of files.

    a table     a header, then a row for each image: image,label[,split][,group]. Columns may be in
                any order and beside others, between commas, semicolons or tabs, and have other
                names (--list-columns image=path,label=species).
    lines       `relative/path label`, as the lists of ImageNet-LT and iNaturalist have them

Labels are names of classes, of any kind. `split` says train, val or test, in the words that
images/layout.py knows for folders; `group` what belongs together (images/holdout.py). Paths are
relative to the data folder or, if images are only there, to the list's own folder.
"""
import codecs
import csv
import io
import os
import re
import unicodedata
from typing import NamedTuple

import numpy as np

from images.files import DataError, Files, class_name, is_image, natural, shown, some
from images.layout import alike_remarks, renumber, split_of

ROLES = ("image", "label", "split", "group")        # of columns
TABLES = (".csv", ".tsv")                           # endings of lists that need a header


class Row(NamedTuple):
    """An image of a list, or what is wrong with its line."""
    line: int           # from 1
    image: str = ""
    label: str = ""
    split: str = None   # None: the list has no column of splits
    group: str = ""
    wrong: str = None


# ---- Lists to train and to test on ---------------------------------------------------------------

def find_listed(train_list, test_list, root, columns=None, by=None, otherwise=None):
    """(training Files, test Files or None, folder that the paths are relative to).

    test_list: None for the test or val rows of train_list; `otherwise`: the list of test images
    where it has no such rows. columns, by: --list-columns and --holdout-by. DataError as
    read_list's, and if a list has no row for its purpose.
    """
    parts, base, problems = read_list(train_list, root, "train", columns, by)
    train = part_of(parts, train_list, "train")
    train.problems.extend(problems)
    train.remarks.extend(alike_remarks(train.class_names))
    tested = [split for split in ("test", "val") if split in parts]
    test_list = test_list or (None if tested else otherwise)
    if test_list:
        test_parts, _, test_problems = read_list(test_list, root, "test", columns)
        test = part_of(test_parts, test_list, "test", "val")
        said = set(problems)                                    # it may be the same list
        test.problems.extend(problem for problem in test_problems if problem not in said)
        same = os.path.samefile(test_list, train_list)
        unused = [] if same else [(train_list, split) for split in tested]
        unused += [(test_list, split) for split, files in test_parts.items()
                   if files is not test and not (same and split == "train")]
    elif tested:
        test, unused = parts[tested[0]], [(train_list, split) for split in tested[1:]]
        test_list = f"{train_list} ({tested[0]})"
    else:
        column = find_column(train.columns, column_names(columns)["group"])
        if by is None and column is not None:
            train.remarks.append(f"The column {shown(train.columns[column])} is not used: "
                                 "--holdout-by group keeps its groups on one side.")
        return train, None, base
    for path, split in unused:
        train.remarks.append(f"Rows of {shown(path)} whose split is {split} are not used.")
    train.remarks.extend(shared_groups(train, test))
    return train, renumber(test, train.class_names, test_list, train_list), base


def shared_groups(train, test):
    """A remark, in a list, on groups with images to train on and to test on, by a list's column."""
    if train.group is None or test.group is None:
        return []
    tested = set(test.group) - {""}
    both = sorted(tested & set(train.group), key=natural)
    if not both:
        return []
    return [f"{len(both)} of the {len(tested)} groups of the test images have training images, "
            f"too, such as {shown(both[0])}: new pictures will do worse than these."]


def part_of(parts, path, *splits):
    """The first of these splits that a list has. DataError if it has none."""
    for split in splits:
        if split in parts:
            return parts[split]
    raise DataError(f"the list {shown(path)} has no row whose split is {splits[0]}")


def read_list(path, root, whole, columns=None, by=None):
    """({"train", "val" or "test": Files}, folder that the paths are relative to, problems).

    Without a column of splits all images are of the split `whole`. Classes are those of a split, in
    natural order; images are in the list's order. Rows that cannot be used are problems, and so
    are files that are listed twice or lie outside the folder; they are problems of the whole list,
    whichever splits are used. DataError if the list cannot be read, is empty, or does not have the
    columns.
    """
    rows, header = read_rows(path, columns, by)
    base = base_folder(path, root, rows)
    problems, good, first = [], {}, {}              # first: {name: (line, its split, class)}
    for row in rows:
        name, label = relative(row.image, base), class_name(in_unicode(row.label))
        split = whole if row.split is None else split_of(row.split)
        if split is not None:
            good.setdefault(split, {})              # there, also if none of its rows can be used
        wrong = row.wrong
        if not wrong and split is None:
            wrong = f"split {shown(row.split)!r} is none of train, val and test"
        elif not wrong and name is None:
            wrong = (f"{shown(row.image)} is not a path below {shown(base)}; --data-dir names the "
                     "folder that all are below")
        elif not wrong and name in first:
            line, its_split, its_label = first[name]
            wrong = f"{shown(row.image)} is listed in line {line} already"
            if label != its_label:                  # nobody knows which is right
                wrong += f", as {its_label}, not {label}: neither is used"
                good[its_split].pop(name, None)
        if wrong:
            problems.append(f"{shown(path)}, line {row.line}: {wrong}")
        else:
            first[name] = row.line, split, label
            path_of_image = os.fsencode(path_on_disk(base, row.image))
            good[split][name] = path_of_image, label, row.group
    if not rows:
        raise DataError(f"the list {shown(path)} is empty: a header image,label and rows, or lines "
                        "'relative/path label', are expected")
    splits = [row.split for row in rows if row.split is not None]
    if splits and not any(map(split_of, splits)):
        raise DataError(f"the list {shown(path)}: its column of splits never says train, val or "
                        f"test, but {some(dict.fromkeys(splits))}; name another, as in "
                        "--list-columns split=fold, or put these words there")
    parts = {split: as_files(list(images.values()), base, header)
             for split, images in good.items()}
    return parts, base, problems


def in_unicode(label):
    """A class's name; one that is not UTF-8 is in the code page 1252, as Excel writes it."""
    try:
        label.encode()
        return label
    except UnicodeEncodeError:                      # bytes that os.fsdecode has kept
        return os.fsencode(label).decode("cp1252", "replace")


def path_on_disk(base, image):
    r"""The path of a list's image, as its file has it.

    Archives of a Mac and lists may differ in the Unicode form; lists of Windows may have a\b.jpg,
    and the code page 1252.
    """
    path = os.path.join(base, image)
    if image.isascii() and "\\" not in image or os.path.exists(path):
        return path
    for name in (in_unicode(image), in_unicode(image).replace("\\", "/")):
        for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
            if os.path.exists(os.path.join(base, form)):
                return os.path.join(base, form)
    return path


def as_files(images, base, header):
    """Files of (path, class, group) of each image; paths begin with the folder `base`."""
    names = sorted({name for _, name, _ in images}, key=natural)
    number = {name: k for k, name in enumerate(names)}
    files = Files(np.array([path for path, _, _ in images], dtype=np.bytes_),
                  np.array([number[name] for _, name, _ in images], dtype=np.int64), names,
                  columns=tuple(header), base=base)
    if header:
        groups = np.array([group for _, _, group in images], dtype=np.str_)
        files.group = groups if (groups != "").any() else None
    return files


def base_folder(path, root, rows):
    """`root`, or the list's own folder if any of the first images is there and none in root.

    An absolute path is there if it leads below the folder.
    """
    images = [row.image for row in rows[:100] if row.image]
    for folder in (root, os.path.dirname(path) or "."):
        if any(relative(image, folder) is not None
               and os.path.exists(path_on_disk(folder, image)) for image in images):
            return folder
    return root


def relative(image, base):
    """A path without detours, relative to base: of a/../b/x.jpg b/x.jpg; None outside of it."""
    name = os.path.normpath(image)
    if os.path.isabs(image):
        try:
            name = os.path.relpath(image, os.path.abspath(base))
            if is_outside(name):                            # unless by a link
                name = os.path.relpath(os.path.realpath(image), os.path.realpath(base))
        except ValueError:                                  # another drive of Windows
            return None
    return None if is_outside(name) else name


def is_outside(name):
    return name.split(os.sep)[0] == ".."


# ---- Reading -------------------------------------------------------------------------------------

def read_rows(path, columns, by):
    """([Row of each line that is not blank], header: the names of a table's columns, else ())."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DataError(f"cannot read the list {shown(path)}: {error.strerror}") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = content.decode("utf-16", "replace").encode()
    elif os.name == "nt":
        content = from_windows(content)
    content = content.removeprefix(codecs.BOM_UTF8)
    content = re.sub(rb"\Asep=.(?=\r?\n)", b"", content)      # Excel's own line, left empty
    first = next((line for line in content.splitlines() if line.strip()), b"")
    names = column_names(columns)
    delimiter, header = header_of(os.fsdecode(first), names)
    if not missing_columns(header, names):
        return table_rows(path, content, delimiter, names, by), header
    is_table = columns or os.fsdecode(path).lower().endswith(TABLES) or any(map(is_image, header))
    if is_table and first:
        refuse_header(path, header, names)
    return line_rows(content), ()


def from_windows(content):
    """UTF-8 of a file that Excel may have written in the code page 1252.

    On other systems bytes that are not UTF-8 are kept: names of files may have them.
    """
    try:
        content.decode()
        return content
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace").encode()


def line_rows(content):
    """The Rows of lines `relative/path label`."""
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        words = os.fsdecode(line).strip().rsplit(None, 1)
        if len(words) == 2:
            rows.append(Row(number, *words))
        elif words:
            rows.append(Row(number, wrong=f"{shown(words[0][:80])!r} is not a path and a class"))
    return rows


def table_rows(path, content, delimiter, names, by):
    """The Rows of a table. DataError for two columns of one name, and for quotes without an end."""
    reader = csv.reader(io.StringIO(os.fsdecode(content), newline=""), delimiter=delimiter,
                        skipinitialspace=True, strict=True)
    rows, header, line = [], None, 0
    try:
        for fields in reader:
            line, start = reader.line_num, line + 1
            fields = [field.strip() for field in fields]
            if not any(fields):
                continue
            if header is None:
                header = fields
                for name in set(names.values()):
                    if header.count(name) > 1:
                        raise DataError(f"the list {shown(path)} has {header.count(name)} columns "
                                        f"called {shown(name)}: rename them")
                place = {role: find_column(header, name) for role, name in names.items()}
                if by not in (None, "group"):       # by its own name
                    place["group"] = find_column(header, by)
                continue
            rows.append(table_row(start, fields, header, place))
    except csv.Error as error:
        raise DataError(f"the list {shown(path)}, line {line + 1}: {error}; a quote at the "
                        "beginning of a field needs another at its end") from None
    return rows


def table_row(line, fields, header, place):
    """The Row of a table's fields; place: {role: number of its column, or None}."""
    while len(fields) > len(header) and not fields[-1]:
        fields = fields[:-1]
    if len(fields) != len(header):
        return Row(line, wrong=f"fields: {len(fields)}, in the header {len(header)}")
    values = {role: fields[k] for role, k in place.items() if k is not None}
    for role in ("image", "label"):
        if not values[role]:
            return Row(line, **values | {"wrong": f"its {role} is empty"})
    return Row(line, **values)


# ---- Columns -------------------------------------------------------------------------------------

def column_names(columns):
    """{role: name of its column} of --list-columns, image=path,label=species.

    A role that is not in it is its column's name. DataError for other words.
    """
    names = {role: role for role in ROLES}
    for text in columns.split(",") if columns else ():
        role, _, name = text.partition("=")
        if role.strip() not in ROLES or not name.strip():
            raise DataError(f"--list-columns says {shown(text)!r}: it is for {', '.join(ROLES)}, "
                            "as in image=path,label=species")
        names[role.strip()] = name.strip()
    return names


def find_column(header, name):
    """The number of a column by its name, in any case if need be, or None."""
    if name in header:
        return header.index(name)
    lower = [column.lower() for column in header]
    return lower.index(name.lower()) if name.lower() in lower else None


def missing_columns(header, names):
    """Names of columns that a table must have and this header has not."""
    needed = [role for role in ROLES if role in ("image", "label") or names[role] != role]
    return [names[role] for role in needed if find_column(header, names[role]) is None]


def header_of(line, names):
    """(delimiter, names of the columns) of a table's first line: the delimiter that fits best."""
    best = ",", []
    for delimiter in ",;\t":
        try:
            fields = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
        except csv.Error:
            continue
        fields = [field.strip() for field in fields]
        if not missing_columns(fields, names):
            return delimiter, fields
        if len(fields) > len(best[1]):
            best = delimiter, fields
    return best


def refuse_header(path, header, names):
    """DataError for a table's first line that does not name the columns."""
    place, found = f"the list {shown(path)}, line 1", some(header, most=20)
    if any(map(is_image, header)):
        raise DataError(f"{place}: {found} are an image's; put a line before it that names the "
                        "columns, such as image,label")
    missing = ", ".join(missing_columns(header, names))
    raise DataError(f"{place}: no column {shown(missing)} among {found}; name them, as in "
                    "--list-columns image=path,label=species")
