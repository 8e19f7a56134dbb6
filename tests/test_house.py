"""The house: which files there are, who imports whom, and how long the main path may become."""
import ast
import io
import tokenize

import pytest

from conftest import ROOT

CONCEPTS = {"vit", "resnet", "sam", "losses", "augment", "data_lt"}
SCRIPTS = {"train_teacher", "train_student", "analyze"}
MAIN_PATH = ("data_lt.py", "augment.py", "vit.py", "losses.py", "train_student.py")
MAY_IMPORT = {  # a file's place -> what it may import of the project
    "images": {"images"},
    "concept": {"images"},
    "engine": {"images", "concept", "engine"},
    "train_teacher": {"images", "concept", "engine"},
    "train_student": {"images", "concept", "engine", "train_teacher", "analyze"},
    "analysis": {"images", "concept", "engine", "analysis"},
    "analyze": {"images", "concept", "engine", "analysis"},
    "experiments": {"images", "concept", "engine", "train_teacher", "train_student", "experiments"},
}
FILES = [f for f in ROOT.rglob("*.py")
         if not any(part in ("tests", "runs", "data") or part.startswith((".", "venv"))
                    for part in f.relative_to(ROOT).parts)]


def place(module):
    """Where a module of the project lives: a folder's name, "concept", a script's name, or None."""
    top = module.split(".")[0]
    if top in CONCEPTS:
        return "concept"
    return top if top in MAY_IMPORT else None


def module_name(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def imports(file):
    """Modules of the project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    known = {module_name(f) for f in FILES}
    return {name for name in found if name in known}


def code_tokens(file):
    """Python tokens without comments and line breaks; a docstring counts as one."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
               tokenize.ENDMARKER, tokenize.ENCODING}
    tokens = tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline)
    return sum(token.type not in skipped for token in tokens)


def test_the_top_level_is_the_nine_files():
    assert {f.stem for f in ROOT.glob("*.py")} == CONCEPTS | SCRIPTS
    assert len(FILES) > 40                              # else the tests below look at nothing


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_go_down_only(file):
    """A concept that knows a run, an engine that knows a script, an analysis that trains."""
    allowed = MAY_IMPORT[place(module_name(file))]
    if module_name(file) in CONCEPTS:
        assert not any(place(name) == "concept" for name in imports(file))
    for name in imports(file):
        assert place(name) in allowed, f"{module_name(file)} imports {name}"


def test_there_are_no_circles():
    """train_student's late import of analyze for a picture is none: analyze imports no script."""
    graph, done = {module_name(f): imports(f) for f in FILES}, set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in graph[name]:
                visit(other, [*path, name])
            done.add(name)
    for name in graph:
        visit(name, [])


def test_the_main_path_stays_short():
    """1,300 lines and 11,000 tokens: an evening's reading. Take away before you add."""
    files = [ROOT / name for name in MAIN_PATH]
    assert sum(len(f.read_text(encoding="utf-8").splitlines()) for f in files) <= 1300
    assert sum(map(code_tokens, files)) <= 11000


@pytest.mark.parametrize("name", ["train_student.py", "train_teacher.py"])
def test_the_loop_begins_before_line_150(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    loops = [i for i, line in enumerate(lines, 1) if "for epoch in range(run.start_epoch" in line]
    assert loops[0] < 150


def test_no_line_is_longer_than_100_columns():
    files = [*FILES, *(ROOT / "tests").rglob("*.py")]
    long = [f"{f.relative_to(ROOT)}:{i}" for f in files
            for i, line in enumerate(f.read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > 100]
    assert not long
