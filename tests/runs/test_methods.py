"""The methods and the distillation modes, each from end to end on the built-in shapes: what it learns from and leaves alone."""
import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ablate
import analyze
import augment
import data_lt
import engine
import networks
import resnet
import train_student
import train_teacher
from conftest import ROOT, script

pytestmark = pytest.mark.usefixtures("no_pictures")
SMALL = "--dataset shapes --imb 10 --epochs 2 --drw-epoch 1 --batch 32 --lr 0.001 --eval-every 2".split()


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch, tmp_path):
    """20 to 2 training images a class, 2 to test on; teachers of one epoch; runs/ in a folder of the test's own."""
    monkeypatch.setattr(data_lt, "SHAPES_MAX", 20), monkeypatch.setattr(data_lt, "SHAPES_TEST", 2)
    for recipes in (train_teacher.RECIPES, train_teacher.STRONG_RECIPES):
        monkeypatch.setitem(recipes["cpu"], "shapes", recipes["cpu"]["shapes"] | dict(epochs=1, warmup_epochs=0, img_size=16))
    monkeypatch.chdir(tmp_path)


def trained(monkeypatch, folder, *flags):
    """Run train_student.py -> (result, config, log, last.pt) of its folder."""
    script(train_student, monkeypatch, *SMALL, *flags)
    read = lambda name: json.loads((folder / name).read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return read("result.json"), read("config.json"), log, torch.load(folder / "last.pt", weights_only=True)


class Stubborn(torch.nn.Module):
    """A teacher that says class 7 of every image."""
    img_size, calls = 32, 0

    def forward(self, x):
        assert x.shape[1:] == (3, 32, 32) and 0 <= x.min() and x.max() <= 1
        self.calls += 1
        return torch.eye(10)[torch.full((len(x),), 7)] * 20


@pytest.mark.parametrize("method", train_student.METHODS)
def test_every_method_runs_from_one_command(method, tmp_path, monkeypatch, capsys):
    """A method whose settings do not arrive, which trains another teacher than its own, or has a head too many."""
    result, config, log, state = trained(monkeypatch, tmp_path / "run", "--method", method, "--out", "run")
    assert config | train_student.changes(method) == config and result["method"] == method
    distilled = method in ("deit-lt", "deit")
    assert set(result) & {"cls", "dist", "avg"} == ({"cls", "dist", "avg"} if distilled else {"cls", "avg"})
    assert ("teacher_accuracy" in log[-1]) == distilled == ("head_dist.weight" in state["model"])
    teacher = {"deit-lt": "runs/teacher_shapes_imb10_cpu_s0", "deit": "runs/teacher_strong_shapes_imb10_cpu_s0"}.get(method)
    assert result["teacher"] == teacher and (teacher is None) != (tmp_path / str(teacher) / "result.json").exists()
    assert ("blocks.0.gamma_1" in state["model"]) == (method == "deit-iii")
    found = networks.load_network("run")                                          # its settings say which network it is
    assert found.net.distilled == distilled and found.config["method"] == method


@pytest.mark.parametrize("flags, heads", [
    ("--tokens 1", 1), ("--tokens 1 --distill soft --tau 3 --alpha 0.1", 1), ("", 2), ("--distill soft", 2),
    ("--teacher-sees weak --mixup 0 --cutmix 0", 2), ("--teacher-sees mirrored", 2),
    ("--tokens 1 --cls-loss bce --smoothing 0", 1), ("--policy none", 2)])
def test_every_mode_of_distillation_learns_from_its_teacher(flags, heads, tmp_path, monkeypatch):
    """alpha 1: only the teacher is listened to. It says one class, so that the taught head learns it whatever the labels are;
    a mode that follows the labels, or teaches the wrong head, does not. The other head stays about where it began."""
    stubborn = Stubborn()
    monkeypatch.setattr(train_student, "read_teacher", lambda *_: stubborn)
    length = "--epochs 4 --drw-epoch 4 --warmup-epochs 0 --eval-every 4 --lr 0.01".split()
    result, _, log, _ = trained(monkeypatch, tmp_path / "run", "--teacher", "a.pth", "--out", "run", *length, *flags.split(),
                                "--alpha", 1)
    taught = result["dist" if heads == 2 else "cls"]
    assert (taught["head"], taught["mid"]) == (0, 0) and taught["tail"] == pytest.approx(100 / 3, abs=1e-3)
    assert stubborn.calls >= 4 * 2 and log[-1]["loss"] == pytest.approx(log[-1]["loss_dist"])
    assert log[-1]["loss_dist"] < 0.5 * log[0]["loss_dist"]
    if heads == 2:
        assert log[-1]["loss_cls"] > 0.8 * log[0]["loss_cls"]                     # nobody taught it


def test_several_teachers_say_the_mean_of_their_probabilities(tmp_path, monkeypatch, capsys):
    """A mean of logits, the first teacher's word alone, classes of a file in another's order. Against a loop in float64."""
    data, files, images = data_lt.load_data("shapes", 10), [], torch.rand(5, 3, 32, 32)
    expected = torch.zeros(5, 10, dtype=torch.double)
    for seed in range(3):
        torch.manual_seed(seed)
        net = networks.build_teacher(dict(arch="resnet32", loss="ce"), 10).eval()
        torch.nn.init.normal_(net.classifier.weight, std=0.5)                             # so that they are sure, and differ
        own = torch.randperm(10)
        files.append(f"{seed}.pth")
        torch.save({"model": net.state_dict(), "class_names": [data.class_names[k] for k in own],
                    "config": dict(arch="resnet32", loss="ce"), "counts": data.counts}, files[-1])
        expected[:, own] += net(images).double().softmax(dim=1).detach() / 3
    committee, what = train_teacher.load_teacher(",".join(files), data, engine.setup("cpu"))
    torch.testing.assert_close(committee(images).double().exp(), expected, rtol=1e-3, atol=1e-4)
    assert what.startswith("the mean of 3") and what.count("resnet32") == 1
    assert not any(p.requires_grad for p in committee.parameters())

    result, config, log, _ = trained(monkeypatch, tmp_path / "run", "--teacher", "0.pth,1.pth", "--out", "run")
    assert config["teacher"] == "0.pth,1.pth" and config["name"].endswith("_by_0.pth+1.pth_s0") and "dist" in result
    for teacher, said in (("0.pth,no.pth", "no.pth"), ("0.pth,run", "run is not a teacher"), ("0.pth,", "a name is empty"),
                          ("ldam,paco", "a run folder or a file"), (",".join(["teacher"] * 40), "--out")):
        with pytest.raises(SystemExit):
            script(train_student, monkeypatch, *SMALL, "--teacher", teacher, *["--out", "bad"] * (said != "--out"))
        assert said in capsys.readouterr().err
    torch.save(torch.load("2.pth") | {"config": dict(arch="resnet32", loss="ce", img_size=40)}, "40.pth")
    with pytest.raises(engine.UserError, match="--teacher-size"):
        train_teacher.load_teacher("0.pth,40.pth", data, engine.setup("cpu"))
    alike, _ = train_teacher.load_teacher("0.pth,40.pth", data, engine.setup("cpu"), norm="imagenet", size=32)
    assert all(net.img_size == 32 and torch.equal(net.mean, alike.nets[0].mean) for net in alike.nets)
    assert not torch.equal(alike.nets[1].mean, committee.nets[1].mean)

    flags = "eval", ",".join(files), "--dataset", "shapes", "--imb", 10
    script(analyze, monkeypatch, *flags, "--out", "three.csv")
    together, *alone = (f"confidence {100 * net(data.test_images / 255).softmax(dim=1).amax(dim=1).mean():.1f} %"
                        for net in (committee, *committee.nets))
    assert together in capsys.readouterr().out and together not in alone and Path("three.csv").exists()
    with pytest.raises(SystemExit):                                                       # else "0.pth,1.pth,2_per_class.csv"
        script(analyze, monkeypatch, *flags)
    assert "--out" in capsys.readouterr().err


def test_the_teacher_sees_what_it_is_said_to(tmp_path):
    """weak: the same images, only shifted and mirrored, however the student's look; same: the student's, bit for bit;
    mirrored: these from both sides, which must not be told apart by what is said."""
    class Spy:
        img_size = 32

        def __call__(self, x):
            self.seen = x
            return torch.arange(3.0).repeat(len(x), 1)
    torch.manual_seed(0)
    levels, x = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8), torch.rand(16, 3, 32, 32)
    args, spy = train_student.parse(["--teacher-sees", "same", "--distill", "hard"]), Spy()
    assert train_student.teacher_says(spy, x, levels, args).tolist() == [2] * 16 and torch.equal(spy.seen, x)
    args.teacher_sees, args.distill = "weak", "soft"
    assert train_student.teacher_says(spy, x, levels, args).shape == (16, 3)
    whole = augment.to_float(levels)
    for seen, image in zip(spy.seen, whole):                                      # it, shifted by up to 4 px, or that mirrored
        padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
        shifts = [padded[:, i:i + 32, j:j + 32] for i in range(9) for j in range(9)]
        assert any(torch.equal(seen, s) or torch.equal(seen.flip(2), s) for s in shifts)
    args.teacher_sees, net = "mirrored", resnet.resnet32(10).eval()
    one, other = (train_student.teacher_says(net, v, levels, args) for v in (x, x.flip(3)))
    torch.testing.assert_close(one, (net(x) + net(x.flip(3))) / 2, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-2)
    assert (one - net(x)).abs().max() > 1


def test_crt_begins_a_classifier_anew_and_leaves_the_rest_alone(tmp_path, monkeypatch, capsys):
    """A body that is trained on, a classifier that is not; draws that are not balanced; a ViT trained twice."""
    drawn = []
    balanced = data_lt.class_balanced
    monkeypatch.setattr(data_lt, "class_balanced", lambda *a: drawn.append(balanced(*a)) or drawn[-1])
    _, config, log, crt = trained(monkeypatch, tmp_path / "run", "--method", "vit-crt", "--out", "run", "--drop-path", 0.1)
    vit, = (tmp_path / "runs").iterdir()
    before = torch.load(vit / "last.pt", weights_only=True)["model"]
    for name, w in crt["model"].items():
        assert torch.equal(w, before[name]) != name.startswith("head"), name
    assert (config["epochs"], config["lr"], config["finetune"]) == (1, 1e-3, str(vit.relative_to(tmp_path))) and len(log) == 1
    assert drawn and all(len(order) == sum(crt["counts"]) for order in drawn)
    capsys.readouterr()
    script(train_student, monkeypatch, *SMALL, "--method", "vit-crt", "--drop-path", 0.1, "--out", "again")
    assert f"{vit.relative_to(tmp_path)} is finished" in capsys.readouterr().out
    again = torch.load("again/last.pt", weights_only=True)["model"]
    assert all(torch.equal(w, again[name]) for name, w in crt["model"].items())
    script(train_student, monkeypatch, "--method", "vit-crt", "--finetune", vit)          # by hand, in a folder named after it
    assert (tmp_path / "runs" / f"{vit.name}_crt" / "result.json").exists()


@pytest.mark.parametrize("method", ["vit-crt", "deit-lt", "deit-lt --stem conv2 --ema 0.9"])
def test_a_killed_run_goes_on(method, tmp_path, monkeypatch, capsys):
    """A head drawn anew or the ViT's weights read again, when the run is resumed; the teacher's label frequencies forgotten."""
    flags = [*SMALL, "--method", *method.split(), "--batch", 16, "--adjust", "both", "--teacher", "a.pth"]
    monkeypatch.setattr(train_student, "read_teacher", lambda *_: Stubborn())
    if method == "vit-crt":
        script(train_student, monkeypatch, *SMALL, "--method", "vit", "--out", "vit")
        flags = ["--method", "vit-crt", "--finetune", "vit", "--epochs", 2, "--batch", 16]
    script(train_student, monkeypatch, *flags, "--out", "whole")
    seed_step = engine.seed_step

    def dying(seed, epoch, step, rank):
        if (epoch, step) == (1, 2):
            raise KeyError("killed")
        seed_step(seed, epoch, step, rank)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "seed_step", dying)
        with pytest.raises(KeyError):
            script(train_student, patch, *flags, "--out", "part")
    if method == "deit-lt":                                                       # begun before there was a choice of stem
        state = torch.load("part/last.pt", weights_only=True)
        del state["config"]["stem"]
        torch.save(state, "part/last.pt")
    script(train_student, monkeypatch, *flags, "--out", "part", "--resume")
    whole, part = (torch.load(f"{name}/last.pt", weights_only=True)["model"] for name in ("whole", "part"))
    assert all(torch.equal(w, part[name]) for name, w in whole.items())
    assert ("patch_embed.layers.1.running_mean" in whole) == ("conv" in method)
    if "conv" in method:
        with pytest.raises(SystemExit):
            script(train_student, monkeypatch, "--finetune", "whole", "--stem", "patch")
        assert "--finetune keeps --stem" in capsys.readouterr().err
        script(train_student, monkeypatch, "--finetune", "whole", "--img-size", 64, "--out", "larger")
        assert Path("larger/result.json").exists()


def test_a_teacher_that_fails_once_costs_one_step(tmp_path, monkeypatch):
    """Shares of labels that stay NaN after it, and with them every later loss."""
    class Failing(Stubborn):
        def forward(self, x):
            return super().forward(x) * (math.nan if self.calls == 6 else 1)                 # three calls measure the time
    failing = Failing()
    monkeypatch.setattr(train_student, "read_teacher", lambda *_: failing)
    flags = "--teacher a.pth --adjust both --distill soft --beta 0 --epochs 1 --batch 8 --drw-epoch 0".split()
    _, _, log, state = trained(monkeypatch, tmp_path / "run", "--out", "run", *flags)
    assert log[0]["skipped"] == 1 and state["said"].sum().item() == pytest.approx(1) and 0 < log[0]["loss_dist"] < 10


def test_every_process_tests_with_the_same_statistics(monkeypatch):
    """--stem conv has BatchNorm, whose statistics each process gathers from its own images; so has its average, --ema."""
    shared = []
    monkeypatch.setattr(engine, "share_buffers", lambda net, rt: shared.append(net))
    rt, args = engine.Runtime(torch.device("cpu")), train_student.parse(
        "--dataset shapes --imb 10 --method vit --stem conv".split())
    train_student.resolve(args, rt)
    data = engine.load_data(args, rt)
    net = train_student.new_network(args, data, rt)
    ema = engine.EMA(net, 0.9)
    train_student.evaluate(net, ema, data, args, rt)
    assert shared == [net, ema.model]


def test_adjusted_soft_labels_are_compared_at_their_temperature(tmp_path, monkeypatch):
    """As below for tau 10, where the teacher gives 0.45 to class 7 and 0.06 to the others: tau^2 KL(p || said) / K. Shares of
    its hard labels, or ln pi inside the division by tau."""
    monkeypatch.setattr(train_student, "read_teacher", lambda *_: Stubborn())
    flags = "--teacher a.pth --adjust both --distill soft --tau 10 --lr 0 --drw-epoch 0 --beta 0 --epochs 1 --batch 8".split()
    _, _, log, state = trained(monkeypatch, tmp_path / "run", "--out", "run", *flags)
    p = (torch.eye(10, dtype=torch.double)[7] * 2).softmax(dim=0)
    steps = -(-sum(state["counts"]) // 8)
    said = [p + (0.1 - p) * 0.99 ** step for step in range(1, steps + 1)]
    expected = sum(100 * (p * (p / q).log()).sum().item() / 10 for q in said) / steps
    assert log[0]["loss_dist"] == pytest.approx(expected, abs=0.05 * expected)
    torch.testing.assert_close(state["said"].double(), said[-1], rtol=0, atol=2e-3)           # bfloat16 logits


def test_adjusted_losses_know_how_often_a_class_is_a_label(tmp_path, monkeypatch):
    """Where nothing is learned, at logits of nearly 0, CE(ln pi, y) is the entropy of the data's classes, 2.05 nats, and not
    ln 10 = 2.30; of a teacher that says one class, minus the log of its running share, 1 - 0.9 * 0.99^step. A prior with the
    wrong sign, of the other head, or left out."""
    monkeypatch.setattr(train_student, "read_teacher", lambda *_: Stubborn())
    flags = "--teacher a.pth --adjust both --lr 0 --drw-epoch 0 --beta 0 --epochs 1 --batch 8".split()
    _, _, log, state = trained(monkeypatch, tmp_path / "run", "--out", "run", *flags)
    pi = torch.tensor(state["counts"]) / sum(state["counts"])
    steps = -(-sum(state["counts"]) // 8)
    said = [1 - 0.9 * 0.99 ** step for step in range(1, steps + 1)]
    assert log[0]["loss_cls"] == pytest.approx(-(pi * pi.log()).sum().item(), abs=0.1)
    assert log[0]["loss_dist"] == pytest.approx(-sum(map(math.log, said)) / steps, abs=0.1)
    assert state["said"][7].item() == pytest.approx(said[-1], abs=1e-5) and state["said"].sum().item() == pytest.approx(1)


def test_classes_among_thousands_are_adjusted_by_their_own_shares():
    """A floor under the teacher's shares, against ln 0, that is above what a class of many has."""
    K, cpu = 8142, engine.Runtime(torch.device("cpu"))
    objective = argparse.Namespace(args=argparse.Namespace(tau=1.0), said=torch.full((K,), 1 / K), rt=cpu)
    log_said = train_student.Objective.log_said(objective, torch.zeros(4).long(), 1)
    assert log_said[1:].exp().tolist() == pytest.approx([0.99 / K] * (K - 1), rel=1e-4)


def test_a_strong_teacher_sees_mixed_images(monkeypatch):
    """Hard labels, weak images, or DRW weights in what is to be DeiT's teacher; its twice as many epochs."""
    seen = []
    mix = augment.mixup_cutmix
    monkeypatch.setattr(augment, "mixup_cutmix", lambda *a, **k: seen.append(mix(*a, **k)) or seen[-1])
    monkeypatch.setitem(train_teacher.LOSSES, "ce", lambda *_: lambda logits, y, weight=None: (
        seen.append((y, weight)), torch.nn.functional.cross_entropy(logits.float(), y))[1])
    script(train_teacher, monkeypatch, "--dataset", "shapes", "--imb", 10, "--augment", "padded", "--out", "strong")
    (_, target), (y, weight) = seen[:2]
    assert torch.equal(target, y) and y.shape[1] == 10 and weight is None
    row, plain = (train_teacher.strong(train_teacher.LDAM_CPU), train_teacher.LDAM_CPU)
    assert row["epochs"] == 2 * plain["epochs"] and (row["rho"], row["beta"], row["loss"]) == (0, 0, "ce")


def test_our_recipes_teachers():
    """Another loss than ours under its name; a paper's teacher trained again, or changed, for ours."""
    def own(*flags):
        args = train_student.parse(["--recipe", "best", *flags])
        return train_student.resolve(args, engine.Runtime(torch.device("cpu")))
    for dataset in ("cifar10", "cifar100"):
        late = own("--dataset", dataset)
        assert late.out == f"runs/teacher_{dataset}_imb100_best_s0"
        assert (late.loss, late.beta, late.epochs, late.rho, late.rho_schedule) == ("la", 0, 36, 0.1, "late")
    assert own("--dataset", "cifar10", "--teacher", "paco").out == "runs/teacher_paco_cifar10_imb100_cpu_s0"
    ldam = own("--dataset", "cifar10", "--teacher", "ldam")
    assert ldam.out == "runs/teacher_cifar10_imb100_cpu_s0"
    assert (ldam.loss, ldam.beta, ldam.epochs, ldam.rho_schedule) == ("ldam", 0.9999, 24, "constant")
    folder = train_teacher.RECIPES["best"]["folder"](data_lt.Survey(images=12406, classes=10, side=32))
    assert (folder["loss"], folder["epochs"], folder["rho_schedule"]) == ("la", 36, "late")
    given = train_teacher.parse("--dataset cifar10 --recipe best --loss la".split())
    train_teacher.resolve(given, engine.Runtime(torch.device("cpu")))
    assert given.out == "runs/teacher_cifar10_imb100_best_s0"
    strong = own("--dataset", "cifar10", "--method", "deit")
    assert strong.out == "runs/teacher_strong_cifar10_imb100_cpu_s0" and strong.epochs == 48


def test_our_recipe_on_shapes_is_the_cpu_recipes_but_for_the_student():
    """A teacher trained again for another recipe's name; a row that is not cpu's but for ours; a ViT that wants a teacher."""
    rt = engine.Runtime(torch.device("cpu"))
    args = train_student.parse("--dataset shapes --recipe best".split())
    own = train_student.resolve(args, rt)
    assert own.out == "runs/teacher_shapes_imb100_cpu_s0" and args.out == "runs/deit-lt_micro_shapes_imb100_best_s0"
    cpu = train_student.parse("--dataset shapes --recipe cpu".split())
    train_student.resolve(cpu, rt)
    ours = train_student.BEST | {"alpha": 0.909, "recipe": "best", "name": args.name, "out": args.out}
    assert {k: v for k, v in vars(args).items() if v != getattr(cpu, k)} == {k: v for k, v in ours.items() if k != "lr"}
    assert train_student.RECIPES["best"]["cifar100"]["alpha"] == 0.99
    many = train_student.RECIPES["best"]["folder"](data_lt.Survey(images=9000, classes=8142, side=64))
    assert 0.9998 < many["alpha"] < 1                                             # of so many classes too, CLS is trained
    for method in ("vit", "deit", "deit-iii"):
        args = train_student.parse(["--dataset", "shapes", "--recipe", "best", "--method", method])
        train_student.resolve(args, rt)
        assert args.stem == "conv2"


def test_own_teachers_are_found_by_their_radius():
    """--teacher-rho that is not passed on, or a folder that forgets it."""
    args = train_student.parse([*SMALL, "--teacher-rho", "0"])
    own = train_student.resolve(args, engine.Runtime(torch.device("cpu")))
    assert own.rho == 0 and own.out == args.teacher == "runs/teacher_shapes_imb10_cpu_rho0.0_s0"
    assert args.out.endswith("_teacherrho0.0_s0")


def test_sams_radius_follows_its_schedule(monkeypatch):
    """The published one of the large sets; a late SAM that climbs early (at rho 0, for twice the time) or never."""
    rho = lambda name, epoch: train_teacher.radius(argparse.Namespace(rho=0.5, rho_schedule=name, epochs=90), epoch)
    assert [rho("step", epoch) for epoch in (0, 4, 5, 59, 60, 89)] == pytest.approx([0.05, 0.05, 0.1, 0.1, 0.5, 0.5])
    assert [rho("late", epoch) for epoch in (0, 59, 60, 89)] == [0, 0, 0.5, 0.5] and rho("constant", 0) == 0.5
    climbs, first_step = [], train_teacher.SAM.first_step
    monkeypatch.setattr(train_teacher.SAM, "first_step", lambda sam: climbs.append(sam.rho) or first_step(sam))
    flags = "--dataset shapes --imb 10 --epochs 3 --drw-epoch 2 --rho-schedule late --out late".split()
    script(train_teacher, monkeypatch, *flags)
    assert climbs == [0.05] * 3                                           # steps of the last epoch's 78 images


@pytest.mark.parametrize("flags, words", [
    ("--distill none", "--tokens 1"), ("--cls-loss bce", "--smoothing 0"),
    ("--cls-loss bce --smoothing 0", "--tokens 1"), ("--tau 3", "--tau has no meaning"),
    ("--method vit --alpha 0.9 --beta 0", "--alpha, --beta has no meaning"),
    ("--method vit --adjust dist", "a teacher's labels"),
    ("--sampling balanced --adjust cls", "leaves nothing"), ("--policy three --magnitude 3", "--magnitude has no meaning"),
    ("--teacher-sees weak", "--mixup 0 --cutmix 0"),
    ("--recipe best --distill hard", "--alpha of soft labels"),
    ("--stem conv --img-size 30 --patch-size 6", "--patch-size 2, 4"), ("--stem pool", "--stem is one of patch, conv, conv2"),
    ("--sampling balanced --repeats 3", "--repeats"), ("--trained classifier", "needs --finetune"),
    ("--distill medium", "--distill is one of hard, soft, none, not medium"), ("--tokens 3", "--tokens is one of 1, 2"),
    ("--method vit --teacher ldam", "has no teacher"), ("--method deit-iii --teacher-rho 0", "has no teacher"),
    ("--teacher a.pth --teacher-rho 0", "--teacher-rho is for"), ("--distill soft --tau 0", "--tau must be"),
    ("--teacher-rho -1", "--teacher-rho must be"), ("--magnitude 11", "--magnitude must be")])
def test_settings_that_cannot_be_are_refused(flags, words, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        script(train_student, monkeypatch, *SMALL, *flags.split())
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and words in error and len(error.splitlines()) == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags, words", [
    ("--augment padded --loss ldam", "--loss ce"), ("--augment loader", "stay on disk"),
    ("--augment padded --beta 0.9", "no --beta"), ("--augment soft", "--augment is one of"),
    ("--schedule slow", "--schedule is one of step, cosine"), ("--rho 0 --rho-schedule late", "--rho-schedule has no meaning")])
def test_teachers_that_cannot_be_are_refused(flags, words, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        script(train_teacher, monkeypatch, "--dataset", "shapes", *flags.split())
    assert words in capsys.readouterr().err


# ---- Tables of runs --------------------------------------------------------------------------------------------------------

@pytest.fixture
def ablation(monkeypatch, capsys):
    """f(*flags) -> (commands that were run, what was printed) of ablate.py, its children run in this process."""
    def child(script_name, argv):
        ran.append(" ".join([script_name, *argv]))
        script(train_student if "student" in script_name else train_teacher, monkeypatch, *argv, "--resume")

    def run(*flags):
        ran.clear(), capsys.readouterr()
        script(ablate, monkeypatch, *flags)
        return list(ran), capsys.readouterr().out
    ran = []
    monkeypatch.setattr(ablate, "run", child)
    return run


def test_a_table_runs_what_is_missing_and_says_what_there_is(ablation, monkeypatch):
    """A run that is trained twice, a row that reads another's folder or head, a wrong mean or spread, seeds mixed up."""
    rows = [("plain", "--method vit", "avg", (12.5, 34.5)), ("again", "--method vit-crt", "avg", None),
            ("modes", "--method deit --teacher MODES_TEACHER", "dist", (None,))]
    monkeypatch.setitem(ablate.TABLES, "table1", rows)
    monkeypatch.setattr(ablate, "MODES_TEACHER", "--loss ce --rho 0 --epochs 1")
    monkeypatch.setattr(ablate, "PUBLISHED_FOR", (("cifar10", 10), ("shapes", 10)))
    flags = ["table1", "--seeds", "0", "1", *SMALL]
    ran, printed = ablation(*flags, "--show")
    assert ran == [] and printed.splitlines()[2:] == ["| plain | - | - | - | - | - | 0 | 34.5 |",
                                                      "| again | - | - | - | - | - | 0 | - |",
                                                      "| modes | - | - | - | - | - | 0 | - |"]
    first, printed = ablation(*flags)
    assert len(first) == 8 and sum("train_teacher" in command for command in first) == 2
    results = {path.parent.name: json.loads(path.read_text()) for path in Path("runs").glob("*/result.json")}
    for line, (ends, head) in zip(printed.splitlines()[-3:], ((("vit", "s"), "avg"), (("vit", "crt"), "avg"),
                                                              (("deit", "s"), "dist"))):
        chosen = [r for n, r in results.items() if (n.split("_")[0], n.split("_")[-1].rstrip("01")) == ends]
        assert sorted(r["seed"] for r in chosen) == [0, 1]
        a, b = (r[head]["overall"] for r in chosen)
        assert f"| {(a + b) / 2:.1f} ± {abs(a - b) / 2 ** 0.5:.1f} |" in line and "| 2 |" in line
    again, same = ablation(*flags)
    assert again == [] and same.splitlines()[-3:] == printed.splitlines()[-3:]


def test_a_table_ends_where_a_run_does_and_hands_signals_on(tmp_path):
    """A run that is killed where it should save, or that trains on without its table."""
    (tmp_path / "child.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), print('saved'), sys.exit(143)))\n"
        "print('begun', flush=True)\ntime.sleep(60)\n")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ablate; ablate.run({str(tmp_path / 'child.py')!r}, [])"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "begun\n"
    parent.terminate()
    assert parent.communicate(timeout=30)[0] == "saved\n" and parent.returncode == 143


@pytest.mark.parametrize("flags", ["table5 --out=x", "table5 --seed 3", "table6 --model tiny", "table2 --teacher paco",
                                   "table1 --beta=0", "search --recipe best"])
def test_flags_in_which_a_tables_rows_differ_are_refused(flags, ablation, capsys):
    with pytest.raises(SystemExit) as stop:
        ablation(*flags.split())
    assert stop.value.code == 2 and "every run has its own" in capsys.readouterr().err


def test_the_modes_teacher_has_its_students_data(ablation):
    """Images that its students are tested on, or another imbalance than theirs."""
    ran, printed = ablation("modes", "--holdout", "0.1", "--imb", "20", "--commands")
    line = next(line for line in printed.splitlines() if "train_teacher" in line)
    teacher = train_teacher.parse(line.split()[2:])
    assert (teacher.holdout, teacher.imb, teacher.epochs) == (0.1, 20, 10)


@pytest.mark.parametrize("table", ablate.TABLES)
def test_commands_of_every_table_parse_and_have_folders_of_their_own(table, ablation):
    """A flag that was renamed; two rows that are the same run though they should not be."""
    ran, printed = ablation(table, "--commands")
    commands = [line.split()[1:] for line in printed.splitlines() if line.startswith("python train_student.py")]
    rt = engine.Runtime(torch.device("cpu"))
    folders = set()
    for command in commands:
        args = train_student.parse(command[1:])
        args.teacher = "ldam" if "/" in str(args.teacher) else args.teacher
        first = train_student.first_run(args)
        train_student.resolve(first or args, rt)
        folders.add((first or args).out + "crt" * bool(first))
    assert not ran and len(folders) == len(commands) == len({flags for _, flags, *_ in ablate.TABLES[table]})
