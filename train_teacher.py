r"""Train the CNN teacher on the long-tailed data: LDAM with deferred re-weighting, or PaCo, under SAM.

    python train_teacher.py --dataset cifar10 --imb 100                LDAM-DRW-SAM, ResNet-32
    python train_teacher.py --dataset cifar10 --imb 100 --loss paco    PaCo-SAM, the paper's best teacher
    python train_teacher.py --dataset cifar10 --recipe best            ours: logit adjustment, SAM in the last third
    python train_teacher.py --dataset cifar10 --augment padded         plain, under the student's augmentation: DeiT's teacher
    python train_teacher.py --dataset shapes                           two to three minutes on 2 CPU threads, no download

Published: ResNet-32 on CIFAR-10-LT and CIFAR-100-LT (imb 100): LDAM-DRW-SAM 81.9 % and 45.4 % (Saddle-LongTail, arXiv
2212.13827; 200 epochs), PaCo+SAM 86.8 % and 52.8 % (DeiT-LT's Table 2; its training code and its rho are not published).
What this code has measured is in the README and under results/.

The LDAM teacher sees only weak augmentation, crop and flip; the student will ask it about strongly augmented, mixed images
that it never saw. That is meant: it is what makes DeiT-LT's distillation out-of-distribution. At the end the script says how
right and how sure the teacher is on both kinds of images.

`train_student.py` trains its teacher by itself when it is missing. Output: runs/teacher_.../ (see run_folder.py).
"""
import argparse
import os
import time
from math import inf, log

import torch

import augment
import data_lt
import engine
import run_folder
from losses import LDAMLoss, PaCo, PaCoLoss, VSLoss, drw_weights, focal_loss, weighted_cross_entropy
from networks import NORMALISATIONS, build_teacher, load_network, match_classes
from quantities import entropy
from sam import SAM, frozen_batchnorm_statistics

# One row per data set. paper: Saddle-LongTail's run.sh. cpu: the same method in minutes on 2 cores.
LDAM_PAPER = dict(arch="resnet32", img_size=32, norm="cifar", augment="weak", loss="ldam", epochs=200, batch=128, lr=0.1,
                  weight_decay=2e-4, schedule="step", decay=0.01, warmup_epochs=5, rho=0.8, rho_schedule="constant",
                  drw_epoch=160, beta=0.9999, max_margin=0.5, eval_every=1)
LDAM_LARGE = LDAM_PAPER | dict(arch="resnet50", img_size=224, epochs=90, batch=256, lr=0.2, schedule="cosine", warmup_epochs=0,
                               rho=0.5, rho_schedule="step", drw_epoch=60, max_margin=0.3, norm="imagenet")
LDAM_CPU = LDAM_PAPER | dict(epochs=24, batch=64, schedule="cosine", warmup_epochs=2, rho=0.1, drw_epoch=16, eval_every=4)
# Ours, in the work of cpu's 24 epochs: 24 plain ones, 12 of SAM. The log prior in its loss does the work of re-weighting.
BEST = LDAM_CPU | dict(loss="la", beta=0.0, epochs=36, drw_epoch=24, rho_schedule="late")
RECIPES = {
    "paper": {"cifar10": LDAM_PAPER, "cifar100": LDAM_PAPER, "imagenet_lt": LDAM_LARGE,
              "inat18": LDAM_LARGE | dict(lr=0.1, weight_decay=1e-4, norm="inat"),
              "folder": lambda seen: own_folder_row(LDAM_PAPER | dict(rho=0.1), seen, 200)},
    "cpu": {"cifar10": LDAM_CPU, "cifar100": LDAM_CPU,
            "shapes": LDAM_CPU | dict(epochs=12, batch=32, lr=0.03, rho=0.05, drw_epoch=7, warmup_epochs=1, eval_every=2),
            "folder": lambda seen: own_folder_row(LDAM_CPU, seen, 24)},
    "best": {"cifar10": BEST, "cifar100": BEST, "folder": lambda seen: own_folder_row(BEST, seen, 36)},
}


def own_size(seen, largest):
    """Side of the images for a folder of one's own (a data_lt.Survey): the largest that its images are not mostly below."""
    return max(size for size in (32, 64, 128, 224) if size == 32 or size <= min(1.25 * seen.side, largest))


def own_epochs(seen, epochs):
    """So many that there are as many samples as in `epochs` of CIFAR-10-LT, within a quarter and three times of them."""
    return round(min(max(epochs * 12406 / seen.images, epochs / 4), 3 * epochs))


def own_folder_row(row, seen, epochs):
    """The row of a folder of one's own: size and length follow from what is in it. ResNet-32 sees 64 px at most."""
    epochs = own_epochs(seen, epochs)
    row = row | dict(img_size=own_size(seen, 64), epochs=epochs, batch=64 if seen.images > 5000 else 32)
    return row | dict(drw_epoch=round(0.7 * epochs)) if "drw_epoch" in row else row


# The rows of --loss paco. paper: PaCo's CIFAR-100 script, also for CIFAR-10, for which none is published; nor is rho (0.05 is
# what the same authors published for GLMC+SAM). Ten classes have ten times as many positives in the queue as a hundred: a tenth
# of alpha keeps the balance of pairs and classes. PaCo needs no re-weighting: the log prior in its loss does that work.
PACO_PAPER = dict(arch="resnet32", img_size=32, norm="cifar", augment="weak", loss="paco", epochs=400, batch=128, lr=0.05,
                  weight_decay=5e-4, schedule="step", decay=0.1, warmup_epochs=10, rho=0.05, rho_schedule="constant",
                  alpha=0.01, temperature=0.05, queue=1024, projection=32, key_momentum=0.999, eval_every=1)
PACO_CPU = PACO_PAPER | dict(epochs=24, batch=64, schedule="cosine", warmup_epochs=2, eval_every=4)
PACO_RECIPES = {
    "paper": {"cifar10": PACO_PAPER | dict(alpha=0.001), "cifar100": PACO_PAPER,
              "folder": lambda seen: own_folder_row(PACO_PAPER | dict(alpha=1e-4 * seen.classes), seen, 400)},
    "cpu": {"cifar10": PACO_CPU | dict(alpha=0.001), "cifar100": PACO_CPU,
            "folder": lambda seen: own_folder_row(PACO_CPU | dict(alpha=1e-4 * seen.classes), seen, 24),
            "shapes": PACO_CPU | dict(epochs=12, batch=32, lr=0.03, warmup_epochs=1, alpha=0.001, eval_every=2)},
}


def strong(row):
    """A row as that of an in-distribution teacher (DeiT's): plain cross-entropy, no SAM, so twice the epochs at equal cost."""
    if callable(row):
        return lambda seen: strong(row(seen))
    return row | dict(loss="ce", augment="padded", rho=0.0, epochs=2 * row["epochs"], beta=0.0)


STRONG_RECIPES = {recipe: {dataset: strong(row) for dataset, row in RECIPES[recipe].items()} for recipe in ("paper", "cpu")}
HELP = {
    "arch": "network: resnet32, resnet50, or the name of any classification network of torchvision",
    "img_size": "side of the images that the network gets, pixels",
    "augment": "weak (crop and flip), or, for a teacher that knows what its student will ask about, the student's --crop: the "
               "recipe's strong augmentation and mixing",
    "loss": "ldam (with a cosine classifier), paco, ce, focal, la (logit adjustment) or vs (vector scaling)",
    "epochs": "passes over the training set",
    "batch": "images per step, over all processes together",
    "lr": "peak learning rate of SGD with momentum 0.9",
    "weight_decay": "of SGD",
    "schedule": "step: times `decay` at 80 %% and again at 90 %% of the epochs; cosine: to 0",
    "decay": "factor of the step schedule",
    "warmup_epochs": "epochs of linear warm-up",
    "rho": "radius of SAM's perturbation; 0 is plain SGD at half the cost",
    "rho_schedule": "constant; step: rho/10, from 1/18 of the epochs rho/5, from 2/3 rho; or late: 0, so at half the cost, and "
                    "from 2/3 rho",
    "norm": "pixel statistics to normalise with: cifar, imagenet, inat or none",
    "drw_epoch": "first epoch (0-based) with re-weighted classes; 0: from the start; the number of epochs or more: never",
    "beta": "of the effective number of images, for the class weights; 0 = none",
    "max_margin": "LDAM's margin of the rarest class",
    "alpha": "PaCo's weight of an image pair",
    "temperature": "PaCo's T, by which cosines are divided",
    "queue": "keys that PaCo remembers",
    "projection": "dimensions of PaCo's anchors and keys",
    "key_momentum": "share of its old weights that PaCo's key encoder keeps in a step",
    "eval_every": "epochs between evaluations on the test set (the last is always evaluated)",
}
LOSSES = {  # name -> criterion(logits, labels, weight=class weights or None); PaCo's takes anchors and a bank too
    "ce": lambda counts, args: weighted_cross_entropy,
    "focal": lambda counts, args: focal_loss,
    "la": lambda counts, args: VSLoss(counts, gamma=0),
    "vs": lambda counts, args: VSLoss(counts),
    "ldam": lambda counts, args: LDAMLoss(counts, args.max_margin),
    "paco": lambda counts, args: PaCoLoss(counts, args.alpha, temperature=args.temperature),
}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    engine.add_run_flags(parser)
    more = {"paco": PACO_RECIPES, "strong": STRONG_RECIPES}
    engine.add_recipe_flags(parser, RECIPES | {f"{kind} {k}": v for kind, rows in more.items() for k, v in rows.items()}, HELP)
    return parser.parse_args(argv)


def resolve(args, rt):
    """Fill the recipe's settings and the run folder's name; raises UserError for settings that cannot be."""
    paco, given = args.loss == "paco", {key for key in HELP if getattr(args, key) is not None}
    engine.resolve_data(args)
    strong = args.augment not in (None, "weak")
    if strong and args.loss not in (None, "ce"):
        raise engine.UserError(f"--augment {args.augment} mixes images, and --loss {args.loss} needs one label: --loss ce")
    recipes = PACO_RECIPES if paco else STRONG_RECIPES if strong else RECIPES
    if args.recipe == "best" and (args.loss not in (None, "la") or args.dataset not in recipes.get("best", ())):
        args.recipe = "cpu"                                              # best has one teacher, and none for shapes
    row, changed = engine.resolve_recipe(args, recipes, rt)
    unused = {"max_margin"} if args.loss != "ldam" else set()
    unused |= {"decay"} if args.schedule == "cosine" else set()
    unused |= {"rho_schedule"} if args.rho == 0 else set()
    if idle := [engine.flag(key) for key in sorted(given) if key not in row or key in unused]:
        raise engine.UserError(f"{', '.join(idle)} has no meaning with --loss {args.loss} --schedule {args.schedule} "
                               f"--rho {args.rho:g}")
    engine.check_choices(args, loss=LOSSES, schedule=("step", "cosine"), rho_schedule=("constant", "step", "late"),
                         augment=("weak", "padded", "resized", "loader"), norm=NORMALISATIONS)
    if strong and args.beta > 0:
        raise engine.UserError(f"--augment {args.augment} mixes images, which have no one class to be weighted by: no --beta")
    if strong and (args.augment == "loader") != (args.dataset in data_lt.LISTS):
        raise engine.UserError("--augment loader is for data sets that stay on disk, and they have no other but weak")
    ranges = dict(epochs=(1, inf), batch=(rt.world, inf), lr=(0, inf), weight_decay=(0, inf), warmup_epochs=(0, inf),
                  rho=(0, inf), decay=(0, 1), img_size=(1, inf), beta=(0, 0.999999), max_margin=(0, 1), alpha=(0, inf),
                  temperature=(1e-3, inf), queue=(1, inf), projection=(1, inf), key_momentum=(0, 1), eval_every=(1, inf))
    engine.check_ranges(args, **{name: limits for name, limits in ranges.items() if name in row})
    if args.batch % rt.world:
        raise engine.UserError(f"--batch {args.batch} cannot be shared by {rt.world} processes")
    args.name = f"teacher_{'paco_' * paco}{'strong_' * strong}{engine.data_name(args)}_{args.recipe}{changed}_s{args.seed}"
    args.out = args.out or f"runs/{args.name}"


def new_network(args, data, rt):
    """An untrained network of these settings on the device. Raises UserError if it cannot take images of their size."""
    net = build_teacher(vars(args), data.num_classes)
    if args.arch not in ("resnet32", "resnet50"):
        try:
            net.eval()(torch.zeros(1, 3, args.img_size, args.img_size))
        except (RuntimeError, AssertionError, ValueError) as error:
            why = " ".join(str(error).split())[:90]
            raise engine.UserError(f"{args.arch} cannot take {args.img_size} px ({why}); try a larger --img-size") from None
    return net.to(rt.device, memory_format=torch.channels_last)


class Committee(torch.nn.Module):
    """Several teachers as one, which says the log of the mean of their probabilities (at temperature 1), (B,K)."""

    def __init__(self, nets):
        super().__init__()
        self.nets, self.img_size = torch.nn.ModuleList(nets), nets[0].img_size

    def forward(self, x):
        log_p = torch.stack([net(x).log_softmax(dim=1, dtype=torch.float32) for net in self.nets])         # (n,B,K)
        return log_p.logsumexp(dim=0) - log(len(self.nets))


def members(path):
    """The files of a teacher: one, or several joined by commas. Raises UserError for an empty one."""
    files = [path] if os.path.exists(path) else [file.strip() for file in path.split(",")]
    if not all(files):
        raise engine.UserError(f"--teacher '{path}': a name is empty")
    return files


def name_of(path):
    """A teacher's name in those of its students and in pictures."""
    return "+".join(os.path.basename(os.path.normpath(file)) for file in members(path))


def load_teacher(path, data, rt, norm=None, size=None):
    """A teacher from a run folder or any file that networks.py understands, ready to label data's classes: (network, text).

    On the device, in evaluation mode, without gradients, its outputs in the order of the data's classes. Several files joined
    by commas are a Committee. norm, size: see networks.load_network. Raises UserError if a file is no teacher, knows other
    classes, or takes images of another size than the others.
    """
    found = [load_network(file, norm, size) for file in members(path)]
    for file, one in zip(members(path), found):
        if one.kind != "teacher":
            raise engine.UserError(f"{file} is not a teacher: it is {one.what}")
        match_classes(one, data, f"the teacher {file}")
    if len(sizes := {one.net.img_size for one in found}) > 1:
        raise engine.UserError(f"--teacher {path}: one --teacher-size for all, not {sorted(sizes)} px")
    net = found[0].net if len(found) == 1 else Committee([one.net for one in found]).eval()
    several = f"the mean of {len(found)}, " if len(found) > 1 else ""
    what = several + ", and ".join(dict.fromkeys(one.what for one in found))               # each kind once
    return net.to(rt.device, memory_format=torch.channels_last), what


def learning_rate(args, t):
    """At fractional epoch t: linear warm-up, then "step" (the published one, per epoch) or "cosine" (per step)."""
    if t < args.warmup_epochs:
        return args.lr * min(1, (int(t) + 1) / args.warmup_epochs)
    if args.schedule == "cosine":
        return engine.cosine_lr(t, args.epochs, args.lr, 0, min_lr=0)
    return args.lr * (1 if t < 0.8 * args.epochs else args.decay if t < 0.9 * args.epochs else args.decay ** 2)


def radius(args, epoch):
    """SAM's rho in an epoch. "step" is Saddle-LongTail's for the large sets: 0.05, 0.1, 0.5 from epochs 0, 5, 60 of 90.

    "late": the last epochs of SAM are said to find what all of them do (Zhou et al., ICLR 2025, arXiv 2410.10373).
    """
    if args.rho_schedule == "constant" or epoch >= args.epochs * 2 / 3:
        return args.rho
    return 0.0 if args.rho_schedule == "late" else args.rho * (0.1 if epoch < args.epochs / 18 else 0.2)


def seconds_of_run(args, data, rt, start_epoch=0):
    """About how long the epochs from start_epoch on will take here."""
    net, epochs = new_network(args, data, rt), args.epochs - start_epoch
    x = augment.to_float(data.train_images[:args.batch // rt.world])
    x = augment.resize(x, args.img_size).contiguous(memory_format=torch.channels_last)
    passes = len(data.train_labels) * sum(2 if radius(args, epoch) > 0 else 1 for epoch in range(start_epoch, args.epochs))
    tests = -(-epochs // args.eval_every)
    keys = epochs * len(data.train_labels) / 3 if args.loss == "paco" else 0      # a forward pass, a third of a whole one

    def forward(n):
        with rt.autocast():
            return net(x[:n]).sum()
    return engine.seconds_of_run(forward, len(x), passes + keys, tests, len(data.test_labels), rt)


def views(images, args):
    """What the network sees of a batch, levels (B,3,H,W): one view (B,3,S,S) in [0,1], and for PaCo one for the key encoder."""
    if args.augment != "weak":
        return augment.strong_augment(images, args.img_size, args.augment).contiguous(memory_format=torch.channels_last), None
    if args.dataset in data_lt.LISTS:                                             # boxes, mirrored, from the loader
        two = augment.color_jitter(images, 0.4, 0.4, 0.4), None
    elif args.loss == "paco":
        two = augment.resize(augment.paco_query_view(images), args.img_size), augment.simclr_view(images, args.img_size)
    else:
        two = augment.resize(augment.random_crop_flip(images), args.img_size), None
    return [x if x is None else augment.to_float(x).contiguous(memory_format=torch.channels_last) for x in two]


def train(args, data, rt, run):
    """The whole training loop. Returns {"avg": accuracies of the last epoch} and the network."""
    torch.manual_seed(args.seed)
    net = new_network(args, data, rt)
    criterion = LOSSES[args.loss](data.counts, args)
    criterion = criterion.to(rt.device) if isinstance(criterion, torch.nn.Module) else criterion
    paco = args.loss == "paco"
    whole = PaCo(net, net.classifier.in_features, args.projection, args.queue, args.key_momentum).to(rt.device) if paco else net
    trained = [p for p in whole.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trained, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    for p in trained:                                                             # else a first step that is left out would
        sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)                     # leave them unset, torch 2.15
    optimizer, guard = SAM(sgd, args.rho), engine.Guard(whole, sgd, rt)

    def load(state):
        run_folder.load_weights(whole, state["paco"] if paco else state["model"], run.checkpoint)
        optimizer.load_state_dict(state["optimizer"])
        guard.load_state_dict(state["guard"])

    def state():
        """What a checkpoint holds beside the place in the training."""
        return dict(model=net.state_dict(), paco=whole.state_dict() if paco else None, optimizer=optimizer.state_dict(),
                    guard=guard.counts, config=vars(args), data=data.fingerprint, class_names=data.class_names,
                    counts=data.counts)

    run.restore(load)
    model = engine.trainable(whole, rt, args.compile)
    images = len(data.train_labels)
    steps, results = data_lt.steps_per_epoch(images, args.batch), None
    bar = engine.progress_bar(rt, args.epochs * images, run.start_epoch * images + run.start_step * args.batch)

    for epoch in range(run.start_epoch, args.epochs):
        whole.train()
        started, sums = run.begun(epoch, torch.zeros(2, device=rt.device))        # loss, steps
        weight = None if paco or args.beta == 0 else drw_weights(data.counts, epoch, args.drw_epoch, args.beta)
        weight = None if weight is None else weight.to(rt.device)                 # (K,) from the DRW epoch on
        order, optimizer.rho = data_lt.shuffled(images, args.seed, epoch), radius(args, epoch)
        shares = run.steps(epoch, data_lt.shard(order, args.batch, rt.rank, rt.world))
        batches = data.batches(shares, (args.seed, epoch, rt.rank))
        for step, levels, y in batches:                                           # (B,3,H,W), (B,)
            engine.seed_step(args.seed, epoch, step, rt.rank)
            engine.set_lr(optimizer, learning_rate(args, epoch + step / steps))
            x, key_view = views(levels, args)                                     # (B,3,S,S) in [0,1] each
            if args.augment != "weak":
                x, y = augment.mixup_cutmix(x, y, data.num_classes)               # y (B,K)
            guard.begin()
            if paco:
                with rt.autocast():
                    keys = whole.keys(key_view)                                   # (B,d); both passes of SAM share them

            def loss_here():
                """The batch's loss at the weights as they are now, with the same dropout whenever it is called."""
                engine.seed_step(args.seed, epoch, step, rt.rank)
                with rt.autocast():
                    if paco:
                        logits, v = model(x)                                      # (B,K), (B,d)
                        return criterion(logits, v, y, *whole.bank(v, keys, y))
                    return criterion(model(x), y, weight=weight)

            loss = loss_here()
            guard.backward(loss)                                                  # gradient at w
            guard.check()
            if optimizer.rho > 0:
                optimizer.first_step()                                            # climb to w + e
                with frozen_batchnorm_statistics(whole):
                    guard.backward(loss_here())                                   # gradient at w + e
                guard.check()
                optimizer.second_step()                                           # back to w, then SGD
            else:
                sgd.step()
                sgd.zero_grad()
            if paco:
                whole.enqueue(engine.gather(keys, rt), engine.gather(y, rt))      # once a step
            guard.end()                                                           # a step that was not finite changes nothing

            sums += guard.unless_bad(torch.stack([loss.detach(), torch.ones_like(loss)]))
            bar.update(len(y) * rt.world)
            if step % 20 == 0:                                                    # but for saving, the only wait for the device
                guard.stop_if_lost(epoch, step, args)
                bar.set_postfix_str(f"epoch {epoch + 1}/{args.epochs}, loss {loss.item():.3f}", refresh=False)
            run.after_step(epoch, step, state, sums, started)                     # saves now and then, and when asked to stop

        guard.stop_if_lost(epoch, steps - 1, args)
        engine.all_sum(sums, rt)
        speed = images / (time.time() - started)
        record = guard.record() | {"drw": weight is not None, "loss": (sums[0] / sums[1]).item()}
        results = evaluate(net, data, rt) if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs else None
        run.after_epoch(epoch, state, record, results, started, speed, bar)
    bar.close()
    return results or evaluate(net, data, rt), net


def evaluate(net, data, rt):
    """{"avg": accuracies} of a teacher on the clean test images."""
    net.eval()
    engine.share_buffers(net, rt)                                         # the BatchNorm statistics that are saved
    return engine.evaluate(lambda x: {"avg": net(teacher_images(x, net))}, data.test_images, data.test_labels, data.groups, rt)


def teacher_images(x, net):
    """Clean float images (B,3,H,W), brought to the size that the network was made for, (B,3,S,S)."""
    return augment.resize(x, net.img_size).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def seen_by_student(net, data, rt, kinds=("clean", "strong", "mixed"), limit=20000, batch=64):
    """A teacher on (up to `limit`) training images as a student of the cpu recipe asks about them (Table 1 and Figure 3).

    kinds: "clean", "strong": cropped, RandAugmented, erased, and "mixed": those mixed, all at the data's own size. Returns
    {kind: (right (n,) bool, entropy (n,))}: is the arg max the label (of a mixed image: the one with the larger share), and
    the softmax's entropy in nats, from 0 (certain) to ln K.
    """
    net.eval()
    torch.manual_seed(0)
    n = min(limit, len(data.train_labels))
    order = torch.linspace(0, len(data.train_labels) - 1, n).long()[torch.randperm(n)]
    seen = {kind: ([], []) for kind in kinds}
    for index in data_lt.shard(order, batch):
        index = index.to(rt.device)
        images, labels = data.train_images[index], data.train_labels[index]
        strong = augment.strong_augment(images, images.shape[-1])
        mixed, target = augment.mixup_cutmix(strong, labels, data.num_classes)
        views = {"clean": (augment.to_float(images), labels), "strong": (strong, labels),
                 "mixed": (mixed, target.argmax(dim=1))}
        for kind, (rights, entropies) in seen.items():
            x, truth = views[kind]
            with rt.autocast():
                logits = net(teacher_images(x, net))
            rights.append(logits.argmax(dim=1) == truth)
            entropies.append(entropy(logits))
    return {kind: (torch.cat(rights), torch.cat(entropies)) for kind, (rights, entropies) in seen.items()}


def on_training_images(net, data, rt):
    """How right and how sure: means of seen_by_student over images, so over the long-tailed distribution, for result.json.

    "clean", and "strong", which are the mixed images: {kind: {"accuracy": percent, "entropy": nats}}.
    """
    seen = seen_by_student(net, data, rt, ("clean", "mixed"))
    return {name: {"accuracy": round(100 * float(right.double().mean()), 2), "entropy": round(float(e.double().mean()), 4)}
            for name, (right, e) in zip(("clean", "strong"), seen.values())}


def say_on_training_images(seen):
    """The result of on_training_images for people."""
    return "on its training images: " + "; ".join(f"{name} {s['accuracy']:.1f} % right, entropy {s['entropy']:.2f} nats"
                                                  for name, s in seen.items())


def run(args, data, rt, folder):
    """Train the teacher of these (resolved) settings, or go on with it, and fill its run folder (an run_folder.Run)."""
    images = len(data.train_labels)
    if images // data_lt.steps_per_epoch(images, args.batch) < 2 * rt.world:
        raise engine.UserError(f"--batch {args.batch}: BatchNorm needs two images or more in each of {rt.world} process(es)")
    seconds = seconds_of_run(args, data, rt, folder.start_epoch)
    rt.print(f"Teacher ({args.recipe} recipe): {args.arch}, {args.loss}, SAM rho {args.rho:g}, {args.epochs} epochs "
             f"on {engine.describe(data, args)}: about {engine.duration(seconds)} on {rt.hardware()}. Run folder: {args.out}")
    folder.begin(args, data)
    results, net = train(args, data, rt, folder)
    seen = on_training_images(net, data, rt)
    folder.finish(args, data, results, method=args.loss, model=args.arch, teacher=None, training_images=seen)
    rt.print(engine.tables(results, "teacher", data) + "\n" + say_on_training_images(seen))


def main():
    args = parse()
    rt = engine.setup(args.device, args.amp)
    resolve(args, rt)
    folder = run_folder.Run(args.out, args, rt)
    if folder.say_if_finished(args, "teacher"):
        return
    if args.resume and not folder.resumed:
        rt.print(f"There is nothing to resume in {args.out}: beginning")
    data = engine.load_data(args, rt)
    engine.explain(args, data, rt)
    folder.check_data(data)
    run(args, data, rt, folder)


if __name__ == "__main__":
    engine.run_main(main)
