"""`clvp-fast batch` as a person runs it: options to settings, tables and JSON, exit codes and sentences."""

import json

import pytest

from clvp_fast.batch import job
from clvp_fast.batch.failures import may_pass
from tests.batch.jobs import VOICE, NoModel, assert_whole, failures, records, results, write_jsonl


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(
        tmp_path / "corpus.jsonl", [row | {"voice": str(VOICE)} for row in records(12) if "voice" not in row]
    )


@pytest.fixture
def made(monkeypatch):
    """Run jobs without a model; give the arguments of their executors."""
    made = []

    def executor(settings, memory_fraction, ray, workers):
        made.append((settings, memory_fraction, ray, workers))
        return NoModel(settings)

    monkeypatch.setattr(job, "_executor", executor)
    return made


TOGGLES = ("--int8-weights", "--latents", "--embeddings")
QUICK = ("--num-candidates", 2, "--max-new-tokens", 5)


def test_from_a_corpus_to_shards(cli, corpus, voice, tmp_path):
    out = tmp_path / "out"
    command = ("batch", corpus, "--out", out, "--voice", voice, *QUICK)
    found = cli(*command)
    assert found.code == 0, found.err
    assert_whole(out, 11)
    assert "tokens/s" in found.out and f"wrote {out / 'shards'}" in found.out
    again = cli(*command, "--json")
    assert again.code == 0 and json.loads(again.out)["spoken"] == 11
    assert json.loads(again.out)["written"][0] == str(out / "shards")
    assert "note: 11 of 11 rows were done by earlier runs" in again.err and "earlier" not in found.err
    assert again.err.count("\n") <= 4  # of the bar that looks through the shards, and the three notes


def test_failed_rows(cli, fails, made, tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", records(20))
    out = tmp_path / "out"
    command = ("batch", corpus, "--out", out, "--voice", VOICE)
    found = cli(*command)
    assert found.code == 1 and "rows" in found.out and "failures.jsonl" in found.out
    last = found.err.splitlines()[-1]
    assert last.startswith(
        f"clvp-fast: error: 2 of 20 rows failed, and {out / 'failures.jsonl'} says why; --retry-failed"
    )
    assert [failure["row"] for failure in failures(out)] == [7, 18]
    assert cli(*command, "--retry-failed").code == 1
    assert len(made) == 2 and len(results(out)) == 18


def test_remarks_are_noted_with_their_rows(cli, voice, tmp_path):
    rows = [{"id": index, "text": f"東 {word}.", "voice": str(voice)} for index, word in enumerate(("yes", "no"))]
    found = cli("batch", write_jsonl(tmp_path / "corpus.jsonl", rows), "--out", tmp_path / "out", *QUICK)
    assert found.code == 0, found.err
    assert "note: 2 of 2 rows: characters of other scripts were written in Latin letters: 東\n" in found.err
    assert "note: 2 of 2 rows: only the first 6 s are used\n" in found.err


def test_options_become_settings(cli, made, corpus, voice, tmp_path):
    def settings(*options):
        found = cli("batch", corpus, "--out", tmp_path / f"out{len(made)}", *options)
        assert found.code == 0, found.err
        return made[-1][0]

    plain = settings()
    assert (plain.num_candidates, plain.keep, plain.top_k, plain.max_new_tokens, plain.device) == (
        16,
        1,
        50,
        None,
        None,
    )
    assert (plain.dtype, plain.seed, plain.voice, plain.scoring, plain.threads) == ("float32", 0, None, "padded", None)
    assert made[-1][1:] == (0.9, None, None)
    many = settings(
        *[
            "--preset",
            "fast",
            "--keep",
            "0",
            "--dtype",
            "bfloat16",
            "--int8-weights",
            "--activation-dtype",
            "int8",
            "--latents",
            "--embeddings",
            "--seed",
            "3",
        ]
    )
    assert (many.num_candidates, many.keep, many.dtype, many.seed) == (96, None, "bfloat16", 3)
    assert many.int8_weights and many.latents and many.embeddings and not many.float8_pages
    assert many.activation_dtype == "int8" and plain.activation_dtype is None
    other = settings(
        "--voice", voice, *["--top-p", "0.5", "--temperature", "0.7", "--scoring", "trimmed", "--batch-size", "4"]
    )
    assert (other.top_p, other.temperature, other.scoring, other.batch_size) == (0.5, 0.7, "trimmed", 4)
    assert other.voice == str(voice) and other.score_dtype is plain.score_dtype is None
    assert settings("--score-dtype", "bfloat16").score_dtype == "bfloat16"
    greedy = settings("--greedy", "--device", "cpu", "--threads", 3, "--memory-fraction", 0.5)
    assert not greedy.do_sample and (greedy.num_candidates, greedy.device, greedy.threads) == (1, "cpu", 3)
    assert made[-1][1:] == (0.5, None, None)
    settings("--ray", "--workers", 2)
    assert made[-1][2:] == (True, 2)
    settings("--ray", "127.0.0.1:6379")
    assert made[-1][2:] == ("127.0.0.1:6379", None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--greedy", "--num-candidates", 2), "--greedy gives one candidate"),
        (("--workers", 2), "workers is for a Ray cluster"),
        (("--dtype", "float16"), "needs each row to give the same in every batch"),
        (("--max-new-tokens", 100_000), "max_new_tokens"),
        (("--checkpoint", "./nowhere"), "there is no checkpoint folder"),
    ],
)
def test_bad_options(fails, corpus, tmp_path, options, said):
    assert said in fails("batch", corpus, "--out", tmp_path / "out", *options)


def test_bad_input(fails, tmp_path):
    assert "there is no input at" in fails("batch", tmp_path / "none.csv", "--out", tmp_path / "out")


def test_rows_without_any_voice_are_refused_before_a_model_is_made(cli, fails, made, tmp_path):
    rows = [{"id": 1, "text": "Yes.", "voice": "a.wav"}, {"id": 2, "text": "No."}, {"id": 3}]
    command = ("batch", write_jsonl(tmp_path / "corpus.jsonl", rows), "--out", tmp_path / "out")
    sentence = fails(*command)
    assert sentence.startswith("1 of 3 rows name no voice (the first is row 1), and the job has none") and not made
    sentence = fails(*command, "--voice", tmp_path / "none.wav")
    assert sentence.startswith(f"there is no voice at {tmp_path}/none.wav") and not made
    found = cli(*command, "--voice", VOICE)  # the same folder serves then
    assert found.code == 1 and len(made) == 1


def test_advice_on_failed_rows(cli, voice, tmp_path):
    rows = [{"id": 1, "text": "Yes."}, {"id": 2, "text": " "}, {"id": 3, "text": "東" * 3000}, {"id": 4}]
    rows += [{"id": 5, "text": "No.", "temperature": -1}, {"id": 1, "text": "Again."}, {"id": 7, "text": "\x01"}]
    source = write_jsonl(tmp_path / "corpus.jsonl", rows)
    found = cli("batch", source, "--out", tmp_path / "out", "--voice", voice, *QUICK)
    assert found.code == 1 and "6 of 7 rows failed" in found.err, found.err
    assert found.err.endswith("mend the rows in the input, and choose another folder for it\n"), failures(
        tmp_path / "out"
    )
    assert not any(may_pass(failure["error"]) for failure in failures(tmp_path / "out"))
    assert may_pass(f"there is no recording at {tmp_path}") and may_pass("a.wav cannot be read as a recording")


def test_random_weights_are_noted_and_files_of_nothing_are_not(cli, corpus, made, tmp_path):
    found = cli("batch", corpus, "--out", tmp_path / "out", "--checkpoint", "random")
    assert found.code == 0 and "failures.jsonl" not in found.out and "summary.json" in found.out
    assert "note: checkpoint 'random' has random weights" in found.err


def test_other_settings(cli, fails, made, corpus, tmp_path):
    command = ("batch", corpus, "--out", tmp_path / "out")
    assert cli(*command).code == 0
    assert "temperature was 0.8 and is 0.9" in fails(*command, "--temperature", 0.9)


def test_interrupted(cli, monkeypatch, corpus, tmp_path):
    monkeypatch.setattr(job, "_executor", lambda settings, *_: NoModel(settings, stop_after=5))
    found = cli("batch", corpus, "--out", tmp_path / "out")
    assert found.code == 130
    assert "interrupted; what is finished is kept, and the same command goes on from there" in found.err
    monkeypatch.setattr(job, "_executor", lambda settings, *_: NoModel(settings))
    assert cli("batch", corpus, "--out", tmp_path / "out").code == 0
    assert_whole(tmp_path / "out", 11)
