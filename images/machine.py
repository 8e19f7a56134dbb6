"""What this process may use of its machine, also in a container or under a batch system."""
import math
import os

GROUPS = "/sys/fs/cgroup"       # Linux's control groups: limits are in files of these folders


def limits(*names):
    """The texts of the files of these names in this process's control group and those above it."""
    folders = [GROUPS, os.path.join(GROUPS, "memory")]                  # the latter: version 1
    try:
        with open("/proc/self/cgroup") as file:
            lines = [line.split(":", 2) for line in file.read().splitlines() if line.count(":") > 1]
    except OSError:
        lines = []
    for _, controllers, own in lines:       # version 2: one line, without controllers
        top = os.path.join(GROUPS, "memory" if "memory" in controllers.split(",") else "")
        own = own.strip("/")
        while own:
            folders.append(os.path.join(top, own))
            own = os.path.dirname(own)
    found = []
    for folder in folders:
        for name in names:
            try:
                with open(os.path.join(folder, name)) as file:
                    found.append(file.read())
            except OSError:                                             # no such file
                pass
    return found


def cpus():
    """How many CPUs this process may use: its affinity, or a quota of time, as of docker --cpus."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    for text in limits("cpu.max"):                                      # "200000 100000", or "max"
        quota, *period = text.split()
        if quota.isdecimal() and period:
            count = min(count, math.ceil(int(quota) / int(period[0])))
    return max(1, count)


def total_memory():
    """Bytes of memory that this process may use; 16 GiB where that is unknown."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = 2 ** 34
    for text in limits("memory.max", "memory.limit_in_bytes"):
        if text.strip().isdecimal():                                    # not "max"
            memory = min(memory, int(text))
    return memory
