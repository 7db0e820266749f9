"""Row failures: which errors become one, how long they may be, and which errors stop a job instead."""

import errno

import pytest
import torch

from clvp_fast.batch.failures import LONGEST, failure_of
from clvp_fast.io.files import UnwritableError
from clvp_fast.native import NativeLibraryError


class StrangeError(Exception):
    """Nobody's."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("top_k must be a number"), "top_k must be a number"),
        (OverflowError("int too big"), "OverflowError: int too big"),
        (MemoryError(), "MemoryError: MemoryError"),
        (RuntimeError("Could not determine home directory."), "RuntimeError: Could not determine home directory."),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (KeyError("x"), "KeyError: 'x'"),
        (StrangeError("two\nlines"), "StrangeError: two lines"),
        (PermissionError(errno.EACCES, "Permission denied", "a.wav"), "Permission denied: a.wav"),
        (ValueError("a name \udcff"), "a name \\udcff"),
    ],
)
def test_of_a_row(error, said):
    assert failure_of(error) == said


def test_length_is_bounded():
    said = failure_of(ValueError(f"text must be a string, not {b'x' * 600_000!r}"))
    assert said.startswith("text must be a string, not b'xxx") and len(said) == LONGEST and said.endswith("…")
    assert len(failure_of(ValueError("\udcff" * LONGEST))) == LONGEST


@pytest.mark.parametrize(
    "error",
    [
        UnwritableError(errno.EACCES, "cannot write"),
        NativeLibraryError("no compiler"),
        ImportError("no unidecode"),
        torch.OutOfMemoryError("none left"),
        torch.AcceleratorError("an illegal memory access"),
        *(OSError(number, "no") for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)),
        *(OSError(number, "no") for number in (errno.ENOMEM, errno.ESTALE, errno.ENOTCONN)),
    ],
)
def test_of_the_job(error):
    with pytest.raises(type(error)) as caught:
        failure_of(error)
    assert caught.value is error
