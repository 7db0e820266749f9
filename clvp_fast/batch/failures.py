"""The one place where an exception becomes a row's failure, or an error of the whole job."""

import errno
import re

from clvp_fast.engine.sampling_params import SAMPLING
from clvp_fast.io.errors import cut, sentence
from clvp_fast.io.files import UnwritableError
from clvp_fast.native import NativeLibraryError

#: The most characters of a failure: a row may hold megabytes, but its failure names its kind and its beginning.
LONGEST = 500

# Errors of the system that hit every row: a full disk, no memory, no more files, a lost file server.
_SYSTEM = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
    errno.ENOTCONN,
}


# The beginnings of sentences on a row's own content, which stays the same as long as the job lasts.
_COLUMN = "|".join(("text", "voice", "bytes of a voice", *SAMPLING))
_OF_THE_ROW = re.compile(
    r"the text |nothing of the text |the row |each row needs |its id is |"
    rf"({_COLUMN}) (must|is not|has neither|cannot be)"
)


def may_pass(failure: str) -> bool:
    """Tell whether a failed row may succeed in a later run: its voice may be mended, but its text may not."""
    return not _OF_THE_ROW.match(failure)


def failure_of(error: Exception) -> str:
    """Return in one sentence of at most `LONGEST` characters why a row cannot be spoken.

    Raises:
        Exception: `error` itself, where it says nothing of the row: it stops the job, and its rows stay to be done.
    """
    if is_of_the_job(error):
        raise error
    text = sentence(error).encode(errors="backslashreplace").decode()  # valid Unicode
    return cut(text, LONGEST)


def is_of_the_job(error: Exception) -> bool:
    """Tell whether other rows would fail likewise: the disk, the system, the library or the device is at fault."""
    import torch  # imported here, as code that only reads rows should not load it

    device = (torch.OutOfMemoryError, torch.AcceleratorError)
    if isinstance(error, (UnwritableError, NativeLibraryError, ImportError, *device)):
        return True
    return isinstance(error, OSError) and error.errno in _SYSTEM
