"""One decoding step's attention of many candidates over pages, the prompt shared.

Rivals: torch's attention over dense keys, by the backend that torch takes and by each alone, and FlashInfer.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.harness import Task
from benchmarks.kernels import Case, Planned, ours, tasks as tasks_of
from benchmarks.rivals import flashinfer_decode, sdpa
from clvp_fast.ops import paged_attention_decode
from clvp_fast.ops.paged_attention import decode_reference

HEADS, HEAD_DIM, PAGE_SIZE = 16, 64, 16
# Candidates, requests they belong to, tokens of each prompt, and the least and most own tokens.
SHAPES = {
    "cpu": ((16, 1, 60, 100, 200),),
    "cuda": ((256, 1, 60, 100, 600), (256, 1, 410, 100, 600), (256, 8, 200, 100, 600), (16, 1, 200, 100, 600)),
    "smoke": ((4, 2, 20, 0, 33),),
}


def lengths_of(candidates: int, least: int, most: int) -> torch.Tensor:
    return torch.linspace(least, most, candidates).round().int()


def make_inputs(seed, candidates, requests, prompt, least, most, dtype, device):
    generator = torch.Generator(device).manual_seed(seed)
    own_width, prompt_width = most // PAGE_SIZE + 1, -(-prompt // PAGE_SIZE)
    num_pages = candidates * own_width + requests * prompt_width
    shape = (num_pages, PAGE_SIZE, HEADS, HEAD_DIM)
    k_pages, v_pages = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    dealt = torch.randperm(num_pages, generator=generator, device=device).int()
    own = dealt[: candidates * own_width].view(candidates, own_width)
    prefix = dealt[candidates * own_width :].view(requests, prompt_width)
    q, k, v = torch.randn(3, candidates, HEADS, HEAD_DIM, generator=generator, device=device).to(dtype)
    lengths = lengths_of(candidates, least, most).to(device)
    prompts = torch.full((requests,), prompt, dtype=torch.int32, device=device)
    index = (torch.arange(candidates, device=device) * requests // candidates).int()
    arrivals = torch.zeros(candidates, HEADS, dtype=torch.int32, device=device)  # kept by an engine from step to step
    return 2 * q, k, v, k_pages, v_pages, own, lengths, prefix, prompts, index, arrivals


def call(q, k, v, k_pages, v_pages, own, lengths, prefix, prompts, index, arrivals):
    shared = dict(prefix_table=prefix, prefix_lens=prompts, prefix_index=index)
    return paged_attention_decode(q, k, v, k_pages, v_pages, own, lengths, **shared, arrivals=arrivals)


def reference(q, k, v, k_pages, v_pages, own, lengths, prefix, prompts, index, arrivals):
    wide = (x.double() for x in (q, k, v, k_pages, v_pages))
    return decode_reference(*wide, own, lengths, prefix, prompts, index, HEAD_DIM**-0.5)


def over_dense(q, k, v, k_pages, v_pages, own, lengths, prefix, prompts, index, arrivals):
    """Plan torch's attention over padded keys in one piece, the prompt, of one length for all, copied for each."""
    dense_k, dense_v = (_dense(pages, prefix[index.long()], own, int(prompts[0])) for pages in (k_pages, v_pages))
    last = prompts[0].long() + lengths.long()
    rows = torch.arange(len(q), device=q.device)
    mask = (torch.arange(dense_k.shape[2], device=q.device) <= last[:, None])[:, None, None]

    def call():
        dense_k[rows, :, last], dense_v[rows, :, last] = k, v
        return F.scaled_dot_product_attention(q[:, :, None], dense_k, dense_v, attn_mask=mask)[:, :, 0]

    return call


def _dense(pages, prefix, own, prompt: int):
    """Return each candidate's prompt and tokens, `[candidates, heads, tokens, head_dim]`, and room for a new one."""
    prompts = pages[prefix.long()].flatten(1, 2)[:, :prompt]
    return torch.cat((prompts, pages[own.long()].flatten(1, 2)), 1).transpose(1, 2).contiguous()


FLASHINFER = {
    "FlashInfer, prompt copied": Planned(flashinfer_decode.paged),
    "FlashInfer, shared prefix": Planned(flashinfer_decode.cascade),
}


def cases(device: str, smoke: bool = False):
    for candidates, requests, prompt, least, most in SHAPES["smoke" if smoke else device]:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32

        def inputs(seed, shape=(candidates, requests, prompt, least, most), dtype=dtype):
            return make_inputs(seed, *shape, dtype, device)

        providers, absent = ours(call, "paged_attention_decode", device)
        dense = Planned(over_dense)
        providers |= {"SDPA over dense keys": dense} | sdpa.one_by_one(dense, "dense keys")
        if device == "cuda":
            providers |= FLASHINFER
        else:
            absent |= dict.fromkeys(FLASHINFER, "for a GPU")
        tokens = int((lengths_of(candidates, least, most) + 1).sum()) + requests * prompt
        yield Case(
            shape=dict(candidates=candidates, requests=requests, prompt=prompt, own=[least, most], page=PAGE_SIZE),
            dtype=dtype,
            inputs=inputs,
            reference=reference,
            providers=providers,
            bytes=(2 * tokens + 4 * candidates) * HEADS * HEAD_DIM * dtype.itemsize,
            flop=4 * (tokens + (candidates - requests) * prompt) * HEADS * HEAD_DIM,
            absent=absent,
        )


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    return tasks_of("paged_attention", cases(device, smoke), device, smoke)
