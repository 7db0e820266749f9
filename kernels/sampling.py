"""Draw the next token of each candidate: processors, draw and bookkeeping in one launch, one program a row.

    x      = logits, penalised where seen, / temperature                          float32
    kept   = top-k, then top-p, then min-p, then typical-p of what was left       transformers' order and ties
    token  = the first whose cumulated weight exceeds u * (the sum of all), weights exp(x - max x) of the kept; or the
             first of the largest scores

logits `[N, V]`, float32, float16 or bfloat16; seen `[N, ceil(V / 32)]` int32; parameters, seed, candidate, step, out
and sampled (which rows draw) `[N]`. u is one number of Philox-4x32-10 with the key `seed` and the counter
`(step, candidate)`.

The rows of a decode step are slots. With `seq_lens`, a row is done where that is negative, and the state that the next
step begins with is written in the same launch: as operations of torch this took nine more.

Nothing is sorted. A sort would only serve to find a threshold: the smallest score up to which the weights of a row add
up to a bound (to V - k + 1 with all weights 1; to more than 1 - p; and, with distances from the mean surprise in place
of scores, to the typical mass). A range of scores that must hold it is halved twelve times: a halving sums the weights
up to its middle, with two instructions a token and one reduction. Then the least and the largest score in the range
are looked at. If they are equal, that is the threshold, exactly; else three more halvings follow, and so on. Among
equal scores, top-p's choice follows from a count of the ties.

Chain of dependent reductions over a row, where the processor is on: maximum 1, a threshold 14 and more, top-k 1 more,
top-p 2 (ties: 6 more), min-p 0, typical-p 3, draw 8. A row is read once and then lives in registers, 32 scores and as
many weights a thread, in programs of 8 warps. Two of them fit a multiprocessor and fill one another's waits, so that
256 rows are one wave on an H200. A thread sums its own tokens first, so that a reduction over threads is of one number
each. A vocabulary little above a power of two (8194) is a tile of that power and a second one with a token a thread:
half the work of padding. Moved: logits and bitmap once, 4 or 8 MB for 256 rows of 8194; instructions are the time.

Precision: sums below a threshold are float32 trees (14 roundings, against thousands in a sequential sum). The draw adds
whole numbers, the weights scaled to a sum of 2^31, exact in any order; their rounding matches the 32 bits of u, and a
token of less than 2^-32 is never drawn. exp has a relative error of at most (2 + max x - x) * 2^-23.
"""

import torch
import triton
import triton.language as tl

MAX_VOCAB = 16384

# (tokens of the first tile up to, num_warps), 2026-11. With 32 tokens a thread, scores and weights take half of its
# registers, and two programs of 8 warps fill those of a multiprocessor.
_TILES = ((1024, 4), (8192, 8), (16384, 16))
_REGISTERS = 128  # of a thread, at most
# Halvings of a range of scores before its values are looked at, and before each later look (docs/kernels.md), 2026-11.
_HALVINGS = tl.constexpr(12)
_MORE = tl.constexpr(3)
_LARGEST = tl.constexpr(3.4028234663852886e38)  # float32


@triton.jit
def _quotient(x, divisor):
    """Return x over one number, correctly rounded as in torch, so that equal scores stay equal and others in order.

    A division of its own finds the divisor's reciprocal for every x. Here two corrections follow one product: the first
    leaves an error below a unit in the last place, from which the second rounds correctly (Markstein, IBM Journal of
    Research and Development 34:1, 1990), as long as neither the divisor nor the quotient is near the ends of float32.
    """
    inverse = tl.div_rn(tl.full((), 1.0, tl.float32), divisor)
    near = x * inverse
    near = tl.where(tl.abs(near) < float("inf"), tl.fma(tl.fma(-near, divisor, x), inverse, near), near)
    return tl.where(tl.abs(near) < float("inf"), tl.fma(tl.fma(-near, divisor, x), inverse, near), near)


@triton.jit
def _scores(
    logits_ptr, seen_ptr, columns, words, vocab_size, seen_word_stride, penalty_ptr, temperature_ptr, sampled
):  # fmt: skip
    """Return logits of one row, penalised and (if it is sampled) over the temperature; -inf past the vocabulary."""
    inside = columns < vocab_size
    x = tl.load(logits_ptr + columns, mask=inside, other=-float("inf")).to(tl.float32)
    if penalty_ptr is not None:
        penalty = tl.load(penalty_ptr).to(tl.float32)
        word = tl.load(seen_ptr + words * seen_word_stride, mask=inside, other=0)
        divided = _quotient(x, penalty)
        punished = tl.where(divided < 0, x * penalty, divided)
        x = tl.where((word >> (columns % 32)) & 1 != 0, punished, x)
    if temperature_ptr is not None:
        x = _quotient(x, tl.where(sampled, tl.load(temperature_ptr).to(tl.float32), 1.0))
    return x


@triton.jit
def _total(a, b):
    """Sum over both tiles: first in each thread, then once over all of them."""
    return tl.sum(tl.sum(a, 0) + tl.sum(b, 0))


@triton.jit
def _least(a, b):
    return tl.min(tl.minimum(tl.min(a, 0), tl.min(b, 0)))


@triton.jit
def _most(a, b):
    return tl.max(tl.maximum(tl.max(a, 0), tl.max(b, 0)))


@triton.jit
def _threshold(x, x2, weight, weight2, low, high, bound, STRICT: tl.constexpr):
    """Find the smallest value in (low, high] up to which the weights add up to `bound` (STRICT: to more).

    If they never do, the largest value. `low` and `high` are finite, with nothing but weights of 0 above `high`.
    """
    least, several, halvings = low, high > low, _HALVINGS
    while several:
        for _ in range(halvings):
            middle = 0.5 * low + 0.5 * high
            # A comparison that gives a float, and a fused product and sum: two instructions instead of three.
            total = _total((x <= middle).to(tl.float32) * weight, (x2 <= middle).to(tl.float32) * weight2)
            short = total <= bound if STRICT else total < bound
            low, high = tl.where(short, middle, low), tl.where(short, high, middle)
        least = _least(tl.where(x > low, x, float("inf")), tl.where(x2 > low, x2, float("inf")))
        most = _most(tl.where(x <= high, x, -float("inf")), tl.where(x2 <= high, x2, -float("inf")))
        several, halvings = least < most, _MORE
    return least


@triton.jit
def _locate(count, count2, target):
    """Find the first token whose cumulated whole number exceeds `target`: the warp that has it, then its place."""
    EACH: tl.constexpr = count.shape[0]
    WARPS: tl.constexpr = count.shape[1]
    # As many as a warp has or, where that is more, as many as the second tile.
    MOST: tl.constexpr = EACH if EACH > WARPS else WARPS
    thread, token = tl.arange(0, WARPS * 32), tl.arange(0, MOST * 32)
    ends = tl.cumsum(tl.reshape(tl.sum(count, 0), (WARPS * 32,)), 0)
    before = (thread % 32 == 31) & (ends <= target)  # the last thread of each warp
    warp = tl.sum(before.to(tl.int32), 0)
    start = tl.max(tl.where(before, ends, 0), 0)
    # The tokens of that warp, in their order, each on a thread of any warp. Behind all warps lies the second tile.
    places = (token // 32 % EACH * WARPS + tl.minimum(warp, WARPS - 1)) * 32 + token % 32
    own = tl.gather(tl.reshape(count, (EACH * WARPS * 32,)), places, 0)
    rest = tl.gather(tl.reshape(count2, (WARPS * 32,)), token % (WARPS * 32), 0)
    # Those that come again add nothing: their sum would overflow.
    here = tl.where(token < tl.where(warp < WARPS, EACH, WARPS) * 32, tl.where(warp < WARPS, own, rest), 0)
    place = tl.sum((start + tl.cumsum(here, 0) <= target).to(tl.int32), 0)
    return warp * (EACH * 32) + place


@triton.jit
def _top_p(x, x2, weight, weight2, largest, mass, steps, begin, begin2):
    """Remove the least weights that together stay within 1 - mass; at least the last largest one is kept."""
    total = _total(weight, weight2)
    spare = (1.0 - mass).to(tl.float32) * total
    # All tokens up to `low` together weigh less than `spare`, or nothing: exp(-104) is 0.
    TOKENS: tl.constexpr = x.numel + x2.numel
    low = largest + tl.maximum(tl.log(tl.maximum(spare / TOKENS, 1e-37)) - 0.01, -104.0)
    # Without top-p nothing is searched, and nothing lies below the bound: a branch around it would cost registers.
    low, high = tl.where(mass < 1.0, low, -float("inf")), tl.where(mass < 1.0, largest, -float("inf"))
    bound = tl.minimum(_threshold(x, x2, weight, weight2, low, high, spare, STRICT=True), largest)
    lost, lost2 = (x < bound).to(tl.float32) * weight, (x2 < bound).to(tl.float32) * weight2
    below = _total(lost, lost2)
    weight, weight2 = weight - lost, weight2 - lost2
    # Of equal scores the first tokens are removed, as many as still fit.
    removed = ((spare - below) / tl.exp(bound - largest)).to(tl.int32)
    if (removed > 0) & (mass < 1.0):
        # The weights of the ties are negative meanwhile, so that the scores need no registers any more.
        weight, weight2 = tl.where(x == bound, -weight, weight), tl.where(x2 == bound, -weight2, weight2)
        tie, tie2 = (weight < 0).to(tl.int32), (weight2 < 0).to(tl.int32)
        last = _locate(tie, tie2, tl.minimum(removed, _total(tie, tie2) - 1) - 1)
        weight = tl.where((weight < 0) & (steps <= last - begin), 0.0, tl.abs(weight))
        weight2 = tl.where((weight2 < 0) & (begin2 <= last), 0.0, tl.abs(weight2))
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
    most = _most(tl.where(weight > 0.0, far, 0.0), tl.where(weight2 > 0.0, far2, 0.0))
    bound = _threshold(far, far2, weight, weight2, tl.full((), -1.0, tl.float32), most, mass * total, STRICT=False)
    return tl.where(far <= bound, weight, 0.0), tl.where(far2 <= bound, weight2, 0.0)


@triton.jit
def _likeliest(x, x2, largest, steps, begin, begin2, vocab_size):
    """Return the first of the largest scores."""
    first = tl.min(tl.where(x == largest, steps, vocab_size), 0)[None] + begin
    return tl.min(tl.min(tl.minimum(first, tl.where(x2 == largest, begin2, vocab_size)), 0))


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
def _draw(weight, weight2, bits):
    """Return the token at (bits + 0.5) / 2^32 of the cumulative distribution."""
    # Whole numbers that add up to nearly 2^31 have exact sums in any order.
    scale = 2147418112.0 / _total(weight, weight2)
    count, count2 = (weight * scale + 0.5).to(tl.int32), (weight2 * scale + 0.5).to(tl.int32)
    target = ((2 * bits.to(tl.uint64) + 1) * _total(count, count2).to(tl.uint64)) >> 33
    return _locate(count, count2, target.to(tl.int32))


@triton.jit
def _top_k(x, x2, largest, k, vocab_size):
    """Set scores below the k-th largest to -inf, if k is above 0 and below the vocabulary's size."""
    lowest = _least(tl.where(x > -float("inf"), x, largest), tl.where(x2 > -float("inf"), x2, largest))
    low = tl.maximum(lowest - (1.0 + 1e-6 * tl.abs(lowest)), -_LARGEST)
    ones, ones2 = tl.full(x.shape, 1.0, tl.float32), tl.full(x2.shape, 1.0, tl.float32)
    # Places past the vocabulary are -inf and counted, at the low end.
    fewest = -k.to(tl.float32) + (x.numel + x2.numel + 1)
    high = tl.where((k > 0) & (k < vocab_size), tl.minimum(largest, _LARGEST), low)
    bound = _threshold(x, x2, ones, ones2, low, high, fewest, STRICT=False)
    return tl.where(x < bound, -float("inf"), x), tl.where(x2 < bound, -float("inf"), x2)


@triton.jit
def _sampled(
    x, x2, largest, top_k_ptr, top_p_ptr, typical_p_ptr, min_p_ptr, seed_ptr, candidate_ptr, step_ptr,
    row, vocab_size, steps, begin, begin2,
):  # fmt: skip
    """Draw from the tokens that the processors leave of a row's tempered scores."""
    if top_k_ptr is not None:
        x, x2 = _top_k(x, x2, largest, tl.load(top_k_ptr + row), vocab_size)
    weight, weight2 = tl.exp(x - largest), tl.exp(x2 - largest)
    if top_p_ptr is not None:
        top_p = tl.load(top_p_ptr + row).to(tl.float64)
        weight, weight2 = _top_p(x, x2, weight, weight2, largest, top_p, steps, begin, begin2)
    if min_p_ptr is not None:
        # The largest weight is 1.
        min_p = tl.load(min_p_ptr + row).to(tl.float32)
        weight, weight2 = tl.where(weight < min_p, 0.0, weight), tl.where(weight2 < min_p, 0.0, weight2)
    if typical_p_ptr is not None:
        typical_p = tl.load(typical_p_ptr + row).to(tl.float32)
        if typical_p < 1.0:
            weight, weight2 = _typical(weight, weight2, typical_p)
    bits = _random_bits(tl.load(seed_ptr + row), tl.load(candidate_ptr + row), tl.load(step_ptr + row))
    return _draw(weight, weight2, bits)


# Rows of 8194 have no alignment. Other widths promise none either, so that all of them compile alike.
@triton.jit(do_not_specialize=["vocab_size", "logits_stride", "stop_token", "pad_token"])
def _sample_kernel(
    logits_ptr, seen_ptr, lengths_ptr, done_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, typical_p_ptr, min_p_ptr, penalty_ptr,
    seed_ptr, candidate_ptr, step_ptr, sampled_ptr, stop_ptr, limit_ptr, token_ptr, seq_lens_ptr, out_ptr,
    vocab_size, logits_stride, seen_stride, seen_word_stride, lengths_stride, done_stride, sampled_stride,
    stop_token, pad_token,
    DO_SAMPLE: tl.constexpr, EACH: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    done_ptr += row * done_stride
    is_done = tl.load(done_ptr) if seq_lens_ptr is None else tl.load(seq_lens_ptr + row) < 0
    if is_done:
        tl.store(out_ptr + row, pad_token)
        if seq_lens_ptr is not None:
            tl.store(done_ptr, is_done)
            tl.store(token_ptr + row, tl.maximum(pad_token, 0))
            tl.store(seq_lens_ptr + row, -1)
        return
    logits_ptr += row * logits_stride
    seen_ptr += row * seen_stride
    if temperature_ptr is not None:
        temperature_ptr += row
    if penalty_ptr is not None:
        penalty_ptr += row
    # A warp has tokens one after another, and a thread every 32nd of them: `begin` + `steps`, [EACH, WARPS, 32]. Only
    # these two are kept: as many columns as scores would take too many registers.
    steps = tl.arange(0, EACH)[:, None, None] * 32
    warp, lane = tl.arange(0, WARPS)[None, :, None], tl.arange(0, 32)[None, None, :]
    begin, begin2 = warp * (EACH * 32) + lane, EACH * WARPS * 32 + warp * 32 + lane
    # If this is known for all rows, the compiler drops the other branch.
    sampled = tl.full((), DO_SAMPLE, tl.int1)
    if sampled_ptr is not None:
        sampled = tl.load(sampled_ptr + row * sampled_stride)
    common = vocab_size, seen_word_stride, penalty_ptr, temperature_ptr, sampled
    x = _scores(logits_ptr, seen_ptr, begin + steps, begin // 32 + steps // 32, *common)
    x2 = _scores(logits_ptr, seen_ptr, begin2, begin2 // 32, *common)
    largest = _most(x, x2)

    if sampled:
        token = _sampled(
            x, x2, largest, top_k_ptr, top_p_ptr, typical_p_ptr, min_p_ptr, seed_ptr, candidate_ptr, step_ptr,
            row, vocab_size, steps, begin, begin2,
        )  # fmt: skip
    else:
        token = _likeliest(x, x2, largest, steps, begin, begin2, vocab_size)
    # Rows of only NaN and -inf have no answer, but a write must stay inside.
    token = tl.minimum(token, vocab_size - 1)

    tl.store(out_ptr + row, token)
    word_ptr = seen_ptr + (token // 32) * seen_word_stride
    tl.store(word_ptr, tl.load(word_ptr) | (1 << (token % 32)))
    length_ptr = lengths_ptr + row * lengths_stride
    length = tl.load(length_ptr) + 1
    tl.store(length_ptr, length)
    if seq_lens_ptr is None:
        is_last = token == stop_token
    else:
        is_last = (token == tl.load(stop_ptr + row)) | (length >= tl.load(limit_ptr + row))
        tl.store(token_ptr + row, token)
        # The start token is stored and the last drawn one is not yet.
        tl.store(seq_lens_ptr + row, tl.where(is_last, -1, length))
    tl.store(done_ptr, is_last)


def _tiles(vocab_size: int) -> dict[str, int]:
    """Return tiles and warps for a vocabulary."""
    num_warps = next(warps for limit, warps in _TILES if vocab_size <= limit + 32 * warps)
    threads = 32 * num_warps
    each = triton.next_power_of_2(triton.cdiv(max(vocab_size - threads, 1), threads))
    return {"EACH": each, "WARPS": num_warps, "num_warps": num_warps, "maxnreg": _REGISTERS}


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
    stop: torch.Tensor | None = None,
    limit: torch.Tensor | None = None,
    token: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    *,
    out: torch.Tensor,
) -> None:
    """Write the tokens, and update `seen`, `lengths` and `done`; of slots also `token` and `seq_lens`.

    Args:
        logits: `[N, V]`, at least one row, 1 to `MAX_VOCAB` wide, columns at stride 1.
        seen: `[N, ceil(V / 32)]` int32, any strides.
        lengths, done: `[N]`, integer and bool, any stride.
        temperature, top_k, top_p, typical_p, min_p, repetition_penalty: `[N]`, contiguous, floating or integer; None
            leaves the processor out of the compiled kernel.
        seed, candidate, step, out: `[N]` int64, contiguous.
        do_sample: False: all rows take their largest score.
        sampled: `[N]` bool, any stride: the other rows take their largest score; only with `do_sample`.
        stop, limit, token, seq_lens: all or none, `[N]`, contiguous, int64 and `seq_lens` int32. The rows are slots,
            done on entry where `seq_lens` is negative, whatever `done` says. A row ends with its token `stop`, or when
            its length reaches `limit`. `token` gets what the next step enters (of rows that are done `pad_token`, but
            at least 0), `seq_lens` the length, or -1 for rows that are done.
    """
    rows, vocab_size = logits.shape
    _sample_kernel[(rows,)](
        logits, seen, lengths, done, temperature, top_k, top_p, typical_p, min_p, repetition_penalty,
        seed, candidate, step, sampled, stop, limit, token, seq_lens, out,
        vocab_size, logits.stride(0), *seen.stride(), lengths.stride(0), done.stride(0),
        0 if sampled is None else sampled.stride(0), stop_token, pad_token,
        DO_SAMPLE=do_sample, **_tiles(vocab_size),
    )  # fmt: skip
