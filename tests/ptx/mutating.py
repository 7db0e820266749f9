"""`pytest -p tests.ptx.plugin -p tests.ptx.mutating --ptx-mutants FILE`: faults in the kernels of the chosen tests.

Each test runs once as it is. Then, for as many seconds of the processor as `--ptx-seconds` says, a fault is drawn, of
each kernel in turn and of each kind with the same chance, and the tests that ran that code are run on it until one
fails. FILE has a line for each fault; called again with it, what it has is not drawn again.
"""

import json
import random
import time
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from tests.ptx.mutants import Mutant, mutants
from tests.ptx.plugin import OPTIONS, REPORTS

# A fault may make a loop endless: of so many times the instructions of the test without it.
_PATIENCE = 10


def pytest_addoption(parser):
    group = parser.getgroup("ptx")
    group.addoption(
        "--ptx-mutants", metavar="FILE", required=True, help="what became of each fault, a line of JSON each"
    )
    group.addoption("--ptx-seconds", type=float, default=600, help="the processor's, in which faults are drawn")
    group.addoption("--ptx-seed", type=int, default=0)


def _fails(item, options, mutant: Mutant | None = None) -> bool:
    options.swap = (mutant.program, mutant.build()) if mutant else None
    item._initrequest()
    try:
        reports = runtestprotocol(item, log=False, nextitem=None)
    finally:
        options.swap = None
    return any(report.failed for report in reports)


def _key(mutant: Mutant) -> list:
    return [mutant.program.kernel.name, mutant.program.key, mutant.instruction.line, mutant.what]


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    config = session.config
    options, reports, file = config.stash[OPTIONS], config.stash[REPORTS], Path(config.option.ptx_mutants)
    rng, users, blocks, cost = random.Random(config.option.ptx_seed), {}, {}, {}
    for item in session.items:
        before, began = len(reports), time.monotonic()
        if _fails(item, options):
            raise pytest.UsageError(f"{item.nodeid} fails without a fault")
        cost[item] = time.monotonic() - began
        for report in reports[before:]:
            users.setdefault(report.program, {}).setdefault(item, 0)
            users[report.program][item] = max(users[report.program][item], report.instructions)
            blocks.setdefault(report.program, set()).update(report.blocks)
    known = {tuple(json.loads(line)["fault"]) for line in file.read_text().splitlines()} if file.exists() else set()
    left: dict[str, dict[str, list[Mutant]]] = {}
    for program in users:
        for mutant in mutants(program):
            if mutant.block in blocks[program] and tuple(_key(mutant)) not in known:
                left.setdefault(program.kernel.name, {}).setdefault(mutant.what, []).append(mutant)
    end = time.process_time() + config.option.ptx_seconds
    with file.open("a") as out:
        while any(left.values()) and time.process_time() < end:
            for kinds in left.values():
                if not kinds or time.process_time() >= end:
                    continue
                what = rng.choice(sorted(kinds))
                mutant = kinds[what].pop(rng.randrange(len(kinds[what])))
                if not kinds[what]:
                    del kinds[what]
                found = None
                for item in sorted(users[mutant.program], key=cost.get):
                    options.limit = _PATIENCE * users[mutant.program][item] + 10000
                    if _fails(item, options, mutant):
                        found = item.nodeid
                        break
                options.limit = None
                row = dict(fault=_key(mutant), text=str(mutant.instruction), where=mutant.instruction.where, seen=found)
                out.write(json.dumps(row) + "\n")
                out.flush()
    return True
