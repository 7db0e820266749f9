"""Operations that end later: each thread commits those that it began to a group, and waits for all but its newest."""

from dataclasses import dataclass, replace

import numpy as np

from tests.ptx.kinds import i8


@dataclass
class _Group:
    """mask: the threads whose group this still is. begun: operations, each with its own `mask`."""

    mask: np.ndarray
    begun: list


class Groups:
    """Groups of all threads of a batch; those that commit together are kept together."""

    def __init__(self, n: int):
        self.n, self.open, self.groups = n, [], []

    def mask(self, mask):
        return np.ones(self.n, np.bool_) if mask is None else mask.copy()

    def begin(self, operation) -> None:
        """Begin an operation, a dataclass with a `mask` of its threads."""
        self.open.append(operation)

    def commit(self, mask) -> None:
        everyone = self.mask(mask)
        mine = [replace(operation, mask=operation.mask & everyone) for operation in self.open]
        rest = [replace(operation, mask=operation.mask & ~everyone) for operation in self.open]
        self.open = [operation for operation in rest if operation.mask.any()]
        self.groups.append(_Group(everyone, mine))

    def wait(self, left: int, mask) -> list:
        """Return the operations that end, with the threads for which they do, the oldest first."""
        everyone, newer, ended = self.mask(mask), np.zeros(self.n, i8), []
        for group in reversed(self.groups):
            done = everyone & group.mask & (newer >= left)
            newer += group.mask
            if done.any():
                ended.append([(operation, done & operation.mask) for operation in group.begun])
                group.mask = group.mask & ~done
        self.groups = [group for group in self.groups if group.mask.any()]
        return [pair for group in reversed(ended) for pair in group if pair[1].any()]
