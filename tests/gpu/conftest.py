"""Fixtures of the engine's tests, on a GPU too."""

from tests.engine.conftest import happened, parts

__all__ = ["happened", "parts"]
