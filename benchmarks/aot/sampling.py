"""The sampler on CLVP's vocabulary with each processor, and one call of each entry of the table."""

import torch

from clvp_fast.kernels import sampling

_PROCESSORS = ("temperature", "top_k", "top_p", "typical_p", "min_p", "repetition_penalty")
_TORTOISE = ("temperature", "top_p", "repetition_penalty")


def calls():
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        yield f"8194 {name} temperature top_p penalty", lambda dtype=dtype: _launch(8194, dtype, _TORTOISE)
        yield f"8194 {name} all", lambda dtype=dtype: _launch(8194, dtype, _PROCESSORS)
        yield f"8194 {name} all, some rows greedy", lambda dtype=dtype: _launch(8194, dtype, _PROCESSORS, mixed=True)
        yield f"8194 {name} all, slots", lambda dtype=dtype: _launch(8194, dtype, _PROCESSORS, slots=True)
    yield "8194 fp32 greedy", lambda: _launch(8194, torch.float32, (), do_sample=False)
    yield "8194 fp32 none", lambda: _launch(8194, torch.float32, ())
    for processor in ("top_k", "typical_p"):
        yield f"8194 fp32 {processor}", lambda processor=processor: _launch(8194, torch.float32, (processor,))
    for vocab_size in (256, 4096, 16384):
        yield f"{vocab_size} fp32 all", lambda vocab_size=vocab_size: _launch(vocab_size, torch.float32, _PROCESSORS)


def _launch(vocab_size, dtype, processors, do_sample=True, mixed=False, slots=False):
    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    number = empty(256, dtype=torch.int64)
    parameters = [
        empty(256, dtype=torch.int64 if name == "top_k" else torch.float64) if name in processors else None
        for name in _PROCESSORS
    ]
    seen, lengths = empty(256, -(-vocab_size // 32), dtype=torch.int32), empty(256, dtype=torch.int32)
    state = seen, lengths, empty(256, dtype=torch.bool)
    logits = empty(256, vocab_size, dtype=dtype)
    sampled = empty(256, dtype=torch.bool) if mixed else None
    numbers = number, number, number, 8193, 8193
    kept = (number, number, number, empty(256, dtype=torch.int32)) if slots else ()
    sampling.sample(logits, *state, *parameters, *numbers, do_sample, sampled, *kept, out=number)
