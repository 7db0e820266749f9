"""The decoder with its language-model head: logits of speech tokens, and the generation of candidates."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.utils import can_return_tuple

from clvp_fast.models.clvp.cache import GrowingCache
from clvp_fast.models.clvp.configuration import ClvpDecoderConfig
from clvp_fast.models.clvp.decoder import ClvpModel
from clvp_fast.models.clvp.kept import release
from clvp_fast.models.clvp.pretrained import ClvpPreTrainedModel
from clvp_fast.models.clvp.tokens import most_codes, start_token
from clvp_fast.models.common.layers import add_norm
from clvp_fast.models.common.parameters import apply_linear, arrange_for_decoding
from clvp_fast.models.transformers_versions import CACHE, CACHE_NAMES, takes_cache


class ClvpForCausalLM(ClvpPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head over speech tokens."""

    config: ClvpDecoderConfig
    config_class = ClvpDecoderConfig

    def __init__(self, config: ClvpDecoderConfig):
        super().__init__(config)
        self.model = ClvpModel(config)
        self.final_norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=True)
        self.post_init()

    def _apply(self, fn, recurse=True):
        release(self)  # what `generate()` keeps reads the parameters where they lie, and would keep that memory
        return super()._apply(fn, recurse)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding."""
        return self.model.decoder.input_embeds_layer

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding by `value`."""
        self.model.decoder.input_embeds_layer = value

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head by `value`."""
        self.lm_head = value

    @can_return_tuple
    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """Compute logits `[batch, length, vocab_size]`; other arguments as in [`ClvpDecoder.forward`].

        Args:
            labels: `[batch, length]`, shifted inside; -100 is ignored.
            logits_to_keep: compute only this many last positions (0 = all), or the positions in a tensor.

        Returns:
            `CausalLMOutputWithCrossAttentions`, or a tuple with `return_dict=False`.
        """
        outputs = self.model(
            input_ids=input_ids,
            **{CACHE: cache},
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor):
            hidden_states = hidden_states[:, logits_to_keep]
        elif logits_to_keep:
            hidden_states = hidden_states[:, -logits_to_keep:]
        logits = apply_linear(self.lm_head, add_norm(self.final_norm, hidden_states)[1])

        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @takes_cache
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_prompts: int | None = None,
        is_first_iteration: bool = False,
        **kwargs,
    ) -> dict:
        """Prepare a step for `GenerationMixin`; `num_prompts` marks one that continues conditioning embeddings."""
        # transformers types `self` here, and in `generate`, by a protocol that none of its models satisfies.
        model_inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids,
            **{CACHE: cache},
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if num_prompts is None:
            return model_inputs
        if is_first_iteration:
            model_inputs["position_ids"] = None
            model_inputs["embeds_have_positions"] = True
            recorded = model_inputs.get("output_attentions") or model_inputs.get("output_hidden_states")
            if cache is not None and not recorded:
                assert inputs_embeds is not None  # `generate` gives them with `num_prompts`
                model_inputs["candidates_per_prompt"] = inputs_embeds.shape[0] // num_prompts
        else:
            # The k-th speech token has position k + 1, as in the original with its cache; in training it had position
            # k.
            last = input_ids.shape[1] - int(getattr(self.config, "contiguous_positions", False))
            width = model_inputs["input_ids"].shape[1]
            model_inputs["position_ids"] = torch.arange(last - width + 1, last + 1, device=input_ids.device)[None]
        return model_inputs

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config=None,
        *args,
        conditioning_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        use_engine: bool | None = None,
        **kwargs,
    ):
        """Generate speech tokens after conditioning embeddings, or continue token ids like any causal model.

        Args:
            inputs: token ids `[batch, length]` to continue (also as `input_ids=`).
            conditioning_embeds: `[batch, prompt, hidden_size]`, from [`ClvpConditioningEncoder`]; the start token is
                added after it, so `inputs` must be absent.
            attention_mask: `[batch, prompt]`, or `[batch, prompt + 1]` with a last column for the start token; 0 =
                padding.
            use_engine: whether the candidate engine decodes. It gives the greedy tokens of transformers' loop, and
                samples from the same distribution. None: if it can; True: always, or raise an error; False: never. The
                logger `clvp_fast.models.clvp.generation` tells the choice at level DEBUG.
            generation_config, args, kwargs: as in `GenerationMixin.generate`.

        Returns:
            Token ids `[batch * num_return_sequences, 1 + generated]`, the start token first; with
            `return_dict_in_generate=True` a `ModelOutput` (from the engine, with only `sequences`).

        Raises:
            ValueError: `use_engine=True` and the engine cannot serve; otherwise as `GenerationMixin.generate`.
        """
        if conditioning_embeds is None:
            if use_engine:
                raise ValueError("use_engine=True needs conditioning_embeds: the engine continues no token ids")
            if attention_mask is not None:
                kwargs["attention_mask"] = attention_mask
            return self._generate(inputs, generation_config, *args, **kwargs)
        if inputs is not None or kwargs.get("input_ids") is not None:
            raise ValueError("conditioning_embeds are continued from the start token: do not give token ids with them")

        from clvp_fast.engine import generation  # imported here, because it needs this module's classes

        batch, prompt, _ = conditioning_embeds.shape
        settings = generation_config if generation_config is not None else self.generation_config
        self._check_length(prompt, settings, kwargs)
        start = torch.full((batch, 1), start_token(self.config), device=conditioning_embeds.device)
        if attention_mask is None:
            attention_mask = start.new_ones((batch, prompt + 1))
        elif attention_mask.shape == (batch, prompt):
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
        elif attention_mask.shape != (batch, prompt + 1):
            raise ValueError(
                f"attention_mask must be [{batch}, {prompt}] or [{batch}, {prompt + 1}] for these conditioning_embeds, "
                f"got {list(attention_mask.shape)}"
            )
        attention_mask = attention_mask.long()
        if use_engine is not False:
            try:
                return self._generate_on_engine(
                    start, generation_config, *args, embeds=conditioning_embeds, attention_mask=attention_mask, **kwargs
                )
            except generation.NotServed as reason:
                if use_engine:
                    raise ValueError(
                        f"use_engine=True, and the engine cannot serve this call: {reason}; leave use_engine out"
                    ) from reason
                generation.LOGGER.debug("generate() runs on transformers' loop: %s", reason)

        if generation.merged_settings(self, generation_config, kwargs)["repetition_penalty"] not in (None, 1):
            # transformers 5.23 skips as many drawn tokens as there is padding in front.
            conditioning_embeds, attention_mask = generation.pad_behind(conditioning_embeds, attention_mask)
        arrange_for_decoding(self)
        decoder = self.model.decoder
        start_embeds = decoder.input_embeds_layer(start) + decoder.position_embeds_layer(torch.zeros_like(start))
        cache_implementation = kwargs.get("cache_implementation") or settings.cache_implementation
        if cache_implementation is None and kwargs.keys().isdisjoint(CACHE_NAMES):
            kwargs[CACHE] = GrowingCache()
        return self._generate(
            start,
            generation_config,
            *args,
            inputs_embeds=torch.cat([conditioning_embeds, start_embeds.to(conditioning_embeds)], dim=1),
            attention_mask=attention_mask,
            num_prompts=batch,
            **kwargs,
        )

    def _generate(self, *args, **kwargs):
        """Call transformers' `generate`."""
        return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] - as above

    def _generate_on_engine(
        self,
        start: torch.Tensor,
        generation_config,
        *args,
        embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        **kwargs,
    ):
        """Call `generate` with the engine in place of the loop; raise `NotServed` if that is impossible."""
        from clvp_fast.engine import generation

        generation.check_call(self, generation_config, args, kwargs)
        generation.check_model(self)
        engine = generation.EngineLoop(generation.split_prompts(embeds, attention_mask))
        return self._generate(
            start,
            generation_config,
            *args,
            # `GenerationMixin` counts the embeddings, and would copy them for each candidate: one channel is enough.
            inputs_embeds=F.pad(embeds[..., :1], (0, 0, 0, 1)),
            attention_mask=attention_mask,
            custom_generate=engine,
            **kwargs,
        )

    def _check_length(self, prompt: int, settings, kwargs: dict) -> None:
        """Refuse to generate past the position table, whose first row is the start token's."""
        limit = most_codes(self.config)
        wanted = kwargs.get("max_new_tokens") or settings.max_new_tokens
        max_length = kwargs.get("max_length") or settings.max_length
        if wanted is None and max_length is not None:
            wanted = (
                max_length - (prompt + 1) - 1
            )  # `GenerationMixin` counts the prompt's embeddings and the start token
        if wanted is not None and wanted > limit:
            raise ValueError(
                f"{wanted} new tokens are more than the positions of this checkpoint allow: "
                f"set max_new_tokens to at most {limit} (max_position_embeddings={self.config.max_position_embeddings})"
            )
