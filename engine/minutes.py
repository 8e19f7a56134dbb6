r"""--minutes: how many epochs a run has time for on this machine.

A `Probe` takes the place of the run's folder in a training loop, which so trains a copy of the
network for three short epochs: the first to warm up, then two of which the steps are timed, as
training itself takes them (loading, augmentation, teacher, both passes of SAM, averages). The
schedule shrinks to three epochs, so the last one has late SAM and, in most recipes, re-weighting.
After each of them a part of the test set is evaluated. Nothing of this reaches the run: everything
random in its steps follows from (seed, epoch, step, rank).

    seconds(E) = steps ((E - L) t_2 + L t_3) + evaluations(E) t,        L = max(1, E // 3)

t_2 and t_3: a step of the second and of the last short epoch; t: an evaluation.
"""
import copy
import gc
import math
import time
from dataclasses import dataclass, replace
from itertools import cycle, islice

import torch

from engine import runtime
from engine.evaluation import SUMMARY_IMAGES
from engine.run_folder import duration
from engine.runtime import all_max
from engine.settings import set_epochs

WARM_UP = {"cpu": 3, "cuda": 10}    # steps that are not timed: kernels are chosen, memory is paged
TIMED = 3, 300                      # steps of a timed epoch, from and to
SHARE = 0.02                        # of the time that is left, for each timed epoch
FIRST_STEP = 0.25                   # of it for the first step: there is no time to measure more
FIRST_STEPS = 0.05                  # of it for the first two or three steps: the same
EVALUATION = 0.07                   # evaluations take at most this share of the epochs' time
PICTURE = 8                         # seconds for a student's table and picture
TOO_MUCH = 0.15                     # of the time, beyond it: the run says that it takes longer


class TooSlow(Exception):
    """Measuring on would cost too much: the estimate is made from the steps so far."""


class Probe:
    """In place of a Run in a training loop: writes nothing, and measures.

    seconds: the time that is left. `warm`, `step`, `evaluation`: seconds of the first epoch's
    steps, of a step of each later epoch, and of the last evaluation.
    """
    start_epoch = 0

    def __init__(self, rt, seconds):
        self.rt, self.seconds, self.count = rt, seconds, WARM_UP[rt.device.type]
        self.step, self.evaluation = [], None

    def start(self, args, data, parts, metrics, steps, images, passes=None):
        self.metrics, self.steps = metrics, steps
        self.passes = passes or [1] * args.epochs
        self.compiled = getattr(args, "compile", False)

    def begin_epoch(self, epoch):
        self.began = self.last = self.rt.now()      # last: the end of the last step that was noted

    def remaining_steps(self, epoch, batches):
        return islice(enumerate(cycle(batches)), self.count)

    def after_step(self, epoch, step, values, finite):
        """Note the time: in a timed epoch of the first and the last step only, so that between
        them the host runs ahead of the device as it does in training.
        """
        if epoch == 0 or step in (0, self.count - 1):
            before, self.last = self.last, self.rt.now()
        if step == 0:
            self.first = self.last                      # its end
        if epoch == 0:
            self.warm, self.warm_step = self.last - self.began, self.last - before
            limit = FIRST_STEP if step == 0 else FIRST_STEPS
            spent = self.warm
            if self.rt.device.type == "cuda":           # its first step loads and chooses kernels
                spent = self.last - self.first
            runtime.stop_if_asked(self.rt)
            slow, = all_max([int(spent > limit * self.seconds)], self.rt)
            if slow:
                raise TooSlow

    def after_epoch(self, epoch, results, **record):
        runtime.stop_if_asked(self.rt)
        self.evaluation = self.rt.now() - self.last
        if epoch == 0:
            fewest, most = TIMED
            wanted = SHARE * self.seconds / self.warm_step
            self.count, = all_max([max(fewest, min(most, round(wanted)))], self.rt)
        else:
            self.step.append((self.last - self.first) / (self.count - 1))

    def costs(self, share):
        """Costs of the run; share: how many times the test images that were looked at it has."""
        if not self.step:                   # too slow: SAM's second pass is as long as the first
            epoch = self.steps * self.warm_step
            late = epoch * self.passes[-1] / self.passes[0]
        else:
            epoch, late = (self.steps * step for step in self.step)
        evaluation = self.evaluation
        if evaluation is None:              # a third of a step, for as many images
            evaluation = self.warm_step / 3
        return Costs(epoch, late, share * evaluation)

    def beginning(self):
        """Seconds of compiling: those that the first steps took longer than later ones.

        What else they load and choose, the process keeps.
        """
        if self.step and self.compiled:
            return max(0, self.warm - WARM_UP[self.rt.device.type] * self.step[0])
        return 0


def fit_epochs(run, train, args, data, net, *more, at_end=None, **replacements):
    """With --minutes: measure steps of train(args, data, net, *more, run), set the epochs, say so.

    more: ends with rt. at_end(net, data, rt): what the script does after training, with a number of
    training images. A run that is continued has its epochs. Rank 0's measurement is for all.
    """
    if args.minutes is None or run.measured:
        return
    budget, rt = 60 * args.minutes, run.rt
    passed = time.monotonic() - run.began
    probe = Probe(rt, budget - passed)
    short = copy.copy(args)
    set_epochs(short, 3, 1)
    short.eval_every = 1
    # Images are taken by the index of their label: with few labels few are looked at. A GPU's time
    # for few is that of the calls.
    tests, images, gpu = len(data.test_labels), len(data.train_labels), rt.device.type == "cuda"
    count = 1000 if gpu else args.batch         # two batches of an evaluation
    few = replace(data, test_labels=data.test_labels[:count])
    end = 0 if at_end else PICTURE
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(gpus):           # of all GPUs it would warn, and begin to use them
        twin = copy.deepcopy(net)
        try:
            train(short, few, twin, *more, probe, **replacements)
        except TooSlow:
            pass
        if at_end:
            few = replace(few, train_labels=data.train_labels[:count])
            if gpu:                             # batches of another size: it chooses kernels
                at_end(twin, few, rt)
            began = rt.now()
            at_end(twin, few, rt)
            end = (rt.now() - began) / len(few.train_labels) * min(images, SUMMARY_IMAGES)
    del twin
    gc.collect()            # frees what a loop that TooSlow has ended holds on the device
    costs = probe.costs(tests / len(few.test_labels))
    left = budget - (time.monotonic() - run.began) - probe.beginning() - end
    epochs, every = all_max(most_epochs(left, costs, args) if rt.main else (0, 0), rt)
    set_epochs(args, epochs, every)
    run.measured = True
    takes = costs.seconds(epochs, every)
    text = (f"{args.minutes:g} minutes: {(budget - left - end) / 60:.1f} are gone, "
            f"{takes / 60:.1f} for {several(epochs, 'epoch')} of {duration(costs.epoch)} and "
            f"{several(math.ceil(epochs / every), 'evaluation')} of {duration(costs.evaluation)}, "
            f"{end / 60:.1f} for the end")
    if takes - left > TOO_MUCH * budget:
        needed = (budget - left + takes) / budget
        text += (f". Warning: that is {(takes - left) / 60:.1f} too many, for one epoch is the "
                 f"least: {needed:.1f} times the --minutes, or a smaller network")
    rt.print(text)


def several(n, what):
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


@dataclass
class Costs:
    """Seconds of an epoch, of one of the last third (late SAM, re-weighting), of an evaluation."""
    epoch: float
    late: float
    evaluation: float

    def seconds(self, epochs, every):
        """Of so many epochs, with an evaluation every so many and at the end."""
        late = max(1, epochs // 3)
        return ((epochs - late) * self.epoch + late * self.late
                + math.ceil(epochs / every) * self.evaluation)


def most_epochs(left, costs, args):
    """(epochs, epochs between evaluations) that come nearest to `left` seconds; at least one.

    Evaluations are in the recipe's proportion, but take at most EVALUATION of an epoch's time.
    """
    every = args.eval_every
    if "eval_every" in args.fitted:
        affordable = math.ceil(costs.evaluation / (EVALUATION * costs.epoch))
        mean = (2 * costs.epoch + costs.late) / 3
        every = max(1, affordable, round(every / args.epochs * left / mean))
    epochs = 1
    while costs.seconds(epochs + 1, every) <= left:
        epochs += 1
    too_much = costs.seconds(epochs + 1, every) - left
    if too_much < left - costs.seconds(epochs, every):
        epochs += 1
    return epochs, min(every, epochs)
