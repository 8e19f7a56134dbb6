"""engine/settings.py: tables, recipes, flags, ranges and names; which settings are refused."""
import argparse
import math
import re

import pytest
import torch

import train_student
import train_teacher
from engine import settings
from engine.run_folder import duration
from engine.runtime import Runtime, UserError
from engine.settings import Interval, Setting

CPU = Runtime(torch.device("cpu"))
TABLE = [Setting("lr", 0.1, Interval(0), "rate"), Setting("batch", 8, Interval(1), "size"),
         Setting("loss", "ce", ("ce", "focal"), "which"), Setting("mix", True, None, "mix")]


def parsed(*flags):
    parser = argparse.ArgumentParser()
    settings.add_settings(parser, TABLE)
    return parser.parse_args(flags)


def test_paths_of_flags_are_those_that_were_meant(monkeypatch):
    """A folder called "~"; --finetune "$RUN" without a RUN, and training from scratch."""
    monkeypatch.setenv("HOME", "/home/me")
    args = train_student.parse(["--out=~/run", "--teacher=a,~/b", "--finetune", "x~"])
    assert (args.out, args.teacher, args.finetune) == ("/home/me/run", "a,/home/me/b", "x~")
    assert train_student.parse(["--teacher=~/a, ~/b"]).teacher == "/home/me/a,/home/me/b"
    parser = settings.Parser("")
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--out")
    found = parser.parse_intermixed_args(["a,~/b", "--out", "~/o", "c"])
    assert (found.runs, found.out) == (["a,/home/me/b", "c"], "/home/me/o")
    for name in ("--finetune", "--out", "--teacher"):
        with pytest.raises(UserError, match=f"{name} is empty"):
            train_student.parse([name, ""])


# ---- Tables and recipes --------------------------------------------------------------------------

def test_a_run_has_the_table_changed_by_its_row_changed_by_flags():
    """A flag that the recipe overrides, a table's value that replaces the recipe's."""
    args = parsed("--lr", "0.5", "--no-mix")
    changed = settings.fill_settings(args, TABLE, settings.defaults(TABLE) | dict(batch=4))
    assert vars(args) == dict(lr=0.5, batch=4, loss="ce", mix=False)
    assert changed == dict(lr=0.5, mix=False)


def test_a_flag_that_repeats_the_recipe_changes_nothing():
    """Two folders for one run."""
    args = parsed("--batch", "4", "--mix")
    assert settings.fill_settings(args, TABLE, settings.defaults(TABLE) | dict(batch=4)) == {}


def test_recipes_are_picked_by_name_data_set_and_device():
    """A recipe of another data set, or an auto that is not what it ran as."""
    recipes = {"paper": {"a": "paper's"}, "cpu": {"a": "small", "b": "b's"}, "ours": {"b": "own"}}

    def pick(recipe, dataset, rt=CPU):
        args = argparse.Namespace(recipe=recipe, dataset=dataset)
        return settings.pick_recipe(args, recipes, rt), args.recipe
    gpu = Runtime(torch.device("cuda"))
    assert pick("auto", "a") == pick("cpu", "a") == ("small", "cpu")
    assert pick("auto", "a", gpu) == pick("paper", "a") == ("paper's", "paper")
    assert pick("auto", "b", gpu) == ("b's", "cpu")
    with pytest.raises(UserError, match="no paper recipe for b; use --recipe cpu or ours"):
        pick("paper", "b")


@pytest.mark.parametrize("flags, words", [
    (("--lr", "-1"), "--lr must be at least 0, not -1"), (("--lr", "nan"), "--lr must be"),
    (("--batch", "0"), "--batch must be at least 1"),
    (("--loss", "la"), "--loss is one of ce, focal, not la")])
def test_values_that_are_not_allowed(flags, words):
    """A NaN that no comparison is true for, a choice that is only found out epochs later."""
    with pytest.raises(UserError, match=words):
        settings.fill_settings(parsed(*flags), TABLE, settings.defaults(TABLE))


def test_every_recipes_row_knows_only_settings_of_its_table():
    """A misspelled name in a row, which would change nothing."""
    for module, tables in ((train_student, (train_student.RECIPES,)),
                           (train_teacher, (train_teacher.RECIPES, train_teacher.PACO_RECIPES))):
        names = {setting.name for setting in module.SETTINGS}
        for row in (row for recipes in tables for rows in recipes.values()
                    for row in rows.values()):
            assert row.keys() <= names
    names = {setting.name for setting in train_student.SETTINGS}
    assert all(changes.keys() <= names for changes in train_student.METHODS.values())


@pytest.mark.parametrize("module", [train_student, train_teacher])
def test_help_states_every_setting_once_and_fits_on_two_screens(module, capsys):
    """A flag without a word, a % that argparse takes for a format, three pages."""
    with pytest.raises(SystemExit) as stop:
        module.parse(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and len(text.splitlines()) <= 110
    for setting in module.SETTINGS:
        lines = [line for line in text.splitlines()
                 if re.match(rf" *{settings.flag(setting.name)}[ ,]", line)]
        assert len(lines) == 1, setting.name
        if isinstance(setting.allowed, tuple):              # else one must guess "padded"
            named = f"{setting.help} {setting.value}"
            assert all(str(choice) in named for choice in setting.allowed), setting.name


# ---- Flags and names -----------------------------------------------------------------------------

def test_settings_become_flags_that_say_the_same():
    """A teacher's flags that lose a value, or say "--skip-bad=False"."""
    args = argparse.Namespace(imb=50.0, holdout=None, skip_bad=True, compile=False, data_dir="x y",
                              seed=0)
    names = ("imb", "holdout", "skip_bad", "compile", "data_dir", "seed")
    assert settings.as_flags(args, names) == ["--imb=50.0", "--skip-bad", "--data-dir=x y",
                                              "--seed=0"]


def test_the_printed_command_of_a_student_has_the_flags_that_it_needs():
    """Unusable images that stop the student of a teacher that left them out."""
    args = train_teacher.parse("--dataset folder --imb 50 --skip-bad --epochs 3 --seed 2 "
                               "--data-dir x --recipe ours --amp none".split())
    assert sorted(train_teacher.flags_for_student(args)) == [
        "--data-dir=x", "--dataset=folder", "--imb=50.0", "--recipe=ours", "--seed=2", "--skip-bad"]
    larger = train_teacher.parse("--dataset folder --data-dir x --img-size 64".split())
    assert "--img-size=64" in train_teacher.flags_for_student(larger)       # or it sees 32 px


def test_a_share_of_0_holds_nothing_out():
    """The advice to say --holdout 0, refused because 0 is not from 0.01 to 0.9."""
    args = train_student.parse("--dataset cifar10 --holdout 0".split())
    settings.resolve_data(args)
    assert args.holdout is None


def data_args(**changes):
    usual = dict(dataset="cifar10", imb=100.0, imb_type="exp", holdout=None, data_dir="data",
                 holdout_by=None, train_list=None, test_list=None, recipe="cpu", seed=0)
    return argparse.Namespace(**usual | changes)


@pytest.mark.parametrize("changes, name", [
    ({}, "cifar10_imb100"), (dict(imb=2.5, imb_type="step"), "cifar10_imb2.5step"),
    (dict(holdout=0.1), "cifar10_imb100_holdout0.1"),
    (dict(dataset="folder", data_dir="/a/my fish/", imb=None, holdout=0.2), "my-fish"),
    (dict(dataset="folder", imb=None, train_list="/a/my list.csv"), "my-list"),
    (dict(dataset="folder", data_dir="Mu\u0308nchen", imb=None), "M\u00fcnchen"),     # of a Mac
    (dict(dataset="folder", data_dir="fish", imb=None, holdout=0.2, holdout_by="x"), "fish_groups"),
    (dict(dataset="inat18", imb=None), "inat18")])
def test_data_names(changes, name):
    """Two data sets under one name: their runs would share a folder."""
    assert settings.data_name(data_args(**changes)) == name


def test_run_names_spell_out_what_changed_or_stand_for_it():
    """Two runs in one folder; a name too long for a file system."""
    def name(**changed):
        return settings.run_name("vit", data_args(seed=3), changed)
    assert name() == "vit_cifar10_imb100_cpu_s3"
    assert name(lr=0.001, drop_path=0.1) == "vit_cifar10_imb100_cpu_lr0.001_droppath0.1_s3"
    assert name(eval_every=1) == name()                             # changes nothing of the run
    assert name(by="a/b c") == "vit_cifar10_imb100_cpu_bya-b-c_s3"
    long = {f"setting{i}": i for i in range(10)}
    assert len(name(**long)) < 50 and name(**long) != name(**long | dict(setting9=8))


@pytest.mark.parametrize("text, ok", [("500", True), ("10m", True), ("0.5m", True), ("0", False),
                                      ("1.5", False), ("-3m", False), ("nan", False),
                                      ("infm", False), ("m", False)])
def test_save_intervals(text, ok):
    """A checkpoint that is never written."""
    if ok:
        assert settings.save_interval(text) == text
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a number of steps"):
            settings.save_interval(text)


def test_durations_read_naturally():
    """20160 s, or 0.2 days."""
    texts = [duration(seconds) for seconds in (12, 204, 20160, 1100000)]
    assert texts == ["12 s", "3.4 min", "5.6 h", "12.7 days"]


# ---- A user's own folder -------------------------------------------------------------------------

def fitted(images, side, largest=224, **row):
    row = dict(epochs=60, drw_epoch=40, warmup_epochs=5, patch_size=16, img_size=224) | row
    return settings.fit_to_folder(row, argparse.Namespace(images=images, side=side), largest)


def test_image_and_patch_size_follow_from_the_images():
    """Images enlarged fourfold, or cut to patches of half an image."""
    sizes = {side: fitted(1000, side)["img_size"] for side in (10, 40, 51, 52, 103, 180, 1000)}
    assert sizes == {10: 32, 40: 32, 51: 32, 52: 64, 103: 128, 180: 224, 1000: 224}
    assert [fitted(1000, side)["patch_size"] for side in (40, 60, 130, 300)] == [8, 8, 16, 16]
    assert fitted(1000, 1000, largest=64)["img_size"] == 64
    survey = argparse.Namespace(images=1000, side=60)           # 784 patches for --img-size 224
    row = dict(epochs=60, drw_epoch=40, warmup_epochs=5, patch_size=8)
    assert settings.fit_to_folder(row, survey, 64, given_size=224)["patch_size"] == 16


def test_epochs_follow_from_the_number_of_images():
    """Minutes for a million images, days for a hundred; re-weighting after the end."""
    lengths = [tuple(fitted(n, 32)[name] for name in ("epochs", "drw_epoch", "warmup_epochs"))
               for n in (100, 6203, 12406, 24812, 10 ** 6)]
    assert lengths == [(180, 120, 15), (120, 80, 10), (60, 40, 5), (30, 20, 2.5), (15, 10, 1.25)]


def test_the_average_remembers_the_same_part_of_the_steps():
    """Averages of a folder's first weights, or of its last few only; memory is counted in steps."""
    row = dict(epochs=60, drw_epoch=40, warmup_epochs=5, ema=0.999)
    usual = settings.fit_to_folder(row, argparse.Namespace(images=24812, side=32), 64)
    assert usual["ema"] == 0.999                            # half of the epochs, as many steps
    fewer = settings.fit_to_folder(row, argparse.Namespace(images=100, side=32), 64)
    share = 180 * 100 / (60 * 12406)
    assert 1 / (1 - fewer["ema"]) == pytest.approx(1000 * share, rel=0.05)


@pytest.mark.parametrize("module, flags, expected", [
    (train_student, "--epochs 3", dict(warmup_epochs=0.25, drw_epoch=2)),
    (train_student, "--epochs 120", dict(warmup_epochs=10, drw_epoch=80)),
    (train_student, "--epochs 3 --drw-epoch 0", dict(warmup_epochs=0.25, drw_epoch=0)),
    (train_student, "--epochs 3 --warmup-epochs 5", dict(warmup_epochs=5, drw_epoch=2)),
    (train_student, "--epochs 12 --recipe paper",
     dict(warmup_epochs=0.05, drw_epoch=11, ema=round(0.99984 ** 100, 6))),
    (train_student, "--epochs 30 --method vit --recipe ours", dict(drw_epoch=20)),
    (train_teacher, "--epochs 8", dict(warmup_epochs=0.67, drw_epoch=5)),
    (train_teacher, "--epochs 20 --recipe paper", dict(warmup_epochs=0.5, drw_epoch=16)),
    (train_teacher, "--epochs 8 --drw-epoch 16", dict(drw_epoch=16))])
def test_the_schedule_shrinks_with_epochs(module, flags, expected):
    """--epochs 3: five of them warm-up, mixing to the end and never a re-weighted one."""
    args = module.parse(["--dataset", "cifar10", *flags.split()])
    module.resolve(args, CPU)
    assert {name: getattr(args, name) for name in expected} == expected


def test_a_part_of_the_schedule_that_is_in_proportion_is_not_in_the_name():
    """Two folders for one run; the same folder for runs with another warm-up."""
    def name(*flags):
        args = train_student.parse(["--epochs", "20", *flags])
        train_student.resolve(args, CPU)
        return args.out
    assert name() == name("--drw-epoch", "13") == "runs/deit-lt_cifar10_imb100_cpu_epochs20_s0"
    assert name("--drw-epoch", "12") != name() != name("--warmup-epochs", "5")


@pytest.mark.parametrize("flags, words", [
    ("--epochs 20", "20 epochs (warm-up 1.67, 7 from --drw-epoch on)"),
    ("--epochs 4 --drw-epoch 9", "4 epochs (warm-up 0.33, none from --drw-epoch on)"),
    ("--epochs 20 --beta 0", "20 epochs (warm-up 1.67, 7 from --drw-epoch on)"),    # unmixed
    ("--epochs 20 --beta 0 --mixup 0 --cutmix 0", "20 epochs (warm-up 1.67)")])
def test_people_are_told_what_the_schedule_became(flags, words):
    """A part of the method that never happens, and nobody knows."""
    args = train_student.parse(flags.split())
    train_student.resolve(args, CPU)
    assert settings.schedule_text(args) == words


# ---- Settings that are refused -------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ("--distill none", "--tokens 1"), ("--tau 3", "--tau would have no effect"),
    ("--method vit --alpha 0.9 --beta 0", "--alpha, --beta would have no effect"),
    ("--method vit --teacher ldam", "--teacher would have no effect"),
    ("--method vit --teacher-rho 0", "--teacher-rho would have no effect"),
    ("--rand-ops 0 --magnitude 3", "--magnitude would have no effect"),
    ("--mixup 0 --cutmix 0 --smoothing 0.2 --mix-drw", "--mix-drw, --smoothing would have no"),
    ("--mixup 0 --cutmix 0 --beta 0 --drw-epoch 5", "--drw-epoch would have no effect"),
    ("--teacher-view weak", "--mixup 0 --cutmix 0"),
    ("--teacher a.pth --teacher-rho 0", "--teacher-rho is for"),
    ("--teacher ldam,paco", "a run folder or a file"), ("--stem pool", "--stem is one of"),
    ("--stem conv --img-size 16 --patch-size 16", "an --img-size above --patch-size"),
    ("--stem fast --img-size 16 --patch-size 16", "an --img-size above --patch-size"),
    ("--crop loader", "--crop loader"), ("--distill medium", "--distill is one of"),
    ("--tokens 3", "--tokens is one of 1, 2"), ("--distill soft --tau 0", "--tau must be"),
    ("--teacher-rho -1", "--rho must be"), ("--magnitude 11", "--magnitude must be"),
    ("--ema 1", "--ema must be"), ("--holdout 0.95", "--holdout must be"),
    ("--seed -1", "--seed must be"), ("--train-list x", "--train-list is for --dataset folder"),
    ("--dataset shapes --holdout 0.1", "--holdout is not for"),
    ("--holdout 0.1 --holdout-by x", "--holdout-by is for --dataset folder"),
    ("--dataset folder --holdout-by x", "give a share too, as in --holdout 0.2"),
    ("--dataset folder --test-list x", "go with a --train-list"),
    ("--dataset folder --list-columns image=x", "go with a --train-list"),
    ("--dataset inat18 --recipe paper --imb 10", "--imb"),
    ("--dataset folder --imb-type step", "--imb-type is the kind of --imb"),
    ("--dataset inat18 --recipe paper --crop padded", "--crop loader")])
def test_students_that_cannot_be(flags, words):
    """Settings that exclude each other, or one that would change nothing: in one line."""
    with pytest.raises(UserError, match=words) as error:
        train_student.resolve(train_student.parse(flags.split()), CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, words", [
    ("--augment padded --loss ldam", "--loss ce"), ("--augment loader", "stay on disk"),
    ("--augment padded --beta 0.9", "give --beta 0"), ("--mixing 0.5", "needs one label"),
    ("--augment soft", "--augment is one of"),
    ("--schedule slow", "--schedule is one of"),
    ("--rho 0 --rho-schedule late", "--rho-schedule would have no effect"),
    ("--queue 3", "--queue would have no effect"), ("--decay 0.1", "--decay would have no"),
    ("--loss ce --max-margin 0.1", "--max-margin would have no effect"),
    ("--loss paco --beta 0.9", "--beta would have no effect"), ("--rho nan", "--rho must be"),
    ("--recipe ours --drw-epoch 9", "--drw-epoch would have no effect"),
    ("--loss paco --temperature 0", "--temperature must be"), ("--loss x", "--loss is one of")])
def test_teachers_that_cannot_be(flags, words):
    """As above."""
    args = train_teacher.parse(["--recipe", "cpu", *flags.split()])
    with pytest.raises(UserError, match=words) as error:
        train_teacher.resolve(args, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", [train_student, train_teacher])
def test_a_batch_that_processes_cannot_share(module):
    """A process with fewer images than the others, whose mean counts for as much."""
    with pytest.raises(UserError, match="--batch 9 cannot be shared by 2 processes"):
        module.resolve(module.parse(["--batch", "9"]), Runtime(torch.device("cpu"), 0, 2))


def test_check_ranges_knows_its_ends():
    """An end that does not belong; NaN inside."""
    args = argparse.Namespace(a=0.0, b=1.0, c=math.nan)
    settings.check_ranges(args, a=(0, 1), b=(0, 1))
    for name, limits in (("a", (0.1, 1)), ("b", (0, 0.9)), ("c", (-math.inf, math.inf))):
        with pytest.raises(UserError, match=f"--{name} must be"):
            settings.check_ranges(args, **{name: limits})
