"""Several texts and voices in one `generate`: each as it is alone, one bad among them leaves the others be."""

import io
import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file, save_file

from clvp_fast.checkpoint import load_checkpoint
from clvp_fast.cli import items, report
from clvp_fast.cli.items import read_texts, text_folders
from clvp_fast.cli.voices import voice_names
from clvp_fast.demo import build_random
from clvp_fast.engine.latents import cut_in_silence
from clvp_fast.engine.ranking import Ranker
from clvp_fast.engine.sampling_params import PRESETS
from clvp_fast.engine.voices import Voice, VoiceCache
from tests.cli.test_generate import QUICK, TEXT

OTHER = "No."
DRAWN = [option for option in QUICK if option != "--no-pictures"]


@pytest.fixture
def low(voice, tmp_path):
    """Another voice."""
    samples, rate = soundfile.read(voice)
    soundfile.write(tmp_path / "low.wav", samples[::-1], rate)
    return tmp_path / "low.wav"


@pytest.fixture
def generate(cli, tmp_path):
    """Run `generate` into a folder, and return the outcome and the folder."""

    def run(*argv, out="out", code=0):
        outcome = cli("generate", *QUICK, *argv, "--out", tmp_path / out)
        assert outcome.code == code, outcome
        return outcome, tmp_path / out

    return run


def codes(folder):
    return np.load(folder / "codes.npz")["codes"]


def test_each_is_what_it_is_alone(generate, voice, low):
    outcome, out = generate(TEXT, OTHER, "--voice", voice, "--voice", low, "--seed", 3)
    summary = json.loads((out / "summary.json").read_text())
    rows = summary["requests"]
    folders = ["001-the-birch-canoe-slid-on-the-smooth", "002-no"]
    assert [row["folder"] for row in rows] == [f"{name}/{folder}" for name in ("voice", "low") for folder in folders]
    assert [(row["text"], row["voice"]) for row in rows] == [(t, str(v)) for v in (voice, low) for t in (TEXT, OTHER)]
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        "summary.json",
        *(f"{row['folder']}/{name}" for row in rows for name in ("codes.npz", "candidates.json")),
    }
    for number, row in enumerate(rows):
        _, alone = generate(row["text"], "--voice", row["voice"], "--seed", 3, out=f"alone-{number}")
        np.testing.assert_array_equal(codes(out / row["folder"]), codes(alone))
        document = json.loads((out / row["folder"] / "candidates.json").read_text())
        expected = json.loads((alone / "candidates.json").read_text())
        for key in ("text", "voice", "checkpoint", "versions"):
            assert document[key] == expected[key]
        best = document["candidates"][0]
        assert row["error"] is None and row["best"] == {key: best[key] for key in row["best"]}
        assert [one["candidate"] for one in document["candidates"]] == [
            one["candidate"] for one in expected["candidates"]
        ]
        np.testing.assert_allclose(
            [one["score"] for one in document["candidates"]],
            [one["score"] for one in expected["candidates"]],
            rtol=1e-4,
            atol=1e-4,
        )
        assert f"{best['score']:.4f}" in outcome.out
    assert len({codes(out / row["folder"]).tobytes() for row in rows}) == 4
    assert summary["settings"]["batch_size"] == 16 and summary["tokens_per_second"] > 0
    assert set(summary["seconds"]) == {"load", "generate_and_score", "write"}
    assert summary["memory"]["planned"] == sum(summary["memory"]["parts"].values()) <= summary["memory"]["budget"]
    assert outcome.out.count("summary.json") == 1
    cut = [row for row in rows if not row["best"]["stopped"]]
    assert outcome.out.count("60+") == len(cut) and ("tokens marked + : cut at 60" in outcome.err) == bool(cut)
    assert "20 candidates, 16 at a time" in outcome.err and "20 of 20 candidates" in outcome.err


def test_texts_of_a_file(generate, voice, tmp_path, monkeypatch):
    content = f"\ufeff\n  {TEXT}  \r\n\n \t\n{OTHER}".encode()
    (tmp_path / "texts.txt").write_bytes(content)
    outcome, out = generate("--texts", tmp_path / "texts.txt", "--voice", voice, "--json")
    document = json.loads(outcome.out)
    assert [row["text"] for row in document["requests"]] == [TEXT, OTHER]
    assert [row["folder"] for row in document["requests"]] == ["001-the-birch-canoe-slid-on-the-smooth", "002-no"]
    written = document.pop("written")
    assert sorted(written) == sorted(str(path) for path in out.rglob("*") if path.is_file())
    assert document == json.loads((out / "summary.json").read_text())

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(OTHER.encode())))
    _, piped = generate("--voice", voice, "--texts", "-", out="piped")
    np.testing.assert_array_equal(codes(piped / "001-no"), codes(out / "002-no"))


def test_any_exception_of_a_voice_fails_it_alone(generate, voice, low, monkeypatch):
    load = items.noted_voice

    def strange(cache, place, crop_seed):
        if place == str(low):
            raise OverflowError("what nobody expects")
        return load(cache, place, crop_seed)

    monkeypatch.setattr(items, "noted_voice", strange)
    outcome, out = generate("Yes.", "--voice", voice, "--voice", low, code=1)
    assert "OverflowError: what nobody expects" in outcome.err and "1 of 2 requests failed" in outcome.err
    assert [path.parent.parent.name for path in out.rglob("codes.npz")] == ["voice"]


def test_lines_end_at_newlines(tmp_path):
    """Keep Unicode's other separators, which `str.splitlines` knows too, inside a text."""
    texts = ["One\u2028two.", "One\vtwo.", "One\ftwo.", "One\x1ctwo.", "One\x85two.", "Last"]
    (tmp_path / "texts.txt").write_text(
        "\n".join(texts[:3]) + "\r\n" + "\r".join(texts[3:]), encoding="utf-8", newline=""
    )
    assert read_texts(SimpleNamespace(texts=str(tmp_path / "texts.txt"))) == texts


def test_a_name_that_is_no_utf_8(generate, voice, low, tmp_path):
    """Write its results beside those of the others."""
    strange = tmp_path / os.fsdecode(b"l\xffw.wav")
    low.rename(strange)
    outcome, out = generate("Yes.", "--voice", voice, "--voice", strange, "--json")
    document = json.loads(outcome.out)
    assert [row["voice"] for row in document["requests"]] == [str(voice), str(strange)]
    assert all(row["error"] is None for row in document["requests"])
    assert document["written"] and json.loads((out / "summary.json").read_text())["requests"] == document["requests"]
    assert sorted(path.parent.parent.name for path in out.rglob("codes.npz")) == ["l-w", "voice"]


def test_other_scripts_are_noted(generate, voice):
    outcome, out = generate("東京 is big.", "--voice", voice)
    said = "characters of other scripts were written in Latin letters: 東 京"
    assert f"note: {said}\n" in outcome.err and outcome.err.count("Latin letters") == 1
    assert said in json.loads((out / "candidates.json").read_text())["remarks"]
    outcome, out = generate("A café, naïve Ångström.", "--voice", voice, out="plain")
    assert "Latin letters" not in outcome.err
    assert json.loads((out / "candidates.json").read_text())["remarks"] == ["only the first 6 s are used"]


def test_a_folder_named_demo(generate, fails, voice, tmp_path, monkeypatch):
    """Take 'demo' for the package's checkpoint wherever the command runs; the help says so."""
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    outcome, _ = generate("Yes.", "--voice", voice, "--checkpoint", "demo")
    assert "words that the checkpoint was not trained on, and may say wrongly: yes" in outcome.err
    assert "has no config.json" in fails("generate", "Yes.", "--voice", voice, "--checkpoint", "./demo", "--out", "o")


def test_formats_of_a_folder_of_one_speaker(generate, fails, voice, low, tmp_path):
    """Name files that the library cannot read, and average the others."""
    (tmp_path / "speaker").mkdir()
    low.rename(tmp_path / "speaker/low.wav")
    samples, rate = soundfile.read(voice)
    soundfile.write(tmp_path / "speaker/voice.aiff", samples, rate)
    (tmp_path / "speaker/other.m4a").write_bytes(b"\0\0\0 ftypM4A ")
    outcome, out = generate("Yes.", "--voice", tmp_path / "speaker")
    assert "left out, as libsndfile does not read them: other.m4a" in outcome.err
    assert "2 of 2 recordings: only the first 6 s are used" in outcome.err
    assert any("other.m4a" in remark for remark in json.loads((out / "candidates.json").read_text())["remarks"])
    for name in ("low.wav", "voice.aiff"):
        (tmp_path / "speaker" / name).unlink()
    sentence = fails("generate", "Yes.", "--voice", tmp_path / "speaker", "--out", tmp_path / "no")
    assert "none can be read of other.m4a" in sentence


def test_file_of_texts_that_is_none(fails, voice, tmp_path):
    def sentence(path):
        return fails("generate", "--texts", path, "--voice", voice, "--out", tmp_path / "out")

    assert sentence(tmp_path / "no.txt") == f"there is no file of texts at {tmp_path}/no.txt"
    assert sentence(tmp_path) == f"{tmp_path} is a folder; give --texts a file with one text per line"
    (tmp_path / "blank.txt").write_text(" \n\n\t\n")
    assert sentence(tmp_path / "blank.txt") == f"{tmp_path}/blank.txt has no text in it; write one per line"
    (tmp_path / "latin.txt").write_bytes("Müller".encode("latin-1"))
    assert "is not UTF-8 text" in sentence(tmp_path / "latin.txt")
    assert not (tmp_path / "out").exists()


def test_bad_ones_leave_the_others(generate, voice, low, tmp_path):
    silent = tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros(22050), 22050)
    texts = (OTHER, "a b " * 150, "{}")
    outcome, out = generate(*texts, "--voice", voice, "--voice", silent, code=1)
    rows = json.loads((out / "summary.json").read_text())["requests"]
    assert [row["best"] is not None for row in rows] == [True] + 5 * [False]
    assert [row["error"] is None for row in rows] == [True] + 5 * [False]
    assert rows[1]["error"].startswith("the text is too long: ") and rows[2]["error"].startswith("nothing of the text ")
    assert all("is silent" in row["error"] for row in rows[3:])
    *notes, last = [line for line in outcome.err.splitlines() if line]
    assert last == ("clvp-fast: error: 5 of 6 requests failed, and the notes name each; the others are written")
    assert any(line.startswith("note: silent/001-no and 2 more: ") and "is silent" in line for line in notes)
    assert outcome.out.count("failed") == 5
    assert {path.name for path in (out / "voice").iterdir()} == {"001-no"} and not (out / "silent").exists()
    _, alone = generate(OTHER, "--voice", voice, out="alone")
    np.testing.assert_array_equal(codes(out / "voice/001-no"), codes(alone))


def test_unknown_characters_are_named_with_their_text(generate, voice):
    outcome, _ = generate(OTHER, "Yes {!", "--voice", voice)
    assert "note: 002-yes: characters that the checkpoint does not know were left out: {\n" in outcome.err


def test_all_bad(fails, voice, tmp_path):
    sentence = fails("generate", "{}", "😀", "--voice", voice, "--out", tmp_path / "out")
    assert sentence == "none of the 2 requests can be spoken; the notes name each"
    assert not (tmp_path / "out").exists()


def test_folder_of_recordings_is_averaged(generate, voice, low, tmp_path):
    speaker = tmp_path / "speaker"
    (speaker / "other speaker").mkdir(parents=True)
    for place, source in (("a.FLAC", voice), ("b.wav", low), ("other speaker/c.wav", low)):
        (speaker / place).write_bytes(source.read_bytes())
    (speaker / ".hidden.wav").write_text("no recording")
    (speaker / "notes.txt").write_text("no recording")
    outcome, both = generate(TEXT, "--voice", speaker)
    assert f"{speaker}: 2 of 2 recordings: only the first 6 s are used" in outcome.err
    _, of_voice = generate(TEXT, "--voice", voice, out="voice")
    _, of_low = generate(TEXT, "--voice", low, out="low")
    assert not np.array_equal(codes(both), codes(of_voice)) and not np.array_equal(codes(both), codes(of_low))
    (speaker / "b.wav").write_bytes(voice.read_bytes())
    _, twice = generate(TEXT, "--voice", speaker, out="twice")
    np.testing.assert_array_equal(codes(twice), codes(of_voice)), "the mean of one voice twice"


def test_saved_voice(generate, fails, voice, low, tmp_path):
    saved = tmp_path / "voices" / "anna.safetensors"
    outcome, out = generate(TEXT, "--voice", voice, "--save-voice", saved)
    assert f"wrote {saved}" in outcome.out and set(load_file(saved)) == {"vector", "fingerprint"}
    (tmp_path / "anna").write_bytes(saved.read_bytes())
    for place in (saved, tmp_path / "anna"):  # known by its content too
        _, again = generate(TEXT, "--voice", place, out="again")
        np.testing.assert_array_equal(codes(again), codes(out))

    saved.write_bytes(saved.read_bytes()[:100])
    sentence = fails("generate", TEXT, "--voice", saved, "--out", tmp_path / "bad")
    assert "anna.safetensors is damaged" in sentence
    assert "there is no voice at" in fails("generate", TEXT, "--voice", tmp_path / "no.safetensors")
    sentence = fails("generate", TEXT, "--voice", voice, "--voice", low, "--save-voice", saved)
    assert sentence == "--save-voice saves one voice, and 2 are given; name one --voice"
    assert not (tmp_path / "bad").exists()


def test_voice_of_another_checkpoint(fails, generate, voice, tmp_path):
    checkpoint = load_checkpoint("random")
    fingerprint = VoiceCache(checkpoint.model, checkpoint.feature_extractor).fingerprint
    Voice(fingerprint, -fingerprint).save(tmp_path / "strange.safetensors")
    sentence = fails("generate", TEXT, "--voice", tmp_path / "strange.safetensors", "--out", tmp_path / "out")
    assert sentence == (
        f"{tmp_path}/strange.safetensors: the voice was made by another checkpoint: make it anew from its recordings"
    )


def test_pictures(cli, voice, tmp_path):
    """Draw a saved voice too, which has no recording to show."""
    saved = tmp_path / "anna.safetensors"
    argv = ("--num-candidates", 2, "--max-new-tokens", 4, "--out", tmp_path / "out")
    assert cli("generate", OTHER, "--voice", voice, "--save-voice", saved, *argv).code == 0
    heights = []
    for place in (voice, saved):
        assert cli("generate", OTHER, "--voice", place, *argv).code == 0
        picture = (tmp_path / "out/candidates.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        heights.append(int.from_bytes(picture[20:24], "big"))
    assert heights[0] > heights[1] > 0


def test_latents_of_the_kept(generate, voice):
    _, out = generate(TEXT, "--voice", voice, "--latents", "--keep", 2)
    kept, latents = np.load(out / "codes.npz"), np.load(out / "latents.npz")
    hidden_size = load_checkpoint("random").model.config.decoder_config.hidden_size
    assert latents.files == [str(candidate) for candidate in kept["candidates"]] and len(latents.files) == 2
    for candidate, codes in zip(latents.files, kept["codes"], strict=True):
        length = cut_in_silence(codes, 83)
        assert latents[candidate].shape == (1, length, hidden_size) and latents[candidate].dtype == np.float32
        assert np.isfinite(latents[candidate]).all() and latents[candidate].std() > 0.1


def test_trimmed_scoring(cli, generate, voice):
    long = (TEXT, "--voice", voice, "--max-new-tokens", 90)
    _, padded = generate(*long)
    _, trimmed = generate(*long, "--scoring", "trimmed", out="trimmed")
    one, other = (json.loads((out / "candidates.json").read_text()) for out in (padded, trimmed))
    by_candidate = [
        sorted((row["candidate"], row["score"]) for row in document["candidates"]) for document in (one, other)
    ]
    assert by_candidate[0] != by_candidate[1]
    assert (one["settings"]["scoring"], other["settings"]["scoring"]) == ("padded", "trimmed")
    for out, document, mode in ((padded, one, "padded"), (trimmed, other, "trimmed")):
        outcome = cli("score", out / "codes.npz", TEXT, "--scoring", mode, "--json")
        ranked = json.loads(outcome.out)["candidates"]
        found = {row["candidate"]: row["score"] for row in ranked}  # by the numbers that codes.npz has
        scores = [found[row["candidate"]] for row in document["candidates"]]
        expected = [row["score"] for row in document["candidates"]]
        # The last three places are written over where a stop came, so that they are no longer what was judged.
        own = [mode == "padded" or row["tokens"] <= 87 or not row["stopped"] for row in document["candidates"]]
        assert sum(own) >= 3 and any(row["tokens"] < 85 for row in document["candidates"])
        np.testing.assert_allclose(*(np.array(some)[own] for some in (scores, expected)), rtol=1e-4, atol=1e-4)


def test_candidates_that_stop_at_once(cli, voice, tmp_path):
    """Write no score and no infinity for them, as they have nothing to judge, but draw a picture."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    build_random(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    stop = load_checkpoint("random").model.config.decoder_config.eos_token_id
    tensors["speech_decoder_model.lm_head.bias"][stop] = 1e4
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    for scoring in ("trimmed", "padded"):
        out = tmp_path / scoring
        argv = ("--voice", voice, "--checkpoint", checkpoint, "--out", out, *DRAWN, "--scoring", scoring)
        outcome = cli("generate", TEXT, *argv)
        assert outcome.code == 0, outcome.err
        assert "Infinity" not in (out / "candidates.json").read_text()
        rows = json.loads((out / "candidates.json").read_text())["candidates"]
        assert [(row["tokens"], row["stopped"]) for row in rows] == 5 * [(0, True)]
        assert [row["score"] is None for row in rows] == 5 * [scoring == "trimmed"]
        assert (out / "candidates.png").read_bytes().startswith(b"\x89PNG")
        assert set(codes(out)[:, :-3].flat) == {83}
        assert cli("score", out / "codes.npz", TEXT, "--checkpoint", checkpoint, "--scoring", scoring).code == 0


def test_failures_on_the_way(generate, fails, voice, tmp_path, monkeypatch):
    """Meet scores that are not finite, and errors of a request."""
    rank, calls = Ranker.rank, []

    def bad(self, *args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise ValueError("this text cannot be ranked")
        ranking = rank(self, *args, **options)
        return replace(ranking, scores=ranking.scores * float("nan")) if len(calls) == 1 else ranking

    monkeypatch.setattr(Ranker, "rank", bad)
    outcome, out = generate(OTHER, OTHER, OTHER, "--voice", voice, "--batch-size", 5, code=1)
    rows = json.loads((out / "summary.json").read_text())["requests"]
    assert [row["error"] for row in rows] == [
        "the scores are not finite in float32; try float32",
        "this text cannot be ranked",
        None,
    ]
    assert "note: 001-no: the scores are not finite" in outcome.err
    assert "2 of 3 requests failed" in outcome.err
    calls.clear()
    sentence = fails("generate", OTHER, "--voice", voice, "--out", tmp_path / "alone", *QUICK)
    assert sentence == "the scores are not finite in float32; try float32"
    assert not (tmp_path / "alone").exists()


def test_candidate_without_a_score_is_last():
    rows = report.ranking(np.array([-np.inf, -3.0]), np.array([0, 4]), np.array([True, True]))
    assert [(row["candidate"], row["score"]) for row in rows] == [(1, -3.0), (0, None)]
    report.print_ranking(rows)


def test_more_ways_to_draw(generate, voice):
    plain = codes(generate(TEXT, "--voice", voice)[1])
    for name, option in enumerate(
        (("--min-p", 0.9), ("--typical-p", 0.1), ("--top-k", 1), ("--repetition-penalty", 0.1))
    ):
        assert not np.array_equal(codes(generate(TEXT, "--voice", voice, *option, out=str(name))[1]), plain), option


def test_preset(cli, fails, voice, tmp_path):
    argv = ("generate", OTHER, "--voice", voice, "--out", tmp_path, "--max-new-tokens", 1, "--no-pictures")
    assert cli(*argv, "--preset", "fast", "--keep", 1).code == 0
    document = json.loads((tmp_path / "candidates.json").read_text())
    assert len(document["candidates"]) == document["settings"]["num_candidates"] == PRESETS["fast"] == 96
    assert len(codes(tmp_path)) == 1
    assert cli(*argv, "--preset", "fast", "--num-candidates", 3).code == 0
    assert len(codes(tmp_path)) == 3
    assert "--preset fast asks for many" in fails(*argv, "--preset", "fast", "--greedy")


@pytest.mark.parametrize(
    "texts, expected",
    [
        (["The doctor's 25 dollars!"], ["001-the-doctors-25-dollars"]),
        (["你好", "..", "a/../b"], ["001", "002", "003-a-b"]),
        (["x" * 60], ["001-" + "x" * 40]),
        (["the same", "the same"], ["001-the-same", "002-the-same"]),
    ],
)
def test_names_of_texts(texts, expected):
    assert text_folders(texts) == expected


def test_names_of_voices(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v1.5 alto").mkdir()
    places = ["a/Anna.wav", "b/anna.flac", "anna-2.mp3", "v1.5 alto", "v1.5 alto/", "..", "...wav", "x/é ü.ogg"]
    names = voice_names(places)
    assert names[:5] == ["Anna", "anna-2", "anna-2-2", "v1.5-alto", "v1.5-alto-2"]
    assert len({name.lower() for name in names}) == len(names) and names[-1] == "é-ü"
    assert all(name not in ("", ".", "..") and "/" not in name for name in names)
