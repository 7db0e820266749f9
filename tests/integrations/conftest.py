"""Tortoise's objects for the tests: a stand-in, and the real one where tortoise-tts is installed."""

import importlib.util
from functools import partial

import pytest

from clvp_fast.integrations import make_tortoise_importable
from tests.integrations import stand_in


@pytest.fixture(scope="session")
def tortoise_api():
    """Give `tortoise.api` of tortoise-tts 3.0.0."""
    if importlib.util.find_spec("tortoise") is None:
        pytest.skip("tortoise-tts 3.0.0 is not installed")
    make_tortoise_importable()
    return importlib.import_module("tortoise.api")


@pytest.fixture(scope="session", params=["stand-in", "package"])
def make_tts(request):
    """Give a maker of objects of either kind, with the same weights every time."""
    if request.param == "stand-in":
        return stand_in.TextToSpeech
    api = request.getfixturevalue("tortoise_api")
    from tests.integrations.package import tiny_tts

    return partial(tiny_tts, api)
