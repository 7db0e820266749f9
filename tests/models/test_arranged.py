"""Parameters are arranged where they change, never in `forward`: what came to lie otherwise is computed as it lies."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from clvp_fast import ClapModel, ClvpModelForConditionalGeneration
from clvp_fast.models.common import parameters
from clvp_fast.models.common.parameters import ArrangedLayer, arrange_parameters
from tests.models.clap.builders import inputs_of, pair, randomize as randomize_clap
from tests.models.clvp.tiny import randomize, tiny_inputs, tiny_ours


def clvp(seed: int) -> ClvpModelForConditionalGeneration:
    model = tiny_ours()
    randomize(model, seed)
    return model


def clap(seed: int) -> ClapModel:
    model = pair("ClapModel")[1]
    buffers = [buffer.clone() for buffer in model.buffers()]
    randomize_clap(model, seed)
    for buffer, value in zip(model.buffers(), buffers, strict=True):  # statistics, which are no parameters
        buffer.copy_(value)
    return model


@pytest.fixture(params=[clvp, clap], ids=["CLVP", "CLAP"])
def make(request):
    return request.param


@pytest.fixture
def use(monkeypatch):
    """Return `use(model)`, the logits; moves of a parameter fail meanwhile."""

    def moved(*_):
        raise AssertionError("forward moved parameters")

    @torch.no_grad()
    def logits(model) -> torch.Tensor:
        if isinstance(model, ClapModel):
            inputs = inputs_of("ClapModel", model.config, model.dtype)
        else:
            ids, features = tiny_inputs()
            inputs = dict(input_ids=ids, input_features=features.to(model.dtype))
        before = addresses(model)
        with monkeypatch.context() as patch:
            patch.setattr(parameters, "_pack", moved)
            patch.setattr(parameters, "transpose_storage", moved)
            patch.setattr(parameters, "arrange_parameters", moved)
            for kind in kinds():
                patch.setattr(kind, "arrange_parameters", moved)
            found = model(**inputs).logits_per_text
        assert addresses(model) == before
        return found

    return logits


def kinds() -> list[type]:
    return ArrangedLayer.__subclasses__()


def addresses(model: nn.Module) -> list[tuple]:
    return [(p.data_ptr(), p.stride()) for p in model.parameters()]


def lying_otherwise(model: nn.Module) -> list[str]:
    """Return the layers whose projections do not lie in a row, or whose `Conv1D` weights are not as in checkpoints."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Conv1D) and not module.weight.is_contiguous():
            found.append(name)
        for trio in (("q_proj", "k_proj", "v_proj"), ("query", "key", "value")):
            linears = [module._modules[key] for key in trio if key in module._modules]
            for kind in ("weight", "bias"):
                tensors = [getattr(linear, kind) for linear in linears]
                if not tensors or tensors[0] is None:
                    continue
                ends = [tensor.data_ptr() + tensor.nbytes for tensor in tensors]
                if ends[:2] != [tensor.data_ptr() for tensor in tensors[1:]]:
                    found.append(f"{name}.{kind}")
                assert all(tensor.is_contiguous() for tensor in tensors)
    return found


def layers_of(model: nn.Module) -> int:
    return sum(isinstance(module, ArrangedLayer) for module in model.modules())


@torch.no_grad()
def copy_(model, new):
    for parameter, value in zip(model.parameters(), new.parameters(), strict=True):
        parameter.copy_(value)


def write_data(model, new):
    for parameter, value in zip(model.parameters(), new.parameters(), strict=True):
        parameter.data.copy_(value)


def load(model, new):
    model.load_state_dict(new.state_dict())


def assign(model, new):
    model.load_state_dict({name: value.clone().contiguous() for name, value in new.state_dict().items()}, assign=True)


def replace_modules(model, new):
    load(model, new)
    for (name, module), other in zip([*model.named_modules()], new.modules(), strict=True):
        if isinstance(module, (nn.Linear, Conv1D)):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, copy.deepcopy(other))


def cast_there_and_back(model, new):
    load(model, new)
    model.double().float()


@pytest.mark.parametrize("change", [copy_, write_data, load, assign, replace_modules, cast_there_and_back])
def test_arranged_after_a_change(make, change, use):
    model, new = make(0), make(1)
    assert lying_otherwise(model) == [] and layers_of(model) > 4
    expected, objects = use(new), list(model.parameters())
    assert not torch.equal(use(model), expected)
    change(model, new)
    assert lying_otherwise(model) == []
    torch.testing.assert_close(use(model), expected, rtol=0, atol=1e-6)
    if change not in (assign, replace_modules):
        assert all(p is before for p, before in zip(model.parameters(), objects, strict=True))


def set_data(model, new):
    for parameter, value in zip(model.parameters(), new.parameters(), strict=True):
        parameter.data = value.detach().clone(memory_format=torch.contiguous_format)


def assign_parameters(model, new):
    for module, other in zip(model.modules(), new.modules(), strict=True):
        for name, value in other._parameters.items():
            if value is not None:
                setattr(module, name, nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("change", [set_data, assign_parameters])
def test_a_change_that_no_module_hears_of_is_computed_as_it_lies(make, change, use):
    model, new = make(0), make(1)
    expected = use(new)
    change(model, new)
    assert lying_otherwise(model) != []
    torch.testing.assert_close(use(model), expected, rtol=0, atol=1e-5)
    assert lying_otherwise(model) != []
    arrange_parameters(model)
    assert lying_otherwise(model) == []
    torch.testing.assert_close(use(model), expected, rtol=0, atol=1e-6)


def on_meta_and_back(model):
    empty = copy.deepcopy(model).to("meta")
    empty.to_empty(device="cpu")
    assert lying_otherwise(empty) == []
    # Buffers of the rest of the model are no parameters, and as empty.
    empty.load_state_dict(model.state_dict())
    return empty


COPIES = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), on_meta_and_back]


@pytest.mark.parametrize("remake", COPIES, ids=["deepcopy", "pickle", "to_empty"])
def test_a_copy_is_arranged(make, remake, use):
    model = make(0)
    found = remake(model)
    assert lying_otherwise(found) == []
    mine, theirs = ({p.untyped_storage().data_ptr() for p in m.parameters()} for m in (model, found))
    assert not mine & theirs
    assert torch.equal(use(found), use(model))


def test_loaded_models_are_arranged(make, tmp_path, use):
    model = make(0)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and lying_otherwise(loaded) == []
    assert torch.equal(use(loaded), use(model))
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert lying_otherwise(half) == [] and half.dtype == torch.bfloat16


def test_an_optimizer_and_gradients_stay_with_their_parameters(make, use):
    model, new = make(0), make(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    grads = [parameter.grad for parameter in model.parameters()]
    set_data(model, new)
    before = use(model)
    arrange_parameters(model)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())
    optimizer.step()
    assert lying_otherwise(model) == [] and not torch.allclose(use(model), before, atol=1e-4)


def test_shared_memory_stays_shared(make):
    """Another process would go on reading what it was given."""
    model = make(0).share_memory()
    assert lying_otherwise(model) == [] and all(p.is_shared() for p in model.parameters())
    set_data(model, make(1))
    model.share_memory()
    arrange_parameters(model)
    assert all(p.is_shared() for p in model.parameters()) and lying_otherwise(model) != []


def attention_of(model: nn.Module) -> tuple[ArrangedLayer, list[str]]:
    layer = next(m for m in model.modules() if {"q_proj", "query"} & m._modules.keys())
    return layer, [name for name in ("q_proj", "k_proj", "v_proj", "query", "key", "value") if name in layer._modules]


def narrower(layer, names):
    linear = layer._modules[names[1]]
    setattr(layer, names[1], nn.Linear(linear.in_features // 2, linear.out_features))


def wider_dtype(layer, names):
    layer._modules[names[1]].double()
    layer.arrange_parameters()


def bias_of_another_dtype(layer, names):
    linear = layer._modules[names[2]]
    linear.bias.data = linear.bias.data.double()
    layer.arrange_parameters()


def without_bias(layer, names):
    linear = layer._modules[names[1]]
    setattr(layer, names[1], nn.Linear(linear.in_features, linear.out_features, bias=False))


def twice_the_same(layer, names):
    setattr(layer, names[1], layer._modules[names[0]])


def on_meta(layer, names):
    layer._modules[names[1]].to("meta")
    layer.arrange_parameters()


def gathered_elsewhere(layer, names):
    linear = layer._modules[names[1]]
    linear.weight.data = torch.empty(0)
    layer.arrange_parameters()


UNLIKE = [narrower, wider_dtype, bias_of_another_dtype, without_bias, twice_the_same, on_meta, gathered_elsewhere]


@pytest.mark.parametrize("change", UNLIKE, ids=lambda change: change.__name__)
def test_unequal_parameters_keep_their_storage(make, change):
    model = make(0)
    layer, names = attention_of(model)
    layer.float()
    for name in names:
        linear = layer._modules[name]
        linear.weight.data, linear.bias.data = linear.weight.data.clone(), linear.bias.data.clone()
    kept = layer._modules[names[0]].weight
    address = kept.data_ptr()
    change(layer, names)
    assert kept.data_ptr() == address
    dtypes = [p.dtype for p in layer.parameters()]
    arrange_parameters(model)
    assert kept.data_ptr() == address and [p.dtype for p in layer.parameters()] == dtypes


def test_neighbours_by_chance_are_not_taken_for_one():
    """Make no view of two storages that happen to touch, as an allocator may put them."""
    block = torch.randn(3 * 64 * 64)
    linears = [nn.Linear(64, 64, bias=False) for _ in range(3)]
    for linear, part in zip(linears, block.split(64 * 64), strict=True):
        linear.weight.data = part.view(64, 64)
    assert parameters.packed_linears(linears) is not None
    own = torch.frombuffer(block.numpy()[: 64 * 64], dtype=torch.float32)
    linears[0].weight.data = own.view(64, 64)
    assert linears[0].weight.data_ptr() + linears[0].weight.nbytes == linears[1].weight.data_ptr()
    assert parameters.packed_linears(linears) is None
