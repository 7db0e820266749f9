"""CLAP's classes compute what transformers' do: every output, in float32 and float64, and the gradients."""

import pytest
import torch
import torch.nn.functional as F

import clvp_fast
from tests.models.clap.builders import SHAPES, SIDES, composite_config, features, inputs_of, pair, texts
from tests.models.clvp.builders import assert_same, gradients

DTYPES = [torch.float32, torch.float64]
EVERYTHING = dict(output_hidden_states=True, output_attentions=True)


@pytest.fixture
def exact_softmax(monkeypatch):
    """Keep the oracle from rounding attention weights to float32 in float64, as transformers' text tower does."""
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SIDES)
@torch.no_grad()
def test_every_output(name, shape, dtype):
    stock, ours = pair(name, shape, dtype)
    inputs = inputs_of(name, composite_config(clvp_fast, shape), dtype)
    expected = stock(**inputs, **EVERYTHING)
    embeds = expected[0] if name.endswith("Projection") else expected.get("pooler_output", expected.get("text_embeds"))
    assert embeds.std(0).mean() > 0.02  # rows differ: a tower that ignores its input would show
    assert_same(ours(**inputs, **EVERYTHING), expected)
    assert_same(ours(**inputs), stock(**inputs))


@torch.no_grad()
def test_float64_of_the_text_tower_is_not_rounded_to_float32():
    stock, ours = pair("ClapTextModel", dtype=torch.float64)
    ids, mask = texts()
    found, expected = ours(ids, mask).last_hidden_state, stock(ids, mask).last_hidden_state
    assert 1e-9 < (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_features(shape):
    stock, ours = pair(shape=shape)
    inputs = inputs_of("ClapModel", composite_config(clvp_fast, shape))
    of_text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    of_audio = {name: inputs[name] for name in ("input_features", "is_longer")}
    for call, inputs in (("get_text_features", of_text), ("get_audio_features", of_audio)):
        expected = getattr(stock, call)(**inputs, **EVERYTHING)
        assert expected.pooler_output.norm(dim=-1).allclose(torch.ones(1))
        assert_same(getattr(ours, call)(**inputs, **EVERYTHING), expected)


@pytest.mark.parametrize("name", SIDES)
@torch.no_grad()
def test_forms_of_output(name):
    stock, ours = pair(name)
    inputs = inputs_of(name, composite_config(clvp_fast))
    expected = stock(**inputs, return_dict=False)
    assert isinstance(expected, tuple)
    found = ours(**inputs, return_dict=False)
    if name == "ClapModel":
        assert_same(ours(**inputs).to_tuple(), stock(**inputs).to_tuple())
        found, expected = found[:4], expected[:4]
    assert_same(found, expected)
    if name != "ClapModel":
        for model in (stock, ours):
            for config in {id(model.config): model.config}.values():
                config.output_hidden_states = True
        assert_same(ours(**inputs), stock(**inputs))


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_and_loss(shape):
    stock, ours = pair(shape=shape, dtype=torch.float64)
    inputs = inputs_of("ClapModel", composite_config(clvp_fast, shape), torch.float64)
    inputs = {name: value[:3] for name, value in inputs.items()}
    losses = []
    for model in (stock, ours):
        outputs = model(**inputs, return_loss=True)
        (outputs.loss + outputs.audio_model_output.last_hidden_state.square().mean()).backward()
        losses.append(outputs.loss.detach())
    assert losses[0] > 0.1
    assert_same(losses[1], losses[0])
    assert_same(gradients(ours), gradients(stock), tolerance=1e-9)


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("shape", ["unfused", "fused"])
def test_training_mode(shape):
    """Batch norms take the batch's statistics and keep them; no dropout is set, so both draw nothing."""
    stock, ours = pair("ClapAudioModel", shape, torch.float64)
    inputs = inputs_of("ClapAudioModel", composite_config(clvp_fast, shape), torch.float64)
    for model in (stock, ours):
        model.train()
    assert_same(ours(**inputs), stock(**inputs))
    assert_same(ours.state_dict(), stock.state_dict())


@pytest.mark.parametrize("name", ["ClapTextModel", "ClapAudioModel"])
@pytest.mark.parametrize("rates", [dict(hidden_dropout_prob=0.3), dict(drop_path_rate=0.5)])
def test_dropout_equals_transformers(name, rates):
    """Use one seed: the draws have the same shapes and order."""
    stock, ours = pair(name, **rates)
    inputs = inputs_of(name, composite_config(clvp_fast))
    expected = []
    for model in (stock, ours):
        model.train()
        torch.manual_seed(0)
        expected.append(model(**inputs).pooler_output.detach())
    if "hidden_dropout_prob" in rates or name == "ClapAudioModel":
        assert (expected[0] - stock(**inputs).pooler_output).abs().max() > 1e-2
    assert_same(expected[1], expected[0])


def test_dropout_of_attention_weights():
    """Drawn in another order than transformers draws it: results differ, and their mean is near what is not dropped."""
    _, ours = pair(attention_probs_dropout_prob=0.1)
    for module in ours.modules():
        if hasattr(module, "self"):
            module.output.dropout.p = 0.0  # in the audio tower the same rate is that of the attention's output
    inputs = inputs_of("ClapModel", composite_config(clvp_fast))
    for part in (ours.text_model, ours.audio_model):
        call = {k: v for k, v in inputs.items() if (k in ("input_ids", "attention_mask")) == (part is ours.text_model)}
        with torch.no_grad():
            expected = part(**call).pooler_output
            part.train()
            for module in part.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()
            torch.manual_seed(0)
            drawn = torch.stack([part(**call).pooler_output for _ in range(40)])
        assert not torch.equal(drawn[0], drawn[1])
        assert F.cosine_similarity(drawn.mean(0), expected).min() > 0.9


@pytest.mark.parametrize("option", ["always_partition", "output_hidden_states_before_downsampling"])
@torch.no_grad()
def test_options_of_the_audio_tower(option):
    """Shift windows as large as the last stage's image only on request."""
    stock, ours = pair("ClapAudioModel", "fused", torch.float64, window_size=8, depths=[2, 2, 2])
    plain = features(ours.config, dtype=torch.float64) | EVERYTHING
    inputs = plain | {option: True}
    expected = stock(**inputs)
    ours(**plain)  # which leaves nothing behind, as it does in transformers
    assert_same(ours(**inputs), expected)
    assert any(not torch.equal(a, b) for a, b in zip(stock(**plain).hidden_states, expected.hidden_states, strict=True))


@pytest.mark.parametrize("frames", [1, 100, 255, 256])
@torch.no_grad()
def test_lengths_of_spectrograms(frames):
    stock, ours = pair("ClapAudioModel")
    inputs = features(ours.config, frames=frames)
    assert_same(ours(**inputs), stock(**inputs))


@torch.no_grad()
def test_longer_clips_are_fused_and_others_are_not():
    stock, ours = pair("ClapAudioModel", "fused")
    inputs = features(ours.config, batch=4)
    for longer in ([0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]):
        inputs["is_longer"] = torch.tensor(longer, dtype=torch.bool)[:, None]
        assert_same(ours(**inputs), stock(**inputs))
    changed = {**inputs, "input_features": inputs["input_features"].clone()}
    changed["input_features"][:, 1:] += 1
    rows = (ours(**changed).pooler_output - ours(**inputs).pooler_output).abs().amax(1)
    assert rows[2] > 1e-3 and rows[[0, 1, 3]].max() == 0


@pytest.mark.parametrize("name", ["ClapTextModel", "ClapAudioModel"])
@pytest.mark.parametrize("shape", ["unfused", "fused"])
@torch.no_grad()
def test_batch_gives_what_each_gives_alone(name, shape):
    _, ours = pair(name, shape)
    inputs = inputs_of(name, composite_config(clvp_fast, shape))
    together = ours(**inputs).pooler_output
    for row in range(len(together)):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        if name == "ClapTextModel":  # without its padding
            length = int(alone["attention_mask"].sum())
            alone = {key: value[:, :length] for key, value in alone.items()}
        assert_same(ours(**alone).pooler_output[0], together[row])


@torch.no_grad()
def test_other_inputs_of_the_text_tower():
    stock, ours = pair("ClapTextModel", "fused")
    ids, mask = texts()
    embeds = torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(0))
    for inputs in (
        dict(inputs_embeds=embeds),
        dict(input_ids=ids, attention_mask=mask.bool()),
        dict(input_ids=ids, token_type_ids=torch.arange(27).view(3, 9) % 2, attention_mask=mask),
        dict(input_ids=ids, position_ids=torch.arange(9)[None] + 3),
        dict(input_ids=ids[:, :1]),
    ):
        assert_same(ours(**inputs), stock(**inputs))
    causal = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    additive = torch.zeros(1, 1, 9, 9).masked_fill(~causal, torch.finfo(torch.float32).min)
    assert_same(ours(ids, causal).last_hidden_state, stock(ids, additive).last_hidden_state)
    assert_same(ours(ids, additive).last_hidden_state, stock(ids, additive).last_hidden_state)


@torch.no_grad()
def test_without_pooler():
    ours = clvp_fast.ClapTextModel(composite_config(clvp_fast).text_config, add_pooling_layer=False).eval()
    assert ours(texts()[0]).pooler_output is None and not any("pooler" in key for key in ours.state_dict())


@pytest.mark.parametrize("name", ["ClapTextModel", "ClapAudioModel"])
@pytest.mark.parametrize("how", ["hook", "replaced"])
@pytest.mark.parametrize("which", ["", "query", "attention.output.dense", "intermediate.dense", "0.output.dense"])
@torch.no_grad()
def test_modules_that_do_more_are_called(name, how, which):
    """Put in an adapter or a hook, which changes the results as in transformers' model."""
    stock, ours = pair(name)
    inputs = inputs_of(name, composite_config(clvp_fast))
    before = ours(**inputs).pooler_output
    for model in (stock, ours):
        for key in [key for key, m in model.named_modules() if isinstance(m, torch.nn.Linear) and key.endswith(which)]:
            parent, _, leaf = key.rpartition(".")
            linear = model.get_submodule(key)
            if how == "hook":
                linear.register_forward_hook(lambda module, args, out: out * 1.1)
            else:
                setattr(model.get_submodule(parent), leaf, torch.nn.Sequential(linear, torch.nn.Tanh()))
    expected = stock(**inputs)
    assert (expected.pooler_output - before).abs().max() > 1e-3
    assert_same(ours(**inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_types(dtype):
    """Come as near to float64 as transformers' model of the same type."""
    for name in ("ClapTextModel", "ClapAudioModel"):
        stock, ours = pair(name, "fused", torch.float64)
        inputs = inputs_of(name, composite_config(clvp_fast, "fused"), torch.float64)
        exact = ours(**inputs).pooler_output
        if name == "ClapAudioModel":
            inputs["input_features"] = inputs["input_features"].to(dtype)
        errors = [
            (model.to(dtype)(**inputs).pooler_output.double() - exact).square().mean().sqrt() for model in (stock, ours)
        ]
        assert errors[1] <= 1.5 * errors[0], (name, errors)


@pytest.mark.parametrize("name", ["ClapTextModel", "ClapAudioModel"])
@torch.no_grad()
def test_compiles_whole(name):
    _, ours = pair(name)
    inputs = inputs_of(name, composite_config(clvp_fast))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(compiled(**inputs).pooler_output, ours(**inputs).pooler_output)


@torch.no_grad()
def test_backends_agree():
    _, ours = pair(shape="fused")
    inputs = inputs_of("ClapModel", composite_config(clvp_fast, "fused"))
    found = []
    for backend in ("reference", "torch"):
        with clvp_fast.backend(backend):
            found.append(ours(**inputs))
    assert_same(found[0], found[1], tolerance=3e-5)
