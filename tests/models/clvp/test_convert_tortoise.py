"""Conversion of original Tortoise checkpoints, held against Tortoise's computation on the original keys."""

import json
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

from clvp_fast import convert_tortoise_checkpoint
from clvp_fast.checkpoint import load_checkpoint
from clvp_fast.cli import main
from clvp_fast.models.clvp.convert_tortoise import write_checkpoint
from tests.data import data_path
from tests.models.clvp import tortoise_files as original

UNUSED = ("text_head.", ".attn.bias", ".attn.masked_bias", "gpt.wte.", "inference_model.")


@pytest.fixture(scope="module")
def autoregressive():
    return original.autoregressive_state()


@pytest.fixture(scope="module")
def clvp():
    return original.clvp_state()


@pytest.fixture
def files(tmp_path, autoregressive, clvp):
    """Give the two files in a folder, without others."""
    folder = tmp_path / "models"
    folder.mkdir()
    torch.save(autoregressive, folder / "autoregressive.pth")
    torch.save(clvp, folder / "clvp2.pth")
    return folder / "autoregressive.pth", folder / "clvp2.pth"


def inputs():
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(3, 255, (1, 9), generator=generator)
    return text, torch.randn(1, original.MELS, 23, generator=generator, dtype=torch.float64)


@torch.no_grad()
def test_computes_what_the_original_computes():
    """Compare in float64; RMS norms differ by their epsilon (1e-5 of the mean square), and nothing else does."""
    states = original.autoregressive_state(dtype=torch.float64), original.clvp_state(dtype=torch.float64)
    model = convert_tortoise_checkpoint(*states)
    text, mel = inputs()

    voice = model.conditioning_encoder(mel, text)[:, 0]
    torch.testing.assert_close(voice, original.voice_latent(states[0], mel), rtol=0, atol=1e-10)

    ids = torch.tensor([[original.START, 5, 17, 250, 17]])
    embeds = states[0]["mel_embedding.weight"][ids] + states[0]["mel_pos_embedding.emb.weight"][: ids.shape[1]]
    logits = model.speech_decoder_model(ids).logits
    expected = original.gpt_logits(states[0], embeds)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)

    for side, encoder, tokens in (
        ("text", model.text_encoder_model, text),
        ("speech", model.speech_encoder_model, ids[:, 1:]),
    ):
        expected = original.clvp_embed(states[1], side, tokens)
        assert expected.std() > 0.5
        torch.testing.assert_close(encoder(tokens).embeds, expected, rtol=0, atol=3e-4)


@torch.no_grad()
def test_generates_and_scores_what_the_original_does():
    states = original.autoregressive_state(dtype=torch.float64), original.clvp_state(dtype=torch.float64)
    model = convert_tortoise_checkpoint(*states)
    text, mel = inputs()
    out = model.generate(text, mel, do_sample=False, max_new_tokens=12, return_dict_in_generate=True)
    codes = original.greedy_codes(states[0], text, mel, steps=12)
    assert len(codes.unique()) > 3
    assert out.speech_ids.tolist() == codes.tolist()
    score = original.clvp_score(states[1], F.pad(text, (0, 1)), codes)
    torch.testing.assert_close(out.logits_per_text, score, rtol=0, atol=3e-4)


def test_architecture_is_read_off_the_shapes():
    model = convert_tortoise_checkpoint(
        original.autoregressive_state(width=192, blocks=3), original.clvp_state(width=192, inner=100)
    )
    decoder, text = model.config.decoder_config, model.config.text_config
    assert (decoder.hidden_size, decoder.num_attention_heads, decoder.num_mel_attn_blocks) == (192, 3, 3)
    assert (decoder.num_hidden_layers, decoder.max_position_embeddings, decoder.max_text_tokens) == (2, 64, 32)
    assert (decoder.vocab_size, decoder.bos_token_id, decoder.eos_token_id) == (302, 300, 301)
    assert (decoder.feature_size, decoder.n_inner) == (20, None)
    assert (text.hidden_size, text.num_attention_heads, text.intermediate_size) == (192, 3, 100)
    assert (text.vocab_size, text.bos_token_id, text.eos_token_id, text.projection_dim) == (256, 255, 0, 96)
    assert (model.config.speech_config.vocab_size, model.config.projection_dim) == (300, 96)


def test_every_number_arrives_and_stock_takes_them_strictly(autoregressive, clvp, tmp_path):
    model = convert_tortoise_checkpoint(autoregressive, clvp)
    used = {k: v for k, v in autoregressive.items() if not any(part in k for part in UNUSED)} | clvp
    # The same numbers, each as often: nothing left out, nothing doubled, nothing made up.
    numbers = torch.cat([x.flatten() for x in used.values()]).sort().values
    arrived = torch.cat([x.flatten() for x in model.state_dict().values()]).sort().values
    assert torch.equal(arrived, numbers)

    model.save_pretrained(tmp_path)
    stock, report = transformers.ClvpModelForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert stock.state_dict().keys() == model.state_dict().keys()


def test_state_dicts_are_left_alone(autoregressive, clvp):
    keys = list(autoregressive)
    before = autoregressive["mel_head.weight"].clone()
    model = convert_tortoise_checkpoint(autoregressive, clvp)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert list(autoregressive) == keys and torch.equal(autoregressive["mel_head.weight"], before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_precision_is_the_files_unless_asked_otherwise(source, dtype):
    states = original.autoregressive_state(dtype=source), original.clvp_state(dtype=source)
    model = convert_tortoise_checkpoint(*states, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype or source}
    assert model.config.dtype == (dtype or source)
    exact = original.clvp_state()["text_transformer.transformer.attn_layers.rotary_pos_emb.inv_freq"]
    torch.testing.assert_close(model.text_encoder_model.rotary_pos_emb.inv_freq, exact, rtol=1e-6, atol=0)


def refusal(autoregressive, clvp) -> str:
    with pytest.raises(ValueError) as error:
        convert_tortoise_checkpoint(autoregressive, clvp)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_each_missing_tensor_is_named(autoregressive, clvp):
    for key in autoregressive:
        if not any(part in key for part in UNUSED):
            assert key in refusal({k: v for k, v in autoregressive.items() if k != key}, clvp)
    for key in clvp:
        assert key in refusal(autoregressive, {k: v for k, v in clvp.items() if k != key})


def test_tensors_that_may_lack(autoregressive, clvp):
    plain = {k: v for k, v in autoregressive.items() if not any(part in k for part in UNUSED)}
    with_them, without = (convert_tortoise_checkpoint(state, clvp).state_dict() for state in (autoregressive, plain))
    assert all(torch.equal(with_them[key], without[key]) for key in with_them | without)


def test_each_misshapen_tensor_is_refused(autoregressive, clvp):
    used = [key for key in autoregressive if not any(part in key for part in UNUSED)]
    for state, keys, place in ((autoregressive, used, 0), (clvp, list(clvp), 1)):
        for key in keys:
            states = [autoregressive, clvp]
            longer = F.pad(state[key], (0, 1)) if state[key].dim() else state[key][None]
            states[place] = state | {key: longer}
            message = refusal(*states)
            assert any(name in message for name in keys), message


def test_one_misshapen_tensor_with_both_shapes(autoregressive, clvp):
    key = "gpt.h.1.attn.c_proj.weight"
    message = refusal(autoregressive | {key: torch.zeros(128, 64)}, clvp)
    assert key in message and "[128, 128]" in message and "[128, 64]" in message


@pytest.mark.parametrize(
    "key", ["gpt.h.0.attn.extra", "gpt.wpe.weight", "module.mel_head.weight", "conditioning_encoder.attn.0.relative"]
)
def test_unknown_tensors_are_named(key, autoregressive, clvp):
    assert key in refusal(autoregressive | {key: torch.zeros(3)}, clvp)
    assert "speech_pos_emb" in refusal(autoregressive, clvp | {"speech_pos_emb.weight": torch.zeros(3, 2)})


def test_files_that_do_not_belong_together(autoregressive, clvp):
    other_text = {"text_embedding.weight": torch.randn(200, 128)}
    assert "200" in refusal(autoregressive | other_text, clvp) and "256" in refusal(autoregressive | other_text, clvp)
    other_speech = {"speech_emb.weight": torch.randn(123, 128)}
    assert "123" in refusal(autoregressive, clvp | other_speech)
    assert "mel_embedding.weight" in refusal(clvp, autoregressive)


def test_other_values_than_tensors(autoregressive, clvp):
    assert "'gpt'" in refusal({"gpt": autoregressive}, clvp)
    assert "int64" in refusal(autoregressive | {"final_norm.bias": torch.zeros(128, dtype=torch.long)}, clvp)
    assert "head size" in refusal(autoregressive | {"mel_embedding.weight": torch.zeros(302, 100)}, clvp)
    with pytest.raises(TypeError, match="path or a state dict"):
        convert_tortoise_checkpoint([1, 2], clvp)


class Bomb:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(zipped, files, tmp_path, clvp):
    marker = tmp_path / "ran"
    if zipped:
        torch.save({"mel_head.weight": Bomb(marker)}, files[0])
    else:
        files[0].write_bytes(pickle.dumps({"mel_head.weight": Bomb(marker)}))
    assert "refused" in refusal(files[0], clvp)
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files(keep, suffix, tmp_path, autoregressive, clvp):
    path = tmp_path / f"clvp2{suffix}"
    torch.save(clvp, path) if suffix == ".pth" else save_file(clvp, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    message = refusal(autoregressive, path)
    assert str(path) in message and "truncated" in message


def test_missing_file(files, tmp_path, clvp):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        convert_tortoise_checkpoint(tmp_path / "nothing.pth", clvp)


def test_paths_and_safetensors_give_the_same(files, tmp_path, autoregressive, clvp):
    save_file(clvp, tmp_path / "clvp2.safetensors")
    expected = convert_tortoise_checkpoint(autoregressive, clvp).state_dict()
    for pair in (files, (str(files[0]), str(files[1])), (files[0], tmp_path / "clvp2.safetensors")):
        found = convert_tortoise_checkpoint(*pair).state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def add_vocabulary(folder):
    """Write a small `tokenizer.json` and `mel_norms.pth` of the original's layout beside the checkpoints."""
    vocab = {"[STOP]": 0, "[UNK]": 1, "[SPACE]": 2, "t": 3, "h": 4, "e": 5, "th": 6, "the": 7, "é": 8}
    model = {"type": "BPE", "vocab": vocab, "merges": ["t h", "th e"]}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}), encoding="utf-8")
    torch.save(torch.arange(1, original.MELS + 1) / 8, folder / "mel_norms.pth")


def test_a_folder_that_loads(files, tmp_path, autoregressive, clvp):
    add_vocabulary(files[0].parent)
    out = tmp_path / "out"
    assert main(["convert", "--autoregressive", str(files[0]), "--clvp", str(files[1]), "--out", str(out)]) in (0, None)
    names = {path.name for path in out.iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json", "vocab.json", "merges.txt"}
    assert "preprocessor_config.json" in names

    settings = json.loads((out / "generation_config.json").read_text())
    tokens = {name: settings[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    assert tokens == {"bos": 300, "eos": 301, "pad": 301} and "top_p" not in settings
    checkpoint = load_checkpoint(out)
    expected = convert_tortoise_checkpoint(autoregressive, clvp).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in checkpoint.model.state_dict().items())
    assert checkpoint.tokenizer("the the")["input_ids"] == [7, 2, 7]
    assert checkpoint.feature_extractor.mel_norms == [k / 8 for k in range(1, original.MELS + 1)]


def test_the_real_vocabulary(files, tmp_path):
    write_checkpoint(*files, tmp_path, tokenizer=data_path("clvp_tokenizer/tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        expected = data_path(f"clvp_tokenizer/{name}").read_text(encoding="utf-8")
        found = (tmp_path / name).read_text(encoding="utf-8")
        assert json.loads(found) == json.loads(expected) if name.endswith("json") else found == expected
    stock = transformers.ClvpTokenizer.from_pretrained(tmp_path)
    assert stock("Hello world")["input_ids"] == [62, 84, 28, 2, 179, 79]


def test_without_vocabulary_a_warning_says_so(files, tmp_path, caplog):
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(*files, out)
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.json", "generation_config.json"}
    assert "tokenizer.json" in caplog.text and "mel_norms.pth" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 256}, "merges": []}}'),
        ("mel_norms.pth", b""),
        ("mel_norms.pth", torch.ones(7)),
        ("mel_norms.pth", torch.full((original.MELS,), torch.nan)),
        ("mel_norms.pth", {"norms": torch.ones(original.MELS)}),
    ],
)
def test_damaged_companions_write_nothing(name, content, files, tmp_path):
    add_vocabulary(files[0].parent)
    path = files[0].parent / name
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ValueError, match=name):
        write_checkpoint(*files, out)
    assert not list(out.iterdir())
