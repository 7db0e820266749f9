"""The style of pictures of results, which are drawn without a display."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib

#: One token of the original stands for 1024 samples at 22.05 kHz.
TOKENS_PER_SECOND = 22050 / 1024

_STYLE: dict[Any, Any] = {  # matplotlib types the names as literals
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.dpi": 150,
}


@contextmanager
def plot_style() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Characters that the font lacks show as boxes in the title; a warning on the terminal would not help.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
