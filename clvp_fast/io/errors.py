"""The part of an error that a person needs to read."""


def sentence(error: Exception) -> str:
    """`error` in one line. The package's own errors are sentences; any other is named with its type."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (ValueError, TypeError, OSError)):
        return text
    return f"{type(error).__name__}: {text}"


def shown(value, longest: int = 100) -> str:
    """`repr(value)`, cut to what a sentence can hold; Python refuses to print whole numbers of thousands of digits."""
    try:
        return cut(repr(value), longest)
    except Exception:
        return f"a {type(value).__name__} that cannot be printed"


def cut(text: str, longest: int) -> str:
    """`text`, of which no more than `longest` characters are left; three dots say that there were more."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
