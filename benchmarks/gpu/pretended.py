"""A device that only counts: torch says that a GPU is there, and nothing may run on it.

A plugin of pytest (`-p benchmarks.gpu.pretended`), which collects then what a GPU would be given, and nothing else.
"""

from types import SimpleNamespace

import pytest
import torch

#: Of an H200.
PROPERTIES = SimpleNamespace(name="a GPU that only counts", L2_cache_size=50 * 2**20, total_memory=139 * 2**30)


def pretend() -> None:
    """Let torch report a GPU in this process from now on."""
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: PROPERTIES
    torch.version.cuda = torch.version.cuda or "13.0"
    torch.cuda.get_device_name = lambda device=None: PROPERTIES.name


def pytest_configure(config):
    if not config.option.collectonly:
        raise pytest.UsageError("a GPU that only counts runs no test: pass --collect-only")
    config.option.capture = "no"


pretend()
