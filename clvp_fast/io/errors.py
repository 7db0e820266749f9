"""Errors as sentences: the part that a person needs to read, and a check of whole numbers."""

from numbers import Integral
from typing import Any


def sentence(error: Exception) -> str:
    """Return `error` in one line. The package's own errors are sentences; other errors are shown with their type."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (ValueError, TypeError, OSError)):
        return text
    return f"{type(error).__name__}: {text}"


def shown(value, longest: int = 100) -> str:
    """Return `repr(value)`, cut to a sentence's length; Python refuses to print integers of thousands of digits."""
    try:
        return cut(repr(value), longest)
    except Exception:
        return f"a {type(value).__name__} that cannot be printed"


def require_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raise `ValueError` unless `value` is a whole number in a range; True and False are none."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or int(value) < least or (most is not None and int(value) > most):
        wanted = f"from {least} up" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {wanted}, not {shown(value)}")


def cut(text: str, longest: int) -> str:
    """Cut `text` to `longest` characters; three dots mark a cut."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
