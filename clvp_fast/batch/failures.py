"""The one place where an exception becomes a row's failure, and where a fault of the job is told from it."""

import errno
import re

from clvp_fast.engine.sampling_params import SAMPLING
from clvp_fast.io.errors import cut, sentence
from clvp_fast.io.files import UnwritableError
from clvp_fast.native import NativeLibraryError

#: Characters of a failure, at most: a row may hold megabytes, and its failure tells its kind and its beginning.
LONGEST = 500

# What the system refuses to every row alike: no room on the disk, no memory, no more files, a file server that is gone.
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


# Beginnings of sentences on what stands in a row itself, which stays as it is as long as the job lasts.
_COLUMN = "|".join(("text", "voice", "bytes of a voice", *SAMPLING))
_OF_THE_ROW = re.compile(
    r"the text |nothing of the text |the row |each row needs |its id is |"
    rf"({_COLUMN}) (must|is not|has neither|cannot be)"
)


def may_pass(failure: str) -> bool:
    """Whether a row that failed may be spoken by a later run: its voice may be mended, and its text may not."""
    return not _OF_THE_ROW.match(failure)


def failure_of(error: Exception) -> str:
    """Why a row cannot be spoken, in one sentence of at most `LONGEST` characters.

    Raises:
        Exception: `error` itself, where it says nothing of the row: it stops the job, and its rows stay to be done.
    """
    if is_of_the_job(error):
        raise error
    text = sentence(error).encode(errors="backslashreplace").decode()  # valid Unicode
    return cut(text, LONGEST)


def is_of_the_job(error: Exception) -> bool:
    """Whether other rows would fail likewise: the disk, the system, the library or the device refuse to work."""
    import torch  # not at the top: who only reads rows need not load it

    device = (torch.OutOfMemoryError, torch.AcceleratorError)
    if isinstance(error, (UnwritableError, NativeLibraryError, ImportError, *device)):
        return True
    return isinstance(error, OSError) and error.errno in _SYSTEM
