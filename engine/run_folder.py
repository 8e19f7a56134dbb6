r"""A run's folder: what is written there, and how a run continues after whatever has ended it.

    config.json   every resolved setting, versions, class counts
    log.jsonl     one JSON object per epoch
    last.pt       all that is needed to resume, or to use the network; previous.pt is the one before
    result.json   the final accuracies, and what they were measured on
    lock          while the run is being trained: by which process, see engine/lock.py

`last.pt` is written by the clock (--save-every), at the end, and when a signal asks the run to
stop. It says how many steps of its epoch are done. Everything random in a step follows from (seed,
epoch, step, rank), so on a CPU a resumed run ends bit for bit where the uninterrupted one ends; on
a GPU, whose kernels add in any order, it is the same only statistically.
"""
import math
import os
import platform
import shlex
import signal
import sys
import time
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

from engine import runtime
from engine.checkpoints import (load_weights, remove_temporaries, save_checkpoint,
                                write_atomically)
from engine.early_warnings import EarlyWarnings
from engine.evaluation import brief, group_by_count, saved
from engine.past_run import FORMAT, PastRun
from engine.records import as_line, is_like, save_json
from engine.runtime import UserError, all_max, all_sum, barrier, gather

TIMED = (3, 13)     # the steps between which the time left is estimated


class Run(PastRun):
    """The folder of a run that is trained: this process's own until `finish`.

    A training script calls `start`, then `begin_epoch`, `remaining_steps`, `after_step` and
    `after_epoch` in its loop, then `finish`.
    """

    def __init__(self, folder, args, rt, settings=(), wait=False):
        self.every_steps, self.every_seconds = math.inf, math.inf
        if args.save_every.endswith("m"):
            self.every_seconds = 60 * float(args.save_every[:-1])
        else:
            self.every_steps = int(args.save_every)
        super().__init__(folder, args, rt, settings, wait)

    # ---- Before the loop -------------------------------------------------------------------------

    def start(self, args, data, parts, metrics, steps, images, passes=None):
        """Restore a resumed run's parts, write config.json, and watch for signals from now on.

        parts: {name in the checkpoint: network, optimizer, ..., tensor or None}, restored in this
        order. metrics: names of the numbers that after_step is given. steps, images: in an epoch.
        passes: relative cost of each epoch, for the time that is left.
        """
        self.args, self.data, self.parts, self.metrics = args, data, parts, metrics
        self.steps, self.images = steps, images
        self.passes = passes or [1] * args.epochs
        self.watch_signals()
        if self.resumed:
            for name, part in parts.items():
                restore(part, self.resumed.get(name), self.checkpoint)
            parts["scaler"].begin_counting()        # its next bad steps are after the checkpoint
            sums, seconds = self.resumed.get("sums"), self.resumed.get("seconds")
            if self.start_step and (getattr(sums, "shape", ()) != (self.rt.world, len(metrics) + 1)
                                    or not is_like(seconds, 0.0)):
                raise UserError(f"{self.checkpoint} is damaged: no sums of its half-done epoch")
            self.half_epoch = sums, seconds
        self.skipped = parts["scaler"].skipped                  # steps, until this epoch
        self.write(self.write_beginning)
        self.watch = None
        if self.rt.main:
            self.watch = EarlyWarnings(args, data, metrics, self.steps, self.rt,
                                       resumed=bool(self.resumed))
        self.resumed = None                                     # lets its memory go
        done = (self.start_epoch + self.start_step / steps) * images
        self.bar = tqdm(total=args.epochs * images, initial=done, unit=" images", unit_scale=True,
                        disable=None if self.rt.main else True)     # None: only in a terminal
        self.timer, self.timed = None, 0
        if self.start_epoch == args.epochs:     # no step is left, as after --force --epochs N:
            self.begin_epoch(self.start_epoch)
            self.save(self.start_epoch, 0)      # last.pt has N, so that it counts as finished

    def watch_signals(self):
        """STOP_SIGNALS stop the run after a step from now on; so does an earlier one."""
        self.saved_at, self.due = time.monotonic(), False
        for number in runtime.watched_signals():
            signal.signal(number, runtime.request_stop)
        runtime.stop_if_asked(self.rt)

    def write_beginning(self):
        """config.json, and the log cut back to the epochs that the checkpoint has."""
        os.makedirs(self.folder, exist_ok=True)
        for name in ("last.pt", "log.jsonl", "config.json", "result.json"):
            remove_temporaries(os.path.join(self.folder, name))
        if self.overwrite:
            self.remove_files()
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "numpy": np.__version__}
        self.settings = self.config() | {
            "classes": self.data.class_names, "counts": self.data.counts,
            "class_groups": self.data.groups, "versions": versions,
            "hardware": self.hardware, "amp_dtype": str(self.rt.amp),
            "teachers": self.teachers, "forced": self.forced,
            "fingerprint": self.data.fingerprint}
        if not self.finished:               # else --force extends it: its files stay as they are
            self.write_settings()           # until there is a checkpoint
        self.seconds = sum(record["seconds"] for record in self.log)
        text = "".join(map(as_line, self.log))
        write_atomically(self.log_path, lambda file: file.write(text.encode()))

    def write_settings(self):
        save_json(os.path.join(self.folder, "config.json"), self.settings)

    def config(self):
        return vars(self.args) | {"format": FORMAT}

    # ---- In the loop -----------------------------------------------------------------------------

    def begin_epoch(self, epoch):
        """Start the epoch's clock and sums, or go on with those of a half-done one."""
        # The last sum is that of finite steps.
        self.sums = torch.zeros(len(self.metrics) + 1, device=self.rt.device)
        self.started = time.monotonic()
        if self.timer is not None and self.timed < TIMED[1]:    # an evaluation is no step
            self.timer += self.started - self.stepped
        if epoch == self.start_epoch and self.start_step:
            sums_by_rank, seconds = self.half_epoch
            self.started -= seconds
            self.sums.copy_(sums_by_rank[self.rt.rank])

    def remaining_steps(self, epoch, batches):
        """(step, batch) of an epoch, without the steps that a resumed run has behind it."""
        done = self.start_step if epoch == self.start_epoch else 0
        return islice(enumerate(batches), done, None)

    def after_step(self, epoch, step, values, finite):
        """Add up the step's metrics, show progress, save if it is time, stop if a signal asks to.

        values: tensor (len(metrics),); the first is the loss. finite: 1.0, or 0.0 for a step that
        was undone and does not count. Waits for the device every 20 steps, at the epoch's last one,
        and at the few that are timed or watched.
        """
        if self.watch:
            self.watch.after_step(epoch, values, finite, self.parts["model"])
        values = torch.cat([values, values.new_ones(1)])
        self.sums += torch.where(finite > 0, values, 0)
        self.bar.update(self.images / self.steps)
        self.estimate(epoch, step)
        if step % 20 == 0 or step + 1 == self.steps:
            self.parts["scaler"].stop_if_lost(epoch, step, self.args.lr)
            self.bar.set_postfix_str(f"epoch {epoch + 1}/{self.args.epochs}, "
                                     f"loss {values[0].item():.3f}", refresh=False)
        if (epoch * self.steps + step + 1) % self.every_steps == 0:
            self.due = True
        stop = self.save_if_due(epoch, step + 1)
        if stop:
            self.stop(stop, f"in epoch {epoch + 1} after step {step + 1}")

    def after_epoch(self, epoch, results, **record):
        """Log the epoch and print its line; save if it is the last one, if it is time, or to stop.

        results: accuracies of every head, or None where the epoch was not evaluated.
        """
        all_sum(self.sums, self.rt)
        means = (self.sums[:-1] / self.sums[-1]).tolist()
        seconds = time.monotonic() - self.started
        skipped = self.parts["scaler"].skipped
        record = {"epoch": epoch, "skipped": skipped} | record | dict(zip(self.metrics, means))
        speed = self.images / seconds
        record |= (results or {}) | {"images_per_second": round(speed, 1),
                                     "seconds": round(seconds, 2)}
        self.write(lambda: self.append_to_log(record))
        last = epoch + 1 == self.args.epochs
        stop = self.save_if_due(epoch + 1, 0, last)
        if self.rt.main:
            line = f"epoch {epoch + 1:4d}  loss {means[0]:.3f}  {speed:5.0f} images/s"
            for head, r in (results or {}).items():
                line += f"  {head} {brief(r)}"
            if skipped > self.skipped:
                line += f"  {skipped - self.skipped} steps were not finite"
            self.skipped = skipped
            self.bar.write(line)
            sys.stdout.flush()              # into a file it would wait for 8 KB
            self.watch.after_epoch(epoch, self.parts["model"], results)
        if last:
            self.bar.close()
        elif stop:
            self.stop(stop, f"after epoch {epoch + 1}")

    def estimate(self, epoch, step):
        """Print once how long the rest will take, by ten steps of this run."""
        first, last = TIMED
        self.timed += 1
        if self.timed <= last and (self.timed in TIMED or step + 1 == self.steps):
            self.stepped = self.rt.now()
        if self.timed == first:
            self.timer = self.stepped
        elif self.timed == last:
            per_step = (self.stepped - self.timer) / (last - first)
            per_step /= self.passes[epoch]
            steps = (self.steps - step - 1) * self.passes[epoch]
            steps += self.steps * sum(self.passes[epoch + 1:])
            self.rt.print(f"about {duration(steps * per_step)} left on {self.rt.hardware()}")

    def save_if_due(self, epoch, step, last=False):
        """Save if it is time, or the end, or to stop. Returns the signal that asks for it, or 0.

        While steps are not finite a save that is due waits for a finite one, so that the last
        checkpoint is from before them.
        """
        if time.monotonic() - self.saved_at > self.every_seconds:
            self.due = True
        stop, due = all_max([runtime.stop_signal, int(self.due)], self.rt)
        if stop or last or (due and not self.parts["scaler"].in_a_row):
            self.save(epoch, step)
        return stop

    def stop(self, number, where):
        bad = self.parts["scaler"].in_a_row
        if bad:
            where += f" (the last {bad} steps were not finite and are undone)"
        self.rt.print(f"Stopped {where}; --resume goes on from there")
        barrier(self.rt)                    # torchrun ends all as soon as one has ended
        sys.exit(128 + number)

    # ---- Files -----------------------------------------------------------------------------------

    def append_to_log(self, record):
        self.seconds += record["seconds"]
        with open(self.log_path, "a") as file:
            file.write(as_line(record))
            file.flush()
            os.fsync(file.fileno())         # a checkpoint counts on the lines of its epochs

    def save(self, epoch, step):
        """Write last.pt: all parts, and `step` steps of `epoch` are done."""
        state = {name: part_state(part) for name, part in self.parts.items()}
        place = dict(epoch=epoch, step=step, sums=gather(self.sums[None], self.rt),     # by rank
                     seconds=time.monotonic() - self.started)
        about = dict(config=self.config(), data=self.data.fingerprint, counts=self.data.counts,
                     class_names=self.data.class_names, groups=self.data.groups,
                     white=self.data.white, world=self.rt.world, teachers=self.hashes(),
                     forced=self.forced, amp=self.precision, hardware=self.hardware)

        def write():
            if self.finished:                   # a shorter run, which --force has extended
                os.remove(os.path.join(self.folder, "result.json"))
                self.write_settings()
            previous = None if self.fallback else self.previous     # keep the good one
            save_checkpoint(self.checkpoint, previous, **state, **place, **about)
        self.write(write)
        self.saved_at, self.due, self.fallback = time.monotonic(), False, False

    def finish(self, results, **more):
        """Write result.json: what was run, on what, and each head's accuracies in percent.

        The folder is given back.
        """
        def write():
            args, data = self.args, self.data
            result = {"dataset": data.label, "imb": round(data.imb, 1),
                      "recipe": args.recipe, "epochs": args.epochs, "seed": args.seed,
                      "command": command_line(self.rt), "hardware": self.hardware,
                      "seconds": round(self.seconds, 1), "date": time.strftime("%Y-%m-%d")}
            if self.teachers:
                result["teachers"] = self.teachers
            if self.forced:
                result["forced"] = self.forced
            result |= more
            for name, r in results.items():
                result[name] = saved(r)
            regrouped = group_by_count(results, data)
            if regrouped:
                result["by_count"] = regrouped
            result["per_class"] = {name: r["per_class"] for name, r in results.items()}
            save_json(os.path.join(self.folder, "result.json"), result)
        self.write(write)
        if self.lock:
            self.lock.release()


def restore(part, state, path):
    """Load a checkpoint's state into a network, an optimizer and the like, or a tensor.

    UserError if it does not fit.
    """
    if part is None:
        return
    try:
        if isinstance(part, torch.Tensor):
            part.copy_(state)
        elif isinstance(part, torch.nn.Module):
            load_weights(part, state, path)
        else:
            decays = [group["weight_decay"] for group in getattr(part, "param_groups", [])]
            part.load_state_dict(state)
            for group, decay in zip(getattr(part, "param_groups", []), decays):
                group["weight_decay"] = decay       # this run's (--force), not the checkpoint's
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not fit this run: {runtime.one_line(error)}") from None


def part_state(part):
    """What a checkpoint holds of a part of the run."""
    if part is None or isinstance(part, torch.Tensor):
        return part
    return part.state_dict()


def command_line(rt):
    """The command that made this run, without how it came about (--resume and the like)."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    launcher = "python"
    if rt.world > 1:
        nodes = f"--nnodes={rt.world // local} " if rt.world > local else ""
        launcher = f"torchrun {nodes}--nproc_per_node={local}"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec and spec.name.startswith("experiments."):           # python -m experiments.crt
        program = ["-m", spec.name]
    else:
        program = [os.path.basename(sys.argv[0])]
    flags = [a for a in sys.argv[1:] if a not in ("--resume", "--overwrite", "--force")]
    return f"{launcher} {shlex.join(program + flags)}"


def duration(seconds):
    """12 s, 3.4 min, 5.6 h, 2.1 days."""
    for limit, unit, size in ((100, "s", 1), (5400, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"
