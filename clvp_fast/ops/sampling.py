"""Draw the next token of each candidate.

    scores = temperature, top-k, top-p, min-p, typical-p after the repetition penalty, as transformers applies them
    token  = the first in token order whose cumulative probability exceeds u (inverse CDF), or the largest score

u is one uniform number of Philox-4x32-10 with the key `seed` and the counter `(step, candidate)`: a candidate's tokens
depend on these three alone, not on the batch.

The kernels do not sort. On a GPU the kernel is Triton's, on a CPU that of the native library of `csrc/`.
"""

from functools import partial
from typing import NamedTuple

import torch

from clvp_fast.ops.binding import BoundCall, Scratch, copying, in_turn, side_by_side, writing
from clvp_fast.ops.checks import check_same, shape_error, unserved_by_triton
from clvp_fast.ops.dispatch import Implementation, Operator
from clvp_fast.ops.sampling_torch import advance, reference, sample_torch


def _native(
    logits, seen, lengths, done, temperature, top_k, top_p, typical_p, min_p, repetition_penalty, seed, candidate, step,
    stop_token, pad_token, do_sample, sampled, *slots,
):  # fmt: skip
    """Run csrc/cpu/sample.cpp."""
    is_done = done if slots[-1] is None else slots[-1] < 0
    reals = (temperature, top_p, typical_p, min_p, repetition_penalty)
    inputs = (
        (logits.float() if logits.dtype == torch.float16 else logits).contiguous(),
        *(None if x is None else x.contiguous() for x in (seen, is_done, sampled)),
        *(None if x is None else x.to(torch.float64).contiguous() for x in reals),
        *(None if x is None else x.to(torch.int64).contiguous() for x in (top_k, seed, candidate, step)),
    )
    tokens = logits.new_empty(len(logits), dtype=torch.int64)
    _native_call(tokens, inputs, pad_token, do_sample)()
    return advance(tokens, seen, lengths, done, stop_token, pad_token, *slots)


def _bind_native(
    out, scratch, logits, seen, lengths, done, temperature, top_k, top_p, typical_p, min_p, repetition_penalty, seed,
    candidate, step, stop_token, pad_token, do_sample, sampled, *slots,
):  # fmt: skip
    is_done, copies = done, []
    if slots[-1] is not None:
        is_done = scratch("sample done", *done.shape, dtype=torch.bool)
        copies.append(partial(torch.lt, slots[-1], 0, out=is_done))
    reals = (temperature, top_p, typical_p, min_p, repetition_penalty)
    whole = (top_k, seed, candidate, step)
    types = (*(x.dtype for x in (seen, done)), torch.bool, *[torch.float64] * len(reals), *[torch.int64] * len(whole))
    given = (seen, is_done, sampled, *reals, *whole)
    if logits.dtype == torch.float16 or not logits.is_contiguous():
        return None
    inputs = [logits]
    for number, (x, dtype) in enumerate(zip(given, types, strict=True)):
        if x is not None and (x.dtype != dtype or not x.is_contiguous()):
            wanted = scratch(f"sample {number}", *x.shape, dtype=dtype)
            copies.append(partial(wanted.copy_, x))
            x = wanted
        inputs.append(x)
    tokens = scratch("sample", len(logits), dtype=torch.int64)
    draw = _native_call(tokens, tuple(inputs), pad_token, do_sample)
    enter = partial(advance, tokens, seen, lengths, done, stop_token, pad_token, *slots)
    return in_turn(*copies, draw, copying(enter, out))


def _native_call(tokens, inputs, pad_token, do_sample):
    """Bind the kernel to the tensors of `struct clvp_fast_sample`, contiguous and of its types."""
    from clvp_fast import native

    logits, marks = inputs[:2]
    count, vocab_size = logits.shape
    call = native.SampleCall(
        *(None if x is None else x.data_ptr() for x in (*inputs, tokens)),
        logits.stride(0),
        marks.stride(0),
        count,
        vocab_size,
        pad_token,
        native.number_of(logits.dtype),
        do_sample,
    )
    return native.Bound("clvp_fast_sample_cpu", call, torch.get_num_threads(), tokens, *inputs)


def _triton(logits, seen, lengths, done, *others, out=None):
    """Run kernels/sampling.py."""
    from clvp_fast.kernels import sampling

    tokens = logits.new_empty(logits.shape[0], dtype=torch.int64) if out is None else out
    if len(tokens):
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        *others, sampled, stop, limit, token, seq_lens = others
        *others, stop, limit = (x.contiguous() if isinstance(x, torch.Tensor) else x for x in (*others, stop, limit))
        sampling.sample(logits, seen, lengths, done, *others, sampled, stop, limit, token, seq_lens, out=tokens)
    return tokens


def _why_not_type(device, dtype):
    return unserved_by_triton("logits", dtype)


def _why_not_triton(logits, *others):
    from clvp_fast.kernels.sampling import MAX_VOCAB

    if reason := unserved_by_triton("logits", logits.dtype):
        return reason
    if not 1 <= logits.shape[1] <= MAX_VOCAB:
        return f"the vocabulary must have 1 to {MAX_VOCAB} tokens, not {logits.shape[1]}"
    return None if side_by_side(*others[-2:]) else "token and seq_lens must be contiguous"


def _why_not_cpu(logits, *others):
    if reason := unserved_by_triton("logits", logits.dtype):
        return reason
    return None if logits.shape[1] else "the vocabulary must have a token"


_OPERATOR = Operator(
    "sample",
    "(Tensor logits, Tensor(a!) seen, Tensor(b!) lengths, Tensor(c!) done, Tensor? temperature, Tensor? top_k, "
    "Tensor? top_p, Tensor? typical_p, Tensor? min_p, Tensor? repetition_penalty, Tensor seed, Tensor candidate, "
    "Tensor step, int stop_token, int pad_token, bool do_sample, Tensor? sampled, Tensor? stop, Tensor? limit, "
    "Tensor(d!)? token, Tensor(e!)? seq_lens) -> Tensor",
    reference=reference,
    fake=lambda logits, seen, lengths, *others: logits.new_empty(logits.shape[0], dtype=torch.int64),
    implementations=(
        Implementation("triton", _triton, _why_not_triton, _why_not_type, bind=writing(_triton)),
        Implementation("cpu", _native, _why_not_cpu, _why_not_type, bind=_bind_native),
        Implementation("torch", sample_torch),
    ),
)

# Each parameter's neutral value, which turns its processor off, and the condition on numbers.
_PARAMETERS = {
    "temperature": (1.0, lambda x: x > 0, "above 0 (for the largest score, do_sample=False)"),
    "top_k": (0, lambda x: x >= 0 and x == int(x), "a whole number from 0 (none) up"),
    "top_p": (1.0, lambda x: 0 <= x <= 1, "from 0 to 1"),
    "typical_p": (1.0, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": (0.0, lambda x: 0 <= x <= 1, "from 0 to 1"),
    "repetition_penalty": (1.0, lambda x: x > 0, "above 0"),
}


def _parameter(name, value, logits):
    """Return a parameter as a tensor `[N]`, or None if it is neutral."""
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
    """Return a whole number, or a tensor `[N]` of them, as int64 `[N]`."""
    count = logits.shape[0]
    if not isinstance(value, torch.Tensor):
        value = (int(value) + 2**63) % 2**64 - 2**63  # seeds from 2^63 on keep their bits
        return torch.full((count,), value, dtype=torch.int64, device=logits.device)
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, not {value.dtype}")
    if value.shape != (count,):
        raise shape_error(name, f"[{count}]", value)
    check_same(name, value, "logits", logits, dtype=False)
    return value


def _choice(do_sample, logits):
    """Return whether any row may be sampled, and which ones: bool `[N]`, or None for all or none."""
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
    """Draw the next token of each of N candidates and enter it into their state; the host reads nothing.

    Args:
        logits: `[N, V]`, any floating type; processed in float32 at least.
        seen: `[N, ceil(V / 32)]` int32: the repetition penalty applies to token t if bit `t % 32` of word `t // 32` is
            set. Updated.
        lengths: `[N]` integer, tokens drawn so far, a stop token included. Updated.
        done: `[N]` bool, candidates that have drawn `stop_token`: they get `pad_token`, and their state does not
            change. Updated.
        temperature, top_k, top_p, typical_p, min_p, repetition_penalty: as in transformers; a number for all, or a
            tensor `[N]` (whose values are not checked). 1, 0, 1, 1, 0 and 1 turn the processors off.
        seed, candidate, step: int64 `[N]` or a number for all; the draw depends on these three and on the row's logits.
        stop_token, pad_token: token ids.
        do_sample: False takes the largest penalised score, the first of equal ones; or bool `[N]`, one for each row.

    Returns:
        `[N]` int64.

    Raises:
        ValueError, TypeError: impossible shapes, dtypes, devices or numbers.
    """
    settings = (temperature, top_k, top_p, typical_p, min_p, repetition_penalty)
    numbers = (seed, candidate, step)
    args = _arguments(logits, seen, lengths, done, settings, numbers, stop_token, pad_token, do_sample, None)
    return _OPERATOR.choose(args)(*args)


class Slots(NamedTuple):
    """The state of a decode step's rows from one draw to the next, each `[N]`, contiguous.

    stop, limit: int64, the token that a row ends with, and the length at which it ends.
    token: int64, what the next step enters: the drawn token, and of a row that is done `pad_token`, but at least 0.
        Written.
    seq_lens: int32, the tokens that the next step finds stored, one fewer than the start token and the drawn ones. The
        row is done if it is negative. Updated.
    """

    stop: torch.Tensor
    limit: torch.Tensor
    token: torch.Tensor
    seq_lens: torch.Tensor


def bind_sample(
    out: torch.Tensor,
    scratch: Scratch,
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
    seed: torch.Tensor,
    candidate: torch.Tensor,
    step: torch.Tensor,
    stop_token: int,
    pad_token: int,
    do_sample: bool | torch.Tensor = True,
    slots: Slots | None = None,
) -> BoundCall:
    """Bind `sample` of these arguments into `out`, `[N]` int64, as `Operator.bind` does.

    With `slots`, these tell which rows are done and when one ends, and are updated; `done` is only written, and
    `stop_token` not used.
    """
    settings = (temperature, top_k, top_p, typical_p, min_p, repetition_penalty)
    numbers = (seed, candidate, step)
    args = _arguments(logits, seen, lengths, done, settings, numbers, stop_token, pad_token, do_sample, slots)
    return _OPERATOR.bind(args, out, scratch)


def _arguments(logits, seen, lengths, done, settings, numbers, stop_token, pad_token, do_sample, slots):
    """Check the operator's arguments and return them; settings become tensors unless they are neutral."""
    if logits.ndim != 2:
        raise shape_error("logits", "[candidates, vocabulary]", logits)
    count, vocab_size = logits.shape
    state = [
        ("seen", seen, torch.int32, (count, -(-vocab_size // 32))),
        ("lengths", lengths, None, (count,)),
        ("done", done, torch.bool, (count,)),
    ]
    if slots is not None:
        dtypes = torch.int64, torch.int64, torch.int64, torch.int32
        state += [(*each, (count,)) for each in zip(slots._fields, slots, dtypes, strict=True)]
    for name, tensor, dtype, shape in state:
        if tensor.shape != shape:
            raise shape_error(name, str(list(shape)), tensor)
        if dtype is not None and tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, not {tensor.dtype}")
        check_same(name, tensor, "logits", logits, dtype=False)
    parameters = [_parameter(name, value, logits) for name, value in zip(_PARAMETERS, settings, strict=True)]
    names = ("seed", "candidate", "step")
    numbers = [_number(name, value, logits) for name, value in zip(names, numbers, strict=True)]
    choice = _choice(do_sample, logits)
    entered = slots or [None] * 4
    return logits, seen, lengths, done, *parameters, *numbers, stop_token, pad_token, *choice, *entered
