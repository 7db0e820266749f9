"""Checkpoints, configurations and random weights: the same keys and files, loaded both ways, parts out of a whole."""

import json

import pytest
import torch
import transformers

import clvp_fast
from tests.models.clap.builders import SHAPES, SIDES, composite_config, inputs_of, pair
from tests.models.clvp.test_initial_weights import check
from tests.models.clvp.test_parity_checkpoints import assert_equal_states


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SIDES)
def test_keys_shapes_and_order(name, shape):
    stock, ours = pair(name, shape)
    assert_equal_states(ours.state_dict(), stock.state_dict())
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in stock.named_parameters()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SIDES)
def test_saved_by_either_loads_in_the_other(name, shape, tmp_path):
    stock, ours = pair(name, shape)
    with torch.no_grad():  # weights in the layout that running leaves behind
        ours(**inputs_of(name, composite_config(clvp_fast, shape)))
    written = []
    for writer, package in ((stock, clvp_fast), (ours, transformers), (ours, clvp_fast)):
        folder = tmp_path / f"{type(writer).__module__}-{package.__name__}"
        writer.save_pretrained(folder)
        written.append(json.loads((folder / "config.json").read_text()))
        read, report = getattr(package, name).from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        assert_equal_states(read.state_dict(), stock.state_dict())
        assert not read.training
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("writer", ["stock", "ours"])
@pytest.mark.parametrize("name", [name for name in SIDES if name != "ClapModel"])
def test_part_of_a_composite_checkpoint(name, writer, tmp_path):
    """Load the bare towers, of which transformers loads nothing here and goes on with a random model."""
    stock, ours = pair(shape="fused")
    (stock if writer == "stock" else ours).save_pretrained(tmp_path)
    side = "text" if "Text" in name else "audio"
    prefix = "" if name.endswith("Projection") else f"{side}_model."
    parts = (f"{side}_model.", f"{side}_projection.") if not prefix else (prefix,)
    expected = {k.removeprefix(prefix): v for k, v in stock.state_dict().items() if k.startswith(parts)}
    read, report = getattr(clvp_fast, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_equal_states(read.state_dict(), expected)
    assert not read.training and read.config.projection_dim == 24
    read.save_pretrained(tmp_path / "part")
    again = getattr(transformers, name).from_pretrained(tmp_path / "part")
    assert_equal_states(again.state_dict(), expected)


def test_buffers_that_an_old_checkpoint_lacks(tmp_path):
    """Start the positions, the distances and the bias table as in a new model."""
    _, ours = pair()
    state = ours.state_dict()
    lacking = {name for name in state if name.endswith(("position_ids", "token_type_ids", "relative_position_index"))}
    assert len(lacking) == 2 + 4
    tables = {name for name in state if name.endswith("bias_table")} | {"logit_scale_a"}
    kept = {key: value for key, value in state.items() if key not in lacking | tables}
    ours.save_pretrained(tmp_path, state_dict=kept)
    read, report = clvp_fast.ClapModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == lacking | tables
    for name in lacking:
        assert torch.equal(read.state_dict()[name], state[name]), name
    for name in tables - {"logit_scale_a"}:
        assert read.state_dict()[name].eq(0).all()
    assert read.logit_scale_a.item() == pytest.approx(torch.tensor(1 / 0.07).log().item())


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("shape", ["unfused", "fused"])
def test_random_weights_start_as_transformers_do(shape, factor):
    states = []
    for seed, package in enumerate((transformers, clvp_fast)):
        torch.manual_seed(seed)
        config = composite_config(package, shape, initializer_factor=factor)
        config.initializer_factor = factor
        states.append(package.ClapModel(config).state_dict())
    stock, ours = states
    assert ours.keys() == stock.keys()
    for name, tensor in ours.items():
        if stock[name].unique().numel() <= 1 or not tensor.is_floating_point():
            assert torch.equal(tensor, stock[name]), name
        else:
            slack = 6 / tensor.numel() ** 0.5
            spread = float(stock[name].std())
            assert abs(tensor.std() / spread - 1) < 2 * slack, name
            assert abs(tensor.mean()) < slack * spread, name
    check("query", ours["text_model.encoder.layer.0.attention.self.query.weight"], (48 * 2 * 2) ** -0.5 * factor, 0.0)
    check("embedding", ours["text_model.embeddings.word_embeddings.weight"], 0.02 * factor, 0.0)


@pytest.mark.parametrize("shape", [None, *SHAPES])
def test_configurations_are_the_same(shape):
    made = [
        package.ClapConfig() if shape is None else composite_config(package, shape)
        for package in (transformers, clvp_fast)
    ]
    assert made[1].to_dict() == made[0].to_dict() and made[1].to_json_string() == made[0].to_json_string()
    for side in ("text_config", "audio_config"):
        assert getattr(made[1], side).to_dict() == getattr(made[0], side).to_dict()
    assert made[1].hidden_size == made[0].hidden_size and made[1].num_hidden_layers == made[0].num_hidden_layers


def test_composite_of_two_configurations(tmp_path):
    text, audio = clvp_fast.ClapTextConfig(hidden_size=96), clvp_fast.ClapAudioConfig(depths=[1, 1])
    config = clvp_fast.ClapConfig.from_text_audio_configs(text, audio, projection_dim=20)
    assert (
        config.to_dict()
        == transformers.ClapConfig(
            text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=20
        ).to_dict()
    )
    assert config.text_config.projection_dim == 20 and config.num_hidden_layers == 12 + 2
    config.save_pretrained(tmp_path)
    read = clvp_fast.ClapTextConfig.from_pretrained(tmp_path)
    assert type(read) is clvp_fast.ClapTextConfig and read.hidden_size == 96 and read.projection_dim == 20
    assert clvp_fast.ClapAudioConfig.from_pretrained(tmp_path).depths == [1, 1]


def test_fields_of_older_checkpoints_are_kept():
    """Keep options of checkpoints on the hub that no class reads any more."""
    old = dict(position_embedding_type="absolute", use_cache=True, is_decoder=False)
    made = [package.ClapConfig(text_config=dict(old)) for package in (transformers, clvp_fast)]
    assert made[1].to_dict() == made[0].to_dict() and made[1].text_config.position_embedding_type == "absolute"
