"""`sample`: thresholds, ties and maxima that lie in one of a row's two tiles, where few of its tokens decide.

Of 1100 tokens, a thread has eight of the first tile's 1024, every 32nd, and one of the second; of 256 one of each, and
no tile has places past the vocabulary.
"""

import pytest
import torch

from tests.kit import random
from tests.kit.backends import on
from tests.ops.test_sampling import ALL, KERNELS, NEUTRAL, TORTOISE, check, check_vocabulary, columns

WIDE, FULL = 1100, 256


def one(count, device, **setting):
    """Make a tensor of each setting, all neutral but this one: the kernel has the code of every processor."""
    return columns([NEUTRAL | setting] * count, device)


def tiles(backend, first, second):
    """Return eight rows over two full tiles, of which some logits of one are given and the others are -inf."""
    logits = torch.full((8, FULL), -torch.inf)
    logits[:, : len(first)] = torch.tensor(first)
    logits[:, 128 : 128 + len(second)] = torch.tensor(second)
    return logits.to(backend.device)


@on(*KERNELS)
def test_ties_that_end_in_each_place(backend):
    """Remove the first of equal logits up to a lane's last token, and up to one of the second tile."""
    removed = [*range(32, 256, 32), 1000, 1034, 1099]
    rows = [NEUTRAL | {"top_p": 1 - (count + 0.5) / WIDE} for count in removed]
    logits = torch.full((len(removed), WIDE), 0.5, device=backend.device)
    tokens = check(logits, **columns(rows, backend.device))
    assert (tokens >= torch.tensor(removed, device=backend.device)).all() and tokens[-1] == WIDE - 1


def last_of_eight(vocab_size):
    """Return a token of each that a thread has in the first tile, and four times one of the second tile."""
    steps, warps = {FULL: (1, 4), WIDE: (8, 4), 8194: (32, 8)}[vocab_size]
    first = [(step % warps * steps + step) * 32 + 7 + step % 25 for step in range(steps)]
    return [*first, *[min(32 * steps * warps + 4, vocab_size - 1)] * 4]


@pytest.mark.parametrize("vocab_size", [FULL, WIDE, 8194])
@on(*KERNELS)
def test_the_last_of_eight_ties_stays(backend, vocab_size):
    """Remove seven equal logits, wherever a thread has the eighth; those of the last rows lie in both tiles."""
    last = last_of_eight(vocab_size)[:: 1 if backend.compiled or backend.name == "cpu" else 8]
    logits = torch.full((len(last), vocab_size), -torch.inf)
    for row, token in zip(logits, last, strict=True):
        row[token - 7 : token + 1] = 1.0
    settings = one(len(last), backend.device, top_p=1 - 7.5 / 8)
    assert check(logits.to(backend.device), **settings).tolist() == last


@on(*KERNELS)
def test_ties_of_which_none_is_removed(backend):
    """Keep the first token too, though it is the next that top-p would remove."""
    logits = torch.full((12, FULL), -torch.inf, device=backend.device)
    logits[:, :2] = 1.0
    assert set(check(logits, **one(12, backend.device, top_p=0.9)).tolist()) == {0, 1}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of top-p's bound, which is -inf without it
@pytest.mark.parametrize("tile", [0, 1])
@on(*KERNELS)
def test_the_lowest_scores_in_one_tile(backend, tile):
    """Keep by top-k a score of the tile without which all others are higher by more than one."""
    low = (-1.5 - torch.arange(128) / 128).tolist()
    logits = tiles(backend, *((low, [0.0]) if tile == 0 else ([0.0], low)))
    tokens = check(logits, **one(8, backend.device, top_k=100))
    assert ((tokens // 128 == tile) & (tokens % 128 < 99)).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of top-p's bound, which is -inf without it
@pytest.mark.parametrize("tile", [0, 1])
@on(*KERNELS)
def test_the_least_typical_scores_in_one_tile(backend, tile):
    """Keep them all, as the mass of the others is too small."""
    near, far = [0.0] * 128, [-1.0] * 128
    logits = tiles(backend, *((far, near) if tile == 0 else (near, far)))
    tokens = check(logits, **one(8, backend.device, typical_p=0.99))
    assert (tokens // 128 == tile).any() and (tokens // 128 != tile).any()


@pytest.mark.parametrize("vocab_size, place", [(FULL, 5), (FULL, 130), (FULL, 255), (WIDE, 1050), (8194, 8192)])
@on(*KERNELS)
def test_one_token_with_nearly_all_weight(backend, vocab_size, place):
    """Draw it and, greedily, take it; its weight alone is nearly the most that a whole number holds."""
    logits = random(2, vocab_size, seed=3, device=backend.device)
    logits[:, place] = 50.0
    assert check(logits).tolist() == check(logits, do_sample=False).tolist() == [place] * 2


# A warp of the first tile has fewer tokens than the second tile.
@pytest.mark.parametrize("vocab_size", [FULL, 384, 1280])
@pytest.mark.parametrize("settings", [TORTOISE, ALL], ids=["tortoise", "all"])
@on(*KERNELS)
def test_a_second_tile_longer_than_a_warp_s_part(backend, vocab_size, settings):
    check_vocabulary(backend, vocab_size, settings)
