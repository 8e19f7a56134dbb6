"""A table of runs from end to end, on the built-in shapes: what is trained, and what is shown."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train_student
import train_teacher
from conftest import script
from engine.records import read_log
from experiments import ablate, crt, deit3, fast_parts
from experiments.ablate import Row
from finished_runs import Ended
from images import shapes
from resnet import FastNet

pytestmark = pytest.mark.usefixtures("no_pictures")
FLAGS = ("--dataset shapes --imb 10 --recipe cpu --epochs 2 --drw-epoch 1 --batch 32 "
         "--eval-every 2").split()
MODULES = {ablate.STUDENT: train_student, ablate.TEACHER: train_teacher, ablate.CRT: crt,
           ablate.DEIT3: deit3}


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch, tmp_path):
    """20 to 2 training images a class, 2 to test on; runs/ in a folder of the test's own."""
    monkeypatch.setattr(shapes, "SHAPES_MAX", 20)
    monkeypatch.setattr(shapes, "SHAPES_TEST", 2)
    monkeypatch.chdir(tmp_path)


def result_of(name):
    """The one finished run whose folder's name begins like this."""
    path, = Path("runs").glob(f"{name}_shapes*/result.json")
    return json.loads(path.read_text())


def test_a_table_of_real_runs(monkeypatch, capsys):
    """A folder that a run names otherwise: its number is missing, and it is trained again."""
    ran = []

    def run_here(command, args, jobs):
        ran.append(command)
        program, flags = ablate.split(command)
        script(MODULES[program], monkeypatch, *flags, "--resume")
        return Ended()

    def modes(teacher):
        return [Row("cRT", ablate.CRT),
                Row("ViT", "train_student.py --method vit"),
                Row("DeiT-III", ablate.DEIT3),
                Row("DIST", f"train_student.py --method deit --teacher {teacher}", "dist")]
    monkeypatch.setattr(ablate, "begin", run_here)
    monkeypatch.setattr(ablate, "modes", modes)
    monkeypatch.setattr(ablate, "MODES_TEACHER",
                        f"{ablate.TEACHER} --loss ce --rho 0 --epochs 1 --img-size 16")
    script(ablate, monkeypatch, "modes", *FLAGS)
    table = capsys.readouterr().out.splitlines()[-4:]

    # cRT trains the plain ViT of the next row on its way: that one is finished when it comes up.
    assert [ablate.split(command)[0] for command in ran] == [
        ablate.TEACHER, ablate.CRT, ablate.DEIT3, ablate.STUDENT]
    shown = [(result_of(name)[head]["overall"], result_of(name)["method"]) for name, head in
             (("vit-crt", "avg"), ("vit", "avg"), ("deit-iii", "avg"), ("deit", "dist"))]
    assert [method for _, method in shown] == ["vit-crt", "vit", "deit-iii", "deit"]
    for line, (overall, _) in zip(table, shown):
        assert line.split(" | ")[1] == f"{overall:.1f}" and line.split(" | ")[-2] == "1"

    script(ablate, monkeypatch, "modes", *FLAGS)
    assert len(ran) == 4 and capsys.readouterr().out.splitlines()[-4:] == table


def test_fastnet_without_each_of_its_parts(monkeypatch, capsys):
    """Rows of one network, or of each other's; a part that is left out of no training."""
    flags = ("--dataset shapes --imb 10 --epochs 1 --warmup-epochs 0 --batch 32 --eval-every 1 "
             "--mixing 1").split()
    script(fast_parts, monkeypatch, *flags)
    _, *lines = capsys.readouterr().out.splitlines()[-len(fast_parts.PARTS) - 1:]
    losses = set()
    for part, line in zip(fast_parts.PARTS, lines, strict=True):
        name = part.replace(" ", "_")
        folder, = Path("runs").glob(f"fast_shapes*_without_{name}")
        result = json.loads((folder / "result.json").read_text())["avg"]
        assert line.split() == [*part.split(), *(f"{result[group]:.1f}" for group in
                                                 ("overall", "head", "mid", "tail"))]
        losses |= {read_log(str(folder))[0]["loss"]}
    assert len(losses) == len(fast_parts.PARTS)
    script(fast_parts, monkeypatch, *flags)                     # all are finished
    assert capsys.readouterr().out.splitlines()[-len(lines):] == lines


def test_what_is_left_out_of_fastnet():
    """Random filters that are Dirac's after all, or features that are still halved."""
    x = torch.rand(20, 3, 32, 32)
    for part, (leave_out, settings) in fast_parts.PARTS.items():
        torch.manual_seed(0)
        net = FastNet(10)
        net.whiten(x)
        stem, features = net.stem.weight.clone(), net.eval().forward_features(x)
        leave_out(net)
        trained = net.stem.weight.requires_grad
        assert trained == (not torch.equal(net.stem.weight, stem)) == (part == "whitened stem")
        first = net.blocks[1].conv2.weight[5]
        dirac = torch.equal(first, F.pad(torch.ones(1, 1, 1), (1, 1, 1, 1, 5, 122)))
        assert dirac == (part != "Dirac filters")
        assert settings == {"mixing": {"mixing": 0.0},
                            "logit adjustment": {"loss": "ce"}}.get(part, {})
        if part == "halved features":
            torch.testing.assert_close(net.forward_features(x), 2 * features)
        elif part not in ("whitened stem", "Dirac filters"):
            torch.testing.assert_close(net.forward_features(x), features)
