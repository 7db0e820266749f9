"""The answers of `explain` agree with calls: each operator, type, instruction set of this CPU, and forced backend."""

import functools
import json
import warnings

import pytest
import torch

import clvp_fast
from clvp_fast import native, ops
from clvp_fast.cli import main
from clvp_fast.ops import many_rows
from clvp_fast.ops.dispatch import OPERATORS
from tests.kit import isa, operators as kit_operators

ROWS = many_rows.FEW_ROWS + 1
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Layers of many rows, and the blocks that are made of them; the other rows of docs/kernels.md name their operators.
ENTRIES = dict.fromkeys(("geglu_mlp", "gelu_mlp", "mlp_block", "window_block"), "many rows") | {
    "rotary_attention_ragged": "rotary_attention"
}


def _int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def _calls(dtype):
    """Make a call of each operator with tensors of `dtype`, of a size at which its kernel is taken."""

    def t(*shape):
        return torch.ones(*shape, dtype=dtype)

    q, pages = t(3, 2, 32), (t(2, 16, 2, 32), t(2, 16, 2, 32))
    ids, image = torch.zeros(1, 4, dtype=torch.int64), (8, 16, 16, 64)
    state = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), torch.zeros(2).bool()
    draw = dict(seed=0, candidate=0, step=0, stop_token=8, pad_token=8)
    mlp = t(ROWS, 32), t(64, 32), t(64), t(32, 64), t(32)
    geglu = t(ROWS, 32), t(128, 32), t(128), t(32, 64), t(32)
    return {
        "add_norm": lambda: ops.add_norm(t(4096, 32), t(4096, 32), weight=t(32), eps=1e-5, kind="rms"),
        "double_layer_norm": lambda: ops.double_layer_norm(
            t(4, 32), weight1=t(32), bias1=t(32), eps1=1e-5, weight2=t(32), bias2=t(32), eps2=1e-5
        ),
        "embed": lambda: ops.embed(ids, ids, t(8, 32), t(8, 32)),
        "geglu_mlp": lambda: ops.geglu_mlp(*geglu),
        "gelu_mlp": lambda: ops.gelu_mlp(*mlp),
        "linear": lambda: ops.linear(t(3, 64), t(50, 64), t(50)),
        "linear, many rows": lambda: ops.linear(t(ROWS, 64), t(50, 64), t(50)),
        "log_mel": lambda: ops.log_mel(
            t(1, 600), window=torch.ones(256), mel_filters=torch.ones(129, 4), hop_length=64
        ),
        "merge_norm": lambda: ops.merge_norm(t(1, 4, 4, 8), weight=t(32), bias=t(32), eps=1e-5),
        "mlp_block": lambda: ops.mlp_block(
            t(2048, 64), t(64), t(64), t(128, 64), t(128), t(64, 128), t(64), activation="gelu", eps=1e-5
        ),
        "paged_attention_decode": lambda: ops.paged_attention_decode(*[q[:1]] * 3, *pages, _int32(1)[None], _int32(3)),
        "paged_prefill": lambda: ops.paged_prefill(*[q] * 3, _int32(0, 3), *pages, _int32(1)[None]),
        "rotary_attention": lambda: ops.rotary_attention(*[t(1, 8, 2, 32)] * 3, causal=True),
        "rotary_attention_ragged": lambda: ops.rotary_attention(
            *[t(5, 2, 32)] * 3, causal=True, cu_seqlens=_int32(0, 2, 5), max_seqlen=3
        ),
        "sample": lambda: ops.sample(t(2, 9), *state, **draw),
        "window_attention": lambda: ops.window_attention(*[t(1, 8, 8, 2, 32)] * 3, t(2, 16, 16), window=4),
        "window_block": lambda: ops.window_block(
            t(*image), t(64), t(64), t(192, 64), t(192), t(2, 16, 16), t(64, 64), t(64), window=4, eps=1e-5
        ),
    }


CALLS = tuple(_calls(torch.float32))


@pytest.fixture
def operators(monkeypatch):
    """Give operators that were never asked, on a CPU whose Triton kernels no interpreter runs."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for operator in OPERATORS.values():
        kit_operators.forget(monkeypatch, operator)
    return OPERATORS


@pytest.fixture
def sets():
    """Instruction sets of this CPU, each chosen when it is reached; one that is None where there is no library."""
    if isa.why_no_library():
        yield iter([None])
        return
    before = native.isa()
    yield (native.choose_isa(name) or name for name in isa.expected_isas())
    native.choose_isa(before)


def taken(operator, call, monkeypatch) -> str | None:
    """Return the backend of `operator` that `call` runs; None where the call raises `RuntimeError`."""
    seen = []

    def noted(backend, path):
        return lambda *args: seen.append(backend) or path(*args)

    with monkeypatch.context() as patch:
        patch.setattr(operator, "reference", noted("reference", operator.reference))
        for backend in ("torch", "kernel"):
            kit_operators.change(patch, operator, backend, around_run=functools.partial(noted, backend))
        try:
            call()
        except RuntimeError as error:
            assert "was forced and cannot serve" in str(error)
            return None
    assert len(seen) == 1, seen
    return seen[0]


def documented(name: str, chosen: str | None, dtype: torch.dtype) -> str:
    """Return the backend that docs/kernels.md promises, in a table that tests/kit/isa.py has."""
    served = isa.SERVED.get(ENTRIES.get(name, name), {})
    products = name in ("linear", "rotary_attention") or name in ENTRIES
    if chosen not in served.get(dtype, ()) or (products and dtype == torch.bfloat16 and isa.has_matrix_unit()):
        return "torch"
    return "kernel"


@pytest.mark.filterwarnings("ignore:.*takes the slower torch path")
@pytest.mark.parametrize("backend", [None, "kernel", "torch", "reference"])
@pytest.mark.parametrize("key", CALLS)
def test_calls_take_what_is_explained(key, backend, operators, sets, monkeypatch):
    name = key.split(",")[0]
    for chosen in sets:
        for dtype in TYPES:
            with clvp_fast.backend(backend), torch.inference_mode():
                (choice,) = clvp_fast.explain(name, "cpu", dtype)
                found = taken(operators[name], _calls(dtype)[key], monkeypatch)
            assert choice.backend == found, (chosen, choice)
            if backend is None and dtype in (torch.float32, torch.bfloat16):
                assert found == documented(name, chosen, dtype), (chosen, choice)
            assert set(choice.refused) == {"reference", "torch", "kernel"} - {found}


def test_every_operator_has_a_call():
    assert {key.split(",")[0] for key in CALLS} == {name for name in OPERATORS if not name.startswith("test_")}


@pytest.mark.parametrize("name", ["gelu_mlp", "geglu_mlp", "mlp_block", "window_block"])
def test_explain_names_the_rows_that_a_kernel_serves(name, operators, sets, monkeypatch):
    t = torch.ones
    few = {
        "gelu_mlp": lambda: ops.gelu_mlp(t(3, 32), t(64, 32), t(64), t(32, 64), t(32)),
        "geglu_mlp": lambda: ops.geglu_mlp(t(3, 32), t(128, 32), t(128), t(32, 64), t(32)),
        "mlp_block": lambda: ops.mlp_block(
            t(3, 32), t(32), t(32), t(64, 32), t(64), t(32, 64), t(32), activation="gelu", eps=1e-5
        ),
        "window_block": lambda: ops.window_block(
            t(1, 4, 4, 32), t(32), t(32), t(96, 32), t(96), t(1, 16, 16), t(32, 32), t(32), window=4, eps=1e-5
        ),
    }
    for _ in sets:
        (choice,) = clvp_fast.explain(name, "cpu", torch.float32)
        assert ("fewer" in choice.calls) == (choice.backend == "kernel")
        with torch.inference_mode():
            assert taken(operators[name], few[name], monkeypatch) == "torch"


def test_types_that_differ_have_a_row_each(operators, monkeypatch):
    linear = operators["linear"]
    for slow, expected in ((None, ["float32, bfloat16"]), (torch.bfloat16, ["float32", "bfloat16"])):
        kit_operators.change(
            monkeypatch,
            linear,
            missing=lambda device: None,
            why_not_type=lambda device, dtype, slow=slow: "slow" if dtype == slow else None,
        )
        rows = clvp_fast.explain("linear", "cpu")
        assert [row.dtype for row in rows] == expected
    assert [row.backend for row in rows] == ["kernel", "torch"] and rows[1].refused["kernel"] == "slow"
    assert [line.split()[2] for line in str(rows).splitlines()[1:]] == expected


@pytest.mark.parametrize("dtype", ["float33", torch.int8, 4])
def test_a_type_that_is_none(dtype):
    with pytest.raises(ValueError, match=r"dtype must be a floating point type such as torch\.bfloat16, or None, not"):
        clvp_fast.explain("linear", "cpu", dtype)


@isa.needs_library
def test_info_tells_the_instruction_set(capsys, sets):
    best = isa.expected_isas()[0]
    for name in sets:
        assert main(["info", "--json"]) == 0
        library = json.loads(capsys.readouterr().out)["library"]
        assert library == {"path": str(native.folder("cpu") / "libclvp_fast.so"), "isa": name, "forced": name != best}
        assert main(["info"]) == 0
        line = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("library"))
        assert str(native.folder("cpu")) in line and name in line and ("forced" in line) == (name != best)


def test_info_without_a_library(capsys, monkeypatch, operators):
    monkeypatch.setattr(native, "loaded", lambda *part: (None, "there is no C++ compiler"))
    isa.forget_library()
    try:
        with warnings.catch_warnings(action="error"):  # said once, in its line
            assert main(["info"]) == 0
        told = capsys.readouterr()
        assert "library   none: there is no C++ compiler\n" in told.out and "Traceback" not in told.err
        assert main(["info", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["library"] == {"missing": "there is no C++ compiler"}
    finally:
        isa.forget_library()
