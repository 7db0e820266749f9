"""`pytest -p tests.ptx.plugin`: the tests of the kernels on their PTX, instead of in Triton's interpreter.

Their ids say "interpreted" as everywhere; bfloat16 is among their types. TRITON_CACHE_DIR must be a folder that no GPU
uses. The run ends with a line a kernel: how many of its PTX instructions ran.
"""

import json
import os
from pathlib import Path

import pytest

if not os.environ.get("TRITON_CACHE_DIR"):
    raise SystemExit(
        "tests.ptx.plugin: TRITON_CACHE_DIR must name a folder of its own, as what is compiled here lacks a cubin"
    )
os.environ["TRITON_INTERPRET"] = "0"
import triton

triton.knobs.runtime.interpret = False  # for any environment from here on
os.environ["TRITON_INTERPRET"] = "1"  # the project asks for it before it runs kernels on a CPU

from tests.kit import device  # noqa: E402

device.emulate()
REPORTS, OPTIONS = pytest.StashKey(), pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("ptx")
    group.addoption("--ptx-arch", type=int, default=80, help="compute capability that kernels are compiled for")
    group.addoption("--ptx-no-checks", action="store_true", help="without the checks for races")
    group.addoption("--ptx-truncate", action="store_true", help="matrix units round toward zero")
    group.addoption(
        "--ptx-random-copies", action="store_true", help="of copies that differ in last bits, any is written"
    )
    group.addoption("--ptx-record", metavar="FILE", help="write what passed and which instructions ran, as JSON")
    group.addoption("--ptx-missed", action="store_true", help="name the instructions that never ran")
    group.addoption("--ptx-random-warps", action="store_true", help="a warp at a time, in random order: slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "float8" in item.name and config.option.ptx_arch < 89:
            item.add_marker(pytest.mark.skip(reason="float8 needs sm_89"))


def pytest_configure(config):
    from tests.ptx.launching import emulated
    from tests.ptx.machine import Options

    checks = not config.option.ptx_no_checks
    options = Options(
        races=checks, warp_races=checks, global_races=checks, random_warps=config.option.ptx_random_warps,
        random_copies=config.option.ptx_random_copies,
        rounding="truncate" if config.option.ptx_truncate else "nearest",
    )  # fmt: skip
    context = emulated(config.option.ptx_arch, options)
    config.stash[OPTIONS] = options
    config.stash[REPORTS] = context.__enter__()
    config.add_cleanup(lambda: context.__exit__(None, None, None))


@pytest.fixture(scope="session")
def launcher(request):
    """Give the launcher of the kernels of csrc/cuda/ (tests/ptx/native.py)."""
    from tests.ptx.native import Launcher, missing

    if reason := missing():
        pytest.skip(reason)
    stash = request.config.stash
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    return Launcher(request.config.option.ptx_arch, stash[OPTIONS], stash[REPORTS], folder)


@pytest.fixture
def cuda_as_ptx(launcher, monkeypatch):
    """Give log-mel of float32 on a CPU to the CUDA kernel."""
    from clvp_fast import native
    from tests.ptx.native import OnCpu

    mine = OnCpu(native.library(), launcher)
    monkeypatch.setattr(native, "library", lambda part="cpu": mine)


@pytest.fixture(autouse=True)
def racing(request, monkeypatch):
    if request.node.get_closest_marker("racing"):
        monkeypatch.setattr(request.config.stash[OPTIONS], "global_races", False)


def pytest_terminal_summary(terminalreporter, config):
    from tests.ptx.coverage import missed, ran

    reports = config.stash[REPORTS]
    if config.option.ptx_missed:
        for (kernel, where, program), count in sorted(missed(reports).items()):
            terminalreporter.write_line(f"ptx: {kernel} {program}: {count} instructions of source {where} never ran")
    if file := config.option.ptx_record:
        every = [one for lines in ran(reports).values() for one in lines.values()]
        passed = len(terminalreporter.stats.get("passed", ()))
        Path(file).write_text(json.dumps({"passed": passed, "ran": sum(every), "instructions": len(every)}))
    for name, lines in sorted(ran(reports).items()):
        terminalreporter.write_line(f"ptx: {name}: {sum(lines.values())} of {len(lines)} instructions ran")
    differ = {
        (r.kernel, i.where) for r in reports for i in r.program.kernel.instructions() if i.line in r.copies_differ
    }
    for kernel, where in sorted(differ):
        told = f"ptx: {kernel}: lanes write copies of one element that differ in their last bits, source {where}"
        terminalreporter.write_line(told)
    steps = sum(report.instructions for report in reports)
    terminalreporter.write_line(f"ptx: {len(reports)} launches, {steps} instructions of batches of CTAs")
