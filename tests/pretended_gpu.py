"""A GPU that is not there: tensors say that they are on cuda:0 and are computed with on the CPU, like a GPU's otherwise.

    with PretendedGPU() as gpu:
        x = torch.zeros(3, device="cuda")         # or .to("cuda")
        x + torch.ones(3)                         # RuntimeError: tensors of two devices
        x.sum().item()                            # noted in gpu.waits: a GPU's queue of work runs dry here

It sees every call of torch's functions and methods from Python (torch.overrides.TorchFunctionMode), not what happens inside of
one, the backward pass for instance. What it cannot tell: how fast a GPU is, how it rounds, which operations it lacks, how much
memory it has, and anything of several processes.
"""
import traceback
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)
ROOT = Path(__file__).parent.parent
# What a GPU must be waited for: the values, or how many results there are.
WAITS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__", "__format__",
         "__repr__", "__contains__", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount",
         "equal", "allclose", "is_nonzero"}
WITHOUT_CPU_NUMBERS = {"cat", "stack", "concat", "hstack", "vstack"}      # elsewhere a GPU takes a CPU's 0-dimensional tensor
FLOAT_ONLY = {"matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "linear", "conv1d", "conv2d", "interpolate",
              "grid_sample", "avg_pool2d", "max_pool2d", "fold"}          # a CPU takes integers to some of them


def name_of(func):
    """"device.__get__" for the getter of a property, else a function's own name."""
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    return f"{owner}.{func.__name__}" if func.__name__ in ("__get__", "__set__") else func.__name__


def tensors_in(value):
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [t for one in value for t in tensors_in(one)]


class PretendedGPU(TorchFunctionMode):
    """See the file's head. waits: [(function, "file.py:line" of the project's that called it)]."""

    def __init__(self):
        super().__init__()
        self.storages, self.waits = {}, []                                # a storage is on one device, and all its views are

    def __enter__(self):
        """Optimizers group their tensors by device outside of what can be seen here: put their groups onto the GPU too."""
        self.group = torch.optim.Optimizer._group_tensors_by_device_and_dtype

        def group(lists, *args, **kwargs):
            found = self.group(lists, *args, **kwargs)
            on_gpu = any(t is not None and self.has(t) for t in lists[0])
            return {(GPU, key[1]): value for key, value in found.items()} if on_gpu else found
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
            self.storages[storage._cdata] = StorageWeakRef(storage)       # weak: its memory goes, its address is not used again
        return t

    def wait(self, name):
        frames = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
        self.waits.append((name, f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "tests"))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), name_of(func)
        tensors = tensors_in((args, kwargs))
        here = [t for t in tensors if self.has(t)]
        if here and name in ("device.__get__", "is_cuda.__get__", "is_cpu.__get__"):
            return {"device": GPU, "is_cuda": True, "is_cpu": False}[name.split(".")[0]]
        target, args, kwargs = self.destination(name, args, kwargs)       # None: no device was named
        if name in ("to", "cpu"):
            return self.move(func, name, target, args, kwargs)
        self.check(name, args, tensors, here)
        if here and self.must_wait(name, args, kwargs):
            self.wait(name)
        result = func(*args, **kwargs)
        if target == "cuda" or target is None and here:
            for t in tensors_in(result):
                self.take(t)
        return result

    def destination(self, name, args, kwargs):
        """The type of the device that a call names, and its arguments with the CPU instead."""
        found, cpu = [], torch.device("cpu")

        def replace(value):
            if isinstance(value, torch.device) or isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda"):
                found.append(torch.device(value).type)
                return cpu
            return value
        if name == "to":
            args = (args[0], *(replace(a) for a in args[1:]))
            if len(args) > 1 and isinstance(args[1], torch.Tensor):
                found.append("cuda" if self.has(args[1]) else "cpu")
        if kwargs.get("device") is not None:
            kwargs["device"] = replace(kwargs["device"])
        return found[0] if found else None, args, kwargs

    def move(self, func, name, target, args, kwargs):
        """.to and .cpu: between devices always a copy."""
        was_here = self.has(args[0])
        goes_here = was_here if target is None and name == "to" else target == "cuda"
        result = func(*args, **kwargs)
        if was_here and not goes_here:
            self.wait(name)
        if was_here != goes_here and result.untyped_storage()._cdata == args[0].untyped_storage()._cdata:
            result = result.clone()
        return self.take(result) if goes_here else result

    def check(self, name, args, tensors, here):
        """Raise RuntimeError where a GPU would: for tensors of both devices."""
        if not here:
            return
        others = [t for t in tensors if not self.has(t) and (t.ndim > 0 or name in WITHOUT_CPU_NUMBERS or "foreach" in name)]
        into = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name in FLOAT_ONLY and not all(t.is_floating_point() for t in here):
            raise RuntimeError(f"{name}: not implemented for integers on {GPU}")
        if name == "copy_":
            if not self.has(into):
                self.wait(name)
            return
        if name in ("__getitem__", "__setitem__") and self.has(into):     # a GPU's tensor takes a CPU's indices
            others = [t for t in tensors_in(args[2:]) if t.ndim > 0 and not self.has(t)]
        if name in ("data.__set__", "_has_compatible_shallow_copy_type"):  # how Module.to moves a parameter
            return
        in_place = name.endswith("_") and not name.endswith("__") or name.startswith("__i")
        if others or in_place and into is not None and not self.has(into):
            raise RuntimeError(f"{name}: tensors on {GPU} and on the CPU, of shapes {[tuple(t.shape) for t in tensors]}")

    def must_wait(self, name, args, kwargs):
        mask = lambda index: any(t.dtype in (torch.bool, torch.uint8) and self.has(t) for t in tensors_in(index))
        if name == "__getitem__":
            return mask(args[1])
        if name == "__setitem__":
            return mask(args[1]) and isinstance(args[2], torch.Tensor) and args[2].ndim > 0
        if name in ("where", "one_hot"):                                  # of one argument
            return len(args) + len(kwargs) == 1
        if name == "repeat_interleave":
            return "output_size" not in kwargs and any(isinstance(a, torch.Tensor) for a in args[1:])
        return name in WAITS
