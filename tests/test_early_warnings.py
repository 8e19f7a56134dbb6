"""engine/early_warnings.py: which runs are warned of, when, and that good ones are not."""
import argparse
import math

import pytest
import torch
from torch import nn

import data_lt
from engine import early_warnings
from engine.early_warnings import (EarlyWarnings, constant_answer, constant_loss, estimates)
from engine.runtime import Runtime

CPU = Runtime(torch.device("cpu"))
K = 10
COUNTS = [100 - 9 * k for k in range(K)]
NAMES = [f"class{k}" for k in range(K)]


class Answers(nn.Module):
    """A teacher that answers label % classes; an image's label is its only pixel."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.img_size = classes, 1

    def forward(self, x):
        label = (255 * x[:, 0, 0, 0]).round().long()
        return nn.functional.one_hot(label % self.classes, K).float()


def data_with(tests):
    labels = torch.arange(K).repeat_interleave(torch.tensor(tests))
    images = labels.to(torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)
    return data_lt.LongTailData("", "", images, labels, images, labels, NAMES, COUNTS, {})


def settings(**changes):
    usual = dict(epochs=20, warmup_epochs=1, drw_epoch=20, beta=0.0, lr=0.1, minutes=None,
                 recipe="cpu", loss="ce", augment="weak", batch=64)
    return argparse.Namespace(**usual | changes)


def watcher(args, tests=(10,) * K, metrics=("loss",), steps=100, resumed=False):
    return EarlyWarnings(args, data_with(tests), metrics, steps, CPU, resumed)


def watched(capsys, losses=(), classes=K, tests=(10,) * K, steps=100, results=(), **changes):
    """The warnings of a run with these losses, one a step, and evaluations {epoch: results}."""
    net, watch = Answers(classes), watcher(settings(**changes), tests, steps=steps)
    for i, loss in enumerate(losses):
        watch.after_step(i // steps, torch.tensor([loss]), torch.tensor(1.0), net)
    for epoch, result in dict(results).items():
        watch.after_epoch(epoch, net, result)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("Always answering")
    return lines


def falling(first, last, n=200):
    return [first + (last - first) * i / n for i in range(n)]


# ---- What one answer is worth --------------------------------------------------------------------

def test_what_one_answer_is_worth():
    """A share of the training images; a mean over classes that have no test image."""
    text = constant_answer(torch.tensor([30, 50, 20, 0]), ["a", "b", "c", "d"])
    assert text == ("Always answering 'b' would be right on 50.0 % of the test images (balanced "
                    "accuracy 33.3 %).")


@pytest.mark.parametrize("settings, expected", [
    (dict(loss="ce", augment="weak"), [0.5, 0.3, 0.2]), (dict(loss="la", augment="weak"),
                                                         [0.5, 0.3, 0.2]),
    (dict(loss="ce", augment="padded", mixing=1.0),
     [0.45 + 0.1 / 3, 0.27 + 0.1 / 3, 0.18 + 0.1 / 3]),
    (dict(loss="ce", augment="padded", mixing=0.5),
     [0.475 + 0.05 / 3, 0.285 + 0.05 / 3, 0.19 + 0.05 / 3]),
    (dict(method="deit-lt", mixup=0.8, cutmix=0.0, smoothing=0.3),
     [0.35 + 0.1, 0.21 + 0.1, 0.14 + 0.1]),
    (dict(method="vit", mixup=0.0, cutmix=0.0, smoothing=0.3), [0.5, 0.3, 0.2]),
    (dict(loss="ldam", augment="weak"), None), (dict(loss="paco", augment="weak"), None)])
def test_the_loss_of_one_answer(settings, expected):
    """Entropy of the labels, which mixing smooths; a margin's loss compared with an entropy."""
    loss = constant_loss(argparse.Namespace(**settings), [50, 30, 20])
    if expected is None:
        assert loss is None
    else:
        assert loss == pytest.approx(-sum(p * math.log(p) for p in expected))


# ---- Before the first step -----------------------------------------------------------------------

@pytest.mark.parametrize("changes, words", [
    (dict(steps=40, epochs=3), "120 steps of the optimizer (--epochs 3, 40 steps each) are too "
                               "few to learn much; --epochs 13 makes 500"),
    (dict(steps=1, epochs=120), "--epochs 500 makes 500"),
    (dict(steps=40, epochs=3, minutes=10.0), "4.2 times the --minutes makes 500"),
    (dict(epochs=6, warmup_epochs=6), "the warm-up, 6 epochs, does not end in 6")])
def test_a_budget_too_short_for_the_schedule(changes, words, capsys):
    """An evening's training that could not have learned anything."""
    line, = watched(capsys, **changes)
    assert words in line


# ---- The loss ------------------------------------------------------------------------------------

@pytest.mark.parametrize("losses, changes, words", [
    ([2.30] * 200, {}, "does not fall: 2.300 in the first 40 steps, 2.300 up to step 200"),
    (falling(2.3, 2.6), {}, "does not fall"),
    (falling(2.9, 2.2), {}, "no lower than the class frequencies alone give, 2.202"),
    (falling(2.9, 1.9), {}, None), ([2.3] * 40 + falling(2.3, 1.5, 160), {}, None),
    (falling(9.0, 6.0), dict(loss="ldam"), None),           # in another unit
    ([9.0] * 200, dict(loss="ldam"), "does not fall"),
    ([1.5] * 200, dict(finetune="run"), None),              # it has fallen before
    (falling(2.0, 9.0), dict(beta=0.9, drw_epoch=1), None)])       # re-weighted meanwhile
def test_a_loss_that_does_not_fall(losses, changes, words, capsys):
    """A learning rate of 0 or far too high; a network that learns how frequent classes are and
    nothing else; an alarm about a loss that is simply another one."""
    lines = watched(capsys, losses, **changes)
    if words is None:
        assert lines == []
    else:
        line, = lines
        assert line.startswith("Warning: ") and words in line and "--lr than 0.1" in line


# ---- The answers ---------------------------------------------------------------------------------

@pytest.mark.parametrize("classes, changes, words", [
    (10, {}, None), (5, {}, None), (4, {}, "epoch 2: the network predicts 4 of 10 classes"),
    (1, {}, "1 of 10 classes, 'class0' for 100 % of the test images"),
    (4, dict(beta=0.9, drw_epoch=15), None),                # re-weighting is still to come
    (1, dict(beta=0.9, drw_epoch=15), "1 of 10 classes"),
    (4, dict(beta=0.9, drw_epoch=15, distill="none"), "4 of 10 classes")])
def test_a_network_that_predicts_few_classes(classes, changes, words, capsys):
    """70 % right, all one class, and nobody is told before the end."""
    lines = watched(capsys, falling(2.3, 1.0), classes, **changes)
    assert len(lines) == (words is not None)
    assert all(words in line and "--recipe ours" in line for line in lines)


def test_one_answer_for_two_classes(capsys):
    """Half of two classes are enough."""
    line, = watched(capsys, falling(0.7, 0.3), 1, tests=(50, 50, *[0] * 8))
    assert "the network predicts 1 of 2 classes" in line


def test_undone_steps_do_not_count(capsys):
    """float16's first steps, undone until the loss scale fits, as a loss of 0 that rises."""
    net, watch = Answers(K), watcher(settings())
    for i, loss in enumerate(falling(2.9, 1.9)):
        finite = float(i >= 30)
        watch.after_step(i // 100, torch.tensor([loss if finite else math.nan]),
                         torch.tensor(finite), net)
    assert len(watch.sums) == 3 and "Warning" not in capsys.readouterr().out


def result(overall, balanced):
    return {"avg": {"overall": overall, "per_class": [float(balanced)] * K}}


def test_an_accuracy_below_that_of_one_answer(capsys):
    """An accuracy of 30 % that reads as success where one answer has 55 %; rare classes that are
    learned at the price of a frequent one, called a failure."""
    tests = (110, *[10] * 9)                                # one answer: 55 % and 10 %
    lines = watched(capsys, falling(2.3, 1.0), tests=tests, results={2: result(30, 15)})
    assert len(lines) == 1 and "30.0 % of the test images are right, fewer" in lines[0]
    assert "'class0', 55.0 %" in lines[0] and "15.0 %, is near chance" in lines[0]
    good = {2: result(30, 45), 9: result(60, 45)}
    assert watched(capsys, falling(2.3, 1.0), tests=tests, results=good) == []
    line, = watched(capsys, falling(2.3, 1.0), tests=tests, results={9: result(40, 45)})
    assert "judge by the balanced accuracy, 45.0 %" in line


def test_an_accuracy_that_is_that_of_one_answer_is_not_below_it(capsys):
    """33.333 as fewer than 33.3333."""
    tests = (4, 4, 4, *[0] * 7)
    equal = {"avg": {"overall": 33.333, "per_class": [33.333] * 3 + [math.nan] * 7}}
    assert watched(capsys, falling(2.3, 1.0), tests=tests, results={19: equal}) == []


def test_a_warning_comes_once_or_when_it_is_much_worse(capsys):
    """The same line after every evaluation."""
    watch = watcher(settings(recipe="ours"), resumed=True)
    for epoch, classes in enumerate((4, 4, 3, 1, 1)):
        watch.after_epoch(epoch, Answers(classes), result(50, 50))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line[:44] for line in lines] == ["Warning: epoch 1: the network predicts 4 of ",
                                             "Warning: epoch 4: the network predicts 1 of "]
    assert not any("recipe" in line for line in lines)


def test_good_networks_of_few_or_many_classes_are_left_alone(capsys, monkeypatch):
    """Two classes, of which one answer has 50 % balanced, "near chance" at any accuracy; a
    thousand, of which a sample of 500 images cannot show more than 500."""
    nan = float("nan")
    good = {"avg": {"overall": 85.5, "per_class": [85.0, 88.0, *[nan] * 8]}}
    assert watched(capsys, falling(2.3, 1.0), tests=(90, 10, *[0] * 8), results={2: good}) == []
    monkeypatch.setattr(early_warnings, "IMAGES", 4)
    assert watched(capsys, falling(2.3, 1.0), classes=3) == []


def test_estimates_weight_the_classes_as_the_test_set_does():
    """An overall accuracy of the balanced sample, in which every class counts alike."""
    labels, answers = torch.tensor([0, 0, 1, 1, 3]), torch.tensor([0, 0, 1, 0, 1])
    overall, balanced = estimates(labels, answers, torch.tensor([80, 10, 0, 10]))
    assert overall == pytest.approx(80 * 1 + 10 * 0.5) and balanced == pytest.approx(50)


def test_the_network_is_looked_at_in_its_evaluation_and_goes_on_training(capsys):
    """BatchNorm that a look has moved, or that stays in evaluation mode."""
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, K))
    net.img_size, modes = 1, []
    net.register_forward_hook(lambda net, *_: modes.append(net.training))
    watch = watcher(settings())
    for _ in range(300):
        watch.after_step(0, torch.ones(1), torch.ones(()), net.train())
    assert modes == [False] and net.training and net[1].num_batches_tracked == 0


def test_a_students_loss_of_labels_is_watched():
    """Its total loss, compared with the entropy of its labels."""
    watch = watcher(settings(), metrics=("loss", "loss_cls"))
    watch.after_step(0, torch.tensor([9.0, 2.0]), torch.tensor(1.0), Answers(K))
    assert watch.sum.tolist() == [2.0, 1.0]
