"""Runs that die or are stopped, and go on: nothing done twice, nothing left out or forgotten."""
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch

import train_student
import train_teacher
from engine import evaluation, run_folder, runtime
from engine.past_run import PastRun
from engine.run_folder import Run
from experiments import crt
from tiny_runs import (PLAIN, WITHOUT_SAM, Killed, OneClass, assert_same_run, checkpoint, killed_at,
                       read, records, train)

pytest_plugins = ["tiny_runs"]


# ---- Killed --------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, at, every, first", [
    ("teacher", (1, 2), "1", (1, 2)), ("teacher", (1, 0), "10m", (0, 0)),
    ("paco", (1, 0), "2", (0, 2)), ("student", (0, 2), "1", (0, 2))])
def test_a_killed_run_ends_where_the_undisturbed_one_does(kind, at, every, first, shared_run,
                                                          tmp_path, steps_done):
    """Killed before step `at`, resumed with step `first`, within an epoch, before or after the DRW
    switch: lost momentum, averages, queue, sums of half an epoch or log lines; other draws."""
    module, flags, undisturbed = shared_run(kind)
    flags = [*flags, "--out", tmp_path / "run", "--save-every", every]
    with killed_at(*at):
        train(module, *flags)
    steps_done.clear()
    train(module, *flags, "--resume")
    assert steps_done[0] == first
    assert_same_run(undisturbed, tmp_path / "run")
    result = read(tmp_path / "run", "result.json")
    assert result["avg"] == read(undisturbed, "result.json")["avg"]


@pytest.mark.parametrize("kind, where", [
    ("teacher", "before the last evaluation"), ("teacher", "before the result"),
    ("student", "before the result")])
def test_a_run_that_has_no_step_left(kind, where, shared_run, tmp_path, monkeypatch, steps_done):
    """An evaluation, a log line or a result that is missing for ever; a step that is repeated."""
    module, flags, undisturbed = shared_run(kind)
    flags = [*flags, "--out", tmp_path / "run", "--save-every", "3"]
    evaluate = evaluation.evaluate_teacher

    def dying(*args, **more):
        if where == "before the last evaluation" and len(records(tmp_path / "run")) == 0:
            return evaluate(*args)
        raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if where == "before the result":
            patch.setattr(Run, "finish", dying)
        else:
            patch.setattr(evaluation, "evaluate_teacher", dying)
        train(module, *flags)
    assert not (tmp_path / "run" / "result.json").exists()
    steps_done.clear()
    train(module, *flags, "--resume")
    assert not steps_done
    assert_same_run(undisturbed, tmp_path / "run")
    assert (read(tmp_path / "run", "result.json")["per_class"]
            == read(undisturbed, "result.json")["per_class"])


def test_a_killed_run_with_everything_that_a_step_moves(tiny_cifar, tmp_path, monkeypatch):
    """The stem's BatchNorm, its average, or the teacher's running label distribution forgotten."""
    monkeypatch.setattr(train_student, "load_teacher", lambda *_: (OneClass(), "of one class"))
    flags = [*PLAIN, *("--method deit-lt --stem conv --ema 0.9 --logit-adjustment --distill soft "
                       "--epochs 1 --teacher a.pth --save-every 2").split()]
    flags += ["--data-dir", tiny_cifar, "--out"]
    train(train_student, *flags, tmp_path / "undisturbed")
    with killed_at(0, 2):
        train(train_student, *flags, tmp_path / "run")
    saved = checkpoint(tmp_path / "run")
    assert saved["step"] == 2 and "patch_embed.layers.1.running_mean" in saved["ema"]
    assert saved["teacher_prior"].argmax() == 7
    train(train_student, *flags, tmp_path / "run", "--resume")
    assert_same_run(tmp_path / "undisturbed", tmp_path / "run")


def test_a_killed_classifier_retraining(tiny_cifar, tmp_path, monkeypatch):
    """The classifier drawn anew once more, or the plain ViT's read again, when it is resumed."""
    monkeypatch.chdir(tmp_path)
    flags = [*PLAIN, "--data-dir", tiny_cifar, "--epochs", "1", "--save-every", "1", "--out"]
    flags.remove("--method")
    flags.remove("vit")
    train(crt, *flags, "undisturbed")
    with killed_at(0, 2):
        train(crt, *flags, "run")
    assert checkpoint("run")["step"] == 2
    train(crt, *flags, "run", "--resume")
    assert_same_run("undisturbed", "run")


# ---- When checkpoints are written ----------------------------------------------------------------

@pytest.fixture
def saves(monkeypatch):
    """List that grows by (epoch, step) of every checkpoint."""
    saves, save = [], Run.save

    def recorded(run, epoch, step):
        saves.append((epoch, step))
        save(run, epoch, step)
    monkeypatch.setattr(Run, "save", recorded)
    return saves


def test_checkpoints_by_the_clock(shared_run, tmp_path, monkeypatch, saves):
    """One after every epoch regardless: a GPU that waits for the disk. One that is never due."""
    module, flags, _ = shared_run("teacher")
    clock, seed_step = [0.0], runtime.seed_step

    class Time:
        strftime = time.strftime

        @staticmethod
        def monotonic():
            clock[0] += 0.001
            return clock[0]

    def passing(*key):
        if key[1:3] == (1, 1):
            clock[0] += 61
        seed_step(*key)
    monkeypatch.setattr(run_folder, "time", Time)
    monkeypatch.setattr(runtime, "seed_step", passing)
    flags = [*flags, *WITHOUT_SAM, "--out", tmp_path / "run"]
    train(module, *flags, "--save-every", "1m")
    assert saves == [(1, 2), (2, 0)]                # two steps of epoch 1 are done; the end


@pytest.mark.parametrize("every, expected", [(2, [(0, 2), (1, 1), (1, 3), (2, 0)]),
                                             (4, [(1, 1), (2, 0)])])
def test_checkpoints_by_steps(every, expected, shared_run, tmp_path, saves):
    """Epochs of 3 steps, and the end; no checkpoint at all where an epoch has fewer steps."""
    module, flags, _ = shared_run("teacher")
    train(module, *flags, *WITHOUT_SAM, "--out", tmp_path / "run", "--save-every", every)
    assert saves == expected


# ---- Stopped by a signal -------------------------------------------------------------------------

def sends(number, function, when):
    """`function`, which sends this process a signal first when its arguments say so."""
    def sending(*args, **more):
        if when(*args):
            os.kill(os.getpid(), number)
        return function(*args, **more)
    return sending


def test_a_signal_saves_after_the_step(shared_run, tmp_path, monkeypatch, capsys):
    """The default handlers: nothing saved, or a traceback. A step that is not finished first."""
    module, flags, _ = shared_run("student")
    flags = [*flags, "--out", tmp_path / "run"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        when = sends(signal.SIGTERM, runtime.seed_step, lambda *key: key[1:3] == (1, 1))
        patch.setattr(runtime, "seed_step", when)
        train(module, *flags)
    out, err = capsys.readouterr()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "in epoch 2 after step 2; --resume goes on from there" in out
    assert err.count("\n") == 1 and "saving after this step" in err
    state = checkpoint(tmp_path / "run")
    assert (state["epoch"], state["step"]) == (1, 2)
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_signal_during_an_evaluation_saves_after_it(shared_run, tmp_path, monkeypatch, capsys):
    """An epoch that is trained again; a signal that is only noticed in the next epoch."""
    module, flags, _ = shared_run("teacher")
    flags = [*flags, *WITHOUT_SAM, "--out", tmp_path / "run"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        once = sends(signal.SIGTERM, evaluation.evaluate_teacher, lambda *_: True)
        patch.setattr(evaluation, "evaluate_teacher", once)
        train(module, *flags)
    assert "Stopped after epoch 1;" in capsys.readouterr().out
    state = checkpoint(tmp_path / "run")
    assert (state["epoch"], state["step"]) == (1, 0) and len(records(tmp_path / "run")) == 1


def test_a_signal_at_the_end_of_the_teachers_run_stops_the_students(shared_run, tmp_path,
                                                                    monkeypatch, capsys):
    """Hours of training that nobody wants any more."""
    module, flags, _ = shared_run("student")
    flags[flags.index("--teacher") + 1] = "auto"
    monkeypatch.chdir(tmp_path)
    tiny = dict(epochs=1, warmup_epochs=0, img_size=8, batch=45)
    monkeypatch.setitem(train_teacher.RECIPES["cpu"], "cifar10", train_teacher.CPU | tiny)
    once = sends(signal.SIGTERM, evaluation.teacher_summary, lambda *_: True)
    monkeypatch.setattr(evaluation, "teacher_summary", once)
    with pytest.raises(SystemExit) as stopped:
        train(module, *flags, "--out", "student")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "Stopped before the first step" in capsys.readouterr().out
    assert (tmp_path / "runs/teacher_cifar10_imb12_cpu_s0/result.json").exists()
    assert not (tmp_path / "student").exists()


# ---- Resumed otherwise ---------------------------------------------------------------------------

def test_torchruns_restart_resumes_by_itself(shared_run, tmp_path, monkeypatch, steps_done):
    """A restarted worker has the command of the first: it must not begin again, nor overwrite."""
    module, flags, _ = shared_run("teacher")
    flags = [*flags, *WITHOUT_SAM, "--out", tmp_path / "run", "--save-every", "1", "--overwrite"]
    with killed_at(1, 1):
        train(module, *flags)
    steps_done.clear()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(module, *flags)
    assert steps_done == [(1, 1), (1, 2)] and len(records(tmp_path / "run")) == 2


@pytest.mark.parametrize("dies", ["before the old files are removed", "at the second of them"])
def test_torchruns_restart_does_not_take_what_is_overwritten(dies, shared_run, tmp_path,
                                                             monkeypatch, steps_done):
    """A worker that died before its first step, and the old result printed as the new one, or the
    old run resumed."""
    module, flags, finished = shared_run("teacher")
    shutil.copytree(finished, tmp_path / "run")
    flags, remove = [*flags, *WITHOUT_SAM, "--out", tmp_path / "run", "--overwrite"], os.remove

    def removing(path):
        if str(path).endswith("last.pt"):
            raise Killed
        remove(path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if dies == "at the second of them":
            patch.setattr(os, "remove", removing)
        else:
            patch.setattr(train_teacher, "load_data", killed)
        train(module, *flags)
    assert not steps_done and (tmp_path / "run" / "last.pt").exists()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(module, *flags)
    assert len(steps_done) == 6 and read(tmp_path / "run", "config.json")["rho"] == 0


def killed(*args):
    raise Killed


def test_a_run_keeps_its_precision_and_remembers_its_machines(shared_run, tmp_path, refused):
    """Half of a run in bfloat16, because the machine that resumes it has that; the minutes of two
    machines under the name of one."""
    module, flags, finished = shared_run("teacher")
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    flags, state = [*flags, "--out", tmp_path / "run", "--resume"], checkpoint(finished)
    other = "bf16" if state["amp"] == "none" else "none"
    torch.save(state | {"amp": other}, tmp_path / "run" / "last.pt")
    assert f"--amp {other} -> {state['amp']}" in refused(module, *flags)
    torch.save(state | {"hardware": "an abacus"}, tmp_path / "run" / "last.pt")
    train(module, *flags)
    for name in ("result.json", "config.json"):
        assert read(tmp_path / "run", name)["hardware"].startswith("an abacus, then ")


def test_another_teacher_is_not_trained_to_be_refused(shared_run, tmp_path, monkeypatch, refused):
    """Hours of a teacher's training, then "its weights are others"."""
    module, flags, finished = shared_run("student")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    at = flags.index("--teacher")
    others = [*flags[:at], *flags[at + 2:], "--out", "run", "--resume"]
    error = refused(module, *others)
    assert "--teacher" in error and "-> runs/teacher_" in error
    assert not (tmp_path / "runs").exists()
    error = refused(module, *others, "--method", "vit")
    assert "--method deit-lt -> vit" in error and "--teacher" in error


def test_the_run_to_start_from_may_be_spelled_otherwise(shared_run, tmp_path):
    """"runs/a/" for "runs/a": "begun with other settings"."""
    module, flags, first = shared_run("student")
    flags = [*flags, "--out", tmp_path / "run", "--save-every", "1", "--finetune"]
    with killed_at(0, 2):
        train(module, *flags, first)
    train(module, *flags, f"{first}/", "--resume")
    assert (tmp_path / "run" / "result.json").exists()


def test_a_finished_students_teacher_may_be_spelled_otherwise(shared_run, capsys):
    """"runs/t/" for "runs/t", and another run is said to be there."""
    module, flags, finished = shared_run("student")
    at = flags.index("--teacher") + 1
    flags = [*flags[:at], flags[at] + "/", *flags[at + 1:], "--out", finished]
    train(module, *flags)
    assert "is finished (2 epochs)" in capsys.readouterr().out


def test_a_shorter_run_by_force_is_the_finished_one(shared_run, capsys):
    """The result of two epochs under the name of one."""
    module, flags, finished = shared_run("teacher")
    train(module, *flags, "--out", finished, "--epochs", "1", "--resume", "--force")
    text = capsys.readouterr().out
    assert "nothing is left to train with" in text and "is finished (2 epochs)" in text


def test_a_stopped_run_ends_by_force_after_the_epochs_that_it_has(shared_run, tmp_path, refused):
    """A result of fewer epochs than the weights have, or one whose checkpoint is "not finished",
    so that no student takes it and no command mends it."""
    module, flags, finished = shared_run("teacher")
    shutil.copytree(finished, tmp_path / "run")
    state = checkpoint(finished)                                # of two epochs
    flags = [*flags, "--out", tmp_path / "run", "--resume", "--force", "--epochs"]
    for step, allowed in ((0, 2), (1, 3)):
        (tmp_path / "run" / "result.json").unlink()
        state |= dict(config=state["config"] | dict(epochs=9), step=step)
        torch.save(state, tmp_path / "run" / "last.pt")
        error = refused(module, *flags, str(allowed - 1))
        assert f"has begun {allowed} epochs already: --epochs {allowed} or more" in error
        train(module, *flags, str(allowed))
        end = checkpoint(tmp_path / "run")
        assert end["epoch"] == end["config"]["epochs"] == allowed
        assert read(tmp_path / "run", "result.json")["epochs"] == allowed
        assert len(records(tmp_path / "run")) == allowed


def test_the_time_left_is_that_of_steps(monkeypatch):
    """An evaluation of a minute among the ten steps that are timed: "hours left"."""
    clock, printed = [0.0], []
    rt = runtime.Runtime(torch.device("cpu"))
    run = Run.__new__(Run)
    vars(run).update(rt=rt, metrics=("loss",), start_epoch=0, start_step=0, steps=8, timed=0,
                     timer=None, passes=[1, 1, 1])
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(runtime.Runtime, "print", lambda rt, text: printed.append(text))
    for epoch in range(3):
        run.begin_epoch(epoch)
        for step in range(8):
            clock[0] += 1
            run.estimate(epoch, step)
        clock[0] += 60
    assert len(printed) == 1 and printed[0].startswith("about 11 s left")      # 3 + 8 steps


def test_another_batch_by_force_begins_the_half_done_epoch_again(shared_run, tmp_path, capsys,
                                                                 steps_done):
    """Steps counted in batches of another size: images that are left out of the epoch."""
    module, flags, _ = shared_run("teacher")
    flags = [*flags, *WITHOUT_SAM, "--out", tmp_path / "run", "--save-every", "1"]
    with killed_at(1, 2):
        train(module, *flags)
    steps_done.clear()
    train(module, *flags, "--resume", "--force", "--batch", "45")
    assert steps_done == [(1, 0), (1, 1)]
    assert "--batch 30 -> 45" in capsys.readouterr().out
    assert "--batch 30 -> 45" in read(tmp_path / "run", "result.json")["forced"][0]


def test_other_settings_are_refused_with_their_list_unless_forced(shared_run, tmp_path, refused,
                                                                  capsys):
    """A run that is neither the old nor the new one. A longer run is the usual reason to force."""
    module, flags, finished = shared_run("teacher")
    shutil.copytree(finished, tmp_path / "run")
    flags = [*flags, "--out", tmp_path / "run", "--resume", "--epochs", "3", "--lr", "0.05"]
    error = refused(module, *flags)
    assert "--epochs 2 -> 3" in error and "--lr 0.1 -> 0.05" in error and "--force" in error
    train(module, *flags, "--force", "--weight-decay", "0.5")
    assert "--epochs 2 -> 3" in capsys.readouterr().out
    assert len(records(tmp_path / "run")) == 3
    # A checkpoint's decay, under a config.json that says the new one.
    optimizer = checkpoint(tmp_path / "run")["optimizer"]["base_optimizer"]
    assert optimizer["param_groups"][0]["weight_decay"] == 0.5


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_finished_run_prints_its_result_and_is_left_alone(kind, shared_run, capsys):
    """A log or a checkpoint that is written again; a run of two epochs that trains a third."""
    module, flags, finished = shared_run(kind)
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    train(module, *flags, "--out", finished, "--resume")
    out = capsys.readouterr().out
    assert "is finished (2 epochs)" in out
    accuracy = read(finished, "result.json")["avg"]["overall"]
    assert f"{accuracy:.1f}" in next(line for line in out.splitlines() if line.startswith("avg"))
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


def test_another_run_in_the_folder_is_not_overwritten(shared_run, refused, tmp_path):
    """A command that is given twice, and its first result gone."""
    module, flags, finished = shared_run("teacher")
    shutil.copytree(finished, tmp_path / "run")
    error = refused(module, *flags, "--out", tmp_path / "run", "--lr", "0.05")
    assert "other settings, --lr 0.1 -> 0.05: " in error and "--overwrite" in error
    (tmp_path / "run" / "result.json").unlink()
    assert "already holds a run" in refused(module, *flags, "--out", tmp_path / "run")
    with killed_at(0, 0):
        train(module, *flags, "--out", tmp_path / "run", "--overwrite")
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"config.json", "log.jsonl"}
    assert records(tmp_path / "run") == []


def test_other_images_are_refused(shared_run, tiny_cifar, tmp_path, refused):
    """A run that goes on with other images than it began with, under the same settings."""
    module, flags, finished = shared_run("teacher")
    shutil.copytree(tiny_cifar, tmp_path / "others")
    picture = tmp_path / "others" / "train" / "class9" / "0.png"
    shutil.copy(tiny_cifar / "train" / "class0" / "0.png", picture)
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    flags = [*flags, "--data-dir", tmp_path / "others", "--out", tmp_path / "run", "--resume"]
    for file in (tmp_path / "others" / "train" / "class0").iterdir():
        file.rename(file.with_name(f"renamed_{file.name}"))
    assert "other images" in refused(module, *flags)


def test_other_classes_of_the_same_files_are_refused(shared_run, tiny_cifar, tmp_path, refused):
    """--skip-bad with files that no longer open: other counts, and so other numbers of classes."""
    module, flags, finished = shared_run("teacher")
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    state = checkpoint(tmp_path / "run")
    assert {"counts", "class_names"} <= state.keys()
    for name in ("counts", "class_names"):
        torch.save(state | {name: state[name][::-1]}, tmp_path / "run" / "last.pt")
        error = refused(module, *flags, "--data-dir", tiny_cifar, "--out", tmp_path / "run",
                        "--resume")
        assert "other images" in error and "--overwrite" in error


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_nothing_to_resume_is_said(kind, shared_run, tmp_path, capsys):
    """A mistyped folder that begins a new run without a word."""
    module, flags, _ = shared_run(kind)
    with killed_at(0, 0):
        train(module, *flags, "--out", tmp_path / "elsewhere", "--resume")
    assert "nothing to resume in" in capsys.readouterr().out


def test_an_unfinished_run_of_other_settings_is_named(tmp_path):
    """A forgotten --epochs, with which --resume trains all over again in another folder."""
    for name in ("teacher_x_ours_epochs9_s0", "teacher_x_ours_s1", "teacher_x_cpu_s0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").touch()
    (tmp_path / "teacher_x_ours_s1" / "result.json").touch()
    (tmp_path / "teacher_x_ours_s2").mkdir()                # not begun
    asked = SimpleNamespace(folder=str(tmp_path / "teacher_x_ours_lr0.1_s0"))
    text = PastRun.unfinished(asked, SimpleNamespace(recipe="ours"))
    assert text == (f". To go on with {tmp_path}/teacher_x_ours_epochs9_s0, which is not finished, "
                    "repeat its settings")
    assert PastRun.unfinished(asked, SimpleNamespace(recipe="paper")) == ""
    asked.folder = str(tmp_path / "my_ours")
    (tmp_path / "my_ours_2").mkdir()
    (tmp_path / "my_ours_2" / "last.pt").touch()            # of a name that says nothing
    assert PastRun.unfinished(asked, SimpleNamespace(recipe="ours")) == ""


def test_the_time_of_half_an_epoch_is_counted(monkeypatch):
    """Minutes too few, and images/s too many, of a run that was resumed."""
    run = Run.__new__(Run)
    vars(run).update(rt=runtime.setup("cpu", "none"), metrics=("loss",), start_epoch=1,
                     start_step=2, timer=None, timed=0,
                     half_epoch=(torch.tensor([[3.0, 2.0]]), 100.0))
    run.begin_epoch(1)
    assert time.monotonic() - run.started >= 100 and run.sums.tolist() == [3.0, 2.0]
    run.begin_epoch(2)
    assert time.monotonic() - run.started < 50 and run.sums.tolist() == [0.0, 0.0]
