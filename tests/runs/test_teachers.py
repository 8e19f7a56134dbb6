"""Teachers of every loss, of torchvision's networks and from files, and students by them."""
import pytest
import torch
from torchvision import models

import analyze
import train_student
import train_teacher
from conftest import script
from engine.evaluation import COLUMNS
from tiny_runs import (PACO, STUDENT, TEACHER, WITHOUT_SAM, checkpoint, read, records, train)

pytest_plugins = ["tiny_runs"]


@pytest.mark.parametrize("loss", ["ce", "focal", "la", "vs"])
def test_every_loss_trains_a_teacher(loss, tiny_cifar, tmp_path):
    """A loss that fails with class weights or without (before and after the DRW epoch), or that
    gets LDAM's cosine classifier."""
    train(train_teacher, *TEACHER, *WITHOUT_SAM, "--data-dir", tiny_cifar, "--loss", loss, "--out",
          tmp_path / "run")
    assert all(0 < r["loss"] < 20 for r in records(tmp_path / "run"))
    assert [r["drw"] for r in records(tmp_path / "run")] == [False, True]
    assert "linear.bias" in checkpoint(tmp_path / "run")["model"]
    assert read(tmp_path / "run", "result.json")["method"] == loss


def test_paco_trains_a_teacher_that_a_student_can_use(paco_run, tiny_cifar, tmp_path, capsys):
    """A queue that does not move; a checkpoint that only PaCo's own code could read."""
    state = checkpoint(paco_run)
    assert state["paco"]["queue_labels"].min() >= 0         # 50 places, 2 epochs of 89 images
    result = read(paco_run, "result.json")
    assert result["method"] == "paco" and set(result["training_images"]) == {"clean", "strong"}
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


def test_both_passes_of_sam_drop_the_same_units(tiny_cifar, tmp_path):
    """At a radius of almost nothing SAM is SGD, unless its second gradient is of another draw of
    the network's dropout."""
    flags = [*TEACHER, *("--arch mobilenet_v3_small --img-size 32 --epochs 1 --batch 45 "
                        "--amp none").split(),
             "--data-dir", tiny_cifar]
    for rho in ("0", "1e-12"):
        train(train_teacher, *flags, "--rho", rho, "--out", tmp_path / rho)
    sgd, sam = (checkpoint(tmp_path / rho)["model"] for rho in ("0", "1e-12"))
    for name, w in sgd.items():
        torch.testing.assert_close(w.float(), sam[name].float(), rtol=1e-2, atol=1e-3)
