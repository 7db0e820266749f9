"""Names that the package keeps for itself, and the name that a mistyped one is near to."""

import difflib
from collections.abc import Iterable

#: Names of the checkpoints that come with the package. A folder that is called so is given as ./demo.
RESERVED = ("demo", "random")

# How alike two words must be, from 0 to 1, for one to be offered in place of the other.
_ALIKE = 0.6


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the word of `known` that `word` is probably meant to be, or None."""
    return next(iter(difflib.get_close_matches(word, list(known), 1, _ALIKE)), None)
