"""Tests of kernels on their PTX run with tests/ptx/plugin.py, by `python -m tests.ptx`."""

from tests.kit.device import EMULATED

collect_ignore_glob = [] if EMULATED else ["test_*_as_ptx.py"]
