r"""A plain ResNet-18, what somebody would do with 50 lines of PyTorch: a baseline in a few minutes.

    python -m experiments.resnet18 --dataset folder --data-dir fish --minutes 5

torchvision's network at 64 px, crops and flips, AdamW under a cosine, cross-entropy with logit
adjustment (losses.py), by which rare classes count as much as frequent ones. Flags as of
train_teacher.py. No SAM, no mixing, no averages.
"""
import torch
import torch.nn.functional as F

import augment
import data_lt
import train_teacher
from engine import evaluation, runtime
from engine.runtime import UserError
from engine.settings import flag, run_name
from engine.training import FiniteScaler, cosine_lr, set_lr

# Instead of train_teacher's values, where no flag gives another.
PLAIN = dict(recipe="cpu", arch="resnet18", img_size=64, norm="imagenet", loss="la", beta=0.0,
             rho=0.0, lr=1e-3, weight_decay=0.05, mixing=0.0, schedule="cosine")

USED = ("arch", "img_size", "norm", "epochs", "batch", "lr", "weight_decay", "warmup_epochs",
        "eval_every")               # flags of train_teacher.py that have an effect here


def train(args, data, net, rt, run):
    """The training loop. Returns {"avg": accuracies of the last epoch}."""
    counts = torch.tensor(data.counts, device=rt.device)
    log_prior = (counts / counts.sum()).log()                           # ln pi (K,)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=args.weight_decay,
                                  fused=True)
    scaler = FiniteScaler(net, optimizer, rt)
    n = len(data.train_labels)
    steps = data_lt.steps_per_epoch(n, args.batch)
    run.start(args, data, dict(model=net, optimizer=optimizer, scaler=scaler), ("loss",), steps, n)
    results = None
    for epoch in range(run.start_epoch, args.epochs):
        net.train()
        run.begin_epoch(epoch)
        batches = data_lt.shard(data_lt.shuffled(n, args.seed, epoch), args.batch)
        batches = run.remaining_steps(epoch, batches)
        for step, images, y in data.batches(batches, (args.seed, epoch, rt.rank)):
            runtime.seed_step(args.seed, epoch, step, rt.rank)
            set_lr(optimizer, cosine_lr(epoch + step / steps, args.epochs, args.lr,
                                        args.warmup_epochs))
            x = augment.random_crop_flip(images, images.shape[-1] // 8)
            x = augment.resize(x, args.img_size)
            with rt.autocast():
                logits = net(train_teacher.to_network(x))               # (B,K)
                loss = F.cross_entropy(logits.float() + log_prior, y)
            scaler.scale(loss).backward()
            scaler.unscale_()
            scaler.step(optimizer)
            optimizer.zero_grad()
            run.after_step(epoch, step, loss.detach()[None], scaler.update())
        results = None
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            results = evaluation.evaluate_teacher(net, data, rt)
        run.after_epoch(epoch, results, drw=False, lr=optimizer.param_groups[0]["lr"])
    return results or evaluation.evaluate_teacher(net, data, rt)


def resolved(args, rt):
    """Fill the settings (of train_teacher.parse) and the run folder's name; returns them."""
    out, names = args.out, [setting.name for setting in train_teacher.SETTINGS]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    idle = [flag(name) for name in given if name not in USED]
    if args.compile:
        idle.append("--compile")
    if idle:
        raise UserError(f"{', '.join(idle)} would have no effect: the plain ResNet-18 has one "
                        "loss and one schedule, and is not compiled")
    for name, value in PLAIN.items():
        if getattr(args, name) in (None, "auto"):
            setattr(args, name, value)
    train_teacher.resolve(args, rt)
    args.out = out or f"runs/{run_name('resnet18', args, given)}"
    return args


def main():
    args = train_teacher.parse(doc=__doc__)
    rt = runtime.setup(args.device, args.amp)
    if rt.world > 1:
        raise UserError("the plain ResNet-18 trains in one process")
    train_teacher.run_teacher(resolved(args, rt), rt, train=train)


if __name__ == "__main__":
    runtime.run_main(main)
