"""Whole runs on a folder of one's own and on list files: from pictures to predictions."""
import csv
import json

import pytest
import torch

import analyze
import data_lt
import train_student
import train_teacher
from conftest import script
from engine import runtime
from engine.checkpoints import load_checkpoint
from engine.datasets import last_loaded
from image_folders import damage, deepen, make_folder, make_lists, picture

SHORT = "--recipe cpu --model micro --epochs 2 --drw-epoch 1 --eval-every 2 --batch 8".split()


def without_picture(monkeypatch):
    """A run's picture takes longer to draw than these networks to train."""
    monkeypatch.setattr(train_student, "draw_summary", lambda folder: None)


def test_training_on_a_folder_of_ones_own(tmp_path, monkeypatch, capsys):
    """From a folder to a result: the paragraph, the choice of sizes, class names in the
    checkpoint; an imbalance in the result that the images do not have."""
    without_picture(monkeypatch)
    root, run = make_folder(tmp_path / "my pictures", n=12, size=(90, 70)), tmp_path / "run"
    script(train_student, monkeypatch, "--dataset", "folder", "--data-dir", root, "--method", "vit",
           "--out", run, "--imb", "5", *SHORT)
    out = capsys.readouterr().out
    assert "my pictures (imb 6 for --imb 5, 19 images, 3 classes of 12 to 2)" in out
    assert "64 px" in out and "'apple pie'" in out
    state = load_checkpoint(str(run))
    assert state["class_names"] == ["apple pie", "Bär", "c,3"]
    assert state["config"]["img_size"] == 64
    assert json.loads((run / "result.json").read_text())["imb"] == 6


def test_from_a_folder_to_predictions_and_on(tmp_path, monkeypatch, capsys):
    """A newcomer's way, every command of it, with what is awkward: a class of one image that is not
    tested; --holdout; data that change under a run."""
    root = make_folder(tmp_path / "in", n=12, size=(40, 44)) / "train"
    (root / "only one").mkdir()
    picture(40, 44, seed=300).save(root / "only one" / "x.png")
    monkeypatch.chdir(tmp_path)
    row = train_teacher.RECIPES["cpu"]["folder"] | dict(epochs=1, drw_epoch=1)
    monkeypatch.setitem(train_teacher.RECIPES["cpu"], "folder", row)
    data = ["--dataset", "folder", "--data-dir", root, "--holdout", "0.2"]
    script(train_student, monkeypatch, *data, "--out", "run", *SHORT)
    out = capsys.readouterr().out
    assert "Without a test image, so without an accuracy: only one" in out
    assert "Picture: run/summary.png" in out
    teacher, = (tmp_path / "runs").iterdir()
    state = load_checkpoint(str(teacher))
    assert state["config"]["img_size"] == 32 and state["class_names"][-1] == "only one"
    for file in ("result.json", "log.jsonl"):
        assert "NaN" not in (tmp_path / "run" / file).read_text()
    script(analyze, monkeypatch, "eval", "run")
    script(analyze, monkeypatch, "predict", "--checkpoint", "run", root / "Bär", "--csv", "p.csv")
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 12

    picture(40, 44, seed=999).save(root / "Bär" / "new.png")
    # The student, and the teacher that another student would ask.
    for out_folder in (["run", "--resume"], ["another"]):
        with pytest.raises(SystemExit):
            script(train_student, monkeypatch, *data, "--out", *out_folder, *SHORT, "--epochs", "3",
                   "--force")
        assert "was trained on other images" in capsys.readouterr().err
    # A finished student says so too, not its old result; --overwrite cannot help its teacher.
    same = [*data, *SHORT]
    for more, advice in (([], "--overwrite starts it again"),
                         (["--overwrite"], "remove that folder to train this teacher again")):
        with pytest.raises(SystemExit):
            script(train_student, monkeypatch, *same, "--out", "run", *more)
        assert advice in capsys.readouterr().err
    script(analyze, monkeypatch, "eval", "run")
    assert "have changed" in capsys.readouterr().err


def test_a_network_keeps_the_white_level_of_its_images(tmp_path, monkeypatch, capsys):
    """New 12-bit pictures 16 times darker than those of training; a run that goes on with others.
    A checkpoint of before there was a rule has 16 bits."""
    without_picture(monkeypatch)
    root, run = tmp_path / "in", tmp_path / "run"
    eight, deep = deepen(make_folder(root, size=(32, 32)))
    train = ["--dataset", "folder", "--data-dir", root, "--method", "vit", "--out", run, *SHORT]
    script(train_student, monkeypatch, *train, "--epochs", "1")
    assert capsys.readouterr().out.count("0 to 4095 becomes 0 to 255") == 1
    state = load_checkpoint(str(run))
    assert state["white"] == 4095

    def predictions(paths):
        script(analyze, monkeypatch, "predict", "--checkpoint", run, *paths, "--csv",
               tmp_path / "p.csv")
        rows = csv.DictReader((tmp_path / "p.csv").open())
        return [list(row.values())[1:] for row in rows]
    assert predictions(deep) == predictions(eight)
    script(analyze, monkeypatch, "eval", run)

    def save(state):
        for name in ("last.pt", "previous.pt"):
            torch.save(state, run / name)
    del state["white"]
    save(state)
    assert predictions(deep) != predictions(eight)
    script(analyze, monkeypatch, "eval", run)
    assert "0 to 65535 becomes 0 to 255" in capsys.readouterr().out
    save(state | {"white": 65535})
    with pytest.raises(SystemExit):
        script(train_student, monkeypatch, *train, "--epochs", "2", "--resume", "--force")
    assert "another white level" in capsys.readouterr().err


def test_a_bad_folder_ends_before_anything_is_written(tmp_path, monkeypatch, capsys):
    damage(make_folder(tmp_path / "in"))
    with pytest.raises(SystemExit) as stopped:
        script(train_student, monkeypatch, "--dataset", "folder", "--data-dir", tmp_path / "in",
               "--out", tmp_path / "run", *SHORT)
    assert stopped.value.code == 2 and "9 problems" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_from_a_table_to_predictions(tmp_path, monkeypatch, capsys):
    """Columns that the teacher or an analysis does not know; patients on both sides after a run is
    loaded again; the numbers of classes in place of their names."""
    without_picture(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    rows = ["patient;file;diagnosis"]
    for k, name in enumerate(("nevus", "Bär, brown")):
        for i in range(24 - 8 * k):
            picture(40, 44, seed=100 * k + i).save(tmp_path / "photos" / f"{k}_{i}.png")
            rows.append(f'p{k}{i // 2};photos/{k}_{i}.png;"{name}"')
    (tmp_path / "my skin.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    row = train_teacher.RECIPES["cpu"]["folder"] | dict(epochs=1, drw_epoch=1)
    monkeypatch.setitem(train_teacher.RECIPES["cpu"], "folder", row)
    data = ["--dataset", "folder", "--data-dir", ".", "--train-list", "my skin.csv",
            "--list-columns", "image=file,label=diagnosis,group=patient",
            "--holdout", "0.25", "--holdout-by", "group"]
    script(train_student, monkeypatch, *data, "--out", "run", *SHORT)
    out = capsys.readouterr().out
    assert ("40 images in 20 groups, of which 5 are held out: 25 to 25 % of each tested class."
            in out)
    assert "my skin (imb 1.5, 30 images, 2 classes of 18 to 12), the largest 'nevus'" in out
    teacher, = (tmp_path / "runs").iterdir()
    assert teacher.name.startswith("teacher_my-skin_groups_cpu")
    for run in (tmp_path / "run", teacher):
        state = load_checkpoint(str(run))
        assert state["class_names"] == ["nevus", "Bär, brown"]
        assert state["config"]["holdout_by"] == "group"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["dataset"] == "my skin"
    last_loaded.clear()                                     # as in a process of its own
    script(analyze, monkeypatch, "eval", "run")
    told = capsys.readouterr()
    assert "20 groups" in told.out and "have changed" not in told.err
    script(analyze, monkeypatch, "predict", "--checkpoint", "run", "photos", "--csv", "p.csv")
    assert "nevus" in (tmp_path / "p.csv").read_text()
    with pytest.raises(SystemExit) as stopped:
        script(train_student, monkeypatch, *data[:-1], "patient id", "--out", "no", *SHORT)
    assert stopped.value.code == 2 and not (tmp_path / "no").exists()
    assert "the columns of the list are patient, file, diagnosis" in capsys.readouterr().err


def test_training_from_list_files(tmp_path, monkeypatch, capsys):
    """Teacher and student of the large sets, made small; a run that dies in an epoch continues
    with the same crops."""
    without_picture(monkeypatch)
    monkeypatch.setitem(data_lt.LISTS, "imagenet_lt", ("ImageNet-LT", 5))
    make_lists(tmp_path)
    data = ["--dataset", "imagenet_lt", "--data-dir", tmp_path, "--recipe", "paper",
            *"--epochs 2 --drw-epoch 1 --batch 8 --amp none".split()]
    script(train_teacher, monkeypatch, *data, "--arch", "resnet32", "--img-size", "16", "--out",
           tmp_path / "teacher")
    student = [*data, "--teacher", tmp_path / "teacher",
               *"--img-size 32 --model micro --patch-size 8 --micro-batch 4 --eval-every 2".split(),
               *"--repeats 1 --save-every 1".split()]
    script(train_student, monkeypatch, *student, "--out", tmp_path / "whole")
    assert "by training images" in capsys.readouterr().out
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert set(result["by_count"]["avg"]) >= {"head", "mid", "tail"}
    assert result["dataset"] == "ImageNet-LT not as published"

    def die_in_epoch_1(seed, epoch, step, rank, seed_step=runtime.seed_step):
        if (epoch, step) == (1, 1):
            raise ZeroDivisionError
        seed_step(seed, epoch, step, rank)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "seed_step", die_in_epoch_1)
        with pytest.raises(ZeroDivisionError):
            script(train_student, patch, *student, "--out", tmp_path / "run")
    script(train_student, monkeypatch, *student, "--out", tmp_path / "run", "--resume")
    whole, run = (load_checkpoint(str(tmp_path / name)) for name in ("whole", "run"))
    torch.testing.assert_close(whole["model"], run["model"], rtol=0, atol=0)
