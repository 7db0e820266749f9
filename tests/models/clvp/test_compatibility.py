"""Where clvp_fast differs from transformers' CLVP: a test for each row of docs/compatibility.md, by its number."""

import copy

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from clvp_fast import ClvpConfig, ClvpEncoder, ClvpForCausalLM, ClvpModelForConditionalGeneration
from tests.models.clvp.tiny import (
    POSITIONS,
    STOP,
    TEXT_POSITIONS,
    config_fields,
    randomize,
    stock_oracle,
    tiny_inputs,
    tiny_ours,
    tiny_pair,
)


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


@pytest.fixture
def model():
    return tiny_ours()


def generated(model, ids, features, **settings):
    return model.generate(ids, features, return_dict_in_generate=True, **{"max_new_tokens": 16, **settings})


class TestGeneration:
    @pytest.mark.parametrize(
        "settings",
        [
            dict(do_sample=False),
            dict(do_sample=True, top_k=0, top_p=0.8, temperature=0.8, repetition_penalty=2.0),
            dict(do_sample=True, num_return_sequences=5),
            dict(num_beams=4, num_return_sequences=4),
            dict(num_beams=2, do_sample=True),
        ],
        ids=["greedy", "tortoise", "candidates", "beams", "beam-sample"],
    )
    def test_01_generates_what_the_original_computes(self, pair, settings):
        stock, ours = pair
        ids, features = tiny_inputs()
        torch.manual_seed(3)
        expected = stock_oracle(stock, ids, features, max_new_tokens=24, **settings)
        torch.manual_seed(3)
        # Of one seed the loop alone draws the same tokens, the engine others of the same distribution.
        use_engine = False if settings.get("do_sample") else None
        output = generated(ours, ids, features, max_new_tokens=24, use_engine=use_engine, **settings)
        assert expected.unique().numel() > 10
        assert torch.equal(output.sequences, expected)

    def test_01_stock_generate_is_wrong(self, pair):
        stock, ours = pair
        ids, features = tiny_inputs()
        wrong = generated(stock, ids, features).speech_ids
        right = generated(ours, ids, features).speech_ids
        assert not torch.equal(wrong, right[:, : wrong.shape[1]])

    def test_01_contiguous_positions_are_an_option(self, pair):
        ids, features = tiny_inputs()
        model = tiny_ours(contiguous_positions=True)
        sequences = generated(model, ids, features, max_new_tokens=6).sequences
        prompt, _ = model.conditioning_encoder.prompt(features, ids)
        decoder = model.speech_decoder_model.model.decoder
        for step in range(6):
            speech = decoder.input_embeds_layer(sequences[:, : step + 1])
            speech = speech + decoder.position_embeds_layer(torch.arange(step + 1))
            logits = model.speech_decoder_model(
                inputs_embeds=torch.cat([prompt, speech], 1), embeds_have_positions=True
            ).logits
            assert torch.equal(logits[:, -1].argmax(-1), sequences[:, step + 1])
        assert not torch.equal(sequences, generated(pair[1], ids, features, max_new_tokens=6).sequences)

    def test_02_default_arguments_give_the_documented_tuple(self, model):
        ids, features = tiny_inputs()
        codes, per_speech, per_text, text_embeds, speech_embeds, text_pooled, speech_pooled = model.generate(
            ids, features
        )
        output = generated(model, ids, features, max_new_tokens=20)
        assert torch.equal(codes, output.speech_ids) and torch.equal(per_text, output.logits_per_text)
        assert torch.equal(per_speech, per_text.t())
        assert torch.equal(text_embeds, output.text_embeds) and torch.equal(speech_embeds, output.speech_embeds)
        assert torch.equal(text_pooled, output.text_model_output)
        assert torch.equal(speech_pooled, output.speech_model_output)
        assert len(model.generate(ids, features, output_hidden_states=True)) == 10

    @pytest.mark.parametrize("source", ["built", "as transformers saved it"])
    def test_03_stops_at_the_decoders_stop_token(self, model, source):
        if source != "built":
            model.generation_config = GenerationConfig(bos_token_id=255, eos_token_id=0)
        ids, features = tiny_inputs()
        with torch.no_grad():
            model.speech_decoder_model.lm_head.bias[STOP] += 4.0
            model.speech_decoder_model.lm_head.bias[0] += 5.0
        torch.manual_seed(0)
        sequences = generated(model, ids, features, do_sample=True, num_return_sequences=8, max_new_tokens=60).sequences
        stopped = sequences == STOP
        assert stopped.any(1).all() and sequences.shape[1] < 61
        after_stop = stopped.cumsum(1) > 0
        assert (sequences[after_stop] == STOP).all()
        assert (sequences == 0).any(), "speech token 0 must be an ordinary token"

    def test_03_saved_generation_config_holds_the_decoders_tokens(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        saved = GenerationConfig.from_pretrained(tmp_path)
        assert (saved.bos_token_id, saved.eos_token_id, saved.pad_token_id) == (292, STOP, STOP)

    def test_04_pads_with_stop_tokens_and_never_cuts(self, model):
        ids, features = tiny_inputs()
        plain = generated(model, ids, features)
        padded = generated(model, ids, features, pad_to_max_mel_tokens=30, eos_token_id=[STOP, 299])
        assert padded.sequences.shape[1] == 30
        assert torch.equal(padded.sequences[:, :17], plain.sequences) and (padded.sequences[:, 17:] == STOP).all()
        assert (padded.speech_ids[:, 16:26] == 83).all()
        assert padded.speech_ids[0, -3:].tolist() == [45, 45, 248]
        assert torch.equal(generated(model, ids, features, pad_to_max_mel_tokens=5).sequences, plain.sequences)

    def test_05_logits_processor_stopping_criteria_and_streamer_work(self, model):
        ids, features = tiny_inputs(texts=1)

        class Forbid(LogitsProcessor):
            def __call__(self, input_ids, scores):
                return scores.index_fill(1, forbidden, -torch.inf)

        class AfterSeven(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 8)

        class Collect(BaseStreamer):
            def __init__(self):
                self.tokens = []

            def put(self, value):
                self.tokens.extend(value.flatten().tolist())

            def end(self):
                self.tokens.append("end")

        plain = generated(model, ids, features).sequences
        forbidden = plain[0, 1:].unique()
        assert not torch.isin(
            generated(model, ids, features, logits_processor=[Forbid()]).sequences[:, 1:], forbidden
        ).any()
        short = generated(model, ids, features, stopping_criteria=[AfterSeven()]).sequences
        assert torch.equal(short, plain[:, :8])
        streamer = Collect()
        generated(model, ids, features, streamer=streamer)
        assert streamer.tokens == [*plain[0].tolist(), "end"]

    def test_06_scores_and_logits_come_back(self, model):
        ids, features = tiny_inputs()
        output = generated(model, ids, features, output_scores=True, output_logits=True, output_attentions=True)
        assert len(output.scores) == len(output.logits) == 16
        steps = torch.stack(output.logits, 1).argmax(-1)
        assert torch.equal(steps, output.sequences[:, 1:])
        assert output.decoder_attentions[0][0].shape[:2] == (2, 2)

    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("do_sample", [False, True])
    def test_07_a_text_in_a_padded_batch_generates_what_it_generates_alone(self, model, side, do_sample):
        ids, features = tiny_inputs(texts=3)
        lengths = [9, 4, 1]
        batch, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            place = slice(0, length) if side == "right" else slice(9 - length, 9)
            batch[row, place], mask[row, place] = ids[row, :length], 1
        settings = dict(do_sample=do_sample, top_k=1) if do_sample else {}
        together = generated(model, batch, features, attention_mask=mask, output_logits=True, **settings)
        for row, length in enumerate(lengths):
            alone = generated(
                model, ids[row : row + 1, :length], features[row : row + 1], output_logits=True, **settings
            )
            assert torch.equal(together.sequences[row, : alone.sequences.shape[1]], alone.sequences[0])
            difference = (together.logits[5][row] - alone.logits[5][0]).abs().max()
            assert difference < 1e-4

    def test_07_one_text_for_several_voices_keeps_its_mask(self, model):
        ids, features = tiny_inputs(texts=1, length=5)
        voices = torch.cat([features, features.flip(2)])
        padded = torch.nn.functional.pad(ids, (2, 0))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (2, 0))
        together = generated(model, padded, voices, attention_mask=mask).sequences
        assert torch.equal(together[0], generated(model, ids, features).sequences[0])

    def test_08_use_cache_false_gives_the_same_tokens(self, model):
        ids, features = tiny_inputs()
        assert torch.equal(
            generated(model, ids, features, use_cache=False).sequences, generated(model, ids, features).sequences
        )

    def test_09_lengths_beyond_the_position_table_are_refused(self, model):
        ids, features = tiny_inputs(texts=1)
        longest = generated(model, ids, features, max_new_tokens=POSITIONS - 1, min_new_tokens=POSITIONS - 1)
        assert longest.sequences.shape[1] == POSITIONS
        for settings in (dict(max_new_tokens=POSITIONS), dict(generation_config=GenerationConfig(max_new_tokens=999))):
            with pytest.raises(ValueError, match=r"at most 79 \(max_position_embeddings=80\)"):
                model.generate(ids, features, **settings)
        with pytest.raises(ValueError, match="at most 79"):
            model.generate(ids, features, max_length=200)
        contiguous = tiny_ours(contiguous_positions=True)
        full = generated(contiguous, ids, features, max_new_tokens=POSITIONS, min_new_tokens=POSITIONS)
        assert full.sequences.shape[1] == POSITIONS + 1

    def test_09_text_over_the_limit_is_refused(self, model):
        ids, features = tiny_inputs(texts=1, length=TEXT_POSITIONS - 2)
        with pytest.raises(ValueError, match="must have 1 to 61 tokens for this checkpoint, it has 62"):
            model.generate(ids, features)
        with pytest.raises(ValueError, match="it has 0"):
            model.generate(ids[:, :0], features)
        with pytest.raises(ValueError, match="hides every token"):
            model.generate(ids[:, :5], features, attention_mask=torch.zeros(1, 5, dtype=torch.long))
        generated(model, ids[:, :61], features, max_new_tokens=2)

    def test_10_speech_features_from_text_and_audio(self, model):
        ids, features = tiny_inputs()
        before = model.generation_config.to_dict()
        embeds = model.get_speech_features(input_ids=ids, input_features=features, max_new_tokens=12)
        assert model.generation_config.to_dict() == before and not embeds.requires_grad
        prompt, mask = model.conditioning_encoder.prompt(features, ids, num_ends=1)
        sequences = model.speech_decoder_model.generate(
            conditioning_embeds=prompt, attention_mask=mask, max_new_tokens=12, eos_token_id=STOP, pad_token_id=STOP
        )
        codes = model.fix_speech_decoder_output(sequences)
        torch.testing.assert_close(embeds, model.speech_encoder_model(codes).embeds, rtol=0, atol=1e-6)
        padded = torch.nn.functional.pad(ids, (0, 3))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
        with_mask = model.get_speech_features(
            input_ids=padded, input_features=features, attention_mask=mask, max_new_tokens=12
        )
        torch.testing.assert_close(with_mask, embeds, rtol=0, atol=1e-4)

    def test_11_without_a_length_twenty_tokens_are_generated(self, model):
        ids, features = tiny_inputs(texts=1)
        with pytest.warns(UserWarning, match="max_new_tokens"):
            sequences = model.generate(ids, features, return_dict_in_generate=True).sequences
        assert sequences.shape[1] == 21

    def test_12_logits_are_each_text_against_each_candidate(self, model):
        ids, features = tiny_inputs()
        torch.manual_seed(0)
        output = generated(model, ids, features, do_sample=True, num_return_sequences=3)
        assert output.logits_per_text.shape == (2, 6)
        own = output.candidate_scores()
        assert own.shape == (2, 3)
        assert torch.equal(own[1], output.logits_per_text[1, 3:])


class TestForward:
    def test_13_embeddings_in_place_of_ids(self, model):
        ids, features = tiny_inputs()
        embeds = dict(
            conditioning_encoder_inputs_embeds=model.conditioning_encoder.text_token_embedding(ids),
            text_encoder_inputs_embeds=model.text_encoder_model.token_embedding(ids),
        )
        by_ids, by_embeds = model(ids, features), model(input_features=features, **embeds)
        torch.testing.assert_close(by_embeds.logits_per_text, by_ids.logits_per_text, rtol=0, atol=1e-5)
        sequences = generated(model, ids, features).sequences
        assert torch.equal(generated(model, None, features, **embeds).sequences, sequences)
        speech = model.get_speech_features(
            conditioning_encoder_inputs_embeds=embeds["conditioning_encoder_inputs_embeds"],
            input_features=features,
            max_new_tokens=8,
        )
        expected = model.get_speech_features(input_ids=ids, input_features=features, max_new_tokens=8)
        torch.testing.assert_close(speech, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("summary_type", ["mean", "last", "first"])
    def test_14_padding_counts_in_the_mean_unless_told_otherwise(self, summary_type):
        fields = config_fields()
        fields["text_config"] |= dict(pool_padding=False, summary_type=summary_type)
        model = ClvpModelForConditionalGeneration(ClvpConfig(**fields)).eval()
        randomize(model)
        ids, _ = tiny_inputs(texts=1)
        alone = model.get_text_features(ids).embeds
        for padding in ((0, 4), (4, 0)):
            padded = torch.nn.functional.pad(ids, padding)
            mask = torch.nn.functional.pad(torch.ones_like(ids), padding)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            embeds = model.text_encoder_model(padded, attention_mask=mask, position_ids=positions).embeds
            torch.testing.assert_close(embeds, alone, rtol=0, atol=1e-5)
        counted = tiny_ours()
        mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 4))
        embeds = counted.get_text_features(torch.nn.functional.pad(ids, (0, 4)), attention_mask=mask).embeds
        assert (embeds - counted.get_text_features(ids).embeds).abs().max() > 0.1

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("how", ["loaded", "moved"])
    def test_15_16_half_types_keep_float32_angles(self, model, tmp_path, dtype, how):
        if how == "loaded":
            model.save_pretrained(tmp_path)
            half = ClvpModelForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
        else:
            half = copy.deepcopy(model).to(dtype)
        assert half.dtype == dtype
        cos, sin = half.text_encoder_model.rotary_pos_emb.cos_sin(torch.arange(600)[None])
        assert cos.dtype == torch.float32
        assert torch.cat([cos, sin], -1).unique(dim=1).shape[1] == 600
        ids, features = tiny_inputs()
        embeds = half.get_text_features(ids).embeds.float()
        expected = model.get_text_features(ids).embeds
        assert torch.nn.functional.cosine_similarity(embeds, expected).min() > 0.999
        assert generated(half, ids, features.to(dtype)).speech_ids.shape == (2, 16)

    def test_17_casting_between_two_calls_of_one_length(self, model):
        ids, _ = tiny_inputs()
        single = model.get_text_features(ids).embeds
        half = model.to(torch.bfloat16).get_text_features(ids).embeds.float()
        assert torch.nn.functional.cosine_similarity(single, half).min() > 0.999
        assert torch.allclose(model.double().get_text_features(ids).embeds.float(), half, atol=0.2)

    def test_18_positions_past_the_length(self, model):
        ids, _ = tiny_inputs(texts=1)
        encoder = model.text_encoder_model
        shifted = encoder(ids, position_ids=torch.arange(9)[None] + 100).last_hidden_state
        longer = torch.cat([torch.full((1, 100), 5), ids], 1)
        mask = (torch.arange(109) >= 100).long()[None]
        expected = encoder(longer, attention_mask=mask).last_hidden_state[:, 100:]
        torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-4)

    def test_20_the_default_configuration_generates(self):
        config = ClvpConfig()
        assert config.speech_config.vocab_size == 8192
        small = config_fields()
        small["speech_config"]["vocab_size"] = 250
        model = ClvpModelForConditionalGeneration(ClvpConfig(**small)).eval()
        randomize(model)
        ids, features = tiny_inputs()
        torch.manual_seed(0)
        output = generated(model, ids, features, do_sample=True, num_return_sequences=4, max_new_tokens=40)
        assert (output.speech_ids >= 250).any() and output.logits_per_text.isfinite().all()
        filled = torch.where(output.speech_ids >= 250, 83, output.speech_ids)
        torch.testing.assert_close(model.speech_encoder_model(filled).pooler_output, output.speech_model_output)

    def test_21_mismatched_pairs_and_lengths(self, model):
        ids, features = tiny_inputs(texts=3)
        with pytest.raises(ValueError, match="got 1 texts and 3 clips"):
            model(ids[:1], features, return_loss=True)
        with pytest.raises(ValueError, match="Found 2 texts vs 3 audios"):
            model(ids[:2], features)
        long, features = tiny_inputs(texts=1, length=63)
        assert model(long[:, :62], features).logits_per_text.isfinite().all()
        with pytest.raises(ValueError, match="must have 1 to 62 tokens for this checkpoint, it has 63"):
            model(long, features)

    def test_22_parts_load_out_of_a_composite_checkpoint(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        decoder, info = ClvpForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        text = ClvpEncoder.from_pretrained(tmp_path)
        speech = ClvpEncoder.from_pretrained(tmp_path, config_type="speech_config")
        for part, expected in (
            (decoder, model.speech_decoder_model),
            (text, model.text_encoder_model),
            (speech, model.speech_encoder_model),
        ):
            state = part.state_dict()
            assert state.keys() == expected.state_dict().keys()
            assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())

    def test_23_embeddings_and_head_are_resized_together(self, model):
        decoder = model.speech_decoder_model
        old = decoder.lm_head.weight.detach().clone()
        decoder.resize_token_embeddings(310, mean_resizing=False)
        assert decoder.get_input_embeddings().num_embeddings == 310 == decoder.config.vocab_size
        assert decoder.lm_head.weight.shape == (310, 128) and decoder.lm_head.bias.shape == (310,)
        assert torch.equal(decoder.lm_head.weight[:300], old)
        assert model.get_input_embeddings() is model.text_encoder_model.token_embedding

    def test_24_a_static_cache_generates_the_same(self, model):
        ids, features = tiny_inputs()
        static = generated(model, ids, features, cache_implementation="static").sequences
        assert torch.equal(static, generated(model, ids, features).sequences)

    def test_24_other_attention_implementations_are_refused_aloud(self, model):
        with pytest.raises(ValueError, match="does not support"):
            model.set_attn_implementation("sdpa")
        assert "ClvpDecoderLayer" in model._no_split_modules
