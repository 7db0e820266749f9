"""The engine's draws against transformers' distribution: its own model's logits through its own processors.

The vocabulary has 8 tokens, so that every continuation of a prompt can be written down, with its exact probability:
chi-squared then looks at each position, and at each pair of neighbouring ones, over thousands of candidates that the
engine has decoded as one batch, the requests of all settings among one another.
"""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import clvp_fast
from clvp_fast.engine.engine import CandidateEngine
from clvp_fast.engine.requests import CandidateRequest
from clvp_fast.engine.sampling_params import SamplingParams
from tests.kit.processors import processors
from tests.models.clvp.builders import clips, composite_config, texts

VOCAB, START, STOP, STEPS, CANDIDATES = 8, 6, 7, 6, 5000
NEUTRAL = dict(temperature=1.0, top_p=1.0, repetition_penalty=1.0, penalize_prompt=False)
SETTINGS = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "top-k": dict(top_k=3),
    "top-p": dict(top_p=0.7),
    "typical": dict(typical_p=0.6),
    "min-p": dict(min_p=0.2),
    "penalty": dict(repetition_penalty=1.8),
    "tortoise": dict(temperature=0.8, top_p=0.8, repetition_penalty=2.0),
    "prompt of 1s": dict(repetition_penalty=2.0, penalize_prompt=True),
    "all": dict(temperature=1.4, top_k=6, top_p=0.95, min_p=0.03, typical_p=0.85, repetition_penalty=1.3),
    "tortoise, typical": dict(temperature=0.8, top_k=6, top_p=0.9, repetition_penalty=1.6, typical_mass=0.6),
    "greedy": dict(do_sample=False, repetition_penalty=1.3),
}
#: Settings that a mistake could lead to. The test that accepts the right one refuses each of these.
MISTAKES = {
    "plain": [dict(temperature=1.07), dict(min_p=0.03), dict(repetition_penalty=1.05)],
    "temperature": [dict(temperature=0.75), dict(temperature=0.65), dict(temperature=1 / 0.7)],
    "top-k": [dict(top_k=4), dict(top_k=2)],
    "top-p": [dict(top_p=0.78), dict(top_p=0.62)],
    "typical": [dict(typical_p=0.7), dict(typical_p=0.5)],
    "min-p": [dict(min_p=0.24), dict(min_p=0.16)],
    "penalty": [dict(repetition_penalty=1.95), dict(repetition_penalty=1 / 1.8)],
    "prompt of 1s": [dict(repetition_penalty=2.0)],
    "tortoise, typical": [
        dict(temperature=0.8, top_k=6, top_p=0.9, repetition_penalty=1.6),
        dict(temperature=0.8, top_k=6, top_p=0.9, repetition_penalty=1.6, typical_p=0.6),
        dict(temperature=0.8, top_k=6, top_p=0.9, repetition_penalty=1.6, typical_mass=0.7),
    ],
    "tortoise": [
        dict(temperature=0.86, top_p=0.8, repetition_penalty=2.0),
        dict(temperature=0.8, top_p=0.86, repetition_penalty=2.0),
        dict(temperature=0.8, top_p=0.8, repetition_penalty=2.25),
    ],
}


def pair():
    """Stock and own model of equal weights; logits spread by about 1.5, the stop token as likely as others."""
    sizes = dict(hidden_size=32, num_attention_heads=2, intermediate_size=64, use_rotary_embedding=False)
    models = []
    for package in (transformers, clvp_fast):
        config = composite_config(package, **sizes)
        decoder = config.decoder_config
        decoder.vocab_size, decoder.bos_token_id, decoder.eos_token_id = VOCAB, START, STOP
        models.append(package.ClvpModelForConditionalGeneration(config).eval())
    stock, ours = models
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            scale = 0.3 if name.endswith("bias") or "norm" in name else 1.5 if "embeds_layer" in name else 0.25
            parameter.copy_("norm" in name and name.endswith("weight"))
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


class Continuations:
    """Every continuation of a prompt that has not stopped, by its length, with the logits of stock's next token.

    prefixes: `[count, length]`, in lexicographic order; logits: `[count, VOCAB]`.
    """

    @torch.no_grad()
    def __init__(self, stock, prompt):
        decoder = stock.speech_decoder_model
        going_on = [token for token in range(VOCAB) if token != STOP]
        self.prefixes = [torch.empty(1, 0, dtype=torch.long)]
        for _ in range(STEPS - 1):
            longer = [F.pad(self.prefixes[-1], (0, 1), value=token) for token in going_on]
            self.prefixes.append(torch.stack(longer, 1).flatten(0, 1))
        self.logits = [self._logits(decoder, prompt, prefixes) for prefixes in self.prefixes]

    @staticmethod
    def _logits(decoder, prompt, prefixes):
        layer = decoder.model.decoder
        places = torch.arange(1 + prefixes.shape[1])
        speech = layer.input_embeds_layer(F.pad(prefixes, (1, 0), value=START))
        speech = speech + layer.position_embeds_layer(places + (places > 0))
        embeds = torch.cat((prompt.expand(len(prefixes), -1, -1), speech), 1)
        # Prompt and tokens have their positions already: stock adds position 0 to all of them.
        nowhere = torch.zeros(1, embeds.shape[1], dtype=torch.long)
        embeds = embeds - layer.position_embeds_layer(nowhere)
        return torch.cat(
            [decoder(inputs_embeds=part, position_ids=nowhere).logits[:, -1] for part in embeds.split(4096)]
        )

    def place(self, tokens):
        """Return the row of a continuation among those of its length."""
        return int((self.prefixes[len(tokens)] == torch.tensor(tokens)).all(1).nonzero())

    def processed(self, length, settings):
        """Return transformers' scores `[count, VOCAB]` after continuations of a length and the original's prompt."""
        ids = F.pad(self.prefixes[length], (1, 0), value=START)
        if settings.get("penalize_prompt"):
            ids = F.pad(ids, (3, 0), value=1)
        return processors(settings)(ids, self.logits[length].clone())

    def joint(self, settings):
        """Return the exact probability of each token at each position and of each pair of neighbours.

        `[STEPS, VOCAB + 1]` and `[STEPS - 1, VOCAB + 1, VOCAB + 1]`; index VOCAB: the candidate has stopped before.
        """
        single = torch.zeros(STEPS, VOCAB + 1, dtype=torch.float64)
        double = torch.zeros(STEPS - 1, VOCAB + 1, VOCAB + 1, dtype=torch.float64)
        going_on = [token for token in range(VOCAB) if token != STOP]
        reached, stopped, last = torch.ones(1, dtype=torch.float64), 0.0, None
        for step in range(STEPS):
            chances = self.processed(step, settings).double().softmax(-1) * reached[:, None]
            single[step, :VOCAB], single[step, VOCAB] = chances.sum(0), stopped
            if step:
                double[step - 1, :, :VOCAB].index_add_(0, last, chances)
                double[step - 1, STOP, VOCAB] = single[step - 1, STOP]
                double[step - 1, VOCAB, VOCAB] = single[step - 1, VOCAB]
            stopped += float(chances[:, STOP].sum())
            last = torch.tensor(going_on).repeat(len(chances))
            reached = chances[:, going_on].flatten()
        return single.numpy(), double.numpy()


def counted(result):
    """Count each token, and each pair of neighbours, laid out as by `joint`."""
    tokens = np.full((len(result.codes), STEPS), VOCAB)
    tokens[:, : result.codes.shape[1]] = result.codes
    places = np.arange(STEPS)
    ends = result.lengths[:, None]
    tokens = np.where(places > ends, VOCAB, np.where((places == ends) & (ends < STEPS), STOP, tokens))
    single = np.stack([np.bincount(column, minlength=VOCAB + 1) for column in tokens.T])
    double = np.zeros((STEPS - 1, VOCAB + 1, VOCAB + 1), dtype=np.int64)
    for table, (first, second) in zip(double, pairwise(tokens.T), strict=True):
        np.add.at(table, (first, second), 1)
    return single, double


def excess(drawn, exact):
    """Return how far chi-squared is above its mean, in standard deviations; infinite where the impossible was drawn.

    Cells in which fewer than 5 are expected are taken together.
    """
    drawn, exact = drawn.ravel().astype(float), exact.ravel()
    if drawn[exact == 0].any():
        return np.inf
    expected = exact * drawn.sum()
    common = expected >= 5
    rest = expected[~common].sum()
    if rest >= 1:
        drawn = np.append(drawn[common], drawn[~common].sum())
        expected = np.append(expected[common], rest)
    else:
        drawn, expected = drawn[common], expected[common]
    degrees = max(len(expected) - 1, 1)
    return (((drawn - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5


@pytest.fixture(scope="module")
def models():
    return pair()


@pytest.fixture(scope="module")
def prompt_inputs():
    return texts(1, 9), clips(1)


@pytest.fixture(scope="module")
def prompt(models, prompt_inputs):
    """Give a prompt as Tortoise makes it: one stop token behind the text, then the encoder's own start and stop."""
    ids, features = prompt_inputs
    with torch.no_grad():
        return models[0].conditioning_encoder(features, F.pad(ids, (0, 1)))


@pytest.fixture(scope="module")
def continuations(models, prompt):
    return Continuations(models[0], prompt)


@pytest.fixture(scope="module")
def drawn(models, prompt_inputs):
    """Give, by setting, the result of its request; one changing batch decoded them all."""
    ids, features = prompt_inputs
    processor = SimpleNamespace(feature_extractor=clvp_fast.ClvpFeatureExtractor(feature_size=20), tokenizer=None)
    engine = CandidateEngine(models[1], processor, max_batch=600, max_new_tokens=STEPS)
    requests = {}
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        count = CANDIDATES if settings.get("do_sample", True) else 1
        sampling = SamplingParams(**NEUTRAL | settings, num_candidates=count, max_new_tokens=STEPS, seed=seed)
        requests[CandidateRequest(input_ids=ids[0], input_features=features, sampling=sampling)] = name
    results = {requests[result.request]: result for result in engine.generate(requests)}
    assert not any(result.error for result in results.values())
    return results


SAMPLED = [name for name, settings in SETTINGS.items() if settings.get("do_sample", True)]


@pytest.mark.parametrize(
    "name", [name for name in SAMPLED if not {"penalize_prompt", "typical_mass"} & {*SETTINGS[name]}]
)
def test_the_table_is_that_of_generation(models, prompt, continuations, name):
    """Compare logits and scores of every step of transformers' own sampling with the table."""
    settings = dict(top_k=0) | SETTINGS[name]
    torch.manual_seed(0)
    with torch.no_grad():
        output = models[0].speech_decoder_model.generate(
            conditioning_embeds=prompt,
            attention_mask=torch.ones(1, prompt.shape[1] + 1, dtype=torch.long),
            do_sample=True,
            num_return_sequences=20,
            max_new_tokens=STEPS,
            eos_token_id=STOP,
            pad_token_id=STOP,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            **settings,
        )
    compared = 0
    for index, row in enumerate(output.sequences[:, 1:].tolist()):
        for step in range(row.index(STOP) + 1 if STOP in row else STEPS):
            place = continuations.place(row[:step])
            scores = continuations.processed(step, SETTINGS[name])[place]
            torch.testing.assert_close(output.logits[step][index], continuations.logits[step][place])
            torch.testing.assert_close(output.scores[step][index], scores)
            compared += 1
    assert compared > 40


@pytest.mark.parametrize("name", SAMPLED)
def test_every_position_has_transformers_distribution(drawn, continuations, name):
    exact = continuations.joint(SETTINGS[name])
    for table in exact:
        np.testing.assert_allclose(table.reshape(len(table), -1).sum(1), 1, rtol=1e-9)
    for kind, found, expected in zip(("token", "pair"), counted(drawn[name]), exact, strict=True):
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert one.sum() == CANDIDATES
            assert excess(one, other) < 5, f"{kind} {place}"


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_setting_would_be_seen(drawn, continuations, name):
    for wrong in MISTAKES[name]:
        tables = zip(counted(drawn[name]), continuations.joint(wrong), strict=True)
        worst = max(excess(*pair) for table in tables for pair in zip(*table, strict=True))
        assert worst > 5, wrong


def test_the_greedy_candidate_among_them(drawn, continuations):
    tokens = []
    while len(tokens) < STEPS and STOP not in tokens:
        scores = continuations.processed(len(tokens), dict(repetition_penalty=SETTINGS["greedy"]["repetition_penalty"]))
        tokens.append(int(scores[continuations.place(tokens)].argmax()))
    result = drawn["greedy"]
    assert result.codes[0, : result.lengths[0]].tolist() == [token for token in tokens if token != STOP]
