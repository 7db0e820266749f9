"""The architecture of the trained checkpoints (665 M parameters) with random weights: parity at its depth and width."""

import pytest
import torch
import torch.nn.functional as F
import transformers

import clvp_fast
from tests.models.clvp.builders import assert_same

pytestmark = pytest.mark.full_size

# 20 to 30 layers of float32 add their rounding errors up.
TOLERANCE = 5e-5


@torch.no_grad()
def test_encoders_and_generation():
    """Keep this one test, so that parallel workers do not build the model each: 5 GB."""
    stock, ours = models()
    check_encoders(stock, ours)
    check_generation(stock, ours)


def models():
    """Give both models on one set of weights in memory."""
    built = []
    for package in (transformers, clvp_fast):
        config = package.ClvpConfig(speech_config={"vocab_size": 8192})
        with torch.device("meta"):
            built.append(package.ClvpModelForConditionalGeneration(config))
    stock, ours = built
    assert sum(p.numel() for p in stock.parameters()) == sum(p.numel() for p in ours.parameters()) == 665_110_531
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in ours.state_dict().items():
        if name.endswith("inv_freq"):
            state[name] = 1.0 / 10000 ** (torch.arange(0, 32, 2).float() / 32)
            continue
        gain = ("norm" in name and name.endswith("weight")) or name == "logit_scale"
        spread = 0.3 if gain else 0.5 if "embed" in name else 0.1 if name.endswith("bias") else 0.035
        state[name] = torch.empty(value.shape).uniform_(-2 * spread, 2 * spread, generator=generator) + gain
    for model in (stock, ours):
        # transformers' causal masks are no part of a checkpoint: unused, and left on the meta device.
        model.load_state_dict(state, assign=True)
    return stock.eval(), ours.eval()


def check_encoders(stock, ours):
    generator = torch.Generator().manual_seed(1)
    for side, rows in (("text_encoder_model", 256), ("speech_encoder_model", 8192)):
        ids = torch.randint(0, rows, (2, 33), generator=generator)
        expected = getattr(stock, side)(ids)
        assert expected.embeds.std() > 0.1
        assert_same(getattr(ours, side)(ids), expected, tolerance=TOLERANCE)


def check_generation(stock, ours):
    generator = torch.Generator().manual_seed(2)
    text, clip = torch.randint(3, 255, (1, 15), generator=generator), torch.randn(1, 80, 517, generator=generator)
    settings = dict(do_sample=True, num_return_sequences=4, max_new_tokens=5, return_dict_in_generate=True)
    settings |= dict(output_logits=True, eos_token_id=8193, pad_token_id=8193)

    cond = stock.conditioning_encoder(clip, F.pad(text, (0, 1)))
    prompt, _ = ours.conditioning_encoder.prompt(clip, text)
    assert_same(prompt, cond, tolerance=TOLERANCE)
    torch.manual_seed(0)
    full = torch.ones(1, cond.shape[1] + 1, dtype=torch.long)
    expected = stock.speech_decoder_model.generate(conditioning_embeds=cond, attention_mask=full, **settings)
    torch.manual_seed(0)
    found = ours.generate(text, clip, **settings)
    assert len(expected.sequences.unique()) > 10
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert_same(found.logits, expected.logits, tolerance=TOLERANCE)

    settings = dict(do_sample=False, repetition_penalty=1.5, max_new_tokens=12, eos_token_id=8193, pad_token_id=8193)
    expected = stock.speech_decoder_model.generate(conditioning_embeds=cond, attention_mask=full, **settings)
    found = ours.speech_decoder_model.generate(conditioning_embeds=cond, use_engine=True, **settings)
    assert len(expected.unique()) > 8 and found.tolist() == expected.tolist()
