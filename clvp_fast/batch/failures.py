"""Decides whether an exception is a row's failure or an error of the whole job."""

import errno
import re

from clvp_fast.engine.sampling_params import SAMPLING
from clvp_fast.io.errors import cut, sentence
from clvp_fast.io.files import UnwritableError
from clvp_fast.native import NativeLibraryError

#: The most characters of a failure: a row may hold megabytes, but its failure names only its kind and its beginning.
LONGEST = 500

# Errors of the system that affect every row: a full disk, no memory, too many open files, a lost file server.
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


# Beginnings of sentences about a row's own content, which stays the same during a job.
_COLUMN = "|".join(("text", "voice", "bytes of a voice", *SAMPLING))
_OF_THE_ROW = re.compile(
    r"the text |nothing of the text |the row |each row needs |its id is |"
    rf"({_COLUMN}) (must|is not|has neither|cannot be)"
)


def may_pass(failure: str) -> bool:
    """Tell whether a failed row may succeed in a later run: a voice's file may be mended, a row's text may not."""
    return not _OF_THE_ROW.match(failure)


def failure_of(error: Exception) -> str:
    """Return in one sentence of at most `LONGEST` characters why a row cannot be spoken.

    Raises:
        Exception: `error` itself, if it is not about the row: it stops the job, and the rows stay open.
    """
    if is_of_the_job(error):
        raise error
    text = sentence(error).encode(errors="backslashreplace").decode()  # valid Unicode
    return cut(text, LONGEST)


def is_of_the_job(error: Exception) -> bool:
    """Tell whether other rows would fail too, because the disk, the system, the library or the device is at fault."""
    import torch  # imported here, because code that only reads rows should not load it

    device = (torch.OutOfMemoryError, torch.AcceleratorError)
    if isinstance(error, (UnwritableError, NativeLibraryError, ImportError, *device)):
        return True
    return isinstance(error, OSError) and error.errno in _SYSTEM
