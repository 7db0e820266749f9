"""The cost of a call of the engine, on paper: bytes and operations of its stages, and the time that a device needs.

A stage takes the longer of bytes / bandwidth and operations / rate, and stages follow one another:

    seconds = sum over stages of max(bytes / bandwidth, operations / rate) / share + steps * step_seconds

Counted are weights, keys and values, logits; products and attention. Activations, features, norms and draws are not:
`share`, the part of both limits that is reached, and `step_seconds`, what a step takes beside them, stand for what
is left out, and are fitted to measured calls (`fit`). docs/scaling.md shows both sides. The launches of a decode step
are those of `benchmarks/cost/`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.cost import devices
from benchmarks.machine import bandwidth

#: The varied values, one at a time, and their names in documents.
SWEEPS = {
    "candidates": "candidates",
    "text_tokens": "text tokens",
    "clips": "clips of the voice",
    "requests": "requests at once",
}
# A clip of six seconds, as features; and the places of a prompt beside its text: voice, and a token at both ends.
FRAMES, BESIDE_TEXT = 517, 3


@dataclass(frozen=True)
class Sizes:
    """The numbers of a checkpoint that cost follows from; by default CLVP's, 665 million parameters."""

    num_layers: int = 30
    hidden_size: int = 1024
    intermediate_size: int = 4096
    vocab_size: int = 8194
    voice_blocks: int = 6
    mel_bins: int = 80
    encoder_layers: int = 20
    encoder_hidden_size: int = 768
    encoder_intermediate_size: int = 1536

    @property
    def layer_weights(self) -> int:
        """Of one layer of the decoder: four square products and two of the feed-forward block."""
        return 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size

    @property
    def step_weights(self) -> int:
        """The weights that a decode step multiplies with: all layers, and the head."""
        return self.num_layers * self.layer_weights + self.vocab_size * self.hidden_size

    @property
    def token_channels(self) -> int:
        """Of one token's keys and values in all layers."""
        return 2 * self.num_layers * self.hidden_size

    @property
    def encoder_weights(self) -> int:
        """Of one encoder, the text's or the speech's; the feed-forward block is gated."""
        square = 4 * self.encoder_hidden_size**2
        return self.encoder_layers * (square + 3 * self.encoder_hidden_size * self.encoder_intermediate_size)


CLVP = Sizes()


@dataclass(frozen=True)
class Call:
    """The requests to an engine at once; the defaults are the call from which a sweep varies one number.

    Args:
        candidates, text_tokens, clips: of each request; its clips are of one voice.
        requests: in one call, all of the same voice.
        new_tokens: of each candidate, which are also the places that it is scored at.
        slots: how many candidates decode at once.
    """

    candidates: int = 4
    text_tokens: int = 60
    clips: int = 1
    requests: int = 1
    new_tokens: int = 16
    slots: int = 16

    @property
    def prompt(self) -> int:
        return self.text_tokens + BESIDE_TEXT

    @property
    def tokens(self) -> int:
        return self.requests * self.candidates * self.new_tokens

    def batches(self) -> Iterator[tuple[int, int]]:
        """Return the rows of successive batches, each decoded to the end, and the prompts that each reads."""
        waiting = self.requests * self.candidates
        while waiting > 0:
            rows = min(waiting, self.slots)
            yield rows, -(-rows // self.candidates)
            waiting -= rows

    @property
    def steps(self) -> int:
        return self.new_tokens * sum(1 for _ in self.batches())


@dataclass(frozen=True)
class Types:
    """Bytes of a weight, and of a channel of a key or value."""

    weight: int = 2
    page: int = 2


@dataclass(frozen=True)
class Stage:
    """Bytes that must move and operations that must be done; `part` as rows call it."""

    part: str
    bytes: float
    flop: float


@dataclass(frozen=True)
class Device:
    """Where a call runs.

    Args:
        bytes_per_s, flop_per_s: bandwidth, and the rate of products in the type of the weights.
        share: the part of both that is reached, above 0.
        step_seconds: what a decode step takes beside its stages.
    """

    name: str
    bytes_per_s: float
    flop_per_s: float
    share: float = 1.0
    step_seconds: float = 0.0

    @classmethod
    def of(cls, row: dict) -> "Device":
        """Make the device of a row, from its run's measurements."""
        device = row["device"]
        return cls(device["name"], bandwidth(device), device["matmul_flop_per_s"][row["dtype"]])

    def limit(self, stage: Stage) -> float:
        """Return the least seconds of a stage."""
        return max(stage.bytes / self.bytes_per_s, stage.flop / self.flop_per_s)

    def seconds(self, stage: Stage) -> float:
        return self.limit(stage) / self.share


H200 = Device("H200", devices.H200.sheet_bytes_per_s, devices.H200.sheet_flop_per_s)


def products(rows: int, types: Types, sizes: Sizes = CLVP) -> Stage:
    """Count a decode step's work of `rows` candidates with all weights, logits included."""
    logits = 2 * rows * sizes.vocab_size
    return Stage("decode", types.weight * (sizes.step_weights + logits), 2 * rows * sizes.step_weights)


def attention(rows: int, prompts: int, prompt: int, stored: int, types: Types, sizes: Sizes = CLVP) -> Stage:
    """Count a decode step's work with keys and values.

    Args:
        rows, prompts: candidates, and how many prompts they continue; a prompt's keys and values are read once.
        prompt, stored: tokens of a prompt, and of a candidate so far.
    """
    read = rows * (stored + 1) + prompts * prompt
    attended = rows * (stored + 1 + prompt)
    return Stage("decode", types.page * sizes.token_channels * read, 2 * sizes.token_channels * attended)


def voice(clips: int, types: Types, sizes: Sizes = CLVP) -> Stage:
    """Count the conditioning encoder over clips, one after another; its last block has one query."""
    hidden, blocks = sizes.hidden_size, sizes.voice_blocks
    weights = sizes.mel_bins * hidden + 4 * blocks * hidden**2
    of_weights = 2 * FRAMES * (weights - hidden**2)
    of_attention = 4 * FRAMES**2 * hidden * (blocks - 1)
    return Stage("voice", clips * types.weight * weights, clips * (of_weights + of_attention))


def prefill(prompt: int, types: Types, sizes: Sizes = CLVP) -> Stage:
    """Count the decoder over one prompt, whose last layer only needs keys and values."""
    hidden, layers = sizes.hidden_size, sizes.num_layers - 1
    weights = layers * sizes.layer_weights + 3 * hidden**2
    stored = types.page * sizes.token_channels * prompt
    return Stage("decode", types.weight * weights + stored, 2 * prompt * (weights + (prompt + 1) * hidden * layers))


def encoder(rows: int, length: int, types: Types, sizes: Sizes = CLVP) -> Stage:
    """Count the text's or the speech's encoder over `rows` of `length` tokens."""
    of_attention = 4 * rows * length**2 * sizes.encoder_hidden_size * sizes.encoder_layers
    of_weights = 2 * rows * length * sizes.encoder_weights
    return Stage("rank", types.weight * sizes.encoder_weights, of_weights + of_attention)


def stages(call: Call, types: Types, sizes: Sizes = CLVP) -> list[Stage]:
    """Return all stages of a call."""
    found = [voice(call.clips, types, sizes)]
    found += [prefill(call.prompt, types, sizes)] * call.requests
    for rows, prompts in call.batches():
        found += [products(rows, types, sizes)] * call.new_tokens
        found += [attention(rows, prompts, call.prompt, stored, types, sizes) for stored in range(call.new_tokens)]
    speech = encoder(call.candidates, call.new_tokens, types, sizes)
    return found + [encoder(1, call.text_tokens + 1, types, sizes), speech] * call.requests


def parts(call: Call, device: Device, types: Types, sizes: Sizes = CLVP) -> dict[str, float]:
    """Return the seconds of a call by parts: voice, decode (prefill and steps), rank."""
    found = dict.fromkeys(("voice", "decode", "rank"), 0.0)
    for stage in stages(call, types, sizes):
        found[stage.part] += device.seconds(stage)
    found["decode"] += call.steps * device.step_seconds
    return found


def seconds(call: Call, device: Device, types: Types, sizes: Sizes = CLVP) -> float:
    return sum(parts(call, device, types, sizes).values())


def fit(device: Device, measured: Sequence[tuple[Call, float]], types: Types, sizes: Sizes = CLVP) -> Device:
    """Return `device` with the `share` and `step_seconds` that best fit calls and their seconds, relative to each.

    Neither is negative: where the best line would have it so, the other one alone is fitted.

    Raises:
        ValueError: fewer than two calls.
    """
    if len(measured) < 2:
        raise ValueError(f"two numbers need at least two measured calls, got {len(measured)}")
    bare = replace(device, share=1.0, step_seconds=0.0)
    found = np.array([took for _, took in measured])
    columns = np.array([[seconds(call, bare, types, sizes), call.steps] for call, _ in measured]) / found[:, None]
    ones = np.ones(len(found))
    (slope, overhead), *_ = np.linalg.lstsq(columns, ones)
    if slope <= 0 or overhead < 0:
        slope, overhead = float(columns[:, 0] @ ones / (columns[:, 0] @ columns[:, 0])), 0.0
    return replace(bare, share=float(1 / slope), step_seconds=float(overhead))


def sweeps(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """Return, for each varied value, the rows that differ from the default call in it alone, in its order."""
    rows, found = list(rows), {}
    for name in SWEEPS:
        others = {other: getattr(Call(), other) for other in SWEEPS if other != name}
        on = [row for row in rows if all(row["shape"][other] == value for other, value in others.items())]
        found[name] = sorted(on, key=lambda row: row["shape"][name])
    return found
