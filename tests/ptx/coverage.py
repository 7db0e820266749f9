"""Which instructions of the kernels' PTX ran."""

from collections.abc import Iterable

from tests.ptx.threads import Report


def ran(reports: Iterable[Report]) -> dict[str, dict[tuple[int, int], bool]]:
    """For each kernel, whether each instruction of each of its compiled forms ran: program and line to that."""
    kernels: dict[str, dict[tuple[int, int], bool]] = {}
    for report in reports:
        lines = kernels.setdefault(report.kernel, {})
        for number, block in enumerate(report.program.kernel.blocks):
            for instruction in block.instructions():
                key = id(report.program), instruction.line
                lines[key] = lines.get(key, False) or number in report.blocks
    return kernels
