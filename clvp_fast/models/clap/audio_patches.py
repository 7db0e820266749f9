"""Turns spectrograms into the patch embeddings of CLAP's audio tower, and fuses the crops of a long clip."""

import torch
import torch.nn.functional as F
from torch import nn

from clvp_fast.models.clap.configuration import ClapAudioConfig
from clvp_fast.models.common.convolution import Conv2d
from clvp_fast.models.common.layers import add_norm


def pair(value) -> tuple[int, int]:
    """Return one number for both axes, or the two numbers."""
    return (value, value) if isinstance(value, int) else tuple(value)


def fold_spectrogram(spectrogram: torch.Tensor, spec_size: int, num_mel_bins: int) -> torch.Tensor:
    """Fold spectrograms `[batch, channels, frames, mels]` to images `[batch, channels, rows, columns]` of `spec_size`.

    Time is stretched to `spec_size * strips` frames and cut into `strips = spec_size // num_mel_bins` strips, which lie
    one above the other; in each, mel channels are the rows.

    Raises `ValueError` for larger spectrograms.
    """
    strips = spec_size // num_mel_bins
    frames, mels = spec_size * strips, spec_size // strips
    if spectrogram.shape[2] > frames or spectrogram.shape[3] > mels:
        raise ValueError(
            f"input_features hold {spectrogram.shape[2]} frames of {spectrogram.shape[3]} mel channels, and the model "
            f"takes at most {frames} of {mels}: cut the clips with the feature extractor's max_length"
        )
    for size in ((frames, spectrogram.shape[3]), (frames, mels)):
        if spectrogram.shape[2:] != size:
            spectrogram = F.interpolate(spectrogram, size, mode="bicubic", align_corners=True)
    image = spectrogram.unflatten(2, (strips, -1)).transpose(3, 4)
    return image.flatten(2, 3)


def project(conv: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Embed patches of images `[batch, channels, height, width]` as vectors, `[batch, rows, columns, width]`."""
    if images.shape[1] == 1:
        # An image of one channel has both of torch's layouts; as channels-last, the numbers of a patch are contiguous.
        height, width = images.shape[2:]
        images = images.contiguous().as_strided(images.shape, (height * width, 1, width, 1))
    return conv(images).permute(0, 2, 3, 1)


class ClapAudioAFFBlock(nn.Module):
    """Attentional feature fusion: a weight for each position and channel of two images, computed from both."""

    def __init__(self, config: ClapAudioConfig):
        super().__init__()
        width, inner = config.patch_embeds_hidden_size, config.patch_embeds_hidden_size // config.aff_block_r

        def attention(*first: nn.Module) -> nn.Sequential:
            return nn.Sequential(
                *first,
                Conv2d(width, inner, kernel_size=1),
                nn.BatchNorm2d(inner),
                nn.ReLU(inplace=True),
                Conv2d(inner, width, kernel_size=1),
                nn.BatchNorm2d(width),
            )

        self.local_att = attention()
        self.global_att = attention(nn.AdaptiveAvgPool2d(1))
        self.sigmoid = nn.Sigmoid()

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Fuse two images `[clips, channels, rows, columns]` into one."""
        both = hidden_states + residual
        weight = self.sigmoid(self.local_att(both) + self.global_att(both))
        return 2 * hidden_states * weight + 2 * residual * (1 - weight)


class ClapAudioPatchEmbed(nn.Module):
    """Embed patches of the image. With `enable_fusion`, those of three crops are fused with a long clip's."""

    def __init__(self, config: ClapAudioConfig):
        super().__init__()
        if not config.flatten_patch_embeds:
            raise ValueError("flatten_patch_embeds must be True: the layers take a sequence of patches")
        self.image_size = pair(config.spec_size)
        size, self.patch_stride = pair(config.patch_size), pair(config.patch_stride)
        (rows, columns), (down, across) = self.image_size, self.patch_stride
        self.grid_size = rows // down, columns // across
        padding = (size[0] - down) // 2, (size[1] - across) // 2
        self.enable_fusion = config.enable_fusion
        if self.enable_fusion and config.fusion_type == "channel_map":
            raise ValueError("fusion_type 'channel_map' is not served: CLAP's checkpoints fuse by 'aff_2d'")
        channels, width = config.patch_embed_input_channels, config.patch_embeds_hidden_size
        self.proj = Conv2d(channels, width, size, self.patch_stride, padding)
        self.norm = nn.LayerNorm(width) if config.enable_patch_layer_norm else nn.Identity()
        if self.enable_fusion:
            self.fusion_model = ClapAudioAFFBlock(config)
            self.mel_conv2d = Conv2d(channels, width, (size[0], size[1] * 3), (down, across * 3), padding)

    def forward(self, hidden_states: torch.Tensor, is_longer_idx: torch.Tensor | None = None) -> torch.Tensor:
        """Embed images `[batch, channels, rows, columns]` as `[batch, patches, channels]`.

        With fusion the channels are a whole clip and three crops; the crops are used for the clips in `is_longer_idx`,
        `[clips]` int64.
        """
        if not self.enable_fusion:
            return self.embed(hidden_states)
        assert is_longer_idx is not None  # with fusion the encoder always gives it
        crops = hidden_states[is_longer_idx, 1:] if len(is_longer_idx) else None
        return self.embed(hidden_states[:, :1], crops, is_longer_idx)

    def embed(
        self, images: torch.Tensor, crops: torch.Tensor | None = None, longer: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embed images as `[batch, patches, channels]`.

        Args:
            images: `[batch, channels, rows, columns]`; with fusion, those of the whole clips.
            crops: `[clips, 3, rows, columns]`, of the clips that are longer than the model's input, or None.
            longer: `[clips]`, int64: the indices of those clips in the batch.
        """
        if images.shape[2:] != self.image_size:
            rows, columns = self.image_size
            raise ValueError(
                f"input_features make an image of {images.shape[2]} x {images.shape[3]}, and the model takes one of "
                f"{rows} x {columns}: the extractor's feature_size must be the model's num_mel_bins"
            )
        embedded = project(self.proj, images)
        if longer is not None and crops is not None:
            embedded = embedded.index_copy(0, longer, self._fuse(embedded[longer], crops))
        return add_norm(self.norm, embedded.flatten(1, 2))[1]

    def _fuse(self, embedded: torch.Tensor, crops: torch.Tensor) -> torch.Tensor:
        """Fuse the embeddings of whole clips `[clips, rows, columns, width]` with those of their crops."""
        local = project(self.mel_conv2d, crops.flatten(0, 1)[:, None]).unflatten(0, crops.shape[:2])
        local = local.transpose(1, 2).flatten(2, 3)  # the crops side by side
        local = F.pad(local, (0, 0, 0, embedded.shape[2] - local.shape[2]))
        fused = self.fusion_model(embedded.permute(0, 3, 1, 2), local.permute(0, 3, 1, 2))
        return fused.permute(0, 2, 3, 1)
