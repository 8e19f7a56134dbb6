r"""Train the CNN teacher on the long-tailed images: LDAM-DRW, or PaCo, under SAM.

    python train_teacher.py --dataset cifar10 --imb 100                LDAM-DRW-SAM, ResNet-32
    python train_teacher.py --dataset cifar10 --imb 100 --loss paco    PaCo-SAM, the paper's best
    python train_teacher.py --dataset cifar10 --recipe ours            our own: FastNet, minutes
    python train_teacher.py --dataset cifar10 --augment padded         DeiT's: strong augmentation
    python train_teacher.py --dataset shapes                           a minute or two, no download

Published for ResNet-32 on CIFAR-10-LT and CIFAR-100-LT, imbalance 100: LDAM-DRW-SAM 81.9 % and
45.4 % (Saddle-LongTail, arXiv 2212.13827; 200 epochs), PaCo-SAM 86.8 % and 52.8 % (DeiT-LT's Table
2; its training code and its rho are not published). Measured here: README.md and results/.

The LDAM teacher sees weak augmentation only, crop and flip; the student will give it strongly
augmented, mixed images. That makes DeiT-LT's distillation out-of-distribution. At the end the
script prints the teacher's accuracy and entropy on clean and on augmented, mixed images.
Output: runs/teacher_.../
"""
import shlex

import torch
from torch.nn.parallel import DistributedDataParallel

import augment
import data_lt
import losses
from engine import evaluation, runtime
from engine.datasets import describe, load_data, print_data_summary, survey
from engine.minutes import fit_epochs
from engine.networks import NORMALISATIONS, build_teacher, whiten
from engine.run_folder import Run
from engine.runtime import UserError
from engine.settings import (DATA_SETTINGS, Interval, Parser, Setting, add_run_flags, add_settings,
                             as_flags, check_minutes, defaults, fill_settings, fit_to_folder, flag,
                             pick_recipe, resolve_data, run_name, schedule_text)
from engine.training import FiniteScaler, compiled, cosine_lr, set_lr
from images.policies import color_jitter
from resnet import CIFAR_BLOCKS
from sam import SAM, frozen_batchnorm_statistics

# Every setting once: name, the paper's value for CIFAR (Saddle-LongTail's run.sh; PaCo's settings:
# its CIFAR-100 script), what is allowed, what it is.
SETTINGS = [
    Setting("arch", "resnet32", None, "resnet32, resnet50, fast or a torchvision network's name"),
    Setting("loss", "ldam", ("ce", "focal", "la", "vs", "ldam", "paco"),
            "ldam, paco, ce, focal, la (logit adjustment), vs (vector scaling)"),
    Setting("img_size", 32, Interval(1, 4096), "side of the network's images, pixels"),
    Setting("norm", "cifar", tuple(NORMALISATIONS),
            "pixel statistics to normalise with: cifar, imagenet, inat, half, none"),
    Setting("augment", "weak", ("weak", "padded", "resized", "loader"),
            "weak: shift and flip (PaCo: more); padded, resized, loader: as the student's"),
    Setting("mixing", 0.0, Interval(0, 1), "fraction of batches to mix; strong --augment: 1"),
    Setting("epochs", 200, Interval(1), "passes over the training images"),
    Setting("batch", 128, Interval(1), "images per step, all processes together"),
    Setting("lr", 0.1, Interval(0), "peak learning rate of SGD with momentum 0.9"),
    Setting("weight_decay", 2e-4, Interval(0), "of SGD"),
    Setting("schedule", "step", ("step", "cosine"), "step: drops at 80 %% and 90 %%; cosine: to 0"),
    Setting("decay", 0.01, Interval(0, 1), "factor of a drop of the step schedule"),
    Setting("warmup_epochs", 5.0, Interval(0), "epochs of linear warm-up"),
    Setting("rho", 0.8, Interval(0), "radius of SAM's perturbation; 0: plain SGD"),
    Setting("rho_schedule", "constant", ("constant", "step", "late"),
            "step: rho/10, rho/5, rho; late: 0, then rho in the last third"),
    Setting("drw_epoch", 160, Interval(0), "first epoch (from 0) with re-weighted classes"),
    Setting("beta", 0.9999, Interval(0, 0.999999), "of the class weights; 0: no re-weighting"),
    Setting("max_margin", 0.5, Interval(0, 1), "LDAM: margin of the rarest class"),
    Setting("alpha", 0.01, Interval(0), "PaCo: weight of a pair of images"),
    Setting("temperature", 0.05, Interval(1e-3), "PaCo: divides cosines"),
    Setting("queue", 1024, Interval(1), "PaCo: keys that are remembered"),
    Setting("projection", 32, Interval(1), "PaCo: dimensions of anchors and keys"),
    Setting("key_momentum", 0.999, Interval(0, 1), "PaCo: of the key encoder, per step"),
    Setting("eval_every", 1, Interval(1), "epochs between evaluations on the test set"),
]
STRONG = ("padded", "resized", "loader")    # the student's strong augmentation, by its crop
PACO_ONLY = ("alpha", "temperature", "queue", "projection", "key_momentum")
# Recipes change some of them. cpu: the same method in minutes on 2 cores. ours: a network that is
# made for a CPU, also the teacher of a student's recipe gpu; the log prior in its loss does the
# work of re-weighting.
CPU = dict(epochs=24, batch=64, schedule="cosine", warmup_epochs=2, rho=0.1, drw_epoch=16,
           eval_every=4)
SHAPES = CPU | dict(img_size=16, epochs=8, batch=32, lr=0.03, rho=0.05, rho_schedule="late",
                    drw_epoch=5, warmup_epochs=1)
OURS = CPU | dict(arch="fast", loss="la", beta=0.0, epochs=40, batch=128, weight_decay=5e-4,
                  warmup_epochs=4, rho=0.0)
OURS_CIFAR = OURS | dict(mixing=0.5)    # better on CIFAR; on few images mixing hurts
LARGE = dict(arch="resnet50", img_size=224, epochs=90, batch=256, lr=0.2, schedule="cosine",
             warmup_epochs=0, rho=0.5, rho_schedule="step", drw_epoch=60, max_margin=0.3,
             norm="imagenet", eval_every=10)
RECIPES = {
    "paper": {"cifar10": {}, "cifar100": {}, "imagenet_lt": LARGE,
              "inat18": LARGE | dict(lr=0.1, weight_decay=1e-4, norm="inat"),
              "folder": dict(rho=0.1, batch=64)},
    "cpu": {"cifar10": CPU, "cifar100": CPU, "shapes": SHAPES, "folder": CPU},
    "ours": {"cifar10": OURS_CIFAR, "cifar100": OURS_CIFAR, "folder": OURS,
             "shapes": OURS | dict(img_size=16, epochs=20, batch=32, lr=0.03, warmup_epochs=2)},
}
# --loss paco: no re-weighting, as PaCo's loss has the log prior. Neither its CIFAR-10 recipe nor
# its rho is published: this rho is Saddle-LongTail's for another method, GLMC. With ten classes an
# image has ten times as many positives in the queue as with a hundred: a tenth of alpha.
PACO = dict(loss="paco", beta=0.0, lr=0.05, weight_decay=5e-4, decay=0.1, rho=0.05)
PACO_PAPER = PACO | dict(epochs=400, warmup_epochs=10)
PACO_CPU = CPU | PACO
PACO_SHAPES = PACO_CPU | dict(epochs=12, batch=32, lr=0.03, warmup_epochs=1, alpha=0.001,
                              eval_every=2)
PACO_RECIPES = {
    "paper": {"cifar10": PACO_PAPER | dict(alpha=0.001), "cifar100": PACO_PAPER,
              "folder": PACO_PAPER | dict(batch=64)},
    "cpu": {"cifar10": PACO_CPU | dict(alpha=0.001), "cifar100": PACO_CPU, "folder": PACO_CPU,
            "shapes": PACO_SHAPES},
}


def train(args, data, net, rt, run):
    """The training loop. Returns {"avg": accuracies of the last epoch}."""
    K, paco = data.num_classes, None
    criterion = make_criterion(args, data.counts, rt.device)
    if args.loss == "paco":
        net.classifier.reset_parameters()           # uniform as published, not Kaiming-normal
        paco = losses.PaCo(net, net.classifier.in_features, args.projection, args.queue,
                           args.key_momentum).to(rt.device)
    trained = paco or net
    parameters = [p for p in trained.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(parameters, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay,
                          fused=True)
    for p in parameters:                # torch leaves momentum unset if the first step is skipped
        sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    sam = SAM(sgd, args.rho)
    model = DistributedDataParallel(trained) if rt.world > 1 else trained
    scaler = FiniteScaler(trained, sgd, rt)                             # undoes non-finite steps
    counts = torch.tensor(data.counts, device=rt.device)
    n = len(data.train_labels)
    steps = data_lt.steps_per_epoch(n, args.batch)
    passes = [2 if radius(args, epoch) > 0 else 1 for epoch in range(args.epochs)]
    run.start(args, data, dict(model=net, paco=paco, optimizer=sam, scaler=scaler), ("loss",),
              steps, n, passes)
    if args.compile:
        model = compiled(model)
    results = None

    for epoch in range(run.start_epoch, args.epochs):
        trained.train()
        run.begin_epoch(epoch)
        weight = losses.drw_weights(counts, epoch, args.drw_epoch, args.beta)   # None, then w (K,)
        sam.rho = radius(args, epoch)
        order = data_lt.shuffled(n, args.seed, epoch)
        batches = data_lt.shard(order, args.batch, rt.rank, rt.world)
        remaining = run.remaining_steps(epoch, batches)     # all, or those left after --resume
        for step, images, y in data.batches(remaining, (args.seed, epoch, rt.rank)):
            seed = (args.seed, epoch, step, rt.rank)
            runtime.seed_step(*seed)
            set_lr(sam, learning_rate(args, epoch + step / steps))
            x = view(images, args)                                      # (B,3,S,S) in [0,1]
            if draw_mixed(args):
                # No smoothing e under la, vs: e/K is far above a rare class's frequency.
                smoothing = 0.1 if args.loss == "ce" else 0.0
                x, y = augment.mixup_cutmix(x, y, K, smoothing=smoothing)       # y (B,K)
            if paco:
                key_view = to_network(augment.simclr_view(images, args.img_size))
                with rt.autocast():
                    keys = paco.keys(key_view)                          # (B,d), for both passes

            def batch_loss():
                """The batch's loss at the present weights, with the same dropout in both passes."""
                runtime.seed_step(*seed)
                with rt.autocast():
                    if paco:
                        logits, v = model(x)                            # (B,K), (B,d)
                        return criterion(logits, v, y, *paco.bank(v, keys, y))
                    return criterion(model(x), y, weight=weight)

            loss = batch_loss()
            scaler.scale(loss).backward()                               # gradient at w
            scaler.unscale_()
            if sam.rho > 0:
                sam.first_step()                                        # climb to w + e
                with frozen_batchnorm_statistics(trained):
                    scaler.scale(batch_loss()).backward()               # gradient at w + e
                scaler.unscale_()
                # Back to w, then SGD, which itself skips a step that the scaler found not finite.
                sam.second_step()
            else:
                scaler.step(sgd)
                sgd.zero_grad()
            if paco:
                paco.enqueue(runtime.gather(keys, rt), runtime.gather(y, rt))   # once a step
            finite = scaler.update()
            run.after_step(epoch, step, loss.detach()[None], finite)

        results = None
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            results = evaluation.evaluate_teacher(net, data, rt)
        run.after_epoch(epoch, results, drw=weight is not None, lr=sgd.param_groups[0]["lr"])
    return results or evaluation.evaluate_teacher(net, data, rt)        # no epoch was left


# ---- Parts of a step -----------------------------------------------------------------------------

def make_criterion(args, counts, device):
    """criterion(logits, labels, weight=(K,) or None); PaCo's: (logits, anchors, labels, *bank)."""
    if args.loss == "ce":
        return losses.cross_entropy
    if args.loss == "focal":
        return losses.focal_loss
    if args.loss == "ldam":
        criterion = losses.LDAMLoss(counts, args.max_margin)
    elif args.loss == "paco":
        criterion = losses.PaCoLoss(counts, args.alpha, temperature=args.temperature)
    elif args.loss == "vs":
        criterion = losses.VSLoss(counts)
    elif args.loss == "la":                         # logit adjustment
        criterion = losses.VSLoss(counts, gamma=0)
    return criterion.to(device)


def learning_rate(args, t):
    """At fractional epoch t: linear warm-up, then "step" (the published one) or "cosine".

    Warm-up rises once an epoch (at every step if it is shorter); cosine falls at every step.
    """
    if t < args.warmup_epochs:
        done = int(t) + 1 if args.warmup_epochs >= 1 else t
        return args.lr * min(1, done / args.warmup_epochs)
    if args.schedule == "cosine":
        return cosine_lr(t, args.epochs, args.lr, 0, min_lr=0)
    if t < 0.8 * args.epochs:
        return args.lr
    if t < 0.9 * args.epochs:
        return args.lr * args.decay
    return args.lr * args.decay ** 2


def radius(args, epoch):
    """SAM's rho in an epoch, 0 for plain SGD.

    "step" is Saddle-LongTail's for the large sets: 0.05, 0.1, 0.5 from epochs 0, 5, 60 of 90.
    "late": minima as flat as with SAM throughout are reported for SAM in the last epochs only
    (Zhou et al., ICLR 2025, arXiv 2410.10373).
    """
    last_third = min(args.epochs * 2 / 3, args.epochs - 1)      # where it begins; one at least
    if args.rho_schedule == "constant" or epoch >= last_third:
        return args.rho
    if args.rho_schedule == "late":
        return 0.0
    return args.rho * (0.1 if epoch < args.epochs / 18 else 0.2)


def view(images, args):
    """What the network sees of a batch, uint8 (B,3,H,W): (B,3,S,S) in [0,1]."""
    if args.augment in STRONG:
        return to_network(augment.strong_augment(images, args.img_size, args.augment))
    if args.dataset in data_lt.LISTS:               # the loader has cropped and mirrored them
        return to_network(color_jitter(images, 0.4, 0.4, 0.4))
    if args.loss == "paco":
        return to_network(augment.resize(augment.paco_query_view(images), args.img_size))
    return to_network(augment.resize(augment.random_crop_flip(images), args.img_size))


def draw_mixed(args):
    """Whether this step's batch is mixed; drawn, unless all or none are."""
    if args.mixing in (0, 1):
        return args.mixing == 1
    return torch.rand(()).item() < args.mixing


def to_network(images):
    return augment.to_float(images).contiguous(memory_format=torch.channels_last)


# ---- The run -------------------------------------------------------------------------------------

def parse(argv=None, doc=__doc__):
    parser = Parser(doc)
    add_run_flags(parser)
    add_settings(parser, SETTINGS)
    return parser.parse_args(argv)


def resolve(args, rt):
    """Fill every setting and the run folder's name; UserError for impossible settings."""
    check_minutes(args)
    resolve_data(args)
    paco = args.loss == "paco"
    recipes = PACO_RECIPES if paco else RECIPES
    if args.loss not in (None, "la"):       # ours and gpu are for la only: use cpu, paper
        recipes = {name: recipes[name] for name in ("paper", "cpu")}
        args.recipe = {"ours": "cpu", "gpu": "paper"}.get(args.recipe, args.recipe)
    row = defaults(SETTINGS) | pick_recipe(args, recipes, rt)
    if args.loss == "la":
        row = row | dict(beta=0.0)                  # the log prior does the work of re-weighting
    strong = args.augment in STRONG
    if args.dataset == "folder":
        folder = survey(args)
        row = fit_to_folder(row, folder, 32 if args.recipe == "ours" else 64)
        if folder.images <= 5000:
            row["batch"] //= 2                      # more steps from few images
        if paco:
            row["alpha"] = 1e-4 * folder.classes
    if strong:                                      # DeiT's
        row = row | dict(mixing=1.0)
    if strong and args.recipe != "ours":            # no SAM, so twice the epochs
        row = row | dict(loss="ce", augment="padded", rho=0.0, epochs=2 * row["epochs"], beta=0.0,
                         drw_epoch=2 * row["drw_epoch"])
    changed = fill_settings(args, SETTINGS, row)
    check(args, changed, rt)
    kind = "teacher"
    if paco:
        kind = "teacher_paco"
    elif strong:
        kind = "teacher_strong"
        if args.augment == "padded":
            changed.pop("augment", None)
    args.out = args.out or f"runs/{run_name(kind, args, changed)}"


def check(args, changed, rt):
    """UserError for settings that exclude each other, or a changed one that has no effect."""
    idle = set(PACO_ONLY) if args.loss != "paco" else {"drw_epoch", "beta"}
    if args.loss != "ldam":
        idle.add("max_margin")
    if args.schedule == "cosine":
        idle.add("decay")
    if args.rho == 0:
        idle.add("rho_schedule")
    if args.beta == 0:
        idle.add("drw_epoch")
    idle &= changed.keys()
    if idle:
        raise UserError(f"{', '.join(map(flag, sorted(idle)))} would have no effect with --loss "
                        f"{args.loss} --schedule {args.schedule} --rho {args.rho:g} --beta "
                        f"{args.beta:g} --augment {args.augment}")
    strong = args.augment in STRONG
    mixing = f"--mixing {args.mixing:g} (--augment {args.augment})"
    if args.mixing > 0 and args.loss not in ("ce", "la", "vs"):
        raise UserError(f"{mixing} mixes images, and --loss {args.loss} needs one label: --mixing "
                        "0, or --loss ce, la or vs")
    if args.mixing > 0 and args.beta > 0:
        raise UserError(f"{mixing} mixes images, which have no one class to be weighted by: give "
                        "--beta 0 or --mixing 0")
    if strong and (args.augment == "loader") != (args.dataset in data_lt.LISTS):
        raise UserError("--augment loader is for data sets that stay on disk, which have only this "
                        "and weak")
    if args.batch % rt.world:
        raise UserError(f"the teacher's --batch {args.batch} cannot be shared by {rt.world} "
                        "processes: train_teacher.py with another, and --teacher")


def new_network(args, data, rt):
    """An untrained network on the device. UserError if it cannot take images of this size."""
    torch.manual_seed(args.seed)
    try:
        net = build_teacher(vars(args), data.num_classes)
    except (ValueError, AssertionError) as error:       # AssertionError: a ViT's patches do not fit
        raise UserError(f"--arch {args.arch}: {error}") from None
    if args.arch not in ("resnet32", "resnet50"):
        try:
            net.eval()(torch.zeros(1, 3, args.img_size, args.img_size))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = runtime.one_line(error, 90)
            raise UserError(f"{args.arch} cannot take {args.img_size} px ({reason}); try a larger "
                            "--img-size") from None
    one_pixel = args.img_size <= 16 and args.arch != "fast" and args.arch not in CIFAR_BLOCKS
    if one_pixel and rt.amp == torch.bfloat16 and rt.device.type == "cpu":
        # A strided 3x3 convolution of a 1x1 input: torch 2.14 leaves most of its weight gradient
        # uninitialised there.
        raise UserError(f"{args.arch} halves {args.img_size} px down to one pixel before its last "
                        "convolutions: --img-size 32 or --amp none")
    net = net.to(rt.device, memory_format=torch.channels_last)
    if args.arch == "fast":             # its stem is computed from images
        whiten(net, data, rt.device)
    return net


def run_teacher(args, rt, flags=None, train=train):
    """One run: train the teacher of these (resolved) settings, or go on with it; its result.

    flags: of a student's teacher, which may be trained by another process: it is waited for.
    train: another loop than this file's.
    """
    run = Run(args.out, args, rt, SETTINGS, wait=flags is not None)
    if run.print_if_finished(args, "teacher"):
        return
    if flags:                           # warnings that follow name flags of this command
        rt.print(f"First its teacher: {shlex.join(['python', 'train_teacher.py', *flags])}")
    data = load_data(args, rt)
    run.check_data(data)
    print_data_summary(data, args, rt)
    n = len(data.train_labels)
    if n <= data_lt.steps_per_epoch(n, args.batch) * rt.world:
        raise UserError(f"--batch {args.batch}: BatchNorm needs two images or more in each of "
                        f"{rt.world} process(es)")
    net = new_network(args, data, rt)
    fit_epochs(run, train, args, data, net, rt, at_end=evaluation.teacher_summary)
    rt.print(f"Teacher ({args.recipe} recipe): {args.arch}, {args.loss}, SAM rho {args.rho:g}, "
             f"{schedule_text(args)} on {describe(data, args)}. Run folder: "
             f"{args.out}")
    results = train(args, data, net, rt, run)
    summary = evaluation.teacher_summary(net, data, rt)
    run.finish(results, method=args.loss, model=args.arch, teacher=None, training_images=summary)
    rt.print(f"{evaluation.tables(results, 'teacher', data)}\n"
             f"{evaluation.teacher_summary_text(summary)}")


def teacher_args(flags, rt):
    """The settings that a student's flags for its teacher lead to; `out` is its run folder."""
    args = parse([*flags, "--resume"])
    resolve(args, rt)
    return args


def flags_for_student(args):
    """The flags given here (before `resolve`) that a student of this teacher needs, too."""
    unset = vars(parse([]))
    names = (*DATA_SETTINGS, "data_dir", "recipe", "seed", "skip_bad")
    if args.dataset == "folder":                        # else each recipe has its own size
        names = (*names, "img_size")
    return as_flags(args, [name for name in names if getattr(args, name) != unset[name]])


def main():
    args = parse()
    rt = runtime.setup(args.device, args.amp)
    flags = flags_for_student(args)
    resolve(args, rt)
    run_teacher(args, rt)
    student = shlex.join(["python", "train_student.py", *flags, "--teacher", args.out])
    rt.print(f"Train a student under it: {student}\n"
             f"Or use it alone: {evaluation.predict_command(args.out)}")


if __name__ == "__main__":
    runtime.run_main(main)
