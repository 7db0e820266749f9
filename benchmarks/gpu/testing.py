"""A plugin of pytest that makes a worker of it: `-p benchmarks.gpu.testing`, with the arguments of the supervisor.

It leaves out tests that have come to something already and those of other workers, and writes down each as it comes.
"""

import os
import sys
import zlib
from pathlib import Path

import pytest

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.supervise import DEVICE_LOST, device_is_lost, end_with_the_supervisor

_LONGEST_WHY = 3000
# Standard input as the supervisor gave it: pytest puts another in its place when it begins.
_INPUT = os.dup(0)


def pytest_addoption(parser):
    group = parser.getgroup("a worker of benchmarks.gpu")
    for name in ("--journal", "--mark", "--step", "--worker", "--share"):
        group.addoption(name, required=False)


def pytest_configure(config):
    if config.getoption("--journal"):
        end_with_the_supervisor(_INPUT)
        config.pluginmanager.register(_Worker(config))


class _Worker:
    def __init__(self, config):
        option = config.getoption
        self._journal = Journal(Path(option("--journal")), option("--mark"))
        self._step, self._worker = option("--step"), option("--worker")
        self._share, self._of = map(int, option("--share").split("/"))
        self._reports = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        ended = self._journal.ended(self._step)
        mine = [
            item
            for item in items
            if item.nodeid not in ended and zlib.crc32(item.nodeid.encode()) % self._of == self._share
        ]
        kept = set(mine)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = mine

    def pytest_collectreport(self, report):
        """Record a file that cannot be imported, which costs only its own tests."""
        item = f"collecting {report.nodeid}"
        if report.failed and item not in self._journal.ended(self._step):
            self._write("end", item=item, outcome="failed", why=report.longreprtext[-_LONGEST_WHY:])

    def pytest_runtest_logstart(self, nodeid):
        self._reports = {}
        self._write("begin", item=nodeid)

    def pytest_runtest_logreport(self, report):
        self._reports[report.when] = report

    def pytest_runtest_logfinish(self, nodeid):
        reports = self._reports.values()
        failed = [report for report in reports if report.failed]
        skipped = [report for report in reports if report.skipped]
        outcome = "failed" if failed else "skipped" if skipped else "passed"
        why = (failed or skipped)[0].longreprtext[-_LONGEST_WHY:] if failed or skipped else ""
        seconds = round(sum(report.duration for report in reports), 3)
        # Asked first: where it never answers, the test is open still, and hangs.
        lost = bool(failed and (cuda := _cuda()) and device_is_lost(cuda.synchronize))
        self._write("end", item=nodeid, outcome=outcome, seconds=seconds, why=why)
        if lost:
            pytest.exit("the device is lost", returncode=DEVICE_LOST)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            self._write("done")

    def _write(self, event, **more):
        self._journal.write(self._step, event, worker=self._worker, **more)


def _cuda():
    """Return `torch.cuda`, where the tests have used it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
