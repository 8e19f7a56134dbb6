"""experiments.minutes: the table of what some minutes buy, from runs that are written here."""
import json
from pathlib import Path

import pytest

import train_teacher
from conftest import script
from engine import datasets
from experiments import minutes, resnet18
from image_folders import write_files


RESNET18_RUN = "runs/resnet18_cifar10_imb4_cpu_imgsize16_epochs4_batch24_s0"


def finish(folder, epochs, **networks):
    """Write the files of a finished run; networks {name: accuracies}."""
    Path(folder).mkdir(parents=True)
    (Path(folder) / "result.json").write_text(json.dumps(networks))
    (Path(folder) / "config.json").write_text(json.dumps({"epochs": epochs}))


def test_the_table_has_each_networks_numbers(monkeypatch, tmp_path, capsys):
    """The teacher's number in the student's row, overall accuracy for balanced accuracy, epochs of
    another run; a run that is trained although only the table was asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(minutes, "run", lambda runs: 1 / 0)
    names = "balanced", "overall", "head", "mid", "tail", "macro_f1"
    skewed = dict(zip(names, (61.25, 90.0, 80.0, 60.0, 40.0, 55.5)))
    plain = dict(zip(names[1:5], (50.0, 60.0, 50.0, 40.0)))
    finish("runs/teacher_cifar10_imb100_ours_min5_s0", 7, avg=skewed)
    finish("runs/teacher_cifar10_imb100_ours_min2_s0", 4, avg=skewed)
    finish("runs/deit-lt_cifar10_imb100_ours_min5_s0", 9, avg=plain | {"tail": None},
           teacher="runs/teacher_cifar10_imb100_ours_min2_s0",
           teacher_avg=skewed | {"balanced": 62.0}, **{"avg+teacher": skewed | {"tail": 41.0}})
    script(minutes, monkeypatch, "--minutes", 5, "--show")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "| 5 | our teacher | 7 | 61.2 | 80.0 | 60.0 | 40.0 | 55.5 | 90.0 |",
        "| 5 | ours, the student | 9 | 50.0 | 60.0 | 50.0 | - | - | 50.0 |",
        "| 5 | ours, its teacher | 4 | 62.0 | 80.0 | 60.0 | 40.0 | 55.5 | 90.0 |",
        "| 5 | ours, both | 9 | 61.2 | 80.0 | 60.0 | 41.0 | 55.5 | 90.0 |"]


def test_every_row_is_a_run_of_its_minutes(monkeypatch, tmp_path, capsys):
    """Two rows in one folder by mistake, minutes or a common flag that do not reach a run."""
    monkeypatch.chdir(tmp_path)
    commands = []
    monkeypatch.setattr(minutes, "run", commands.extend)
    script(minutes, monkeypatch, "--minutes", 5, 10, "--seed", 3)
    assert len(set(commands)) == 8              # the student's three rows are one run
    for command in commands:
        assert "--seed 3 --minutes=" in command
    assert capsys.readouterr().out.count("\n") == 2


@pytest.mark.parametrize("flags, words", [
    (("--out", "x"), "every run has its own"), (("--recipe", "cpu"), "every run has its own"),
    (("--minutes", 0), "must be at least"),
    (("--minutes", 4, 10), "of its student would be that of 4 minutes")])
def test_what_all_runs_cannot_share(flags, words, monkeypatch, capsys):
    """Rows that print one run's numbers; a student that gets its teacher's time as well."""
    monkeypatch.setattr(minutes, "run", lambda runs: 1 / 0)
    with pytest.raises(SystemExit):
        script(minutes, monkeypatch, *flags)
    assert words in capsys.readouterr().err


def test_a_student_does_not_get_its_teachers_time_as_well(monkeypatch, tmp_path, capsys):
    """Stopped between teacher and student, and the row of five minutes is one of seven."""
    monkeypatch.chdir(tmp_path)
    commands = []
    monkeypatch.setattr(minutes, "run", commands.extend)
    finish("runs/teacher_cifar10_imb100_ours_min2_s0", 4)
    with pytest.raises(SystemExit):
        script(minutes, monkeypatch, "--minutes", 5)
    assert "teacher_cifar10_imb100_ours_min2_s0 is trained already" in capsys.readouterr().err
    assert not any("train_student" in command and "vit" not in command for command in commands)


def test_a_finished_run_of_another_folder_of_the_same_name_is_not_shown(monkeypatch, tmp_path):
    """a/fish, then b/fish, or a fish more: the numbers of before."""
    monkeypatch.chdir(tmp_path)
    for place, n in (("a", 3), ("b", 4)):
        write_files(tmp_path / place / "fish", {"train/cod": n, "train/eel": 3, "test/cod": 2,
                                                "test/eel": 2})
    rt = minutes.runtime.setup("cpu", "none")
    monkeypatch.setattr(train_teacher, "survey", lambda args: datasets.Survey(6, 2, 32))
    command = f"{minutes.RESNET18} --minutes 5 --dataset folder --data-dir"
    first, second = (minutes.settings_of(f"{command} {place}/fish", rt) for place in "ab")
    assert first.out == second.out
    finish(first.out, 3)
    config = {"epochs": 3, "warmup_epochs": 0.5, "minutes": 5, "dataset": "folder", "imb": None,
              "holdout": None, "fingerprint": datasets.fingerprint_of_files(first)}
    Path(first.out, "config.json").write_text(json.dumps(config))
    assert minutes.is_finished(first.out, first)
    with pytest.raises(minutes.UserError, match="--data-dir"):
        minutes.is_finished(second.out, second)


@pytest.mark.parametrize("flags, words", [
    ("--loss ce", "--loss would have no effect"), ("--compile", "--compile would have no effect"),
    ("--rho 0.1 --schedule step", "--schedule, --rho would have no effect")])
def test_a_plain_resnet18_takes_no_flag_in_vain(flags, words):
    """A log that says SAM, or another loss, of a run that had neither."""
    rt = minutes.runtime.setup("cpu", "none")
    with pytest.raises(minutes.UserError, match=words):
        minutes.settings_of(f"{minutes.RESNET18} {flags}", rt)
    named = minutes.settings_of(f"{minutes.RESNET18} --lr 0.01", rt)
    assert named.out == "runs/resnet18_cifar10_imb100_cpu_lr0.01_s0"


def test_the_plain_resnet18_learns(monkeypatch, tmp_path, tiny_cifar, capsys):
    """A loop that does not learn, a rate that stays at its warm-up, a result that is not kept."""
    monkeypatch.chdir(tmp_path)
    sizes, to_network = set(), train_teacher.to_network

    def watched(images):
        sizes.add(images.shape[-1])
        return to_network(images)
    monkeypatch.setattr(train_teacher, "to_network", watched)
    script(resnet18, monkeypatch, "--dataset", "cifar10", "--imb", 4, "--data-dir", tiny_cifar,
           "--img-size", 16, "--epochs", 4, "--batch", 24, "--device", "cpu", "--amp", "none")
    log = [json.loads(line) for line in Path(
        f"{RESNET18_RUN}/log.jsonl").read_text().splitlines()]
    assert sizes == {16}                                        # as it is tested, not as stored
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and log[-1]["lr"] < log[1]["lr"]
    assert "avg" in json.loads(Path(f"{RESNET18_RUN}/result.json").read_text())
