"""Every operator's kernel can be captured in a CUDA graph, and its replay sees new inputs."""

import pytest
import torch

from clvp_fast import ops
from clvp_fast.ops.dispatch import OPERATORS, Operator
from tests.kit import PagePool, random
from tests.kit.device import DEVICE

HEADS, DIM = 2, 64


def draw(*shape, seed, dtype=torch.bfloat16):
    return random(*shape, seed=seed, dtype=dtype, device=DEVICE)


def attention():
    packed = draw(3, 70, 3, HEADS, DIM, seed=0)
    angles = draw(1, 70, 32, seed=1, dtype=torch.float32)
    return [packed], lambda: ops.rotary_attention(*packed.unbind(2), cos=angles.cos(), sin=angles.sin(), causal=True)


def ragged():
    packed, bounds = draw(70, 3, HEADS, DIM, seed=0), torch.tensor([0, 5, 5, 70], dtype=torch.int32, device=DEVICE)
    return [packed], lambda: ops.rotary_attention(*packed.unbind(1), causal=True, cu_seqlens=bounds, max_seqlen=65)


def windows():
    packed, bias = draw(2, 16, 8, 3, HEADS, 24, seed=0), draw(HEADS, 64, 64, seed=1)
    return [packed], lambda: ops.window_attention(*packed.unbind(3), bias, window=8, shift=4)


def gated():
    x, w_in, w_out = draw(33, 96, seed=0), draw(256, 96, seed=1), draw(96, 128, seed=2)
    b_in, b_out = draw(256, seed=3), draw(96, seed=4)
    return [x], lambda: ops.geglu_mlp(x, w_in, b_in, w_out, b_out, residual=x)


def plain():
    x, w_in, b_in = draw(5, 256, seed=0), draw(1024, 256, seed=1), draw(1024, seed=3)
    w_out, b_out = draw(256, 1024, seed=2), draw(256, seed=4)
    return [x], lambda: ops.gelu_mlp(x, w_in, b_in, w_out, b_out, residual=x)


def quantized():
    """Call a linear layer over int8 weights, and a block of two."""
    x, bias = draw(5, 256, seed=0), draw(1024, seed=3)
    w_in, w_out = ((20 * draw(*shape, seed=1)).to(torch.int8) for shape in ((1024, 256), (256, 1024)))
    scale_in, scale_out = torch.full((1024,), 0.003, device=DEVICE), torch.full((256,), 0.002, device=DEVICE)

    def run():
        hidden = ops.linear(x, w_in, bias, scale=scale_in, activation="gelu_new")
        scales = dict(scale_in=scale_in, scale_out=scale_out)
        block = ops.gelu_mlp(x, w_in, bias, w_out, bias[:256], residual=x.float(), **scales)
        return torch.cat((hidden.float(), block), 1)

    return [x], run


def norm():
    x, weight, bias = draw(9, 200, seed=0), draw(200, seed=1), draw(200, seed=2)
    return [x], lambda: torch.stack(ops.add_norm(x, x, weight=weight, bias=bias, eps=1e-5, kind="layer"))


def two_norms():
    x, affine = draw(9, 200, seed=0), draw(4, 200, seed=1)
    named = dict(zip(("weight1", "bias1", "weight2", "bias2"), affine, strict=True))
    return [x], lambda: torch.stack(ops.double_layer_norm(x, **named, eps1=1e-5, eps2=1e-5))


def merging():
    x, weight, bias = draw(2, 5, 6, 24, seed=0), draw(96, seed=1), draw(96, seed=2)
    return [x], lambda: ops.merge_norm(x, weight=weight, bias=bias, eps=1e-5)


def embedding():
    ids = torch.arange(7, device=DEVICE)
    tables = draw(20, 96, seed=0), draw(10, 96, seed=1)
    return [tables[0]], lambda: ops.embed(ids, ids, *tables)


def decode():
    pool = PagePool(40, 16, HEADS, DIM, seed=0, dtype=torch.bfloat16, device=DEVICE)
    own, prefix = pool.store([5, 0, 33], room=1), pool.store([20])
    lengths = torch.tensor([5, 0, 33], dtype=torch.int32, device=DEVICE)
    q, k, v = draw(3, 3, HEADS, DIM, seed=5)
    prefix_of = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    shared = dict(prefix_table=prefix.table, prefix_lens=prefix_of[:1] + 20, prefix_index=prefix_of)
    return [q, k, v], lambda: ops.paged_attention_decode(q, k, v, pool.k, pool.v, own.table, lengths, **shared)


def prefill():
    pool = PagePool(20, 16, HEADS, DIM, seed=0, dtype=torch.bfloat16, device=DEVICE)
    table = pool.store([20, 0, 3]).table
    bounds = torch.tensor([0, 20, 20, 23], dtype=torch.int32, device=DEVICE)
    q, k, v = draw(3, 23, HEADS, DIM, seed=5)
    return [q, k, v], lambda: ops.paged_prefill(q, k, v, bounds, pool.k, pool.v, table)


def sampling():
    logits = draw(4, 300, seed=0, dtype=torch.float32)

    def run():
        seen = torch.zeros(4, 10, dtype=torch.int32, device=DEVICE)
        lengths, done = seen[:, 0].clone(), seen[:, 0] > 0
        settings = dict(temperature=0.8, top_p=0.8, top_k=50, repetition_penalty=2.0)
        numbers = dict(seed=1, candidate=torch.arange(4, device=DEVICE), step=3, stop_token=-1, pad_token=0)
        return ops.sample(logits, seen, lengths, done, **settings, **numbers)

    return [logits], run


def features():
    """Compute features with filters that the graph reads again, so that tables are derived inside the graph."""
    samples, filters = draw(3, 5000, seed=0, dtype=torch.float32), draw(513, 80, seed=1, dtype=torch.float32).abs()
    lengths = torch.tensor([5000, 1, 700], device=DEVICE)
    settings = dict(window=torch.hann_window(1024, device=DEVICE), mel_filters=filters, hop_length=256)
    settings |= dict(mel_norms=draw(80, seed=2), decibels=True, top_db=30.0, dtype=torch.float16)
    return [samples, filters], lambda: ops.log_mel(samples, lengths=lengths, **settings)


CALLS = [attention, windows, gated, plain, quantized, norm, merging, embedding, decode, prefill, sampling, features]
CALLS += [ragged, two_norms]


def test_every_operator_of_a_gpu_has_a_call(monkeypatch):
    seen = set()

    def choose(self, *_, **__):
        seen.add(self.name)  # and its reference, which calls no other operator, is what runs

    monkeypatch.setattr(Operator, "_choose", choose)
    for make in CALLS:
        make()[1]()
    on_gpu = {name for name, it in OPERATORS.items() if {"triton", "cuda"} & {each.name for each in it.implementations}}
    assert seen >= {name for name in on_gpu if not name.startswith("test_")}


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("make", CALLS, ids=[make.__name__ for make in CALLS])
@torch.no_grad()
def test_capture_and_replay_on_new_inputs(make):
    inputs, call = make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        before = call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for x in inputs:
        x.copy_(x.flip(0) * 1.5)
    if captured.is_floating_point():
        captured.fill_(float("nan"))
    graph.replay()
    expected = call()
    assert torch.equal(captured, expected)
    if captured.is_floating_point():
        assert not torch.equal(captured, before)
