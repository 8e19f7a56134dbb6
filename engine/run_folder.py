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
import glob
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
from engine.checkpoints import (is_like, load_checkpoint, load_weights, null_for_nan, read_json,
                                read_log_lines, remove_temporaries, save_checkpoint, save_json,
                                upgrade_config, write_atomically)
from engine.evaluation import COLUMNS, group_by_count, table
from engine.lock import Lock, held
from engine.networks import check_origin, teacher_files
from engine.runtime import UserError, all_max, all_sum, barrier, exit_together, gather
from engine.settings import NOT_RESUMED, defaults, flag

FORMAT = 2      # of a run folder's settings; runs without one were made before their names changed
TIMED = (3, 13)     # the steps between which the time left is estimated
RESTART = 60        # seconds that torchrun's new worker waits for the old one to let the run go
LACKS = "the log lacks epochs"      # in `forced` of a run that went on with such a log
# What config.json says besides the settings.
ABOUT = ("classes", "counts", "groups", "versions", "hardware", "amp_dtype", "forced",
         "fingerprint", "teachers")
# All files that this project writes into a run's folder: what --overwrite removes.
FIGURES = ("attention", "distance", "rank", "augment", "entropy", "sharpness", "diversity",
           "imbalance", "curves")
OWN_FILES = ("result.json", "last.pt", "previous.pt", "log.jsonl", "config.json", "summary.png",
             "per_class.csv", "confusion.png", "heads.csv", "report.html", "model.pt2",
             "model.onnx", "events.out.tfevents.*",
             *(f"{figure}.{ending}" for figure in FIGURES for ending in ("png", "csv", "json")))


class Run:
    """One run's folder, of which only the main process writes.

    It is this run's own from here to `finish`. Refuses to overwrite another run, to train where
    another process trains, and to resume with other settings. A training script calls `start`, then
    `begin_epoch`, `remaining_steps`, `after_step` and `after_epoch` in its loop, then `finish`.

    table: of Settings. wait: for another process that trains there, as several students may need
    the same teacher.
    """

    def __init__(self, folder, args, rt, table=(), wait=False):
        self.folder, self.rt, self.log_path = folder, rt, os.path.join(folder, "log.jsonl")
        self.checkpoint = os.path.join(folder, "last.pt")
        self.previous = os.path.join(folder, "previous.pt")
        self.every_steps, self.every_seconds = math.inf, math.inf
        if args.save_every.endswith("m"):
            self.every_seconds = 60 * float(args.save_every[:-1])
        else:
            self.every_steps = int(args.save_every)
        self.resumed, self.fallback, self.forced, self.log = None, False, [], []
        self.teachers = []
        self.start_epoch, self.start_step = 0, 0
        self.defaults = defaults(table)
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0   # by torchrun
        self.resume = args.resume or self.restarted         # its command is that of the start
        self.overwrite = args.overwrite and not self.restarted
        runtime.trains = True
        self.lock, self.over = None, False
        self.check_sources(args)
        self.own(args, wait)
        if self.over or self.overwrite:
            return
        if os.path.exists(self.checkpoint) or os.path.exists(self.previous):
            if not self.resume:
                raise UserError(f"{folder} already holds a run: --resume continues it, --overwrite "
                                "starts it again, --out names another folder")
            self.read_state(args)
        elif self.finished:
            raise UserError(f"{folder} holds another run's result, and no checkpoint to go on "
                            "from: --overwrite starts it again, --out names another folder")

    # ---- Whose folder it is ----------------------------------------------------------------------

    def check_sources(self, args):
        """UserError if the run would replace the network that it builds on."""
        own = [os.path.realpath(path) for path in (self.folder, self.checkpoint, self.previous)]
        for name in ("teacher", "finetune"):
            path = getattr(args, name, None)
            for file in teacher_files(path) if path else []:
                if os.path.realpath(file) in own:
                    raise UserError(f"the run and its {flag(name)} cannot share the folder "
                                    f"{self.folder}: --out names another")

    def own(self, args, wait):
        """Lock the folder until `finish`, unless its run is over. The main process finds out.

        UserError if another process trains there, or, with `wait`, this process's own student.
        """
        patience = RESTART if self.restarted else 0
        if wait:
            patience = math.inf
        began, waiting = time.monotonic(), False

        def attempt():
            nonlocal waiting
            self.over = self.is_over(args)
            if self.over:
                return
            self.check_writable()
            mine = held.get(os.path.realpath(self.folder))      # of an earlier Run
            if mine and wait:
                raise UserError(f"student and teacher cannot share the folder {self.folder}: "
                                "--out names another")
            lock = mine or Lock(self.folder)
            if mine or lock.take():
                self.lock = lock
                runtime.at_end.append(lock.release)
                return
            if time.monotonic() - began >= patience:
                raise UserError(f"{self.folder} is being trained by {lock.holder()}; wait for it, "
                                "or --out names another folder")
            if not waiting:
                self.rt.print(f"Waiting for {self.folder}, which is being trained by "
                              f"{lock.holder()}")
            waiting = True

        while True:
            self.write(attempt)
            over, locked, stop = all_max([int(self.over), int(self.lock is not None),
                                          runtime.stop_signal], self.rt)
            self.over = bool(over)
            if over or locked:
                return
            if stop:
                sys.exit(128 + stop)
            time.sleep(0.5)

    def is_over(self, args):
        """Is the run finished, with these settings, so that nothing is left to train?

        Reads result.json and config.json only: the checkpoints may be gone, the folder another's.
        UserError to resume one with other settings.
        """
        if not self.finished or self.overwrite:
            return False
        if not os.path.exists(os.path.join(self.folder, "config.json")):
            return False                                    # --resume writes it again
        if read_json(self.folder, "result.json")["epochs"] < args.epochs:
            return False
        config = read_json(self.folder, "config.json")
        if config.get("format") != FORMAT:                  # older settings are not all comparable
            if self.resume:
                return True
            config = {name: value for name, value in upgrade_config(config).items()
                      if value is not None} | {"format": FORMAT}
        changes = self.changes(config, args, (*NOT_RESUMED, *ABOUT, "amp", "processes"))
        if changes and not self.resume:
            return False
        if changes:
            self.force(args, changes)
        return True

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
        if not is_like([self.start_epoch, self.start_step], [0]) or not is_like(self.forced, [""]):
            raise UserError(f"{self.checkpoint} is damaged: it does not say how far the run is")
        if state["config"].get("format") != FORMAT:
            raise UserError(f"{self.folder} was begun by an older version of this project: it can "
                            "be evaluated, not resumed; --overwrite starts it again")
        old = state["config"] | {"processes": state.get("world", self.rt.world)}
        changes = self.changes(old, args, NOT_RESUMED)
        if changes:
            self.force(args, changes)
            self.start_step = 0         # the steps of a half-done epoch may be others now
        self.read_past_log(args)

    def changes(self, old, args, free):
        """"--lr 0.1 -> 0.05, ...": settings other than the run began with, but for those in `free`.

        A setting that the run did not know yet counts as changed unless it is off, or has its
        table's value: what runs did before there was a choice.
        """
        new = vars(args) | {"processes": self.rt.world, "format": FORMAT}
        names = []
        for name in sorted((old.keys() | new.keys()) - set(free)):
            if name in old:
                same = old[name] == new.get(name)
            else:
                same = new[name] in (None, False, self.defaults.get(name))
            if not same:
                names.append(name)
        return ", ".join(f"{flag(k)} {old.get(k)} -> {new.get(k)}" for k in names)

    def force(self, args, changes):
        """UserError for changed settings, or, with --force, a line about them."""
        if not args.force:
            raise UserError(f"{self.folder} was begun with other settings: {changes}; repeat them, "
                            "start another run, or go on all the same with --force")
        self.forced = [*self.forced, f"after epoch {self.start_epoch}: {changes}"]
        self.rt.print(f"--force: going on {self.forced[-1]}")

    def read_past_log(self, args):
        """Keep the log's lines of the epochs that the checkpoint has, and check that all are there.

        Later ones are of epochs that are trained again; damaged lines are named and left out.
        """
        lines = read_log_lines(self.log_path)
        damaged = [str(i) for i, line in enumerate(lines, 1) if not is_epoch(line)]
        if damaged:
            self.rt.print(f"{self.log_path} is damaged; left out: line {', '.join(damaged[:9])}")
        self.log = [line for line in lines if is_epoch(line) and line["epoch"] < self.start_epoch]
        complete = [line["epoch"] for line in self.log] == list(range(self.start_epoch))
        if not complete and not any(text.endswith(LACKS) for text in self.forced):
            if not args.force:
                raise UserError(f"{self.log_path} does not have one line for each of the "
                                f"{self.start_epoch} epochs that the checkpoint has: put back a "
                                "copy of it, or --resume --force goes on with the lines it has")
            self.forced = [*self.forced, f"after epoch {self.start_epoch}: {LACKS}"]
        by_epoch = {line["epoch"]: line for line in self.log}
        self.log = [by_epoch[epoch] for epoch in sorted(by_epoch)]

    @property
    def finished(self):
        """Has the run in this folder written its result?"""
        return os.path.exists(os.path.join(self.folder, "result.json"))

    def check_data(self, data):
        """UserError if the run that is resumed, or over, was trained on other images or levels."""
        def check():
            others = self.fingerprint() not in (None, data.fingerprint)
            if others or (self.resumed and self.resumed.get("white", 65535) != data.white):
                raise UserError(f"{self.folder} was trained on other images than these, or on "
                                "other levels of them: --overwrite trains it again, --out names "
                                "another folder")
        self.write(check)

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

    def fingerprint(self):
        """Of the images that the run in this folder was trained on; None if that is not known."""
        if self.over:
            config = read_json(self.folder, "config.json")
            if "fingerprint" in config or not os.path.exists(self.checkpoint):
                return config.get("fingerprint")
            return load_checkpoint(self.folder).get("data")         # a run from before it was there
        return self.resumed and self.resumed.get("data")

    def print_if_finished(self, epochs, title, draw=None):
        """True, after printing its table, if nothing is left to train.

        draw(folder): draws the run's picture, if that is missing and can be drawn.
        """
        if not self.over:
            return False
        result = read_json(self.folder, "result.json")
        rows = {name: r for name, r in result.items()
                if is_like(r, {"": 0.0}) and set(COLUMNS) <= r.keys()}
        self.rt.print(f"{self.folder} is finished ({epochs} epochs); its result:\n"
                      + table(rows, title))
        picture = os.path.join(self.folder, "summary.png")
        if (draw and self.rt.main and os.path.exists(self.checkpoint)
                and not os.path.exists(picture)):
            draw(self.folder)
        return True

    # ---- Before the loop -------------------------------------------------------------------------

    def start(self, args, data, parts, metrics, images, batch, passes=None):
        """Restore a resumed run's parts, write config.json, and watch for signals from now on.

        parts: {name in the checkpoint: network, optimizer, ..., tensor or None}, restored in this
        order. metrics: names of the numbers that after_step is given. images: of an epoch, cut into
        global batches of `batch`. passes: relative cost of each epoch, for the time that is left.
        """
        self.args, self.data, self.parts, self.metrics = args, data, parts, metrics
        self.steps = -(-images // batch)
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
        self.write(self.write_beginning)
        self.resumed = None                                     # lets its memory go
        done = self.start_epoch * images + self.start_step * batch
        self.bar = tqdm(total=args.epochs * images, initial=done, unit=" images", unit_scale=True,
                        disable=None if self.rt.main else True)     # None: only in a terminal
        self.images, self.timer, self.timed = images, None, 0

    def watch_signals(self):
        """STOP_SIGNALS stop the run after a step from now on; so does an earlier one."""
        self.saved_at, self.due = time.monotonic(), False
        for number in runtime.watched_signals():
            signal.signal(number, runtime.request_stop)
        stop, = all_max([runtime.stop_signal], self.rt)
        if stop:
            self.rt.print("Stopped before the first step")
            sys.exit(128 + stop)

    def write_beginning(self):
        """config.json, and the log cut back to the epochs that the checkpoint has."""
        os.makedirs(self.folder, exist_ok=True)
        for name in ("last.pt", "log.jsonl", "config.json", "result.json"):
            remove_temporaries(os.path.join(self.folder, name))
        if self.overwrite:
            for pattern in OWN_FILES:
                for path in glob.glob(os.path.join(glob.escape(self.folder), pattern)):
                    os.remove(path)
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "numpy": np.__version__}
        save_json(os.path.join(self.folder, "config.json"), self.config() | {
            "classes": self.data.class_names, "counts": self.data.counts,
            "groups": self.data.groups, "versions": versions, "hardware": self.rt.hardware(),
            "amp_dtype": str(self.rt.amp), "teachers": self.teachers, "forced": self.forced,
            "fingerprint": self.data.fingerprint})
        self.seconds = sum(record["seconds"] for record in self.log)
        text = "".join(map(as_line, self.log))
        write_atomically(self.log_path, lambda file: file.write(text.encode()))

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
        if (step + 1) % self.every_steps == 0:
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

    def write(self, action):
        """Call action() in the main process; if it cannot write, all processes end."""
        error = None
        if self.rt.main:
            try:
                if self.lock and self.lock.file is not None and not self.lock.in_place():
                    raise UserError(f"cannot write in {self.folder}: it was removed, or is "
                                    "another run's now")
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
                     forced=self.forced)

        def write():
            with suppress(FileNotFoundError):   # of a shorter run, which --force has extended
                os.remove(os.path.join(self.folder, "result.json"))
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
                      "command": command_line(self.rt), "hardware": self.rt.hardware(),
                      "seconds": round(self.seconds, 1), "date": time.strftime("%Y-%m-%d")}
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
        if self.lock:
            self.lock.release()


def is_epoch(line):
    """Is a line of the log, a dict or None, what after_epoch has written?"""
    return line is not None and all(isinstance(line.get(name), (int, float))
                                    for name in ("epoch", "seconds"))


def as_line(record):
    """An epoch's record as a line of log.jsonl."""
    return json.dumps(null_for_nan(record)) + "\n"


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
            part.load_state_dict(state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not fit this run: {runtime.one_line(error)[:200]}") from None


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
