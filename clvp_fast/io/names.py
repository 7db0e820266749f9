"""Names that the package reserves, and the nearest name to a mistyped one."""

import difflib
from collections.abc import Iterable

#: Names of the checkpoints that come with the package. A folder of such a name is written ./demo.
RESERVED = ("demo", "random")

# The least similarity of two words, from 0 to 1, for one to be suggested for the other.
_ALIKE = 0.6


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the word of `known` that `word` probably misspells, or None."""
    return next(iter(difflib.get_close_matches(word, list(known), 1, _ALIKE)), None)
