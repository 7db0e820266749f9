"""Runs objects of other packages on this package's engine."""

from clvp_fast.integrations.importing import make_tortoise_importable

__all__ = ["make_tortoise_importable"]
