"""The decode step of few candidates as one launch: csrc/cuda/persistent_decode.cuh over weights and pages."""

import ctypes

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from clvp_fast import native
from clvp_fast.engine.decoder import KVPages, PagedDecoder
from clvp_fast.models.clvp.layers import ClvpDecoderMLP
from clvp_fast.models.common.parameters import pack_linears, transpose_storage
from clvp_fast.models.common.plain import activation_name, is_plain
from clvp_fast.ops.dispatch import device_guard

#: The most candidates of a step.
MAX_ROWS = 4
HEAD_DIM = 64
MAX_HIDDEN, MAX_INNER, MAX_VOCAB, MAX_LAYERS = 2048, 8192, 1 << 20, 256
_DTYPES = {torch.float16: native.FLOAT16, torch.bfloat16: native.BFLOAT16}


def unserved(decoder: PagedDecoder, page_dtype: torch.dtype | None = None) -> str | None:
    """Why a persistent step does not serve a decoder with pages of `page_dtype` (None: its own), or None if it does."""
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
    inner = causal_lm.model.decoder.layers[0].mlp.c_fc.nf
    if inner > MAX_INNER or inner % 8:
        return f"it serves an inner size that is a multiple of 8 up to {MAX_INNER}, not {inner}"
    if config.vocab_size > MAX_VOCAB or decoder.num_layers > MAX_LAYERS:
        return f"it serves up to {MAX_VOCAB} tokens of vocabulary and {MAX_LAYERS} layers"
    if (found := _changed(causal_lm)) is not None:
        return found
    names = {activation_name(layer.mlp.act) for layer in causal_lm.model.decoder.layers}
    if not names <= {"gelu_new", "gelu_pytorch_tanh"}:
        return f"its activation is gelu_new, not {config.activation_function}"
    return None


def _changed(causal_lm: nn.Module) -> str | None:
    """A module that would have to be called, because it does more than its class's own computation."""
    stack = causal_lm.model.decoder
    expected = [
        (stack.input_embeds_layer, nn.Embedding),
        (stack.position_embeds_layer, nn.Embedding),
        (stack.layer_norm, nn.LayerNorm),
        (causal_lm.final_norm, nn.LayerNorm),
        (causal_lm.lm_head, nn.Linear),
    ]
    for layer in stack.layers:
        attn, mlp = layer.attn, layer.mlp
        expected += [(norm, nn.LayerNorm) for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        expected += [(linear, nn.Linear) for linear in (attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj)]
        expected += [(mlp, ClvpDecoderMLP), (mlp.c_fc, Conv1D), (mlp.c_proj, Conv1D)]
    for module, kind in expected:
        if not is_plain(module, kind):
            return f"a {kind.__name__} of the decoder is hooked or replaced: merge adapters, and remove hooks, first"
    dtypes = {str(parameter.dtype) for module, _ in expected for parameter in module.parameters()}
    return None if len(dtypes) == 1 else f"it serves weights of one dtype, not {', '.join(sorted(dtypes))}"


def _address(tensor: torch.Tensor | None) -> int | None:
    """Of contiguous numbers that can be read 16 bytes at a time."""
    if tensor is None:
        return None
    if not tensor.is_contiguous() or tensor.data_ptr() % 16:
        raise ValueError("no persistent decode step: a parameter is not contiguous from a multiple of 16 bytes on")
    return tensor.data_ptr()


class PersistentStep:
    """A decoder's step for up to four candidates, over pages of its own dtype; see [`PagedDecoder.step`].

    Parameters are shared; where they lie is noted here, so they may not move afterwards (`addresses` of the decoder).
    One step at a time: all use one workspace.

    Args:
        decoder: on a CUDA device.
        pages: of the decoder.
        max_pages, max_prefix_pages: the widths of the tables that `step` will be given, at most.

    Raises:
        ValueError: the decoder is not one that it serves, with the reason.
        NativeLibraryError: the native library has no CUDA part.
    """

    @torch.no_grad()
    def __init__(self, decoder: PagedDecoder, pages: KVPages, max_pages: int, max_prefix_pages: int):
        reason = unserved(decoder, pages.data.dtype)
        if reason is not None:
            raise ValueError(f"no persistent decode step: {reason}")
        self.decoder, self.pages, self._widths = decoder, pages, (max_pages, max_prefix_pages)
        self._require()
        causal_lm, config = decoder.model, decoder.model.config
        stack = causal_lm.model.decoder
        eps = {norm.eps for layer in stack.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)}
        if len(eps) > 1:
            raise ValueError(f"no persistent decode step: the layers' norms have different eps, {sorted(eps)}")
        table = [self._layer(index, layer) for index, layer in enumerate(stack.layers)]
        self._layers = torch.tensor(table, dtype=torch.int64, device=decoder.device)
        first, final, head = stack.layer_norm, causal_lm.final_norm, causal_lm.lm_head
        page_strides = pages.data.stride()[2:5]
        self._call = native.PersistentDecodeCall(
            layers=self._layers.data_ptr(),
            token_table=_address(stack.input_embeds_layer.weight),
            position_table=_address(stack.position_embeds_layer.weight),
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
            intermediate_size=stack.layers[0].mlp.c_fc.nf,
            vocab_size=config.vocab_size,
            num_positions=stack.position_embeds_layer.num_embeddings,
            page_size=pages.page_size,
            max_pages=max_pages,
            max_prefix_pages=max_prefix_pages,
            contiguous_positions=decoder.contiguous_positions,
            dtype=_DTYPES[decoder.dtype],
            layer_eps=eps.pop(),
            first_eps=first.eps,
            final_eps=final.eps,
            scale=stack.layers[0].attn.scale,
        )
        # A prefix table, so that there is room for its parts; each call names its own.
        self._call.prefix_table = self._layers.data_ptr()
        room = self._workspace_bytes(self._call)
        # The barrier's counter begins at zero, and is left as the next launch wants it.
        self._workspace = torch.zeros(room, dtype=torch.uint8, device=decoder.device)
        self._call.workspace = self._workspace.data_ptr()

    def step(
        self,
        tokens: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        prefix_table: torch.Tensor,
        prefix_lens: torch.Tensor,
        prefix_index: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Arguments, of which the last axis is contiguous, and results as of `PagedDecoder.step`; up to four rows."""
        decoder, call, count = self.decoder, self._call, len(tokens)
        if not 1 <= count <= MAX_ROWS:
            raise ValueError(f"a persistent decode step has 1 to {MAX_ROWS} candidates, not {count}")
        widths = block_table.shape[1], prefix_table.shape[1]
        if widths[0] > self._widths[0] or widths[1] > self._widths[1]:
            raise ValueError(f"tables of {widths} pages a row, and there is room for {self._widths}")
        rows = tokens, seq_lens, block_table, prefix_table, prefix_lens, prefix_index
        if any(row.stride(-1) != 1 for row in rows if row.shape[-1] > 1):
            raise ValueError("tokens, lengths and tables must be contiguous along their last axis")
        hidden = torch.empty(count, decoder.hidden_size, dtype=decoder.dtype, device=decoder.device)
        logits = torch.empty(count, decoder.vocab_size, dtype=decoder.dtype, device=decoder.device)
        call.tokens, call.seq_lens = tokens.data_ptr(), seq_lens.data_ptr()
        call.block_table, call.block_table_stride = block_table.data_ptr(), block_table.stride(0)
        call.prefix_table, call.prefix_table_stride = prefix_table.data_ptr(), prefix_table.stride(0)
        call.prefix_lens, call.prefix_index = prefix_lens.data_ptr(), prefix_index.data_ptr()
        call.max_pages, call.max_prefix_pages = widths
        call.num_candidates, call.num_prefixes = count, len(prefix_table)
        call.hidden, call.logits = hidden.data_ptr(), logits.data_ptr()
        self._launch(call)
        return hidden, logits

    def _layer(self, index: int, layer: nn.Module) -> list[int]:
        """The fields of `native.DecoderLayer`; weights are packed as the layer's own step packs them."""
        attn, mlp = layer.attn, layer.mlp
        if (packed := pack_linears([attn.q_proj, attn.k_proj, attn.v_proj])) is None:
            raise ValueError("no persistent decode step: weights of queries, keys and values cannot lie in a row")
        qkv, qkv_bias = packed
        for conv in (mlp.c_fc, mlp.c_proj):
            transpose_storage(conv)
        tensors = [layer.input_layernorm.weight, layer.input_layernorm.bias, qkv, qkv_bias]
        tensors += [attn.out_proj.weight, attn.out_proj.bias]
        tensors += [layer.post_attention_layernorm.weight, layer.post_attention_layernorm.bias]
        tensors += [mlp.c_fc.weight.t(), mlp.c_fc.bias, mlp.c_proj.weight.t(), mlp.c_proj.bias]
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
