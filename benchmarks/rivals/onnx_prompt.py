"""CLVP's pass over a prompt and its start token in ONNX Runtime on a CPU, in the kinds of `onnx_runtime.py`."""

from pathlib import Path

from benchmarks.rivals import onnx_runtime
from benchmarks.rivals.serving import Job, serve

PACKAGES, SETTINGS, held_down = onnx_runtime.PACKAGES, onnx_runtime.SETTINGS, onnx_runtime.held_down


def model_file(kind: str, layers, stored) -> Path:
    """Return the graph of a kind, which is made where it is missing."""
    from benchmarks.rivals.onnx_graph import exported_prompt

    return onnx_runtime.quantised("onnx-prompt", kind, layers, exported_prompt(layers))


def load(job: Job):
    """Return the pass of `serve`: embeddings `[tokens, hidden_size]` to logits `[1, vocab_size]`."""
    session = onnx_runtime.session_of(job)

    def run(hidden):
        return session.run(None, {"hidden": hidden})[0]

    return run


if __name__ == "__main__":
    serve(load)
