"""`ClvpModelForConditionalGeneration` without generation: `forward`, the features, the conditioning encoder."""

import pytest
import torch

from tests.models.clvp.builders import SHAPES, START, STOP, assert_same, clips, codes, gradients, padding, pair, texts

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_output(shape, dtype):
    stock, ours = pair(shape=shape, dtype=dtype)
    inputs = dict(input_ids=texts(3), input_features=clips(3, dtype=dtype), return_loss=True)
    inputs |= dict(output_hidden_states=True)
    for side in ("none", "left", "right"):
        expected = stock(**inputs, attention_mask=padding(3, 7, side))
        assert expected.logits_per_text.std() > 0.01 and expected.loss > 0
        assert_same(ours(**inputs, attention_mask=padding(3, 7, side)), expected)


@pytest.mark.parametrize(("num_texts", "num_clips"), [(1, 1), (1, 3), (3, 1)])
@torch.no_grad()
def test_one_text_or_one_clip_for_many(num_texts, num_clips):
    stock, ours = pair(dtype=torch.float64)
    inputs = texts(num_texts), clips(num_clips, dtype=torch.float64)
    expected = stock(*inputs)
    assert expected.logits_per_text.shape == (num_texts, max(num_texts, num_clips))
    assert_same(ours(*inputs), expected)


def test_counts_that_do_not_match():
    for model in pair():
        with pytest.raises(ValueError, match="2 texts vs 3 audios"):
            model(texts(2), clips(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(input_features=clips(2)[:, :10]), r"\[clips, 20, frames\], got \[2, 10, 21\]"),
        (dict(input_features=clips(2)[0]), r"got \[20, 21\]"),
        (dict(input_features=clips(2)[..., :0]), r"got \[2, 20, 0\]"),
        (dict(attention_mask=torch.ones(2, 3)), r"attention_mask must be \[2, 7\] as the text is, got \[2, 3\]"),
        (dict(input_ids=texts(2, 64)), "1 to 6[12] tokens"),
    ],
)
def test_inputs_of_a_wrong_shape(change, message):
    _, ours = pair()
    for run in (ours, ours.generate):
        with pytest.raises(ValueError, match=message):
            run(**(dict(input_ids=texts(2), input_features=clips(2)) | change))


def test_damaged_features_are_not_generated_from():
    _, ours = pair()
    features = clips(2)
    features[1, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        ours.generate(texts(2), features)


@torch.no_grad()
def test_forms_of_output():
    stock, ours = pair(dtype=torch.float64)
    features = clips(dtype=torch.float64)
    for asked in ({}, {"return_loss": True}, {"output_hidden_states": True}):
        asked["return_dict"] = False
        assert_same(ours(texts(), features, **asked), stock(texts(), features, **asked))
    for model in (stock, ours):
        model.config.return_dict = False
    assert_same(ours(texts(), features), stock(texts(), features))


@torch.no_grad()
def test_text_encoder_embeddings():
    stock, ours = pair(dtype=torch.float64)
    embeds = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    features = clips(dtype=torch.float64)
    expected = stock.get_text_features(text_encoder_inputs_embeds=embeds)
    assert_same(ours.get_text_features(text_encoder_inputs_embeds=embeds), expected)
    # transformers refuses ids beside embeddings, but needs ids for a prompt: only ours takes both, as documented.
    found = ours(texts(), features, text_encoder_inputs_embeds=embeds)
    assert_same(found.text_model_output, expected.pooler_output)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@torch.no_grad()
def test_features(side):
    stock, ours = pair(dtype=torch.float64)
    mask = padding(3, 7, side)
    expected = stock.get_text_features(texts(3), attention_mask=mask, output_hidden_states=True)
    assert_same(ours.get_text_features(texts(3), attention_mask=mask, output_hidden_states=True), expected)
    mask = padding(3, 9, side)
    expected = stock.get_speech_features(speech_ids=codes(3), attention_mask=mask)
    assert_same(ours.get_speech_features(speech_ids=codes(3), attention_mask=mask), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("frames", [1, 2, 37])
@torch.no_grad()
def test_conditioning_encoder(frames, shape):
    stock, ours = pair(shape=shape, dtype=torch.float64)
    features = clips(3, frames, dtype=torch.float64)
    for ids, mask in (
        (texts(3), None),
        (texts(3), padding(3, 7, "right")),
        (texts(3), padding(3, 7, "left")),
        (texts(1, 61), None),
    ):
        expected = stock.conditioning_encoder(features, ids, attention_mask=mask)
        assert expected.std() > 0.1
        assert_same(ours.conditioning_encoder(features, ids, attention_mask=mask), expected)
    # Zeros inside a text: transformers takes the first one for the padding, mask or not.
    ids = texts(3)
    ids[1, 4:] = 0
    ids[2, 3] = 0
    assert_same(ours.conditioning_encoder(features, ids), stock.conditioning_encoder(features, ids))


@torch.no_grad()
def test_stop_tokens_are_replaced_alike():
    stock, ours = pair()
    rows = codes(6, 9)
    rows[:, 0] = START
    rows[1, 4] = rows[2, 8] = rows[3, 1] = rows[4, 7] = rows[4, 8] = STOP
    rows[5, 1:] = STOP
    for length in (9, 5, 4):
        part = rows[:, :length].clone()
        expected = stock.fix_speech_decoder_output(part.clone())
        found = ours.fix_speech_decoder_output(part)
        assert torch.equal(found, expected) and found.shape == (6, length - 1)
        assert torch.equal(part, rows[:, :length]), "the input is left alone"
    assert stock.fix_speech_decoder_output(rows)[1].tolist()[-3:] == [45, 45, 248]


def test_gradients():
    stock, ours = pair(dtype=torch.float64)
    for model in (stock, ours):
        model(texts(3), clips(3, dtype=torch.float64), return_loss=True).loss.backward()
    found, expected = gradients(ours), gradients(stock)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    assert_same(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_conditioning_encoder(shape):
    stock, ours = pair(shape=shape, dtype=torch.float64)
    for model in (stock, ours):
        model.conditioning_encoder(clips(dtype=torch.float64), texts()).sin().sum().backward()
    found, expected = gradients(ours), gradients(stock)
    assert "conditioning_encoder.mel_conv.weight" in expected
    assert_same(found, expected, tolerance=1e-9)
