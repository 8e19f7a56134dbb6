"""The tables of runs: their commands, which of them are run, and the numbers in the table."""
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_teacher
from conftest import ROOT, script
from engine.evaluation import COLUMNS, SKEWED_COLUMNS
from engine.runtime import STOP_SIGNALS, Runtime
from experiments import ablate
from experiments.ablate import Row
from finished_runs import Ended

CPU = Runtime(torch.device("cpu"))


@pytest.fixture
def ablation(monkeypatch, capsys, tmp_path):
    """f(*flags) -> what is printed, as lines, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)

    def ablation(*flags):
        capsys.readouterr()
        script(ablate, monkeypatch, *flags)
        return capsys.readouterr().out.splitlines()
    return ablation


def finish(folder, overall, teacher_accuracy=None):
    """Write the files of a finished run: CLS 10 points below the average, in all groups."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    heads = {"avg": dict.fromkeys(COLUMNS, overall),
             "cls": dict.fromkeys(COLUMNS, overall - 10)}
    (folder / "result.json").write_text(json.dumps(heads))
    (folder / "config.json").write_text("{}")
    log = [{"drw": False}, {"drw": True}]
    if teacher_accuracy:
        log = [{"drw": False, "teacher_accuracy": teacher_accuracy - 5},
               {"drw": False, "teacher_accuracy": teacher_accuracy + 5},
               {"drw": True, "teacher_accuracy": 99.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in log))


def run_of(*commands):
    """What ablate.run takes, for commands whose run folders are never written."""
    return {command: SimpleNamespace(out=f"runs/{i}") for i, command in enumerate(commands)}


# ---- Commands ------------------------------------------------------------------------------------

@pytest.mark.parametrize("table", ablate.TABLES)
def test_every_row_of_a_table_is_another_run(table, ablation):
    """A flag that was renamed, two rows that are the same run by mistake, a row without seeds."""
    lines = ablation(table, "--commands", "--seeds", 0, 1)
    students = [line.removeprefix("python ") for line in lines if "train_teacher" not in line]
    rows = ablate.TABLES[table]
    if table == "modes":
        rows = ablate.modes("runs/teacher")
    folders = {ablate.resolved(command, CPU).out for command in students}
    assert len(folders) == len(students) == 2 * len({row.command for row in rows})
    assert not Path("runs").exists()


def test_further_flags_go_to_every_run(ablation):
    lines = ablation("table2", "--commands", "--imb", 50, "--seeds", 3)
    assert len(lines) == len(ablate.TABLE2)
    assert all(line.endswith("--imb 50 --seed 3") for line in lines)


@pytest.mark.parametrize("flags", [
    "table5 --out=x", "table5 --seed 3", "table6 --model tiny", "table2 --teacher paco",
    "table2 --method vit", "table1 --beta=0", "modes --tokens 1",
    "main --tokens 1", "table2 --distill soft", "table5 --minutes 5", "table5 --teacher paco",
    "table1 --teacher paco"])
def test_flags_in_which_the_rows_differ_are_refused(flags, ablation, capsys):
    with pytest.raises(SystemExit) as stop:
        ablation(*flags.split())
    assert stop.value.code == 2 and "every run has its own" in capsys.readouterr().err


def test_the_teacher_of_the_modes_has_its_students_data(ablation):
    """Images that its students are tested on, or another imbalance than theirs."""
    teacher, *students = ablation("modes", "--holdout", "0.1", "--imb", "20", "--commands")
    program, flags = ablate.split(teacher.removeprefix("python "))
    args = train_teacher.parse(flags)
    assert (program, args.holdout, args.imb, args.epochs) == (ablate.TEACHER, 0.1, 20, 10)
    folder = train_teacher.teacher_args(flags, CPU).out
    assert sum(f"--teacher {folder} " in student for student in students) == len(students) - 1


# ---- Running and reading -------------------------------------------------------------------------

def test_what_is_missing_is_run_once_and_the_table_tells_heads_and_seeds_apart(ablation,
                                                                               monkeypatch):
    """A run that is trained twice; a row with another's folder, head, mean or spread."""
    rows = [Row("plain", "train_student.py --method vit", "avg", (12.5, 34.5)),
            Row("CLS", "train_student.py --teacher ldam", "cls", (None, None)),
            Row("both", "train_student.py --teacher ldam", "avg", (55.0,))]
    monkeypatch.setitem(ablate.TABLES, "table1", rows)
    monkeypatch.setattr(ablate, "PUBLISHED_FOR", [("cifar10", 10), ("shapes", 10)])
    ran = []

    def finish_run(command, args, jobs):
        ran.append(command)
        seed = int(command.split()[-1])
        if "vit" in command:
            finish(ablate.resolved(command, CPU).out, 40 + 2 * seed)
        else:
            finish(ablate.resolved(command, CPU).out, 70 + seed, teacher_accuracy=50)
        return Ended()
    monkeypatch.setattr(ablate, "begin", finish_run)
    flags = "table1", "--seeds", 0, 1, 1, "--dataset", "shapes", "--imb", 10

    assert ablation(*flags, "--show")[2:] == ["| plain | - | - | - | - | - | 0 | 34.5 |",
                                              "| CLS | - | - | - | - | - | 0 | - |",
                                              "| both | - | - | - | - | - | 0 | - |"]
    assert not ran
    table = ablation(*flags)
    assert len(ran) == len(set(ran)) == 4
    assert table[2:] == [f"| plain |{' 41.0 ± 1.4 |' * 4} - | 2 | 34.5 |",
                         f"| CLS |{' 60.5 ± 0.7 |' * 4} 50.0 ± 0.0 | 2 | - |",
                         f"| both |{' 70.5 ± 0.7 |' * 4} 50.0 ± 0.0 | 2 | - |"]
    assert ablation(*flags) == table and len(ran) == 4


def test_a_skewed_test_sets_table_has_its_balanced_accuracy():
    """Tables of a user's own images that rank by overall accuracy alone, which re-weighting
    lowers."""
    accuracies = dict(zip(SKEWED_COLUMNS, (61.0, 90.0, 95.0, 60.0, 30.0, 55.0)), teacher=None)
    table = ablate.as_markdown([(Row("ViT", ""), [accuracies])], None, "paper")
    header, _, line = table.split("\n")
    assert header == ("| | balanced | overall | head | mid | tail | macro F1 | teacher right "
                      "| seeds | paper |")
    assert line == "| ViT | 61.0 | 90.0 | 95.0 | 60.0 | 30.0 | 55.0 | - | 1 | - |"


def test_a_finished_run_of_other_images_is_named_before_anything_runs(ablation, monkeypatch,
                                                                      capsys):
    """Hours of the rows above it first; or the commands, which need no run, refused for it."""
    rows = [Row("plain", "train_student.py --method vit"), Row("both", "train_student.py")]
    monkeypatch.setitem(ablate.TABLES, "table1", rows)
    monkeypatch.setattr(ablate, "begin", lambda *_: 1 / 0)
    folder = ablate.resolved("train_student.py --holdout 0.1 --seed 0", CPU).out
    finish(folder, 50.0)
    monkeypatch.setattr(ablate, "retrained", lambda config: config.get("teachers"))
    for config, other in (('{"holdout": 0.2, "lr": 9, "eval_every": 9}', "--holdout, --lr"),
                          ('{"teachers": ["a"]}', "--teacher, which has been trained again")):
        Path(folder, "config.json").write_text(config)
        with pytest.raises(SystemExit) as stop:
            ablation("table1", "--holdout", 0.1)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and f"{folder} is a finished run with another {other}" in error
    assert len(ablation("table1", "--holdout", 0.1, "--commands")) == 2


PAPERS = ["table1", "table2", "table5", "table6"]


@pytest.mark.parametrize("flags, words", [
    *((f"{table} --recipe ours", f"{table} is about the paper's method")
      for table in [*PAPERS, "modes"]),
    ("modes --dataset imagenet_lt", "DeiT's loss for ten classes"),
    ("table1 --jobs 0", "--jobs is 1 or more")])
def test_what_a_table_cannot_be(flags, words, ablation, capsys):
    """Soft labels in a row that is called "hard"; a table that waits for ever."""
    with pytest.raises(SystemExit):
        ablation(*flags.split(), "--commands")
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("table, flags, column", [
    ("table2", "", 0), ("table2", "--imb 50", 1), ("table2", "--dataset cifar100 --imb 50", 3),
    ("table2", "--imb 20", None), ("table2", "--imb-type step", None),
    ("table2", "--holdout 0.1", None), ("modes", "--imb 1", 0), ("modes", "--imb 100", None)])
def test_published_numbers_stand_beside_their_own_data_only(table, flags, column):
    assert ablate.published_column(table, f"train_student.py {flags}") == column


@pytest.mark.parametrize("number, received, status, code", [
    (signal.SIGTERM, signal.SIGTERM, 99, 128 + 15), (signal.SIGINT, signal.SIGINT, 0, 128 + 2),
    pytest.param(signal.SIGKILL, signal.SIGTERM, 143, -9, marks=pytest.mark.skipif(
        not sys.platform.startswith("linux"), reason="prctl is Linux's"))])
def test_a_signal_reaches_the_run_and_ends_the_table(number, received, status, code, tmp_path):
    """A run that is killed where it should save; one that goes on without its table, in the way of
    the same table when it is begun again."""
    (tmp_path / "child.py").write_text(f"""
import signal, sys, time
def save(*_):
    time.sleep(0.3)
    print("saved", *sys.argv[1:])
    sys.exit({status})
signal.signal({int(received)}, save)
print("begun", flush=True)
time.sleep(60)
""")
    program = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
               "from types import SimpleNamespace as Settings\nfrom experiments import ablate\n"
               "ablate.run({'child.py --seed 0': Settings(out='runs/a')})\nprint('next run')")
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
                              cwd=tmp_path)
    assert parent.stdout.readline() == "python child.py --seed 0\n"
    assert parent.stdout.readline() == "begun\n"
    parent.send_signal(number)
    # Its end is the end of both: the child holds the pipe too.
    assert parent.communicate(timeout=30)[0] == "saved --seed 0 --resume\n"
    assert parent.returncode == code


def test_signals_that_come_while_the_run_begins_are_handed_on_once(tmp_path, monkeypatch):
    """Lost, if there is no run yet; or twice, which ends the run without a save."""
    sent = []

    class Child:
        def __init__(self, *_, **__):
            signal.raise_signal(signal.SIGTERM)             # before anybody knows this child

        def send_signal(self, number):
            sent.append(number)
            if len(sent) == 1:
                signal.raise_signal(signal.SIGINT)          # while the first is handed on

        def poll(self):
            return self.returncode
        returncode = 0
    monkeypatch.setattr(subprocess, "Popen", Child)
    with pytest.raises(SystemExit) as stop:
        ablate.run(run_of("child.py"))
    assert sent == [signal.SIGTERM, signal.SIGINT] and stop.value.code == 128 + signal.SIGTERM


def test_a_hangup_under_nohup_is_not_handed_on(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    class Child(Ended):
        def poll(self):
            signal.raise_signal(signal.SIGHUP)
            return 0
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: Child())
    try:
        ablate.run(run_of("child.py"))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_damaged_run_is_named(ablation, capsys, monkeypatch):
    """A traceback instead of the table."""
    row = Row("plain", "train_student.py --method vit --dataset shapes")
    monkeypatch.setitem(ablate.TABLES, "table1", [row])
    folder = Path(ablate.resolved(f"{row.command} --seed 0", CPU).out)
    finish(folder, 50.0)
    (folder / "result.json").write_text('{"avg": ')
    with pytest.raises(SystemExit) as stop:
        ablation("table1", "--show")
    assert stop.value.code == 2 and "result.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("end, status", [
    ("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 128 + 9), ("sys.exit(0)", 0)])
def test_a_run_that_fails_ends_the_table_as_it_does(end, status, tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(f"import os, sys\n{end}\n")
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    try:
        ablate.run(run_of("child.py"))
        code = 0
    except SystemExit as stop:
        code = stop.code
    assert code == status
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers


CHILD = """
import os, signal, sys, time
def save(*_):
    print("saved")
    sys.exit(143)
def begun():
    with open("log") as file:
        return file.read().count("begin")
signal.signal(signal.SIGTERM, save)
with open("log", "a") as file:
    file.write("begin\\n")
print(os.environ["OMP_NUM_THREADS"], flush=True)
for _ in range(300):                    # until another is there too
    if begun() > 1:
        break
    time.sleep(0.1)
if sys.argv[1] == "fails":
    sys.exit(3)
time.sleep(60 if sys.argv[1] == "long" else 0.5)
with open("log", "a") as file:
    file.write("end\\n")
"""


def test_jobs_are_run_at_a_time_and_no_more(tmp_path, monkeypatch):
    """One after the other in spite of --jobs, all at once, or each with all of the CPU's threads;
    one file for all that they print."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ablate, "cpus", lambda: 7)
    ablate.run(run_of(*(f"child.py {number}" for number in range(4))), jobs=2)
    running, most = 0, 0
    for line in (tmp_path / "log").read_text().split():
        running += 1 if line == "begin" else -1
        most = max(most, running)
    assert (running, most) == (0, 2)
    assert [(tmp_path / f"runs/{i}.txt").read_text() for i in range(4)] == ["3\n"] * 4


def test_a_job_that_fails_ends_the_others_as_a_signal_does(tmp_path, monkeypatch, capsys):
    """A table that trains on for hours, and is refused at its end; runs that are not saved."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        ablate.run(run_of("child.py long", "child.py fails", "child.py"), jobs=2)
    assert stop.value.code == 3 and "exit code 3: see runs/1.txt" in capsys.readouterr().err
    assert (tmp_path / "runs/0.txt").read_text().endswith("saved\n")
    assert not (tmp_path / "runs/2.txt").exists()


def test_a_signal_reaches_all_jobs_and_no_other_is_begun(tmp_path, monkeypatch):
    """One of two that trains on without its table; a run begun only to be stopped."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.chdir(tmp_path)
    sleep = ablate.time.sleep

    def sleep_then_signal(seconds):
        sleep(seconds)
        log = tmp_path / "log"
        if log.exists() and log.read_text().count("begin") == 2:
            log.write_text("")
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(ablate.time, "sleep", sleep_then_signal)
    with pytest.raises(SystemExit) as stop:
        ablate.run(run_of("child.py long", "child.py long --imb 2", "child.py"), jobs=2)
    assert stop.value.code == 128 + signal.SIGTERM
    assert [(tmp_path / f"runs/{i}.txt").read_text().split()[-1] for i in (0, 1)] == ["saved"] * 2
    assert not (tmp_path / "runs/2.txt").exists()


def test_runs_are_ended_when_another_cannot_be_begun(tmp_path, monkeypatch):
    """A full disk: a table that ends, and runs that train on without it and are in its way."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/1.txt").mkdir(parents=True)           # cannot be written
    with pytest.raises(OSError):
        ablate.run(run_of("child.py long", "child.py"), jobs=2)
    assert "end" not in (tmp_path / "runs/0.txt").read_text()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_jobs_that_need_cifar_find_it_downloaded(ablation, monkeypatch):
    """Each of them writes the same archive at the same time."""
    done = []
    monkeypatch.setattr(ablate, "load_data", lambda args, rt: done.append(args.dataset))

    def begin(command, args, jobs):
        done.append("begin")
        finish(args.out, 50.0)
        return Ended()
    monkeypatch.setattr(ablate, "begin", begin)
    ablation("table1", "--jobs", 2, "--dataset", "cifar100", "--recipe", "cpu")
    assert done == ["cifar100", *["begin"] * len(ablate.TABLE1)]


def test_crt_is_not_begun_beside_the_vit_that_it_trains_first(ablation, monkeypatch):
    """Two processes in one folder: the second is refused, and the table ends."""
    monkeypatch.setitem(ablate.TABLES, "table1", [row for row in ablate.TABLE2
                                                  if row.title in ("ViT", "ViT, cRT", "DeiT")])
    together = []

    class Child(Ended):
        def __init__(self, folder):
            self.folder, self.polled = folder, 0
            together.append([*(child.folder for child in alive), folder])
            alive.append(self)

        def poll(self):
            self.polled += 1
            if self.polled < 3:
                return None
            finish(self.folder, 50.0)
            alive.remove(self)
            return 0
    alive = []
    monkeypatch.setattr(ablate, "begin", lambda command, args, jobs: Child(args.out))
    ablation("table1", "--jobs", 3, "--dataset", "shapes", "--recipe", "cpu")
    kinds = [[Path(folder).name.split("_")[0] for folder in each] for each in together]
    assert kinds == [["vit"], ["vit", "deit"], ["vit-crt"]]


# Table 1: of CIFAR-10; the others also of CIFAR-10 at imbalance 50, CIFAR-100 at 100 and at 50.
PUBLISHED = {
    "table2": {"--method vit": (62.6, 70.1, 35.0, 39.0),
               "-m experiments.crt": (68.9, 74.5, 38.9, 42.2),
               "--method deit --teacher strong": (70.2, 77.5, 31.3, 39.1),
               "-m experiments.deit3": (59.1, 68.2, 38.1, 44.1),
               "": (84.8, 87.5, 52.0, 54.1), "--teacher paco": (87.5, 89.8, 55.6, 60.5)},
    "table1": {"--method deit --teacher strong": (70.2,),
               "--beta 0 --teacher-view weak --mixup 0 --cutmix 0": (54.2,),
               "--beta 0 --mixup 0 --cutmix 0": (69.6,), "--beta 0": (79.4,)},
    "table5": {"--method deit --teacher strong": (70.2, None, 31.3),
               "--beta 0 --teacher-rho 0": (84.5, None, 48.9),
               "--teacher-rho 0": (87.3, None, 54.5), "": (87.5, None, 55.6)},
    "table6": {"--model tiny": (80.8, None, 49.3), "--model small": (85.5, None, 54.3),
               "--model base": (87.5, None, 55.6)},
}


@pytest.mark.parametrize("table", PUBLISHED)
def test_rows_are_the_papers(table):
    """A number under another title, or another command's number: CutMix that goes on, SAM."""
    rows = {row.command.removeprefix("train_student.py").strip(): row.published
            for row in ablate.TABLES[table]}
    assert rows == PUBLISHED[table]


def test_rows_of_the_modes_are_what_their_titles_say():
    """The report's number under another mode; a student with labels that are mixed; a teacher with
    a loss or a flat minimum of its own."""
    rows = {row.title: (row.head, row.published) for row in ablate.modes("runs/t")}
    assert rows == {
        "none": ("avg", (67.69,)), "usual: soft, one token": ("avg", (68.85,)),
        "hard, one token": ("avg", (40.19,)),
        "hard, two tokens: class embedding": ("cls", (61.69,)),
        "hard, two tokens: distil embedding": ("dist", (8.07,)),
        "hard, two tokens: both": ("avg", (46.11,)),
        "soft, two tokens: class embedding": ("cls", ()),
        "soft, two tokens: distil embedding": ("dist", ()),
        "soft, two tokens: both": ("avg", (69.19,))}
    for row in ablate.modes("runs/t"):
        args = ablate.resolved(row.command, CPU)
        distilled = row.title != "none"
        assert (args.imb, args.mixup, args.cutmix, args.epochs) == (1, 0, 0, 20)
        assert args.method == ("deit" if distilled else "vit")
        if distilled:
            assert args.teacher == "runs/t"
            assert args.tokens == (1 if "one token" in row.title else 2)
            assert args.distill == ("soft" if "soft" in row.title else "hard")
        if args.distill == "soft":          # 0.9 CE + 0.1 KL / 10: 0.91 times what is trained here
            usual = "usual" in row.title
            assert args.tau == (3 if usual else 2)
            assert args.alpha == pytest.approx(0.01 / 0.91 if usual else 0.5, abs=2e-4)
    teacher = ablate.resolved(ablate.MODES_TEACHER, CPU)
    assert (teacher.imb, teacher.loss, teacher.rho) == (1, "ce", 0)
    assert teacher.epochs == teacher.drw_epoch == 10


@pytest.mark.parametrize("table", PAPERS)
def test_a_folders_table_on_a_cpu_is_of_the_papers_method(table):
    """Soft labels and logit adjustment, by ours, the default there, under the paper's titles."""
    _, rows = ablate.plan(table, ["--dataset", "folder", "--data-dir", "fish"], [0], CPU)
    assert all("--recipe cpu" in command for _, commands in rows for command in commands)
