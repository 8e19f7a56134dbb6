"""Teachers of every loss, of torchvision's networks and from files, and students by them."""
import shutil

import pytest
import torch
from torchvision import models

import analyze
import train_student
import train_teacher
from conftest import script
from engine.evaluation import COLUMNS
from tiny_runs import (PACO, STUDENT, TEACHER, WITHOUT_SAM, checkpoint, killed_at, read, records,
                       train)

pytest_plugins = ["tiny_runs"]


@pytest.mark.parametrize("loss", ["ce", "focal", "la", "vs"])
def test_every_loss_trains_a_teacher(loss, tiny_cifar, tmp_path):
    """A loss that fails with class weights or without (before and after the DRW epoch), or that
    gets LDAM's cosine classifier."""
    train(train_teacher, *TEACHER, *WITHOUT_SAM, "--data-dir", tiny_cifar, "--loss", loss, "--beta",
          0.9999, "--out", tmp_path / "run")
    assert all(0 < r["loss"] < 20 for r in records(tmp_path / "run"))
    assert [r["drw"] for r in records(tmp_path / "run")] == [False, True]
    assert "linear.bias" in checkpoint(tmp_path / "run")["model"]
    assert read(tmp_path / "run", "result.json")["method"] == loss


def test_paco_trains_a_teacher_that_a_student_can_use(paco_run, tiny_cifar, tmp_path, capsys):
    """A queue that does not move; a checkpoint that only PaCo's own code could read."""
    state = checkpoint(paco_run)
    assert state["paco"]["queue_labels"].min() >= 0         # 50 places, 2 epochs of 89 images
    result = read(paco_run, "result.json")
    assert result["method"] == "paco" and set(result["training_images"]) == {"clean", "mixed"}
    for measured in result["training_images"].values():
        assert 0 <= measured["accuracy"] <= 100 and 0 <= measured["entropy"] <= 2.3027
    train(train_student, *STUDENT, "--epochs", 1, "--data-dir", tiny_cifar, "--teacher", paco_run,
          "--out", tmp_path / "student")
    out = capsys.readouterr().out
    assert "teacher resnet32, paco, 10 classes, 8 px, cifar normalisation" in out


def test_batchnorm_needs_two_images(tiny_cifar, tmp_path, refused):
    """A traceback of BatchNorm's in the last step of the first epoch."""
    flags = [*TEACHER, "--data-dir", tiny_cifar, "--batch", 1, "--out", tmp_path / "run"]
    assert "two images" in refused(train_teacher, *flags)
    assert not (tmp_path / "run").exists()


def test_the_command_for_a_student_has_the_recipe_of_its_teacher(shared_run, capsys):
    """A student of the cpu recipe, or on a GPU the paper's, under a teacher made for ours."""
    module, flags, finished = shared_run("teacher")
    train(module, *flags, "--out", finished, "--resume")
    assert f" --recipe=cpu --teacher {finished}\n" in capsys.readouterr().out


# ---- Networks of torchvision, files from elsewhere -----------------------------------------------

@pytest.mark.parametrize("loss", ["ldam", "paco"])
def test_a_network_of_torchvision_is_trained_and_read_back(loss, tiny_cifar, tmp_path,
                                                           monkeypatch, capsys):
    """Another size, classifier or normalisation when its run folder is read than when trained."""
    flags = PACO if loss == "paco" else TEACHER
    flags = [*flags, *WITHOUT_SAM,
             *"--arch mobilenet_v3_small --img-size 40 --epochs 1 --batch 45".split()]
    train(train_teacher, *flags, "--data-dir", tiny_cifar, "--out", tmp_path / "run")
    capsys.readouterr()
    script(analyze, monkeypatch, "eval", "--checkpoint", tmp_path / "run")
    printed = capsys.readouterr().out
    assert f"teacher mobilenet_v3_small, {loss}, 10 classes, 40 px" in printed
    result = read(tmp_path / "run", "result.json")["avg"]
    line = next(line for line in printed.splitlines() if line.startswith("avg"))
    assert [float(x) for x in line.split()[1:]] == [round(result[c], 1) for c in COLUMNS]


@pytest.mark.parametrize("arch, words", [
    ("resnet33", "no network 'resnet33'"), ("alexnet", "alexnet cannot take 8 px"),
    ("squeezenet1_1", "does not end in one linear layer")])
def test_networks_that_cannot_be_teachers(arch, words, tiny_cifar, tmp_path, refused):
    """A traceback of torchvision's, before or after the run folder is there."""
    flags = [*TEACHER, "--data-dir", tiny_cifar, "--arch", arch, "--out", tmp_path / "run"]
    assert words in refused(train_teacher, *flags)
    assert not (tmp_path / "run").exists()


def test_a_file_from_elsewhere_is_a_teacher(tiny_cifar, tmp_path, monkeypatch, capsys):
    """"My data, my teacher": torchvision's own state dict, at the data's size and with another
    normalisation; a run whose name does not say so."""
    torch.manual_seed(0)
    torch.save(models.mobilenet_v3_small(num_classes=10).state_dict(), tmp_path / "mine.pth")
    monkeypatch.chdir(tmp_path)
    flags = ["--teacher", "mine.pth", "--teacher-size", 32, "--teacher-norm", "none"]
    train(train_student, *STUDENT, "--epochs", 1, "--data-dir", tiny_cifar, *flags)
    out = capsys.readouterr().out
    assert "torchvision's mobilenet_v3_small, 10 classes, 32 px, none normalisation" in out
    run, = tmp_path.glob("runs/*")
    config = checkpoint(run)["config"]
    assert (config["teacher_size"], config["teacher_norm"]) == (32, "none")
    monkeypatch.chdir(run.parent.parent)
    train(train_student, *STUDENT, "--epochs", 1, "--data-dir", tiny_cifar, *flags[:4])
    assert len(list(tmp_path.glob("runs/*"))) == 2


# ---- Which network a teacher is ------------------------------------------------------------------

@pytest.fixture
def teacher(teacher_run, tmp_path):
    """A copy of teacher_run that a test may change: (folder, change(**what) of its checkpoint)."""
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_run, folder)

    def change(**what):
        torch.save(checkpoint(folder) | what, folder / "last.pt")
    return folder, change


def test_the_teachers_identity_is_in_the_run(student_run, teacher_run):
    """A path, under which another network may lie tomorrow."""
    known, = read(student_run, "config.json")["teachers"]
    state = checkpoint(student_run)
    assert known["file"] == str(teacher_run) and known["unfinished"] == ""
    assert len(known["weights"]) == 16 and known["data"] == state["data"]
    assert state["teachers"] == known["weights"]
    assert read(student_run, "result.json")["teachers"] == [known]


def test_a_run_does_not_go_on_by_another_teacher(teacher, tiny_cifar, tmp_path, refused, capsys):
    """A teacher that was replaced between interruption and --resume: half of the student is its
    own, half another's, and nobody knows."""
    folder, change = teacher
    flags = [*STUDENT, "--data-dir", tiny_cifar, "--teacher", folder, "--out", tmp_path / "run",
             "--save-every", "1"]
    with killed_at(1, 0):
        train(train_student, *flags)
    weights = checkpoint(folder)["model"]
    change(model=weights | {"linear.weight": weights["linear.weight"] + 0.1})
    before = (tmp_path / "run" / "config.json").read_bytes()
    error = refused(train_student, *flags, "--resume")
    assert "the teacher's weights" in error and "--force" in error
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    capsys.readouterr()
    train(train_student, *flags, "--resume", "--force")
    assert "--force: going on after epoch 0: the teacher's weights" in capsys.readouterr().out
    assert "the teacher's weights" in read(tmp_path / "run", "result.json")["forced"][0]


def test_a_teacher_is_the_same_under_another_path(teacher, tiny_cifar, tmp_path):
    """The run refused because the teacher was moved, or is named through a link."""
    folder, _ = teacher
    flags = [*STUDENT, "--data-dir", tiny_cifar, "--out", tmp_path / "run", "--save-every", "1"]
    with killed_at(1, 0):
        train(train_student, *flags, "--teacher", folder)
    folder.rename(tmp_path / "moved")
    train(train_student, *flags, "--teacher", tmp_path / "moved", "--resume")
    assert (tmp_path / "run" / "result.json").exists()


def test_a_teachers_checkpoint_is_no_students(teacher, tiny_cifar, tmp_path, refused):
    """A list of thirty settings that have changed."""
    folder, _ = teacher
    (folder / "result.json").unlink()
    flags = [*STUDENT, "--data-dir", tiny_cifar, "--teacher", "none.pt", "--out", folder]
    assert "is a teacher's, not a student's" in refused(train_student, *flags, "--resume")


@pytest.mark.parametrize("what", ["epoch", "no result", "damaged", "one of two", "file"])
def test_an_unfinished_teacher_is_refused(what, teacher, teacher_run, tiny_cifar, tmp_path,
                                          monkeypatch, capsys):
    """Half a training distilled as if it were whole; an earlier state because the last one is
    damaged."""
    folder, change = teacher
    path = folder
    if what == "no result":
        (folder / "result.json").unlink()
    elif what == "damaged":
        change(epoch=1)
        (folder / "last.pt").rename(folder / "previous.pt")
        (folder / "last.pt").write_bytes(b"PK damaged")
    else:
        change(epoch=1)
    if what == "one of two":
        path = f"{teacher_run},{folder}"
    elif what == "file":
        path = folder / "last.pt"
    flags = [*STUDENT, "--data-dir", tiny_cifar, "--teacher", path, "--out", tmp_path / "run"]
    with pytest.raises(SystemExit):
        script(train_student, monkeypatch, *flags)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: the teacher {folder}") and "is not finished" in error
    assert ("epoch 1 of 2" in error) == (what != "no result")
    assert ("damaged" in error) == (what == "damaged")
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_images_is_warned_of(teacher, tiny_cifar, tmp_path, capsys):
    """A student tested on what its teacher was trained on: another holdout, another imbalance."""
    folder, change = teacher
    change(data="of another split")
    flags = [*STUDENT, "--data-dir", tiny_cifar, "--epochs", 1, "--out", tmp_path / "run"]
    train(train_student, *flags, "--teacher", folder)
    out, err = capsys.readouterr()
    warnings = [line for line in err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and str(folder) in warnings[0] and "test images" in warnings[0]
    assert "% of 89 clean training images right" in out
    assert read(tmp_path / "run", "result.json")["teachers"][0]["data"] == "of another split"


def test_a_teacher_of_weights_that_are_not_finite_is_refused(teacher, tiny_cifar, tmp_path,
                                                             refused):
    """A student that learns class 0, whatever it is shown."""
    folder, change = teacher
    weights = checkpoint(folder)["model"]
    weights["layer1.0.bn1.running_var"][0] = float("nan")
    change(model=weights)
    flags = [*STUDENT, "--data-dir", tiny_cifar, "--teacher", folder, "--out", tmp_path / "run"]
    assert "layer1.0.bn1.running_var" in refused(train_student, *flags)
    assert not (tmp_path / "run").exists()
