"""A pretended GPU: tensors say that they are on cuda:0 but are computed on the CPU.

    with PretendedGPU() as gpu:
        x = torch.zeros(3, device="cuda")         # or .to("cuda")
        x + torch.ones(3)                         # RuntimeError: tensors of two devices
        x.sum().item()                            # noted in gpu.waits: a host-device sync

It sees every call of torch's functions and methods from Python (TorchFunctionMode), not what
happens inside of one, the backward pass for instance. It cannot tell how fast a GPU is, how it
rounds, which operations it lacks or how much memory it has, and knows nothing of several processes.
"""
import traceback
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

import resnet

GPU = torch.device("cuda", 0)
ROOT = Path(__file__).parent.parent
# What a GPU must be waited for: the values, or how many results there are.
WAITS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__",
         "__array__", "__format__", "__repr__", "__contains__", "nonzero", "argwhere",
         "masked_select", "unique", "unique_consecutive", "bincount", "equal", "allclose",
         "is_nonzero"}
# Elsewhere a GPU takes a CPU's 0-dimensional tensor.
WITHOUT_CPU_NUMBERS = {"cat", "stack", "concat", "hstack", "vstack"}
# A CPU takes integers to some of these.
FLOAT_ONLY = {"matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "linear", "conv1d",
              "conv2d", "interpolate", "grid_sample", "avg_pool2d", "max_pool2d", "fold"}
PROPERTIES = {"device.__get__": GPU, "is_cuda.__get__": True, "is_cpu.__get__": False}
MOVES_A_PARAMETER = ("data.__set__", "_has_compatible_shallow_copy_type")      # in Module.to


def name_of(func):
    """"device.__get__" for the getter of a property, else a function's own name."""
    if func.__name__ not in ("__get__", "__set__"):
        return func.__name__
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    return f"{owner}.{func.__name__}"


def tensors_in(value):
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [t for one in value for t in tensors_in(one)]


def names_a_device(value):
    if isinstance(value, str):
        return value.split(":")[0] in ("cpu", "cuda")
    return isinstance(value, torch.device) and value.type in ("cpu", "cuda")       # not meta


def caller():
    """"file.py:line" of the project's line that is being executed, or "tests"."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if ROOT in file.parents and ROOT / "tests" not in file.parents:
            return f"{file.relative_to(ROOT)}:{frame.lineno}"
    return "tests"


@pytest.fixture(scope="module")
def short_resnet():
    """ResNet-32 with one block for each five: the same kinds of tensors in a fifth of the time."""
    stage = resnet.CifarResNet.stage

    def one_block(n, *args, **kwargs):
        return stage(1, *args, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet.CifarResNet, "stage", staticmethod(one_block))
        yield


class PretendedGPU(TorchFunctionMode):
    """See the file's head.

    waits: [(function, "file.py:line" of the project that called it)]. calls: names of functions.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.calls = [], []
        self.storages = {}          # a storage is on one device, and so are all its views

    def __enter__(self):
        """Optimizers group tensors by device out of sight: put their groups onto the GPU too."""
        self.group = torch.optim.Optimizer._group_tensors_by_device_and_dtype

        def group(lists, *args, **kwargs):
            groups = self.group(lists, *args, **kwargs)
            if any(t is not None and self.has(t) for t in lists[0]):
                return {(GPU, key[1]): value for key, value in groups.items()}
            return groups
        torch.optim.Optimizer._group_tensors_by_device_and_dtype = staticmethod(group)
        return super().__enter__()

    def __exit__(self, *error):
        torch.optim.Optimizer._group_tensors_by_device_and_dtype = staticmethod(self.group)
        return super().__exit__(*error)

    def has(self, t):
        return t.untyped_storage()._cdata in self.storages

    def take(self, t):
        storage = t.untyped_storage()
        if storage._cdata not in self.storages:
            # A weak reference: its memory goes, but its address is not used again.
            self.storages[storage._cdata] = StorageWeakRef(storage)
        return t

    def wait(self, name):
        self.waits.append((name, caller()))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), name_of(func)
        self.calls.append(name)
        tensors = tensors_in((args, kwargs))
        here = [t for t in tensors if self.has(t)]
        if here and name in PROPERTIES:
            return PROPERTIES[name]
        target, args, kwargs = self.destination(name, args, kwargs)
        if name in ("to", "cpu"):
            return self.move(func, name, target, args, kwargs)
        self.check(name, args, tensors, here)
        if here and self.must_wait(name, args, kwargs):
            self.wait(name)
        result = func(*args, **kwargs)
        if target == "cuda" or (target is None and here):
            for t in tensors_in(result):
                self.take(t)
        return result

    def destination(self, name, args, kwargs):
        """The type of the device that a call names, or None, and the arguments with the CPU."""
        named = []

        def replace(value):
            if not names_a_device(value):
                return value
            named.append(torch.device(value).type)
            return torch.device("cpu")
        if name == "to":
            args = (args[0], *(replace(a) for a in args[1:]))
            if len(args) > 1 and isinstance(args[1], torch.Tensor):
                named.append("cuda" if self.has(args[1]) else "cpu")
        if kwargs.get("device") is not None:
            kwargs["device"] = replace(kwargs["device"])
        return named[0] if named else None, args, kwargs

    def move(self, func, name, target, args, kwargs):
        """.to and .cpu: between devices always a copy, which blocks unless it is asked not to.

        Module.to, at the start of a run, is not noted: its call has a fourth argument.
        """
        was_here = self.has(args[0])
        goes_here = target == "cuda"
        if target is None and name == "to":         # to another type only
            goes_here = was_here
        result = func(*args, **kwargs)
        blocks = was_here or not (kwargs.get("non_blocking") or len(args) == 4)
        if was_here != goes_here and blocks:
            self.wait(name)
        same = result.untyped_storage()._cdata == args[0].untyped_storage()._cdata
        if was_here != goes_here and same:
            result = result.clone()
        return self.take(result) if goes_here else result

    def check(self, name, args, tensors, here):
        """Raise what a GPU's tensor would: RuntimeError where tensors are of both devices."""
        if not here:
            return
        if name in ("numpy", "__array__"):
            raise TypeError(f"{name}: of a tensor on {GPU}; .cpu() first")
        needed = name in WITHOUT_CPU_NUMBERS or "foreach" in name
        others = [t for t in tensors if not self.has(t) and (t.ndim > 0 or needed)]
        into = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name in FLOAT_ONLY and not all(t.is_floating_point() for t in here):
            raise RuntimeError(f"{name}: not implemented for integers on {GPU}")
        if name == "copy_":
            if not self.has(into):
                self.wait(name)
            return
        if name in MOVES_A_PARAMETER:
            return
        if name in ("__getitem__", "__setitem__") and self.has(into):
            # A GPU's tensor takes a CPU's indices.
            others = [t for t in tensors_in(args[2:]) if t.ndim > 0 and not self.has(t)]
        in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
        if others or (in_place and into is not None and not self.has(into)):
            shapes = [tuple(t.shape) for t in tensors]
            raise RuntimeError(f"{name}: tensors on {GPU} and on the CPU, of shapes {shapes}")

    def must_wait(self, name, args, kwargs):
        if name == "__getitem__":
            return self.has_mask(args[1]) or self.is_copied(args[1])
        if name == "__setitem__":
            masked = self.has_mask(args[1])
            several = isinstance(args[2], torch.Tensor) and args[2].ndim > 0
            return (masked and several) or self.is_copied(args[1])
        if name in ("where", "one_hot"):            # of one argument
            return len(args) + len(kwargs) == 1
        if name == "repeat_interleave":
            counted = any(isinstance(a, torch.Tensor) for a in args[1:])
            return counted and "output_size" not in kwargs
        return name in WAITS

    def is_copied(self, index):
        """Are there indices on the CPU? They are copied by a call that blocks."""
        return any(t.ndim > 0 and not self.has(t) for t in tensors_in(index))

    def has_mask(self, index):
        return any(t.dtype in (torch.bool, torch.uint8) and self.has(t) for t in tensors_in(index))
