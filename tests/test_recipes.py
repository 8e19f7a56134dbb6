"""Every number of every recipe, written out again by hand, through the real parse() and resolve().

`--recipe paper` is from the published scripts of DeiT-LT (students), Saddle-LongTail (LDAM) and
PaCo. A number that changes here must change in the table of departures too (results/README.md).
"""
import argparse

import pytest
import torch

import train_student
import train_teacher
from conftest import script
from engine.runtime import Runtime, UserError
from experiments import crt, deit3

CPU, GPU = Runtime(torch.device("cpu")), Runtime(torch.device("cuda"))

# ---- Students: DeiT-LT's sh/train_*.sh and arguments.py ------------------------------------------

STUDENT_CIFAR = dict(
    model="base", img_size=224, patch_size=16, stem="patch", tokens=2, layer_scale=0.0,
    epochs=1200, batch=1024, micro_batch=128,           # 2 GPUs x 128 images x 4 accumulated
    lr=0.00025,                                         # 5e-4 * 2 * 128 / 512
    warmup_epochs=5, weight_decay=0.05, drop_path=0.1,
    distill="hard", tau=1.0, teacher_view="same", alpha=0.5, logit_adjustment=False,
    drw_epoch=1100, beta=0.9999, mix_drw=False,
    repeats=3, crop="resized", rand_ops=2, magnitude=9.0, erasing=0.25,
    mixup=0.8, cutmix=1.0, smoothing=0.1,
    ema=0.99984,                                        # 0.99996 in each of 4 micro-batches
    eval_crop=0.875,                                    # 224 of 256 px
    eval_every=10)
STUDENT_IMAGENET = STUDENT_CIFAR | dict(
    epochs=1400, batch=2048, lr=0.0005, drw_epoch=1200, mix_drw=True, crop="loader")
STUDENT_PAPER = {
    "cifar10": STUDENT_CIFAR,
    "cifar100": STUDENT_CIFAR,
    "imagenet_lt": STUDENT_IMAGENET,
    "inat18": STUDENT_IMAGENET | dict(epochs=1000, drw_epoch=900),
    # 24,812 images of 20 classes and of 300 px: half of 400 epochs; re-weighted from 90 % on. As
    # many steps as 400 epochs of CIFAR-10-LT, a third of 1,200: a third of the EMA's memory.
    "folder": STUDENT_CIFAR | dict(model="small", epochs=200, warmup_epochs=2.5, drw_epoch=180,
                                   eval_crop=1.0, ema=0.99952),
}
STUDENT_CPU_CIFAR = dict(
    model="mini", img_size=32, patch_size=8, stem="patch", tokens=2, layer_scale=0.0,
    epochs=60, batch=64, micro_batch=64, lr=0.0005, warmup_epochs=5, weight_decay=0.05,
    drop_path=0.0, distill="hard", tau=1.0, teacher_view="same", alpha=0.5,
    logit_adjustment=False, drw_epoch=40, beta=0.9999, mix_drw=False, repeats=1, crop="padded",
    rand_ops=2, magnitude=9.0, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1,
    ema=0.0, eval_crop=1.0, eval_every=5)
STUDENT_CPU = {
    "cifar10": STUDENT_CPU_CIFAR,
    "cifar100": STUDENT_CPU_CIFAR,
    "shapes": STUDENT_CPU_CIFAR | dict(model="micro", stem="conv", epochs=30, lr=0.002,
                                       warmup_epochs=2, drw_epoch=15, eval_every=10),
    # The same folder, at 64 px: half of 60 epochs, re-weighted in the last third.
    "folder": STUDENT_CPU_CIFAR | dict(img_size=64, epochs=30, warmup_epochs=2.5, drw_epoch=20),
}
OURS = dict(stem="fast", lr=0.001, distill="soft", logit_adjustment=True, beta=0.0, smoothing=0.0)
STUDENT_OURS = {dataset: row | OURS for dataset, row in STUDENT_CPU.items()}
STUDENT_OURS["shapes"] |= dict(lr=0.002, stem="conv")
STUDENT_OURS["folder"] |= dict(img_size=32, rand_ops=0, erasing=0.0, mixup=0.0, cutmix=0.0)
STUDENT_GPU = STUDENT_OURS["cifar10"] | dict(
    model="small", patch_size=4, epochs=300, drw_epoch=200, batch=256, micro_batch=256, lr=0.0005,
    drop_path=0.1, ema=0.999)
STUDENTS = {"paper": STUDENT_PAPER, "cpu": STUDENT_CPU, "ours": STUDENT_OURS,
            "gpu": {"cifar10": STUDENT_GPU, "cifar100": STUDENT_GPU}}

# ---- Teachers: Saddle-LongTail's run.sh, PaCo's CIFAR-100 script ---------------------------------

LDAM_CIFAR = dict(
    arch="resnet32", loss="ldam", img_size=32, norm="cifar", augment="weak", mixing=0.0,
    epochs=200, batch=128, lr=0.1, weight_decay=0.0002,
    schedule="step", decay=0.01,                        # 0.1, from 160 on 1e-3, from 180 on 1e-5
    warmup_epochs=5, rho=0.8, rho_schedule="constant",
    drw_epoch=160, beta=0.9999, max_margin=0.5, eval_every=1)
LDAM_IMAGENET = LDAM_CIFAR | dict(
    arch="resnet50", img_size=224, norm="imagenet", epochs=90, batch=256, lr=0.2,
    schedule="cosine", warmup_epochs=0, rho=0.5, rho_schedule="step", drw_epoch=60,
    max_margin=0.3, eval_every=10)
LDAM_PAPER = {
    "cifar10": LDAM_CIFAR,
    "cifar100": LDAM_CIFAR,
    "imagenet_lt": LDAM_IMAGENET,
    "inat18": LDAM_IMAGENET | dict(lr=0.1, weight_decay=0.0001, norm="inat"),
    "folder": LDAM_CIFAR | dict(img_size=64, epochs=100, batch=64, warmup_epochs=2.5,
                                drw_epoch=80, rho=0.1),
}
LDAM_CPU_CIFAR = LDAM_CIFAR | dict(
    epochs=24, batch=64, schedule="cosine", warmup_epochs=2, rho=0.1, drw_epoch=16, eval_every=4)
LDAM_CPU = {
    "cifar10": LDAM_CPU_CIFAR,
    "cifar100": LDAM_CPU_CIFAR,
    "shapes": LDAM_CPU_CIFAR | dict(img_size=16, epochs=8, batch=32, lr=0.03, rho=0.05,
                                    rho_schedule="late", drw_epoch=5, warmup_epochs=1),
    "folder": LDAM_CPU_CIFAR | dict(img_size=64, epochs=12, warmup_epochs=1, drw_epoch=8),
}
FAST = LDAM_CPU_CIFAR | dict(arch="fast", loss="la", beta=0.0, epochs=40, batch=128,
                             weight_decay=5e-4, warmup_epochs=4, rho=0.0)
LA_OURS = {
    "cifar10": FAST | dict(mixing=0.5), "cifar100": FAST | dict(mixing=0.5),
    "shapes": FAST | dict(img_size=16, epochs=20, batch=32, lr=0.03, warmup_epochs=2),
    "folder": FAST | dict(epochs=20, warmup_epochs=2, drw_epoch=8),
}
PACO_CIFAR100 = dict(
    arch="resnet32", loss="paco", img_size=32, norm="cifar", augment="weak", mixing=0.0,
    epochs=400, batch=128, lr=0.05, weight_decay=0.0005,
    schedule="step", decay=0.1,                         # 0.05, from 320 on 5e-3, from 360 on 5e-4
    warmup_epochs=10, rho=0.05, rho_schedule="constant", beta=0.0,
    alpha=0.01, temperature=0.05, queue=1024, projection=32, key_momentum=0.999, eval_every=1)
PACO_PAPER = {
    "cifar10": PACO_CIFAR100 | dict(alpha=0.001),
    "cifar100": PACO_CIFAR100,
    "folder": PACO_CIFAR100 | dict(img_size=64, epochs=200, batch=64, warmup_epochs=5, alpha=0.002),
}
PACO_CPU_CIFAR100 = PACO_CIFAR100 | dict(
    epochs=24, batch=64, schedule="cosine", warmup_epochs=2, eval_every=4)
PACO_CPU = {
    "cifar10": PACO_CPU_CIFAR100 | dict(alpha=0.001),
    "cifar100": PACO_CPU_CIFAR100,
    "shapes": PACO_CPU_CIFAR100 | dict(epochs=12, batch=32, lr=0.03, warmup_epochs=1, alpha=0.001,
                                       eval_every=2),
    "folder": PACO_CPU_CIFAR100 | dict(img_size=64, epochs=12, warmup_epochs=1, alpha=0.002),
}
# DeiT's teacher: the student's augmentation, no SAM, so twice the epochs at equal cost.
STRONG = dict(loss="ce", augment="padded", mixing=1.0, rho=0.0, beta=0.0)
STRONG_PAPER = {name: LDAM_PAPER[name] | STRONG | dict(epochs=epochs, drw_epoch=drw) for
                name, epochs, drw in (("cifar10", 400, 320), ("cifar100", 400, 320),
                                      ("folder", 200, 160))}
STRONG_CPU = {name: LDAM_CPU[name] | STRONG | dict(epochs=epochs, drw_epoch=drw) for
              name, epochs, drw in (("cifar10", 48, 32), ("cifar100", 48, 32), ("shapes", 16, 10),
                                    ("folder", 24, 16))}
STRONG_OURS = {name: row | dict(augment="padded", mixing=1.0) for name, row in LA_OURS.items()}
# The log prior and re-weighting would do the same twice.
LA_PAPER, LA_CPU = ({name: row | dict(loss="la", beta=0.0) for name, row in rows.items()}
                    for rows in (LDAM_PAPER, LDAM_CPU))
LA, PACO, PADDED = ("--loss", "la"), ("--loss", "paco"), ("--augment", "padded")
TEACHERS = [
    ("paper", (), LDAM_PAPER), ("cpu", (), LDAM_CPU), ("ours", (), LA_OURS),
    ("paper", PACO, PACO_PAPER), ("cpu", PACO, PACO_CPU), ("ours", PACO, PACO_CPU),
    ("paper", PADDED, STRONG_PAPER), ("cpu", PADDED, STRONG_CPU), ("ours", PADDED, STRONG_OURS),
    ("paper", LA, LA_PAPER), ("cpu", LA, LA_CPU), ("ours", LA, LA_OURS),
    ("gpu", (), {name: LA_OURS[name] for name in ("cifar10", "cifar100")}),
    ("gpu", PACO, {name: PACO_PAPER[name] for name in ("cifar10", "cifar100")}),
]
ONLY_LDAM, ONLY_REWEIGHTED = {"max_margin"}, {"drw_epoch"}
ONLY_PACO = {"alpha", "temperature", "queue", "projection", "key_momentum"}


@pytest.fixture(autouse=True)
def a_folder_of_24812_images(monkeypatch):
    """--dataset folder has twice the images of CIFAR-10-LT, 20 classes, of 300 px."""
    def survey(args):
        return argparse.Namespace(images=24812, classes=20, side=300)
    for module in (train_student, train_teacher):
        monkeypatch.setattr(module, "survey", survey)


def settings_of(module, args):
    return {setting.name: getattr(args, setting.name) for setting in module.SETTINGS}


def resolved(module, *flags, rt=CPU):
    args = module.parse(list(flags))
    module.resolve(args, rt)
    return args


# ---- The recipes ---------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe, dataset", [(r, d) for r in STUDENTS for d in STUDENTS[r]])
def test_students(recipe, dataset):
    """A rate, a decay, a crop or any other number that is not the recipe's."""
    args = resolved(train_student, "--recipe", recipe, "--dataset", dataset)
    assert settings_of(train_student, args) == STUDENTS[recipe][dataset]


@pytest.mark.parametrize("recipe, flags, dataset", [(r, f, d) for r, f, rows in TEACHERS
                                                    for d in rows])
def test_teachers(recipe, flags, dataset):
    """A radius, a margin or any other number that is not the recipe's."""
    expected = {(r, f): rows for r, f, rows in TEACHERS}[recipe, flags][dataset]
    args = resolved(train_teacher, "--recipe", recipe, "--dataset", dataset, *flags)
    got = settings_of(train_teacher, args)
    idle = got.keys() - expected.keys()
    assert idle == (ONLY_LDAM | ONLY_REWEIGHTED if flags == PACO else ONLY_PACO)
    assert {name: got[name] for name in expected} == expected


@pytest.mark.parametrize("images, flags, expected", [
    (5000, (), dict(batch=32)), (5001, (), dict(batch=64)),
    (5000, ("--batch", "48"), dict(batch=48)), (5000, PACO, dict(batch=32, alpha=0.003))])
def test_a_teacher_of_few_images_has_smaller_batches(images, flags, expected, monkeypatch):
    """Too few steps for a few thousand images; a batch that was given, halved; CIFAR's alpha."""
    monkeypatch.setattr(train_teacher, "survey", lambda args: argparse.Namespace(
        images=images, classes=30, side=300))
    args = resolved(train_teacher, "--recipe", "cpu", "--dataset", "folder", *flags)
    assert {name: getattr(args, name) for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("dataset, recipe", [
    ("cifar10", "paper"), ("cifar100", "paper"), ("imagenet_lt", "paper"), ("inat18", "paper"),
    ("folder", "paper"), ("shapes", "cpu")])
def test_on_a_gpu_the_papers_recipe_is_the_default(dataset, recipe):
    """hours of a small network where the paper's was meant; shapes has no paper's."""
    assert resolved(train_student, "--dataset", dataset, rt=GPU).recipe == recipe
    assert resolved(train_teacher, "--dataset", dataset, rt=GPU).recipe == recipe


@pytest.mark.parametrize("dataset, recipe", [("cifar10", "cpu"), ("cifar100", "cpu"),
                                             ("folder", "ours"), ("shapes", "cpu")])
def test_without_one_the_small_recipe_is(dataset, recipe):
    """Years of ViT-B on a laptop; hours of SAM where somebody wants a model of own images."""
    assert resolved(train_student, "--dataset", dataset).recipe == recipe
    assert resolved(train_teacher, "--dataset", dataset).recipe == recipe
    for loss in ("ldam", "paco"):                       # ours has its own loss only
        assert resolved(train_teacher, "--dataset", dataset, "--loss", loss).recipe == "cpu"


@pytest.mark.parametrize("module, flags", [
    (train_student, "--dataset shapes --recipe paper"),
    (train_teacher, "--dataset inat18 --loss paco"),
    (train_student, "--dataset inat18 --recipe cpu"),
    (train_teacher, "--dataset shapes --recipe paper")])
def test_there_is_no_recipe_where_none_was_published_or_tried(module, flags):
    """A row of another data set in silence."""
    with pytest.raises(UserError, match="there is no .* recipe for"):
        resolved(module, *flags.split())


# ---- What a method changes -----------------------------------------------------------------------

@pytest.mark.parametrize("recipe", STUDENTS)
@pytest.mark.parametrize("method, changed, teacher", [
    ("deit-lt", {}, "runs/teacher_cifar10_imb100_RECIPE_s0"),
    ("deit", dict(beta=0.0), "runs/teacher_strong_cifar10_imb100_RECIPE_s0"),
    ("vit", dict(distill="none", tokens=1), None)])
def test_methods(recipe, method, changed, teacher):
    """deit: another teacher, no weights. vit: no teacher, one token. Nothing else differs.

    And: a CIFAR teacher of ours that is trained a second time for the gpu recipe.
    """
    args = resolved(train_student, "--recipe", recipe, "--method", method)
    expected = STUDENTS[recipe]["cifar10"] | changed
    assert settings_of(train_student, args) == expected
    if teacher:
        teacher = teacher.replace("RECIPE", "ours" if recipe == "gpu" else recipe)
        if method == "deit" and recipe == "paper":          # its crop is not the usual one
            teacher = teacher.replace("_s0", "_augmentresized_s0")
    assert args.teacher == teacher
    assert args.out == f"runs/{method}_cifar10_imb100_{recipe}_s0"
    if method == "deit":            # named, as in experiments/ablate.py: no second run of the same
        named = resolved(train_student, "--recipe", recipe, "--method", method, "--teacher",
                         "strong")
        assert vars(named) == vars(args)


@pytest.mark.parametrize("recipe", ["paper", "cpu"])
def test_deit_3(recipe):
    """LayerScale, no RandAugment or erasing, no smoothing under binary cross-entropy."""
    args = train_student.parse(["--recipe", recipe])
    args.method = "deit-iii"                            # as experiments.deit3 does
    train_student.resolve(args, CPU)
    assert settings_of(train_student, args) == STUDENTS[recipe]["cifar10"] | dict(
        distill="none", tokens=1, layer_scale=1e-4, rand_ops=0, erasing=0.0, smoothing=0.0)
    assert args.teacher is None


@pytest.mark.parametrize("given", ["--smoothing 0.1", "--rand-ops 2", "--magnitude 5"])
def test_what_deit_3_cannot_have(given, monkeypatch, capsys):
    """Of smoothed labels every class is above 0: a loss that falls and a network that learns
    nothing; an operation in a run's name that it never had."""
    monkeypatch.setattr(train_student, "run_student", lambda *given, **more: 1 / 0)
    with pytest.raises(SystemExit):
        script(deit3, monkeypatch, *given.split())
    assert f"{given.split()[0]} is not for DeiT-III" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["paper", "cpu"])
def test_classifier_retraining(recipe):
    """Of ViT's settings: a tenth of the epochs, the whole rate, no warm-up, decay or average."""
    first = resolved(train_student, "--recipe", recipe, "--method", "vit", "--seed", "3")
    second = crt.second_run(first)
    train_student.resolve(second, CPU)
    row = STUDENTS[recipe]["cifar10"]
    assert settings_of(train_student, second) == row | dict(
        distill="none", tokens=1, epochs=row["epochs"] // 10, warmup_epochs=0,
        weight_decay=1e-8, drw_epoch=0, repeats=1, ema=0.0)
    assert second.finetune == first.out == f"runs/vit_cifar10_imb100_{recipe}_s3"
    assert second.teacher is None and second.out != first.out and second.seed == 3


@pytest.mark.parametrize("name, recipe, loss", [
    ("auto", "paper", "ldam"), ("ldam", "paper", "ldam"), ("paco", "paper", "paco"),
    ("strong", "paper", "ce"), ("auto", "cpu", "ldam"), ("paco", "cpu", "paco"),
    ("auto", "ours", "la"), ("ldam", "ours", "ldam"), ("paco", "ours", "paco"),
    ("strong", "ours", "la")])
def test_a_students_own_teacher(name, recipe, loss):
    """A teacher of another loss, seed, tail or data set than the student's, or its folder."""
    args = train_student.parse(["--recipe", recipe, "--teacher", name, "--dataset", "cifar100",
                                "--imb", "50", "--imb-type", "step", "--seed", "7"])
    flags = train_student.resolve(args, CPU)
    teacher = resolved(train_teacher, *flags)
    assert (teacher.loss, teacher.dataset, teacher.imb, teacher.imb_type, teacher.seed) == (
        loss, "cifar100", 50, "step", 7)
    rows = {"ldam": LDAM_PAPER, "paco": PACO_PAPER, "ce": STRONG_PAPER}
    if recipe != "paper":
        rows = {"ldam": LDAM_CPU, "paco": PACO_CPU, "ce": STRONG_CPU, "la": LA_OURS}
    expected = rows[loss]["cifar100"]
    if name == "strong":
        crop = STUDENTS[recipe]["cifar100"]["crop"]
        expected = expected | dict(augment=crop, mixing=1.0)
    got = settings_of(train_teacher, teacher)
    assert {key: got[key] for key in expected} == expected
    assert teacher.out == args.teacher and "cifar100_imb50step" in teacher.out


def test_a_students_own_teacher_of_another_radius():
    """--teacher-rho that does not reach the teacher, or that leaves both in the usual folders."""
    usual = resolved(train_student)
    args = train_student.parse(["--teacher-rho", "0.2"])
    flags = train_student.resolve(args, CPU)
    teacher = resolved(train_teacher, *flags)
    assert teacher.rho == 0.2 and teacher.out == args.teacher != usual.teacher
    assert args.out != usual.out
