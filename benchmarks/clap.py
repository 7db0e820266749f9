"""CLAP, part by part: recordings to features, features to embeddings, texts to embeddings; against transformers."""

from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.harness import Provider, Task, task
from benchmarks.kernels import name_of
from clvp_fast import ClapConfig, ClapFeatureExtractor, ClapModel

RATE = 48000
PARTS = {
    "cpu": (
        dict(part="features", clips=16, seconds=10, truncation="rand_trunc"),
        dict(part="features", clips=4, seconds=60, truncation="fusion"),
        dict(part="audio", clips=1, fusion=False),
        dict(part="audio", clips=4, fusion=False),
        dict(part="audio", clips=4, fusion=True),
        dict(part="audio", clips=16, fusion=False),
        dict(part="text", texts=32, tokens=20),
    ),
    "cuda": (
        dict(part="features", clips=256, seconds=10, truncation="rand_trunc"),
        dict(part="audio", clips=256, fusion=False),
        dict(part="audio", clips=256, fusion=True),
        dict(part="text", texts=256, tokens=20),
    ),
}
SMOKE = (
    dict(part="features", clips=2, seconds=1, truncation="fusion"),
    dict(part="audio", clips=1, fusion=True),
    dict(part="text", texts=2, tokens=5),
)
_TINY = {
    "text_config": dict(vocab_size=200, hidden_size=64, num_hidden_layers=1, num_attention_heads=1),
    "audio_config": dict(patch_embeds_hidden_size=32, depths=[1, 1], num_attention_heads=[2, 4], hidden_size=64),
}
# By dtype, how far embeddings may be from transformers' in float32; of features, decibels.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
DECIBELS = 1e-2


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    for shape in SMOKE if smoke else PARTS[device]:
        makers = _extractors(shape, device) if shape["part"] == "features" else _towers(shape, device, smoke)
        yield task("clap", shape, makers, 1 if smoke else 5)


def _extractors(shape: dict, device: str) -> dict[str, Callable[[], Provider]]:
    @cache
    def clips() -> list[np.ndarray]:
        generator = np.random.default_rng(0)
        samples = RATE * shape["seconds"]
        return [generator.standard_normal(samples, dtype=np.float32) * 0.1 for _ in range(shape["clips"])]

    def run(extractor: Callable, **options):
        np.random.seed(0)  # so that crops are the same
        call = dict(truncation=shape["truncation"], sampling_rate=RATE, return_tensors="pt")
        return extractor(clips(), **call, **options)["input_features"]

    @cache
    def stock() -> Callable:
        from transformers.models.clap.feature_extraction_clap import ClapFeatureExtractor as StockExtractor

        return StockExtractor()

    @cache
    def expected() -> torch.Tensor:
        return run(stock())

    def make(name: str, extractor: Callable, **options) -> Provider:
        way = partial(run, extractor(), **options)
        error = float((way().cpu() - expected()).abs().max())
        return Provider(name, way, error, DECIBELS, counted={"dtype": "float32"})

    ways = {"transformers": (stock, {}), "clvp_fast": (ClapFeatureExtractor, {})}
    if device == "cuda":
        ways["clvp_fast on the GPU"] = ClapFeatureExtractor, {"device": "cuda"}
    return {name: partial(make, name, extractor, **options) for name, (extractor, options) in ways.items()}


@cache
def our_model(device: str, dtype: torch.dtype, fusion: bool, smoke: bool) -> ClapModel:
    """Make a model of random weights: 153 million parameters, or a tiny one."""
    torch.manual_seed(0)
    fields = _TINY if smoke else {"text_config": {}, "audio_config": {}}
    audio = fields["audio_config"] | {"enable_fusion": fusion, "fusion_type": "aff_2d"}
    config = ClapConfig(text_config=dict(fields["text_config"]), audio_config=audio)
    return ClapModel(config).eval().requires_grad_(False).to(device, dtype)


@cache
def stock_model(device: str, dtype: torch.dtype, fusion: bool, smoke: bool):
    """Make transformers' own class, with the same weights."""
    from transformers.models.clap import configuration_clap, modeling_clap

    ours = our_model(device, torch.float32, fusion, smoke)
    stock = modeling_clap.ClapModel(configuration_clap.ClapConfig(**ours.config.to_dict())).eval()
    stock.load_state_dict(ours.state_dict())
    return stock.requires_grad_(False).to(device, dtype)


def _towers(shape: dict, device: str, smoke: bool) -> dict[str, Callable[[], Provider]]:
    generator = torch.Generator().manual_seed(1)
    fusion = shape.get("fusion", False)

    def embed(model, dtype: torch.dtype) -> torch.Tensor:
        inputs = made()
        if shape["part"] == "audio":
            inputs = inputs | {"input_features": inputs["input_features"].to(dtype)}
            return model.get_audio_features(**inputs).pooler_output
        return model.get_text_features(**inputs).pooler_output

    @cache
    def made() -> dict[str, torch.Tensor]:
        if shape["part"] == "text":
            ids = torch.randint(4, 200, (shape["texts"], shape["tokens"]), generator=generator)
            return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
        features = torch.randn(shape["clips"], 4 if fusion else 1, 1001, 64, generator=generator) * 20 - 40
        return {"input_features": features.to(device), "is_longer": torch.ones(shape["clips"], 1, dtype=torch.bool)}

    @cache
    @torch.no_grad()
    def expected() -> torch.Tensor:
        return F.normalize(embed(stock_model(device, torch.float32, fusion, smoke), torch.float32), dim=-1)

    @torch.no_grad()
    def make(name: str, model_of: Callable, dtype: torch.dtype) -> Provider:
        model = model_of(device, dtype, fusion, smoke)
        run = torch.no_grad()(partial(embed, model, dtype))
        error = float((F.normalize(run().float(), dim=-1) - expected()).norm() / expected().norm())
        return Provider(name, run, error, TOLERANCE[dtype], counted={"dtype": name_of(dtype)})

    makers = {}
    for dtype in TOLERANCE:
        makers[f"transformers {name_of(dtype)}"] = partial(make, f"transformers {name_of(dtype)}", stock_model, dtype)
        makers[f"clvp_fast {name_of(dtype)}"] = partial(make, f"clvp_fast {name_of(dtype)}", our_model, dtype)
    return makers
