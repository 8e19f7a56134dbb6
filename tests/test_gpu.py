"""Training on a pretended GPU: every tensor on its device, no wait for it within a step."""
import json
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import analyze
import train_student
import train_teacher
from conftest import script
from engine import datasets, minutes, runtime
from engine.runtime import Runtime
from engine.training import FiniteScaler
from experiments import crt, deit3
from pretended_gpu import GPU, PretendedGPU, short_resnet  # noqa: F401: a fixture

pytestmark = pytest.mark.usefixtures("no_pictures", "short_resnet")
SHORT = "--recipe", "cpu", "--epochs", 2, "--batch", 8, "--eval-every", 2
DRW = "--drw-epoch", 1                                  # one epoch before, one with re-weighting
CIFAR = "--dataset", "cifar10", "--imb", 24             # from 24 images to one a class: 74
STEPS = 8                                               # in an epoch, at least
TEACHERS = {
    "LDAM under SAM": (*DRW, "--rho-schedule", "step"),
    "PaCo under SAM": ("--loss", "paco", "--queue", 32),
    "strong": (*DRW, "--loss", "ce", "--rho", 0, "--augment", "resized"),
    "vector scaling": (*DRW, "--loss", "vs", "--rho", 0),
    "ours": ("--arch", "fast", "--loss", "la", "--beta", 0, "--rho", 0, "--mixing", 0.5),
}
STUDENTS = {
    "DeiT-LT": ("--micro-batch", 6, "--ema", 0.9, "--drop-path", 0.1, "--repeats", 3,
                "--crop", "resized"),
    "ours": ("--stem", "fast", "--distill", "soft", "--logit-adjustment", "--beta", 0,
             "--ema", 0.9),
    "weak images, one token": ("--tokens", 1, "--teacher-view", "weak", "--mixup", 0,
                               "--cutmix", 0, "--teacher-size", 40),
}


@pytest.fixture
def run(monkeypatch, tmp_path, tiny_cifar):
    """A function: run a script on a device, in a folder of the test's own.

    It returns the PretendedGPU, or None for the CPU.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 ** 34, 2 ** 34))

    def run(module, *flags, device=GPU, amp=None, data=CIFAR):
        rt = Runtime(torch.device(device), amp=amp)
        datasets.last_loaded.clear()                    # it is on another device
        monkeypatch.setattr(runtime, "setup", lambda *_: rt)
        flags = *data, *SHORT, "--data-dir", tiny_cifar, *flags
        if device == "cpu":
            return script(module, monkeypatch, *flags)
        with PretendedGPU() as gpu, warnings.catch_warnings():
            # autocast's, for float16
            warnings.filterwarnings("ignore", ".*CUDA is not available")
            script(module, monkeypatch, *flags)
        return gpu
    return run


@pytest.fixture(scope="module")
def teacher(short_resnet, tiny_cifar, tmp_path_factory):
    """Run folder of a teacher of one epoch, trained on the CPU."""
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    with pytest.MonkeyPatch.context() as patch:
        script(train_teacher, patch, *CIFAR, "--recipe", "cpu", "--img-size", 16, "--epochs", 1,
               "--rho", 0, "--data-dir", tiny_cifar, "--out", folder)
    return folder


class Killed(Exception):
    pass


def assert_no_step_waits(gpu):
    """Reports, evaluation and saving wait now and then; a wait in each step is noted often."""
    often = {place: n for place, n in Counter(gpu.waits).items() if n >= STEPS}
    assert gpu.waits and not often


def test_what_is_pretended():
    """A pretence that lets through what a GPU would refuse or wait for: all tests would pass."""
    with PretendedGPU() as gpu:
        x, net = torch.arange(6.0).to("cuda"), nn.Linear(2, 3).to(GPU)
        assert x.device == x[1:].device == torch.rand(2, device="cuda").device == GPU
        assert net.weight.device == GPU and x.is_cuda
        assert torch.rand(2).device == x.cpu().device == torch.device("cpu")
        assert torch.equal(x.cpu(), torch.arange(6.0))
        net(x.view(3, 2)).sum().backward()
        assert net.weight.grad.device == torch.full_like(x, 1).device == GPU
        # A GPU's tensor takes a CPU's numbers and indices.
        assert (x + torch.tensor(1)).device == x[torch.tensor([0, 1])].device == GPU
        gpu.waits.clear()
        for of_the_gpu in (x.numpy, lambda: np.asarray(x)):
            with pytest.raises(TypeError, match="first"):
                of_the_gpu()
        for mixed in (lambda: x + torch.ones(6),
                      lambda: torch.stack([x[0], torch.tensor(1)]),
                      lambda: torch.ones(6)[x.long()],
                      lambda: torch.zeros(6).add_(x),
                      lambda: net(torch.ones(3, 2)),
                      lambda: torch.where(x > 1, torch.ones(6), x),
                      lambda: x.long() @ x.long()):
            with pytest.raises(RuntimeError, match="cuda"):
                mixed()
        torch.ones(6).to(GPU, non_blocking=True)
        assert not gpu.waits
        for waiting in (lambda: torch.ones(6).to(GPU), lambda: x[torch.tensor([0, 1])],
                        lambda: x[0].item(), lambda: bool(x[0] > 0), lambda: x[x > 1],
                        lambda: x.nonzero(), lambda: x.cpu(), lambda: x.tolist(),
                        lambda: torch.zeros(6).copy_(x), lambda: torch.where(x > 1),
                        lambda: f"{x[0]:.1f}"):
            before = len(gpu.waits)
            waiting()
            assert len(gpu.waits) > before
    assert torch.ones(1).device.type == x.device.type == "cpu"


@pytest.mark.parametrize("flags", TEACHERS.values(), ids=TEACHERS)
def test_teacher(flags, run):
    """A margin, weight or schedule that stays on the CPU; a loss that is read in every step."""
    assert_no_step_waits(run(train_teacher, "--img-size", 16, *flags))


@pytest.mark.parametrize("flags", STUDENTS.values(), ids=STUDENTS)
def test_student(flags, run, teacher):
    """Class weights, priors, draws or averaged weights on the CPU; a wait in every step."""
    flags = "--model", "micro", *DRW, "--teacher", teacher, *flags
    assert_no_step_waits(run(train_student, *flags))


@pytest.mark.parametrize("module", [crt, deit3])
def test_experiments(module, run):
    """Draws of 3-Augment on the CPU, a frozen network whose fresh classifier stays there."""
    assert_no_step_waits(run(module, "--model", "micro", *DRW))


@pytest.mark.parametrize("module", [train_student, train_teacher])
def test_minutes(module, run, monkeypatch):
    """A measurement that waits for the GPU in each step, which training does not, or never does."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    monkeypatch.setattr(minutes, "TIMED", (12, 12))
    monkeypatch.setattr(minutes, "most_epochs", lambda *_: (1, 1))
    monkeypatch.setattr(sys.modules[__name__], "SHORT", ("--recipe", "cpu", "--minutes", 5,
                                                         "--batch", 8))
    flags = {train_student: ("--method", "vit", "--model", "micro"),
             train_teacher: ("--img-size", 16, "--rho", 0)}[module]
    gpu = run(module, *flags)
    gpu.waits = [wait for wait in gpu.waits if "evaluation.py" not in wait[1]]      # of four
    assert_no_step_waits(gpu)
    # An epoch's beginning, steps and evaluation: 1 + 10 + 1, twice 1 + 2 + 1; the teacher's end;
    # and in training itself, for the time left, the third and the last step.
    assert len(waited) == 20 + 2 * (module is train_teacher) + 2


def test_float16(run, teacher):
    """The loss scale on the CPU, or read there in every step."""
    flags = "--model", "micro", *DRW, "--teacher", teacher
    assert_no_step_waits(run(train_student, *flags, amp=torch.float16))


def test_undoing_a_step_takes_as_many_calls_for_many_layers_as_for_few():
    """A copy and a comparison per buffer: ResNet-50's 159 would be hundreds of launches a step."""
    views = {"as_strided", "stride", "split", "numel", "detach", "dim"}

    def calls(layers):
        with PretendedGPU() as gpu:
            net = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(layers))).to(GPU)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
            scaler = FiniteScaler(net, optimizer, Runtime(GPU))
            scaler.scale(net(torch.ones(4, 3, device=GPU)).sum()).backward()
            scaler.unscale_()
            gpu.calls.clear()
            scaler.update()
            return [name for name in gpu.calls if name not in views and "__get__" not in name]
    assert calls(2) == calls(20) and len(calls(2)) <= 20


def test_images_that_stay_on_disk(run, tiny_cifar, tmp_path, monkeypatch):
    """Batches decoded ahead, or labels, that are not brought to the device."""
    for split in ("train", "test"):
        lines = [f"{split}/class{k}/{i}.png {k}" for k in range(10) for i in range(6)]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    lists = ("--dataset", "imagenet_lt", "--train-list", tmp_path / "train.txt",
             "--test-list", tmp_path / "test.txt")
    gpu = run(train_student, "--recipe", "paper", "--model", "micro", "--img-size", 32,
              "--batch", 6, "--method", "vit", "--eval-crop", 1, "--skip-bad", data=lists)
    assert_no_step_waits(gpu)


def test_resumed(run, teacher, monkeypatch):
    """A checkpoint's weights, moments or sums that stay on the CPU, where torch.load puts them."""
    flags = ("--model", "micro", "--epochs", 1, "--drw-epoch", 0, "--teacher", teacher,
             "--ema", 0.9, "--logit-adjustment", "--out", "run")
    seed_step = runtime.seed_step

    def dying(seed, epoch, step, rank):
        if step == 2:
            raise Killed
        seed_step(seed, epoch, step, rank)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runtime, "seed_step", dying)
        run(train_student, *flags, "--save-every", 1)
    gpu = run(train_student, *flags, "--save-every", 100, "--resume")
    gpu.waits = [wait for wait in gpu.waits if "run_folder.py" not in wait[1]]      # of loading
    assert_no_step_waits(gpu)


def test_the_same_training_on_both(run, teacher, tmp_path):
    """Code for a GPU only (fused attention in training, say) that computes something else."""
    flags = ("--model", "micro", "--epochs", 1, "--teacher", teacher, "--stem", "conv",
             "--crop", "resized", "--ema", 0.9)
    run(train_student, *flags, "--out", "gpu")
    run(train_student, *flags, "--out", "cpu", device="cpu")
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("gpu", "cpu")]
    for one, other in zip(*logs, strict=True):
        assert one["loss_cls"] == pytest.approx(other["loss_cls"], rel=0.01)
        assert one["loss_dist"] == pytest.approx(other["loss_dist"], rel=0.01)
    one, other = (torch.load(tmp_path / name / "last.pt")["optimizer"]["state"].values()
                  for name in ("gpu", "cpu"))
    apart = [((mine["exp_avg"] - theirs["exp_avg"]).norm() / theirs["exp_avg"].norm()).item()
             for mine, theirs in zip(one, other, strict=True)]          # mean gradients
    assert sorted(apart)[len(apart) // 2] < 0.01          # the stem's BatchNorm makes more of it


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_analyses(kind, run, teacher, tiny_cifar, tmp_path, monkeypatch):
    """A hook's, a map's or a direction's tensor on the CPU, a picture drawn from the GPU."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)       # half of the time
    folder = teacher
    if kind == "student":
        folder = tmp_path / "student"
        run(train_student, "--model", "micro", "--epochs", 1, "--teacher", teacher,
            "--out", folder, device="cpu")
    monkeypatch.setattr(runtime, "setup", lambda *_: Runtime(GPU))
    data = "--data-dir", tiny_cifar, "--imb", 24
    images = sorted((tiny_cifar / "test" / "class0").iterdir())
    with PretendedGPU():
        script(analyze, monkeypatch, "report", folder, "--out", tmp_path / "report.html",
               "--images", 20, *data)
        script(analyze, monkeypatch, "eval", folder, *data)
        script(analyze, monkeypatch, "predict", *images, "--checkpoint", folder,
               "--csv", tmp_path / "classes.csv")
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert len((tmp_path / "classes.csv").read_text().splitlines()) == 7
