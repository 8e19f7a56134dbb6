"""engine/runtime.py: device and processes, seeds, signals, and how a script ends."""
import atexit
import ctypes
import math
import os
import re
import signal
import sys
import time
from datetime import timedelta

import pytest
import torch
from tqdm import tqdm

import data_lt
import train_student
from engine import runtime
from engine.runtime import Runtime, UserError
from engine.training import FiniteScaler
from images.files import DataError

CPU = Runtime(torch.device("cpu"))


# ---- Device --------------------------------------------------------------------------------------

@pytest.mark.parametrize("cpu, faster", [
    ("vendor_id : GenuineIntel\nflags : avx512f", False),
    ("vendor_id : GenuineIntel\nflags : avx512_bf16 avx512_fp16", False),
    ("vendor_id : GenuineIntel\nflags : avx512_bf16 amx_bf16", True),
    ("vendor_id : AuthenticAMD\nflags : avx512f", False),
    ("vendor_id : AuthenticAMD\nflags : avx2 avx512_bf16", True),
    ("Features : fp asimd bf16 i8mm", True)])
def test_bfloat16_is_for_processors_that_multiply_it_faster(cpu, faster, monkeypatch):
    """Intel's avx512_bf16 without amx_bf16 would train at two thirds of float32's speed."""
    monkeypatch.setattr(runtime, "cpu_info", lambda pattern: re.search(pattern, cpu))
    assert runtime.has_bf16(torch.device("cpu")) is faster
    assert runtime.setup("cpu").amp is (torch.bfloat16 if faster else None)


def test_autocast_has_the_type_that_was_asked_for():
    """bfloat16 under --amp fp16, or autocast under --amp none."""
    x = torch.ones(2, 2)
    for amp, dtype in (("none", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with runtime.setup("cpu", amp).autocast():
            assert (x @ x).dtype is dtype


@pytest.mark.parametrize("device, words", [("tpu", "--device is auto"), ("cuda:99", "--device cpu"),
                                           ("cuda:x", "--device is auto")])
def test_devices_that_are_not_there(device, words):
    """torch's traceback, or the CPU in silence."""
    with pytest.raises(UserError, match=words):
        runtime.setup(device)


@pytest.mark.parametrize("world, words", [("2", "start it with torchrun"), ("x", "unset them")])
def test_a_clusters_variables_without_a_group(world, words, monkeypatch):
    """torch's traceback about a rendezvous."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match=words):
        runtime.setup("cpu")


def test_a_cluster_without_torchrun_is_told_what_is_waited_for(monkeypatch, capsys):
    """Two silent hours in a shell whose variables are those of a cluster's job."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(runtime.dist, "init_process_group", lambda *_, **__: None)
    for rank, words in (("1", ""), ("0", "Waiting for the others")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        runtime.setup("cpu")
        err = capsys.readouterr().err
        assert err.startswith(words) and bool(err) == (rank == "0")


@pytest.mark.parametrize("rank, world", [("1", "1"), ("0", "0"), ("-1", "2")])
def test_a_process_that_no_group_has(rank, world, monkeypatch):
    """A stray RANK: a training that prints and writes nothing; a division by a world of 0."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match="unset them"):
        runtime.setup("cpu")


# ---- Seeds ---------------------------------------------------------------------------------------

def test_step_seeds_replay_and_differ_in_every_part_of_the_key():
    """A collision (say of step and rank added up) would give two ranks the same augmentation."""
    def draw(*key):
        runtime.seed_step(*key)
        return tuple(torch.rand(4).tolist())
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 0)]
    draws = [draw(*key) for key in keys]
    assert draws == [draw(*key) for key in keys]
    assert len(set(draws)) == len(keys)


def test_seeding_a_step_does_not_walk_the_stack(monkeypatch):
    """torch.manual_seed instead: milliseconds in each step of a machine whose CUDA is not used."""
    monkeypatch.delattr(torch, "manual_seed")
    monkeypatch.delattr(torch.random, "manual_seed")
    runtime.seed_step(0, 0, 0, 0)


def test_an_epochs_order_has_a_seed_of_its_own():
    """The order's draws again in step 0: images that come first would be augmented alike."""
    for seed, epoch in ((0, 0), (0, 3), (5, 0)):
        runtime.seed_step(seed, epoch, 0, 0)
        order = data_lt.epoch_generator(seed, epoch)
        assert order.initial_seed() != torch.default_generator.initial_seed()


# ---- How a script ends ---------------------------------------------------------------------------

@pytest.mark.parametrize("error", [UserError("do this instead"), DataError("do this instead")])
def test_a_users_error_ends_with_code_2_and_one_line(error, capsys):
    """A traceback for a mistyped path."""
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        runtime.run_main(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: do this instead\n"


def test_a_missing_file_is_named_in_one_line_but_a_bug_keeps_its_traceback(capsys, tmp_path):
    """A bug that reads like a user's mistake."""
    with pytest.raises(SystemExit) as stop:
        runtime.run_main(lambda: open(tmp_path / "no.txt"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "no.txt" in error and error.count("\n") == 1
    with pytest.raises(ZeroDivisionError):
        runtime.run_main(lambda: 1 / 0)


def test_signal_handlers_are_put_back():
    """A program that imports a script could no longer be stopped by Ctrl-C."""
    before = signal.getsignal(signal.SIGTERM)
    runtime.run_main(lambda: signal.signal(signal.SIGTERM, runtime.request_stop))
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_first_signal_asks_and_only_a_later_one_ends_at_once(monkeypatch, capsys):
    """torchrun's copy of a Ctrl-C, right after it, that loses the step; or a run that cannot be
    killed."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(runtime, "stop_signal", 0)
    for _ in range(2):                                  # within a second: one
        runtime.request_stop(signal.SIGINT, None)
    assert runtime.stop_signal == signal.SIGINT and not ended
    monkeypatch.setattr(runtime, "stop_requested_at", time.monotonic() - 2)
    runtime.request_stop(signal.SIGTERM, None)
    assert ended == [128 + signal.SIGTERM] and runtime.stop_signal == signal.SIGINT
    assert capsys.readouterr().err.count("once more") == 1


@pytest.mark.parametrize("ending, code", [
    (None, 0), (UserError("no"), 2), (SystemExit(143), 143), (SystemExit(), 0)])
def test_one_of_several_processes_ends_at_once_with_its_code(ending, code, monkeypatch):
    """Python's own ending of a process, which gloo's threads now and then abort, or a lost code; a
    group that is destroyed, for which torch 2.6 now and then waits forever."""
    def main():
        if ending:
            raise ending

    def hard_exit(code):
        raise RuntimeError(f"left with {code}")
    monkeypatch.setattr(runtime.dist, "is_initialized", lambda: True)
    monkeypatch.delattr(runtime.dist, "destroy_process_group")
    monkeypatch.setattr(runtime, "hard_exit", hard_exit)
    with pytest.raises(RuntimeError, match=f"left with {code}"):
        runtime.run_main(main)


def test_a_hard_exit_loses_neither_output_nor_code():
    """Output that Python still holds, functions registered for the end, or the exit code."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        atexit._clear()                                 # pytest's own
        sys.stdout = os.fdopen(write, "w")              # buffered
        atexit.register(print, "last")
        print("first")
        runtime.hard_exit(3)
    os.close(write)
    with os.fdopen(read) as output:
        assert output.read().split() == ["first", "last"]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
@pytest.mark.parametrize("starter, number", [("torchrun", signal.SIGTERM), ("a person", 0)])
def test_torchruns_processes_stop_with_it(starter, number, monkeypatch):
    """Orphans that hold GPUs and folder after a kill -9 of torchrun. (With it: test_faults.py.)"""
    if starter == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    child = os.fork()
    if child == 0:
        runtime.setup("cpu", "none")
        asked = ctypes.c_int()
        runtime.LIBC.prctl(2, ctypes.byref(asked))          # PR_GET_PDEATHSIG
        os._exit(asked.value)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == number


# ---- Output that cannot be written ---------------------------------------------------------------

def lost(how):
    """A stream that can no longer be written."""
    if how == "full disk":
        return open("/dev/full", "w")
    if how == "terminal":
        master, slave = os.openpty()
        stream = os.fdopen(slave, "w", buffering=1)
        os.close(master)
        return stream
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def talk():
    """Print more than a buffer holds, with progress as in a training."""
    bar = tqdm(total=5, mininterval=0, miniters=1)
    for _ in range(5):
        bar.update(1)
        bar.write("x" * 5000)
        print("y" * 5000, flush=True)
        print("z" * 5000, file=sys.stderr)
    bar.close()


@pytest.mark.parametrize("how", ["reader", "full disk", "terminal"])
@pytest.mark.parametrize("name", ["stdout", "stderr", "both"])
def test_output_that_is_lost_ends_no_training(name, how, monkeypatch, capsys):
    """`| head`, `> /dev/full` or a closed terminal: a traceback, and hours of training gone."""
    streams = ["stdout", "stderr"] if name == "both" else [name]
    for each in streams:
        monkeypatch.setattr(sys, each, lost(how))
    ended = []

    def main():
        runtime.trains = True
        talk()
        ended.append(True)
    runtime.run_main(main)                                  # no exit code
    assert ended
    for each in streams:
        getattr(sys, each).close()                          # nothing is left that Python could lose
    monkeypatch.undo()
    if name == "stdout":
        said = "output can no longer be written" in capsys.readouterr().err
        assert said == (how != "reader")


@pytest.mark.parametrize("how, code", [("reader", 0), ("full disk", 2)])
def test_a_script_that_only_prints_has_failed_if_nobody_can_read_it(how, code, monkeypatch, capsys):
    """`analyze.py runs ... > full/table.md && rm -r runs`; or a traceback after `| head`."""
    stream = lost(how)
    monkeypatch.setattr(sys, "stdout", stream)
    try:
        runtime.run_main(lambda: print("table"))            # into a buffer, until the end
        ended = 0
    except SystemExit as stop:
        ended = stop.code
    stream.close()
    assert ended == code and "Traceback" not in capsys.readouterr().err


def test_closed_streams(monkeypatch):
    """`>&- 2>&-`: Python has None for them."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    runtime.run_main(talk)


# ---- A terminal, or a parent, that goes away -----------------------------------------------------

def test_a_lost_connection_asks_for_a_stop_unless_nohup_has_been_asked_for(monkeypatch):
    """A run over ssh that ends without a save; one under nohup that stops at the logout."""
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in runtime.watched_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert runtime.watched_signals() == [signal.SIGTERM, signal.SIGINT]
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_child_is_asked_to_stop_when_its_parent_is_killed():
    """Runs that go on after a kill -9 of torchrun, or of a table of runs."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, lambda *_: (os.write(write, b"asked"), os._exit(0)))
            runtime.end_with_parent()
            os.write(write, b"ready")
        time.sleep(30)
        os._exit(0)
    os.close(write)
    assert os.read(read, 5) == b"ready"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert os.read(read, 5) == b"asked"
    os.close(read)


# ---- Several processes ---------------------------------------------------------------------------

def rows_of(rank):
    """What a process brings to gather: rows that differ in type and shape."""
    floats = torch.rand(5, 4, generator=torch.Generator().manual_seed(rank))
    return {"floats": floats, "doubles": floats.double()[:2, None],
            "labels": torch.arange(4) + 10 * rank, "a column": floats[:, 1],
            "transposed": floats[:2].T}


def one_of_two(rank, folder):
    """Process `rank` of two: what it gets from the others goes to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
        timeout=timedelta(minutes=2))
    rt = Runtime(torch.device("cpu"), rank, 2)
    results = {name: runtime.gather(rows, rt) for name, rows in rows_of(rank).items()}
    results["sum"] = runtime.all_sum(torch.tensor([1.0, rank]), rt)
    results["max"] = torch.tensor(runtime.all_max([3 - rank, rank], rt))
    net = torch.nn.BatchNorm1d(2)
    net.running_mean.fill_(rank + 5.0)
    runtime.share_buffers(net, rt)
    results["buffer"] = net.running_mean
    prior = torch.tensor([0.5, 0.5])
    train_student.update_prior(prior, torch.tensor([rank, rank]), 1.0, 1, rt)   # 0s and 1s
    layer = torch.nn.Linear(2, 2)
    scaler = FiniteScaler(layer, torch.optim.SGD(layer.parameters(), lr=0.1, fused=True), rt)
    for p in layer.parameters():                # no backward pass: autograd's threads and a fork
        p.grad = torch.zeros_like(p)
    scaler.scale(torch.tensor(math.nan if rank == 0 else 1.0))
    scaler.unscale_()
    results |= {"prior": prior, "finite": scaler.update()}
    torch.save(results, f"{folder}/rank{rank}.pt")
    os._exit(0)                     # a fork: pytest's own ending is not this process's


@pytest.mark.parametrize("kind, text", [
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
    (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    (RuntimeError, "CUDA error: out of memory"),
    (RuntimeError, "NCCL error: unhandled cuda error: Cuda failure 2 'out of memory'")])
def test_too_little_memory_on_a_gpu_is_one_line_with_advice(kind, text, capsys):
    """A traceback of 60 lines on the first day with a GPU."""
    for training in (True, False):              # an analysis has no such flags
        def main(training=training):
            runtime.trains = training
            raise kind(text)
        with pytest.raises(SystemExit) as stop:
            runtime.run_main(main)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and text[:40] in error
        assert ("--micro-batch" in error) == ("--checkpointing" in error) == training


def test_another_runtime_error_is_a_bug_with_its_traceback():
    """Every error of torch called a lack of memory."""
    def main():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        runtime.run_main(main)


@pytest.mark.parametrize("fast, words", [(False, "--amp fp16 is faster"), (True, "")])
def test_a_gpu_without_bfloat16_is_told_what_is_faster(fast, words, monkeypatch, capsys):
    """Days in float32 on a T4, in silence."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(runtime, "use_gpu", lambda device: None)
    monkeypatch.setattr(runtime, "has_bf16", lambda device: fast)
    runtime.setup("cuda", "auto")
    error = capsys.readouterr().err
    assert words in error and bool(error) == (not fast)
    runtime.setup("cuda", "none")                                       # asked for
    runtime.setup("cuda")                                               # analyze.py has no --amp
    assert not capsys.readouterr().err


@pytest.mark.parametrize("device, world, words", [
    ("auto", 4, "process needs number 2, counted from 0; use --nproc_per_node=2"),
    ("cuda:2", 1, "process needs number 2, counted from 0; use --device cpu")])
def test_more_processes_than_gpus_are_told_how_many_there_are(device, world, words, monkeypatch):
    """The CPU recommended to somebody who has two GPUs and started four processes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("RANK", 2), ("LOCAL_RANK", 2), ("WORLD_SIZE", world)):
        monkeypatch.setenv(name, str(value if world > 1 else int(name == "WORLD_SIZE")))
    with pytest.raises(UserError, match=words):
        runtime.setup(device)


def test_a_gpu_that_cannot_compute_is_one_line(monkeypatch):
    """A traceback on a card that this build of torch has no kernels for."""
    def no_kernels(device):
        raise RuntimeError("CUDA error: no kernel image is available for execution\nCompile with")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", no_kernels)
    with pytest.raises(UserError, match=r"cuda:0 cannot be used \(.*no kernel image.*--device cpu"):
        runtime.setup("cuda")


@pytest.mark.parametrize("own, expected", [(None, [1]), ("2", [])])
def test_no_more_threads_than_the_quota_of_cpus(own, expected, monkeypatch):
    """64 threads for two CPUs' time; somebody's own number overruled."""
    asked = []
    monkeypatch.setattr(runtime, "cpus", lambda: 1)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    runtime.setup("cpu")
    assert asked == expected


def test_a_gpu_with_too_old_a_driver_is_not_passed_over_in_silence(monkeypatch, capsys):
    """The cpu recipe for days, on a machine with a GPU."""
    exists = os.path.exists
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidia0" or exists(path))
    assert runtime.setup("cpu").device.type == "cpu" and not capsys.readouterr().err   # asked for
    assert runtime.setup().device.type == "cpu"
    assert "driver too old for CUDA 13.0" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(os.path, "exists", exists)
    monkeypatch.setattr(runtime.shutil, "which", lambda name: {"nvidia-smi": "C:/smi"}.get(name))
    assert runtime.setup().device.type == "cpu"
    assert "(it is a build for CPUs)" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")                  # hidden on purpose
    assert runtime.setup().device.type == "cpu" and not capsys.readouterr().err


def test_one_process_is_alone():
    """A copy, or a call to a process group that is not there."""
    rows = torch.rand(3, 2)
    assert runtime.gather(rows, CPU) is rows and runtime.all_sum(rows, CPU) is rows
    assert runtime.all_max([3, 1], CPU) == [3, 1]
    runtime.barrier(CPU)
    with pytest.raises(UserError, match="all of us"):
        runtime.exit_together(UserError("all of us"), CPU)


def test_two_processes_gather_sum_and_share(tmp_path):
    """A rank's own rows first, labels turned into floats; a prior of one's own, a step that only
    the others take."""
    torch.multiprocessing.start_processes(one_of_two, args=(str(tmp_path),), nprocs=2,
                                          start_method="fork")
    zero, one = rows_of(0), rows_of(1)
    for rank in (0, 1):
        results = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert results.pop("sum").tolist() == [2, 1] and results.pop("max").tolist() == [3, 1]
        assert results.pop("buffer").tolist() == [5, 5]                 # rank 0's
        assert results.pop("prior").tolist() == pytest.approx([0.5, 0.5])
        assert results.pop("finite").item() == 0        # of rank 0's loss: neither takes the step
        assert results.keys() == zero.keys()
        for name, rows in results.items():
            assert rows.dtype == zero[name].dtype
            assert torch.equal(rows, torch.cat([zero[name], one[name]])), name
