"""A scene of the persistent decode step, and the bounds that its step is held to, wherever it runs."""

import copy
import ctypes
import functools

import torch

import clvp_fast
from clvp_fast import ClvpDecoderConfig, ClvpForCausalLM
from clvp_fast.engine import step as step_module
from clvp_fast.engine.decoder import PagedDecoder
from clvp_fast.engine.persistent import PersistentStep
from clvp_fast.ops.binding import copying
from tests.kit import assert_within_budget
from tests.models.clvp.builders import randomize

DTYPES = [torch.bfloat16, torch.float16]
PAGE_SIZE, GUARD = 16, 4096
# Own tokens stored (-1: inactive), and whose prompt is continued (-1: none).
ROWS = [(5, 1), (140, 0), (-1, 0), (16, -1)]
PREFIXES = (20, 131)


class OnHost(PersistentStep):
    """A step on host memory, by `blocks` blocks in an order drawn from `seed`.

    workspace_bytes: the library's function of a call. A subclass has `_run(call)`, which returns the library's code.
    """

    def __init__(self, workspace_bytes, *made_of, blocks, seed=0):
        self._bytes_of, self.blocks, self.seed = workspace_bytes, blocks, seed
        super().__init__(*made_of)

    def _require(self):
        pass

    def _workspace_bytes(self, call):
        return self._bytes_of(call) + GUARD

    def _launch(self, call):
        # NaN: every element is written, and nothing is left over from the step before.
        self._workspace[256:] = 0xFF
        for result, width in ((call.hidden, call.hidden_size), (call.logits, call.vocab_size)):
            ctypes.memset(result, 0xFF, 2 * call.num_candidates * width)
        code = self._run(call)
        assert code == 0, code
        assert (self._workspace[-GUARD:] == 0xFF).all(), "written behind the workspace"


@torch.no_grad()
def decoder_of(dtype, seed=0, **changes):
    sizes = dict(hidden_size=128, num_attention_heads=2, num_hidden_layers=2, vocab_size=300) | changes
    config = ClvpDecoderConfig(use_attention_bias=True, **sizes)
    return PagedDecoder(randomize(ClvpForCausalLM(config), seed).to(dtype).eval())


def scene_of(decoder, rows=ROWS, prefixes=PREFIXES, seed=0):
    """Make the inputs of a step: pages dealt at random, and NaN in every slot that is not a stored token's."""
    generator = torch.Generator().manual_seed(seed)
    widths = [max(own // PAGE_SIZE for own, _ in rows) + 2, max(prefixes) // PAGE_SIZE + 2]
    counts = len(rows) * widths[0], len(prefixes) * widths[1]
    deal = torch.randperm(sum(counts) + 3, generator=generator).int()
    block_table, prefix_table = deal[: counts[0]].view(-1, widths[0]), deal[counts[0] : -3].view(-1, widths[1])
    pages = decoder.pages(len(deal), PAGE_SIZE)
    values = torch.randn(pages.data.shape, generator=generator).to(decoder.dtype)
    pages.data.fill_(torch.nan)
    for table, lengths in ((block_table, [own for own, _ in rows]), (prefix_table, prefixes)):
        for pages_of_row, length in zip(table.tolist(), lengths, strict=True):
            for place in range(length):
                at = (slice(None), slice(None), pages_of_row[place // PAGE_SIZE], place % PAGE_SIZE)
                pages.data[at] = values[at]
    return dict(
        decoder=decoder,
        pages=pages,
        tokens=torch.randint(decoder.vocab_size, (len(rows),), generator=generator),
        seq_lens=torch.tensor([own for own, _ in rows], dtype=torch.int32),
        block_table=block_table,
        prefix_table=prefix_table,
        prefix_lens=torch.tensor(prefixes, dtype=torch.int32),
        prefix_index=torch.tensor([request for _, request in rows], dtype=torch.int32),
    )


def tensors(scene):
    return [value for name, value in scene.items() if name not in ("decoder", "pages")]


def made_of(scene):
    """Return the arguments of a `PersistentStep` over the scene."""
    return scene["decoder"], scene["pages"], scene["block_table"].shape[1], scene["prefix_table"].shape[1]


def scene_of_width(hidden, inner, rows, dtype=torch.float16, layers=1):
    """Make a scene of layers of these widths, whose vocabulary is no multiple of anything."""
    sizes = dict(hidden_size=hidden, num_attention_heads=hidden // 64, n_inner=inner, num_hidden_layers=layers)
    return scene_of(decoder_of(dtype, vocab_size=301, **sizes), rows)


def with_row(scene, n):
    """Return the scene of one row alone."""
    alone = dict(scene)
    for name in ("tokens", "seq_lens", "block_table", "prefix_index"):
        alone[name] = scene[name][n : n + 1]
    return alone


def with_pages(scene, dtype=None):
    """Return the scene over pages of its own, perhaps in another dtype."""
    decoder = scene["decoder"] if dtype is None else PagedDecoder(copy.deepcopy(scene["decoder"].model).to(dtype))
    other = scene | {"decoder": decoder, "pages": decoder.pages(scene["pages"].data.shape[2], PAGE_SIZE)}
    other["pages"].data.copy_(scene["pages"].data)
    return other


@torch.inference_mode()
def expected(scene):
    with clvp_fast.backend("reference"):
        return scene["decoder"].step(*tensors(scene), scene["pages"])


def hold_to_the_decoder(run, scene):
    """Hold `run(scene)` to the decoder: hidden states and logits, and new keys and values in the scene's pages."""
    exact, plain, ours = with_pages(scene, torch.float64), with_pages(scene), with_pages(scene)
    active = scene["seq_lens"] >= 0
    reference, baseline, got = expected(exact), expected(plain), run(ours)
    for name, mine, right, other in zip(("hidden", "logits"), got, reference, baseline, strict=False):
        assert_within_budget(mine[active], right[active], other[active], name)
    data, right, other = (one["pages"].data for one in (ours, exact, plain))
    untouched = other.isnan()
    assert torch.equal(data.isnan(), untouched)
    stored_before = with_pages(scene)["pages"].data
    new = stored_before.isnan() & ~untouched
    stores = active & (scene["seq_lens"] < scene["block_table"].shape[1] * PAGE_SIZE)
    assert new.sum() == stores.sum() * data[:, :, 0, 0].numel()
    assert_within_budget(data[new], right[new], other[new], "new keys and values")
    kept = ~stored_before.isnan()
    assert torch.equal(data[kept], stored_before[kept])


def same_bits(scene, found, right):
    """Tell whether two steps gave the active rows the same hidden states and logits."""
    active = scene["seq_lens"] >= 0
    return all(torch.equal(mine[active], other[active]) for mine, other in zip(found, right, strict=True))


def hold_rows_to_themselves(run, scene, together):
    """Hold each row alone, by `run(scene, seed)`, to its bits among the others."""
    for n, length in enumerate(scene["seq_lens"].tolist()):
        if length >= 0:
            alone = run(with_row(with_pages(scene), n), n)
            assert all(torch.equal(mine[0], other[n]) for mine, other in zip(alone, together, strict=True)), n


def full_table(stored, monkeypatch, prefix=96):
    """Give a scene whose first row has no place for its new token, which the decoder's own step omits too.

    Both tables are full. With a prefix of 96 there are 128 keys: one more would be a second part of every head, for
    which there is no room; with fewer, it would be among the others.
    """
    scene = scene_of(decoder_of(torch.bfloat16), [(32, 0), (5, 0)], [prefix])
    for name, width in (("block_table", 2), ("prefix_table", prefix // PAGE_SIZE)):
        scene[name] = scene[name][:, :width].contiguous()
    scene["seq_lens"][0] = stored

    def left_out(q, k_new, v_new, *, k_pages, v_pages, block_table, seq_lens, **tables):
        """Row 0 stores and attends to the last token of its table once more, in the place of the new one."""
        last, news = (block_table[0, -1], PAGE_SIZE - 1), (k_new.clone(), v_new.clone())
        for new, pages in zip(news, (k_pages, v_pages), strict=True):
            new[0] = pages[last]
        lengths = torch.cat((seq_lens.new_tensor([31]), seq_lens[1:]))
        return clvp_fast.ops.paged_attention_decode(q, *news, k_pages, v_pages, block_table, lengths, **tables)

    def bind(out, room, *args, **tables):
        return copying(functools.partial(left_out, *args, **tables), out)

    monkeypatch.setattr(step_module, "bind_paged_attention_decode", bind)
    return scene
