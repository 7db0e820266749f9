"""Tortoise's draws, by a loop over its own modules: its `generate` is gone with transformers 4.50."""

import torch
import torch.nn.functional as F


def prompt_of(autoregressive, latent, text_inputs):
    """Return `[1, length, width]` as `inference_speech` stores it."""
    ids = F.pad(text_inputs.long(), (0, 1), value=autoregressive.stop_text_token)
    ids = F.pad(ids, (1, 0), value=autoregressive.start_text_token)
    text = autoregressive.text_embedding(ids) + autoregressive.text_pos_embedding(ids)
    return torch.cat([latent[:, None], text], dim=1)


@torch.no_grad()
def next_state(autoregressive, prompt, codes):
    """Return `[1, width]` that the code behind `codes` is drawn from, at the positions that drawing counts."""
    tokens = torch.tensor([[autoregressive.start_mel_token, *codes]])
    places = [0, *(place + 1 + int(autoregressive.inference_model.kv_cache) for place in range(len(codes)))]
    mel = autoregressive.mel_embedding(tokens) + autoregressive.mel_pos_embedding.emb(torch.tensor(places))
    hidden = autoregressive.gpt(inputs_embeds=torch.cat([prompt, mel], 1), return_dict=True).last_hidden_state
    return autoregressive.final_norm(hidden[:, -1])


@torch.no_grad()
def next_logits(autoregressive, prompt, codes):
    """Return logits `[vocabulary]` behind `codes`."""
    return autoregressive.mel_head(next_state(autoregressive, prompt, codes))[0]


def penalized(logits, seen, penalty):
    """Apply a repetition penalty; `seen` includes code 1 of the original's prompt and the start token."""
    scores = logits.clone()
    for token in seen:
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    return scores


def argmax_codes(autoregressive, latent, text_inputs, length, penalty=2.0):
    """Return the likeliest codes, with the stop token if it comes within `length`."""
    prompt, codes = prompt_of(autoregressive, latent, text_inputs), []
    while len(codes) < length and autoregressive.stop_mel_token not in codes:
        seen = {1, autoregressive.start_mel_token, *codes}
        scores = penalized(next_logits(autoregressive, prompt, codes), seen, penalty)
        codes.append(int(scores.argmax()))
    return codes


def stock_inference_speech(autoregressive):
    """Run `inference_speech` with `top_k=1`, which repeats one greedy candidate.

    A draw of torch's generator, as the engine's seed is one, so that the diffusion has the same noise behind either.
    """

    def inference_speech(latent, text_inputs, num_return_sequences=1, max_generate_length=None, **options):
        assert options["top_k"] == 1
        torch.randint(2**63 - 1, ())
        codes = argmax_codes(autoregressive, latent, text_inputs, max_generate_length, options["repetition_penalty"])
        return torch.tensor([codes] * num_return_sequences)

    return inference_speech


def randomize(module, seed):
    """Random numbers in every parameter, gains about 1, so that each place counts and logits spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = name.endswith((".g", "norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
            gain = gain or name == "temperature"
            wide = "emb" in name and parameter.ndim == 2
            parameter.copy_(1 + 0.3 * noise if gain else (0.6 if wide else 0.1) * noise)
    return module.eval()


def off(found, expected):
    """Return the largest difference, relative to the root of the mean square."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).abs().max() / expected.square().mean().sqrt())
