"""`pytest -p tests.ptx.plugin -p tests.ptx.mutating --ptx-mutants FILE`: faults in the kernels of the chosen tests.

Each test runs once as it is. Then, for as many seconds of the processor as `--ptx-seconds` says, a fault is drawn, and
the tests that ran that code are run on it until one fails: of each kernel in turn, of each kind with the same chance,
first at places where no fault was seen yet. FILE has a line for each fault; called again with it, no fault of it is
drawn again.
"""

import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from tests.ptx.mutants import Mutant, drawn, key, latest, mutants
from tests.ptx.plugin import OPTIONS, REPORTS

# A fault may make a loop endless: the limit is this multiple of the test's instructions without it.
_PATIENCE = 10


def pytest_addoption(parser):
    group = parser.getgroup("ptx")
    group.addoption(
        "--ptx-mutants", metavar="FILE", required=True, help="what became of each fault, a line of JSON each"
    )
    group.addoption("--ptx-seconds", type=float, default=600, help="how long faults are drawn, in CPU seconds")
    group.addoption("--ptx-seed", type=int, default=0)
    group.addoption("--ptx-again", action="store_true", help="try the faults of FILE at places where none was seen")


@dataclass
class _Reached:
    """Code that the tests ran.

    users: of each program its tests, with the instructions that each needed. cost: seconds of each test.
    """

    users: dict = field(default_factory=dict)
    blocks: dict = field(default_factory=dict)
    cost: dict = field(default_factory=dict)

    def run(self, items, options, reports):
        for item in items:
            before, began = len(reports), time.monotonic()
            if _fails(item, options):
                raise pytest.UsageError(f"{item.nodeid} fails without a fault")
            self.cost[item] = time.monotonic() - began
            for report in reports[before:]:
                needed = self.users.setdefault(report.program, {})
                needed[item] = max(needed.get(item, 0), report.instructions)
                self.blocks.setdefault(report.program, set()).update(report.blocks)

    def faults(self) -> list[Mutant]:
        return [mutant for program in self.users for mutant in mutants(program) if mutant.block in self.blocks[program]]

    def seen_by(self, mutant: Mutant, options) -> str | None:
        """Return the first test that fails with the fault, of all that ran its program, the fastest first."""
        users = self.users[mutant.program]
        for item in sorted(users, key=self.cost.get):
            options.limit = _PATIENCE * users[item] + 10000
            if _fails(item, options, mutant):
                return item.nodeid
        return None


def _fails(item, options, mutant: Mutant | None = None) -> bool:
    options.swap = (mutant.program, mutant.build()) if mutant else None
    item._initrequest()
    try:
        reports = runtestprotocol(item, log=False, nextitem=None)
    finally:
        options.swap = None
    return any(report.failed for report in reports)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    config = session.config
    options, file, reached = config.stash[OPTIONS], Path(config.option.ptx_mutants), _Reached()
    reached.run(session.items, options, config.stash[REPORTS])
    faults, known = reached.faults(), latest(file)
    tried = Counter((row["fault"][3], row["where"]) for row in known.values())
    found = {(row["fault"][3], row["where"]) for row in known.values() if row["seen"]}
    if config.option.ptx_again:
        left = [one for one in faults if key(one) in known and (one.what, one.instruction.where) not in found]
    else:
        left = [one for one in faults if key(one) not in known]
    end = time.process_time() + config.option.ptx_seconds
    with file.open("a") as out:
        out.write("\n" * (out.tell() > 0))  # behind the part of a line that a killed run may have left
        rows = [] if config.option.ptx_again else [{"of": Counter(fault.what for fault in faults)}]
        out.writelines(json.dumps(row) + "\n" for row in rows)
        for fault in drawn(left, tried, found, random.Random(config.option.ptx_seed)):
            if time.process_time() >= end:
                break
            seen = reached.seen_by(fault, options)
            if seen:
                found.add((fault.what, fault.instruction.where))
            row = dict(fault=key(fault), text=str(fault.instruction), where=fault.instruction.where, seen=seen)
            out.write(json.dumps(row) + "\n")
            out.flush()
    return True


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session, exitstatus):
    """Keep the status: of a run of tests some must have passed, but this was none."""
    yield
    session.exitstatus = exitstatus
