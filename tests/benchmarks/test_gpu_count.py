"""The work of the GPU commands, counted on a CPU with the packages hidden that a GPU machine lacks."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import aims, measuring, steps
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.measuring import MOST_BYTES
from benchmarks.harness import ROOT, Task, source, write_rows
from tests.kit.hidden.sitecustomize import HIDDEN

#: Where kernels are tested.
OF_KERNELS = ("tests/ops/", "tests/kernels/")
HIDING = ROOT / "tests/kit/hidden"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU need not be pretended here")


def hidden(*words: str, **more: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{HIDING}:{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | more
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)


def python(code: str) -> str:
    done = hidden(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout


COUNTED = """
import pytest
from pathlib import Path
from benchmarks.gpu import pretended, counting, steps

class Markers:
    def pytest_collection_finish(self, session):
        for item in session.items:
            print("test", item.nodeid, *{mark.name for mark in item.iter_markers()}, sep="|")

words = ["-q", "--collect-only", "-p", "no:cacheprovider", "-m", "gpu"]
words += ["tests/ops", "tests/kernels", "tests/gpu", "tests/engine"]
assert pytest.main(words, [pretended, Markers()]) == 0
for step in steps.bench(Path("rows")):
    for item in counting.rows_of(step):
        size = None if item.provider in item.task.absent else counting.held(item)
        print("row", step.name, item.workload, item.provider, item.name, size, sep="|")
"""


@pytest.fixture(scope="module")
def counted():
    """Count a GPU's work: give each test's id and markers, and each row's description and bytes."""
    lines = [line.split("|") for line in python(COUNTED).splitlines() if line.startswith(("test|", "row|"))]
    return SimpleNamespace(
        marks={name: marks for kind, name, *marks in lines if kind == "test"},
        rows=[words for kind, *words in lines if kind == "row"],
    )


def test_the_packages_are_hidden():
    tried = "\n".join(f"try: import {name}\nexcept ImportError: print({name!r})" for name in HIDDEN)
    assert python(tried).split() == list(HIDDEN)


@pytest.mark.slow
def test_kernels_are_tested_and_measured_without_the_packages():
    """Use the interpreter and small sizes, which this machine can run."""
    done = hidden(sys.executable, "-m", "pytest", "-q", "tests/ops/test_embedding.py")
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr
    workloads = ["add_norm", "decode_step", "end_to_end"]
    said = python(
        f"from benchmarks import run; assert run.main({workloads!r} + ['--smoke', '--providers', 'ours']) == 0"
    )
    assert all(re.search(rf"^ *{name} clvp_fast", said, re.MULTILINE) for name in workloads), said


def test_the_steps_run_tests_of_a_gpu_alone(counted):
    """Exclude tests of a CPU, and tests that only compile."""
    everything = list(counted.marks)
    files = Counter(name.partition("::")[0] for name in everything)
    assert len(everything) > 1000 and not [name for name in files if name.endswith(("_cpu.py", "test_compiled.py"))]
    assert not [name for name in everything if re.search(r"\[(cpu|interpreted|torch|reference|default)\b", name)]
    kernels = [name for name in everything if name.startswith(OF_KERNELS)]
    assert 200 < sum("bfloat16" in counted.marks[name] for name in kernels) < len(kernels) / 2
    sanitized = steps.SANITIZED.read_text().splitlines()
    assert len(set(sanitized)) == len(sanitized) and set(sanitized) < set(everything)
    # Of each operator, whose files share the beginning of their names.
    stems = {Path(name).stem for name in files if name.startswith(OF_KERNELS)} - {"test_capture"}
    watched = {Path(name.partition("::")[0]).stem for name in sanitized}
    assert watched <= stems
    assert all(any(stem.startswith(other) or other.startswith(stem) for other in watched) for stem in stems)
    # Each file of it is in a step.
    words = [word for step in steps.check("sanitizer") for word in step.command]
    assert all(any(name.startswith(word) for word in words) for name in files)


def test_the_rows_and_their_memory(counted):
    """Check the order: kernels, each workload's first shape first, then models, then rivals; all fit."""
    rows = counted.rows
    names = list(dict.fromkeys(step for step, *_ in rows))
    assert names == [step.name for step in steps.bench(Path("rows"))]
    first = list(dict.fromkeys(workload for step, workload, *_ in rows if step == names[0]))
    assert first == list(steps.KERNELS)
    of_kernels = [workload for step, workload, *_ in rows if step == names[0]]
    shapes = len(list(dict.fromkeys(of_kernels)))
    changes = [before for before, after in pairwise(of_kernels) if before != after]
    assert changes[:shapes] == list(steps.KERNELS), "the first shape of each workload comes first"
    assert not any("one launch" in provider for step, _, provider, *_ in rows if step != names[-1])
    assert not any(provider == "clvp_fast tasks" for _, _, provider, *_ in rows), "a workload tells of no row"
    for aim in aims.AIMS:
        assert sum(aims.is_of(item, aim) for _, _, _, item, _ in rows) == 1, aim
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


def test_the_checkers_watch_their_steps():
    memcheck, racecheck = [step for step in steps.check("sanitizer") if step.sanitized]
    for step in (memcheck, racecheck):
        assert f" sanitizer --tool {step.name} --error-exitcode 1 {sys.executable} " in " ".join(step.command)
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING=1" in memcheck.command, "each tensor has bounds of its own"


@pytest.mark.parametrize("target", ["gpu-check", "gpu-bench", "gpu-evidence"])
def test_make_keeps_a_python_path(target, tmp_path):
    """Put an outer path behind the repository, for everything that the commands start."""
    told = tmp_path / "python"
    told.write_text('#!/bin/sh\necho "path: $PYTHONPATH"\necho "words: $*"\n')
    told.chmod(0o755)
    done = hidden("make", target, f"GPU_PYTHON={told}", PYTHONPATH="/given/from:/outside")
    assert "path: .:/given/from:/outside\n" in done.stdout, done.stdout + done.stderr
    assert f"words: -m benchmarks.gpu {target.removeprefix('gpu-')} --out out/gpu --seconds 540" in done.stdout
    done = hidden("make", target, f"GPU_PYTHON={told}", PYTHONPATH="")
    assert "path: .\n" in done.stdout


def test_make_hands_on_each_value_as_one_word(tmp_path):
    """Pass a folder of two words as one, and do not take the next option for an empty value."""
    told = tmp_path / "python"
    told.write_text('#!/bin/sh\nfor word; do echo "<$word>"; done\n')
    told.chmod(0o755)
    done = hidden("make", "gpu-check", f"GPU_PYTHON={told}", "GPU_OUT=of two words", "GPU_SECONDS=")
    assert "<--out>\n<of two words>\n<--seconds>\n<>\n<--sanitizer>" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_without_a_gpu_the_commands_say_so(tmp_path):
    done = hidden("make", "gpu-evidence", f"GPU_PYTHON={sys.executable}", f"GPU_OUT={tmp_path}")
    assert done.returncode and "needs a CUDA device" in done.stderr and "--count tells" in done.stderr


@pytest.mark.slow
def test_the_whole_command_counts(counted):
    done = hidden("make", "gpu-evidence", f"GPU_PYTHON={sys.executable}", "GPU_ARGS=--count", PYTHONPATH=str(HIDING))
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.findall(r"^(\S.*): (\d+) (tests|rows)\b", done.stdout, re.MULTILINE)
    planned = steps.evidence("sanitizer", Path("rows"))
    assert [name for name, *_ in told] == [step.name for step in planned]
    assert all(int(count) > 0 for _, count, _ in told)
    tests = {name: int(count) for name, count, kind in told if kind == "tests"}
    watched = len(steps.SANITIZED.read_text().splitlines())
    assert tests["memcheck"] == tests["racecheck"] == watched
    assert sum(tests.values()) - 2 * watched == len(counted.marks)


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
    write_rows([aim_row(aims.AIMS[3], 1.0, aims.BANDWIDTH) | {"source": "of other code"}], folder)
    journal = Journal(tmp_path / "journal.jsonl", "code on card")
    lines = aims.table(tmp_path, "NVIDIA Test", journal).splitlines()[2:]
    assert len(lines) == len(aims.AIMS)
    assert "| 1.20 ms at 2.40 TB/s | 1.80 ms | 1.50 |" in lines[0] and "| wrong |" in lines[1]
    assert all(line.endswith("| no row |  |") for line in lines[2:])
    assert all("no row" in line for line in aims.table(tmp_path, "another card", journal).splitlines()[2:])
    # Of a row that there is not, what the journal has of it.
    third = aims.AIMS[2]
    item = f"{third.workload} {json.dumps(third.shape | {'more': 1})} {third.provider}"
    journal.write("rows", "end", item=item, worker="w", outcome="failed", why="RuntimeError: a | b\n and more")
    lines = aims.table(tmp_path, "NVIDIA Test", journal).splitlines()[2:]
    assert lines[2].endswith("| no row: failed (RuntimeError: a \\| b) |  |") and lines[3].endswith("| no row |  |")


def test_a_workload_without_tasks_costs_itself_alone():
    names = ["tests.benchmarks.no_such_workload", "tests.benchmarks.planted"]
    missing, *others = measuring.items_of(names, ("ours", "torch"), "", "cpu", smoke=True)
    assert missing.workload == names[0] and others and {item.workload for item in others} == {names[1]}
    with pytest.raises(ModuleNotFoundError):
        missing.task.row(missing.provider)


@pytest.mark.parametrize(("memory", "outcome"), [(24e9, "absent"), (141e9, "failed")])
def test_a_row_that_a_small_card_cannot_hold_is_absent(memory, outcome, tmp_path):
    def row(name):
        raise torch.OutOfMemoryError("CUDA out of memory")

    item = measuring.Item("generate", Task({}, list, row=row), "clvp_fast engine")
    machine = SimpleNamespace(described=dict)
    found, why = measuring._measure(item, machine, tmp_path, memory)
    assert found == outcome and why == f"a device of {memory / 1e9:.0f} GB: CUDA out of memory"


def test_the_document_has_the_aims():
    assert aims.in_document() in aims.DOCUMENT.read_text()
