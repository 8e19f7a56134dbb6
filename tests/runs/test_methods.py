"""Methods and modes of distillation, each from its command to its result."""
import argparse
import math

import pytest
import torch

import analyze
import augment
import resnet
import train_student
import train_teacher
from conftest import script
from engine import evaluation, networks, runtime
from engine.datasets import load_data
from engine.networks import build_teacher, load_teacher
from experiments import crt, deit3
from tiny_runs import DATA, LENGTH, OneClass, checkpoint, read, records, train

pytest_plugins = ["tiny_runs"]
SMALL = [*DATA, *LENGTH, "--model", "micro", "--img-size", "16"]


@pytest.fixture
def own_runs(tmp_path, monkeypatch, tiny_cifar):
    """Teachers of the cpu recipe are trained in an instant; runs/ is in a folder of the test's.
    Returns the flags that name the images."""
    monkeypatch.chdir(tmp_path)
    row = train_teacher.CPU | dict(epochs=1, warmup_epochs=0, img_size=8, batch=45, eval_every=9)
    monkeypatch.setitem(train_teacher.RECIPES["cpu"], "cifar10", row)
    return ["--data-dir", str(tiny_cifar)]


@pytest.fixture
def teach(own_runs, monkeypatch):
    """teach(teacher, *flags) -> log of a student by this network."""
    def teach(teacher, *flags):
        monkeypatch.setattr(train_student, "load_teacher", lambda *_: (teacher, "a test's"))
        train(train_student, *SMALL, *own_runs, "--teacher", "a.pth", *flags, "--out", "run")
        return records("run")
    return teach


# ---- Methods -------------------------------------------------------------------------------------

@pytest.mark.parametrize("module, method, teacher", [
    (train_student, "deit-lt", "runs/teacher_cifar10_imb12_cpu_s0"),
    (train_student, "deit", "runs/teacher_strong_cifar10_imb12_cpu_s0"),
    (train_student, "vit", None), (deit3, "deit-iii", None)])
def test_every_method_runs_from_one_command(module, method, teacher, own_runs, tmp_path):
    """Settings that do not arrive, a teacher that is another method's, a head too many."""
    flags = [*SMALL, *own_runs, "--epochs", "1", "--out", "run"]
    if module is train_student:
        flags += ["--method", method]
    train(module, *flags)
    result, state = read("run", "result.json"), checkpoint("run")
    assert result["method"] == method and result["teacher"] == teacher
    changed = (train_student.METHODS | train_student.BASELINES)[method]
    assert {name: state["config"][name] for name in changed} == changed
    distilled = teacher is not None
    heads = {"cls", "dist", "avg"} if distilled else {"cls", "avg"}
    assert result.keys() & {"cls", "dist", "avg"} == heads
    assert ("head_dist.weight" in state["model"]) == distilled
    assert ("teacher_accuracy" in records("run")[0]) == distilled
    assert ("blocks.0.gamma_1" in state["model"]) == (method == "deit-iii")
    runs = [path.name for path in tmp_path.glob("runs/*")]
    assert runs == ([teacher.removeprefix("runs/")] if distilled else [])
    network = networks.load_network("run")              # its settings say which network it is
    assert network.net.distilled == distilled and network.config["method"] == method


def test_crt_trains_a_new_classifier_and_nothing_else(own_runs, tmp_path, monkeypatch, capsys):
    """A body that is trained too, a classifier that is not; draws that are not balanced; a plain
    ViT that is trained twice."""
    orders, balanced = [], crt.class_balanced

    def recorded(args, data, epoch):
        orders.append(balanced(args, data, epoch))
        return orders[-1]
    monkeypatch.setattr(crt, "class_balanced", recorded)
    flags = [*SMALL, *own_runs, "--stem", "conv"]       # its BatchNorm would learn in training mode
    train(crt, *flags, "--out", "run")
    first, = tmp_path.glob("runs/vit_*")
    before, after = checkpoint(first)["model"], checkpoint("run")["model"]
    for name, w in after.items():
        assert torch.equal(w, before[name]) != name.startswith("head"), name
    config = checkpoint("run")["config"]
    assert (config["epochs"], config["method"]) == (1, "vit-crt") and len(records("run")) == 1
    assert config["finetune"] == str(first.relative_to(tmp_path))
    assert orders and all(len(order) == 89 for order in orders)
    assert read("run", "result.json")["teacher"] is None
    capsys.readouterr()
    train(crt, *flags, "--out", "again", "--overwrite")
    assert f"{first.relative_to(tmp_path)} is finished" in capsys.readouterr().out
    torch.testing.assert_close(checkpoint("again")["model"], after, rtol=0, atol=0)


def test_crts_samples_are_balanced():
    """The long tail's own order under that name."""
    labels = torch.arange(3).repeat_interleave(torch.tensor([200, 40, 10]))
    data = argparse.Namespace(train_labels=labels)
    args = argparse.Namespace(seed=0)
    drawn = torch.cat([crt.class_balanced(args, data, epoch) for epoch in range(40)])
    found = torch.bincount(labels[drawn]).double() / len(drawn)         # 10,000 draws
    assert (found - 1 / 3).abs().max() < 5 * (2 / 9 / len(drawn)) ** 0.5
    assert len(drawn[drawn >= 240].unique()) == 10


def test_deit3s_loss_asks_of_each_class_whether_it_is_there():
    """Only the larger part of a mixed image as a yes."""
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    sigmoid = 1 / (1 + (-logits.double()).exp())
    expected = -(sigmoid[0, 0].log() + sigmoid[0, 1].log() + (1 - sigmoid[0, 2]).log()) / 3
    found = deit3.binary_cross_entropy(logits, torch.tensor([[0.7, 0.3, 0.0]]))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_deit3_trains_with_its_own_loss_and_images(monkeypatch):
    """A ViT with LayerScale, cross-entropy and the student's augmentation under DeiT-III's name."""
    given = {}
    monkeypatch.setattr(deit3, "parse", lambda: argparse.Namespace(device="cpu", amp="none"))
    monkeypatch.setattr(train_student, "run_student", lambda args, rt, **more: given.update(more))
    deit3.main()
    assert given == dict(augment_images=deit3.augment_images, label_loss=deit3.binary_cross_entropy)


@pytest.mark.parametrize("crop, cropped", [
    ("padded", [("random_crop_flip", 4), ("resize", 64)]),
    ("resized", [("random_resized_crop", 64)]), ("loader", [])])
def test_deit3s_images_are_cropped_augmented_and_erased(crop, cropped, monkeypatch):
    """DeiT-III without 3-Augment, or with another crop than its recipe's."""
    calls = []

    def step(name):
        def replaced(images, *args, **more):
            calls.append((name, *args, *more.values()))
            return images
        return replaced
    for name in ("random_crop_flip", "random_resized_crop", "resize", "random_erasing"):
        monkeypatch.setattr(augment, name, step(name))
    monkeypatch.setattr(deit3, "three_augment", step("three_augment"))
    args = argparse.Namespace(crop=crop, img_size=64, erasing=0.3)
    deit3.augment_images(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), args)
    assert calls == [*cropped, ("three_augment",), ("random_erasing", 0.3)]


def test_deit3_solarizes_from_128_and_jitters_by_0_3(monkeypatch):
    """Another threshold, or colours that stay as they are."""
    seen = []
    monkeypatch.setattr(deit3, "color_jitter", lambda images, *s: (seen.append(s), images)[1])
    torch.manual_seed(0)
    image = torch.tensor([127, 128], dtype=torch.uint8).repeat(8).expand(300, 3, 16, 16)
    made = deit3.three_augment(image)
    assert seen == [(0.3, 0.3, 0.3)]
    assert (made == 127).flatten(1).all(dim=1).sum() > 60           # 128 becomes 127


def test_deit3s_images_are_gray_solarized_or_blurred():
    """An augmentation that returns its input."""
    torch.manual_seed(0)
    bands = torch.tensor([40, 220], dtype=torch.uint8).repeat(8)        # columns of two values
    image = bands.expand(3, 16, 16) // torch.tensor([1, 2, 4], dtype=torch.uint8)[:, None, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deit3, "color_jitter", lambda images, *_: images)
        made = deit3.three_augment(image.expand(300, -1, -1, -1))
    gray = (made[:, 0] == made[:, 1]).flatten(1).all(dim=1)
    inverted = torch.where(image[0] < 128, image[0], 255 - image[0])
    solarized = (made[:, 0] == inverted).flatten(1).all(dim=1)
    rest = made[~gray & ~solarized][:, 0].float()
    assert all(60 < n < 140 for n in (gray.sum(), solarized.sum(), len(rest)))
    assert (rest.std(dim=-1) < image[0].float().std(dim=-1).mean()).all()       # blurred


def test_student_and_teacher_are_compared_on_the_images_that_are_reported(teach, monkeypatch):
    """The student on whole images in the teacher's row and in the tokens' cosine."""
    crops, student_input = set(), evaluation.student_input

    def recorded(x, img_size, eval_crop):
        crops.add((img_size, eval_crop))
        return student_input(x, img_size, eval_crop)
    monkeypatch.setattr(evaluation, "student_input", recorded)
    teach(OneClass(), "--eval-crop", "0.5")
    assert crops == {(16, 0.5)} and read("run", "result.json")["teacher_avg"]


def test_a_fast_stem_begins_with_the_teachers_blocks(own_runs, monkeypatch):
    """A student that trains, or is fine-tuned, from another stem than it says."""
    teachers = []

    def load_teacher(*_):
        torch.manual_seed(len(teachers) + 1)
        net = resnet.make("fast", 10, img_size=16).eval()
        net.blocks[0].bn1.weight.data.uniform_()
        net.origin = []
        teachers.append(net)
        return net, "fast"
    monkeypatch.setattr(train_student, "load_teacher", load_teacher)
    flags = [*SMALL, *own_runs, *"--stem fast --lr 0 --epochs 1 --teacher a.pth --out".split()]
    train(train_student, *flags, "run")
    train(train_student, *flags, "tuned", "--finetune", "run")
    for folder in ("run", "tuned"):
        found = checkpoint(folder)["model"]["patch_embed.blocks.0.bn1.weight"]
        torch.testing.assert_close(found, teachers[0].blocks[0].bn1.weight.detach())
    assert not torch.equal(teachers[0].blocks[0].bn1.weight, teachers[1].blocks[0].bn1.weight)


def test_crt_without_mixing(own_runs):
    """A second run that is refused after the whole first one: nothing changes at --drw-epoch."""
    train(crt, *SMALL, *own_runs, "--mixup", "0", "--cutmix", "0", "--out", "run")
    assert read("run", "result.json")["method"] == "vit-crt"


# ---- Modes of distillation -----------------------------------------------------------------------

@pytest.mark.parametrize("flags, head", [
    ("--tokens 1", "cls"), ("--tokens 1 --distill soft --tau 3", "cls"), ("", "dist"),
    ("--distill soft", "dist"), ("--teacher-view weak --mixup 0 --cutmix 0", "dist")])
def test_every_mode_of_distillation_learns_from_its_teacher(flags, head, teach):
    """With --alpha 1 only the teacher counts. It gives all images one label, so that the head that
    it teaches learns that, whatever the labels are; the other head stays about where it began."""
    teacher = OneClass()
    log = teach(teacher, *"--epochs 4 --drw-epoch 4 --lr 0.01 --eval-every 4 --alpha 1".split(),
                *flags.split())
    taught = log[-1][head]
    assert (taught["head"], taught["mid"]) == (0, 0)
    assert taught["tail"] == pytest.approx(100 / 3, abs=1e-3)
    # Once before the training, on clean images; 4 epochs of 3 steps; the table at the end.
    assert teacher.calls == 1 + 4 * 3 + 1 and log[-1]["loss"] == pytest.approx(log[-1]["loss_dist"])
    assert log[-1]["loss_dist"] < 0.5 * log[0]["loss_dist"]
    if head == "dist":
        assert log[-1]["loss_cls"] > 0.8 * log[0]["loss_cls"]


def test_a_teacher_that_fails_once_costs_one_step(teach):
    """A running label distribution that stays NaN after it, and with it every later loss."""
    class Failing(OneClass):
        def forward(self, x):
            logits = super().forward(x)
            return logits * math.nan if self.calls == 2 else logits
    log = teach(Failing(), *("--logit-adjustment --distill soft --beta 0 --epochs 1 "
                             "--drw-epoch 0").split())
    assert log[0]["skipped"] == 1 and 0 < log[0]["loss_dist"] < 10
    assert checkpoint("run")["teacher_prior"].sum().item() == pytest.approx(1)


# ---- Several teachers ----------------------------------------------------------------------------

@pytest.fixture
def three_teachers(own_runs):
    """(names of three files, their data): each with the classes in an order of its own."""
    args = argparse.Namespace(dataset="cifar10", imb=12, imb_type="exp", data_dir=own_runs[1],
                              img_size=16, holdout=None, train_list=None, test_list=None,
                              skip_bad=False)
    data = load_data(args, runtime.setup("cpu", "none"))
    config, files = dict(arch="resnet32", loss="ce", img_size=8), []
    for seed in range(3):
        torch.manual_seed(seed)
        net = build_teacher(config, 10)
        torch.nn.init.normal_(net.classifier.weight, std=0.5)       # sure, and different
        names = [data.class_names[k] for k in torch.randperm(10)]
        files.append(f"{seed}.pth")
        torch.save({"model": net.state_dict(), "class_names": names, "config": config,
                    "counts": data.counts}, files[-1])
    return files, data


def test_a_student_of_several_teachers(three_teachers, own_runs, tmp_path, refused):
    """A name that says the first one only; a file that is no teacher among them."""
    train(train_student, *SMALL, *own_runs, "--epochs", "1", "--teacher", "0.pth,1.pth")
    run, = tmp_path.glob("runs/*")
    assert checkpoint(run)["config"]["teacher"] == "0.pth,1.pth"
    assert "dist" in read(run, "result.json")
    bad = [*SMALL, *own_runs, "--out", "bad", "--teacher"]
    assert "no.pth" in refused(train_student, *bad, "0.pth,no.pth")
    assert "is not a teacher" in refused(train_student, *bad, f"0.pth,{run}")
    assert "a name is empty" in refused(train_student, *bad, "0.pth,")
    state = torch.load("2.pth", weights_only=True)
    state["config"]["img_size"] = 12
    torch.save(state, "other.pth")
    assert "--teacher-size" in refused(train_student, *bad, "0.pth,other.pth")
    assert not (tmp_path / "bad").exists()


def test_several_teachers_are_evaluated_as_one(three_teachers, own_runs, monkeypatch, capsys,
                                               tmp_path):
    """The accuracy of the first one; tables that seem to be those of the first one alone."""
    files, data = three_teachers
    flags = ["eval", ",".join(files), *DATA[:4], *own_runs, "--device", "cpu"]
    script(analyze, monkeypatch, *flags, "--out", "three.csv")
    rt = runtime.setup("cpu", "none")
    ensemble, _ = load_teacher(",".join(files), data, rt)
    expected = evaluation.evaluate_teacher(ensemble, data, rt)["avg"]
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("avg"))
    assert [float(x) for x in line.split()[1:]] == [
        round(expected[column], 1) for column in evaluation.COLUMNS]
    script(analyze, monkeypatch, *flags)
    assert [file.name for file in tmp_path.glob("*per_class.csv")] == [
        "0_with_1.pth+2.pth_per_class.csv"]
