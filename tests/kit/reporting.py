"""The report at the end of a test run, and the choice of the tests that reach the native library.

`--write-native-tests FILE` writes the ids of the tests that call the library on the instruction set that the process
began with; `--only-tests-in FILE` runs those alone, as `.ci/run` does on each other set. A test that chooses its
instruction set itself would do the same there, and is left out.
"""

from collections import Counter
from pathlib import Path

import pytest

_REACHES = "reaches the native library"


def pytest_addoption(parser):
    group = parser.getgroup("clvp_fast")
    group.addoption("--write-native-tests", metavar="FILE", help="write the ids of the tests that reach the library")
    group.addoption("--only-tests-in", metavar="FILE", help="run only the tests whose ids FILE has, one a line")


def pytest_configure(config):
    config.pluginmanager.register(_Run(config))


@pytest.fixture(autouse=True)
def library_watched(request, monkeypatch):
    """Note for the run's summary whether the test reaches the native library."""
    if not request.config.getoption("--write-native-tests"):
        yield
        return
    from clvp_fast import native

    calls = dict(library=0, choose_isa=0)
    for name in calls:
        original = getattr(native, name)

        def watched(*args, name=name, original=original):
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(native, name, watched)
    yield
    if calls["library"] and not calls["choose_isa"]:
        request.node.user_properties.append((_REACHES, True))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if not (file := config.getoption("--only-tests-in")):
        return
    wanted = set(Path(file).read_text().splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
    items[:] = [item for item in items if item.nodeid in wanted]


class _Run:
    """Gathers over all worker processes what their tests report."""

    def __init__(self, config):
        self._file = None if hasattr(config, "workerinput") else config.getoption("--write-native-tests")
        self._native: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown" and (_REACHES, True) in map(tuple, report.user_properties):
            self._native.append(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter):
        """Name everything that this run did not prove, a line a reason."""
        skipped = terminalreporter.getreports("skipped")
        reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
        if reasons:
            terminalreporter.section(f"not proved here: {len(skipped)} tests")
            for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1]):
                terminalreporter.line(f"{count:5} {reason}")
        if self._file:
            Path(self._file).write_text("".join(f"{test}\n" for test in sorted(self._native)))
