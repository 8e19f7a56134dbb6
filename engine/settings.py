r"""Settings of a run: each is stated once, in a table at the top of its training script.

A row of that table is a `Setting`: name, the paper's value, what is allowed, what it is. Flags,
their types, ranges and `--help` follow from it. A recipe is a dict of the settings that it changes.
A run's settings are the table, changed by its recipe, by its method or loss, then by flags.
"""
import argparse
import hashlib
import math
import os
import re
import sys
from dataclasses import dataclass

import data_lt
from engine.runtime import UserError
from images.files import class_name, shown


@dataclass(frozen=True)
class Setting:
    name: str
    value: object               # the paper's; its type is the flag's type
    allowed: object             # an Interval, several choices, or None: anything
    help: str

    def check(self, value):
        """UserError for a value that is not allowed."""
        if self.allowed is None or value in self.allowed:
            return
        if isinstance(self.allowed, Interval):
            raise UserError(f"{flag(self.name)} must be {self.allowed}, not {value}")
        choices = ", ".join(map(str, self.allowed))
        raise UserError(f"{flag(self.name)} is one of {choices}, not {value}")


@dataclass(frozen=True)
class Interval:
    low: float
    high: float = math.inf

    def __contains__(self, value):
        return self.low <= value <= self.high and value < math.inf      # False for NaN

    def __str__(self):
        if self.high == math.inf:
            return f"at least {self.low:g}"
        return f"from {self.low:g} to {self.high:g}"


# Settings of both scripts that say which images there are, and how a run goes.
DATA_SETTINGS = ("dataset", "imb", "imb_type", "holdout", "holdout_by", "train_list", "test_list",
                 "list_columns", "groups")
CARRIED = (*DATA_SETTINGS, "data_dir", "seed", "device", "amp", "save_every", "compile", "skip_bad")
NOT_RESUMED = ("out", "resume", "overwrite", "force", "device", "data_dir", "compile",
               "checkpointing", "save_every", "skip_bad", "eval_every", "fitted")  # free to differ
# What follows from --minutes (engine/minutes.py) where no flag says it.
FITTED = ("epochs", "eval_every", "warmup_epochs", "drw_epoch", "ema")
# Of a student's --minutes, for its teacher: a CNN learns from fewer epochs than a ViT, and a
# teacher that is trained already leaves the student all of them.
TEACHER_SHARE = 0.4
SHORTEST = 0.1          # of --minutes


class Parser(argparse.ArgumentParser):
    """One line for each flag: no list of all flags as usage, no choices spelled out."""

    def __init__(self, description):
        def formatter(prog):
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=24, width=100)
        spec = getattr(sys.modules["__main__"], "__spec__", None)       # of python -m
        super().__init__(prog=f"-m {spec.name}" if spec else None, description=description,
                         usage="python %(prog)s [--flag value ...]", formatter_class=formatter,
                         allow_abbrev=False)

    def parse_known_args(self, *args, **kwargs):
        return self.expanded(*super().parse_known_args(*args, **kwargs))

    def parse_known_intermixed_args(self, *args, **kwargs):     # newer ones do not call the above
        return self.expanded(*super().parse_known_intermixed_args(*args, **kwargs))

    @staticmethod
    def expanded(options, rest):
        """Shells expand "~" neither after a "=" nor after a comma; "$X" may be empty."""
        def expand(name, value):
            if value == "":
                raise UserError(f"{flag(name)} is empty: give it a value, or leave it out")
            if isinstance(value, list):
                return [expand(name, each) for each in value]
            if isinstance(value, str):
                return ",".join(os.path.expanduser(part.lstrip()) if part.lstrip()[:1] == "~"
                                else part for part in value.split(","))
            return value
        for name, value in vars(options).items():
            setattr(options, name, expand(name, value))
        return options, rest


def add_run_flags(parser):
    """The flags that both training scripts have."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", default="cifar10", choices=data_lt.DATASETS, metavar="NAME",
                      help=f"{', '.join(data_lt.DATASETS)} [cifar10]")
    data.add_argument("--imb", type=float, metavar="N",
                      help="imbalance n_max / n_min [100; folder and large sets: as they are]")
    data.add_argument("--imb-type", default="exp", choices=("exp", "step"), metavar="TYPE",
                      help="shape of the tail: exp or step [exp]")
    data.add_argument("--data-dir", default="data", metavar="DIR",
                      help="CIFAR's folder (downloaded if missing), or of your images [data]")
    data.add_argument("--holdout", type=float, metavar="SHARE",
                      help="test on this share of each class; needed without test images")
    data.add_argument("--holdout-by", metavar="GROUP",
                      help="with --holdout: equal matches of this regular expression in the "
                           "paths, or in this column of a list, stay on one side")
    data.add_argument("--train-list", metavar="FILE",
                      help="images by a list: CSV with image,label[,split][,group], or lines "
                           "'path label'; paths are relative to --data-dir")
    data.add_argument("--test-list", metavar="FILE", help="the same for the test images")
    data.add_argument("--list-columns", metavar="NAMES",
                      help="of a CSV list: image=...,label=...,split=...,group=... [those words]")
    data.add_argument("--groups", type=group_limits, metavar="A,B",
                      help="own data, lists: head has more than A training images, tail fewer "
                           "than B [100,20, or thirds]")
    data.add_argument("--skip-bad", action="store_true",
                      help="list unusable images and continue without them [list and stop]")
    run = parser.add_argument_group("run")
    run.add_argument("--recipe", default="auto", metavar="NAME",
                     help="paper, cpu, ours; gpu: ours, larger, for CIFAR [GPU: paper; else cpu, "
                          "for own images ours]")
    run.add_argument("--minutes", type=float, metavar="N",
                     help="as many epochs as fit here; 40 %% of it for a student's missing teacher")
    run.add_argument("--seed", type=int, default=0, metavar="N",
                     help="of weights, order and augmentation [0]")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    run.add_argument("--amp", default="auto", choices=("auto", "bf16", "fp16", "none"),
                     metavar="TYPE", help="autocast: bf16, fp16, none [bf16 where it is faster]")
    run.add_argument("--compile", action="store_true",
                     help="torch.compile the network: for a GPU; takes minutes at first")
    run.add_argument("--out", metavar="DIR", help="run folder [runs/<name of the settings>]")
    run.add_argument("--save-every", type=save_interval, default="10m", metavar="N",
                     help="checkpoint every N steps, or minutes with an m [10m]")
    again = run.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue where the run stopped")
    again.add_argument("--overwrite", action="store_true", help="start again in the same folder")
    run.add_argument("--force", action="store_true", help="resume although settings have changed")
    return run


def save_interval(text):
    """argparse type: "500" (steps) or "10m" (minutes), above 0; returned as it is."""
    try:
        number = float(text.removesuffix("m"))
    except ValueError:
        number = 0
    if not 0 < number < math.inf or not (text.endswith("m") or text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number of steps, such as 500, or "
                                         "of minutes, such as 10m")
    return text


def group_limits(text):
    """argparse type: "100,20", two whole numbers, the larger one first; returned as it is."""
    try:
        above, below = map(int, text.split(","))
    except ValueError:
        above, below = 0, 0
    if not 1 <= below <= above:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not A,B: two numbers of training "
                                         "images, the larger first, as in 100,20")
    return text


def add_settings(parser, table):
    """A flag of the same name for every Setting; None when it is not given."""
    group = parser.add_argument_group(
        "settings of the recipe [the paper's value for CIFAR; a run's own: config.json]")
    for setting in table:
        text = f"{setting.help} [{setting.value}]"
        if isinstance(setting.value, bool):
            group.add_argument(flag(setting.name), action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = type(setting.value)
            group.add_argument(flag(setting.name), type=kind, help=text, metavar="X")


def flag(name):
    return "--" + name.replace("_", "-")


def as_flags(args, names):
    """The settings of these names as command-line flags; those that are unset are left out."""
    flags = []
    for name in names:
        value = getattr(args, name)
        if value is True:
            flags.append(flag(name))
        elif value is not None and value is not False:
            flags.append(f"{flag(name)}={value}")
    return flags


def flags_of_teacher(args):
    """The flags of a student's teacher that are the student's too; its share of the minutes."""
    flags = as_flags(args, (*CARRIED, "recipe"))
    if args.dataset == "folder" and args.recipe == "ours":      # both see the same pixels
        flags.append(f"--img-size={args.img_size}")
    if args.minutes is not None:
        flags.append(f"--minutes={max(SHORTEST, TEACHER_SHARE * args.minutes):g}")
    return flags


def check_ranges(args, **ranges):
    """UserError for a setting outside its (lowest, highest) allowed value; NaN is outside."""
    for name, limits in ranges.items():
        Setting(name, None, Interval(*limits), "").check(getattr(args, name))


def check_minutes(args):
    """UserError for a flag --minutes out of range or beside --epochs.

    For flags only: the settings of a run that was measured have both.
    """
    if args.minutes is not None:
        if args.epochs is not None:
            raise UserError("--minutes decides on the epochs: give it or --epochs, not both")
        check_ranges(args, minutes=(SHORTEST, 1e5))


def resolve_data(args):
    """Fill --imb where it has a default. UserError for flags that the data set does not have."""
    check_ranges(args, seed=(0, 2 ** 62))
    args.holdout = args.holdout or None                         # 0: nothing is held out
    by_list = ("folder", *data_lt.LISTS)                        # or, folder, by its folders
    if args.imb is None and args.dataset not in by_list:
        args.imb = 100.0
    if args.holdout is not None and args.dataset == "shapes":
        raise UserError("--holdout is not for --dataset shapes")
    for name in ("holdout_by", "train_list", "test_list", "list_columns"):
        if getattr(args, name) and args.dataset not in by_list:
            raise UserError(f"{flag(name)} is for --dataset {', '.join(by_list)}")
    if args.holdout_by and args.holdout is None:
        raise UserError("--holdout-by says what --holdout keeps together: give a share too, as in "
                        "--holdout 0.2")
    if args.dataset == "folder" and not args.train_list and (args.test_list or args.list_columns):
        raise UserError("--test-list and --list-columns go with a --train-list")
    if args.groups and args.dataset not in by_list:
        raise UserError(f"--groups is for your own data: {args.dataset} has published groups")
    if args.dataset in data_lt.LISTS and args.imb is not None:
        raise UserError(f"--imb: {args.dataset} is as imbalanced as its lists")
    if args.imb is None and args.imb_type != "exp":
        raise UserError("--imb-type is the kind of --imb, which is not given")
    if args.holdout is not None:
        check_ranges(args, holdout=(0.01, 0.9))


def pick_recipe(args, recipes, rt):
    """Replace args.recipe by its name and return its row for args.dataset, a dict.

    recipes: {recipe: {dataset: row}}. "auto" is the paper's on a GPU; without one cpu, the paper's
    method in small, but ours for a user's own images; or whichever the data set has. The teacher of
    "gpu" is that of "ours". UserError if there is none.
    """
    known = [name for name in recipes if args.dataset in recipes[name]]
    if args.recipe == "gpu" and "gpu" not in recipes:
        args.recipe = "ours"
    if args.recipe == "auto":
        order = ["cpu", *known, "paper"]
        if rt.device.type == "cuda":
            order = ["paper", *known]
        elif args.dataset == "folder":
            order = ["ours", "cpu"]
        args.recipe = next((name for name in order if name in known), "paper")
    if args.recipe not in known:
        hint = f"; use --recipe {' or '.join(known)}" if known else f" by --loss {args.loss}"
        raise UserError(f"there is no {args.recipe} recipe for {args.dataset}{hint}")
    return recipes[args.recipe][args.dataset]


def defaults(table):
    """{name: the paper's value} of a table of settings."""
    return {setting.name: setting.value for setting in table}


def fill_settings(args, table, row):
    """Set every setting that no flag gave to its value in `row`, a dict of all of them.

    --epochs changes the rest of the row's schedule in proportion; with --minutes `set_epochs` does
    so later. Returns {name: value} of the flags that differ from the row. UserError for a value
    that is not allowed.
    """
    epochs, changed = getattr(args, "epochs", None), {}
    if getattr(args, "minutes", None) is not None:
        free = [name for name in FITTED if name in row and getattr(args, name) is None]
        args.fitted = ",".join(free)
    if epochs is not None and epochs > 0:
        row = in_proportion(row, epochs / row["epochs"])
    for setting in table:
        name, default = setting.name, row[setting.name]
        given = getattr(args, name)
        if given is None:
            setattr(args, name, default)
        elif given != default:
            changed[name] = given
        setting.check(getattr(args, name))
    return changed


def in_proportion(row, epochs, steps=None):
    """A recipe's row with the parts of its schedule for a share `epochs` of its epochs.

    These are warm-up, first re-weighted epoch, and the memory of the averaged weights, which is
    counted in steps: a share `steps` of the row's (None: the same share).
    """
    parts = dict(warmup_epochs=round(epochs * row["warmup_epochs"], 2),
                 drw_epoch=round(epochs * row["drw_epoch"]))
    if row.get("ema"):
        parts["ema"] = round(row["ema"] ** (1 / (steps or epochs)), 6)
    return row | parts


def set_epochs(args, epochs, eval_every):
    """Give filled settings with --minutes this number of epochs, as --epochs would have."""
    row = in_proportion(vars(args), epochs / args.epochs)
    row |= dict(epochs=epochs, eval_every=eval_every)
    for name in args.fitted.split(","):
        setattr(args, name, row[name])


def has_second_phase(args):
    """Does anything change at --drw-epoch: classes weighted, or a student's mixing over?"""
    weighted = args.beta > 0 and getattr(args, "distill", "") != "none"
    mixing = getattr(args, "mixup", 0) + getattr(args, "cutmix", 0) > 0
    return weighted or (mixing and not args.mix_drw)


def schedule_text(args):
    """20 epochs (warm-up 1.67, 7 from --drw-epoch on), for people."""
    parts = f"warm-up {args.warmup_epochs:g}"
    if has_second_phase(args):
        parts += f", {max(0, args.epochs - args.drw_epoch) or 'none'} from --drw-epoch on"
    return f"{args.epochs} epoch{'s' if args.epochs > 1 else ''} ({parts})"


def fit_to_folder(row, survey, largest_size, given_size=None):
    """A recipe's row for a user's own folder: image size, patch size and length follow from it.

    Image size: the largest of 32, 64, 128, 224 px up to `largest_size` that is not above 1.25
    times the median shorter side. Patch size: of the given size, or this one. Epochs: as many
    samples as on CIFAR-10-LT (12,406 images), but from a quarter to three times the row's epochs.
    """
    limit = min(1.25 * survey.side, largest_size)
    size = max([32, *(size for size in (64, 128, 224) if size <= limit)])
    usual = row["epochs"]
    epochs = round(min(max(usual * 12406 / survey.images, usual / 4), 3 * usual))
    share = epochs / usual
    fitted = in_proportion(row, share, share * survey.images / 12406)
    fitted |= dict(img_size=size, epochs=epochs)
    if "patch_size" in row:
        fitted["patch_size"] = 8 if (given_size or size) < 128 else 16
    return fitted


# ---- Names of runs -------------------------------------------------------------------------------

def own_name(args):
    """What a user's own images are called: as their list, or as their folder."""
    path = os.path.splitext(args.train_list)[0] if args.train_list else args.data_dir
    return class_name(os.path.basename(os.path.abspath(path)))


def data_name(args):
    """What the data are, for a run's name: cifar10_imb100."""
    name = args.dataset
    if name == "folder":
        name = re.sub(r"[^\w.-]+", "-", own_name(args))
    if args.imb is not None:
        name += f"_imb{args.imb:g}"
        if args.imb_type == "step":
            name += "step"
    if args.holdout and args.dataset != "folder":
        name += f"_holdout{args.holdout:g}"
    if args.holdout_by:
        name += "_groups"
    return name


def run_name(kind, args, changed, longest=48):
    """Short name of a run: deit-lt_cifar10_imb100_cpu_s0.

    changed {name: value}: settings other than the recipe's, spelled out, or, where that would take
    more than `longest` characters, eight digits that stand for them (config.json has them all).
    """
    changes = "".join(f"_{name.replace('_', '')}{value}" for name, value in changed.items()
                      if name != "eval_every")
    changes = re.sub(r"[^\w.,+-]+", "-", changes)
    if len(changes) > longest:
        changes = "_" + hashlib.sha256(changes.encode()).hexdigest()[:8]
    if getattr(args, "minutes", None) is not None:
        changes = f"_min{args.minutes:g}{changes}"
    return f"{kind}_{data_name(args)}_{args.recipe}{changes}_s{args.seed}"
