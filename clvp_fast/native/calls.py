"""The prototypes of `csrc/clvp_fast.h` for ctypes: its numbers, structures and functions. It imports only ctypes."""

import ctypes
import hashlib
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p

#: `enum clvp_fast_dtype` of csrc/clvp_fast.h.
FLOAT32, FLOAT64, INT16, FLOAT16, BFLOAT16, INT8 = range(6)
_NUMBERS = dict(float32=FLOAT32, float64=FLOAT64, int16=INT16, float16=FLOAT16, bfloat16=BFLOAT16, int8=INT8)
#: `enum clvp_fast_activation`.
NO_ACTIVATION, GELU_TANH, GELU = range(3)
#: The functions of `enum clvp_fast_operation`, by number.
OPERATIONS = ("clvp_fast_paged_decode_cpu", "clvp_fast_linear_cpu", "clvp_fast_norm_cpu")


class LogMelCall(ctypes.Structure):
    """`struct clvp_fast_log_mel` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("samples", c_void_p),
        ("lengths", c_void_p),
        ("window", c_void_p),
        ("twiddles", c_void_p),
        ("mel_filters", c_void_p),
        ("bands", c_void_p),
        ("mel_norms", c_void_p),
        ("features", c_void_p),
        ("clip_maxima", c_void_p),
        ("batch", c_int64),
        ("time", c_int64),
        ("samples_stride", c_int64),
        ("hop_length", c_int64),
        ("frames", c_int64),
        ("n_fft", c_int32),
        ("num_mels", c_int32),
        ("samples_dtype", c_int32),
        ("compute_dtype", c_int32),
        ("features_dtype", c_int32),
        ("decibels", c_int32),
        ("log_floor", c_double),
        ("top_db", c_double),
    )


class PagedDecodeCall(ctypes.Structure):
    """`struct clvp_fast_paged_decode` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("q", c_void_p),
        ("k_new", c_void_p),
        ("v_new", c_void_p),
        ("k_pages", c_void_p),
        ("v_pages", c_void_p),
        ("out", c_void_p),
        ("block_table", c_void_p),
        ("seq_lens", c_void_p),
        ("prefix_table", c_void_p),
        ("prefix_lens", c_void_p),
        ("prefix_index", c_void_p),
        ("q_strides", c_int64 * 2),
        ("k_new_strides", c_int64 * 2),
        ("v_new_strides", c_int64 * 2),
        ("page_strides", c_int64 * 3),
        ("block_table_stride", c_int64),
        ("prefix_table_stride", c_int64),
        ("num_candidates", c_int64),
        ("num_pages", c_int64),
        ("num_prefixes", c_int64),
        ("num_heads", c_int32),
        ("head_dim", c_int32),
        ("page_size", c_int32),
        ("max_pages", c_int32),
        ("max_prefix_pages", c_int32),
        ("dtype", c_int32),
        ("scale", c_float),
    )


class PagedPrefillCall(ctypes.Structure):
    """`struct clvp_fast_paged_prefill` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_pages", c_void_p),
        ("v_pages", c_void_p),
        ("out", c_void_p),
        ("cu_seqlens", c_void_p),
        ("block_table", c_void_p),
        ("q_strides", c_int64 * 2),
        ("k_strides", c_int64 * 2),
        ("v_strides", c_int64 * 2),
        ("page_strides", c_int64 * 3),
        ("block_table_stride", c_int64),
        ("rows", c_int64),
        ("num_sequences", c_int64),
        ("num_pages", c_int64),
        ("num_heads", c_int32),
        ("head_dim", c_int32),
        ("page_size", c_int32),
        ("max_pages", c_int32),
        ("dtype", c_int32),
        ("scale", c_float),
    )


class RotaryAttentionCall(ctypes.Structure):
    """`struct clvp_fast_rotary_attention` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("out", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("key_mask", c_void_p),
        ("cu_seqlens", c_void_p),
        ("q_strides", c_int64 * 3),
        ("k_strides", c_int64 * 3),
        ("v_strides", c_int64 * 3),
        ("angle_stride", c_int64),
        ("batch", c_int64),
        ("q_len", c_int64),
        ("k_len", c_int64),
        ("query_offset", c_int64),
        ("item_queries", c_int64),
        ("num_heads", c_int32),
        ("head_dim", c_int32),
        ("rotary_dim", c_int32),
        ("causal", c_int32),
        ("dtype", c_int32),
        ("scale", c_float),
    )


class LinearCall(ctypes.Structure):
    """`struct clvp_fast_linear` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("x", c_void_p),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("residual", c_void_p),
        ("out", c_void_p),
        ("panels", c_void_p),
        ("x_stride", c_int64),
        ("weight_stride", c_int64),
        ("rows", c_int64),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("dtype", c_int32),
        ("weight_dtype", c_int32),
        ("activation", c_int32),
        ("int8_x", c_int32),
    )


class NormCall(ctypes.Structure):
    """`struct clvp_fast_norm` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("x", c_void_p),
        ("residual", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("sum", c_void_p),
        ("out", c_void_p),
        ("x_stride", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
        ("dtype", c_int32),
        ("sum_dtype", c_int32),
        ("affine_dtype", c_int32),
        ("out_dtype", c_int32),
        ("rms", c_int32),
        ("eps", c_float),
    )


class MlpCall(ctypes.Structure):
    """`struct clvp_fast_mlp` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("x", c_void_p),
        ("w_in", c_void_p),
        ("b_in", c_void_p),
        ("w_out", c_void_p),
        ("b_out", c_void_p),
        ("residual", c_void_p),
        ("out", c_void_p),
        ("x_stride", c_int64),
        ("w_in_stride", c_int64),
        ("w_out_stride", c_int64),
        ("rows", c_int64),
        ("in_features", c_int64),
        ("inner_features", c_int64),
        ("out_features", c_int64),
        ("dtype", c_int32),
        ("out_dtype", c_int32),
        ("activation", c_int32),
        ("item_rows", c_int32),
        ("gated", c_int32),
        ("norm_weight", c_void_p),
        ("norm_bias", c_void_p),
        ("eps", c_float),
    )


class WindowAttentionCall(ctypes.Structure):
    """`struct clvp_fast_window_attention` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("q_strides", c_int64 * 4),
        ("k_strides", c_int64 * 4),
        ("v_strides", c_int64 * 4),
        ("bias_strides", c_int64 * 3),
        ("batch", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("num_heads", c_int32),
        ("head_dim", c_int32),
        ("window", c_int32),
        ("shift", c_int32),
        ("dtype", c_int32),
        ("bias_dtype", c_int32),
        ("scale", c_float),
    )


class WindowBlockCall(ctypes.Structure):
    """`struct clvp_fast_window_block` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("x", c_void_p),
        ("norm_weight", c_void_p),
        ("norm_bias", c_void_p),
        ("w_qkv", c_void_p),
        ("b_qkv", c_void_p),
        ("bias", c_void_p),
        ("w_out", c_void_p),
        ("b_out", c_void_p),
        ("out", c_void_p),
        ("w_qkv_stride", c_int64),
        ("w_out_stride", c_int64),
        ("bias_strides", c_int64 * 3),
        ("batch", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("num_heads", c_int32),
        ("head_dim", c_int32),
        ("window", c_int32),
        ("shift", c_int32),
        ("dtype", c_int32),
        ("eps", c_float),
    )


class AnyCall(ctypes.Structure):
    """`struct clvp_fast_call` of csrc/clvp_fast.h, with the address of its call."""

    _fields_ = (("operation", c_int32), ("call", c_void_p))


class SampleCall(ctypes.Structure):
    """`struct clvp_fast_sample` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("logits", c_void_p),
        ("seen", c_void_p),
        ("done", c_void_p),
        ("sampled", c_void_p),
        ("temperature", c_void_p),
        ("top_p", c_void_p),
        ("typical_p", c_void_p),
        ("min_p", c_void_p),
        ("repetition_penalty", c_void_p),
        ("top_k", c_void_p),
        ("seed", c_void_p),
        ("candidate", c_void_p),
        ("step", c_void_p),
        ("tokens", c_void_p),
        ("logits_stride", c_int64),
        ("seen_stride", c_int64),
        ("rows", c_int64),
        ("vocab_size", c_int64),
        ("pad_token", c_int64),
        ("dtype", c_int32),
        ("do_sample", c_int32),
    )


class DecoderLayer(ctypes.Structure):
    """`struct clvp_fast_decoder_layer` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            "input_norm_weight",
            "input_norm_bias",
            "qkv_weight",
            "qkv_bias",
            "out_weight",
            "out_bias",
            "post_norm_weight",
            "post_norm_bias",
            "mlp_in_weight",
            "mlp_in_bias",
            "mlp_out_weight",
            "mlp_out_bias",
            "k_pages",
            "v_pages",
        )
    )


class PersistentDecodeCall(ctypes.Structure):
    """`struct clvp_fast_persistent_decode` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("layers", c_void_p),
        ("token_table", c_void_p),
        ("position_table", c_void_p),
        ("first_norm_weight", c_void_p),
        ("first_norm_bias", c_void_p),
        ("final_norm_weight", c_void_p),
        ("final_norm_bias", c_void_p),
        ("head_weight", c_void_p),
        ("head_bias", c_void_p),
        ("tokens", c_void_p),
        ("seq_lens", c_void_p),
        ("block_table", c_void_p),
        ("prefix_table", c_void_p),
        ("prefix_lens", c_void_p),
        ("prefix_index", c_void_p),
        ("hidden", c_void_p),
        ("logits", c_void_p),
        ("workspace", c_void_p),
        ("page_strides", c_int64 * 3),
        ("block_table_stride", c_int64),
        ("prefix_table_stride", c_int64),
        ("num_pages", c_int64),
        ("num_prefixes", c_int64),
        ("num_candidates", c_int32),
        ("num_layers", c_int32),
        ("hidden_size", c_int32),
        ("intermediate_size", c_int32),
        ("vocab_size", c_int32),
        ("num_positions", c_int32),
        ("page_size", c_int32),
        ("max_pages", c_int32),
        ("max_prefix_pages", c_int32),
        ("contiguous_positions", c_int32),
        ("dtype", c_int32),
        ("layer_eps", c_float),
        ("first_eps", c_float),
        ("final_eps", c_float),
        ("scale", c_float),
    )


def number_of(dtype: object) -> int:
    """Return the number of a `torch.dtype`, which must be one that the library has."""
    return _NUMBERS[str(dtype).removeprefix("torch.")]


def _on_cpu(call: type[ctypes.Structure]) -> tuple:
    return c_int, POINTER(call), c_int32, c_char_p


def _on_cuda(call: type[ctypes.Structure]) -> tuple:
    return c_int, POINTER(call), c_void_p


#: For each part of the library: the functions by name, with the types of their results and arguments.
FUNCTIONS = {
    "cpu": {
        "clvp_fast_log_mel_cpu": _on_cpu(LogMelCall),
        "clvp_fast_paged_decode_cpu": _on_cpu(PagedDecodeCall),
        "clvp_fast_paged_prefill_cpu": _on_cpu(PagedPrefillCall),
        "clvp_fast_rotary_attention_cpu": _on_cpu(RotaryAttentionCall),
        "clvp_fast_linear_cpu": _on_cpu(LinearCall),
        "clvp_fast_norm_cpu": _on_cpu(NormCall),
        "clvp_fast_calls_cpu": (c_int, POINTER(AnyCall), c_int64, c_int32, c_char_p),
        "clvp_fast_mlp_cpu": _on_cpu(MlpCall),
        "clvp_fast_window_attention_cpu": _on_cpu(WindowAttentionCall),
        "clvp_fast_window_block_cpu": _on_cpu(WindowBlockCall),
        "clvp_fast_sample_cpu": _on_cpu(SampleCall),
        "clvp_fast_cpu_isa": (c_char_p,),
        "clvp_fast_has_isa": (c_int, c_char_p),
        "clvp_fast_choose_isa": (c_int, c_char_p),
        "clvp_fast_error": (c_char_p, c_int),
    },
    "cuda": {
        "clvp_fast_log_mel_cuda": _on_cuda(LogMelCall),
        "clvp_fast_persistent_decode_cuda": _on_cuda(PersistentDecodeCall),
        "clvp_fast_persistent_decode_workspace": (c_int64, POINTER(PersistentDecodeCall)),
        "clvp_fast_cuda_missing": (c_int, c_char_p, c_int32),
        "clvp_fast_log_mel_cuda_missing": (c_int, c_int32, c_char_p, c_int32),
        "clvp_fast_cuda_error": (c_char_p, c_int),
    },
}


def set_prototypes(library: ctypes.CDLL, part: str) -> None:
    """Set the types of a part's functions. Raises `AttributeError` for one that the library lacks."""
    for name, (result, *arguments) in FUNCTIONS[part].items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def _version() -> str:
    """Return 16 hexadecimal digits that change with any structure or function above."""
    structures = [kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, ctypes.Structure)]
    described: list[tuple[str, list]] = [
        (kind.__name__, [(field[0], field[1].__name__) for field in kind._fields_]) for kind in structures
    ]
    for functions in FUNCTIONS.values():
        described += [(name, [type_.__name__ for type_ in types]) for name, types in functions.items()]
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]


#: The library must answer this to `clvp_fast_version`: it is compiled into it.
VERSION = _version()
