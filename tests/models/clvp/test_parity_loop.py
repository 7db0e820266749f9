"""transformers' loop over `ClvpForCausalLM`, one call after another, on the installed release.

Each call is made of stock's model and of ours, and both give the same tokens, scores, caches and errors.
"""

import copy
import inspect

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from tests.models.clvp.builders import START, STOP, assert_same, codes, pair

CACHE = "cache" if "cache" in inspect.signature(transformers.ClvpForCausalLM.forward).parameters else "past_key_values"
TOKENS = dict(eos_token_id=STOP, pad_token_id=STOP)
EVERYTHING = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, output_attentions=True) | dict(
    output_hidden_states=True, max_new_tokens=8, **TOKENS
)
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
HOW = {
    "greedy": {},
    "sampled": dict(do_sample=True),
    "beams": dict(num_beams=3, num_return_sequences=2),
    "sampled beams": dict(num_beams=3, do_sample=True),
}


def embeds(model, *arguments) -> torch.Tensor:
    return model.get_input_embeddings()(codes(*arguments))


def continued(model, how: str):
    """Four tokens, and four more from their cache, behind `how` many further tokens or embeddings."""
    first = dict(inputs_embeds=embeds(model, 2, 5)) if how == "embeddings" else dict(input_ids=codes(2, 5))
    short = EVERYTHING | dict(max_new_tokens=4)
    outputs = model.generate(**first, **short)
    rest = {CACHE: outputs[CACHE], **short}
    if how == "embeddings":
        both = torch.cat([first["inputs_embeds"], model.get_input_embeddings()(outputs.sequences)], 1)
        return model.generate(inputs_embeds=both, **rest)
    more = [codes(2, 2, 5)] if how == "tokens" else []
    return model.generate(torch.cat([outputs.sequences, *more], 1), **rest)


def trained(model, call):
    """Make `call` on a model in training mode that checkpoints its gradients."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    result = call(model.train())
    model.gradient_checkpointing_disable()
    return result


CALLS = {
    **{
        f"{name}, {'a' if use_cache else 'no'} cache": lambda model, use_cache=use_cache, how=how: model.generate(
            codes(2, 5), use_cache=use_cache, **how, **EVERYTHING
        )
        for use_cache in (True, False)
        for name, how in HOW.items()
    },
    **{
        f"{name}, embeddings": lambda model, how=how: model.generate(
            inputs_embeds=embeds(model, 2, 5), **how, **EVERYTHING
        )
        for name, how in HOW.items()
    },
    "ids and embeddings": lambda model: model.generate(codes(2, 5), inputs_embeds=embeds(model, 2, 5), **EVERYTHING),
    "from the start token": lambda model: model.generate(input_ids=torch.tensor([[START, 4, 5]]), **EVERYTHING),
    "from nothing": lambda model: model.generate(**EVERYTHING),
    "static cache": lambda model: model.generate(codes(2, 5), cache_implementation="static", **EVERYTHING),
    "static cache, beams": lambda model: model.generate(
        codes(2, 5), cache_implementation="static", num_beams=3, **EVERYTHING
    ),
    "a static cache of the caller's": lambda model: model.generate(
        codes(2, 5), **{CACHE: StaticCache(config=model.config, max_cache_len=40)}, **EVERYTHING
    ),
    "a dynamic cache of the caller's": lambda model: model.generate(
        codes(2, 5), **{CACHE: DynamicCache(config=model.config)}, **EVERYTHING
    ),
    "two caches": lambda model: model.generate(
        codes(2, 5), cache_implementation="static", **{CACHE: DynamicCache()}, **EVERYTHING
    ),
    "a tuple for a cache": lambda model: model.generate(codes(2, 5), **{CACHE: ((1, 2),)}, **EVERYTHING),
    "prompt lookup": lambda model: model.generate(codes(1, 5), prompt_lookup_num_tokens=3, **EVERYTHING),
    "assistant": lambda model: model.generate(codes(1, 5), assistant_model=copy.deepcopy(model), **EVERYTHING),
    "assistant, sampled": lambda model: model.generate(
        codes(1, 5), assistant_model=copy.deepcopy(model), do_sample=True, **EVERYTHING
    ),
    "continued": lambda model: continued(model, "nothing"),
    "continued behind more": lambda model: continued(model, "tokens"),
    "continued embeddings": lambda model: continued(model, "embeddings"),
    "padding in front": lambda model: model.generate(codes(2, 5), attention_mask=MASK, **EVERYTHING),
    "padding in front, positions": lambda model: model.generate(
        codes(2, 5), attention_mask=MASK, position_ids=(MASK.cumsum(1) - 1).clamp(min=0), **EVERYTHING
    ),
    "padding in front, beams": lambda model: model.generate(
        codes(2, 5), attention_mask=MASK, num_beams=3, **EVERYTHING
    ),
    "in pieces": lambda model: model.generate(codes(2, 9), prefill_chunk_size=4, **EVERYTHING),
    "guided": lambda model: model.generate(codes(2, 5), guidance_scale=1.5, **EVERYTHING),
    "an unknown argument": lambda model: model.generate(codes(2, 5), nonsense=3, **EVERYTHING),
    "in training": lambda model: trained(model, lambda model: model.generate(codes(2, 5), **EVERYTHING)),
}


def plain(value):
    """Return an output with its cache as keys and values by layer; values without tensors stay."""
    if hasattr(value, "get_seq_length"):
        length = int(value.get_seq_length())
        return [(layer.keys[..., :length, :], layer.values[..., :length, :]) for layer in value.layers]
    return {key: plain(item) for key, item in value.items()} if hasattr(value, "items") else value


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_the_call_gives_what_stock_gives(name):
    results = []
    for model in pair("ClvpForCausalLM", dtype=torch.float64):
        torch.manual_seed(5)
        try:
            results.append(plain(CALLS[name](model)))
        except (ValueError, RuntimeError) as error:
            results.append((type(error), str(error)))
    expected, found = results
    fails = name in ("two caches", "a tuple for a cache", "an unknown argument")
    assert isinstance(expected, tuple) == fails, expected
    if not fails:
        assert expected["sequences"].shape[1] >= 4 and len(expected["sequences"].unique()) > 3
    assert_same(found, expected)


@torch.no_grad()
def test_greedy_tokens_are_those_of_whole_forward_passes():
    """Take each token as the argmax over all before it, without stock's loop or a cache."""
    _, ours = pair("ClvpForCausalLM", dtype=torch.float64)
    ids = torch.tensor([[START, 4, 5]])
    found = ours.generate(input_ids=ids, max_new_tokens=12, **TOKENS)
    for _ in range(12):
        ids = torch.cat([ids, ours(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert found.tolist() == ids.tolist()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("use_cache", [None, False, True])
def test_checkpointed_layers_and_the_cache(use_cache, grad):
    """Compare a training step's result, which differs between releases where there are no gradients."""
    results = []
    with torch.set_grad_enabled(grad):
        for model in pair("ClvpForCausalLM", dtype=torch.float64):
            outputs = trained(model, lambda model: model(codes(), use_cache=use_cache, output_hidden_states=True))
            results.append(plain(outputs))
    assert_same(*reversed(results))
