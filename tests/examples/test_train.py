"""The recipe of examples/train: what it writes, spoils and counts, and trainings that are killed and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clvp_fast import CandidateEngine, CandidateRequest, ClvpFeatureExtractor, ClvpProcessor, SamplingParams, demo
from clvp_fast.checkpoint import load_checkpoint
from examples.train import (
    candidates,
    card,
    data,
    evaluate,
    judge,
    model,
    picture,
    quality,
    texts,
    train_decoder,
    train_scorer,
)
from examples.train.__main__ import _wait_for_codes, main
from examples.train.muon import orthogonal
from examples.train.state import STOP, Interrupted, Refused, Training, alone, draws
from examples.train.train_codec import make_codec, train_codec

ROOT = Path(__file__).resolve().parents[2]


def test_grammar_is_closed_and_the_same_for_a_seed():
    said = texts.unique(3, 800)
    assert said == texts.unique(3, 800) and said != texts.unique(4, 800)
    assert {word for line in said for word in line.split()} <= set(texts.WORDS)
    assert 450 <= len(texts.WORDS) <= 520 and max(map(len, said)) <= texts.LONGEST


def test_nothing_is_trained_on_sentences_that_are_judged():
    assert not set(texts.HELD_OUT) & set(texts.EVALUATION)
    lines = texts.Writer(0).sentences(texts.UNSEEN)
    assert texts.UNSEEN.isdisjoint(next(lines) for _ in range(2000))
    # The grammar alone would write some of them.
    first = next(texts.Writer(999).sentences())
    assert first in texts.UNSEEN and next(texts.Writer(999).sentences({first})) != first


def test_longest_sentence_has_room_in_the_model():
    longest = max(texts.unique(5, 3000), key=lambda line: len(model.ids_of(line)))
    assert len(model.ids_of(f"{longest}.")) + 3 <= model.MOST_TEXT
    assert model.tokenizer().unk_token_id not in model.ids_of(longest)


def test_orthogonal_pulls_singular_values_together():
    matrix = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 16)
    for x in (matrix, matrix.T):
        before, after = torch.linalg.svdvals(x), torch.linalg.svdvals(orthogonal(x, 8))
        assert before.max() / before.min() > 20
        assert after.min() > 0.5 and after.max() < 1.5
        assert (orthogonal(x, 8) * x).sum() > 0.5 * before.sum()  # the nearest one


@pytest.mark.parametrize(
    ("said", "heard", "share"),
    [
        ("the old man", "the old man", 0),
        ("the old man", "", 1),
        ("the old man", "the man", 1 / 3),
        ("the old man", "the very old man", 1 / 3),
        ("one two", "two one", 1),
        ("one", "one two three four", 1),
    ],
)
def test_word_errors(said, heard, share):
    assert judge.word_errors(said, heard) == pytest.approx(share)


def test_flat_language_model_gives_every_word_one_share():
    lines = judge.flat_model(["one", "two", "three"]).splitlines()
    assert "ngram 1=5" in lines and lines[-1] == "\\end\\"
    shares = {line.split()[0] for line in lines if line.endswith(("one", "two", "three", "</s>"))}
    assert len(shares) == 1 and 10 ** float(shares.pop()) == pytest.approx(1 / 4, abs=1e-3)


def test_wilcoxon_against_the_exact_distribution():
    # Of 12 differences without ties, the sum of ranks 66 or more has the exact chance 33 / 4096 (by enumeration).
    differences = np.arange(1, 13) * np.where(np.isin(np.arange(1, 13), [5, 7]), -1.0, 1.0)
    sums = np.array([sum(rank for rank in range(1, 13) if mask >> (rank - 1) & 1) for mask in range(4096)])
    exact = (sums >= 66).mean()
    assert evaluate.wilcoxon(differences) == pytest.approx(exact, rel=0.2)
    assert evaluate.wilcoxon(np.zeros(5)) == 1.0
    assert evaluate.standard_error(differences) == pytest.approx(differences.std(ddof=1) / 12**0.5, abs=1e-4)
    assert evaluate.wilcoxon(-differences) == pytest.approx(1 - exact, rel=0.02)


def test_summary_picks_by_score_within_each_group():
    # Of the first sentence, the groups of 4 pick errors of 0.25, 0, 0, 0; of the second 0, 1, 1, 1.
    rows = [
        {"voice": "heart", "errors": [0.5, 0.25, 1, 0.5, *[0] * 12], "scores": [1, 3, 2, 0, *[9] * 12]},
        {"voice": "rms", "errors": [0, 0.5, 1, 0.5, *[1] * 12], "scores": [4, 3, 2, 0, *[-9] * 12]},
    ]
    found = evaluate.summary(rows)
    assert found["best_of_4"]["picked"] == pytest.approx((0.25 + 3) / 8, abs=1e-4)
    assert found["best_of_4"]["least"] == pytest.approx((0.25 + 3) / 8, abs=1e-4)
    assert found["best_of_4"]["mean"] == found["best_of_16"]["mean"] == found["mean"]
    assert found["best_of_16"]["picked"] == 0 and "best_of_64" not in found


def test_spoilt_texts_and_codes_differ():
    random, codes, other = draws(0), torch.arange(40), torch.arange(100, 150)
    for line in texts.unique(8, 200):
        assert train_scorer.spoil_text(line, random) != line
    for _ in range(100):
        spoilt = train_scorer.spoil_codes(codes, other, random)
        assert not torch.equal(spoilt, codes) and 4 <= len(spoilt) <= model.MOST_CODES


def test_moved_codes_lie_one_level_beside():
    codes = torch.arange(1000)
    moved = train_scorer.move_codes(codes, draws(0))
    sizes = np.cumprod([1, 8, 5, 5])
    levels, others = (row.numpy()[:, None] // sizes % [8, 5, 5, 5] for row in (codes, moved))
    steps = np.abs(levels - others)
    assert 0 < (steps.sum(1) > 0).mean() < train_scorer.MOVED and steps.sum(1).max() == 1


def test_candidates_are_compared_a_few_times_in_the_last_steps():
    own = [
        ("", [], torch.tensor(errors)) for errors in ([0.0, 0.5], [0.2, 0.2], *[[0.0, 0.1 * n] for n in range(2, 22)])
    ]
    steps = [train_scorer.compared_at(left, own) for left in range(1, 9)]
    counts = [len(step) for step in steps]
    assert counts == [8, 8, 8, 8, 8, 2, 0, 0]  # 21 of them differ, and each has two turns
    seen = [id(item) for step in steps for item in step]
    assert set(map(seen.count, seen)) == {2} and id(own[1]) not in seen
    assert len(set(seen[:21])) == 21 and seen[:21] != seen[21:]
    assert train_scorer.compared_at(1, own[1:2]) == []


def test_own_pairs_want_fewer_errors_to_score_higher():
    compared = [("a b", [torch.ones(3), torch.ones(0), torch.ones(2), torch.ones(1)], torch.tensor([0, 0.3, 1, 0.5]))]
    right, share = train_scorer.own_pairs(torch.tensor([[3.0, 1, 2]]), compared)
    wrong, none = train_scorer.own_pairs(torch.tensor([[1.0, 3, 2]]), compared)
    assert share == 1 and none == 0 and wrong > right + 1


def test_target_ends_with_one_stop_token():
    codes, target = train_decoder.padded([torch.tensor([4, 5, 6]), torch.tensor([7])], stop=9)
    assert codes.tolist() == [[4, 5, 6], [7, 9, 9]]
    assert target.tolist() == [[4, 5, 6, 9], [7, 9, -100, -100]]


def test_corpus_takes_the_least_taken_of_one_length(tmp_path):
    said = [line for line in texts.unique(1, 400) if len(line) in (20, 21)][:12] * 2
    codes = np.arange(3 * len(said), dtype=np.int16)
    (tmp_path / "codes").mkdir()
    ends = np.arange(3, len(codes) + 1, 3)
    np.savez(tmp_path / "codes" / "00000.npz", codes=codes, ends=ends, said=np.array(said))
    corpus = data.Corpus(tmp_path, lambda line: [len(line)] * len(line))
    assert len(corpus) == len(said) and corpus.items[4][2].tolist() == [12, 13, 14] and corpus.items[5][0] == 1
    random = np.random.default_rng(0)
    for _ in range(60):
        chosen = corpus.batch(random, 4)
        assert len({len(corpus.ids[index]) for index in chosen}) == 1
    for same in corpus.by_length.values():
        assert np.ptp(corpus.taken[same]) <= 1


@pytest.fixture(scope="module")
def small():
    codec = make_codec(width=16)
    return codec, model.make_model(model.configuration(codec.num_codes, 5, hidden=64, layers=1, width=32)).eval()


def test_training_counts_positions_as_generation_does(small):
    """Greedy tokens of the engine, of `generate()` in either way and of the training's own logits are the same."""
    _, clvp = small
    assert clvp.config.decoder_config.contiguous_positions is True
    clip = torch.randn(1, 80, 120, generator=torch.Generator().manual_seed(1)) - 5
    ids = torch.tensor([model.ids_of("the old man slept.")])
    with torch.no_grad():
        voices, codes = clvp.conditioning_encoder.encode_voice(clip), torch.zeros(1, 0, dtype=torch.long)
        for _ in range(12):
            logits = train_decoder.speech_logits(clvp, voices, ids, codes)
            codes = torch.cat([codes, logits[:, -1:].argmax(-1)], 1)
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "repetition_penalty": 1.0}
    for use_engine in (True, False):
        drawn = clvp.generate(ids, clip, use_engine=use_engine, **settings).sequences
        assert drawn[:, 1:].tolist() == codes.tolist()
    engine = CandidateEngine(clvp, ClvpProcessor(ClvpFeatureExtractor(), model.tokenizer()))
    sampling = SamplingParams(do_sample=False, max_new_tokens=12, repetition_penalty=1.0)
    (result,) = engine.generate([CandidateRequest(input_ids=ids[0], input_features=clip)], sampling)
    assert result.codes[0, :12].tolist() == codes[0].tolist()


def test_trained_scores_are_the_rankers(small):
    """Compare the scorer's own embeddings with those of the engine's ranker, padded and trimmed."""
    from clvp_fast.engine.ranking import Ranker

    _, clvp = small
    part = train_scorer.ScorerPart(clvp)
    rows, line = [torch.arange(9), torch.arange(30, 50)], "hello there."
    for mode, length in (("padded", model.MOST_CODES), ("trimmed", None)):
        with torch.no_grad():
            own = (part.texts([line]) @ part.speech(rows, length).T * clvp.logit_scale.exp())[0]
        ranked = Ranker(clvp, mode=mode, pad_to=model.MOST_CODES + 1).rank(list(model.ids_of(line)), rows)
        torch.testing.assert_close(own, ranked.scores, rtol=1e-4, atol=1e-4)


def _line(folder, steps: int) -> tuple[nn.Module, Training]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    return layer, Training(folder, "line", layer, [torch.optim.AdamW(layer.parameters(), lr=0.1)], steps, every=1e9)


def _learn(layer: nn.Module, training: Training, until: int | None = None) -> None:
    for step in training:
        training.learn(layer(torch.tensor(draws(step).standard_normal((4, 3)), dtype=torch.float32)).square().mean())
        STOP.requested = step + 1 == until


def test_a_training_that_was_stopped_gives_the_weights_of_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(STOP, "requested", False)
    whole, training = _line(tmp_path / "whole", 9)
    _learn(whole, training)
    stopped, training = _line(tmp_path / "stopped", 9)
    with pytest.raises(Interrupted):
        _learn(stopped, training, until=4)
    STOP.requested = False
    again, training = _line(tmp_path / "stopped", 9)
    assert training.step == 4 and torch.equal(again.weight, stopped.weight)
    _learn(again, training)
    assert torch.equal(again.weight, whole.weight) and not torch.equal(stopped.weight, whole.weight)
    averages = torch.load(tmp_path / "whole" / "line.pt", weights_only=True)["averages"]
    assert torch.equal(averages["weight"], training.averages["weight"])


KILLED = """
import itertools, sys
from pathlib import Path
import torch
from examples.train.state import STOP, Training
STOP.listen()
layer = torch.nn.Linear(3, 2)
training = Training(Path(sys.argv[1]), "line", layer, [torch.optim.SGD(layer.parameters(), lr=0.1)], 10**9, every=1e9)
for step in training:
    training.learn(layer(torch.ones(1, 3)).square().mean())
    if step == 20:
        print("under way", flush=True)
"""


def test_sigterm_saves_first(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"under way\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert b"Interrupted" in said
    assert torch.load(tmp_path / "line.pt", weights_only=True)["step"] > 20
    assert [path.name for path in tmp_path.iterdir()] == ["line.pt"]


def test_two_processes_do_not_work_on_one_state(tmp_path):
    holder = "import sys; from pathlib import Path; from examples.train.state import alone\n"
    holder += "with alone(Path(sys.argv[1]), 'train'):\n    print('held', flush=True); sys.stdin.read()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(Refused, match="another process works on"), alone(tmp_path, "train"):
            pass
        with alone(tmp_path, "material"):  # the process beside it
            pass
        process.kill()
    with alone(tmp_path, "train"):
        pass


def test_a_child_ends_when_its_parent_is_gone(monkeypatch):
    monkeypatch.setattr(STOP, "requested", False)
    monkeypatch.setattr(STOP, "parent", os.getppid())
    STOP.check()
    monkeypatch.setattr(STOP, "parent", os.getppid() + 1)
    with pytest.raises(Interrupted):
        STOP.wait(0)


def test_without_flite_one_sentence_says_so(tmp_path, monkeypatch, capsys):
    from examples.train import voices

    voices.voice.cache_clear()
    monkeypatch.setenv("CLVP_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(voices, "NAMES", ("rms", "rms"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(STOP, "listen", lambda parent: STOP)
    monkeypatch.setattr(demo, "TRAINED", tmp_path / "none")
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "error: the program flite is not installed: apt-get install flite\n"
    assert main(["export", str(tmp_path / "out")]) == 1
    missing = f"error: there is no codec.pt in {tmp_path}/train yet: train first\n"
    assert capsys.readouterr().err == missing and not (tmp_path / "out").exists()


def test_a_codec_is_not_trained_under_codes_that_are_there(tmp_path, monkeypatch, small):
    monkeypatch.setattr(data, "make_speech", lambda folder, count: [])
    monkeypatch.setattr(data, "make_clips", lambda folder: torch.randn(2, 1, 80, 20) - 5)
    Training(tmp_path, "codec", small[0], [torch.optim.AdamW(small[0].parameters())], 1).save()
    (tmp_path / "codes").mkdir()
    with pytest.raises(Refused, match=r"from step 0 to 3, and codes of \S+ are of the codec as it was: remove them"):
        train_codec(tmp_path, make_codec(width=16), 3, 0)


def test_the_way_back_is_trained_on_and_codes_stay(tmp_path, monkeypatch):
    """Once three quarters of its steps are done, a codec learns the way back alone, so its codes stay true."""
    monkeypatch.setattr(data, "make_speech", lambda folder, count: [None])
    monkeypatch.setattr(data, "make_clips", lambda folder: torch.randn(2, 1, 80, 20) - 5)
    monkeypatch.setattr(data, "read_speech", lambda path: [(0, torch.randn(80, 120) - 5)])
    codec = make_codec(width=16)
    training = Training(tmp_path, "codec", codec, [torch.optim.AdamW(codec.parameters())], 9)
    training.step = 9
    training.save()
    (tmp_path / "codes").mkdir()
    trained = make_codec(width=16)
    train_codec(tmp_path, trained, 12, 1)
    was, now = codec.state_dict(), trained.state_dict()
    changed = {name.split(".")[0] for name in was if not torch.equal(was[name], now[name])}
    assert changed == {"voice", "expand", "decoder", "leave", "smooth"}


def test_codes_of_speech_made_ahead_are_those_of_speech_made_in_time(tmp_path, monkeypatch):
    """Speech that is made while the codec is trained gives the same codes, and is removed behind them."""

    def speak(said: str, seed: int) -> np.ndarray:
        return draws(seed).standard_normal(2000 + 300 * len(said)).astype(np.float32) / 10

    monkeypatch.setattr(data.voices, "voice", lambda name: speak)
    monkeypatch.setattr(data, "SENTENCES", 3)
    in_time, ahead = tmp_path / "in_time", tmp_path / "ahead"
    told = iter([False, False, True])
    data.speak_ahead(ahead, 9, enough=lambda: next(told))
    assert sorted(path.name for path in (ahead / "ahead").iterdir()) == ["00000.npz", "00001.npz"]
    codec = make_codec(width=16)
    torch.nn.init.normal_(codec.quantise.weight, std=3)  # codes that differ
    for folder in (in_time, ahead):
        data.stream_codes(folder, codec, 3)
    for name in ("00000.npz", "00001.npz", "00002.npz"):
        one, other = data.read_codes(in_time / "codes" / name), data.read_codes(ahead / "codes" / name)
        assert [row[:2] for row in one] == [row[:2] for row in other] and len(one) == 3
        assert all(torch.equal(mine[2], theirs[2]) for mine, theirs in zip(one, other, strict=True))
    assert not list((ahead / "ahead").iterdir())


def test_candidates_come_back_as_they_were_kept(tmp_path):
    rows = [np.arange(n, dtype=np.int16) for n in (3, 0, 2, 5)]
    ends, said = np.cumsum([len(row) for row in rows]), np.array(["one", "two"])
    errors = np.array([0, 1, 0.5, 0.25])
    np.savez(tmp_path / "0.npz", codes=np.concatenate(rows), ends=ends, said=said, errors=errors)
    first, second = candidates.read_candidates(tmp_path / "0.npz")
    assert first[0] == "one" and [len(row) for row in first[1]] == [3, 0] and first[2].tolist() == [0, 1]
    assert second[1][1].tolist() == [0, 1, 2, 3, 4] and second[2].tolist() == [0.5, 0.25]


def test_small_recipe_end_to_end_is_exported_and_loaded(tmp_path, monkeypatch, small):
    """Decoder and scorer of tiny sizes learn from codes of noise; what is exported is a checkpoint with a vocoder."""
    from clvp_fast.checkpoint import load_checkpoint

    codec, _ = small
    monkeypatch.setattr(STOP, "requested", False)
    monkeypatch.setattr(train_decoder, "BATCH", 4)
    monkeypatch.setattr(train_scorer, "BATCH", 6)
    monkeypatch.setattr(data, "make_clips", lambda folder: torch.randn(2, 3, 80, 40) - 5)
    monkeypatch.setattr(data, "make_held_out", lambda folder, codec: [])
    monkeypatch.setattr(model, "make_codec", lambda: make_codec(width=16))
    monkeypatch.setattr(model, "configuration", lambda *known: _tiny(*known))
    Training(tmp_path, "codec", codec, [], 1).save()
    (tmp_path / "codes").mkdir()
    (tmp_path / "candidates").mkdir()
    said, random = np.array(texts.unique(2, 60)), np.random.default_rng(0)
    codes = random.integers(0, 1000, 60 * 8).astype(np.int16)
    np.savez(tmp_path / "codes" / "00000.npz", codes=codes, ends=np.arange(8, 481, 8), said=said)
    np.savez(
        tmp_path / "candidates" / "0000.npz",
        codes=codes[:64],
        ends=np.arange(8, 65, 8),
        said=said[:2],
        errors=np.tile([0, 0.5, 1, 0.2], 2),
    )
    clvp = model.make_model(_tiny(codec.num_codes, model.silence_of(codec)))
    started = time.process_time()
    train_decoder.train_decoder(tmp_path, clvp, codec, 3)
    train_scorer.train_scorer(tmp_path, clvp, 3)
    assert time.process_time() - started < 60
    loaded = load_checkpoint(model.export(tmp_path, tmp_path / "out"))
    assert loaded.vocoder is not None and loaded.vocoder.codec.num_codes == 1000
    assert loaded.tokenizer.domain_words == texts.WORDS
    kept = torch.load(tmp_path / "scorer.pt", weights_only=True)["averages"]
    weight = "speech_encoder_model.token_embedding.weight"
    torch.testing.assert_close(loaded.model.state_dict()[weight], kept[weight], rtol=1e-3, atol=1e-3)
    (tmp_path / model.USES).write_text("{}\n")
    card.write(tmp_path, tmp_path / "out")
    # Where the state is gone, what was exported is gone on from.
    again = tmp_path / "again"
    assert model.go_on_from(again, tmp_path / "out") == ["codec", "decoder", "scorer"]
    assert model.steps_of(again) == model.steps_of(tmp_path) and model.go_on_from(again, tmp_path / "out") == []
    assert (again / model.USES).read_text() == "{}\n"
    gone_on = torch.load(again / "scorer.pt", weights_only=True)["weights"]
    assert gone_on.keys() == kept.keys()
    torch.testing.assert_close(gone_on[weight], kept[weight], rtol=1e-3, atol=1e-3)
    (again / "codes").mkdir()
    (again / "codes" / "00000.npz").write_bytes((tmp_path / "codes" / "00000.npz").read_bytes())
    train_decoder.train_decoder(again, clvp, codec, 5)
    assert model.steps_of(again)["decoder"][0] == 5
    assert loaded.model.config.decoder_config.decoder_fixing_codes == [model.silence_of(codec)] * 4


def test_a_card_is_held_to_a_measurement(tmp_path, monkeypatch):
    def figures(mean, picked, sentences=100):
        best = {"picked": picked, "picked_error": 0.03}
        return {"kind": "open", "candidates": 16, "sentences": sentences, "mean": mean, "mean_error": 0.02} | {
            "best_of_16": best
        }

    lines, good = quality.compare(figures(0.30, 0.2, 60), figures(0.33, 0.25))
    assert good and lines == [
        "open language model, 60 sentences of 16 candidates",
        "  mean candidate: word errors 0.300 ± 0.020, card 0.330 ± 0.020: as the card says",
        "  picked of 16: word errors 0.200 ± 0.030, card 0.250 ± 0.030: as the card says",
    ]
    lines, good = quality.compare(figures(0.30, 0.2), figures(0.31, 0.33))
    assert not good and ": as the card" in lines[1] and lines[2].endswith("0.330 ± 0.030: not as the card says")
    with pytest.raises(Refused, match=r"has no figures\.json: export a trained checkpoint there first"):
        next(quality.quality(tmp_path, tmp_path, 100))
    card = tmp_path / "figures.json"
    card.write_text("[]")
    with pytest.raises(Refused, match="has no figures: evaluate it first, and export it again"):
        next(quality.quality(tmp_path, tmp_path, 100))
    # Of each evaluation, as many sentences as may be heard, and at least one.
    told = [figures(0.3, 0.2, sentences=3), figures(0.3, 0.2) | {"candidates": 64, "kind": "closed"}]
    card.write_text(json.dumps(told))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(model, "go_on_from", lambda work, checkpoint: [])
    monkeypatch.setattr(evaluate, "evaluate", lambda work, *asked: asked)
    assert list(quality.quality(tmp_path, tmp_path, 100)) == [((3, 16, "open"), told[0]), ((1, 64, "closed"), told[1])]


def test_card_has_the_figures_of_this_decoder_and_scorer_alone(tmp_path):
    layer = nn.Linear(1, 1)
    for part, steps in (("codec", 7), ("decoder", 40), ("scorer", 60)):
        training = Training(tmp_path, part, layer, [], steps)
        training.step, training.spent = steps, 120.0
        training.save()
    row = {"said": "one", "voice": "rms", "errors": [0.5, 0.25, 1, 0.5], "scores": [0, 3, 1, 2], "scorer": 60}
    heard = [row] * 3 + [row | {"scorer": 59}] * 2
    for name, rows in (("evaluation-40-4-open", heard), ("evaluation-39-4-open", [row] * 6)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = card.card(tmp_path)
    assert "| decoder | 40 | 2 |" in text
    assert "| open | 3 | 4 | 0.562 | 0.250 ± 0.000 | 0.250 |" in text
    assert "| 5 | 4 |" not in text and "| 6 |" not in text
    # More candidates of as many sentences have figures of fewer candidates too.
    more = row | {"errors": [1.0] * 16, "scores": list(range(16))}
    (tmp_path / "evaluation-40-16-open.jsonl").write_text((json.dumps(more) + "\n") * 3)
    rows = [line for line in card.card(tmp_path).splitlines() if line.startswith("| open")]
    assert [line[:24] for line in rows] == ["| open | 3 | 4 | 1.000 |", "| open | 3 | 16 | 1.000 "]
    (tmp_path / "evaluation-40-16-open.jsonl").unlink()
    assert "Ranking gains nothing here" in text
    (tmp_path / "evaluation-40-4-open.jsonl").unlink()
    assert "Nothing was measured of this checkpoint." in card.card(tmp_path)


def test_a_training_without_its_helper_says_what_to_do(tmp_path):
    helper = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    helper.wait()
    with pytest.raises(Refused, match="ended with 3 and made none; it says why above: the same command goes on"):
        _wait_for_codes(tmp_path, helper)


def test_the_picture_of_ranking_shows_the_figures_of_the_package(tmp_path, capsys):
    figures = card.read_figures(demo.TRAINED)
    shown = picture.content(figures)
    assert set(shown) == {"open", "closed"} and all(len(points) >= 2 for points in shown.values())
    committed = ROOT / "docs/pictures/ranking.svg"
    assert committed.read_text().endswith(picture.mark(figures) + "\n"), "python -m examples.train picture renews it"
    assert main(["picture", str(tmp_path / "new.svg")]) == 0
    drawn = (tmp_path / "new.svg").read_text()
    assert drawn.endswith(picture.mark(figures) + "\n") and "the candidate with the highest score" in drawn


def test_candidates_are_ranked_as_an_engine_ranks_them():
    clvp = load_checkpoint("demo").model
    engine = CandidateEngine(clvp, ClvpProcessor(ClvpFeatureExtractor(), model.tokenizer()))
    said, mel = "seven cold rivers", torch.zeros(1, 80, 600)
    (result,) = engine.generate([CandidateRequest(text=said, input_features=mel, id=0)], candidates.sampling(4, seed=3))
    codes = [row[:length].tolist() for row, length in zip(result.codes, result.lengths, strict=True)]
    old = {"said": said, "codes": codes, "scores": [0.0] * 4, "scorer": 7}
    kept, again = evaluate.ranked([old, {"said": said, "codes": codes}], clvp, 7)
    assert kept["scores"] == [0.0] * 4 and again["scorer"] == 7
    assert again["scores"] == pytest.approx(result.scores.tolist(), rel=1e-4)


_TINY = model.configuration


def _tiny(num_codes: int, silence: int):
    return _TINY(num_codes, silence, hidden=64, layers=1, width=32)
