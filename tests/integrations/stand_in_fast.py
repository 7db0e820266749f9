"""A stand-in of `tortoise.api_fast.TextToSpeech`, and the real one at tiny sizes."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.integrations import stand_in
from tests.integrations.oracle import randomize


class Hifi(nn.Module):
    def __init__(self):
        super().__init__()
        self.wave = nn.Linear(stand_in.WIDTH, 1)

    def forward(self, frames, voice):
        return self.wave((frames + voice).transpose(1, 2)).transpose(1, 2)

    def inference(self, latents, voice):
        raise AssertionError("Torch not compiled with CUDA enabled")  # it moves them there by name


def _settings(temperature, repetition_penalty, top_p, length_penalty):
    settings = dict(temperature=temperature, repetition_penalty=float(repetition_penalty), top_p=top_p, top_k=50)
    return settings | dict(do_sample=True, num_beams=1, num_return_sequences=1, length_penalty=float(length_penalty))


class TextToSpeech:
    get_random_conditioning_latents = stand_in.TextToSpeech.get_random_conditioning_latents
    deterministic_state = stand_in.TextToSpeech.deterministic_state

    def __init__(self, kv_cache=False, stop_bias=1.0):
        self.half, self.device, self.tokenizer = False, torch.device("cpu"), stand_in.Tokenizer()
        self.autoregressive = randomize(stand_in.UnifiedVoice(kv_cache), 1)
        with torch.no_grad():
            self.autoregressive.mel_head.bias[stand_in.STOP] = stop_bias
        self.hifi_decoder = randomize(Hifi(), 2)

    def get_conditioning_latents(self, voice_samples, return_mels=False):
        return voice_samples[0]  # the tests give latents

    def _begin(self, text, voice_samples, seed):
        self.deterministic_state(seed=seed)
        ids = F.pad(torch.IntTensor(self.tokenizer.encode(text)).unsqueeze(0), (0, 1))
        return ids, self.get_conditioning_latents(voice_samples)

    def tts(
        self,
        text,
        voice_samples=None,
        k=1,
        verbose=True,
        use_deterministic_seed=None,
        num_autoregressive_samples=512,
        temperature=0.8,
        length_penalty=1,
        repetition_penalty=2.0,
        top_p=0.8,
        max_mel_tokens=500,
        cvvp_amount=0.0,
        **hf_generate_kwargs,
    ):
        ids, voice = self._begin(text, voice_samples, use_deterministic_seed)
        settings = _settings(temperature, repetition_penalty, top_p, length_penalty)
        settings |= dict(output_attentions=False, output_hidden_states=True)
        with torch.no_grad():
            codes = self.autoregressive.inference_speech(voice, ids, **settings, **hf_generate_kwargs)
            lengths = torch.tensor([ids.shape[-1]]), torch.tensor([codes.shape[-1] * 1024])
            latents = self.autoregressive(
                voice, ids, lengths[0], codes, lengths[1], return_latent=True, clip_inputs=False
            )
            return self.hifi_decoder.inference(latents, voice)

    def tts_stream(
        self,
        text,
        voice_samples=None,
        conditioning_latents=None,
        k=1,
        verbose=True,
        use_deterministic_seed=None,
        return_deterministic_state=False,
        overlap_wav_len=1024,
        stream_chunk_size=40,
        num_autoregressive_samples=512,
        temperature=0.8,
        length_penalty=1,
        repetition_penalty=2.0,
        top_p=0.8,
        max_mel_tokens=500,
        cvvp_amount=0.0,
        **hf_generate_kwargs,
    ):
        ids, voice = self._begin(text, voice_samples, use_deterministic_seed)
        inputs = self.autoregressive.compute_embeddings(voice, ids)
        settings = _settings(temperature, repetition_penalty, top_p, length_penalty)
        drawn = self.autoregressive.get_generator(fake_inputs=inputs, **settings, **hf_generate_kwargs)
        latents = []
        for _, latent in drawn:
            latents.append(latent)
            if len(latents) % stream_chunk_size == 0:
                with torch.no_grad():
                    yield self.hifi_decoder.inference(torch.cat(latents)[None], voice)
        with torch.no_grad():
            yield self.hifi_decoder.inference(torch.cat(latents)[None], voice)


def tiny_fast(api_fast, kv_cache=False, stop_bias=1.0, **sizes):
    """Make an object of `tortoise.api_fast` without the files that its constructor loads; its voices are latents."""
    from tortoise.utils.tokenizer import VoiceBpeTokenizer

    from tests.integrations.package import WIDTH, unified_voice

    tts = api_fast.TextToSpeech.__new__(api_fast.TextToSpeech)
    tts.half, tts.device, tts.tokenizer, tts.rlg_auto = False, torch.device("cpu"), VoiceBpeTokenizer(), None
    tts.autoregressive = unified_voice(api_fast.UnifiedVoice, kv_cache, stop_bias, **sizes)
    torch.manual_seed(4)
    tts.hifi_decoder = api_fast.HifiganGenerator(
        in_channels=WIDTH,
        out_channels=1,
        resblock_type="1",
        resblock_dilation_sizes=[[1, 3, 5]],
        resblock_kernel_sizes=[3],
        upsample_kernel_sizes=[16, 16, 4, 4],
        upsample_initial_channel=32,
        upsample_factors=[8, 8, 2, 2],
        cond_channels=WIDTH,
    ).eval()
    tts.get_conditioning_latents = lambda voice_samples, return_mels=False: voice_samples[0]
    return tts
