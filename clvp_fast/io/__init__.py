"""Atomic files, errors in a sentence, levels of recordings, and the style of pictures."""
