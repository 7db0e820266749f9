"""`build_engine`: a job's settings and the command line's arguments make the same engine."""

import pytest
import torch

pytest.importorskip("pyarrow")  # which a GPU machine may lack
from clvp_fast.batch import Settings
from clvp_fast.checkpoint import load_checkpoint
from clvp_fast.cli.parser import build_parser
from clvp_fast.engine.building import build_engine
from clvp_fast.engine.memory import CPU_BATCH


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint("random")


def sizes(engine):
    runner = engine._work.loop.runner
    found = (engine.memory.max_batch, engine.max_new_tokens, engine.scorer.mode, engine._work.latents is not None)
    copy = engine.scorer._copy
    scored_in = None if copy is None else copy.current().dtype
    return *found, scored_in, runner.decoder.weight_dtype, runner.pages.data.dtype, runner.deterministic


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ((), {}),
        (
            ("--batch-size", "3", "--max-new-tokens", "9", "--scoring", "trimmed", "--latents"),
            dict(batch_size=3, max_new_tokens=9, scoring="trimmed", latents=True),
        ),
        (("--int8-weights", "--float8-pages"), dict(int8_weights=True, float8_pages=True)),
        (("--score-dtype", "bfloat16"), dict(score_dtype="bfloat16")),
    ],
)
def test_arguments_and_settings_make_the_same_engine(checkpoint, options, settings):
    arguments = build_parser().parse_args(["generate", "Hello.", "--voice", "a.wav", *options])
    made = sizes(build_engine(checkpoint, arguments, arguments.memory_fraction))
    assert made == sizes(build_engine(checkpoint, Settings(**settings), 0.9))
    assert made[:4] == (
        settings.get("batch_size", CPU_BATCH),
        settings.get("max_new_tokens", 500),
        settings.get("scoring", "padded"),
        settings.get("latents", False),
    )
    assert made[4] == (torch.bfloat16 if "score_dtype" in settings else None)
    eight_bits = (torch.int8, torch.float8_e4m3fn) if settings.get("int8_weights") else (None, torch.float32)
    assert made[5:] == (*eight_bits, False)


def test_there_are_no_more_places_than_candidates(checkpoint):
    for batch_size, candidates, expected in ((None, 2, 2), (1, 2, 1), (2, 4, 2)):
        settings = Settings(batch_size=batch_size, max_new_tokens=9)
        assert build_engine(checkpoint, settings, 0.9, candidates=candidates).memory.max_batch == expected
