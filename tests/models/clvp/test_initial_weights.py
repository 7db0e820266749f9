"""Random weights start as transformers' do, parameter by parameter, also those that a checkpoint lacks."""

import torch
from transformers.models.clvp import configuration_clvp as stock_configuration, modeling_clvp as stock_modeling

from clvp_fast import ClvpConfig, ClvpForCausalLM, ClvpModelForConditionalGeneration
from tests.models.clvp.tiny import config_fields


def check(name: str, ours: torch.Tensor, expected_std: float, expected_mean: float) -> None:
    slack = 6 / ours.numel() ** 0.5
    if expected_std == 0:
        assert ours.eq(expected_mean).all(), name
    else:
        assert abs(ours.std() / expected_std - 1) < slack, (name, float(ours.std()), expected_std)
        assert abs(ours.mean()) < slack * expected_std, name


def expected_spread(name: str, stock: torch.Tensor, layers: int) -> tuple[float, float]:
    if "decoder.layers" in name and name.endswith("c_proj.weight"):
        return 0.02 / (2 * layers) ** 0.5, 0.0  # as in 5.23; 5.17 starts them at 0.02
    if stock.unique().numel() == 1:
        return 0.0, float(stock.flatten()[0])
    return float(stock.std()), 0.0


def test_spread_of_every_random_parameter_equals_transformers():
    fields = config_fields()
    torch.manual_seed(0)
    stock = stock_modeling.ClvpModelForConditionalGeneration(stock_configuration.ClvpConfig(**fields)).state_dict()
    torch.manual_seed(1)
    ours = ClvpModelForConditionalGeneration(ClvpConfig(**fields)).state_dict()
    assert ours.keys() == stock.keys()
    for name, tensor in ours.items():
        if name.endswith("inv_freq"):
            assert torch.equal(tensor, stock[name])
        else:
            check(name, tensor, *expected_spread(name, stock[name], layers=2))


def test_initializer_factor_scales():
    fields = config_fields(initializer_factor=3.0)
    decoder = ClvpForCausalLM(ClvpConfig(**fields).decoder_config)
    check("lm_head", decoder.lm_head.weight.detach(), 0.06, 0.0)


def test_parameters_that_a_checkpoint_lacks_start_the_same(tmp_path):
    model = ClvpModelForConditionalGeneration(ClvpConfig(**config_fields()))
    state = model.state_dict()
    lacking = {"logit_scale", "text_encoder_model.rotary_pos_emb.inv_freq", "conditioning_encoder.mel_conv.weight"}
    lacking |= {name for name in state if "mlp.fc1" in name or "c_proj" in name or "input_rmsnorm" in name}
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in state.items() if k not in lacking})
    loaded, info = ClvpModelForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == lacking
    for name in lacking:
        tensor = loaded.state_dict()[name]
        if name == "logit_scale" or name.endswith("inv_freq"):
            assert torch.equal(tensor, state[name]), name
        else:
            check(name, tensor, *expected_spread(name, state[name], layers=2))
