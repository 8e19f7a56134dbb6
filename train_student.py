r"""Train a Vision Transformer from scratch on long-tailed images: DeiT-LT.

Rangwani et al., CVPR 2024, arXiv 2404.02900. Output: runs/<name>/, see engine/run_folder.py.

    python train_student.py --dataset shapes                     minutes on 2 CPU cores, no download
    python train_student.py --dataset cifar10 --imb 100          CIFAR-10-LT
    python train_student.py --dataset cifar10 --method vit       the same ViT without a teacher
    torchrun --nproc_per_node=2 train_student.py --dataset cifar10 --recipe paper

    images --augment, mix--> x --> student: f_c(x), f_d(x)      L = 1/2 CE(f_c, y)
                               \-> teacher: y_t = argmax g(x)     + 1/2 w[y_t] CE(f_d, y_t)

The teacher is trained first when it is missing. Published for CIFAR-10-LT, imbalance 100: ViT-B
alone 62.6 %, DeiT-LT-B under an LDAM-DRW-SAM teacher 84.8 %. Measured here: README.md and results/.
"""
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

import augment
import data_lt
import losses
import train_teacher
from engine import evaluation, runtime
from engine.datasets import describe, load_data, print_data_summary, survey
from engine.minutes import fit_epochs
from engine.networks import (NORMALISATIONS, STEMS, build_student, load_teacher, short_name,
                             start_from, start_stem, teacher_files)
from engine.run_folder import Run
from engine.runtime import UserError
from engine.settings import (Interval, Parser, Setting, add_run_flags, add_settings, check_minutes,
                             defaults, fill_settings, fit_to_folder, flag, flags_of_teacher,
                             has_second_phase, pick_recipe, resolve_data, run_name, schedule_text)
from engine.training import (EMA, FiniteScaler, compiled, cosine_lr, micro_batches,
                             parameter_groups, set_lr)
from vit import MODELS

# Every setting once: name, the paper's value for CIFAR, what is allowed, what it is. The published
# scripts accumulate 4 micro-batches of 2 GPUs x 128 images, but scale the learning rate for 256
# only, 5e-4 x 256 / 512; their EMA decays by 0.99996 each micro-batch, so by 0.99996^4 each step.
SETTINGS = [
    Setting("model", "base", tuple(MODELS), "network: micro, mini, tiny, small or base"),
    Setting("img_size", 224, Interval(1, 4096), "side of the student's images, pixels"),
    Setting("patch_size", 16, Interval(1, 4096), "side of a patch, pixels"),
    Setting("stem", "patch", tuple(STEMS), "patch, conv, or fast: the teacher's FastNet"),
    Setting("tokens", 2, (1, 2), "2: CLS and DIST; 1: CLS learns from the teacher too"),
    Setting("layer_scale", 0.0, Interval(0), "initial value of LayerScale; 0: off"),
    Setting("epochs", 1200, Interval(1), "the student's epochs, of about as many views as images"),
    Setting("batch", 1024, Interval(1), "images per optimizer step, all processes together"),
    Setting("micro_batch", 128, Interval(1), "images per forward pass, mixed with each other"),
    Setting("lr", 2.5e-4, Interval(0), "peak learning rate of AdamW"),
    Setting("warmup_epochs", 5.0, Interval(0), "epochs of linear warm-up"),
    Setting("weight_decay", 0.05, Interval(0), "of AdamW; for matrices and kernels"),
    Setting("drop_path", 0.1, Interval(0, 0.99), "stochastic depth rate of the last block"),
    Setting("distill", "hard", ("hard", "soft", "none"), "hard: labels; soft: probabilities; none"),
    Setting("tau", 1.0, Interval(1e-3), "temperature of --distill soft"),
    Setting("teacher_view", "same", ("same", "weak"), "teacher input: same images, or weak crops"),
    Setting("alpha", 0.5, Interval(1e-6, 1), "weight of the DIST loss; 1 - alpha of the CLS loss"),
    Setting("logit_adjustment", False, None, "add log class frequencies to the logits in the loss"),
    Setting("drw_epoch", 1100, Interval(0), "first epoch (from 0) not mixed, and re-weighted"),
    Setting("beta", 0.9999, Interval(0, 0.999999), "of the class weights; 0: no re-weighting"),
    Setting("mix_drw", False, None, "go on mixing from --drw-epoch on"),
    Setting("repeats", 3, Interval(1), "repeated augmentation: views of an image; 1: off"),
    Setting("crop", "resized", ("resized", "padded", "loader"),
            "resized: a random area; padded: shifted; loader: as the image loader does"),
    Setting("rand_ops", 2, Interval(0), "RandAugment: operations per image"),
    Setting("magnitude", 9.0, Interval(0, 10), "RandAugment: their strength"),
    Setting("erasing", 0.25, Interval(0, 1), "probability of random erasing"),
    Setting("mixup", 0.8, Interval(0), "Beta parameter of mixup; 0: off"),
    Setting("cutmix", 1.0, Interval(0), "Beta parameter of CutMix; 0: off"),
    Setting("smoothing", 0.1, Interval(0, 1), "label smoothing while images are mixed"),
    Setting("ema", 0.99984, Interval(0, 0.999999), "decay per step of averaged weights; 0: off"),
    Setting("eval_crop", 0.875, Interval(0.1, 1), "side of the tested central square, a fraction"),
    Setting("eval_every", 10, Interval(1), "epochs between evaluations on the test set"),
]
# Recipes change some of them. cpu: the same method, small and short. ours: cpu with what was better
# on held-out images (results/jpeg_copy.md); own images: crop and flip only. gpu: ours, larger.
CPU = dict(model="mini", img_size=32, patch_size=8, epochs=60, batch=64, micro_batch=64, lr=5e-4,
           drop_path=0.0, drw_epoch=40, repeats=1, crop="padded", ema=0.0, eval_crop=1.0,
           eval_every=5)
SHAPES = dict(model="micro", stem="conv", epochs=30, lr=2e-3, warmup_epochs=2, drw_epoch=15,
              eval_every=10)
LARGE = dict(epochs=1400, batch=2048, lr=5e-4, drw_epoch=1200, mix_drw=True, crop="loader")
OURS = CPU | dict(stem="fast", lr=1e-3, distill="soft", logit_adjustment=True, beta=0.0,
                  smoothing=0.0)
OURS_FOLDER = OURS | dict(rand_ops=0, erasing=0.0, mixup=0.0, cutmix=0.0)
GPU = OURS | dict(model="small", patch_size=4, epochs=300, drw_epoch=200, batch=256,
                  micro_batch=256, lr=5e-4, drop_path=0.1, ema=0.999)
RECIPES = {
    "paper": {"cifar10": {}, "cifar100": {}, "imagenet_lt": LARGE,
              "inat18": LARGE | dict(epochs=1000, drw_epoch=900),
              "folder": dict(model="small", epochs=400, drw_epoch=360, eval_crop=1.0, ema=0.99952)},
    "cpu": {"cifar10": CPU, "cifar100": CPU, "shapes": CPU | SHAPES, "folder": CPU},
    "ours": {"cifar10": OURS, "cifar100": OURS, "shapes": OURS | SHAPES, "folder": OURS_FOLDER},
    "gpu": {"cifar10": GPU, "cifar100": GPU},
}
# What a method changes in its recipe; deit: augmentation as its teacher's.
NO_TEACHER = dict(distill="none", tokens=1)
METHODS = {
    "deit-lt": {},
    "deit": dict(beta=0.0, rand_ops=2, erasing=0.25, mixup=0.8, cutmix=1.0),
    "vit": NO_TEACHER,
}
BASELINES = {                       # with code of their own in experiments/
    "vit-crt": NO_TEACHER | dict(repeats=1, ema=0.0, logit_adjustment=False),
    "deit-iii": NO_TEACHER | dict(layer_scale=1e-4, rand_ops=0, erasing=0.0, smoothing=0.0,
                                  logit_adjustment=False, mixup=0.8, cutmix=1.0),
}
METRICS = ("loss", "loss_cls", "loss_dist", "teacher_accuracy")


def train(args, data, net, teacher, rt, run, augment_images=None, label_loss=None, order_of=None):
    """The training loop. Returns {"cls", "dist", "avg" and, with --ema, "ema": accuracies}.

    run: a Run, or engine/minutes.py's Probe. The last three are replaced in experiments/."""
    augment_images = augment_images or strong_augment
    label_loss = label_loss or losses.cross_entropy
    order_of = order_of or epoch_order
    K, counts = data.num_classes, torch.tensor(data.counts, device=rt.device)
    log_prior = (counts / counts.sum()).log()                           # ln pi (K,)
    teacher_prior = torch.full((K,), 1 / K, device=rt.device)           # pi_t (K,), a running mean
    optimizer = torch.optim.AdamW(parameter_groups(net, args.weight_decay), lr=args.lr, fused=True)
    model = DistributedDataParallel(net) if rt.world > 1 else net       # sends rank 0's weights
    ema = EMA(net, args.ema) if args.ema > 0 else None
    scaler = FiniteScaler(net, optimizer, rt, teacher_prior)            # undoes non-finite steps
    n = len(order_of(args, data, 0))                                    # images in an epoch
    steps = data_lt.steps_per_epoch(n, args.batch)
    accumulation_steps = micro_batches(n, steps, rt.world, args.micro_batch)
    state = dict(model=net, ema=ema, optimizer=optimizer, teacher_prior=teacher_prior,
                 scaler=scaler)             # what checkpoints hold; run.start restores them
    run.start(args, data, state, METRICS if teacher else METRICS[:1], steps, n)
    if args.compile:
        model = compiled(model)
    results = None

    for epoch in range(run.start_epoch, args.epochs):
        net.train()
        run.begin_epoch(epoch)
        weight = losses.drw_weights(counts, epoch, args.drw_epoch, args.beta)   # None, then w (K,)
        mixing = (epoch < args.drw_epoch or args.mix_drw) and args.mixup + args.cutmix > 0
        batches = data_lt.shard(order_of(args, data, epoch), args.batch, rt.rank, rt.world,
                                accumulation_steps)
        remaining = run.remaining_steps(epoch, batches)     # all, or those left after --resume
        for step, images, labels in data.batches(remaining, (args.seed, epoch, rt.rank)):
            runtime.seed_step(args.seed, epoch, step, rt.rank)      # so that a step can be replayed
            set_lr(optimizer, cosine_lr(epoch + step / steps, args.epochs, args.lr,
                                        args.warmup_epochs))
            metrics = torch.zeros(len(run.metrics), device=rt.device)
            for i in range(accumulation_steps):
                # Strided: an image's copies (--repeats) are in different micro-batches if possible.
                part = images[i::accumulation_steps]                    # uint8 (b,3,H,W)
                target = labels[i::accumulation_steps]                  # (b,)
                # 1. Augment, every image with its own draws, and mix, with one draw for all.
                x = augment_images(part, args)                          # (b,3,S,S) in [0,1]
                if mixing:
                    x, target = augment.mixup_cutmix(x, target, K, args.mixup, args.cutmix,
                                                     args.smoothing)    # target (b,K)
                # Processes average their gradients in the last micro-batch only.
                sync = i == accumulation_steps - 1 or rt.world == 1
                with nullcontext() if sync else model.no_sync():
                    with rt.autocast():
                        # 2. Student.
                        cls_logits, dist_logits = model(x)              # f_c, f_d (b,K)
                        if dist_logits is None:
                            dist_logits = cls_logits                    # one token learns both
                        if args.logit_adjustment:
                            cls_logits = cls_logits + log_prior         # f_c + ln pi
                        if teacher:
                            # 3. Teacher: the same images, resized to its side. They are out of
                            # its distribution: DeiT-LT's saw weakly augmented ones.
                            view = x if args.teacher_view == "same" else weak_augment(part)
                            g = evaluation.teacher_logits(teacher, view)        # g(x) (b,K)
                            y_t = g.argmax(dim=1) if args.distill == "hard" else g  # (b,) or (b,K)
                            if args.logit_adjustment:
                                update_prior(teacher_prior, y_t, args.tau, accumulation_steps, rt)
                                # f_d + tau ln pi_t
                                dist_logits = dist_logits + args.tau * log_prior_of(teacher_prior)
                            # 4. L = (1 - alpha) CE(f_c, y) + alpha w[y_t] CE(f_d, y_t)
                            loss, *terms = losses.distillation_loss(
                                cls_logits, dist_logits, target, y_t, args.alpha, weight, args.tau)
                            loss = loss + 0 * g.sum()       # NaN if g(x) is: then no step
                            values = [loss, *terms, teacher_accuracy(g, target)]
                        else:
                            loss = label_loss(cls_logits, target)
                            values = [loss]
                    scaler.scale(loss / accumulation_steps).backward()
                metrics += torch.stack(values).detach() / accumulation_steps
            # 5. AdamW step and moving average, both left out if a number is not finite.
            scaler.unscale_()           # here it finds out whether all gradients are finite
            scaler.step(optimizer)
            optimizer.zero_grad()
            finite = scaler.update()
            if ema:
                ema.update(finite)
            run.after_step(epoch, step, metrics, finite)

        results, cosine = None, None
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            results = evaluate(net, ema, data, args, rt)
            cosine = evaluation.token_cosine(net, data, args.img_size, args.eval_crop, rt)
        run.after_epoch(epoch, results, cosine=cosine, lr=optimizer.param_groups[0]["lr"],
                        drw=epoch >= args.drw_epoch and has_second_phase(args))
    return results or evaluate(net, ema, data, args, rt)                # no epoch was left


# ---- Parts of a step -----------------------------------------------------------------------------

def strong_augment(images, args):
    """uint8 (B,3,H,W) -> (B,3,S,S) in [0,1]: crop, flip, RandAugment, erasing."""
    return augment.strong_augment(images, args.img_size, args.crop, args.rand_ops, args.magnitude,
                                  args.erasing)


def weak_augment(images):
    """uint8 (B,3,H,W) -> (B,3,H,W) in [0,1]: padded by an eighth, shifted, flipped."""
    return augment.to_float(augment.random_crop_flip(images, images.shape[-1] // 8))


def update_prior(teacher_prior, y_t, tau, accumulation_steps, rt):
    """Move pi_t (K,), the teacher's label frequencies, towards those of labels or logits y_t.

    A running mean over about 100 steps, their micro-batches and all processes.
    """
    now = losses.teacher_label_distribution(y_t, len(teacher_prior), tau)
    teacher_prior.lerp_(runtime.all_sum(now, rt) / rt.world, 0.01 / accumulation_steps)


def log_prior_of(pi):
    """ln pi (K,); a class that never occurs counts as 1e-3 / K."""
    return pi.clamp(min=1e-3 / len(pi)).log()


def teacher_accuracy(g, target):
    """Percent of images that g (b,K) labels right; of mixed ones, target (b,K), the larger part."""
    if target.ndim == 2:
        target = target.argmax(dim=1)
    return 100 * (g.argmax(dim=1) == target).float().mean()


def epoch_order(args, data, epoch):
    """Which training images an epoch shows, in order: LongTensor."""
    n = len(data.train_labels)
    if args.repeats > 1:
        return data_lt.repeated_augmentation(n, args.seed, epoch, args.repeats)
    return data_lt.shuffled(n, args.seed, epoch)


def evaluate(net, ema, data, args, rt):
    """Accuracies of every head on the test set; "ema": the prediction of the averaged weights."""
    averaged = ema.model if ema else None
    return evaluation.evaluate_student(net, data, args.img_size, args.eval_crop, rt, averaged)


# ---- The run -------------------------------------------------------------------------------------

def parse(argv=None, doc=__doc__):
    parser = Parser(doc)
    flags = add_run_flags(parser)
    flags.add_argument("--method", default="deit-lt", choices=METHODS, metavar="NAME",
                       help=f"{', '.join(METHODS)} [deit-lt]")
    flags.add_argument("--teacher", default="auto", metavar="NAME",
                       help="auto, ldam, paco, strong; or a run or file, several by commas [auto]")
    flags.add_argument("--teacher-rho", type=float, metavar="X", help="its SAM radius [recipe]")
    flags.add_argument("--teacher-norm", choices=NORMALISATIONS, metavar="NAME",
                       help=f"its pixel statistics: {', '.join(NORMALISATIONS)} [its own]")
    flags.add_argument("--teacher-size", type=int, metavar="N", help="its images' side [its own]")
    flags.add_argument("--checkpointing", action="store_true",
                       help="recompute blocks in the backward pass: less memory, a third more work")
    flags.add_argument("--finetune", metavar="RUN", help="start from this run's student")
    add_settings(parser, SETTINGS)
    return parser.parse_args(argv)


OWN_TEACHERS = ("auto", "ldam", "paco", "strong")       # train_teacher.py makes them
ABOUT_TEACHER = ("teacher_rho", "teacher_norm", "teacher_size")


def resolve(args, rt):
    """Fill every setting and the run folder's name; UserError for impossible settings.

    Returns the flags of the teacher that train_teacher.py is to provide, or None.
    """
    check_minutes(args)
    resolve_data(args)
    row = defaults(SETTINGS) | pick_recipe(args, RECIPES, rt)
    if args.dataset == "folder":
        largest = {"paper": 224, "cpu": 64, "ours": 32}[args.recipe]    # px; ours: quick
        row = fit_to_folder(row, survey(args), largest, args.img_size)
    changed = fill_settings(args, SETTINGS, row | (METHODS | BASELINES)[args.method])
    for name in ABOUT_TEACHER:
        if getattr(args, name) is not None:
            changed[name] = getattr(args, name)
    check(args, changed, rt)
    usual = "strong" if args.method == "deit" else "auto"
    if args.teacher not in ("auto", usual):
        changed["by"] = short_name(args.teacher)
    if args.finetune:
        changed["from"] = short_name(args.finetune)
    args.out = args.out or f"runs/{run_name(args.method, args, changed)}"
    if args.distill == "none":
        args.teacher = None
        return None
    args.teacher = usual if args.teacher == "auto" else args.teacher
    if args.teacher not in OWN_TEACHERS:
        return None
    flags = flags_of_teacher(args)
    if args.teacher == "strong":
        flags.append(f"--augment={args.crop}")
    elif args.teacher != "auto":
        flags.append(f"--loss={args.teacher}")
    if args.teacher_rho is not None:
        flags.append(f"--rho={args.teacher_rho}")
    args.teacher = train_teacher.teacher_args(flags, rt).out
    return flags


def check(args, changed, rt):
    """UserError for settings that exclude each other, or a changed one that has no effect."""
    idle = set()
    if args.distill == "none":
        idle |= {*ABOUT_TEACHER, "alpha", "beta", "teacher_view", "tau"}
    elif args.distill == "hard":
        idle.add("tau")
    if args.rand_ops == 0:
        idle.add("magnitude")
    if args.mixup + args.cutmix == 0:
        idle |= {"smoothing", "mix_drw"}
    if not has_second_phase(args):
        idle.add("drw_epoch")
    idle = [flag(name) for name in sorted(idle & changed.keys())]
    if args.distill == "none" and args.teacher != "auto":
        idle.append("--teacher")
    if idle:
        raise UserError(f"{', '.join(idle)} would have no effect with --method {args.method} "
                        f"--distill {args.distill} --rand-ops {args.rand_ops} --beta {args.beta:g} "
                        f"--mixup {args.mixup:g} --cutmix {args.cutmix:g}")
    several = teacher_files(args.teacher)
    if len(several) > 1 and set(several) & set(OWN_TEACHERS):
        raise UserError(f"--teacher {args.teacher}: each of several must be a run folder or a file")
    if args.teacher_rho is not None and args.teacher not in OWN_TEACHERS:
        raise UserError(f"--teacher-rho is for --teacher {', '.join(OWN_TEACHERS)}")
    if args.batch % rt.world:
        raise UserError(f"--batch {args.batch} cannot be shared by {rt.world} processes")
    if (args.crop == "loader") != (args.dataset in data_lt.LISTS):
        raise UserError("--crop loader is for imagenet_lt and inat18, and their only crop")
    if args.stem != "patch" and args.img_size == args.patch_size:
        raise UserError(f"--stem {args.stem}: its BatchNorm needs an --img-size above --patch-size")
    if args.distill == "none" and args.tokens == 2:
        raise UserError("--distill none leaves DIST nothing to learn: --tokens 1")
    if args.teacher_view == "weak" and args.mixup + args.cutmix > 0:
        raise UserError("--teacher-view weak: the teacher's images are not mixed, so the student's "
                        "must not be either: --mixup 0 --cutmix 0")


def new_network(args, data, rt, resumed=False):
    """An untrained student on the device, or, with --finetune, one with that run's weights.

    The patches' positions are resized to this run's grid. resumed: the checkpoint has the weights.
    """
    torch.manual_seed(args.seed)
    try:
        net = build_student(vars(args), data.num_classes, args.tokens == 2).to(rt.device)
        if args.finetune and not resumed:
            start_from(net, args.finetune, data, rt)
    except ValueError as error:                         # sizes that do not fit
        raise UserError(str(error)) from None
    return net


def run_student(args, rt, prepare=None, wait=False, **replacements):
    """One run: its teacher first if it is missing, the student, its result and its picture.

    prepare(net): changes the network before it is trained. wait, replacements: see Run, `train`.
    """
    teacher_flags = resolve(args, rt)
    run = Run(args.out, args, rt, SETTINGS, wait)
    if run.print_if_finished(args, args.method, draw_summary):
        return
    data = load_data(args, rt)
    run.check_data(data)
    print_data_summary(data, args, rt)
    net, teacher = new_network(args, data, rt, resumed=bool(run.resumed)), None
    if prepare:
        prepare(net)
    if teacher_flags:
        train_teacher.run_teacher(train_teacher.teacher_args(teacher_flags, rt), rt, teacher_flags)
    if args.teacher:
        teacher, text = load_teacher(args.teacher, data, rt, args.teacher_norm, args.teacher_size)
        run.check_teacher(args, teacher, data)
        rt.print(f"Teacher {args.teacher}: {text}; "
                 f"{evaluation.accuracy_on_clean(teacher, data, rt)}")
    if args.stem == "fast" and not args.finetune:
        start_stem(net, teacher, data, rt)
    fit_epochs(run, train, args, data, net, teacher, rt, **replacements)    # with --minutes
    rt.print(f"Student ({args.recipe} recipe): {args.method} {args.model} ({args.img_size} px, "
             f"patch {args.patch_size}), {schedule_text(args)} on {describe(data, args)}")
    results = train(args, data, net, teacher, rt, run, **replacements)
    results = evaluation.with_teacher(results, net, teacher, data, args.img_size, args.eval_crop,
                                      rt)
    run.finish(results, method=args.method, model=args.model, teacher=args.teacher)
    rt.print(f"\n{evaluation.final_table(results, args.method, data)}\nRun folder: {args.out}")
    if rt.main:
        draw_summary(args.out)
    settings = vars(args) | {"counts": data.counts}
    rt.print(evaluation.advice(results, args.out, args.teacher, settings))


def draw_summary(folder):
    """The run's picture, if matplotlib is installed; a failure does not fail the finished run."""
    try:
        import analyze
        print(f"Picture: {analyze.summary(folder)}")
    except (Exception, SystemExit) as error:
        print(f"No picture ({runtime.one_line(error)}): python analyze.py summary {folder}")


def main():
    args = parse()
    run_student(args, runtime.setup(args.device, args.amp))


if __name__ == "__main__":
    runtime.run_main(main)
