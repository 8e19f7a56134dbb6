"""README.md and results/*.md: every command runs, every link leads somewhere, it is short.

Commands in the docstrings of the scripts and in experiments/ are tried, too.
"""
import ast
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import analyze
import augment
import losses
import resnet
import train_student
import train_teacher
import vit
from conftest import ROOT
from engine.runtime import Runtime, run_main
from engine.settings import flag
from experiments import (ablate, bench, crt, deit3, fast_parts, minutes, one_gpu, resnet18,
                         runs_table, steps)

LONG = ["README.md", "results/README.md", "results/jpeg_copy.md"]       # many commands and links
DOCUMENTS = [*LONG, "results/departures.md", "results/interruptions.md"]
TRAINING = {ablate.STUDENT: train_student, ablate.TEACHER: train_teacher, ablate.CRT: crt,
            ablate.DEIT3: deit3}
SCRIPTS = {"analyze.py": analyze, "-m experiments.ablate": ablate, "-m experiments.bench": bench,
           "-m experiments.runs_table": runs_table, "-m experiments.minutes": minutes,
           "-m experiments.resnet18": resnet18, "-m experiments.one_gpu": one_gpu,
           "-m experiments.steps": steps, "-m experiments.fast_parts": fast_parts}
COMMAND = re.compile(r"(?:OMP_NUM_THREADS=\S+ )?(?:python3? |torchrun )")


# ---- What documents contain ----------------------------------------------------------------------

def code_blocks(text):
    """The lines of the fenced code blocks of a document, without comments."""
    lines = []
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            lines += [part.partition(" #")[0].strip() for part in line.split("&&")]
    return lines


def commands_in_tables(text):
    """Commands in the code spans of a document's text and tables.

    Of a column headed "... with `FLAGS`", these are added; of one headed "add to `python SCRIPT`",
    the spans follow it; of one headed "flags", they are a student's.
    """
    commands, headers = [], None
    for line in re.sub(r"^```.*?^```", "", text, flags=re.M | re.S).splitlines():
        if not line.startswith("|"):
            headers = None
            commands += re.findall(r"`([^`]+)`", line)
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if headers is None:
            headers = cells
            continue
        for header, cell in zip(headers, cells):
            added = re.search(r"with `([^`]+)`", header)
            program = re.fullmatch(r"(?:add to )?`(python [^`]+)`", header)
            for span in re.findall(r"`([^`]+)`", cell):
                if program:
                    span = f"{program[1]} {span}"
                elif header.startswith("flags") and span.startswith("--"):
                    span = f"{ablate.STUDENT} {span}"
                if added and is_command(span):
                    span = f"{span} {added[1]}"
                commands.append(span)
    return commands


def is_command(text):
    """With `python` before it or, in tables, without; `analyze.py` alone is only a file's name."""
    without = re.match(r"train_(student|teacher)\.py|analyze\.py ", text)
    return bool(COMMAND.match(text) or without)


def normal(command):
    """A command without "python", with spaces where a document leaves several."""
    command = re.sub(r"^OMP_NUM_THREADS=\S+ ", "", command)
    return re.sub(r"^python3? ", "", command)


def commands_of(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    found = [*code_blocks(text), *commands_in_tables(text)]
    return list(dict.fromkeys(normal(command) for command in found if is_command(command)))


def commands_of_docstrings():
    """Indented commands of the module docstrings; after two spaces or more, what they do."""
    files = [*ROOT.glob("*.py"), *(ROOT / "experiments").glob("*.py")]
    commands = []
    for file in files:
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        for line in text.splitlines():
            if line.startswith("    ") and COMMAND.match(line.strip()):
                commands.append(normal(re.split(r" {2,}", line.strip())[0]))
    return list(dict.fromkeys(commands))


# ---- Trying a command ----------------------------------------------------------------------------

def split(command):
    """(program, flags, processes) of a command, torchrun's own flags left out."""
    processes, words = 1, shlex.split(command)
    if words[0] == "torchrun":
        for number in re.findall(r"--(?:nnodes|nproc.per.node)[= ](\d+)", command):
            processes *= int(number)
        while not words[0].endswith(".py"):
            del words[0]
    n = 2 if words[0] == "-m" else 1
    return " ".join(words[:n]), words[n:], processes


def try_command(command, monkeypatch):
    """Parse a command's flags and resolve its settings, as far as that goes without training."""
    program, flags, processes = split(command)
    monkeypatch.setattr(sys, "argv", [program, *flags])
    if "--help" in flags:
        with pytest.raises(SystemExit) as stop:
            (TRAINING | SCRIPTS)[program].main()
        assert stop.value.code == 0
    elif program in TRAINING:
        make_images(flags)
        rt = Runtime(torch.device("cpu"), 0, processes)
        assert ablate.resolved(shlex.join([*program.split(), *flags]), rt).out
    elif program == "analyze.py":
        analyze.parse()
    elif program in ("-m experiments.ablate", "-m experiments.one_gpu"):
        sys.argv.append("--commands")
        run_main(SCRIPTS[program].main)
    elif program == "-m experiments.steps":
        monkeypatch.setattr(steps, "matmul_peak", lambda rt: 1e12)
        monkeypatch.setattr(steps, "measure_step", lambda *_: "")
        run_main(steps.main)
    elif program in ("-m experiments.resnet18", "-m experiments.fast_parts"):
        make_images(flags)
        args, rt = train_teacher.parse(flags), Runtime(torch.device("cpu"))
        assert SCRIPTS[program].resolved(args, rt).out
    elif program == "-m experiments.minutes":
        make_images(flags)
        sys.argv.append("--show")
        run_main(minutes.main)
    elif program == "-m experiments.bench":
        for section in bench.SECTIONS:
            monkeypatch.setitem(bench.SECTIONS, section, lambda rt, rounds: None)
        run_main(bench.main)
    elif program == "-m experiments.runs_table":
        runs_table.main(flags)
    else:
        known = ("-m pytest", "-m pip", "-m venv", "-c")
        assert program in known, f"{command}: no such program"


def make_images(flags):
    """A folder of images where a command names one of its own."""
    words = shlex.split(shlex.join(flags).replace("=", " "))
    if "folder" not in words:
        return
    root = Path(words[words.index("--data-dir") + 1])
    assert not root.is_absolute()
    splits = [root] if "--holdout" in words else [root / "train", root / "test"]
    for folder in splits:
        for name in "ab":
            (folder / name).mkdir(parents=True, exist_ok=True)
            for i in range(5):
                color = (10 * i, ord(name), len(folder.name))           # no image is there twice
                Image.new("RGB", (40, 40), color).save(folder / name / f"{i}.png")


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    """Nothing that a command writes lands in the project."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_of_the_documents_is_understood(document, monkeypatch, capsys):
    """A flag, a method, a recipe or a file that was renamed, but not there."""
    commands = commands_of(document)
    if document in LONG:
        programs = {split(command)[0] for command in commands}
        assert {"train_student.py", "train_teacher.py", "analyze.py"} <= programs
        assert len(commands) >= 8
    for command in commands:
        try_or_fail(command, monkeypatch, capsys)


def test_every_command_of_the_docstrings_is_understood(monkeypatch, capsys):
    """As above, at the top of the scripts."""
    commands = commands_of_docstrings()
    assert {"train_student.py --dataset shapes", "train_teacher.py --dataset shapes"} < set(
        commands)
    for command in commands:
        try_or_fail(command, monkeypatch, capsys)


def try_or_fail(command, monkeypatch, capsys):
    try:
        try_command(command, monkeypatch)
    except (Exception, SystemExit) as error:
        pytest.fail(f"{command}: {error!r} {capsys.readouterr().err}")


def flags_of(program, monkeypatch, capsys):
    """The flags that a script's --help names."""
    module = (TRAINING | SCRIPTS)[program]
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit):
        module.main()
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_of_the_documents_exists(document, monkeypatch, capsys):
    """A flag that is named in a sentence or a table cell without its command."""
    known = {"--no-logit-adjustment", "--no-mix-drw", "--nproc_per_node", "--nnodes",
             "--max-restarts", "--rdzv-backend", "--rdzv-endpoint"}
    for program in [*TRAINING, *SCRIPTS]:
        known |= flags_of(program, monkeypatch, capsys)
    named = re.findall(r"(?<![\w-])--[a-z][\w-]*", (ROOT / document).read_text(encoding="utf-8"))
    assert named and set(named) <= known


def test_the_loop_that_readme_shows_is_the_scripts():
    """A function that was renamed, other arguments or results, other logits than the script's."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"```python\n(# the training loop.*?)```", text, re.S)[1]
    torch.manual_seed(0)
    student = vit.MODELS["micro"](img_size=32, patch_size=8, num_classes=4, distilled=True)
    before = [parameter.clone() for parameter in student.parameters()]
    scope = dict(
        augment=augment, losses=losses, student=student, teacher=resnet.resnet32(4).eval(),
        batches=[(torch.randint(0, 256, (8, 3, 32, 32)).byte(), torch.arange(8) % 4)] * 2,
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1), counts=torch.tensor([8, 4, 2, 1]),
        num_classes=4, epoch=3, drw_epoch=3)
    exec(shown, scope)
    assert scope["target"].shape == scope["f_d"].shape == (8, 4) and scope["w"].shape == (4,)
    expected, *_ = losses.distillation_loss(
        scope["f_c"], scope["f_d"], scope["target"], scope["y_t"], 0.5,
        losses.class_balanced_weights([8, 4, 2, 1]))
    assert scope["loss"] == expected and torch.isfinite(expected)
    assert not any(torch.equal(a, b) for a, b in zip(before, student.parameters()))


# ---- Links ---------------------------------------------------------------------------------------

def anchors(text):
    """The anchors that GitHub gives to a document's headings."""
    names = []
    for heading in re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S),
                              re.M):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")
        names.append(f"{name}-{names.count(name)}" if name in names else name)
    return names


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document):
    """A file or a heading that was moved or renamed."""
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[\w.-]+\]: (\S+)", text, re.M)
    links += re.findall(r'<img [^>]*src="([^"]+)"', text)
    links = [link for link in links if not re.match(r"https?:|mailto:", link)]
    assert links or document not in LONG
    for link in links:
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    named = re.findall(r"\]\[([\w.-]+)\]", prose)
    assert set(named) <= set(re.findall(r"^\[([\w.-]+)\]:", text, re.M))


# ---- Length --------------------------------------------------------------------------------------

def test_the_readme_is_short():
    """An explanation that belongs elsewhere: 210 lines and 2,500 words are a few minutes."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 210 and len(text.split()) <= 2500


@pytest.mark.parametrize("module", [train_student, train_teacher])
def test_help_fits_on_two_screens_and_names_every_setting_once(module, capsys):
    """A setting without a flag, one that is explained twice, or three pages of help."""
    with pytest.raises(SystemExit) as stop:
        module.parse(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and len(text.splitlines()) <= 100
    explained = re.findall(r"^  (--[\w-]+)", text, re.M)
    assert len(set(explained)) == len(explained)
    assert {flag(setting.name) for setting in module.SETTINGS} <= set(explained)
