"""The checkpoint `demo` means something: texts find their speech, and candidates say their text, on every way.

tests/data/demo_speech.npz has codes of 64 sentences that nothing was trained on (`python -m examples.train test-data`).
Bars lie below the measured shares by more than chance moves them.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from clvp_fast import CandidateEngine, CandidateRequest, Ranker, SamplingParams
from clvp_fast.audio import load_audio
from clvp_fast.checkpoint import load_checkpoint
from clvp_fast.cli import main
from examples.train import data, judge, texts

ROOT = Path(__file__).resolve().parents[1]
VOICE = ROOT / "examples/voice.flac"
LONGEST = 120  # codes
GREEDY = SamplingParams(do_sample=False, max_new_tokens=60, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint("demo", device="cpu")


@pytest.fixture(scope="module")
def speech():
    """Return 64 sentences and their codes."""
    rows = data.read_codes(ROOT / "tests/data/demo_speech.npz")
    return [said for _, said, _ in rows], [codes for *_, codes in rows]


def scores(checkpoint, lines, rows):
    """Return scores `[lines, rows]` as the engine ranks them."""
    ranker = Ranker(checkpoint.model, pad_to=LONGEST + 1)
    ids = [checkpoint.tokenizer(line)["input_ids"] for line in lines]
    return np.stack([np.asarray(ranker.rank(text, rows).scores) for text in ids])


def test_a_text_finds_its_speech_among_64(checkpoint, speech):
    found = scores(checkpoint, *speech)
    right = np.arange(len(found))
    assert (found.argmax(1) == right).mean() > 0.88  # measured: 0.95
    assert (found.argmax(0) == right).mean() > 0.85  # measured: 0.94


def test_the_right_text_scores_above_one_with_a_word_replaced(checkpoint, speech):
    lines, rows = speech
    random = np.random.default_rng(0)
    ahead = []
    for line, codes in zip(lines, rows, strict=True):
        words = line.split()
        place = int(random.integers(len(words)))
        other = str(random.choice([word for word in texts.WORDS if word != words[place]]))
        changed = " ".join([*words[:place], other, *words[place + 1 :]])
        right, wrong = scores(checkpoint, [line, changed], [codes])[:, 0]
        ahead.append(right > wrong)
    assert np.mean(ahead) > 0.8  # measured: 0.91


def test_candidates_say_their_own_text(checkpoint, speech):
    lines = speech[0][:8]
    samples, _ = load_audio(VOICE, 22050)
    engine = CandidateEngine(checkpoint.model, checkpoint.processor)
    sampling = SamplingParams(num_candidates=4, seed=0, max_new_tokens=LONGEST, repetition_penalty=1.0)
    requests = [CandidateRequest(text=line, audio=samples, sampling_rate=22050, id=k) for k, line in enumerate(lines)]
    results = sorted(engine.generate(requests, sampling), key=lambda result: result.request.id)
    rows = [torch.from_numpy(row[:n]) for one in results for row, n in zip(one.codes, one.lengths, strict=True)]
    own = scores(checkpoint, lines, rows).argmax(0) == np.repeat(np.arange(len(lines)), 4)
    assert own.mean() > 0.85  # measured: 1.0


def test_engine_command_line_and_generate_give_the_same_greedy_tokens(checkpoint, tmp_path):
    assert checkpoint.model.config.decoder_config.contiguous_positions is True
    text, (samples, _) = "the old man found a golden ring", load_audio(VOICE, 22050)
    engine = CandidateEngine(checkpoint.model, checkpoint.processor)
    request = CandidateRequest(text=text, audio=samples, sampling_rate=22050)
    (result,) = engine.generate([request], GREEDY)
    drawn = result.codes[0, : result.lengths[0]].tolist()
    assert len(drawn) > 20 and len(set(drawn)) > 10
    inputs = checkpoint.processor(text=text, raw_speech=samples, sampling_rate=22050, return_tensors="pt")
    for use_engine in (True, False):
        sequences = checkpoint.model.generate(
            inputs["input_ids"],
            inputs["input_features"],
            max_new_tokens=60,
            do_sample=False,
            repetition_penalty=1.0,
            use_engine=use_engine,
            return_dict_in_generate=True,
        ).sequences
        assert sequences[0, 1 : 1 + len(drawn)].tolist() == drawn
    argv = ["generate", text, "--voice", VOICE, "--greedy", "--repetition-penalty", 1, "--max-new-tokens", 60]
    assert main([str(part) for part in [*argv, "--no-pictures", "--out", tmp_path]]) == 0
    with np.load(tmp_path / "codes.npz") as kept:
        assert kept["codes"][0, : kept["lengths"][0]].tolist() == drawn


def test_a_recogniser_understands_the_sentences_that_readme_and_demo_say(tmp_path):
    pytest.importorskip("pocketsphinx", reason="the recogniser is not installed: pip install pocketsphinx")
    readme, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    of_readme = re.findall(r'clvp-fast generate "(.+?)"|text="(.+?)"', readme)
    shown = {"".join(found) for found in of_readme} | set(re.findall("^DEMO_TEXT := (.+)$", makefile, re.MULTILINE))
    assert len(shown) == 3
    for number, text in enumerate(sorted(shown)):
        out = tmp_path / str(number)
        argv = ["generate", text, "--voice", VOICE, "--keep", 1, "--listen", "--no-pictures", "--out", out]
        assert main([str(part) for part in argv]) == 0
        samples, _ = load_audio(next((out / "sound").iterdir()), 22050)
        said = re.sub("[^a-z ]", "", text.lower())
        wrong = judge.word_errors(said, judge.hear(samples, "open")) * len(said.split())
        assert wrong < 1.5, (text, judge.hear(samples, "open"))
