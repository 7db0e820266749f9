"""Every benchmark of an operator runs, at small shapes, and each of its providers passes the gate."""

import pytest
import torch

from benchmarks import add_norm, geglu_mlp, gelu_mlp, kernels, paged_attention, rotary_attention, sample

SMALL = [
    (rotary_attention, "CPU_SHAPES", ((2, 20),), 2),
    (geglu_mlp, "ROWS", {"cpu": (3,)}, 2),
    (gelu_mlp, "ROWS", {"cpu": (3,)}, 2),
    (add_norm, "SHAPES", {"cpu": (("rms", 3, 40), ("layer", 3, 40))}, 4),
    (paged_attention, "SHAPES", {"cpu": ((4, 2, 20, 0, 33),)}, 1),
    (sample, "CANDIDATES", {"cpu": (3,)}, 1),
]


@pytest.mark.parametrize(
    ("module", "name", "shapes", "cases"), SMALL, ids=[module.__name__.split(".")[1] for module, *_ in SMALL]
)
def test_providers_agree(module, name, shapes, cases, monkeypatch):
    monkeypatch.setattr(module, name, shapes)
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)
    rows = module.rows("cpu")
    assert len(rows) == 2 * cases and not [row for row in rows if row["seconds"] is None]
    assert all(row["bytes"] > 0 and row["absent"] == {"clvp_fast kernel": "no GPU"} for row in rows)


def test_a_provider_that_is_off_is_refused(monkeypatch):
    monkeypatch.setattr(add_norm, "SHAPES", {"cpu": (("layer", 3, 40),)})
    case = next(add_norm.cases("cpu"))
    case.providers = {"right": case.providers["clvp_fast torch"]}
    case.providers["wrong"] = lambda *arguments: [1.01 * x for x in case.providers["right"](*arguments)]
    wrong, right = kernels.measure_case("add_norm", case, "cpu", repeats=1)
    assert (wrong["provider"], right["provider"]) == ("wrong", "right")
    assert wrong["seconds"] is None and right["seconds"] is not None
