"""A copy of an encoder in another dtype, for ranking beside a model that keeps its own."""

import torch

from clvp_fast.engine.defaults import DTYPES
from clvp_fast.engine.weight_versions import WeightVersions
from clvp_fast.io.errors import shown
from clvp_fast.models.clvp.encoder import ClvpEncoder
from clvp_fast.models.common.plain import PlainModel


class EncoderCopy:
    """A copy of `encoder` in `dtype`, which is made anew when parameters of `encoder` were moved or written to.

    Writes through `.data` or numpy are not seen ([`WeightVersions`] tells why): call `renew` after one.

    Raises:
        ValueError: another dtype than float32, bfloat16 or float16; a module of `encoder` that is not plain, in whose
            place the copy would be called.
    """

    def __init__(self, encoder: ClvpEncoder, dtype: torch.dtype):
        if dtype not in [getattr(torch, name) for name in DTYPES]:
            raise ValueError(f"candidates are scored in torch.{', torch.'.join(DTYPES)}, not {shown(dtype)}")
        self._encoder, self._dtype = encoder, dtype
        self.renew()

    def current(self) -> ClvpEncoder:
        """Return the copy, in eval mode; raise ValueError where a module of the encoder was hooked or replaced."""
        self._plain.check()
        if self._versions.changed() is not None:
            self.renew()
        return self._copy

    @torch.inference_mode(False)
    @torch.no_grad()
    def renew(self) -> None:
        """Make the copy from the encoder as it is now."""
        self._plain = PlainModel(self._encoder)
        vars(self).pop("_copy", None)  # its memory is free before the next one needs as much
        with torch.device("meta"):
            made = ClvpEncoder(self._encoder.config)
        weights = {name: value.detach().to(self._dtype) for name, value in self._encoder.named_parameters()}
        # Buffers, the frequencies of the angles, keep their precision.
        made.load_state_dict(dict(self._encoder.named_buffers()) | weights, assign=True)
        self._copy, self._versions = made.eval().requires_grad_(False), WeightVersions(self._encoder)
