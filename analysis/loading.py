r"""What an analysis looks at: networks with their settings and data, and the logs of runs.

    load(path, rt, ...)        Network, settings, data     of a run folder, a file, several teachers
    load_networks(paths, ...)  Subjects                    the same under their names in a picture
    load_logs(paths, ...)      Logs                        reads only the text files of run folders
"""
import argparse
import os
import sys
from dataclasses import dataclass

from torch import nn

import data_lt
from engine.checkpoints import read_json
from engine.datasets import describe, load_data
from engine.networks import (Mirrored, load_network, load_teacher, match_classes, short_name,
                             teacher_files)
from engine.runtime import UserError

# Settings that say which data to use; the command line's replace those of a run.
DATA_FLAGS = ("dataset", "imb", "imb_type", "data_dir", "holdout", "train_list", "test_list")


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
        dataset, counts = config["dataset"], config["counts"]
        if os.path.exists(os.path.join(self.path, "result.json")):
            dataset = read_json(self.path, "result.json")["dataset"]        # "CIFAR-10-LT"
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
    """What distinguishes the names of runs, for a legend; an empty label if there is only one."""
    names = [short_name(path) for path in paths]
    if len(names) == 1:
        return [""]
    common = set.intersection(*(set(name.split("_")) for name in names))
    labels = ["_".join(part for part in name.split("_") if part not in common) for name in names]
    return labels if all(labels) and len(set(labels)) == len(labels) else names


def load_logs(paths, labels=None):
    """The runs as Logs; nothing is read yet."""
    return [Log(label, path) for label, path in zip(labels or legend_labels(paths), paths)]


def load_networks(kind, paths, rt, labels=None, **flags):
    """The networks as Subjects. UserError for one that is not a `kind`: "student" or "teacher"."""
    return [Subject(log.label, log.path, *load_kind(kind, log.path, rt, **flags))
            for log in load_logs(paths, labels)]


def load_kind(kind, path, rt, **flags):
    """As load, but (the bare network, its settings, its data), and UserError for the other kind."""
    network, args, data = load(path, rt, **flags)
    if network.kind != kind:
        raise UserError(f"{path} is not a {kind}: it is {network.what}")
    return network.net, args, data


def load_student(path, rt, **flags):
    """As load, but (the student itself, its settings, its data). UserError for a teacher."""
    return load_kind("student", path, rt, **flags)


# ---- Loading -------------------------------------------------------------------------------------

def load(path, rt, data_flags=None, norm=None, size=None, mirror=False):
    """Run folder or checkpoint -> (Network in evaluation mode on rt.device, settings, data).

    Several teachers joined by commas are one (engine.networks.Ensemble), with the settings of the
    first. A file from elsewhere has no settings: its data are those that `data_flags` name, else
    CIFAR, and its test images are resized and cropped as usual for its size. norm, size: see
    load_network. mirror: average over an image and its mirror image. data_flags: {setting: value}.
    Raises UserError for a file that is not understood or does not fit the data.
    """
    files, data_flags = teacher_files(path), data_flags or {}
    network = load_network(files[0], norm, size)
    args = settings_of(network, path, data_flags)
    data = load_data(args, rt)
    if len(files) > 1:
        network.net, network.what = load_teacher(path, data, rt, norm, size)
    else:
        match_classes(network, data, path)
    if mirror:
        add_mirror(network)
    if network.data and network.data != data.fingerprint and not data_flags:
        print(f"{path}: its images have changed since it was trained; some of the test images may "
              "have been training images", file=sys.stderr)
    network.net.to(rt.device)
    return network, args, data


def settings_of(network, path, data_flags):
    """A namespace of a network's settings, completed for a file that has none."""
    K, side = network.num_classes, network.net.img_size
    if not network.config and "dataset" not in data_flags and K not in (10, 100):
        raise UserError(f"{path} knows {K} classes, neither CIFAR's 10 nor 100: name its --dataset")
    assumed = dict(dataset="cifar100" if K == 100 else "cifar10", imb=None, imb_type="exp",
                   data_dir="data", img_size=side, eval_crop=side / decoded_size(network),
                   holdout=None, train_list=None, test_list=None,
                   white=network.white if network.config else None)
    # Images that have become unusable are listed and left out: there is no --skip-bad here.
    args = argparse.Namespace(**assumed | network.config | data_flags | {"skip_bad": True})
    if args.imb is None and args.dataset not in ("folder", *data_lt.LISTS):
        args.imb = 100.0
    return args


def decoded_size(network):
    """Side of the square that a file is decoded to before its centre is cut out, pixels.

    A student's run states its eval_crop; teachers are tested on the whole square; files from
    elsewhere as is usual for their size.
    """
    side = network.net.img_size
    usual = 0.875 if side > 64 and not network.config else 1.0
    return round(side / network.config.get("eval_crop", usual))


def add_mirror(network):
    """Make a Network predict the mean over an image and its mirror image."""
    network.net = Mirrored(network.net).eval()
    network.what = f"{network.what}; image and mirror image"
