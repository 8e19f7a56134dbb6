r"""What every run needs, once: device and processes, signals, seeds, schedules, EMA, evaluation, settings.

Nothing here knows the method; if you must read this file to follow DeiT-LT, something is in the wrong place.
"""
import argparse
import atexit
import copy
import ctypes
import math
import os
import platform
import re
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import augment
import data_lt


class UserError(Exception):
    """A mistake that a person can put right; the message is one line that says how."""


def run_main(main):
    """Run a script: a UserError, a DataError or a file that cannot be read or written ends it with one line and exit code 2.

    Anything else is a bug and keeps its traceback. One of several processes ends here, see leave().
    """
    global stop_signal
    before, stop_signal = {number: signal.getsignal(number) for number in STOP_SIGNALS}, 0
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):                                    # a name that the terminal cannot show is escaped
            stream.reconfigure(errors="backslashreplace")
    code = 0
    try:
        main()
    except (UserError, data_lt.DataError) as error:
        if int(os.environ.get("RANK", 0)) > 0:                            # most likely all say the same: torchrun ends this one
            time.sleep(5)                                                 # as soon as the main one has said it
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)                             # before a run's first step, or no run at all
        code = 128 + signal.SIGINT
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        code = 2
    except SystemExit as error:
        code = error.code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    grouped = dist.is_available() and dist.is_initialized()
    try:
        if code:
            sys.exit(code)                                                # wandb listens to it
        if grouped:
            dist.destroy_process_group()                                  # where all is well: NCCL's may wait for the others
    finally:
        if grouped:
            leave(code or 0)


def leave(code=0):
    """End one of several processes without Python's own ending, which gloo's threads, alive after DDP, abort now and then:
    torchrun would call a finished run a failure."""
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
stop_signal, stop_asked_at = 0, 0.0                                       # which has asked this process to stop, and when


def note_signal(number, _):
    """The first signal is noted, for the end of the step (see run_folder.py); the second ends the process at once.

    Those of one second count as one: torchrun hands on a signal that its workers may have got themselves.
    """
    global stop_signal, stop_asked_at
    if stop_signal and time.time() - stop_asked_at > 1:
        os._exit(128 + number)
    if not stop_signal:
        stop_signal, stop_asked_at = number, time.time()
        name = signal.Signals(number).name
        print(f"{name}: saving after this step (or evaluation); once more stops at once", file=sys.stderr, flush=True)


# ---- Device and processes ------------------------------------------------------------------------------------------------

@dataclass
class Runtime:
    """Where a run computes: device, this process's rank of world, and the autocast type (None: float32)."""
    device: torch.device
    rank: int = 0
    world: int = 1
    amp: torch.dtype = None

    @property
    def main(self):
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None)

    def print(self, *args):
        if self.main:
            print(*args, flush=True)

    def hardware(self):
        """For people: the GPU's name, or the CPU's with the threads in use."""
        if self.device.type == "cuda":
            return f"{self.world} x {torch.cuda.get_device_name(self.device)}"
        n, name = torch.get_num_threads(), cpu_info(r"model name\s*:\s*(.+)")
        threads = f"{n} thread{'s' if n > 1 else ''} of {name[1] if name else platform.machine()}"
        return f"{self.world} x {threads}" if self.world > 1 else threads


def cpu_info(pattern):
    """First match of a regular expression in /proc/cpuinfo, or None (also where there is no such file)."""
    try:
        with open("/proc/cpuinfo") as f:
            return re.search(pattern, f.read())
    except OSError:
        return None


def has_bf16(device):
    """Does the hardware multiply bfloat16 matrices faster than float32 ones? (CPU: as /proc/cpuinfo says.)

    AMD's avx512_bf16 does. Intel's, without amx_bf16, takes twice the time of float32: see the README's part on speed.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and cpu_info(r"\b(amx_bf16|bf16)\b|AuthenticAMD(?s:.*)\bavx512_bf16\b") is not None


def keep_freed_memory():
    """Let glibc keep freed memory for the next tensor; otherwise it goes back to the system and comes again, page by page."""
    with suppress(OSError, AttributeError):                               # another system has another allocator
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)                                               # M_MMAP_MAX: nothing is mapped on its own
        libc.mallopt(-1, 2 ** 31 - 1)                                     # M_TRIM_THRESHOLD: nothing is given back


def setup(device="auto", amp="auto"):
    """Runtime for this process; joins torchrun's process group if there is one. Raises UserError for a missing device."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device) or ":" in device and world > 1:
        raise UserError(f"--device is auto, cpu, cuda or, for one process, cuda:N, not {device}")
    if device != "cpu" and int(device[5:] or local) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: this torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    device = torch.device(f"cuda:{local}" if device == "cuda" else device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:
        keep_freed_memory()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if amp == "auto":
        amp = "bf16" if has_bf16(device) else "none"
    return Runtime(device, rank, world, {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[amp])


def trainable(net, rt, compiled=False):
    """The network as the training loop calls it: gradients averaged over processes, and compiled if wanted."""
    model = DistributedDataParallel(net) if rt.world > 1 else net
    return torch.compile(model) if compiled else model


def wait_for_all(rt):
    """Barrier: what the main process has written by now, the others may read."""
    if rt.world > 1:
        dist.barrier()


def end_together(error, rt):
    """End all processes because of a UserError that all have come to: one line from the main process, not one from each.

    Only the main process need have the error itself. torchrun ends all as soon as one has ended, so they wait for the line.
    """
    if rt.world == 1:
        raise error
    if rt.main:
        print(f"error: {error}", file=sys.stderr, flush=True)
    dist.barrier()
    sys.exit(2)


def all_sum(tensor, rt):
    """Sum over processes, in place."""
    if rt.world > 1:
        dist.all_reduce(tensor)
    return tensor


def all_max(numbers, rt):
    """The largest of all processes' whole numbers, one by one, the same in each."""
    if rt.world == 1:
        return numbers
    largest = torch.tensor(numbers, dtype=torch.long)                     # on the CPU, by gloo: waits for no GPU
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def gather(tensor, rt):
    """Rows of all processes (n_r, ...) -> (sum of n_r, ...), in the order of ranks; the n_r may differ."""
    if rt.world == 1:
        return tensor
    sizes = [torch.zeros((), dtype=torch.long) for _ in range(rt.world)]
    dist.all_gather(sizes, torch.tensor(len(tensor)))                     # on the CPU, by gloo: waits for no GPU
    sizes = [int(n) for n in sizes]
    padded = torch.cat([tensor, tensor.new_zeros(max(sizes) - len(tensor), *tensor.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(rt.world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, sizes)])


def share_buffers(net, rt):
    """Give every process the main process's buffers: each has seen other images, so BatchNorm's statistics differ."""
    if rt.world > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


def seed_step(*key):
    """Seed torch from (seed, epoch, step, rank): everything random in that step follows from these numbers alone."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


# ---- Schedules and averages ----------------------------------------------------------------------------------------------

def cosine_lr(t, epochs, peak, warmup_epochs, warmup_lr=1e-6, min_lr=1e-5):
    """Learning rate at fractional epoch t: linear warm-up, then a half cosine (the published rule).

        t < W:  warmup_lr + (peak - warmup_lr) t / W
        else:   min_lr + (peak - min_lr) (1 + cos(pi t / epochs)) / 2          the cosine's clock starts at 0, not at W
    """
    if t < warmup_epochs:
        return warmup_lr + (peak - warmup_lr) * t / warmup_epochs
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * t / epochs))


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


class EMA:
    """Exponential moving average of a network's weights, BatchNorm's statistics among them: e <- d e + (1 - d) w.

    Evaluate `.model`.
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model, bad=0.0):
        """After a step; bad: 1 for one that was left out (a number or a tensor), where nothing is averaged either."""
        mine, theirs = ([t for t in m.state_dict().values() if t.is_floating_point()] for m in (self.model, model))
        change = torch._foreach_sub(theirs, mine)
        torch._foreach_mul_(change, (1 - self.decay) * (1 - bad))
        torch._foreach_add_(mine, change)


class Guard:
    """Takes a step back where its loss or a gradient is not finite, and ends a run in which that does not stop.

        guard.begin();  guard.backward(loss);  guard.check();  optimizer.step();  guard.end()

    With SAM, backward and check come twice. Nothing here waits for the device: whether the step is `bad` (0 or 1) stays
    there. PyTorch's fused optimizers read it there, as `found_inf`, and leave weights and moments alone; what else a step
    moves, BatchNorm's statistics, PaCo's queue and key encoder, is put back from a copy.

    float16 has no small numbers: under its autocast the loss is multiplied by `scale`, and `check` divides the gradients by
    it. A bad step halves the scale, 2,000 good ones double it. That is the rule of torch.amp.GradScaler, which cannot be
    used here: it refuses to divide twice in a step.
    """
    LIMIT, GROWTH = 10, 2000                                              # bad steps in a row; good steps until a larger scale

    def __init__(self, net, optimizer, rt, *others):
        """others: tensors outside the network that a step moves."""
        if not optimizer.defaults.get("fused"):
            raise ValueError("only fused optimizers can leave a step out without a wait for the device")
        number = lambda value: torch.full((), value, device=rt.device)
        self.rt, self.bad, self.scaled = rt, number(0.0), rt.amp is torch.float16
        self.counts = {"scale": number(2.0 ** 16 if self.scaled else 1.0), "good": number(0), "in_a_row": number(0),
                       "skipped": number(0)}
        self.optimizer, self.params = optimizer, [p for group in optimizer.param_groups for p in group["params"]]
        trained = set(map(id, self.params))                               # the rest: BatchNorm, PaCo's queue and key encoder
        self.buffers = [*(t for t in net.state_dict(keep_vars=True).values() if id(t) not in trained), *others]
        optimizer.found_inf = self.bad

    def begin(self):
        self.before = [b.detach().clone() for b in self.buffers]
        self.bad.zero_()

    def backward(self, loss):
        self.bad += ~loss.detach().isfinite()
        (loss * self.counts["scale"] if self.scaled else loss).backward()

    @torch.no_grad()
    def check(self):
        """Bring the gradients to their true scale and note, for all processes, whether the step is bad so far."""
        grads = [p.grad for p in self.params if p.grad is not None]
        if self.scaled:
            torch._foreach_mul_(grads, 1 / self.counts["scale"])
        self.bad += ~torch.stack(torch._foreach_norm(grads)).isfinite().all()
        all_sum(self.bad, self.rt).clamp_(max=1)

    @torch.no_grad()
    def end(self):
        """Put back what a bad step has moved, and count."""
        for now, before in zip(self.buffers, self.before):
            torch.where(self.bad > 0, before, now, out=now)
        c, bad = self.counts, self.bad > 0
        c["skipped"] += bad
        c["in_a_row"].add_(bad).mul_(bad)
        if self.scaled:
            c["good"].add_(1).mul_(~bad)
            c["scale"].mul_(torch.where(bad, 0.5, torch.where(c["good"] == self.GROWTH, 2.0, 1.0)))
            c["good"].remainder_(self.GROWTH)

    def unless_bad(self, numbers):
        """The numbers of a step, for the epoch's sums; zeros for a bad one."""
        return torch.where(self.bad > 0, 0, numbers)

    def record(self):
        """For the log: the learning rate, and how many steps of the run have been left out."""
        return {"lr": self.optimizer.param_groups[0]["lr"], "skipped": int(self.counts["skipped"])}

    def stop_if_lost(self, epoch, step, args):
        """Raise UserError after LIMIT bad steps in a row. Waits for the device, so not every step."""
        if (n := int(self.counts["in_a_row"])) >= self.LIMIT:
            lr = self.optimizer.param_groups[0]["lr"]
            end_together(UserError(
                f"epoch {epoch + 1}, step {step + 1}: loss or gradients were not finite in {n} steps in a row, at learning "
                f"rate {lr:.3g}; the last checkpoint is from before them. Try a lower --lr than {args.lr:g}, more "
                "--warmup-epochs or --amp none, from the start or with --resume --force"), self.rt)

    def load_state_dict(self, counts):
        for name, value in counts.items():
            self.counts[name].copy_(value)


# ---- Evaluation ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(predict, images, labels, groups, rt, batch=500):
    """Accuracy of every head on a test set, over all processes, each image counted once.

    predict: float images (B,3,H,W) in [0,1] -> {head name: logits (B,K)}. images uint8 (N,3,H,W), labels (N,).
    Returns {head: {"overall", "head", "mid", "tail": percent, "per_class": [K percents]}}. Overall is plain top-1; a group is
    the mean of its classes' recalls (NaN for an empty group).
    """
    K = sum(map(len, groups.values()))
    mine = torch.arange(len(labels), device=labels.device)[rt.rank::rt.world]
    right = {}                                                            # head -> (K,) images of each class that it knows
    for index in mine.split(batch):
        with rt.autocast():
            heads = predict(augment.to_float(images[index]))
        for head, logits in heads.items():
            known = (logits.argmax(dim=1) == labels[index]).double()
            right[head] = right.get(head, 0) + torch.bincount(labels[index], known, minlength=K)
    total = torch.bincount(labels, minlength=K).cpu()
    return {head: accuracies(all_sum(correct, rt).cpu(), total, groups) for head, correct in right.items()}


def accuracies(correct, total, groups):
    """Test images of each class, those known (K,) and all (K,) -> overall, group and per-class accuracies in percent."""
    recall = 100 * correct / total                                        # NaN for a class without test images
    out = {"overall": float(100 * correct.sum() / total.sum())}
    out |= {name: float(recall[classes].nanmean()) for name, classes in groups.items()}
    return {k: round(v, 3) for k, v in out.items()} | {"per_class": [round(float(r), 2) for r in recall]}


def report(bar, rt, record, speed, results):
    """Print an epoch's line above the progress bar: overall (head mid tail) of every head, where they were measured."""
    if rt.main:
        line = "{} {overall:.1f} ({head:.1f} {mid:.1f} {tail:.1f})"
        shown = "  ".join(line.format(name, **r) for name, r in (results or {}).items())
        shown += f"  {record['skipped']} steps were not finite" if record["skipped"] else ""
        bar.write(f"epoch {record['epoch'] + 1:4d}  loss {record['loss']:.3f}  {speed:5.0f} images/s  {shown}")


def progress_bar(rt, images, done):
    """tqdm over all images of the whole run, so that the time left is the run's; silent where the output is not a terminal."""
    return tqdm(total=images, initial=done, unit=" images", unit_scale=True, disable=None if rt.main else True)


COLUMNS = ("overall", "head", "mid", "tail")


def by_count(results, data):
    """The large sets' results with groups by training images, head > 100, mid 20 to 100, tail < 20; {} for other data.

    Published tables mix these groups and those of the published code, which split the order of classes elsewhere.
    """
    groups = data_lt.head_mid_tail("", data.counts) if data.name in data_lt.LISTS else {}
    recall = {name: torch.tensor(r["per_class"]) for name, r in results.items()} if groups else {}
    return {name: {"overall": results[name]["overall"]} | {g: round(float(r[classes].nanmean()), 3) for g, classes in
                                                           groups.items()} for name, r in recall.items()}


def tables(results, title, data):
    """The table of results and, for the large sets, the one with groups by training images, as text."""
    other = by_count(results, data)
    return table(results, title) + (f"\nby training images (> 100, 20 to 100, < 20)\n{table(other, title)}" if other else "")


def table(results, title=""):
    """The head/mid/tail table as text, a row per entry of {row name: accuracies}."""
    width = max([6, len(title), *map(len, results)])
    lines = [f"{title:<{width}}" + "".join(f"{c:>9}" for c in COLUMNS)]
    shown = lambda x: f"{'-':>9}" if math.isnan(x) else f"{x:9.1f}"       # no test image in this group
    return "\n".join(lines + [f"{name:<{width}}" + "".join(shown(r[c]) for c in COLUMNS) for name, r in results.items()])


# ---- Settings ------------------------------------------------------------------------------------------------------------

def add_run_flags(parser):
    """The flags that both training scripts have."""
    parser.add_argument("--dataset", default="cifar10", choices=data_lt.DATASETS,
                        help="shapes is built in and needs no download (default: %(default)s)")
    parser.add_argument("--imb", type=float, help="imbalance n_max / n_min, 1 = balanced (default: 100; a folder and the large "
                        "sets: as they are)")
    parser.add_argument("--imb-type", default="exp", choices=["exp", "step"], help="shape of the tail (default: %(default)s)")
    parser.add_argument("--data-dir", default="data", help="torchvision's CIFAR folder (downloaded into if empty), or a folder "
                        "with train/<class>/* and test/<class>/* (or val/); imagenet_lt, inat18: what the lists' paths start "
                        "from (default: %(default)s)")
    parser.add_argument("--holdout", type=float, metavar="SHARE", help="test on this share of each class's training images "
                        "and train on the others, the same for every seed: a folder without test/ or val/; CIFAR, to choose "
                        "settings without its test set")
    parser.add_argument("--train-list", help="imagenet_lt, inat18: file with lines 'path label' (default: the published name, "
                        "in --data-dir)")
    parser.add_argument("--test-list", help="the same for the test images")
    parser.add_argument("--skip-bad", action="store_true", help="go on without images that cannot be used, after a list of "
                        "them; otherwise the list is all that happens")
    parser.add_argument("--recipe", default="auto", choices=["auto", "paper", "cpu", "best"],
                        help="which row of the recipe table; best: ours, on top of cpu; auto: paper on a GPU, cpu without one "
                        "(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "none"],
                        help="autocast to bfloat16 or float16 (with a loss scaler); auto: bf16 where it is faster than "
                        "float32, else none (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile: a minute or two at the start, then a faster "
                        "step (of the student on a CPU: 3 to 7 %%)")
    parser.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard too, into the run folder")
    parser.add_argument("--wandb", action="store_true", help="send the log to Weights & Biases too, project deit-lt")
    parser.add_argument("--out", help="run folder (default: runs/<name from the settings>)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run folder's last.pt, wherever it stopped")
    again.add_argument("--overwrite", action="store_true", help="start again in a run folder that already has a run")
    parser.add_argument("--force", action="store_true", help="resume although settings have changed")
    parser.add_argument("--save-every", type=interval, default="10m", metavar="STEPS|MINUTESm", help="how often last.pt is "
                        "written inside an epoch: 500 = steps, 10m = minutes; it always is after one (default: %(default)s)")


def add_recipe_flags(parser, recipes, help_texts):
    """A flag for every setting of the recipe rows, of the same name; its help shows what the rows say."""
    group = parser.add_argument_group("recipe", "each overrides the number of the same name in the recipe table at the top "
                                      "of this file; in brackets: the rows' values")
    for key, text in help_texts.items():
        rows = {f"{recipe} {dataset}": row[key] for recipe, r in recipes.items() for dataset, row in r.items()
                if not callable(row) and key in row}
        shown = ", ".join(f"{name}: {value}" for name, value in rows.items())
        kind = type(next(iter(rows.values())))
        if kind is bool:
            group.add_argument(flag(key), action=argparse.BooleanOptionalAction, default=None, help=f"{text} [{shown}]")
        else:
            group.add_argument(flag(key), type=kind, metavar=kind.__name__.upper(), help=f"{text} [{shown}]")


def interval(text):
    """For argparse: "500" (steps) or "10m" (minutes), either above 0; returned as it is."""
    if not 0 < float(text.removesuffix("m")) < math.inf or not (text.endswith("m") or text.isdecimal()):
        raise ValueError
    return text


def flag(key):
    return "--" + key.replace("_", "-")


def as_flags(args, keys):
    """The settings of these names as command-line flags, those that are None left out."""
    return [f"{flag(key)}={value}" for key in keys if (value := getattr(args, key)) is not None]


def check_ranges(args, **ranges):
    """Raise UserError for a setting outside its (lowest, highest) allowed value; NaN is outside."""
    for name, (low, high) in {"seed": (0, 2 ** 62), **ranges}.items():
        if not low <= getattr(args, name) <= high:
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise UserError(f"{flag(name)} must be {limits}, not {getattr(args, name)}")


def check_choices(args, **choices):
    """Raise UserError for a setting that is none of its possible values."""
    for name, values in choices.items():
        if getattr(args, name) not in values:
            raise UserError(f"{flag(name)} is one of {', '.join(map(str, values))}, not {getattr(args, name)}")


def data_name(args):
    """What the data are, for a run's name: cifar10_imb100."""
    name = args.dataset
    if name == "folder":
        name = re.sub(r"[^\w.-]+", "-", data_lt.shown(os.path.basename(os.path.abspath(args.data_dir))))
    name += "" if args.imb is None else f"_imb{args.imb:g}" + ("step" if args.imb_type == "step" else "")
    return name + (f"_holdout{args.holdout:g}" if args.holdout and args.dataset != "folder" else "")


def room(rt):
    """Bytes that a data set may take: 40 % of this process's share of the memory; on a GPU, no more of what is free there."""
    share = data_lt.memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 0.4 * min(share, torch.cuda.mem_get_info(rt.device)[0] if rt.device.type == "cuda" else share)


def load_data(args, rt):
    """The data set of these settings on this process's device; the main process loads first, so a download happens once."""
    if not rt.main:
        wait_for_all(rt)
    try:
        data = data_lt.load_data(args.dataset, args.imb, args.imb_type, args.data_dir, args.img_size,
                                 round(args.img_size / getattr(args, "eval_crop", 1.0)), args.holdout,
                                 (args.train_list, args.test_list), args.skip_bad, rt.print, room(rt))
    finally:
        if rt.main:
            wait_for_all(rt)
    return data.to(rt.device)


def explain(args, data, rt):
    """Print, for a folder of one's own, what is in it and what was made of it: one paragraph."""
    if args.dataset != "folder":
        return
    seen = data_lt.survey(args.data_dir, args.imb, args.imb_type, args.holdout)
    tests = torch.bincount(data.test_labels.cpu(), minlength=data.num_classes).tolist()
    sizes = {name: len(classes) for name, classes in data.groups.items()}
    untested = [name for name, n in zip(data.class_names, tests) if n == 0]
    coarse = sum(0 < n < 10 for n in tests)
    rt.print(f"{describe(data, args)}, the largest '{data.class_names[0]}', the smallest '{data.class_names[-1]}'; "
             f"{len(data.test_labels):,} images to test on. Groups by training images: head (more than 100) {sizes['head']} "
             f"classes, mid (20 to 100) {sizes['mid']}, tail (fewer than 20) {sizes['tail']}. "
             + f"Without a test image, so without an accuracy: {', '.join(untested[:10])}. " * bool(untested)
             + f"{coarse} classes have fewer than 10 test images: their accuracies are coarse. " * bool(coarse)
             + f"Half of the images are at least {seen.side} px on their shorter side; of the central square "
             f"{args.img_size} px " + (f"in patches of {args.patch_size} px " if hasattr(args, "patch_size") else "")
             + f"are used. {args.epochs} epochs make {args.epochs * seen.images:,} samples. (Recipe {args.recipe}; --img-size, "
             "--epochs and all other settings can be given.)")


def describe(data, args):
    """For people: CIFAR-10-LT (imb 100, 12,406 images, 10 classes of 5000 to 50)."""
    imb = data.imb if args.imb is None else args.imb
    return (f"{data.label} (imb {imb:.4g}, {len(data.train_labels):,} images, {data.num_classes} classes of "
            f"{max(data.counts)} to {min(data.counts)})")


def resolve_data(args):
    """Fill --imb where it has a default; raises UserError for flags that the data set does not have."""
    if args.imb is None and args.dataset not in ("folder", *data_lt.LISTS):
        args.imb = 100.0
    if args.holdout is not None and args.dataset not in ("folder", "cifar10", "cifar100"):
        raise UserError("--holdout is for --dataset folder, cifar10 and cifar100")
    if args.dataset not in data_lt.LISTS and (args.train_list or args.test_list):
        raise UserError(f"--train-list and --test-list are for --dataset {' or '.join(data_lt.LISTS)}")
    if args.dataset in data_lt.LISTS and args.imb is not None:
        raise UserError(f"--imb: {args.dataset} is as imbalanced as its lists")
    if args.holdout is not None:
        check_ranges(args, holdout=(0.01, 0.9))


def resolve_recipe(args, recipes, rt, method=None):
    """Fill every recipe setting that has no flag from its row, some of which the method (a dict) may replace.

    Returns (the row, the text of what was overridden, for the run's name). A row may be a function of what is known about a
    folder of one's own, a data_lt.Survey.
    """
    if args.recipe == "auto":
        wanted = "paper" if rt.device.type == "cuda" else "cpu"
        args.recipe = min(recipes, key=lambda name: (args.dataset not in recipes[name], name != wanted))
    if args.dataset not in recipes[args.recipe]:
        known = [name for name in recipes if args.dataset in recipes[name]]
        raise UserError(f"there is no {args.recipe} recipe for {args.dataset}"
                        + (f"; use --recipe {known[0]}" if known else f" with --loss {args.loss}"))
    row, changed = recipes[args.recipe][args.dataset], ""
    row = row(data_lt.survey(args.data_dir, args.imb, args.imb_type, args.holdout)) if callable(row) else row
    row = row | (method or {})
    for key, value in row.items():
        given = getattr(args, key)
        if given is None:
            setattr(args, key, value)
        elif given != value and key != "eval_every":
            changed += f"_{key.replace('_', '')}{given}"
    return row, changed


# ---- Time ----------------------------------------------------------------------------------------------------------------

def seconds_of_run(forward, images, training_images, tests, test_images, rt):
    """About how long a run will take here, from one measured step.

    forward(n) -> scalar: a step's work on n <= images images, up to a loss. training_images: all to come, in passes forward
    and back; tests: evaluations of test_images each, at a third of a training image's cost.
    """
    for n in (min(4, images), images, images):                            # the first warms up
        start = time.perf_counter()
        forward(n).backward()
        if rt.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if seconds / n * images > 20:                                     # a big network on a CPU: four images tell enough
            break
    return seconds / n * (training_images + tests * test_images / 3) / rt.world


def duration(seconds):
    """12 s, 3.4 min, 5.6 h, 2.1 days."""
    for limit, unit, size in ((100, "s", 1), (5400, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"
