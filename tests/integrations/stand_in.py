"""Stand-ins of what Tortoise's two `TextToSpeech` are made of: attributes, order of calls, layout of weights; no sound.

For machines without tortoise-tts. Where that is, the same tests run over the real one too.
"""

import functools
import random
from contextlib import contextmanager
from time import time

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2Model

from tests.integrations.oracle import randomize
from tests.models.clvp import tortoise_files as original

WIDTH, HEADS, LAYERS, START, STOP = original.WIDTH, original.HEADS, original.LAYERS, original.START, original.STOP
CALM, CHANNELS, POSITIONS, TEXTS = 83, 64, 64, 64


class Positions(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.emb = nn.Embedding(rows, WIDTH)

    def forward(self, x):
        return self.emb(torch.arange(x.shape[1]))


class InferenceModel(nn.Module):
    def __init__(self, gpt, head, kv_cache):
        super().__init__()
        self.transformer, self.lm_head, self.kv_cache = gpt, head, kv_cache


class VoiceBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(32, WIDTH)
        self.qkv = nn.Conv1d(WIDTH, 3 * WIDTH, 1)
        self.proj_out = nn.Conv1d(WIDTH, WIDTH, 1)


class VoiceEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.init = nn.Conv1d(original.MELS, WIDTH, 1)
        self.attn = nn.ModuleList([VoiceBlock(), VoiceBlock()])


class UnifiedVoice(nn.Module):
    start_mel_token, stop_mel_token, start_text_token, stop_text_token = START, STOP, original.TEXT_ROWS - 1, 0
    mel_length_compression, max_mel_tokens = 1024, POSITIONS - 4

    def __init__(self, kv_cache):
        super().__init__()
        config = GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS + TEXTS, vocab_size=4)
        gpt = GPT2Model(config)
        del gpt.wpe, gpt.wte
        gpt.wpe = functools.partial(lambda places: torch.zeros(*places.shape, WIDTH))
        self.gpt = gpt
        self.conditioning_encoder = VoiceEncoder()
        self.text_embedding = nn.Embedding(original.TEXT_ROWS, WIDTH)
        self.text_pos_embedding = Positions(TEXTS)
        self.mel_embedding = nn.Embedding(STOP + 1, WIDTH)
        self.mel_pos_embedding = Positions(POSITIONS)
        self.final_norm = nn.LayerNorm(WIDTH)
        self.text_head = nn.Linear(WIDTH, original.TEXT_ROWS)
        self.mel_head = nn.Linear(WIDTH, STOP + 1)
        self.inference_model = InferenceModel(gpt, nn.Sequential(self.final_norm, self.mel_head), kv_cache)
        self.gpt.wte = self.mel_embedding

    def get_conditioning(self, mels):
        voices = [original.voice_latent(self.state_dict(), mels[:, clip]) for clip in range(mels.shape[1])]
        return torch.stack(voices, 1).mean(1)

    def compute_embeddings(self, cond_latents, text_inputs):
        return torch.ones(1, text_inputs.shape[1] + 4, dtype=torch.long)

    def get_generator(self, fake_inputs, **kwargs):
        raise AttributeError("'GPT2InferenceModel' object has no attribute 'generate_stream'")

    def inference_speech(self, *args, **kwargs):
        raise AttributeError("'GPT2InferenceModel' object has no attribute 'generate'")

    def forward(
        self,
        speech_conditioning_latent,
        text_inputs,
        text_lengths,
        mel_codes,
        wav_lengths,
        types=None,
        text_first=True,
        raw_mels=None,
        return_attentions=False,
        return_latent=False,
        clip_inputs=True,
    ):
        assert return_latent and not clip_inputs
        ids = F.pad(F.pad(text_inputs.long(), (0, 1)), (1, 0), value=self.start_text_token)
        tokens = F.pad(F.pad(mel_codes, (0, 1), value=STOP), (1, 0), value=START)
        tokens = F.pad(tokens, (0, 1), value=STOP)
        parts = (
            speech_conditioning_latent[:, None],
            self.text_embedding(ids) + self.text_pos_embedding(ids),
            self.mel_embedding(tokens) + self.mel_pos_embedding(tokens),
        )
        hidden = self.gpt(inputs_embeds=torch.cat(parts, 1), return_dict=True).last_hidden_state
        return self.final_norm(hidden[:, -tokens.shape[1] :])[:, : mel_codes.shape[1]]


class CLVP(nn.Module):
    """Tortoise's tree of modules; the linear ones that are read together are linear modules."""

    def __init__(self):
        super().__init__()
        for key, value in original.clvp_state().items():
            *path, leaf = key.split(".")
            module = self
            for number, name in enumerate(path):
                if name not in module._modules:
                    joined = name in ("to_q", "to_k", "to_v") and number == len(path) - 1
                    module.add_module(name, nn.Linear(WIDTH, WIDTH, bias=False) if joined else nn.Module())
                module = module._modules[name]
            if leaf == "inv_freq":
                module.register_buffer(leaf, value)
            else:
                module.register_parameter(leaf, nn.Parameter(value))

    def forward(self, text, speech_tokens, return_loss=False):
        assert not return_loss
        state = self.state_dict()
        return torch.cat(
            [original.clvp_score(state, *pair)[0] for pair in zip(text[:, None], speech_tokens[:, None], strict=True)]
        )


class CVVP(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(STOP, 1)
        self.sizes = []

    def forward(self, mel_cond, mel_input, return_loss=False):
        self.sizes.append(len(mel_input))
        return 50 * self.table(mel_input).mean((1, 2)) + mel_cond.mean((1, 2))


class Diffusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.mel = nn.Linear(WIDTH + 2 * CHANNELS, 100)

    def get_conditioning(self, clips):
        return clips.mean((1, 2), keepdim=True).expand(1, 1, 2 * CHANNELS)[:, 0]

    def timestep_independent(self, latents, conditioning, length, return_code_pred):
        voice = conditioning[:, None].expand(-1, latents.shape[1], -1)
        return self.mel(torch.cat([latents, voice], -1))


class Vocoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.wave = nn.Linear(100, 16)

    def inference(self, mel):
        return self.wave(mel).flatten(1)[:, None]


class Tokenizer:
    def encode(self, text):
        return [ord(letter) % 250 + 1 for letter in text]


class TextToSpeech:
    def __init__(self, kv_cache=False, batch_size=4, stop_bias=1.0):
        self.autoregressive_batch_size, self.enable_redaction, self.half = batch_size, False, False
        self.device, self.cvvp, self.tokenizer = torch.device("cpu"), None, Tokenizer()
        self.autoregressive = randomize(UnifiedVoice(kv_cache), 1)
        with torch.no_grad():
            self.autoregressive.mel_head.bias[STOP] = stop_bias
        self.clvp = CLVP().eval()
        self.diffusion, self.vocoder = randomize(Diffusion(), 3), randomize(Vocoder(), 4)

    @contextmanager
    def temporary_cuda(self, model):
        yield model.to(self.device)
        model.cpu()

    def load_cvvp(self):
        self.cvvp = randomize(CVVP(), 5)

    def get_conditioning_latents(self, voice_samples, return_mels=False):
        mels = []
        for clip in voice_samples:
            start = random.randint(0, clip.shape[1] - 20 * original.MELS)
            mels.append(clip[:, start : start + 20 * original.MELS].view(1, original.MELS, 20))
        mels = torch.stack(mels, 1)
        self.autoregressive = self.autoregressive.to(self.device)
        auto = self.autoregressive.get_conditioning(mels)
        self.autoregressive = self.autoregressive.cpu()
        latents = auto, self.diffusion.get_conditioning(mels[:, 0])
        return (*latents, mels, mels) if return_mels else latents

    def get_random_conditioning_latents(self):
        return torch.randn(1, WIDTH), torch.randn(1, 2 * CHANNELS)

    def tts_with_preset(self, text, preset="fast", **kwargs):
        settings = {"ultra_fast": {"num_autoregressive_samples": 16}, "fast": {"num_autoregressive_samples": 96}}
        return self.tts(text, **{**settings[preset], **kwargs})

    def deterministic_state(self, seed=None):
        seed = int(time()) if seed is None else seed
        torch.manual_seed(seed)
        random.seed(seed)
        return seed

    def tts(
        self,
        text,
        voice_samples=None,
        conditioning_latents=None,
        k=1,
        verbose=True,
        use_deterministic_seed=None,
        return_deterministic_state=False,
        num_autoregressive_samples=512,
        temperature=0.8,
        length_penalty=1,
        repetition_penalty=2.0,
        top_p=0.8,
        max_mel_tokens=500,
        cvvp_amount=0.0,
        diffusion_iterations=100,
        cond_free=True,
        cond_free_k=2,
        diffusion_temperature=1.0,
        **hf_generate_kwargs,
    ):
        seed = self.deterministic_state(seed=use_deterministic_seed)
        text_tokens = F.pad(torch.IntTensor(self.tokenizer.encode(text)).unsqueeze(0), (0, 1))
        mels = None
        if voice_samples is not None:
            auto, diffusion, mels, _ = self.get_conditioning_latents(voice_samples, return_mels=True)
        elif conditioning_latents is not None:
            auto, diffusion = conditioning_latents
        else:
            auto, diffusion = self.get_random_conditioning_latents()
        with torch.no_grad():
            samples, scores = [], []
            with self.temporary_cuda(self.autoregressive) as autoregressive:
                for _ in range(num_autoregressive_samples // self.autoregressive_batch_size):
                    codes = autoregressive.inference_speech(
                        auto,
                        text_tokens,
                        do_sample=True,
                        top_p=top_p,
                        temperature=temperature,
                        num_return_sequences=self.autoregressive_batch_size,
                        length_penalty=length_penalty,
                        repetition_penalty=repetition_penalty,
                        max_generate_length=max_mel_tokens,
                        **hf_generate_kwargs,
                    )
                    samples.append(F.pad(codes, (0, max_mel_tokens - codes.shape[1]), value=STOP))
            with self.temporary_cuda(self.clvp) as clvp:
                if cvvp_amount > 0 and self.cvvp is None:
                    self.load_cvvp()
                for batch in samples:
                    for row in batch:
                        stops = (row == STOP).nonzero()
                        if len(stops):
                            row[stops[0, 0] :] = CALM
                            row[-3:] = torch.tensor([45, 45, 248])
                    found = clvp(text_tokens.repeat(len(batch), 1), batch, return_loss=False)
                    if mels is not None and cvvp_amount > 0:
                        of_voice = self.cvvp(mels[:, 0].repeat(len(batch), 1, 1), batch, return_loss=False)
                        found = of_voice * cvvp_amount + found * (1 - cvvp_amount)
                    scores.append(found)
            best = torch.cat(samples)[torch.topk(torch.cat(scores), k=k).indices]
            with self.temporary_cuda(self.autoregressive) as autoregressive:
                latents = autoregressive(
                    auto.repeat(k, 1),
                    text_tokens.repeat(k, 1),
                    torch.tensor([text_tokens.shape[-1]]),
                    best,
                    torch.tensor([best.shape[-1] * autoregressive.mel_length_compression]),
                    return_latent=True,
                    clip_inputs=False,
                )
            clips = []
            for codes, one in zip(best.tolist(), latents[:, None], strict=True):
                run = 0
                for place, code in enumerate(codes):
                    run = run + 1 if code == CALM else 0
                    if run > 8:
                        one = one[:, :place]
                        break
                mel = self.diffusion.timestep_independent(one, diffusion, one.shape[1], False)
                mel = mel + 0.1 * torch.randn(mel.shape)
                clips.append(self.vocoder.inference(mel))
        result = clips if len(clips) > 1 else clips[0]
        return (result, (seed, text, voice_samples, conditioning_latents)) if return_deterministic_state else result
