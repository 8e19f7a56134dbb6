r"""A run's folder: what is written there, and how a run continues after whatever has ended it.

    config.json   every resolved setting, versions, class counts
    log.jsonl     one JSON object per epoch
    last.pt       all that is needed to resume, or to use the network; previous.pt is the one before
    result.json   the final accuracies, and what they were measured on

`last.pt` is written by the clock (--save-every), at the end, and when a signal asks the run to
stop. It says how many steps of its epoch are done. Everything random in a step follows from (seed,
epoch, step, rank), so on a CPU a resumed run ends bit for bit where the uninterrupted one ends; on
a GPU, whose kernels add in any order, it is the same only statistically.
"""
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from contextlib import suppress
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

from engine import runtime
from engine.checkpoints import (load_checkpoint, load_weights, null_for_nan, read_json,
                                save_checkpoint, save_json, write_atomically)
from engine.evaluation import COLUMNS, group_by_count, table
from engine.networks import check_origin
from engine.runtime import UserError, all_max, all_sum, barrier, exit_together, gather
from engine.settings import NOT_RESUMED, flag

FORMAT = 2      # of a run folder's settings; runs without one were made before their names changed
TIMED = (3, 13)     # the steps between which the time left is estimated


class Run:
    """One run's folder, of which only the main process writes.

    Refuses to overwrite another run, and to resume one with other settings. A training script calls
    `start`, then `begin_epoch`, `remaining_steps`, `after_step` and `after_epoch` in its loop, then
    `finish`.
    """

    def __init__(self, folder, args, rt):
        self.folder, self.rt, self.log_path = folder, rt, os.path.join(folder, "log.jsonl")
        self.checkpoint = os.path.join(folder, "last.pt")
        self.previous = os.path.join(folder, "previous.pt")
        self.every_steps, self.every_seconds = math.inf, math.inf
        if args.save_every.endswith("m"):
            self.every_seconds = 60 * float(args.save_every[:-1])
        else:
            self.every_steps = int(args.save_every)
        self.resumed, self.fallback, self.forced = None, False, []
        self.teachers = []
        self.start_epoch, self.start_step = 0, 0
        self.check_writable()
        if not (os.path.exists(self.checkpoint) or os.path.exists(self.previous)):
            return
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0        # by torchrun
        if args.resume or restarted:
            self.read_state(args)
        elif not args.overwrite:
            raise UserError(f"{folder} already holds a run: --resume continues it, --overwrite "
                            "starts it again, --out names another folder")

    def check_writable(self):
        """UserError now, rather than after hours of a teacher's training."""
        existing = self.folder
        while not os.path.exists(existing) and os.path.dirname(existing) != existing:
            existing = os.path.dirname(existing) or "."
        if not os.path.isdir(existing):
            raise UserError(f"{existing} is a file: a run needs a folder, --out names another")
        if not os.access(existing, os.W_OK):
            raise UserError(f"the run folder {self.folder} cannot be written (read-only, or not "
                            "yours); --out names another")

    def read_state(self, args):
        self.resumed = state = load_checkpoint(self.folder, ("model", "config", "epoch"))
        self.fallback = state.pop("fallback", False)    # last.pt is damaged, previous.pt was taken
        self.start_epoch, self.start_step = state["epoch"], state.get("step", 0)    # done already
        self.forced = state.get("forced", [])
        over = self.finished and self.start_epoch >= args.epochs
        if state["config"].get("format") == FORMAT:
            self.check_settings(args, (*NOT_RESUMED, "amp", "processes") if over else NOT_RESUMED)
        elif not over:
            raise UserError(f"{self.folder} was begun by an older version of this project: it can "
                            "be evaluated, not resumed; --overwrite starts it again")

    def check_settings(self, args, free):
        """UserError for other settings than the run began with; with --force they are printed.

        free: names of those that may differ.
        """
        old = self.resumed["config"] | {"processes": self.resumed.get("world", self.rt.world)}
        new = vars(args) | {"processes": self.rt.world, "format": FORMAT}
        old, new = ({k: v for k, v in c.items() if k not in free} for c in (old, new))
        names = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        if not names:
            return
        changes = ", ".join(f"{flag(k)} {old.get(k)} -> {new.get(k)}" for k in names)
        self.force(args, changes)
        self.start_step = 0             # the steps of a half-done epoch may be others now

    def force(self, args, changes):
        """UserError for changed settings, or, with --force, a line about them."""
        if not args.force:
            raise UserError(f"{self.folder} was begun with other settings: {changes}; repeat them, "
                            "start another run, or go on all the same with --force")
        self.forced = [*self.forced, f"after epoch {self.start_epoch}: {changes}"]
        self.rt.print(f"--force: going on {self.forced[-1]}")

    @property
    def finished(self):
        """Has the run in this folder written its result?"""
        return os.path.exists(os.path.join(self.folder, "result.json"))

    def check_data(self, data):
        """UserError if the run that is resumed was trained on other images, or other levels."""
        if not self.resumed:
            return
        before = self.resumed.get("data", data.fingerprint), self.resumed.get("white", 65535)
        if before != (data.fingerprint, data.white):
            raise UserError(f"{self.folder} was trained on other images than these, or on other "
                            "levels of them: --overwrite trains it again, --out names another "
                            "folder")

    def check_teacher(self, args, teacher, data):
        """Remember which networks the teacher is: their files, hashes of weights, and data.

        UserError if one is not finished, or if the run that is resumed has learned from others;
        with --force the latter is printed.
        """
        for known in teacher.origin:
            check_origin(f"the teacher {known['file']}", known, data, self.rt)
        self.teachers = teacher.origin
        old = (self.resumed or {}).get("teachers", self.hashes())       # none in older runs
        if old != self.hashes():
            self.force(args, f"the teacher's weights {old} -> {self.hashes()}")

    def hashes(self):
        """Of the teachers' weights, for the checkpoint: a text, which is compared as it is."""
        return ",".join(known["weights"] for known in self.teachers)

    def print_if_finished(self, epochs, title):
        """True, after printing its table, if nothing is left to resume."""
        if not (self.finished and self.resumed and self.start_epoch >= epochs):
            return False
        result = read_json(self.folder, "result.json")
        rows = {name: r for name, r in result.items()
                if isinstance(r, dict) and set(COLUMNS) <= r.keys()}
        self.rt.print(f"{self.folder} is finished ({epochs} epochs); its result:\n"
                      + table(rows, title))
        return True

    # ---- Before the loop -------------------------------------------------------------------------

    def start(self, args, data, parts, metrics, images, batch, passes=None):
        """Write config.json, restore a resumed run's parts, and watch for signals from now on.

        parts: {name in the checkpoint: network, optimizer, ..., tensor or None}, restored in this
        order. metrics: names of the numbers that after_step is given. images: of an epoch, cut into
        global batches of `batch`. passes: relative cost of each epoch, for the time that is left.
        """
        self.args, self.data, self.parts, self.metrics = args, data, parts, metrics
        self.steps = -(-images // batch)
        self.passes = passes or [1] * args.epochs
        self.watch_signals()
        self.write(self.write_beginning)
        if self.resumed:
            for name, part in parts.items():
                restore(part, self.resumed.get(name), self.checkpoint)
            self.half_epoch = self.resumed["sums"], self.resumed["seconds"]
        self.resumed = None                                     # lets its memory go
        done = self.start_epoch * images + self.start_step * batch
        self.bar = tqdm(total=args.epochs * images, initial=done, unit=" images", unit_scale=True,
                        disable=None if self.rt.main else True)     # None: only in a terminal
        self.images, self.timer, self.timed = images, None, 0

    def watch_signals(self):
        """SIGTERM and SIGINT stop the run after a step from now on; so does an earlier one."""
        self.saved_at = time.monotonic()
        for number in runtime.STOP_SIGNALS:
            signal.signal(number, runtime.request_stop)
        stop, = all_max([runtime.stop_signal], self.rt)
        if stop:
            self.rt.print("Stopped before the first step")
            sys.exit(128 + stop)

    def write_beginning(self):
        """config.json, and the log cut back to the epochs that the checkpoint has."""
        os.makedirs(self.folder, exist_ok=True)
        if not self.resumed:
            for old in ("last.pt", "previous.pt", "result.json"):
                with suppress(FileNotFoundError):
                    os.remove(os.path.join(self.folder, old))
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "numpy": np.__version__}
        save_json(os.path.join(self.folder, "config.json"), self.config() | {
            "classes": self.data.class_names, "counts": self.data.counts,
            "groups": self.data.groups, "versions": versions, "hardware": self.rt.hardware(),
            "amp_dtype": str(self.rt.amp), "teachers": self.teachers, "forced": self.forced})
        lines = []
        if self.resumed and os.path.exists(self.log_path):
            with open(self.log_path) as file:
                lines = file.readlines()[:self.start_epoch]     # one line per epoch
        write_atomically(self.log_path, lambda file: file.write("".join(lines).encode()))

    def config(self):
        return vars(self.args) | {"format": FORMAT}

    # ---- In the loop -----------------------------------------------------------------------------

    def begin_epoch(self, epoch):
        """Start the epoch's clock and sums, or go on with those of a half-done one."""
        sums = torch.zeros(len(self.metrics) + 1, device=self.rt.device)    # the last: finite steps
        self.started = time.monotonic()
        if epoch == self.start_epoch and self.start_step:
            sums_by_rank, seconds = self.half_epoch
            self.started -= seconds
            sums.copy_(sums_by_rank[self.rt.rank])
        self.sums = sums

    def remaining_steps(self, epoch, batches):
        """(step, batch) of an epoch, without the steps that a resumed run has behind it."""
        done = self.start_step if epoch == self.start_epoch else 0
        return islice(enumerate(batches), done, None)

    def after_step(self, epoch, step, images, values, finite):
        """Add up the step's metrics, show progress, save if it is time, stop if a signal asks to.

        images: of this process's part of the batch. values: tensor (len(metrics),); the first is
        the loss. finite: 1.0, or 0.0 for a step that was undone and does not count. Waits for the
        device every 20 steps only.
        """
        values = torch.cat([values, values.new_ones(1)])
        self.sums += torch.where(finite > 0, values, 0)
        self.bar.update(images * self.rt.world)
        self.estimate(epoch, step)
        if step % 20 == 0 or step + 1 == self.steps:
            self.parts["scaler"].stop_if_lost(epoch, step, self.args.lr)
            self.bar.set_postfix_str(f"epoch {epoch + 1}/{self.args.epochs}, "
                                     f"loss {values[0].item():.3f}", refresh=False)
        due = (step + 1) % self.every_steps == 0 or self.clock_is_due()
        stop, due = all_max([runtime.stop_signal, int(due)], self.rt)
        if due or stop:
            self.save(epoch, step + 1)
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
        stop, due = all_max([runtime.stop_signal, int(self.clock_is_due())], self.rt)
        if last or stop or due:
            self.save(epoch + 1, 0)
        if self.rt.main:
            line = f"epoch {epoch + 1:4d}  loss {means[0]:.3f}  {speed:5.0f} images/s"
            for head, r in (results or {}).items():
                line += "  {} {overall:.1f} ({head:.1f} {mid:.1f} {tail:.1f})".format(head, **r)
            if skipped:
                line += f"  {skipped} steps were not finite"
            self.bar.write(line)
        if last:
            self.bar.close()
        elif stop:
            self.stop(stop, f"after epoch {epoch + 1}")

    def estimate(self, epoch, step):
        """Print once how long the rest will take, by ten steps of this run."""
        self.timed += 1
        first, last = TIMED
        if self.timed == first:
            self.timer = time.monotonic()
        elif self.timed == last:
            per_step = (time.monotonic() - self.timer) / (last - first)
            per_step /= self.passes[epoch]
            steps = (self.steps - step - 1) * self.passes[epoch]
            steps += self.steps * sum(self.passes[epoch + 1:])
            self.rt.print(f"about {duration(steps * per_step)} to go on {self.rt.hardware()}")

    def clock_is_due(self):
        return time.monotonic() - self.saved_at > self.every_seconds

    def stop(self, number, where):
        self.rt.print(f"Stopped {where}; --resume goes on from there")
        barrier(self.rt)                    # torchrun ends all as soon as one has ended
        sys.exit(128 + number)

    # ---- Files -----------------------------------------------------------------------------------

    def write(self, action):
        """Call action() in the main process; if it cannot write, all processes end."""
        error = None
        if self.rt.main:
            try:
                action()
            except UserError as caught:
                error = caught
            except OSError as caught:
                error = UserError(f"cannot write in {self.folder}: {caught.strerror}; what was "
                                  "written before is intact")
        failed, = all_max([int(error is not None)], self.rt)
        if failed:
            exit_together(error, self.rt)

    def append_to_log(self, record):
        with open(self.log_path, "a") as file:
            file.write(json.dumps(null_for_nan(record)) + "\n")
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
                     forced=self.forced)

        def write():
            with suppress(FileNotFoundError):   # of a shorter run, which --force has extended
                os.remove(os.path.join(self.folder, "result.json"))
            previous = None if self.fallback else self.previous     # keep the good one
            save_checkpoint(self.checkpoint, previous, **state, **place, **about)
        self.write(write)
        self.saved_at, self.fallback = time.monotonic(), False

    def finish(self, results, **more):
        """Write result.json: what was run, on what, and each head's accuracies in percent."""
        def write():
            with open(self.log_path) as file:
                seconds = round(sum(json.loads(line)["seconds"] for line in file), 1)
            args, data = self.args, self.data
            result = {"dataset": data.label, "imb": round(data.imb, 1),
                      "recipe": args.recipe, "epochs": args.epochs, "seed": args.seed,
                      "command": command_line(self.rt), "hardware": self.rt.hardware(),
                      "seconds": seconds, "date": time.strftime("%Y-%m-%d")}
            if self.teachers:
                result["teachers"] = self.teachers
            if self.forced:
                result["forced"] = self.forced
            result |= more
            for name, r in results.items():
                result[name] = {column: r[column] for column in COLUMNS}
            regrouped = group_by_count(results, data)
            if regrouped:
                result["by_count"] = regrouped
            result["per_class"] = {name: r["per_class"] for name, r in results.items()}
            save_json(os.path.join(self.folder, "result.json"), result)
        self.write(write)


def restore(part, state, path):
    """Load a checkpoint's state into a network, an optimizer and the like, or a tensor."""
    if part is None or state is None:
        return
    if isinstance(part, torch.Tensor):
        part.copy_(state)
    elif isinstance(part, torch.nn.Module):
        load_weights(part, state, path)
    else:
        part.load_state_dict(state)


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
