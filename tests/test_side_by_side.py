"""Files side by side (side_by_side.py) give pytest's own results."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import os, warnings, pytest
def test_passes(): assert os.getpid() != int(os.environ["FIRST"]) or os.environ["ALONE"]
def test_fails(): print("said before"); assert not "this"
def test_warns(): warnings.warn("look here")
@pytest.mark.skip
def test_skipped(): pass
def test_without(fixture_that_is_not_there): pass
def test_dies():
    if os.environ.get("DIES"): os._exit(9)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
def test_files_side_by_side_are_reported_as_one_after_the_other(tmp_path):
    """A failure, a warning or what a test printed that is lost on the way; a test that is not run, or in no worker; a worker
    that dies and takes its tests along, and nobody says so."""
    for name in "abc":
        (tmp_path / f"test_{name}.py").write_text(TESTS)

    def run(workers, dies=""):
        alone = "1" if workers == 1 else ""
        code = "import os, sys, pytest; os.environ['FIRST'] = str(os.getpid()); sys.exit(pytest.main(sys.argv[1:]))"
        return subprocess.run([sys.executable, "-c", code, "-q", "-p", "side_by_side", "-p", "no:cacheprovider", "--workers",
                               str(workers), tmp_path], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                              env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "DIES": dies, "ALONE": alone})
    together, alone = run(2), run(1)
    for done in (together, alone):
        assert done.returncode == 1 and "3 failed, 9 passed, 3 skipped, 3 warnings, 3 errors" in done.stdout, done.stdout
        assert done.stdout.count("look here") >= 3 and done.stdout.count("said before") >= 3
    died = run(2, "yes")
    assert died.returncode == 3 and "has died (9)" in died.stdout + died.stderr
