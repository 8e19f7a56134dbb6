"""Runs of the code before its settings had today's names: used and evaluated, but not resumed.

Their settings one by one: tests/test_checkpoints.py.
"""
import shutil

import pytest
import torch

import analyze
import train_student
import train_teacher
from conftest import script
from engine import runtime
from engine.records import save_json
from engine.datasets import load_data
from engine.networks import load_network, load_teacher
from tiny_runs import STUDENT, checkpoint, read, records, train

pytest_plugins = ["tiny_runs"]
# Today's settings -> those of that time, {name: (older name, {value: older value})}.
OLDER = {"logit_adjustment": ("adjust", {False: "none", True: "both"}),
         "rand_ops": ("policy", {2: "rand", 0: "none"}), "teacher_view": ("teacher_sees", {}),
         "stem": ("stem", {"conv": "conv2"})}
GONE = dict(name="a_long_name", tensorboard=False, wandb=False)
GONE_STUDENT = dict(trained="all", sampling="shuffled", cls_loss="ce")


def older_config(config):
    """The settings as the older code would have written them."""
    older = dict(GONE)
    if "method" in config:
        older |= GONE_STUDENT
    for name, value in config.items():
        name, values = OLDER.get(name, (name, {}))
        older[name] = values.get(value, value) if isinstance(value, (str, int)) else value
    del older["format"]
    return older


def older_run(folder, to, **changes):
    """A copy of a run as the older code would have left it. changes: to its settings."""
    shutil.copytree(folder, to)
    save_json(str(to / "config.json"), older_config(read(folder, "config.json")) | changes)
    state = checkpoint(folder)
    state["config"] = older_config(state["config"]) | changes
    state["guard"] = state.pop("scaler")
    if "teacher_prior" in state:
        state["said"] = state.pop("teacher_prior")
    torch.save(state, to / "last.pt")
    return to


@pytest.fixture(scope="module")
def conv_student(teacher_run, tiny_cifar, tmp_path_factory):
    """(flags, run folder) of a student with settings whose names have changed."""
    folder = tmp_path_factory.mktemp("conv") / "student"
    flags = [*STUDENT, "--stem", "conv", "--logit-adjustment", "--beta", "0", "--rand-ops", "0",
             "--epochs", "1", "--data-dir", str(tiny_cifar), "--teacher", str(teacher_run)]
    train(train_student, *flags, "--out", folder)
    return flags, folder


def test_a_finished_older_student_is_evaluated(conv_student, tmp_path, monkeypatch, capsys):
    """Another network, other images or another test crop than those it was trained with."""
    _, folder = conv_student
    older = older_run(folder, tmp_path / "older")
    assert load_network(str(older)).net.state_dict().keys() == checkpoint(folder)["model"].keys()
    script(analyze, monkeypatch, "eval", older)
    expected = read(folder, "result.json")["avg"]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("avg"))
    assert [float(x) for x in line.split()[1:]] == [round(x, 1) for x in expected.values()]


def test_a_finished_older_run_says_so(conv_student, tmp_path, capsys):
    """A finished run that is trained again, or refused, when its command is repeated."""
    flags, folder = conv_student
    older = older_run(folder, tmp_path / "older")
    before = {file.name: file.read_bytes() for file in older.iterdir()}
    train(train_student, *flags, "--out", older, "--resume")
    assert "is finished (1 epochs)" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in older.iterdir()} == before


def test_an_older_teacher_teaches(shared_run, tmp_path, monkeypatch, capsys):
    """A teacher that is found under its run's name, and trained again or refused."""
    _, _, folder = shared_run("teacher")
    _, flags, _ = shared_run("student")
    flags[flags.index("--teacher") + 1] = "auto"
    monkeypatch.chdir(tmp_path)
    tiny = dict(epochs=2, warmup_epochs=0, img_size=8, batch=30, drw_epoch=1)
    monkeypatch.setitem(train_teacher.RECIPES["cpu"], "cifar10", train_teacher.CPU | tiny)
    older = older_run(folder, tmp_path / "runs" / "teacher_cifar10_imb12_cpu_s0")
    train(train_student, *flags, "--epochs", "1", "--out", "student")
    assert "Teacher (cpu recipe)" not in capsys.readouterr().out
    assert read("student", "result.json")["teacher"] == str(older.relative_to(tmp_path))
    assert 0 < records("student")[0]["loss_dist"] < 10

    args, rt = train_student.parse(flags), runtime.setup("cpu", "none")
    args.img_size = 16
    nets = [load_teacher(str(path), load_data(args, rt), rt)[0] for path in (folder, older)]
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(nets[0](x), nets[1](x))


def test_an_older_run_is_not_resumed(conv_student, shared_run, tmp_path, refused):
    """Half a run of each code; or a run that begins again, over what there is."""
    flags, folder = conv_student
    older = older_run(folder, tmp_path / "student")
    longer = [*flags, "--out", older, "--resume", "--epochs", "2"]
    assert "begun by an older version" in refused(train_student, *longer)
    assert "begun by an older version" in refused(train_student, *longer, "--force")
    module, flags, folder = shared_run("teacher")
    older = older_run(folder, tmp_path / "teacher")
    (older / "result.json").unlink()
    before = (older / "last.pt").read_bytes()
    assert "--overwrite" in refused(module, *flags, "--out", older, "--resume")
    assert (older / "last.pt").read_bytes() == before
