"""The memory of a process that makes one request of the engine and nothing else: `python -m benchmarks.peak_memory`.

Peak of the process on a CPU, of torch's allocations on a GPU, beside what cannot be less: the weights of the whole
model (the encoders of ranking too), the copies of weights in 8 bits, and the keys and values of the candidates.
"""

import argparse
import json
import subprocess
import sys

import torch

from benchmarks.harness import ROOT
from benchmarks.machine import process_memory


def peak_memory(tier: str, device: str, shape: dict, smoke: bool) -> dict[str, int]:
    """Return `peak_bytes` of a new process, the bytes that it must hold, and `import_bytes`, held before."""
    words = [tier, device, *(str(shape[name]) for name in ("candidates", "new_tokens", "text_tokens"))]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peak_memory", *words, *["--smoke"] * smoke],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode:
        raise RuntimeError(f"the process whose memory is measured failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peak_memory", description=__doc__)
    parser.add_argument("tier")
    parser.add_argument("device", choices=("cpu", "cuda"))
    for name in ("candidates", "new_tokens", "text_tokens"):
        parser.add_argument(name, type=int)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    shape = {name: getattr(arguments, name) for name in ("candidates", "new_tokens", "text_tokens")}

    from benchmarks.generate import engine_generate
    from benchmarks.models import our_model
    from benchmarks.tiers import PAGE_SIZE, TIERS, engine_of

    device = arguments.device
    (tier,) = (tier for tier in TIERS[device] if tier.name == arguments.tier)
    before = _peak_bytes(device)
    if device == "cpu":
        _build_in(tier.dtype, arguments.smoke)
    engine = engine_of(tier, device, arguments.smoke, shape["candidates"], shape["new_tokens"])
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    engine_generate(engine, device, shape)
    model = our_model(device, tier.dtype, arguments.smoke)
    decoder = model.config.decoder_config
    itemsize = (tier.page_dtype or tier.dtype).itemsize
    pages = shape["candidates"] * -(-shape["new_tokens"] // PAGE_SIZE) + -(-(shape["text_tokens"] + 3) // PAGE_SIZE)
    weights = sum(p.nbytes for p in model.parameters())
    if tier.weight_dtype is not None:  # copies, beside the model's own
        layers = model.speech_decoder_model.model.decoder.layers
        weights += sum(p.numel() for p in layers.parameters()) * tier.weight_dtype.itemsize
    key_values = pages * PAGE_SIZE * 2 * decoder.num_hidden_layers * decoder.hidden_size * itemsize
    found = dict(peak_bytes=_peak_bytes(device), import_bytes=before, weights_bytes=weights, kv_bytes=key_values)
    print(json.dumps(found))


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return process_memory("VmHWM")  # `ru_maxrss` would count what the parent had when it forked


def _build_in(dtype: torch.dtype, smoke: bool) -> None:
    """Let the model be made in `dtype` at once: a float32 one on the way would be the peak."""
    from benchmarks import models

    torch.set_default_dtype(dtype)
    models.our_model("cpu", dtype, smoke)
    torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    main()
