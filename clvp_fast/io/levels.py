"""The peaks between which samples count as having full scale at 1."""

#: Below this peak (-80 dB of full scale) a recording counts as silent.
SILENCE_PEAK = 1e-4
#: Above this peak (24 dB over full scale) floats are of another scale, such as that of 16-bit samples.
LOUDEST_PEAK = 16.0


def wrong_scale(peak: float) -> str | None:
    """Return advice on floats with a peak of another scale, in words that follow a name, or None."""
    if peak <= LOUDEST_PEAK:
        return None
    return (
        f"has floats up to {peak:.6g}, and full scale is 1: divide them by that of their format, which is 32768 of "
        "16-bit samples"
    )
