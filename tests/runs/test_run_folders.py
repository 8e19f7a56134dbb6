"""Whose a run's folder is, what is finished in it, and what may be there besides."""
import json
import os
import select
import shutil
import signal
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

import analyze
import train_student
import train_teacher
from conftest import script
from engine import run_folder, runtime
from engine.checkpoints import UserError
from engine.lock import Lock
from engine.records import read_log
from engine.run_folder import Run
from engine.training import FiniteScaler
from image_folders import make_folder
from several_processes import run
from tiny_runs import (LENGTH, PLAIN, WITHOUT_SAM, assert_same_run, checkpoint, killed_at, read,
                       records, train)

pytest_plugins = ["tiny_runs", "several_processes"]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def owner(monkeypatch):
    """owner(folder, until=None, then=None): another process trains there for a minute, or until
    this one prints a line that begins so, or the test ends; then it calls then() and is killed.
    Returns its process id."""
    children = []

    def owner(folder, until=None, then=None):
        began, said = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            Lock(str(folder)).take()
            os.write(began[1], b"x")
            select.select([said[0]], [], [], 60)
            if then:
                then()
            os.kill(os.getpid(), signal.SIGKILL)
        if until:
            show = runtime.Runtime.print

            def show_and_tell(rt, text, *more):
                show(rt, text, *more)
                if text.startswith(until):
                    os.write(said[1], b"x")
            monkeypatch.setattr(runtime.Runtime, "print", show_and_tell)
        assert os.read(began[0], 1) == b"x"
        children.append(child)
        return child
    yield owner
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.fixture
def unfinished(shared_run, tmp_path):
    """(script, flags with --out, folder) of a teacher's run without its result."""
    module, flags, finished = shared_run("teacher")
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return module, [*flags, "--out", str(tmp_path / "run")], tmp_path / "run"


# ---- Another process trains there ----------------------------------------------------------------

@pytest.mark.parametrize("flag", [[], ["--resume"], ["--overwrite"]])
def test_the_same_command_twice(flag, unfinished, owner, refused):
    """Two processes in one folder: one dies, the log has 17 lines for 12 epochs."""
    module, flags, folder = unfinished
    child = owner(folder)
    before = contents(folder)
    error = refused(module, *flags, *flag)
    assert f"is being trained by process {child} on {os.uname().nodename}" in error
    assert "--out" in error and contents(folder) == before


def test_a_command_that_is_refused_leaves_no_lock(shared_run, refused, tmp_path):
    """A folder that is locked, marked or made by a mistake."""
    module, flags, finished = shared_run("teacher")
    before = contents(finished)
    refused(module, *flags, "--out", finished, "--resume", "--lr", "0.05")
    assert contents(finished) == before
    refused(module, *flags, "--out", tmp_path / "new" / "run", "--imb", "1000")
    assert not (tmp_path / "new").exists()
    shutil.copytree(finished, tmp_path / "run")
    refused(module, *flags, "--out", tmp_path / "run", "--imb", "1000", "--overwrite")
    assert contents(tmp_path / "run") == before


@pytest.fixture
def waiting_student(shared_run, tmp_path, monkeypatch):
    """(flags of a student whose teacher has the settings of teacher_run, the teacher's folder)"""
    _, flags, _ = shared_run("student")
    flags[flags.index("--teacher") + 1] = "auto"
    monkeypatch.chdir(tmp_path)
    tiny = dict(epochs=2, warmup_epochs=0, img_size=8, batch=30, drw_epoch=1)
    monkeypatch.setitem(train_teacher.RECIPES["cpu"], "cifar10", train_teacher.CPU | tiny)
    folder = tmp_path / "runs" / "teacher_cifar10_imb12_cpu_s0"
    return [*flags, "--epochs", "1", "--out", "student"], folder


@pytest.mark.parametrize("ends", ["finished", "killed"])
def test_a_student_waits_for_the_teacher_that_another_one_trains(
        ends, waiting_student, teacher_run, owner, capsys, steps_done):
    """Two students that are started at once: both train the teacher, and one of them dies."""
    flags, folder = waiting_student

    def leave():
        names = ["config.json", "log.jsonl", "last.pt"]
        if ends == "finished":
            names.append("result.json")                     # the last one, as in a run
        for name in names:
            shutil.copy(teacher_run / name, folder)
    child = owner(folder, "Waiting for", leave)
    train(train_student, *flags)
    out = capsys.readouterr().out
    assert f"Waiting for runs/{folder.name}, which is being trained by process {child}" in out
    assert out.count("Waiting") == 1
    assert (f"{folder.name} is finished" in out) == (ends == "finished")
    assert steps_done == [(0, 0), (0, 1), (0, 2)]           # the student's only
    assert (folder / "result.json").exists()
    assert read("student", "result.json")["teacher"] == f"runs/{folder.name}"


def test_a_student_in_its_teachers_folder(waiting_student, refused):
    """It waits for itself, for ever."""
    flags, folder = waiting_student
    flags[-1] = str(folder)
    assert "cannot share the folder" in refused(train_student, *flags)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["teacher", "finetune"])
@pytest.mark.parametrize("spelling", ["{}/", "{}/last.pt", "other.pt,{}", "link"])
def test_a_run_does_not_replace_what_it_builds_on(name, spelling, shared_run, tmp_path, refused):
    """--overwrite with the teacher's folder as --out: the teacher is gone for ever."""
    module, flags, made = shared_run("student")
    folder = tmp_path / "run"
    shutil.copytree(made, folder)
    (tmp_path / "link").symlink_to(folder)
    path = str(tmp_path / "link") if spelling == "link" else spelling.format(folder)
    before = contents(folder)
    error = refused(module, *flags, f"--{name}={path}", "--out", str(folder), "--overwrite")
    assert f"the run and its --{name} cannot share the folder" in error
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_lost_text_file_is_written_again(name, shared_run, tmp_path, refused):
    """A finished run that no command can mend: each names the other, or itself."""
    module, flags, made = shared_run("student")
    folder = tmp_path / "run"
    shutil.copytree(made, folder)
    (folder / name).unlink()
    assert "--resume continues it" in refused(module, *flags, "--out", str(folder))
    train(module, *flags, "--out", str(folder), "--resume")
    assert read(folder, name).keys() == read(made, name).keys()
    assert read(folder, "result.json")["avg"] == read(made, "result.json")["avg"]


@pytest.mark.parametrize("name, change", [
    ("config.json", {"stem": ["x"]}),
    ("result.json", {"note": dict.fromkeys(("overall", "head", "mid", "tail"), "x")})])
def test_a_finished_run_whose_files_were_edited(name, change, shared_run, tmp_path, monkeypatch,
                                                capsys):
    """A traceback for what nobody reads."""
    module, flags, made = shared_run("student")
    folder = tmp_path / "run"
    shutil.copytree(made, folder)
    (folder / name).write_text(json.dumps(read(folder, name) | change))
    with suppress(SystemExit):
        script(module, monkeypatch, *flags, "--out", str(folder))
    said = capsys.readouterr()
    assert "is finished" in said.out or said.err.startswith("error: ")


def test_a_restarted_worker_waits_for_the_old_one(unfinished, owner, monkeypatch, capsys):
    """torchrun starts the new workers while the old one is dying: its last restart is lost."""
    module, flags, folder = unfinished
    owner(folder, "Waiting for")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(module, *flags)
    assert "Waiting for" in capsys.readouterr().out and (folder / "result.json").exists()


def test_several_processes_learn_together_that_the_folder_is_taken(server, unfinished, owner,
                                                                   tmp_path):
    """One that waits for ever for those that have ended, or a line of each of them."""
    _, flags, folder = unfinished
    owner(folder)
    code, printed = run(2, tmp_path / "log", "train_teacher", *flags, "--resume", "--force")
    assert code == 2 and printed.count("error: ") == 1 and "is being trained by" in printed


def test_a_folder_that_was_removed_and_is_another_runs_now(shared_run, tmp_path, refused,
                                                           monkeypatch):
    """rm -r and a new start, while the old run goes on and writes into the new one's folder."""
    module, flags, _ = shared_run("teacher")
    seed_step, folder = runtime.seed_step, tmp_path / "run"

    def replacing(*key):
        if key[1:3] == (1, 0):
            shutil.rmtree(folder)
            folder.mkdir()
            (folder / "lock").write_text("another's")
        seed_step(*key)
    monkeypatch.setattr(runtime, "seed_step", replacing)
    error = refused(module, *flags, *WITHOUT_SAM, "--out", folder)
    assert "another run's now" in error and os.listdir(folder) == ["lock"]


# ---- A finished run ------------------------------------------------------------------------------

@pytest.mark.parametrize("flag", [[], ["--resume"]])
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_finished_run_whose_checkpoints_are_gone(kind, flag, shared_run, tmp_path, capsys):
    """Large files deleted, the result kept: the same command empties the folder."""
    module, flags, finished = shared_run(kind)
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("*.pt"))
    before = contents(folder)
    train(module, *flags, "--out", folder, *flag)
    out = capsys.readouterr().out
    accuracy = read(finished, "result.json")["avg"]["overall"]
    assert "is finished (2 epochs)" in out and f"{accuracy:.1f}" in out
    assert contents(folder) == before
    with killed_at(0, 0):
        train(module, *flags, "--out", folder, "--overwrite")
    assert set(contents(folder)) == {"config.json", "log.jsonl"}


@pytest.mark.parametrize("flags, words", [
    ("--epochs 3", "no checkpoint to go on"), ("--epochs 3 --resume", "no checkpoint to go on"),
    ("--lr 0.05", "no checkpoint to go on"), ("--lr 0.05 --resume", "--lr 0.1 -> 0.05")])
def test_another_result_without_checkpoints_is_not_overwritten(flags, words, shared_run, tmp_path,
                                                               refused):
    """A longer run, or one of other settings, over the only trace of a finished one."""
    module, given, finished = shared_run("teacher")
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("*.pt"))
    before = contents(tmp_path / "run")
    assert words in refused(module, *given, "--out", tmp_path / "run", *flags.split())
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("flags, forced", [("--lr 0.05", True), ("--imb 6", False)])
def test_force_is_named_only_where_it_helps(flags, forced, shared_run, tmp_path, refused):
    """--force advised for other images, which it refuses in its turn."""
    module, given, finished = shared_run("teacher")
    shutil.copytree(finished, tmp_path / "run")
    message = refused(module, *given, "--out", tmp_path / "run", "--resume", *flags.split())
    assert "other settings" in message and ("--force" in message) == forced


def test_a_finished_student_of_a_teacher_that_was_trained_again(shared_run, tmp_path, capsys):
    """The first teacher's student, shown as if it were the second's."""
    module, flags, finished = shared_run("student")
    shutil.copytree(finished, tmp_path / "run")
    own = [*flags, "--out", tmp_path / "run", "--amp", "none"]
    train(module, *own)
    assert "again since" not in capsys.readouterr().out
    config = read(tmp_path / "run", "config.json")
    config["teachers"][0]["weights"] = "0123456789abcdef"
    config["amp_dtype"] = "torch.bfloat16"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    train(module, *own)
    out = capsys.readouterr().out
    assert "is finished (2 epochs) in bfloat16" in out
    assert f"Its teacher {config['teacher']} has been trained again since" in out
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    config["teachers"][0]["file"] = str(tmp_path / "none")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    train(module, *own)
    assert "again since" not in capsys.readouterr().out


def test_an_extended_run_that_dies_before_its_checkpoint_is_the_old_one(shared_run, tmp_path,
                                                                        capsys):
    """The new settings beside the old result: neither command goes on, and a student is told to
    remove its teacher."""
    module, given, finished = shared_run("teacher")
    shutil.copytree(finished, tmp_path / "run")
    own, before = [*given, "--out", tmp_path / "run"], contents(tmp_path / "run")
    longer = [*own, "--epochs", "3", "--resume", "--force"]
    with killed_at(2, 1):
        train(module, *longer)
    after = contents(tmp_path / "run")
    assert all(after[name] == before[name] for name in ("config.json", "result.json", "last.pt"))
    train(module, *own)
    assert "is finished" in capsys.readouterr().out
    train(module, *longer)
    for name in ("config.json", "result.json"):
        assert read(tmp_path / "run", name)["epochs"] == 3


def test_a_list_is_the_same_by_another_path(tmp_path, monkeypatch, refused, capsys):
    """A finished run refused for ./list.csv, with the advice to remove it."""
    make_folder(tmp_path, n=6)
    files = [*tmp_path.glob("t*/*/*.png"), *tmp_path.glob("t*/*/*.jpg")]
    (tmp_path / "list.csv").write_text("image,label,split\n" + "".join(
        f'"{file.relative_to(tmp_path)}","{file.parent.name}",{file.parts[-3]}\n'
        for file in files))
    monkeypatch.chdir(tmp_path)
    flags = [*LENGTH, *WITHOUT_SAM, *"--dataset folder --data-dir . --recipe cpu --device cpu "
             "--img-size 8 --drw-epoch 1 --batch 8 --out run --train-list".split()]
    train(train_teacher, *flags, "list.csv")
    capsys.readouterr()
    train(train_teacher, *flags, "./list.csv")
    assert "is finished" in capsys.readouterr().out
    shutil.copy("list.csv", "copy.csv")
    assert "--train-list" in refused(train_teacher, *flags, "copy.csv", "--resume")


def test_what_a_student_can_do_about_a_teacher_with_other_settings(
        waiting_student, teacher_run, refused):
    """A finished teacher refused for --groups, which are the student's own; the advice to remove
    one that was trained in another precision and only has to be resumed."""
    flags, folder = waiting_student
    shutil.copytree(teacher_run, folder)
    for wait in (True, False):                              # --groups: own images only
        past = SimpleNamespace(wait=wait, rt=runtime.Runtime(torch.device("cpu")),
                               precision="none", defaults={})
        old = dict(groups=None, lr=0.1, amp="none", processes=1, format=2)
        args = SimpleNamespace(groups="15,5", lr=0.2)
        found = Run.changes(past, old, args, ())
        groups = {} if wait else {"groups": "--groups None -> 15,5"}
        assert found == groups | {"lr": "--lr 0.1 -> 0.2"}
    (folder / "result.json").unlink()
    state = checkpoint(folder) | {"amp": "fp16"}
    torch.save(state, folder / "last.pt")
    message = refused(train_student, *flags[:-1], "again")
    assert "--amp fp16" in message and "train_teacher.py --resume --force finishes it" in message


def test_a_finished_teacher_that_is_only_read_may_be_anybodys(waiting_student, teacher_run, owner,
                                                              monkeypatch, capsys):
    """Refused: a teacher of another owner, in a read-only folder, of other processes or --amp,
    saved otherwise; or one that somebody else is reading."""
    flags, folder = waiting_student
    shutil.copytree(teacher_run, folder)
    config = read(folder, "config.json") | {"amp": "fp16", "save_every": "7m", "device": "cuda"}
    (folder / "config.json").write_text(json.dumps(config))
    state = checkpoint(folder) | {"world": 8}
    torch.save(state, folder / "last.pt")
    os.utime(folder / "last.pt", (0, 0))
    before, take = contents(folder), Lock.take

    def not_there(lock):
        assert "teacher" not in lock.folder, "locked a folder that it only reads"
        return take(lock)
    monkeypatch.setattr(Lock, "take", not_there)
    train(train_student, *flags, "--amp", "none", "--save-every", "3")
    assert f"{folder.name} is finished" in capsys.readouterr().out
    assert contents(folder) == before


def test_a_finished_teacher_of_other_images_is_refused(shared_run, tmp_path, refused):
    """Its accuracies shown for images that it was not trained on."""
    module, flags, finished = shared_run("teacher")
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    config = read(folder, "config.json") | {"fingerprint": "other"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "other images" in refused(module, *flags, "--out", folder)


def test_damaged_text_files_of_a_finished_run(shared_run, tmp_path, refused):
    """A traceback; or a run that begins again because its result cannot be read."""
    module, flags, finished = shared_run("teacher")
    for name, words in (("result.json", "is damaged"), ("config.json", "is damaged")):
        folder = tmp_path / name
        shutil.copytree(finished, folder)
        (folder / name).write_text('{"epochs": ')
        before = contents(folder)
        for flag in ([], ["--resume"]):
            assert words in refused(module, *flags, "--out", folder, *flag)
        assert contents(folder) == before


# ---- Settings that the run did not know yet ------------------------------------------------------

def forget(folder, *names):
    """Take settings out of a run's files, as if it were from before they existed."""
    state = checkpoint(folder)
    state["config"] = {k: v for k, v in state["config"].items() if k not in names}
    torch.save(state, folder / "last.pt")
    config = {k: v for k, v in read(folder, "config.json").items() if k not in names}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("over", [True, False])
def test_settings_that_were_added_later(over, shared_run, tmp_path, refused, capsys):
    """Every run of yesterday refused because of a setting that is new, and at its default: a flag
    that is off, a number at the table's value. Another value is another run."""
    module, flags, finished = shared_run("teacher")
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    forget(folder, "max_margin", "holdout", "skip_bad", "imb_type")
    if not over:
        (folder / "result.json").unlink()
    flags = [*flags, "--out", folder, "--resume"]
    assert "--imb-type None -> exp" in refused(module, *flags)      # its value is no table's
    for file in (folder / "last.pt", folder / "config.json"):
        shutil.copy(finished / file.name, file)
    forget(folder, "max_margin", "holdout", "skip_bad")
    assert "--max-margin None -> 0.4" in refused(module, *flags, "--max-margin", "0.4")
    train(module, *flags)
    assert ("is finished" in capsys.readouterr().out) == over
    assert (folder / "result.json").exists()


@pytest.mark.parametrize("over", [True, False])
def test_a_run_of_another_format_does_not_go_on(over, shared_run, tmp_path, refused):
    """Half a run of each version; settings of other names compared with today's."""
    module, flags, finished = shared_run("teacher")
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    forget(folder, "format")
    if not over:
        (folder / "result.json").unlink()
    before = contents(folder)
    for more in ([], ["--force"]):
        error = refused(module, *flags, "--out", folder, "--resume", *more)
        assert "was begun by an earlier version" in error and "--overwrite" in error
    assert contents(folder) == before


# ---- The log -------------------------------------------------------------------------------------

LINE = b'{"epoch": 0, "seconds": 1.0, "loss": 2.0}\n'


@pytest.mark.parametrize("damage", [
    lambda log: b"", lambda log: log[:40], lambda log: log.replace(b'"loss"', b'loss', 1),
    lambda log: b"\0" * len(log), lambda log: LINE + log, lambda log: log.split(b"\n")[1] + b"\n",
    lambda log: b"\n".join(reversed(log.split(b"\n"))), lambda log: None],
    ids="empty torn garbage zeros twice missing reversed gone".split())
def test_a_damaged_log_is_found_before_training(damage, unfinished, refused, steps_done):
    """A run that trains to its end and dies without a result; an epoch that is lost in silence."""
    module, flags, folder = unfinished
    log = damage((folder / "log.jsonl").read_bytes())
    if log is None:
        (folder / "log.jsonl").unlink()
    else:
        (folder / "log.jsonl").write_bytes(log)
    before = contents(folder)
    error = refused(module, *flags, "--resume")
    assert "log.jsonl does not have one line for each of the 2 epochs" in error
    assert contents(folder) == before and not steps_done
    train(module, *flags, "--resume", "--force", "--beta", "0.99")      # says both
    assert "the log lacks epochs" in read(folder, "result.json")["forced"][1]
    epochs = [record["epoch"] for record in records(folder)]
    assert epochs == sorted(set(epochs))


@pytest.mark.parametrize("torn", [b'{"epoch": 1, "lo', b"\0\0\0\0", b"garbage\n"])
def test_a_torn_line_after_the_checkpoint_is_cut_away_and_said(torn, shared_run, tmp_path, capsys):
    """Killed while a line was written: left in the middle of the log, where no reader gets past."""
    module, flags, undisturbed = shared_run("teacher")
    flags = [*flags, "--out", tmp_path / "run", "--save-every", "3"]
    with killed_at(1, 1):
        train(module, *flags)
    with open(tmp_path / "run" / "log.jsonl", "ab") as file:
        file.write(torn)
    train(module, *flags, "--resume")
    assert "log.jsonl is damaged; left out: line 2" in capsys.readouterr().out
    assert_same_run(undisturbed, tmp_path / "run")
    seconds = sum(record["seconds"] for record in records(tmp_path / "run"))
    assert read(tmp_path / "run", "result.json")["seconds"] == round(seconds, 1)


# ---- Steps that are not finite -------------------------------------------------------------------

def bad_steps(monkeypatch, bad, at_each=None):
    """Losses of these steps, counted from 0, are NaN; at_each(step) is called first."""
    scale, step = FiniteScaler.scale, [-1]

    def scaled(scaler, loss):
        step[0] += 1
        if at_each:
            at_each(step[0])
        return scale(scaler, loss * (torch.nan if step[0] in bad else 1))
    monkeypatch.setattr(FiniteScaler, "scale", scaled)


def test_no_checkpoint_while_steps_are_not_finite(shared_run, tmp_path, monkeypatch):
    """"The last checkpoint is from before them", and it holds nine of the ten bad steps."""
    module, flags, _ = shared_run("teacher")
    saves, save = [], Run.save

    def recorded(run, epoch, step):
        saves.append((epoch, step, run.parts["scaler"].in_a_row))
        save(run, epoch, step)
    monkeypatch.setattr(Run, "save", recorded)
    bad_steps(monkeypatch, {1, 2, 3, 5})
    train(module, *flags, *WITHOUT_SAM, "--out", tmp_path / "run", "--save-every", "2")
    # Due after steps 2 and 5; the end is saved in any case.
    assert saves == [(1, 2, 0), (2, 0, 1)]


def test_a_run_that_is_lost_ends(shared_run, tmp_path, monkeypatch, refused):
    """Hours of NaN: a limit that nobody asks."""
    module, flags, _ = shared_run("teacher")
    bad_steps(monkeypatch, set(range(6)))
    monkeypatch.setattr(FiniteScaler, "LIMIT", 3)
    error = refused(module, *flags, *WITHOUT_SAM, "--out", tmp_path / "run")
    assert "--lr" in error and not (tmp_path / "run" / "last.pt").exists()


def test_an_epochs_line_counts_its_own_steps_that_are_not_finite(shared_run, tmp_path, monkeypatch,
                                                                 capsys):
    """float16's search for its first scale, reported as a fault of every later epoch."""
    module, flags, _ = shared_run("teacher")
    bad_steps(monkeypatch, {1})
    train(module, *flags, *WITHOUT_SAM, "--out", tmp_path / "run")
    out = capsys.readouterr()
    first, second = [line for line in (out.out + out.err).splitlines() if "loss" in line
                     and line.lstrip().startswith("epoch")]
    assert first.endswith("1 steps were not finite") and "not finite" not in second
    assert [epoch["skipped"] for epoch in read_log(str(tmp_path / "run"))] == [1, 1]


def test_a_stop_among_steps_that_are_not_finite_says_so(shared_run, tmp_path, monkeypatch, capsys):
    """A checkpoint with bad steps in it, of which the next run says that it is from before them."""
    module, flags, _ = shared_run("teacher")
    flags = [*flags, *WITHOUT_SAM, "--out", tmp_path / "run"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        bad_steps(patch, {1, 2}, lambda step: step == 2 and os.kill(os.getpid(), signal.SIGTERM))
        train(module, *flags)
    assert "(the last 2 steps were not finite and are undone)" in capsys.readouterr().out
    monkeypatch.setattr(FiniteScaler, "LIMIT", 3)           # the two before do not count again
    bad_steps(monkeypatch, {0, 1})
    train(module, *flags, "--resume")
    assert checkpoint(tmp_path / "run")["scaler"]["skipped"] == 4


# ---- Output and pictures -------------------------------------------------------------------------

@pytest.mark.parametrize("file", ["/dev/full", "closed pipe"])
def test_a_run_whose_output_is_lost_goes_on(file, tiny_cifar, tmp_path, monkeypatch):
    """A full disk for the log of a batch system, or `| head`: the run ends with a traceback."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    for name in ("stdout", "stderr"):
        stream = open(file if file == "/dev/full" else os.dup(write_end), "w")
        monkeypatch.setattr(sys, name, stream)
    train(train_student, *PLAIN, "--data-dir", tiny_cifar, "--out", tmp_path / "run")
    monkeypatch.undo()
    os.close(write_end)
    assert (tmp_path / "run" / "result.json").exists() and len(records(tmp_path / "run")) == 2


def test_a_lost_connection_saves(tiny_cifar, tmp_path, monkeypatch, capsys):
    """SIGHUP: the run over ssh ends at once, and with it the work since the last save."""
    monkeypatch.setattr(run_folder, "duration",
                        lambda _: os.kill(os.getpid(), signal.SIGHUP))      # in the 13th step
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)      # the tests themselves under nohup
    flags = [*PLAIN, "--epochs", "9", "--data-dir", tiny_cifar, "--out", tmp_path / "run"]
    with pytest.raises(SystemExit) as stopped:
        train(train_student, *flags)
    signal.signal(signal.SIGHUP, ignored)
    assert stopped.value.code == 128 + signal.SIGHUP
    assert "after step 1; --resume goes on" in capsys.readouterr().out
    assert checkpoint(tmp_path / "run")["epoch"] == 4


@pytest.mark.parametrize("error", [UserError("no matplotlib"), SystemExit(3), MemoryError(),
                                   ValueError("$\\frac{$\n^\nexpected"), UserWarning("glyph")])
def test_a_failed_picture_fails_no_run(error, student_run, monkeypatch, capsys):
    def summary(folder):
        raise error
    monkeypatch.setattr(analyze, "summary", summary)
    train_student.draw_summary(str(student_run))
    out, err = capsys.readouterr()
    assert out.startswith("No picture (") and out.count("\n") == 1 and not err
    assert "()" not in out


def test_a_missing_picture_is_drawn_when_the_command_is_repeated(shared_run, tmp_path, monkeypatch,
                                                                 capsys):
    """No picture ever, as the run is finished; or one that is drawn again each time."""
    module, flags, finished = shared_run("student")
    shutil.copytree(finished, tmp_path / "run")
    drawn = []

    def draw(folder):
        drawn.append(folder)
        (tmp_path / "run" / "summary.png").write_text("picture")
    for flag in ("--resume", "--resume", "--seed=0"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_student, "draw_summary", draw)
            args = train_student.parse([*flags, "--out", str(tmp_path / "run"), flag])
            train_student.run_student(args, runtime.setup("cpu"))
    assert drawn == [str(tmp_path / "run")]


# ---- What an overwritten run leaves --------------------------------------------------------------

def test_an_overwritten_run_leaves_nothing_of_the_old_one(unfinished):
    """The old run's picture, per-class table and TensorBoard events beside the new run's result;
    or somebody's notes removed with them."""
    module, flags, folder = unfinished
    ours = {"result.json", "summary.png", "per_class.csv", "confusion.csv", "confusion.png",
            "calibration.json", "heads.csv", "report.html", "model.pt2", "model.json", "model.onnx",
            "events.out.tfevents.1.host.2.3"}
    figures = {name for name, command in analyze.COMMANDS.items()
               if command is analyze.command_figure}
    ours |= {f"{name}.{ending}" for name in figures for ending in ("png", "csv", "json")}
    ours |= {f"mirror_{name}" for name in ours}
    ours |= {f"with_other+another_{name}" for name in ours}
    foreign = {"notes.txt", "my_summary.png", "predictions.csv", "last.pt.bak", "summary.png.old",
               "with_love.txt"}
    for name in ours | foreign:
        (folder / name).write_text("old")
    (folder / "last.pt.0a1b2c3d.tmp").write_text("of a killed writer")
    (folder / "with_a_report.html").mkdir()
    with killed_at(0, 0):
        train(module, *flags, "--overwrite")
    assert set(os.listdir(folder)) == foreign | {"config.json", "log.jsonl", "with_a_report.html"}
    assert all((folder / name).read_text() == "old" for name in foreign)
