"""The kit's expectations of a machine: its instruction sets, the interpreter's products, the end of waits."""

import threading

import numpy as np
import pytest
import torch

from tests.kit import interpreter, isa, waiting

AVX512 = "avx512f avx512bw avx512dq avx512vl avx2 fma"


@pytest.mark.parametrize(
    "flags, sets, few, many",
    [
        (f"{AVX512} avx512_vnni avx512_bf16", ("avx512bf16", "avx512vnni", "avx512", "avx2", "portable"), True, True),
        (
            f"{AVX512} avx512_vnni avx512_bf16 amx_bf16",
            ("avx512bf16", "avx512vnni", "avx512", "avx2", "portable"),
            False,
            False,
        ),
        (f"{AVX512} avx512_bf16", ("avx512", "avx2", "portable"), True, True),
        (f"{AVX512} avx512_vnni", ("avx512vnni", "avx512", "avx2", "portable"), True, True),
        (AVX512, ("avx512", "avx2", "portable"), True, True),
        ("avx2 fma avx_vnni", ("avxvnni", "avx2", "portable"), True, True),
        ("avx2 fma sse2", ("avx2", "portable"), True, True),
        ("avx2 avx512f", ("portable",), False, False),
        ("", ("portable",), False, False),
    ],
)
def test_sets_follow_the_flags_and_the_table(monkeypatch, flags, sets, few, many):
    monkeypatch.setattr(isa, "cpu_flags", lambda: frozenset(flags.split()))
    monkeypatch.setattr(isa, "why_no_library", lambda: None)
    monkeypatch.delenv("CLVP_FAST_ISA", raising=False)
    assert isa.expected_isas() == sets and isa.expected_isa() == sets[0]
    assert (isa.why_unserved("linear", torch.bfloat16) is None) == few
    assert (isa.why_unserved("many rows", torch.bfloat16) is None) == many
    assert isa.why_unserved("sample") is None
    monkeypatch.setenv("CLVP_FAST_ISA", "portable")
    assert "no kernel on a CPU with portable" in isa.why_unserved("linear")


def test_an_interpreted_product_has_a_row_s_bits_in_any_company():
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(shape, np.float32) for shape in ((2, 33, 70), (2, 70, 19)))
    whole = interpreter.product(a, b, np.float32)
    np.testing.assert_allclose(whole, a.astype(np.float64) @ b.astype(np.float64), rtol=1e-4, atol=1e-4)
    for row in range(33):
        for rows in (slice(row, row + 1), slice(row, row + 7)):
            assert np.array_equal(interpreter.product(a[:, rows], b, np.float32), whole[:, rows])
    assert np.array_equal(interpreter.product(a, b[:, :, 3:5], np.float32), whole[:, :, 3:5])


def test_waits_end(monkeypatch):
    answers = iter([0, [], "found"])
    assert waiting.wait_for(lambda: next(answers), pause=0) == "found"
    monkeypatch.setattr(waiting, "BOUND", 0.0)
    with pytest.raises(AssertionError, match="did not happen"):
        waiting.wait_for(lambda: None)
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="sleeper")
    thread.start()
    with pytest.raises(AssertionError, match="sleeper did not end"):
        waiting.join(thread)
    end.set()
