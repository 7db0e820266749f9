"""Speech codes to embeddings: transformers' speech encoder against ours."""

import torch

from benchmarks.harness import Provider, measure
from benchmarks.models import full_size, full_size_stock


@torch.no_grad()
def rows(device: str, candidates: int = 16, length: int = 200, repeats: int = 5) -> list[dict]:
    codes = torch.randint(0, 8192, (candidates, length), generator=torch.Generator().manual_seed(2)).to(device)
    models = (full_size_stock(device), full_size(device), full_size(device, torch.bfloat16))
    encoders = [model.speech_encoder_model for model in models]

    @torch.no_grad()
    def run(encoder):
        return encoder(input_ids=codes).embeds

    expected, *others = (run(encoder).float() for encoder in encoders)
    errors = [0.0, *(float((got - expected).norm() / expected.norm()) for got in others)]
    names = ["transformers float32", "clvp_fast float32", "clvp_fast bfloat16"]
    providers = [
        Provider(name, lambda encoder=encoder: run(encoder), error, tolerance)
        for name, encoder, error, tolerance in zip(names, encoders, errors, [0.0, 1e-4, 3e-2], strict=True)
    ]
    parameters = sum(p.numel() for layer in encoders[1].layers for p in layer.parameters())
    flop = 2 * parameters * candidates * length
    return measure("score", {"candidates": candidates, "length": length}, providers, repeats, encoder_flop=flop)
