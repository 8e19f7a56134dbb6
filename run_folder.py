r"""A run's folder: what is written there, and how a run goes on after whatever ended it.

    config.json   every resolved setting, versions, class counts
    log.jsonl     one JSON object per epoch
    last.pt       everything needed to resume, or to use the network; previous.pt is the one before it
    result.json   the final accuracies, and what they were measured on

Files are written aside and then moved into place, so that a file is either whole or the one before; and read without running
code from them. A checkpoint says how many steps of its epoch are done: since everything random in a step follows from (seed,
epoch, step, process), a run that goes on from there ends bit for bit where the undisturbed one ends.
"""
import argparse
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
import zipfile
from contextlib import suppress
from itertools import islice

import numpy as np
import torch

import engine
from engine import UserError


# ---- Files ---------------------------------------------------------------------------------------------------------------

def write_atomically(path, write, previous=None):
    """Call write(file) on a temporary file in the same folder, force it to disk, then put it in path's place at once.

    previous: where to keep what was in that place. Raises UserError if it cannot be written; what was there is still there.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        if previous and os.path.exists(path):
            os.replace(path, previous)                                    # killed between these two: `previous` is there
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; what was written before is intact") from None
    finally:
        with suppress(OSError):
            os.remove(temporary)


def sync_folder(path):
    """Force a folder's entries to disk: a file that took its place must be there after a power failure too."""
    with suppress(OSError):                                               # not every system lets a folder be opened
        folder = os.open(path or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def null_for_nan(data):
    """The same without NaN, which JSON does not know: an accuracy that nothing was measured for is null in files."""
    if isinstance(data, dict):
        return {k: null_for_nan(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [null_for_nan(v) for v in data]
    return None if isinstance(data, float) and math.isnan(data) else data


def nan_for_null(read):
    """For json's object_hook, the way back: in accuracies and in lists."""
    return {k: [math.nan if x is None else x for x in v] if isinstance(v, list) else
            math.nan if v is None and "overall" in read else v for k, v in read.items()}


def save_json(path, data):
    write_atomically(path, lambda f: f.write(json.dumps(null_for_nan(data), indent=1).encode() + b"\n"))


def save_checkpoint(path, previous=None, **state):
    """Write a dict of tensors and plain values, atomically; the file that was there becomes `previous`."""
    contents = io.BytesIO()
    torch.save(state, contents)                                           # straight to a full disk it would fail unclearly
    write_atomically(path, lambda f: f.write(contents.getbuffer()), previous)


# What published files hold beside tensors: settings, and accuracies as NumPy numbers. Anything else is refused.
numpy_scalar = np.float64(0).__reduce__()[0]
HARMLESS = [argparse.Namespace, np.dtype, *(type(np.dtype(t)) for t in ("float32", "float64", "int64")),
            (numpy_scalar, "numpy.core.multiarray.scalar"), (numpy_scalar, "numpy._core.multiarray.scalar")]


def load_checkpoint(path, keys=("model", "config")):
    """Read a checkpoint (`path`: the file or its run folder) safely, onto the CPU: a dict.

    Of a folder: last.pt or, if that is damaged or missing, previous.pt, with a line that says so. Raises UserError if there is
    none, if it is damaged or no checkpoint, or if it lacks one of `keys`.
    """
    if os.path.isdir(path):
        last, previous = (os.path.join(path, name) for name in ("last.pt", "previous.pt"))
        try:
            return load_checkpoint(last, keys)
        except UserError as error:
            try:
                state = load_checkpoint(previous, keys)
            except UserError:
                raise error from None
            print(f"{error}; taking {previous}", file=sys.stderr, flush=True)
            return state | {"fallback": True}
    if not os.path.exists(path):
        raise UserError(f"there is no checkpoint {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:
                if parts.testzip():                                       # torch.load would take a flipped bit for a weight
                    raise zipfile.BadZipFile
        with torch.serialization.safe_globals(HARMLESS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                            # damaged files raise nearly anything
        forbidden = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
        if forbidden:
            raise UserError(f"{path} holds an object of type {forbidden[1]}, and reading that would run code; save its "
                            "state_dict() instead") from None
        raise UserError(f"{path} is not a readable checkpoint: not a file that torch.save wrote, or damaged") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    if any(k not in state for k in keys):
        raise UserError(f"{path} is not a checkpoint of this project: it lacks {', '.join(keys)}")
    return state


LATER = {"stem": "patch"}                                                 # settings that older runs lack, as they were then


def load_weights(model, weights, what):
    """load_state_dict with strict=True; a mismatch becomes a UserError that says what differs."""
    try:
        model.load_state_dict(weights, strict=True)
    except (RuntimeError, ValueError, TypeError) as error:                # TypeError: there are none
        raise UserError(f"{what} does not fit the network: {' '.join(str(error).split())[:200]}") from None


# ---- The run -------------------------------------------------------------------------------------------------------------

def trackers(args, resumed):
    """What else is told of every epoch, functions of (epoch, {name: number}): TensorBoard, Weights & Biases, or nothing."""
    told = []
    if args.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs its package: pip install tensorboard") from None
        writer = SummaryWriter(args.out)

        def tell(epoch, numbers):
            for name, value in numbers.items():
                writer.add_scalar(name, value, epoch + 1)
            writer.flush()
        told.append(tell)
    if args.wandb:
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb needs its package: pip install wandb") from None
        number = os.path.join(args.out, "wandb_id.txt")                   # the same for a resumed run, another for a new one
        if not (resumed and os.path.exists(number)):
            write_atomically(number, lambda f: f.write(os.urandom(4).hex().encode()))
        with open(number) as f:
            number = f.read()
        try:
            run = wandb.init(project="deit-lt", name=args.name, id=number, config=vars(args), dir=args.out, resume="allow",
                             reinit=True)                                 # a teacher's run may have gone before in this process
        except Exception as error:                                        # not logged in, no network, ...
            raise UserError(f"--wandb: {' '.join(str(error).split())[:200]}") from None
        told.append(lambda epoch, numbers: run.log(numbers, step=epoch + 1))
    return told


def scalars(record):
    """An epoch's record for trackers: {"loss": 1.2, "avg/tail": 41.7, ...}, without lists and what was not measured."""
    flat = {}
    for name, value in record.items():
        flat |= {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return {k: float(v) for k, v in flat.items() if isinstance(v, (int, float))}


class Run:
    """A run's folder: refuses to overwrite another run, writes config, log, checkpoint and result (main process only)."""

    def __init__(self, folder, args, rt):
        self.folder, self.rt, self.log_path = folder, rt, os.path.join(folder, "log.jsonl")
        self.checkpoint, self.previous = (os.path.join(folder, name) for name in ("last.pt", "previous.pt"))
        minutes = args.save_every.endswith("m")                           # "10m", else "500": steps
        self.every_steps = math.inf if minutes else int(args.save_every)
        self.every_seconds = 60 * float(args.save_every[:-1]) if minutes else math.inf
        self.resumed, self.start_epoch, self.start_step, self.forced, self.fallback = None, 0, 0, [], False
        resume = args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0             # torchrun's restart
        there = folder
        while not os.path.exists(there) and os.path.dirname(there) != there:
            there = os.path.dirname(there) or "."
        if not os.path.isdir(there):
            raise UserError(f"{there} is a file: a run needs a folder, --out names another")
        if not os.access(there, os.W_OK):                                 # now, not after hours of a teacher's training
            raise UserError(f"the run folder {folder} cannot be written (read-only, or not yours); --out names another")
        if not any(map(os.path.exists, (self.checkpoint, self.previous))):
            return
        if not (resume or args.overwrite):
            raise UserError(f"{folder} already holds a run: --resume continues it, --overwrite starts it again, --out names "
                            "another folder")
        if resume:
            self.resumed = state = load_checkpoint(folder, ("model", "config", "epoch"))
            self.fallback = state.pop("fallback", False)                  # last.pt is damaged: it must not become previous.pt
            self.start_epoch, self.start_step = state["epoch"], state.get("step", 0)                 # done already
            self.sums, self.seconds, self.forced = state.get("sums"), state.get("seconds"), state.get("forced", [])
            self.check_settings(args)

    def check_settings(self, args):
        """Going on with other settings would be neither run: raise UserError with the differences, or with --force say them."""
        free = ("out", "resume", "overwrite", "device", "data_dir", "name", "compile", "checkpointing", "save_every", "force",
                "skip_bad", "tensorboard", "wandb", "eval_every")
        later = {k: v for k, v in LATER.items() if k in vars(args)}
        old, new = ({k: v for k, v in c.items() if k not in free} for c in (later | self.resumed["config"], vars(args)))
        old["processes"], new["processes"] = self.resumed.get("world", self.rt.world), self.rt.world
        keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        if keys:
            changed = ", ".join(f"{engine.flag(k)} {old.get(k)} -> {new.get(k)}" for k in keys)
            if not args.force:
                raise UserError(f"{self.folder} was begun with other settings: {changed}; repeat them, start another run, or "
                                "go on all the same with --force")
            self.forced = [*self.forced, f"after epoch {self.start_epoch}: {changed}"]
            self.rt.print(f"--force: going on {self.forced[-1]}")
            self.start_step = 0                                           # a half-done epoch's steps may now be others

    @property
    def finished(self):
        """Has the run in this folder written its result?"""
        return os.path.exists(os.path.join(self.folder, "result.json"))

    def check_data(self, data):
        """Raise UserError if the run that is resumed, or asked for its teacher, knows other images."""
        if self.resumed and self.resumed.get("data", data.fingerprint) != data.fingerprint:
            raise UserError(f"{self.folder} was trained on other images than these: --overwrite trains it again, --out names "
                            "another folder")

    def say_if_finished(self, args, title):
        """True, after a line that says so and its table, if there is nothing left to resume."""
        if not (self.finished and self.resumed and self.start_epoch >= args.epochs):
            return False
        with open(os.path.join(self.folder, "result.json")) as f:
            result = json.load(f, object_hook=nan_for_null)
        rows = {name: r for name, r in result.items() if isinstance(r, dict) and set(engine.COLUMNS) <= r.keys()}
        self.rt.print(f"{self.folder} is finished ({args.epochs} epochs); its result:\n{engine.table(rows, title)}")
        return True

    # A training loop calls these five: with the checkpoint to go on from; where an epoch starts, its steps, the end of each
    # step, and the end of the epoch.

    def restore(self, load):
        """Call load(state) with the checkpoint that is resumed, if any, and let its memory go."""
        if self.resumed:
            load(self.resumed)
            self.resumed = None

    def begun(self, epoch, sums):
        """(Time at which the epoch began, its sums so far): those of the checkpoint for a half-done epoch, else now, `sums`."""
        if epoch == self.start_epoch and self.start_step:
            return time.time() - self.seconds, self.sums[self.rt.rank].to(sums.device, copy=True)
        return time.time(), sums

    def steps(self, epoch, batches):
        """(step, batch) of an epoch, without the steps that a resumed run has behind it."""
        return islice(enumerate(batches), self.start_step if epoch == self.start_epoch else 0, None)

    def after_step(self, epoch, step, state, sums, started):
        """Write a checkpoint if it is time, or if a signal has asked to stop; then end the process with code 128 + signal.

        state: a function that returns what a checkpoint holds beside the place in the epoch.
        """
        due = (step + 1) % self.every_steps == 0 or time.time() - self.saved_at > self.every_seconds
        stop, due = engine.all_max((engine.stop_signal, due), self.rt)
        if due or stop:
            sums = engine.gather(sums[None], self.rt)                     # a row per process
            self.save(state() | dict(epoch=epoch, step=step + 1, sums=sums, seconds=time.time() - started))
        if stop:
            self.rt.print(f"Stopped in epoch {epoch + 1} after step {step + 1}; --resume goes on from there")
            engine.wait_for_all(self.rt)                                  # torchrun ends all as soon as one has ended
            sys.exit(128 + stop)

    def after_epoch(self, epoch, state, record, results, started, speed, bar):
        """Log the epoch's record and results (None: not evaluated), write a checkpoint, and print the epoch's line."""
        record = {"epoch": epoch} | record | (results or {})
        record |= {"images_per_second": round(speed, 1), "seconds": round(time.time() - started, 2)}
        self.save(state() | dict(epoch=epoch + 1, step=0), record)
        for tell in self.trackers:
            tell(epoch, scalars(record))
        engine.report(bar, self.rt, record, speed, results)

    def write(self, action):
        """Call action() in the main process; if it cannot write, all processes end, with one line. Until then all wait."""
        error = None
        if self.rt.main:
            try:
                action()
            except UserError as met:
                error = met
            except OSError as met:
                error = UserError(f"cannot write in {self.folder}: {met.strerror}; what was written before is intact")
        failed, = engine.all_max((error is not None,), self.rt)
        if failed:
            engine.end_together(error, self.rt)

    def begin(self, args, data):
        """Write config.json and cut the log back to the epochs that the checkpoint has; a new run clears the old one away."""
        self.watch_signals()
        self.write(lambda: self.write_beginning(args, data))
        self.trackers = trackers(args, self.resumed is not None) if self.rt.main else []

    def watch_signals(self):
        """From now on SIGTERM and SIGINT stop the run at the end of a step; one that came before, in a teacher's run, too."""
        self.saved_at = time.time()
        for number in engine.STOP_SIGNALS:
            signal.signal(number, engine.note_signal)
        stop, = engine.all_max((engine.stop_signal,), self.rt)
        if stop:
            self.rt.print("Stopped before the first step")
            sys.exit(128 + stop)

    def write_beginning(self, args, data):
        os.makedirs(self.folder, exist_ok=True)
        for old in () if self.resumed else ("last.pt", "previous.pt", "result.json"):
            with suppress(FileNotFoundError):
                os.remove(os.path.join(self.folder, old))
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        save_json(os.path.join(self.folder, "config.json"), vars(args) | {
            "classes": data.class_names, "counts": data.counts, "groups": data.groups, "versions": versions,
            "hardware": self.rt.hardware(), "amp_dtype": str(self.rt.amp), "forced": self.forced})
        lines = []
        if self.resumed and os.path.exists(self.log_path):
            with open(self.log_path) as f:
                lines = f.readlines()[:self.start_epoch]                  # one line per epoch
        write_atomically(self.log_path, lambda f: f.write("".join(lines).encode()))

    def save(self, state, record=None):
        """Write the state as the run's checkpoint, after adding the record of a finished epoch to its log."""
        def write():
            if record:
                with open(self.log_path, "a") as f:
                    f.write(json.dumps(null_for_nan(record)) + "\n")
                    f.flush()
                    os.fsync(f.fileno())                                  # the checkpoint counts on it
            with suppress(FileNotFoundError):
                os.remove(os.path.join(self.folder, "result.json"))       # of a shorter run, which --force has gone on with
            keep = None if self.fallback else self.previous               # the good one stays until another is there
            save_checkpoint(self.checkpoint, keep, world=self.rt.world, forced=self.forced, **state)
        self.write(write)
        self.saved_at, self.fallback = time.time(), False

    def finish(self, args, data, results, **more):
        """Write result.json: what was run, on what, and each head's accuracies; no process goes on before it is there."""
        def write():
            with open(self.log_path) as f:
                seconds = round(sum(json.loads(line)["seconds"] for line in f), 1)
            local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            machines = f"--nnodes={self.rt.world // local} " if self.rt.world > local else ""
            launcher = f"torchrun {machines}--nproc_per_node={local}" if self.rt.world > 1 else "python"
            how = ("--resume", "--overwrite", "--force")                  # how the run came about, not what it is
            argv = [a for a in sys.argv if a not in how]
            result = {"dataset": data.label, "imb": round(data.imb, 1) if args.imb is None else args.imb, "recipe": args.recipe,
                      "epochs": args.epochs, "seed": args.seed, "command": f"{launcher} {shlex.join(argv)}",
                      "hardware": self.rt.hardware(), "seconds": seconds, "date": time.strftime("%Y-%m-%d")}
            result |= {"forced": self.forced} if self.forced else {}
            result |= more | {name: {c: r[c] for c in engine.COLUMNS} for name, r in results.items()}
            result |= {"by_count": other} if (other := engine.by_count(results, data)) else {}
            result["per_class"] = {name: r["per_class"] for name, r in results.items()}
            save_json(os.path.join(self.folder, "result.json"), result)
        self.write(write)
