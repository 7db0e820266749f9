"""The workload `tortoise` of the benchmarks, at small sizes, and without the package."""

import importlib.util

from benchmarks import tortoise
from benchmarks.harness import all_rows
from benchmarks.rivals import tortoise_stage


def test_it_runs_the_stages_of_tts_and_ours(tortoise_api, monkeypatch):
    monkeypatch.setattr(tortoise_api, "do_spectrogram_diffusion", tortoise_api.do_spectrogram_diffusion)  # put back
    rows = all_rows(tortoise, "cpu", smoke=True)
    *stock, float32, int8, scored, bfloat16 = rows
    assert [row["provider"] for row in stock] == [
        "tortoise, default",
        "tortoise, kv_cache",
        "tortoise, kv_cache, batch of 2",
    ]
    assert all(row["seconds"] and set(row["parts"]) == {"draw", "rank", "latents"} for row in rows)
    assert 0 < float32["error"] < 1e-4 and 0 < int8["error"] < 1e-4 and 1e-4 < bfloat16["error"] < 5e-2
    assert scored["provider"] == "clvp_fast accelerate(tts), int8, scored in bfloat16"
    assert int8["error"] < scored["error"] < 5e-2
    tortoise_stage.tortoise_api.cache_clear()


def test_without_the_package_there_is_nothing_to_measure(monkeypatch):
    tortoise_stage.tortoise_api.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert all_rows(tortoise, "cpu", smoke=True) == []
