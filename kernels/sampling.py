"""Draw the next token of each candidate: processors, draw and bookkeeping in one launch, one program a row.

    x      = logits, penalised where seen, / temperature                          float32
    kept   = top-k, then top-p, then min-p, then typical-p of what was left       transformers' order and ties
    token  = the first whose cumulated weight exceeds u * (the sum of all), weights exp(x - max x) of the kept; or the
             first of the largest scores

logits `[N, V]`, float32, float16 or bfloat16; seen `[N, ceil(V / 32)]` int32; parameters, seed, candidate, step, out
and sampled (which rows draw) `[N]`. u is one number of Philox-4x32-10 with the key `seed` and the counter
`(step, candidate)`.

Nothing is sorted. A sort would only serve to find a threshold: the smallest score up to which the weights of a row add
up to a bound (to V - k + 1 with all weights 1; to more than 1 - p; and, with distances from the mean surprise in place
of scores, to the typical mass). Floats have the order of their bits, so 16 rounds of two bits each find it: a round
sums the weights below three candidate thresholds at once, in one reduction. Among equal scores, top-p's choice follows
from a count of the ties, which rows of float32 logits hardly ever need.

Chain of dependent reductions over a row, where the processor is on: maximum 1, top-k 16, top-p 1 + 16 + 1 (ties: 3
more), min-p 0, typical-p 2 + 16, draw 8. A row is read once and then lives in registers, 32 scores and as many weights
a thread, in programs of 8 warps. Two of them fit a multiprocessor and fill one another's waits, so that 256 rows are
one wave on an H200. A vocabulary little above a power of two (8194) is a tile of that power and a small second one:
half the work of padding. Moved: logits and bitmap once, 4 or 8 MB for 256 rows of 8194; the chain is the time.

Precision: sums below a threshold are float32 trees (14 roundings, against thousands in a sequential sum). The draw adds
whole numbers, the weights scaled to a sum of 2^31, exact in any order; their rounding matches the 32 bits of u, and a
token of less than 2^-32 is never drawn. exp has a relative error of at most (2 + max x - x) * 2^-23.
"""

import torch
import triton
import triton.language as tl

MAX_VOCAB = 16384
CHUNK = 32  # tokens of one step of the draw's outer sum

# (tokens of the first tile up to, num_warps), 2026-11. With 32 tokens a thread, scores and weights take half of its
# registers, and two programs of 8 warps fill those of a multiprocessor.
_TILES = ((1024, 4), (8192, 8), (16384, 16))
_REGISTERS = 128  # of a thread, at most
_SMALL = 16  # tokens of the second tile at least


@triton.jit
def _scores(
    logits_ptr, seen_ptr, columns, vocab_size, seen_word_stride, penalty_ptr, temperature_ptr, sampled
):  # fmt: skip
    """Return logits of one row, penalised and (if it is sampled) over the temperature; -inf past the vocabulary."""
    inside = columns < vocab_size
    x = tl.load(logits_ptr + columns, mask=inside, other=-float("inf")).to(tl.float32)
    if penalty_ptr is not None:
        penalty = tl.load(penalty_ptr).to(tl.float32)
        word = tl.load(seen_ptr + (columns // 32) * seen_word_stride, mask=inside, other=0)
        # One product and one quotient, one of which is by 1, because there are no registers for a third array.
        factor = tl.where((word >> (columns % 32)) & 1 != 0, penalty, 1.0)
        x = tl.div_rn(tl.where(x < 0, x * factor, x), tl.where(x < 0, 1.0, factor))
    if temperature_ptr is not None:
        # Correctly rounded, as in torch, so that equal scores stay equal and others keep their order.
        x = tl.div_rn(x, tl.where(sampled, tl.load(temperature_ptr).to(tl.float32), 1.0))
    return x


@triton.jit
def _total(a, b):
    """Sum over both tiles."""
    return tl.sum(a, 0) + tl.sum(b, 0)


@triton.jit
def _float_of_rank(rank):
    """Return the float32 at a place (uint32) in the order of all floats; +inf beyond it."""
    rank = tl.minimum(rank, 0xFF800000)
    bits = tl.where(rank >= 0x80000000, rank ^ 0x80000000, rank ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _below(x, weight, first, second, third):
    """Return the weights at or below three thresholds, `[2, 2]`; the fourth is out of reach."""
    # A comparison that gives a float, and a fused product and sum: two instructions instead of three for a choice.
    sums = tl.join(
        tl.join((x <= first).to(tl.float32) * weight, (x <= second).to(tl.float32) * weight),
        tl.join((x <= third).to(tl.float32) * weight, tl.full(x.shape, float("inf"), tl.float32)),
    )
    return tl.sum(sums, 0)


@triton.jit
def _threshold(x, x2, weight, weight2, bound, STRICT: tl.constexpr):
    """Find the smallest value up to which the weights add up to `bound` (STRICT: to more); +inf if they never do."""
    low, step = tl.full((), 0, tl.uint32), tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):
        first = _float_of_rank(low + (step - 1))
        second = _float_of_rank(low + (2 * step - 1))
        third = _float_of_rank(low + (3 * step - 1))
        sums = _below(x, weight, first, second, third) + _below(x2, weight2, first, second, third)
        short = sums <= bound if STRICT else sums < bound
        low += tl.sum(tl.sum(short.to(tl.int32), 0), 0).to(tl.uint32) * step
        step = step >> 2
    return _float_of_rank(low)


@triton.jit
def _first_above(cumulated, target, SIZE: tl.constexpr):
    return tl.min(tl.where(cumulated > target, tl.arange(0, SIZE), SIZE - 1), 0)


@triton.jit
def _ends(count, count2, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Cumulate whole numbers: of each chunk of the first tile `[BLOCK / CHUNK]`, of each token of the second."""
    ends = tl.cumsum(tl.sum(tl.reshape(count, (BLOCK // CHUNK, CHUNK)), 1), 0)
    return ends, tl.max(ends, 0) + tl.cumsum(count2, 0)


@triton.jit
def _locate(count, ends, ends2, target, BLOCK: tl.constexpr, SMALL: tl.constexpr, CHUNK: tl.constexpr):
    """Find the first token whose cumulated number exceeds `target`: first its chunk, then its place in it."""
    CHUNKS: tl.constexpr = BLOCK // CHUNK
    before = ends <= target
    chunk = tl.sum(before.to(tl.int32), 0)
    start = tl.max(tl.where(before, ends, 0), 0)
    here = (tl.arange(0, CHUNKS) == chunk)[:, None]
    inner = tl.sum(tl.where(here, tl.reshape(count, (CHUNKS, CHUNK)), 0), 0)  # [CHUNK]
    place = chunk * CHUNK + _first_above(start + tl.cumsum(inner, 0), target, CHUNK)
    return tl.where(chunk < CHUNKS, place, BLOCK + _first_above(ends2, target, SMALL))


@triton.jit
def _top_p(x, x2, weight, weight2, largest, mass, BLOCK: tl.constexpr, SMALL: tl.constexpr, CHUNK: tl.constexpr):
    """Remove the least weights that together stay within 1 - mass; at least the last largest one is kept."""
    spare = (1.0 - mass).to(tl.float32) * _total(weight, weight2)
    bound = tl.minimum(_threshold(x, x2, weight, weight2, spare, STRICT=True), largest)
    below = _total(tl.where(x < bound, weight, 0.0), tl.where(x2 < bound, weight2, 0.0))
    weight, weight2 = tl.where(x < bound, 0.0, weight), tl.where(x2 < bound, 0.0, weight2)
    # Of equal scores the first tokens are removed, as many as still fit.
    removed = ((spare - below) / tl.exp(bound - largest)).to(tl.int32)
    if removed > 0:
        # The weights of the ties are negative meanwhile, so that the scan needs no other registers.
        weight, weight2 = tl.where(x == bound, -weight, weight), tl.where(x2 == bound, -weight2, weight2)
        tie, tie2 = (weight < 0).to(tl.int32), (weight2 < 0).to(tl.int32)
        before, before2 = tl.sum(tie, 0), tl.sum(tie2, 0)
        removed = tl.minimum(removed, before + before2 - 1)
        weight = tl.where((weight < 0) & (tl.cumsum(tie, 0) <= removed), 0.0, tl.abs(weight))
        weight2 = tl.where((weight2 < 0) & (before + tl.cumsum(tie2, 0) <= removed), 0.0, tl.abs(weight2))
    return weight, weight2


@triton.jit
def _typical(weight, weight2, mass):
    """Keep the weights of the tokens whose surprise is nearest to the entropy, up to `mass`.

    With l the logarithm of a weight, surprise minus entropy is the mean of l minus l: the normalising terms cancel.
    """
    total = _total(weight, weight2)
    # A weight of 0 may have any logarithm: it adds nothing and is not kept.
    logarithm, logarithm2 = tl.log(tl.maximum(weight, 1e-37)), tl.log(tl.maximum(weight2, 1e-37))
    mean = _total(weight * logarithm, weight2 * logarithm2) / total
    far, far2 = tl.abs(mean - logarithm), tl.abs(mean - logarithm2)
    bound = _threshold(far, far2, weight, weight2, mass * total, STRICT=False)
    return tl.where(far <= bound, weight, 0.0), tl.where(far2 <= bound, weight2, 0.0)


@triton.jit
def _likeliest(x, x2, largest, columns, columns2, vocab_size):
    """Return the first of the largest scores."""
    first = tl.min(tl.where(x == largest, columns, vocab_size), 0)
    return tl.minimum(first, tl.min(tl.where(x2 == largest, columns2, vocab_size), 0))


@triton.jit
def _random_bits(seed, candidate, step):
    """Return 32 random bits as uint32."""
    step, candidate = step.to(tl.uint64), candidate.to(tl.uint64)
    word, _, _, _ = tl.philox(
        seed,
        (step & 0xFFFFFFFF).to(tl.uint32),
        (step >> 32).to(tl.uint32),
        (candidate & 0xFFFFFFFF).to(tl.uint32),
        (candidate >> 32).to(tl.uint32),
    )
    return word


@triton.jit
def _draw(weight, weight2, bits, BLOCK: tl.constexpr, SMALL: tl.constexpr, CHUNK: tl.constexpr):
    """Return the token at (bits + 0.5) / 2^32 of the cumulative distribution."""
    # Whole numbers that add up to nearly 2^31 have exact sums in any order.
    scale = 2147418112.0 / _total(weight, weight2)
    count, count2 = (weight * scale + 0.5).to(tl.int32), (weight2 * scale + 0.5).to(tl.int32)
    ends, ends2 = _ends(count, count2, BLOCK, CHUNK)
    target = ((2 * bits.to(tl.uint64) + 1) * tl.max(ends2, 0).to(tl.uint64)) >> 33
    return _locate(count, ends, ends2, target.to(tl.int32), BLOCK, SMALL, CHUNK)


@triton.jit
def _sampled(
    x, x2, largest, top_k_ptr, top_p_ptr, typical_p_ptr, min_p_ptr, seed_ptr, candidate_ptr, step_ptr,
    row, vocab_size, BLOCK: tl.constexpr, SMALL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Draw from the tokens that the processors leave of a row's tempered scores."""
    if top_k_ptr is not None:
        top_k = tl.load(top_k_ptr + row)
        if (top_k > 0) & (top_k < vocab_size):
            ones, ones2 = tl.full(x.shape, 1.0, tl.float32), tl.full(x2.shape, 1.0, tl.float32)
            # Places past the vocabulary are -inf and counted, at the low end.
            bound = _threshold(x, x2, ones, ones2, (BLOCK + SMALL + 1 - top_k).to(tl.float32), STRICT=False)
            x, x2 = tl.where(x < bound, -float("inf"), x), tl.where(x2 < bound, -float("inf"), x2)
    weight, weight2 = tl.exp(x - largest), tl.exp(x2 - largest)
    if top_p_ptr is not None:
        top_p = tl.load(top_p_ptr + row).to(tl.float64)
        if top_p < 1.0:
            weight, weight2 = _top_p(x, x2, weight, weight2, largest, top_p, BLOCK, SMALL, CHUNK)
    if min_p_ptr is not None:
        # The largest weight is 1.
        min_p = tl.load(min_p_ptr + row).to(tl.float32)
        weight, weight2 = tl.where(weight < min_p, 0.0, weight), tl.where(weight2 < min_p, 0.0, weight2)
    if typical_p_ptr is not None:
        typical_p = tl.load(typical_p_ptr + row).to(tl.float32)
        if typical_p < 1.0:
            weight, weight2 = _typical(weight, weight2, typical_p)
    bits = _random_bits(tl.load(seed_ptr + row), tl.load(candidate_ptr + row), tl.load(step_ptr + row))
    return _draw(weight, weight2, bits, BLOCK, SMALL, CHUNK)


# Rows of 8194 have no alignment. Other widths promise none either, so that all of them compile alike.
@triton.jit(do_not_specialize=["vocab_size", "logits_stride", "stop_token", "pad_token"])
def _sample_kernel(
    logits_ptr, seen_ptr, lengths_ptr, done_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, typical_p_ptr, min_p_ptr, penalty_ptr,
    seed_ptr, candidate_ptr, step_ptr, sampled_ptr, out_ptr,
    vocab_size, logits_stride, seen_stride, seen_word_stride, lengths_stride, done_stride, sampled_stride,
    stop_token, pad_token,
    DO_SAMPLE: tl.constexpr, BLOCK: tl.constexpr, SMALL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(done_ptr + row * done_stride):
        tl.store(out_ptr + row, pad_token)
        return
    logits_ptr += row * logits_stride
    seen_ptr += row * seen_stride
    if temperature_ptr is not None:
        temperature_ptr += row
    if penalty_ptr is not None:
        penalty_ptr += row
    columns, columns2 = tl.arange(0, BLOCK), BLOCK + tl.arange(0, SMALL)
    # If this is known for all rows, the compiler drops the other branch.
    sampled = tl.full((), DO_SAMPLE, tl.int1)
    if sampled_ptr is not None:
        sampled = tl.load(sampled_ptr + row * sampled_stride)
    x = _scores(logits_ptr, seen_ptr, columns, vocab_size, seen_word_stride, penalty_ptr, temperature_ptr, sampled)
    x2 = _scores(logits_ptr, seen_ptr, columns2, vocab_size, seen_word_stride, penalty_ptr, temperature_ptr, sampled)
    largest = tl.maximum(tl.max(x, 0), tl.max(x2, 0))

    if sampled:
        token = _sampled(
            x, x2, largest, top_k_ptr, top_p_ptr, typical_p_ptr, min_p_ptr, seed_ptr, candidate_ptr, step_ptr,
            row, vocab_size, BLOCK, SMALL, CHUNK,
        )  # fmt: skip
    else:
        token = _likeliest(x, x2, largest, columns, columns2, vocab_size)
    # Rows of only NaN and -inf have no answer, but a write must stay inside.
    token = tl.minimum(token, vocab_size - 1)

    tl.store(out_ptr + row, token)
    word_ptr = seen_ptr + (token // 32) * seen_word_stride
    tl.store(word_ptr, tl.load(word_ptr) | (1 << (token % 32)))
    length_ptr = lengths_ptr + row * lengths_stride
    tl.store(length_ptr, tl.load(length_ptr) + 1)
    tl.store(done_ptr + row * done_stride, token == stop_token)


def _tiles(vocab_size: int) -> dict[str, int]:
    """Return tiles and warps for a vocabulary."""
    power = 1 << (vocab_size.bit_length() - 1)
    rest = vocab_size - power
    if rest > power // 8 or power < CHUNK:
        power, rest = max(triton.next_power_of_2(vocab_size), CHUNK), 0
    small = max(triton.next_power_of_2(rest), _SMALL)
    num_warps = next(warps for limit, warps in _TILES if power <= limit)
    return {"BLOCK": power, "SMALL": small, "CHUNK": CHUNK, "num_warps": num_warps, "maxnreg": _REGISTERS}


def sample(
    logits: torch.Tensor,
    seen: torch.Tensor,
    lengths: torch.Tensor,
    done: torch.Tensor,
    temperature: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    typical_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    repetition_penalty: torch.Tensor | None,
    seed: torch.Tensor,
    candidate: torch.Tensor,
    step: torch.Tensor,
    stop_token: int,
    pad_token: int,
    do_sample: bool,
    sampled: torch.Tensor | None,
    *,
    out: torch.Tensor,
) -> None:
    """Write the tokens, and update `seen`, `lengths` and `done`.

    Args:
        logits: `[N, V]`, at least one row, 1 to `MAX_VOCAB` wide, columns at stride 1.
        seen: `[N, ceil(V / 32)]` int32, any strides.
        lengths, done: `[N]`, integer and bool, any stride.
        temperature, top_k, top_p, typical_p, min_p, repetition_penalty: `[N]`, contiguous, floating or integer; None
            leaves the processor out of the compiled kernel.
        seed, candidate, step, out: `[N]` int64, contiguous.
        do_sample: False: all rows take their largest score.
        sampled: `[N]` bool, any stride: the other rows take their largest score; only with `do_sample`.
    """
    rows, vocab_size = logits.shape
    _sample_kernel[(rows,)](
        logits, seen, lengths, done, temperature, top_k, top_p, typical_p, min_p, repetition_penalty,
        seed, candidate, step, sampled, out,
        vocab_size, logits.stride(0), *seen.stride(), lengths.stride(0), done.stride(0),
        0 if sampled is None else sampled.stride(0), stop_token, pad_token,
        DO_SAMPLE=do_sample, **_tiles(vocab_size),
    )  # fmt: skip
