"""Cases at several numbers of torch's threads."""

from collections.abc import Iterator

import torch


def at_threads(*counts: int) -> Iterator[int]:
    """Yield each of these numbers while torch has so many threads; afterwards it has as many as before."""
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            yield count
    finally:
        torch.set_num_threads(before)
