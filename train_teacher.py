r"""Train the CNN teacher on the long-tailed data: LDAM with deferred re-weighting, under SAM.

    python train_teacher.py --dataset cifar10 --imb 100            the teacher of DeiT-LT on CIFAR-10-LT
    python train_teacher.py --dataset shapes                       two to three minutes on 2 CPU threads, no download

Published: ResNet-32, LDAM-DRW-SAM, 200 epochs: 81.9 % on CIFAR-10-LT (imb 100), 45.4 % on CIFAR-100-LT (Saddle-LongTail,
arXiv 2212.13827). The teacher sees only weak augmentation, crop and flip; the student will ask it about strongly augmented,
mixed images that it never saw. That is meant: it is what makes DeiT-LT's distillation out-of-distribution.

`train_student.py` trains this teacher by itself when it is missing. Output: runs/teacher_.../ (see engine.py).
"""
import argparse
import time
from math import inf

import torch
from torch.nn.parallel import DistributedDataParallel

import augment
import data_lt
import engine
from losses import LDAMLoss, VSLoss, drw_weights, focal_loss, weighted_cross_entropy
from resnet import CIFAR_MEAN, CIFAR_STD, resnet32, resnet50
from sam import SAM, frozen_batchnorm_statistics

# One row per data set. paper: Saddle-LongTail's run.sh. cpu: the same method in minutes on 2 cores.
LDAM_PAPER = dict(arch="resnet32", loss="ldam", epochs=200, batch=128, lr=0.1, weight_decay=2e-4, schedule="step",
                  warmup_epochs=5, rho=0.8, drw_epoch=160, beta=0.9999, max_margin=0.5, eval_every=1)
LDAM_CPU = LDAM_PAPER | dict(epochs=24, batch=64, schedule="cosine", warmup_epochs=2, rho=0.1, drw_epoch=16, eval_every=4)
RECIPES = {
    "paper": {"cifar10": LDAM_PAPER, "cifar100": LDAM_PAPER},
    "cpu": {"cifar10": LDAM_CPU, "cifar100": LDAM_CPU,
            "shapes": LDAM_CPU | dict(epochs=12, batch=32, lr=0.03, rho=0.05, drw_epoch=7, warmup_epochs=1, eval_every=2)},
}
HELP = {
    "arch": "network: resnet32 or resnet50",
    "loss": "ldam (with a cosine classifier), ce, focal, la (logit adjustment) or vs (vector scaling)",
    "epochs": "passes over the training set",
    "batch": "images per step, over all processes together",
    "lr": "peak learning rate of SGD with momentum 0.9",
    "weight_decay": "of SGD",
    "schedule": "step: times 0.01 at 80 %% and 0.0001 at 90 %% of the epochs; cosine: to 0",
    "warmup_epochs": "epochs of linear warm-up",
    "rho": "radius of SAM's perturbation; 0 is plain SGD at half the cost",
    "drw_epoch": "first epoch (0-based) with re-weighted classes; the number of epochs or more: never",
    "beta": "of the effective number of images, for the class weights",
    "max_margin": "LDAM's margin of the rarest class",
    "eval_every": "epochs between evaluations on the test set (the last is always evaluated)",
}
LOSSES = {  # name -> criterion(logits, labels, weight=class weights or None)
    "ce": lambda counts, args: weighted_cross_entropy,
    "focal": lambda counts, args: focal_loss,
    "la": lambda counts, args: VSLoss(counts, gamma=0),
    "vs": lambda counts, args: VSLoss(counts),
    "ldam": lambda counts, args: LDAMLoss(counts, args.max_margin),
}
ARCHITECTURES = {"resnet32": resnet32, "resnet50": resnet50}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    engine.add_run_flags(parser)
    engine.add_recipe_flags(parser, RECIPES, HELP)
    return parser.parse_args(argv)


def resolve(args, rt):
    """Fill the recipe's settings and the run folder's name; raises UserError for settings that cannot be."""
    changed = engine.resolve_recipe(args, RECIPES, rt)
    if args.arch not in ARCHITECTURES or args.loss not in LOSSES or args.schedule not in ("step", "cosine"):
        raise engine.UserError(f"--arch is one of {', '.join(ARCHITECTURES)}; --loss one of {', '.join(LOSSES)}; "
                               "--schedule step or cosine")
    engine.check_ranges(args, epochs=(1, inf), batch=(rt.world, inf), lr=(0, inf), weight_decay=(0, inf), rho=(0, inf),
                        warmup_epochs=(0, inf), beta=(0, 0.999999), max_margin=(0, 1), eval_every=(1, inf))
    args.name = f"teacher_{engine.data_name(args)}_{args.recipe}{changed}_s{args.seed}"
    args.out = args.out or f"runs/{args.name}"


def build(args, num_classes):
    """The network of these settings (a dict); every data set here has 32 px images."""
    make = ARCHITECTURES[args["arch"]]
    return make(num_classes, cosine=args["loss"] == "ldam", img_size=32, mean=CIFAR_MEAN, std=CIFAR_STD)


def new_network(args, data, rt):
    """An untrained network of these settings on the device."""
    return build(vars(args), data.num_classes).to(rt.device, memory_format=torch.channels_last)


def load_teacher(path, class_names, rt):
    """A teacher from its run folder or checkpoint, ready to label: on the device, in evaluation mode, without gradients.

    Raises UserError if the file is none, or was trained for other classes or another order of them.
    """
    state = engine.load_checkpoint(path, ("model", "config", "class_names"))
    if state["config"].get("arch") not in ARCHITECTURES:
        raise engine.UserError(f"{path} is not a teacher: its network is {state['config'].get('model', 'unknown')}")
    theirs = state["class_names"]
    if len(theirs) != len(class_names):
        raise engine.UserError(f"the teacher {path} knows {len(theirs)} classes, the data have {len(class_names)}")
    if list(theirs) != list(class_names):
        raise engine.UserError(f"the teacher {path} knows other classes ({theirs[0]}, ...) than the data ({class_names[0]})")
    net = build(state["config"], len(theirs))
    engine.load_weights(net, state["model"], f"the teacher {path}")
    return net.to(rt.device, memory_format=torch.channels_last).eval().requires_grad_(False)


def learning_rate(args, t):
    """At fractional epoch t: linear warm-up, then "step" (the published one, per epoch) or "cosine" (per step)."""
    if t < args.warmup_epochs:
        return args.lr * min(1, (int(t) + 1) / args.warmup_epochs)
    if args.schedule == "cosine":
        return engine.cosine_lr(t, args.epochs, args.lr, 0, min_lr=0)
    return args.lr * (1 if t < 0.8 * args.epochs else 1e-2 if t < 0.9 * args.epochs else 1e-4)


def seconds_of_run(args, data, rt, start_epoch=0):
    """About how long the epochs from start_epoch on will take here."""
    net, epochs = new_network(args, data, rt), args.epochs - start_epoch
    x = augment.to_float(data.train_images[:args.batch // rt.world]).contiguous(memory_format=torch.channels_last)
    passes, tests = (2 if args.rho > 0 else 1) * epochs * len(data.train_labels), -(-epochs // args.eval_every)

    def forward(n):
        with rt.autocast():
            return net(x[:n]).sum()
    return engine.seconds_of_run(forward, len(x), passes, tests, len(data.test_labels), rt)


def train(args, data, rt, run):
    """The whole training loop. Returns {"avg": accuracies of the last epoch}."""
    torch.manual_seed(args.seed)
    net = new_network(args, data, rt)
    criterion = LOSSES[args.loss](data.counts, args)
    criterion = criterion.to(rt.device) if isinstance(criterion, torch.nn.Module) else criterion
    sgd = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    optimizer = SAM(sgd, args.rho)
    if run.resumed:
        engine.load_weights(net, run.resumed["model"], run.checkpoint)
        optimizer.load_state_dict(run.resumed["optimizer"])
    model = DistributedDataParallel(net) if rt.world > 1 else net
    steps = data_lt.steps_per_epoch(len(data.train_labels), args.batch)
    bar, results = engine.progress_bar(rt, args.epochs, run.start_epoch, len(data.train_labels)), None

    for epoch in range(run.start_epoch, args.epochs):
        net.train()
        started, loss_sum = time.time(), torch.zeros((), device=rt.device)
        weight = drw_weights(data.counts, epoch, args.drw_epoch, args.beta)       # None, or (K,) from the DRW epoch on
        weight = None if weight is None else weight.to(rt.device)
        order = data_lt.shuffled(len(data.train_labels), args.seed, epoch)
        for step, index in enumerate(data_lt.shard(order, args.batch, rt.rank, rt.world)):
            engine.seed_step(args.seed, epoch, step, rt.rank)
            engine.set_lr(optimizer, learning_rate(args, epoch + step / steps))
            index = index.to(rt.device, non_blocking=True)
            x, y = augment.to_float(data.train_images[index]), data.train_labels[index]    # (B,3,H,W) in [0,1], (B,)
            x = augment.random_crop_flip(x).contiguous(memory_format=torch.channels_last)

            with rt.autocast():
                loss = criterion(model(x), y, weight=weight)
            loss.backward()                                                       # gradient at w
            if args.rho > 0:
                optimizer.first_step()                                            # climb to w + e
                with frozen_batchnorm_statistics(net), rt.autocast():
                    second_loss = criterion(model(x), y, weight=weight)
                second_loss.backward()                                            # gradient at w + e
                optimizer.second_step()                                           # back to w, then SGD
            else:
                sgd.step()
                sgd.zero_grad()

            loss_sum += loss.detach()
            bar.update(len(index) * rt.world)
            if step % 20 == 0 and not bar.disable:                                # the only wait for the device in the loop
                bar.set_postfix_str(f"epoch {epoch + 1}/{args.epochs}, loss {loss.item():.3f}", refresh=False)

        mean_loss = (engine.all_sum(loss_sum, rt) / steps / rt.world).item()
        speed = len(order) / (time.time() - started)
        record = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], "drw": weight is not None, "loss": mean_loss}
        results = None
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            results = evaluate(net, data, rt)
            record |= results
        run.log(record | {"images_per_second": round(speed, 1), "seconds": round(time.time() - started, 2)})
        run.save(model=net.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch + 1, config=vars(args),
                 class_names=data.class_names, counts=data.counts)
        engine.report(bar, rt, epoch, mean_loss, speed, results)
    bar.close()
    return results or evaluate(net, data, rt)


def evaluate(net, data, rt):
    """{"avg": accuracies} of a teacher on the clean test images."""
    net.eval()
    engine.share_buffers(net, rt)                                         # the BatchNorm statistics that are saved
    return engine.evaluate(lambda x: {"avg": net(x.contiguous(memory_format=torch.channels_last))},
                           data.test_images, data.test_labels, data.groups, rt)


def run(args, data, rt, folder):
    """Train the teacher of these (resolved) settings, or go on with it, and fill its run folder (an engine.Run)."""
    seconds = seconds_of_run(args, data, rt, folder.start_epoch)
    rt.print(f"Teacher ({args.recipe} recipe): {args.arch}, {args.loss}, SAM rho {args.rho:g}, {args.epochs} epochs "
             f"on {engine.describe(data, args)}: about {engine.duration(seconds)} on {rt.hardware()}. Run folder: {args.out}")
    folder.begin(args, data)
    results = train(args, data, rt, folder)
    folder.finish(args, data, results, method=args.loss, model=args.arch, teacher=None)
    rt.print(engine.table(results, "teacher"))


def main():
    args = parse()
    rt = engine.setup(args.device, args.amp)
    resolve(args, rt)
    folder = engine.Run(args.out, args, rt)
    data = engine.load_data(args, rt)
    run(args, data, rt, folder)


if __name__ == "__main__":
    engine.run_main(main)
