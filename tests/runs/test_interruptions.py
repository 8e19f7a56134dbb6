"""A run that dies, is stopped, meets a full disk or a damaged file: what must survive, and what must be said."""
import argparse
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch

import engine
import run_folder
import train_student
import train_teacher
from conftest import ROOT, script

pytestmark = pytest.mark.usefixtures("no_pictures")
TEACHER = "--img-size 16 --epochs 3 --drw-epoch 2 --batch 32 --eval-every 2 --imb 4".split()            # 4 steps an epoch
PACO = "--loss paco --img-size 16 --epochs 3 --batch 32 --eval-every 2 --imb 4 --queue 50".split()
STUDENT = ("--model micro --epochs 3 --drw-epoch 2 --batch 32 --micro-batch 16 --patch-size 8 --eval-every 2 --ema 0.9 "
           "--drop-path 0.1 --imb 4").split()


@pytest.fixture(scope="module")
def whole_runs(no_pictures, tiny_cifar, tmp_path_factory):
    """{kind: (module, flags, folder)} of runs that nothing disturbed."""
    folder, runs = tmp_path_factory.mktemp("whole"), {}
    for kind, module, flags in (("teacher", train_teacher, TEACHER), ("paco", train_teacher, PACO),
                                ("student", train_student, ["--teacher", folder / "teacher", *STUDENT])):
        flags = ["--data-dir", tiny_cifar, *map(str, flags)]
        with pytest.MonkeyPatch.context() as patch:
            script(module, patch, *flags, "--out", folder / kind)
        runs[kind] = module, flags, folder / kind
    return runs


def assert_same_run(one, other):
    """Weights, averages, PaCo's queue, optimizer and log, to the bit; times aside."""
    a, b = (torch.load(folder / "last.pt", weights_only=True) for folder in (one, other))
    for part in ("model", "ema", "paco", "optimizer", "guard"):
        torch.testing.assert_close(a.get(part), b.get(part), rtol=0, atol=0, msg=lambda m, part=part: f"{part}: {m}")
    logs = [[{k: v for k, v in json.loads(line).items() if k not in ("seconds", "images_per_second")}
             for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, other)]
    assert logs[0] == logs[1]


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind, at, every", [("teacher", (2, 2), "1"), ("paco", (1, 2), "1"), ("student", (0, 2), "1"),
                                             ("student", (2, 2), "1"), ("student", (1, 1), "10m"), ("paco", (2, 1), "10m")])
def test_a_killed_and_resumed_run_is_bit_for_bit_the_same(kind, at, every, whole_runs, tmp_path, monkeypatch):
    """Killed inside an epoch, before and after the DRW switch, saved after each step or each epoch: momentum, EMA, PaCo's
    queue, sums of a half-done epoch or a random draw that are lost; a step that is done twice or left out."""
    module, flags, whole = whole_runs[kind]
    flags, steps, seed_step = [*flags, "--out", tmp_path / "run", "--save-every", every], [], engine.seed_step

    def dying(seed, epoch, step, rank):
        if (epoch, step) == at:
            raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(engine, "seed_step", lambda *key: dying(*key) or seed_step(*key))
        with pytest.raises(Killed):
            script(module, patch, *flags)
    monkeypatch.setattr(engine, "seed_step", lambda *key: steps.append(key[1:3]) or seed_step(*key))
    script(module, monkeypatch, *flags, "--resume")
    assert steps[0] == (at if every == "1" else (at[0], 0))
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_run_killed_between_the_last_step_and_the_end_of_its_epoch(kind, whole_runs, tmp_path, monkeypatch):
    """No step is left of the epoch that is resumed, only its evaluation and log line."""
    module, flags, whole = whole_runs[kind]
    flags = [*flags, "--out", tmp_path / "run", "--save-every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            script(module, patch, *flags)
    script(module, monkeypatch, *flags, "--resume")
    assert_same_run(whole, tmp_path / "run")


def start(module, flags, folder, *more):
    """A script in a process of its own."""
    command = [sys.executable, ROOT / f"{module.__name__}.py", *flags, "--out", folder, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def wait_until(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition() and process.poll() is None:
        assert time.time() < end, "waited in vain"
        time.sleep(0.01)


def test_a_signal_saves_after_the_step_and_ends_with_its_code(whole_runs, tmp_path):
    """The default handlers (nothing saved, or a traceback), or a checkpoint from which the run ends elsewhere."""
    module, flags, _ = whole_runs["student"]
    flags = [*flags, "--epochs", "300", "--drw-epoch", "200", "--eval-every", "1000"]
    runs = {number: tmp_path / str(int(number)) for number in (signal.SIGTERM, signal.SIGINT)}
    for (number, run), process in [(item, start(module, flags, item[1])) for item in runs.items()]:
        wait_until((run / "last.pt").exists, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number, err
        assert "--resume goes on from there" in out and err.count("\n") == 1 and "saving after this step" in err
        state = torch.load(run / "last.pt", weights_only=True)
        assert 0 < state["epoch"] < 299 and not (run / "result.json").exists()


def test_a_second_signal_ends_a_run_at_once(monkeypatch):
    """A step that never ends; and two signals of one second, as torchrun sends them, must count as one."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(engine, "stop_signal", 0)
    engine.note_signal(signal.SIGTERM, None)
    engine.note_signal(signal.SIGTERM, None)
    assert ended == [] and engine.stop_signal == signal.SIGTERM
    monkeypatch.setattr(engine, "stop_asked_at", time.time() - 2)
    engine.note_signal(signal.SIGINT, None)
    assert ended == [128 + signal.SIGINT]


def test_handlers_are_put_back_after_a_run(whole_runs, tmp_path, monkeypatch):
    """A program that imports a script would lose its own Ctrl-C."""
    module, flags, _ = whole_runs["teacher"]
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ours = {number: signal.getsignal(number) for number in before}
        script(module, monkeypatch, *flags, "--out", tmp_path / "run", "--epochs", "1")
        assert {number: signal.getsignal(number) for number in before} == ours
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_torchruns_restart_resumes_by_itself(whole_runs, tmp_path, monkeypatch, capsys):
    """A restarted worker has the same command line, without --resume, perhaps with --overwrite: it must not begin again."""
    module, flags, whole = whole_runs["teacher"]
    flags, seed_step = [*flags, "--out", tmp_path / "run", "--save-every", "1", "--overwrite"], engine.seed_step
    with monkeypatch.context() as patch:
        patch.setattr(engine, "seed_step", lambda *key: 1 / (key[1:3] != (1, 1)) and seed_step(*key))
        with pytest.raises(ZeroDivisionError):
            script(module, patch, *flags)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    script(module, monkeypatch, *flags)
    assert_same_run(whole, tmp_path / "run")


def test_a_signal_of_the_teachers_run_is_not_forgotten_by_the_students(monkeypatch, tmp_path):
    """A signal in the teacher's last evaluation: the student must not begin its hours of training."""
    run = run_folder.Run(str(tmp_path), argparse.Namespace(save_every="1", resume=False, overwrite=False),
                     engine.Runtime(torch.device("cpu")))
    before = {number: signal.getsignal(number) for number in engine.STOP_SIGNALS}
    monkeypatch.setattr(engine, "stop_signal", signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            run.watch_signals()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stopped.value.code == 128 + signal.SIGTERM


def test_another_batch_by_force_begins_the_half_done_epoch_again(whole_runs, tmp_path, monkeypatch, capsys):
    """Steps counted in batches of another size: images left out, or a loss divided by the wrong number of steps."""
    module, flags, _ = whole_runs["teacher"]
    flags, steps, seed_step = [*flags, "--out", tmp_path / "run", "--save-every", "1"], [], engine.seed_step
    with monkeypatch.context() as patch:
        patch.setattr(engine, "seed_step", lambda *key: 1 / (key[1:3] != (1, 3)) and seed_step(*key))
        with pytest.raises(ZeroDivisionError):
            script(module, patch, *flags)
    monkeypatch.setattr(engine, "seed_step", lambda *key: steps.append(key[1:3]) or seed_step(*key))
    script(module, monkeypatch, *flags, "--resume", "--force", "--batch", "64")
    assert steps[0] == (1, 0) and "--batch 32 -> 64" in capsys.readouterr().out


def test_nothing_to_resume_is_said(whole_runs, tmp_path, monkeypatch, capsys):
    """A mistyped folder would begin a new run without a word."""
    module, flags, _ = whole_runs["teacher"]
    script(module, monkeypatch, *flags, "--epochs", "1", "--out", tmp_path / "elsewhere", "--resume")
    assert "nothing to resume in" in capsys.readouterr().out


def damaged(data, how):
    half = len(data) // 2
    return {"truncated": data[:half], "empty": b"", "one bit": data[:half] + bytes([data[half] ^ 1]) + data[half + 1:]}[how]


@pytest.mark.parametrize("how", ["truncated", "empty", "one bit", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(how, whole_runs, tmp_path, monkeypatch, capsys):
    """A run that cannot go on although an older checkpoint is there, or that goes on from it to another end."""
    module, flags, whole = whole_runs["teacher"]
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    last = tmp_path / "run" / "last.pt"
    last.unlink() if how == "missing" else last.write_bytes(damaged(last.read_bytes(), how))
    script(module, monkeypatch, *flags, "--out", tmp_path / "run", "--resume")
    assert "previous.pt" in capsys.readouterr().err
    assert_same_run(whole, tmp_path / "run")


def test_two_damaged_checkpoints_are_refused_in_one_line(whole_runs, tmp_path, monkeypatch, capsys):
    """And nothing is begun anew over them."""
    module, flags, whole = whole_runs["teacher"]
    shutil.copytree(whole, tmp_path / "run")
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "run" / name).write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit) as stopped:
        script(module, monkeypatch, *flags, "--out", tmp_path / "run", "--resume")
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert (tmp_path / "run" / "last.pt").read_bytes() == b"no checkpoint"


def test_a_finished_run_says_so_and_is_left_alone(whole_runs, tmp_path, monkeypatch, capsys):
    module, flags, whole = whole_runs["student"]
    before = {f.name: f.read_bytes() for f in whole.iterdir()}
    script(module, monkeypatch, *flags, "--out", whole, "--resume")
    out = capsys.readouterr().out
    assert "is finished (3 epochs)" in out and "dist" in out
    assert {f.name: f.read_bytes() for f in whole.iterdir()} == before


def test_changed_settings_are_refused_with_their_list_unless_forced(whole_runs, tmp_path, monkeypatch, capsys):
    """A longer run is the usual reason: --force goes on from where it was, and says what has changed."""
    module, flags, whole = whole_runs["teacher"]
    shutil.copytree(whole, tmp_path / "run")
    flags = [*flags, "--out", tmp_path / "run", "--resume", "--epochs", "4", "--lr", "0.05"]
    with pytest.raises(SystemExit):
        script(module, monkeypatch, *flags)
    err = capsys.readouterr().err
    assert "--epochs 3 -> 4" in err and "--lr 0.1 -> 0.05" in err and "--force" in err
    script(module, monkeypatch, *flags, "--force")
    assert "--epochs 3 -> 4" in capsys.readouterr().out
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 4


def test_a_full_disk_ends_in_one_line_with_the_last_checkpoint_intact(tmp_path):
    """torch.save turns what the system says into a RuntimeError of many lines; half a file must not replace a whole one."""
    path = tmp_path / "last.pt"
    run_folder.save_checkpoint(path, model={"w": torch.zeros(1000)}, config={})
    before = path.read_bytes()
    code = f"""
import resource, torch, engine, run_folder
for limit in (1_000, 100_000, 1_000_000):                                 # bytes of the file at which the disk is full
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, 1_000_000))
    try:
        engine.run_main(lambda: run_folder.save_checkpoint({str(path)!r}, "old", model=dict(w=torch.zeros(10 ** 6))))
    except SystemExit as stopped:
        print(stopped.code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["2"] * 3 and len(lines := done.stderr.splitlines()) == 3, done.stderr
    assert all(line.startswith(f"error: cannot write {path}") and "intact" in line for line in lines)
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["last.pt"]


def test_a_read_only_folder_ends_in_one_line_before_anything_else(whole_runs, tmp_path, monkeypatch, capsys):
    """The teacher trained for hours, and then no place for the student."""
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.access(tmp_path / "closed", os.W_OK):                           # root may write anywhere
        monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(engine, "load_data", lambda *_: pytest.fail("data were loaded first"))
    module, flags, _ = whole_runs["student"]
    with pytest.raises(SystemExit) as stopped:
        script(module, monkeypatch, *flags, "--out", tmp_path / "closed" / "runs" / "run")
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and "cannot be written" in err


def test_a_vanished_run_folder_ends_in_one_line(whole_runs, tmp_path, monkeypatch, capsys):
    module, flags, _ = whole_runs["teacher"]
    seed_step = engine.seed_step

    def vanish(*key):
        if key[1:3] == (1, 0):
            shutil.rmtree(tmp_path / "run")
        seed_step(*key)
    monkeypatch.setattr(engine, "seed_step", vanish)
    with pytest.raises(SystemExit) as stopped:
        script(module, monkeypatch, *flags, "--out", tmp_path / "run")
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and str(tmp_path / "run") in err


@pytest.mark.slow
def test_300_torn_checkpoints_are_refused_or_whole(whole_runs, tmp_path):
    """Cut, changed in a byte, a block of zeros, two halves of different files: never other weights, never another error."""
    draw, path = random.Random(0), tmp_path / "last.pt"
    data = (whole_runs["student"][2] / "last.pt").read_bytes()
    other = (whole_runs["student"][2] / "previous.pt").read_bytes()
    whole, refused = torch.load(io.BytesIO(data), weights_only=True), 0
    for i in range(300):
        torn, at = bytearray(data), draw.randrange(len(data))
        if i % 4 == 0:
            torn = torn[:at]
        elif i % 4 == 1:
            torn[at] ^= 1 << draw.randrange(8)
        elif i % 4 == 2:
            torn[at:at + 4096] = bytes(len(torn[at:at + 4096]))
        else:
            torn = torn[:at] + other[at:]
        path.write_bytes(torn)
        try:
            state = run_folder.load_checkpoint(str(path))
        except engine.UserError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        torch.testing.assert_close(state["model"], whole["model"], rtol=0, atol=0)
        torch.testing.assert_close(state["optimizer"], whole["optimizer"], rtol=0, atol=0)
    print(f"{refused} of 300 refused")
    assert refused > 250


LONGER = {"teacher": ["--img-size", "32", "--batch", "16"], "paco": ["--img-size", "32", "--batch", "16"],
          "student": ["--batch", "16", "--micro-batch", "8"]}             # so that a kill or a signal comes before the end


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["teacher", "paco", "student"])
def test_killed_at_20_random_moments(kind, whole_runs, tmp_path):
    """kill -9 while starting, training, evaluating or writing: every restart goes on, to the undisturbed run's end."""
    module, flags, _ = whole_runs[kind]
    epochs = {"teacher": 80, "paco": 40, "student": 200}[kind]              # enough for 20 kills
    flags = [*flags, *LONGER[kind], "--epochs", str(epochs), *([] if kind == "paco" else ["--drw-epoch", "20"])]
    began, undisturbed = time.time(), start(module, flags, tmp_path / "whole")
    wait_until((tmp_path / "whole" / "last.pt").exists, undisturbed)
    first_epoch = time.time() - began                                       # seconds on this machine, with what else it does
    assert undisturbed.wait(600) == 0
    draw, kills, killed_at = random.Random(0), 0, []
    while kills < 20:
        process = start(module, flags, tmp_path / "run", "--save-every", "1", "--resume")
        time.sleep(draw.uniform(0.5, 2) * first_epoch)
        assert process.poll() is None, f"it ended after {kills} kills: {process.communicate()}"
        process.kill()
        process.communicate()
        kills += 1
        with suppress(engine.UserError):
            state = run_folder.load_checkpoint(str(tmp_path / "run"))
            killed_at.append((state["epoch"], state["step"]))
    assert killed_at == sorted(killed_at) and len(set(killed_at)) > 5     # it got on between the kills
    print(kind, "killed at", killed_at)
    process = start(module, flags, tmp_path / "run", "--save-every", "1", "--resume")
    assert process.wait(600) == 0, process.communicate()
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_two_processes_stopped_by_a_signal_to_torchrun_go_on_as_if_nothing_had_been(whole_runs, tmp_path):
    """A process that ends before the other has saved; sums of one process taken for both's; buffers that differ."""
    module, flags, _ = whole_runs["teacher"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d",
               "--rdzv-endpoint=localhost:0", ROOT / f"{module.__name__}.py", *flags, *LONGER["teacher"], "--epochs", "30",
               "--drw-epoch", "20"]

    def begin(folder, *more):
        return subprocess.Popen(list(map(str, [*command, "--out", folder, *more])), cwd=ROOT, stderr=subprocess.PIPE, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
    undisturbed = begin(tmp_path / "whole")
    assert undisturbed.wait(600) == 0
    stopped = begin(tmp_path / "run")
    wait_until(lambda: (tmp_path / "run" / "last.pt").exists(), stopped)
    stopped.send_signal(signal.SIGTERM)
    out, err = stopped.communicate(timeout=120)
    assert "--resume goes on from there" in out, err
    state = run_folder.load_checkpoint(str(tmp_path / "run"))
    assert 0 < state["epoch"] < 29 and len(state["sums"]) == 2
    resumed = begin(tmp_path / "run", "--resume")
    assert resumed.wait(600) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
