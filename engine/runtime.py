r"""Where a run computes: device and processes, autocast, seeds, signals, and how a script ends.

Under `torchrun` there are several processes, of which rank 0 prints and writes files. Errors that a
person can cause are `UserError`s: one line that says what to do, exit code 2, no traceback.
"""
import atexit
import ctypes
import os
import platform
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from images.files import DataError, visible
from images.machine import cpus

try:
    LIBC = ctypes.CDLL("libc.so.6")         # Linux
except OSError:
    LIBC = None


class UserError(Exception):
    """A mistake that a person can put right; the message is one line that says how."""


# ---- How a script ends ---------------------------------------------------------------------------

# SIGHUP: the terminal, or the connection to it, is gone. Windows has none.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM))
stop_signal = 0           # the signal that has asked this process to stop; 0: none
stop_requested_at = 0.0   # seconds, time.monotonic()
at_end = []               # functions that run_main calls at its end, the last one first
began = time.monotonic()   # when the script began, which --minutes counts from
trains = False            # does this script train? Then what it prints is in its files too


def watched_signals():
    """STOP_SIGNALS, but SIGHUP only where nohup has not told this process to ignore it."""
    return [number for number in STOP_SIGNALS
            if number in (signal.SIGTERM, signal.SIGINT)
            or signal.getsignal(number) is not signal.SIG_IGN]


def request_stop(number, _):
    """Signal handler: the first signal asks for a stop after the step, the second stops at once.

    Signals within one second count as one: torchrun forwards a signal to workers that may have
    received it themselves.
    """
    global stop_signal, stop_requested_at
    if stop_signal and time.monotonic() - stop_requested_at > 1:
        os._exit(128 + number)
    if not stop_signal:
        stop_signal, stop_requested_at = number, time.monotonic()
        with suppress(RuntimeError):        # it came while this process was printing
            print(f"{signal.Signals(number).name}: saving after this step (or evaluation); once "
                  "more stops at once", file=sys.stderr, flush=True)


def stop_if_asked(rt):
    """End all processes if a signal has asked one of them to, before the first step."""
    stop, = all_max([stop_signal], rt)
    if stop:
        rt.print("Stopped before the first step")
        sys.exit(128 + stop)


def run_main(main):
    """Run a script's main(); UserError, DataError and file errors end it with one line, code 2.

    Any other exception is a bug and keeps its traceback. Output that cannot be written ends no
    script (see Output); one that only prints then has exit code 2, unless its reader, say `head`,
    has had enough. Signal handlers are put back at the end.
    """
    global stop_signal, began, trains
    handlers, stop_signal = {number: signal.getsignal(number) for number in STOP_SIGNALS}, 0
    began, trains, code, streams = time.monotonic(), False, 0, (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = map(Output, streams)
    try:
        main()
    except (UserError, DataError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)       # all have the same error: rank 0 prints it
        print(f"error: {visible(str(error))}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        advice = ("; less is needed with --checkpointing, a smaller --micro-batch (of a teacher: "
                  "--batch) or, if it works in float32, --amp fp16")
        print(f"error: the GPU's memory is too small ({one_line(error, 90)})"
              + (advice if trains else ""), file=sys.stderr)
        code = 2
    except OSError as error:
        if error.filename is None:
            raise
        print(visible(f"error: {error.filename}: {error.strerror}"), file=sys.stderr)
        code = 2
    except SystemExit as error:
        code = error.code
    finally:
        while at_end:
            at_end.pop()()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if sys.stdout.error and not trains:
            code = code or 2
        sys.stdout, sys.stderr = sys.stdout.stream, sys.stderr.stream
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if dist.is_available() and dist.is_initialized():
        hard_exit(code or 0)
    if code:
        sys.exit(code)


class Output:
    """A standard stream that never fails: what can no longer be written is dropped.

    Its reader may have ended (`| head`), its disk be full, its terminal be gone. `error`: why, but
    for a reader that has ended; this is said on stderr.
    """

    def __init__(self, stream):
        if stream is None:                          # closed by the shell, `>&-`
            stream = open(os.devnull, "w")
        with suppress(AttributeError):              # characters that it lacks are escaped
            stream.reconfigure(errors="backslashreplace")
        self.stream, self.error = stream, None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError as error:
            self.drop(error)
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError as error:
            self.drop(error)

    def drop(self, error):
        """Lead the stream, and what Python still holds of it, into nothing."""
        with suppress(OSError):                     # one without a file, in a test or a notebook
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.stream.fileno())
            os.close(nothing)
        if not isinstance(error, BrokenPipeError) and not self.error:
            self.error = error
            print(f"output can no longer be written ({error}); it is dropped from here on",
                  file=sys.stderr)


def end_with_parent():
    """Under Linux: when the process that started this one ends, this one is asked to stop.

    Otherwise a kill -9 of torchrun, or of a table of runs, would leave its runs behind.
    """
    if LIBC is not None:
        LIBC.prctl(1, signal.SIGTERM)               # PR_SET_PDEATHSIG


# preexec_fn of subprocess.Popen.
ENDS_WITH_PARENT = end_with_parent if os.name == "posix" else None


def one_line(value, longest=200):
    """The beginning of a value's or an exception's text on one line; its kind if it has none."""
    return " ".join(str(value).split())[:longest] or type(value).__name__


def hard_exit(code=0):
    """End one of several processes without the interpreter's shutdown.

    gloo's threads, alive after DDP, abort during that shutdown now and then, and torchrun would
    report a finished run as failed. Destroying the group first does not help: torch 2.6 waits there
    for a thread of gloo's that waits for Python's lock, now and then; NCCL, after an error, for the
    other processes.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- Device and processes ------------------------------------------------------------------------

PRECISIONS = {None: "none", torch.bfloat16: "bf16", torch.float16: "fp16"}  # Runtime.amp: --amp


@dataclass
class Runtime:
    """Device, this process's rank among `world` processes, autocast type (None: float32)."""
    device: torch.device
    rank: int = 0
    world: int = 1
    amp: torch.dtype = None

    @property
    def main(self):
        return self.rank == 0

    def now(self):
        """The clock's seconds, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def autocast(self):
        dtype = self.amp or torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.amp is not None)

    def print(self, *args):
        if self.main:
            print(*(visible(str(arg)) for arg in args), flush=True)

    def hardware(self):
        """For people: the GPU's name, or the CPU's with the threads in use."""
        if self.device.type == "cuda":
            return f"{self.world} x {torch.cuda.get_device_name(self.device)}"
        n, match = torch.get_num_threads(), cpu_info(r"model name\s*:\s*(.+)")
        name = match[1] if match else platform.machine()
        threads = f"{n} threads of {name}" if n > 1 else f"{n} thread of {name}"
        return f"{self.world} x {threads}" if self.world > 1 else threads


def cpu_info(pattern):
    """First match of a regular expression in /proc/cpuinfo; None if there is none."""
    try:
        with open("/proc/cpuinfo") as file:
            return re.search(pattern, file.read())
    except OSError:
        return None


def has_bf16(device):
    """Does the hardware multiply bfloat16 matrices faster than float32 ones?

    GPUs from Ampere on do; on a CPU AMX, ARM's bf16 and AMD's avx512_bf16. Intel's avx512_bf16
    without AMX takes twice the time of float32 (results/README.md, speed).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    fast = r"\b(amx_bf16|bf16)\b|AuthenticAMD(?s:.*)\bavx512_bf16\b"
    return device.type == "cpu" and cpu_info(fast) is not None


def lacks_memory(error):
    """Is this RuntimeError a lack of GPU memory? cuBLAS, CUDA, NCCL report theirs as text only."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("_ALLOC_FAILED", "out of memory"))


def keep_freed_memory():
    """Let glibc keep freed memory for the next tensor instead of returning it to the system."""
    if LIBC is not None:                            # other systems have other allocators
        LIBC.mallopt(-4, 0)                         # M_MMAP_MAX: no allocation is mapped separately
        LIBC.mallopt(-1, 2 ** 31 - 1)               # M_TRIM_THRESHOLD: nothing is returned


def use_gpu(device):
    """Make it this process's GPU. UserError if it cannot compute.

    torch counts all GPUs, also those that this build has no kernels for, that are full, or that
    another process has to itself.
    """
    try:
        torch.cuda.set_device(device)
        torch.ones(1, device=device).add(1).cpu()
    except RuntimeError as error:
        raise UserError(f"{device} cannot be used ({one_line(error, 90)}): is it full, taken, or "
                        "for another torch or driver? Else --device cpu") from None
    torch.backends.cudnn.benchmark = True


def setup(device="auto", amp=None):
    """Runtime of this process; joins torchrun's process group. UserError for a missing device.

    amp: as --amp; None, of scripts that have no such flag: "auto".
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:         # torchrun's child
        end_with_parent()
    try:
        rank, world, local = (int(os.environ.get(name, default)) for name, default in
                              (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if not 0 <= rank < world:
            raise ValueError
    except ValueError:
        raise UserError("RANK, WORLD_SIZE and LOCAL_RANK of the environment are numbers that "
                        "torchrun sets: unset them") from None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        hidden = rank > 0 or "CUDA_VISIBLE_DEVICES" in os.environ
        has_gpu = os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi")      # Windows, WSL
        if device == "cpu" and has_gpu and not hidden:
            cuda = torch.version.cuda               # None: as pip installs it on Windows
            reason = f"a driver too old for CUDA {cuda}?" if cuda else "it is a build for CPUs"
            print(f"warning: there is a GPU, but torch cannot use it ({reason}): going on without "
                  "it", file=sys.stderr)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device) or (":" in device and world > 1):
        raise UserError(f"--device is auto, cpu, cuda or, for one process, cuda:N, not {device}")
    gpus = torch.cuda.device_count()
    if device != "cpu" and int(device[5:] or local) >= gpus:
        advice = f"--nproc_per_node={gpus}" if gpus and world > 1 else "--device cpu"
        raise UserError(f"--device {device}: this torch sees {gpus} GPU(s), and this process needs "
                        f"number {device[5:] or local}, counted from 0; use {advice}")
    device = torch.device(f"cuda:{local}" if device == "cuda" else device)
    if device.type == "cuda":
        use_gpu(device)
    else:
        keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:         # torch does not know of a quota of time
        torch.set_num_threads(min(torch.get_num_threads(), cpus()))
    if world > 1 and not dist.is_initialized():
        if rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ:       # not by torchrun
            print(f"Waiting for the others, as WORLD_SIZE is {world}; unset it if there are none",
                  file=sys.stderr, flush=True)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            # Others wait while the first reads a large set; torchrun notices one that has died.
            dist.init_process_group(backend, timeout=timedelta(hours=2))
        except ValueError as error:                 # set by a cluster, or left in the environment
            raise UserError(f"WORLD_SIZE is {world}, but this process has no group: start it with "
                            f"torchrun, or unset WORLD_SIZE ({one_line(error)})") from None
    if amp in ("auto", None):
        chosen = "bf16" if has_bf16(device) else "none"
        if (amp, chosen, device.type) == ("auto", "none", "cuda") and rank == 0:
            print("This GPU has no fast bfloat16, so it works in float32: --amp fp16 is faster",
                  file=sys.stderr)
        amp = chosen
    dtype, = (dtype for dtype, name in PRECISIONS.items() if name == amp)
    return Runtime(device, rank, world, dtype)


def seed_step(*key):
    """Seed torch from (seed, epoch, step, rank): all that is random in that step follows.

    torch.manual_seed would give the same draws, but walks the stack for 2 to 8 ms while CUDA has
    not been used, two or three times a step.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


# ---- Several processes ---------------------------------------------------------------------------

def barrier(rt):
    """Wait for all processes: what the main process has written by now, the others may read."""
    if rt.world > 1:
        dist.barrier()


def exit_together(error, rt):
    """End all processes because of a UserError that all of them have come to.

    Rank 0 prints it. torchrun kills every process as soon as one has ended, so all wait until it
    is printed. With one process the error is raised.
    """
    if rt.world == 1:
        raise error
    if rt.main:
        print(f"error: {visible(str(error))}", file=sys.stderr, flush=True)
    dist.barrier()
    sys.exit(2)


def all_sum(tensor, rt):
    """Sum over processes, in place."""
    if rt.world > 1:
        dist.all_reduce(tensor)
    return tensor


def all_max(numbers, rt):
    """Elementwise maximum of every process's whole numbers, a list, the same in each process."""
    if rt.world == 1:
        return list(numbers)
    largest = torch.tensor(numbers, dtype=torch.long)   # on the CPU, by gloo: no GPU is waited for
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def gather(tensor, rt):
    """Rows of all processes, (n, ...) of each -> (world n, ...), by rank."""
    if rt.world == 1:
        return tensor
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(rt.world)]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def share_buffers(net, rt):
    """Give every process rank 0's buffers: BatchNorm's statistics differ between processes."""
    if rt.world > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)
