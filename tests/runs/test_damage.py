"""Damaged files and folders that cannot be written: one line, and nothing lost.

Checkpoints alone, and full disks: tests/test_checkpoints.py, test_processes.py.
"""
import errno
import os
import shutil

import pytest
import torch

import train_student
import train_teacher
from engine import runtime
from tiny_runs import TEACHER, WITHOUT_SAM, assert_same_run, train

pytest_plugins = ["tiny_runs"]


@pytest.fixture(scope="module")
def saved_twice(tiny_cifar, tmp_path_factory):
    """(flags, run folder) of a finished teacher; previous.pt is of the second step of epoch 1."""
    folder = tmp_path_factory.mktemp("twice") / "run"
    flags = [*TEACHER, *WITHOUT_SAM, "--data-dir", tiny_cifar, "--save-every", "5"]
    train(train_teacher, *flags, "--out", folder)
    return flags, folder


# ---- Damaged files -------------------------------------------------------------------------------

def damage(path, how):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1                       # one bit of a weight
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["one bit", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(how, saved_twice, tmp_path, capsys,
                                                           steps_done):
    """A run that cannot go on although an older checkpoint is there, or that ends elsewhere."""
    flags, undisturbed = saved_twice
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (run / "result.json").unlink()
    damage(run / "last.pt", how)
    before = (run / "previous.pt").read_bytes()
    train(train_teacher, *flags, "--out", run, "--resume")
    assert "previous.pt" in capsys.readouterr().err
    assert steps_done == [(1, 2)]
    assert_same_run(undisturbed, run)
    assert (run / "previous.pt").read_bytes() == before     # not replaced by the damaged one


def test_two_damaged_checkpoints_are_refused(saved_twice, tmp_path, refused):
    """A run that begins anew over them."""
    flags, undisturbed = saved_twice
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "run" / name).write_bytes(b"no checkpoint")
    error = refused(train_teacher, *flags, "--out", tmp_path / "run", "--resume")
    assert "last.pt is not a readable checkpoint" in error
    assert (tmp_path / "run" / "last.pt").read_bytes() == b"no checkpoint"


@pytest.mark.parametrize("damage", [
    {"epoch": "1"}, {"epoch": None}, {"step": 0.5}, {"forced": 3}, {"sums": None},
    {"sums": torch.zeros(3)}, {"sums": "x"}, {"seconds": None}, {"optimizer": {"state": 3}},
    {"optimizer": None}, {"scaler": {"good": "x"}}, {"scaler": {"x": torch.ones(1)}},
    {"model": {}}], ids=lambda damage: "-".join(damage))
def test_a_checkpoint_with_parts_of_another_kind(damage, saved_twice, tmp_path, refused):
    """A traceback; or an optimizer that begins anew without a word."""
    flags, undisturbed = saved_twice
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    state = torch.load(undisturbed / "previous.pt", weights_only=True)      # of half an epoch
    torch.save(state | damage, tmp_path / "run" / "last.pt")
    (tmp_path / "run" / "previous.pt").unlink()
    error = refused(train_teacher, *flags, "--out", tmp_path / "run", "--resume")
    assert "last.pt" in error


# ---- Folders ------------------------------------------------------------------------------------

def test_a_read_only_folder_is_found_out_first(shared_run, tmp_path, refused, monkeypatch):
    """A teacher that is trained for hours, and then no place for the student."""
    module, flags, _ = shared_run("student")
    (tmp_path / "closed").mkdir(mode=0o500)

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if os.access(tmp_path / "closed", os.W_OK):             # root may write anywhere
        monkeypatch.setattr(os, "makedirs", denied)
    monkeypatch.setattr(train_student, "load_data", lambda *_: pytest.fail("loaded images first"))
    error = refused(module, *flags, "--out", tmp_path / "closed" / "a" / "b")
    assert "cannot write in" in error and "Permission denied" in error
    assert "--out names another folder" in error


def test_a_file_in_the_folders_place(shared_run, tmp_path, refused):
    """A traceback of NotADirectoryError after the images are loaded."""
    (tmp_path / "file").write_text("")
    module, flags, _ = shared_run("teacher")
    error = refused(module, *flags, "--out", tmp_path / "file" / "run")
    assert "Not a directory" in error and "--out names another folder" in error


def test_a_folder_that_vanishes(shared_run, tmp_path, refused, monkeypatch):
    """A traceback, or a process that trains on without being able to save."""
    module, flags, _ = shared_run("teacher")
    seed_step = runtime.seed_step

    def vanishing(*key):
        if key[1:3] == (1, 0):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
        seed_step(*key)
    monkeypatch.setattr(runtime, "seed_step", vanishing)
    error = refused(module, *flags, *WITHOUT_SAM, "--out", tmp_path / "run")
    assert "cannot write" in error and str(tmp_path / "run") in error
