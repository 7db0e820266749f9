"""CLVP's scorer: `CLVPModel`, and its text side and speech side alone, with and without the projection.

These classes (CLVP in capitals, as in CLVP's first API) hold [`ClvpEncoder`]s under the names of a full CLVP checkpoint
and compute the same. Each class reads its part of any checkpoint that has it, including the full CLVP's, and writes
only that part.
"""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from clvp_fast.models.clvp.encoder import ClvpEncoder
from clvp_fast.models.clvp.outputs import ClvpEncoderOutput
from clvp_fast.models.clvp.pretrained import ClvpPreTrainedModel
from clvp_fast.models.clvp.similarity import contrastive_loss, similarity
from clvp_fast.models.clvp_scorer.configuration import CLVPConfig, CLVPSpeechConfig, CLVPTextConfig
from clvp_fast.models.clvp_scorer.outputs import CLVPOutput, CLVPSpeechModelOutput, CLVPTextModelOutput

__all__ = [
    "CLVPModel",
    "CLVPOutput",
    "CLVPPreTrainedModel",
    "CLVPSpeechModel",
    "CLVPSpeechModelOutput",
    "CLVPSpeechModelWithProjection",
    "CLVPTextModel",
    "CLVPTextModelOutput",
    "CLVPTextModelWithProjection",
]

_DECODER = r"^(conditioning_encoder|speech_decoder_model)\."
# The tensors of a checkpoint of both sides that one side omits.
_NOT_TEXT = [_DECODER, r"^speech_encoder_model\.", r"^logit_scale$"]
_NOT_SPEECH = [_DECODER, r"^text_encoder_model\.", r"^logit_scale$"]


def _checked(token_ids: torch.Tensor | None, name: str, vocab_size: int) -> torch.Tensor:
    """Return `token_ids`, if they are whole numbers `[batch, length]` and, on a CPU, below `vocab_size`."""
    if token_ids is None:
        raise ValueError(f"{name} is missing: give token ids [batch, length]")
    shape = list(token_ids.shape)
    if token_ids.dtype not in (torch.int64, torch.int32) or len(shape) != 2 or not shape[1]:
        raise ValueError(f"{name} must be token ids [batch, length], int64 or int32, got {token_ids.dtype} {shape}")
    if token_ids.device.type == "cpu" and token_ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(end) for end in token_ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name} must lie from 0 to {vocab_size - 1}, got {low} to {high}")
    return token_ids


def _pooled(output: ClvpEncoderOutput) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(
        last_hidden_state=output.last_hidden_state,
        pooler_output=output.pooler_output,
        hidden_states=output.hidden_states,
        attentions=output.attentions,
    )


def _embeds(output: ClvpEncoderOutput) -> torch.Tensor:
    assert output.embeds is not None  # both encoders of `CLVPModel` project
    return output.embeds


class CLVPPreTrainedModel(ClvpPreTrainedModel):
    """Weights initialisation, and loading and saving of checkpoints, for the scorer's classes."""

    config: CLVPConfig
    config_class = CLVPConfig
    base_model_prefix = "clvp"

    def __init__(self, config, *args, **kwargs):
        assert self.config_class is not None  # each class of this file has one
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, not a {type(config).__name__}: "
                "CLVP... are the classes of the scorer, Clvp... those of the full model and of its decoder"
            )
        super().__init__(config, *args, **kwargs)

    def _vocab_size(self, name: str) -> int:
        """Return the number of rows of the encoder of the ids called `name`."""
        side = "text_config" if name == "input_ids" else "speech_config"
        return getattr(self.config, side, self.config).vocab_size

    def _encode(
        self,
        encoder: ClvpEncoder,
        name: str,
        token_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
    ) -> ClvpEncoderOutput:
        return encoder(
            input_ids=_checked(token_ids, name, self._vocab_size(name)),
            attention_mask=attention_mask,
            output_attentions=self.option("output_attentions", output_attentions),
            output_hidden_states=self.option("output_hidden_states", output_hidden_states),
            return_dict=True,
        )


class _TextSide(CLVPPreTrainedModel):
    config: CLVPTextConfig
    config_class = CLVPTextConfig
    # The encoder has this name in a full checkpoint; transformers adds it to the keys of a lone ClvpEncoder.
    base_model_prefix = "text_encoder_model"
    _keys_to_ignore_on_load_unexpected = _NOT_TEXT
    with_projection: bool

    def __init__(self, config: CLVPTextConfig):
        super().__init__(config)
        self.text_encoder_model = ClvpEncoder(config, with_projection=self.with_projection)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding."""
        return self.text_encoder_model.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding by `value`."""
        self.text_encoder_model.token_embedding = value


class CLVPTextModel(_TextSide):
    """The text encoder without its projection.

    `from_pretrained` takes a checkpoint of its own, of [`CLVPTextModelWithProjection`], of [`CLVPModel`], of a full
    CLVP, or of a [`ClvpEncoder`].
    """

    with_projection = False
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        *_NOT_TEXT,
        r"^(text_encoder_model\.)?projection\.",
    ]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encode texts `[texts, length]`.

        Args:
            attention_mask: `[texts, length]`, 1 or True = a token, 0 = padding.

        Returns:
            `last_hidden_state` `[texts, length, hidden_size]` and `pooler_output` `[texts, hidden_size]`; a tuple with
            `return_dict=False`.
        """
        asked = (output_attentions, output_hidden_states)
        return _pooled(self._encode(self.text_encoder_model, "input_ids", input_ids, attention_mask, *asked))


class CLVPTextModelWithProjection(_TextSide):
    """The text encoder with its projection into the space that texts and speech share.

    `from_pretrained` takes a checkpoint of its own, of [`CLVPModel`], of a full CLVP, or of a [`ClvpEncoder`].
    """

    with_projection = True

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CLVPTextModelOutput:
        """Embed texts `[texts, length]`; arguments as those of [`CLVPTextModel`].

        Returns:
            [`CLVPTextModelOutput`] with `text_embeds` `[texts, projection_dim]`; a tuple with `return_dict=False`.
        """
        asked = (output_attentions, output_hidden_states)
        output = self._encode(self.text_encoder_model, "input_ids", input_ids, attention_mask, *asked)
        return CLVPTextModelOutput(
            text_embeds=output.embeds,
            last_hidden_state=output.last_hidden_state,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class _SpeechSide(CLVPPreTrainedModel):
    config: CLVPSpeechConfig
    config_class = CLVPSpeechConfig
    base_model_prefix = "speech_encoder_model"
    main_input_name = "speech_ids"
    _keys_to_ignore_on_load_unexpected = _NOT_SPEECH
    with_projection: bool

    def __init__(self, config: CLVPSpeechConfig):
        super().__init__(config)
        self.speech_encoder_model = ClvpEncoder(config, with_projection=self.with_projection)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding."""
        return self.speech_encoder_model.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding by `value`."""
        self.speech_encoder_model.token_embedding = value


class CLVPSpeechModel(_SpeechSide):
    """The encoder of speech tokens without its projection.

    `from_pretrained` takes a checkpoint of its own, of [`CLVPSpeechModelWithProjection`], of [`CLVPModel`], of a full
    CLVP, or of a [`ClvpEncoder`].
    """

    with_projection = False
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        *_NOT_SPEECH,
        r"^(speech_encoder_model\.)?projection\.",
    ]

    @can_return_tuple
    def forward(
        self,
        speech_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encode speech tokens `[clips, length]`.

        Args:
            attention_mask: `[clips, length]`, 1 or True = a token, 0 = padding.

        Returns:
            `last_hidden_state` `[clips, length, hidden_size]` and `pooler_output` `[clips, hidden_size]`; a tuple with
            `return_dict=False`.
        """
        asked = (output_attentions, output_hidden_states)
        return _pooled(self._encode(self.speech_encoder_model, "speech_ids", speech_ids, attention_mask, *asked))


class CLVPSpeechModelWithProjection(_SpeechSide):
    """The encoder of speech tokens with its projection into the space that texts and speech share.

    `from_pretrained` takes a checkpoint of its own, of [`CLVPModel`], of a full CLVP, or of a [`ClvpEncoder`].
    """

    with_projection = True

    @can_return_tuple
    def forward(
        self,
        speech_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CLVPSpeechModelOutput:
        """Embed speech tokens `[clips, length]`; arguments as those of [`CLVPSpeechModel`].

        Returns:
            [`CLVPSpeechModelOutput`] with `speech_embeds` `[clips, projection_dim]`; a tuple with `return_dict=False`.
        """
        asked = (output_attentions, output_hidden_states)
        output = self._encode(self.speech_encoder_model, "speech_ids", speech_ids, attention_mask, *asked)
        return CLVPSpeechModelOutput(
            speech_embeds=output.embeds,
            last_hidden_state=output.last_hidden_state,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class CLVPModel(CLVPPreTrainedModel):
    """The scorer, which tells how well speech tokens say a text. It has no decoder and generates nothing.

    Its name differs only by case from [`ClvpModel`], the bare decoder. The full CLVP, which proposes candidates and
    scores them, is [`ClvpModelForConditionalGeneration`].

    `from_pretrained` takes a checkpoint of its own or of a full CLVP, whose decoder is not loaded;
    [`convert_tortoise_scorer`] reads Tortoise's `clvp2.pth`.

    Ids are encoded as they are given. Trained checkpoints expect texts that end with token 0
    (`text_config.eos_token_id`), and codes without start and stop tokens, as `fix_speech_decoder_output` of the full
    CLVP returns them.
    """

    _keys_to_ignore_on_load_unexpected = [_DECODER]  # noqa: RUF012

    def __init__(self, config: CLVPConfig):
        super().__init__(config)
        self.text_encoder_model = ClvpEncoder(config.text_config)
        self.speech_encoder_model = ClvpEncoder(config.speech_config)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the text encoder's token embedding."""
        return self.text_encoder_model.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding by `value`."""
        self.text_encoder_model.token_embedding = value

    def get_text_features(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed texts `[texts, length]`: `[texts, projection_dim]`, not normalised. Arguments as those of `forward`."""
        return _embeds(self._encode(self.text_encoder_model, "input_ids", input_ids, attention_mask, False, False))

    def get_speech_features(
        self,
        speech_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed speech tokens `[clips, length]`: `[clips, projection_dim]`, not normalised."""
        return _embeds(self._encode(self.speech_encoder_model, "speech_ids", speech_ids, attention_mask, False, False))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        speech_ids: torch.LongTensor | None = None,
        text_attention_mask: torch.Tensor | None = None,
        speech_attention_mask: torch.Tensor | None = None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CLVPOutput:
        """Compare every text with every clip of speech tokens.

        Args:
            input_ids: `[texts, length]`, from [`ClvpTokenizer`].
            speech_ids: `[clips, length]`, speech tokens.
            text_attention_mask, speech_attention_mask: of the shape of the ids, 1 or True = a token, 0 = padding.
            return_loss: add the contrastive loss of matching the i-th text with the i-th clip; there must be as many
                texts as clips.
            output_attentions, output_hidden_states: return those of both encoders, in `text_model_output` and
                `speech_model_output`.

        Returns:
            [`CLVPOutput`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: ids that are missing, of another shape or type, or (on a CPU) without a row in the embedding.
        """
        asked = (output_attentions, output_hidden_states)
        text = self._encode(self.text_encoder_model, "input_ids", input_ids, text_attention_mask, *asked)
        speech = self._encode(self.speech_encoder_model, "speech_ids", speech_ids, speech_attention_mask, *asked)
        scores = similarity(_embeds(text), _embeds(speech), self.logit_scale)
        return CLVPOutput(
            loss=contrastive_loss(scores["logits_per_text"]) if return_loss else None,
            **scores,
            text_model_output=_pooled(text),
            speech_model_output=_pooled(speech),
        )
