"""The operators: the package's hot paths, each with a reference, a torch path, and kernels for a GPU or a CPU."""

from clvp_fast.ops.dispatch import backend, explain
from clvp_fast.ops.embedding import embed
from clvp_fast.ops.linear import linear
from clvp_fast.ops.log_mel import log_mel
from clvp_fast.ops.merge_norm import merge_norm
from clvp_fast.ops.mlp import ACTIVATIONS, geglu_mlp, gelu_mlp
from clvp_fast.ops.norm import add_norm, double_layer_norm
from clvp_fast.ops.paged_attention import paged_attention_decode, paged_prefill
from clvp_fast.ops.rotary_attention import rotary_attention, rotary_attention_weights
from clvp_fast.ops.sampling import sample
from clvp_fast.ops.swin import mlp_block, window_block
from clvp_fast.ops.window_attention import window_attention, window_attention_weights

__all__ = [
    "ACTIVATIONS",
    "add_norm",
    "backend",
    "double_layer_norm",
    "embed",
    "explain",
    "geglu_mlp",
    "gelu_mlp",
    "linear",
    "log_mel",
    "merge_norm",
    "mlp_block",
    "paged_attention_decode",
    "paged_prefill",
    "rotary_attention",
    "rotary_attention_weights",
    "sample",
    "window_attention",
    "window_attention_weights",
    "window_block",
]
