"""CLVP's decode step in OpenVINO on a CPU, over the graph of `onnx_graph.py`: in float32, and with weights of 8 bits.

NNCF, OpenVINO's own package for that, rounds the weights by channel. Activations are rounded as they come, in
groups, where the settings say so.
"""

from pathlib import Path

from benchmarks.rivals.serving import Job, serve

PACKAGES = ("openvino", "nncf", "onnx", "onnxscript")
SETTINGS = {
    "float32": [{"group": 0, "pinning": pinning} for pinning in (True, False)],
    "int8": [{"group": group, "pinning": pinning} for group in (128, 32, 0) for pinning in (True, False)],
}


def model_file(kind: str, layers, stored) -> Path:
    """Return the graph of a kind, which is made where it is missing."""
    from benchmarks.rivals.decoder_process import built
    from benchmarks.rivals.onnx_graph import exported

    exact = exported(layers)
    if kind == "float32":
        return exact
    return built(f"openvino-{kind}", layers, lambda folder: _compress(exact, folder)) / "decoder.xml"


def held_down(isa: str) -> dict[str, str] | None:
    """Return the variables of its process at an instruction set, or None where it cannot be held down to that."""
    from benchmarks.rivals.masked_cpuid import variables

    return variables("openvino") if isa == "avx2" else None


def _compress(exact: Path, folder: Path) -> None:
    import nncf
    import openvino

    model = nncf.compress_weights(openvino.Core().read_model(exact), mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(model, folder / "decoder.xml", compress_to_fp16=False)


def load(job: Job):
    """Return the step of `serve`."""
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "f32",  # it would take bfloat16 where the CPU has it
        "INFERENCE_NUM_THREADS": job.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": job.settings["pinning"],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": job.settings["group"],
    }
    request = openvino.Core().compile_model(job.model, "CPU", options).create_infer_request()
    # OpenVINO reads the arrays where they lie, so they must stay.
    stored = {f"{kind} {n}": layer for kind in ("keys", "values") for n, layer in enumerate(job.dense(kind))}
    for name, array in stored.items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

    def step(hidden, stored=stored):
        request.set_tensor("hidden", openvino.Tensor(hidden, shared_memory=True))
        request.infer()
        return request.get_tensor("logits").data

    return step


if __name__ == "__main__":
    serve(load)
