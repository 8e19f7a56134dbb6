"""Several processes: the losses of one, one log, one error line, every test image once."""
import os
import shutil
import signal
import sys

import pytest
import torch
from torch import nn

import augment
import data_lt
import train_student
import train_teacher
from engine import evaluation, minutes, run_folder
from engine.datasets import load_data
from engine.networks import build_student, load_teacher
from engine.runtime import Runtime, setup
from several_processes import run, start, start_torchrun
from tiny_runs import DATA, PACO, PLAIN, STUDENT, TEACHER, WITHOUT_SAM, checkpoint, read, records

pytest_plugins = ["tiny_runs", "several_processes"]
pytestmark = pytest.mark.usefixtures("server")
FLOAT32 = ["--amp", "none"]


# ---- Two processes and one -----------------------------------------------------------------------

def without_batchnorm(net):
    for name, child in net.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(net, name, nn.GroupNorm(4, child.num_features))
        without_batchnorm(child)
    return net


def nothing_random():
    """In a process of its own: no augmentation, nor statistics of a process's part of a batch."""
    new_network = train_teacher.new_network

    def new_network_without_batchnorm(*given):
        return without_batchnorm(new_network(*given))

    def as_they_are(images, args):
        most = 30 // int(os.environ.get("WORLD_SIZE", 1))           # this process's part of a batch
        assert len(images) <= getattr(args, "micro_batch", most)
        return augment.resize(augment.to_float(images), args.img_size)
    train_teacher.new_network = new_network_without_batchnorm
    train_teacher.view = train_student.strong_augment = as_they_are


ALIKE = {       # 90 images: 3 steps of 30 (student: 32, micro-batches of 8)
    "train_teacher": [*TEACHER, *"--imb 11.5 --loss ce --lr 0.02 --drw-epoch 2".split()],
    "train_student": [*DATA, *("--imb 11.5 --method vit --model micro --img-size 16 --epochs 2 "
                               "--warmup-epochs 1 --lr 0.002 --batch 30 "
                               "--micro-batch 8 --mixup 0 --cutmix 0 --ema 0.9 "
                               "--eval-every 2").split()],
}


@pytest.mark.parametrize("module", ALIKE)
def test_two_processes_give_the_losses_of_one(module, tiny_cifar, tmp_path):
    """Gradients summed, not averaged; processes that average too early in an accumulation; SAM that
    climbs on the gradient of a part; an order that shows images twice; the whole batch in each."""
    for n in (1, 2):
        flags = [*ALIKE[module], *FLOAT32, "--data-dir", tiny_cifar, "--out", tmp_path / str(n)]
        code, printed = run(n, tmp_path / "log", module, *flags, prepare=nothing_random)
        assert code == 0, printed
    losses = [[r["loss"] for r in records(tmp_path / n)] for n in "12"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] != pytest.approx(losses[0][1], rel=1e-2)        # something is learned
    one, two = (checkpoint(tmp_path / n) for n in "12")
    assert (one["world"], two["world"]) == (1, 2)
    for part in ("model", "ema"):           # AdamW moves a weight without gradient by its noise
        torch.testing.assert_close(one.get(part), two.get(part), rtol=1e-3, atol=1e-3)
    if module == "train_student":           # it divides by the gradient's size: compare that too
        for mine, theirs in zip(*(run["optimizer"]["state"].values() for run in (one, two))):
            a, b = mine["exp_avg"], theirs["exp_avg"]
            assert (a - b).norm() < 1e-3 * a.norm()


def two_epochs():
    """In a process of its own: what is measured becomes two epochs, and three in a second one."""
    minutes.TIMED = (2, 2)
    minutes.most_epochs = lambda *_: (2 + int(os.environ["RANK"]), 1)


@pytest.mark.parametrize("module, flags", [("train_student", PLAIN), ("train_teacher", PACO)])
def test_two_processes_measure_and_have_the_same_epochs(module, flags, tiny_cifar, tmp_path):
    """Processes with epochs of their own, or a measurement that leaves one in a collective."""
    flags = [*flags, "--data-dir", str(tiny_cifar), "--out", str(tmp_path / "run")]
    at = flags.index("--epochs")
    flags[at:at + 2] = ["--minutes", "3"]
    code, printed = run(2, tmp_path / "log", module, *flags, prepare=two_epochs)
    assert code == 0, printed
    assert [r["epoch"] for r in records(tmp_path / "run")] == [0, 1]


# ---- What two processes leave --------------------------------------------------------------------

@pytest.fixture(scope="module")
def pacos_run(server, tiny_cifar, tmp_path_factory):
    """Run folder of a PaCo teacher that two processes have trained."""
    folder = tmp_path_factory.mktemp("two")
    code, printed = run(2, folder / "log", "train_teacher", *PACO, *FLOAT32, *WITHOUT_SAM,
                        "--data-dir", tiny_cifar, "--out", folder / "paco")
    assert code == 0, printed
    return folder / "paco"


def test_two_processes_train_one_teacher(pacos_run, tiny_cifar):
    """A log line of each process; a queue of one's own images, which must have those of both, the
    newest step first; BatchNorm statistics of another process than the one that was tested."""
    rt = setup("cpu", "none")
    args = train_student.parse([*STUDENT, "--data-dir", str(tiny_cifar)])
    data = load_data(args, rt)
    assert len(records(pacos_run)) == 2
    result = read(pacos_run, "result.json")
    assert result["command"].startswith("torchrun --nproc_per_node=2 ")
    net, _ = load_teacher(str(pacos_run), data, rt)
    again = evaluation.evaluate_teacher(net, data, rt)["avg"]
    assert {column: again[column] for column in evaluation.COLUMNS} == result["avg"]

    order = data_lt.shuffled(len(data.train_labels), 0, 1)              # seed 0, the last epoch
    by_rank = [data_lt.shard(order, 30, rank, 2) for rank in (0, 1)]
    newest_first = torch.cat([torch.cat(parts) for parts in list(zip(*by_rank))[::-1]])
    queue = checkpoint(pacos_run)["paco"]["queue_labels"]
    assert torch.equal(queue, data.train_labels[newest_first][:50])


def test_two_processes_train_one_student(pacos_run, tiny_cifar, tmp_path):
    """A test image counted twice; the statistics of the stem of one process only; another number of
    micro-batches in one process, for which the other would wait for ever."""
    flags = [*STUDENT, *FLOAT32, *("--stem conv --logit-adjustment --batch 26 --micro-batch 4 "
                                   "--epochs 1").split(), "--data-dir", str(tiny_cifar)]
    code, printed = run(2, tmp_path / "log", "train_student", *flags, "--teacher", pacos_run,
                        "--out", tmp_path / "run")
    assert code == 0, printed
    assert [r["epoch"] for r in records(tmp_path / "run")] == [0]
    state, rt = checkpoint(tmp_path / "run"), setup("cpu", "none")
    assert state["sums"].shape[0] == 2                      # of each process
    net = build_student(state["config"], 10, distilled=True)
    data = load_data(train_student.parse(flags), rt)
    for part, head in (("model", "avg"), ("ema", "ema")):
        net.load_state_dict(state[part])
        again = evaluation.evaluate_student(net, data, 16, 1.0, rt)["avg"]
        result = read(tmp_path / "run", "result.json")[head]
        assert {column: again[column] for column in evaluation.COLUMNS} == result


# ---- What goes wrong in one of them --------------------------------------------------------------

def a_full_disk():
    def full(*args, **more):
        raise OSError(28, os.strerror(28))
    run_folder.save_checkpoint = full


def test_a_disk_that_is_full_for_the_writer_ends_all_with_one_line(tiny_cifar, tmp_path):
    """The others' tracebacks of a lost connection, or processes that wait for ever."""
    code, printed = run(2, tmp_path / "log", "train_teacher", *TEACHER, *WITHOUT_SAM,
                        "--epochs", 1, "--data-dir", tiny_cifar, "--out", tmp_path / "run",
                        prepare=a_full_disk)
    assert code == 2 and printed.count("error: ") == 1 and "cannot write in" in printed
    assert "No space left" in printed and "Traceback" not in printed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers under /proc")
def test_a_process_that_dies_ends_torchruns_job(tiny_cifar, tmp_path):
    """The others would wait for it for half an hour. The checkpoint stays. (Whether torchrun first
    sees its end or that another process has lost its connection is a matter of chance.)"""
    job = start_torchrun(2, tmp_path / "log", "train_teacher", *TEACHER, "--epochs", 500,
                         "--save-every", 1, "--data-dir", tiny_cifar, "--out", tmp_path / "run")
    job.wait_until((tmp_path / "run" / "last.pt").exists)
    os.kill(job.children()[-1], signal.SIGKILL)
    code, printed = job.end()
    assert code != 0 and ("SIGKILL" in printed or "Connection" in printed), printed
    assert checkpoint(tmp_path / "run")["world"] == 2


# ---- Several machines ----------------------------------------------------------------------------

def restarted_beside_a_new_machine():
    """In a process of its own: as torchrun has it where one machine of two was started anew."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(1 - int(os.environ["RANK"]))


def a_folder_of_its_own():
    """In a process of its own: the second machine does not see the run folder of the first."""
    if os.environ["RANK"] == "1":
        sys.argv[sys.argv.index("--out") + 1] += "_elsewhere"


def images_of_its_own():
    """In a process of its own: the second machine has other files under the same classes."""
    if os.environ["RANK"] == "1":
        sys.argv[sys.argv.index("--data-dir") + 1] += "_elsewhere"


@pytest.fixture
def begun_run(pacos_run, tiny_cifar, tmp_path):
    """(a run without its result, of two processes; the flags to go on with it)."""
    shutil.copytree(pacos_run, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return tmp_path / "run", [*PACO, *FLOAT32, *WITHOUT_SAM, "--data-dir", tiny_cifar, "--out",
                              tmp_path / "run"]


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_all_processes_go_on_if_one_was_restarted(more, begun_run, tmp_path):
    """Of a machine that was started anew, one that refuses to go on, or that begins again."""
    folder, flags = begun_run
    before = records(folder)
    code, printed = run(2, tmp_path / "log", "train_teacher", *flags, *more,
                        prepare=restarted_beside_a_new_machine)
    assert code == 0, printed
    assert records(folder) == before and (folder / "result.json").exists()


def test_a_checkpoint_that_one_process_does_not_see_is_refused(begun_run, tmp_path):
    """A process that begins while the other goes on, and both wait for each other for ever."""
    folder, flags = begun_run
    code, printed = run(2, tmp_path / "log", "train_teacher", *flags, "--resume",
                        prepare=a_folder_of_its_own)
    assert code == 2 and printed.count("error: ") == 1 and "Traceback" not in printed
    assert "not all processes find the same checkpoint" in printed and str(folder) in printed


def test_other_images_on_another_machine_are_refused(tiny_cifar, tmp_path):
    """Each process numbers the classes by its own counts: gradients of permuted labels."""
    shutil.copytree(tiny_cifar, tmp_path / "images")
    shutil.copytree(tiny_cifar, tmp_path / "images_elsewhere")
    for file in (tmp_path / "images_elsewhere" / "train" / "class0").iterdir():
        file.rename(file.with_name(f"renamed_{file.name}"))
    code, printed = run(2, tmp_path / "log", "train_teacher", *TEACHER, "--data-dir",
                        tmp_path / "images", "--out", tmp_path / "run", prepare=images_of_its_own)
    assert code == 2 and printed.count("error: ") == 1 and "Traceback" not in printed
    assert "not all processes have the same images" in printed


# ---- Stopped -------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_process_with_its_code(number, tiny_cifar, tmp_path):
    """Ctrl-C: a traceback, or a process that trains on."""
    job = start(tmp_path / "log", "train_student", *PLAIN, "--epochs", 1000, "--eval-every", 1000,
                "--save-every", 1, "--data-dir", tiny_cifar, "--out", tmp_path / "run")
    job.wait_until((tmp_path / "run" / "last.pt").exists)
    os.kill(job.process.pid, number)
    code, printed = job.end()
    assert code == 128 + number, printed
    assert "--resume goes on from there" in printed and "Traceback" not in printed


# ---- Who is given what ---------------------------------------------------------------------------

@pytest.mark.parametrize("world", [2, 3, 7, 30])
def test_any_number_of_processes_tests_every_image_once(world, monkeypatch):
    """Images repeated to make equal parts, as DistributedSampler does, or dropped; a process
    without any image."""
    labels = torch.arange(20) % 4
    images = labels.view(20, 1, 1, 1).expand(20, 3, 4, 4).to(torch.uint8)
    counted = []
    monkeypatch.setattr(evaluation, "all_sum", lambda tensor, rt: tensor)       # each its own part
    monkeypatch.setattr(evaluation, "accuracies",
                        lambda right, answers, total, groups: counted.append(right))

    def predict(x):
        return {"avg": nn.functional.one_hot((255 * x[:, 0, 0, 0]).round().long(), 4)}
    for rank in range(world):
        evaluation.evaluate(predict, images, labels, {"head": [0, 1], "mid": [2], "tail": [3]},
                            Runtime(torch.device("cpu"), rank, world))
    assert len(counted) == world and torch.stack(counted).sum(dim=0).tolist() == [5, 5, 5, 5]
