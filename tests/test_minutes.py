"""engine/minutes.py: the epochs that fit into a time, by a pretended clock that only steps move.

The pretended training has a training loop's hooks and known costs; what it takes altogether is
added up by that clock.
"""
import argparse
import gc
import math
import weakref

import pytest
import torch

import data_lt
import train_teacher
from engine import minutes, runtime, settings
from engine.runtime import Runtime, UserError
from engine.settings import Interval, Setting

CPU = Runtime(torch.device("cpu"))
IMAGES, TESTS, BATCH = 1000, 500, 50                    # 20 steps an epoch
TABLE = [Setting("epochs", 60, Interval(1), ""), Setting("batch", BATCH, Interval(1), ""),
         Setting("warmup_epochs", 5.0, Interval(0), ""), Setting("drw_epoch", 40, Interval(0), ""),
         Setting("eval_every", 5, Interval(1), "")]


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(minutes.time, "monotonic", lambda: self.now)


class Folder:
    """What fit_epochs asks of a Run, and in the pretended training a Run's hooks."""
    start_epoch = 0

    def __init__(self, clock):
        self.rt, self.began, self.measured = CPU, clock.now, False

    def start(self, *args):
        pass

    def begin_epoch(self, epoch):
        pass

    def remaining_steps(self, epoch, batches):
        return enumerate(batches)

    def after_step(self, *args):
        pass

    def after_epoch(self, epoch, results):
        pass


def training(clock, step, late=None, evaluation=0.0, first=0.0):
    """A train() of which a step takes `step` seconds, in the last third of the epochs `late`, an
    evaluation so many per image, and the first step of all `first` more."""
    extra = [first]

    def train(args, data, net, rt, run):
        steps = data_lt.steps_per_epoch(len(data.train_labels), args.batch)
        run.start(args, data, {}, (), steps, len(data.train_labels))
        for epoch in range(run.start_epoch, args.epochs):
            run.begin_epoch(epoch)
            for i, batch in run.remaining_steps(epoch, [None] * steps):
                clock.now += late if late and epoch >= args.epochs * 2 / 3 else step
                clock.now += extra.pop() if extra else 0
                run.after_step(epoch, i, None, None)
            if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
                clock.now += evaluation * len(data.test_labels)
            run.after_epoch(epoch, None)
    return train


def small_data():
    images, labels = torch.zeros(1, 3, 1, 1, dtype=torch.uint8), torch.zeros(IMAGES).long()
    return data_lt.LongTailData("", "", images, labels, images, labels[:TESTS], ["a"], [IMAGES], {})


def asked(**given):
    args = argparse.Namespace(**{setting.name: None for setting in TABLE} | given)
    settings.fill_settings(args, TABLE, settings.defaults(TABLE))
    return args


def fit(clock, train, began=0.0, data=small_data(), **given):
    """(settings, seconds that measuring, training and its end take)."""
    args, run, start = asked(**given), Folder(clock), clock.now
    clock.now += began
    minutes.fit_epochs(run, train, args, data, torch.nn.Linear(1, 1), CPU)
    assert run.measured
    train(args, data, None, CPU, Folder(clock))
    return args, clock.now - start + minutes.PICTURE


@pytest.mark.parametrize("costs", [
    dict(step=0.1), dict(step=0.5), dict(step=0.1, late=0.2), dict(step=1.9, late=3.8),
    dict(step=0.1, first=20), dict(step=0.1, evaluation=0.01), dict(step=0.02, evaluation=0.1),
    dict(step=2.3, first=3), dict(step=0.004)])
@pytest.mark.parametrize("minutes_asked, began", [(3, 0), (3, 40), (10, 5), (10, 240)])
def test_the_whole_run_takes_the_minutes(costs, minutes_asked, began, monkeypatch):
    """A first step that counts in every epoch, evaluations, late SAM or loading that are forgotten,
    the epochs' number rounded down twice. Within 15 %, as far as whole epochs allow that."""
    clock = Clock(monkeypatch)
    args, taken = fit(clock, training(clock, **costs), began, minutes=minutes_asked)
    slack = 0.1 * 60 * minutes_asked + 0.5 * 20 * costs.get("late", costs["step"])
    assert abs(taken - 60 * minutes_asked) < slack
    evaluations = math.ceil(args.epochs / args.eval_every)
    assert evaluations == 1 or evaluations * TESTS * costs.get("evaluation", 0) < 0.1 * taken


@pytest.mark.parametrize("epochs, seconds", [(1, 60), (2, 90), (3, 120), (4, 150), (6, 240)])
def test_one_epoch_of_a_short_run_is_a_late_one(epochs, seconds):
    """SAM's second pass forgotten where a third of the epochs is less than one."""
    costs = minutes.Costs(epoch=30.0, late=60.0, evaluation=0.0)
    assert costs.seconds(epochs, 1) == seconds
    args = argparse.Namespace(epochs=epochs, rho_schedule="late", rho=0.1)
    late = sum(train_teacher.radius(args, epoch) > 0 for epoch in range(epochs))
    assert seconds == 30 * (epochs + late)


def test_the_schedule_is_that_of_the_epochs_it_became(monkeypatch):
    """A warm-up of 5 epochs in a run of 6; --minutes and --epochs that are different runs."""
    clock = Clock(monkeypatch)
    args, _ = fit(clock, training(clock, 0.25), minutes=3)
    same = asked(epochs=args.epochs, eval_every=args.eval_every)
    assert 20 < args.epochs < 40
    assert (args.warmup_epochs, args.drw_epoch) == (same.warmup_epochs, same.drw_epoch)
    kept, _ = fit(clock, training(clock, 0.25), minutes=3, warmup_epochs=5.0, eval_every=1)
    assert kept.warmup_epochs == 5 and kept.eval_every == 1
    assert kept.drw_epoch == round(40 * kept.epochs / 60)


@pytest.mark.parametrize("step, most", [(30, 3), (500, 1)])
def test_an_epoch_longer_than_the_minutes_is_one_with_a_warning(step, most, monkeypatch, capsys):
    """No epoch at all; hours of measuring; a run of ten times its minutes that says nothing."""
    clock = Clock(monkeypatch)
    args, began, steps = asked(minutes=3), clock.now, []
    run, train = Folder(clock), training(clock, step)
    monkeypatch.setattr(minutes.Probe, "after_step", counted(minutes.Probe.after_step, steps))
    minutes.fit_epochs(run, train, args, small_data(), torch.nn.Linear(1, 1), CPU)
    assert args.epochs == 1 and len(steps) <= most and clock.now - began == len(steps) * step
    text = capsys.readouterr().out
    needed = (len(steps) * step + 20 * step + 10 * step / 3 + minutes.PICTURE) / 180
    assert "1 epoch of" in text and f"{needed:.1f} times the --minutes," in text


@pytest.mark.parametrize("device, enough", [("cpu", True), ("cuda", False)])
def test_a_gpus_first_step_is_no_measure_of_it(device, enough, monkeypatch):
    """Ten seconds of loading kernels, taken for a step: one epoch in the minutes of forty."""
    clock = Clock(monkeypatch)
    probe = minutes.Probe(Runtime(torch.device(device)), 36)
    monkeypatch.setattr(probe.rt, "now", lambda: clock.now)
    probe.begin_epoch(0)
    seconds = iter([10, 0.1])
    try:
        for step in (0, 1):
            clock.now += next(seconds)
            probe.after_step(0, step, None, None)
    except minutes.TooSlow:
        assert enough
    else:
        assert not enough and probe.warm_step == pytest.approx(0.1)


def counted(function, calls):
    def count(*args):
        calls.append(args)
        return function(*args)
    return count


def test_a_known_run_is_not_measured_again(monkeypatch):
    """A resumed run that goes on with other epochs."""
    clock = Clock(monkeypatch)
    for given, measured in ((dict(epochs=7, minutes=None), False), (dict(minutes=3), True)):
        run, args = Folder(clock), asked(**given)
        run.measured, before = measured, vars(args).copy()
        minutes.fit_epochs(run, None, args, None, None, CPU)
        assert vars(args) == before


def test_what_comes_after_training_is_counted(monkeypatch):
    """A teacher's summary, which looks at all training images."""
    clock, args = Clock(monkeypatch), asked(minutes=3)

    def summary(net, data, rt):
        clock.now += 0.05 * len(data.train_labels)
    minutes.fit_epochs(Folder(clock), training(clock, 0.5), args, small_data(),
                       torch.nn.Linear(1, 1), CPU, at_end=summary)
    # 180 s, less 50 of the summary, 2.5 and about 9 to measure it and the steps, 10 s an epoch.
    assert args.epochs == 12


def test_what_was_too_slow_to_measure_is_let_go(monkeypatch):
    """A GPU that keeps a network, its optimizer and its images beside those of the run."""
    clock, networks = Clock(monkeypatch), []
    slow = training(clock, 500.0)

    def train(args, data, net, rt, run):
        net.itself = [net]              # a cycle, as a traceback and its frames are
        networks.append(weakref.ref(net))
        slow(args, data, net, rt, run)
    gc.disable()
    try:
        minutes.fit_epochs(Folder(clock), train, asked(minutes=3), small_data(),
                           torch.nn.Linear(1, 1), CPU)
    finally:
        gc.enable()
    assert len(networks) == 1 and networks[0]() is None


@pytest.mark.parametrize("device, epochs", [("cpu", 1), ("cuda", 16)])
def test_a_gpus_first_summary_is_no_measure_of_it(device, epochs, monkeypatch):
    """Ten seconds of choosing kernels for 50 images, taken for those of each 50: a teacher of one
    epoch, because there is "no time" after its summary."""
    clock, args, first = Clock(monkeypatch), asked(minutes=3), [10.0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    run = Folder(clock)
    run.rt = Runtime(torch.device(device))

    def summary(net, data, rt):
        clock.now += first.pop() if first else 0.001 * len(data.train_labels)
    minutes.fit_epochs(run, training(clock, 0.5), args, small_data(), torch.nn.Linear(1, 1), CPU,
                       at_end=summary)
    assert args.epochs == epochs


def test_random_numbers_are_those_of_a_run_without_it(monkeypatch):
    """A probe that draws from the run's random numbers: other keys and queues of PaCo."""
    clock, net = Clock(monkeypatch), torch.nn.Linear(1, 1)

    def drawing(*args):
        torch.rand(5)
        training(clock, 0.5)(*args)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    minutes.fit_epochs(Folder(clock), drawing, asked(minutes=3), small_data(), net, CPU)
    assert torch.equal(torch.rand(3), expected)


# ---- The flag ------------------------------------------------------------------------------------

@pytest.mark.parametrize("given, words", [
    (dict(minutes=3, epochs=4), "not both"), (dict(minutes=0), "--minutes must be from 0.1"),
    (dict(minutes=math.nan), "--minutes must be"), (dict(minutes=math.inf), "--minutes must be")])
def test_minutes_that_cannot_be(given, words):
    """A run without end; two answers to one question, of which one is silently dropped."""
    with pytest.raises(UserError, match=words):
        settings.check_minutes(argparse.Namespace(**dict(epochs=None) | given))


def test_scripts_count_from_their_beginning(monkeypatch):
    """Loading and the teacher's training that are not counted, or the test session that is."""
    monkeypatch.setattr(runtime.time, "monotonic", lambda: 77.0)
    runtime.run_main(lambda: None)
    assert runtime.began == 77
