"""Candidates for one text: transformers' whole `generate` (conditioning, decoding, scoring) against ours."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Provider, measure
from benchmarks.models import full_size, full_size_stock, inputs

TEXT_TOKENS = 30


@torch.no_grad()
def decoder_error(model, device: str) -> float:
    """Largest difference of the first step's logits from transformers' in float32, over the largest logit."""
    ids, features = inputs(TEXT_TOKENS, device)
    logits = []
    for each in (full_size_stock(device), model):
        prompt = each.conditioning_encoder(input_features=features.to(each.dtype), input_ids=ids)
        logits.append(each.speech_decoder_model(inputs_embeds=prompt).logits[:, -1].float())
    expected, got = logits
    return float((got - expected).abs().max() / expected.abs().max())


def greedy_tokens(model, device: str) -> torch.Tensor:
    """The first tokens; transformers' from its decoder loop with the mask that makes it right."""
    ids, features = inputs(TEXT_TOKENS, device)
    if model is not full_size_stock(device):
        return model.generate(ids, features, max_new_tokens=4, return_dict_in_generate=True).sequences
    prompt = model.conditioning_encoder(input_features=features, input_ids=F.pad(ids, (0, 1)))
    mask = torch.ones(1, prompt.shape[1] + 1, dtype=torch.long, device=device)
    return model.speech_decoder_model.generate(conditioning_embeds=prompt, attention_mask=mask, max_new_tokens=4)


def rows(device: str, candidates: int = 16, new_tokens: int = 64, repeats: int = 3) -> list[dict]:
    ids, features = inputs(TEXT_TOKENS, device)
    settings = dict(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        num_return_sequences=candidates,
        do_sample=True,
        top_k=0,
        top_p=0.8,
        temperature=0.8,
        repetition_penalty=2.0,
        return_dict_in_generate=True,
        eos_token_id=8193,
    )

    def run(model):
        torch.manual_seed(0)
        return model.generate(ids, features.to(model.dtype), **settings)

    stock, ours, half = full_size_stock(device), full_size(device), full_size(device, torch.bfloat16)
    if not torch.equal(greedy_tokens(stock, device), greedy_tokens(ours, device)):
        raise SystemExit("greedy tokens differ from transformers' decoder loop; not timed")
    weights = sum(p.numel() for p in ours.speech_decoder_model.parameters())
    return measure(
        "generate",
        {"candidates": candidates, "new_tokens": new_tokens, "text_tokens": TEXT_TOKENS},
        [
            Provider("transformers float32", lambda: run(stock), 0.0, 0.0),
            Provider("clvp_fast float32", lambda: run(ours), decoder_error(ours, device), 1e-4),
            Provider("clvp_fast bfloat16", lambda: run(half), decoder_error(half, device), 3e-2),
        ],
        repeats,
        decoder_parameters=weights,
        decoder_flop=2 * weights * candidates * new_tokens,
    )
