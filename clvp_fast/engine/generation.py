"""`generate()` on the candidate engine: decides which calls the engine can serve, and decodes them.

`GenerationMixin.generate` prepares every call: it merges and checks settings, and counts lengths. Its public argument
`custom_generate` then puts the engine in the place of the loop over `forward`. The engine itself knows nothing of
transformers. Calls that it cannot serve keep the loop.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import proxy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from clvp_fast.engine.decode_loop import DecodeLoop, Job
from clvp_fast.engine.defaults import PAGE_SIZE
from clvp_fast.engine.memory import MAX_BATCH, MemoryPlan, free_bytes, plan
from clvp_fast.engine.runner import Runner
from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.models.clvp import kept
from clvp_fast.models.clvp.causal_lm import ClvpForCausalLM
from clvp_fast.models.clvp.tokens import fill_up, only_token, start_token
from clvp_fast.models.common.plain import changed_module
from clvp_fast.ops.dispatch import autocasts, situation

# The documented name: this module stood in models/clvp before.
LOGGER = logging.getLogger("clvp_fast.models.clvp.generation")

#: Where `generate()` runs, in one sentence.
SERVED = (
    "the engine decodes greedily and samples with temperature, top-k, top-p, typical-p, min-p and repetition penalty; "
    "transformers' loop over the same modules serves every other setting, and hooked or replaced modules"
)

# Settings that the engine supports, or that change no token.
_KNOWN = {
    *("max_length", "max_new_tokens", "num_return_sequences", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("do_sample", "temperature", "top_k", "top_p", "typical_p", "min_p", "repetition_penalty"),
    *("use_cache", "return_dict_in_generate", "transformers_version"),
    # Settings of beams and assistants; they have no effect unless other settings turn these on.
    *("early_stopping", "length_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
}
# Values that switch a setting off, besides None, False and the default of transformers.
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "diversity_penalty": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_PROCESSORS = (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
)
_CRITERIA = (MaxLengthCriteria, EosTokenCriteria)
# The share of a GPU's memory that pages may take to be kept after their call.
_KEPT_SHARE = 1 / 8


class NotServed(Exception):
    """A generation that the engine cannot decode, with the reason."""


def check_call(model: ClvpForCausalLM, given: GenerationConfig | None, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Raise `NotServed` if a call of `generate` asks for something that the engine cannot do.

    Args:
        model: the `ClvpForCausalLM`.
        given, args, kwargs: the call's `generation_config`, further positional arguments, and keywords.
    """
    defaults = vars(GenerationConfig())
    if any(not _absent(value) for value in args):
        raise NotServed("it got positional arguments after generation_config")
    for name, value in kwargs.items():
        if name not in defaults and not _absent(value):
            raise NotServed(f"it was given {name}")
    settings = merged_settings(model, given, kwargs)
    for name, value in settings.items():
        if name in _KNOWN or name.startswith("_") or value is None or value is False:
            continue
        neutral = (defaults.get(name), _NEUTRAL.get(name))
        if not any(isinstance(value, (int, float, str)) and value == other for other in neutral):
            raise NotServed(f"{name}={value!r}")
    _stop_token(settings.get("eos_token_id"))
    _stop_token(model.config.eos_token_id)


def merged_settings(
    model: ClvpForCausalLM, given: GenerationConfig | None, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Merge a call's settings as `GenerationMixin` does: keywords, `given`, the model's, and defaults for None."""
    settings = vars(GenerationConfig()) | vars(model.generation_config)
    if given is not None:
        settings |= {name: value for name, value in vars(given).items() if value is not None}
    return settings | {name: value for name, value in kwargs.items() if name in settings}


def _absent(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (list, tuple)) and not value)


def _stop_token(eos_token_id: Any) -> int:
    """Return the one stop token of a generation; raise `NotServed` if it has none, or several."""
    if isinstance(eos_token_id, torch.Tensor):
        eos_token_id = eos_token_id.flatten().tolist()
    try:
        stop = only_token(eos_token_id, "eos_token_id")
    except ValueError as error:
        raise NotServed(str(error)) from error
    if stop is None:
        raise NotServed("eos_token_id names no token")
    return stop


def check_model(model: ClvpForCausalLM) -> None:
    """Raise `NotServed` if a `ClvpForCausalLM` does more than its class does, or lies on several devices."""
    if (found := changed_module(model, model.kinds)) is not None:
        raise NotServed(found)
    for name, module in model.named_modules():
        # `nn.Dropout` keeps its probability in `p`; attention keeps the number itself.
        dropout = module.p if isinstance(module, nn.Dropout) else getattr(module, "dropout", 0)
        if module.training and isinstance(dropout, (int, float)) and dropout > 0:
            raise NotServed(f"module {name} is in training mode, with dropout")
    kinds = {(type(p), p.device, p.dtype) for p in model.parameters()}
    if len(kinds) > 1 or next(iter(kinds))[0] is not nn.Parameter:
        raise NotServed("the parameters are not all of one kind, dtype and device")
    device = model.device.type
    if device not in ("cpu", "cuda"):
        raise NotServed(f"the model is on {device}")
    if autocasts(model.device):
        raise NotServed("autocast is on")
    if torch.compiler.is_compiling():
        raise NotServed("it is being compiled")


def split_prompts(conditioning_embeds: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Return the prompts, each `[length, hidden_size]`, without their padding.

    Args:
        conditioning_embeds: `[batch, prompt, hidden_size]`.
        mask: `[batch, prompt + 1]`, 0 = padding, the last column the start token's.

    Raises:
        NotServed: a prompt or its start token is masked out completely.
    """
    kept = mask.bool().cpu()
    if not kept[:, -1].all() or not kept[:, :-1].any(1).all():
        raise NotServed("the attention mask hides a whole prompt, or its start token")
    rows = [row.nonzero()[:, 0].to(conditioning_embeds.device) for row in kept[:, :-1]]
    return [embeds[row] for embeds, row in zip(conditioning_embeds, rows, strict=True)]


def pad_behind(conditioning_embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the padding of prompts `[batch, prompt, hidden_size]` and mask `[batch, prompt + 1]` to their end."""
    order = mask[:, :-1].bool().int().argsort(dim=1, descending=True, stable=True)
    moved = conditioning_embeds.take_along_dim(order[..., None], 1)
    return moved, torch.cat([mask[:, :-1].take_along_dim(order, 1), mask[:, -1:]], 1)


class EngineLoop:
    """Decode the candidates of `prompts` on the engine, as `custom_generate` of `GenerationMixin.generate`.

    When sampling, a call draws a seed for every prompt from torch's global generator.

    Args:
        prompts: one for each row of the batch, `[length, hidden_size]`, with position embeddings, without the start
            token.
    """

    def __init__(self, prompts: list[torch.Tensor]):
        self.prompts = prompts

    def __call__(
        self,
        model: ClvpForCausalLM,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ) -> GenerateDecoderOnlyOutput | torch.Tensor:
        """Return token ids `[batch * num_return_sequences, 1 + generated]`, as `GenerationMixin` does.

        Raises `NotServed` for prepared settings that the engine does not know, and for too little memory.
        """
        for part in (*logits_processor, *stopping_criteria):
            if type(part) not in (*_PROCESSORS, *_CRITERIA):
                raise NotServed(f"it uses {type(part).__name__}")
        stop = _stop_token(generation_config.eos_token_id)
        if stopping_criteria.max_length is None:
            raise NotServed("it has no greatest length")
        # `input_ids` holds the start token alone, which counts in `max_length`.
        max_new_tokens = stopping_criteria.max_length - input_ids.shape[1]
        try:
            sampling = _sampling_params(generation_config, max_new_tokens, stop)
            sizes = _Sizes.of(self.prompts, sampling)
            loop = DecodeLoop(_kept_runner(model, sizes) or _runner(model, sizes))
        except ValueError as error:
            raise NotServed(str(error)) from error
        # Seeds are drawn last, so that a call left to transformers' loop finds the generator unchanged.
        seeds = [0] * len(self.prompts)
        if sampling.do_sample:
            seeds = torch.randint(2**63 - 1, (len(self.prompts),)).tolist()
        jobs = [Job(prompt, replace(sampling, seed=seed)) for prompt, seed in zip(self.prompts, seeds, strict=True)]
        if _decode(loop, jobs, lambda max_batch: _runner(model, replace(sizes, max_batch=max_batch))):
            _keep(model, loop)

        pad = stop if generation_config.pad_token_id is None else generation_config.pad_token_id
        start, codes = start_token(model.config), [codes for job in jobs for codes in job.all_codes()]
        drawn = torch.from_numpy(fill_up(codes, max(map(len, codes)), pad)).to(input_ids.device)
        sequences = F.pad(drawn, (1, 0), value=start)
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences)  # pyright: ignore[reportArgumentType] - torch makes no `LongTensor`


def _sampling_params(settings: GenerationConfig, max_new_tokens: int, stop_token: int) -> SamplingParams:
    """Return prepared settings as the engine's, without a seed; None switches a processor off, as in transformers.

    Raises `ValueError` for values that the engine does not take.
    """
    neutral: dict[str, Any] = dict(repetition_penalty=1.0)
    if settings.do_sample:
        neutral |= dict(temperature=1.0, top_k=0, top_p=1.0, typical_p=1.0, min_p=0.0)
    values = {name: getattr(settings, name, None) for name in neutral}
    return SamplingParams(
        num_candidates=settings.num_return_sequences or 1,
        do_sample=bool(settings.do_sample),
        max_new_tokens=max_new_tokens,
        stop_token=stop_token,
        penalize_prompt=False,
        **{name: neutral[name] if value is None else value for name, value in values.items()},
    )


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a call: slots, the longest candidate and prompt in tokens, and the number of prompts."""

    max_batch: int
    max_new_tokens: int
    max_prefix_len: int
    prompts: int

    @classmethod
    def of(cls, prompts: list[torch.Tensor], sampling: SamplingParams) -> "_Sizes":
        max_batch = min(len(prompts) * (sampling.num_candidates or 1), MAX_BATCH)
        return cls(max_batch, sampling.max_new_tokens, max(map(len, prompts)), len(prompts))

    @property
    def num_pages(self) -> int:
        """Return the most pages that the call can fill at once."""
        own, prefix = (-(-tokens // PAGE_SIZE) for tokens in (self.max_new_tokens, self.max_prefix_len))
        return self.max_batch * own + self.prompts * prefix


def _kept_runner(model: ClvpForCausalLM, sizes: _Sizes) -> Runner | None:
    """Return the runner that an earlier call has left if it decodes this call as a new one would; otherwise free it."""
    runner, made_for = kept.take(model) or (None, None)
    if runner is None or made_for != _made_for(model) or runner.outdated() is not None:
        return None
    room = runner.max_batch, runner.max_new_tokens, runner.max_prefix_len, runner.pages.data.shape[2]
    needed = sizes.max_batch, sizes.max_new_tokens, sizes.max_prefix_len, sizes.num_pages
    if any(there < wanted for there, wanted in zip(room, needed, strict=True)):
        return None
    runner.reset()
    return runner


def _keep(model: ClvpForCausalLM, loop: DecodeLoop) -> None:
    """Keep a loop's runner for the next call, with its captured steps, unless much memory would be missing elsewhere.

    Where no steps are captured, as on a CPU, a kept runner would save nothing.
    """
    runner = loop.runner
    assert runner is not None  # its calls are done
    if runner.replays and runner.pages.data.nbytes <= _KEPT_SHARE * _device_bytes(runner.device):
        kept.keep(model, (runner, _made_for(model)))


def _device_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def _made_for(model: ClvpForCausalLM) -> tuple:
    """Return what captured steps depend on besides weights and sizes."""
    return start_token(model.config), getattr(model.config, "contiguous_positions", False), *situation()


def _runner(model: ClvpForCausalLM, sizes: _Sizes) -> Runner:
    """Make a runner with no more pages than the call can fill.

    Raises `ValueError` where memory is too little for one candidate.
    """
    try:
        planned = _planned(model, sizes)
    except ValueError:
        kept.release_all()  # other models' runners may have the memory
        planned = _planned(model, sizes)
    sizes = replace(sizes, max_batch=planned.max_batch)
    num_pages = min(planned.num_pages, sizes.num_pages)
    longest: dict[str, Any] = dict(max_new_tokens=sizes.max_new_tokens, max_prefix_len=sizes.max_prefix_len)
    # By a weak reference, because a kept runner must not keep its model.
    weak: Any = proxy(model)
    return Runner(weak, num_pages, PAGE_SIZE, sizes.max_batch, **longest, capture_late=True)


def _planned(model: ClvpForCausalLM, sizes: _Sizes) -> MemoryPlan:
    longest: dict[str, Any] = dict(max_new_tokens=sizes.max_new_tokens, max_prefix_len=sizes.max_prefix_len)
    return plan(model, free_bytes(model.device), max_batch=sizes.max_batch, page_size=PAGE_SIZE, **longest)


@torch.inference_mode()
def _decode(loop: DecodeLoop, jobs: list[Job], smaller: Callable[[int], Runner]) -> bool:
    """Fill the codes of `jobs`, and return whether memory was enough.

    When memory runs out, start again on `smaller(slots)` with half the slots.
    """
    candidates = sum(len(job.codes) for job in jobs)
    at_once = most = min(candidates, loop.scheduler.max_batch)
    LOGGER.debug("generate() runs on the engine: prompts %d, candidates %d, at once %d", len(jobs), candidates, at_once)
    while True:
        for job in jobs:
            loop.add(job)
        try:
            while not loop.idle:
                loop.step()
            return at_once == most
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
        at_once = loop.halve(at_once)
        LOGGER.debug("memory ran out: starting again with %d candidates at once", at_once)
        loop.restart(smaller(at_once))
