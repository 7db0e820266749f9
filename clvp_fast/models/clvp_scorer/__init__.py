"""CLVP's first API: only the scorer, which compares text with speech tokens by the encoders of `models.clvp`."""
