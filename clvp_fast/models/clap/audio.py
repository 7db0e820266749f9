"""The audio tower of CLAP: HTSAT (arXiv:2202.00874), a Swin transformer over a spectrogram folded into an image."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from clvp_fast import ops
from clvp_fast.models.clap.audio_attention import ClapAudioAttention, cut_windows, join_windows
from clvp_fast.models.clap.audio_patches import ClapAudioPatchEmbed, fold_spectrogram
from clvp_fast.models.clap.configuration import ClapAudioConfig
from clvp_fast.models.clap.layers import Dense, Intermediate, feed_forward, feed_forward_activation
from clvp_fast.models.common.layers import add_norm, is_plain_layer_norm
from clvp_fast.models.common.parameters import apply_linear, packed_linears
from clvp_fast.models.common.plain import drop_probability, is_plain
from clvp_fast.ops.merge_norm import merge
from clvp_fast.ops.window_attention import SEAM, seam


class ClapAudioIntermediate(Intermediate):
    """First half of the feed-forward layer."""


class ClapAudioOutput(Dense):
    """Second half of the feed-forward layer."""


class ClapDropPath(nn.Module):
    """In training, drop a block for some clips, and scale it up for the others (arXiv:1603.09382)."""

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    @property
    def drops(self) -> bool:
        """Tell whether calls drop anything now."""
        return self.training and self.drop_prob > 0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Drop whole examples of `hidden_states` at random, and scale the others up."""
        if not self.drops:
            return hidden_states
        kept = 1 - self.drop_prob
        shape = len(hidden_states), *[1] * (hidden_states.ndim - 1)
        draws = torch.rand(shape, dtype=hidden_states.dtype, device=hidden_states.device)
        return hidden_states.div(kept) * torch.floor(draws + kept)

    def extra_repr(self) -> str:
        """Tell the probability, for `repr`."""
        return f"p={self.drop_prob}"


class ClapAudioLayer(nn.Module):
    """Pre-norm layer: window attention, feed-forward."""

    def __init__(self, config: ClapAudioConfig, width: int, num_heads: int, shift: int, drop_path_rate: float):
        super().__init__()
        self.window_size, self.shift_size = config.window_size, shift
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = ClapAudioAttention(config, width, num_heads)
        self.drop_path = ClapDropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)
        inner = int(config.mlp_ratio * width)
        self.intermediate = ClapAudioIntermediate(width, inner, config.hidden_act)
        self.output = ClapAudioOutput(inner, width, config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: bool = False,
        always_partition: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """Map an image `[batch, rows * columns, width]` to the same shape; also return attention weights if asked for.

        An image no larger than a window is not shifted, unless `always_partition`.
        """
        size = (rows, columns) = input_dimensions
        window, shift = self.window_size, self.shift_size
        if not always_partition and min(size) <= window:
            if min(size) < window:
                raise ValueError(
                    f"a stage has {rows} x {columns} patches, fewer than window_size {window}: use fewer stages, a "
                    "smaller window or patch_stride, or always_partition=True"
                )
            shift = 0
        activation = feed_forward_activation(self.intermediate, ClapAudioIntermediate, self.output, ClapAudioOutput)
        if not output_attentions and activation is not None and self._is_in_halves(hidden_states, size):
            return (self._in_halves(hidden_states, size, shift, activation),)
        normed = add_norm(self.layernorm_before, hidden_states)[1]
        attended, weights = self._attend(normed.unflatten(1, size), shift, output_attentions)
        attended = self.drop_path(attended.flatten(1, 2))
        hidden_states, normed = add_norm(self.layernorm_after, attended, hidden_states)
        if activation is None:
            hidden_states = hidden_states + self.output(self.intermediate(normed))
        elif not is_plain(self.output.dropout, nn.Dropout) or drop_probability(self.output.dropout):
            inner = feed_forward(self.intermediate, self.output.dense, normed, activation)
            hidden_states = hidden_states + self.output.dropout(inner)
        else:
            hidden_states = feed_forward(self.intermediate, self.output.dense, normed, activation, hidden_states)
        return (hidden_states, *weights)

    def _attend(self, image: torch.Tensor, shift: int, output_attentions: bool) -> tuple[torch.Tensor, tuple]:
        """Attend within `[batch, rows, columns, width]`; the attention weights come in a tuple, if asked for."""
        (rows, columns), window = image.shape[1:3], self.window_size
        below, right = -rows % window, -columns % window
        if below or right:
            image = F.pad(image, (0, 0, 0, right, 0, below))
        if is_plain(self.attention, ClapAudioAttention) and self.attention.is_plain_inside():
            attended, weights = self.attention.attend(image, shift, output_attentions)
            weights = (weights,) if output_attentions else ()
        else:
            mask = None
            if shift > 0:
                _, height, width, _ = image.shape
                mask = seam(height, width, window, shift, image.device).to(image.dtype) * SEAM
            windows = cut_windows(image, window, shift)
            windows, *weights = self.attention(windows, mask, output_attentions=output_attentions)
            attended = join_windows(windows, image.shape, window, shift)
        return attended[:, :rows, :columns], tuple(weights)

    def _is_in_halves(self, hidden_states: torch.Tensor, size: tuple[int, int]) -> bool:
        """Tell whether `_in_halves` equals the modules and is faster; on a GPU the second norm adds the residual."""
        attention = self.attention
        return (
            hidden_states.device.type == "cpu"
            and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
            and not (size[0] % self.window_size or size[1] % self.window_size)
            and all(is_plain_layer_norm(norm) for norm in (self.layernorm_before, self.layernorm_after))
            and (
                is_plain(self.drop_path, nn.Identity)
                or (is_plain(self.drop_path, ClapDropPath) and not self.drop_path.drops)
            )
            and is_plain(self.output.dropout, nn.Dropout)
            and is_plain(attention, ClapAudioAttention)
            and attention.is_plain_inside()
            and not any(map(drop_probability, (attention.self.dropout, attention.output.dropout, self.output.dropout)))
            and packed_linears(attention.self.projections()) is not None
        )

    def _in_halves(
        self, hidden_states: torch.Tensor, size: tuple[int, int], shift: int, activation: str
    ) -> torch.Tensor:
        """Compute `forward` by the operators of the two halves."""
        norm, attention, dense = self.layernorm_before, self.attention.self, self.attention.output.dense
        packed = packed_linears(attention.projections())
        assert packed is not None  # `_is_in_halves` has checked it
        weights = norm.weight, norm.bias, *packed, attention.bias(), dense.weight, dense.bias
        image, window = hidden_states.unflatten(1, size), self.window_size
        hidden_states = ops.window_block(image, *weights, window=window, shift=shift, eps=norm.eps).flatten(1, 2)
        norm, first, last = self.layernorm_after, self.intermediate.dense, self.output.dense
        weights = norm.weight, norm.bias, first.weight, first.bias, last.weight, last.bias
        return ops.mlp_block(hidden_states, *weights, activation=activation, eps=norm.eps)


class ClapAudioPatchMerging(nn.Module):
    """Merge four neighbours into one position of twice the width, which leaves a quarter of the positions."""

    def __init__(self, width: int):
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, input_feature: torch.Tensor, input_dimensions: tuple[int, int]) -> torch.Tensor:
        """Map `[batch, rows * columns, width]` to `[batch, ceil(rows / 2) * ceil(columns / 2), 2 * width]`."""
        image, norm = input_feature.unflatten(1, input_dimensions), self.norm
        if is_plain_layer_norm(norm):
            merged = ops.merge_norm(image, weight=norm.weight, bias=norm.bias, eps=norm.eps).flatten(1, 2)
        else:
            merged = norm(merge(image).flatten(1, 2))
        return apply_linear(self.reduction, merged)


class ClapAudioStage(nn.Module):
    """Layers of one width, every second one shifted, and patch merging after all stages but the last."""

    def __init__(self, config: ClapAudioConfig, stage: int, drop_path_rates: list[float]):
        super().__init__()
        width = config.patch_embeds_hidden_size * 2**stage
        self.blocks = nn.ModuleList(
            [
                ClapAudioLayer(
                    config, width, config.num_attention_heads[stage], (i % 2) * (config.window_size // 2), rate
                )
                for i, rate in enumerate(drop_path_rates)
            ]
        )
        self.downsample = ClapAudioPatchMerging(width) if stage < len(config.depths) - 1 else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: bool = False,
        always_partition: bool = False,
    ) -> tuple:
        """Map `[batch, rows * columns, width]` to the next stage's input; return it, the unmerged image and both sizes.

        The sizes are (rows, columns, rows, columns); the last layer's attention weights follow if asked for.
        """
        (rows, columns), weights = input_dimensions, ()
        for block in self.blocks:
            hidden_states, *weights = block(hidden_states, input_dimensions, output_attentions, always_partition)
        merged = hidden_states
        if self.downsample is not None:
            merged = self.downsample(hidden_states, input_dimensions)
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        return merged, hidden_states, (*input_dimensions, rows, columns), *weights


class ClapAudioEncoder(nn.Module):
    """Encode each spectrogram as one vector; see [`ClapAudioModel`]."""

    def __init__(self, config: ClapAudioConfig):
        super().__init__()
        self.config = config
        self.patch_embed = ClapAudioPatchEmbed(config)
        self.grid_size = self.patch_embed.grid_size  # also where another module replaces `patch_embed`
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            self.layers.append(ClapAudioStage(config, stage, rates[:depth]))
            rates = rates[depth:]
        self.batch_norm = nn.BatchNorm2d(config.num_mel_bins)
        self.norm = nn.LayerNorm(config.patch_embeds_hidden_size * 2 ** (len(config.depths) - 1))
        self.avgpool = nn.AdaptiveAvgPool1d(1)

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor,
        is_longer: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_hidden_states_before_downsampling: bool = False,
        always_partition: bool = False,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode spectrograms; see [`ClapAudioModel.forward`]."""
        output_attentions = output_attentions or self.config.output_attentions
        output_hidden_states = output_hidden_states or self.config.output_hidden_states
        hidden_states = self._embed(input_features, is_longer)

        def as_image(tokens):
            return tokens.transpose(1, 2).unflatten(2, size)

        size = self.grid_size
        images, attentions = [as_image(hidden_states)] if output_hidden_states else [], []
        for stage in self.layers:
            hidden_states, whole, sizes, *weights = stage(hidden_states, size, output_attentions, always_partition)
            if output_hidden_states and output_hidden_states_before_downsampling:
                images.append(as_image(whole))
            size = sizes[2:]
            if output_hidden_states and not output_hidden_states_before_downsampling:
                images.append(as_image(hidden_states))
            attentions += weights
        normed = add_norm(self.norm, hidden_states)[1]
        last_hidden_state = self._unfold(as_image(normed))
        if is_plain(self.avgpool, nn.AdaptiveAvgPool1d):
            pooled = normed.mean(1)
        else:
            pooled = self.avgpool(last_hidden_state.flatten(2)).flatten(1)
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=pooled,
            hidden_states=tuple(images) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _embed(self, input_features: torch.Tensor, is_longer: torch.Tensor | None) -> torch.Tensor:
        """Embed `[batch, channels, frames, mels]` as `[batch, patches, patch_embeds_hidden_size]`."""
        longer = self._check(input_features, is_longer)
        fold = self.config.spec_size, self.config.num_mel_bins
        # The norm is over mel channels.
        if is_plain(self.batch_norm, nn.BatchNorm2d):
            # This view is the layout that torch reads without a copy.
            normed = self.batch_norm(input_features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            normed = self.batch_norm(input_features.transpose(1, 3)).transpose(1, 3)
        if longer is None or not is_plain(self.patch_embed, ClapAudioPatchEmbed):
            return self.patch_embed(fold_spectrogram(normed, *fold), longer)
        crops = fold_spectrogram(normed[longer, 1:], *fold) if len(longer) else None
        return self.patch_embed.embed(fold_spectrogram(normed[:, :1], *fold), crops, longer)

    def _check(self, input_features: torch.Tensor, is_longer: torch.Tensor | None) -> torch.Tensor | None:
        """Check the input, and return which clips are longer than the model's input, `[clips]` int64.

        It returns None without fusion, because the length then makes no difference.
        """
        fusion, mels = self.config.enable_fusion, self.config.num_mel_bins
        channels = 4 if fusion else self.config.patch_embed_input_channels
        shape = list(input_features.shape)
        if len(shape) != 4 or shape[1] != channels or shape[3] != mels:
            mode = "fusion" if fusion else "rand_trunc"
            raise ValueError(
                f"input_features must be [batch, {channels}, frames, {mels}], got {shape}: use a ClapFeatureExtractor "
                f"with truncation={mode!r} and feature_size={mels} for this model"
            )
        if not fusion:
            return None
        if is_longer is None:
            raise ValueError("is_longer is missing: a model with enable_fusion needs it, as the extractor returns it")
        is_longer = torch.as_tensor(is_longer, device=input_features.device)
        if is_longer.numel() != shape[0]:
            raise ValueError(f"is_longer must be [{shape[0]}, 1], one value a clip, got {list(is_longer.shape)}")
        return (is_longer.reshape(-1) == 1).nonzero()[:, 0]

    def _unfold(self, image: torch.Tensor) -> torch.Tensor:
        """Put the strips of `[batch, width, rows, columns]` side by side: `[batch, width, frequencies, times]`."""
        strips = image.shape[2] // (image.shape[2] // (self.config.spec_size // self.config.num_mel_bins))
        return image.unflatten(2, (strips, -1)).transpose(2, 3).flatten(3)
