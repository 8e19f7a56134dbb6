"""The benchmarks: that each section runs on a small scale, and what its numbers are made of."""
import re

import pytest
import torch
from torch import nn

import resnet
import train_student
import vit
from conftest import script
from engine.records import read_log
from engine.runtime import Runtime
from experiments import bench
from pretended_gpu import GPU, PretendedGPU

CPU = Runtime(torch.device("cpu"))


@pytest.fixture
def quick(monkeypatch):
    """Without timm, and with a peak that takes no time to measure."""
    monkeypatch.setattr(bench, "timm", None)
    monkeypatch.setattr(bench, "matmul_peak", lambda rt, dtype=None: 1e15)


def test_every_variant_is_called_once_in_each_round():
    """A first call counted with the others; one variant after the other instead of in turn."""
    calls = []
    times = bench.measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, CPU)
    assert calls == list("ababab") and [len(seconds) for seconds in times.values()] == [2, 2]


def test_ratios_are_of_the_same_round(capsys):
    """Twice as fast in each round, while the machine becomes ten times as slow."""
    bench.print_rates("title", {"slow": [1.0, 4.0, 10.0], "fast": [0.5, 2.0, 5.0]}, 100, "slow")
    _, title, slow, fast = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", slow.strip()) == ["slow", "25 images/s", "(10 .. 100)", "1.00 x"]
    assert re.split(r"  +", fast.strip()) == ["fast", "50 images/s", "(20 .. 200)", "2.00 x"]


def test_operations_of_a_convolution_are_counted_per_image():
    """4 filters of 3 x 3 x 3 at 8 x 8 places, a multiplication and an addition each."""
    net = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    assert bench.forward_flops(net, 8, CPU) == 2 * 4 * 27 * 64


@pytest.mark.parametrize("recipe", ["cpu", "ours"])
def test_the_students_step_trains_and_names_its_parts(recipe):
    """A part that is left out of the table; a step that leaves the weights alone."""
    args = train_student.parse(["--recipe", recipe, "--model", "micro", "--ema", "0.9"])
    train_student.resolve(args, CPU)
    parts, nets = [], []

    def build_student(*settings, **more):
        nets.append(original(*settings, **more))
        return nets[-1]
    original = bench.build_student
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "build_student", build_student)
        step, flops = bench.student_step(args, 4, CPU)
    before = {name: p.clone() for name, p in nets[0].named_parameters()}
    step(parts.append)
    assert parts == ["augment", "teacher", "forward", "backward", "optimizer"]
    assert all(not p.equal(before[name]) for name, p in nets[0].named_parameters()
               if p.ndim > 1 and p.requires_grad and name != "cls_token")
    assert flops > 3 * bench.forward_flops(nets[0], 32, CPU)


def test_the_row_of_a_student(quick):
    row = bench.measure_student("cpu", "micro", 32, 8, 4, CPU, 1).split()
    assert row[:5] == ["micro", "patch", "32", "8", "4"]
    assert float(row[5]) > 0 and 0.1 < float(row[7]) < 50               # images/s, GiB
    shares = [int(share.removesuffix("%")) for share in row[8:]]
    assert len(shares) == 5 and sum(shares) == pytest.approx(100, abs=3)


def test_steps_run_on_a_gpu():
    """Weights, images or priors that stay on the CPU; a wait for the device inside a step."""
    rt = Runtime(GPU)
    args = train_student.parse(["--recipe", "ours", "--model", "micro", "--ema", "0.9"])
    train_student.resolve(args, rt)
    with PretendedGPU() as gpu:
        student, _ = bench.student_step(args, 4, rt)
        teacher = bench.teacher_step(torch.rand(4, 3, 32, 32, device=GPU), rt, 0.1)
        gpu.waits.clear()
        student()
        teacher()
        assert not gpu.waits


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_the_teachers_step_moves_the_statistics_once(rho, monkeypatch):
    """SAM's second pass, at perturbed weights, counted too."""
    net = resnet.resnet32(10)
    monkeypatch.setattr(resnet, "resnet32", lambda num_classes: net)
    before = net.classifier.weight.clone()
    bench.teacher_step(torch.rand(4, 3, 32, 32), CPU, rho)()
    assert not net.classifier.weight.equal(before)
    counts = [b for name, b in net.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts and all(count == 1 for count in counts)


def test_sections_print_their_tables(quick, monkeypatch, capsys):
    """A function that was renamed elsewhere."""
    monkeypatch.setitem(vit.MODELS, "tiny", vit.MODELS["micro"])
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    bench.compare_augmentation(images, 32, "padded", CPU, 1)
    bench.bench_files(CPU, 1, drawn=2, images=4, batch=2)
    bench.compare_networks(32, 8, 4, CPU, 1)
    bench.bench_teacher(CPU, 1, batch=4)
    rates = re.findall(r"  (\S.*?)  +\d+ images/s", capsys.readouterr().out)
    assert [rate.split(",")[0] for rate in rates] == [
        "augment.py", "augment.py", "ImageFolder", "images/decode.py", "vit.py",
        "channels first", "channels last", "channels last"]


# ---- How cost grows ------------------------------------------------------------------------------

def rows(capsys):
    """The printed rows of numbers, split at two spaces or more."""
    lines = capsys.readouterr().out.splitlines()
    return [re.split(r"  +", line.strip()) for line in lines if re.match(r"  \S.*\d", line)]


def test_growth_of_steps_changes_one_size_at_a_time(quick, monkeypatch, capsys):
    """A size that does not reach the network or the batch, or one that stays for the next rows."""
    monkeypatch.setitem(vit.MODELS, "tiny", vit.MODELS["micro"])
    growth = {"batch": (2, 4), "pixels": (16, 32), "blocks": (1, 3), "classes": (10, 8142)}
    monkeypatch.setattr(bench, "USUAL", {"batch": 2, "pixels": 16, "blocks": 1, "classes": 10})
    bench.growth_of_steps(CPU, 1, growth)
    found = rows(capsys)
    assert [row[:2] for row in found] == [[name, f"{value:,}"] for name, values in growth.items()
                                          for value in values]
    work = [float(row[-1].removesuffix(" x")) for row in found]
    assert work[::2] == [1] * 4 and work[1] == 1 and min(work[3::2]) > 1
    assert all(float(row[2]) > 0 and float(row[4]) > 0 for row in found)


def test_growth_of_listing_reads_every_file(monkeypatch, capsys):
    """Lists that the reader refuses, files taken for damaged or for copies, or none at all."""
    seen = []

    def counted(function, number_of):
        def counting(*given, **more):
            found = function(*given, **more)
            seen.append(number_of(found))
            return found
        return counting
    monkeypatch.setattr(bench, "in_new_process", lambda function, *given: function(*given))
    monkeypatch.setattr(bench.runtime, "setup", lambda device: CPU)     # it changes the allocator
    for module, name, number_of in (
            (bench.lists, "find_listed", lambda found: len(found[0]) + len(found[1])),
            (bench.files, "list_folder", len),
            (bench.datasets, "load", lambda data: len(data.train_images) + len(data.test_images))):
        monkeypatch.setattr(module, name, counted(getattr(module, name), number_of))
    bench.growth_of_listing(sizes=(40, 60), most=50)
    assert [row[:2] for row in rows(capsys)] == [
        ["lists, no file opened", "40"], ["folders, no file opened", "40"], ["a run's start", "40"],
        ["lists, no file opened", "60"]]
    assert seen == [40, 40, 40, 60]


def test_growth_of_processes_is_the_logs(no_pictures, monkeypatch, capsys):
    """Flags that a script refuses; images/s of an epoch with an evaluation, or of another run."""
    launched = []

    def in_this_process(command, **more):
        at = command.index(train_student.__file__)
        launched.append(command[:at])
        script(train_student, monkeypatch, *command[at + 1:])
    monkeypatch.setattr(bench.subprocess, "run", in_this_process)
    monkeypatch.setattr(bench, "read_log", lambda folder: read_log(folder)[:1]
                        + [{"images_per_second": 10 ** 6 * len(launched)}])
    flags = "--img-size 16 --imb 1000 --epochs 1 --warmup-epochs 0 --drw-epoch 1".split()
    bench.growth_of_processes((1, 2), flags)
    assert [command[3] for command in launched] == ["--nproc_per_node=1", "--nproc_per_node=2"]
    assert rows(capsys)[-2:] == [["1 process(es)", "1000000 images/s", "1.00 x"],
                                 ["2 process(es)", "2000000 images/s", "2.00 x"]]
