"""Test files side by side, in processes forked from pytest's own: what pytest-xdist does, less most of it."""
import multiprocessing
import os
import sys
import warnings
from multiprocessing.connection import wait

import pytest


def pytest_addoption(parser):
    cores = len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else 1
    parser.addoption("--workers", type=int, default=min(4, cores), help="test files at a time (default: %(default)s)")


def pytest_runtestloop(session):
    """Each worker takes the next file until there is none; what it reports is shown and counted here, as if it had run here.

    One after the other, as pytest does it, with -s and --pdb, which need the terminal, and with -x, which ends at a failure.
    """
    config, files = session.config, {}
    for item in session.items:
        files.setdefault(item.path, []).append(item)
    n, option = min(config.option.workers, len(files)), config.option
    if n < 2 or option.capture == "no" or option.usepdb or option.maxfail or option.collectonly or session.testsfailed:
        return None
    config._tmp_path_factory.getbasetemp()                                # made here, so that it is one for all
    fork, workers = multiprocessing.get_context("fork"), {}
    taken, finished = fork.Value("i", 0), 0
    for _ in range(n):
        receiver, sender = fork.Pipe(duplex=False)
        workers[receiver] = fork.Process(target=work, args=(config, list(files.values()), taken, sender))
        workers[receiver].start()
        sender.close()                                                    # the worker's is the last: its end can be seen
    while workers:
        for receiver in wait(list(workers)):
            try:
                hook, said = receiver.recv()
            except EOFError:
                process = workers.pop(receiver)
                process.join()
                if process.exitcode:
                    pytest.exit(f"a process that ran tests has died ({process.exitcode})", 3)
                continue
            if "report" in said:
                said["report"] = config.hook.pytest_report_from_serializable(config=config, data=said["report"])
            finished += hook == "pytest_runtest_logfinish"
            heard = getattr(config.hook, hook)
            heard.call_historic(kwargs=said) if heard.is_historic() else heard(**said)
    if finished != len(session.items):
        pytest.exit(f"{finished} of {len(session.items)} tests have been heard of", 3)
    return True


def work(config, files, taken, sender):
    """Run the tests of file after file; taken: how many files have been taken, by all workers."""
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing(), capture.start_global_capturing()     # into temporary files of its own
    config.pluginmanager.unregister(name="terminalreporter")
    config.pluginmanager.register(Sender(config, sender))

    def items():
        while True:
            with taken.get_lock():
                mine, taken.value = taken.value, taken.value + 1
            if mine >= len(files):
                return
            yield from files[mine]
    queue = items()
    item = next(queue, None)
    while item:
        following = next(queue, None)                                     # says which fixtures are still needed
        config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        item = following


class Sender:
    """Sends what pytest's hooks hear in a worker to the first process."""

    def __init__(self, config, sender):
        self.config, self.sender = config, sender

    def pytest_runtest_logstart(self, nodeid, location):
        self.sender.send(("pytest_runtest_logstart", dict(nodeid=nodeid, location=location)))

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.sender.send(("pytest_runtest_logreport", dict(report=data)))

    def pytest_runtest_logfinish(self, nodeid, location):
        self.sender.send(("pytest_runtest_logfinish", dict(nodeid=nodeid, location=location)))

    def pytest_warning_recorded(self, warning_message, when, nodeid, location):
        w = warning_message
        w = warnings.WarningMessage(w.category(str(w.message)), w.category, w.filename, w.lineno)
        self.sender.send(("pytest_warning_recorded", dict(warning_message=w, when=when, nodeid=nodeid, location=location)))
