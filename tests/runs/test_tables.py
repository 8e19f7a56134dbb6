"""A table of runs from end to end, on the built-in shapes: what is trained, and what is shown."""
import json
from pathlib import Path

import pytest

import train_student
import train_teacher
from conftest import script
from experiments import ablate, crt, deit3
from experiments.ablate import Row
from finished_runs import Ended
from images import shapes

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
