"""The rivals of a decode step in processes of their own do the same work, and one that does another is found out.

Each is tested where its packages are.
"""

import json
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import decode_rivals, decode_step, first_token
from benchmarks.decode_rivals import RIVALS
from benchmarks.providers import Absent, group_of
from benchmarks.rivals import decoder_process, held_down, onnx_runtime
from benchmarks.rivals.decoder_process import Stored
from benchmarks.rivals.torch_decoder import TorchLayers
from benchmarks.tiers import Tier
from tests.benchmarks import pretended_rival

ON = pytest.mark.parametrize("rival", RIVALS, ids=[rival.name for rival in RIVALS])


@pytest.fixture(autouse=True)
def no_set_is_forced(monkeypatch):
    """Let rivals be had also where a test run holds our kernels down to a lesser instruction set."""
    monkeypatch.setattr(held_down, "cpu_facts", lambda: {"isa_forced": False, "isa": "avx512vnni"})


@pytest.fixture(autouse=True)
def require_packages(request):
    rival = getattr(request.node, "callspec", None) and request.node.callspec.params.get("rival")
    if rival and (missing := [name for name in rival.module.PACKAGES if find_spec(name) is None]):
        pytest.skip(f"not installed: {', '.join(missing)}")


def shape_of(candidates: int) -> dict:
    return {"candidates": candidates, "text_tokens": 7, "stored": 9}


@ON
@pytest.mark.parametrize("candidates", [1, 2, 5])
def test_a_rival_does_the_same_work_with_each_of_its_settings(rival, candidates):
    for settings in rival.module.SETTINGS[rival.kind]:
        decoder = decode_step.process_of(rival, shape_of(candidates), True, settings)
        for _ in range(2):  # a step leaves nothing behind
            error, divergent = decode_step.judged(decoder, "cpu", True, shape_of(candidates), rival.distinct)
            assert 0 < error < rival.tier.tolerance, settings
            assert divergent["greedy"] == 1 or rival.kind != "float32", settings
            assert divergent["kl"] < 1e-4 and divergent["greedy"] > 0.9, settings
            decoder.run()
        decoder.end()


def test_a_rivals_threads_rest_outside_of_its_turns():
    rival = decode_rivals.Rival(pretended_rival, "", Tier("pretended", torch.float32, 1.0))
    decoder = decode_step.process_of(rival, shape_of(2), True, {})
    assert decoder(torch.tensor([1, 2])).shape == (2, 128)
    decoder.run()
    cpu_times = []
    for _ in range(2):
        cpu_times.append(sum(map(int, Path(f"/proc/{decoder._process.pid}/stat").read_text().split()[13:15])))
        time.sleep(0.2)
    assert cpu_times[0] == cpu_times[1]
    assert decoder.peak_bytes() > 1e6  # it goes on
    decoder.end()
    assert decoder._process.returncode == 0


@ON
@pytest.mark.parametrize("fault", ["position", "prompt"])
def test_a_rival_that_does_another_step_is_refused(rival, fault, monkeypatch):
    def faulty(prompt, tokens, positions, keys, values, position):
        if fault == "position":
            return Stored(prompt, tokens, positions, keys, values, position + 1)
        values = torch.cat([2 * values[:, :, :, : len(prompt)], values[:, :, :, len(prompt) :]], 3)
        return Stored(2 * prompt, tokens, positions, keys, values, position)

    monkeypatch.setattr(decode_step, "Stored", faulty)
    provider = decode_step._process(rival, shape_of(2), True)
    assert not provider.error <= rival.tier.tolerance


@ON
def test_a_rival_with_weights_of_another_scale_is_refused(rival, monkeypatch, tmp_path):
    """Double the second layer's outputs while the rival's files are made, in a cache of their own."""
    monkeypatch.setenv("CLVP_FAST_CACHE", str(tmp_path))
    layer = decode_step.stock_model("cpu", smoke=True).speech_decoder_model.model.decoder.layers[1]
    weight = layer.mlp.c_proj.weight
    decode_step.known("cpu", True, 7, 9)  # before the weights are other ones
    weight.data *= 3
    try:
        decode_step.process_of(rival, shape_of(2), True, rival.settings(2)).end()
    finally:
        weight.data /= 3
    assert not decode_step._process(rival, shape_of(2), True).error <= rival.tier.tolerance


@ON
def test_the_model_stays_as_it_was_when_a_rival_makes_its_files(rival, monkeypatch, tmp_path):
    monkeypatch.setenv("CLVP_FAST_CACHE", str(tmp_path))
    model = decode_step.stock_model("cpu", smoke=True).speech_decoder_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decode_step.process_of(rival, shape_of(2), True, rival.settings(2)).end()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@ON
def test_the_row_of_a_rival_tells_of_its_process(rival):
    shape = shape_of(3)
    provider = decode_step._process(rival, shape, True)
    counted = provider.counted
    assert counted["process_bytes"] > 2e7 and counted["settings"] in rival.module.SETTINGS[rival.kind]
    assert group_of(provider.name) != "ours" and {"bytes", "flop", "dtype", "kl", "greedy"} <= set(counted)
    provider.run()


@pytest.mark.parametrize("rival", [one for one in RIVALS if one.module is onnx_runtime], ids=lambda rival: rival.kind)
def test_a_rivals_first_token_is_of_the_prompt_and_the_start_token(rival, monkeypatch):
    provider = first_token._onnx(rival, 7, True)
    provider.run()
    assert 0 < provider.error < provider.tolerance and provider.counted["process_bytes"] > 2e7
    prompt, tokens, expected = first_token.compared_logits("cpu", True, 7)
    monkeypatch.setattr(first_token, "compared_logits", lambda *arguments: (prompt.flip(0), tokens, expected))
    assert first_token._onnx(rival, 7, True).error > 5 * provider.error


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(decoder_process, "find_spec", lambda name: None if name == "onnx" else object())
    with pytest.raises(Absent, match=r"not installed: onnx$"):
        decode_step.process_of(RIVALS[0], shape_of(1), True, {})


def test_a_process_that_ends_says_so(monkeypatch):
    """Leave out what the process needs, so that it ends before its first answer."""
    monkeypatch.setattr(onnx_runtime, "PACKAGES", ())
    monkeypatch.setattr(onnx_runtime, "model_file", lambda *arguments: "/nowhere/decoder.onnx")
    decoder = decode_step.process_of(RIVALS[0], shape_of(1), True, {})
    with pytest.raises(RuntimeError, match=r"the process of benchmarks\.rivals\.onnx_runtime ended with status 1"):
        decoder(torch.zeros(1, dtype=torch.int64))
    decoder.end()


def test_weights_lie_in_the_cache_and_models_are_told_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("CLVP_FAST_CACHE", str(tmp_path))
    layers = TorchLayers(decode_step.stock_model("cpu", smoke=True).speech_decoder_model)
    first = decoder_process.built("rival-kind", layers, lambda folder: (folder / "weights").touch())
    assert first.parent == tmp_path / "rivals" and (first / "weights").exists()
    assert decoder_process.built("rival-kind", layers, pytest.fail) == first
    layers.qkv[0] = 2 * layers.qkv[0]
    assert decoder_process.built("rival-kind", layers, lambda folder: None) != first


def test_the_fastest_settings_of_the_nearest_sweep_are_taken(monkeypatch, tmp_path):
    rival, other = RIVALS[0], RIVALS[1]
    slow, fast, third = rival.module.SETTINGS[rival.kind]
    found = [
        (rival, 1, slow, 3.0, decode_rivals.here()),
        (rival, 1, fast, 2.0, decode_rivals.here()),
        (rival, 1, {"of": "old code"}, 1.0, decode_rivals.here()),
        (rival, 16, third, 9.0, decode_rivals.here()),
        (rival, 16, fast, 1.0, "another machine"),
        (other, 16, fast, 1.0, decode_rivals.here()),
    ]
    names = ("rival", "candidates", "settings", "seconds", "device")
    rows = [dict(zip(names, (one.name, *rest), strict=True)) for one, *rest in found]
    table = tmp_path / "sweep.jsonl"
    monkeypatch.setattr(decode_rivals, "SWEEP", table)
    decode_rivals._swept.cache_clear()
    assert rival.settings(1) == slow  # without a sweep
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    decode_rivals._swept.cache_clear()
    assert [rival.settings(candidates) for candidates in (1, 3, 8, 64)] == [fast, fast, third, third]
    decode_rivals._swept.cache_clear()


def test_parties_of_a_step_on_a_cpu():
    (task,) = decode_step.tasks("cpu", smoke=True)
    parties = decode_step._parties(list(task.makers), 16)
    assert sorted(name for party in parties for name in party) == sorted(task.makers) and len(parties) == 6
    ours = next(party for party in parties if "clvp_fast float32" in party)
    assert ours == ["ONNX Runtime float32, no draw", "llama.cpp float32, no draw", "clvp_fast float32"]
    assert decode_step._parties(list(task.makers), 64) == [[name] for name in task.makers]
