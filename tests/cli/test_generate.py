"""`generate` and `score`: what they write is what they say, and the same seed gives the same candidates."""

import json

import numpy as np
import pytest
import torch

from tests.cli.conftest import TEXT
from tests.kit import isa

# To draw a picture takes almost half of the time of so short a command.
QUICK = ("--num-candidates", 5, "--max-new-tokens", 60, "--no-pictures")


@pytest.fixture
def generate(cli, voice, tmp_path):
    def run(*argv, out=tmp_path / "out", text=TEXT, voice=voice):
        outcome = cli("generate", text, "--voice", voice, "--out", out, *argv)
        assert outcome.code == 0, outcome.err
        return outcome, np.load(out / "codes.npz"), json.loads((out / "candidates.json").read_text())

    return run


def test_files_and_table_agree(generate, tmp_path):
    outcome, codes, document = generate("--num-candidates", 5, "--max-new-tokens", 60)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"codes.npz", "candidates.json", "candidates.png"}
    assert (tmp_path / "out/candidates.png").read_bytes().startswith(b"\x89PNG")

    rows = document["candidates"]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    assert sorted(row["candidate"] for row in rows) == [0, 1, 2, 3, 4]
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 5
    assert codes["codes"].shape == (5, 60) and codes["codes"].dtype == np.int64
    np.testing.assert_array_equal(codes["candidates"], [row["candidate"] for row in rows])
    np.testing.assert_array_equal(codes["lengths"], [row["tokens"] for row in rows])
    np.testing.assert_allclose(codes["scores"], scores)
    for row in rows:
        assert f"{row['score']:.4f}" in outcome.out
    assert "random weights" in outcome.err
    assert document["settings"]["seed"] == 0 and document["settings"]["max_new_tokens"] == 60
    assert document["versions"]["transformers"] and document["text"] == TEXT


def test_codes_are_fixed_as_tortoise_does(generate):
    """Expect 83 from the stop on, and 45 45 248 at the end; a candidate that was cut keeps its own tokens."""
    _, codes, document = generate("--num-candidates", 12, "--max-new-tokens", 90, "--no-pictures")
    stopped = [row["stopped"] for row in document["candidates"]]
    assert any(stopped)
    for row, length, ended in zip(codes["codes"], codes["lengths"], stopped, strict=True):
        assert row.min() >= 0 and row.max() < 8192
        if ended and length < len(row) - 3:
            assert set(row[length:-3]) == {83}
            assert list(row[-3:]) == [45, 45, 248]
        if not ended:
            assert length == len(row) and list(row[-3:]) != [45, 45, 248]


def test_seed_decides(generate, tmp_path):
    runs = [generate(*QUICK, "--seed", seed, out=tmp_path / str(n))[1]["codes"] for n, seed in enumerate((7, 7, 8))]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_batches_and_keep(generate):
    _, codes, document = generate(*QUICK, "--batch-size", 2, "--keep", 2)
    assert len(codes["codes"]) == 2
    assert [row["kept"] for row in document["candidates"]] == [True, True, False, False, False]
    np.testing.assert_array_equal(codes["candidates"], [row["candidate"] for row in document["candidates"][:2]])
    assert len({tuple(row) for row in codes["codes"]}) == 2


@pytest.mark.parametrize("option, part", [("--int8-weights", "weights"), ("--float8-pages", "pages")])
def test_eight_bits(generate, tmp_path, option, part):
    """Check memory and scores of 8-bit weights and pages."""
    _, _, plain = generate(*QUICK, out=tmp_path / "plain")
    _, _, rounded = generate(*QUICK, option, out=tmp_path / "rounded")
    assert rounded["settings"][option[2:].replace("-", "_")] and not plain["settings"]["int8_weights"]
    before, after = (document["memory"]["parts"][part] for document in (plain, rounded))
    assert after > before == 0 if part == "weights" else after == before / 4
    assert [row["score"] for row in rounded["candidates"]] != [row["score"] for row in plain["candidates"]]


def test_packed_weights_are_told(generate, tmp_path):
    """Name them in the settings, because they change a candidate's bits."""
    _, _, plain = generate(*QUICK, "--no-packed-weights", out=tmp_path / "plain")
    _, _, packed = generate(*QUICK, out=tmp_path / "packed")
    for document in plain, packed:
        assert document["settings"]["packed_weights"] == (document["memory"]["parts"]["panels"] > 0)
    assert not plain["settings"]["packed_weights"]


@isa.needs("linear", torch.int8)
def test_activations_in_eight_bits(generate, tmp_path):
    """Check what is written of them, and that they change scores beside 8-bit weights."""
    both = ("--int8-weights", "--activation-dtype", "int8")
    documents = [generate(*QUICK, *both[:given], out=tmp_path / str(given))[2] for given in (1, 3)]
    assert [document["settings"]["activation_dtype"] for document in documents] == [None, "int8"]
    scores = [[row["score"] for row in document["candidates"]] for document in documents]
    assert scores[0] != scores[1]


def test_another_dtype_of_the_ranking(generate, tmp_path):
    """Draw the same codes, with scores that are off by the rounding alone."""
    _, codes, plain = generate(*QUICK, out=tmp_path / "plain")
    _, same, found = generate(*QUICK, "--score-dtype", "bfloat16", out=tmp_path / "found")
    assert [document["settings"]["score_dtype"] for document in (plain, found)] == ["float32", "bfloat16"]
    drawn, again = (dict(zip(one["candidates"], map(tuple, one["codes"]), strict=True)) for one in (codes, same))
    assert drawn == again
    before, after = ({row["candidate"]: row["score"] for row in one["candidates"]} for one in (plain, found))
    assert 0 < max(abs(after[candidate] - score) for candidate, score in before.items()) < 0.05


def test_greedy_needs_no_seed(generate, tmp_path):
    greedy = ("--greedy", "--max-new-tokens", 40, "--no-pictures")
    first, second = (generate(*greedy, "--seed", seed, out=tmp_path / str(seed))[1]["codes"] for seed in (1, 2))
    assert first.shape == (1, 40)
    np.testing.assert_array_equal(first, second)


def test_text_and_voice_matter(generate, tmp_path, voice):
    import soundfile

    samples, rate = soundfile.read(voice)
    soundfile.write(tmp_path / "low.wav", samples[::-1], rate)
    plain = generate(*QUICK, out=tmp_path / "a")[1]["codes"]
    other_text = generate(*QUICK, out=tmp_path / "b", text="Something else is said here.")[1]["codes"]
    other_voice = generate(*QUICK, voice=tmp_path / "low.wav", out=tmp_path / "c")[1]["codes"]
    assert not np.array_equal(plain, other_text)
    assert not np.array_equal(plain, other_voice)


def test_json_alone_on_stdout(generate, tmp_path):
    outcome, _, document = generate(*QUICK, "--json")
    printed = json.loads(outcome.out)
    assert [printed.pop("written")[0]] == [str(tmp_path / "out/codes.npz")]
    assert printed == document
    assert "note:" in outcome.err


def test_default_length_is_what_the_checkpoint_has_positions_for(generate):
    _, codes, document = generate("--num-candidates", 1, "--no-pictures")
    assert document["settings"]["max_new_tokens"] == 500
    assert codes["codes"].shape == (1, 500)
    assert document["candidates"][0]["stopped"]


def test_score_keeps_the_numbers_of_candidates(cli, generate, tmp_path):
    """Find the kept candidates in `codes.npz`, best first; a number tells their latents and seed."""
    _, codes, document = generate(*QUICK, "--keep", 4, "--no-pictures")
    kept = [row["candidate"] for row in document["candidates"][:4]]
    assert kept != sorted(kept) and kept == codes["candidates"].tolist()
    found = cli("score", tmp_path / "out/codes.npz", TEXT, "--json")
    assert [row["candidate"] for row in json.loads(found.out)["candidates"]] == kept
    other = cli("score", tmp_path / "out/codes.npz", "Something else is said here.", "--json")
    rows = json.loads(other.out)["candidates"]
    assert {row["candidate"]: row["tokens"] for row in rows} == dict(zip(kept, codes["lengths"].tolist(), strict=True))


@pytest.mark.parametrize("form", ["npz", "npy", "json"])
def test_score_gives_the_scores_of_generate(cli, generate, tmp_path, form):
    _, codes, document = generate(*QUICK)
    path = tmp_path / f"codes.{form}"
    if form == "npz":
        np.savez(path, codes=codes["codes"])
    elif form == "npy":
        np.save(path, codes["codes"].astype(np.int32))
    else:
        path.write_text(json.dumps(codes["codes"].tolist()))
    outcome = cli("score", path, TEXT, "--json")
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)["candidates"]
    assert [row["candidate"] for row in rows] == [0, 1, 2, 3, 4]  # codes.npz is in rank order already
    np.testing.assert_allclose(
        [row["score"] for row in rows], [row["score"] for row in document["candidates"]], rtol=1e-5, atol=1e-5
    )


def test_score_table(cli, generate, tmp_path):
    generate(*QUICK)
    outcome = cli("score", tmp_path / "out/codes.npz", "Other words.")
    assert outcome.code == 0
    assert "score" in outcome.out and outcome.out.count("│") >= 5 * 5


def test_voices_as_tortoise_has_them(generate, tmp_path):
    """Take 6 s from a random place, by a seed that is written down; and latents in a file."""
    soundfile = pytest.importorskip("soundfile")  # which a GPU machine may lack
    samples = np.random.default_rng(0).normal(size=8 * 22050) * 0.1 * np.linspace(0.1, 1, 8 * 22050)
    soundfile.write(tmp_path / "long.wav", samples, 22050)
    found = {}
    for seed in (None, 1, 2):
        crop = () if seed is None else ("--crop-seed", seed)
        outcome, codes, document = generate(*QUICK, *crop, voice=tmp_path / "long.wav", out=tmp_path / str(seed))
        assert document["settings"]["crop_seed"] == seed
        assert ("6 s from a random place on are used" in outcome.err) == (seed is not None)
        found[seed] = codes["codes"]
    assert len({codes.tobytes() for codes in found.values()}) == 3
    torch.save((torch.randn(1, 128), torch.randn(1, 256)), tmp_path / "voice.pth")
    generate(*QUICK, voice=tmp_path / "voice.pth")
