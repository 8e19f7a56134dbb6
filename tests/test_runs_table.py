"""The table of runs: which columns a run's files fill, and what happens to rows that exist."""
import csv
import json
import shutil

import pytest

from engine.runtime import UserError
from experiments import runs_table

HEAD = {"overall": 40.0, "head": 80.0, "mid": 30.0, "tail": 10.0}
CONFIG = {"dataset": "cifar10", "amp_dtype": "None", "versions": {"torch": "2.6.0"}}
RESULT = {"dataset": "CIFAR-10", "imb": 100.0, "recipe": "cpu", "epochs": 2, "seed": 1,
          "seconds": 90.0, "hardware": "1 thread", "method": "deit-lt", "model": "mini",
          "teacher": None, "avg": {"overall": 50.5, "head": 70.0, "mid": 50.0, "tail": 30.0}}


def finished_run(folder, config, result, log):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "result.json").write_text(json.dumps(RESULT | result))
    (folder / "log.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in log))
    return str(folder)


def rows_of(table):
    with open(table, newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


@pytest.fixture
def runs(tmp_path):
    earlier = finished_run(
        tmp_path / "earlier", {"adjust": "both", "beta": 0.0, "lr": 0.001, "alpha": 0.909},
        {"command": "python train_student.py --adjust both --beta 0 --seed 1 --save-every 3m",
         "teacher": "runs/a,runs/b", "cls": HEAD, "dist": HEAD | {"tail": 11.0},
         "ema": HEAD | {"tail": 12.0}, "avg+teacher": HEAD | {"tail": 13.0},
         "per_class": {"avg": [51.0, 50.0]}},
        [{"epoch": 0, "drw": False, "teacher_accuracy": 40.0},
         {"epoch": 1, "drw": False, "teacher_accuracy": 30.0},
         {"epoch": 2, "drw": True, "teacher_accuracy": 90.0, "cosine": 0.7}])
    today = finished_run(
        tmp_path / "today",
        {"format": 2, "logit_adjustment": False, "lr": 0.01, "amp_dtype": "torch.bfloat16",
         "checkpointing": True},
        {"command": "python train_student.py --recipe ours --no-logit-adjustment --lr=1e-2 "
                    "--checkpointing"},
        [{"epoch": 0, "drw": False}])
    teacher = finished_run(
        tmp_path / "teacher", {"arch": "resnet32", "holdout": 0.1, "rho": 0.0, "lr": 0.1},
        {"command": "python train_student.py --holdout 0.1 --teacher-rho 0 --lr 0.5",
         "training_images": {"mixed": {"accuracy": 37.5, "entropy": 0.25}}},
        [{"epoch": 0, "drw": False}])
    return earlier, today, teacher


def test_rows_of_earlier_and_of_todays_runs(runs, tmp_path):
    table = tmp_path / "runs.csv"
    runs_table.main([str(table), *runs])
    rows = rows_of(table)
    assert list(rows) == ["earlier", "teacher", "today"]

    row = rows["earlier"]
    assert (row["kind"], row["teacher"]) == ("student", "a,b")
    assert row["settings"] == "adjust=both beta=0.0"
    assert (row["overall"], row["both_mid"], row["both_balanced"]) == ("50.5", "30.0", "")
    tails = [row[f"{head}_tail"] for head in ("cls", "dist", "ema", "both")]
    assert tails == ["10.0", "11.0", "12.0", "13.0"]
    assert (row["teacher_right"], row["cosine"], row["minutes"]) == ("35.0", "0.7", "1.5")
    assert (row["amp_dtype"], row["torch"], row["per_class"]) == ("float32", "2.6.0", "51.0 50.0")

    row = rows["today"]
    assert (row["amp_dtype"], row["teacher"]) == ("bfloat16", "")
    assert row["settings"] == "logit_adjustment=False lr=0.01"

    row = rows["teacher"]
    assert row["kind"] == "teacher"
    assert row["settings"] == "holdout=0.1 rho=0.0"       # the command's --lr is the student's
    assert (row["mixed_accuracy"], row["mixed_entropy"]) == ("37.5", "0.25")


def test_rows_are_added_and_replaced_by_name(runs, tmp_path, capsys):
    table = tmp_path / "runs.csv"
    runs_table.main([str(table), runs[0], "--note", "on another machine"])
    runs_table.main([str(table), runs[1], str(tmp_path)])
    assert "no finished run" in capsys.readouterr().err
    assert list(rows_of(table)) == ["earlier", "today"]

    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "result.json").write_text("{")
    runs_table.main([str(table), str(tmp_path / "damaged")])
    assert "no finished run" in capsys.readouterr().err
    assert list(rows_of(table)) == ["earlier", "today"]

    result = tmp_path / "earlier" / "result.json"
    result.write_text(result.read_text().replace("50.5", "51.5"))
    runs_table.main([str(table), runs[0]])
    row = rows_of(table)["earlier"]
    assert (row["overall"], row["note"]) == ("51.5", "on another machine")


@pytest.mark.parametrize("content", ["name,phone\nold,123\n", "class,frequency\ncat,1\n", ""])
def test_a_table_of_something_else_is_left_as_it_is(content, runs, tmp_path):
    """Columns that are not ours lost; a traceback."""
    table = tmp_path / "mine.csv"
    table.write_text(content)
    with pytest.raises(UserError, match="no table of runs"):
        runs_table.main([str(table), runs[0]])
    assert table.read_text() == content


def test_a_table_that_excel_has_saved_is_read(runs, tmp_path):
    table = tmp_path / "runs.csv"
    runs_table.main([str(table), runs[0]])
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    runs_table.main([str(table), runs[1]])
    assert list(rows_of(table)) == ["earlier", "today"]


def test_two_runs_of_one_name_are_refused(runs, tmp_path):
    """One of them lost: a row has its run's name."""
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(runs[0], tmp_path / "elsewhere" / "earlier")
    with pytest.raises(UserError, match="same name"):
        runs_table.main([str(tmp_path / "t.csv"), runs[0], str(tmp_path / "elsewhere/earlier")])
    assert not (tmp_path / "t.csv").exists()
