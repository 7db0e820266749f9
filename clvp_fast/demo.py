"""The checkpoints that come with the package: `demo`, a small CLVP that speaks, and `random`, with random weights.

With them every command runs without a download. examples/train made `demo`, which lies in the package beside its model
card; `random` is built when it is first used.

`random` has the standard layout, a vocabulary of its own and the token numbers of trained checkpoints. Its weights are
seeded noise: its candidates are no speech and its scores mean nothing. Two things make its output less trivial: the
stop token becomes likelier with every step, so that candidates end at different lengths, and the logits are spread
widely enough that sampling has a choice.
"""

import json
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

from clvp_fast.io.errors import sentence
from clvp_fast.io.files import UnwritableError, build_folder_once, cache_folder

#: Part of the folder's name in the cache: any change below needs a new one.
RANDOM_VERSION = "random-1"

#: The folder of `demo`.
TRAINED = Path(__file__).with_name("trained_demo")

_PUNCTUATION = "!\"'(),-./:;?"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Byte pairs of frequent English words, most frequent first.
_MERGES = """
    t h, e r, a n, o u, i n, e n, o r, m e, l l, a r, o w, w h, s e, s t, th e, a t, o n, a y, c h, b e, i t, th er,
    a s, a d, l e, r e, l d, i s, h e, o o, v e, k e, g h, s o, g e, i r, a ll, in g, n d, an d, f or, l i, t o,
    er e, w or, n e, ou ld, n o, y ou, v er, w i, w e, en t, o ther, a me, ou t, o f, ou nd, p e, i d, d o, c e,
    a l, gh t, a ke, m an, p l, u t, w ay, h ow, n ow, u se, i f, m o, i m, s a, in d, o me, wh i, u st, th ing,
    u ch, so me, ow n, se e, t er, ar t, o p, ver y, g o, l y, on g, m or, oo d, t w, e ar, th at, t i, w as, ar e,
    o i, wi th, h is, the y, t u, th is, a ve, h ave, f r, fr o, fro m, on e, h ad, b y, wor d, b ut, no t, wh at,
    an t, w ere, wh en, you r, c an, sa id, ther e, a ch, e ach, re e, i ght, whi ch, s he, s pe, re ad, the ir,
    wi ll, u p, a b, ab out, man y, r ou, th en, the m, the se, c k, h er, w ould, b o, m ake, li ke, r y, t ry,
    h im, in k, in to, th ink, ti me, h as, l oo, loo k, tw o, mor e, it e, r ite, w rite, b er, m ber, n u,
    nu mber, c ould, op le, pe ople, m y, th an, f ir, fir st, at er, w ater, be en, c all, wh o, oi l, it s, f ind,
    l ong, d own, d ay, d id, e v, ev en, ge t, c ome, ad e, m ade, m ay, p art, o ver, ne w, s ound, t ake, on ly,
    it t, itt le, l ittle, wor k, k now, a ce, pl ace, y ear, li ve, a ck, b ack, g i, gi ve, p a
"""


def is_random(name: str | Path) -> bool:
    """Tell whether a name is that of the random checkpoint."""
    return str(name) == "random"


def reserved_checkpoint(name: str) -> Path:
    """Return the folder of `demo` or `random`."""
    return random_checkpoint() if is_random(name) else TRAINED


def random_checkpoint() -> Path:
    """Return the folder of the random checkpoint, built once into the user's cache (21 MB, about a second).

    If the cache cannot be written, the folder is a temporary one that is removed when the process ends.
    """
    try:
        return build_folder_once(cache_folder() / RANDOM_VERSION, build_random)
    except UnwritableError as error:
        return Path(_temporary(sentence(error)).name)


@cache
def _temporary(reason: str) -> tempfile.TemporaryDirectory:
    """Make the checkpoint in a folder that only this user can see, and that is removed when the process ends."""
    warnings.warn(f"the random checkpoint is built for this run alone: {reason}", stacklevel=3)
    folder = tempfile.TemporaryDirectory(prefix="clvp-fast-random-")
    build_random(Path(folder.name))
    return folder


def build_random(folder: Path) -> None:
    """Write the random checkpoint into the empty `folder`."""
    from clvp_fast import ClvpFeatureExtractor, ClvpTokenizer

    write_vocabulary(folder)
    tokenizer = ClvpTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    ClvpFeatureExtractor().save_pretrained(folder)
    _random_model().save_pretrained(folder)


def write_vocabulary(folder: Path) -> None:
    """Write the files of a vocabulary of letters, marks and pairs of frequent words into `folder`."""
    merges = [merge.strip() for merge in _MERGES.replace("\n", " ").split(",")]
    tokens = ["[STOP]", "[UNK]", "[SPACE]", *_PUNCTUATION, *_LETTERS, *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


def _random_model():
    from clvp_fast import ClvpConfig, ClvpModelForConditionalGeneration

    encoder = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "projection_dim": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    decoder = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "num_mel_attn_blocks": 2}
    config = ClvpConfig(
        text_config={**encoder, "vocab_size": 256},
        speech_config={**encoder, "vocab_size": 8192},
        decoder_config=decoder,
        projection_dim=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20240607)
        model = ClvpModelForConditionalGeneration(config).eval()
        _spread_logits_and_lengths(model.speech_decoder_model)
    return model


@torch.no_grad()
def _spread_logits_and_lengths(decoder) -> None:
    """Widen the logits, and let the stop token's logit grow with the position along one fixed direction."""
    hidden_size = decoder.config.hidden_size
    direction = torch.randn(hidden_size)
    direction /= direction.norm()

    decoder.model.decoder.input_embeds_layer.weight.normal_(std=0.3)
    decoder.lm_head.weight.normal_(std=3.0 / hidden_size**0.5)
    positions = decoder.model.decoder.position_embeds_layer.weight
    steps = torch.arange(positions.shape[0], dtype=torch.float32)[:, None]
    positions.add_(steps / 80 * 2.5 * direction)
    decoder.lm_head.weight[decoder.config.eos_token_id] = direction
    decoder.lm_head.bias.zero_()
    decoder.lm_head.bias[decoder.config.eos_token_id] = 3.0
