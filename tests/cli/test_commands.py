"""`info`, usage and exit codes."""

import json
import subprocess
import sys

import pytest

import clvp_fast


def test_info(cli):
    outcome = cli("info", "--json")
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    assert document["versions"]["clvp_fast"] == clvp_fast.__version__
    assert document["devices"][0].startswith("cpu")
    assert document["generate"].startswith("the engine decodes greedily and samples with temperature")
    plain = cli("info")
    assert plain.code == 0
    for operator in ("rotary_attention", "add_norm", "geglu_mlp", "gelu_mlp", "log_mel"):
        assert operator in json.dumps(document["operators"])
        assert operator in plain.out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["sing"],
        ["generate", "hello"],
        ["generate", "hello", "--voice", "a.wav", "--num-candidates", "0"],
        ["generate", "hello", "--voice", "a.wav", "--temperature", "-1"],
        ["generate", "hello", "--voice", "a.wav", "--temperature", "nan"],
        ["generate", "hello", "--voice", "a.wav", "--top-p", "1.5"],
        ["generate", "hello", "--voice", "a.wav", "--dtype", "float8"],
        ["generate", "hello", "--voice", "a.wav", "--seed", str(2**64)],
        ["generate", "--voice", "a.wav"],
        ["generate", "hello", "--texts", "texts.txt", "--voice", "a.wav"],
        ["generate", "hello", "--voice", "a.wav", "--preset", "slow"],
        ["generate", "hello", "--voice", "a.wav", "--scoring", "none"],
        ["generate", "hello", "--voice", "a.wav", "--typical-p", "0"],
        ["generate", "hello", "--voice", "a.wav", "--min-p", "1.5"],
        ["generate", "hello", "--voice", "a.wav", "--memory-fraction", "2"],
        ["convert", "--out", "x"],
    ],
)
def test_wrong_usage_is_2(cli, argv):
    outcome = cli(*argv)
    assert outcome.code == 2
    assert "usage: clvp-fast" in outcome.err


def test_version_and_help(cli):
    assert cli("--version").out == f"clvp-fast {clvp_fast.__version__}\n"
    for command in ("generate", "score", "mel", "convert", "info", "bench"):
        outcome = cli(command, "--help")
        assert outcome.code == 0 and f"usage: clvp-fast {command}" in outcome.out


def test_python_dash_m(tmp_path):
    done = subprocess.run([sys.executable, "-m", "clvp_fast", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"clvp-fast {clvp_fast.__version__}\n")
