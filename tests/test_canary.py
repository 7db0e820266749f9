"""`make canary`: what it installs, and the table that it makes of pytest's report."""

import tomllib
from pathlib import Path
from xml.etree import ElementTree

from tests.canary import SUITES, newest, rows, table

ROOT = Path(__file__).resolve().parents[1]
REPORT = """<testsuites><testsuite>
<testcase classname="tests.models.clvp.test_parity_decoder.TestOne" name="test_a"/>
<testcase classname="tests.models.clvp.test_parity_decoder" name="test_b"><failure message="no"/></testcase>
<testcase classname="tests.models.clvp.test_parity_decoder" name="test_c"><skipped/></testcase>
<testcase classname="" name="tests.ops.test_log_mel"><error message="does not import"/></testcase>
<testcase classname="tests.ops.test_log_mel_of_another_name" name="test_d"/>
<testcase classname="tests.test_audio" name="test_e"/>
</testsuite></testsuites>"""


def test_bounds_are_left_out():
    wanted = newest(tomllib.loads((ROOT / "pyproject.toml").read_text()))
    assert {"torch", "transformers", "numpy", "triton", "pytest", "ray[data]", "pytest-random-order"} <= set(wanted)
    assert not [requirement for requirement in wanted if set(requirement) & set("<>=!~; ")]
    assert not [requirement for requirement in wanted if requirement.startswith(("clvp", "ruff"))]


def test_every_suite_is_there():
    assert not [suite for suites in SUITES.values() for suite in suites if not (ROOT / "tests" / suite).exists()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = " ".join([*project["dependencies"], *project["optional-dependencies"]["kernels"], "ray"])
    assert not [package for package in SUITES if package not in named]


def test_a_row_for_each_package():
    found = {row.package: row for row in rows(ElementTree.fromstring(REPORT), {"torch": "2.99.0", "soxr": "1.0"})}
    assert found.keys() == SUITES.keys()
    assert found["torch"] == ("torch", "2.99.0", 2, 2, "tests.models.clvp.test_parity_decoder::test_b")
    assert found["numpy"] == ("numpy", "missing", 0, 1, "tests.ops.test_log_mel::tests.ops.test_log_mel")
    assert found["soxr"] == ("soxr", "1.0", 1, 0, "")
    head, *lines = table(list(found.values())).splitlines()
    assert head.split() == ["package", "version", "passed", "failed", "first", "failure"]
    assert len(lines) == len(SUITES) and lines[0].split()[:4] == ["torch", "2.99.0", "2", "2"]
