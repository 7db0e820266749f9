"""CLVP's decode step in llama.cpp on a CPU, through `llama-cpp-python`, as a model of its architecture gpt2.

Where that architecture differs from CLVP, the same step comes of it so:

- Tokens arrive as embeddings with their positions, and the model's own table of positions is zero: CLVP's tokens count
  from the end of the prompt, and its prompt carries positions of its own.
- There is one norm at the end, where CLVP has two. The first is left out, which changes nothing but the epsilon that it
  adds to the variance, if it scales and shifts all channels alike, as in a model of random weights. With other weights
  this rival is absent.
- The head has no bias. It is added where the logits are read.

That epsilon is seen in tiny models alone, where it puts logits in float32 off by some thousandths of the largest.

Kinds are types of the weights; keys and values are in float32 with weights in float32, else in float16.
"""

import ctypes
from pathlib import Path

import numpy as np

from benchmarks.rivals.serving import Job, serve

PACKAGES = ("llama_cpp", "gguf")
# flash: attention in one pass, which rounds to float16 and puts logits in float32 off by a hundredth of the largest.
# unified: sequences share the cells of the prompt, and each token's query meets the cells of all of them.
_SETTINGS = [
    {"unified": unified, "flash": flash, "repack": True} for flash in (False, True) for unified in (False, True)
]
SETTINGS = {
    "float32": [one for one in _SETTINGS if not one["flash"]],
    "float16": _SETTINGS,
    "q8_0": _SETTINGS + [one | {"repack": False} for one in _SETTINGS],
}
_POSITIONS = 1024


def model_file(kind: str, layers, stored) -> Path:
    """Return the weights of a kind as GGUF, which are made where they are missing."""
    from benchmarks.rivals.decoder_process import built, require_one_norm

    require_one_norm(layers, "llama.cpp's gpt2")
    return built(f"llama-{kind}", layers, lambda folder: _write(kind, layers, folder)) / "decoder.gguf"


def held_down(isa: str) -> dict[str, str] | None:
    """Return the variables of its process at an instruction set, or None where it cannot be held down to that."""
    from benchmarks.rivals.llama_avx2 import variables

    return variables() if isa == "avx2" else None


def _write(kind: str, layers, folder: Path) -> None:
    import gguf

    model, config = layers.model, layers.model.config
    np.save(folder / "head_bias.npy", model.lm_head.bias.numpy())
    writer = gguf.GGUFWriter(folder / "decoder.gguf", "gpt2")
    writer.add_context_length(_POSITIONS)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(layers.decoder.layers[0].mlp.c_fc.weight.shape[1])
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    stored_as = {name: getattr(gguf.GGMLQuantizationType, name.upper()) for name in ("f32", "f16", "q8_0")}
    of_matrices = stored_as[{"float32": "f32", "float16": "f16"}.get(kind, kind)]
    for name, tensor in _tensors(layers):
        dtype = of_matrices if tensor.ndim == 2 and name != "position_embd.weight" else stored_as["f32"]
        writer.add_tensor(name, gguf.quantize(tensor.contiguous().numpy(), dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(layers):
    """Yield names of llama.cpp's and tensors, of matrices `[out, in]`."""
    width = layers.model.config.hidden_size
    head = layers.model.lm_head.weight
    yield "token_embd.weight", layers.decoder.input_embeds_layer.weight
    yield "position_embd.weight", head.new_zeros(_POSITIONS, width)
    yield from _affine("output_norm", layers.model.final_norm)
    yield "output.weight", head
    for index, layer in enumerate(layers.decoder.layers):
        place, bias = f"blk.{index}.", layers.qkv_bias[index]
        yield from _affine(place + "attn_norm", layer.input_layernorm)
        yield place + "attn_qkv.weight", layers.qkv[index]
        yield place + "attn_qkv.bias", head.new_zeros(3 * width) if bias is None else bias
        out = layer.attn.out_proj
        yield place + "attn_output.weight", out.weight
        yield place + "attn_output.bias", head.new_zeros(width) if out.bias is None else out.bias
        yield from _affine(place + "ffn_norm", layer.post_attention_layernorm)
        for name, conv in (("ffn_up", layer.mlp.c_fc), ("ffn_down", layer.mlp.c_proj)):
            yield f"{place}{name}.weight", conv.weight.t()
            yield f"{place}{name}.bias", conv.bias


def _affine(name: str, module):
    yield f"{name}.weight", module.weight
    yield f"{name}.bias", module.bias


class _Sequences:
    """A context of llama.cpp with the candidates as its sequences, which hold what is stored."""

    def __init__(self, job: Job):
        import llama_cpp

        self.library, self.job = llama_cpp, job
        embedded = job.array("embedded")
        self.distinct, self.length, self.width = embedded.shape
        self.log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.log, None)
        of_model = llama_cpp.llama_model_default_params()
        of_model.use_extra_bufts = job.settings["repack"]
        self.model = llama_cpp.llama_model_load_from_file(job.model.encode(), of_model)
        self.context = llama_cpp.llama_init_from_model(self.model, self._options())
        if not self.context:
            raise RuntimeError("llama.cpp makes no context with these settings")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(max(self.length, job.candidates), self.width, 1)
        self._fill(embedded)

    def _options(self):
        job, shared = self.job, self.job.prompt_len
        options = self.library.llama_context_default_params()
        unified = options.kv_unified = job.settings["unified"]
        own = self.length - shared + 1
        cells = shared + own * (job.candidates + 1) if unified else self.length + 1
        options.n_seq_max = job.candidates + unified  # one more to copy from
        options.n_ctx = -(-cells // 256) * 256 * (1 if unified else job.candidates)
        options.n_batch = options.n_ubatch = max(self.length, job.candidates)
        options.n_threads = options.n_threads_batch = job.threads
        options.flash_attn_type = int(job.settings["flash"])
        exact = Path(job.model).parent.name.startswith("llama-float32")
        options.type_k = options.type_v = self.library.GGML_TYPE_F32 if exact else self.library.GGML_TYPE_F16
        return options

    def _fill(self, embedded: np.ndarray) -> None:
        """Enter what the distinct candidates have stored, and copy it to the others."""
        library, shared, own = self.library, self.job.prompt_len, []
        unified, spare = self.job.settings["unified"], self.job.candidates
        for row in range(min(self.distinct, self.job.candidates)):
            begin = shared if unified and row else 0
            if begin:
                library.llama_memory_seq_cp(self.memory, 0, row, 0, shared)
            self.enter(embedded[row, begin:], range(begin, self.length), [row] * (self.length - begin))
            kept = row
            if unified:  # all but the prompt, whose cells are shared
                library.llama_memory_seq_cp(self.memory, row, kept := spare, shared, -1)
            own.append(self._state(kept))
            if unified:
                library.llama_memory_seq_rm(self.memory, spare, -1, -1)
        for row in range(self.distinct, self.job.candidates):
            state = own[row % self.distinct]
            if not library.llama_state_seq_set_data(self.context, state, len(state), row):
                raise RuntimeError("llama.cpp has no room for the candidates")
            if unified:
                library.llama_memory_seq_cp(self.memory, 0, row, 0, shared)

    def _state(self, row: int):
        size = self.library.llama_state_seq_get_size(self.context, row)
        state = (ctypes.c_uint8 * size)()
        self.library.llama_state_seq_get_data(self.context, state, size, row)
        return state

    def enter(self, embedded: np.ndarray, places, rows) -> None:
        """Enter embeddings `[n, hidden_size]` at places of sequences; each has logits behind it."""
        batch = self.batch
        batch.n_tokens = count = len(embedded)
        np.ctypeslib.as_array(batch.embd, (count, self.width))[:] = embedded
        for n, (place, row) in enumerate(zip(places, rows, strict=True)):
            batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0], batch.logits[n] = place, 1, row, 1
        if status := self.library.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode ends with {status}")

    def logits(self, count: int, vocab_size: int) -> np.ndarray:
        return np.ctypeslib.as_array(self.library.llama_get_logits(self.context), (count, vocab_size))

    def forget(self, rows, place: int) -> None:
        for row in rows:
            self.library.llama_memory_seq_rm(self.memory, row, place, -1)


def load(job: Job):
    """Return the step of `serve`."""
    sequences, rows = _Sequences(job), range(job.candidates)
    bias = np.load(Path(job.model).parent / "head_bias.npy")

    def step(hidden):
        sequences.enter(hidden, [sequences.length] * len(rows), rows)
        logits = sequences.logits(len(rows), len(bias)) + bias
        sequences.forget(rows, sequences.length)
        return logits

    return step


if __name__ == "__main__":
    serve(load)
