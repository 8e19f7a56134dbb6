"""engine/checkpoints.py: files that are damaged, half written or foreign."""
import io
import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from engine import checkpoints, records
from engine.checkpoints import load_checkpoint, save_checkpoint, write_atomically
from engine.runtime import UserError


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- writing ----

def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path):
    """Without the temporary file, a crash in the middle would destroy the only checkpoint."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, model={}, config={}, epoch=1)

    def half(file):
        file.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert load_checkpoint(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_the_checkpoint_before_is_kept(tmp_path):
    """The previous file lost, or the new one under its name."""
    path, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for epoch in (1, 2, 3):
        save_checkpoint(path, previous, model={}, config={}, epoch=epoch)
    assert load_checkpoint(path)["epoch"] == 3 and load_checkpoint(previous)["epoch"] == 2


def test_a_full_disk_ends_in_one_line_with_the_last_checkpoint_intact(tmp_path):
    """torch.save turns a full disk into a RuntimeError of many lines; half a file must not
    replace a whole one."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, model={"w": torch.zeros(1000)}, config={})
    before = path.read_bytes()
    code = f"""
import resource, torch
from engine import checkpoints, records, runtime
for limit in (1_000, 100_000, 1_000_000):           # bytes of a file at which the disk is full
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, 1_000_000))
    state = dict(model=dict(w=torch.zeros(10 ** 6)))
    try:
        runtime.run_main(lambda: checkpoints.save_checkpoint({str(path)!r}, "old", **state))
    except SystemExit as stopped:
        print(stopped.code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    lines = done.stderr.splitlines()
    assert done.stdout.split() == ["2"] * 3 and len(lines) == 3, done.stderr
    for line in lines:
        assert line.startswith(f"error: cannot write {path}") and "intact" in line
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.pt"]


def test_two_writers_of_one_file_do_not_share_a_temporary_one(tmp_path):
    """One name for all: half of one file and half of the other, or a rename of what is gone."""
    path = tmp_path / "last.pt"

    def write(file):
        write_atomically(path, lambda inner: inner.write(b"second"))
        file.write(b"first")
    write_atomically(path, write)
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["last.pt"]


def test_files_are_not_written_through_links(tmp_path):
    """A file elsewhere that is emptied: that a temporary name, or the file's own, leads to."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("text")
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "last.pt"
    for link in (path, tmp_path / "run" / "last.pt.tmp"):
        link.symlink_to(elsewhere)
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and not path.is_symlink()
    assert elsewhere.read_text() == "text"


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_not_replaced_by_one(kind, tmp_path):
    """--csv /dev/null would turn it into a file for all programs of the machine."""
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(UserError, match="not a regular file") as error:
        write_atomically(path, lambda file: file.write(b"new"))
    one_line(error)
    assert not path.is_file() and os.listdir(tmp_path) == ["x"]


def test_a_files_rights_follow_the_umask(tmp_path):
    """A result that only its owner can read, as of tempfile.mkstemp."""
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "x", lambda file: file.write(b""))
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_what_killed_writers_have_left_is_removed(tmp_path):
    """Gigabytes after every kill in the middle of a checkpoint; or files that are not theirs."""
    ours = ["last[1].pt.0a1b2c3d.tmp", "last[1].pt.ffffffff.tmp"]
    others = ["last[1].pt", "last1.pt.tmp", "last[1].pt.txt", "result.json.0a1b2c3d.tmp"]
    for name in ours + others:
        (tmp_path / name).write_text("")
    checkpoints.remove_temporaries(tmp_path / "last[1].pt")
    assert sorted(os.listdir(tmp_path)) == sorted(others)


# ---- JSON ----

def test_accuracies_that_nothing_was_measured_for_are_null_in_files(tmp_path):
    """NaN, which no other JSON reader understands; None for an accuracy, NaN for a setting."""
    result = {"teacher": None, "seed": 0, "avg": {"overall": 50.0, "tail": math.nan},
              "per_class": {"avg": [1.0, math.nan]}}
    records.save_json(tmp_path / "result.json", result)
    assert "NaN" not in (tmp_path / "result.json").read_text()
    read = records.read_json(tmp_path, "result.json")
    assert read["teacher"] is None and read["avg"]["overall"] == 50
    assert math.isnan(read["avg"]["tail"]) and math.isnan(read["per_class"]["avg"][1])


def test_a_log_is_a_list_of_epochs(tmp_path):
    """One line read as a whole file, or accuracies of a class without test images as None."""
    (tmp_path / "log.jsonl").write_text('{"epoch": 0}\n{"avg": {"overall": 1, "tail": null}}\n')
    first, second = records.read_log(tmp_path)
    assert first == {"epoch": 0} and math.isnan(second["avg"]["tail"])


@pytest.mark.parametrize("folder", ["nowhere", "a file", "empty"])
def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, folder):
    """A traceback for a mistyped folder, or an empty log that a picture is drawn of."""
    (tmp_path / "a file").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.jsonl").write_text("")
    for read in (lambda path: records.read_json(path, "result.json"), records.read_log):
        with pytest.raises(UserError) as error:
            read(tmp_path / folder)
        assert str(tmp_path / folder) in one_line(error)


RESULT = {"dataset": "CIFAR-10-LT", "epochs": 3, "imb": 100.0, "seconds": 9.5, "teacher": None,
          "avg": {"overall": 50.0, "tail": 10.0}, "per_class": {"avg": [50.0, 10.0]}}
CONFIG = {"dataset": "cifar10", "epochs": 3, "counts": [50, 5], "classes": ["a", "b"],
          "class_groups": {"head": [0], "tail": [1]}, "versions": {"torch": "2.6"}, "lr": 0.1}


@pytest.mark.parametrize("name, content", [
    ("result.json", b""), ("result.json", b'{"epochs": 3'), ("result.json", b"[1, 2]"),
    ("result.json", b"null"), ("result.json", bytes(range(256))), ("result.json", b"[" * 10 ** 5),
    ("result.json", b'{"epochs": 1' + b"0" * 10 ** 4 + b"}"),
    ("result.json", {"epochs": "3"}), ("result.json", {"epochs": None}),
    ("result.json", {"epochs": math.nan}), ("result.json", {"seconds": "x"}),
    ("result.json", {"imb": None}), ("result.json", {"dataset": 3}), ("result.json", {"avg": 50.0}),
    ("result.json", {"avg": {"overall": "x"}}), ("result.json", {"avg": [50.0]}),
    ("result.json", {"per_class": [1.0]}), ("result.json", {"per_class": {"avg": ["x"]}}),
    ("result.json", {"teacher": {}}), ("result.json", {"training_images": {"clean": 1.0}}),
    ("config.json", b"{]"), ("config.json", {"dataset": None}), ("config.json", {"counts": 55}),
    ("config.json", {"counts": [None, 5]}), ("config.json", {"classes": [1, 2]}),
    ("config.json", {"classes": "ab"}), ("config.json", {"class_groups": [0, 1]}),
    ("config.json", {"class_groups": {"head": 0}}), ("config.json", {"versions": "2.6"}),
    ("config.json", {"epochs": 1.5})])
def test_damaged_json_is_refused_in_one_line(name, content, tmp_path):
    """A traceback in every figure, a hang, or a number that somebody believes."""
    if isinstance(content, dict):
        good = RESULT if name == "result.json" else CONFIG
        content = json.dumps(good | content).encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        records.read_json(tmp_path, name)
    assert f"{tmp_path / name} is damaged" in one_line(error) and len(str(error.value)) < 400


def test_good_json_is_read_as_it_is(tmp_path):
    """A check that refuses what older or later versions write."""
    more = {"forced": ["x"], "date": "2026-01-01", "new": [{"a": None}], "imb": 1, "seed": 0}
    for name, good in (("result.json", RESULT | more), ("config.json", CONFIG | more)):
        (tmp_path / name).write_text(json.dumps(good))
        assert records.read_json(tmp_path, name) == good


def test_what_a_damaged_file_lacks_is_named_in_one_line(tmp_path):
    """KeyError: 'avg', from somewhere in a figure."""
    (tmp_path / "result.json").write_text('{"epochs": 3, "cls": {"overall": 1.0}}')
    result = records.read_json(tmp_path, "result.json")
    for read in (lambda: result["avg"], lambda: result["cls"]["tail"]):
        with pytest.raises(UserError, match="result.json has no '(avg|tail)'") as error:
            read()
        one_line(error)


@pytest.mark.parametrize("kind", ["pipe", "folder", "huge"])
def test_what_is_no_file_is_not_read(kind, tmp_path):
    """A FIFO that is waited for for ever; gigabytes of zeros in memory."""
    for name in ("result.json", "log.jsonl"):
        if kind == "pipe":
            os.mkfifo(tmp_path / name)
        elif kind == "folder":
            (tmp_path / name).mkdir()
        else:
            with open(tmp_path / name, "wb") as file:
                file.truncate(10 ** 12)
    for read in (lambda: records.read_json(tmp_path, "result.json"),
                 lambda: records.read_log(tmp_path)):
        with pytest.raises(UserError, match="no file of a run") as error:
            read()
        one_line(error)


@pytest.mark.parametrize("end", [b'{"epoch": 1, "lo', b"\x00\x00\x00", b'{"epoch": 1}x', b"5\n",
                                 b"\n", b'{"epoch": "1"}\n'])
def test_a_torn_last_line_of_a_log_is_left_out_and_said(end, tmp_path, capsys):
    """A traceback in every figure of a run that was killed while it wrote, or is just writing."""
    (tmp_path / "log.jsonl").write_bytes(b'{"epoch": 0, "drw": false, "cosine": null}\n' + end)
    assert records.read_log(tmp_path) == [{"epoch": 0, "drw": False, "cosine": None}]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "last line" in error


@pytest.mark.parametrize("line", ["", "garbage", "[]", '{"loss": "x"}', '{"avg": {"overall": "x"}}',
                                  '{"avg": [1]}', '{"epoch": 1', "\0"])
def test_a_damaged_line_within_a_log_is_refused_with_its_number(line, tmp_path):
    """An epoch that is missing in a curve without a word."""
    (tmp_path / "log.jsonl").write_text(f'{{"epoch": 0}}\n{line}\n{{"epoch": 2}}\n')
    with pytest.raises(UserError, match="log.jsonl is damaged in line 2") as error:
        records.read_log(tmp_path)
    one_line(error)


# ---- reading ----

def test_a_file_that_lacks_a_key_is_refused_in_one_line(tmp_path):
    """A traceback for another project's file. (What is no checkpoint at all: test_networks.py.)"""
    torch.save({"weights": 1}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt is not a checkpoint .* lacks model, config") as error:
        load_checkpoint(str(tmp_path / "x.pt"))
    one_line(error)


@pytest.fixture(scope="module")
def two_files():
    """The bytes of two checkpoints of the same shapes and other numbers."""
    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        file = io.BytesIO()
        torch.save({"model": {"w": torch.randn(3000), "b": torch.randn(7)}, "config": {}}, file)
        files.append(file.getvalue())
    return files


def damaged(data, how):
    half = len(data) // 2
    return {"truncated": data[:half], "end missing": data[:-700], "empty": b"",
            "one bit": data[:half] + bytes([data[half] ^ 1]) + data[half + 1:]}[how]


@pytest.mark.parametrize("how", ["truncated", "end missing", "empty", "one bit", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(how, two_files, tmp_path, capsys):
    """A run lost although an older checkpoint is there; a flipped bit taken for a weight."""
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    previous.write_bytes(two_files[1])
    if how != "missing":
        last.write_bytes(damaged(two_files[0], how))
        with pytest.raises(UserError, match="not a readable checkpoint"):
            load_checkpoint(str(last))
    state = load_checkpoint(str(tmp_path))
    assert state["fallback"] is True and f"taking {previous}" in capsys.readouterr().err
    expected = torch.load(previous, weights_only=True)["model"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state["model"].items())
    last.write_bytes(two_files[0])
    assert "fallback" not in load_checkpoint(str(tmp_path))
    assert capsys.readouterr().err == ""


def test_a_file_that_may_not_be_read_is_not_called_damaged(two_files, tmp_path, monkeypatch):
    """Somebody who trains again because of another user's file permissions."""
    path = tmp_path / "x.pt"
    path.write_bytes(two_files[0])

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(torch, "load", denied)
    with pytest.raises(UserError, match="cannot read .*x.pt: Permission denied"):
        load_checkpoint(str(path))


def test_300_torn_checkpoints_are_refused_or_whole(two_files, tmp_path):
    """Cut, changed in a bit, a block of zeros, two halves of different files: never other weights,
    never another error."""
    draw, path, refused = random.Random(0), tmp_path / "last.pt", 0
    data, other = two_files
    whole = torch.load(io.BytesIO(data), weights_only=True)["model"]
    for i in range(300):
        torn, at = bytearray(data), draw.randrange(len(data))
        if i % 4 == 0:
            torn = torn[:at]
        elif i % 4 == 1:
            torn[at] ^= 1 << draw.randrange(8)
        elif i % 4 == 2:
            torn[at:at + 4096] = bytes(len(torn[at:at + 4096]))
        else:
            torn = torn[:at] + other[at:]
            if torn == other:           # cut where both are still the same
                continue
        path.write_bytes(torn)
        try:
            state = load_checkpoint(str(path))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        assert all(torch.equal(tensor, whole[name]) for name, tensor in state["model"].items())
    assert refused > 250


def test_weights_that_do_not_fit_are_refused_in_one_line():
    """strict=False, or a traceback of many lines for another architecture."""
    net = torch.nn.Linear(2, 3)
    for weights in ({}, {"weight": torch.zeros(3, 2)}, net.state_dict() | {"x": torch.zeros(1)},
                    {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}, None):
        with pytest.raises(UserError, match="^run.pt does not fit the network: ") as error:
            checkpoints.load_weights(net, weights, "run.pt")
        one_line(error)


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """An empty last.pt after a power failure."""
    done, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), rename(*names))[1])
    write_atomically(str(tmp_path / "x"), lambda file: file.write(b"x"))
    assert done == ["sync", "rename", "sync"]
