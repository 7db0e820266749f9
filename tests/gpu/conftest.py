"""What tests of the engine watch, on a GPU too."""

from tests.engine.conftest import happened, parts

__all__ = ["happened", "parts"]
