"""What a person needs to read of an error."""


def sentence(error: Exception) -> str:
    """`error` in one line. The package's own errors are sentences; any other is named with its type."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (ValueError, TypeError, OSError)):
        return text
    return f"{type(error).__name__}: {text}"
