r"""Train a Vision Transformer from scratch on long-tailed images: DeiT-LT (Rangwani et al., CVPR 2024, arXiv 2404.02900).

    python train_student.py --dataset shapes                       the whole method in minutes on 2 CPU cores, no download
    python train_student.py --dataset cifar10 --imb 100            CIFAR-10-LT; paper's recipe on a GPU, a small one on a CPU
    python train_student.py --dataset cifar10 --method vit         the baseline: the same ViT without a teacher; also vit-crt,
                                                                   deit and deit-iii, see METHODS
    torchrun --nproc_per_node=2 train_student.py --dataset cifar10 --recipe paper

Published (CIFAR-10-LT, imb 100): ViT-B 62.6 %, DeiT-LT-B 84.8 % with this teacher (LDAM-DRW-SAM). What this code has
measured is in the README and under results/.

    images --augment--> --mix--> teacher: y_t = argmax g(x)          the same strongly augmented, mixed images
                             \-> student: f_c(x), f_d(x)             L = 1/2 CE(f_c, y) + 1/2 w[y_t] CE(f_d, y_t)

The teacher is trained first when it is missing (`--teacher auto`). Output: runs/<name>/ (see run_folder.py).
"""
import argparse
import os
import time
from contextlib import nullcontext
from math import inf

import torch
import torch.nn.functional as F

import augment
import data_lt
import engine
import run_folder
import train_teacher
from losses import binary_cross_entropy, distillation_loss, drw_weights, soft_cross_entropy
from networks import NORMALISATIONS, Mirrored, build_student
from vit import MODELS, STEMS, resize_pos_embed

# One row per data set. paper: the published scripts, where 2 GPUs x 128 images x 4 accumulated micro-batches make a batch of
# 1024, the learning rate follows from 2 x 128, and the EMA's decay is that of four micro-batches, 0.99996^4. cpu: the same
# method at 32 px on a small network, see the README.
PAPER = dict(model="base", img_size=224, patch_size=16, stem="patch", tokens=2, layer_scale=0.0, epochs=1200, batch=1024,
             micro_batch=128, lr=2.5e-4, warmup_epochs=5, weight_decay=0.05, drop_path=0.1, distill="hard", tau=1.0,
             teacher_sees="same", alpha=0.5, cls_loss="ce", adjust="none", drw_epoch=1100, beta=0.9999, sampling="shuffled",
             repeats=3, crop="resized", policy="rand", magnitude=9.0, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1,
             mix_drw=False, trained="all", ema=0.99984, eval_crop=0.875, eval_every=10)
CPU = PAPER | dict(model="mini", img_size=32, patch_size=8, epochs=60, batch=64, micro_batch=64, lr=5e-4, drop_path=0.0,
                   drw_epoch=40, repeats=1, crop="padded", ema=0.0, eval_crop=1.0, eval_every=5)
LARGE = PAPER | dict(epochs=1400, batch=2048, lr=5e-4, drw_epoch=1200, mix_drw=True, crop="loader")
RECIPES = {
    "paper": {"cifar10": PAPER, "cifar100": PAPER, "imagenet_lt": LARGE, "inat18": LARGE | dict(epochs=1000, drw_epoch=900),
              "folder": lambda seen: own_folder_row(PAPER | dict(model="small", crop="resized"), seen, 224, 400, 0.9)},
    "cpu": {"cifar10": CPU, "cifar100": CPU,
            "shapes": CPU | dict(model="micro", epochs=100, lr=1e-3, drw_epoch=40, eval_every=10),
            "folder": lambda seen: own_folder_row(CPU, seen, 64, 60, 2 / 3)},
}
# Ours, on top of cpu: what was better on held-out images (ablate.py search). The soft loss is divided by the number of classes;
# this alpha makes up for it, so that both heads have the same say.
BEST = dict(stem="conv2", lr=1e-3, distill="soft", adjust="both", beta=0.0)
best = lambda row, classes: row | BEST | dict(alpha=round(classes / (classes + 1), 3 if classes <= 100 else 9))
RECIPES["best"] = {"cifar10": best(CPU, 10), "cifar100": best(CPU, 100), "shapes": best(RECIPES["cpu"]["shapes"], 10),
                   "folder": lambda seen: best(RECIPES["cpu"]["folder"](seen), seen.classes)}


def own_folder_row(row, seen, largest, epochs, drw):
    """The row of a folder of one's own, after a data_lt.Survey: image size, patches and length follow from what is in it."""
    size = train_teacher.own_size(seen, largest)
    epochs = train_teacher.own_epochs(seen, epochs)
    return row | dict(img_size=size, patch_size=8 if size < 128 else 16, epochs=epochs, drw_epoch=round(drw * epochs),
                      eval_crop=1.0)


# What a method changes in its recipe's row; everything else is equal, and every change has a flag too. teacher: which one
# `--teacher auto` is, the recipe's first choice where nothing is said. after: the method whose network it goes on with.
NO_TEACHER = dict(distill="none", tokens=1)
METHODS = {
    "deit-lt": {},
    "deit": dict(teacher="strong", beta=0.0),                     # a teacher that knows such images, no re-weighting
    "deit-iii": NO_TEACHER | dict(policy="three", layer_scale=1e-4, cls_loss="bce", adjust="none", erasing=0.0, smoothing=0.0),
    "vit": NO_TEACHER,
    "vit-crt": NO_TEACHER | dict(after="vit", trained="classifier", sampling="balanced", adjust="none",    # arXiv 1910.09217
                                 repeats=1, ema=0.0),
}
OWN_TEACHERS = ("auto", "ldam", "paco", "strong")
DATA = ("dataset", "imb", "imb_type", "holdout", "train_list", "test_list")       # what says which images

HELP = {
    "model": "micro, mini, tiny, small or base",
    "img_size": "side of the student's images, pixels",
    "patch_size": "side of a patch, pixels",
    "stem": "patch: each patch is projected by itself; conv, conv2: one or two overlapping convolutions at each size that the "
            "image is halved to, down to the same grid",
    "tokens": "2: CLS and DIST; 1: CLS alone, for the teacher's labels too",
    "layer_scale": "LayerScale's first value; 0 = off",
    "epochs": "epochs of about as many samples as there are training images",
    "batch": "images per optimizer step, over all processes and accumulated micro-batches",
    "micro_batch": "images per forward pass and process, at most (a stem's BatchNorm sees that many)",
    "lr": "peak learning rate of AdamW",
    "warmup_epochs": "epochs of linear warm-up",
    "weight_decay": "of AdamW; not on biases, norms, tokens and positions",
    "drop_path": "stochastic depth rate of the last block",
    "distill": "hard: the teacher's labels; soft: its probabilities; none: no teacher",
    "tau": "temperature of --distill soft",
    "teacher_sees": "same: the student's images; mirrored: these and their mirror images, the mean of its logits counts; weak: "
                    "only cropped and flipped ones (the student's must not be mixed then)",
    "alpha": "weight of the DIST loss; 1 - alpha of the CLS loss",
    "cls_loss": "ce, or bce: binary cross-entropy, without --smoothing",
    "adjust": "none; cls, dist or both: the loss of that head knows how often each class is its label (logit adjustment), so "
              "that its logits need not: in place of re-weighting, --beta 0",
    "drw_epoch": "first epoch (0-based) with re-weighted teacher labels (and, unless --mix-drw, without mixing)",
    "beta": "of the effective number of images, for the class weights; 0 = all classes alike",
    "sampling": "shuffled: every image once; balanced: every class as often, images drawn with replacement",
    "repeats": "repeated augmentation: times an image comes up in an epoch that has it; 1 = off",
    "crop": "resized (random area and shape, to img_size), padded (pad by an eighth, shift) or loader (as resized, when the "
            "file is decoded: large sets)",
    "policy": "rand: RandAugment; three: 3-Augment; none",
    "magnitude": "of RandAugment, 0..10",
    "erasing": "probability of random erasing",
    "mixup": "Beta parameter of mixup; 0 = off",
    "cutmix": "Beta parameter of CutMix; 0 = off",
    "smoothing": "label smoothing while images are mixed",
    "mix_drw": "go on mixing in the DRW stage (published: not on CIFAR, but on ImageNet-LT and iNaturalist)",
    "trained": "all, or classifier: the rest of --finetune's network stays as it is, the classifier begins anew",
    "ema": "decay per step of the averaged weights, evaluated beside the last ones; 0 = off",
    "eval_crop": "test images are resized to img_size / eval_crop and the centre is cut out",
    "eval_every": "epochs between evaluations on the test set (the last is always evaluated)",
}
CHOICES = dict(model=MODELS, stem=STEMS, tokens=(1, 2), distill=("hard", "soft", "none"),
               teacher_sees=("same", "mirrored", "weak"), cls_loss=("ce", "bce"), adjust=("none", "cls", "dist", "both"),
               sampling=("shuffled", "balanced"), crop=("resized", "padded", "loader"), policy=("rand", "three", "none"),
               trained=("all", "classifier"))
CLS_LOSSES = {"ce": soft_cross_entropy, "bce": binary_cross_entropy}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    engine.add_run_flags(parser)
    parser.add_argument("--method", default="deit-lt", choices=METHODS, help="default: %(default)s")
    parser.add_argument("--teacher", default="auto", help="run folder of train_teacher.py, published checkpoint or state dict "
                        "of a torchvision network, or several of them joined by commas, whose probabilities are averaged; "
                        "ldam, paco or strong (plain, under the recipe's strong augmentation): the recipe's own (best: cpu's) "
                        "of the same seed, trained first if it is missing; auto: strong for deit, with --recipe best one by "
                        "logit adjustment, else ldam (default: %(default)s)")
    parser.add_argument("--teacher-rho", type=float, help="SAM's radius for the recipe's own teacher; 0: without SAM")
    parser.add_argument("--teacher-norm", choices=NORMALISATIONS, help="pixel statistics that the teacher's images are "
                        "normalised with (default: those it was trained on; the published student loop: imagenet)")
    parser.add_argument("--teacher-size", type=int, help="side of the teacher's images, pixels (default: what it is known for: "
                        "32 or 224)")
    parser.add_argument("--checkpointing", action="store_true", help="compute each block again in the backward pass rather "
                        "than keep what it computed (a stem is kept): less memory, a third more work, the same numbers")
    parser.add_argument("--finetune", metavar="RUN", help="go on with the student of a run folder at another --img-size (or "
                        "other settings): its data, teacher and recipe, a tenth of its epochs and learning rate, no warm-up or "
                        "weight decay, re-weighted from the start; all of it unless given (vit-crt: its whole learning rate)")
    engine.add_recipe_flags(parser, RECIPES, HELP)
    args = parser.parse_args(argv)
    if args.finetune:
        parser.set_defaults(**short_recipe(run_folder.load_checkpoint(args.finetune)["config"], args.method))
        args = parser.parse_args(argv)
    return args


def changes(method):
    """The settings of a recipe's row that a method replaces."""
    return {k: v for k, v in METHODS[method].items() if k not in ("teacher", "after")}


def short_recipe(config, method):
    """What a run's settings (a dict) become for --finetune, as DeiT does it (section 3): 30 of 300 epochs, hardly any decay.

    DeiT takes a hundredth of the learning rate, this a tenth, for fewer epochs; a classifier that begins anew needs the whole.
    """
    if "method" not in config:
        raise engine.UserError("--finetune takes a run of train_student.py")
    if config.get("trained") == "classifier":
        raise engine.UserError("--finetune cannot go on with a classifier's re-training; name the run that it went on with")
    own = ("out", "name", "resume", "overwrite", "force", "device", "amp", "save_every", "compile", "finetune", "skip_bad",
           "tensorboard", "wandb", "teacher_rho")
    short = {k: v for k, v in config.items() if k not in own} | dict(
        epochs=max(1, config["epochs"] // 10), lr=config["lr"] / 10, warmup_epochs=0, weight_decay=1e-8, drw_epoch=0)
    if METHODS[method].get("after") == config["method"]:
        short |= changes(method) | dict(method=method, lr=config["lr"])
    return short


def first_run(args):
    """Settings of the run that a method like vit-crt goes on with: the same as its own; None if it needs none, or has it."""
    after = METHODS[args.method].get("after")
    if after and not args.finetune:
        return argparse.Namespace(**vars(args) | dict(method=after, out=None, resume=True, overwrite=False))


def go_on_with(args, first):
    """Make of a method's settings those of its second run, after the first (resolved)."""
    vars(args).update(short_recipe(vars(first), args.method), finetune=first.out)


def finetuned_name(args):
    """Name of a run with --finetune. Raises UserError for settings that the old weights do not fit."""
    config = run_folder.LATER | run_folder.load_checkpoint(args.finetune)["config"]
    short = {k: v for k, v in short_recipe(config, args.method).items() if v != getattr(args, k, v)}          # given otherwise
    kept = *DATA, "recipe", "method", "model", "patch_size", "stem", "tokens", "layer_scale"
    if changed := [engine.flag(k) for k in kept if k in short]:
        raise engine.UserError(f"--finetune keeps {', '.join(changed)} of the run")
    crt = args.trained == "classifier"
    value = lambda key: train_teacher.name_of(args.teacher) if key == "teacher" and args.teacher else getattr(args, key)
    changed = "".join(f"_{key.replace('_', '')}{os.path.basename(str(value(key)))}" for key in short
                      if key not in ("eval_every", "data_dir", "checkpointing") and (crt or key != "img_size"))
    return f"{os.path.basename(os.path.normpath(args.finetune))}_{'crt' if crt else f'finetuned{args.img_size}'}{changed}"


def teacher_args(args):
    """Settings of the recipe's own teacher (`--teacher auto`, ldam, ...): same data, recipe and seed, its folder resumed."""
    given = engine.as_flags(args, (*DATA, "data_dir", "recipe", "seed", "device", "amp", "save_every"))
    given += [engine.flag(k) for k in ("compile", "skip_bad", "tensorboard", "wandb") if getattr(args, k)]
    kinds = {"auto": [], "strong": [f"--augment={args.crop}"]}
    given += kinds.get(args.teacher, [f"--loss={args.teacher}"])
    given += [f"--rho={args.teacher_rho}"] if args.teacher_rho is not None else []
    return train_teacher.parse(given + ["--resume"])


def resolve(args, rt):
    """Fill the recipe's settings and the run folder's name; raises UserError for settings that cannot be.

    Returns the settings of the recipe's own teacher with `--teacher auto`, ldam, paco or strong, else None.
    """
    given = set() if args.finetune else {key for key in HELP if getattr(args, key) is not None}
    engine.resolve_data(args)
    row, changed = engine.resolve_recipe(args, RECIPES, rt, changes(args.method))
    finetuned = finetuned_name(args) if args.finetune else None
    check(args, row, given, rt)
    about_teacher = {k: v for k in ("teacher_norm", "teacher_size", "teacher_rho") if (v := getattr(args, k)) is not None}
    if args.distill == "none" and (about_teacher or args.teacher not in ("auto", None)):
        raise engine.UserError(f"--method {args.method} has no teacher")
    if args.teacher is None:                                          # --finetune of a run that had none
        args.teacher = "auto"
    several = train_teacher.members(args.teacher)
    if len(several) > 1 and not set(several).isdisjoint(OWN_TEACHERS):
        raise engine.UserError(f"--teacher {args.teacher}: of several each is a run folder or a file")
    engine.check_ranges(args, **{k: (0 if k == "teacher_rho" else 1, inf) for k in about_teacher if k != "teacher_norm"})
    if args.distill != "none" and args.teacher != "auto":
        changed += "_by_" + train_teacher.name_of(args.teacher)
    changed += "".join(f"_{k.replace('_', '')}{v}" for k, v in about_teacher.items())
    args.name = finetuned or f"{args.method}_{args.model}_{engine.data_name(args)}_{args.recipe}{changed}_s{args.seed}"
    args.out = args.out or f"runs/{args.name}"
    if len(os.fsencode(os.path.basename(args.out))) > 255:
        raise engine.UserError(f"{args.name} is too long for the name of a folder: give another by --out")
    args.teacher = None if args.distill == "none" else args.teacher
    if args.teacher == "auto":
        args.teacher = METHODS[args.method].get("teacher", "auto")
    if args.teacher not in OWN_TEACHERS:
        if args.teacher_rho is not None:
            raise engine.UserError(f"--teacher-rho is for --teacher {', '.join(OWN_TEACHERS)}")
        return None
    own = teacher_args(args)
    train_teacher.resolve(own, rt)
    args.teacher = own.out
    return own


def check(args, row, given, rt):
    """Raise UserError for settings that cannot be, alone or together, and for a `given` one that has no meaning with others."""
    engine.check_choices(args, **CHOICES)
    engine.check_ranges(args, epochs=(1, inf), batch=(rt.world, inf), micro_batch=(1, inf), lr=(0, inf), img_size=(1, inf),
                        patch_size=(1, inf), layer_scale=(0, inf), warmup_epochs=(0, inf), weight_decay=(0, inf),
                        drop_path=(0, 0.99), tau=(1e-3, inf), alpha=(0, 1), beta=(0, 0.999999), repeats=(1, inf),
                        magnitude=(0, 10), erasing=(0, 1), mixup=(0, inf), cutmix=(0, inf), smoothing=(0, 1), ema=(0, 0.999999),
                        eval_crop=(0.1, 1), eval_every=(1, inf))
    idle = {"alpha", "beta", "teacher_sees"} if args.distill == "none" else set()
    idle |= {"tau"} if args.distill != "soft" else set()
    idle |= {"magnitude"} if args.policy != "rand" else set()
    if idle := [engine.flag(key) for key in sorted(idle & given)]:
        raise engine.UserError(f"{', '.join(idle)} has no meaning with --distill {args.distill} --policy {args.policy}")
    for impossible, why in (
            ((args.crop == "loader") != (row["crop"] == "loader"), "--crop loader is for data sets that stay on disk, and they "
             "have no other"),
            (args.img_size % args.patch_size, f"--img-size {args.img_size} is not a multiple of --patch-size "
             f"{args.patch_size}"),
            (args.stem != "patch" and args.patch_size not in (2, 4, 8, 16, 32), f"--stem {args.stem} halves the image: "
             f"--patch-size 2, 4, 8, 16 or 32, not {args.patch_size}"),
            (args.batch % rt.world, f"--batch {args.batch} cannot be shared by {rt.world} processes"),
            (args.distill == "none" and args.tokens == 2, "--distill none leaves DIST nothing to learn: --tokens 1"),
            (args.recipe == "best" and args.distill == "hard" and args.alpha == row["alpha"], "--recipe best has the --alpha "
             "of soft labels: give another, 0.5 for heads with the same say"),
            (args.cls_loss == "bce" and args.smoothing > 0, "--cls-loss bce takes every share for a yes: --smoothing 0"),
            (args.cls_loss == "bce" and args.tokens == 2, "--cls-loss bce: its logits have no mean with DIST's: --tokens 1"),
            (args.adjust == "dist" and args.distill == "none", "--adjust dist needs a teacher's labels"),
            (args.adjust in ("cls", "both") and args.sampling == "balanced", "--sampling balanced leaves nothing to --adjust"),
            (args.adjust in ("cls", "both") and args.cls_loss == "bce", "--adjust cls needs --cls-loss ce"),
            (args.teacher_sees == "weak" and args.mixup + args.cutmix > 0, "--teacher-sees weak: its images are not mixed, so "
             "the student's cannot be: --mixup 0 --cutmix 0"),
            (args.sampling == "balanced" and args.repeats > 1, "--sampling balanced has no --repeats"),
            (args.trained == "classifier" and not args.finetune, "--trained classifier needs --finetune")):
        if impossible:
            raise engine.UserError(why)


def new_network(args, data, rt):
    """An untrained student of these settings on the device; with --trained classifier all but its heads is frozen."""
    net = build_student(vars(args), data.num_classes, args.tokens == 2).to(rt.device)
    if args.trained == "classifier":                                  # cRT, Kang et al., ICLR 2020, arXiv 1910.09217
        for name, p in net.named_parameters():
            p.requires_grad_(name.startswith("head"))
    return net


def load_resized(net, args, data):
    """Fill a student with the weights of --finetune's run, its positions resized to the new grid of patches.

    A classifier that is to begin anew is left as it is. Raises UserError for a run that does not fit.
    """
    path = args.finetune
    state = run_folder.load_checkpoint(path, ("model", "config", "class_names"))
    if state["class_names"] != data.class_names:
        raise engine.UserError(f"--finetune {path}: that run has other classes")
    weights = dict(state["model"])
    weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], net.num_tokens, net.img_size // net.patch_size)
    fresh = {k: v for k, v in net.state_dict().items() if k.startswith("head") and args.trained == "classifier"}
    run_folder.load_weights(net, weights | fresh, path)


def parameter_groups(net, weight_decay):
    """AdamW's groups: decay for matrices, none for biases, norms, layer scales, tokens and positions."""
    decay, plain = [], []
    for name, p in net.named_parameters():
        if not p.requires_grad:
            continue
        (plain if p.ndim <= 1 or name in ("cls_token", "dist_token", "pos_embed") else decay).append(p)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def strong_augment(x, args):
    """Levels (B,3,H,W) -> (B,3,S,S) in [0,1], another draw for every image."""
    return augment.strong_augment(x, args.img_size, args.crop, args.policy, args.magnitude, args.erasing)


@torch.no_grad()
def teacher_logits(teacher, x, mirrored=False):
    """Logits (B,K) of the teacher for the student's images, brought to its own size; mirrored: the mean over both sides.

    Without antialiasing, as in the published code: 224 -> 32 px keeps every seventh pixel, noise and all.
    """
    teacher = Mirrored(teacher) if mirrored else teacher
    if x.shape[-1] != teacher.img_size:
        x = F.interpolate(x, size=teacher.img_size, mode="bicubic", antialias=False).clamp(0, 1)
    return teacher(x.contiguous(memory_format=torch.channels_last))


def teacher_says(teacher, x, levels, args):
    """y_t: the teacher's hard labels (B,) of the student's images x, or with --distill soft its logits (B,K).

    With --teacher-sees weak, of the images before their strong augmentation, levels (B,3,H,W), cropped and flipped.
    """
    if args.teacher_sees == "weak":
        x = augment.to_float(augment.random_crop_flip(levels, levels.shape[-1] // 8))
    logits = teacher_logits(teacher, x, args.teacher_sees == "mirrored")
    return logits if args.distill == "soft" else logits.argmax(dim=1)


class Objective:
    """The loss of a micro-batch: equation (1) of losses.py, of logits adjusted by the frequencies of their labels (--adjust).

    prior: pi (K,), how often a class is CLS's label, from the training images; said: how often it is DIST's, pi_t (K,), as the
    teacher has said over some hundred steps.
    """

    def __init__(self, teacher, data, args, rt):
        self.teacher, self.args, self.rt, self.cls_loss = teacher, args, rt, CLS_LOSSES[args.cls_loss]
        self.prior = torch.tensor(data.counts, device=rt.device) / sum(data.counts)
        self.said = torch.full_like(self.prior, 1 / data.num_classes)

    def __call__(self, net, x, levels, target, weight, share):
        """[L, CLS's part, DIST's part, how often the teacher is right], without a teacher [L].

        x (B,3,S,S): the student's images; levels (B,3,H,W): before augmentation; target: labels (B,), of mixed images (B,K);
        weight: class weights (K,) or None; share: of the batch that this micro-batch is.
        """
        y_t = teacher_says(self.teacher, x, levels, self.args) if self.teacher else None              # (B,), or soft (B,K)
        cls_logits, dist_logits = net(x)                                          # f_c (B,K), f_d (B,K)
        dist_logits = cls_logits if dist_logits is None else dist_logits          # --tokens 1: CLS is both
        if self.args.adjust in ("cls", "both"):
            cls_logits = cls_logits + self.prior.log()                            # f_c + ln pi, Menon et al.
        if not self.teacher:
            return [self.cls_loss(cls_logits, target)]
        if self.args.adjust in ("dist", "both"):
            dist_logits = dist_logits + self.log_said(y_t, share)                 # f_d + tau ln pi_t
        terms = distillation_loss(cls_logits, dist_logits, target, y_t, self.args.alpha, weight, self.args.tau, self.cls_loss)
        return [*terms, accuracy(y_t, target)]

    def log_said(self, y_t, share):
        """tau ln pi_t (K,), after the teacher has said y_t: hard labels (B,), or logits (B,K) of a loss that divides by tau."""
        hard, tau = y_t.ndim == 1, self.args.tau
        p = augment.smooth_one_hot(y_t, len(self.said)) if hard else (y_t.float() / tau).softmax(dim=1)              # (B,K)
        self.said.lerp_(engine.all_sum(p.mean(dim=0), self.rt) / self.rt.world, 0.01 * share)
        return (1 if hard else tau) * self.said.clamp(min=1e-3 / len(self.said)).log()            # never said: not -inf


def epoch_order(args, data, epoch):
    """Which training images an epoch shows, in order."""
    n = len(data.train_labels)
    if args.sampling == "balanced":
        return data_lt.class_balanced(data.train_labels, args.seed, epoch)
    if args.repeats > 1:
        return data_lt.repeated_augmentation(n, args.seed, epoch, args.repeats)
    return data_lt.shuffled(n, args.seed, epoch)


def train(args, data, teacher, rt, run):
    """The whole training loop. Returns {"cls", "dist", "avg" and, with --ema, "ema": accuracies of the last epoch}."""
    torch.manual_seed(args.seed)
    net = new_network(args, data, rt)
    if args.finetune and not run.resumed:
        load_resized(net, args, data)
    optimizer = torch.optim.AdamW(parameter_groups(net, args.weight_decay), lr=args.lr, fused=True)
    objective = Objective(teacher, data, args, rt)
    guard = engine.Guard(net, optimizer, rt, objective.said)
    ema = engine.EMA(net, args.ema) if args.ema > 0 else None

    def load(state):
        objective.said.copy_(state.get("said", objective.said))
        run_folder.load_weights(net, state["model"], run.checkpoint)
        optimizer.load_state_dict(state["optimizer"])
        guard.load_state_dict(state["guard"])
        if ema:
            run_folder.load_weights(ema.model, state["ema"], run.checkpoint)

    def state():
        """What a checkpoint holds beside the place in the training."""
        return dict(model=net.state_dict(), ema=ema.model.state_dict() if ema else None, optimizer=optimizer.state_dict(),
                    guard=guard.counts, said=objective.said, config=vars(args), data=data.fingerprint,
                    class_names=data.class_names, counts=data.counts, groups=data.groups)

    run.restore(load)
    model = engine.trainable(net, rt, args.compile)
    n = len(epoch_order(args, data, 0))                                           # images an epoch
    steps, results = data_lt.steps_per_epoch(n, args.batch), None
    # Micro-batches of a step, whose gradients add up: as many in every process, for each of them may exchange `said`.
    parts = min(-(-n // (steps * rt.world * args.micro_batch)), n // (steps * rt.world))
    bar = engine.progress_bar(rt, args.epochs * n, run.start_epoch * n + run.start_step * args.batch)

    for epoch in range(run.start_epoch, args.epochs):
        net.train(args.trained == "all")
        started, sums = run.begun(epoch, torch.zeros(5, device=rt.device))        # loss, CLS, DIST, teacher's accuracy; steps
        weight = drw_weights(data.counts, epoch, args.drw_epoch, args.beta)       # None, or (K,) from the DRW epoch on
        weight = None if weight is None else weight.to(rt.device)
        mixing = weight is None or args.mix_drw
        order = epoch_order(args, data, epoch)
        shares = run.steps(epoch, data_lt.shard(order, args.batch, rt.rank, rt.world))
        batches = data.batches(shares, (args.seed, epoch, rt.rank))
        for step, images, labels in batches:                                      # levels (B,3,H,W), (B,)
            engine.seed_step(args.seed, epoch, step, rt.rank)
            engine.set_lr(optimizer, engine.cosine_lr(epoch + step / steps, args.epochs, args.lr, args.warmup_epochs))
            guard.begin()
            seen = torch.zeros_like(sums)                                         # this step's
            seen[-1] = 1
            for i, (levels, target) in enumerate(zip(images.tensor_split(parts), labels.tensor_split(parts))):
                share = len(levels) / len(labels)
                x = strong_augment(levels, args)                                  # (B,3,S,S) in [0,1]
                if mixing:
                    x, target = augment.mixup_cutmix(x, target, data.num_classes, args.mixup, args.cutmix, args.smoothing)
                last = i == parts - 1                                             # only then do processes average gradients
                with nullcontext() if last or rt.world == 1 else model.no_sync():
                    with rt.autocast():
                        terms = objective(model, x, levels, target, weight, share)
                    guard.backward(share * terms[0])
                seen[:len(terms)] += share * torch.stack(terms).detach()
            guard.check()
            optimizer.step()                                                      # nothing, where a number is not finite
            optimizer.zero_grad()
            guard.end()
            sums += guard.unless_bad(seen)
            if ema:
                ema.update(net, guard.bad)
            bar.update(len(labels) * rt.world)
            if step % 20 == 0:                                                    # but for saving, the only wait for the device
                guard.stop_if_lost(epoch, step, args)
                bar.set_postfix_str(f"epoch {epoch + 1}/{args.epochs}, loss {terms[0].item():.3f}", refresh=False)
            run.after_step(epoch, step, state, sums, started)                     # saves now and then, and when asked to stop

        guard.stop_if_lost(epoch, steps - 1, args)
        engine.all_sum(sums, rt)
        mean = (sums / sums[-1]).tolist()
        speed = len(order) / (time.time() - started)
        record = guard.record() | {"drw": weight is not None, "loss": mean[0]}
        record |= {"loss_cls": mean[1], "loss_dist": mean[2], "teacher_accuracy": 100 * mean[3]} if teacher else {}
        results = None
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            results = evaluate(net, ema, data, args, rt)
            record |= {"cosine": token_cosine(net, data, args, rt)}
        run.after_epoch(epoch, state, record, results, started, speed, bar)
    bar.close()
    return results or evaluate(net, ema, data, args, rt)                          # None: there was no epoch left to run


def accuracy(y_t, target):
    """How often the teacher's labels (B,) or logits (B,K) say the true label (B,), or the larger part of a mixed one (B,K)."""
    said, truth = (y.argmax(dim=1) if y.ndim == 2 else y for y in (y_t, target))
    return (said == truth).float().mean()


# ---- Evaluation ----------------------------------------------------------------------------------------------------------

def test_images(x, args):
    """Clean float images (B,3,H,W) -> what the student is tested on, (B,3,S,S)."""
    return augment.center_crop(augment.resize(x, round(args.img_size / args.eval_crop)), args.img_size)


def heads(net, x):
    """Logits of every head the student has, and of their mean, which is the prediction."""
    cls_logits, dist_logits = net(x)
    if dist_logits is None:
        return {"cls": cls_logits, "avg": cls_logits}
    return {"cls": cls_logits, "dist": dist_logits, "avg": (cls_logits + dist_logits) / 2}


def evaluate(net, ema, data, args, rt):
    """Accuracies of every head on the test set; "ema": those of the averaged weights' mean prediction."""
    for model in [net.eval(), ema.model] if ema else [net.eval()]:
        engine.share_buffers(model, rt)                                           # --stem conv: its BatchNorm's statistics
    test = data.test_images, data.test_labels, data.groups, rt
    results = engine.evaluate(lambda x: heads(net, test_images(x, args)), *test)
    if ema:
        results["ema"] = engine.evaluate(lambda x: {"avg": heads(ema.model, test_images(x, args))["avg"]}, *test)["avg"]
    return results


@torch.no_grad()
def token_cosine(net, data, args, rt):
    """Mean cosine similarity of the final CLS and DIST tokens on (up to) 1,000 test images; None without a DIST token."""
    if not net.distilled:
        return None
    spread = torch.linspace(0, len(data.test_labels) - 1, min(1000, len(data.test_labels))).long()
    cosines = []
    for index in spread.to(rt.device).split(500):
        with rt.autocast():
            tokens, _ = net.forward_features(test_images(augment.to_float(data.test_images[index]), args))
        cosines.append(F.cosine_similarity(tokens[:, 0].float(), tokens[:, 1].float(), dim=1))
    return round(torch.cat(cosines).mean().item(), 4)


# ---- The run -------------------------------------------------------------------------------------------------------------

def main():
    args = parse()
    rt = engine.setup(args.device, args.amp)
    asked = args.resume
    if first := first_run(args):
        run_student(first, rt, asked)
        go_on_with(args, first)
    run_student(args, rt, asked)


def run_student(args, rt, asked):
    """All that one run is: its teacher first if it is missing, the student, its result and its picture. asked: to resume it."""
    own_teacher = resolve(args, rt)
    run = run_folder.Run(args.out, args, rt)
    if run.say_if_finished(args, args.method):
        return
    if asked and not run.resumed:
        rt.print(f"There is nothing to resume in {args.out}: beginning")
    own_run = run_folder.Run(own_teacher.out, own_teacher, rt) if own_teacher else None   # refuses another recipe's teacher
    data = engine.load_data(args, rt)
    engine.explain(args, data, rt)
    run.check_data(data)
    if own_run:
        own_run.check_data(data)
    teacher, to_train = None, own_run is not None and not own_run.finished
    if args.teacher and not to_train:
        teacher = read_teacher(args, data, rt)

    plan = f"{args.method} {args.model} ({args.img_size} px, patch {args.patch_size}), {args.epochs} epochs"
    if to_train:                                                                  # where images are cut to size, to its own
        cut = args.dataset in ("folder", *data_lt.LISTS) and own_teacher.img_size != args.img_size
        teacher_data = engine.load_data(own_teacher, rt) if cut else data
    like_teacher = train_teacher.new_network(own_teacher, data, rt).eval() if to_train else teacher
    seconds = seconds_of_run(args, data, rt, like_teacher, run.start_epoch)
    if to_train:
        plan = f"teacher {own_teacher.arch}, {own_teacher.epochs} epochs, then {plan}"
        seconds += train_teacher.seconds_of_run(own_teacher, teacher_data, rt, own_run.start_epoch)
    rt.print(f"{plan} on {engine.describe(data, args)}: about {engine.duration(seconds)} on {rt.hardware()}.")
    if args.recipe == "cpu":
        other = "; the paper's is --recipe paper" if args.dataset in RECIPES["paper"] else ""
        rt.print(f"Recipe cpu: a small network and a short training, for a machine without a GPU{other}.")
    if to_train:
        train_teacher.run(own_teacher, teacher_data, rt, own_run)
        teacher = read_teacher(args, data, rt)

    run.begin(args, data)
    results = train(args, data, teacher, rt, run)
    run.finish(args, data, results, method=args.method, model=args.model, teacher=args.teacher)
    rt.print("\n" + engine.tables(results, args.method, data) + f"\nRun folder: {args.out}")
    if rt.main:
        draw_summary(args.out)


def read_teacher(args, data, rt):
    """The teacher of these settings, after a line that says what it is."""
    like = (getattr(args, key, None) for key in ("teacher_norm", "teacher_size"))
    teacher, what = train_teacher.load_teacher(args.teacher, data, rt, *like)
    rt.print(f"Teacher {args.teacher}: {what}")
    return teacher


def seconds_of_run(args, data, rt, teacher, start_epoch):
    """About how long the epochs from start_epoch on will take here, all parts of a step included."""
    net, epochs = new_network(args, data, rt), args.epochs - start_epoch
    images = data.train_images[:min(args.micro_batch, args.batch // rt.world)]

    def forward(n):
        x = strong_augment(images[:n], args)
        with rt.autocast():
            if teacher:
                teacher_logits(teacher, x, args.teacher_sees == "mirrored")
            return sum(logits.sum() for logits in net(x) if logits is not None)
    to_come, tests = epochs * len(epoch_order(args, data, 0)), -(-epochs // args.eval_every)
    return engine.seconds_of_run(forward, len(images), to_come, tests, len(data.test_labels), rt)


def draw_summary(folder):
    """The run's picture, if matplotlib is installed."""
    try:
        import analyze
    except ImportError:
        print(f"(pip install matplotlib, then python analyze.py summary {folder}, for a picture)")
        return
    print(f"Picture: {analyze.summary(folder)}")


if __name__ == "__main__":
    engine.run_main(main)
