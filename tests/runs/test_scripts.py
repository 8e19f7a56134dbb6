"""The training scripts from flags to a finished run: what is written, used, found and drawn."""
import re

import pytest
import torch

import analyze
import data_lt
import train_student
import train_teacher
from conftest import script
from engine import evaluation
from engine.runtime import setup
from tiny_runs import DATA, PLAIN, STUDENT, checkpoint, read, records, train
from vit import VisionTransformer, resize_pos_embed

pytest_plugins = ["tiny_runs"]


# ---- What a run leaves ---------------------------------------------------------------------------

def test_a_run_folder_holds_what_the_contract_says(student_run):
    """A column, a head or a setting that is missing; groups that do not add up."""
    files = {file.name for file in student_run.iterdir()} - {"calibration.json"}    # eval's
    assert files == {"last.pt", "log.jsonl", "config.json", "result.json"}
    result = read(student_run, "result.json")
    assert result.keys() == {
        "dataset", "imb", "recipe", "epochs", "seed", "command", "hardware", "seconds", "date",
        "method", "model", "teacher", "teachers", "teacher_avg", "cls", "dist", "avg", "ema",
        "avg+teacher", "per_class"}
    for head in ("cls", "dist", "avg", "ema"):
        r = result[head]
        assert r.keys() == {"overall", "head", "mid", "tail"}
        mean = (3 * r["head"] + 4 * r["mid"] + 3 * r["tail"]) / 10      # 6 test images a class
        assert mean == pytest.approx(r["overall"], abs=0.01)
        assert sum(result["per_class"][head]) / 10 == pytest.approx(r["overall"], abs=0.01)
    assert result["command"].startswith("python train_student.py --dataset cifar10")

    log = records(student_run)
    assert [r["epoch"] for r in log] == [0, 1] and [r["drw"] for r in log] == [False, True]
    assert -1 <= log[-1]["cosine"] <= 1 and log[-1]["skipped"] == 0
    assert log[-1]["avg"]["overall"] == result["avg"]["overall"]        # the last, not the best
    for r in log:
        half = 0.5 * r["loss_cls"] + 0.5 * r["loss_dist"]
        assert r["loss"] == pytest.approx(half, rel=1e-4)
    config = read(student_run, "config.json")
    assert config["counts"] == data_lt.long_tailed_counts(24, 10, 12)
    assert (config["lr"], config["img_size"], config["format"]) == (5e-4, 16, 2)


def test_a_checkpoint_holds_what_the_contract_says(student_run, teacher_run, paco_run):
    """A part that a resumed run would miss; PaCo's projection among the network's weights."""
    about = {"model", "optimizer", "scaler", "config", "data", "class_names", "counts", "groups",
             "epoch", "step", "sums", "seconds", "world", "teachers", "forced", "white", "amp",
             "hardware"}
    student, teacher = checkpoint(student_run), checkpoint(teacher_run)
    assert student.keys() == about | {"ema", "teacher_prior"}
    assert teacher.keys() == about | {"paco"} and teacher["paco"] is None
    assert checkpoint(paco_run)["model"].keys() ^ teacher["model"].keys() == {"linear.bias"}
    assert (student["epoch"], student["step"]) == (2, 0)
    assert student["class_names"] == [f"class{k}" for k in range(10)]


def test_a_students_picture_is_drawn_at_its_end(tiny_cifar, tmp_path, monkeypatch, capsys):
    """A finished run without its picture, or one that fails because of it."""
    flags = [*PLAIN, "--data-dir", tiny_cifar, "--epochs", 1, "--out"]
    script(train_student, monkeypatch, *flags, tmp_path / "run")
    assert (tmp_path / "run" / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert f"Picture: {tmp_path / 'run' / 'summary.png'}" in capsys.readouterr().out

    def summary(folder):
        raise RuntimeError("no such font")
    monkeypatch.setattr(analyze, "summary", summary)
    train_student.draw_summary("a/run")
    assert capsys.readouterr().out == (
        "No picture (no such font): python analyze.py summary a/run\n")


@pytest.mark.parametrize("tail", [0.0, float("nan")])
def test_the_last_line_claims_no_difference_that_is_not_there(tail):
    """"DIST is better on the tail (0.0 against 0.0 %)"; the same of groups without test images."""
    results = {"cls": {"head": 60.0, "tail": tail}, "dist": {"head": 40.0, "tail": tail}}
    text = evaluation.heads_compared(results)
    assert "CLS is better on the head (60.0 against 40.0 %)" in text
    assert "better on the tail" not in text and "nan" not in text


# ---- What a run does -----------------------------------------------------------------------------

def test_the_papers_recipe_starts_at_chance(teacher_run, tiny_cifar, tmp_path, monkeypatch):
    """Resized crops, repeats, averaged weights, accumulation, the crop for tests. ln 10 = 2.303 for
    either head, as long as nothing is learned: a wrong scale or sum. DIST's classifier is zero: a
    teacher near chance may name one class only, and its untrained logit would be the loss's."""
    build = train_student.build_student

    def without_dist_logits(*args):
        net = build(*args)
        torch.nn.init.zeros_(net.head_dist.weight)
        return net

    monkeypatch.setattr(train_student, "build_student", without_dist_logits)
    flags = [*DATA, *("--model micro --img-size 32 --batch 60 --micro-batch 30 --epochs 1 --lr 0 "
                      "--warmup-epochs 0 --drw-epoch 1").split()]
    flags[flags.index("cpu")] = "paper"
    train(train_student, *flags, "--data-dir", tiny_cifar, "--teacher", teacher_run, "--out",
          tmp_path / "run")
    log, = records(tmp_path / "run")
    assert log["loss_cls"] == pytest.approx(2.3026, abs=0.15)
    assert log["loss_dist"] == pytest.approx(2.3026, abs=1e-3)
    config = checkpoint(tmp_path / "run")["config"]
    assert (config["repeats"], config["crop"], config["eval_crop"]) == (3, "resized", 0.875)
    assert "ema" in read(tmp_path / "run", "result.json")


class Compiled(torch.nn.Module):
    """In place of torch.compile, whose import alone takes seconds."""
    calls = 0

    def __init__(self, module, mode=None, dynamic=None):
        super().__init__()
        self._orig_mod = module

    def forward(self, x):
        Compiled.calls += x.ndim == 4               # images, not the trial of check_compiler
        return self._orig_mod(x)


def test_compiling_and_checkpointing_are_the_same_run(shared_run, tmp_path, monkeypatch):
    """A compiled network whose weights the optimizer, the average or the checkpoint do not share,
    or that is not the one that is trained."""
    module, flags, undisturbed = shared_run("student")
    monkeypatch.setattr(torch, "compile", Compiled)
    train(module, *flags, "--compile", "--checkpointing", "--out", tmp_path / "run")
    assert Compiled.calls == 2 * 3 * 2                      # epochs, steps, micro-batches
    one, other = checkpoint(tmp_path / "run"), checkpoint(undisturbed)
    for part in ("model", "ema"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)


def test_a_small_set_can_be_learned_by_heart(learned_by_heart):
    """Without augmentation the plain ViT must fit 240 easy images: a broken gradient or step."""
    assert records(learned_by_heart)[-1]["loss"] < 0.3
    assert read(learned_by_heart, "result.json")["avg"]["overall"] > 90


# ---- Its teacher ---------------------------------------------------------------------------------

@pytest.fixture
def tiny_teachers(tmp_path, monkeypatch):
    """Teachers of the cpu recipe are trained in an instant; runs/ is in a folder of the test's."""
    monkeypatch.chdir(tmp_path)
    row = train_teacher.CPU | dict(epochs=1, warmup_epochs=0, img_size=8, batch=45)
    monkeypatch.setitem(train_teacher.RECIPES["cpu"], "cifar10", row)
    return row


def test_a_missing_teacher_is_trained_first(tiny_cifar, tmp_path, tiny_teachers, monkeypatch,
                                            capsys, refused):
    """A teacher of other data or seed, one that is trained twice, or one of another recipe."""
    flags = [*STUDENT, "--epochs", "1", "--seed", "3", "--data-dir", tiny_cifar]
    train(train_student, *flags)
    out = capsys.readouterr().out
    assert "Teacher (cpu recipe): resnet32" in out
    command, = re.findall("First its teacher: python train_teacher.py (.*)", out)
    assert {"--imb=12.0", "--seed=3"} < set(command.split())
    teacher = read("runs/teacher_cifar10_imb12_cpu_s3", "config.json")
    assert (teacher["imb"], teacher["seed"], teacher["device"]) == (12, 3, "cpu")
    student, = tmp_path.glob("runs/deit-lt_*")
    assert student.name.startswith("deit-lt_cifar10_imb12_cpu_") and student.name.endswith("_s3")
    assert read(student, "result.json")["teacher"] == "runs/teacher_cifar10_imb12_cpu_s3"
    train(train_student, *flags, "--resume")
    assert "Teacher (" not in capsys.readouterr().out
    train(train_student, *flags, "--out", "another")
    assert "Teacher (" not in capsys.readouterr().out
    monkeypatch.setitem(train_teacher.RECIPES["cpu"], "cifar10", tiny_teachers | dict(rho=0.2))
    assert "--rho 0.1 -> 0.2" in refused(train_student, *flags, "--overwrite")


# ---- Going on from another run -------------------------------------------------------------------

def test_finetuning_begins_with_the_other_runs_weights(student_run, shared_run, tmp_path):
    """Weights drawn anew, positions cut instead of resized. Next to nothing is learned here."""
    _, flags, _ = shared_run("student")
    flags = [*flags, "--finetune", student_run, "--img-size", "32", "--lr", "0", "--epochs", "1"]
    train(train_student, *flags, "--out", tmp_path / "larger")
    before, after = checkpoint(student_run)["model"], checkpoint(tmp_path / "larger")["model"]
    before["pos_embed"] = resize_pos_embed(before["pos_embed"], 2, 4)   # 2 x 2 -> 4 x 4 patches
    torch.testing.assert_close(before, after, rtol=0, atol=1e-4)
    config = checkpoint(tmp_path / "larger")["config"]
    assert (config["img_size"], config["epochs"]) == (32, 1)


def test_finetuning_puts_the_other_runs_classes_into_the_datas_order(student_run, shared_run,
                                                                     tmp_path):
    """A refusal, or classes under each other's names, after new images changed their order."""
    _, flags, _ = shared_run("student")
    other, state = tmp_path / "other", checkpoint(student_run)
    other.mkdir()
    (other / "result.json").write_bytes((student_run / "result.json").read_bytes())
    before = {name: tensor.clone() for name, tensor in state["model"].items()}
    last = [name for name in before if name.startswith("head")]
    assert {"head.weight", "head.bias"} <= set(last)
    state["class_names"] = state["class_names"][::-1]
    state["model"] |= {name: before[name].flip(0) for name in last}
    torch.save(state, other / "last.pt")
    flags = [*flags, "--finetune", other, "--lr", "0", "--epochs", "1", "--out", tmp_path / "run"]
    train(train_student, *flags)
    after = checkpoint(tmp_path / "run")
    assert after["class_names"] == state["class_names"][::-1]
    torch.testing.assert_close(before, after["model"], rtol=0, atol=1e-4)


def test_finetuning_has_a_name_of_its_own(student_run, monkeypatch):
    """Its result in the folder of a run that was trained from scratch."""
    args = [train_student.parse([*PLAIN, *more]) for more in ([], ["--finetune", str(student_run)])]
    for each in args:
        train_student.resolve(each, setup("cpu", "none"))
    assert args[0].out != args[1].out and args[1].finetune == str(student_run)


def test_finetuning_goes_on_when_the_other_run_is_gone(student_run, shared_run, tmp_path):
    """The other run's weights read again, over those of the run that is resumed."""
    _, flags, _ = shared_run("student")
    first = tmp_path / "first"
    first.mkdir()
    for name in ("last.pt", "result.json"):
        (first / name).write_bytes((student_run / name).read_bytes())
    flags = [*flags, "--finetune", first, "--epochs", "1", "--out", tmp_path / "run"]
    train(train_student, *flags)
    (tmp_path / "run" / "result.json").unlink()
    (first / "last.pt").unlink()
    train(train_student, *flags, "--resume")
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("what, words", [
    ("a teacher", "not a student's run"), ("nothing", "no checkpoint"),
    ("another model", "does not fit"), ("another number of tokens", "does not fit"),
    ("not finished", "epoch 1 of 2"), ("from elsewhere", "not a student's run"),
    ("not finite", "not finite")])
def test_runs_that_cannot_be_gone_on_from(what, words, student_run, teacher_run, tiny_cifar,
                                          tmp_path, refused):
    """A traceback of torch's, or a network that is only in part the other run's."""
    other = {"a teacher": teacher_run, "nothing": tmp_path / "none"}.get(what, student_run)
    if what in ("not finished", "from elsewhere", "not finite"):
        other, state = tmp_path / "other.pt", checkpoint(student_run)
        if what == "not finished":
            state["epoch"] = 1
        elif what == "not finite":
            state["model"]["norm.bias"][0] = float("nan")
        else:
            state = {"model": VisionTransformer(embed_dim=64, num_heads=1, depth=1).state_dict()}
        torch.save(state, other)
    flags = [*PLAIN, "--data-dir", tiny_cifar, "--finetune", other, "--out", tmp_path / "run"]
    if what == "another model":
        flags += ["--method", "deit-lt", "--model", "mini", "--teacher", teacher_run]
    error = refused(train_student, *flags)
    assert other.name in error and words in error
    assert not (tmp_path / "run").exists()
