"""The versions that results depend on."""

import platform
from importlib.metadata import PackageNotFoundError, version

import clvp_fast


def versions() -> dict[str, str]:
    """Return the version of each package by name; `absent` if an optional package is not installed."""
    found = {"clvp_fast": clvp_fast.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "triton", "numpy", "soundfile", "soxr"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
