""".ci/constraints.txt pins what pyproject.toml names, and is what `make` installed."""

import re
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE = ".ci/constraints.txt"


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / FILE).read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines), (
        "one exact release of each, name normalized"
    )
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines), "a package is pinned twice"
    return found


def test_every_dependency_has_a_pin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(requirement for extra in extras.values() for requirement in extra)]
    names = {normalized(re.match(r"[\w.-]+", requirement)[0]) for requirement in wanted} - {project["name"]}
    assert {"torch", "transformers", "ray", "pytest-random-order", "ruff"} <= names
    assert not names - pins().keys()


def test_an_exact_requirement_is_pinned_to_the_same():
    text = (ROOT / "pyproject.toml").read_text()
    exact = {normalized(name): release for name, release in re.findall(r'"([\w.-]+)==([\w.]+)"', text)}
    assert exact and exact.items() <= pins().items()


def test_the_environment_is_what_the_pins_say():
    stamp = Path(sys.prefix) / ".stamp-runtime"
    if not stamp.is_file() or stamp.read_text().strip() != FILE:
        pytest.skip(f"this environment was not made by `make` with {FILE}")
    # The part of a release behind `+` names a build: torch's for CPUs.
    installed = {normalized(found.name): found.version.split("+")[0] for found in distributions(path=[site_packages()])}
    wrong = {name: installed[name] for name, release in pins().items() if installed.get(name, release) != release}
    assert not wrong, f"installed, and pinned to another release: {wrong}"
    assert {"torch", "numpy", "transformers", "pytest"} <= installed.keys()


def site_packages() -> str:
    """Return the environment's own folder of packages, even if `PYTHONPATH` puts others before it."""
    (folder,) = Path(sys.prefix).glob("lib/python3*/site-packages")
    return str(folder)
