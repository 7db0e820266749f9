"""The decode step of few candidates as one launch: csrc/cuda/persistent_decode.cuh over weights and pages."""

import ctypes
from functools import partial

import torch

from clvp_fast import native
from clvp_fast.engine.decoder import KVPages, PagedDecoder
from clvp_fast.engine.step import BoundStep
from clvp_fast.engine.weights import DecoderWeights, LayerWeights
from clvp_fast.ops.binding import Scratch
from clvp_fast.ops.dispatch import device_guard

#: The most candidates of a step.
MAX_ROWS = 4
HEAD_DIM = 64
MAX_HIDDEN, MAX_INNER, MAX_VOCAB, MAX_LAYERS = 2048, 8192, 1 << 20, 256
_DTYPES = torch.float16, torch.bfloat16


def unserved(decoder: PagedDecoder, page_dtype: torch.dtype | None = None) -> str | None:
    """Return why a persistent step cannot serve a decoder with pages of `page_dtype` (None: its own); None: it can."""
    config, causal_lm = decoder.model.config, decoder.model
    if decoder.dtype not in _DTYPES:
        return f"it serves float16 and bfloat16, not {decoder.dtype}"
    if page_dtype not in (None, decoder.dtype):
        return f"it serves pages of the dtype of the weights, {decoder.dtype}, not of {page_dtype}"
    if decoder.residual_dtype != torch.float32:
        return f"its residual is float32, not {decoder.residual_dtype}"
    if decoder.weight_dtype is not None:
        return f"it serves the weights of the model, not copies in {decoder.weight_dtype}"
    if decoder.head_dim != HEAD_DIM or decoder.hidden_size > MAX_HIDDEN:
        return (
            f"it serves heads of {HEAD_DIM} channels and hidden_size up to {MAX_HIDDEN}, not heads of "
            f"{decoder.head_dim} and {decoder.hidden_size}"
        )
    inner = len(decoder.weights.layers[0].mlp_in.weight)
    if inner > MAX_INNER or inner % 8:
        return f"it serves an inner size that is a multiple of 8 up to {MAX_INNER}, not {inner}"
    if config.vocab_size > MAX_VOCAB or decoder.num_layers > MAX_LAYERS:
        return f"it serves up to {MAX_VOCAB} tokens of vocabulary and {MAX_LAYERS} layers"
    weights = DecoderWeights.take(causal_lm)
    if isinstance(weights, str):
        return weights
    dtypes = {str(parameter.dtype) for parameter in weights.parameters()}
    if len(dtypes) > 1:
        return f"it serves weights of one dtype, not {', '.join(sorted(dtypes))}"
    if any(len(layer.projections) > 1 for layer in weights.layers):
        return "it serves weights of queries, keys and values that lie in a row"
    if not {layer.activation for layer in weights.layers} <= {"gelu_new", "gelu_pytorch_tanh"}:
        return f"its activation is gelu_new, not {config.activation_function}"
    return None


def _address(tensor: torch.Tensor | None) -> int | None:
    """Return the address of contiguous numbers that can be read 16 bytes at a time."""
    if tensor is None:
        return None
    if not tensor.is_contiguous() or tensor.data_ptr() % 16:
        raise ValueError("no persistent decode step: a parameter is not contiguous from a multiple of 16 bytes on")
    return tensor.data_ptr()


class PersistentStep:
    """A decoder's step for up to four candidates, over pages of its own dtype; see [`PagedDecoder.step`].

    Parameters are shared. Their addresses are read here, so they may not move afterwards (`DecoderWeights.sources`).
    Steps share one workspace, so they must run one at a time.

    Args:
        decoder: on a CUDA device.
        pages: the decoder's.
        max_pages, max_prefix_pages: the greatest widths of the tables that `step` will get.

    Raises:
        ValueError: a decoder that it does not serve, with the reason.
        NativeLibraryError: the native library has no CUDA part.
    """

    @torch.no_grad()
    def __init__(self, decoder: PagedDecoder, pages: KVPages, max_pages: int, max_prefix_pages: int):
        reason = unserved(decoder, pages.data.dtype)
        if reason is not None:
            raise ValueError(f"no persistent decode step: {reason}")
        self.decoder, self.pages, self._widths = decoder, pages, (max_pages, max_prefix_pages)
        self._require()
        decoder.follow()
        weights, layers = decoder.weights, decoder.weights.layers
        eps = {norm.eps for layer in layers for norm in (layer.input_norm, layer.post_norm)}
        if len(eps) > 1:
            raise ValueError(f"no persistent decode step: the layers' norms have different eps, {sorted(eps)}")
        table = [self._layer(index, layer) for index, layer in enumerate(layers)]
        self._layers = torch.tensor(table, dtype=torch.int64, device=decoder.device)
        first, final, head = weights.last_norm, weights.final_norm, weights.head
        page_strides = pages.data.stride()[2:5]
        self._call = native.PersistentDecodeCall(
            layers=self._layers.data_ptr(),
            token_table=_address(weights.token_table),
            position_table=_address(weights.position_table),
            first_norm_weight=_address(first.weight),
            first_norm_bias=_address(first.bias),
            final_norm_weight=_address(final.weight),
            final_norm_bias=_address(final.bias),
            head_weight=_address(head.weight),
            head_bias=_address(head.bias),
            page_strides=(ctypes.c_int64 * 3)(*page_strides),
            num_pages=pages.data.shape[2],
            num_candidates=MAX_ROWS,
            num_layers=decoder.num_layers,
            hidden_size=decoder.hidden_size,
            intermediate_size=len(layers[0].mlp_in.weight),
            vocab_size=decoder.vocab_size,
            num_positions=len(weights.position_table),
            page_size=pages.page_size,
            max_pages=max_pages,
            max_prefix_pages=max_prefix_pages,
            contiguous_positions=decoder.contiguous_positions,
            dtype=native.number_of(decoder.dtype),
            layer_eps=eps.pop(),
            first_eps=first.eps,
            final_eps=final.eps,
            scale=decoder.head_dim**-0.5,
        )
        # A prefix table is named here only to reserve room for its parts; each call names its own.
        self._call.prefix_table = self._layers.data_ptr()
        size = self._workspace_bytes(self._call)
        # The barrier's counter begins at zero, and each launch leaves it ready for the next.
        self._workspace = torch.zeros(size, dtype=torch.uint8, device=decoder.device)
        self._call.workspace = self._workspace.data_ptr()

    def step(self, *entered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a step on tensors in the order of `ENTERED`; results are as of `PagedDecoder.step`.

        The tensors have up to four rows, and their last axis is contiguous.
        """
        return self.bind(*entered, scratch=Scratch(len(entered[0]), self.decoder.device)).run()

    def bind(
        self,
        tokens: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        prefix_table: torch.Tensor,
        prefix_lens: torch.Tensor,
        prefix_index: torch.Tensor,
        scratch: Scratch,
    ) -> BoundStep:
        """Return the one call that `step` makes on these tensors, as `PagedDecoder.bind` does."""
        decoder, count = self.decoder, len(tokens)
        if not 1 <= count <= MAX_ROWS:
            raise ValueError(f"a persistent decode step has 1 to {MAX_ROWS} candidates, not {count}")
        widths = block_table.shape[1], prefix_table.shape[1]
        if widths[0] > self._widths[0] or widths[1] > self._widths[1]:
            raise ValueError(f"tables of {widths} pages a row, and there is room for {self._widths}")
        rows = tokens, seq_lens, block_table, prefix_table, prefix_lens, prefix_index
        if any(row.stride(-1) != 1 for row in rows if row.shape[-1] > 1):
            raise ValueError("tokens, lengths and tables must be contiguous along their last axis")
        hidden = scratch("normed", count, decoder.hidden_size, dtype=decoder.dtype)
        logits = scratch("logits", count, decoder.vocab_size, dtype=decoder.dtype)
        call = native.PersistentDecodeCall.from_buffer_copy(self._call)
        call.tokens, call.seq_lens = tokens.data_ptr(), seq_lens.data_ptr()
        call.block_table, call.block_table_stride = block_table.data_ptr(), block_table.stride(0)
        call.prefix_table, call.prefix_table_stride = prefix_table.data_ptr(), prefix_table.stride(0)
        call.prefix_lens, call.prefix_index = prefix_lens.data_ptr(), prefix_index.data_ptr()
        call.max_pages, call.max_prefix_pages = widths
        call.num_candidates, call.num_prefixes = count, len(prefix_table)
        call.hidden, call.logits = hidden.data_ptr(), logits.data_ptr()
        return BoundStep((partial(self._launch, call),), hidden, logits)

    def _layer(self, index: int, layer: LayerWeights) -> list[int]:
        """Return the fields of `native.DecoderLayer`."""
        norms = layer.input_norm, layer.post_norm
        products = layer.projections[0], layer.out, layer.mlp_in, layer.mlp_out
        before, behind = ([norm.weight, norm.bias] for norm in norms)
        qkv, out, first, second = ([product.weight, product.bias] for product in products)
        tensors = [*before, *qkv, *out, *behind, *first, *second]
        pages = self.pages.data[index].unbind(0)
        return [_address(tensor) or 0 for tensor in (*tensors, *pages)]

    def _require(self) -> None:
        device = self.decoder.device
        if device.type != "cuda":
            raise ValueError(f"no persistent decode step: it runs on a CUDA device, and the decoder is on {device}")
        if absent := native.missing("cuda"):
            raise native.NativeLibraryError(absent)

    def _workspace_bytes(self, call: native.PersistentDecodeCall) -> int:
        return native.library("cuda").clvp_fast_persistent_decode_workspace(call)

    def _launch(self, call: native.PersistentDecodeCall) -> None:
        with device_guard(self.decoder.device):
            stream = torch.cuda.current_stream().cuda_stream
            native.check(native.library("cuda").clvp_fast_persistent_decode_cuda(call, stream))
