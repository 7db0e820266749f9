"""Small checkpoints in the layout of Tortoise's own files, and what Tortoise computes from them, in plain torch.

The functions read the original's keys alone; they share no line with the conversion that they are held against.
"""

import torch
import torch.nn.functional as F

WIDTH, HEADS, LAYERS, HEAD_DIM = 128, 2, 2, 64
SPEECH_CODES, TEXT_ROWS, MELS, LATENT = 300, 256, 20, 96
START, STOP = SPEECH_CODES, SPEECH_CODES + 1


def autoregressive_state(seed: int = 0, dtype=torch.float32, width: int = WIDTH, blocks: int = 2) -> dict:
    """Make `autoregressive.pth`, with the tensors that conversion leaves out."""
    inner, positions, texts = 4 * width, 64, 32
    shapes = {
        "conditioning_encoder.init.weight": (width, MELS, 1),
        "conditioning_encoder.init.bias": (width,),
        "text_embedding.weight": (TEXT_ROWS, width),
        "text_pos_embedding.emb.weight": (texts, width),
        "mel_embedding.weight": (SPEECH_CODES + 2, width),
        "mel_pos_embedding.emb.weight": (positions, width),
        "final_norm.weight": (width,),
        "final_norm.bias": (width,),
        "gpt.ln_f.weight": (width,),
        "gpt.ln_f.bias": (width,),
        "gpt.wte.weight": (SPEECH_CODES + 2, width),
        "inference_model.lm_head.1.weight": (SPEECH_CODES + 2, width),
        "mel_head.weight": (SPEECH_CODES + 2, width),
        "mel_head.bias": (SPEECH_CODES + 2,),
        "text_head.weight": (TEXT_ROWS, width),
        "text_head.bias": (TEXT_ROWS,),
    }
    for i in range(blocks):
        block = f"conditioning_encoder.attn.{i}"
        shapes |= {f"{block}.norm.weight": (width,), f"{block}.norm.bias": (width,)}
        shapes |= {f"{block}.qkv.weight": (3 * width, width, 1), f"{block}.qkv.bias": (3 * width,)}
        shapes |= {f"{block}.proj_out.weight": (width, width, 1), f"{block}.proj_out.bias": (width,)}
    for i in range(LAYERS):
        layer = f"gpt.h.{i}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{layer}.{norm}.weight": (width,), f"{layer}.{norm}.bias": (width,)}
        for conv, size in (
            ("attn.c_attn", (width, 3 * width)),
            ("attn.c_proj", (width, width)),
            ("mlp.c_fc", (width, inner)),
            ("mlp.c_proj", (inner, width)),
        ):
            shapes |= {f"{layer}.{conv}.weight": size, f"{layer}.{conv}.bias": size[1:]}
    state = _random(shapes, seed, dtype)
    for i in range(LAYERS):
        state[f"gpt.h.{i}.attn.bias"] = torch.ones(positions, positions, dtype=torch.bool).tril()[None, None]
        state[f"gpt.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    state["mel_head.bias"][STOP] = -20.0  # candidates of full length
    return state


def clvp_state(seed: int = 1, dtype=torch.float32, width: int = WIDTH, inner: int = 192) -> dict:
    """Make `clvp2.pth`."""
    shapes = {"temperature": ()}
    for side, rows in (("text", TEXT_ROWS), ("speech", SPEECH_CODES)):
        stack = f"{side}_transformer.transformer"
        shapes |= {f"{side}_emb.weight": (rows, width), f"to_{side}_latent.weight": (LATENT, width)}
        shapes |= {f"{stack}.norm.weight": (width,), f"{stack}.norm.bias": (width,)}
        for i in range(LAYERS):
            attention, feed_forward = (f"{stack}.attn_layers.layers.{2 * i + odd}" for odd in (0, 1))
            shapes |= {f"{attention}.0.0.g": (width,), f"{feed_forward}.0.0.g": (width,)}
            shapes |= {f"{attention}.1.wrap.to_{x}.weight": (width, width) for x in ("q", "k", "v", "out")}
            shapes |= {f"{attention}.1.wrap.to_out.bias": (width,)}
            net = f"{feed_forward}.1.wrap.net"
            shapes |= {f"{net}.0.proj.weight": (2 * inner, width), f"{net}.0.proj.bias": (2 * inner,)}
            shapes |= {f"{net}.3.weight": (width, inner), f"{net}.3.bias": (width,)}
    state = _random(shapes, seed, dtype)
    for side in ("text", "speech"):
        frequencies = 1.0 / 10000 ** (torch.arange(0, 32, 2).float() / 32)
        state[f"{side}_transformer.transformer.attn_layers.rotary_pos_emb.inv_freq"] = frequencies.to(dtype)
    return state


def _random(shapes: dict, seed: int, dtype) -> dict:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        gain = key.endswith(".g") or (("norm" in key or "ln_" in key) and key.endswith("weight"))
        scale = 0.6 if "emb" in key else 0.1
        value = 1 + 0.3 * noise if gain or key == "temperature" else scale * noise
        state[key] = value.to(dtype)
    return state


def _heads(x):
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(-2, -3)


def _attend(q, k, v, mask=None):
    scores = q @ k.transpose(-1, -2) / HEAD_DIM**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)


def voice_latent(state: dict, mel: torch.Tensor) -> torch.Tensor:
    """Do as `ConditioningEncoder`: `[clips, mels, frames]` → `[clips, width]`; queries, keys, values by head."""
    x = F.conv1d(mel, state["conditioning_encoder.init.weight"], state["conditioning_encoder.init.bias"])
    i = 0
    while f"conditioning_encoder.attn.{i}.qkv.weight" in state:
        block = {k: state[f"conditioning_encoder.attn.{i}.{k}"] for k in ("norm.weight", "norm.bias", "qkv.weight")}
        normed = F.group_norm(x, 32, block["norm.weight"], block["norm.bias"])
        qkv = F.conv1d(normed, block["qkv.weight"], state[f"conditioning_encoder.attn.{i}.qkv.bias"])
        parts = qkv.reshape(len(x) * x.shape[1] // HEAD_DIM, 3 * HEAD_DIM, -1).split(HEAD_DIM, dim=1)
        q, k, v = (part.transpose(1, 2) for part in parts)
        scores = (q @ k.transpose(1, 2) / HEAD_DIM**0.5).softmax(-1)
        attended = (scores @ v).transpose(1, 2).reshape(x.shape)
        proj = f"conditioning_encoder.attn.{i}.proj_out"
        x = x + F.conv1d(attended, state[f"{proj}.weight"], state[f"{proj}.bias"])
        i += 1
    return x[:, :, 0]


def gpt_logits(state: dict, embeds: torch.Tensor) -> torch.Tensor:
    """Run GPT-2 without positions of its own, both closing norms, and the head: `[batch, length, width]` → logits."""
    x, length = embeds, embeds.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for i in range(LAYERS):
        layer = {key: state[f"gpt.h.{i}.{key}"] for key in _layer_keys(state, f"gpt.h.{i}.")}
        normed = F.layer_norm(x, x.shape[-1:], layer["ln_1.weight"], layer["ln_1.bias"])
        q, k, v = (normed @ layer["attn.c_attn.weight"] + layer["attn.c_attn.bias"]).chunk(3, -1)
        attended = _attend(_heads(q), _heads(k), _heads(v), causal)
        x = x + attended @ layer["attn.c_proj.weight"] + layer["attn.c_proj.bias"]
        normed = F.layer_norm(x, x.shape[-1:], layer["ln_2.weight"], layer["ln_2.bias"])
        inner = F.gelu(normed @ layer["mlp.c_fc.weight"] + layer["mlp.c_fc.bias"], approximate="tanh")
        x = x + inner @ layer["mlp.c_proj.weight"] + layer["mlp.c_proj.bias"]
    for norm in ("gpt.ln_f", "final_norm"):
        x = F.layer_norm(x, x.shape[-1:], state[f"{norm}.weight"], state[f"{norm}.bias"])
    return F.linear(x, state["mel_head.weight"], state["mel_head.bias"])


def _layer_keys(state, prefix):
    return [key.removeprefix(prefix) for key in state if key.startswith(prefix)]


def greedy_codes(state: dict, text: torch.Tensor, mel: torch.Tensor, steps: int) -> torch.Tensor:
    """Tortoise with its cache: text `[1, length]` with one 0 behind it is put between 255 and 0; the k-th code stands
    at position k + 1."""
    ids = F.pad(F.pad(F.pad(text, (0, 1)), (0, 1)), (1, 0), value=TEXT_ROWS - 1)
    texts = state["text_embedding.weight"][ids] + state["text_pos_embedding.emb.weight"][: ids.shape[1]]
    codes, positions = [START], [0]
    for k in range(steps):
        mels = state["mel_embedding.weight"][codes] + state["mel_pos_embedding.emb.weight"][positions]
        prompt = torch.cat([voice_latent(state, mel)[:, None], texts, mels[None]], dim=1)
        codes.append(int(gpt_logits(state, prompt)[0, -1].argmax()))
        positions.append(k + 2)
    return torch.tensor([codes[1:]])


def clvp_embed(state: dict, side: str, ids: torch.Tensor) -> torch.Tensor:
    """Run x-transformers' encoder with rotary q, k and v; mean, projection: `[batch, length]` → `[batch, dim]`."""
    x = state[f"{side}_emb.weight"][ids]
    stack = f"{side}_transformer.transformer"
    angles = torch.arange(ids.shape[1])[:, None] * state[f"{stack}.attn_layers.rotary_pos_emb.inv_freq"]
    angles = torch.cat([angles, angles], -1)

    def rms_norm(x, gain):
        return x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5).clamp(min=1e-8) * gain

    def rotate(x):
        turned, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
        first, second = turned.chunk(2, -1)
        return torch.cat([turned * angles.cos() + torch.cat([-second, first], -1) * angles.sin(), rest], -1)

    for i in range(LAYERS):
        attention, feed_forward = (f"{stack}.attn_layers.layers.{2 * i + odd}" for odd in (0, 1))
        normed = rms_norm(x, state[f"{attention}.0.0.g"])
        wrap = f"{attention}.1.wrap"
        q, k, v = (rotate(_heads(F.linear(normed, state[f"{wrap}.to_{p}.weight"]))) for p in "qkv")
        x = x + F.linear(_attend(q, k, v), state[f"{wrap}.to_out.weight"], state[f"{wrap}.to_out.bias"])
        net = f"{feed_forward}.1.wrap.net"
        normed = rms_norm(x, state[f"{feed_forward}.0.0.g"])
        value, gate = F.linear(normed, state[f"{net}.0.proj.weight"], state[f"{net}.0.proj.bias"]).chunk(2, -1)
        x = x + F.linear(value * F.gelu(gate), state[f"{net}.3.weight"], state[f"{net}.3.bias"])
    x = F.layer_norm(x, x.shape[-1:], state[f"{stack}.norm.weight"], state[f"{stack}.norm.bias"])
    return F.linear(x.mean(1), state[f"to_{side}_latent.weight"])


def clvp_score(state: dict, text: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return scaled cosine similarities `[texts, codes]`."""
    texts, speech = (F.normalize(clvp_embed(state, side, ids)) for side, ids in (("text", text), ("speech", codes)))
    return texts @ speech.T * state["temperature"].exp()
