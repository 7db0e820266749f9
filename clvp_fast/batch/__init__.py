"""Corpora: one resumable job over many rows of text and voice, on one device or a Ray cluster."""

from clvp_fast.batch.job import run
from clvp_fast.batch.settings import Settings

__all__ = ["Settings", "run"]
