"""CLVP's decode step in CTranslate2 on a CPU, as a model of its GPT-2: in float32, and with 8 bits.

With 8 bits both weights, by channel, and activations, by row as they come, are rounded. Its generator takes no
embeddings and enters nothing but what it draws, so that it comes to the same step in its own way:

- The stored tokens are a static prompt of words of its own, whose embeddings carry their positions, and all candidates
  have those of the first one. The generator computes its keys and values once, and copies them for each candidate.
- A repeated step is the next one of a generation that waits between its steps, one token further each time. It draws
  the most likely token.
- There is one norm at the end, as in llama.cpp (`llama_cpp.py`), with the same remark on its epsilon.
"""

import hashlib
import os
import threading
from pathlib import Path

import numpy as np

from benchmarks.rivals.serving import Job, serve

PACKAGES = ("ctranslate2",)
_SETTINGS = [{"mkl": False, "packed": False}, {"mkl": True, "packed": False}, {"mkl": True, "packed": True}]
SETTINGS = {"float32": _SETTINGS, "int8": _SETTINGS}
_STEPS = 64
_END = "</s>"


def model_file(kind: str, layers, stored) -> Path:
    """Return the folder of a kind's weights, which is made where it is missing."""
    from benchmarks.rivals.decoder_process import built, require_one_norm

    require_one_norm(layers, "CTranslate2's GPT-2")
    embedded = stored.embedded(layers)[0]
    digest = hashlib.sha256(f"{stored.position}\0".encode() + embedded.numpy().tobytes()).hexdigest()[:8]
    return built(f"ctranslate2-{kind}-{digest}", layers, lambda folder: _convert(kind, layers, stored, folder))


def held_down(isa: str) -> dict[str, str] | None:
    """Return variables of its own choice of kernels, and of the two libraries that it multiplies with."""
    names = ("CT2_FORCE_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    return dict.fromkeys(names, "AVX2") if isa == "avx2" else None


def _convert(kind: str, layers, stored, folder: Path) -> None:
    from ctranslate2.specs import common_spec, transformer_spec

    model, decoder, config = layers.model, layers.decoder, layers.model.config
    embedded = stored.embedded(layers)[0]
    length, width = embedded.shape
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config.num_hidden_layers, config.num_attention_heads, activation=common_spec.Activation.GELUTanh
    )
    of = spec.decoder
    of.scale_embeddings = False
    of.embeddings.weight = np.concatenate([decoder.input_embeds_layer.weight.numpy(), embedded.numpy()])
    table = decoder.position_embeds_layer.weight.numpy()[stored.position :][: _STEPS + 1]
    of.position_encodings.encodings = np.concatenate([np.zeros((length, width), np.float32), table])
    _norm(of.layer_norm, model.final_norm)
    # The words of the static prompt are never drawn.
    of.projection.weight = np.concatenate([model.lm_head.weight.numpy(), np.zeros((length, width), np.float32)])
    of.projection.bias = np.concatenate([model.lm_head.bias.numpy(), np.full(length, -1e4, np.float32)])
    for index, (layer_spec, layer) in enumerate(zip(of.layer, decoder.layers, strict=True)):
        attention, mlp, bias = layer_spec.self_attention, layer_spec.ffn, layers.qkv_bias[index]
        _norm(attention.layer_norm, layer.input_layernorm)
        _linear(attention.linear[0], layers.qkv[index], bias)
        _linear(attention.linear[1], layer.attn.out_proj.weight, layer.attn.out_proj.bias)
        _norm(mlp.layer_norm, layer.post_attention_layernorm)
        _linear(mlp.linear_0, layer.mlp.c_fc.weight.t(), layer.mlp.c_fc.bias)
        _linear(mlp.linear_1, layer.mlp.c_proj.weight.t(), layer.mlp.c_proj.bias)
    names = [str(token) for token in range(config.vocab_size)] + [f"stored {n}" for n in range(length)]
    names[config.eos_token_id] = _END
    spec.register_vocabulary(names)
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "0", _END, "0"
    spec.validate()
    spec.optimize(quantization="int8_float32" if kind == "int8" else None)
    spec.save(str(folder))
    np.save(folder / "tokens.npy", np.array(names[: config.vocab_size]))


def _norm(spec, module) -> None:
    spec.gamma, spec.beta = _copied(module.weight), _copied(module.bias)


def _linear(spec, weight, bias) -> None:
    spec.weight = _copied(weight)
    if bias is not None:
        spec.bias = _copied(bias)


def _copied(tensor) -> np.ndarray:
    """Return an array of its own: CTranslate2 rounds weights in place."""
    return np.array(tensor.numpy(), order="C")


class _Generation:
    """A step from the static prompt; `run` takes the next step of a generation that waits between its steps."""

    def __init__(self, generator, names: list[str], prompt: list[str], candidates: int):
        self.generator, self.names, self.candidates = generator, names, candidates
        self.options = {"static_prompt": prompt, "include_prompt_in_result": False, "end_token": _END}
        self.start, self.thread = None, None
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        self._end()
        self.start = [[self.names[token]] for token in tokens]
        options = self.options | {"max_length": 1, "return_logits_vocab": True}
        results = self.generator.generate_batch(self.start, **options)
        return np.stack([np.array(result.logits[0]).reshape(-1)[: len(self.names)] for result in results])

    def run(self) -> None:
        if self.thread is None:
            self.called, self.ending = 0, False
            self.thread = threading.Thread(target=self._generate, daemon=True)
            self.thread.start()
            self.done.acquire()  # the first step, with the copies of the prompt's keys
        self.go.release()
        self.done.acquire()
        if self.called == self.candidates * _STEPS:
            self._end()

    def _end(self) -> None:
        if self.thread is not None:
            self.ending = True
            self.go.release()
            self.thread.join()
            self.thread, self.go = None, threading.Semaphore(0)

    def _generate(self) -> None:
        options = self.options | {"max_length": _STEPS, "min_length": _STEPS}
        self.generator.generate_batch(self.start, callback=self._arrived, **options)

    def _arrived(self, result) -> bool:
        """Wait behind the last candidate of a step until the next one is asked for; return whether all is at an end."""
        self.called += 1
        if self.called % self.candidates == 0 and not self.ending:
            self.done.release()
            self.go.acquire()
        return self.ending


def load(job: Job):
    """Return the step of `serve`."""
    os.environ["CT2_USE_MKL"] = str(int(job.settings["mkl"]))
    os.environ["CT2_USE_EXPERIMENTAL_PACKED_GEMM"] = str(int(job.settings["packed"]))
    import ctranslate2

    kind = "int8_float32" if "-int8-" in job.model else "float32"
    generator = ctranslate2.Generator(job.model, "cpu", compute_type=kind, intra_threads=job.threads)
    names = np.load(Path(job.model, "tokens.npy")).tolist()
    prompt = [f"stored {n}" for n in range(job.array("embedded").shape[1])]
    return _Generation(generator, names, prompt, job.candidates)


if __name__ == "__main__":
    serve(load, "tokens")
