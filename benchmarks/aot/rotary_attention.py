"""Attention of CLVP and of its neighbours in size: each entry of the table, each branch of the kernel."""

import torch

from clvp_fast.kernels import rotary_attention as kernels

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def calls():
    for dtype in _NAMES:
        yield _dense(64, 32, dtype)  # the encoders
        yield _dense(64, 32, dtype, shared=True)
        yield _dense(64, 32, dtype, q_len=60)
        yield _dense(64, 32, dtype, shared=True, q_len=60)
        yield _dense(64, 0, dtype, causal=True)  # the decoder's prompt
        yield _dense(64, 0, dtype, causal=True, q_len=1)  # its steps
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim, rotary_dim in ((32, 32), (80, 32), (128, 0), (128, 128), (128, 32)):
            yield _dense(head_dim, rotary_dim, dtype)
        yield _dense(64, 32, dtype, mask="keys")
        yield _dense(64, 32, dtype, causal=True, mask="keys")
        yield _dense(64, 0, dtype, mask="additive")
    yield _dense(64, 32, torch.bfloat16, causal=True, mask="keys", shared=True)
    yield _dense(128, 32, torch.bfloat16, mask="keys")
    yield _dense(40, 32, torch.float16, causal=True)  # rows of 32 and of 16 channels: mma on sm_90
    yield _dense(40, 32, torch.float16, mask="keys")
    yield _dense(48, 16, torch.float16, causal=True)
    yield _dense(128, 128, torch.bfloat16, q_len=1)
    yield _dense(64, 0, torch.bfloat16, causal=True, mask="square")
    yield _ragged(64, 32, torch.bfloat16, causal=False)
    yield _ragged(64, 0, torch.bfloat16, causal=True)


def _empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def _packed(*rows, head_dim, dtype):
    return _empty(*rows, 3, 12, head_dim, dtype=dtype).unbind(-3)


def _angles(length, rotary_dim, shared=False):
    if not rotary_dim:
        return None
    return _empty(1, length, *((1, rotary_dim // 2) if shared else (rotary_dim,)), dtype=torch.float32)


def _dense(head_dim, rotary_dim, dtype, causal=False, mask=None, q_len=500, shared=False):
    def launch():
        q, k, v = _packed(2, 500, head_dim=head_dim, dtype=dtype)
        q = q[:, :q_len]
        angles = _angles(500, rotary_dim, shared)
        masks = {
            None: None,
            "keys": _empty(2, 500, dtype=torch.bool),
            "square": _empty(2, 1, q_len, 500, dtype=torch.bool),
            "additive": _empty(2, 1, q_len, 500, dtype=torch.float32),
        }
        out = _empty(*q.shape, dtype=dtype)
        kernels.rotary_attention(q, k, v, angles, angles, masks[mask], causal, 0, head_dim**-0.5, out=out)

    parts = [_NAMES[dtype], f"{head_dim}, {rotary_dim} turn"]
    parts += ["angles shared"] * shared + ["causal"] * causal + [f"{mask} mask"] * bool(mask)
    parts += ["one query"] * (q_len == 1) + [f"{q_len} queries"] * (1 < q_len < 500)
    return ", ".join(parts), launch


def _ragged(head_dim, rotary_dim, dtype, causal):
    def launch():
        q, k, v = _packed(1000, head_dim=head_dim, dtype=dtype)
        bounds, angles = _empty(5, dtype=torch.int32), _angles(500, rotary_dim)
        out = _empty(*q.shape, dtype=dtype)
        kernels.rotary_attention_ragged(q, k, v, bounds, 500, angles, angles, causal, head_dim**-0.5, out=out)

    return f"{_NAMES[dtype]}, {head_dim}, {rotary_dim} turn, ragged" + ", causal" * causal, launch
