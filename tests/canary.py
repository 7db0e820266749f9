"""The failures with the newest release of every dependency: `make canary`, once a month, by hand.

This makes an environment of its own with the newest of everything that pip offers: no constraints, and none of the
bounds of pyproject.toml. Then it runs the suites that use the packages, and prints a row for each package.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]

#: The tests that tell of a package, as folders and files below tests/.
SUITES = {
    "torch": ["models", "ops"],
    "transformers": ["models"],
    "triton": ["ops/test_norm.py", "ops/test_mlp.py", "ops/test_rotary_attention.py"],
    "numpy": [
        "models/clvp/test_feature_extraction.py",
        "models/clap/test_feature_extraction.py",
        "ops/test_log_mel.py",
        "ops/test_log_mel_calls.py",
    ],
    "safetensors": ["models/clvp/test_parity_checkpoints.py", "models/clap/test_checkpoints.py"],
    "huggingface_hub": ["models/clvp/test_parity_checkpoints.py", "models/clap/test_checkpoints.py"],
    "inflect": ["models/clvp/test_text_cleaning.py"],
    "unidecode": ["models/clvp/test_text_cleaning.py"],
    "soundfile": ["test_audio.py"],
    "soxr": ["test_audio.py"],
    "rich": ["cli"],
    "matplotlib": ["cli"],
    "pyarrow": ["batch/test_inputs.py", "batch/test_rows.py"],
    "ray": ["batch/test_distributed.py"],
}


class Row(NamedTuple):
    package: str
    version: str
    passed: int
    failed: int
    first_failure: str


def newest(pyproject: dict) -> list[str]:
    """Return packages to install: dependencies and the tests' extras, without bounds; `ray[data]` keeps its extra."""
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["kernels"], *extras["ray"], *extras["test"]]
    bare = [re.match(r"[\w.-]+(\[[\w,]+\])?", requirement)[0] for requirement in wanted]
    return [requirement for requirement in bare if not requirement.startswith(project["name"])]


def rows(report: ElementTree.Element, versions: dict[str, str]) -> list[Row]:
    """Make a row for each package from pytest's report in JUnit's format; a file that does not import is a failure."""
    results = []
    for package, suites in SUITES.items():
        places = tuple("tests." + suite.removesuffix(".py").replace("/", ".") for suite in suites)
        passed, failures = 0, []
        for case in report.iter("testcase"):
            # The name of a file that does not import takes the place of its tests' class name.
            module = case.get("classname") or case.get("name")
            if not any(module == place or module.startswith(place + ".") for place in places):
                continue
            if case.find("failure") is not None or case.find("error") is not None:
                failures.append(f"{module}::{case.get('name')}")
            elif case.find("skipped") is None:
                passed += 1
        version = versions.get(re.sub(r"[-_.]+", "-", package).lower(), "missing")
        results.append(Row(package, version, passed, len(failures), failures[0] if failures else ""))
    return results


def table(lines: list[Row]) -> str:
    """Lay out the rows below their heads, in columns."""
    cells = [tuple(name.replace("_", " ") for name in Row._fields), *(tuple(map(str, line)) for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def installed(python: Path) -> dict[str, str]:
    """Return the versions of an environment's packages, by their normalised names."""
    code = "import importlib.metadata as m; [print(d.name, d.version) for d in m.distributions()]"
    listed = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in map(str.split, listed.splitlines())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-canary", help="the environment, made anew")
    parser.add_argument("--workers", default="2", help="processes of pytest")
    parser.add_argument("pip_args", nargs="*", help="arguments of pip, behind --")
    options = parser.parse_args()
    python, report = options.venv / "bin" / "python", options.venv / "report.xml"
    subprocess.run([sys.executable, "-m", "venv", "--clear", options.venv], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--upgrade", *options.pip_args]
    subprocess.run([*pip, "pip"], check=True)
    subprocess.run([*pip, *newest(tomllib.loads((ROOT / "pyproject.toml").read_text()))], check=True)

    suites = sorted({f"tests/{suite}" for suites in SUITES.values() for suite in suites})
    pytest = [python, "-m", "pytest", "-n", options.workers, "-q", "-m", "not gpu", f"--junitxml={report}", *suites]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    report.unlink(missing_ok=True)
    status = subprocess.run(pytest, cwd=ROOT, env=environment).returncode
    if not report.is_file():
        sys.exit(f"pytest ended without a report (status {status}): {options.venv} is as it was installed, look there")
    lines = rows(ElementTree.parse(report).getroot(), installed(python))
    print(f"\nPython {'.'.join(map(str, sys.version_info[:3]))}, the newest of everything that pip offers:\n")
    print(table(lines))
    return int(any(line.failed or not line.passed for line in lines))


if __name__ == "__main__":
    sys.exit(main())
