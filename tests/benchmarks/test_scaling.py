"""The model on paper counts what the modules do, and docs/scaling.md says what rows and model say."""

import re
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import clvp_fast
from benchmarks import cluster_document, plots, report, scaling, scaling_document, scaling_model as model, tiers
from benchmarks.harness import all_rows
from benchmarks.models import our_model
from benchmarks.run import WORKLOADS
from benchmarks.scaling_model import Call, Device, Sizes, Stage, Types
from clvp_fast import CandidateRequest, ClvpConfig, ClvpModelForConditionalGeneration, SamplingParams
from clvp_fast.cli.parser import build_parser
from clvp_fast.engine.decoder import PagedDecoder
from clvp_fast.models.common import plain

# Of the models of a smoke test.
TINY = Sizes(2, 128, 512, 8194, 2, 80, 2, 128, 256)
FP32 = Types(4, 4)


def matrices(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


@pytest.mark.parametrize("tiny", [False, True], ids=["full size", "tiny"])
def test_the_sizes_are_those_of_the_modules(tiny):
    sizes = TINY if tiny else model.CLVP
    if tiny:
        whole = our_model("cpu", smoke=True)
    else:
        with torch.device("meta"):
            whole = ClvpModelForConditionalGeneration(ClvpConfig())
    decoder = whole.speech_decoder_model
    assert matrices(decoder.model.decoder.layers) + matrices(decoder.lm_head) == sizes.step_weights
    assert matrices(whole.speech_encoder_model.layers) == sizes.encoder_weights
    assert matrices(whole.text_encoder_model.layers) == sizes.encoder_weights
    voice = whole.conditioning_encoder
    weights = matrices(voice.mel_conv) + matrices(voice.mel_attn_blocks)
    assert model.voice(3, Types(2, 1), sizes).bytes == 3 * 2 * weights


def operations(call) -> int:
    with pytest.MonkeyPatch.context() as patch:
        # The counter hooks all modules to learn their names, and hooks switch the fused paths off.
        patch.setattr(plain, "_has_any_global_hook", lambda: False)
        with clvp_fast.backend("reference"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
            call()
    return counter.get_total_flops()


def test_operations_are_those_that_the_modules_do():
    whole = our_model("cpu", smoke=True)
    features, codes = torch.randn(1, 80, model.FRAMES), torch.randint(0, 100, (3, 17))
    counted = operations(lambda: whole.conditioning_encoder.encode_voice(features))
    assert counted == pytest.approx(model.voice(1, FP32, TINY).flop, rel=0.002)  # and of the last block one query
    counted = operations(lambda: whole.speech_encoder_model(input_ids=codes))
    assert counted == model.encoder(3, 17, FP32, TINY).flop + 2 * 3 * 128 * 128  # and the projection

    decoder = PagedDecoder(whole.speech_decoder_model)
    pages = decoder.pages(7, 16)
    numbers = [
        torch.tensor(x, dtype=torch.int32) for x in ([0, 33], [[0, 1, 2]], [31, 31], [[3, 4], [5, 6]], [33], [0, 0])
    ]
    bounds, prefix_table, seq_lens, block_table, prefix_lens, prefix_index = numbers
    counted = operations(lambda: decoder.prefill(torch.randn(33, 128), bounds, pages, prefix_table))
    causal, square = 2 * 33 * 34 * 128, 4 * 33 * 33 * 128  # of the one layer, and of the last the reference's alone
    assert counted - 2 * square == model.prefill(33, FP32, TINY).flop - causal
    tables = block_table, prefix_table, prefix_lens, prefix_index
    arrivals = torch.zeros(2, 2, dtype=torch.int32)
    counted = operations(lambda: decoder.step(torch.tensor([5, 6]), seq_lens, *tables, pages, arrivals))
    step = model.products(2, FP32, TINY), model.attention(2, 1, 33, 31, FP32, TINY)
    assert counted == sum(stage.flop for stage in step)


def test_bytes_are_those_of_weights_pages_and_logits():
    weights = 4 * (2 * 12 * 128**2 + 8194 * 128)
    assert model.products(3, FP32, TINY).bytes == weights + 4 * 2 * 3 * 8194
    token = PagedDecoder(our_model("cpu", smoke=True).speech_decoder_model).pages(1, 16).data.nbytes / 16
    assert model.attention(3, 2, 33, 9, FP32, TINY).bytes == token * (3 * 10 + 2 * 33)
    assert model.attention(3, 2, 33, 9, Types(4, 1), TINY).bytes == token / 4 * (3 * 10 + 2 * 33)
    in_layers = 12 * 128**2 + 3 * 128**2
    assert model.prefill(33, Types(4, 1), TINY).bytes == 4 * in_layers + token / 4 * 33
    assert model.encoder(3, 17, Types(2, 1), TINY).bytes == 2 * TINY.encoder_weights


def test_candidates_beyond_the_slots_wait():
    call = Call(candidates=4, requests=5, new_tokens=3, slots=16)
    assert list(call.batches()) == [(16, 4), (4, 1)] and call.steps == 6 and call.tokens == 60
    assert list(Call(candidates=6, requests=1, slots=4).batches()) == [(4, 1), (2, 1)]
    stages = model.stages(call, FP32, TINY)
    assert [stage.part for stage in stages] == ["voice"] + ["decode"] * (5 + 2 * 6) + ["rank"] * 10
    steps = stages[6:18]
    expected = []
    for rows, prompts in ((16, 4), (4, 1)):
        expected += [model.products(rows, FP32, TINY)] * 3
        expected += [model.attention(rows, prompts, 63, stored, FP32, TINY) for stored in range(3)]
    assert steps == expected


def test_a_stage_takes_the_longer_of_its_two_limits():
    device = Device("d", bytes_per_s=10.0, flop_per_s=100.0, share=0.5)
    assert device.seconds(Stage("", 40, 100)) == 8.0 and device.seconds(Stage("", 10, 900)) == 18.0
    assert device.limit(Stage("", 40, 100)) == 4.0
    row = {"device": {"name": "n", "copy_bytes_per_s": 1.0, "matmul_flop_per_s": {"float32": 2.0, "bfloat16": 3.0}}}
    assert Device.of(row | {"dtype": "bfloat16"}) == Device("n", 1.0, 3.0)


CALLS = [Call(candidates=count) for count in (1, 4, 16, 64)]


def timed(device: Device) -> list[tuple[Call, float]]:
    return [(call, model.seconds(call, device, FP32)) for call in CALLS]


def test_share_and_overhead_are_found_again():
    device = Device("d", 2e10, 1e11, share=0.7, step_seconds=0.005)
    found = model.fit(replace(device, share=0.1), timed(device), FP32)
    assert found.share == pytest.approx(0.7) and found.step_seconds == pytest.approx(0.005)
    parts = model.parts(CALLS[-1], device, FP32)
    bare = model.parts(CALLS[-1], replace(device, share=1, step_seconds=0), FP32)
    assert parts["voice"] == pytest.approx(bare["voice"] / 0.7) and parts["rank"] == pytest.approx(bare["rank"] / 0.7)
    assert parts["decode"] == pytest.approx(bare["decode"] / 0.7 + 64 * 0.005)


def test_no_step_takes_less_than_nothing_beside():
    device = Device("d", 2e10, 1e11, share=0.7, step_seconds=-0.005)
    found = model.fit(device, timed(device), FP32)
    assert found.step_seconds == 0 and 0.7 < found.share < 0.9
    with pytest.raises(ValueError, match="at least two measured calls, got 1"):
        model.fit(device, timed(device)[:1], FP32)


def test_every_call_is_measured_once_and_each_sweep_has_its_values():
    for device in scaling.SWEEPS:
        shapes = [task.shape for task in scaling.tasks(device)]
        assert len({str(shape) for shape in shapes}) == len(shapes)
        found = model.sweeps({"shape": shape} for shape in shapes)
        values = {name: [row["shape"][name] for row in rows] for name, rows in found.items()}
        assert values == {name: sorted(of_sweep) for name, of_sweep in scaling.SWEEPS[device].items()}
    assert asdict(Call()) in [task.shape for task in scaling.tasks("cpu")]


def test_a_call_is_measured_with_its_parts_and_has_all_its_tokens(monkeypatch):
    found = all_rows(scaling, "cpu", smoke=True)
    assert [(row["shape"]["candidates"], row["shape"]["requests"]) for row in found] == [(6, 1), (2, 3)]
    for row in found:
        assert row["tokens"] == 6 * 3 and row["dtype"] == "float32" and 0 < row["error"] < 1e-4
        assert list(row["parts"]) == ["voice", "decode", "rank"] and min(row["parts"].values()) > 0
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"]["median"], rel=0.2)
    engine = tiers.engine_of(tiers.TIERS["cpu"][0], "cpu", True, 4, 3, 2)
    requests = scaling.requests_of(replace(scaling.SMOKE, requests=2, clips=3), 22050)
    assert len(requests) == 2 and all(len(request.audio) == 3 for request in requests)
    assert not torch.equal(requests[0].input_ids, requests[1].input_ids)
    voices = []
    encode = type(engine.voices)._encode
    monkeypatch.setattr(type(engine.voices), "_encode", lambda *rest: voices.append(1) or encode(*rest))
    for _ in range(2):
        scaling.whole_call(engine, SamplingParams(2, max_new_tokens=3, seed=0), requests)
    assert len(voices) == 2 * (3 + 1)  # the clips of both runs, and the mark of the checkpoint
    with pytest.raises(RuntimeError, match="input_ids must lie from 0 to"):
        bad = CandidateRequest(input_ids=[3, 999], audio=requests[0].audio, sampling_rate=22050)
        scaling.whole_call(engine, SamplingParams(2, max_new_tokens=3, seed=0), [requests[0], bad])
    (result,) = engine.generate(requests[0], SamplingParams(2, max_new_tokens=3, seed=0))
    stopping = SamplingParams(2, max_new_tokens=3, seed=0, stop_token=int(result.codes[0, 2]))
    with pytest.raises(RuntimeError, match="candidates should have 3 tokens"):
        scaling.whole_call(engine, stopping, requests[:1])


DEVICE = Device("AMD EPYC", 2e10, 1e11, share=0.8, step_seconds=0.002)


def row(call: Call, device: Device = DEVICE, off: float = 0.0, dtype: str = "float32"):
    median = model.seconds(call, device, scaling_document.TYPES[dtype]) * (1 + off)
    limits = {"copy_bytes_per_s": device.bytes_per_s, "matmul_flop_per_s": {dtype: device.flop_per_s}}
    return {
        "workload": "scaling",
        "shape": asdict(call),
        "provider": f"clvp_fast engine, {dtype}",
        "seconds": {"q20": 0.9 * median, "median": median, "q80": 1.1 * median, "repeats": 3},
        "parts": {"voice": 0.1, "decode": 0.2, "rank": 0.3},
        "tokens": call.tokens,
        "dtype": dtype,
        "device": {"name": device.name, "threads": 2} | limits,
        "versions": {"torch": "1", "transformers": "2"},
        "commit": "abc",
    }


def cpu_rows() -> list[dict]:
    found = [row(call) for call in CALLS]
    found += [row(Call(text_tokens=300), off=0.25), row(Call(text_tokens=10)), row(Call(clips=4), off=-0.2)]
    return found


def test_the_document_shows_each_sweep_beside_the_model():
    text = scaling_document.document(cpu_rows(), {"AMD EPYC": "![figure](x.svg)"})
    assert text.startswith("## AMD EPYC\n\n![figure](x.svg)\n\n### Over candidates\n\nText tokens 60, clips of ")
    sections = dict(re.findall(r"### Over ([a-z ]+)\n\n(.*?)(?=\n##|\Z)", text, flags=re.DOTALL))
    assert list(sections) == list(model.SWEEPS.values())
    assert re.findall(r"^\| (\d+) .* \| ([+-]\d+%) \|$", sections["candidates"], flags=re.MULTILINE) == [
        (str(count), "+0%") for count in (1, 4, 16, 64)
    ]
    median = model.seconds(CALLS[0], DEVICE, FP32)
    spread = f"{median:.2f} s ({0.9 * median:.2f} s to {1.1 * median:.2f} s)"
    assert f"| 1 | {spread} | 100.0 ms, 200.0 ms, 300.0 ms | " in sections["candidates"]
    assert re.findall(r"([+-]\d+%) \|", sections["text tokens"]) == ["+0%", "+0%", "-20%"]
    assert re.findall(r"([+-]\d+%) \|", sections["clips of the voice"]) == ["+0%", "+25%"]
    assert sections["requests at once"].startswith("Not measured.")
    assert "takes 20.0 GB/s and 100 GFLOP/s in float32 from the run" in text
    assert (
        "80% of both is reached, and that a step takes 2.00 ms beside. From the 3 other calls it is off by 15%" in text
    )
    assert "by 25% at most." in text and "## NVIDIA GPU\n\nNot measured: none was at hand." in text
    assert "an assumption that no GPU has confirmed, 60% of both limits" in text
    assert text.count("Not measured") == 3 and "### On a cluster\n\nNot measured." in text


def test_too_few_calls_are_told_and_a_refused_one_is_left_out():
    (only,) = cpu_rows()[:1]
    text = scaling_document.document([only, only | {"shape": asdict(CALLS[1]), "seconds": None}], {})
    assert "at commit abc. Too few calls for the model." in text and "the model is off by" not in text
    text = scaling_document.document([], {})
    assert text.startswith("## CPU\n\nNot measured.\n\n## NVIDIA GPU\n\nNot measured") and "the host" not in text
    assert "- **The host's scheduling** is not measured." in text


def test_a_measured_h200_takes_the_place_of_the_assumption():
    h200 = Device("NVIDIA H200", 4e12, 8e14, share=0.5, step_seconds=0.001)
    calls = [Call(candidates=count, new_tokens=250, slots=512) for count in (1, 64, 256)]
    other = [row(call, replace(h200, name="NVIDIA A100"), dtype="bfloat16") for call in calls]
    text = scaling_document.document([*cpu_rows(), *other], {})
    assert "an assumption that no GPU has confirmed" in text and "none was at hand" not in text
    text = scaling_document.document([row(call, h200, dtype="bfloat16") for call in calls], {})
    assert text.startswith("## CPU\n\nNot measured.\n\n## NVIDIA H200\n\n") and "assumption" not in text
    assert '"below" stands for the numbers that were fitted above.' in text
    below = 3600 * 256 / model.seconds(scaling_document.STANDARD, h200, Types())
    *_, line = (line for line in text.splitlines() if line.startswith("| 256 |"))
    assert line.endswith(f"| {scaling_document._rounded(below)} |")


def test_saturation_is_where_the_model_has_it():
    scheduler = {"workload": "scheduler", "shape": {}, "provider": "scheduler", "device": {"name": "cpu"}}
    scheduling = [scheduler | {"seconds": {"median": median}} for median in (1e-5, 2e-5)]
    text = scaling_document.document(scheduling, {})
    own = int(re.search(r"From (\d+) candidates on they are more", text).group(1))
    bound = int(re.search(r"bound by operations\*\* from (\d+) candidates", text).group(1))
    standard, types, stored = scaling_document.STANDARD, Types(), 249.5
    for count, more in ((own, True), (own - 1, False)):
        weights = types.weight * model.CLVP.step_weights
        assert (model.attention(count, 1, standard.prompt, stored, types).bytes >= weights) == more
    for count, more in ((bound, True), (bound - 1, False)):
        stage = replace(model.products(count, types), bytes=types.weight * model.CLVP.step_weights)
        assert (stage.flop / model.H200.flop_per_s >= stage.bytes / model.H200.bytes_per_s) == more
    many = replace(standard, candidates=512 * 64, slots=512 * 64)
    most = float(re.search(r"No batch gives more\*\* than ([\d ]+) candidates", text).group(1).replace(" ", ""))
    assert most == pytest.approx(3600 * many.candidates / model.seconds(many, model.H200, types), rel=0.005)
    assert "in 10.0 µs to 20.0 µs (measured" in text and "at most 12% of the shortest step" in text
    one, eight = (
        re.search(rf"^\| {name} \| ([\d ]+) /", text, flags=re.MULTILINE).group(1).replace(" ", "")
        for name in ("one GPU", "eight GPUs of a machine")
    )
    assert int(eight) == pytest.approx(8 * int(one), rel=0.01)


def test_the_figure_has_a_panel_for_each_sweep():
    rows = cpu_rows()
    (drawing,) = (each for each in plots.drawings(rows).values() if each["kind"] == "scaling")
    name = f"{rows[0]['provider']}"
    assert [point[0] for point in drawing["panels"]["candidates"][name]] == [1, 4, 16, 64]
    value, low, median, high, rate = drawing["panels"]["text_tokens"][name][-1]
    assert (value, median) == (300, rows[4]["seconds"]["median"]) and low < median < high and rate == 64 / median
    assert drawing["panels"]["requests"] == {}
    assert plots.lines_of(rows, "scaling") == {
        "AMD EPYC": "![A call over candidates, text, clips and requests](benchmarks/amd-epyc-scaling.svg)"
    }
    assert plots.lines_of(rows, "roofline") == {} and plots.drawings(rows[:1]) == {}


def test_the_figure_says_what_is_not_measured(tmp_path):
    plots.draw_all(cpu_rows(), tmp_path)
    drawn = (tmp_path / "amd-epyc-scaling.svg").read_text()
    assert drawn.count("not measured") == 2  # seconds and tokens a second over requests
    assert all(what in drawn for what in model.SWEEPS.values())


def test_the_commands_of_the_document_are_ones():
    text = report.SCALING.read_text(encoding="utf-8")
    block, *_ = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    bench, make = block.splitlines()
    parsed = build_parser().parse_args(bench.split()[1:])
    assert parsed.command == "bench" and parsed.workload == ["scaling"] and "scaling" in WORKLOADS
    assert f"\n{make.removeprefix('make ')}:" in (report.ROOT / "Makefile").read_text(encoding="utf-8")


def cluster_row(provider, rows, work, **shape):
    times = {"seconds": {"median": work + 3}, "parts": {"start": 2.0, "work": work}}
    context = {"device": {"threads": 2}, "versions": {"torch": "1"}, "commit": "abc"}
    return {"provider": provider, "shape": {"rows": rows, **shape}} | times | context


def test_the_document_tells_of_clusters():
    job = {"candidates": 16, "new_tokens": 64, "model": "random"}
    rows = [
        cluster_row("one process", 48, 24.0, **job),
        cluster_row("Ray, two workers", 48, 10.5, **job),
        cluster_row("one process", 10000, 1.0, model="none"),
        cluster_row("Ray", 10000, 20.0, model="none"),
    ]
    text = cluster_document.measured(rows)
    assert "| one process | 27.0 s | 2.00 s | 2.00 | 1.00x |" in text
    assert "| Ray, two workers | 13.5 s | 2.00 s | 4.00 | 2.00x |" in text  # 6 rows may be done when the first is seen
    assert "takes in 10 000 rows a second in one process, and 500 over Ray" in text
    assert cluster_document.measured(rows[:2]).endswith("Not measured.")
    text = cluster_document.modelled(rows, model.H200, Types(2, 2))
    one = 2 / model.seconds(cluster_document.ROWS["256 candidates of 500 tokens"], model.H200, Types(2, 2))
    assert f"| 64 | {64 * one:.0f} | 500 (the job's own process) |" in text and f"{500 / one:.0f} GPUs at 256" in text
    assert "not measured" in cluster_document.modelled([], model.H200, Types(2, 2))
