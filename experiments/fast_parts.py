r"""What does each part of our teacher add? FastNet trained again and again, each time without one.

    python -m experiments.fast_parts --dataset cifar10 --imb 100 --holdout 0.2 --epochs 10

    whitened stem       its filters are random and trained instead (2404.00498)
    Dirac filters       every convolution begins with random filters only (1706.00388)
    halved features     the classifier learns as fast as the rest
    mixing              no batch is mixed
    logit adjustment    plain cross-entropy, of mixed batches with label smoothing (2007.07314)

Flags as of train_teacher.py. On held-out images, since recipes are chosen by such tables. Runs are
in runs/fast_...; the same command goes on where it was stopped. No other command knows what their
networks lack.
"""
import argparse
import os

import train_teacher
from engine import runtime
from engine.evaluation import table
from engine.records import read_json
from engine.runtime import UserError
from resnet import FastNet


# ---- What is left out ----------------------------------------------------------------------------

def random_stem(net):
    net.stem.reset_parameters()
    net.stem.requires_grad_(True)


def random_filters(net):
    for block in net.blocks:
        block.conv1.reset_parameters()
        block.conv2.reset_parameters()


def whole_features(net):
    net.forward_features = lambda x: 2 * FastNet.forward_features(net, x)


def nothing(net):
    pass


PARTS = {                           # part: what leaves it out, of the new network and of settings
    "none": (nothing, {}),
    "whitened stem": (random_stem, {}),
    "Dirac filters": (random_filters, {}),
    "halved features": (whole_features, {}),
    "mixing": (nothing, {"mixing": 0.0}),
    "logit adjustment": (nothing, {"loss": "ce"}),
}


# ---- The runs ------------------------------------------------------------------------------------

def train_without(part, args, rt):
    """Train a FastNet without this part (or go on with it); returns its accuracies."""
    leave_out, settings = PARTS[part]
    args = argparse.Namespace(**vars(args) | settings)
    folder, name = os.path.split(args.out)
    name = f"{name.replace('teacher_', 'fast_', 1)}_without_{part.replace(' ', '_')}"
    args.out = os.path.join(folder, name)

    def train(args, data, net, rt, run):
        leave_out(net)
        return train_teacher.train(args, data, net, rt, run)
    train_teacher.run_teacher(args, rt, train=train)
    return read_json(args.out, "result.json")["avg"]


def resolved(args, rt):
    """Fill the settings (of train_teacher.parse) and the run folder's name; returns them."""
    if args.recipe not in ("auto", "ours") or args.arch or args.loss or args.minutes:
        raise UserError("this is about --recipe ours as it is: leave out --arch, --loss, --minutes")
    args.recipe, args.resume = "ours", True
    train_teacher.resolve(args, rt)
    return args


def main():
    args = train_teacher.parse(doc=__doc__)
    rt = runtime.setup(args.device, args.amp)
    args = resolved(args, rt)
    results = {part: train_without(part, args, rt) for part in PARTS}
    rt.print(table(results, "FastNet without"))


if __name__ == "__main__":
    runtime.run_main(main)
