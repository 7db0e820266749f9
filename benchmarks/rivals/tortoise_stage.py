"""Tortoise's `TextToSpeech` of random weights, and the sampling that it had with transformers 4.31.

Its classes are tortoise-tts 3.0.0's own. Their `generate` has gone from transformers since 4.50: the loop here is what
4.31 ran for `tts()`, over the package's own forward. Diffusion and vocoder are silent, and take no time.
"""

import importlib
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from benchmarks.providers import Absent
from clvp_fast.integrations import make_tortoise_importable

# Sizes of `UnifiedVoice` and `CLVP` that `TextToSpeech` makes, and small ones.
REAL = (
    dict(max_mel_tokens=604, max_text_tokens=402, layers=30, model_dim=1024, heads=16, number_mel_codes=8194),
    dict(dim_text=768, dim_speech=768, dim_latent=768, text_enc_depth=20, speech_enc_depth=20, text_heads=12)
    | dict(speech_heads=12, text_seq_len=350, speech_seq_len=430, num_speech_tokens=8192),
)
SMALL = (
    dict(max_mel_tokens=80, max_text_tokens=80, layers=2, model_dim=128, heads=2, number_mel_codes=302),
    dict(dim_text=128, dim_speech=128, dim_latent=96, text_enc_depth=2, speech_enc_depth=2, text_heads=2)
    | dict(speech_heads=2, num_speech_tokens=300),
)


class Silent(nn.Module):
    """In the place of diffusion and vocoder."""

    def inference(self, mel: torch.Tensor) -> torch.Tensor:
        return mel


@cache
def tortoise_api() -> Any:
    """Import `tortoise.api` without its diffusion; raises `Absent` where it is not installed."""
    try:
        make_tortoise_importable()
    except ImportError as error:
        raise Absent(f"{error}") from error
    api = importlib.import_module("tortoise.api")
    api.do_spectrogram_diffusion = lambda diffusion, diffuser, latents, *others, **options: latents
    return api


@torch.no_grad()
def make_tts(device: str, smoke: bool) -> Any:
    """Make a `TextToSpeech` without the files of its constructor; equal weights every time, and nothing ever stops."""
    api = tortoise_api()
    decoder, encoders = SMALL if smoke else REAL
    codes = decoder["number_mel_codes"]
    torch.manual_seed(0)
    tts = api.TextToSpeech.__new__(api.TextToSpeech)
    tts.autoregressive_batch_size, tts.enable_redaction, tts.half = 1, False, False
    tts.device, tts.models_dir, tts.cvvp = torch.device(device), "", None
    tts.tokenizer = api.VoiceBpeTokenizer()
    tts.autoregressive = api.UnifiedVoice(
        **decoder,
        max_conditioning_inputs=2,
        number_text_tokens=255,
        start_text_token=255,
        start_mel_token=codes - 2,
        stop_mel_token=codes - 1,
        checkpointing=False,
        train_solo_embeddings=False,
    ).eval()
    tts.autoregressive.post_init_gpt2_config(kv_cache=False)
    tts.autoregressive.mel_head.bias[codes - 1] = -30.0
    tts.clvp = api.CLVP(**encoders, num_text_tokens=256, use_xformers=True).eval()
    tts.diffusion, tts.vocoder = Silent(), Silent()
    tts.autoregressive.inference_speech = Sampling(tts.autoregressive)
    return tts


class Sampling:
    """`UnifiedVoice.inference_speech` with the loop of transformers 4.31, and a count of the codes that are drawn."""

    def __init__(self, autoregressive: nn.Module):
        self._module = autoregressive

    def __call__(
        self, latent, text_inputs, num_return_sequences, max_generate_length, top_p, temperature, repetition_penalty,
        top_k=50, **others,
    ):  # fmt: skip
        module, model = self._module, self._module.inference_model
        ids = F.pad(text_inputs, (0, 1), value=module.stop_text_token)
        ids, _ = module.build_aligned_inputs_and_targets(ids, module.start_text_token, module.stop_text_token)
        text = module.text_embedding(ids) + module.text_pos_embedding(ids)
        prompt = torch.cat([latent[:, None], text], dim=1)
        model.store_mel_emb(prompt)
        length = prompt.shape[1]
        tokens = torch.ones(num_return_sequences, length + 1, dtype=torch.long, device=prompt.device)
        tokens[:, -1] = module.start_mel_token
        processors = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(repetition_penalty),
                TemperatureLogitsWarper(temperature),
                TopKLogitsWarper(top_k),
                TopPLogitsWarper(top_p),
            ]
        )
        past = None
        for _ in range(max_generate_length):
            out = self._forward(model, prompt, tokens, past)
            past = out.past_key_values if model.kv_cache else None
            logits = model.lm_head(out.last_hidden_state)[:, -1]
            chances = processors(tokens, logits).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(chances, 1)], 1)
        return tokens[:, length + 1 :]

    @staticmethod
    def _forward(model: Any, prompt: torch.Tensor, tokens: torch.Tensor, past: Any):
        """Run `GPT2InferenceModel.forward`, but for arguments that transformers' GPT-2 has no more."""
        length = prompt.shape[1]
        if past is None:
            speech = model.embeddings(tokens[:, length:])
            speech = speech + model.text_pos_embedding(speech)
            embeds = torch.cat([prompt.repeat_interleave(len(speech), 0), speech], 1)
        else:
            place = model.text_pos_embedding.get_fixed_embedding(tokens.shape[1] - length, tokens.device)
            embeds = model.embeddings(tokens[:, -1:]) + place
        return model.transformer(inputs_embeds=embeds, past_key_values=past, use_cache=True, return_dict=True)
