"""Every door to the engine draws by `SamplingParams`: the same defaults, the same ranges, the same jobs."""

import inspect
import json
import math

import pytest

from clvp_fast import CandidateEngine, SamplingParams
from clvp_fast.batch import Settings, job
from clvp_fast.batch.rows import Row
from clvp_fast.batch.worker import Worker
from clvp_fast.cli.inputs import sampling_of
from clvp_fast.cli.parser import build_parser
from clvp_fast.distributed import CandidateActor
from clvp_fast.engine.defaults import TEXT_CLEANINGS
from clvp_fast.engine.memory import plan
from clvp_fast.engine.ranking import Ranker
from clvp_fast.engine.sampling_params import PRESETS, RANGES, SAMPLING
from clvp_fast.models.clvp.text_cleaning import TEXT_CLEANERS
from tests.batch.jobs import VOICE, NoModel, assert_whole, records, results, write_jsonl

COMMANDS = {"generate": ("generate", "Hello.", "--voice", "a.wav"), "batch": ("batch", "a.csv", "--out", "out")}


def of_command_line(command, *options):
    """Return the parameters of a command, or None where an option is refused."""
    try:
        given = sampling_of(build_parser().parse_args([*COMMANDS[command], *options]))
    except SystemExit:
        return None
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def of_settings(**given):
    try:
        return Settings(**{"seed": 0, **given}).sampling()
    except ValueError:
        return None


def of_row(**given):
    """Return the parameters of a row of a table, in a job that leaves them open."""
    row = Row.read(0, {"id": "a", "text": "Hello.", "seed": 0, **given})
    assert row.error is None
    try:
        return Settings().sampling(**row.sampling)
    except ValueError:
        return None


@pytest.mark.parametrize("greedy", [False, True])
def test_all_doors_have_the_same_defaults(greedy):
    expected = SamplingParams(do_sample=not greedy, seed=0)
    for command in COMMANDS:
        assert of_command_line(command, *["--greedy"] * greedy) == expected
    assert of_settings(do_sample=not greedy) == Settings(do_sample=not greedy).sampling() == expected
    assert greedy or of_row() == expected  # a job's number of candidates is its rows', and greedy ones have to say 1
    of_engine = inspect.signature(CandidateEngine.generate).parameters["sampling"].default
    assert of_engine is None and CandidateEngine._call(None, [], of_engine).sampling == SamplingParams()


def test_all_doors_have_the_same_settings_of_the_engine():
    """Compare memory, scoring, dtype and the cleaning of texts, besides sampling."""
    parameters = [
        inspect.signature(function).parameters
        for function in (
            CandidateEngine,
            CandidateEngine.from_pretrained,
            CandidateActor,
            Worker,
            job.run,
            plan,
            Ranker,
        )
    ]
    expected = dict(memory_fraction=0.9, page_size=16, scoring="padded", text_cleaning="tortoise", mode="padded")
    for name, default in expected.items():
        defaults = [each[name].default for each in parameters if name in each]
        assert defaults and set(defaults) == {default}, name
    for command in COMMANDS:
        given = build_parser().parse_args([*COMMANDS[command]])
        assert (given.memory_fraction, given.scoring, given.dtype, given.text_cleaning) == (
            *(expected[name] for name in ("memory_fraction", "scoring")),
            Settings().dtype,
            expected["text_cleaning"],
        )
    assert (Settings().scoring, Settings().text_cleaning) == (expected["scoring"], expected["text_cleaning"])
    assert set(TEXT_CLEANINGS) == set(TEXT_CLEANERS)


def test_all_doors_have_the_same_names():
    others = {"stop_token", "penalize_prompt", "typical_mass"}  # of a checkpoint, or of Tortoise's objects
    assert set(SAMPLING) == set(inspect.signature(SamplingParams).parameters) - others
    assert set(SAMPLING) - {"do_sample"} == set(RANGES) - others
    assert set(SAMPLING) <= set(Settings().as_dict())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_one_of_the_command_line(name):
    for command in COMMANDS:
        assert of_command_line(command, "--preset", name) == SamplingParams.preset(name, seed=0)


# Numbers on both sides of every bound of `RANGES`.
_WHOLE = (-(2**63) - 1, -(2**63), -1, 0, 1, 65_536, 65_537, 2**31 - 1, 2**31, 2**63, 2**64 - 1, 2**64)
_REAL = (-math.inf, -1e-9, 0.0, 1e-9, 0.5, 1.0, 1.0 + 1e-9, 1e30, math.inf)


@pytest.mark.parametrize("name", [name for name in SAMPLING if name != "do_sample"])
def test_all_doors_have_the_same_ranges(name, capsys):
    refused = []
    for value in _WHOLE if RANGES[name].kind is int else _REAL:
        try:
            expected = SamplingParams(**{"seed": 0, name: value})
        except ValueError:
            expected = None
            refused.append(value)
        for command in COMMANDS:
            assert of_command_line(command, f"--{name.replace('_', '-')}={value}") == expected, value
        assert of_settings(**{name: value}) == of_row(**{name: value}) == expected, value
    assert refused
    assert capsys.readouterr().err.count(f"is not {'a number ' * (RANGES[name].kind is float)}") >= 2 * len(refused)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_executor", lambda settings, *_: NoModel(settings, **stops))
    stops = {}
    rows = [row | {"voice": str(VOICE)} for row in records(12) if "voice" not in row]
    return write_jsonl(tmp_path / "corpus.jsonl", rows), stops


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ((), {}),
        (
            ("--temperature", "1", "--top-k", "0", "--preset", "fast"),
            dict(temperature=1, top_k=None, num_candidates=96),
        ),
        (("--greedy", "--seed", "-3"), dict(do_sample=False, seed=-3)),
    ],
)
@pytest.mark.parametrize("begun_in", ["shell", "Python"])
def test_a_job_goes_on_at_the_other_door(cli, corpus, tmp_path, caplog, options, settings, begun_in):
    """Resume a job without refusals or repeated shards, though both sides name the settings differently."""
    (corpus, stops), out = corpus, tmp_path / "out"
    doors = {
        "shell": lambda: cli("batch", corpus, "--out", out, "--shard-rows", 4, *options).code,
        "Python": lambda: job.run(corpus, out, checkpoint="random", shard_rows=4, progress=False, **settings),
    }
    stops["stop_after"] = 6
    if begun_in == "shell":
        assert doors["shell"]() == 130
    else:
        with pytest.raises(KeyboardInterrupt):
            doors["Python"]()
    stops.clear()
    doors["Python" if begun_in == "shell" else "shell"]()
    assert_whole(out, 11)
    assert json.loads((out / "summary.json").read_text())["this_run"]["rows"] == 5
    assert "spoken again" not in caplog.text and len({line["settings"] for line in results(out)}) == 1
