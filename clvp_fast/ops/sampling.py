"""Draw the next token of each candidate.

    scores = temperature, top-k, top-p, min-p, typical-p after the repetition penalty, as transformers applies them
    token  = the first in token order whose cumulated probability exceeds u (exactly: inverse CDF), or the largest score

u is one uniform number of Philox-4x32-10 with the key `seed` and the counter `(step, candidate)`: a candidate's tokens
depend on these three alone, not on the batch.

The kernels sort nothing. On a GPU Triton's serves, on a CPU that of the native library of `csrc/`.
"""

import ctypes

import torch

from clvp_fast.ops.dispatch import (
    Implementation,
    Operator,
    check_same,
    shape_error,
    unserved_by_triton,
)

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: tuple, key: tuple) -> tuple:
    """Philox-4x32-10: four 32-bit words from a counter of four and a key of two, as ints or int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A tensor's product wraps at 64 bits, and `>>` drags its sign along: the mask leaves the high word.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def _halves(x):
    return x & _LOW, (x >> 32) & _LOW


def _uniform(seed, candidate, step):
    """One number in (0, 1) from 32 random bits."""
    return (philox((*_halves(step), *_halves(candidate)), _halves(seed))[0] + 0.5) * 2.0**-32


def _seen_tokens(seen, vocab_size):
    """The bitmap `[N, words]` as bool `[N, vocab_size]`."""
    bits = (seen[:, :, None] >> torch.arange(32, dtype=torch.int32, device=seen.device)) & 1
    return bits.flatten(1)[:, :vocab_size].bool()


def _advance(tokens, seen, lengths, done, stop_token, pad_token):
    """Enter the tokens of unfinished candidates into their state; finished ones get `pad_token`."""
    tokens = torch.where(done, pad_token, tokens)
    word = torch.where(done, 0, tokens)[:, None] // 32
    before = seen.gather(1, word)
    bit = torch.ones_like(before) << (tokens[:, None] % 32).to(seen.dtype)
    seen.scatter_(1, word, torch.where(done[:, None], before, before | bit))
    lengths += ~done
    done |= tokens == stop_token
    return tokens


def _row_scores(scores, temperature, top_k, top_p, typical_p, min_p):
    """transformers' warpers in their order, on one row; what may not be drawn becomes -inf."""
    scores = scores / temperature
    if 0 < top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        ascending, order = scores.sort(stable=True)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        removed[-1] = False
        scores = scores.index_fill(0, order[removed], -torch.inf)
    if min_p > 0:
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities < min_p * probabilities.max(), -torch.inf)
    if typical_p < 1:
        log_p = scores.log_softmax(-1)
        surprise = (-log_p + (log_p * log_p.exp()).nansum()).abs()
        ascending, order = surprise.sort(stable=True)
        last = int((scores[order].softmax(-1).cumsum(-1) < typical_p).sum().clamp(max=len(scores) - 1))
        removed = ascending > ascending[last]
        scores = scores.index_fill(0, order[removed], -torch.inf)
    return scores


def reference(
    logits, seen, lengths, done, temperature, top_k, top_p, typical_p, min_p, repetition_penalty, seed, candidate, step,
    stop_token, pad_token, do_sample, sampled,
):  # fmt: skip
    """One candidate after another."""
    tokens = torch.zeros_like(lengths, dtype=torch.int64)
    known = _seen_tokens(seen, logits.shape[1])
    for n, row in enumerate(logits.to(torch.promote_types(logits.dtype, torch.float32))):
        if repetition_penalty is not None:
            penalty = repetition_penalty[n].item()
            row = torch.where(known[n], torch.where(row < 0, row * penalty, row / penalty), row)
        if not (do_sample if sampled is None else sampled[n]):
            tokens[n] = row.argmax()
            continue
        neutral = ((temperature, 1.0), (top_k, 0), (top_p, 1.0), (typical_p, 1.0), (min_p, 0.0))
        scores = _row_scores(row, *(default if x is None else x[n].item() for x, default in neutral))
        cumulated = scores.double().softmax(-1).cumsum(0)
        target = _uniform(seed[n].item(), candidate[n].item(), step[n].item()) * cumulated[-1]
        tokens[n] = (cumulated > target).nonzero()[0, 0]
    return _advance(tokens, seen, lengths, done, stop_token, pad_token)


def _filter_sorted(scores, top_k, top_p):
    """Top-k and top-p from one sort of `[N, V]`."""
    ascending, order = scores.sort(stable=True)
    if top_k is not None:
        size = scores.shape[1]
        place = size - torch.where(top_k > 0, top_k, size).clamp(max=size)
        ascending = ascending.masked_fill(ascending < ascending.gather(1, place[:, None]), -torch.inf)
    if top_p is not None:
        tail = (1 - top_p.double()).to(scores.dtype)[:, None]
        removed = (ascending.softmax(-1).cumsum(-1) <= tail) & (top_p < 1)[:, None]
        removed[:, -1] = False
        ascending = ascending.masked_fill(removed, -torch.inf)
    return torch.empty_like(scores).scatter_(1, order, ascending)


def _filter_typical(scores, mass):
    log_p = scores.log_softmax(-1)
    surprise = (-log_p + (log_p * log_p.exp()).nansum(-1, keepdim=True)).abs()
    ascending, order = surprise.sort(stable=True)
    cumulated = scores.gather(1, order).softmax(-1).cumsum(-1)
    last = (cumulated < mass.to(scores.dtype)[:, None]).sum(-1, keepdim=True).clamp(max=scores.shape[1] - 1)
    removed = (ascending > ascending.gather(1, last)) & (mass < 1)[:, None]
    return scores.masked_fill(torch.empty_like(removed).scatter_(1, order, removed), -torch.inf)


def _torch(
    logits, seen, lengths, done, temperature, top_k, top_p, typical_p, min_p, repetition_penalty, seed, candidate, step,
    stop_token, pad_token, do_sample, sampled,
):  # fmt: skip
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if repetition_penalty is not None:
        penalty = repetition_penalty.to(scores.dtype)[:, None]
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(_seen_tokens(seen, scores.shape[1]), penalised, scores)
    likeliest = None if do_sample and sampled is None else scores.argmax(-1)
    if not do_sample:
        return _advance(likeliest, seen, lengths, done, stop_token, pad_token)
    if temperature is not None:
        scores = scores / temperature.to(scores.dtype)[:, None]
    if top_k is not None or top_p is not None:
        scores = _filter_sorted(scores, top_k, top_p)
    if min_p is not None:
        probabilities = scores.softmax(-1)
        least = min_p.to(scores.dtype)[:, None] * probabilities.amax(-1, keepdim=True)
        scores = scores.masked_fill(probabilities < least, -torch.inf)
    if typical_p is not None:
        scores = _filter_typical(scores, typical_p)
    # float64: in float32 a sum of 8194 terms would move the bounds of the rare tokens.
    cumulated = scores.double().softmax(-1).cumsum(-1)
    target = _uniform(seed, candidate, step)[:, None] * cumulated[:, -1:]
    tokens = (cumulated <= target).sum(-1)
    if sampled is not None and likeliest is not None:  # both or neither
        tokens = torch.where(sampled, tokens, likeliest)
    return _advance(tokens, seen, lengths, done, stop_token, pad_token)


def _native(
    logits, seen, lengths, done, temperature, top_k, top_p, typical_p, min_p, repetition_penalty, seed, candidate, step,
    stop_token, pad_token, do_sample, sampled,
):  # fmt: skip
    """csrc/cpu/sample.cpp."""
    from clvp_fast import native

    count, vocab_size = logits.shape
    logits = (logits.float() if logits.dtype == torch.float16 else logits).contiguous()
    marks, flags = seen.contiguous(), done.contiguous()
    tokens = logits.new_empty(count, dtype=torch.int64)
    reals = (temperature, top_p, typical_p, min_p, repetition_penalty)
    inputs = (
        *(logits, marks, flags, None if sampled is None else sampled.contiguous()),
        *(None if x is None else x.to(torch.float64).contiguous() for x in reals),
        *(None if x is None else x.to(torch.int64).contiguous() for x in (top_k, seed, candidate, step)),
    )
    call = native.SampleCall(
        *(None if x is None else x.data_ptr() for x in (*inputs, tokens)),
        logits.stride(0),
        marks.stride(0),
        count,
        vocab_size,
        pad_token,
        native.FLOAT32 if logits.dtype == torch.float32 else native.BFLOAT16,
        do_sample,
    )
    native.check(native.library().clvp_fast_sample_cpu(ctypes.byref(call), torch.get_num_threads(), None))
    return _advance(tokens, seen, lengths, done, stop_token, pad_token)


def _triton(logits, seen, lengths, done, *others):
    """kernels/sampling.py."""
    from clvp_fast.kernels import sampling

    tokens = logits.new_empty(logits.shape[0], dtype=torch.int64)
    if len(tokens):
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        *others, sampled = others
        others = (x.contiguous() if isinstance(x, torch.Tensor) else x for x in others)
        sampling.sample(logits, seen, lengths, done, *others, sampled, out=tokens)
    return tokens


def _why_not_type(device, dtype):
    return unserved_by_triton("logits", dtype)


def _why_not_triton(logits, *others):
    from clvp_fast.kernels.sampling import MAX_VOCAB

    if reason := unserved_by_triton("logits", logits.dtype):
        return reason
    if not 1 <= logits.shape[1] <= MAX_VOCAB:
        return f"the vocabulary must have 1 to {MAX_VOCAB} tokens, not {logits.shape[1]}"
    return None


def _why_not_cpu(logits, *others):
    if reason := unserved_by_triton("logits", logits.dtype):
        return reason
    return None if logits.shape[1] else "the vocabulary must have a token"


_OPERATOR = Operator(
    "sample",
    "(Tensor logits, Tensor(a!) seen, Tensor(b!) lengths, Tensor(c!) done, Tensor? temperature, Tensor? top_k, "
    "Tensor? top_p, Tensor? typical_p, Tensor? min_p, Tensor? repetition_penalty, Tensor seed, Tensor candidate, "
    "Tensor step, int stop_token, int pad_token, bool do_sample, Tensor? sampled) -> Tensor",
    reference=reference,
    fake=lambda logits, seen, lengths, *others: logits.new_empty(logits.shape[0], dtype=torch.int64),
    implementations=(
        Implementation("triton", _triton, _why_not_triton, _why_not_type),
        Implementation("cpu", _native, _why_not_cpu, _why_not_type),
        Implementation("torch", _torch),
    ),
)

# Each parameter's neutral value, which leaves its processor out, and what a number must fulfil.
_PARAMETERS = {
    "temperature": (1.0, lambda x: x > 0, "above 0 (for the largest score, do_sample=False)"),
    "top_k": (0, lambda x: x >= 0 and x == int(x), "a whole number from 0 (none) up"),
    "top_p": (1.0, lambda x: 0 <= x <= 1, "from 0 to 1"),
    "typical_p": (1.0, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": (0.0, lambda x: 0 <= x <= 1, "from 0 to 1"),
    "repetition_penalty": (1.0, lambda x: x > 0, "above 0"),
}


def _parameter(name, value, logits):
    """A parameter as a tensor `[N]`, or None if it is neutral."""
    count = logits.shape[0]
    if isinstance(value, torch.Tensor):
        if value.shape != (count,):
            raise shape_error(name, f"[{count}]", value)
        check_same(name, value, "logits", logits, dtype=False)
        return value
    neutral, holds, wanted = _PARAMETERS[name]
    if not holds(value):
        raise ValueError(f"{name} must be {wanted}, not {value}")
    if value == neutral:
        return None
    dtype = torch.int64 if name == "top_k" else torch.float64
    return torch.full((count,), value, dtype=dtype, device=logits.device)


def _number(name, value, logits):
    """A whole number, or a tensor `[N]` of them, as int64 `[N]`."""
    count = logits.shape[0]
    if not isinstance(value, torch.Tensor):
        value = (int(value) + 2**63) % 2**64 - 2**63  # seeds above 2^63 keep their bits
        return torch.full((count,), value, dtype=torch.int64, device=logits.device)
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, not {value.dtype}")
    if value.shape != (count,):
        raise shape_error(name, f"[{count}]", value)
    check_same(name, value, "logits", logits, dtype=False)
    return value


def _choice(do_sample, logits):
    """Whether any row may be sampled, and which are: bool `[N]`, or None for all or none."""
    if not isinstance(do_sample, torch.Tensor):
        return bool(do_sample), None
    if do_sample.dtype != torch.bool:
        raise TypeError(f"do_sample must be torch.bool, not {do_sample.dtype}")
    if do_sample.shape != logits.shape[:1]:
        raise shape_error("do_sample", f"[{logits.shape[0]}]", do_sample)
    check_same("do_sample", do_sample, "logits", logits, dtype=False)
    return True, do_sample


def sample(
    logits: torch.Tensor,
    seen: torch.Tensor,
    lengths: torch.Tensor,
    done: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    typical_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    repetition_penalty: float | torch.Tensor = 1.0,
    seed: int | torch.Tensor,
    candidate: int | torch.Tensor,
    step: int | torch.Tensor,
    stop_token: int,
    pad_token: int,
    do_sample: bool | torch.Tensor = True,
) -> torch.Tensor:
    """Draw the next token of N candidates and enter it into their state, without reading anything on the host.

    Args:
        logits: `[N, V]`, any floating type; processed in float32 at least.
        seen: `[N, ceil(V / 32)]` int32: the repetition penalty falls on token t if bit `t % 32` of word `t // 32` is
            set. Updated.
        lengths: `[N]` integer, tokens drawn so far, a stop token included. Updated.
        done: `[N]` bool, candidates that have drawn `stop_token`: they get `pad_token` and stay as they are. Updated.
        temperature, top_k, top_p, typical_p, min_p, repetition_penalty: as transformers' processors; a number for all,
            or a tensor `[N]` (whose values are not checked). 1, 0, 1, 1, 0, 1 leave the processor out.
        seed, candidate, step: int64 `[N]` or a number for all; the draw depends on these three and on the row's logits.
        stop_token, pad_token: token ids.
        do_sample: False: the largest penalised score, the first of equal ones; or bool `[N]`, for each row its own.

    Returns:
        `[N]` int64.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that cannot be.
    """
    if logits.ndim != 2:
        raise shape_error("logits", "[candidates, vocabulary]", logits)
    count, vocab_size = logits.shape
    state = (
        ("seen", seen, torch.int32, (count, -(-vocab_size // 32))),
        ("lengths", lengths, None, (count,)),
        ("done", done, torch.bool, (count,)),
    )
    for name, tensor, dtype, shape in state:
        if tensor.shape != shape:
            raise shape_error(name, str(list(shape)), tensor)
        if dtype is not None and tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, not {tensor.dtype}")
        check_same(name, tensor, "logits", logits, dtype=False)
    given = (temperature, top_k, top_p, typical_p, min_p, repetition_penalty)
    names = ("temperature", "top_k", "top_p", "typical_p", "min_p", "repetition_penalty")
    parameters = [_parameter(name, value, logits) for name, value in zip(names, given, strict=True)]
    numbers = [_number(name, x, logits) for name, x in (("seed", seed), ("candidate", candidate), ("step", step))]
    choice = _choice(do_sample, logits)
    args = (logits, seen, lengths, done, *parameters, *numbers, stop_token, pad_token, *choice)
    return _OPERATOR.choose(args)(*args)
