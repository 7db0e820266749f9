"""The runner, driven by hand-made steps: tokens against `GenerationMixin`, rows against themselves in other batches."""

from collections import deque
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clvp_fast import ops
from clvp_fast.engine import prompts as prompts_module, runner as runner_module, slots as slots_module
from clvp_fast.engine.decoder import PagedDecoder, min_rows
from clvp_fast.engine.runner import Runner
from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.engine.scheduler import Admission, Prefill, Scheduler
from tests.engine.test_decoder import Loop, prompts, tiny
from tests.kit import isa
from tests.models.clvp.builders import START, STOP

PAGE_SIZE = 16
# So many that a row has its bits by any product.
ROWS = 16
GREEDY = SamplingParams(do_sample=False, repetition_penalty=1.0, max_new_tokens=40, seed=0)
SAMPLED = SamplingParams(max_new_tokens=40, seed=5, temperature=1.3, top_k=0, top_p=0.95)


# The torch path of attention reads lengths, and adds up by them.
needs_own_attention = isa.needs("paged_attention_decode")


@pytest.fixture(autouse=True)
def words_are_written_once(monkeypatch):
    """Assert that no scatter writes a word twice, which would hold either value on a GPU."""
    to_device = slots_module.to_device

    def checked(device, words, *others):
        assert len(np.unique(words)) == len(words)
        return to_device(device, words, *others)

    monkeypatch.setattr(slots_module, "to_device", checked)


def stopping(model):
    """Make a model whose stop token is drawn now and then."""
    with torch.no_grad():
        model.speech_decoder_model.lm_head.bias[STOP] = 1.5
    return model


class Driver:
    """A runner, with pages dealt at random and poisoned, and what a scheduler would tell it made by hand."""

    def __init__(self, model, prompt_list, params, *, max_batch=6, num_pages=60, seed=0, **options):
        settings = dict(page_size=PAGE_SIZE, max_new_tokens=40) | options
        self.runner = Runner(model.speech_decoder_model, num_pages, max_batch=max_batch, **settings)
        self.runner.pages.data.fill_(torch.nan)
        self.prompts, self.params = dict(enumerate(prompt_list)), dict(enumerate(params))
        self._free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist()
        self.held = {}  # slot -> [key, candidate, tokens stored, own pages]
        self.tokens = {}  # (key, candidate) -> what it drew
        self.pending = self._nothing()
        self._prefilled = {}

    @staticmethod
    def _nothing():
        return SimpleNamespace(freed_slots=[], prefills=[], admitted=[], new_pages=[], moves=[])

    def admit(self, slot, key, candidate=0):
        if key not in self._prefilled:
            row, length = len(self._prefilled), len(self.prompts[key])
            pages = [self._free.pop() for _ in range(-(-length // PAGE_SIZE))]
            self.pending.prefills.append(Prefill(key, row, pages, length))
            self._prefilled[key] = row
        self.pending.admitted.append(Admission(slot, key, candidate, self._prefilled[key]))
        self.held[slot] = [key, candidate, 0, []]
        self.tokens[key, candidate] = []

    def free(self, slot):
        self._free = self.held.pop(slot)[3] + self._free
        self.pending.freed_slots.append(slot)

    def move(self, source, target):
        self.pending.moves.append((source, target))

    def apply(self):
        """Bring what is pending to the runner."""
        self.runner.apply(self.pending, self.prompts, self.params)
        for source, target in self.pending.moves:
            self.held[target] = self.held.pop(source)
        self.pending = self._nothing()

    def start(self):
        """Apply what is pending and start a step."""
        for slot, (_, _, stored, pages) in self.held.items():
            if stored % PAGE_SIZE == 0:
                pages.append(self._free.pop())
                self.pending.new_pages.append((slot, len(pages) - 1, pages[-1]))
        self.apply()
        for state in self.held.values():
            state[2] += 1
        return self.runner.decode(max(self.held) + 1)

    def step(self):
        """Run one step, read it at once, and free finished candidates."""
        handle = self.start()
        tokens, finished = self.runner.tokens(handle), self.runner.finished(handle)
        for slot, (key, candidate, *_) in sorted(self.held.items()):
            assert tokens[slot] >= 0
            self.tokens[key, candidate].append(int(tokens[slot]))
            if finished[slot]:
                self.free(slot)

    def run(self):
        while self.held:
            self.step()
        return self.tokens


@torch.no_grad()
def expected_tokens(model, prompt, **settings):
    """Return the tokens that `GenerationMixin` draws after a prompt, up to the stop token."""
    settings = dict(do_sample=False, max_new_tokens=40, eos_token_id=STOP, pad_token_id=STOP) | settings
    settings["use_engine"] = False
    return model.speech_decoder_model.generate(conditioning_embeds=prompt[None], **settings)[0, 1:].tolist()


def alone(model, prompt, params, candidate=0, slot=0, **options):
    """Return `(tokens, states)` of one candidate that has the runner to itself."""
    driver = Driver(model, [prompt], [params], states=True, **options)
    driver.admit(slot, 0, candidate)
    tokens = driver.run()[0, candidate]
    return tokens, driver.runner.states(slot, len(tokens))


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_greedy_equals_generation_mixin(penalty, contiguous):
    model = stopping(tiny())
    decoder = model.speech_decoder_model
    decoder.config.contiguous_positions = contiguous
    with torch.no_grad():
        decoder.lm_head.bias[START] = 2.0  # so that the penalty on the start token shows
    prompt_list = prompts(model, (4, 23, 9, 40, 15))
    params = SamplingParams(
        do_sample=False, repetition_penalty=penalty, max_new_tokens=40, seed=0, penalize_prompt=False
    )
    driver = Driver(model, prompt_list, [params] * 5)
    driver.admit(1, 0)
    driver.admit(3, 1)
    for key in (2, 3, 4):
        for _ in range(3):
            driver.step()
        driver.admit(next(slot for slot in (0, 2, 5, 4) if slot not in driver.held), key)
    found = driver.run()
    expected = [expected_tokens(model, prompt, repetition_penalty=penalty) for prompt in prompt_list]
    assert [found[key, 0] for key in range(5)] == expected
    assert len({token for row in expected for token in row}) > 6


def test_rows_of_the_test_above_stop_apart():
    model = stopping(tiny())
    lengths = {len(expected_tokens(model, prompt, repetition_penalty=2.0)) for prompt in prompts(model, (4, 23, 9, 40))}
    assert len(lengths) > 2 and min(lengths) < 40


def test_every_shape_of_model():
    for shape in ("heads32", "heads80", "unrotated"):
        model = tiny(shape)
        prompt_list = prompts(model)
        driver = Driver(model, prompt_list, [GREEDY] * 3)
        for slot, key in enumerate((2, 0, 1)):
            driver.admit(slot, key)
        found = driver.run()
        assert [found[key, 0] for key in range(3)] == [expected_tokens(model, prompt) for prompt in prompt_list]


def test_stop_tokens_and_limits_are_each_candidate_s_own():
    model = tiny()
    (prompt,) = prompts(model, (7,))
    whole = expected_tokens(model, prompt)
    token = whole[12]
    stops = SamplingParams(do_sample=False, repetition_penalty=1.0, max_new_tokens=40, seed=0, stop_token=token)
    limited = SamplingParams(do_sample=False, repetition_penalty=1.0, max_new_tokens=3, seed=0)
    driver = Driver(model, [prompt] * 3, [stops, limited, GREEDY])
    for key in range(3):
        driver.admit(key, key)
    found = driver.run()
    assert found[0, 0] == whole[: whole.index(token) + 1] and found[1, 0] == whole[:3] and found[2, 0] == whole


@pytest.mark.parametrize("contiguous", [False, True])
def test_candidates_as_long_as_the_positions_allow(contiguous):
    model = tiny()
    model.speech_decoder_model.config.contiguous_positions = contiguous
    longest = 80 if contiguous else 79
    params = SamplingParams(do_sample=False, repetition_penalty=1.0, max_new_tokens=longest, seed=0)
    (prompt,) = prompts(model, (7,))
    expected = expected_tokens(model, prompt, max_new_tokens=longest)
    assert alone(model, prompt, params, max_new_tokens=longest)[0] == expected and len(expected) == longest
    with pytest.raises(ValueError, match=f"from 1 to {longest}"):
        Driver(model, [prompt], [params], max_new_tokens=longest + 1)


def test_a_finished_or_free_slot_draws_minus_one():
    model = tiny()
    params = SamplingParams(do_sample=False, max_new_tokens=2, seed=0)
    driver = Driver(model, prompts(model), [params, GREEDY, GREEDY])
    driver.admit(0, 0)
    driver.admit(2, 1)
    handles = [driver.start() for _ in range(4)]
    tokens = [driver.runner.tokens(handle).tolist() for handle in handles]
    finished = [driver.runner.finished(handle).tolist() for handle in handles]
    assert [row[1] for row in tokens] == [-1] * 4 and [row[0] for row in tokens[2:]] == [-1] * 2
    assert min(tokens[0][0], tokens[1][0], *(row[2] for row in tokens)) >= 0
    assert [row[0] for row in finished] == [False, True, True, True] and not any(row[2] for row in finished)


def test_results_are_read_late():
    """Read a step's own tokens, however many steps have started since."""
    model = tiny()
    expected = expected_tokens(model, prompts(model)[1])
    driver = Driver(model, prompts(model), [GREEDY] * 3)
    driver.admit(0, 1)
    handles = [driver.start() for _ in range(20)]
    assert [int(driver.runner.tokens(handle)[0]) for handle in handles] == expected[:20]


VARIED = [
    SAMPLED,
    replace(GREEDY, temperature=1e-44),  # which greedy rows must not be divided by
    SamplingParams(max_new_tokens=30, seed=2**63 + 7, top_k=9, top_p=1.0, repetition_penalty=1.0),
    SamplingParams(max_new_tokens=40, seed=9, typical_p=0.8, min_p=0.02, temperature=2.0),
    SamplingParams(max_new_tokens=35, seed=5, temperature=1.0, top_p=1.0, repetition_penalty=3.0),
]


@needs_own_attention
@torch.inference_mode()
def test_draws_are_those_of_the_operator():
    """Call the operator with each request's parameters as numbers, on the logits of the same prompt and tokens."""
    model = tiny()
    prompt_list = prompts(model, (4, 23, 9, 40, 15))
    for key, params in enumerate(VARIED):
        loop = Loop(model.speech_decoder_model, [prompt_list[key]], [0] * ROWS, steps=30)
        seen = torch.zeros(ROWS, 10, dtype=torch.int32)
        seen[:, START // 32] = 1 << START % 32
        seen[:, 0] |= 1 << 1
        lengths, done = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS, dtype=torch.bool)
        names = ("temperature", "top_k", "top_p", "typical_p", "min_p", "repetition_penalty", "do_sample", "seed")
        settings = {name: getattr(params, name) for name in names} | dict(stop_token=-1, pad_token=-1)
        if not params.do_sample:
            settings |= dict(temperature=1.0, top_p=1.0)
        drawn = []
        for step in range(30):
            _, logits = loop.step()
            loop.tokens = ops.sample(logits, seen, lengths, done, candidate=3, step=step, **settings)
            drawn.append(int(loop.tokens[0]))
        found = alone(model, prompt_list[key], replace(params, max_new_tokens=30), candidate=3)[0]
        assert found == drawn[: len(found)] and (len(found) == 30 or found[-1] == STOP)


@needs_own_attention
@pytest.mark.parametrize(
    "options, threads", [({}, 1), ({}, 2), ({"deterministic": True}, 1), ({"max_batch": 40}, 1)], ids=str
)
def test_bits_do_not_depend_on_the_batch(options, threads):
    """Compare tokens and hidden states of varied candidates alone with those among others in other slots."""
    model = stopping(tiny())
    options = dict(max_batch=24, num_pages=200) | options
    prompt_list = prompts(model, (4, 23, 9, 40, 15))
    params = [replace(given, max_new_tokens=18 + key) for key, given in enumerate(VARIED)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = {
            (key, candidate): alone(model, prompt_list[key], params[key], candidate, slot=candidate, **options)
            for key in range(5)
            for candidate in (0, 3)
        }
        driver = Driver(model, prompt_list, params, states=True, **options)
        waiting = [(key, candidate) for candidate in range(4) for key in range(5)]
        slots, found = torch.randperm(24, generator=torch.Generator().manual_seed(1)).tolist(), {}
        while waiting or driver.held:
            for _ in range(3):
                if waiting:
                    driver.admit(slots.pop(), *waiting.pop())
            held = {tuple(state[:2]): slot for slot, state in driver.held.items()}
            driver.step()
            for name, slot in held.items():
                if slot not in driver.held:
                    found[name] = driver.runner.states(slot, len(driver.tokens[name]))
    finally:
        torch.set_num_threads(before)
    for name, (tokens, states) in expected.items():
        assert driver.tokens[name] == tokens, name
        assert torch.equal(found[name], states), name
    assert driver.tokens[0, 0] != driver.tokens[0, 3], "candidates of one request differ"
    assert len({len(tokens) for tokens in driver.tokens.values()}) > 5


def test_few_rows_would_have_other_bits(monkeypatch):
    """Show why there is a least number of rows on this machine; elsewhere it costs a little."""
    model = tiny()
    (prompt,) = prompts(model, (7,))
    with ops.backend("torch"):
        _, padded = alone(model, prompt, GREEDY, max_batch=20)
        monkeypatch.setattr(runner_module, "min_rows", lambda model: 1)
        _, bare = alone(model, prompt, GREEDY, max_batch=20)
    torch.testing.assert_close(bare, padded, atol=1e-4, rtol=1e-4)
    if torch.equal(bare, padded):
        pytest.skip("one row has the same bits here")


@needs_own_attention
def test_steps_have_enough_rows(monkeypatch):
    model = tiny()
    rows = []
    step = Runner._step
    monkeypatch.setattr(
        Runner, "_step", lambda self, count, **agreed: rows.append(count) or step(self, count, **agreed)
    )
    for least in (1, 16):
        monkeypatch.setattr(runner_module, "min_rows", lambda model, least=least: least)
        for options, slot in (({}, 0), ({"max_batch": 20}, 18), ({"max_batch": 20, "deterministic": True}, 0)):
            driver = Driver(model, prompts(model), [GREEDY] * 3, **options)
            driver.admit(slot, 0)
            driver.step()
        assert rows == [least, 19, 20]
        rows.clear()


@pytest.mark.parametrize(
    "dtype, backend, changes, least",
    [
        (torch.float32, None, {}, 1),
        (torch.float32, None, {"n_inner": 72}, 16),
        (torch.float32, "torch", {}, 16),
        (torch.bfloat16, "torch", {}, 1),
    ],
)
def test_few_rows_where_products_promise_their_bits(dtype, backend, changes, least):
    model = tiny().speech_decoder_model.to(dtype)
    model.config.update(changes)
    if isa.why_unserved("linear", dtype):
        least = 1 if dtype == torch.bfloat16 else 16
    with ops.backend(backend):
        assert min_rows(model) == least


@needs_own_attention
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_moves(params):
    """Move candidates to other slots: they draw the same tokens, and take their hidden states along."""
    model = tiny()
    prompt_list = prompts(model)
    expected = {key: alone(model, prompt_list[key], params) for key in (1, 2)}
    driver = Driver(model, prompt_list, [GREEDY, params, params], states=True)
    for slot, key in ((0, 0), (4, 1), (5, 2)):
        driver.admit(slot, key)
    for _ in range(18):
        driver.step()
    driver.free(0)
    driver.move(5, 0)
    driver.move(4, 1)
    driver.step()
    assert set(driver.held) == {0, 1} and driver.runner.slots.active[:6].tolist() == [True, True] + [False] * 4
    for _ in range(3):
        driver.step()
    driver.admit(4, 0)
    tokens = driver.run()
    for key, slot in ((2, 0), (1, 1)):
        assert tokens[key, 0] == expected[key][0]
        assert torch.equal(driver.runner.states(slot, len(tokens[key, 0])), expected[key][1])
    assert tokens[0, 0] == alone(model, prompt_list[0], GREEDY)[0]


def test_a_preempted_candidate_starts_again_in_another_slot():
    model = stopping(tiny())
    prompt_list = prompts(model)
    expected = alone(model, prompt_list[1], SAMPLED, candidate=7)[0]
    assert len(expected) > 9
    driver = Driver(model, prompt_list, [GREEDY, SAMPLED, GREEDY])
    driver.admit(0, 0)
    driver.admit(1, 1, 7)
    for _ in range(9):
        driver.step()
    driver.free(1)
    driver.admit(1, 2)
    driver.step()
    driver.admit(3, 1, 7)
    assert driver.run()[1, 7] == expected


def test_freed_slots_write_nothing():
    model = tiny()
    driver = Driver(model, prompts(model), [GREEDY] * 3)
    driver.admit(0, 0)
    driver.admit(2, 1)
    for _ in range(5):
        driver.step()
    pages = list(driver.held[0][3])
    assert driver.runner.slots.active.sum() == 2
    driver.free(0)
    driver.start()
    assert driver.runner.slots.active.nonzero()[0].tolist() == [2]
    before = driver.runner.pages.data[:, :, pages].clone()
    for _ in range(3):
        driver.start()
    assert torch.equal(driver.runner.pages.data[:, :, pages].nan_to_num(), before.nan_to_num())


@torch.no_grad()
def test_states_are_the_hidden_states_of_the_draws():
    model = tiny()
    decoder, (prompt,) = model.speech_decoder_model, prompts(model, (11,))
    tokens, states = alone(model, prompt, GREEDY)
    logits = decoder.lm_head(states)
    assert states.shape == (40, 128) and logits.argmax(-1).tolist() == tokens
    places = torch.arange(40)
    own = decoder.model.decoder.input_embeds_layer(torch.tensor([START, *tokens[:-1]]))
    own = own + decoder.model.decoder.position_embeds_layer(places + (places > 0))
    whole = decoder.model(inputs_embeds=torch.cat([prompt, own])[None], embeds_have_positions=True).last_hidden_state
    torch.testing.assert_close(states, decoder.final_norm(whole[0, len(prompt) :]), atol=2e-5, rtol=1e-5)


def test_changes_are_one_copy(monkeypatch):
    copies = []
    to_device = slots_module.to_device
    for module in (slots_module, prompts_module):
        monkeypatch.setattr(module, "to_device", lambda *args: copies.append(1) or to_device(*args))
    model = tiny()
    driver = Driver(model, prompts(model), [GREEDY] * 3)
    driver.admit(0, 0)
    driver.step()
    assert len(copies) == 2, "the changes, and where the prompts begin"
    for candidate in range(1, 4):
        driver.admit(candidate, 0, candidate)
    driver.step()
    assert len(copies) == 3
    for _ in range(10):
        driver.step()
    assert len(copies) == 3, "a step without changes copies nothing"


class NoReading(TorchDispatchMode):
    """Refuses what reads the device on the host, or allocates by what it reads."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), function
        return function(*args, **(kwargs or {}))


@needs_own_attention
def test_nothing_is_read_within_a_step():
    model = tiny()
    driver = Driver(model, prompts(model), VARIED, states=True)
    driver.admit(0, 0)
    driver.admit(2, 1)
    driver.step()
    with NoReading(), torch.inference_mode():
        driver.runner._step(driver.runner.max_batch)
    with NoReading(), pytest.raises(AssertionError):
        torch.zeros(1).item()


def test_kernels_in_the_interpreter():
    model = tiny("heads32", num_hidden_layers=1, activation_function="gelu_new")
    prompt_list = prompts(model, (3, 15))
    params = SamplingParams(do_sample=False, repetition_penalty=1.5, max_new_tokens=3, seed=0, penalize_prompt=False)
    expected = [expected_tokens(model, prompt, max_new_tokens=3, repetition_penalty=1.5) for prompt in prompt_list]
    driver = Driver(model, prompt_list, [params, params])
    driver.admit(2, 0)
    driver.admit(0, 1)
    with ops.backend("kernel"):
        found = driver.run()
    assert [found[0, 0], found[1, 0]] == expected


def test_bfloat16_and_float8_pages_run():
    model = tiny().to(torch.bfloat16)
    prompt_list = [prompt.bfloat16() for prompt in prompts(tiny())]
    for page_dtype in (None, torch.float8_e4m3fn):
        driver = Driver(model, prompt_list, [GREEDY] * 3, page_dtype=page_dtype)
        for key in range(3):
            driver.admit(key, key)
        tokens = driver.run()
        assert all(len(row) == 40 and len(set(row)) > 3 for row in tokens.values())


def test_bad_input():
    model = tiny()
    decoder = model.speech_decoder_model
    with pytest.raises(ValueError, match="from 1 up, not 4, 16 and 0"):
        Runner(decoder, 4, PAGE_SIZE, 0, 8)
    with pytest.raises(ValueError, match="captured on a CUDA device"):
        Runner(decoder, 4, PAGE_SIZE, 2, 8, capture=True)
    short, long = prompts(model, (4, 40))
    cases = [
        (short[:, :-1], GREEDY, {}, r"a prompt must be \[8, 128\], not \[8, 127\]"),
        (long, GREEDY, dict(max_prefix_len=40), "has 44 tokens, and there is room for 40"),
        (short, SamplingParams(max_new_tokens=40), {}, "have no seed"),
        (short, SamplingParams(max_new_tokens=41, seed=0), {}, "may draw 41 tokens, and there is room for 40"),
    ]
    for prompt, params, options, message in cases:
        driver = Driver(model, [prompt], [params], **options)
        driver.admit(0, 0)
        with pytest.raises(ValueError, match=message):
            driver.start()
        assert (driver.runner.slots.tensors["seq_lens"] == -1).all() and not driver.runner.slots.active.any()
    for count in (0, 7):
        with pytest.raises(ValueError, match="num_slots must be from 1 to 6"):
            driver.runner.decode(count)
    with pytest.raises(RuntimeError, match="states=True"):
        driver.runner.states(0, 1)
    decoder.config.eos_token_id = [STOP, 3]
    with pytest.raises(ValueError, match="names 2"):
        Runner(decoder, 4, PAGE_SIZE, 2, 8)


def test_deterministic_needs_attention_that_treats_each_row_alone():
    model = tiny()
    with ops.backend("torch"), pytest.raises(RuntimeError, match="deterministic=True needs the kernel"):
        Runner(model.speech_decoder_model, 4, PAGE_SIZE, 2, 8, deterministic=True)
    with ops.backend("reference"):
        assert alone(model, prompts(model)[0], GREEDY, deterministic=True)[0] == expected_tokens(
            model, prompts(model)[0]
        )


@needs_own_attention
def test_deterministic_steps_stay_so_under_a_backend_that_is_forced_later():
    """Bound anew under torch's, they would sum over as many keys as the longest row has."""
    driver = Driver(tiny(), [prompts(tiny())[0]], [GREEDY], deterministic=True)
    driver.admit(0, 0)
    driver.step()
    with ops.backend("torch"), pytest.raises(RuntimeError, match="deterministic=True needs the kernel"):
        driver.step()


@needs_own_attention
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("num_pages, max_batch", [(200, 24), (14, 24)])
def test_the_runner_follows_the_scheduler(num_pages, max_batch, lag):
    """Several requests with several candidates, with room and without (candidates are preempted and start again)."""
    model = stopping(tiny())
    prompt_list = prompts(model, (4, 23, 9, 40, 15))
    params = [replace(given, max_new_tokens=25 + 3 * key) for key, given in enumerate(VARIED)]
    counts = {0: 5, 1: 1, 2: 4, 3: 3, 4: 6}
    scheduler = Scheduler(num_pages, PAGE_SIZE, max_batch, 40, lag=lag)
    runner = Runner(model.speech_decoder_model, num_pages, PAGE_SIZE, max_batch, 40, states=True)
    runner.pages.data.fill_(torch.nan)
    for key, count in counts.items():
        scheduler.add(key, len(prompt_list[key]), count, params[key].max_new_tokens)
    tokens, kept, starts, moves, in_flight, ended = {}, {}, 0, 0, deque(), []

    def read():
        handle, runs = in_flight.popleft()
        drawn, finished = runner.tokens(handle), runner.finished(handle)
        for slot, run in enumerate(runs):
            if run is None or run.slot is None:
                continue
            tokens[run].append(int(drawn[slot]))
            if finished[slot]:
                kept[run.key, run.candidate] = tokens[run], runner.states(run.slot, len(tokens[run]))
        ended.extend(scheduler.advance(np.flatnonzero(finished).tolist()))

    while (step := scheduler.schedule()) is not None:
        starts, moves = starts + len(step.admitted), moves + len(step.moves)
        runner.apply(step, prompt_list, params)
        for run in step.runs:
            if run is not None:
                tokens.setdefault(run, [])
        in_flight.append((runner.decode(step.num_slots), step.runs))
        if len(in_flight) > lag:
            read()
    while in_flight:
        read()
    assert sorted(ended) == sorted(counts) and scheduler.pool.used_pages == 0
    assert len(kept) == sum(counts.values()) and (starts > len(kept)) == (num_pages < 200) and moves > 0
    for (key, candidate), (drawn, states) in kept.items():
        expected, expected_states = alone(model, prompt_list[key], params[key], candidate)
        assert drawn == expected, (key, candidate)
        assert torch.equal(states, expected_states), (key, candidate)


@needs_own_attention
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_rows_take_the_first_of_equal_logits_in_every_company(dtype):
    """Use tokens with equal logits, also without shortcuts, as in a captured step."""
    model = stopping(tiny())
    prompt_list = [prompt.to(dtype) for prompt in prompts(model)]
    model.to(dtype)
    head = model.speech_decoder_model.lm_head
    with torch.no_grad():
        head.weight[150:300] = head.weight[:150]
        head.bias[150:300] = head.bias[:150]
        head.bias[START - 150], head.bias[STOP - 150] = -9.0, -9.0
    params = [replace(GREEDY, repetition_penalty=1.5), SAMPLED, replace(SAMPLED, top_p=1.0, typical_p=0.9)]
    expected = [alone(model, prompt_list[key], params[key])[0] for key in range(3)]
    twins = [(token, step) for step, token in enumerate(expected[0]) if token >= 150 and token != STOP]
    assert twins and all(token - 150 in expected[0][:step] for token, step in twins), "the first was penalised before"
    for shortcuts in (None, lambda rows: {}):
        driver = Driver(model, prompt_list, params)
        if shortcuts is not None:
            driver.runner.slots.shortcuts = shortcuts
        for slot, key in enumerate((1, 0, 2)):
            driver.admit(slot, key)
        assert [driver.run()[key, 0] for key in range(3)] == expected


def test_shortcuts_are_what_the_slots_agree_on():
    driver = Driver(tiny(), prompts(tiny()), [GREEDY, SAMPLED, replace(SAMPLED, temperature=1.0, top_k=4)])
    slots = driver.runner.slots
    neutral = dict(slots_module.NEUTRAL)
    for slot, key in ((3, 0), (1, 1), (0, 2)):
        driver.admit(slot, key)
    driver.start()
    greedy, both, all_three = slots.shortcuts(4), slots.shortcuts(2), slots.shortcuts(5)
    off = {"typical_p": 1.0, "min_p": 0.0, "typical_mass": 1.0}
    assert both == {"do_sample": True} | off
    assert all_three == greedy == off
    driver.free(1), driver.free(0)
    driver.start()
    assert slots.shortcuts(4) == neutral | {"do_sample": False} and slots.shortcuts(3) == neutral | {"do_sample": True}


@needs_own_attention
def test_replays_in_the_place_of_steps(monkeypatch):
    """Do on a CPU as a captured step does: more rows than slots, and no number in place of a tensor."""
    model = stopping(tiny())
    prompt_list = prompts(model, (4, 23, 9, 40, 15))
    expected = [alone(model, prompt_list[key], VARIED[key])[0] for key in range(5)]
    driver = Driver(model, prompt_list, VARIED, max_batch=24, num_pages=200)
    runner, step, replayed = driver.runner, driver.runner._step, set()

    def replay(size):
        replayed.add(size)
        step(size, typical_mass=1.0)

    sizes = [16, 20, 24]
    monkeypatch.setattr(runner_module, "batch_buckets", lambda capacity: sizes)
    runner._graphs._graphs = {size: SimpleNamespace(replay=partial(replay, size)) for size in sizes}
    runner._step = lambda *args, **options: pytest.fail("a step that could be replayed ran eagerly")
    for slot, key in enumerate((2, 4, 0)):
        driver.admit(slot, key)
    driver.step()
    driver.admit(17, 1)
    driver.admit(23, 3)
    found = driver.run()
    assert [found[key, 0] for key in range(5)] == expected
    assert replayed >= {16, 24}


def test_warm_up_without_capture_does_nothing():
    driver = Driver(tiny(), [], [])
    driver.runner.warm_up(lambda *args: pytest.fail("nothing is captured on a CPU"))


def test_state_is_laid_out_as_named():
    """Keep the bits of 64-bit fields on the way through 32-bit words."""
    model = tiny()
    driver = Driver(model, prompts(model), [SAMPLED, VARIED[2], VARIED[3]], max_batch=16)
    driver.admit(4, 1, 2**31 - 1)
    driver.admit(1, 2, 3)
    driver.runner.apply(driver.pending, driver.prompts, driver.params)
    state = {name: tensor.numpy() for name, tensor in driver.runner.slots.tensors.items()}
    assert state["seed"][4] == 7 - 2**63 and state["seed"][1] == 9 and state["candidate"][4] == 2**31 - 1
    assert state["typical_p"][1] == 0.8 and state["temperature"][1] == 2.0 and state["top_k"][4] == 9
    assert state["limit"][4] == 30 and state["stop"][4] == STOP and state["token"][[1, 4]].tolist() == [START] * 2
    assert state["do_sample"].tolist() == [slot in (1, 4) for slot in range(16)]
    assert state["seq_lens"].tolist() == [-1, 0, -1, -1, 0] + [-1] * 11
    # The start token, and code 1 as in the original's prompt.
    assert np.bitwise_count(state["seen"].view(np.uint32)).sum(1).tolist() == [0, 2, 0, 0, 2] + [0] * 11
    assert state["seen"].view(np.uint32)[4, START // 32] == 1 << START % 32
    assert state["seen"].view(np.uint32)[4, 0] == 1 << 1


def test_steps_that_were_bound_before_a_move_end_with_it():
    """Keep the old weights for a request under way; the next one has the new ones, at any row count."""
    model = tiny()
    (prompt,) = prompts(model, (9,))
    driver = Driver(model, [prompt] * 4, [GREEDY] * 4)
    driver.admit(0, 0)
    driver.admit(1, 1)
    for _ in range(3):
        driver.step()
    for parameter in model.speech_decoder_model.model.decoder.layers[1].parameters():
        parameter.data = 1.5 * parameter.data
    driver.free(1)
    driver.run()  # one row: another step is bound
    driver._prefilled = {}  # prompts anew
    driver.admit(0, 2)
    driver.admit(1, 3)
    assert driver.run()[3, 0] == expected_tokens(model, prompt)


def test_a_bound_step_keeps_the_storage_it_reads():
    model = tiny()
    decoder = PagedDecoder(model.speech_decoder_model)
    weights, layer = decoder.weights, model.speech_decoder_model.model.decoder.layers[0]
    first = weights.layers[0]
    taken = first.out.weight, first.out.bias, first.input_norm.weight, weights.head.weight
    places, values = [one.data_ptr() for one in taken], [one.clone() for one in taken]
    for parameter in (*layer.parameters(), *model.speech_decoder_model.lm_head.parameters()):
        parameter.data = 2 * parameter.data
    assert decoder.has_moved and [one.data_ptr() for one in taken] == places
    assert all(torch.equal(one, value) for one, value in zip(taken, values, strict=True))
