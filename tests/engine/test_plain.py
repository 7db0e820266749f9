"""An engine reads a plain model's parameters: what is attached to a module is told, when it is made and later."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from clvp_fast import CandidateEngine, CandidateRequest, ClvpFeatureExtractor, SamplingParams
from tests.engine.test_decoder import tiny
from tests.kit import random
from tests.models.attachments import ATTACHED, replace

PARTS = [
    "speech_decoder_model.model.decoder.layers.1.mlp.act",
    "speech_decoder_model.model.decoder.layers.0",
    "speech_decoder_model.final_norm",
    "conditioning_encoder.group_norms.0",
    "text_encoder_model.layers.0.self_attn.out_proj",
    "speech_encoder_model.sequence_summary",
]


def engine(model):
    processor = SimpleNamespace(feature_extractor=ClvpFeatureExtractor(feature_size=20), tokenizer=None)
    return CandidateEngine(model, processor, max_batch=2, max_new_tokens=8)


def result(of):
    settings = SamplingParams(do_sample=False, repetition_penalty=1.0, max_new_tokens=8, seed=0)
    (found,) = of.generate(
        CandidateRequest(input_ids=[5, 9, 17], input_features=random(1, 20, 40, seed=4), sampling=settings)
    )
    return found


def told(part: str, when: str = "") -> str:
    name = part.replace(".", "[.]")
    return rf"^module {name} (has|is) .*{when}, (and the engine|which) reads its parameters: take it off"


def pruned(model, part):
    module = next(
        m for m in model.get_submodule(part).modules() if isinstance(getattr(m, "weight", None), nn.Parameter)
    )
    prune.l1_unstructured(module, "weight", 0.2)


def normed(model, part):
    module = next(
        m for m in model.get_submodule(part).modules() if isinstance(getattr(m, "weight", None), nn.Parameter)
    )
    parametrizations.weight_norm(module)


def compiled(model, part):
    model.get_submodule(part).compile(backend="eager")


def subclassed(model, part):
    module = model.get_submodule(part)
    module.__class__ = type("Mine", (type(module),), {"__module__": "mine"})


@pytest.mark.parametrize("attach", [*ATTACHED, compiled, subclassed], ids=lambda attach: attach.__name__)
@pytest.mark.parametrize("part", PARTS)
def test_attachments_are_named_before_and_after_construction(part, attach):
    model = tiny()
    made = engine(model)
    before = result(made)
    assert before.error is None
    attach(model, part)
    after = result(made)
    with pytest.raises(type(after.error), match=told(part, "since the engine was made")):
        raise after.error
    assert isinstance(after.error, ValueError)
    with pytest.raises(ValueError, match=told(part)):
        engine(model)


@pytest.mark.parametrize("attach", [pruned, normed], ids=lambda attach: attach.__name__)
def test_parametrizations_are_told(attach):
    model = tiny()
    made = engine(model)
    attach(model, "speech_decoder_model.model.decoder.layers.0")
    for raised in (lambda: engine(model), lambda: (_ for _ in ()).throw(result(made).error)):
        with pytest.raises(ValueError, match=r"^module speech_decoder_model.model.decoder.layers.0\.\S+ (has|is) "):
            raised()


def test_a_request_after_it_was_taken_off():
    """Serve again with the same codes; another module of the same class still counts as a replacement."""
    model = tiny()
    made = engine(model)
    expected = result(made)
    handle = model.speech_decoder_model.lm_head.register_forward_hook(lambda *_: None)
    assert result(made).error is not None
    handle.remove()
    found = result(made)
    assert found.error is None and found.codes.tolist() == expected.codes.tolist()
    replace(model, "speech_decoder_model.lm_head", nn.Linear(128, 300))
    assert "since the engine was made" in str(result(made).error)


def test_lora_is_told_before_it_is_merged_and_served_after():
    """Let `generate()` of the classes call the adapted modules meanwhile, as `use_engine=False` does."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny()
    inputs = dict(input_ids=torch.tensor([[5, 9, 17]]), input_features=random(1, 20, 40, seed=4))
    settings = dict(do_sample=False, max_new_tokens=8, repetition_penalty=1.0, return_dict_in_generate=True)

    def generated(**options):
        return model.generate(**inputs, **settings, **options).sequences

    before = generated()
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj", "out_proj"])
    adapted = peft.get_peft_model(model, config).eval()
    told = r"is a \S+ of another package or subclass.*merge adapters.*generate\(use_engine=False\)"
    with pytest.raises(ValueError, match=told):
        engine(model)
    found = generated()
    assert torch.equal(found, generated(use_engine=False)) and not torch.equal(found, before)
    with pytest.raises(ValueError, match="of another package or subclass"):
        generated(use_engine=True)
    merged = adapted.merge_and_unload()
    codes = result(engine(merged)).codes[0]
    assert codes.tolist() == found[0, 1 : 1 + len(codes)].tolist()
