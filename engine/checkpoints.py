r"""Checkpoints: written atomically, read without running code from them.

A file is written under a temporary name of its own, flushed to disk and then renamed, so that at
any moment either the new file or the one before is there, and whole. A link is replaced by the
file; what it leads to is left alone. Checkpoints are read with weights_only=True, which unpickles
tensors and plain values only.
"""
import argparse
import glob
import io
import math
import os
import re
import secrets
import sys
import zipfile
from contextlib import suppress

import numpy as np
import torch

from engine.runtime import UserError, one_line
from images.files import class_name


# ---- Writing -------------------------------------------------------------------------------------

def write_atomically(path, write, previous=None):
    """Call write(file) on a temporary file in the same folder, force it to disk, rename it to path.

    previous: where to keep the file that was there. Raises UserError if it cannot be written (the
    old file is then intact), or if `path` exists and is not a regular file.
    """
    if os.path.exists(path) and not os.path.isfile(path):       # a folder, or /dev/stdout
        raise UserError(f"cannot write {path}: it is not a regular file; name another")
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:     # x: never another's, nor through a link
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and os.path.exists(path):
            os.replace(path, previous)          # killed between these two: `previous` is there
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; what was written before is "
                        "intact") from None
    finally:
        with suppress(OSError):
            os.remove(temporary)


def remove_temporaries(path):
    """Remove what killed writers of this file have left; the caller is its only writer."""
    for name in glob.glob(f"{glob.escape(path)}.????????.tmp"):
        with suppress(OSError):
            os.remove(name)


def sync_folder(path):
    """Force a folder's entries to disk, so that a rename survives a power failure."""
    with suppress(OSError):                     # not every system lets a folder be opened
        folder = os.open(path or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_checkpoint(path, previous=None, **state):
    """Write a dict of tensors and plain values, atomically; the old file becomes `previous`."""
    contents = io.BytesIO()
    torch.save(state, contents)     # into memory: on a full disk torch.save has no clear error
    write_atomically(path, lambda file: file.write(contents.getbuffer()), previous)


# ---- Reading checkpoints -------------------------------------------------------------------------

# Settings that a network is built from, or its data are found by, in a checkpoint: texts, and
# numbers from ... to ..., of which OPTIONAL ones may be None.
TEXTS = {"arch", "loss", "norm", "method", "model", "stem", "dataset", "imb_type", "data_dir"}
NUMBERS = {"img_size": (1, 4096), "patch_size": (1, 4096), "epochs": (1, 10 ** 9),
           "drop_path": (0.0, 1.0), "layer_scale": (0.0, math.inf), "eval_crop": (0.1, 1.0),
           "imb": (1.0, math.inf), "holdout": (0.0, 1.0)}
OPTIONAL = {"layer_scale", "imb", "holdout"}
REPEATED = 2 ** 30      # bytes of a file's tensors that may be repetitions

# What published files hold beside tensors: settings, and accuracies as NumPy numbers.
numpy_scalar = np.float64(0).__reduce__()[0]
SAFE_GLOBALS = [argparse.Namespace, np.dtype,
                *(type(np.dtype(name)) for name in ("float32", "float64", "int64")),
                (numpy_scalar, "numpy.core.multiarray.scalar"),
                (numpy_scalar, "numpy._core.multiarray.scalar")]


def load_checkpoint(path, keys=("model", "config")):
    """Read a checkpoint (`path`: the file, or a run folder) onto the CPU: a dict.

    Of a folder: last.pt or, if that is damaged or missing, previous.pt, with a line on stderr and
    "fallback": True in the dict. Raises UserError if there is no checkpoint, if it is damaged, if
    it lacks one of `keys`, or if a run's values are not of their kinds.
    """
    if os.path.isdir(path):
        return load_last_or_previous(path, keys)
    if not os.path.exists(path):
        raise UserError(f"there is no checkpoint {path}")
    state = read_safely(path)
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    missing = [key for key in keys if key not in state]
    if missing:
        raise UserError(f"{path} is not a checkpoint of this project: it lacks "
                        + ", ".join(missing))
    names = state.get("class_names")
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
        state["class_names"] = [class_name(name) for name in names]
    if is_run_checkpoint(state):
        try:
            check_run(state)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return state


def load_last_or_previous(folder, keys):
    """last.pt of a run folder, or previous.pt; UserError about last.pt if neither can be read."""
    last, previous = os.path.join(folder, "last.pt"), os.path.join(folder, "previous.pt")
    try:
        return load_checkpoint(last, keys)
    except UserError as error:
        try:
            state = load_checkpoint(previous, keys)
        except UserError:
            raise error from None
        print(f"{error}; taking {previous}", file=sys.stderr, flush=True)
        return state | {"fallback": True}


def read_safely(path):
    """torch.load without running code from the file. UserError for a file that is damaged."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                packed = any(i.file_size > i.compress_size for i in archive.infolist())
                # torch.save packs nothing: no file is larger in memory. torch.load would take a
                # flipped bit for a weight.
                if packed or archive.testzip():
                    raise zipfile.BadZipFile
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:                  # damaged files raise nearly anything
        forbidden = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
        if forbidden:
            raise UserError(f"{path} holds an object of type {forbidden[1]}, and reading that "
                            "would run code; save its state_dict() instead") from None
        raise UserError(f"{path} is not a readable checkpoint: not a file that torch.save wrote, "
                        "or damaged") from None


def is_run_checkpoint(state):
    """Does a file hold a run of this project: weights, class names and a run's settings?"""
    config = state.get("config")
    if not isinstance(config, dict) or not {"model", "class_names"} <= state.keys():
        return False
    student, teacher = {"method", "model", "img_size", "patch_size", "drop_path"}, {"arch", "loss"}
    return student <= config.keys() or teacher <= config.keys()


def check_run(state):
    """UserError for a run's checkpoint with weights, names or settings that are malformed.

    Ranges only of settings that a network is built from, or that its data are found by.
    """
    weights, names, config = state["model"], state["class_names"], state["config"]
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise UserError("its weights are damaged: they are not a dict of tensors by name")
    if not are_names(names):
        raise UserError("its class names are damaged: they are not a list of different names")
    for key, value in config.items():
        if not isinstance(key, str) or not isinstance(value, (str, int, float, type(None))):
            raise UserError(f"its setting {one_line(key)} is damaged: it is a "
                            + type(value).__name__)
    for key in ("epoch", "step"):
        check_number(key, state.get(key, 0), 0, 10 ** 9)
    check_number("white", state.get("white", 255), 255, 65535)
    for key in ("data", "hardware", "amp"):             # data: a fingerprint
        if not isinstance(state.get(key, ""), str):
            raise UserError(f"its {key} is damaged: it is {one_line(state[key])}")
    for key in TEXTS & config.keys():
        if not isinstance(config[key], str):
            raise UserError(f"its setting {key} is damaged: it is {one_line(config[key])}")
    for key in NUMBERS.keys() & config.keys():
        if config[key] is not None or key not in OPTIONAL:
            check_number(key, config[key], *NUMBERS[key])


def are_names(names):
    """Is this a list of different class names, one or more?"""
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        return False
    return len(names) == len(set(names)) > 0


def is_number(value, low=-1e300, high=1e300):
    """Is this a number from low to high? If `low` is an int, so must be the value."""
    kinds = int if isinstance(low, int) else (int, float)
    return not isinstance(value, bool) and isinstance(value, kinds) and low <= value <= high


def check_number(key, value, low, high):
    """UserError for what is no number from low to high."""
    if not is_number(value, low, high):
        raise UserError(f"its {key} is damaged: it is {one_line(value)}, not a number from {low:g} "
                        f"to {high:g}")


def check_tensors(weights, what):
    """UserError for weights (a dict) that are no plain tensors with numbers, or too large.

    Before they are used: a file of a kilobyte can describe tensors of a terabyte, by repeating
    one number.
    """
    stored, needed = {}, 0
    for key, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{what} is damaged: {one_line(key)} is a {type(tensor).__name__}, not "
                            "a tensor")
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.is_complex() or tensor.numel() == 0:
            raise UserError(f"{what}: {one_line(key)} is not a plain tensor of real numbers (but "
                            "empty, sparse, quantized or complex); save the weights as float32")
        storage = tensor.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        needed += tensor.numel() * tensor.element_size()
    if needed > sum(stored.values()) + REPEATED:
        raise UserError(f"{what} is damaged: its weights would take {needed / 2 ** 30:,.0f} GiB, "
                        "which are not in the file")


def load_weights(model, weights, what):
    """load_state_dict with strict=True. UserError, about `what`, that says where they differ.

    UserError also for weights that are not finite: such a network predicts nothing.
    """
    try:
        model.load_state_dict(weights, strict=True)
    except (RuntimeError, ValueError, TypeError) as error:      # TypeError: there are none
        raise UserError(f"{what} does not fit the network: {one_line(error)}") from None
    for key, own in model.state_dict().items():
        # Old files lack BatchNorm's counts; in averages of several networks they are no integers.
        if key not in weights or key.endswith("num_batches_tracked"):
            continue
        tensor, dtype = weights[key], own.dtype
        if tensor.is_floating_point() != dtype.is_floating_point:
            raise UserError(f"{what} does not fit the network: {key} is {tensor.dtype}; save the "
                            "weights as float32")
        if not tensor.to(dtype).isfinite().all():
            raise UserError(f"{what} is damaged, or its training has failed: its weights {key} are "
                            "not finite; train it again, or take an earlier checkpoint")
