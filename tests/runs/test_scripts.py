"""The training scripts from end to end on a tiny folder of images: results, resume, several processes, mistakes, README."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import analyze
import data_lt
import engine
import networks
import run_folder
import train_student
import train_teacher
from conftest import ROOT, script

TEACHER = "--img-size 16 --epochs 2 --drw-epoch 1 --batch 32 --eval-every 1 --imb 4".split()
PACO = "--loss paco --img-size 16 --epochs 2 --batch 32 --eval-every 1 --imb 4 --queue 50".split()
STUDENT = ("--model micro --epochs 3 --drw-epoch 2 --batch 32 --micro-batch 16 --patch-size 8 --eval-every 1 --ema 0.9 "
           "--drop-path 0.1 --imb 4").split()


@pytest.fixture(scope="module")
def teacher(tiny_cifar, tmp_path_factory):
    """A teacher's run folder."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    with pytest.MonkeyPatch.context() as patch:
        script(train_teacher, patch, "--data-dir", tiny_cifar, "--out", folder, *TEACHER)
    return folder


@pytest.fixture(scope="module")
def paco_teacher(tiny_cifar, tmp_path_factory):
    """A PaCo teacher's run folder."""
    folder = tmp_path_factory.mktemp("runs") / "paco"
    with pytest.MonkeyPatch.context() as patch:
        script(train_teacher, patch, "--data-dir", tiny_cifar, "--out", folder, *PACO)
    return folder


@pytest.fixture(scope="module")
def student(teacher, tiny_cifar, tmp_path_factory):
    """A student's run folder."""
    folder = tmp_path_factory.mktemp("runs") / "student"
    with pytest.MonkeyPatch.context() as patch:
        script(train_student, patch, "--data-dir", tiny_cifar, "--teacher", teacher, "--out", folder, *STUDENT)
    return folder


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def test_a_run_folder_holds_what_the_contract_says(student):
    assert {"last.pt", "log.jsonl", "config.json", "result.json", "summary.png"} <= set(os.listdir(student))
    result = json.loads((student / "result.json").read_text())
    assert {"dataset", "imb", "method", "model", "teacher", "recipe", "epochs", "seed", "command", "hardware", "seconds",
            "date", "cls", "dist", "avg", "ema"} <= set(result)
    for head in ("cls", "dist", "avg"):
        assert set(result[head]) == {"overall", "head", "mid", "tail"}
        groups = result[head]["head"] * 3 + result[head]["mid"] * 4 + result[head]["tail"] * 3
        assert groups / 10 == pytest.approx(result[head]["overall"], abs=0.01)            # the test set is balanced
    log = records(student)
    assert [r["epoch"] for r in log] == [0, 1, 2] and [r["drw"] for r in log] == [False, False, True]
    assert -1 <= log[-1]["cosine"] <= 1 and log[-1]["avg"]["overall"] == result["avg"]["overall"]
    config = json.loads((student / "config.json").read_text())
    assert config["counts"] == data_lt.long_tailed_counts(24, 10, 4) and config["lr"] == 5e-4


def test_the_first_loss_is_near_chance(student):
    """ln 10 = 2.303 for either head at the start; a wrong scale, label map or normalisation shows here at once."""
    first = records(student)[0]
    assert first["loss_cls"] == pytest.approx(2.3026, abs=0.25) and first["loss_dist"] == pytest.approx(2.3026, abs=0.25)
    assert first["loss"] == pytest.approx(0.5 * first["loss_cls"] + 0.5 * first["loss_dist"], rel=1e-4)


def test_the_papers_steps_run_at_another_size_than_the_data(teacher, tiny_cifar, tmp_path, monkeypatch):
    """The paper's recipe with a small network, batch and length: resized crops, repeats, EMA, accumulation, evaluation crop."""
    flags = "--recipe paper --model micro --img-size 64 --batch 48 --micro-batch 16 --epochs 2 --drw-epoch 1 --imb 4".split()
    script(train_student, monkeypatch, "--data-dir", tiny_cifar, "--teacher", teacher, "--out", tmp_path / "paper", *flags)
    log, result = records(tmp_path / "paper"), json.loads((tmp_path / "paper" / "result.json").read_text())
    assert len(log) == 2 and all(0 < r["loss"] < 4 for r in log) and "ema" in result
    assert torch.load(tmp_path / "paper" / "last.pt", weights_only=True)["config"]["repeats"] == 3


def test_compiling_and_checkpointing_are_the_same_run(student, teacher, tiny_cifar, tmp_path, monkeypatch):
    """A compiled network whose weights the optimizer, the EMA or the checkpoint do not share. (The compiler rests here.)"""
    with torch.compiler.set_stance("force_eager"):
        script(train_student, monkeypatch, "--data-dir", tiny_cifar, "--teacher", teacher, "--out", tmp_path / "run", *STUDENT,
               "--compile", "--checkpointing")
    ours, theirs = (torch.load(folder / "last.pt", weights_only=True) for folder in (tmp_path / "run", student))
    for part in ("model", "ema"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][k], theirs[part][k]) for k in theirs[part])


def test_a_student_run_leaves_its_teacher_alone_and_labels_by_argmax(teacher, tiny_cifar):
    """In training mode, or with gradients, the teacher's BatchNorm statistics would drift with the student's images."""
    rt = engine.setup("cpu")
    net, _ = train_teacher.load_teacher(str(teacher), data_lt.load_data("cifar10", 4, "exp", tiny_cifar), rt)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.rand(16, 3, 32, 32)
    labels = train_student.teacher_says(net, x, None, train_student.parse(["--teacher-sees", "same", "--distill", "hard"]))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert labels.tolist() == [int(net(image[None]).argmax()) for image in x]
    assert not any(p.requires_grad for p in net.parameters())


def test_a_224_px_image_reaches_a_32_px_teacher_as_every_seventh_pixel():
    """The published teacher input has no antialiasing; with it, erasing noise would be smoothed away."""
    seen = []

    class Spy(torch.nn.Module):
        img_size = 32

        def forward(self, x):
            seen.append(x)
            return x.flatten(1)[:, :5]
    x = torch.rand(2, 3, 224, 224)
    train_student.teacher_logits(Spy(), x)
    assert torch.allclose(seen[0], x[:, :, 3::7, 3::7], atol=1e-5)


def test_weight_decay_spares_biases_norms_tokens_and_positions():
    net = networks.build_student(dict(model="mini", img_size=32, patch_size=8, drop_path=0.0), 10, distilled=True)
    decay, plain = train_student.parameter_groups(net, 0.05)
    names = {id(p): n for n, p in net.named_parameters()}
    spared = {names[id(p)] for p in plain["params"]}
    tokens = ("cls_token", "dist_token", "pos_embed")
    assert spared == {n for n in names.values() if n.endswith("bias") or "norm" in n or n in tokens}
    assert len(spared) + len(decay["params"]) == len(names) and plain["weight_decay"] == 0


def test_a_small_set_can_be_learned_by_heart(learned_by_heart):
    """Without augmentation the plain ViT must fit 240 easy images; a broken gradient, target or step could not."""
    assert records(learned_by_heart)[-1]["loss"] < 0.3
    assert json.loads((learned_by_heart / "result.json").read_text())["avg"]["overall"] > 90


def on_two_processes(name, folder, tiny_cifar, *flags):
    """torchrun --nproc_per_node=2 with gloo on free ports; returns the result."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d",
               "--rdzv-endpoint=localhost:0", ROOT / f"{name}.py", "--data-dir", tiny_cifar, "--device", "cpu", "--out", folder,
               *flags]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=280,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


def test_two_processes_share_one_run(tiny_cifar, tmp_path):
    """One log; each test image counted once and the saved BatchNorm statistics used: one process re-evaluates the same.
    PaCo's queue holds the labels of the last global batches, both processes' parts of each, newest batch first. Of the
    student's last steps one process has 13 images, the other 12: as many micro-batches, or --adjust waits for ever."""
    result = on_two_processes("train_teacher", tmp_path / "teacher", tiny_cifar, *PACO)
    rt = engine.setup("cpu")
    data = data_lt.load_data("cifar10", 4, "exp", tiny_cifar)
    net, _ = train_teacher.load_teacher(str(tmp_path / "teacher"), data, rt)
    again = train_teacher.evaluate(net, data, rt)["avg"]
    assert {c: again[c] for c in engine.COLUMNS} == result["avg"] and len(records(tmp_path / "teacher")) == 2

    order = data_lt.shuffled(len(data.train_labels), 0, 1)                # seed 0, the last epoch
    steps = zip(data_lt.shard(order, 32, 0, 2), data_lt.shard(order, 32, 1, 2))
    newest_first = torch.cat([torch.cat(parts) for parts in list(steps)[::-1]])
    queue = torch.load(tmp_path / "teacher" / "last.pt", weights_only=True)["paco"]["queue_labels"]
    assert torch.equal(queue, data.train_labels[newest_first][:50])

    result = on_two_processes("train_student", tmp_path / "two", tiny_cifar, "--teacher", tmp_path / "teacher", *STUDENT,
                             "--adjust", "both", "--batch", 30, "--micro-batch", 12)
    assert [r["epoch"] for r in records(tmp_path / "two")] == [0, 1, 2] and result["command"].startswith("torchrun")
    net, args, data = analyze.load_student(str(tmp_path / "two"), rt)
    again = train_student.evaluate(net, None, data, args, rt)
    assert {c: again["avg"][c] for c in engine.COLUMNS} == result["avg"]


def test_the_teacher_is_trained_first_when_it_is_missing(tiny_cifar, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = train_teacher.LDAM_CPU | dict(epochs=1, batch=64)
    monkeypatch.setitem(train_teacher.RECIPES["cpu"], "cifar10", tiny)
    flags = ["--data-dir", tiny_cifar, *STUDENT, "--epochs", "1"]
    script(train_student, monkeypatch, *flags)
    printed = capsys.readouterr().out
    assert printed.startswith("teacher resnet32, 1 epochs, then deit-lt micro") and "about" in printed.splitlines()[0]
    assert (tmp_path / "runs/teacher_cifar10_imb4_cpu_s0/result.json").exists()
    folder = next((tmp_path / "runs").glob("deit-lt*"))
    before = (folder / "result.json").read_text()
    script(train_student, monkeypatch, *flags, "--resume")                                # a finished run, teacher and all
    assert "Teacher (" not in capsys.readouterr().out
    assert json.loads((folder / "result.json").read_text())["avg"] == json.loads(before)["avg"]
    monkeypatch.setitem(train_teacher.RECIPES["cpu"], "cifar10", tiny | dict(rho=0.2))    # the teacher there is another's
    assert "--rho 0.1 -> 0.2" in refused(train_student, monkeypatch, capsys, *flags, "--overwrite")


# ---- Mistakes ------------------------------------------------------------------------------------------------------------

def refused(module, monkeypatch, capsys, *flags):
    """Run a script that must end with exit code 2 and one line; returns the line."""
    with pytest.raises(SystemExit) as stop:
        script(module, monkeypatch, *flags)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "Traceback" not in error and len(error.splitlines()) == 1, error
    return error


def test_mistakes_end_with_one_line_and_leave_nothing(teacher, student, tiny_cifar, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ["--data-dir", tiny_cifar]
    no = lambda module, *flags: refused(module, monkeypatch, capsys, *flags)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    assert "--data-dir" in no(train_teacher, "--data-dir", tmp_path / "nowhere") and not (tmp_path / "nowhere").exists()
    assert "--imb" in no(train_teacher, *data, "--imb", 0)
    assert "lower --imb" in no(train_student, *data, "--imb", 1000, "--method", "vit")
    data += ["--imb", 4]
    assert "no checkpoint" in no(train_student, *data, "--teacher", tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert "not a readable checkpoint" in no(train_student, *data, "--teacher", tmp_path / "text.pt")
    assert "multiple of" in no(train_student, *data, "--patch-size", 5)
    assert "--epochs must be at least 1" in no(train_student, *data, "--epochs", 0)
    assert "--drop-path" in no(train_student, *data, "--drop-path", 1)
    assert "--rho" in no(train_teacher, *data, "--rho", "nan")
    assert "--device" in no(train_teacher, *data, "--device", "gpu")
    assert "--seed" in no(train_teacher, *data, "--seed", -1)
    assert "--eval-crop" in no(train_student, *data, "--eval-crop", 2)
    assert "no paper recipe" in no(train_student, "--dataset", "shapes", "--recipe", "paper")
    assert "10 classes, the data have 100" in no_hundred(teacher, tmp_path, no)
    assert "already holds a run" in no(train_teacher, *data, "--out", teacher)
    assert "knows other classes" in no(train_student, "--dataset", "shapes", "--teacher", teacher)
    assert "not finished" in no(analyze, "summary", unfinished(student, tmp_path))
    broken = copy_of(tiny_cifar, tmp_path / "broken")
    (broken / "test" / "class3" / "0.png").write_bytes(b"not a picture")
    assert "class3" in no(train_teacher, "--data-dir", broken, "--imb", 4)
    for file in (broken / "train" / "class5").iterdir():
        file.unlink()
    assert "class5 has no images" in no(train_teacher, "--data-dir", broken, "--imb", 4)
    assert "--lr 0.1 -> 0.3" in no(train_teacher, *data, "--out", teacher, "--resume", "--lr", 0.3, *TEACHER)
    assert not (tmp_path / "runs").exists()


def copy_of(folder, to):
    return Path(shutil.copytree(folder, to))


def unfinished(student, tmp_path):
    (tmp_path / "unfinished").mkdir()
    shutil.copy(student / "last.pt", tmp_path / "unfinished")
    return tmp_path / "unfinished"


def no_hundred(teacher, tmp_path, no):
    from PIL import Image
    for split in ("train", "test"):
        for k in range(100):
            (tmp_path / "hundred" / split / f"{k}").mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / "hundred" / split / f"{k}" / "0.png")
    return no(train_student, "--dataset", "cifar100", "--imb", 1, "--data-dir", tmp_path / "hundred", "--teacher", teacher)


# ---- analyze, help, README -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("command, file", [("eval", "per_class.csv"), ("attention", "attention.png"),
                                           ("augment", "augment.png")])
def test_analyses_run_on_a_student(command, file, student, monkeypatch, capsys):
    script(analyze, monkeypatch, command, student)
    assert (student / file).stat().st_size > 100
    assert file in capsys.readouterr().out


def test_eval_repeats_the_accuracies_of_the_run(student, monkeypatch, capsys):
    """Loaded weights, data and preprocessing must be those of the training: same numbers, to the last image."""
    script(analyze, monkeypatch, "eval", student)
    result = json.loads((student / "result.json").read_text())
    line = next(l for l in capsys.readouterr().out.splitlines() if l.startswith("avg"))
    assert [float(v) for v in line.split()[1:]] == [round(result["avg"][c], 1) for c in engine.COLUMNS]


@pytest.mark.parametrize("loss", ["ce", "focal", "la", "vs"])
def test_every_loss_trains_a_teacher(loss, tiny_cifar, tmp_path, monkeypatch):
    """With and without weights (before and after DRW), without SAM; the loss is finite and the classifier linear, with bias."""
    script(train_teacher, monkeypatch, "--data-dir", tiny_cifar, "--out", tmp_path / loss, *TEACHER, "--loss", loss, "--rho", 0)
    assert all(0 < r["loss"] < 20 for r in records(tmp_path / loss))
    assert "linear.bias" in torch.load(tmp_path / loss / "last.pt", weights_only=True)["model"]


def test_paco_trains_a_teacher_that_a_student_can_use(paco_teacher, tiny_cifar, tmp_path, monkeypatch, capsys):
    """Its checkpoint is a plain ResNet-32, the queue has moved by all images, and settings that PaCo lacks are refused."""
    state = torch.load(paco_teacher / "last.pt", weights_only=True)
    assert "linear.bias" in state["model"] and not any("projection" in k for k in state["model"])
    assert state["paco"]["queue_labels"].min() >= 0                                       # 50 places, 2 epochs of 132 images
    result = json.loads((paco_teacher / "result.json").read_text())
    assert result["method"] == "paco" and set(result["training_images"]) == {"clean", "strong"}
    assert all(0 <= s["accuracy"] <= 100 and 0 <= s["entropy"] <= 2.3027 for s in result["training_images"].values())
    script(train_student, monkeypatch, "--data-dir", tiny_cifar, "--teacher", paco_teacher, "--out", tmp_path / "s", *STUDENT)
    assert "teacher resnet32, paco, 10 classes, 16 px, cifar normalisation" in capsys.readouterr().out
    assert "--max-margin" in refused(train_teacher, monkeypatch, capsys, *PACO, "--max-margin", 0.5)
    assert "--queue" in refused(train_teacher, monkeypatch, capsys, *TEACHER, "--queue", 5)
    assert "--max-margin" in refused(train_teacher, monkeypatch, capsys, *TEACHER, "--loss", "ce", "--max-margin", 0.5)
    assert "--decay" in refused(train_teacher, monkeypatch, capsys, *TEACHER, "--schedule", "cosine", "--decay", 0.5)
    assert "empty" in refused(train_student, monkeypatch, capsys, *STUDENT, "--teacher", "")
    assert "no teacher" in refused(train_student, monkeypatch, capsys, *STUDENT, "--method", "vit", "--teacher", "paco")
    alone = ("--data-dir", tiny_cifar, *PACO, "--batch", 1, "--out", tmp_path / "alone")
    assert "two images" in refused(train_teacher, monkeypatch, capsys, *alone)


@pytest.mark.parametrize("loss", ["ldam", "paco"])
def test_a_network_of_torchvision_can_be_the_teacher(loss, tiny_cifar, tmp_path, monkeypatch, capsys):
    """At another size than the data's; its run folder is read back and evaluated to the same numbers."""
    flags = [*(PACO if loss == "paco" else TEACHER), "--arch", "mobilenet_v3_small", "--img-size", "40", "--rho", "0"]
    script(train_teacher, monkeypatch, "--data-dir", tiny_cifar, "--out", tmp_path / "t", *flags, "--epochs", 1)
    script(analyze, monkeypatch, "eval", "--checkpoint", tmp_path / "t")
    result = json.loads((tmp_path / "t" / "result.json").read_text())
    printed = capsys.readouterr().out
    assert f"teacher mobilenet_v3_small, {loss}, 10 classes, 40 px" in printed
    line = [l for l in printed.splitlines() if l.startswith("avg")][-1]
    assert [float(v) for v in line.split()[1:]] == [round(result["avg"][c], 1) for c in engine.COLUMNS]
    again = ["--data-dir", tiny_cifar, "--imb", 4, "--arch"]
    assert "no network 'resnet33'" in refused(train_teacher, monkeypatch, capsys, *again, "resnet33")
    assert "alexnet cannot take 32 px" in refused(train_teacher, monkeypatch, capsys, *again, "alexnet")
    assert "does not end in one linear layer" in refused(train_teacher, monkeypatch, capsys, *again, "squeezenet1_1")


def test_a_file_from_elsewhere_is_a_teacher_and_can_be_evaluated(tiny_cifar, tmp_path, monkeypatch, capsys):
    """"My data, my teacher": torchvision's own state dict, at the data's size and with another normalisation."""
    from torchvision import models
    torch.manual_seed(0)
    torch.save(models.mobilenet_v3_small(num_classes=10).state_dict(), tmp_path / "mine.pth")
    mine = ["--checkpoint", tmp_path / "mine.pth", "--data-dir", tiny_cifar, "--imb", 4, "--size", 32]
    script(analyze, monkeypatch, "eval", *mine)
    assert "torchvision's mobilenet_v3_small, 10 classes, 32 px, imagenet" in capsys.readouterr().out
    assert (tmp_path / "mine_per_class.csv").exists()
    flags = ["--teacher", tmp_path / "mine.pth", "--teacher-size", 32, "--teacher-norm", "none", *STUDENT, "--epochs", 1]
    monkeypatch.chdir(tmp_path)
    script(train_student, monkeypatch, "--data-dir", tiny_cifar, *flags)
    assert "10 classes, 32 px, none normalisation" in capsys.readouterr().out
    assert "_by_mine.pth_teachernormnone_teachersize32_" in next((tmp_path / "runs").iterdir()).name


def test_both_passes_of_sam_drop_the_same_units(tiny_cifar, tmp_path, monkeypatch):
    """At a radius of almost nothing SAM is SGD, unless its second gradient is that of another draw of the dropout."""
    for name, rho in (("sgd", 0), ("sam", 1e-12)):
        flags = ["--arch", "mobilenet_v3_small", *TEACHER, "--epochs", 1, "--rho", rho, "--amp", "none"]
        script(train_teacher, monkeypatch, "--data-dir", tiny_cifar, "--out", tmp_path / name, *flags)
    sgd, sam = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("sgd", "sam"))
    assert all(torch.allclose(sgd[k].float(), sam[k].float(), rtol=1e-2, atol=1e-3) for k in sgd)


@pytest.mark.parametrize("module", [train_teacher, train_student, analyze])
def test_help_works(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module.__name__, "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out


@pytest.mark.parametrize("document", ["README.md", "RESULTS.md"])
def test_every_training_command_in_the_documents_parses(document, student):
    """A flag that was renamed must be renamed there too."""
    commands = re.findall(r"(train_teacher|train_student)\.py((?: +(?:--[\w-]+|[\w./,-]+))*)", (ROOT / document).read_text())
    assert len(commands) >= 6
    for name, flags in commands:
        if "--" in flags:
            flags = re.sub(r"(?<=--finetune )\S+", str(student), flags)  # that one is read
            {"train_teacher": train_teacher, "train_student": train_student}[name].parse(shlex.split(flags))


@pytest.mark.parametrize("document", ["README.md", "RESULTS.md", "results/README.md"])
def test_every_link_in_the_documents_leads_somewhere(document):
    """A file or heading that was moved or renamed must be so in the links, too. Anchors as GitHub makes them of headings."""
    def anchors(text):
        headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
        return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

    path = ROOT / document
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)|^\[\w+\]: (\S+)", path.read_text(), re.M)
    assert links
    for link in map("".join, links):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
    named = re.findall(r"\[[^\]]*\]\[(\w+)\]", path.read_text())
    assert set(named) <= set(re.findall(r"^\[(\w+)\]:", path.read_text(), re.M))


def test_a_student_goes_on_at_a_higher_resolution(teacher, student, tiny_cifar, tmp_path, monkeypatch, capsys):
    """Positions cut or drawn anew; the old run's data, teacher or recipe forgotten. At no learning rate: the same network."""
    for name, more in (("same", ["--lr", "0"]), ("larger", ["--img-size", "64"])):
        script(train_student, monkeypatch, "--finetune", student, "--out", tmp_path / name, *more)
    folders = student, tmp_path / "same", tmp_path / "larger"
    old, same, larger = (run_folder.load_checkpoint(str(folder)) for folder in folders)
    torch.testing.assert_close(old["model"], same["model"], rtol=0, atol=1e-3)            # the schedule ends at 1e-5
    assert larger["model"]["pos_embed"].shape[1] == 2 + (64 // old["config"]["patch_size"]) ** 2
    config = larger["config"]
    assert (config["epochs"], config["lr"], config["img_size"]) == (1, old["config"]["lr"] / 10, 64)
    assert config["teacher"] == str(teacher) and config["data_dir"] == str(tiny_cifar) and config["model"] == "micro"
    before, after = (state["model"]["blocks.0.attn.qkv.weight"].flatten() for state in (old, larger))
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=0)
    assert cosine > 0.99                                                  # the old weights, a little further
    with pytest.raises(SystemExit):
        script(train_student, monkeypatch, "--finetune", teacher, "--out", tmp_path / "wrong")
    assert "--finetune takes a run of train_student.py" in capsys.readouterr().err
