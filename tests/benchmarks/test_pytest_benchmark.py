"""The workloads as modules of pytest-benchmark: providers side by side, behind the same gate."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import conftest
from benchmarks.harness import ROOT

# A workload of which one provider is right, one wrong, one broken, one absent; a run makes ten calls.
PLUGIN = """
import time
from benchmarks import scheduler
from benchmarks.harness import Provider, task
from benchmarks.providers import Absent

def absent():
    raise Absent("for a GPU")

def tasks(device, smoke=False):
    assert (device, smoke) == ("cpu", True)
    right = lambda: Provider("right", lambda: time.sleep(0.05), 1e-5, 1e-3, calls=10, counted={"bytes": 7})
    makers = {"right": right, "wrong": lambda: Provider("wrong", None, float("nan"), 1e-3)}
    makers |= {"flashmel, broken": lambda: 1 / 0, "one launch": absent}
    yield task("scheduler", {"n": 1}, makers, 2, {"asrfront": "not for this shape"})

scheduler.tasks = tasks
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run `scheduler`, which the plugin has replaced, and `sample` as it is; give the output, and the kept files."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "replaced.py").write_text(PLUGIN)
    words = ["benchmarks/scheduler.py", "benchmarks/sample.py", "--smoke", "--benchmark-only", "-p", "replaced", "-v"]
    words += ["-p", "no:cacheprovider", f"--benchmark-json={folder / 'measured.json'}"]
    path = os.pathsep.join([str(folder), str(ROOT)])
    # A worker of xdist says in the environment that it is one, and the plugin would measure nothing there.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": path, "COLUMNS": "300"},
    )
    assert (folder / "measured.json").exists(), done.stdout + done.stderr
    measured = json.loads((folder / "measured.json").read_text())["benchmarks"]
    return SimpleNamespace(code=done.returncode, said=done.stdout, measured=measured)


def test_providers_of_a_shape_stand_side_by_side(run):
    groups = {}
    for one in run.measured:
        groups.setdefault(one["group"], []).append(one["name"])
    of_sample = "sample candidates=3 vocabulary=8194 temperature=0.8 top_p=0.8"
    assert set(groups) == {of_sample, "scheduler n=1"} and groups["scheduler n=1"] == ["right"]
    # Our kernel is there where a CPU has one.
    ways = {"clvp_fast torch", "clvp_fast reference", "transformers' processors"}
    assert set(groups[of_sample]) - {"clvp_fast kernel"} == ways
    assert f"benchmark '{of_sample}': {len(groups[of_sample])} tests" in run.said


def test_a_time_is_of_a_single_call_and_its_error_stands_beside_it(run):
    (right,) = (one for one in run.measured if one["group"] == "scheduler n=1")
    assert 0.005 <= right["stats"]["median"] < 0.05 and right["stats"]["rounds"] == 2
    assert right["extra_info"] == {"bytes": 7, "error": 1e-5}


def test_a_wrong_provider_fails_and_one_that_cannot_be_had_says_why(run):
    assert run.code == pytest.ExitCode.TESTS_FAILED and f"1 failed, {len(run.measured)} passed, " in run.said
    assert "error nan is beyond 0.001: not timed" in run.said and "::n=1 wrong FAILED" in run.said
    for name, why in (
        ("flashmel, broken", "ZeroDivisionError: division by zero"),
        ("one launch", "for a GPU"),
        ("asrfront", "not for this shape"),
    ):
        assert f"::n=1 {name} SKIPPED ({why})" in run.said


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_a_gpu_that_is_not_there_is_told():
    config = SimpleNamespace(getoption={"--device": "cuda"}.get)
    with pytest.raises(pytest.UsageError, match="--device cuda needs an NVIDIA GPU"):
        conftest.pytest_configure(config)
