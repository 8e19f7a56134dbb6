"""images/lists.py: tables as people have them, the published lists, and what is wrong with both."""
import argparse
import os
import random
import time
from dataclasses import replace

import pytest

from engine.datasets import survey
from image_folders import write_files
from images import lists
from images.files import DataError
from images.lists import find_listed, from_windows, read_list

TABLE = "image,label\na/0.jpg,cat\na/1.jpg,dog\nb/0.jpg,cat\n"


def write(root, content, name="list.csv"):
    """A list beside four files; returns its path."""
    write_files(root, {"a": 2, "b": 2})
    if isinstance(content, str):
        content = content.encode()
    (root / name).write_bytes(content)
    return str(root / name)


def names(files, root):
    """[(path below root, class)] of Files."""
    return [(name.decode(), files.class_names[k])
            for name, k in zip(files.names(str(root)), files.labels)]


def listed(root, content, name="list.csv", **how):
    """(training, test or None) as `names`, and the training Files of a list."""
    train, test, base = find_listed(write(root, content, name), None, str(root), **how)
    return names(train, base), test and names(test, base), train


EXPECTED = [("a/0.jpg", "cat"), ("a/1.jpg", "dog"), ("b/0.jpg", "cat")]


# ---- Tables --------------------------------------------------------------------------------------

@pytest.mark.parametrize("content, name, columns", [
    (TABLE, "list.csv", None), (TABLE, "list.txt", None),
    (TABLE.replace(",", ";"), "list.csv", None), (TABLE.replace(",", "\t"), "list.tsv", None),
    (TABLE.replace("\n", "\r\n"), "list.csv", None), (TABLE.replace("\n", "\r"), "list.csv", None),
    (b"\xef\xbb\xbf" + TABLE.encode(), "list.csv", None), (TABLE.encode("utf-16"), "l.csv", None),
    (TABLE.rstrip(), "list.csv", None), ("\n" + TABLE.replace("\n", "\n\n"), "list.csv", None),
    ('"image","label"\n"a/0.jpg","cat"\n"a/1.jpg","dog"\n"b/0.jpg","cat"', "list.csv", None),
    (" Image , LABEL \n a/0.jpg , cat\na/1.jpg, dog \nb/0.jpg,cat,\n", "list.csv", None),
    ("id,label,note,image\n1,cat,,a/0.jpg\n2,dog,x,a/1.jpg\n3,cat,,b/0.jpg", "list.csv", None),
    ("path,species\na/0.jpg,cat\n./a/1.jpg,dog\na/../b/0.jpg,cat", "l.txt",
     "image=path,label=species"),
    ("image,label,species\na/0.jpg,0,cat\na/1.jpg,1,dog\nb/0.jpg,0,cat", "list.csv",
     "label=species")])
def test_tables_that_say_the_same(content, name, columns, tmp_path):
    """A mark of encoding that is part of the first column's name; a class "dog\\r"; a delimiter of
    another country; the header as an image."""
    train, test, files = listed(tmp_path, content, name, columns=columns)
    assert [(path.removeprefix("./").replace("a/../", ""), k) for path, k in train] == EXPECTED
    assert test is None and not files.problems and files.class_names == ["cat", "dog"]


def test_labels_are_text_of_any_kind(tmp_path):
    """A comma in a name as the next column; class 10 before class 9; one class under two forms."""
    content = ('image,label\na/0.jpg,"pie, apple"\na/1.jpg,10\nb/0.jpg,9\n'
               'b/1.jpg,"said ""no"""\n')
    assert listed(tmp_path, content)[2].class_names == ["9", "10", "pie, apple", 'said "no"']
    content = "image,label\na/0.jpg,Ba\u0308r\na/1.jpg,B\u00e4r\n"
    assert listed(tmp_path, content)[2].class_names == ["B\u00e4r"]


def test_a_table_of_excel_under_windows():
    """A traceback, since not every byte of code page 1252 is UTF-8 there."""
    assert from_windows("image,Bär".encode("cp1252")) == "image,Bär".encode()
    assert from_windows("image,Bär".encode()) == "image,Bär".encode()


def test_a_path_in_another_unicode_form_is_found(tmp_path):
    """An archive of a Mac, a list of Excel: "No such file", where ls shows exactly that name."""
    path = write(tmp_path, "image,label\nK\u00e4fer.jpg,x\na/1.jpg,y\n")
    (tmp_path / "a" / "0.jpg").rename(tmp_path / "Ka\u0308fer.jpg")
    train, _, _ = find_listed(path, None, str(tmp_path))
    assert all(map(os.path.exists, train.paths)) and len(train) == 2


def test_a_column_of_splits(tmp_path):
    """A val row that is trained on; classes of the test rows numbered by themselves."""
    rows = ["image,label,fold", "a/0.jpg,dog,Train", "a/1.jpg,cat,TRAINING", "b/0.jpg,dog,Test"]
    train, test, _ = listed(tmp_path, "\n".join(rows), columns="split=fold")
    assert train == [("a/0.jpg", "dog"), ("a/1.jpg", "cat")] and test == [("b/0.jpg", "dog")]
    rows[3] = "b/0.jpg,dog,valid"
    assert listed(tmp_path, "\n".join(rows), columns="split=fold")[1] == [("b/0.jpg", "dog")]
    rows.append("b/1.jpg,cat,test")
    train, test, files = listed(tmp_path, "\n".join(rows), columns="split=fold")
    assert len(train) == 2 and test == [("b/1.jpg", "cat")]
    assert files.remarks == [f"Rows of {tmp_path}/list.csv whose split is val are not used."]


def test_two_lists(tmp_path):
    """A test list's classes in its own order; a class that training does not know; rows of the
    training list tested on beside those of the test list."""
    train_list = write(tmp_path, "image,label,split\na/0.jpg,dog,train\na/1.jpg,cat,train\n"
                                 "b/1.jpg,cat,test\n")
    test_list = write(tmp_path, "b/0.jpg dog\nb/1.jpg owl\n", "test.txt")
    train, test, base = find_listed(train_list, test_list, str(tmp_path))
    assert names(test, base) == [("b/0.jpg", "dog")] and test.class_names == ["cat", "dog"]
    assert test.problems == [f"class owl of {test_list} is not in {train_list}"]
    assert "whose split is test are not used" in train.remarks[0]
    same, test, base = find_listed(train_list, train_list, str(tmp_path))
    assert len(same) == 2 and names(test, base) == [("b/1.jpg", "cat")] and not same.remarks


def test_rows_of_a_test_list_that_are_left_out(tmp_path):
    """Its rows to train on and its val rows, which vanish without a word."""
    content = "image,label,split\na/0.jpg,cat,train\na/1.jpg,dog,val\nb/0.jpg,cat,test\n"
    both = write(tmp_path, content, "both.csv")
    alone = write(tmp_path, "b/1.jpg cat\nb/2.jpg dog\n", "alone.txt")
    for train_list, test_list, left_out in [
            (alone, both, [(both, "train"), (both, "val")]), (both, both, [(both, "val")]),
            (both, alone, [(both, "test"), (both, "val")]), (alone, alone, [])]:
        train, test, base = find_listed(train_list, test_list, str(tmp_path))
        assert train.remarks == [f"Rows of {path} whose split is {split} are not used."
                                 for path, split in left_out]


@pytest.mark.parametrize("two_lists", [False, True])
def test_groups_with_images_to_train_and_to_test_on_are_named(two_lists, tmp_path):
    """A patient on both sides, without a word; images of no group taken for one."""
    content = ("image,label,split,patient\na/0.jpg,cat,train,p2\na/1.jpg,dog,train,\n"
               "b/0.jpg,cat,test,{}\nb/1.jpg,cat,test,p10\nb/2.jpg,cat,test,\n")
    for patient, said in (("p2", ["1 of the 2 groups of the test images have training images, too, "
                                  "such as p2: new pictures will do worse than these."]),
                          ("p3", [])):
        path = write(tmp_path, content.format(patient))
        other = path if two_lists else None
        train, _, _ = find_listed(path, other, str(tmp_path), "group=patient")
        assert train.remarks == said


def test_lists_of_windows_find_their_images(tmp_path):
    """Backslashes, the code page 1252, Excel's first line: every row as "no such file"; K\\xe4fer
    for Käfer, in every table and prediction."""
    write_files(tmp_path, {"a": 1, "Bär": 2})
    rows = "sep=;\r\nimage;label\r\na\\0.jpg;cat\r\n.\\Bär\\1.jpg;Käfer\r\nA\\9.jpg;cat\r\n"
    for encoding in ("utf-8", "cp1252"):
        path = write(tmp_path / "lists", rows.encode(encoding))
        for root in (tmp_path, tmp_path / "nowhere"):           # by --data-dir; beside the list
            place = path if root == tmp_path else write(tmp_path, rows.encode(encoding))
            train, _, base = find_listed(place, None, str(root))
            assert names(train, base)[:2] == [("a/0.jpg", "cat"), ("Bär/1.jpg", "Käfer")]
            assert os.path.realpath(base) == os.path.realpath(tmp_path) and len(train) == 3


@pytest.mark.parametrize("by, groups", [
    ("group", ["p1", "", "p2"]), ("Group", ["p1", "", "p2"]), ("plate", ["7", "7", "8"]),
    ("(.)/", None), (None, ["p1", "", "p2"])])
def test_a_column_of_groups(by, groups, tmp_path):
    """A column that is taken for a pattern; the group of another row."""
    content = ("group,plate,image,label\np1,7,a/0.jpg,cat\n,7,a/1.jpg,dog\np2,8,b/0.jpg,cat\n")
    _, _, files = listed(tmp_path, content, by=by)
    assert (None if files.group is None else files.group.tolist()) == groups
    said = ["The column group is not used: --holdout-by group keeps its groups on one side."]
    assert files.remarks == (said if by is None else [])
    content = content.replace("group", "patient")
    _, _, files = listed(tmp_path, content, by="group", columns="group=patient")
    assert files.group.tolist() == ["p1", "", "p2"]


def test_paths_are_of_the_data_folder_or_of_the_lists(tmp_path):
    """A list far from its images; images of another set of the same names beside the list."""
    for folder in ("data", "lists"):
        (tmp_path / folder).mkdir()
    path = write(tmp_path / "lists", TABLE)
    assert find_listed(path, None, str(tmp_path / "data"))[2] == str(tmp_path / "lists")
    write_files(tmp_path / "data", {"a": 2, "b": 1})
    train, _, base = find_listed(path, None, str(tmp_path / "data"))
    assert base == str(tmp_path / "data") and names(train, base) == EXPECTED
    content = TABLE.replace("a/0", f"{tmp_path}/data/a/0")              # an absolute path
    train, _, base = find_listed(write(tmp_path / "lists", content), None, str(tmp_path / "data"))
    assert names(train, base) == EXPECTED and not train.problems


def test_a_fingerprint_does_not_depend_on_the_folder_the_command_is_given_in(tmp_path, monkeypatch):
    """--resume from elsewhere refused, as if the images beside the list were others."""
    write_files(tmp_path, {"lists/a": 2, "lists/b": 1})
    path, found = write(tmp_path / "lists", TABLE), set()
    for folder in (tmp_path, tmp_path / "lists"):
        monkeypatch.chdir(folder)
        found.add(find_listed(path, None, "data")[0].fingerprint("data"))
    assert len(found) == 1


def test_absolute_paths_may_lie_beside_the_list(tmp_path):
    """Every row refused as not below the default data folder, because an absolute path is found
    from any folder."""
    (tmp_path / "lists").mkdir()
    content = TABLE.replace("a/", f"{tmp_path}/lists/a/").replace("b/", f"{tmp_path}/lists/b/")
    path = write(tmp_path / "lists", content)
    for root in (tmp_path / "data", tmp_path / "lists", tmp_path):
        train, _, base = find_listed(path, None, str(root))
        assert base == str(tmp_path if root == tmp_path else tmp_path / "lists")
        assert names(train, tmp_path / "lists") == EXPECTED and not train.problems


@pytest.mark.parametrize("row, words", [
    ("a/1.jpg", "fields: 1, in the header 3"), ("a/1.jpg,pie, apple,train", "fields: 4"),
    ("a/1.jpg,,train", "its label is empty"), (",cat,train", "its image is empty"),
    ("a/0.jpg,dog,train", "a/0.jpg is listed in line 2 already"),
    ("b/../a/0.jpg,dog,test", "is listed in line 2 already"),
    ("../x.jpg,cat,train", "is not a path below"), ("/etc/x.jpg,cat,train", "not a path below"),
    ("a/1.jpg,cat,", "split '' is none of train, val and test"),
    ("a/1.jpg,cat,fold 1", "split 'fold 1' is none of train, val and test")])
def test_a_row_that_cannot_be_used_is_named_by_its_line(row, words, tmp_path):
    """A class called "pie" and one "apple"; an image with two labels; the line before or after."""
    content = f'image,label,split\na/0.jpg,cat,train\n"b/\n1.jpg",dog,train\n{row}\n'
    train, _, files = listed(tmp_path, content)
    assert len(train) == 2 - ("listed in line 2" in words) and len(files.problems) == 1
    assert files.problems[0].startswith(f"{tmp_path}/list.csv, line 5: ")
    assert words in files.problems[0]


@pytest.mark.parametrize("test_list", [False, True])
def test_bad_rows_are_problems_whichever_splits_are_used(test_list, tmp_path):
    """A misspelled split and an image with two labels that vanish without a word, because the
    list's first split is not used: val beside test, or test beside a list of test images."""
    rows = ["a/0.jpg,cat,val", "a/1.jpg,cat,train", "a/2.jpg,dog,train", "b/0.jpg,cat,test",
            "b/1.jpg,dog,test", "b/2.jpg,cat,tarin", "a/1.jpg,dog,test", "b/9.jpg,cat,train"]
    path = write(tmp_path, "\n".join(["image,label,split", *rows]))
    other = write(tmp_path, "b/3.jpg cat\nb/4.jpg\n", "test.txt") if test_list else None
    train, test, _ = find_listed(path, other, str(tmp_path))
    assert len(train) == 2 and len(test) == (1 if test_list else 2)     # neither has a/1.jpg
    assert [problem.split(": ")[0] for problem in train.problems] == [
        f"{path}, line 7", f"{path}, line 8"]
    assert "split 'tarin'" in train.problems[0] and "line 3 already" in train.problems[1]
    assert [problem.split(": ")[0] for problem in test.problems] == (
        [f"{other}, line 2"] if test_list else [])


@pytest.mark.parametrize("bad", [("train",), ("test",), ("train", "test")])
def test_a_split_without_a_row_that_can_be_used_is_there_all_the_same(bad, tmp_path):
    """"Give it a column split" to a list that has one, whose paths are another machine's; labels of
    no image that are of float64, which cannot be counted."""
    rows = [f"{'/elsewhere' if split in bad else 'a'}/{i}.jpg,{label},{split}"
            for split in ("train", "test") for i, label in enumerate(("cat", "dog"))]
    path = write(tmp_path, "\n".join(["image,label,split", *rows]))
    train, test, _ = find_listed(path, None, str(tmp_path))
    assert train.counts().sum() == (0 if "train" in bad else 2) and test.counts().sum() == 0
    assert sum("is not a path below" in problem for problem in train.problems) == 2 * len(bad)


def test_one_list_for_both_purposes_names_a_bad_row_once(tmp_path):
    """Each mistake as two problems; a remark that the rows to test on are not used."""
    path = write(tmp_path, "image,label,split\na/0.jpg,cat,train\na/1.jpg,cat,test\n"
                           "b/0.jpg,cat,tset\n")
    train, test, _ = find_listed(path, path, str(tmp_path))
    assert len(train.problems + test.problems) == 1 and not train.remarks


@pytest.mark.parametrize("content, name, columns, words", [
    (None, "no.csv", None, "cannot read the list .*no.csv: No such file"),
    ("", "list.csv", None, "is empty"), ("\n", "list.txt", None, "is empty"),
    ("image,label\n", "list.csv", None, "is empty"),
    ("path,species\na/0.jpg,cat", "list.csv", None, "line 1: no column image, label among path, "
     "species; .*--list-columns image=path,label=species"),
    ("image,label\na/0.jpg,cat", "list.csv", "label=species", "no column species among image, la"),
    ("image,label\na/0.jpg,cat", "list.csv", "split=fold", "no column fold among image, label"),
    ("image,label\na/0.jpg,cat", "list.csv", "picture=x", "--list-columns says 'picture=x'"),
    ("image,label\na/0.jpg,cat", "list.csv", "image", "--list-columns says 'image'"),
    ("a/0.jpg,cat\na/1.jpg,dog", "list.csv", None, "put a line before it that names the columns"),
    ("a/0.jpg;cat\na/1.jpg;dog", "list.txt", None, "put a line before it that names the columns"),
    ("image,label,label\na/0.jpg,cat,dog", "list.csv", None, "has 2 columns called label"),
    ('image,label\na/0.jpg,cat\n"a/1.jpg,dog\nb/0.jpg,cat', "list.csv", None, "list.csv, line 3: "),
    ("image,label,split\na/0.jpg,cat,0\na/1.jpg,dog,1", "list.csv", None, "but 0, 1; name another"),
    ("image,label,split\na/0.jpg,cat,test", "list.csv", None, "no row whose split is train")])
def test_a_list_that_cannot_be_used_is_refused(content, name, columns, words, tmp_path):
    """A traceback of the csv module; a run on no images; ten thousand lines for one mistake."""
    path = str(tmp_path / name) if content is None else write(tmp_path, content, name)
    with pytest.raises(DataError, match=words) as error:
        find_listed(path, None, str(tmp_path), columns)
    assert "\n" not in str(error.value)


# ---- Lines `path label` --------------------------------------------------------------------------

def read_lines(path, root="/root"):
    """The Files of a list of lines, with its problems."""
    parts, _, problems = read_list(str(path), root, "train")
    return replace(parts["train"], problems=problems)


@pytest.mark.parametrize("line", ["a.jpg", "7", "\x00"])
def test_a_list_of_lines_names_its_bad_ones(line, tmp_path):
    """A path alone. Blank lines and paths with blanks are fine."""
    (tmp_path / "list.txt").write_text(f"b c.jpg 0\n\n{line}\nd.jpg\t2\r\n")
    found = read_lines(tmp_path / "list.txt")
    assert found.paths.tolist() == [b"/root/b c.jpg", b"/root/d.jpg"]
    assert found.labels.tolist() == [0, 1] and found.class_names == ["0", "2"]
    assert len(found.problems) == 1 and "line 3" in found.problems[0]


def test_a_list_names_what_it_lists_twice(tmp_path):
    """One image as two classes."""
    (tmp_path / "list.txt").write_text("a.jpg 0\nb.jpg 1\na.jpg 1\n")
    found = read_lines(tmp_path / "list.txt")
    assert [os.path.basename(path) for path in found.paths] == [b"b.jpg"]      # who knows which
    assert found.problems[0].endswith("line 3: a.jpg is listed in line 1 already, as 0, not 1: "
                                      "neither is used")
    (tmp_path / "list.txt").write_text("a.jpg 0\nb.jpg 1\na.jpg 0\n")
    found = read_lines(tmp_path / "list.txt")
    assert len(found) == 2 and found.problems[0].endswith("is listed in line 1 already")


def test_a_link_to_the_images_has_the_paths_of_the_list(tmp_path):
    """Absolute paths of a list, "not below data", because data is a link; files that nobody meant
    to read; a folder ..b that is taken for one above."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.jpg").touch()
    (tmp_path / "data").symlink_to("disk")
    base = str(tmp_path / "data")
    assert lists.relative(str(tmp_path / "disk" / "a.jpg"), base) == "a.jpg"
    for outside in (str(tmp_path / "a.jpg"), "../a.jpg", "b/../../a.jpg", ".."):
        assert lists.relative(outside, base) is None
    assert lists.relative("..b//./..c/a.jpg", base) == "..b/..c/a.jpg"


def test_long_lists_are_read_in_seconds(tmp_path):
    """A loop over all lines for every line; a Python object for each of them that stays. (The
    largest published list has 437,513 lines.)"""
    lines = [f"train_val2018/Aves/{i % 8142}/{i:032x}.jpg {i % 8142}\n" for i in range(20_000)]
    (tmp_path / "list.txt").write_text("".join(lines))
    start = time.process_time()
    found = read_lines(tmp_path / "list.txt", "/data/inat")
    assert len(found) == 20_000 and not found.problems and time.process_time() - start < 5
    assert found.paths.nbytes < 1.8e6


@pytest.mark.slow
@pytest.mark.parametrize("table", [False, True])
def test_2000_damaged_lists_are_read_or_named(table, tmp_path):
    """A line that is no path and label must never become an image of another class, or another
    error."""
    draw, path = random.Random(0), tmp_path / "list.txt"
    delimiter, header = (b",", [b"image,label\n"]) if table else (b" ", [])
    lines = [b"folder %d/image_%d.jpg%b%d\n" % (i % 7, i, delimiter, i % 5) for i in range(40)]
    truth = {b"/root/" + line.rsplit(delimiter, 1)[0]: line.rsplit(delimiter, 1)[1].decode().strip()
             for line in lines}
    for _ in range(2000):
        content = bytearray(b"".join(header + lines))
        for _ in range(draw.randint(1, 6)):
            at, inserted = draw.randrange(len(content)), draw.randint(0, 3)
            content[at:at + draw.randint(0, 3)] = bytes(draw.randrange(256)
                                                        for _ in range(inserted))
        path.write_bytes(content)
        try:
            found = read_lines(path)
        except DataError:
            continue
        assert len(found) + len(found.problems) >= 28
        right = [truth[name] == found.class_names[k]
                 for name, k in zip(found.paths.tolist(), found.labels.tolist()) if name in truth]
        assert sum(right) >= len(right) - 6                     # a changed label: another class
        assert all(str(path) in problem for problem in found.problems)


def test_a_list_of_missing_files_says_what_is_missing(tmp_path):
    """"No image that can be used", where a backslash or a wrong --data-dir is the reason."""
    path = write(tmp_path, "image,label,split\na\\x.jpg,a,train\nb\\y.jpg,b,test\n")
    args = argparse.Namespace(data_dir=str(tmp_path), imb=None, imb_type="exp", holdout=None,
                              holdout_by=None, train_list=path, test_list=None, list_columns=None)
    with pytest.raises(DataError, match=r"no image that can be used; .*x\.jpg: No such file"):
        survey(args)
