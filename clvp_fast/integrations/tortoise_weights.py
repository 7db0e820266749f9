"""The parameters of Tortoise's live modules as a CLVP model: both share one storage."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from clvp_fast.models.clvp.configuration import ClvpConfig
from clvp_fast.models.clvp.convert_tortoise import Original, check_pair, decoder_configs, encoder_configs
from clvp_fast.models.clvp.modeling import ClvpModelForConditionalGeneration
from clvp_fast.models.clvp.tortoise_keys import HEAD_DIM, Rule, decoder_rules, encoder_rules
from clvp_fast.models.common.parameters import pack_linears, transpose_storage

# Rows of the voice encoder are in another order in Tortoise, so they are copied; its own encoder is not called.
_COPIED = re.compile(r"conditioning_encoder\.attn\.\d+\.qkv\.(weight|bias)")


class SharedWeights:
    """A CLVP `model` that shares the parameters of Tortoise's modules.

    Their parameters are first moved into the storage that the engine reads (GPT-2's weights transposed; query, key and
    value of the encoders one after another), with the same values and shapes. Those of `model` are views of them.

    Args:
        autoregressive: a live `UnifiedVoice`.
        clvp: a live `CLVP`; None: the model has small random encoders that are not used.

    Raises:
        ValueError: tensors are missing, too many, or of other shapes than Tortoise's. Both modules are then unchanged.
    """

    def __init__(self, autoregressive: nn.Module, clvp: nn.Module | None):
        self._autoregressive, self._clvp = autoregressive, clvp
        decoder_side = Original("tts.autoregressive", autoregressive.state_dict())
        config = decoder_configs(decoder_side)
        if clvp is None:
            model_config = ClvpConfig(**config, **_no_encoders(decoder_side))
            rules = [(autoregressive, decoder_side, list(decoder_rules(model_config)))]
        else:
            encoder_side = Original("tts.clvp", clvp.state_dict())
            model_config = ClvpConfig(**config, **encoder_configs(encoder_side))
            check_pair(model_config, decoder_side, encoder_side)
            rules = [
                (autoregressive, decoder_side, list(decoder_rules(model_config))),
                (clvp, encoder_side, list(encoder_rules(model_config))),
            ]
        self._rules = [(module, of_module) for module, _, of_module in rules]
        for _, side, of_module in rules:
            side.check(of_module)
        self._sources = [(rule, tensor) for rule, tensor in self._now() if tensor is not None]
        self._moved: dict[torch.Tensor, tuple[tuple[int, ...], torch.Tensor | None]] = {}  # strides, place in a buffer
        device = next(autoregressive.parameters()).device
        try:
            self._arrange()
            self.model: ClvpModelForConditionalGeneration = self._make(model_config, device)
        except BaseException:
            self.give_back()
            raise

    def _make(self, config: ClvpConfig, device: torch.device) -> ClvpModelForConditionalGeneration:
        with torch.device("meta"):
            model = ClvpModelForConditionalGeneration(config)
        if self._clvp is None:
            for part in (model.text_encoder_model, model.speech_encoder_model):
                part.to_empty(device=device)
            model.logit_scale = nn.Parameter(torch.ones((), device=device))
        state = dict(part for rule, source in self._sources for part in _parts(rule, source))
        model.load_state_dict(state, strict=self._clvp is not None, assign=True)
        return model.eval()

    @torch.inference_mode(False)
    def _arrange(self) -> None:
        for module in self._autoregressive.modules():
            if isinstance(module, Conv1D):
                with self._noted([module.weight]):
                    transpose_storage(module)
        for linears in self._projections():
            with self._noted([parameter for linear in linears for parameter in linear.parameters()]):
                pack_linears(linears)

    @contextmanager
    def _noted(self, parameters: Sequence[torch.Tensor]) -> Iterator[None]:
        """Record the former place of moved parameters: the larger buffer itself for a part of one, else the strides."""
        before = [parameter.data for parameter in parameters]
        yield
        for parameter, old in zip(parameters, before, strict=True):
            if parameter.data_ptr() != old.data_ptr() and parameter not in self._moved:
                part = old.untyped_storage().nbytes() > old.nbytes
                self._moved[parameter] = old.stride(), old if part else None

    def _projections(self) -> Iterator[list[nn.Linear]]:
        for module in () if self._clvp is None else self._clvp.modules():
            linears = [getattr(module, name, None) for name in ("to_q", "to_k", "to_v")]
            if found := [linear for linear in linears if isinstance(linear, nn.Linear)]:
                yield found

    def _now(self) -> Iterator[tuple[Rule, torch.Tensor | None]]:
        """Yield the current tensor of the modules for each rule."""
        for module, rules in self._rules:
            tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
            for rule in rules:
                yield rule, tensors.get(rule.source)

    def _ours(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    def apart(self) -> str | None:
        """Return the name of a Tortoise parameter that ours no longer share, or None."""
        ours = self._ours()
        for (rule, source), (_, now) in zip(self._sources, self._now(), strict=True):
            if now is not source:
                return rule.source
            if _COPIED.fullmatch(rule.source):
                continue
            for target, part in _parts(rule, source):
                mine = ours[target]
                if (mine.data_ptr(), mine.dtype, mine.stride()) != (part.data_ptr(), part.dtype, part.stride()):
                    return rule.source
        return None

    def stands_on(self, device: torch.device) -> bool:
        """Tell whether all of Tortoise's parameters that the model shares are on a device."""
        index = None if device.type == "cpu" else device.index
        places = {source.device for _, source in self._sources}
        return len(places) == 1 and all(place.type == device.type and index in (None, place.index) for place in places)

    @torch.no_grad()
    @torch.inference_mode(False)  # inference tensors could no longer be trained
    def move(self, device: torch.device) -> None:
        """Move both sides to a device, a tensor at a time, so that there are never two whole copies."""
        if device.type == "cpu":
            device = torch.device("cpu")  # torch takes "cpu:0" for another device, and copies
        for _, source in self._sources:
            source.data = source.data.to(device)
            self._point(source)
        for module in (self._autoregressive, self._clvp):
            if module is not None:
                nn.Module.to(module, device)
        self._arrange()
        self._point()
        nn.Module.to(self.model, device)  # the model's own tensors

    def _point(self, only: torch.Tensor | None = None) -> None:
        """Make ours views of Tortoise's tensors, or of one of them."""
        ours = self._ours()
        for rule, source in self._sources:
            if only is None or source is only:
                for target, part in _parts(rule, source):
                    ours[target].data = part

    @torch.no_grad()
    @torch.inference_mode(False)
    def give_back(self) -> None:
        """Return moved parameters to their former storage; `model` must not be used afterwards."""
        for parameter, (strides, old) in self._moved.items():
            if parameter.device.type == "cpu" and parameter.is_shared():  # shared with another process since
                continue
            if old is None or (old.shape, old.dtype) != (parameter.shape, parameter.dtype):
                old = torch.empty_strided(parameter.shape, strides, dtype=parameter.dtype, device=parameter.device)
            parameter.data = old.copy_(parameter.data)
        self._moved.clear()


def _parts(rule: Rule, source: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield our tensors by name for one of Tortoise's tensors: views, except for rows in another order."""
    return zip(rule.targets, rule.convert(source.detach()), strict=True)


def _no_encoders(original: Original) -> dict:
    rows = original.shape("text_embedding.weight", 2)[0]
    small = dict(hidden_size=HEAD_DIM, intermediate_size=HEAD_DIM, num_hidden_layers=1, num_attention_heads=1)
    text = small | dict(vocab_size=rows, bos_token_id=rows - 1, eos_token_id=0, projection_dim=HEAD_DIM)
    codes = original.shape("mel_embedding.weight", 2)[0] - 2
    return dict(
        projection_dim=HEAD_DIM, text_config=text, speech_config=small | dict(vocab_size=codes, projection_dim=HEAD_DIM)
    )
