"""Log-mel spectrograms to samples without a trained model: magnitudes by least squares, phases by Griffin-Lim."""

import torch

from clvp_fast.models.clvp.feature_extraction import ClvpFeatureExtractor

# Exponents a little below those of an exact inversion sharpen the peaks, which the few mel channels blur.
_SHARPEN = 1.1
_LOUDNESS = 0.08


class GriffinLim:
    """Invert the features of `extractor`, with its window, hop and mel filters.

    Args:
        extractor: the feature extractor to invert.
        iterations: iterations of the phases (Perraudin et al., "A fast Griffin-Lim algorithm", 2013).
        momentum: their momentum.
    """

    def __init__(self, extractor: ClvpFeatureExtractor, iterations: int = 32, momentum: float = 0.99):
        self.n_fft, self.hop_length = extractor.n_fft, extractor.hop_length
        self.iterations, self.momentum = iterations, momentum
        norms = extractor.mel_norms
        self.norms = None if norms is None else torch.tensor(norms, dtype=torch.float32)[:, None]
        self.filters = torch.tensor(extractor.mel_filters, dtype=torch.float32)  # [n_fft // 2 + 1, bins]
        self.inverse = torch.linalg.pinv(self.filters)
        self.window = torch.hann_window(self.n_fft)

    def magnitudes(self, log_mel: torch.Tensor) -> torch.Tensor:
        """Return magnitudes `[n_fft // 2 + 1, frames]` of log-mel `[bins, frames]`, none negative."""
        log_mel = log_mel.float() if self.norms is None else log_mel.float() * self.norms
        power = log_mel.clamp(max=12).exp()
        # Least squares by multiplicative updates, which keep the sign, starting from the pseudo-inverse.
        spectrum = (self.inverse.T @ power).clamp(min=1e-6)
        wanted = self.filters @ power
        for _ in range(30):
            spectrum = spectrum * wanted / (self.filters @ (self.filters.T @ spectrum) + 1e-8)
        return spectrum.sqrt()

    @torch.no_grad()
    def __call__(self, log_mel: torch.Tensor) -> torch.Tensor:
        """Return float32 samples `[(frames - 1) * hop_length]` in [-1, 1] of log-mel `[bins, frames]`, not empty."""
        if log_mel.ndim != 2 or not log_mel.shape[1]:
            raise ValueError(f"log_mel must be [bins, frames] of at least one frame, got {list(log_mel.shape)}")
        length = (log_mel.shape[1] - 1) * self.hop_length
        # A transform reflects half a window at either end, so a spectrogram that is too short repeats its last frame.
        missing = max(0, 2 + self.n_fft // 2 // self.hop_length - log_mel.shape[1])
        log_mel = torch.cat([log_mel, log_mel[:, -1:].expand(-1, missing)], 1)
        wanted = self.magnitudes(log_mel) ** _SHARPEN
        noise = torch.rand(wanted.shape, generator=torch.Generator().manual_seed(0))
        estimate = torch.polar(wanted, 2 * torch.pi * noise)
        before = torch.zeros_like(estimate)
        for _ in range(self.iterations):
            found = self._spectrum(self._samples(estimate))
            ahead = found + self.momentum * (found - before)
            before = found
            estimate = wanted * ahead / (ahead.abs() + 1e-8)
        samples = self._samples(estimate)[:length]
        if not length:
            return samples
        return (samples * (_LOUDNESS / (samples.square().mean().sqrt() + 1e-6))).clamp(-1, 1)

    def _samples(self, spectrum: torch.Tensor) -> torch.Tensor:
        return torch.istft(spectrum, self.n_fft, self.hop_length, window=self.window)

    def _spectrum(self, samples: torch.Tensor) -> torch.Tensor:
        return torch.stft(samples, self.n_fft, self.hop_length, window=self.window, return_complex=True)
