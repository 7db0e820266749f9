"""`build_engine`: a job's settings and the command line's arguments make the same engine."""

import pytest
import torch

pytest.importorskip("pyarrow")  # which a GPU machine may lack
from clvp_fast.batch import Settings
from clvp_fast.checkpoint import load_checkpoint
from clvp_fast.cli.parser import build_parser
from clvp_fast.engine.building import build_engine
from clvp_fast.engine.memory import CPU_BATCH
from tests.kit import isa


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint("random")


def sizes(engine):
    runner = engine._work.loop.runner
    found = (engine.memory.max_batch, engine.max_new_tokens, engine.scorer.mode, engine._work.latents is not None)
    copy = engine.scorer._copy
    scored_in = None if copy is None else copy.current().dtype
    decoder = runner.decoder
    dtypes = scored_in, decoder.weight_dtype, decoder.activation_dtype, runner.pages.data.dtype
    return *found, *dtypes, runner.deterministic


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ((), {}),
        (
            ("--batch-size", "3", "--max-new-tokens", "9", "--scoring", "trimmed", "--latents"),
            dict(batch_size=3, max_new_tokens=9, scoring="trimmed", latents=True),
        ),
        (("--int8-weights", "--float8-pages"), dict(int8_weights=True, float8_pages=True)),
        pytest.param(
            ("--int8-weights", "--activation-dtype", "int8"),
            dict(int8_weights=True, activation_dtype="int8"),
            marks=isa.needs("linear", torch.int8),
        ),
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
    assert made[5] == (torch.int8 if "int8_weights" in settings else None)
    assert made[6] == (torch.int8 if "activation_dtype" in settings else None)
    assert made[7:] == (torch.float8_e4m3fn if "float8_pages" in settings else torch.float32, False)


def test_activations_in_eight_bits_need_weights_in_eight_bits(checkpoint):
    with pytest.raises(ValueError, match=r"activation_dtype must be one of None, 'int8', not 'int4'"):
        Settings(activation_dtype="int4")
    with pytest.raises(ValueError, match=r"multiplies weights in 8 bits: add int8_weights \(--int8-weights\)"):
        build_engine(checkpoint, Settings(activation_dtype="int8"), 0.9)


def test_there_are_no_more_places_than_candidates(checkpoint):
    for batch_size, candidates, expected in ((None, 2, 2), (1, 2, 1), (2, 4, 2)):
        settings = Settings(batch_size=batch_size, max_new_tokens=9)
        assert build_engine(checkpoint, settings, 0.9, candidates=candidates).memory.max_batch == expected
