"""A `TextToSpeech` of the real tortoise-tts at tiny sizes, of random weights."""

import torch

from tests.integrations.oracle import randomize

WIDTH, HEADS, LAYERS, CODES, CHANNELS = 128, 2, 2, 300, 64
START, STOP = CODES, CODES + 1
DIFFUSION = dict(
    model_channels=CHANNELS,
    num_layers=1,
    in_channels=100,
    out_channels=200,
    in_latent_channels=WIDTH,
    in_tokens=CODES + 1,
    dropout=0,
    use_fp16=False,
    num_heads=2,
    layer_drop=0,
    unconditioned_percentage=0,
)


def tiny_tts(api, kv_cache=False, batch_size=4, stop_bias=1.0):
    """Make an object of `tortoise.api`, without the files that its constructor loads."""
    from tortoise.models.random_latent_generator import RandomLatentConverter
    from tortoise.utils.tokenizer import VoiceBpeTokenizer

    tts = api.TextToSpeech.__new__(api.TextToSpeech)
    tts.autoregressive_batch_size, tts.enable_redaction, tts.half = batch_size, False, False
    tts.device, tts.models_dir, tts.cvvp = torch.device("cpu"), "", None
    tts.tokenizer = VoiceBpeTokenizer()
    tts.autoregressive = unified_voice(api.UnifiedVoice, kv_cache, stop_bias)
    sizes = dict(dim_text=WIDTH, dim_speech=WIDTH, dim_latent=96, num_text_tokens=256, num_speech_tokens=CODES)
    depths = dict(text_enc_depth=2, speech_enc_depth=2, text_heads=HEADS, speech_heads=HEADS, use_xformers=True)
    tts.clvp = randomize(api.CLVP(**sizes, **depths), 2)
    torch.manual_seed(3)
    tts.diffusion = api.DiffusionTts(**DIFFUSION).eval()
    with torch.no_grad():
        for parameter in tts.diffusion.parameters():
            if not parameter.any():  # what training begins with at zero would let no latent through
                parameter.copy_(0.05 * torch.randn(parameter.shape))
    tts.vocoder = api.UnivNetGenerator(channel_size=8)
    tts.vocoder.eval(inference=True)
    tts.rlg_auto = RandomLatentConverter(WIDTH).eval()
    tts.rlg_diffusion = RandomLatentConverter(2 * CHANNELS).eval()
    return tts


def unified_voice(kind, kv_cache, stop_bias, max_mel_tokens=60):
    autoregressive = kind(
        max_mel_tokens=max_mel_tokens,
        max_text_tokens=60,
        max_conditioning_inputs=2,
        layers=LAYERS,
        model_dim=WIDTH,
        heads=HEADS,
        number_text_tokens=255,
        start_text_token=255,
        number_mel_codes=CODES + 2,
        start_mel_token=START,
        stop_mel_token=STOP,
        checkpointing=False,
        train_solo_embeddings=False,
    ).eval()
    autoregressive.post_init_gpt2_config(kv_cache=kv_cache)
    randomize(autoregressive, 1)
    with torch.no_grad():
        autoregressive.mel_head.bias[STOP] = stop_bias
    return autoregressive
