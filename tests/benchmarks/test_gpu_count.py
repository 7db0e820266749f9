"""What the GPU commands would run, counted on a CPU with the packages hidden that a GPU machine lacks."""

import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import aims, steps
from benchmarks.gpu.measuring import MOST_BYTES
from benchmarks.harness import ROOT, source, write_rows
from tests.kit.hidden.sitecustomize import HIDDEN

HIDING = ROOT / "tests/kit/hidden"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU need not be pretended here")


def hidden(*words: str, **more: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{HIDING}:{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | more
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)


def python(code: str) -> str:
    done = hidden(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def collected(*words: str) -> list[str]:
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.pretended", "-p", "no:cacheprovider")
    done = hidden(*pytest_, "--collect-only", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if re.match(r"tests/\S+\.py::", line)]


def test_the_packages_are_hidden():
    tried = "\n".join(f"try: import {name}\nexcept ImportError: print({name!r})" for name in HIDDEN)
    assert python(tried).split() == list(HIDDEN)


@pytest.mark.slow
def test_kernels_are_tested_and_measured_without_the_packages():
    """In the interpreter, and at small sizes, which is what this machine can do of it."""
    done = hidden(sys.executable, "-m", "pytest", "-q", "tests/kernels/test_embedding.py")
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr
    workloads = ["add_norm", "decode_step", "end_to_end"]
    said = python(
        f"from benchmarks import run; assert run.main({workloads!r} + ['--smoke', '--providers', 'ours']) == 0"
    )
    assert all(re.search(rf"^ *{name} clvp_fast", said, re.MULTILINE) for name in workloads), said


def test_what_runs_on_a_gpu_is_all_that_the_steps_run():
    """And nothing of it is a CPU's, or compiles alone."""
    everything = collected("-m", "gpu", "tests/kernels", "tests/gpu", "tests/engine")
    files = Counter(name.partition("::")[0] for name in everything)
    assert len(everything) > 1000 and not [name for name in files if name.endswith(("_cpu.py", "test_compiled.py"))]
    assert not [name for name in everything if "test_log_mel" in name and "[cpu" in name]
    first = collected("-m", "gpu and bfloat16", "tests/kernels")
    assert 200 < len(first) < len(everything) and set(first) < set(everything)
    sanitized = steps.SANITIZED.read_text().splitlines()
    assert len(set(sanitized)) == 40 and set(sanitized) < set(everything)
    kernels = {name for name in files if name.startswith("tests/kernels/")}
    assert {name.partition("::")[0] for name in sanitized} == kernels - {"tests/kernels/test_capture.py"}
    # Each file of it is in a step.
    words = [word for step in steps.check("sanitizer") for word in step.command]
    assert all(any(name.startswith(word) for word in words) for name in files)


def test_the_rows_and_their_memory():
    """In their order: kernels, of each workload the first shape first, then models, then rivals; all fit."""
    said = python(
        "from pathlib import Path\n"
        "from benchmarks.gpu import pretended, counting, steps\n"
        "for step in steps.bench(Path('rows')):\n"
        "    for item in counting.rows_of(step):\n"
        "        absent = item.provider in item.task.absent\n"
        "        print(step.name, item.workload, item.provider, None if absent else counting.held(item), sep='|')\n"
    )
    rows = [line.split("|") for line in said.splitlines() if line.count("|") == 3]
    names = list(dict.fromkeys(step for step, *_ in rows))
    assert names == [step.name for step in steps.bench(Path("rows"))]
    first = list(dict.fromkeys(workload for step, workload, *_ in rows if step == names[0]))
    assert first == list(steps.KERNELS)
    of_kernels = [workload for step, workload, *_ in rows if step == names[0]]
    shapes = len(list(dict.fromkeys(of_kernels)))
    changes = [before for before, after in pairwise(of_kernels) if before != after]
    assert changes[:shapes] == list(steps.KERNELS), "the first shape of each workload comes first"
    assert not any("one launch" in provider for step, _, provider, _ in rows if step != names[-1])
    sizes = [int(size) for *_, size in rows if size != "None"]
    assert len(sizes) > 200 and 30e9 < max(sizes) < MOST_BYTES


def test_all_steps_together_take_25_minutes_at_most():
    planned = steps.evidence("sanitizer", Path("rows"))
    assert sum(step.seconds for step in planned) <= 25 * 60
    assert {step.name for step in planned} == {
        step.name for step in [*steps.check("sanitizer"), *steps.bench(Path("rows"))]
    }
    names = [step.name for step in planned]
    assert names[0] == "kernels in bfloat16" and names[-2:] == ["persistent step", "rows of the persistent step"]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("target", ["gpu-check", "gpu-bench", "gpu-evidence"])
def test_make_keeps_a_python_path(target, tmp_path):
    """A path that is given from outside stands behind the repository, and in all that the commands start."""
    told = tmp_path / "python"
    told.write_text('#!/bin/sh\necho "path: $PYTHONPATH"\necho "words: $*"\n')
    told.chmod(0o755)
    done = hidden("make", target, f"GPU_PYTHON={told}", PYTHONPATH="/given/from:/outside")
    assert "path: .:/given/from:/outside\n" in done.stdout, done.stdout + done.stderr
    assert f"words: -m benchmarks.gpu {target.removeprefix('gpu-')} --out out/gpu --seconds 540" in done.stdout
    done = hidden("make", target, f"GPU_PYTHON={told}", PYTHONPATH="")
    assert "path: .\n" in done.stdout


def test_without_a_gpu_the_commands_say_so(tmp_path):
    done = hidden("make", "gpu-evidence", f"GPU_PYTHON={sys.executable}", f"GPU_OUT={tmp_path}")
    assert done.returncode and "needs a CUDA device" in done.stderr and "--count tells" in done.stderr


@pytest.mark.slow
def test_the_whole_command_counts():
    done = hidden("make", "gpu-evidence", f"GPU_PYTHON={sys.executable}", "GPU_ARGS=--count", PYTHONPATH=str(HIDING))
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.findall(r"^(\S.*): (\d+) (tests|rows)\b", done.stdout, re.MULTILINE)
    planned = steps.evidence("sanitizer", Path("rows"))
    assert [name for name, *_ in told] == [step.name for step in planned]
    assert all(int(count) > 0 for _, count, _ in told)
    tests = {name: int(count) for name, count, kind in told if kind == "tests"}
    everything = collected("-m", "gpu", "tests/kernels", "tests/gpu", "tests/engine")
    assert tests["memcheck"] == tests["racecheck"] == 40
    assert sum(tests.values()) - 80 == len(everything)


def aim_row(aim: aims.Aim, seconds: float, copy: float) -> dict:
    device = {"name": "NVIDIA Test", "copy_bytes_per_s": copy}
    spread = {"q20": seconds, "median": seconds, "q80": seconds, "repeats": 1}
    row = {"workload": aim.workload, "shape": aim.shape | {"more": 1}, "provider": aim.provider, "seconds": spread}
    return row | {
        "device": device,
        "source": source(),
        "alone": True,
        "utc": "now",
        "ratio": None,
        "compared_with": "x",
    }


def test_aims_scale_by_the_card_s_bandwidth(tmp_path):
    first, second, *_ = aims.AIMS
    folder = tmp_path / "nvidia-test"
    write_rows([aim_row(first, 3 * first.seconds, aims.BANDWIDTH / 2)], folder)
    write_rows([aim_row(second, 1.0, aims.BANDWIDTH) | {"seconds": None, "refused": "wrong"}], folder)
    lines = aims.table(tmp_path, "NVIDIA Test").splitlines()[2:]
    assert len(lines) == len(aims.AIMS)
    assert "| 1.20 ms at 2.40 TB/s | 1.80 ms | 1.50 |" in lines[0] and "| wrong |" in lines[1]
    assert all("no row" in line for line in lines[2:])
    assert all("no row" in line for line in aims.table(tmp_path, "another card").splitlines()[2:])


def test_the_document_has_the_aims():
    assert aims.in_document() in aims.DOCUMENT.read_text()
