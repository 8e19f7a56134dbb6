"""Which numbers reach which function: both training loops, recorded and written out again.

Concepts have tests of their own. Here tiny networks train on a few 8 px images while the optimizer,
the losses and the augmentation are watched. Formulas are written out here, not imported.
"""
import argparse
import copy
import inspect
import io
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import augment
import data_lt
import losses
import train_student
import train_teacher
from engine import evaluation, networks, runtime
from engine.early_warnings import EarlyWarnings
from engine.networks import build_student, build_teacher
from engine.run_folder import Run
from engine.runtime import Runtime
from engine.training import FiniteScaler, parameter_groups
from experiments import resnet18
from sam import SAM

CPU = Runtime(torch.device("cpu"))
COUNTS = [12, 6, 3, 2]                                  # 23 images of 4 classes
N, K = sum(COUNTS), len(COUNTS)
PI = torch.tensor(COUNTS, dtype=torch.double) / N


# ---- Small things to train with ------------------------------------------------------------------

def small_data(side=8, name="cifar10"):
    """Image i has the value 8 i + 1 in its first pixel, so that a batch says who is in it."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, 3, side, side), generator=generator, dtype=torch.uint8)
    images[:, 0, 0, 0] = 8 * torch.arange(N) + 1
    labels = torch.arange(K).repeat_interleave(torch.tensor(COUNTS))
    return data_lt.LongTailData(name, name, images, labels, images[::3], labels[::3],
                                [f"class{k}" for k in range(K)], COUNTS,
                                {"head": [0], "mid": [1, 2], "tail": [3]})


def indices_of(images):
    """Which of small_data's training images these are, uint8 or in [0,1]."""
    first = images[:, 0, 0, 0]
    if images.is_floating_point():
        first = (first * 255).round()
    return (first.long() - 1) // 8


def settings_of(module, *flags, **changes):
    """A run's resolved settings of the cpu recipe, with changes that flags cannot make."""
    args = module.parse(["--dataset", "cifar10", "--recipe", "cpu", *map(str, flags)])
    teacher = getattr(args, "teacher", None)
    module.resolve(args, CPU)
    vars(args).update(teacher=teacher, compile=False, **changes)
    return args


def student_settings(*flags, **changes):
    small = dict(img_size=8, patch_size=4, batch=8, micro_batch=8, epochs=2, drw_epoch=1,
                 warmup_epochs=0, eval_every=100, crop="padded", rand_ops=0)
    return settings_of(train_student, *flags, **small | changes)


def teacher_settings(*flags, **changes):
    small = dict(img_size=8, batch=8, epochs=2, drw_epoch=1, warmup_epochs=0, eval_every=100)
    return settings_of(train_teacher, *flags, **small | changes)


class Vit(train_student.MODELS["micro"].func):
    """Two blocks, 16 wide."""

    def __init__(self, distilled=True, **more):
        super().__init__(img_size=8, patch_size=4, num_classes=K, embed_dim=16, depth=2,
                         num_heads=2, distilled=distilled, **more)


class Cnn(nn.Module):
    """What train_teacher.py needs of a network: BatchNorm, features, a classifier."""

    def __init__(self):
        super().__init__()
        self.img_size, self.body = 8, nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6))
        self.classifier = nn.Linear(6, K)

    def forward(self, x, return_features=False):
        features = self.body(x).relu().mean(dim=(2, 3))
        logits = self.classifier(features)
        return (logits, features) if return_features else logits


class GivenTeacher(nn.Module):
    """Logits that depend on the first pixel alone; keeps the images that it was given."""

    def __init__(self, img_size=8):
        super().__init__()
        self.img_size, self.images = img_size, []

    def forward(self, x):
        self.images.append(x.clone())
        return 4 * (x.mean(dim=(1, 2, 3))[:, None] * torch.tensor([30.0, 10, -20, -50])).sin()


class RecordingRun:
    """In place of a run's folder: keeps what the loop tells it."""
    start_epoch = 0

    def __init__(self):
        self.records, self.values, self.finite = [], [], []

    def start(self, args, data, parts, metrics, steps, images, passes=None):
        self.parts, self.metrics, self.images, self.passes = parts, metrics, images, passes

    def begin_epoch(self, epoch):
        pass

    def remaining_steps(self, epoch, batches):
        return enumerate(batches)

    def after_step(self, epoch, step, values, finite):
        self.values.append(dict(zip(self.metrics, values.tolist(), strict=True)))
        self.finite.append(finite.item())

    def after_epoch(self, epoch, results, **record):
        self.records.append(record | {"results": results})


def train_a_student(args, net=None, teacher=None, data=None, **replacements):
    torch.manual_seed(0)
    net, run = net or Vit(distilled=teacher is not None), RecordingRun()
    results = train_student.train(args, data or small_data(), net, teacher, CPU, run,
                                  **replacements)
    return net, run, results


def train_a_teacher(args, net=None, data=None):
    torch.manual_seed(0)
    net, run = net or Cnn(), RecordingRun()
    results = train_teacher.train(args, data or small_data(), net, CPU, run)
    return net, run, results


def as_they_are(images, args):
    """In place of the strong augmentation."""
    return images.float() / 255


def noting(seen, what):
    """As as_they_are; what(images) is added to the list `seen`."""
    def augment_images(images, args):
        seen.append(what(images))
        return as_they_are(images, args)
    return augment_images


def recorded_batches(data):
    """Lists that grow: the key and the order of each epoch, the labels of each step."""
    keys, orders, labels, batches = [], [], [], data.batches

    def recorded(steps, key):
        steps = list(steps)
        keys.append(key)
        orders.append(torch.cat([index for _, index in steps]).tolist())
        for step, images, y in batches(steps, key):
            labels.append(y)
            yield step, images, y
    data.batches = recorded
    return keys, orders, labels


@pytest.fixture
def watch(monkeypatch):
    """watch(owner, name) -> list of (arguments by name, result) of every call of owner.name."""
    def watch(owner, name):
        original, calls = getattr(owner, name), []
        signature = inspect.signature(original)

        def watched(*args, **kwargs):
            result = original(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            calls.append((dict(bound.arguments), result))
            return result
        monkeypatch.setattr(owner, name, watched)
        return calls
    return watch


@pytest.fixture
def steps_of(monkeypatch):
    """steps_of(optimizer class) -> {"groups": settings, "grads", "weights"} of each step."""
    def steps_of(optimizer):
        original, steps = optimizer.step, []

        def step(self, *args, **kwargs):
            groups = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]
            params = [p for g in self.param_groups for p in g["params"]]
            before = {"groups": groups, "grads": [p.grad.clone() for p in params],
                      "weights": [p.detach().clone() for p in params]}
            steps.append(before)
            return original(self, *args, **kwargs)
        monkeypatch.setattr(optimizer, "step", step)
        return steps
    return steps_of


def class_weights(beta=0.9999):
    """w_k = K (1 - beta) / (1 - beta^n_k), divided by their sum over k."""
    inverse = torch.tensor([(1 - beta) / (1 - beta ** n) for n in COUNTS], dtype=torch.double)
    return K * inverse / inverse.sum()


def cross_entropy(logits, target, weight=None):
    """Mean over the batch; with weights a mean weighed by those of the labels. In float64."""
    log_p = logits.double() - logits.double().exp().sum(dim=1, keepdim=True).log()
    if target.ndim == 2:
        return -(target.double() * log_p).sum(dim=1).mean()
    w = torch.ones(len(target)).double() if weight is None else weight[target]
    return -(w * log_p[torch.arange(len(target)), target]).sum() / w.sum()


# ---- The learning rate of every step -------------------------------------------------------------

def test_the_students_rate_in_every_step(steps_of):
    """A rate that moves once an epoch, a warm-up from elsewhere, a cosine that starts after it."""
    steps = steps_of(torch.optim.AdamW)
    args = student_settings("--lr", 0.008, "--method", "vit", epochs=5, warmup_epochs=2)
    train_a_student(args)
    expected = []
    for epoch in range(5):
        for t in (epoch, epoch + 1 / 3, epoch + 2 / 3):                 # 23 images: 3 steps
            if t < 2:
                expected.append(1e-6 + (0.008 - 1e-6) * t / 2)
            else:
                expected.append(1e-5 + (0.008 - 1e-5) * (1 + math.cos(math.pi * t / 5)) / 2)
    for group in (0, 1):
        assert [s["groups"][group]["lr"] for s in steps] == pytest.approx(expected, rel=1e-9)


def test_a_teachers_rate_in_every_step_of_the_step_schedule(steps_of):
    """A warm-up that starts at 0, a drop an epoch late, a drop of the drop's base."""
    steps = steps_of(torch.optim.SGD)
    args = teacher_settings("--loss", "ce", "--rho", 0, "--schedule", "step", "--decay", 0.1,
                            "--lr", 0.4, epochs=10, warmup_epochs=4)
    train_a_teacher(args)
    per_epoch = [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4, 0.04, 0.004]
    rates = [s["groups"][0]["lr"] for s in steps]
    assert rates == pytest.approx([rate for rate in per_epoch for _ in range(3)])


@pytest.mark.parametrize("warmup, rates", [
    (0.5, [0, 0.2, 0.4, 0.4, 0.4]), (1, [0.4] * 5), (1.5, [0.4 / 1.5] * 4 + [0.4])])
def test_a_teachers_warm_up_of_less_than_an_epoch(warmup, rates):
    """The full rate from the first step on, where --epochs has made the warm-up short."""
    args = teacher_settings("--loss", "ce", "--rho", 0, "--schedule", "step", "--lr", 0.4,
                            epochs=10, warmup_epochs=warmup)
    for t, rate in zip((0, 0.25, 0.5, 0.75, 1), rates, strict=True):
        assert train_teacher.learning_rate(args, t) == pytest.approx(rate)


@pytest.mark.parametrize("recipe, drops", [
    ("ldam", {0: 0.02, 4: 0.1, 159: 0.1, 160: 1e-3, 179: 1e-3, 180: 1e-5, 199: 1e-5}),
    ("paco", {0: 0.005, 9: 0.05, 10: 0.05, 319: 0.05, 320: 5e-3, 359: 5e-3, 360: 5e-4})])
def test_the_published_rates_in_their_epochs(recipe, drops):
    """Saddle-LongTail's and PaCo's schedules, by epoch from 0."""
    args = train_teacher.parse(["--recipe", "paper", "--loss", recipe])
    train_teacher.resolve(args, CPU)
    for epoch, rate in drops.items():
        for t in (epoch, epoch + 0.99):
            assert train_teacher.learning_rate(args, t) == pytest.approx(rate), t


def test_a_teachers_rate_in_every_step_of_the_cosine(steps_of):
    """A cosine once an epoch, one that ends at the student's 1e-5 or starts after the warm-up."""
    steps = steps_of(torch.optim.SGD)
    args = teacher_settings("--loss", "ce", "--schedule", "cosine", "--lr", 0.4, "--rho", 0.1,
                            epochs=4, warmup_epochs=2)
    train_a_teacher(args)
    expected = [0.2] * 3 + [0.4] * 3
    expected += [0.2 * (1 + math.cos(math.pi * t / 12)) for t in range(6, 12)]      # 3 an epoch
    assert [s["groups"][0]["lr"] for s in steps] == pytest.approx(expected, rel=1e-9)


# ---- The student's optimizer ---------------------------------------------------------------------

def test_adamw_decays_matrices_only(steps_of):
    """No decay at all, decay of norms, biases, tokens or positions, other betas."""
    steps = steps_of(torch.optim.AdamW)
    net = Vit(layer_scale=0.1)
    train_a_student(student_settings("--weight-decay", 0.07), net, GivenTeacher())
    matrices = {"patch_embed.proj.weight", "head.weight", "head_dist.weight"}
    for i in range(2):
        matrices |= {f"blocks.{i}.{name}.weight"
                     for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    state = dict(net.named_parameters())
    groups = parameter_groups(net, 0.07)
    found = [{name for name, p in state.items() if any(p is q for q in g["params"])}
             for g in groups]
    assert found == [matrices, state.keys() - matrices]
    for step in steps:
        decayed, others = step["groups"]
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.07, 0)
        assert decayed["betas"] == others["betas"] == (0.9, 0.999) and decayed["eps"] == 1e-8


def test_frozen_parameters_are_not_trained(steps_of):
    """Weight decay that shrinks what experiments.crt has frozen."""
    steps = steps_of(torch.optim.AdamW)
    net = Vit(distilled=False)
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith("head"))
    train_a_student(student_settings("--method", "vit"), net)
    assert [w.shape for w in steps[0]["weights"]] == [(K, 16), (K,)]


def test_accumulated_gradients_are_those_of_the_whole_batch(steps_of):
    """Gradients of micro-batches that are added up instead of averaged; numbers of the last one."""
    steps = steps_of(torch.optim.AdamW)
    values = []
    for micro_batch in (8, 2):
        args = student_settings("--beta", 0, drw_epoch=0, micro_batch=micro_batch, epochs=1)
        _, run, _ = train_a_student(args, teacher=GivenTeacher(), augment_images=as_they_are)
        values.append(run.values)
    whole, parts = steps[:3], steps[3:]
    assert len(parts) == 3
    for one, other in zip(whole, parts):
        torch.testing.assert_close(one["grads"], other["grads"], rtol=1e-3, atol=1e-6)
    for one, other in zip(*values):                                     # the log's numbers too
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("tokens", [2, 1])
def test_a_students_steps_written_out_again(tokens):
    """Gradients of earlier steps that are left, a step not taken, or one with other moments."""
    batches, data, teacher, net = [], small_data(), GivenTeacher(), Vit(distilled=tokens == 2)
    twin = copy.deepcopy(net)
    args = student_settings("--lr", 0.01, "--weight-decay", 0.5, drw_epoch=0, epochs=2)
    train_a_student(args, net, teacher, augment_images=noting(batches, indices_of))
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p))
               for name, p in twin.named_parameters()}
    for t, batch in enumerate(batches):
        x, y = data.train_images[batch] / 255, data.train_labels[batch]
        cls_logits, dist_logits = twin(x)
        if tokens == 1:
            dist_logits = cls_logits
        loss = 0.5 * cross_entropy(cls_logits, y)
        loss = loss + 0.5 * cross_entropy(dist_logits, teacher(x).argmax(dim=1), class_weights())
        grads = torch.autograd.grad(loss, list(twin.parameters()))
        rate = 1e-5 + (0.01 - 1e-5) * (1 + math.cos(math.pi * t / 6)) / 2
        with torch.no_grad():
            for (name, p), g in zip(twin.named_parameters(), grads):
                m, v = moments[name]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                if p.ndim > 1 and name not in ("cls_token", "dist_token", "pos_embed"):
                    p -= rate * 0.5 * p
                m_hat, v_hat = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.999 ** (t + 1))
                p -= rate * m_hat / (v_hat.sqrt() + 1e-8)
    for (name, mine), theirs in zip(twin.named_parameters(), net.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_students_bad_step_moves_nothing(bad, steps_of):
    """Weights, moments or an average of NaN; an average that moves in a step that was undone."""
    steps, calls = steps_of(torch.optim.AdamW), []

    def label_loss(logits, target):
        calls.append(1)
        loss = F.cross_entropy(logits, target)
        if len(calls) != 2:
            return loss
        if bad == "loss":
            return loss * math.nan
        return loss + (0 * logits).abs().sum().sqrt()           # finite, but not its gradient
    net = Vit(distilled=False)
    args = student_settings("--method", "vit", "--ema", 0.5, drw_epoch=0, epochs=1)
    start = net.head.weight.detach().clone()
    _, run, _ = train_a_student(args, net, label_loss=label_loss)
    i = next(i for i, w in enumerate(steps[0]["weights"]) if torch.equal(w, start))
    first, second, third = (step["weights"][i] for step in steps)
    assert torch.equal(second, third) and not torch.equal(first, second)
    expected = 0.5 * (0.5 * first + 0.5 * second) + 0.5 * net.head.weight.detach()
    torch.testing.assert_close(run.parts["ema"].model.head.weight, expected)
    assert run.parts["scaler"].skipped == 1
    assert run.finite == [1, 0, 1]


@pytest.mark.parametrize("distill, tokens", [("hard", 2), ("soft", 2), ("hard", 1)])
@pytest.mark.parametrize("adjusted", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_teachers_answer_that_is_not_finite_teaches_nothing(bad, adjusted, distill, tokens,
                                                              steps_of):
    """Class 0, the most frequent one, taught for an image of which the teacher says nothing."""
    class Teacher(GivenTeacher):
        def forward(self, x):
            logits = super().forward(x)
            if len(self.images) == 2:
                logits[3, 1] = bad                          # one image of the second step's eight
            return logits
    steps = steps_of(torch.optim.AdamW)
    args = student_settings(epochs=1, drw_epoch=0, distill=distill, logit_adjustment=adjusted)
    net, run, _ = train_a_student(args, Vit(distilled=tokens == 2), Teacher())
    first, second, third = (step["weights"] for step in steps)
    assert all(torch.equal(a, b) for a, b in zip(second, third))
    assert any(not torch.equal(a, b) for a, b in zip(first, second))
    assert run.finite == [1, 0, 1] and run.parts["scaler"].skipped == 1
    assert run.parts["teacher_prior"].isfinite().all()
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize("rho, at", [(0, 1), (0, 2), (0.1, 1), (0.1, 3), (0.1, 4)])
def test_a_teachers_bad_step_moves_nothing(bad, rho, at, steps_of, monkeypatch):
    """A queue, a key encoder or statistics of NaN, in either pass of SAM; weights left at w + e."""
    steps, calls, original = steps_of(torch.optim.SGD), [], losses.PaCoLoss.forward

    def forward(self, logits, *more):
        calls.append(1)
        loss = original(self, logits, *more)
        if len(calls) != at:
            return loss
        if bad == "loss":
            return loss * math.nan
        return loss + (0 * logits).abs().sum().sqrt()
    monkeypatch.setattr(losses.PaCoLoss, "forward", forward)
    args = teacher_settings("--loss", "paco", "--rho", rho, "--queue", 64, "--projection", 5,
                            epochs=1)
    _, run, _ = train_a_teacher(args)
    paco, bad_step = run.parts["paco"], (at - 1) // (2 if rho else 1)
    moved = [any(not torch.equal(a, b) for a, b in zip(one["weights"], other["weights"]))
             for one, other in zip(steps, steps[1:])]
    assert moved == [bad_step != 0, bad_step != 1]
    assert all(tensor.isfinite().all() for tensor in paco.state_dict().values())
    assert (paco.queue_labels >= 0).sum() == 16                 # not the bad step's 8
    assert run.finite == [step != bad_step for step in range(3)]


@pytest.mark.parametrize("micro_batch, pieces", [(8, [8]), (4, [4, 4]), (3, [3, 3, 3])])
def test_a_batch_is_cut_into_micro_batches(micro_batch, pieces):
    """--micro-batch ignored: memory; or cut when it fits: a stem's BatchNorm sees fewer images;
    parts of two sizes, for each of which a GPU tries out its kernels and graphs are compiled."""
    sizes = []
    args = student_settings("--method", "vit", micro_batch=micro_batch, epochs=1)
    train_a_student(args, augment_images=noting(sizes, len))
    assert sizes == pieces * 3


def test_the_average_has_the_recipes_decay(steps_of):
    """--ema that is not used, is used as 1 - decay, or averages before the step."""
    steps = steps_of(torch.optim.AdamW)
    net = Vit()
    start = [p.detach().clone() for p in net.parameters()]
    _, run, results = train_a_student(student_settings("--ema", 0.7), net, GivenTeacher())
    order = [p for group in parameter_groups(net, 0) for p in group["params"]]
    later = [step["weights"] for step in steps[1:]] + [[p.detach() for p in order]]
    averaged = run.parts["ema"].model
    start = {name: w for (name, _), w in zip(net.named_parameters(), start)}
    for name, mean in averaged.named_parameters():
        i = next(i for i, p in enumerate(order) if p is dict(net.named_parameters())[name])
        expected = start[name]
        for weights in later:
            expected = 0.7 * expected + 0.3 * weights[i]
        torch.testing.assert_close(mean.detach(), expected)
    assert list(results) == ["cls", "dist", "avg", "ema"]
    again = evaluation.evaluate_student(averaged, small_data(), 8, 1.0, CPU)["avg"]
    assert results["ema"] == again


def test_without_ema_there_is_none():
    """Two networks evaluated where one was asked for."""
    _, run, results = train_a_student(student_settings(ema=0.0), teacher=GivenTeacher())
    assert run.parts["ema"] is None and list(results) == ["cls", "dist", "avg"]


def test_drop_path_reaches_every_block():
    """Stochastic depth of another rate, or of the same in all blocks: 0.1 i / 11 for ViT-B."""
    args = train_student.parse(["--recipe", "paper", "--method", "vit"])
    train_student.resolve(args, CPU)
    with torch.device("meta"):
        net = build_student(vars(args), 10, False)
    assert [b.drop_prob for b in net.blocks] == pytest.approx([0.1 * i / 11 for i in range(12)])
    small = student_settings("--drop-path", 0.3, model="micro", img_size=8, patch_size=4)
    net = train_student.new_network(small, small_data(), CPU)
    assert [b.drop_prob for b in net.blocks] == pytest.approx([0.3 * i / 5 for i in range(6)])


@pytest.mark.parametrize("flags, check", [
    (("--img-size", 32), lambda net: net.img_size == 32 and net.pos_embed.shape[1] == 2 + 16),
    (("--patch-size", 4), lambda net: net.patch_embed.proj.kernel_size == (4, 4)),
    (("--stem", "conv"), lambda net: hasattr(net.patch_embed, "layers")),
    (("--stem", "fast"), lambda net: len(net.patch_embed.blocks) == 3),
    (("--tokens", 1), lambda net: not net.distilled and not hasattr(net, "dist_token")),
    (("--layer-scale", 0.5), lambda net: net.blocks[0].gamma_1.unique().tolist() == [0.5]),
    (("--layer-scale", 0), lambda net: net.blocks[0].gamma_1 is None),
    (("--model", "tiny"), lambda net: (len(net.blocks), net.cls_token.shape[2]) == (12, 192)),
    (("--checkpointing",), lambda net: net.checkpointing)])
def test_settings_reach_the_network(flags, check):
    """A flag that the network is built without."""
    args = settings_of(train_student, *flags)
    assert check(train_student.new_network(args, small_data(), CPU))


def test_the_seed_reaches_the_initial_weights():
    """Every seed the same network, or the same seed another."""
    nets = [train_student.new_network(student_settings("--seed", s), small_data(), CPU)
            for s in (0, 0, 1)]
    assert torch.equal(nets[0].head.weight, nets[1].head.weight)
    assert not torch.equal(nets[0].head.weight, nets[2].head.weight)
    args = [settings_of(train_teacher, "--seed", s) for s in (0, 0, 1)]
    nets = [train_teacher.new_network(a, small_data(), CPU) for a in args]
    assert torch.equal(nets[0].conv1.weight, nets[1].conv1.weight)
    assert not torch.equal(nets[0].conv1.weight, nets[2].conv1.weight)


# ---- The student's images ------------------------------------------------------------------------

def test_repeated_augmentation_is_what_an_epoch_shows():
    """--repeats ignored; the same third of the images in every epoch."""
    often = {3: [0] * 15 + [2] + [3] * 7, 2: [0] * 11 + [1] + [2] * 11, 1: [1] * 23}
    for repeats in often:                               # below 256 images none is cut off: 23
        args, shown = student_settings("--method", "vit", repeats=repeats), []
        train_a_student(args, augment_images=noting(shown, indices_of))
        first, second = torch.cat(shown[:3])[:N], torch.cat(shown[3:])[:N]
        for epoch in (first, second):
            assert sorted(torch.bincount(epoch, minlength=N).tolist()) == often[repeats]
        assert first.tolist() != second.tolist()
        assert repeats == 1 or set(first.tolist()) != set(second.tolist())


def test_the_seed_reaches_the_order_of_an_epoch():
    """The same batches in the same order for every seed: half of the spread between them."""
    data, orders = small_data(), []
    for repeats in (1, 3):
        for seed in (0, 1):
            args = student_settings("--seed", seed, repeats=repeats)
            orders.append(train_student.epoch_order(args, data, 0).tolist())
    _, teachers, _ = recorded_batches(data)
    for seed in (0, 1):
        train_a_teacher(teacher_settings("--seed", seed, "--rho", 0, epochs=2), data=data)
    plain, repeated = orders[:2], orders[2:]
    assert plain[0] != plain[1] and repeated[0] != repeated[1]
    assert len({tuple(order) for order in teachers}) == 4       # of two seeds, two epochs each
    assert all(sorted(order[:N]) == list(range(N)) for order in [*plain, *teachers])


def test_a_micro_batch_has_no_two_copies_of_an_image():
    """Repeated augmentation puts copies side by side: mixing and BatchNorm would see few images."""
    shown = []
    args = student_settings("--method", "vit", repeats=3, micro_batch=3, epochs=1)
    train_a_student(args, augment_images=noting(shown, indices_of))
    assert all(len(part) == len(part.unique()) for part in shown) and len(shown) == 9


def test_labels_are_smoothed_only_while_images_are_mixed(watch):
    """--mixup 0 --cutmix 0 that still smooths, which the published code does not."""
    calls = watch(losses, "cross_entropy")
    for mixup, cutmix, kind in ((0.0, 0.0, 1), (0.8, 0.0, 2), (0.0, 1.0, 2)):
        calls.clear()
        args = student_settings("--method", "vit", epochs=1, mixup=mixup, cutmix=cutmix)
        train_a_student(args)
        assert [call["target"].ndim for call, _ in calls] == [kind] * 3


def test_strong_augmentation_has_the_runs_settings(watch):
    """--erasing, --magnitude, --rand-ops, --crop or --img-size that do not arrive."""
    calls = watch(augment, "strong_augment")
    args = student_settings("--method", "vit", "--erasing", 0.5, "--magnitude", 3.0, epochs=1,
                            rand_ops=1, crop="resized")
    train_a_student(args)
    asked = {k: v for k, v in calls[0][0].items() if k != "images"}
    assert asked == dict(size=8, crop="resized", rand_ops=1, magnitude=3.0, erasing=0.5)
    assert calls[0][0]["images"].dtype is torch.uint8 and calls[0][1].shape[1:] == (3, 8, 8)


@pytest.mark.parametrize("kind", ["student", "teacher", "paco"])
def test_networks_are_in_mixed_precision_if_the_run_is(kind):
    """--amp that does not arrive: half of a GPU's speed."""
    half, modes = Runtime(torch.device("cpu"), amp=torch.bfloat16), []
    net = Vit(False) if kind == "student" else Cnn()

    def note(net, *_):
        if net.training:
            modes.append(torch.is_autocast_enabled("cpu"))
    net.register_forward_hook(note)
    if kind == "student":
        args = student_settings("--method", "vit", epochs=1)
        train_student.train(args, small_data(), net, None, half, RecordingRun())
    else:
        loss = ["--loss", "paco", "--queue", 16] if kind == "paco" else []
        train_teacher.train(teacher_settings(*loss, epochs=1), small_data(), net, half,
                            RecordingRun())
    assert modes and all(modes)


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_every_step_has_draws_of_its_own(kind, watch):
    """One augmentation for all steps, epochs or processes."""
    calls = watch(runtime, "seed_step")
    if kind == "student":
        train_a_student(student_settings("--method", "vit", "--seed", 5))
    else:
        train_a_teacher(teacher_settings("--rho", 0, "--seed", 5))
    keys = list(dict.fromkeys(call["key"] for call, _ in calls))
    assert keys == [(5, epoch, step, 0) for epoch in range(2) for step in range(3)]
    calls.clear()
    second = Runtime(torch.device("cpu"), rank=1)           # of a world of 1: nobody to wait for
    if kind == "student":
        train_student.train(student_settings("--method", "vit"), small_data(), Vit(False), None,
                            second, RecordingRun())
    else:
        train_teacher.train(teacher_settings("--rho", 0), small_data(), Cnn(), second,
                            RecordingRun())
    assert {call["key"][-1] for call, _ in calls} == {1}


# ---- One step on each side of the re-weighting epoch ---------------------------------------------

SMOOTH = 0.2
MIXING = {"mixup": 0.7, "cutmix": 0.3, "smoothing": SMOOTH}


def recorded_steps(watch, *flags, teacher=None, **changes):
    """Train two epochs, the second re-weighted; a dict of what was seen in every step."""
    mixed, scaled = watch(augment, "mixup_cutmix"), watch(FiniteScaler, "scale")
    net, outputs, images = Vit(distilled=teacher is not None and changes.get("tokens") != 1), [], []
    net.register_forward_hook(lambda net, inputs, output: outputs.append((inputs[0], *output)))
    args = student_settings(*flags, **MIXING | changes)
    _, run, _ = train_a_student(args, net, teacher,
                                augment_images=noting(images, lambda uint8: uint8))
    steps = []
    for i in range(6):                                                  # 3 in each epoch
        x, cls_logits, dist_logits = outputs[i]
        steps.append(dict(x=x, cls=cls_logits, dist=dist_logits, images=images[i],
                          labels=small_data().train_labels[indices_of(images[i])],
                          loss=scaled[i][0]["loss"], values=run.values[i]))
    for i, (call, (x, target)) in enumerate(mixed):
        steps[i] |= dict(mixing=call, mixed=x, soft=target)
    return steps, run


@pytest.mark.parametrize("flags, changes, mixes, weights", [
    ((), {}, [True, False], class_weights()),
    (("--mix-drw",), {}, [True, True], class_weights()),
    (("--mix-drw", "--beta=0"), {}, [True, True], torch.ones(K).double()),
    (("--beta", 0.9), {}, [True, False], class_weights(0.9)),
    (("--method", "deit"), {}, [True, False], torch.ones(K).double()),
    ((), dict(drw_epoch=0), [False, False], class_weights()),
    ((), dict(drw_epoch=2), [True, True], None)])
def test_hard_distillation_before_and_after_the_drw_epoch(flags, changes, mixes, weights, watch):
    """Weights that never reach DIST, or reach CLS; mixing that goes on, or ends too early; a
    teacher asked about other images; alpha's sides exchanged; labels of the unmixed images."""
    teacher = GivenTeacher()
    steps, run = recorded_steps(watch, "--alpha", 0.3, *flags, teacher=teacher, **changes)
    assert run.metrics == ("loss", "loss_cls", "loss_dist", "teacher_accuracy")
    drw_epoch = changes.get("drw_epoch", 1)
    for i, step in enumerate(steps):
        epoch = i // 3
        assert ("mixing" in step) == mixes[epoch]
        x, target = step["images"] / 255, step["labels"]
        if mixes[epoch]:
            asked = {k: v for k, v in step["mixing"].items() if k not in ("images", "labels")}
            assert asked == MIXING | dict(num_classes=K)
            assert torch.equal(step["mixing"]["images"], x)
            assert torch.equal(step["mixing"]["labels"], target)
            x, target = step["mixed"], step["soft"]
        assert torch.equal(step["x"], x) and torch.equal(teacher.images[i], x)
        y_t = teacher(x).argmax(dim=1)
        cls_loss = cross_entropy(step["cls"], target)
        dist_loss = cross_entropy(step["dist"], y_t, weights if epoch >= drw_epoch else None)
        loss = 0.7 * cls_loss + 0.3 * dist_loss
        assert step["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        assert step["values"]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert step["values"]["loss_cls"] == pytest.approx(cls_loss.item(), rel=1e-5)
        assert step["values"]["loss_dist"] == pytest.approx(dist_loss.item(), rel=1e-5)
    switched = [epoch >= drw_epoch and "--beta=0" not in flags for epoch in range(2)]
    assert [r["drw"] for r in run.records] == switched      # False where nothing has changed


def test_soft_distillation_is_tempered(watch):
    """Hard labels; KL the wrong way round; no tau^2; a mean over images and classes."""
    teacher = GivenTeacher()
    steps, _ = recorded_steps(watch, "--distill", "soft", "--tau", 2, "--alpha", 0.9, "--beta", 0,
                              teacher=teacher)
    for step in steps:
        p = (teacher(step["x"]).double() / 2).softmax(dim=1)
        q = (step["dist"].double() / 2).softmax(dim=1)
        dist_loss = 4 * (p * (p / q).log()).sum() / len(p)
        target = step.get("soft", step["labels"])
        loss = 0.1 * cross_entropy(step["cls"], target) + 0.9 * dist_loss
        assert step["loss"].item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("distill, tau", [("hard", 1), ("soft", 1), ("soft", 3)])
def test_logit_adjustment_knows_the_labels_of_each_head(distill, tau, watch):
    """A prior with the wrong sign, of the other head, of the hard labels, or a stale one.

    pi_t is a running mean of what the teacher has said, rate 0.01 a step, from 1 / K.
    """
    teacher = GivenTeacher()
    flags = ("--distill", distill, "--logit-adjustment", "--beta", 0, "--alpha", 0.9)
    steps, run = recorded_steps(watch, *flags, teacher=teacher, tau=float(tau))
    pi_t = torch.full((K,), 1 / K).double()
    for step in steps:
        logits = teacher(step["x"]).double()
        p = (logits / tau).softmax(dim=1)
        if distill == "hard":
            p = F.one_hot(logits.argmax(dim=1), K).double()
        pi_t = 0.99 * pi_t + 0.01 * p.mean(dim=0)
        q = ((step["dist"].double() + tau * pi_t.log()) / tau).softmax(dim=1)
        if distill == "hard":
            dist_loss = -(p * q.log()).sum(dim=1).mean()
        else:
            dist_loss = tau ** 2 * (p * (p / q).log()).sum() / len(p)
        cls_loss = cross_entropy(step["cls"].double() + PI.log(), step.get("soft", step["labels"]))
        loss = 0.1 * cls_loss + 0.9 * dist_loss
        assert step["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(run.parts["teacher_prior"].double(), pi_t, rtol=1e-5, atol=0)


def test_micro_batches_move_the_teachers_prior_as_far_as_their_batch():
    """A rate per micro-batch: eight times as fast at --micro-batch 1."""
    priors = []
    for micro_batch in (8, 2):
        args = student_settings("--logit-adjustment", "--beta", 0, "--distill", "soft",
                                "--alpha", 0.9, epochs=1, drw_epoch=0, micro_batch=micro_batch)
        _, run, _ = train_a_student(args, teacher=GivenTeacher(), augment_images=as_they_are)
        priors.append(run.parts["teacher_prior"])
    torch.testing.assert_close(*priors, rtol=1e-3, atol=0)


def test_classes_among_thousands_are_adjusted_by_their_own_frequency():
    """A floor under the teacher's prior, against ln 0, above what a class of many has."""
    prior = torch.full((8142,), 1 / 8142)
    train_student.update_prior(prior, torch.zeros(4).long(), 1.0, 1, CPU)
    log_prior = train_student.log_prior_of(prior)
    assert log_prior[1:].exp().tolist() == pytest.approx([0.99 / 8142] * 8141, rel=1e-4)


@pytest.mark.parametrize("adjusted", [False, True])
def test_one_token_learns_from_labels_and_teacher(adjusted, watch):
    """A DIST head that is missing, CLS's logits without their gradient in the second term, or with
    the labels' prior in both."""
    teacher, pi_t = GivenTeacher(), torch.full((K,), 1 / K).double()
    flags = ("--logit-adjustment", "--beta", 0) if adjusted else ()
    steps, _ = recorded_steps(watch, "--alpha", 0.3, *flags, teacher=teacher, tokens=1)
    for i, step in enumerate(steps):
        weights = class_weights() if i >= 3 and not adjusted else None
        y_t = teacher(step["x"]).argmax(dim=1)
        pi_t = 0.99 * pi_t + 0.01 * F.one_hot(y_t, K).double().mean(dim=0)
        priors = (PI.log(), pi_t.log()) if adjusted else (0, 0)
        cls_logits, dist_logits = (step["cls"].double() + prior for prior in priors)
        loss = 0.7 * cross_entropy(cls_logits, step.get("soft", step["labels"]))
        loss = loss + 0.3 * cross_entropy(dist_logits, y_t, weights)
        assert step["dist"] is None and step["loss"].item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("adjusted", [False, True])
def test_a_student_without_a_teacher_learns_from_labels(adjusted, watch):
    """Half the loss, class weights in it, or mixing after the re-weighting epoch."""
    flags = ("--method", "vit", *(["--logit-adjustment"] if adjusted else []))
    steps, run = recorded_steps(watch, *flags)
    for i, step in enumerate(steps):
        assert ("soft" in step) == (i < 3)
        logits = step["cls"].double() + (PI.log() if adjusted else 0)
        loss = cross_entropy(logits, step.get("soft", step["labels"]))
        assert step["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert run.metrics == ("loss",)


def test_another_loss_and_order_replace_the_recipes():
    """experiments.deit3 and experiments.crt: functions that are taken and not called."""
    calls = []

    def label_loss(logits, target):
        calls.append(target)
        return logits.sum() * 0

    def order_of(args, data, epoch):
        return torch.tensor([epoch + 1, 0, 5, 5])
    shown = []
    _, run, _ = train_a_student(student_settings("--method", "vit"), label_loss=label_loss,
                                order_of=order_of, augment_images=noting(shown, indices_of))
    assert torch.stack(shown).tolist() == [[1, 0, 5, 5], [2, 0, 5, 5]] and len(calls) == 2
    assert run.images == 4                              # not the 23 that there are


def test_the_logs_numbers_are_as_they_have_been():
    """teacher_accuracy in percent, by which figures and older logs go."""
    class AlwaysRight(GivenTeacher):
        def forward(self, x):
            return 9 * F.one_hot(small_data().train_labels[indices_of(x)], K).float()
    args = student_settings(drw_epoch=0)
    _, run, _ = train_a_student(args, teacher=AlwaysRight(), augment_images=as_they_are)
    assert [v["teacher_accuracy"] for v in run.values] == [100] * 6
    assert [r["lr"] > 0 for r in run.records] == [True, True]


def test_the_teachers_accuracy_counts_the_larger_part_of_a_mixed_image():
    """Row numbers against classes, a fraction for percent."""
    y_t = torch.tensor([2, 0, 1])
    mixed = torch.tensor([[0.1, 0.3, 0.6], [0.4, 0.6, 0], [0.2, 0.5, 0.3]])
    g = F.one_hot(y_t, 3).float()
    assert train_student.teacher_accuracy(g, y_t).item() == 100
    assert train_student.teacher_accuracy(g, mixed).item() == pytest.approx(200 / 3)


# ---- The student's teacher -----------------------------------------------------------------------

def test_the_teacher_sees_the_students_images_resized(watch):
    """The clean images; others than the student's; a smoothed resize."""
    teacher = GivenTeacher(img_size=4)
    steps, _ = recorded_steps(watch, teacher=teacher)
    for step, seen in zip(steps, teacher.images):
        expected = F.interpolate(step["x"], size=4, mode="bicubic", antialias=False).clamp(0, 1)
        assert torch.equal(seen, expected)


def test_the_weak_view_is_the_same_image_only_shifted_and_mirrored(watch):
    """Another image, the strongly augmented one, or one that is not shifted."""
    teacher = GivenTeacher()
    steps, _ = recorded_steps(watch, "--teacher-view", "weak", "--mixup", 0, "--cutmix", 0,
                              teacher=teacher, mixup=0.0, cutmix=0.0)
    for step, seen in zip(steps, teacher.images):
        for image, view in zip(step["images"] / 255, seen):
            padded = F.pad(image, (1, 1, 1, 1))                         # an eighth of 8 px
            shifted = [padded[:, i:i + 8, j:j + 8] for i in range(3) for j in range(3)]
            assert any(torch.equal(view, s) or torch.equal(view, s.flip(2)) for s in shifted)
    for i, (step, seen) in enumerate(zip(steps, teacher.images.copy())):
        y_t, weights = teacher(seen).argmax(dim=1), class_weights() if i >= 3 else None
        loss = 0.5 * cross_entropy(step["cls"], step["labels"])
        loss = loss + 0.5 * cross_entropy(step["dist"], y_t, weights)
        assert step["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    moved = [not torch.equal(seen, step["x"]) for step, seen in zip(steps, teacher.images)]
    assert any(moved)


def test_training_a_student_leaves_its_teacher_alone(tmp_path):
    """A teacher in training mode, whose BatchNorm moves and sees the batch; one that is trained."""
    data = small_data()
    config = dict(arch="resnet32", loss="ldam", img_size=8, norm="cifar")
    torch.manual_seed(0)
    net = build_teacher(config, K)
    torch.save({"model": net.state_dict(), "config": config, "class_names": data.class_names,
                "counts": COUNTS}, tmp_path / "teacher.pt")
    teacher, _ = networks.load_teacher(str(tmp_path / "teacher.pt"), data, CPU)
    before = copy.deepcopy(teacher.state_dict())
    train_a_student(student_settings("--teacher-size", 8), teacher=teacher)
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("flags, expected", [
    (("--teacher", "a.pth", "--teacher-norm", "imagenet", "--teacher-size", 48),
     ("a.pth", "imagenet", 48)),
    (("--teacher", "a.pth"), ("a.pth", None, None))])
def test_teacher_flags_reach_the_file(flags, expected, monkeypatch, tmp_path):
    """--teacher-norm or --teacher-size that are taken and forgotten."""
    class Asked(Exception):
        pass

    def load_teacher(path, data, rt, norm, size):
        raise Asked(path, norm, size)
    monkeypatch.setattr(train_student, "load_teacher", load_teacher)
    monkeypatch.setattr(train_student, "load_data", lambda args, rt: small_data(32))
    args = train_student.parse(["--recipe", "cpu", "--out", str(tmp_path / "run"),
                                *map(str, flags)])
    with pytest.raises(Asked) as asked:
        train_student.run_student(args, CPU)
    assert asked.value.args == expected


# ---- Evaluation ----------------------------------------------------------------------------------

def test_a_student_is_evaluated_with_its_crop_in_its_epochs(watch):
    """--eval-crop or --eval-every ignored; an average that is evaluated on other images."""
    calls = watch(evaluation, "evaluate_student")
    args = student_settings("--ema", 0.5, epochs=5, eval_every=2, eval_crop=0.5)
    net, run, _ = train_a_student(args, teacher=GivenTeacher())
    assert [r["results"] is not None for r in run.records] == [False, True, False, True, True]
    assert [(c["img_size"], c["eval_crop"]) for c, _ in calls] == [(8, 0.5)] * 3
    assert all(c["net"] is net and c["averaged"] is run.parts["ema"].model for c, _ in calls)
    assert run.records[-1]["cosine"] is not None


def test_a_teacher_is_evaluated_in_its_epochs():
    """--eval-every ignored: a table of the last epoch only, or a test set in every epoch."""
    args = teacher_settings("--rho", 0, epochs=5, eval_every=2)
    _, run, results = train_a_teacher(args)
    assert [r["results"] is not None for r in run.records] == [False, True, False, True, True]
    assert results == run.records[-1]["results"]


def test_training_goes_on_in_training_mode_after_an_evaluation():
    """Drop path and BatchNorm that stay in evaluation mode from the first evaluation on."""
    for train, args, net in (
            (train_a_student, student_settings("--method", "vit", epochs=3, eval_every=1),
             Vit(distilled=False)),
            (train_a_teacher, teacher_settings("--rho", 0, epochs=3, eval_every=1), Cnn())):
        modes = []
        net.register_forward_hook(lambda net, *_: modes.append(net.training))
        train(args, net)
        assert sum(modes) == 9                          # 3 epochs of 3 steps


# ---- A teacher's step ----------------------------------------------------------------------------

def ldam(logits, y, weight, m_max=0.5, scale=30):
    margins = torch.tensor([n ** -0.25 for n in COUNTS], dtype=torch.double)
    margins = m_max * margins / margins.max()
    z = logits.double() - scale * margins[y][:, None] * F.one_hot(y, K)
    return cross_entropy(z, y, weight)


def focal(logits, y, weight):
    w = torch.ones(len(y)).double() if weight is None else weight[y]
    loss = w * F.cross_entropy(logits.double(), y, reduction="none")
    return ((1 - (-loss).exp()) * loss).mean()


def vector_scaling(logits, y, weight):
    delta = torch.tensor([(COUNTS[0] / n) ** 0.3 for n in COUNTS], dtype=torch.double)
    return cross_entropy(logits.double() / delta + PI.log(), y, weight)


def adjusted(logits, y, weight):
    return cross_entropy(logits.double() + PI.log(), y, weight)


@pytest.mark.parametrize("name, by_hand, beta", [
    ("ldam", ldam, 0.9999), ("ldam", ldam, 0.8), ("ce", cross_entropy, 0.9999),
    ("focal", focal, 0.9999), ("vs", vector_scaling, 0.9999), ("la", adjusted, 0.9999),
    ("la", adjusted, 0)])
def test_a_teachers_loss_before_and_after_the_drw_epoch(name, by_hand, beta, watch):
    """Class weights that never reach the loss, or from another epoch on; another loss."""
    scaled, outputs = watch(FiniteScaler, "scale"), []
    net = Cnn()
    net.register_forward_hook(lambda net, inputs, output: outputs.append((inputs[0], output)))
    flags = ("--loss", name, "--rho", 0, "--beta", beta)
    data = small_data()
    _, _, seen = recorded_batches(data)
    _, run, _ = train_a_teacher(teacher_settings(*flags), net, data)
    assert len(scaled) == 6
    for i, (call, _) in enumerate(scaled):
        weight = class_weights(beta) if beta > 0 and i >= 3 else None
        loss = by_hand(outputs[i][1], seen[i], weight).item()
        assert call["loss"].item() == pytest.approx(loss, rel=1e-5)
        assert run.values[i] == {"loss": pytest.approx(loss, rel=1e-5)}
    assert [r["drw"] for r in run.records] == [False, beta > 0]


def test_ldams_margin_is_the_settings():
    """--max-margin that does not arrive: 0.5 on ImageNet-LT, too."""
    args = teacher_settings("--max-margin", 0.2)
    criterion = train_teacher.make_criterion(args, COUNTS, CPU.device)
    logits, y = torch.randn(6, K), torch.tensor([0, 1, 2, 3, 3, 0])
    expected = ldam(logits, y, None, m_max=0.2).item()
    assert criterion(logits, y).item() == pytest.approx(expected, rel=1e-5)


def test_the_cosine_classifier_starts_with_unit_columns():
    """Longer class vectors turn more slowly: another training with the same rate."""
    net = build_teacher(dict(arch="resnet32", loss="ldam", img_size=32, norm="cifar"), 10)
    torch.testing.assert_close(net.classifier.weight.norm(dim=0), torch.ones(10))
    with torch.device("meta"):
        for arch in ("resnet32", "resnet50"):
            config = dict(arch=arch, img_size=64, norm="cifar")
            cosine = build_teacher(config | dict(loss="ldam"), 10)
            assert type(cosine.classifier) is type(net.classifier)
            assert cosine.classifier.scale == 30 and cosine.img_size == 64
            for loss in ("ce", "paco", "la"):
                plain = build_teacher(config | dict(loss=loss), 10)
                assert isinstance(plain.classifier, nn.Linear)


def test_sgd_has_momentum_and_the_runs_weight_decay(steps_of):
    """Plain SGD, Nesterov's, or a decay that does not arrive."""
    steps = steps_of(torch.optim.SGD)
    train_a_teacher(teacher_settings("--weight-decay", 0.003, "--rho", 0))
    for step in steps:
        group, = step["groups"]
        assert (group["momentum"], group["weight_decay"]) == (0.9, 0.003)
        assert not group["nesterov"] and group["dampening"] == 0


@pytest.mark.parametrize("schedule, radii", [
    ("constant", [0.3] * 6), ("late", [0, 0, 0, 0, 0.3, 0.3]),
    ("step", [0.03, 0.06, 0.06, 0.06, 0.3, 0.3])])
def test_sams_radius_in_every_epoch(schedule, radii, watch, monkeypatch):
    """A radius that is not taken, or climbs where it should be 0; the time that is left."""
    climbs, scaled, climb = [], watch(FiniteScaler, "scale"), SAM.first_step

    def first_step(sam):
        before = [p.detach().clone() for p in sam.param_groups[0]["params"]]
        norm = climb(sam)
        moved = [p - b for p, b in zip(sam.param_groups[0]["params"], before)]
        climbs.append(torch.stack([m.norm() for m in moved]).norm().item())
        return norm
    monkeypatch.setattr(SAM, "first_step", first_step)
    args = teacher_settings("--rho", 0.3, "--rho-schedule", schedule, epochs=6, drw_epoch=4)
    _, run, _ = train_a_teacher(args)
    expected = [radius for radius in radii for _ in range(3) if radius > 0]
    assert climbs == pytest.approx(expected, rel=1e-4)
    assert run.passes == [2 if radius else 1 for radius in radii]
    assert len(scaled) == 18 + len(climbs)                              # two losses under SAM


def test_the_published_radii_of_the_large_sets():
    """0.05, 0.1, 0.5 from epochs 0, 5 and 60 of 90."""
    args = train_teacher.parse(["--recipe", "paper", "--dataset", "imagenet_lt"])
    train_teacher.resolve(args, CPU)
    found = {epoch: train_teacher.radius(args, epoch) for epoch in (0, 4, 5, 59, 60, 89)}
    assert found == pytest.approx({0: 0.05, 4: 0.05, 5: 0.1, 59: 0.1, 60: 0.5, 89: 0.5})


def test_a_sam_step_written_out_again(watch, steps_of):
    """A step by the gradient at w, from w + e, with BatchNorm moved twice or other dropout."""
    class Noisy(Cnn):
        def forward(self, x, return_features=False):
            self.noise.append(torch.rand(1).item())
            return super().forward(x, return_features)
    steps, net = steps_of(torch.optim.SGD), Noisy()
    net.noise, inputs = [], []
    twin = Cnn()
    twin.load_state_dict(net.state_dict())
    net.register_forward_pre_hook(lambda net, args: inputs.append((args[0], net.training)))
    data = small_data()
    _, _, labels = recorded_batches(data)
    args = teacher_settings("--loss", "ldam", "--rho", 0.2, "--lr", 0.1, epochs=1, drw_epoch=0)
    train_a_teacher(args, net, data)
    views = [x for x, training in inputs if training]
    assert len(views) == 6 and len(steps) == 3
    params = list(twin.parameters())
    momentum = [torch.zeros_like(p) for p in params]
    for i in range(3):
        assert torch.equal(views[2 * i], views[2 * i + 1])
        assert net.noise[2 * i] == net.noise[2 * i + 1]
        x, y = views[2 * i], labels[i]
        w = [p.detach().clone() for p in params]
        grads = torch.autograd.grad(ldam(twin(x), y, class_weights()), params)
        statistics = twin.body[1].running_mean.clone()
        norm = sum(g.square().sum() for g in grads).sqrt()
        with torch.no_grad():
            for p, g in zip(params, grads):
                p += 0.2 * g / norm
        grads = torch.autograd.grad(ldam(twin(x), y, class_weights()), params)
        twin.body[1].running_mean.copy_(statistics)                     # moved once a step
        with torch.no_grad():
            for p, g, before, m, found in zip(params, grads, w, momentum, steps[i]["grads"]):
                torch.testing.assert_close(found, g, rtol=1e-3, atol=1e-5)
                m.mul_(0.9).add_(g + args.weight_decay * before)
                rate = 0.1 * (1 + math.cos(math.pi * i / 3)) / 2        # cosine, 3 steps
                p.copy_(before - rate * m)
    for mine, theirs in zip(params, net.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(twin.body[1].running_mean, net.body[1].running_mean)


def test_a_strong_teacher_learns_from_mixed_images(watch):
    """Hard labels, weak images or class weights in DeiT's teacher; another crop than its own."""
    mixed, criteria = watch(augment, "mixup_cutmix"), watch(losses, "cross_entropy")
    strong, net, shown = watch(augment, "strong_augment"), Cnn(), []
    net.register_forward_pre_hook(lambda net, inputs: shown.append(inputs[0]))
    train_a_teacher(teacher_settings("--augment", "resized", drw_epoch=0), net)
    assert len(mixed) == len(criteria) == len(strong) == 6
    for (call, (both, target)), (criterion, _), (made, x), seen in zip(mixed, criteria, strong,
                                                                       shown):
        assert torch.equal(seen, both)
        assert torch.equal(criterion["target"], target) and target.shape[1] == K
        assert criterion["weight"] is None and torch.equal(call["images"], x)
        assert (made["size"], made["crop"], made["rand_ops"]) == (8, "resized", 2)
        assert (made["magnitude"], made["erasing"]) == (9, 0.25)
        assert (call["mixup"], call["cutmix"], call["smoothing"]) == (0.8, 1.0, 0.1)
    assert any(not torch.equal(seen, x) for seen, (_, x) in zip(shown, strong))


@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("view", ["weak", "padded"])
def test_a_share_of_a_teachers_batches_is_mixed(share, view, watch):
    """Weak images that are never mixed, or always; the same draw for mixing in every step."""
    mixed, criteria = watch(augment, "mixup_cutmix"), watch(losses.VSLoss, "forward")
    train_a_teacher(teacher_settings("--loss", "la", "--rho", 0, "--beta", 0, "--mixing", share,
                                     "--augment", view, epochs=20))
    expected = {0: (0, 0), 0.5: (18, 42), 1: (60, 60)}[share]            # of 60 steps
    assert len(criteria) == 60 and expected[0] <= len(mixed) <= expected[1]
    assert sum(call["target"].ndim == 2 for call, _ in criteria) == len(mixed)
    assert all(call["smoothing"] == 0 for call, _ in mixed)


@pytest.mark.parametrize("dataset, loss, made_by", [
    ("cifar10", "ldam", "random_crop_flip"), ("cifar10", "paco", "paco_query_view"),
    ("inat18", "ldam", "color_jitter")])
def test_weak_images_are_those_of_the_published_teacher(dataset, loss, made_by, watch):
    """PaCo's view for LDAM, a crop of what the loader has cropped; another size."""
    owner = train_teacher if made_by == "color_jitter" else augment
    made = {name: watch(owner if name == made_by else augment, name)
            for name in ("random_crop_flip", "paco_query_view", made_by)}
    args = argparse.Namespace(augment="weak", dataset=dataset, loss=loss, img_size=16)
    x = train_teacher.view(small_data(16 if dataset == "inat18" else 8).train_images, args)
    assert x.shape == (N, 3, 16, 16) and 0 <= x.min() and x.max() <= 1
    assert len(made[made_by]) == 1
    assert bool(made["paco_query_view"]) == (loss == "paco")
    if made_by == "color_jitter":
        assert list(made[made_by][0][0].values())[1:4] == [0.4, 0.4, 0.4]
        assert not made["random_crop_flip"] and not made["paco_query_view"]


def test_ldams_images_are_shifted_by_up_to_4_px_and_mirrored():
    """No shift, or no flip: a teacher that memorises."""
    args = argparse.Namespace(augment="weak", dataset="cifar10", loss="ldam", img_size=8)
    torch.manual_seed(0)
    views = train_teacher.view(small_data().train_images[:1].expand(4000, -1, -1, -1), args)
    assert len({view.numpy().tobytes() for view in views}) == 9 * 9 * 2


def test_a_fast_teachers_stem_is_computed_from_the_images():
    """A stem that stays as it was drawn, or is computed from the most frequent class alone."""
    args = settings_of(train_teacher, "--recipe", "ours", "--img-size", 128)   # of 125 images
    data = small_data(32)
    data.train_labels = torch.arange(K).repeat_interleave(torch.tensor([200, 6, 3, 2]))
    data.train_images = torch.zeros(211, 3, 32, 32, dtype=torch.uint8)
    data.train_images[200:] = small_data(32).train_images[:11]      # only rare classes have pixels
    weight = train_teacher.new_network(args, data, CPU).stem.weight
    assert torch.equal(weight[12:], -weight[:12])
    blank = 5e-4 ** -0.5                # the largest weights of images without any variation
    assert weight[:12].flatten(1).norm(dim=1).max() < 0.9 * blank


# ---- PaCo ----------------------------------------------------------------------------------------

def paco_steps(watch, monkeypatch, *flags):
    """Two epochs of PaCo whose query view is all 51 and whose key view is all 102 but pixel 0."""
    def marked(images, value):
        view = torch.full_like(images, value)
        view[:, 0, 0, 0] = images[:, 0, 0, 0]
        return view
    monkeypatch.setattr(augment, "paco_query_view", lambda images: marked(images, 51))
    monkeypatch.setattr(augment, "simclr_view", lambda images, size: marked(images, 102))
    calls = {name: watch(losses.PaCo, name) for name in ("forward", "keys", "bank", "enqueue")}
    calls["loss"] = watch(losses.PaCoLoss, "forward")
    args = teacher_settings("--loss", "paco", "--queue", 16, "--projection", 5, *flags, epochs=2)
    net, run, _ = train_a_teacher(args)
    return calls, run, args


@pytest.mark.parametrize("rho", [0, 0.1])
def test_pacos_anchors_and_keys_come_from_their_own_views(rho, watch, monkeypatch):
    """Keys of the query's view; keys that move, or are enqueued, twice under SAM; wrong labels."""
    calls, _, _ = paco_steps(watch, monkeypatch, "--rho", rho)
    passes = 2 if rho else 1
    assert len(calls["keys"]) == len(calls["enqueue"]) == 6
    assert len(calls["forward"]) == len(calls["loss"]) == 6 * passes
    labels = small_data().train_labels
    for i, (call, keys) in enumerate(calls["keys"]):
        y = labels[indices_of(call["images"])]
        assert (call["images"][:, 1] * 255).round().unique().tolist() == [102]
        assert torch.equal(calls["enqueue"][i][0]["keys"], keys)
        assert torch.equal(calls["enqueue"][i][0]["labels"], y)
        for j in range(passes * i, passes * (i + 1)):
            query, (logits, v) = calls["forward"][j]
            assert (query["images"][:, 1] * 255).round().unique().tolist() == [51]
            assert torch.equal(labels[indices_of(query["images"])], y)
            bank, loss = calls["bank"][j][0], calls["loss"][j][0]
            assert bank["keys"] is keys and bank["v"] is v and torch.equal(bank["labels"], y)
            assert loss["v"] is v and loss["logits"] is logits
            assert torch.equal(loss["target"], y)
            assert torch.equal(loss["bank"][len(v):2 * len(v)], keys)


def test_pacos_queue_takes_the_keys_and_labels_of_all_processes(watch, monkeypatch):
    """Keys of one process beside the labels of all."""
    monkeypatch.setattr(runtime, "gather", lambda tensor, rt: torch.cat([tensor, tensor]))
    calls, _, _ = paco_steps(watch, monkeypatch, "--rho", 0)
    for (enqueued, _), (_, keys) in zip(calls["enqueue"], calls["keys"], strict=True):
        assert torch.equal(enqueued["keys"], torch.cat([keys, keys]))
        assert len(enqueued["labels"]) == 2 * len(keys)


def test_pacos_settings_arrive(watch, monkeypatch):
    """--alpha, --temperature, --queue, --projection or --key-momentum that are not used."""
    calls, run, _ = paco_steps(watch, monkeypatch, "--alpha", 0.03, "--temperature", 0.2,
                               "--key-momentum", 0.5)
    paco, criterion = run.parts["paco"], calls["loss"][0][0]["self"]
    assert paco.queue.shape == (16, 5) and paco.momentum == 0.5
    assert (criterion.alpha, criterion.temperature) == (0.03, 0.2)
    assert (criterion.beta, criterion.gamma) == (1, 1)
    torch.testing.assert_close(criterion.log_prior.double(), PI.log(), rtol=1e-5, atol=0)
    assert [r["drw"] for r in run.records] == [False, False]            # never re-weighted


def test_pacos_classifier_starts_as_published(steps_of):
    """The network's own initial values, Kaiming-normal: three times as large."""
    steps, net = steps_of(torch.optim.SGD), Cnn()
    nn.init.constant_(net.classifier.weight, 7)
    args = teacher_settings("--loss", "paco", "--queue", 16, "--projection", 5, epochs=1)
    train_a_teacher(args, net)
    names = [name for name, _ in net.named_parameters()]
    weight = steps[0]["weights"][names.index("classifier.weight")]
    assert weight.abs().max() <= 6 ** -0.5 and weight.std() > 0.1


def test_pacos_projection_is_trained_and_its_key_encoder_is_not(steps_of):
    """An optimizer of the network alone, or one that steps the keys' encoder as well."""
    steps = steps_of(torch.optim.SGD)
    args = teacher_settings("--loss", "paco", "--queue", 16, "--projection", 5, epochs=1)
    _, run, _ = train_a_teacher(args)
    paco = run.parts["paco"]
    trained = [*paco.net.parameters(), *paco.projection.parameters()]
    assert len(steps[0]["weights"]) == len(trained)
    assert any(not torch.equal(a, b) for a, b in zip(steps[0]["weights"], steps[1]["weights"]))


# ---- Runs that go on -----------------------------------------------------------------------------

@pytest.fixture
def signals():
    """Run.start replaces signal handlers: put them back."""
    import signal
    before = {number: signal.getsignal(number) for number in runtime.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_bad_step_after_a_resume_goes_back_to_the_checkpoint(tmp_path, signals, monkeypatch):
    """A copy that the scaler takes before all of the checkpoint is restored: the teacher's prior
    would be 1 / K again after the first step that is not finite."""
    flags = ("--logit-adjustment", "--beta", 0, "--distill", "soft", "--save-every", 1)
    args = student_settings(*flags, epochs=1, alpha=0.9)
    data, teacher = small_data(), GivenTeacher()

    class Killed(Exception):
        pass
    seed_step = runtime.seed_step

    def dying(seed, epoch, step, rank):
        if step == 2:
            raise Killed
        seed_step(seed, epoch, step, rank)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runtime, "seed_step", dying)
        run = Run(str(tmp_path / "run"), args, CPU)
        train_student.train(args, data, Vit(), teacher, CPU, run)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["step"] == 2 and saved["teacher_prior"].std() > 0
    args.resume = True
    run = Run(str(tmp_path / "run"), args, CPU)
    monkeypatch.setattr(FiniteScaler, "scale", spoiled(FiniteScaler.scale))
    train_student.train(args, data, Vit(), teacher, CPU, run)
    after = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert int(after["scaler"]["skipped"]) == 1
    assert torch.equal(after["teacher_prior"], saved["teacher_prior"])
    for name, tensor in after["model"].items():
        assert torch.equal(tensor, saved["model"][name]), name


def test_an_epochs_line_is_in_the_output_file_at_once(tmp_path, signals, monkeypatch):
    """A batch system's file that says nothing of the first eighty epochs, or loses them."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    written = []
    monkeypatch.setattr(EarlyWarnings, "after_epoch",
                        lambda *_: written.append(sys.stdout.buffer.getvalue()))
    args = student_settings("--method", "vit", epochs=1)
    run = Run(str(tmp_path / "run"), args, CPU)
    train_student.train(args, small_data(), Vit(False), None, CPU, run)
    assert b"epoch    1  loss" in written[0]


def spoiled(scale):
    def scale_nan(self, loss):
        return scale(self, loss * math.nan)
    return scale_nan


# ---- Several micro-batches, epochs and processes -------------------------------------------------

def test_a_steps_micro_batches_have_draws_of_their_own():
    """The same crops, operations and boxes in each of the eight micro-batches of a step."""
    draws = []
    args = student_settings("--method", "vit", micro_batch=2, epochs=1)
    train_a_student(args, augment_images=noting(draws, lambda images: torch.rand(1).item()))
    assert len(draws) > 6 and len(set(draws)) == len(draws)


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_crops_of_the_loader_are_drawn_anew_in_every_epoch_and_process(kind):
    """The same random crops of ImageNet-LT's images in every epoch, or in every process."""
    data = small_data()
    keys, _, _ = recorded_batches(data)
    second = Runtime(torch.device("cpu"), rank=1)
    if kind == "student":
        args = student_settings("--method", "vit", "--seed", 5)
        train_student.train(args, data, Vit(False), None, second, RecordingRun())
    else:
        args = teacher_settings("--rho", 0, "--seed", 5)
        train_teacher.train(args, data, Cnn(), second, RecordingRun())
    assert keys == [(5, 0, 1), (5, 1, 1)]


def test_a_class_that_the_teacher_never_names_has_a_finite_prior():
    """ln 0, which takes the class out of DIST's softmax for good."""
    found = train_student.log_prior_of(torch.tensor([1.0, 0, 0, 0]))
    assert found.tolist() == pytest.approx([0] + [math.log(1e-3 / 4)] * 3)


def test_weak_views_are_shifted_by_up_to_an_eighth_and_mirrored():
    """Views that are shifted only, mirrored only, or further than teachers see them."""
    torch.manual_seed(0)
    views = train_student.weak_augment(small_data().train_images[:1].expand(500, -1, -1, -1))
    assert len({view.numpy().tobytes() for view in views}) == 3 * 3 * 2     # of 8 px: by 1 at most


def test_pacos_keys_are_of_the_runs_image_size(watch):
    """Keys of the images' own size, which a CNN takes without a word."""
    views = watch(augment, "simclr_view")
    train_a_teacher(teacher_settings("--loss", "paco", "--queue", 16, epochs=1, img_size=4))
    assert {call["size"] for call, _ in views} == {4}


# ---- The plain ResNet-18 -------------------------------------------------------------------------

def train_a_resnet18(**changes):
    """Train a Cnn as the plain ResNet-18 is. Returns it, its run, each epoch's order of images and
    each step's labels; run.seen: each step's images and logits, then those of the evaluation."""
    args = resnet18.resolved(train_teacher.parse(["--dataset", "cifar10"]), CPU)
    small = dict(img_size=8, batch=8, epochs=2, warmup_epochs=0, eval_every=100)
    vars(args).update(small | changes)
    torch.manual_seed(0)
    net, run, data = Cnn(), RecordingRun(), small_data()
    _, orders, labels = recorded_batches(data)
    run.seen = []
    net.register_forward_hook(lambda net, x, out: run.seen.append((x[0], out)))
    resnet18.train(args, data, net, CPU, run)
    return net, run, orders, labels


def test_the_plain_resnet18_written_out_again(steps_of, watch):
    """A log prior subtracted; one order, or the same draws, in every epoch; no crop; no decay."""
    steps, crops = steps_of(torch.optim.AdamW), watch(augment, "random_crop_flip")
    seeds = watch(runtime, "seed_step")
    _, run, orders, labels = train_a_resnet18()
    for i, y in enumerate(labels):
        loss = cross_entropy(run.seen[i][1].double() + PI.log(), y)
        assert run.values[i]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert steps[i]["groups"][0]["weight_decay"] == 0.05
    assert len(labels) == 6 and orders[0] != orders[1]
    assert [call["padding"] for call, _ in crops] == [1] * 6
    assert [call["key"] for call, _ in seeds] == [(0, e, s, 0) for e in range(2) for s in range(3)]


def test_the_plain_resnet18_clears_its_gradients(steps_of):
    """Gradients of all earlier steps in each. At a rate of 0 the weights stay as they are."""
    steps = steps_of(torch.optim.AdamW)
    net, run, _, labels = train_a_resnet18(lr=0.0)
    net.train()
    loss = F.cross_entropy(net(run.seen[5][0]) + PI.log().float(), labels[5])
    expected = torch.autograd.grad(loss, list(net.parameters()))
    torch.testing.assert_close(steps[5]["grads"], list(expected))


def test_the_plain_resnet18s_settings():
    """Another baseline than the table's; settings of a recipe that its loop does not have."""
    for recipe in ("ours", "paper"):
        b = resnet18.resolved(train_teacher.parse(["--dataset", "cifar10", "--recipe", recipe]),
                              CPU)
        assert (b.mixing, b.schedule, b.rho, b.beta, b.loss) == (0, "cosine", 0, 0, "la")
    a = resnet18.resolved(train_teacher.parse(["--dataset", "cifar10"]), CPU)
    assert (a.arch, a.img_size, a.norm, a.loss, a.beta, a.rho, a.lr, a.weight_decay) == (
        "resnet18", 64, "imagenet", "la", 0, 0, 1e-3, 0.05)
