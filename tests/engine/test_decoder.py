"""The paged decoder, held against `GenerationMixin` over the same weights: greedy tokens, hidden states, logits."""

import pytest
import torch

from clvp_fast import ops
from clvp_fast.engine.decoder import PagedDecoder
from clvp_fast.ops.dispatch import OPERATORS
from clvp_fast.ops.paged_attention import FLOAT8
from tests.kit import operators
from tests.models.clvp.builders import SHAPES, START, STOP, clips, pair, texts

PAGE_SIZE, STEPS = 16, 36
GREEDY = dict(do_sample=False, max_new_tokens=STEPS, eos_token_id=None, pad_token_id=STOP)


@torch.inference_mode(False)
def tiny(shape: str = "heads64", **changes):
    """Make the composite model of a shape in float32."""
    return pair(shape=shape, **changes)[1]


@torch.no_grad()
def prompts(model, lengths=(4, 23, 9)) -> list[torch.Tensor]:
    """Make a prompt `[tokens, hidden_size]` for each length of a text: pages filled in part, and more than one."""
    return [
        model.conditioning_encoder.prompt(clips(1, seed=length), texts(1, length, seed=length))[0][0]
        for length in lengths
    ]


class Loop:
    """Greedy decoding of candidates by hand: pages dealt at random, unused slots and pages of nobody poisoned.

    `owners[n]` is the prompt that candidate n continues.
    """

    def __init__(self, model, prompt_list, owners, *, steps=STEPS, dtype=None, seed=0, residual_dtype=None):
        self.decoder = PagedDecoder(model, residual_dtype)
        count, pages_each = len(owners), -(-steps // PAGE_SIZE)
        self.num_pages = sum(-(-len(p) // PAGE_SIZE) for p in prompt_list) + count * pages_each + 3
        self.pages = self.decoder.pages(self.num_pages, PAGE_SIZE, dtype)
        self.pages.data.fill_(torch.nan)
        free = iter(torch.randperm(self.num_pages, generator=torch.Generator().manual_seed(seed)).tolist())
        nobody = next(free)
        self.prefix_lens = torch.tensor([len(p) for p in prompt_list], dtype=torch.int32)
        self.prefix_table = self._table([-(-len(p) // PAGE_SIZE) for p in prompt_list], free, nobody)
        self.block_table = self._table([pages_each] * count, free, nobody)
        self.prefix_index = torch.tensor(owners, dtype=torch.int32)
        self.seq_lens = torch.zeros(count, dtype=torch.int32)
        self.tokens = torch.full((count,), START)
        bounds = torch.tensor([0, *self.prefix_lens.cumsum(0)], dtype=torch.int32)
        self.decoder.prefill(torch.cat(prompt_list), bounds, self.pages, self.prefix_table)

    @staticmethod
    def _table(counts, free, nobody):
        table = torch.full((len(counts), max(counts) + 1), nobody, dtype=torch.int32)
        for row, count in enumerate(counts):
            table[row, :count] = torch.tensor([next(free) for _ in range(count)], dtype=torch.int32)
        return table

    def step(self):
        """Run one step, and return hidden states and logits; the largest logit is the next token."""
        tables = self.block_table, self.prefix_table, self.prefix_lens, self.prefix_index, self.pages
        hidden, logits = self.decoder.step(self.tokens, self.seq_lens, *tables)
        self.tokens = logits.argmax(-1)
        self.seq_lens = torch.where(self.seq_lens < 0, -1, self.seq_lens + 1).int()
        return hidden, logits

    def run(self, steps=STEPS):
        """Return the tokens `[candidates, steps]`."""
        return torch.stack([self.tokens for _ in range(steps) if self.step()], 1)


@torch.inference_mode()
def greedy(model, prompt_list, owners, **options):
    return Loop(model, prompt_list, owners, **options).run(options.get("steps", STEPS))


@torch.no_grad()
def expected_tokens(model, prompt, steps=STEPS):
    """Return the tokens `[steps]` that `GenerationMixin` draws after one prompt."""
    settings = GREEDY | dict(max_new_tokens=steps, use_engine=False)
    return model.speech_decoder_model.generate(conditioning_embeds=prompt[None], **settings)[0, 1:]


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_equals_generation_mixin(shape, contiguous):
    model = tiny(shape)
    model.speech_decoder_model.config.contiguous_positions = contiguous
    prompt_list = prompts(model)
    owners = [1, 0, 2, 1, 0]
    found = greedy(model.speech_decoder_model, prompt_list, owners)
    expected = [expected_tokens(model, prompt) for prompt in prompt_list]
    assert found.tolist() == [expected[owner].tolist() for owner in owners]
    assert len(torch.stack(expected).unique()) > 8 and expected[0].tolist() != expected[1].tolist()


def test_positions_are_the_configured_ones():
    """Were the option without effect, the tests above would tell nothing of it."""
    model = tiny()
    prompt_list = prompts(model)
    stock = greedy(model.speech_decoder_model, prompt_list, [0, 1, 2])
    model.speech_decoder_model.config.contiguous_positions = True
    assert greedy(model.speech_decoder_model, prompt_list, [0, 1, 2]).tolist() != stock.tolist()


def test_composite_generate_draws_the_same():
    model = tiny()
    with torch.no_grad():
        prompt_list = list(model.conditioning_encoder.prompt(clips(3), texts(3))[0])
        settings = GREEDY | dict(return_dict_in_generate=True, use_engine=False)
        expected = model.generate(texts(3), clips(3), **settings).sequences[:, 1:]
    assert greedy(model.speech_decoder_model, prompt_list, [0, 1, 2]).tolist() == expected.tolist()


def test_hidden_states_and_logits():
    model = tiny()
    decoder, (prompt, *_) = model.speech_decoder_model, prompts(model, (20,))
    settings = GREEDY | dict(return_dict_in_generate=True, output_logits=True)
    with torch.inference_mode():
        expected = decoder.generate(conditioning_embeds=prompt[None], **settings)
        loop = Loop(decoder, [prompt], [0])
        hidden, logits = zip(*(loop.step() for _ in range(STEPS)), strict=True)
        states = decoder.model(
            inputs_embeds=torch.cat([prompt[None], _embedded(decoder, expected.sequences[:, :-1])], 1),
            embeds_have_positions=True,
        ).last_hidden_state[:, len(prompt) :]
        states = decoder.final_norm(states)
    torch.testing.assert_close(torch.cat(logits), torch.cat(expected.logits), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(hidden), states[0], atol=2e-5, rtol=1e-5)
    assert states.std() > 0.3


def _embedded(decoder, tokens):
    places = torch.arange(tokens.shape[1])
    tables = decoder.model.decoder.input_embeds_layer, decoder.model.decoder.position_embeds_layer
    return tables[0](tokens) + tables[1](places + (places > 0))


@torch.inference_mode()
def test_inactive_rows_touch_nothing_and_change_nobody():
    model = tiny()
    prompt_list = prompts(model)
    whole = Loop(model.speech_decoder_model, prompt_list, [0, 1, 2, 1])
    whole.seq_lens[1] = -1
    owned = whole.block_table[1].long()
    found = whole.run()
    expected = greedy(model.speech_decoder_model, prompt_list, [0, 2, 1])
    assert found[[0, 2, 3]].tolist() == expected.tolist()
    assert whole.pages.data[:, :, owned[:-1]].isnan().all()


@torch.inference_mode()
def test_parameters_are_shared():
    model = tiny().speech_decoder_model
    before = sum(p.numel() for p in model.parameters())
    decoder = PagedDecoder(model)
    assert decoder.model is model and sum(p.numel() for p in model.parameters()) == before
    of_model = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    layer = decoder.weights.layers[1]
    read = [layer.projections[0].weight, layer.out.weight, layer.mlp_in.weight, layer.post_norm.bias]
    assert all(tensor.untyped_storage().data_ptr() in of_model for tensor in read)
    settled = decoder.weights.sources()
    greedy(model, prompts(tiny()), [0])
    assert decoder.weights.sources() == settled and not decoder.has_moved


def test_kernels_in_the_interpreter():
    model = tiny("heads32", num_hidden_layers=1, activation_function="gelu_new")
    prompt_list = prompts(model, (3, 15))
    expected = [expected_tokens(model, prompt, 3).tolist() for prompt in prompt_list]
    with ops.backend("kernel"):
        found = greedy(model.speech_decoder_model, prompt_list, [1, 0, 1], steps=3)
    assert found.tolist() == [expected[1], expected[0], expected[1]]


def logits_along(model, prompt_list, tokens, **options):
    """Return logits `[steps, prompts, vocab_size]` of one candidate a prompt that gets `tokens` `[prompts, steps]`."""
    loop = Loop(model, prompt_list, range(len(prompt_list)), **options)
    logits = []
    for drawn in tokens.T:
        hidden, scores = loop.step()
        assert hidden.dtype == scores.dtype == loop.decoder.dtype
        logits.append(scores.double())
        loop.tokens = drawn
    return torch.stack(logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_a_half_type_keeps_its_residual_in_float32(dtype):
    """Expect only the error of half operands; with a residual of the half type it grows with the depth."""
    composite = tiny(num_hidden_layers=12)
    prompt_list = prompts(composite)
    model = composite.speech_decoder_model.to(dtype)
    prompt_list = [prompt.to(dtype) for prompt in prompt_list]
    tokens = greedy(model, prompt_list, [0, 1, 2], steps=20)
    found, rounded = (logits_along(model, prompt_list, tokens, residual_dtype=residual) for residual in (None, dtype))
    exact = logits_along(model.double(), [prompt.double() for prompt in prompt_list], tokens)
    error, rounded_error = ((logits - exact).std() / exact.std() for logits in (found, rounded))
    assert error < 0.75 * rounded_error
    assert error < 8 * torch.finfo(dtype).eps


def test_the_residual_is_float32_in_every_layer_of_prefill_and_step(monkeypatch):
    model = tiny().speech_decoder_model.to(torch.bfloat16)
    seen = []

    def around(run):
        def watched(x, w_in, b_in, w_out, b_out, residual, *others):
            out = run(x, w_in, b_in, w_out, b_out, residual, *others)
            seen.append((x.dtype, residual.dtype, out.dtype))
            return out

        return watched

    operators.change(monkeypatch, OPERATORS["gelu_mlp"], "torch", around_run=around)
    greedy(model, [prompt.bfloat16() for prompt in prompts(tiny())], [0, 1, 2], steps=2)
    assert seen == [(torch.bfloat16, torch.float32, torch.float32)] * (1 + 2 * 2)


@torch.inference_mode()
def test_half_types_through_the_kernels_in_the_interpreter():
    composite = tiny("heads32", num_hidden_layers=1, activation_function="gelu_new")
    prompt_list = [prompt.half() for prompt in prompts(composite, (3, 15))]
    model, tokens = composite.speech_decoder_model.half(), torch.tensor([[5, 7], [9, 5]])
    with ops.backend("kernel"):
        found = logits_along(model, prompt_list, tokens)
    exact = logits_along(model.double(), [prompt.double() for prompt in prompt_list], tokens)
    assert (found - exact).std() < 2 * torch.finfo(torch.float16).eps * exact.std()


@torch.inference_mode()
def test_float8_pages_cost_little_and_clamp_nothing():
    model = tiny()
    loops = [Loop(model.speech_decoder_model, prompts(model), [0, 1, 2], dtype=dtype) for dtype in (None, FLOAT8)]
    for _ in range(20):
        (_, exact), (_, rounded) = (loop.step() for loop in loops)
        error = (rounded - exact).std() / exact.std()
        assert 1e-4 < error < 0.1
        loops[1].tokens = loops[0].tokens
    stored = loops[1].pages.data.float()
    largest = stored[~stored.isnan()].abs().max()
    assert 10 < largest < torch.finfo(FLOAT8).max
