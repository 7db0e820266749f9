"""One decode step of N candidates of one text, half-way through decoding, in every precision tier of the engine.

Ours enters the tokens, computes logits and draws the next ones, as the engine runs it: captured and eagerly on a GPU.
The rivals give logits and draw nothing: transformers' decoder, whose cache is copied at every step, the same compiled
over a static cache (on a GPU), a decoder of torch's own operators (`benchmarks/rivals/torch_decoder.py`), captured too,
and on a CPU those of `benchmarks/decode_rivals.py`, each in a process of its own. All begin behind the same tokens as
transformers' decoder in float32, and are judged by its logits behind each of several tokens more: by the furthest
logit, by KL, and by how often the largest logit is the same token's.

The bytes of a row are what a step must move: weights, keys and values (the prompt's once), logits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

import torch

from benchmarks.decode_rivals import RIVALS, Rival
from benchmarks.harness import Provider, Task, task
from benchmarks.kernels import captured, name_of
from benchmarks.machine import read_bytes
from benchmarks.models import our_model, stock_model
from benchmarks.precision import divergence
from benchmarks.providers import Absent, bits, group_of
from benchmarks.rivals.decoder_process import DecoderProcess, Stored
from benchmarks.rivals.torch_decoder import TorchDecoder, TorchLayers
from benchmarks.tiers import PAGE_SIZE, TIERS, Tier, furthest_logit, prompt_of, require_served, stock_logits
from clvp_fast import SamplingParams
from clvp_fast.engine.persistent import MAX_ROWS, PersistentStep
from clvp_fast.engine.runner import Runner
from clvp_fast.engine.scheduler import Admission, Prefill, Step
from clvp_fast.engine.step import ENTERED
from clvp_fast.models.transformers_versions import CACHE

CANDIDATES = {"cpu": (16, 1, 4, 64), "cuda": (256, 1, 64, 16)}
TEXT_TOKENS, STORED = 60, 250
SMOKE = (3, 5, 18)
# The steps of a measurement, as many before `STORED` as after it; none of them makes a GPU wait.
STEPS = {"cpu": 1, "cuda": 20}
# Candidates of different tokens; the others repeat them.
_DISTINCT = 2
# The tokens that are entered behind those of a candidate, one at a time, to judge a step.
_PROBES = 32
# The groups that run in turns on a CPU with ours, and in other parties the others.
_AMONG_OURS = ("ours", "onnx", "llama")
# Seconds between steps on a CPU, while OpenMP's threads still spin for more work.
_REST = 0.05
# The most candidates on a CPU whose keys and values every provider of a party can have.
_CROWD = 16


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    for candidates in (SMOKE[0],) if smoke else CANDIDATES[device]:
        text_tokens, stored = SMOKE[1:] if smoke else (TEXT_TOKENS, STORED)
        shape = {"candidates": candidates, "text_tokens": text_tokens, "stored": stored}
        yield _task(device, shape, smoke)


@dataclass
class Known:
    """The results of transformers' decoder in float32 for a prompt and distinct candidates.

    prompt: `[prompt, hidden_size]`. tokens: `[distinct, stored]`. keys, values: `[num_layers, distinct, num_heads,
        prompt + stored, head_dim]`. entered: `[distinct, probes]`, tokens that could come next. logits: `[distinct,
        probes, vocab_size]` behind each of these.
    """

    prompt: torch.Tensor
    tokens: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    entered: torch.Tensor
    logits: torch.Tensor


@cache
def known(device: str, smoke: bool, text_tokens: int, stored: int) -> Known:
    from transformers import DynamicCache

    stock = stock_model(device, smoke=smoke)
    prompt = prompt_of(our_model(device, smoke=smoke), text_tokens, device)
    draw, shape = torch.Generator().manual_seed(4), (_DISTINCT, stored + _PROBES)
    tokens, entered = torch.randint(0, 8192, shape, generator=draw).to(device).split([stored, _PROBES], 1)
    tokens[:, 0] = stock.config.decoder_config.bos_token_id
    filled = DynamicCache()
    stock_logits(stock, prompt.expand(_DISTINCT, -1, -1), tokens, filled)
    keys, values = (torch.stack([getattr(layer, name) for layer in filled.layers]) for name in ("keys", "values"))
    decoder, place = stock.speech_decoder_model, torch.tensor([[stored + 1]], device=device)
    logits = []
    for probe in entered.t():
        logits.append(decoder(input_ids=probe[:, None], position_ids=place, **{CACHE: filled}).logits[:, 0])
        filled.crop(-1)
    return Known(prompt, tokens, keys, values, entered, torch.stack(logits, 1))


def judged(step: Callable, device: str, smoke: bool, shape: dict, distinct: int = _DISTINCT) -> tuple[float, dict]:
    """Return the largest distance of a step's logits from transformers' in float32, and its divergence from them.

    step: tokens `[candidates]` to logits `[candidates, vocab_size]`, behind the same stored tokens at every call.
    distinct: how many of the distinct candidates the step has.
    """
    found, candidates = known(device, smoke, shape["text_tokens"], shape["stored"]), shape["candidates"]
    place = torch.arange(candidates, device=device)
    results, exact = [], []
    for first in range(0, _PROBES, max(1, candidates // distinct)):
        which = place % distinct, (first + place // distinct) % _PROBES
        results.append(step(found.entered[which]).clone())
        exact.append(found.logits[which])
    error = max(map(furthest_logit, results, exact))
    return error, divergence(results, [logits.double() for logits in exact])


class StoredCandidates:
    """Candidates of one prompt in a `Runner`, with `stored` tokens each.

    Args:
        capture: replay steps as a CUDA graph.
        persistent: steps are one launch.
        deterministic: as for `Runner`.
    """

    def __init__(
        self,
        tier: Tier,
        device: str,
        smoke: bool,
        shape: dict,
        capture: bool,
        persistent: bool = False,
        deterministic: bool = False,
    ):
        require_served(tier.dtype, tier.activation_dtype, device)
        self.known = known(device, smoke, shape["text_tokens"], shape["stored"])
        self.candidates, self.stored, self.steps = shape["candidates"], shape["stored"], STEPS[device]
        prompt, room = self.known.prompt, self.stored + self.steps + 1
        shared, own = -(-len(prompt) // PAGE_SIZE), -(-room // PAGE_SIZE)
        self.runner = Runner(
            our_model(device, tier.dtype, smoke).speech_decoder_model,
            shared + self.candidates * own,
            PAGE_SIZE,
            self.candidates,
            room,
            max_prefix_len=len(prompt),
            capture=capture,
            persistent=persistent,
            deterministic=deterministic,
            packed=device == "cpu",  # as the engine does
            **tier.options,
        )
        self.runner.warm_up()
        self._persistent = persistent
        slots = range(self.candidates)
        pages = [(slot, place, shared + place * self.candidates + slot) for slot in slots for place in range(own)]
        step = Step(
            prefills=[Prefill("text", 0, list(range(shared)), len(prompt))],
            admitted=[Admission(slot, "text", slot, 0) for slot in slots],
            new_pages=pages,
            num_slots=self.candidates,
        )
        self.runner.apply(
            step, {"text": prompt}, {"text": SamplingParams(self.candidates, max_new_tokens=room, seed=0)}
        )
        self.runner.prefill_waiting()
        self._enter(self.known)
        self._tokens = _entered(device, smoke, shape)

    @torch.no_grad()
    def _enter(self, known: Known) -> None:
        """Write the candidates' keys and values into their pages."""
        pages, count = self.runner.pages, -(-self.stored // PAGE_SIZE)
        table = self.runner.slots.tensors["block_table"][: self.candidates, :count].long()
        limit = torch.finfo(pages.data.dtype).max
        for index in range(len(known.keys)):
            for which, all_tokens in enumerate((known.keys[index], known.values[index])):
                own = all_tokens[:, :, len(known.prompt) :].transpose(1, 2)  # [distinct, stored, num_heads, head_dim]
                if pages.scales is not None:
                    own = own / pages.scales[index, which][:, None]
                padded = own.new_zeros(_DISTINCT, count * PAGE_SIZE, *own.shape[2:])
                padded[:, : self.stored] = own
                paged = padded.clamp(-limit, limit).to(pages.data.dtype).unflatten(1, (count, PAGE_SIZE))
                # Through bytes where the type has no indexing of its own.
                target = pages.data[index, which].view(torch.uint8) if pages.scales is not None else None
                if target is None:
                    pages.data[index, which][table] = _repeated(paged, self.candidates)
                else:
                    target[table] = _repeated(paged.view(torch.uint8), self.candidates)

    def reset(self, stored: int, tokens: torch.Tensor | None = None) -> None:
        """Let every candidate have `stored` tokens, and enter `tokens` `[candidates]` or the known ones next."""
        state = self.runner.slots.first(self.candidates)
        state["lengths"].fill_(stored)
        state["seq_lens"].fill_(stored)
        state["token"].copy_(self._tokens if tokens is None else tokens)

    @cached_property
    def _one_launch(self) -> PersistentStep:
        widths = (self.runner.slots.tensors[name].shape[1] for name in ("block_table", "prefix_table"))
        return PersistentStep(self.runner.decoder, self.runner.pages, *widths)

    @torch.inference_mode()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits `[candidates, vocab_size]` behind `tokens` `[candidates]`."""
        self.reset(self.stored, tokens)
        state, decoder = self.runner.slots.first(self.candidates), self.runner.decoder
        arguments = [state[name] for name in ENTERED]
        if self._persistent:
            return self._one_launch.step(*arguments)[1]
        arrivals = torch.zeros(self.candidates, decoder.num_heads, dtype=torch.int32, device=decoder.device)
        return decoder.step(*arguments, self.runner.pages, arrivals, self.runner.product_rows)[1]

    @torch.inference_mode()
    def run(self) -> None:
        """Run `steps` steps around `stored` tokens, and read tokens one step late, as the engine does on a GPU."""
        self.reset(self.stored - self.steps // 2)
        last = None
        for _ in range(self.steps):
            handle = self.runner.decode(self.candidates)
            if last is not None:
                last.wait()
            last = handle
        last.wait()


def _task(device: str, shape: dict, smoke: bool) -> Task:
    first, *_ = TIERS[device]
    makers = {f"transformers {first.name}, no draw": partial(_transformers, device, shape, smoke)}
    absent = {}
    if device == "cpu":
        absent |= dict.fromkeys((COMPILED, ONE_LAUNCH), "for a GPU")
    else:
        makers[f"{COMPILED}, {first.name}, no draw"] = partial(_compiled_transformers, device, shape, smoke)
    for tier in TIERS[device]:
        if tier.page_dtype is None and tier.weight_dtype is None and (device == "cpu" or tier == first):
            name = f"torch {tier.name}{', captured' if device == 'cuda' else ''}, no draw"
            makers[name] = partial(_torch, name, tier, device, shape, smoke)
    for rival in RIVALS if device == "cpu" else ():
        makers[f"{rival.name}, no draw"] = partial(_process, rival, shape, smoke)
    for tier in TIERS[device]:
        # Keys and values of all providers lie on the device at once: the eager step is shown in the first tier.
        both = (True, False) if tier == first else (True,)
        for capture in both if device == "cuda" else (False,):
            how = "" if device == "cpu" else ", captured" if capture else ", eager"
            name = f"clvp_fast {tier.name}{how}"
            makers[name] = partial(_ours, name, tier, device, shape, smoke, capture)
        if device == "cuda" and tier.page_dtype is None and tier.weight_dtype is None:
            name = f"clvp_fast {tier.name}, deterministic, captured"
            makers[name] = partial(_ours, name, tier, device, shape, smoke, True, deterministic=True)
    if device == "cuda" and shape["candidates"] <= MAX_ROWS:
        for capture in (True, False):
            name = f"{ONE_LAUNCH}, {'captured' if capture else 'eager'}"
            makers[name] = partial(_one_launch, name, device, shape, smoke, capture)
    repeats = 1 if smoke else 20 if device == "cuda" else 10 if shape["candidates"] <= _CROWD else 5
    parties = _parties(list(makers), shape["candidates"]) if device == "cpu" else None
    rest = _REST if device == "cpu" and not smoke else 0.0
    read = read_bytes(device, smoke) if device == "cpu" else None
    counted = dict(tokens=shape["candidates"])
    return task("decode_step", shape, makers, repeats, absent, parties=parties, rest=rest, read=read, **counted)


def _parties(names: list[str], candidates: int) -> list[list[str]]:
    """Return the names of those that run in turns on a CPU, so that 23 GiB of memory are enough for each party.

    These are ours and some rivals, or the other rivals, with weights of as many bits; each alone where keys are many.
    """
    if candidates > _CROWD:
        return [[name] for name in names]
    parties = {}
    for name in names:
        parties.setdefault((bits(name), group_of(name) in _AMONG_OURS), []).append(name)
    return list(parties.values())


COMPILED = "transformers, static cache, torch.compile"
ONE_LAUNCH = "clvp_fast bfloat16, one launch"


def _one_launch(name: str, device: str, shape: dict, smoke: bool, capture: bool) -> Provider:
    tier = next(tier for tier in TIERS[device] if tier.name == "bfloat16")
    try:
        candidates = StoredCandidates(tier, device, smoke, shape, capture, persistent=True)
    except ValueError as error:  # the step itself says that it cannot serve here
        raise Absent(str(error)) from error
    return _timed(name, candidates, tier, device, shape, smoke)


def _ours(
    name: str, tier: Tier, device: str, shape: dict, smoke: bool, capture: bool, deterministic: bool = False
) -> Provider:
    candidates = StoredCandidates(tier, device, smoke, shape, capture, deterministic=deterministic)
    return _timed(name, candidates, tier, device, shape, smoke)


def _timed(name: str, candidates: StoredCandidates, tier: Tier, device: str, shape: dict, smoke: bool) -> Provider:
    error, divergent = judged(candidates.logits, device, smoke, shape)
    counted = _counted(device, smoke, shape, tier) | divergent
    return Provider(name, candidates.run, error, tier.tolerance, STEPS[device], counted)


def _dense(device: str, shape: dict, smoke: bool, dtype: torch.dtype, room: int) -> list[torch.Tensor]:
    """Return keys and values of candidates, prompt included: [num_layers, candidates, num_heads, tokens, head_dim]."""
    found = known(device, smoke, shape["text_tokens"], shape["stored"])
    index = torch.arange(shape["candidates"], device=device) % _DISTINCT
    dense = []
    for x in (found.keys, found.values):
        layers, _, heads, tokens, head_dim = x.shape
        whole = torch.zeros(layers, len(index), heads, tokens + room, head_dim, dtype=dtype, device=device)
        whole[:, :, :, :tokens] = x[:, index].to(dtype)
        dense.append(whole)
    return dense


def _rival(
    name: str,
    run: Callable,
    device: str,
    shape: dict,
    smoke: bool,
    tier: Tier,
    replay: bool = False,
    distinct: int = _DISTINCT,
) -> Provider:
    """Make a provider of `run(tokens)`, which gives logits; with `replay` it is timed as a CUDA graph."""
    tokens = _entered(device, smoke, shape)
    error, divergent = judged(run, device, smoke, shape, distinct)
    timed = captured(partial(run, tokens)) if replay else None
    counted = _counted(device, smoke, shape, tier) | divergent
    return Provider(name, timed or partial(run, tokens), error, tier.tolerance, counted=counted)


def _entered(device: str, smoke: bool, shape: dict) -> torch.Tensor:
    """Return the tokens `[candidates]` of a timed step."""
    found = known(device, smoke, shape["text_tokens"], shape["stored"])
    return _repeated(found.entered[:, 0], shape["candidates"])


def _repeated(distinct: torch.Tensor, candidates: int) -> torch.Tensor:
    """Return `[candidates, ...]`, which repeat the distinct ones in turn."""
    return distinct[torch.arange(candidates, device=distinct.device) % _DISTINCT]


def _transformers(device: str, shape: dict, smoke: bool) -> Provider:
    from transformers import DynamicCache

    tier = TIERS[device][0]
    stock = stock_model(device, tier.dtype, smoke).speech_decoder_model
    keys, values = _dense(device, shape, smoke, tier.dtype, 0)
    cache = DynamicCache()
    for index, pair in enumerate(zip(keys, values, strict=True)):
        cache.update(*pair, index)
    position = torch.tensor([[shape["stored"] + 1]], device=device)

    @torch.no_grad()
    def run(tokens):
        options = {"position_ids": position, CACHE: cache, "use_cache": True}
        logits = stock(input_ids=tokens[:, None], **options).logits[:, 0]
        cache.crop(-1)
        return logits

    return _rival(f"transformers {name_of(tier.dtype)}, no draw", run, device, shape, smoke, tier)


def _compiled_transformers(device: str, shape: dict, smoke: bool) -> Provider:
    """Run transformers' fastest mode: keys in one piece that does not grow, its forward compiled."""
    from transformers import StaticCache

    tier, steps, stored = TIERS[device][0], STEPS[device], shape["stored"]
    stock = stock_model(device, tier.dtype, smoke).speech_decoder_model
    keys, values = _dense(device, shape, smoke, tier.dtype, 0)
    length = keys.shape[3]
    cache = StaticCache(config=stock.config, max_cache_len=length + steps)
    for index, pair in enumerate(zip(keys, values, strict=True)):
        cache.update(*pair, index)
    compiled = torch.compile(stock, mode="reduce-overhead" if device == "cuda" else None)
    positions = [torch.tensor([[stored + 1 + n]], device=device) for n in range(-(steps // 2), steps - steps // 2)]

    def step(tokens, position):
        options = {"position_ids": position, CACHE: cache, "use_cache": True}
        return compiled(input_ids=tokens[:, None], **options).logits[:, 0]

    @torch.no_grad()
    def at_stored(tokens):
        _rewind(cache, length)
        return step(tokens, positions[steps // 2])

    tokens = _entered(device, smoke, shape)
    error, divergent = judged(at_stored, device, smoke, shape)

    @torch.no_grad()
    def run():
        _rewind(cache, length - steps // 2)
        for position in positions:
            step(tokens, position)

    counted = _counted(device, smoke, shape, tier) | divergent
    return Provider(f"{COMPILED}, {tier.name}, no draw", run, error, tier.tolerance, steps, counted)


def _rewind(cache, length: int) -> None:
    """Let a static cache hold its first `length` tokens."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def _torch(name: str, tier: Tier, device: str, shape: dict, smoke: bool) -> Provider:
    keys, values = _dense(device, shape, smoke, tier.dtype, 1)
    model = stock_model(device, tier.dtype, smoke).speech_decoder_model
    decoder = TorchDecoder(model, keys, values, shape["stored"] + 1)
    return _rival(name, decoder, device, shape, smoke, tier, device == "cuda")


def process_of(rival: Rival, shape: dict, smoke: bool, settings: dict) -> DecoderProcess:
    """Start a rival's process behind what the candidates of a shape have stored."""
    found = known("cpu", smoke, shape["text_tokens"], shape["stored"])
    places = torch.arange(shape["stored"])
    stored = Stored(found.prompt, found.tokens, places + (places > 0), found.keys, found.values, shape["stored"] + 1)
    layers = layers_of(smoke)
    return DecoderProcess(rival.module, layers, stored, shape["candidates"], kind=rival.kind, settings=settings)


@cache
def layers_of(smoke: bool) -> TorchLayers:
    """Return the layers of transformers' decoder that rivals have."""
    return TorchLayers(stock_model("cpu", smoke=smoke).speech_decoder_model)


def _process(rival: Rival, shape: dict, smoke: bool) -> Provider:
    """Make a provider of a rival in a process of its own, whose peak memory its row has."""
    settings = rival.settings(shape["candidates"])
    decoder = process_of(rival, shape, smoke, settings)
    provider = _rival(f"{rival.name}, no draw", decoder, "cpu", shape, smoke, rival.tier, distinct=rival.distinct)
    counted = _counted("cpu", smoke, shape, rival.tier, rival.tier.weight_dtype)
    of_process = {"process_bytes": decoder.peak_bytes(), "settings": settings}
    return replace(provider, run=decoder.run, counted=provider.counted | counted | of_process)


def _counted(device: str, smoke: bool, shape: dict, tier: Tier, head_dtype: torch.dtype | None = None) -> dict:
    """Count the bytes and operations that a step of a tier needs at least; its head is of `head_dtype` or its dtype."""
    model = our_model(device, smoke=smoke).speech_decoder_model
    config, candidates = model.config, shape["candidates"]
    in_layers = sum(p.numel() for layer in model.model.decoder.layers for p in layer.parameters())
    head = model.lm_head.weight.numel()
    prompt = len(known(device, smoke, shape["text_tokens"], shape["stored"]).prompt)
    tokens = candidates * (shape["stored"] + 1) + prompt
    itemsize, page_itemsize = tier.dtype.itemsize, (tier.page_dtype or tier.dtype).itemsize
    weights = in_layers * (tier.weight_dtype or tier.dtype).itemsize + head * (head_dtype or tier.dtype).itemsize
    key_values = 2 * tokens * config.num_hidden_layers * config.hidden_size * page_itemsize
    logits = 2 * candidates * config.vocab_size * itemsize
    attended = candidates * (shape["stored"] + 1 + prompt)
    flop = 2 * candidates * (in_layers + head) + 4 * attended * config.num_hidden_layers * config.hidden_size
    return {"bytes": weights + key_values + logits, "flop": flop, "dtype": name_of(tier.dtype)}
