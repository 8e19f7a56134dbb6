r"""Classifier re-training, cRT (Kang et al., ICLR 2020, arXiv 1910.09217), of a plain ViT.

    python -m experiments.crt --dataset cifar10 --imb 100            flags as of train_student.py

Trains `--method vit` first if it is missing. Then its classifier is trained anew, everything else
frozen, for a tenth of the epochs on class-balanced samples: a class, then one of its images. The
second run has no logit adjustment (the first has it where its recipe does), and mixes images only
where the recipe does to the end, as those for the large sets do.
DeiT-LT's authors do not say for how long, nor with which learning rate and augmentation.
"""
import argparse

import torch
from torch import nn

import data_lt
import train_student
from engine import runtime
from engine.runtime import UserError
from engine.networks import build_student
from engine.settings import has_second_phase


def class_balanced(args, data, epoch):
    """As many draws as images, with replacement, every class as often: LongTensor (N,)."""
    labels = data.train_labels.cpu()
    weight = 1 / torch.bincount(labels).double()[labels]
    generator = data_lt.epoch_generator(args.seed, epoch)
    return torch.multinomial(weight, len(labels), replacement=True, generator=generator)


def second_run(first):
    """Settings of the second run, after the first (resolved): a tenth of its epochs."""
    settings = dict(epochs=max(1, first.epochs // 10), warmup_epochs=0, weight_decay=1e-8,
                     drw_epoch=0 if has_second_phase(first) else None, repeats=None, ema=None,
                     logit_adjustment=None)
    own = dict(method="vit-crt", finetune=first.out, teacher="auto", out=None)
    return argparse.Namespace(**vars(first) | settings | own)


def parse(argv=None):
    """The settings of train_student.py. UserError for those that cRT does not have.

    The second run's epochs, a part of its name, would not be known before the first.
    """
    args = train_student.parse(argv, __doc__)
    if args.method != "deit-lt":                    # the default: none was given
        raise UserError(f"--method {args.method} is not cRT: python train_student.py has it")
    if args.minutes is not None:
        raise UserError("cRT is two runs: give --epochs instead of --minutes")
    if args.distill not in (None, "none"):
        raise UserError("--distill is not for cRT, which has no teacher")
    return args


def freeze_all_but_classifier(args):
    """A function of the network: a fresh classifier, the rest frozen and in evaluation mode."""
    def prepare(net):
        torch.manual_seed(args.seed)
        fresh = build_student(vars(args), net.head.out_features, distilled=False)
        net.head.load_state_dict(fresh.head.state_dict())
        for name, p in net.named_parameters():
            p.requires_grad_(name.startswith("head"))
        net.train = lambda mode=True: nn.Module.train(net, False)       # not even for the loop
    return prepare


def main():
    args = parse()
    rt = runtime.setup(args.device, args.amp)
    first = argparse.Namespace(**vars(args) | dict(method="vit", out=None, resume=True,
                                                   overwrite=False))
    train_student.run_student(first, rt, wait=True)
    second = second_run(first)
    second.resume, second.overwrite, second.out = args.resume, args.overwrite, args.out
    train_student.run_student(second, rt, prepare=freeze_all_but_classifier(second),
                              order_of=class_balanced)


if __name__ == "__main__":
    runtime.run_main(main)
