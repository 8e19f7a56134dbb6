r"""Pieces of a training step: learning rate, weight decay, averaged weights, finite steps."""
import copy
import math

import torch

from engine.runtime import UserError, all_sum, exit_together, one_line

FEWEST_STEPS = 500          # of the optimizer, below which no recipe of ours has learned much


def cosine_lr(t, epochs, peak, warmup_epochs, warmup_lr=1e-6, min_lr=1e-5):
    """Learning rate at fractional epoch t: linear warm-up, then a half cosine (the published rule).

        t < W:  warmup_lr + (peak - warmup_lr) t / W
        else:   min_lr + (peak - min_lr) (1 + cos(pi t / epochs)) / 2

    W = warmup_epochs. The cosine starts at epoch 0, not at W. No rate is above the peak.
    """
    warmup_lr, min_lr = min(warmup_lr, peak), min(min_lr, peak)
    if t < warmup_epochs:
        return warmup_lr + (peak - warmup_lr) * t / warmup_epochs
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * t / epochs))


def fewest_epochs(steps):
    """The epochs of this many steps that make FEWEST_STEPS."""
    return math.ceil(FEWEST_STEPS / steps)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def micro_batches(n, steps, world, largest):
    """Number of micro-batches per step of at most `largest` images, the same in each process.

    n images an epoch make `steps` steps of `world` processes.
    """
    return -(-n // (steps * world * largest))               # rounded up


def parameter_groups(net, weight_decay):
    """AdamW's groups: decay for matrices; none for biases, norms, scales, tokens and positions."""
    decayed, others = [], []
    for name, p in net.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim <= 1 or name in ("cls_token", "dist_token", "pos_embed"):
            others.append(p)
        else:
            decayed.append(p)
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0}]


def compiled(model, mode=None):
    """torch.compile of a network whose training batches (B,3,S,S) all have one size.

    There is a graph for each mode of the network (SAM's second pass is one). mode: torch.compile's;
    "reduce-overhead" replays a pass's kernels as one CUDA graph.
    """
    torch._dynamo.config.optimize_ddp = False       # else it is split at DDP's buckets: not tried
    return torch.compile(model, mode=mode, dynamic=False)


def check_compiler(device):
    """Compile a function of one line. UserError if that cannot be done here."""
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except Exception as error:                  # of the compiler: no g++, no Python.h, no space
        raise UserError(f"--compile does not work here ({one_line(error)}): leave it out, or "
                        "install what it needs: a C++ compiler such as g++ (on a GPU Triton "
                        "and a C compiler) and Python's header files") from None


class EMA:
    """Exponential moving average of a network: e <- d e + (1 - d) w. `.model` is the averaged one.

    BatchNorm's running statistics are averaged too. decay: d, per optimizer step.
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.pairs = [(mine, theirs) for mine, theirs in
                      zip(self.model.state_dict().values(), model.state_dict().values())
                      if mine.is_floating_point()]

    @torch.no_grad()
    def update(self, finite=1.0):
        """After an optimizer step; finite: 0 for a step that was undone, where e stays as it is."""
        mine, theirs = zip(*self.pairs)
        change = torch._foreach_sub(theirs, mine)
        torch._foreach_mul_(change, (1 - self.decay) * finite)
        torch._foreach_add_(mine, change)

    def state_dict(self):
        return self.model.state_dict()

    def load_state_dict(self, state):
        self.model.load_state_dict(state)


class FiniteScaler:
    """Gradient scaling by torch.amp.GradScaler's protocol; steps that are not finite are undone.

        scaler.scale(loss).backward()       as often as gradients are accumulated
        scaler.unscale_()                   under SAM these two come twice in a step
        scaler.step(optimizer)              leaves weights and moments alone if not finite
        finite = scaler.update()            puts back what else the step has moved; 1 or 0, a tensor

    A step is not finite if its loss or a gradient is infinite or NaN, in any process. Nothing here
    waits for the device: PyTorch's fused optimizers read `found_inf` there. What a step moves
    besides the weights (BatchNorm's statistics, PaCo's queue and key encoder, `extra` tensors) is
    restored from a copy.

    float16 lacks small numbers: under float16 autocast the loss is multiplied by `scale`, which a
    step that is not finite halves and 2,000 finite ones double: GradScaler's rule. GradScaler
    itself refuses to unscale twice in a step, as SAM must.
    """
    LIMIT = 10          # steps in a row that are not finite, after which the run ends
    GROWTH = 2000       # finite steps in a row after which the scale doubles

    def __init__(self, net, optimizer, rt, *extra):
        if not optimizer.defaults.get("fused"):
            raise ValueError("only a fused optimizer can skip a step without a host-device sync")
        self.rt, self.optimizer, self.scaled = rt, optimizer, rt.amp is torch.float16
        self.nonfinite = torch.zeros((), device=rt.device)      # of the present step: 0 or 1
        start = {"scale": 2.0 ** 16 if self.scaled else 1.0, "good": 0, "in_a_row": 0, "skipped": 0}
        self.counts = {name: torch.tensor(value, device=rt.device) for name, value in start.items()}
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        trained = {id(p) for p in self.params}
        moved = [t for t in net.state_dict(keep_vars=True).values() if id(t) not in trained]
        self.moved = {}                                         # dtype -> the tensors to restore
        for tensor in [*moved, *extra]:
            self.moved.setdefault(tensor.dtype, []).append(tensor.detach())
        self.remember()
        optimizer.found_inf = self.nonfinite

    def remember(self):
        """Copy what a step moves, one flat tensor per dtype; again after loading a state."""
        self.before = {dtype: flat(tensors) for dtype, tensors in self.moved.items()}

    def scale(self, loss):
        self.nonfinite += ~loss.detach().isfinite()
        return loss * self.counts["scale"] if self.scaled else loss

    @torch.no_grad()
    def unscale_(self):
        """Divide the gradients by the scale and find out, for all processes, if they are finite."""
        grads = [p.grad for p in self.params if p.grad is not None]
        if self.scaled:
            torch._foreach_mul_(grads, 1 / self.counts["scale"])
        self.nonfinite += ~torch.stack(torch._foreach_norm(grads)).isfinite().all()
        all_sum(self.nonfinite, self.rt).clamp_(max=1)

    def step(self, optimizer):
        optimizer.step()

    @torch.no_grad()
    def update(self):
        """Undo what a step that is not finite has moved, count it; returns 1.0 if it was finite."""
        bad = self.nonfinite > 0
        for dtype, tensors in self.moved.items():
            kept = torch.where(bad, self.before[dtype], flat(tensors))
            parts = kept.split([t.numel() for t in tensors])
            # In the memory format of each tensor: else foreach copies one after the other.
            parts = [part.as_strided(t.shape, t.stride()) for part, t in zip(parts, tensors)]
            torch._foreach_copy_(tensors, parts)
            self.before[dtype] = kept
        c = self.counts
        c["skipped"] += bad
        c["in_a_row"].add_(bad).mul_(bad)
        if self.scaled:
            c["good"].add_(1).mul_(~bad)
            grown = torch.where(c["good"] == self.GROWTH, 2.0, 1.0)
            c["scale"].mul_(torch.where(bad, 0.5, grown))
            c["good"].remainder_(self.GROWTH)
        self.nonfinite.zero_()
        return (~bad).float()

    def stop_if_lost(self, epoch, step, lr):
        """UserError after LIMIT steps in a row that were not finite. Waits for the device."""
        n = self.in_a_row
        if n >= self.LIMIT:
            now = self.optimizer.param_groups[0]["lr"]
            exit_together(UserError(
                f"epoch {epoch + 1}, step {step + 1}: loss or gradients were not finite in {n} "
                f"steps in a row, at learning rate {now:.3g}; the last checkpoint is from before "
                f"them. Try a lower --lr than {lr:g}, more --warmup-epochs or --amp none, from the "
                "start, or with --resume --force and this run's folder as --out"), self.rt)

    @property
    def in_a_row(self):
        """How many of the latest steps were not finite. Waits for the device."""
        return int(self.counts["in_a_row"])

    def begin_counting(self):
        """Start the count towards LIMIT again: a resumed run gets as many new tries."""
        self.counts["in_a_row"].zero_()

    @property
    def skipped(self):
        """How many steps of the run were not finite. Waits for the device."""
        return int(self.counts["skipped"])

    def state_dict(self):
        # A run that goes on in float16 begins with float16's own scale, not with this one's 1.
        unused = () if self.scaled else ("scale", "good")
        return {name: value for name, value in self.counts.items() if name not in unused}

    def load_state_dict(self, counts):
        for name, value in counts.items():
            self.counts[name].copy_(value)
        self.remember()


def flat(tensors):
    """One new tensor (n,) of all elements, those of a tensor in their order in memory."""
    return torch.cat([t.as_strided((t.numel(),), (1,)) for t in tensors])
