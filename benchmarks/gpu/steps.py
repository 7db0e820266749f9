"""The runs on a GPU, their order and their durations.

The most important come first. All steps together have half an hour on a GPU; their limits were set without one.
"""

import os
import sys
from pathlib import Path

from benchmarks.gpu.supervise import Step
from benchmarks.harness import ROOT

#: The tests that the sanitizers watch, one a line: each kernel once where it writes and reads most oddly.
SANITIZED = ROOT / "tests/gpu/sanitized.txt"
#: Kernels first: what is measured of ours and torch's, by workload.
KERNELS = (
    "paged_attention",
    "gelu_mlp",
    "sample",
    "rotary_attention",
    "log_mel",
    "add_norm",
    "linear",
    "geglu_mlp",
    "window_attention",
    "merge_norm",
    "swin",
)
MODELS = ("decode_step", "generate", "score", "clap", "end_to_end")
OURS, RIVALS = "ours,torch", "sdpa,transformers,flashinfer,torchaudio,flashmel"
# This kernel could wait for itself forever, so it comes last.
ONE_LAUNCH, ALL_ELSE = "one launch", "^(?!.*one launch)"

# Of each process of tests, of which several run at once; rows are measured with all threads.
ONE_THREAD = ("env", "OMP_NUM_THREADS=1")


def environment() -> dict[str, str]:
    """Return the environment of programs that import this checkout first, and then an outer `PYTHONPATH`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def check(sanitizer: str) -> list[Step]:
    """Return the steps of a GPU's tests. sanitizer: the command of compute-sanitizer."""

    def watched(tool: str, *environment: str) -> Step:
        program = (sanitizer, "--tool", tool, "--error-exitcode", "1")
        tests = _pytest("gpu", "tests/ops", "tests/kernels", "--only-tests-in", str(SANITIZED))
        return Step(tool, (*ONE_THREAD, *environment, *program, *tests), 90, 60, sanitized=True)

    def tests(markers: str, *words: str) -> tuple[str, ...]:
        return (*ONE_THREAD, *_pytest(markers, *words))

    log_mel = "tests/ops/test_log_mel.py", "tests/ops/test_log_mel_calls.py"
    apart = "tests/kernels/test_capture.py", *log_mel
    triton = "tests/ops", "tests/kernels", *(f"--ignore={file}" for file in apart)
    return [
        Step("kernels in bfloat16", tests("gpu and bfloat16", *triton), 150, 60, workers=8),
        Step(
            "native library",
            tests("gpu", "tests/gpu/test_native_on_gpu.py", *log_mel),
            100,
            90,
        ),
        Step(
            "engine",
            tests(
                "gpu",
                *(f"tests/gpu/test_{it}.py" for it in ("runner_on_gpu", "int8_on_gpu", "second_device")),
                "tests/engine",
            ),
            120,
            60,
            workers=4,
        ),
        Step("capture", tests("gpu", "tests/kernels/test_capture.py"), 40, 30),
        Step(
            "models",
            tests("gpu", *(f"tests/gpu/test_{it}_on_gpu.py" for it in ("models", "generate", "clap", "features"))),
            60,
            30,
        ),
        Step("kernels in other types", tests("gpu and not bfloat16", *triton), 150, 60, workers=8),
        # The checker sees a tensor's bounds where every tensor is an allocation of its own.
        watched("memcheck", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"),
        watched("racecheck"),
        Step("persistent step", tests("gpu", "tests/gpu/test_persistent_on_gpu.py"), 60, 30),
    ]


def bench(rows: Path) -> list[Step]:
    """Return the steps that measure. rows: the folder for them."""

    def step(name: str, workloads: tuple[str, ...], seconds: float, groups: str = OURS, names: str = ALL_ELSE) -> Step:
        words = (
            "-m",
            "benchmarks.gpu.measuring",
            *workloads,
            "--groups",
            groups,
            "--names",
            names,
            "--rows",
            str(rows),
        )
        return Step(name, (sys.executable, *words), seconds, 60)

    return [
        step("rows of kernels", KERNELS, 210),
        step("rows of the decode step", ("decode_step",), 90),
        step("rows of generate", ("generate",), 100),
        step("rows of score", ("score", "clap"), 50),
        step("rows end to end", ("end_to_end",), 40),
        step("rows of rivals", (*KERNELS, *MODELS), 120, RIVALS),
        step("rows of the persistent step", ("decode_step",), 30, names=ONE_LAUNCH),
    ]


def evidence(sanitizer: str, rows: Path) -> list[Step]:
    """Return the steps that test, then measure, then run the persistent step."""
    *tests, persistent = check(sanitizer)
    *measured, one_launch = bench(rows)
    return [*tests, *measured, persistent, one_launch]


def _pytest(markers: str, *words: str) -> tuple[str, ...]:
    options = ("--continue-on-collection-errors", "-p", "benchmarks.gpu.testing", "-p", "no:cacheprovider")
    return (sys.executable, "-m", "pytest", "-q", *options, "-m", markers, *words)
