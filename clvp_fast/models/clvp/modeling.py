"""CLVP as a whole: candidates of speech tokens from a text and a voice clip, and their similarity to the text.

The parts are in `conditioning`, `causal_lm`, `decoder`, `encoder` and `layers`; their public names are found here too.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import can_return_tuple

from clvp_fast.models.clvp.causal_lm import ClvpForCausalLM
from clvp_fast.models.clvp.conditioning import ClvpConditioningEncoder
from clvp_fast.models.clvp.configuration import ClvpConfig, ClvpDecoderConfig, ClvpEncoderConfig
from clvp_fast.models.clvp.decoder import ClvpDecoder, ClvpModel
from clvp_fast.models.clvp.encoder import ClvpEncoder
from clvp_fast.models.clvp.outputs import ClvpEncoderOutput, ClvpOutput
from clvp_fast.models.clvp.pretrained import ClvpPreTrainedModel
from clvp_fast.models.clvp.similarity import contrastive_loss, similarity
from clvp_fast.models.clvp.tokens import end_text, fix_ends, known_codes, stop_token, text_end

__all__ = [
    "ClvpConditioningEncoder",
    "ClvpDecoder",
    "ClvpEncoder",
    "ClvpEncoderOutput",
    "ClvpForCausalLM",
    "ClvpModel",
    "ClvpModelForConditionalGeneration",
    "ClvpOutput",
    "ClvpPreTrainedModel",
]


class ClvpModelForConditionalGeneration(ClvpPreTrainedModel, GenerationMixin):
    """The composite: conditioning encoder and decoder propose speech; text and speech encoder score it."""

    config: ClvpConfig

    def __init__(self, config: ClvpConfig):
        super().__init__(config)
        expected = {
            "text_config": ClvpEncoderConfig,
            "speech_config": ClvpEncoderConfig,
            "decoder_config": ClvpDecoderConfig,
        }
        for name, config_class in expected.items():
            if not isinstance(getattr(config, name), config_class):
                raise TypeError(
                    f"config.{name} is expected to be of type `{config_class.__name__}` but is of type "
                    f"{type(getattr(config, name))}."
                )
        self.conditioning_encoder = ClvpConditioningEncoder(config)
        self.speech_decoder_model = ClvpForCausalLM(config.decoder_config)
        self.text_encoder_model = ClvpEncoder(config.text_config)
        self.speech_encoder_model = ClvpEncoder(config.speech_config)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()
        # transformers would use the text's tokens for generation, but speech is generated.
        decoder = config.decoder_config
        self.generation_config.update(
            bos_token_id=decoder.bos_token_id, eos_token_id=decoder.eos_token_id, pad_token_id=decoder.eos_token_id
        )

    def part(self, part_class: type[ClvpPreTrainedModel], config_type: str = "text_config") -> ClvpPreTrainedModel:
        """Return the sub-model of a class; for [`ClvpEncoder`], the side that `config_type` names."""
        decoder = self.speech_decoder_model
        for candidate in (
            self.speech_encoder_model if config_type == "speech_config" else self.text_encoder_model,
            decoder,
            decoder.model,
            decoder.model.decoder,
        ):
            if isinstance(candidate, part_class):
                return candidate
        raise TypeError(f"a composite CLVP checkpoint holds no {part_class.__name__}")

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the text encoder's token embedding."""
        return self.text_encoder_model.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding by `value`."""
        self.text_encoder_model.token_embedding = value

    def fix_speech_decoder_output(self, speech_ids: torch.Tensor) -> torch.Tensor:
        """Turn the decoder's output into codes, as the original does before it scores them.

        The first column (the start token) is dropped. In a row with a stop token, everything from the first one on
        becomes `decoder_fixing_codes[0]`, and the last three positions become the other fixing codes; other rows stay.

        Args:
            speech_ids: `[candidates, 1 + length]`.

        Returns:
            `[candidates, length]`.
        """
        return fix_ends(speech_ids[:, 1:], self.speech_decoder_model.config)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor | None = None,
        text_encoder_inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        **kwargs,
    ) -> ClvpEncoderOutput:
        """Embed texts: `[texts, length]` ids, or `text_encoder_inputs_embeds` `[texts, length, hidden_size]`.

        Returns:
            [`ClvpEncoderOutput`]; its `embeds` `[texts, projection_dim]` are the features.
        """
        return self.text_encoder_model(
            input_ids=input_ids, inputs_embeds=text_encoder_inputs_embeds, attention_mask=attention_mask, **kwargs
        )

    def get_speech_features(
        self,
        speech_ids: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        conditioning_encoder_inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Embed speech tokens, given or generated from a text and a voice clip.

        Args:
            speech_ids: `[batch, length]`; if given, the other inputs are ignored, and `attention_mask` belongs to
                these.
            input_ids: `[batch, length]`, the text; or `conditioning_encoder_inputs_embeds`, its embeddings.
            input_features: `[batch, feature_size, frames]`, the clip.
            attention_mask: `[batch, length]`, 1 = a token, 0 = padding.
            generation_config, kwargs: how speech is generated, as in [`generate`].

        Returns:
            `[batch, projection_dim]`, not normalised.
        """
        if speech_ids is not None:
            return _embeds(self.speech_encoder_model(input_ids=speech_ids, attention_mask=attention_mask))
        if (input_ids is None and conditioning_encoder_inputs_embeds is None) or input_features is None:
            raise ValueError(
                "Either speech_ids or input_ids/conditioning_encoder_inputs_embeds and input_features must be provided."
            )
        with torch.no_grad():
            text = (input_ids, conditioning_encoder_inputs_embeds, attention_mask)
            embeds, mask = self.conditioning_encoder.prompt(input_features, *text, num_ends=1)
            settings, others = self._generation_config(
                generation_config, **{**kwargs, "return_dict_in_generate": False}
            )
            sequences = self.speech_decoder_model.generate(
                conditioning_embeds=embeds, attention_mask=mask, generation_config=settings, **others
            )
            codes = self.fix_speech_decoder_output(sequences)
            return _embeds(self._encode_speech(codes))

    def _encode_speech(self, codes: torch.Tensor, **kwargs) -> ClvpEncoderOutput:
        """Embed generated codes; the filling code replaces one without a row in the encoder (the start token)."""
        return self.speech_encoder_model(input_ids=known_codes(codes, self.config), **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        conditioning_encoder_inputs_embeds: torch.Tensor | None = None,
        text_encoder_inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        **kwargs,
    ) -> ClvpOutput:
        """Compare texts with the likeliest speech tokens at each position of the decoder's prompt.

        This equals transformers' `forward`, number for number. Use [`generate`] to make speech.

        Args:
            input_ids: `[texts, length]`; `conditioning_encoder_inputs_embeds` can replace them for the conditioning
                encoder, and `text_encoder_inputs_embeds` for the text encoder.
            input_features: `[clips, feature_size, frames]`.
            attention_mask: `[texts, length]`, 1 = a token, 0 = padding.
            return_loss: add the contrastive loss; there must be as many texts as clips.

        Returns:
            [`ClvpOutput`], or a tuple with `return_dict=False`.
        """
        conditioning_embeds = self.conditioning_encoder(
            input_features=input_features,
            input_ids=input_ids if conditioning_encoder_inputs_embeds is None else None,
            inputs_embeds=conditioning_encoder_inputs_embeds,
            attention_mask=attention_mask,
        )
        decoder_outputs = self.speech_decoder_model(inputs_embeds=conditioning_embeds, **{"use_cache": False, **kwargs})
        codes = self.fix_speech_decoder_output(decoder_outputs.logits.argmax(2))
        speech_outputs = self._encode_speech(codes, **kwargs)
        text_outputs = self.text_encoder_model(
            input_ids=input_ids if text_encoder_inputs_embeds is None else None,
            inputs_embeds=text_encoder_inputs_embeds,
            attention_mask=attention_mask,
            **kwargs,
        )
        scores = similarity(_embeds(text_outputs), _embeds(speech_outputs), self.logit_scale)
        return ClvpOutput(
            loss=contrastive_loss(scores["logits_per_text"]) if return_loss else None,
            **scores,
            text_model_output=text_outputs.pooler_output,
            speech_model_output=speech_outputs.pooler_output,
            decoder_hidden_states=decoder_outputs.hidden_states,
            text_encoder_hidden_states=text_outputs.hidden_states,
            speech_encoder_hidden_states=speech_outputs.hidden_states,
        )

    def _generation_config(self, given: GenerationConfig | None, **kwargs) -> tuple[GenerationConfig, dict]:
        """Return the settings of a generation, with the decoder's start and stop tokens, and the rest of `kwargs`.

        Checkpoints saved from a configuration alone have the text encoder's tokens there, which mean something else in
        speech.
        """
        settings = copy.deepcopy(self.generation_config if given is None else given)
        text, decoder = self.config.text_config, self.config.decoder_config
        of_text = given is None and (settings.bos_token_id, settings.eos_token_id) == (
            text.bos_token_id,
            text.eos_token_id,
        )
        if settings.eos_token_id is None or of_text:
            settings.bos_token_id = decoder.bos_token_id
            settings.eos_token_id = decoder.eos_token_id
        if settings.pad_token_id is None:
            settings.pad_token_id = decoder.eos_token_id
        return settings, settings.update(**kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        pad_to_max_mel_tokens: int | None = None,
        output_hidden_states: bool | None = None,
        conditioning_encoder_inputs_embeds: torch.Tensor | None = None,
        text_encoder_inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> ClvpOutput | tuple:
        """Generate speech candidates for texts in a voice, and compute their similarity to the texts.

        Args:
            input_ids: `[texts, length]`, from [`ClvpTokenizer`]; or both `..._inputs_embeds` instead.
            input_features: `[clips, feature_size, frames]`, from [`ClvpFeatureExtractor`].
            attention_mask: `[texts, length]`, 1 = a token, 0 = padding, on either side.
            generation_config: settings; `kwargs` with the names of its attributes override them. The default is the
                checkpoint's.
            pad_to_max_mel_tokens: pad the generated sequences, start token included, to this length with stop tokens
                before they are scored, as the original does; longer ones stay as they are.
            output_hidden_states: return hidden states of the decoder and of both encoders.
            kwargs: settings of generation (`max_new_tokens`, `do_sample`, `num_return_sequences`, ...), other arguments
                of `GenerationMixin.generate` (`logits_processor`, `stopping_criteria`, `streamer`, ...), and
                `use_engine` as in [`ClvpForCausalLM.generate`].

        Returns:
            With `return_dict_in_generate=True` a [`ClvpOutput`]; else the tuple `(speech_ids, logits_per_speech,
            logits_per_text, text_embeds, speech_embeds, text pooled, speech pooled)`, and the hidden states if asked
            for.
        """
        tokens = input_ids if input_ids is not None else conditioning_encoder_inputs_embeds
        if tokens is None or input_features is None:
            raise ValueError("generate() needs a text (input_ids) and a voice clip (input_features)")
        settings, others = self._generation_config(generation_config, **kwargs)
        return_dict = settings.return_dict_in_generate
        settings.return_dict_in_generate = True
        if output_hidden_states is None:
            output_hidden_states = settings.output_hidden_states
        settings.output_hidden_states = output_hidden_states

        conditioning_embeds, prompt_mask = self.conditioning_encoder.prompt(
            input_features,
            input_ids if conditioning_encoder_inputs_embeds is None else None,
            conditioning_encoder_inputs_embeds,
            attention_mask,
        )
        generated = self.speech_decoder_model.generate(
            conditioning_embeds=conditioning_embeds,
            attention_mask=prompt_mask,
            generation_config=settings,
            **others,
        )
        sequences = generated.sequences
        if pad_to_max_mel_tokens is not None:
            missing = max(pad_to_max_mel_tokens - sequences.shape[1], 0)
            sequences = F.pad(sequences, (0, missing), value=stop_token(self.speech_decoder_model.config))
        codes = self.fix_speech_decoder_output(sequences)

        speech_outputs = self._encode_speech(codes, output_hidden_states=output_hidden_states)
        text_outputs = self._encode_text_with_end(
            input_ids, text_encoder_inputs_embeds, attention_mask, output_hidden_states=output_hidden_states
        )
        recorded = generated if return_dict else {}
        output = ClvpOutput(
            speech_ids=codes,
            **similarity(_embeds(text_outputs), _embeds(speech_outputs), self.logit_scale),
            text_model_output=text_outputs.pooler_output,
            speech_model_output=speech_outputs.pooler_output,
            decoder_hidden_states=generated.get("hidden_states"),
            text_encoder_hidden_states=text_outputs.hidden_states,
            speech_encoder_hidden_states=speech_outputs.hidden_states,
            sequences=sequences if return_dict else None,
            scores=recorded.get("scores"),
            logits=recorded.get("logits"),
            decoder_attentions=recorded.get("attentions"),
        )
        return output if return_dict else output.to_tuple()

    def _encode_text_with_end(self, input_ids, inputs_embeds, attention_mask, **kwargs) -> ClvpEncoderOutput:
        """Embed texts with one end token, as the original scores them."""
        encoder, end = self.text_encoder_model, text_end(self.config.text_config)
        if inputs_embeds is None:
            tokens, mask = end_text(input_ids, attention_mask, end)
            return encoder(input_ids=tokens, attention_mask=mask, **kwargs)
        end = encoder.token_embedding(torch.tensor(end, device=inputs_embeds.device))
        embeds, mask = end_text(inputs_embeds, attention_mask, end)
        return encoder(inputs_embeds=embeds, attention_mask=mask, **kwargs)


def _embeds(output: ClvpEncoderOutput) -> torch.Tensor:
    """Return the embeddings of an encoder with a projection, which both encoders of the composite have."""
    assert output.embeds is not None
    return output.embeds
