"""Attachments of torch, accelerate and PEFT act as in transformers: offloading, adapters, pruning, parametrizations."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import clvp_fast
from tests.models.attachments import replace
from tests.models.clap import builders as clap
from tests.models.clvp import builders as clvp
from tests.models.clvp.builders import assert_same


def _clvp():
    return (*clvp.pair(), dict(input_ids=clvp.texts(2, 5), input_features=clvp.clips(2, 9)))


def _encoder():
    return (*clvp.pair("ClvpEncoder"), dict(input_ids=clvp.texts(2, 5)))


def _decoder():
    return (*clvp.pair("ClvpForCausalLM"), dict(input_ids=clvp.codes(2, 5)))


def _clap(name="ClapModel"):
    return (*clap.pair(name), clap.inputs_of(name, clap.composite_config(clvp_fast)))


MODELS = {"clvp": _clvp, "encoder": _encoder, "decoder": _decoder, "clap": _clap}


def linears(model) -> dict[str, nn.Module]:
    """Return all modules with a matrix: linear layers, GPT-2's convolutions, and convolutions."""
    found = {name: module for name, module in model.named_modules() if getattr(module, "weight", None) is not None}
    return {name: module for name, module in found.items() if module.weight.ndim >= 2 and name != "lm_head"}


def outputs(model, inputs) -> dict:
    with torch.no_grad():
        found = model(**inputs)
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


def assert_both(stock, ours, inputs, before=None, tolerance=3e-5) -> None:
    """Assert that both give the same result, which differs from the former one."""
    expected, found = outputs(stock, inputs), outputs(ours, inputs)
    expected = {key: value for key, value in expected.items() if key in found}
    assert expected
    if before is not None:
        assert any((value.float() - before[key].float()).abs().max() > 1e-3 for key, value in expected.items())
    assert_same({key: found[key] for key in expected}, expected, "output", tolerance)


def pruned(model):
    for module in linears(model).values():
        prune.l1_unstructured(module, "weight", 0.4)


def pruned_for_good(model):
    pruned(model)
    for module in linears(model).values():
        prune.remove(module, "weight")


class Cut(nn.Module):
    def forward(self, weight):
        return weight.clamp(-0.1, 0.1)


def parametrized(model):
    for module in linears(model).values():
        if not isinstance(module, nn.Embedding):
            parametrize.register_parametrization(module, "weight", Cut())


def old_weight_norm(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in linears(model).values():
            nn.utils.weight_norm(module)
            module.weight_g.data *= 1.2


def weight_norm(model):
    for module in linears(model).values():
        nn.utils.parametrizations.weight_norm(module)
        module.parametrizations.weight.original0.data *= 1.2


def spectral_norm(model):
    for module in linears(model).values():
        torch.manual_seed(0)
        nn.utils.parametrizations.spectral_norm(module)


def norms_without_gains(model):
    for name, module in list(model.named_modules()):
        if type(module) is nn.LayerNorm:
            replace(model, name, nn.LayerNorm(module.normalized_shape, module.eps, elementwise_affine=False))


def norms_without_offsets(model):
    for name, module in list(model.named_modules()):
        if type(module) is nn.LayerNorm:
            norm = nn.LayerNorm(module.normalized_shape, module.eps, bias=False)
            norm.weight = module.weight
            replace(model, name, norm)


def linears_without_biases(model):
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = module.weight
            replace(model, name, linear)


def embeddings_of_bounded_norm(model):
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.max_norm = 0.3


TORCH = (pruned, pruned_for_good, parametrized, old_weight_norm, weight_norm, spectral_norm, norms_without_gains)
TORCH += (norms_without_offsets, linears_without_biases, embeddings_of_bounded_norm)


def on_all_modules(model):
    """Give torch's hook on the calls of all modules; the test removes it."""
    hook = lambda module, args, output: output * 0.9 if isinstance(module, nn.Linear) else None  # noqa: E731
    return nn.modules.module.register_module_forward_hook(hook)


@pytest.mark.parametrize("attach", TORCH, ids=lambda attach: attach.__name__)
@pytest.mark.parametrize("model", MODELS)
def test_torch(model, attach):
    stock, ours, inputs = MODELS[model]()
    before = outputs(stock, inputs)
    attach(stock)
    attach(ours)
    assert_both(stock.eval(), ours.eval(), inputs, before)


@pytest.mark.parametrize("dropping", [True, False], ids=["dropouts alone", "all but dropouts"])
@pytest.mark.parametrize("model", MODELS)
def test_modules_in_training_mode(model, dropping):
    """Give each dropout layer a mode of its own, as Monte Carlo dropout does. All of them drop everything here."""
    stock, ours, inputs = MODELS[model]()
    before = outputs(stock, inputs)
    for one in (stock, ours):
        for module in one.modules():
            if isinstance(module, nn.Dropout):
                module.p = 1.0
            # Attention's probability is a number, zero in these models; the mode of a batch norm is another matter.
            module.training = dropping == isinstance(module, nn.Dropout) and not isinstance(module, nn.BatchNorm2d)
    if dropping:
        assert_both(stock, ours, inputs, before)
    else:
        assert_both(stock, ours, inputs)
        assert_same(outputs(ours, inputs), before, tolerance=3e-5)


@pytest.mark.parametrize("model", MODELS)
def test_hooks_on_all_modules(model):
    stock, ours, inputs = MODELS[model]()
    before = outputs(stock, inputs)
    handle = on_all_modules(None)
    try:
        assert_both(stock, ours, inputs, before)
    finally:
        handle.remove()


TEXTS = {"encoder": _encoder, "clap's text": lambda: _clap("ClapTextModelWithProjection")}


@pytest.mark.parametrize("model", TEXTS)
def test_derivatives_forward(model):
    """Use `torch.func.jvp`, also with `torch.no_grad()`: neither kernels nor torch's fused attention support it."""
    stock, ours, _ = TEXTS[model]()
    found = []
    for one in (stock, ours):
        one.requires_grad_(False)
        embeds = one.get_input_embeddings()(clvp.texts(2, 5) % 50)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                call = lambda x, one=one: one(inputs_embeds=x).last_hidden_state  # noqa: E731
                found.append(torch.func.jvp(call, (embeds,), (embeds.cos(),)))
    for tangents in found[1:]:
        assert_same(dict(enumerate(tangents)), dict(enumerate(found[0])), tolerance=3e-5)


@pytest.mark.parametrize("model", TEXTS)
def test_an_ensemble_in_one_call(model):
    """Use `functional_call` under `vmap`, whose tensors are the caller's, and stay as they lie."""
    stock, ours, _ = TEXTS[model]()
    found = []
    for one in (stock, ours):
        stacked = {name: torch.stack([p.detach(), p.detach() * 0.9]) for name, p in one.named_parameters()}
        ids = dict(input_ids=clvp.texts(2, 5) % 50)
        call = lambda state, one=one, ids=ids: torch.func.functional_call(one, state, (), ids)  # noqa: E731
        with torch.no_grad():
            found.append(torch.vmap(lambda state, call=call: call(state).last_hidden_state)(stacked))
            alone = {name: p[1].clone() for name, p in stacked.items()}
            places = {name: p.data_ptr() for name, p in alone.items()}
            assert_same(call(alone).last_hidden_state, found[-1][1], tolerance=3e-5)
        assert {name: p.data_ptr() for name, p in alone.items()} == places
    assert_same(found[1], found[0], tolerance=3e-5)


@pytest.mark.parametrize("model", MODELS)
def test_parameters_of_inference_mode(model):
    """Call such a model inside and outside of the mode; its storage cannot move."""
    stock, ours, inputs = MODELS[model]()
    with torch.inference_mode():
        for one in (stock, ours):
            for module in one.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)
    assert_both(stock, ours, inputs)
    with torch.inference_mode():
        assert_both(stock, ours, inputs)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloading(model, how, tmp_path):
    """Leave parameters on "meta", from where they come for a module's own call."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    stock, ours, inputs = MODELS[model]()
    expected = outputs(ours, inputs)
    for one, folder in ((stock, tmp_path / "stock"), (ours, tmp_path / "ours")):
        if how == "cpu":
            accelerate.cpu_offload(one, execution_device="cpu")
        else:
            accelerate.disk_offload(one, folder, execution_device="cpu")
    assert all(parameter.is_meta for parameter in ours.parameters())
    assert_both(stock, ours, inputs)
    assert_same(outputs(ours, inputs), expected, tolerance=3e-5)


@pytest.mark.parametrize("name", ["ClvpModelForConditionalGeneration", "ClvpForCausalLM", "ClapModel"])
def test_device_map(name, tmp_path):
    """Half of the model fits into memory, the other half stays on the disk."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    clap_model = name == "ClapModel"
    _, ours = (clap if clap_model else clvp).pair(name)
    if clap_model:
        inputs = clap.inputs_of(name, clap.composite_config(clvp_fast))
    elif name == "ClvpForCausalLM":
        inputs = dict(input_ids=clvp.codes(2, 5))
    else:
        inputs = dict(input_ids=clvp.texts(2, 5), input_features=clvp.clips(2, 9))
    expected = outputs(ours, inputs)
    ours.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    size = sum(tensor.numel() * tensor.element_size() for tensor in ours.state_dict().values())
    loaded = (
        type(ours)
        .from_pretrained(
            tmp_path / "model", device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path / "offloaded"
        )
        .eval()
    )
    assert 0 < sum(parameter.is_meta for parameter in loaded.parameters()) < len(list(loaded.parameters()))
    assert_same(outputs(loaded, inputs), expected, tolerance=3e-5)
    if name == "ClvpModelForConditionalGeneration":
        settings = dict(max_new_tokens=5, do_sample=False)
        found = loaded.generate(**inputs, **settings)
        assert_same(found, ours.generate(**inputs, **settings), tolerance=3e-5)


def lora(peft, model):
    wanted = ["q_proj", "v_proj", "out_proj", "c_fc", "fc2", "proj", "query", "value", "dense", "linear1"]
    return peft.LoraConfig(r=4, init_lora_weights=False, target_modules=present(model, wanted))


def ln_tuning(peft, model):
    kinds = (nn.LayerNorm,)
    return peft.LNTuningConfig(target_modules=[name for name, m in model.named_modules() if isinstance(m, kinds)])


def ia3(peft, model):
    wanted = present(model, ["k_proj", "v_proj", "c_proj", "fc2", "key", "value"])
    return peft.IA3Config(target_modules=wanted, feedforward_modules=present(model, ["c_proj", "fc2"]))


def present(model, names: list[str]) -> list[str]:
    ends = {
        name.rpartition(".")[2] for name, module in model.named_modules() if getattr(module, "weight", None) is not None
    }
    return [name for name in names if name in ends]


@pytest.mark.parametrize("adapt", [lora, ln_tuning, ia3], ids=lambda adapt: adapt.__name__)
@pytest.mark.parametrize("model", MODELS)
def test_peft(model, adapt):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    stock, ours, inputs = MODELS[model]()
    before, adapted = outputs(stock, inputs), []
    for one in (stock, ours):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted.append(peft.get_peft_model(one, adapt(peft, one)).base_model.model.eval())
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        trained = {name: p for name, p in stock.named_parameters() if p.requires_grad}
        for name, parameter in trained.items():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            ours.get_parameter(name).copy_(parameter)
    assert trained
    assert_both(*adapted, inputs, before)
