"""Parameters keep the checkpoint's names and shapes over the storage that the operators want, with no second copy."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from clvp_fast import ClvpModelForConditionalGeneration, ops
from clvp_fast.models.common.parameters import arrange_for_decoding
from tests.models.clvp.tiny import randomize, tiny_inputs, tiny_ours


def storages(model: nn.Module) -> int:
    """Count the bytes of all distinct storages of the parameters."""
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(found.values())


def parameter_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def check_packed(model) -> None:
    decoder = model.speech_decoder_model.model.decoder
    for attention in [
        *(layer.attn for layer in decoder.layers),
        *(layer.self_attn for layer in model.text_encoder_model.layers),
        *model.conditioning_encoder.mel_attn_blocks,
    ]:
        weights = [linear.weight for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
        assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
        assert weights[1].data_ptr() == weights[0].data_ptr() + weights[0].numel() * weights[0].element_size()
    for layer in decoder.layers:
        assert layer.mlp.c_fc.weight.shape == (128, 512)
    assert storages(model) == parameter_bytes(model)


def use(model, dtype=torch.float32):
    ids, features = tiny_inputs()
    with torch.no_grad():
        return model(ids, features.to(dtype)).logits_per_text


@pytest.mark.parametrize("change", ["built", "loaded", "cast", "assigned", "copied", "trained"])
def test_packed_after_every_change_of_the_parameters(change, tmp_path):
    model = tiny_ours()
    expected = use(model)
    dtype = torch.float32
    if change == "loaded":
        model.save_pretrained(tmp_path)
        model = ClvpModelForConditionalGeneration.from_pretrained(tmp_path)
    elif change == "cast":
        model, dtype = model.double(), torch.float64
    elif change == "assigned":
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
    elif change == "copied":
        model = copy.deepcopy(model)
    elif change == "trained":
        before = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        ids, features = tiny_inputs()
        model(ids, features, return_loss=True).loss.backward()
        optimizer.step()
        expected = use(before.float())
        assert not torch.equal(use(model), expected), "packed weights must follow an optimizer's step"
        expected = use(model)
    torch.testing.assert_close(use(model, dtype).float(), expected, rtol=0, atol=1e-5)
    check_packed(model)


@torch.no_grad()
def drawn(model) -> None:
    ids, features = tiny_inputs()
    model.generate(ids, features, max_new_tokens=2, use_engine=False)


@pytest.mark.parametrize("arrange", [arrange_for_decoding, drawn])
def test_weights_are_transposed_before_candidates_are_drawn(arrange):
    model, untouched = tiny_ours(), tiny_ours()
    arrange(model)
    check_packed(model)
    both = (one.speech_decoder_model.model.decoder.layers for one in (model, untouched))
    for layer, as_loaded in zip(*both, strict=True):
        for name in ("c_fc", "c_proj"):
            assert getattr(layer.mlp, name).weight.t().is_contiguous()
            assert getattr(as_loaded.mlp, name).weight.is_contiguous()
    assert torch.equal(use(model), use(untouched))


def test_hooked_layers_are_not_arranged():
    model = tiny_ours()
    layer = model.speech_decoder_model.model.decoder.layers[0]
    layer.attn.k_proj.register_forward_hook(lambda *_: None)
    layer.mlp.c_fc.register_forward_hook(lambda *_: None)
    before = [parameter.data_ptr() for parameter in layer.parameters()]
    layer.mlp.c_proj.register_forward_hook(lambda *_: None)
    arrange_for_decoding(model)
    assert [parameter.data_ptr() for parameter in layer.parameters()] == before
    with torch.device("meta"):
        arrange_for_decoding(ClvpModelForConditionalGeneration(model.config))  # has no storage


def test_packed_under_inference_mode_and_trained_after():
    model = tiny_ours()
    ids, features = tiny_inputs()
    with torch.inference_mode():
        model(ids, features)
    check_packed(model)
    model(ids, features, return_loss=True).loss.backward()
    assert model.text_encoder_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_saved_tensors_are_whole_and_contiguous(tmp_path):
    model = tiny_ours()
    use(model)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 1.05 * sum(t.numel() * t.element_size() for t in expected.values()) + 20_000


class Adapter(nn.Module):
    """An adapter library's replacement of a linear layer."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.calls = 0

    def forward(self, hidden_states):
        self.calls += 1
        return self.base(hidden_states) * 1.5


def test_replaced_and_hooked_layers_are_called():
    ids, _ = tiny_inputs()
    model = tiny_ours().text_encoder_model
    expected = copy.deepcopy(model)
    layer = model.layers[0]
    layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
    layer.mlp.fc2 = Adapter(layer.mlp.fc2)
    hooked = []
    layer.mlp.fc1.proj.register_forward_hook(lambda module, inputs, output: hooked.append(output.shape))
    model.layers[1].self_attn.out_proj.register_forward_hook(lambda module, inputs, output: output * 2)
    with torch.no_grad():
        expected.layers[0].self_attn.q_proj.weight.mul_(1.5)
        expected.layers[0].mlp.fc2.weight.mul_(1.5)
        expected.layers[0].mlp.fc2.bias.mul_(1.5)
        expected.layers[1].self_attn.out_proj.weight.mul_(2)
        expected.layers[1].self_attn.out_proj.bias.mul_(2)
        got = model(ids).last_hidden_state
        torch.testing.assert_close(got, expected(ids).last_hidden_state, rtol=0, atol=1e-5)
    assert layer.self_attn.q_proj.calls == layer.mlp.fc2.calls == 1 and hooked == [(2, 9, 192)]


def test_prompt_is_computed_once_for_all_candidates():
    model = tiny_ours()
    ids, features = tiny_inputs()
    rows = []
    layer = model.speech_decoder_model.model.decoder.layers[0]
    layer.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[:2]))
    model.generate(ids, features, num_return_sequences=6, do_sample=True, max_new_tokens=4)
    assert rows == [(2, 14), (12, 1), (12, 1), (12, 1)]


def test_only_frame_zero_is_attended_from_in_the_last_block(monkeypatch):
    model = tiny_ours()
    _, features = tiny_inputs()
    encoder = model.conditioning_encoder
    frames = encoder.mel_conv(features)
    for norm, block in zip(encoder.group_norms, encoder.mel_attn_blocks, strict=True):
        frames = frames + block(norm(frames).transpose(1, 2))[0].transpose(1, 2)
    queries, attention = [], ops.rotary_attention

    def spied(query, *args, **kwargs):
        queries.append(query.shape[1])
        return attention(query, *args, **kwargs)

    monkeypatch.setattr(ops, "rotary_attention", spied)
    voices = encoder.encode_voice(features)
    torch.testing.assert_close(voices, frames[..., 0], rtol=0, atol=1e-5)
    assert queries == [40, 40, 1]


def test_random_weights_do_not_depend_on_how_they_were_made():
    first, second = tiny_ours(), tiny_ours()
    randomize(second, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
