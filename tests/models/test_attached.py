"""Attachments to a module, and replacements of it, have the same effect as in transformers' model.

Every name of transformers' `named_modules()` is tried, with each of `attachments.ATTACHED`.
"""

import warnings

import pytest
import torch
import transformers
from torch import nn

import clvp_fast
from tests.models.attachments import ATTACHED, backward_hook
from tests.models.clap import builders as clap
from tests.models.clvp import builders as clvp
from tests.models.clvp.builders import assert_same, gradients


class _Side(nn.Module):
    """transformers' encoder under the name that it has in the scorer, with the scorer's output."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.text_encoder_model = encoder

    def forward(self, **inputs):
        found = self.text_encoder_model(**inputs)
        return {"text_embeds": found.embeds, "last_hidden_state": found.last_hidden_state}


def _scorer():
    stock, encoder = clvp.pair("ClvpEncoder", dtype=torch.float64, num_hidden_layers=1)
    ours = clvp_fast.CLVPTextModelWithProjection(clvp_fast.CLVPTextConfig(**encoder.config.to_dict())).double()
    ours.text_encoder_model.load_state_dict(stock.state_dict())
    return _Side(stock).eval(), ours.eval()


def _clap(name: str, shape: str = "unfused", **changes):
    """Make a pair over small images, and the model's inputs."""
    small = dict(num_hidden_layers=1, depths=[2, 1], num_attention_heads=[2, 4], num_mel_bins=8, spec_size=32) | changes
    fields = clap.fields_of(shape, **small)
    fields["text_config"]["num_attention_heads"] = 3
    models = []
    for package in (transformers, clvp_fast):
        config = package.ClapConfig(**fields)
        side = clap.SIDES[name]
        models.append(getattr(package, name)(config if side is None else getattr(config, side)))
    stock, ours = models
    ours.load_state_dict(clap.randomize(stock).state_dict())
    inputs = {}
    if "Text" not in name:
        inputs |= clap.features(config.audio_config, batch=2, frames=70, dtype=torch.float64)
    if "Audio" not in name:
        inputs |= dict(zip(("input_ids", "attention_mask"), clap.texts(2, 5), strict=True))
    return stock.double().eval(), ours.double().eval(), inputs


def _conditioning():
    stock, ours = _clvp()
    return stock.conditioning_encoder, ours.conditioning_encoder


def _clvp(*names, **changes):
    return clvp.pair(*names, dtype=torch.float64, **changes)


TEXT = dict(input_ids=clvp.texts(2, 5), attention_mask=clvp.padding(2, 5, "right"))
CODES = dict(input_ids=clvp.codes(2, 5), attention_mask=clvp.padding(2, 5, "right"))
CLIP = dict(input_ids=clvp.texts(2, 5), input_features=clvp.clips(2, 9, torch.float64))
MODELS = {
    "conditioning": lambda: (*_conditioning(), CLIP),
    "clvp": lambda: (*_clvp(num_hidden_layers=1), CLIP),
    "encoder": lambda: (*_clvp("ClvpEncoder", "heads80"), TEXT),
    "encoder with another activation": lambda: (*_clvp("ClvpEncoder", "heads32", num_hidden_layers=1), TEXT),
    "encoder without rotation": lambda: (*_clvp("ClvpEncoder", "unrotated", num_hidden_layers=1), TEXT),
    "decoder": lambda: (*_clvp("ClvpForCausalLM", "heads80", num_hidden_layers=2), CODES),
    "scorer": lambda: (*_scorer(), TEXT),
    "clap": lambda: _clap("ClapModel"),
    "clap's text": lambda: _clap("ClapTextModelWithProjection"),
    "clap's audio": lambda: _clap("ClapAudioModelWithProjection"),
    "clap's audio with fusion": lambda: _clap("ClapAudioModel", "odd", spec_size=36, num_mel_bins=12),
}


#: Of these models the modules inside a part are tried in that part's own model, and here among the long tests.
PARTS = ("text_encoder_model", "speech_encoder_model", "speech_decoder_model", "text_model", "audio_model")


def names_of(stock: nn.Module, inside: bool) -> list[str]:
    """Return names of transformers' modules: those inside parts of a composite model, or all others."""
    composite = any(name in dict(stock.named_children()) for name in ("conditioning_encoder", "text_projection"))
    composite = composite and sum(name in dict(stock.named_children()) for name in PARTS) > 1
    names = [name for name, _ in stock.named_modules() if name]
    return [name for name in names if (composite and name.partition(".")[0] in PARTS and "." in name) == inside]


def tensors_of(found) -> dict[str, torch.Tensor]:
    """Return the floating tensors of an output, by their places."""
    if isinstance(found, torch.Tensor):
        return {"": found} if found.is_floating_point() else {}
    items = found.items() if hasattr(found, "items") else enumerate(found or ())
    return {f"{key}.{name}": x for key, value in items for name, x in tensors_of(value).items()}


def run(model, inputs, train: bool):
    """Return the tensors of the output, and gradients; or the error's class."""
    torch.manual_seed(0)
    try:
        with torch.set_grad_enabled(train), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = tensors_of(model(**inputs))
            if train:
                sum(value.square().mean() for value in found.values() if value.requires_grad).backward()
                found = {key: grad.clone() for key, grad in gradients(model).items()}
                model.zero_grad()
            return found
    except Exception as error:
        return error


def assert_equal_tensors(found, expected, name: str) -> None:
    """Assert that tensors which both have are equal, nearly all of the expected among them."""
    finite = {key: value for key, value in expected.items() if value.isfinite().all()}
    common = [key for key in finite if key in found]
    assert len(common) >= 0.9 * len(finite) > 0, f"{name}: without {sorted(finite.keys() - found.keys())}"
    assert_same({key: found[key] for key in common}, {key: finite[key] for key in common}, name, 1e-9)


def assert_as(found, expected, name: str) -> None:
    """Assert that `run` gives both the same: where transformers refuses, so must ours."""
    if isinstance(expected, Exception):
        # transformers writes into the output of a convolution, which torch forbids behind a hook of gradients.
        known = "is being modified inplace" in str(expected)
        assert known or isinstance(found, Exception), f"{name}: transformers says {expected!r}, ours nothing"
    else:
        assert not isinstance(found, Exception), f"{name}: {found!r}"
        assert_equal_tensors(found, expected, name)


def differs(found, before) -> bool:
    if isinstance(found, Exception):
        return True
    return any(
        value.shape != before[key].shape or (value - before[key]).abs().max() > 1e-6
        for key, value in found.items()
        if key in before
    )


@pytest.fixture
def exact_softmax(monkeypatch):
    """Keep transformers' CLAP from rounding attention weights to float32 in float64."""
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


@pytest.mark.parametrize("model", MODELS)
def test_every_module_is_there(model):
    stock, ours, _ = MODELS[model]()
    found = dict(ours.named_modules())
    for name, module in stock.named_modules():
        if name:
            assert name in found, name
            assert type(found[name]).__name__ == type(module).__name__, name


def check(model: str, attach, inside: bool = False) -> None:
    """Attach to each module in turn, and compare."""
    stock, ours, inputs = MODELS[model]()
    train = attach is backward_hook
    before = run(stock, inputs, train)
    assert_equal_tensors(run(ours, inputs, train), before, "nothing")
    names, wrong, told = names_of(stock, inside), [], 0
    for name in names:
        undo = [attach(one, name) for one in (stock, ours)]
        expected, found = run(stock, inputs, train), run(ours, inputs, train)
        for take_off in undo:
            take_off()
        told += differs(expected, before)
        try:
            assert_as(found, expected, name)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)
    # Containers are never called, and what stands in for many a module is the same as it.
    assert told >= len(names) / 4 > 0, f"only {told} of {len(names)} modules tell"
    assert_equal_tensors(run(ours, inputs, train), before, "what was taken off")


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize(
    ("model", "attach"),
    # Only modules inside parts of the whole model get gradients, which cannot pass through codes.
    [
        # The tower with fusion has every module of the one without it.
        pytest.param(m, a, marks=[pytest.mark.slow] if m == "clap's audio" else [])
        for m in MODELS
        for a in ATTACHED
        if (m, a) != ("clvp", backward_hook)
    ],
)
def test_as_in_transformers(model, attach):
    check(model, attach)


@pytest.mark.slow
@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("attach", ATTACHED, ids=lambda attach: attach.__name__)
@pytest.mark.parametrize("model", ["clvp", "clap"])
def test_as_in_transformers_inside_of_parts(model, attach):
    check(model, attach, inside=True)


def test_generation_calls_the_conditioning_encoder():
    """Call it as transformers does, whose hooks change the prompt."""
    _, ours = clvp.pair()
    call = dict(input_ids=clvp.texts(), input_features=clvp.clips(), do_sample=False, max_new_tokens=8)
    before, seen = ours.generate(**call)[0], []

    def hook(module, args, output):
        seen.append(output.shape)
        return output.flip(-1)

    handle = ours.conditioning_encoder.register_forward_hook(hook)
    assert not torch.equal(ours.generate(**call)[0], before)
    assert seen == [(2, 1 + 7 + 3, 128)]  # the voice, the text, its begin token and two end tokens
    handle.remove()
    assert torch.equal(ours.generate(**call)[0], before)
