"""A small CLVP of the package's own classes, and its export to a checkpoint folder."""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from clvp_fast import ClvpConfig, ClvpFeatureExtractor, ClvpModelForConditionalGeneration, ClvpTokenizer
from clvp_fast.demo import write_vocabulary
from clvp_fast.io.files import write_json
from clvp_fast.vocoder import WEIGHTS_FILE, Codec, save_vocoder
from clvp_fast.vocoder.codec import FLOOR
from examples.train import data
from examples.train.state import averages_of, begin_from
from examples.train.texts import WORDS
from examples.train.train_codec import make_codec

# The most tokens of candidates and of texts; the longest sentence of the grammar needs two thirds of them.
MOST_CODES, MOST_TEXT = 160, 128

# The trainings, each with the prefixes of its weights' names.
PARTS = {
    "codec": "",
    "decoder": ("conditioning_encoder.", "speech_decoder_model."),
    "scorer": ("text_encoder_model.", "speech_encoder_model.", "logit_scale"),
}
# The state of each at the export of a checkpoint.
PROGRESS = "training.json"
# A row for each use of the sentences that are kept for figures; it goes with the checkpoint.
USES = "uses.jsonl"


def configuration(num_codes: int, silence: int, hidden: int = 256, layers: int = 4, width: int = 160) -> ClvpConfig:
    """Return the sizes of the demo; the defaults make 6.2 million parameters.

    Args:
        silence: the code that candidates are filled up with for the scorer.
        hidden, layers: of the decoder. width: of both encoders.
    """
    encoder = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "projection_dim": width,
        "num_hidden_layers": 3,
        "num_attention_heads": width // 32,
        "dropout": 0.05,
        "attention_dropout": 0.0,
        "pool_padding": False,
    }
    decoder = {
        "vocab_size": num_codes + 2,
        "bos_token_id": num_codes,
        "eos_token_id": num_codes + 1,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_mel_attn_blocks": 2,
        "max_position_embeddings": MOST_CODES,
        "max_text_tokens": MOST_TEXT,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attention_dropout": 0.0,
        "decoder_fixing_codes": [silence] * 4,
        "contiguous_positions": True,
    }
    return ClvpConfig(
        text_config={**encoder, "vocab_size": 256},
        speech_config={**encoder, "vocab_size": num_codes},
        decoder_config=decoder,
        projection_dim=width,
    )


def make_model(config: ClvpConfig) -> ClvpModelForConditionalGeneration:
    """Make an untrained model, the same each time."""
    torch.manual_seed(0)
    return ClvpModelForConditionalGeneration(config)


@cache
def tokenizer() -> ClvpTokenizer:
    """Return the demo's tokenizer: letters, marks and pairs of letters of frequent words."""
    with tempfile.TemporaryDirectory(prefix="clvp-fast-vocabulary-") as folder:
        write_vocabulary(Path(folder))
        files = f"{folder}/vocab.json", f"{folder}/merges.txt"
        return ClvpTokenizer(*files, text_cleaning="tortoise", domain_words=WORDS)


@cache
def ids_of(text: str) -> tuple[int, ...]:
    return tuple(tokenizer()(text)["input_ids"])


def silence_of(codec: Codec) -> int:
    """Return the code of silence."""
    return int(codec.codes_of(torch.full((1, codec.bins, 16 * codec.stride), FLOOR))[0].mode().values)


def speech_logits(model, voices: torch.Tensor, ids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return logits `[batch, length + 1, vocab]` of each next code, given the codes before it.

    Args:
        voices: of `encode_voice`, `[batch, hidden]`.
        ids: texts of one length, `[batch, text]`.
        codes: `[batch, length]`.
    """
    conditioning, head = model.conditioning_encoder, model.speech_decoder_model
    prompt = conditioning.join(voices, conditioning.prompt_text(ids)[0])
    decoder = head.model.decoder
    started = F.pad(codes, (1, 0), value=head.config.bos_token_id)
    places = decoder.position_embeds_layer.weight[: started.shape[1]]  # the k-th code has position k: contiguous
    inputs = torch.cat([prompt, decoder.input_embeds_layer(started) + places], 1)
    return head(
        inputs_embeds=inputs, embeds_have_positions=True, use_cache=False, logits_to_keep=started.shape[1]
    ).logits


def assemble(folder: Path, scorer: bool = True) -> ClvpModelForConditionalGeneration:
    """Assemble the latest trained model in eval mode: the decoder, and with `scorer` the encoders."""
    codec = data.load_codec(folder, make_codec())
    model = make_model(configuration(codec.num_codes, silence_of(codec)))
    weights = model.state_dict()
    weights.update(averages_of(folder / "decoder.pt"))
    if scorer and (folder / "scorer.pt").is_file():
        weights.update(averages_of(folder / "scorer.pt"))
    model.load_state_dict(weights)
    return model.eval()


def export(folder: Path, target: Path) -> Path:
    """Write a checkpoint folder in float16 with its vocoder; `clvp-fast generate --checkpoint` takes it."""
    clvp = assemble(folder).half()
    target.mkdir(parents=True, exist_ok=True)
    clvp.save_pretrained(target)
    tokenizer().save_pretrained(target)
    ClvpFeatureExtractor().save_pretrained(target)
    save_vocoder(target, data.load_codec(folder, make_codec()))
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    assert config["decoder_config"]["contiguous_positions"] is True
    write_json(target / PROGRESS, {part: list(progress) for part, progress in steps_of(folder).items()})
    return target


def steps_of(folder: Path) -> dict[str, tuple[int, float]]:
    """Return steps and CPU seconds of each training that has begun."""
    found = {}
    for part in PARTS:
        path = folder / f"{part}.pt"
        if path.is_file():
            state = torch.load(path, weights_only=True, mmap=True)
            found[part] = state["step"], state["spent"]
    return found


def go_on_from(folder: Path, checkpoint: Path) -> list[str]:
    """Begin trainings that are missing in `folder` with the weights of an export, and return their names."""
    progress = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
    clvp = load_file(checkpoint / "model.safetensors")
    taken = []
    for part, (step, spent) in progress.items():
        path = folder / f"{part}.pt"
        if path.is_file():
            continue
        weights = load_file(checkpoint / WEIGHTS_FILE) if part == "codec" else clvp
        begin_from(path, {name: weights[name] for name in weights if name.startswith(PARTS[part])}, step, spent)
        taken.append(part)
    if (checkpoint / USES).is_file() and not (folder / USES).is_file():
        shutil.copy(checkpoint / USES, folder / USES)
    return taken
