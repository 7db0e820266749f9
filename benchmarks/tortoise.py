"""The first stages of Tortoise's `tts()`: candidates drawn, ranked by CLVP, and the latents of the best; no sound.

`tts()` itself runs, of tortoise-tts 3.0.0, over models of its sizes and random weights: with its default batch on a
CPU, with its cache, with that and all candidates as one batch, and accelerated. Each candidate has so many codes, few
beside the two hundred of a sentence, and is filled up to the length that it is scored at. "Scored in bfloat16" is
`score_dtype`, and "engine, bfloat16" the engine over the converted models, put together as the accelerated stage is.
The error is that of scores and latents of given codes, against the package's own modules.
"""

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.harness import Provider, Task, task
from benchmarks.rivals.tortoise_stage import make_tts
from clvp_fast import CandidateEngine, CandidateRequest, ClvpFeatureExtractor, Ranking, SamplingParams, accelerate
from clvp_fast.engine.latents import cut_in_silence, states_of_codes
from clvp_fast.engine.ranking import Ranker
from clvp_fast.models.clvp.convert_tortoise import convert_tortoise_checkpoint

SHAPES = {
    "cpu": (dict(candidates=4, codes=8, padded_to=500),),
    "cuda": (dict(candidates=16, codes=200, padded_to=500),),
}
SMOKE = (dict(candidates=2, codes=4, padded_to=40),)
TEXT = "The birch canoe slid on the smooth planks, and the doctor paid for it."
# Settings of `accelerate`, and the largest difference of scores and latents of given codes from the package's.
ACCELERATED: dict[str, tuple[dict[str, Any], float]] = {
    "float32": ({}, 1e-4),
    "int8": (dict(weight_dtype=torch.int8), 1e-4),
    "int8, scored in bfloat16": (dict(weight_dtype=torch.int8, score_dtype=torch.bfloat16), 5e-2),
}
SILENCE = 83


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    for shape in SMOKE if smoke else SHAPES[device]:
        yield _task(device, shape, smoke)


def _task(device: str, shape: dict, smoke: bool) -> Task:
    shared = cache(partial(Shared, device, shape, smoke))
    everyone = shape["candidates"]
    makers: dict[str, Callable[[], Provider]] = {}
    for name, kv_cache, size in (
        ("tortoise, default", False, 1),
        ("tortoise, kv_cache", True, 1),
        (f"tortoise, kv_cache, batch of {everyone}", True, everyone),
    ):
        makers[name] = partial(_stock, name, shared, shape, kv_cache, size)
    for kind in ACCELERATED:
        name = f"clvp_fast accelerate(tts), {kind}"
        makers[name] = partial(_accelerated, name, shared, shape, *ACCELERATED[kind])
    makers["clvp_fast engine, bfloat16"] = partial(_half, shared, device, shape)
    # On a CPU the first run of each, which measures memory, and two that are timed take minutes.
    return task("tortoise", shape, makers, 1 if smoke else 2, tokens=everyone * shape["codes"])


class Shared:
    """The package's own object, given codes `[candidates, padded_to]`, and its scores and latents of them."""

    @torch.no_grad()
    def __init__(self, device: str, shape: dict, smoke: bool):
        self.tts = make_tts(device, smoke)
        width = self.tts.autoregressive.model_dim
        generator = torch.Generator().manual_seed(1)
        self.voice = torch.randn(1, width, generator=generator), torch.randn(1, 2 * width, generator=generator)
        drawn = torch.randint(0, 300, (shape["candidates"], shape["codes"]), generator=generator)
        codes = F.pad(drawn, (0, shape["padded_to"] - shape["codes"]), value=SILENCE)
        self.codes = codes.to(device)
        self.text = F.pad(torch.IntTensor([self.tts.tokenizer.encode(TEXT)]), (0, 1)).to(device)
        self.scores, self.latents = scores_and_latents(self.tts, self)


def scores_and_latents(tts: Any, shared: Shared) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores `[candidates]` of the given codes by an object, and the latents of the first up to its silence."""
    with torch.no_grad():
        scores = tts.clvp(shared.text.repeat(len(shared.codes), 1), shared.codes, return_loss=False)
        first, kept = shared.codes[:1], cut_in_silence(shared.codes[0].tolist(), SILENCE)
        lengths = torch.tensor([shared.text.shape[1]]), torch.tensor([first.shape[1] * 1024])
        voice = shared.voice[0].to(first.device)
        inputs = (voice, shared.text, lengths[0], first, lengths[1])
        return scores, tts.autoregressive(*inputs, return_latent=True, clip_inputs=False)[:, :kept]


def _error(found: tuple[torch.Tensor, torch.Tensor], shared: Shared) -> float:
    pairs = zip(found, (shared.scores, shared.latents), strict=True)
    return max(float((one.float() - other).norm() / other.norm()) for one, other in pairs)


class Stages:
    """`tts()` with candidates that end after so many codes; `told["parts"]` are seconds of the last run's stages."""

    def __init__(self, tts: Any, shared: Shared, shape: dict, kv_cache: bool | None = None, size: int = 1):
        self.tts, self.shared, self.shape = tts, shared, shape
        self.kv_cache, self.size = kv_cache, size
        self.told: dict[str, Any] = {}

    def __call__(self) -> None:
        tts, shape, parts = self.tts, self.shape, dict.fromkeys(("draw", "rank", "latents"), 0.0)
        if self.kv_cache is not None:
            tts.autoregressive.inference_model.kv_cache = self.kv_cache
        tts.autoregressive_batch_size = self.size
        own, began = vars(tts.autoregressive)["inference_speech"], []

        def drawn(*args, max_generate_length, **options):
            begin = perf_counter()
            codes = own(*args, max_generate_length=shape["codes"], **options)
            parts["draw"] += perf_counter() - begin
            return codes

        def ended(part):
            return lambda *_: parts.update({part: parts[part] + perf_counter() - began.pop()})

        hooks = [module.register_forward_pre_hook(lambda *_: began.append(perf_counter())) for module in _roots(tts)]
        hooks += [
            module.register_forward_hook(ended(part))
            for module, part in zip(_roots(tts), ("latents", "rank"), strict=True)
        ]
        vars(tts.autoregressive)["inference_speech"] = drawn
        try:
            settings = dict(num_autoregressive_samples=shape["candidates"], max_mel_tokens=shape["padded_to"])
            tts.tts(TEXT, conditioning_latents=self.shared.voice, use_deterministic_seed=0, verbose=False, **settings)
        finally:
            vars(tts.autoregressive)["inference_speech"] = own
            for hook in hooks:
                hook.remove()
        self.told["parts"] = parts


def _roots(tts: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    return tts.autoregressive, tts.clvp


def _stock(name: str, shared: Callable[[], Shared], shape: dict, kv_cache: bool, size: int) -> Provider:
    run = Stages(shared().tts, shared(), shape, kv_cache, size)
    return Provider(name, run, 0.0, 0.0, counted=run.told)


def _accelerated(
    name: str, shared: Callable[[], Shared], shape: dict, options: dict[str, Any], tolerance: float
) -> Provider:
    common = shared()
    tts = copy.deepcopy(common.tts)
    del tts.autoregressive.inference_speech  # the engine takes its place
    accelerate(tts, max_batch=shape["candidates"], **options)
    run = Stages(tts, common, shape)
    error = _error(scores_and_latents(tts, common), common)
    return Provider(name, run, error, tolerance, counted=run.told)


def _half(shared: Callable[[], Shared], device: str, shape: dict) -> Provider:
    run = Half(shared(), device, shape)
    error = _error((run.rank(shared().codes), run.latents(shared().codes[0])), shared())
    return Provider("clvp_fast engine, bfloat16", run, error, 5e-2, counted=run.told)


class Half:
    """The accelerated stage in bfloat16, over the converted models of an object."""

    def __init__(self, shared: Shared, device: str, shape: dict):
        self.shared, self.shape, self.told = shared, shape, {}
        states = (module.state_dict() for module in _roots(shared.tts))
        self.model = convert_tortoise_checkpoint(*states, dtype=torch.bfloat16).to(device)
        self.model.config.decoder_config.contiguous_positions = True
        features = ClvpFeatureExtractor(feature_size=self.model.config.decoder_config.feature_size)
        processor = SimpleNamespace(feature_extractor=features, tokenizer=None)
        sizes = dict(max_batch=shape["candidates"], max_new_tokens=shape["codes"], text_ends=1)
        self.engine = CandidateEngine(self.model, processor, scorer=Unranked(), **sizes)
        self.ranker = Ranker(self.model)
        sampling = SamplingParams(num_candidates=shape["candidates"], max_new_tokens=shape["codes"], seed=0)
        self.request = CandidateRequest(
            input_ids=shared.text[0].cpu(), conditioning=shared.voice[0][0].bfloat16(), sampling=sampling
        )

    def __call__(self) -> None:
        begin = perf_counter()
        (result,) = self.engine.generate(self.request)
        if result.error is not None:
            raise RuntimeError(str(result.error)) from result.error
        drawn = perf_counter()
        codes = torch.from_numpy(result.codes)[:, : self.shape["codes"]]
        codes = F.pad(codes, (0, self.shape["padded_to"] - codes.shape[1]), value=SILENCE)
        best = int(self.rank(codes).argmax())
        ranked = perf_counter()
        self.latents(codes[best])
        parts = dict(draw=drawn - begin, rank=ranked - drawn, latents=perf_counter() - ranked)
        self.told["parts"] = parts

    def rank(self, codes: torch.Tensor) -> torch.Tensor:
        return self.ranker.score_fixed(self.shared.text[0], codes)

    @torch.no_grad()
    def latents(self, codes: torch.Tensor) -> torch.Tensor:
        kept = cut_in_silence(codes.tolist(), SILENCE)
        voice = self.shared.voice[0].to(self.model.device, torch.bfloat16)
        encoder, decoder = self.model.conditioning_encoder, self.model.speech_decoder_model
        text, _ = encoder.prompt_text(self.shared.text.long(), num_ends=1)
        return states_of_codes(decoder, encoder.join(voice, text)[0], codes[:kept])[None].float()


class Unranked:
    """A scorer for candidates that are ranked at another length than the engine's."""

    def score(self, request, text_ids, codes, max_codes) -> Ranking:
        return Ranking(torch.zeros(len(codes)))
