"""The CLAP models: text tower, audio tower, each with its projection, and both together."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from clvp_fast.models.clap.audio import ClapAudioEncoder
from clvp_fast.models.clap.configuration import ClapAudioConfig, ClapConfig, ClapTextConfig
from clvp_fast.models.clap.layers import ClapProjectionLayer
from clvp_fast.models.clap.outputs import ClapAudioModelOutput, ClapOutput, ClapTextModelOutput
from clvp_fast.models.clap.pretrained import ClapPreTrainedModel
from clvp_fast.models.clap.text import ClapTextEmbeddings, ClapTextEncoder, ClapTextPooler
from clvp_fast.models.common.masks import boolean_mask


class ClapTextModel(ClapPreTrainedModel):
    """RoBERTa encoder of texts, with a pooler of the first token unless `add_pooling_layer=False`."""

    config: ClapTextConfig
    config_class = ClapTextConfig
    input_modalities = ("text",)

    def __init__(self, config: ClapTextConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = ClapTextEmbeddings(config)
        self.encoder = ClapTextEncoder(config)
        self.pooler = ClapTextPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding by `value`."""
        self.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode token ids `[batch, length]`, or their embeddings `[batch, length, hidden_size]`.

        Args:
            attention_mask: `[batch, length]`, 1 or True = a token, 0 = padding; None: all are tokens.
            token_type_ids: `[batch or 1, length]`; 0 by default.
            position_ids: `[batch or 1, length]`; by default counted from `pad_token_id + 1`, without padding.

        Returns:
            `last_hidden_state` `[batch, length, hidden_size]`, `pooler_output` `[batch, hidden_size]`, and if asked for
            `hidden_states` (input of the first layer, output of each) and `attentions` of each layer; or a tuple with
            `return_dict=False`.

        Raises:
            ValueError: both ids and embeddings, or neither; a mask of another shape; more tokens than positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if input_ids is not None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        hidden_states = self.embeddings(
            input_ids=input_ids, position_ids=position_ids, token_type_ids=token_type_ids, inputs_embeds=inputs_embeds
        )
        mask = boolean_mask(attention_mask, hidden_states.shape[1], " as the text")
        attentions = [] if self.option("output_attentions", output_attentions) else None
        layer_inputs = [] if self.option("output_hidden_states", output_hidden_states) else None
        # Arguments that transformers' modules do not take are passed only if they are needed.
        asked = {"attentions": attentions, "layer_inputs": layer_inputs}
        asked = {name: found for name, found in asked.items() if found is not None}
        encoded = self.encoder(hidden_states, attention_mask=mask, **asked)[0]
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded,
            pooler_output=None if self.pooler is None else self.pooler(encoded),
            hidden_states=None if layer_inputs is None else (*layer_inputs, encoded),
            attentions=None if attentions is None else tuple(attentions),
        )


class ClapAudioModel(ClapPreTrainedModel):
    """HTSAT encoder of log-mel spectrograms."""

    config: ClapAudioConfig
    config_class = ClapAudioConfig
    main_input_name = "input_features"
    input_modalities = "audio"

    def __init__(self, config: ClapAudioConfig):
        super().__init__(config)
        self.audio_encoder = ClapAudioEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the convolution that embeds patches."""
        return self.audio_encoder.patch_embed.proj

    def forward(
        self, input_features: torch.Tensor | None = None, is_longer: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Encode the features of a `ClapFeatureExtractor`.

        Args:
            input_features: `[batch, 1, frames, num_mel_bins]`, or `[batch, 4, ...]` with `enable_fusion`: the whole
                clip and three crops.
            is_longer: `[batch, 1]`, bool: the clips whose crops are fused in; needed only with `enable_fusion`.
            output_attentions, output_hidden_states, return_dict: as in transformers.
            output_hidden_states_before_downsampling: hidden states are those of a stage's last layer, not the next
                stage's input.
            always_partition: shift windows even if the image is no larger than one.

        Returns:
            `last_hidden_state` `[batch, width, frequencies, times]`, `pooler_output` `[batch, width]`, and if asked for
            `hidden_states` of patches and stages `[batch, channels, rows, columns]` and `attentions` of each stage's
            last layer `[batch * windows, heads, positions, positions]`; or a tuple with `return_dict=False`.

        Raises:
            ValueError: features of another shape than this model's, or too many frames; `is_longer` missing.
        """
        if input_features is None:
            raise ValueError("You must specify input_features")
        return self.audio_encoder(input_features=input_features, is_longer=is_longer, **kwargs)


class ClapModel(ClapPreTrainedModel):
    """Both towers, their projections, and the scaled cosine similarity of texts and clips."""

    config: ClapConfig

    def __init__(self, config: ClapConfig):
        super().__init__(config)
        for name, config_class in type(config).sub_configs.items():
            if type(getattr(config, name)).model_type != config_class.model_type:
                raise TypeError(f"{name} must be a {config_class.__name__}, not {type(getattr(config, name)).__name__}")
        scale = math.log(config.logit_scale_init_value)
        self.logit_scale_a = nn.Parameter(torch.tensor(scale))
        self.logit_scale_t = nn.Parameter(torch.tensor(scale))
        self.projection_dim = config.projection_dim
        self.text_model = ClapTextModel(config.text_config)
        self.text_projection = ClapProjectionLayer(config.text_config)
        self.audio_model = ClapAudioModel(config.audio_config)
        self.audio_projection = ClapProjectionLayer(config.audio_config)
        self.post_init()

    def part(self, part_class: type[ClapPreTrainedModel]) -> ClapPreTrainedModel:
        """Return the sub-model of a class: a tower, or a tower with its projection, over the same parameters."""
        for tower in (self.text_model, self.audio_model):
            if isinstance(tower, part_class):
                return tower
        for config, made_of in (
            (self.config.text_config, {"text_model": self.text_model, "text_projection": self.text_projection}),
            (self.config.audio_config, {"audio_model": self.audio_model, "audio_projection": self.audio_projection}),
        ):
            if part_class.config_class is type(config):
                with torch.device("meta"):
                    whole = part_class(config)
                for name, module in made_of.items():
                    setattr(whole, name, module)
                return whole.train(self.training)
        raise TypeError(f"a composite CLAP checkpoint holds no {part_class.__name__}")

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Return the text tower's output; its `pooler_output` is the normalised embedding `[batch, projection_dim]`."""
        outputs = self._text(input_ids, attention_mask, position_ids, **kwargs)
        outputs.pooler_output = F.normalize(self.text_projection(outputs.pooler_output), dim=-1)
        return outputs

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: torch.Tensor | None = None,
        is_longer: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Return the audio tower's output; its `pooler_output` is the normalised embedding `[batch, projection_dim]`.

        `attention_mask` has no effect, because the extractor's features have one length.
        """
        outputs = self._audio(input_features, is_longer, **kwargs)
        outputs.pooler_output = F.normalize(self.audio_projection(outputs.pooler_output), dim=-1)
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        is_longer: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        **kwargs,
    ) -> ClapOutput:
        """Compare every text with every clip.

        Args:
            input_ids, attention_mask, position_ids: of the texts, as [`ClapTextModel`] takes them.
            input_features, is_longer: of the clips, as [`ClapAudioModel`] takes them.
            return_loss: add the contrastive loss; there must be as many texts as clips, and the i-th of each belong
                together.

        Returns:
            [`ClapOutput`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: an input that a tower refuses; a loss for unequal numbers of texts and clips.
        """
        audio_outputs = self._audio(input_features, is_longer, **kwargs)
        text_outputs = self._text(input_ids, attention_mask, position_ids, **kwargs)
        audio_embeds = self.audio_projection(audio_outputs.pooler_output)
        text_embeds = self.text_projection(text_outputs.pooler_output)
        audio_embeds = audio_embeds / audio_embeds.norm(p=2, dim=-1, keepdim=True)
        text_embeds = text_embeds / text_embeds.norm(p=2, dim=-1, keepdim=True)
        logits_per_text = text_embeds @ audio_embeds.t() * self.logit_scale_t.exp()
        logits_per_audio = audio_embeds @ text_embeds.t() * self.logit_scale_a.exp()
        return ClapOutput(
            loss=_contrastive_loss(logits_per_text, logits_per_audio) if return_loss else None,
            logits_per_audio=logits_per_audio,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            audio_embeds=audio_embeds,
            text_model_output=text_outputs,
            audio_model_output=audio_outputs,
        )

    def _text(self, input_ids, attention_mask, position_ids, **kwargs) -> BaseModelOutputWithPooling:
        kwargs["return_dict"] = True
        return self.text_model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    def _audio(self, input_features, is_longer, **kwargs) -> BaseModelOutputWithPooling:
        kwargs["return_dict"] = True
        return self.audio_model(input_features=input_features, is_longer=is_longer, **kwargs)


def _contrastive_loss(logits_per_text: torch.Tensor, logits_per_audio: torch.Tensor) -> torch.Tensor:
    """Return the mean of both sides' losses as transformers computes them: both over the rows of texts."""
    texts, clips = logits_per_text.shape
    if texts != clips:
        raise ValueError(f"return_loss needs a clip for each text, and there are {texts} texts and {clips} clips")
    labels = torch.arange(texts, device=logits_per_text.device)
    return (F.cross_entropy(logits_per_text, labels) + F.cross_entropy(logits_per_audio.t(), labels)) / 2


class ClapTextModelWithProjection(ClapPreTrainedModel):
    """[`ClapTextModel`] and the projection of its pooled output to the shared space."""

    config: ClapTextConfig
    config_class = ClapTextConfig
    input_modalities = ("text",)

    def __init__(self, config: ClapTextConfig):
        super().__init__(config)
        self.text_model = ClapTextModel(config)
        self.text_projection = ClapProjectionLayer(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding."""
        return self.text_model.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding by `value`."""
        self.text_model.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> ClapTextModelOutput:
        """Embed texts; arguments as for [`ClapTextModel`]. Returns [`ClapTextModelOutput`], or a tuple."""
        kwargs["return_dict"] = True
        outputs = self.text_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
        return ClapTextModelOutput(
            text_embeds=self.text_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ClapAudioModelWithProjection(ClapPreTrainedModel):
    """[`ClapAudioModel`] and the projection of its pooled output to the shared space."""

    config: ClapAudioConfig
    config_class = ClapAudioConfig
    main_input_name = "input_features"
    input_modalities = "audio"

    def __init__(self, config: ClapAudioConfig):
        super().__init__(config)
        self.audio_model = ClapAudioModel(config)
        self.audio_projection = ClapProjectionLayer(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the convolution that embeds patches."""
        return self.audio_model.get_input_embeddings()

    @can_return_tuple
    def forward(
        self, input_features: torch.Tensor | None = None, is_longer: torch.Tensor | None = None, **kwargs
    ) -> ClapAudioModelOutput:
        """Embed clips; arguments as for [`ClapAudioModel`]. Returns [`ClapAudioModelOutput`], or a tuple."""
        kwargs["return_dict"] = True
        outputs = self.audio_model(input_features=input_features, is_longer=is_longer, **kwargs)
        return ClapAudioModelOutput(
            audio_embeds=self.audio_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
