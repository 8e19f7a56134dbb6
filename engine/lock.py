r"""The lock of a run's folder: one process at a time trains there.

It is flock(2) on the file `lock` in the folder, which says who holds it. The system gives the lock
back when its process ends, however it ends, so no lock outlives its process; the file may, and
means nothing then. Whoever only reads a run needs no lock.
"""
import os
import socket
import sys
import time
from contextlib import suppress

try:
    import fcntl
except ImportError:             # Windows has none
    fcntl = None

from images.files import shown

held = {}                       # {real path of a folder: its Lock}, of this process


class Lock:
    """take() and release() the right to write in a folder; holder() says who has it."""

    def __init__(self, folder):
        self.folder, self.path, self.file = folder, os.path.join(folder, "lock"), None
        self.made = []          # folders made for the lock's sake, the innermost first

    def take(self):
        """True if the folder, made if it is missing, is this process's now; False: another's.

        OSError if nothing can be written there. Where the file system has no locks, that is said
        and the folder is taken.
        """
        self.make_folder()
        if fcntl is None:
            return self.go_without()
        # Not through a link; closed by the programs that this process starts.
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:           # the owner before has just removed the folder
            return self.take()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        except OSError:
            os.close(file)
            return self.go_without()
        self.file = file
        with suppress(OSError):             # whoever may write in the folder may own it
            os.fchmod(file, os.stat(self.folder).st_mode & 0o666)
        if not self.in_place():             # the owner before has just removed it: try again
            self.close()
            return self.take()
        held[os.path.realpath(self.folder)] = self
        with suppress(OSError):             # on a full disk nobody reads who it is
            os.truncate(file, 0)
            since = time.strftime("%Y-%m-%d %H:%M")
            os.write(file, f"process {os.getpid()} on {socket.gethostname()} since {since}"
                     .encode(errors="replace"))
        return True

    def make_folder(self):
        path = os.path.abspath(self.folder)
        while not os.path.isdir(path) and path != os.path.dirname(path):
            self.made.append(path)
            path = os.path.dirname(path)
        os.makedirs(self.folder, exist_ok=True)

    def go_without(self):
        print(f"{self.folder} is on a file system without locks: see to it that only one process "
              "trains there", file=sys.stderr, flush=True)
        return True

    def in_place(self):
        """Is the locked file still that of the folder, which might have been replaced?"""
        try:
            return os.path.samestat(os.fstat(self.file), os.stat(self.path))
        except OSError:
            return False

    def holder(self):
        """"process 12 on host since 2026-11-27 07:10" of another's lock."""
        with suppress(OSError):
            with open(self.path, errors="replace") as file:
                return shown(file.read(200)) or "another process"
        return "another process"

    def release(self):
        """Give the folder back; a folder in which nothing has been written is removed."""
        if self.file is None:
            return
        if self.in_place():
            with suppress(OSError):
                os.remove(self.path)        # while it is locked: nobody else's
        held.pop(os.path.realpath(self.folder), None)
        self.close()
        for path in self.made:
            with suppress(OSError):         # it holds something
                os.rmdir(path)

    def close(self):
        if self.file is not None:
            os.close(self.file)
            self.file = None


def close_all():
    for lock in held.values():
        lock.close()
    held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=close_all)       # a lock lasts as long as any copy is open
