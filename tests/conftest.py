"""Rules for every test run: GPU tests skip with a reason where there is no device, and an all-skipped run is red."""

import gc
import os
from dataclasses import replace

import pytest
import torch

from clvp_fast.io.files import cache_folder, make_private
from tests.kit import interpreter

pytest_plugins = ["tests.kit.reporting"]

# Triton reads this when it is imported; without a GPU its interpreter runs the kernels that a test forces.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter.repair()


def pytest_addoption(parser):
    parser.addoption(
        "--interpret-kernels",
        action="store_true",
        help="on a CPU, run every operator's Triton kernel in the interpreter where it can serve, as a GPU would",
    )
    parser.addoption("--wheel", help="the wheel that tests/test_packaging.py installs, in place of one that it builds")


@pytest.fixture(scope="session", autouse=True)
def kernels_by_default(request):
    if not request.config.getoption("--interpret-kernels"):
        return
    from clvp_fast.ops.dispatch import OPERATORS

    for operator in OPERATORS.values():
        kernel, *others = operator.implementations
        if kernel.name == "triton" and len(others) == 1:
            why_not = _but_no_bfloat16(kernel.why_not)
            operator.use((replace(kernel, missing=lambda device: None, why_not=why_not), *others))


def _but_no_bfloat16(why_not):
    """Refuse bfloat16, whose products the interpreter gets wrong (triton 3.6 and 3.9)."""

    def refuse(*args):
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in args):
            return "bfloat16 cannot be interpreted"
        return why_not(*args)

    return refuse


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "callspec") and any(value is torch.bfloat16 for value in item.callspec.params.values()):
            item.add_marker(pytest.mark.bfloat16)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish():
    """Keep imports out of every collection of garbage, which takes a third of a second to go through them."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    if hasattr(session.config, "workerinput") or session.config.option.collectonly:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == pytest.ExitCode.OK and reporter and not reporter.stats.get("passed"):
        reporter.write_line("no test passed: everything was skipped or deselected", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Let tests build the random checkpoint themselves, so that the user's cache has no influence.

    Native libraries are shared: their names change with their sources, flags and compilers, and each is checked before
    use.
    A user without a cache has none here either.
    """
    try:
        shared = cache_folder() / "native"
        make_private(shared)
    except OSError:  # no home, or none that can be written: what the package then does is tested too
        yield
        return
    own = tmp_path_factory.mktemp("cache")
    (own / "native").symlink_to(shared.resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLVP_FAST_CACHE", str(own))
        yield
