"""images/files.py: which files there are, by folders and lists, and which are held out."""
import random
import time

import numpy as np
import pytest

from images import files
from images.files import DataError


def test_names_sort_naturally_and_never_fail():
    """Comparing a number with a word is an error in Python, and so is int("²"), although
    "²".isdigit()."""
    names = ["10", "2", "b", "a10", "a2", "a", "2b", "", "1.5", "1.10", "5²"]
    expected = ["", "1.5", "1.10", "2", "2b", "5²", "10", "a", "a2", "a10", "b"]
    assert sorted(names, key=files.natural) == expected


def test_what_systems_leave_behind_is_no_picture(tmp_path):
    """Thumbnails of a NAS as training images, or as a class; a photograph left out without a
    word."""
    names = ["cat/a.jpg", "cat/b.PGM", "cat/c.jfif", "cat/d.avif", "cat/sub/e.pbm",
             "cat/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "cat/sub/.thumbnails/e.png", "cat/._a.jpg",
             "cat/Thumbs.db", "cat/.DS_Store", "@eaDir/x.jpg", "__MACOSX/cat/._a.jpg",
             "#recycle/cat/z.jpg", "$RECYCLE.BIN/z.jpg", "dog/f.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = files.list_folder(tmp_path)
    assert found.class_names == ["cat", "dog"] and not found.problems
    kept = [name.decode() for name in found.names(tmp_path)]
    assert kept == ["cat/a.jpg", "cat/b.PGM", "cat/c.jfif", "cat/d.avif", "cat/sub/e.pbm",
                    "dog/f.jpg"]
    assert found.ignored == {
        ".db": 1, "hidden": 1, "folder @eaDir": 2, "folder .thumbnails": 1, "folder __MACOSX": 1,
        "folder #recycle": 1, "folder $RECYCLE.BIN": 1}


def test_a_part_of_files_keeps_what_is_known_of_all(tmp_path):
    """Another white level, or no problems, for the half that is held out."""
    whole = files.Files(np.array([b"a", b"b"]), np.array([0, 1]), ["x", "y"], ["problem"],
                        {".txt": 1}, white=4095)
    part = whole.keep(np.array([1]))
    assert part.paths.tolist() == [b"b"] and part.labels.tolist() == [1] and part.white == 4095
    assert (part.class_names, part.problems, part.ignored) == (["x", "y"], ["problem"], {".txt": 1})


@pytest.mark.parametrize("name, text", [
    ("cat", "cat"), (b"caf\xc3\xa9", "café"), ("日本 😀 ي", "日本 😀 ي"), ("\\x", "\\x"),
    (b"caf\xe9", r"caf\xe9"), ("caf\udce9", r"caf\xe9"), ("\ud800", r"\ud800"),
    ("\x1b[2J", r"\x1b[2J"), ("a\tb\r\nc\x00", r"a\x09b\x0d\x0ac\x00"), ("\x7f\x9b", r"\x7f\x9b"),
    ("gpj.\u202etac", r"gpj.\u202etac"), ("a\u200bb\ufeff", r"a\u200bb\ufeff"),
    ("a\u2028b\u2029", r"a\u2028b\u2029"), ("\U000e0041", r"\U000e0041"),
    (" a b ", r"\x20a b\x20"), ("   ", r"\x20\x20\x20"), ("a\xa0", r"a\xa0"), ("", "")])
def test_names_are_shown_on_one_line_as_they_are(name, text):
    """A terminal that obeys a name, a line break in a table, a letter that nobody sees, an error
    for what is no text; another text for what is shown a second time, as the classes of a
    checkpoint are."""
    assert files.shown(name) == files.shown(files.shown(name)) == text


def test_lines_stay_lines_where_nothing_else_is_obeyed():
    """A list of problems on one line, an indented table with escapes, a terminal that obeys."""
    text = "2 problems:\n  a\x1b[2J\u202e\n  b "
    assert files.visible(text) == "2 problems:\n  a\\x1b[2J\\u202e\n  b "


def test_classes_have_one_form(tmp_path):
    """The same class under two names: by its accent, or as data and as a checkpoint have it."""
    assert files.class_name("cafe\u0301\n") == files.class_name("café\\x0a") == "café\\x0a"
    (tmp_path / "a\tb" / "deeper").mkdir(parents=True)
    assert files.list_folder(tmp_path).class_names == [r"a\x09b"]


@pytest.mark.slow
def test_2000_damaged_lists_are_read_or_named(tmp_path):
    """A line that is no path and label must never become an image of another class, or another
    error."""
    draw, path = random.Random(0), tmp_path / "list.txt"
    lines = [b"folder %d/image_%d.jpg %d\n" % (i % 7, i, i % 5) for i in range(40)]
    truth = {line.rsplit(b" ", 1)[0]: int(line.rsplit(b" ", 1)[1]) for line in lines}
    for _ in range(2000):
        content = bytearray(b"".join(lines))
        for _ in range(draw.randint(1, 6)):
            at, inserted = draw.randrange(len(content)), draw.randint(0, 3)
            content[at:at + draw.randint(0, 3)] = bytes(draw.randrange(256)
                                                        for _ in range(inserted))
        path.write_bytes(content)
        try:
            found = files.list_file(path, "", 5)
        except DataError:
            continue
        assert found.labels.max(initial=0) < 5 and len(found) + len(found.problems) >= 30
        right = [truth[name] == k for name, k in zip(found.paths.tolist(), found.labels.tolist())
                 if name in truth]
        assert sum(right) >= len(right) - 6                     # a changed digit: another class
        assert all(str(path) in problem for problem in found.problems)


@pytest.mark.parametrize("line", ["a.jpg", "a.jpg x", "a.jpg -1", "a.jpg 3", "a.jpg 1.5", "7",
                                  "a.jpg ١", "a.jpg " + "1" * 5000])
def test_a_list_file_names_its_bad_lines(line, tmp_path):
    """A label that is none; one beyond the classes; a path alone. Blank lines and paths with blanks
    are fine."""
    (tmp_path / "list.txt").write_text(f"b c.jpg 0\n\n{line}\nd.jpg\t2\r\n")
    found = files.list_file(tmp_path / "list.txt", "/root", 3)
    assert found.paths.tolist() == [b"/root/b c.jpg", b"/root/d.jpg"]
    assert found.labels.tolist() == [0, 2]
    assert len(found.problems) == 1 and "line 3" in found.problems[0]


def test_a_list_may_begin_with_a_mark_of_its_encoding(tmp_path):
    """The first image of a list from Windows, which cannot be found."""
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.jpg 0\r\nb.jpg 1\r\n")
    assert files.list_file(tmp_path / "list.txt", "/root", 3).paths.tolist() == [
        b"/root/a.jpg", b"/root/b.jpg"]


def test_a_list_file_names_what_it_lists_twice(tmp_path):
    """One image as two classes."""
    (tmp_path / "list.txt").write_text("a.jpg 0\nb.jpg 1\na.jpg 1\n")
    found = files.list_file(tmp_path / "list.txt", "/root", 3)
    assert len(found) == 2 and "line 3: a.jpg is listed in line 1 already" in found.problems[0]


@pytest.mark.parametrize("content, words", [(None, "No such file"), ("\n", "is empty")])
def test_a_list_that_cannot_be_used_is_refused(content, words, tmp_path):
    if content is not None:
        (tmp_path / "list.txt").write_text(content)
    with pytest.raises(DataError, match=words):
        files.list_file(tmp_path / "list.txt", "/root", 3)


def test_long_lists_are_read_in_seconds(tmp_path):
    """A loop over all lines for every line; a Python object for each of them that stays. (The
    largest published list has 437,513 lines.)"""
    lines = [f"train_val2018/Aves/{i % 8142}/{i:032x}.jpg {i % 8142}\n" for i in range(100_000)]
    (tmp_path / "list.txt").write_text("".join(lines))
    start = time.process_time()
    found = files.list_file(tmp_path / "list.txt", "/data/inat", 8142)
    assert len(found) == 100_000 and not found.problems and time.process_time() - start < 5
    assert found.paths.nbytes < 9e6


def test_a_held_out_part_is_stratified_fixed_and_leaves_something_to_train_on():
    """A rare class that is all in one part; another test set for another run or another place; an
    image in both parts."""
    def folder(root):
        labels = np.repeat([0, 1, 2, 3], [100, 8, 2, 1])
        paths = np.array([f"{root}/{i}".encode() for i in range(111)])
        return files.Files(paths, labels, list("abcd"))
    whole = folder("/root")
    train, test = files.hold_out(whole, 0.2, "/root")
    assert test.counts().tolist() == [20, 2, 1, 0] and train.counts().tolist() == [80, 6, 1, 1]
    assert set(train.paths) | set(test.paths) == set(whole.paths)
    assert not set(train.paths) & set(test.paths)
    numbers = [int(path.split(b"/")[-1]) for path in test.paths.tolist()]
    assert max(numbers[:20]) > 60 and min(numbers[:20]) < 40    # from all over the class

    train, _ = files.hold_out(whole, 0.9, "/root")
    assert train.counts().tolist() == [10, 1, 1, 1]

    fewer = whole.keep(np.arange(111) != 50)                    # an image more or less
    before = set(files.hold_out(fewer, 0.2, "/root")[1].paths)
    after = set(test.paths)
    assert len(before - {whole.paths[50]} - after) <= 1 and len(after - before) <= 1
    moved = files.hold_out(folder("/elsewhere"), 0.2, "/elsewhere")[1]
    assert [int(path.split(b"/")[-1]) for path in moved.paths.tolist()] == numbers
