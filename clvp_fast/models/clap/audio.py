"""The audio tower of CLAP: HTSAT (arXiv:2202.00874), a Swin transformer over a spectrogram folded into an image."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from clvp_fast import ops
from clvp_fast.models.clap.audio_patches import ClapAudioPatchEmbed, fold_spectrogram
from clvp_fast.models.clap.configuration import ClapAudioConfig
from clvp_fast.models.clap.layers import ClapIntermediate, feed_forward, is_plain_feed_forward
from clvp_fast.models.clvp.layers import add_layer_norm
from clvp_fast.models.clvp.parameters import apply_linear, can_pack, is_plain, pack_linears, project_heads


class ClapAudioSelfAttention(nn.Module):
    """Attention within windows, with a bias for each distance of two places."""

    def __init__(self, config: ClapAudioConfig, width: int, num_heads: int):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"a stage's width must be a multiple of its heads, got {width} and {num_heads}")
        self.num_heads = num_heads
        self.window_size = config.window_size
        distances = (2 * self.window_size - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(distances, num_heads))
        for name, value in self.initial_buffers().items():
            self.register_buffer(name, value)
        self.query = nn.Linear(width, width, bias=config.qkv_bias)
        self.key = nn.Linear(width, width, bias=config.qkv_bias)
        self.value = nn.Linear(width, width, bias=config.qkv_bias)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def initial_buffers(self) -> dict[str, torch.Tensor]:
        """Part of the checkpoints: rows of the bias table, by two places of a window, `[places, places]`."""
        place = torch.arange(self.window_size**2)
        rows, columns = (x[:, None] - x for x in (place // self.window_size, place % self.window_size))
        side = 2 * self.window_size - 1
        return {"relative_position_index": (rows + self.window_size - 1) * side + columns + self.window_size - 1}

    def projections(self) -> list[nn.Module]:
        """Of one input: queries, keys and values."""
        return [self.query, self.key, self.value]

    def bias(self) -> torch.Tensor:
        """Of the scores, `[heads, places, places]`: by the distance of two places of a window."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)

    def forward(
        self, image: torch.Tensor, shift: int = 0, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[batch, rows, columns, width]` → the same, and the attention weights of each window if asked for."""
        query, key, value = project_heads(self.projections(), image, self.num_heads)
        bias = self.bias()
        dropout_p = self.dropout.p if self.training else 0.0
        options = dict(window=self.window_size, shift=shift, dropout_p=dropout_p)
        if output_attentions:
            attended, weights = ops.window_attention_weights(query, key, value, bias, **options)
        else:
            attended, weights = ops.window_attention(query, key, value, bias, **options), None
        return attended.flatten(-2), weights


class ClapAudioDense(nn.Module):
    """The end of a block: a linear layer, and dropout."""

    def __init__(self, inner: int, width: int, dropout: float):
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(apply_linear(self.dense, hidden_states))


class ClapAudioAttention(nn.Module):
    """Window attention and the projection of its output."""

    def __init__(self, config: ClapAudioConfig, width: int, num_heads: int):
        super().__init__()
        self.self = ClapAudioSelfAttention(config, width, num_heads)
        self.output = ClapAudioDense(width, width, config.attention_probs_dropout_prob)

    def forward(
        self, image: torch.Tensor, shift: int = 0, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[batch, rows, columns, width]` → the same, and the attention weights if asked for."""
        attended, weights = self.self(image, shift, output_attentions)
        return self.output(attended), weights


class ClapAudioLayer(nn.Module):
    """Pre-norm layer: window attention, feed-forward."""

    def __init__(self, config: ClapAudioConfig, width: int, num_heads: int, shift: int, drop_path_rate: float):
        super().__init__()
        self.window_size, self.shift_size, self.drop_path_rate = config.window_size, shift, drop_path_rate
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = ClapAudioAttention(config, width, num_heads)
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)
        inner = int(config.mlp_ratio * width)
        self.intermediate = ClapIntermediate(width, inner, config.hidden_act)
        self.output = ClapAudioDense(inner, width, config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        size: tuple[int, int],
        output_attentions: bool = False,
        always_partition: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[batch, rows * columns, width]` of an image of `size` → the same, and the attention weights if asked for.

        An image no larger than a window is not shifted, unless `always_partition`.
        """
        (rows, columns), window, shift = size, self.window_size, self.shift_size
        if not always_partition and min(size) <= window:
            if min(size) < window:
                raise ValueError(
                    f"a stage has {rows} x {columns} patches, fewer than window_size {window}: use fewer stages, a "
                    "smaller window or patch_stride, or always_partition=True"
                )
            shift = 0
        if not output_attentions and self._is_in_halves(hidden_states, size):
            return self._in_halves(hidden_states, size, shift), None
        image = add_layer_norm(self.layernorm_before, hidden_states)[1].unflatten(1, size)
        below, right = -rows % window, -columns % window
        if below or right:
            image = F.pad(image, (0, 0, 0, right, 0, below))
        attended, weights = self.attention(image, shift, output_attentions)
        if below or right:
            attended = attended[:, :rows, :columns]
        attended = self._drop_path(attended.flatten(1, 2))
        hidden_states, normed = add_layer_norm(self.layernorm_after, attended, hidden_states)
        if self.training and self.output.dropout.p > 0:
            inner = feed_forward(self.intermediate, self.output.dense, normed)
            return hidden_states + self.output.dropout(inner), weights
        return feed_forward(self.intermediate, self.output.dense, normed, hidden_states), weights

    def _is_in_halves(self, hidden_states: torch.Tensor, size: tuple[int, int]) -> bool:
        """Whether `_in_halves` computes what the modules do, and sooner: on a GPU the second norm adds the residual."""
        attention = self.attention
        return (
            hidden_states.device.type == "cpu"
            and not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
            and not (size[0] % self.window_size or size[1] % self.window_size)
            and is_plain(attention, ClapAudioAttention)
            and is_plain(attention.self, ClapAudioSelfAttention)
            and can_pack(attention.self.projections())
            and is_plain(attention.output, ClapAudioDense)
            and is_plain(attention.output.dense, nn.Linear)
            and is_plain(self.output, ClapAudioDense)
            and is_plain_feed_forward(self.intermediate, self.output.dense)
        )

    def _in_halves(self, hidden_states: torch.Tensor, size: tuple[int, int], shift: int) -> torch.Tensor:
        """`forward`, by the operators of the two halves."""
        norm, attention, dense = self.layernorm_before, self.attention.self, self.attention.output.dense
        packed = pack_linears(attention.projections())
        weights = norm.weight, norm.bias, *packed, attention.bias(), dense.weight, dense.bias
        options = dict(window=self.window_size, shift=shift, eps=norm.eps)
        hidden_states = ops.window_block(hidden_states.unflatten(1, size), *weights, **options).flatten(1, 2)
        norm, first, last = self.layernorm_after, self.intermediate, self.output.dense
        weights = norm.weight, norm.bias, first.dense.weight, first.dense.bias, last.weight, last.bias
        return ops.mlp_block(hidden_states, *weights, activation=first.hidden_act, eps=norm.eps)

    def _drop_path(self, attended: torch.Tensor) -> torch.Tensor:
        """In training, leave the block out for some clips, and scale it up for the others (arXiv:1603.09382)."""
        if not self.training or self.drop_path_rate == 0:
            return attended
        kept = 1 - self.drop_path_rate
        draws = torch.rand(len(attended), 1, 1, dtype=attended.dtype, device=attended.device)
        return attended.div(kept) * torch.floor(draws + kept)


class ClapAudioPatchMerging(nn.Module):
    """Four neighbours to one place of twice the width: a quarter of the places is left."""

    def __init__(self, width: int):
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, hidden_states: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """`[batch, rows * columns, width]` → `[batch, ceil(rows / 2) * ceil(columns / 2), 2 * width]`."""
        image = hidden_states.unflatten(1, size)
        merged = ops.merge_norm(image, weight=self.norm.weight, bias=self.norm.bias, eps=self.norm.eps)
        return apply_linear(self.reduction, merged.flatten(1, 2))


class ClapAudioStage(nn.Module):
    """Layers of one width, every second of them shifted, and patch merging behind all stages but the last."""

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
        size: tuple[int, int],
        output_attentions: bool = False,
        always_partition: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`[batch, rows * columns, width]` → the next stage's input, what it was merged from, the last weights."""
        weights = None
        for block in self.blocks:
            hidden_states, weights = block(hidden_states, size, output_attentions, always_partition)
        merged = hidden_states if self.downsample is None else self.downsample(hidden_states, size)
        return merged, hidden_states, weights


class ClapAudioEncoder(nn.Module):
    """Spectrograms to one vector each; see [`ClapAudioModel`]."""

    def __init__(self, config: ClapAudioConfig):
        super().__init__()
        self.config = config
        self.patch_embed = ClapAudioPatchEmbed(config)
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            self.layers.append(ClapAudioStage(config, stage, rates[:depth]))
            rates = rates[depth:]
        self.batch_norm = nn.BatchNorm2d(config.num_mel_bins)
        self.norm = nn.LayerNorm(config.patch_embeds_hidden_size * 2 ** (len(config.depths) - 1))

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
        """See [`ClapAudioModel.forward`]."""
        output_attentions = output_attentions or self.config.output_attentions
        output_hidden_states = output_hidden_states or self.config.output_hidden_states
        hidden_states = self._embed(input_features, is_longer)

        def as_image(tokens):
            return tokens.transpose(1, 2).unflatten(2, size)

        size = self.patch_embed.grid_size
        images, attentions = [as_image(hidden_states)] if output_hidden_states else [], []
        for stage in self.layers:
            hidden_states, whole, weights = stage(hidden_states, size, output_attentions, always_partition)
            if output_hidden_states and output_hidden_states_before_downsampling:
                images.append(as_image(whole))
            if stage.downsample is not None:
                size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
            if output_hidden_states and not output_hidden_states_before_downsampling:
                images.append(as_image(hidden_states))
            attentions.append(weights)
        normed = add_layer_norm(self.norm, hidden_states)[1]
        return BaseModelOutputWithPooling(
            last_hidden_state=self._unfold(as_image(normed)),
            pooler_output=normed.mean(1),
            hidden_states=tuple(images) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _embed(self, input_features: torch.Tensor, is_longer: torch.Tensor | None) -> torch.Tensor:
        """`[batch, channels, frames, mels]` → `[batch, patches, patch_embeds_hidden_size]`."""
        longer = self._check(input_features, is_longer)
        fold = self.config.spec_size, self.config.num_mel_bins
        # Mel channels are what is normalised; this view is the layout that torch reads without a copy.
        normed = self.batch_norm(input_features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if not self.patch_embed.enable_fusion:
            return self.patch_embed(fold_spectrogram(normed, *fold))
        crops = fold_spectrogram(normed[longer, 1:], *fold) if len(longer) else None
        return self.patch_embed(fold_spectrogram(normed[:, :1], *fold), crops, longer)

    def _check(self, input_features: torch.Tensor, is_longer: torch.Tensor | None) -> torch.Tensor | None:
        """Raise for what is no input of this model; which clips are longer than its input, `[clips]` int64."""
        fusion, mels = self.patch_embed.enable_fusion, self.config.num_mel_bins
        channels = 4 if fusion else self.patch_embed.in_channels
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
        """`[batch, width, rows, columns]` → `[batch, width, frequencies, times]`: the strips side by side again."""
        strips = image.shape[2] // (image.shape[2] // (self.config.spec_size // self.config.num_mel_bins))
        return image.unflatten(2, (strips, -1)).transpose(2, 3).flatten(3)
