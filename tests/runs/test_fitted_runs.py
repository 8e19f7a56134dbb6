"""Whole runs of --minutes: those of the epochs that they became, also killed and resumed."""
import json

import pytest
import torch

import analyze
import train_student
import train_teacher
from conftest import script
from engine import minutes, runtime
from engine.run_folder import Run
from tiny_runs import PLAIN, STUDENT, Killed, assert_same_run, read, train

pytest_plugins = ["tiny_runs"]


def in_minutes(flags):
    """The flags with --minutes instead of --epochs."""
    at = flags.index("--epochs")
    return [*flags[:at], *flags[at + 2:], "--minutes", "3"]


@pytest.fixture
def measured(monkeypatch):
    """List that grows by what is measured, which always becomes two epochs."""
    costs = []

    def most_epochs(left, measured, args):
        costs.append(measured)
        return 2, 1
    monkeypatch.setattr(minutes, "TIMED", (2, 2))
    monkeypatch.setattr(minutes, "most_epochs", most_epochs)
    return costs


@pytest.mark.parametrize("kind", ["paco", "student"])
def test_the_run_is_that_of_its_epochs(kind, shared_run, measured, tmp_path, capsys):
    """A network that the measurement has trained already, BatchNorm's statistics, PaCo's keys drawn
    after other random numbers; a repeated command that measures again."""
    module, flags, undisturbed = shared_run(kind)
    flags = [*in_minutes(flags), "--out", tmp_path / "run"]
    train(module, *flags)
    assert_same_run(undisturbed, tmp_path / "run")
    assert "3 minutes: " in capsys.readouterr().out
    assert measured[0].epoch > 0 and measured[0].evaluation > 0
    config = read(tmp_path / "run", "config.json")
    assert (config["epochs"], config["minutes"], config["eval_every"]) == (2, 3, 1)
    train(module, *flags)
    assert "is finished (2 epochs)" in capsys.readouterr().out and len(measured) == 1


def test_a_fitted_run_can_be_analysed(tiny_cifar, measured, tmp_path, monkeypatch):
    """Its settings, --minutes and the epochs that they became, refused as if both were given."""
    train(train_student, *in_minutes(PLAIN), "--data-dir", tiny_cifar, "--out", tmp_path / "run")
    script(analyze, monkeypatch, "eval", tmp_path / "run")
    assert (tmp_path / "run/per_class.csv").exists()


@pytest.mark.parametrize("saved, lost", [("1", None), ("1", "config.json"), ("10m", None)])
def test_a_killed_run_goes_on_with_its_epochs(saved, lost, tiny_cifar, measured, tmp_path):
    """A resumed run, or one that was killed before its first checkpoint, that measures again and
    becomes another run."""
    flags = [*in_minutes(PLAIN), "--data-dir", tiny_cifar]
    train(train_student, *flags, "--out", tmp_path / "undisturbed")
    flags += ["--out", tmp_path / "run", "--save-every", saved]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "after_step", dying(Run.after_step))
        train(train_student, *flags)
    if lost:
        (tmp_path / "run" / lost).unlink()
    train(train_student, *flags, "--resume")
    assert len(measured) == 2                           # once in each folder
    assert_same_run(tmp_path / "undisturbed", tmp_path / "run")


def dying(after_step):
    def die(run, epoch, step, *more):
        after_step(run, epoch, step, *more)
        if (epoch, step) == (1, 1):
            raise Killed
    return die


def test_a_run_goes_on_with_its_minutes_only(tiny_cifar, measured, tmp_path, refused):
    """A run of ten minutes that goes on as one of twenty without a word."""
    flags = [*in_minutes(PLAIN), "--data-dir", tiny_cifar, "--out", tmp_path]
    train(train_student, *flags)
    for more in ([], ["--force"]):          # which would train nothing, and write "4 minutes"
        error = refused(train_student, *flags, "--minutes", "4", "--resume", *more)
        assert "was begun with --minutes 3.0, which cannot be changed" in error
    assert "--epochs" in refused(train_student, *PLAIN, "--data-dir", tiny_cifar, "--minutes", "3")


@pytest.mark.parametrize("other", [dict(minutes=1.0), dict(model="mini")])
def test_a_run_without_a_checkpoint_has_the_epochs_of_its_own_settings(other, tiny_cifar, measured,
                                                                       tmp_path):
    """Killed before its first checkpoint, then begun with more minutes, or a network of another
    size: the old epochs."""
    flags = [*in_minutes(PLAIN), "--data-dir", tiny_cifar, "--out", tmp_path]
    train(train_student, *flags)
    config = read(tmp_path, "config.json") | other | dict(epochs=7)
    for file in tmp_path.iterdir():
        file.unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    train(train_student, *flags, "--resume")
    assert read(tmp_path, "config.json")["epochs"] == 2 and len(measured) == 2


def test_a_signal_ends_the_measurement(monkeypatch, capsys):
    """Minutes of a measurement, after a signal that asked the run to stop."""
    probe = minutes.Probe(runtime.Runtime(torch.device("cpu")), 100)
    monkeypatch.setattr(runtime, "stop_signal", 15)
    with pytest.raises(SystemExit) as stopped:
        probe.after_epoch(0, None)
    assert stopped.value.code == 143 and "Stopped" in capsys.readouterr().out


def test_a_student_shares_its_minutes_with_its_teacher(tiny_cifar, measured, tmp_path, monkeypatch,
                                                       capsys):
    """A teacher that takes all of the time, or a student that starts another one each time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train_teacher.RECIPES["cpu"], "cifar10", train_teacher.CPU
                        | dict(img_size=8, batch=30, rho=0.0, eval_every=1))
    flags = [*in_minutes(STUDENT), "--data-dir", tiny_cifar]
    train(train_student, *flags)
    teacher, = (tmp_path / "runs").glob("teacher_*")
    student, = (tmp_path / "runs").glob("deit-lt_*")
    assert teacher.name == "teacher_cifar10_imb12_cpu_min1.2_s0"
    assert "_min3_" in student.name and "epochs" not in student.name
    assert read(teacher, "config.json")["minutes"] == pytest.approx(1.2)
    assert read(student, "result.json")["epochs"] == read(teacher, "result.json")["epochs"] == 2
    text = capsys.readouterr().out
    assert text.index("1.2 minutes: 0.") < text.index("3 minutes: 0.")
