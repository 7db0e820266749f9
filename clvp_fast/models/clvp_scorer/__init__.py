"""CLVP's first API: the scorer alone, text and speech tokens to their similarity, on the encoders of `models.clvp`."""
