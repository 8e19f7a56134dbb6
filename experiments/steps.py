r"""A training step, looked at closely: images/s, kernel launches, how busy the GPU is, its memory.

    python -m experiments.steps --data-dir data           the steps of this project's runs
    python -m experiments.steps --only small --compile    one of them, with torch.compile
    python -m experiments.steps --only resnet32 --compile --graphs     and CUDA graphs (for steps
                                                          of one micro-batch: not base)
    python -m experiments.steps --device cpu              on a CPU: smaller batches and networks

Each row is a training script's own loop, with its settings, augmentation, data and mixed precision;
a student's teacher is an untrained ResNet-32. Some steps are timed, then two are profiled.

launches   kernels that a step starts on the GPU (on a CPU: operators). Starting one takes the host
           some microseconds: many of them, and a GPU that is not busy, mean that the host is slow
GPU busy   time of a step's kernels / time of a step
of peak    FLOP/s of the step / those of a large matrix product, measured in the same process
GiB        largest memory of the GPU's tensors in a step; on a CPU of this process, until then
"""
import argparse
import gc
import math
import time
from functools import partial
from itertools import cycle

import torch

import resnet
import train_student
import train_teacher
from engine import runtime
from engine.datasets import load_data
from engine.minutes import Probe
from engine.runtime import one_line
from engine.training import compiled
from experiments.ablate import STUDENT, TEACHER
from experiments.bench import forward_flops, matmul_peak, peak_memory, type_name

STEPS = {  # name: (script, flags, and those of a CPU besides)
    "resnet32": (TEACHER, "--recipe paper", "--batch 16"),              # under SAM, batch 128
    "fast": (TEACHER, "--recipe ours", "--batch 16"),
    "mini": (STUDENT, "--recipe cpu", "--batch 16"),                    # 32 px, patch 8, batch 64
    "small": (STUDENT, "--recipe paper --model small --img-size 32 --patch-size 4 --batch 256 "
                       "--micro-batch 256", "--batch 2"),
    "gpu": (STUDENT, "--recipe gpu", "--batch 2 --micro-batch 2"),      # 32 px, patch 4, batch 256
    "base": (STUDENT, "--recipe paper", "--model tiny --batch 2 --micro-batch 1"),  # 8 x 128
}
TIMED, PROFILED = 3, 2      # steps: timed at least; profiled


class Measured(Exception):
    """Enough steps are measured."""


class Meter(Probe):
    """In place of a Run in a training loop: times its steps, profiles two more, and ends the loop.

    seconds: how long steps are timed. step: seconds of one; batch: its images.
    """

    def remaining_steps(self, epoch, batches):
        """Batches without end."""
        self.batch, self.timed, self.profiler = len(batches[0]), 0, None
        return enumerate(cycle(batches))

    def after_step(self, epoch, step, values, finite):
        if step < self.count:                                   # to warm up
            self.started = self.rt.now()
            if self.rt.device.type == "cuda":                   # cuDNN has tried its algorithms
                torch.cuda.reset_peak_memory_stats()
            if step + 1 >= TIMED and self.started - self.began > self.seconds:
                self.count = step + 1                           # slow steps: no more of them
        elif not self.profiler:                                 # the host runs ahead, as in a run
            self.timed += 1
            if self.timed >= TIMED and time.monotonic() - self.started > self.seconds:
                self.step = (self.rt.now() - self.started) / self.timed
                self.profiler = torch.profiler.profile(activities=self.activities())
                self.profiler.start()
        elif step == self.count + self.timed + PROFILED - 1:
            self.rt.now()
            self.profiler.stop()
            raise Measured

    def activities(self):
        """A GPU's kernels, a CPU's operators; both at once would be slow."""
        activity = torch.profiler.ProfilerActivity
        return [activity.CUDA if self.rt.device.type == "cuda" else activity.CPU]

    def launches(self):
        """Of a profiled step: (kernels, their seconds) on a GPU, (operators, NaN) on a CPU."""
        events = self.profiler.events()
        if self.rt.device.type == "cpu":
            operators = [event for event in events
                         if event.name.startswith("aten::") and not event.cpu_children]
            return len(operators) / PROFILED, math.nan
        kernels = [event for event in events if event.device_type.name == "CUDA"
                   and not event.name.startswith(("Memcpy", "Memset", "Context Sync"))
                   and not getattr(event, "is_user_annotation", False)]
        if not kernels:                                         # the profiler was not let in
            return math.nan, math.nan
        seconds = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
        return len(kernels) / PROFILED, seconds / PROFILED


def measure_step(script, flags, seconds, peak, rt, mode=None):
    """A row of the table. flags: a list; peak: FLOP/s; mode: of torch.compile."""
    if rt.device.type == "cuda":
        torch.compiler.reset()                                  # the last row's graphs hold memory
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    module = train_teacher if script == TEACHER else train_student
    module.compiled = partial(compiled, mode=mode)              # what its train() calls
    args = module.parse(flags)
    module.resolve(args, rt)
    data = load_data(args, rt)
    net, teachers = module.new_network(args, data, rt), []
    flops = 3 * forward_flops(net, args.img_size, rt)           # of an image; backward is twice
    if script == TEACHER:
        title = f"{args.arch}, {args.img_size} px"
        if args.rho > 0:
            title, flops = f"{title}, SAM", 2 * flops
    else:
        title = f"{args.model}, {args.img_size} px, patch {args.patch_size}"
        teacher = resnet.resnet32(data.num_classes).eval().requires_grad_(False)
        teachers = [teacher.to(rt.device, memory_format=torch.channels_last)]
        flops += forward_flops(teacher, 32, rt)
    if args.compile:
        title += ", compiled" if mode is None else ", compiled, graphs"
    meter = Meter(rt, seconds)
    try:
        module.train(args, data, net, *teachers, rt, meter)
    except Measured:
        pass
    memory, (launches, kernel_seconds) = peak_memory(rt), meter.launches()
    speed = meter.batch / meter.step                            # images/s
    launches = "-" if math.isnan(launches) else f"{launches:.0f}"
    busy = "-" if math.isnan(kernel_seconds) else f"{kernel_seconds / meter.step:.0%}"
    return (f"| {title} | {args.batch} | {speed:.0f} | {1000 * meter.step:.1f} | {launches} | "
            f"{busy} | {flops * speed / peak:.1%} | {memory:.1f} |")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m experiments.steps", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP",
                        help=", ".join(STEPS))
    parser.add_argument("--seconds", type=float, default=3.0, help="timed in each row [3]")
    parser.add_argument("--graphs", action="store_true",
                        help="with --compile: replay kernels as CUDA graphs")
    options, common = parser.parse_known_args()                 # further flags go to every run
    settings = train_teacher.parse(common)
    rt = runtime.setup(settings.device, settings.amp)
    peak, mode = matmul_peak(rt), "reduce-overhead" if options.graphs else None
    print(f"| step ({type_name(rt)}, peak {peak / 1e12:.2f} TFLOP/s) | batch | images/s | ms | "
          "launches | GPU busy | of peak | GiB |\n"
          "| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name in options.only:
        script, flags, on_cpu = STEPS[name]
        flags = flags.split()
        if rt.device.type == "cpu":
            flags += on_cpu.split()
        try:
            row = measure_step(script, [*flags, *common], options.seconds, peak, rt, mode)
            print(row, flush=True)
        except RuntimeError as error:                           # too little memory, say
            print(f"| {name} | failed: {one_line(error)} |{' - |' * 6}", flush=True)


if __name__ == "__main__":
    runtime.run_main(main)
