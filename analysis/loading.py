r"""What an analysis looks at: networks with their settings and data, and the logs of runs.

    load(path, rt, ...)        Network, settings, data     of a run folder, a file, several teachers
    load_networks(paths, ...)  Subjects                    the same under their names in a picture
    load_logs(paths, ...)      Logs                        reads only the text files of run folders
    run_result, run_log        what a run says of itself   checked, so that figures need not
"""
import argparse
import math
import os
import sys
from dataclasses import dataclass

from torch import nn

import data_lt
from engine.records import read_json, read_log
from engine.datasets import describe, load_data
from engine.evaluation import COLUMNS
from engine.networks import (Mirrored, joined, load_network, match_classes, match_each_other,
                             short_name, teacher_files)
from engine.runtime import UserError
from engine.settings import DATA_SETTINGS, resolve_data
from images.files import DataError, shown

# Settings that say which data to use; the command line's replace those of a run.
DATA_FLAGS = (*DATA_SETTINGS, "data_dir")
SAME_IMAGES = ("data_dir", "groups")    # of these: where images are now, how classes are grouped
HELD_OUT = ("holdout", "holdout_by")                        # which of the images are to test on


# ---- What a run says of itself -------------------------------------------------------------------

UNMEASURED = dict.fromkeys(COLUMNS, math.nan)


def run_result(path, *names):
    """The result.json of a finished run, a dict that has these names at least.

    Groups that are missing in "avg" are NaN. UserError if the file is missing or damaged.
    """
    result = read_json(path, "result.json").having(*names)
    if "avg" in names:
        result["avg"] = UNMEASURED | result["avg"]
    return {name: shown(value) if isinstance(value, str) else value
            for name, value in result.items()}


def run_log(path):
    """The epochs of a run's log.jsonl, a list of dicts. UserError if it is missing or damaged.

    Groups that are missing in a head's accuracies are NaN, and so is the loss of an epoch without a
    finite step.
    """
    log, last = read_log(path), -1
    for record in log:
        if record.having("epoch", "drw", "loss", "lr")["loss"] is None:
            record["loss"] = math.nan
        heads = {"cls", "dist", "avg"} & record.keys()
        record |= {head: UNMEASURED | record[head] for head in heads}
        if record["epoch"] <= last:
            raise UserError(f"{shown(record.source)} is damaged: epoch {record['epoch']} follows "
                            f"on {last}")
        last = record["epoch"]
    return log


# ---- Runs and networks in a picture --------------------------------------------------------------

@dataclass
class Log:
    """A run in a picture, of which only the text files are read.

    label: its name in a legend; empty if it is the only run.
    """
    label: str
    path: str

    @property
    def name(self):
        """Its name in tables."""
        return self.label or short_name(self.path)

    @property
    def source(self):
        """Which run it is, for the lines below a picture."""
        name = short_name(self.path)
        return f"{self.label}: {name}" if self.label not in ("", name) else name

    @property
    def data_text(self):
        """The data of the run, for the lines below a picture."""
        config = read_json(self.path, "config.json")
        dataset, counts = shown(config["dataset"]), config["counts"]
        if os.path.exists(os.path.join(self.path, "result.json")):
            dataset = run_result(self.path, "dataset")["dataset"]           # "CIFAR-10-LT"
        return f"{dataset} (imb {max(counts) / min(counts):.4g}, {sum(counts):,} images)"


@dataclass
class Subject(Log):
    """A network in a picture, its settings and its data."""
    net: nn.Module
    args: argparse.Namespace
    data: data_lt.LongTailData

    @property
    def data_text(self):
        return describe(self.data, self.args)


def legend_labels(paths):
    """What distinguishes the names of runs, for a legend; an empty label if there is only one.

    Whole paths where two runs have the same name.
    """
    names = [short_name(path) for path in paths]
    if len(names) == 1:
        return [""]
    if len(set(names)) < len(names):
        return [shown(path) for path in paths]
    common = set.intersection(*(set(name.split("_")) for name in names))
    labels = ["_".join(part for part in name.split("_") if part not in common) for name in names]
    return labels if all(labels) and len(set(labels)) == len(labels) else names


def load_logs(paths, labels=None):
    """The runs as Logs; nothing is read yet."""
    return [Log(label, path) for label, path in zip(labels or legend_labels(paths), paths)]


def load_networks(kind, paths, rt, labels=None, **flags):
    """The networks as Subjects. UserError for one that is not a `kind`: "student" or "teacher".

    Of several, norm and size are for those from elsewhere.
    """
    subjects = []
    for log in load_logs(paths, labels):
        more = flags
        if looks_like_run(log.path) and not all(map(looks_like_run, paths)):
            more = flags | dict(norm=None, size=None)
        subjects.append(Subject(log.label, log.path, *load_kind(kind, log.path, rt, **more)))
    return subjects


def looks_like_run(path):
    """A run folder, or a checkpoint in one, by its name? Nothing is read."""
    return os.path.isdir(path) or os.path.basename(path) in ("last.pt", "previous.pt")


def load_kind(kind, path, rt, **flags):
    """As load, but (the bare network, its settings, its data), and UserError for the other kind."""
    network, args, data = load(path, rt, **flags)
    if network.kind != kind:
        raise UserError(f"{path} is not a {kind}: it is {network.what}")
    return network.net, args, data


# ---- Loading -------------------------------------------------------------------------------------

def load(path, rt, data_flags=None, norm=None, size=None, mirror=False):
    """Run folder or checkpoint -> (Network in evaluation mode on rt.device, settings, data).

    Several joined by commas are one (engine.networks.joined), with the settings of the student, or
    else of the first. A file from elsewhere has no settings: its data are those that `data_flags`
    name, else CIFAR, and its test images are resized and cropped as usual for its size. norm, size:
    see load_network. mirror: average over an image and its mirror image. data_flags: {setting:
    value}. Raises UserError for a file that is not understood or does not fit the data.
    """
    files, data_flags = teacher_files(path), data_flags or {}
    networks = load_files(files, path, norm, size)
    first = next((network for network in networks if network.kind == "student"), networks[0])
    args = settings_of(first, path, data_flags)
    try:
        data = load_data(args, rt)
    except DataError as error:
        if "data_dir" in data_flags or os.path.isdir(args.data_dir or "."):
            raise
        raise UserError(f"{error}, where the images were in training: --data-dir says where they "
                        "are now") from None
    for file, network in zip(files, networks):
        match_classes(network, data, file)
        changed = network.data and network.data != data.fingerprint
        if changed and not names_other_data(network, data_flags, but=HELD_OUT):
            print(f"{shown(file)}: its images, or those that are held out, are others than these "
                  "or have changed since it was trained; some of the test images may have been "
                  "training images",
                  file=sys.stderr)
    return ready(networks, path, rt, mirror), args, data


def load_alone(path, rt, norm=None, size=None, mirror=False):
    """As load, but the Network alone, without any data; one that is not finished is named."""
    files = teacher_files(path)
    networks = load_files(files, path, norm, size)
    for file, network in zip(files, networks):
        if network.unfinished:
            print(f"{shown(file)} is not finished: {network.unfinished}", file=sys.stderr)
    match_each_other(networks, files)
    return ready(networks, path, rt, mirror)


def load_files(files, path, norm, size):
    """The Networks of the files of a path.

    norm and size are for those from elsewhere: a run says its own. UserError if then they are for
    none.
    """
    networks = [load_network(file) for file in files]
    if norm is None and size is None:
        return networks
    if all(network.config for network in networks):
        raise UserError(f"{shown(path)}: --norm and --size are for files from elsewhere; a run "
                        "says its own")
    return [network if network.config else load_network(file, norm, size)
            for file, network in zip(files, networks)]


def names_other_data(network, data_flags, but=()):
    """May data flags ({setting: value}) name other images than those a network was trained with?

    A file from elsewhere has no data but those that they name; yet which images its training held
    out, nobody says. but: settings that are not looked at.
    """
    if not network.config:
        return "holdout" in data_flags
    return any(value != network.config.get(name) for name, value in data_flags.items()
               if name not in (*SAME_IMAGES, *but))


def ready(networks, path, rt, mirror):
    """Networks, whose outputs are in one order, as one on rt.device."""
    network = joined(networks, path)
    if mirror:
        network.net = Mirrored(network.net).eval()
        if network.teacher is not None:
            network.teacher = Mirrored(network.teacher).eval()
        network.what += "; image and mirror image"
    for net in (network.net, network.teacher):
        if net is not None:
            net.to(rt.device)
    return network


def settings_of(network, path, data_flags):
    """A namespace of a network's settings, completed for a file that has none.

    UserError for data flags that a run with these data would refuse, too.
    """
    K, side = network.num_classes, network.net.img_size
    if not network.config and "dataset" not in data_flags and K not in (10, 100):
        raise UserError(f"{path} knows {K} classes, neither CIFAR's 10 nor 100: name its --dataset")
    assumed = dict(dataset="cifar100" if K == 100 else "cifar10", imb=None, imb_type="exp",
                   data_dir="data", img_size=side, eval_crop=side / decoded_size(network),
                   holdout=None, holdout_by=None, train_list=None, test_list=None,
                   list_columns=None, groups=None, seed=0,
                   white=network.white if network.config else None)
    config = network.config
    if data_flags.get("dataset", config.get("dataset")) != config.get("dataset"):
        config = {name: value for name, value in config.items() if name not in DATA_FLAGS}
    # Images that have become unusable are listed and left out: there is no --skip-bad here.
    args = argparse.Namespace(**assumed | config | data_flags | {"skip_bad": True})
    if data_flags.get("holdout") == 0:              # a run held images out; now there are others
        args.holdout = args.holdout_by = None
    resolve_data(args)
    return args


def decoded_size(network):
    """Side of the square that a file is decoded to before its centre is cut out, pixels.

    A student's run states its eval_crop; teachers are tested on the whole square; students from
    elsewhere as is usual for their size.
    """
    side = network.net.img_size
    if network.kind == "teacher":
        return side
    usual = 0.875 if side > 64 and not network.config else 1.0
    return round(side / network.config.get("eval_crop", usual))
