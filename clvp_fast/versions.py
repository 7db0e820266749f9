"""The versions that a result depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version

import clvp_fast


def versions() -> dict[str, str]:
    """Return package name to version; `absent` where an optional package is not installed."""
    found = {"clvp_fast": clvp_fast.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "triton", "numpy", "soundfile", "soxr"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
