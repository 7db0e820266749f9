"""The rivals are honest: what they compute is right, and what is not there is named."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import LogitsProcessorList, TopKLogitsWarper

from benchmarks import paged_attention, sample, tiers
from benchmarks.models import inputs, stock_model
from benchmarks.providers import Absent
from benchmarks.rivals import flashinfer_decode, sdpa, torch_generator
from benchmarks.rivals.torch_generator import TorchGenerator


def _rows_of(indptr, indices, last, page_size):
    """Return pages and length of each row of FlashInfer's tables, as its documentation defines them."""
    assert indptr.dtype == indices.dtype == last.dtype == torch.int32 and int(indptr[-1]) == len(indices)
    for begin, end, filled in zip(indptr[:-1].tolist(), indptr[1:].tolist(), last.tolist(), strict=True):
        assert 1 <= filled <= page_size and begin < end
        yield indices[begin:end].long(), (end - begin - 1) * page_size + filled


class _Decode:
    """`BatchDecodeWithPagedKVCacheWrapper` by the formula."""

    def __init__(self, workspace, kv_layout):
        assert workspace.dtype == torch.uint8 and kv_layout == "NHD"

    def plan(self, indptr, indices, last, qo_heads, kv_heads, head_dim, page_size, *, q_data_type, kv_data_type):
        assert (qo_heads, kv_heads) == (16, 16) and q_data_type == kv_data_type
        self.rows = list(_rows_of(indptr, indices, last, page_size))

    def run(self, q, cache):
        return torch.stack([_attended(q[n], cache, *row) for n, row in enumerate(self.rows)])


class _Cascade:
    """`MultiLevelCascadeAttentionWrapper`: each query attends to its row of every level."""

    def __init__(self, num_levels, workspace, kv_layout):
        assert num_levels == 2 and kv_layout == "NHD"

    def plan(
        self, queries, indptr, indices, last, qo_heads, kv_heads, head_dim, page_size, *, q_data_type, kv_data_type
    ):
        self.queries = queries
        self.levels = [list(_rows_of(*level, page_size)) for level in zip(indptr, indices, last, strict=True)]

    def run(self, q, cache):
        found = []
        for n in range(len(q)):
            rows = [level[int((ends[1:] <= n).sum())] for ends, level in zip(self.queries, self.levels, strict=True)]
            found.append(_attended(q[n], cache, *zip(*rows, strict=True)))
        return torch.stack(found)


def _attended(q, cache, pages, lengths):
    """Attend from one query to the first tokens of one or several rows of pages: `[heads, head_dim]`."""
    several = [(pages, lengths)] if isinstance(lengths, int) else zip(pages, lengths, strict=True)
    parts = [[x[row].flatten(0, 1)[:length] for x in cache] for row, length in several]
    k, v = (torch.cat(part).transpose(0, 1) for part in zip(*parts, strict=True))
    return F.scaled_dot_product_attention(q[:, None], k, v)[:, 0]


def _append(k, v, rows, places, cache, indices, indptr, last, kv_layout):
    for n, (row, place) in enumerate(zip(rows.tolist(), places.tolist(), strict=True)):
        page = indices[int(indptr[row]) + place // cache[0].shape[1]].long()
        for pages, new in zip(cache, (k, v), strict=True):
            pages[page, place % pages.shape[1]] = new[n]


@pytest.fixture
def flashinfer(monkeypatch):
    module = SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=_Decode,
        MultiLevelCascadeAttentionWrapper=_Cascade,
        append_paged_kv_cache=_append,
    )
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer_decode, "WORKSPACE_BYTES", 16)


@pytest.mark.parametrize("plan", [flashinfer_decode.paged, flashinfer_decode.cascade])
@pytest.mark.parametrize("shape", [(5, 1, 20, 0, 33), (6, 2, 32, 15, 48), (3, 3, 1, 16, 31)])
def test_flashinfer_is_given_our_pages(plan, shape, flashinfer):
    arguments = paged_attention.make_inputs(3, *shape, torch.float32, "cpu")
    expected = paged_attention.reference(*(x.clone() for x in arguments))
    call = plan(*arguments)
    torch.testing.assert_close(call().double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(call().double(), expected, atol=1e-5, rtol=1e-5)  # the next call writes the same place


@pytest.mark.parametrize("plan", [flashinfer_decode.paged, flashinfer_decode.cascade])
def test_without_flashinfer_its_name_says_so(plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    arguments = paged_attention.make_inputs(0, 2, 1, 20, 1, 3, torch.float32, "cpu")
    with pytest.raises(ImportError, match="flashinfer"):
        plan(*arguments)


def test_each_backend_of_sdpa_is_asked_for_alone(monkeypatch):
    enabled = []

    def run(x):
        names = ("math", "mem_efficient", "flash", "cudnn")
        enabled.append([name for name in names if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()])
        return x

    ways = sdpa.one_by_one(run, "bare")
    assert list(ways) == ["SDPA math, bare", "SDPA efficient, bare", "SDPA flash, bare", "SDPA cudnn, bare"]
    x = torch.ones(1)
    for name in ("math", "flash"):
        assert ways[f"SDPA {name}, bare"].plan(x)() is x
    assert enabled == [["math"], ["flash"]]
    for name in ("efficient", "cudnn"):
        with pytest.raises(Absent, match="for a GPU"):
            ways[f"SDPA {name}, bare"].plan(x)
    monkeypatch.setattr(sdpa, "_OF_A_CPU", tuple(sdpa.BACKENDS.values()))
    ways["SDPA efficient, bare"].plan(x)()
    assert enabled[-1] == ["mem_efficient"]


@pytest.fixture
def run_again(monkeypatch):
    """Stand for a CUDA graph: a capture runs twice and a replay once; count the captures."""
    captures = []

    def captured(run):
        captures.append(run)
        run()
        run()
        return run

    monkeypatch.setattr(torch_generator, "captured", captured)
    monkeypatch.setattr(torch_generator, "STRETCH", 7)
    return captures


@pytest.mark.parametrize("capture", [False, True])
def test_the_torch_generator_decodes_as_transformers_does(capture, run_again):
    prompt, tokens, expected = tiers.compared_logits("cpu", True, 9)
    generator = TorchGenerator(stock_model("cpu", smoke=True), 3, 12, capture=capture)
    for _ in range(2):  # a second call finds what the first has left
        generator.prefill(prompt)
        found = [generator.logits.clone()]
        for place, token in enumerate(tokens[1:].tolist(), 1):
            generator.token.fill_(token)
            generator.step(place)
            found.append(generator.logits.clone())
        for candidate in range(3):
            assert tiers.furthest_logit(torch.stack(found)[:, candidate], expected) < 1e-5
    assert len(run_again) == 2 * capture  # of 14 tokens, the prompt being of 12, and of 21


@pytest.mark.parametrize("top_k", [0, 3, 50])
def test_the_torch_generator_draws_what_may_be_drawn(top_k):
    """Against transformers' processors: what they forbid is never drawn, and what is likely comes as often."""
    generator = TorchGenerator(stock_model("cpu", smoke=True), 4000, 5, top_k=top_k)
    torch.manual_seed(0)
    logits = 3 * torch.randn(1, 40).repeat(4000, 1)
    generator.logits, generator.seen = logits, torch.zeros(4000, 40, dtype=torch.bool)
    before = torch.tensor([3, 7, int(logits[0].argmax())])
    generator.seen[:, before] = True
    seen = generator.seen.clone()
    generator._draw()
    drawn = generator.token
    penalty, *others = sample.chain()
    chain = LogitsProcessorList([penalty, TopKLogitsWarper(top_k or 40), *others])  # temperature keeps the order
    chances = chain(before[None], logits[:1]).softmax(-1)[0]
    assert not (chances[drawn] == 0).any() and 2 <= (chances > 0).sum() < 30
    often = torch.bincount(drawn, minlength=40) / 4000
    assert (often - chances).abs().max() < 4 * (0.25 / 4000) ** 0.5
    assert torch.equal(generator.codes[:, 0], drawn)
    assert torch.equal(generator.seen, seen.scatter(1, drawn[:, None], True))


def test_the_torch_generator_scores_what_it_drew():
    stock = stock_model("cpu", smoke=True)
    ids, features = inputs(9, "cpu")
    codes, scores = TorchGenerator(stock, 3, 12)(ids, features)
    assert codes.shape == (3, 12) and len({tuple(row) for row in codes.tolist()}) == 3
    with torch.no_grad():
        speech = stock.fix_speech_decoder_output(F.pad(codes, (1, 0), value=8192))
        text = F.normalize(stock.text_encoder_model(input_ids=ids).embeds, dim=-1)
        alone = [F.normalize(stock.speech_encoder_model(input_ids=row[None]).embeds, dim=-1)[0] for row in speech]
    torch.testing.assert_close(scores, torch.stack(alone) @ text[0], atol=1e-5, rtol=1e-5)
