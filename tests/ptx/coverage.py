"""Coverage: the instructions of the kernels' PTX that ran."""

from collections import Counter
from collections.abc import Iterable

from tests.ptx.threads import Report


def ran(reports: Iterable[Report]) -> dict[str, dict[tuple[int, int], bool]]:
    """Return, for each kernel, whether each instruction of each compiled form ran, by program and line."""
    kernels: dict[str, dict[tuple[int, int], bool]] = {}
    for report in reports:
        lines = kernels.setdefault(report.kernel, {})
        for number, block in enumerate(report.program.kernel.blocks):
            for instruction in block.instructions():
                key = id(report.program), instruction.line
                lines[key] = lines.get(key, False) or number in report.blocks
    return kernels


def missed(reports: Iterable[Report]) -> Counter[tuple[str, str, str]]:
    """Count the instructions of each program that no launch ran, by kernel, place in its source and program."""
    reports = list(reports)
    ran_blocks: dict[int, set[int]] = {}
    programs = {id(report.program): report for report in reports}
    for report in reports:
        ran_blocks.setdefault(id(report.program), set()).update(report.blocks)
    found: Counter[tuple[str, str, str]] = Counter()
    for key, report in programs.items():
        for number, block in enumerate(report.program.kernel.blocks):
            if number not in ran_blocks[key]:
                for instruction in block.instructions():
                    found[report.kernel, instruction.where, report.program.key] += 1
    return found
