"""The peaks between which samples have the scale of 1."""

#: Below this peak (-80 dB of full scale) a recording counts as silent.
SILENCE_PEAK = 1e-4
#: Above this peak (24 dB over full scale) floats are of another scale, such as that of 16-bit samples.
LOUDEST_PEAK = 16.0


def wrong_scale(peak: float) -> str | None:
    """Advise on floats of that peak, in words that follow a name; return None where their scale is 1."""
    if peak <= LOUDEST_PEAK:
        return None
    return (
        f"has floats up to {peak:.6g}, and full scale is 1: divide them by that of their format, which is 32768 of "
        "16-bit samples"
    )
