"""The latents of candidates for Tortoise's diffusion: a second pass over fixed codes, cut in the final silence."""

from collections.abc import Sequence

import numpy as np
import torch

from clvp_fast.models.clvp.causal_lm import ClvpForCausalLM
from clvp_fast.models.clvp.tokens import finished_codes, start_token
from clvp_fast.models.common.layers import add_norm

#: The number of silent codes in a row that the diffusion gets after the speech; the original cuts at the next one.
MAX_SILENCE = 8


def cut_in_silence(codes: Sequence[int] | np.ndarray, silence: int) -> int:
    """Return how many latents of fixed `codes` `[length]` the original keeps: all before a ninth silent code in a row.

    The first run of more than eight codes `silence` counts, even within speech; without such a run all are kept.
    """
    run = 0
    for place, code in enumerate(codes):
        run = run + 1 if code == silence else 0
        if run > MAX_SILENCE:
            return place
    return len(codes)


@torch.no_grad()
def states_of_codes(decoder: ClvpForCausalLM, prompt: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the state that predicts each code, `[length, hidden_size]` in the model's dtype, after both final norms.

    As in the original's second pass (`return_latent=True`), the start token and the codes stand at positions 0, 1, 2,
    and so on, whichever positions they were drawn with.

    Args:
        prompt: `[prompt, hidden_size]`, voice and text without the start token, with position embeddings.
        codes: `[length]` int64, at least one; the last is not entered.
    """
    stack = decoder.model.decoder
    start = codes.new_full((1,), start_token(decoder.config))
    entered = torch.cat([start, codes[:-1]]).to(prompt.device)
    places = torch.arange(len(entered), device=prompt.device)
    speech = stack.input_embeds_layer(entered) + stack.position_embeds_layer(places)
    embeds = torch.cat([prompt, speech.to(prompt.dtype)])[None]
    hidden = decoder.model(inputs_embeds=embeds, embeds_have_positions=True, use_cache=False).last_hidden_state
    return add_norm(decoder.final_norm, hidden[0, len(prompt) :])[1]


def diffusion_latents(
    decoder: ClvpForCausalLM, prompt: torch.Tensor, codes: np.ndarray | torch.Tensor, max_codes: int
) -> torch.Tensor:
    """Return the latents of a candidate as original Tortoise hands them to its diffusion.

    The codes are filled up and fixed to `max_codes` as for scoring, cut by `cut_in_silence`, and run through the
    decoder a second time: a candidate that stopped has eight latents more than codes, the states over its silence.

    Args:
        prompt: as `states_of_codes`.
        codes: `[length]` int64, at most `max_codes`, without start and stop token.
        max_codes: the length that candidates are filled up to (`max_mel_tokens` there, `max_new_tokens` here).

    Returns:
        `[1, latents, hidden_size]` float32.
    """
    fixed = finished_codes([codes], max_codes, decoder.config)[0]
    kept = cut_in_silence(fixed.tolist(), decoder.config.decoder_fixing_codes[0])
    return states_of_codes(decoder, prompt, fixed[:kept])[None].float()
