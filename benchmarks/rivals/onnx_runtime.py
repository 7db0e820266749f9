"""CLVP's decode step in ONNX Runtime on a CPU: in float32, and in its two kinds of 8 bits.

`int8` is its dynamic quantisation: weights by channel, and activations by tensor as they come. Where the instruction
set has no VNNI, weights have 7 bits, as the quantiser advises: with 8, sums of two products overflow 16 bits. `blocks`
has weights in blocks of 32 and activations likewise, in products of 8 bits (`MatMulNBits` at accuracy level 4).
"""

from functools import partial
from pathlib import Path

from benchmarks.rivals.serving import Job, serve

PACKAGES = ("onnxruntime", "onnx", "onnxscript")
# The settings that a sweep tries, by kind; the first are those of a run without a sweep.
_SETTINGS = [
    {"spinning": True, "prepacking": True},
    {"spinning": False, "prepacking": True},
    {"spinning": True, "prepacking": False},
]
SETTINGS = {"float32": _SETTINGS, "int8": _SETTINGS, "blocks": _SETTINGS}


def model_file(kind: str, layers, stored) -> Path:
    """Return the graph of a kind, which is made where it is missing."""
    from benchmarks.rivals.onnx_graph import exported

    return quantised("onnx", kind, layers, exported(layers))


def quantised(name: str, kind: str, layers, exact: Path) -> Path:
    """Return the graph of a kind that is made of an exact one, in a folder of the cache that begins with `name`."""
    from benchmarks.rivals.decoder_process import built
    from benchmarks.rivals.held_down import has_vnni

    if kind == "float32":
        return exact
    name, quantise = f"{name}-{kind}", _blocks if kind == "blocks" else _dynamic
    if kind == "int8" and not has_vnni():
        name, quantise = f"{name}-of-7-bits", partial(_dynamic, reduce_range=True)
    return built(name, layers, lambda folder: quantise(exact, folder / exact.name)) / exact.name


def held_down(isa: str) -> dict[str, str] | None:
    """Return the variables of its process at an instruction set, or None where it cannot be held down to that."""
    from benchmarks.rivals.masked_cpuid import variables

    return variables("onnxruntime") if isa == "avx2" else None


def _dynamic(exact: Path, target: Path, reduce_range: bool = False) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": reduce_range}
    quantize_dynamic(exact, target, use_external_data_format=True, **options)


def _blocks(exact: Path, target: Path) -> None:
    import logging

    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)
    graph = ONNXModel(onnx.load(exact))
    graph.replace_gemm_with_matmul()  # the quantiser leaves a Gemm as it is
    quantizer = MatMulNBitsQuantizer(graph.model, bits=8, block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=True)


def session_of(job: Job):
    """Return ONNX Runtime's session of a job."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(job.settings["spinning"])))
    options.add_session_config_entry("session.disable_prepacking", str(int(not job.settings["prepacking"])))
    return onnxruntime.InferenceSession(job.model, options, providers=["CPUExecutionProvider"])


def load(job: Job):
    """Return the step of `serve`."""
    session = session_of(job)
    feed = {f"{kind} {n}": layer for kind in ("keys", "values") for n, layer in enumerate(job.dense(kind))}

    def step(hidden):
        return session.run(None, feed | {"hidden": hidden})[0]

    return step


if __name__ == "__main__":
    serve(load)
