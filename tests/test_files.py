"""images/files.py: which files there are, and how names are shown."""
import os
from dataclasses import replace

import numpy as np
import pytest

from images import files


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


def test_a_fingerprint_is_of_names_classes_and_sizes(tmp_path):
    """Corrected labels, or pictures replaced under their names, that count as the same data."""
    path = tmp_path / "a.jpg"
    path.write_bytes(b"1")
    one = files.Files(np.array([os.fsencode(path)]), np.array([0]), ["x", "y"])
    before = one.fingerprint(tmp_path)
    assert replace(one, labels=np.array([1])).fingerprint(tmp_path) != before
    path.write_bytes(b"22")
    assert one.fingerprint(tmp_path) != before
