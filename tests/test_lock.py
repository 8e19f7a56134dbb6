"""engine/lock.py: one process at a time in a run's folder."""
import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from engine import lock
from engine.lock import Lock


def in_a_child(action):
    """Process id of a fork that calls action() and then sleeps; returns once it has."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        action()
        os.write(write, b"done")
        signal.pause()
    os.close(write)
    assert os.read(read, 4) == b"done"
    os.close(read)
    return child


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.fixture
def owner(tmp_path):
    """(run folder, process id of its owner)"""
    folder = str(tmp_path / "runs" / "run")
    child = in_a_child(lambda: Lock(folder).take())
    yield folder, child
    try:
        kill(child)
    except ProcessLookupError:
        pass


def test_a_second_process_learns_who_owns_the_folder(owner):
    """Two processes that write one log; a message that does not say which to wait for."""
    folder, child = owner
    mine = Lock(folder)
    assert not mine.take() and not mine.take()
    assert mine.holder().startswith(f"process {child} on {os.uname().nodename} since 20")
    mine.release()
    assert os.path.exists(f"{folder}/lock") and not Lock(folder).take()     # is still the owner's


def test_a_killed_owner_leaves_no_lock(owner):
    """A folder that nobody can train in after kill -9, because a file is left."""
    folder, child = owner
    kill(child)
    assert os.path.exists(f"{folder}/lock")
    mine = Lock(folder)
    assert mine.take() and mine.holder().startswith(f"process {os.getpid()} ")
    mine.release()
    assert not os.path.exists(f"{folder}/lock")


def test_who_may_write_in_the_folder_may_lock_it(tmp_path):
    """A group's folder in which a run of one member is nobody else's to resume."""
    mask = os.umask(0o022)
    try:
        tmp_path.chmod(0o2775)
        mine = Lock(str(tmp_path))
        assert mine.take() and os.stat(mine.path).st_mode & 0o777 == 0o664
        mine.release()
    finally:
        os.umask(mask)


def test_nothing_is_left_of_a_run_that_wrote_nothing(tmp_path):
    """Empty run folders after every mistyped command; or somebody's files gone with them."""
    (tmp_path / "runs").mkdir()
    mine = Lock(str(tmp_path / "runs" / "a" / "run"))
    assert mine.take()
    mine.release()
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]
    assert mine.take()
    (tmp_path / "runs" / "a" / "file").write_text("")
    mine.release()
    assert (tmp_path / "runs" / "a" / "file").exists()


@pytest.mark.parametrize("way", ["fork", "another program"])
def test_what_the_owner_has_started_does_not_keep_the_lock(way, tmp_path):
    """A worker or a viewer that lives on, and a run that can never be resumed."""
    mine = Lock(str(tmp_path))
    assert mine.take()
    if way == "fork":
        child = in_a_child(lambda: None)
    else:
        program = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE,
                                   close_fds=False)
        child = program.pid
    mine.close()                                            # as at the owner's end
    other, until = Lock(str(tmp_path)), time.monotonic() + 20
    while not other.take():     # an exec closes files a moment after the starter goes on
        assert time.monotonic() < until
    kill(child)
    lock.close_all()


def test_a_fork_does_not_give_its_parents_folder_away(tmp_path):
    """Released by the child's end, while the parent still trains."""
    mine = Lock(str(tmp_path))
    assert mine.take()
    kill(in_a_child(mine.release))
    other = in_a_child(lambda: Lock(str(tmp_path)).take() and os._exit(1))
    kill(other)
    assert mine.in_place() and os.path.exists(tmp_path / "lock")
    mine.release()


def test_an_owner_whose_folder_was_removed_knows(tmp_path):
    """It would write into the folder of the run that was begun in its place."""
    mine, other = Lock(str(tmp_path / "run")), Lock(str(tmp_path / "run"))
    assert mine.take() and mine.in_place()
    os.remove(tmp_path / "run" / "lock")
    assert not mine.in_place()
    assert other.take() and not mine.in_place()
    mine.release()
    assert other.in_place()
    other.release()


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def without(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(lock.fcntl, "flock", without)
    assert Lock(str(tmp_path)).take()
    assert capsys.readouterr().err.count("without locks") == 1
    monkeypatch.setattr(lock, "fcntl", None)
    assert Lock(str(tmp_path)).take()


def test_a_link_in_the_locks_place_is_not_followed(tmp_path):
    """Somebody's file emptied."""
    (tmp_path / "file").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "file")
    with pytest.raises(OSError):
        Lock(str(tmp_path / "run")).take()
    assert (tmp_path / "file").read_text() == "text"
