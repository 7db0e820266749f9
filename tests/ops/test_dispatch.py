"""The choice of backend: forced, by default, refused, explained."""

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

import clvp_fast
from clvp_fast.ops import dispatch
from clvp_fast.ops.binding import Scratch
from tests.kit import operators

operator_reason = [None]
X = torch.tensor([1.0])


@pytest.fixture(scope="module")
def triple():
    """Give an operator that triples, and whose paths leave a mark."""
    made = dispatch.Operator(
        "test_triple",
        "(Tensor x) -> Tensor",
        reference=lambda x: x + x + x,
        fake=lambda x: torch.empty_like(x),
        implementations=(
            dispatch.Implementation(
                "triton",
                lambda x: x * 3.0 + 200,
                lambda x: "x must be float32, not float64" if x.dtype == torch.float64 else None,
                missing=lambda device: operator_reason[0],
            ),
            dispatch.Implementation("torch", lambda x: x * 3.0 + 100),
        ),
    )
    yield made
    del dispatch.OPERATORS["test_triple"]


@pytest.fixture
def operator(triple):
    forget(triple)
    operator_reason[0] = None
    return triple


def forget(operator):
    operator._refusals.clear()
    operator._warned.clear()


def call(operator, x=X, training=None):
    return operator.choose((x,), training)(x).item()


def test_default_takes_the_kernel_where_it_serves(operator):
    assert call(operator) == 203
    assert call(operator, training="an input requires grad") == 103
    forget(operator)
    operator_reason[0] = "too old"
    assert call(operator) == 103


def test_forced_backends_nest_and_are_restored(operator):
    with clvp_fast.backend("torch"):
        assert call(operator) == 103
        with clvp_fast.backend("reference"):
            assert call(operator) == 3
            with clvp_fast.backend(None):
                assert call(operator) == 203
        assert call(operator) == 103
        with pytest.raises(KeyError), clvp_fast.backend("reference"):
            raise KeyError
        assert call(operator) == 103
    assert call(operator) == 203


def test_forced_kernel_that_cannot_serve_says_why(operator, monkeypatch):
    with clvp_fast.backend("kernel"):
        assert call(operator) == 203
        with pytest.raises(RuntimeError, match=r"clvp_fast\.test_triple was forced .* on cpu: an input requires grad"):
            call(operator, training="an input requires grad")
        operators.use(monkeypatch, operator, operator.implementations[1:])
        with pytest.raises(RuntimeError, match="there is no kernel for this operator yet; choose backend 'torch'"):
            call(operator)


@pytest.fixture
def several(operator, monkeypatch):
    """Give the operator with a kernel on a CPU too: of at most two numbers, for which it pays from two on."""
    triton, plain = operator.implementations
    triton = replace(triton, missing=dispatch.missing_for_triton)
    cpu = dispatch.Implementation(
        "cpu",
        lambda x: x * 3.0 + 300,
        lambda x: "x must have two numbers" if len(x) > 2 else None,
        lambda device, dtype: "x must be narrow" if dtype == torch.float64 else None,
        pays=lambda x: len(x) > 1,
        calls="two numbers",
        missing=lambda device: operator_reason[0],
    )
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    operators.use(monkeypatch, operator, (triton, cpu, plain))
    return operator


def taken(operator, length, dtype=torch.float32):
    return operator.choose((torch.ones(length, dtype=dtype),))(torch.ones(length, dtype=dtype))[0].item()


def test_the_first_that_serves_and_pays_is_taken(several):
    assert taken(several, 2) == 303
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert taken(several, 1) == 103
    with pytest.warns(UserWarning, match="test_triple takes the slower torch path: x must have two numbers"):
        assert taken(several, 3) == 103
    (choice,) = clvp_fast.explain("test_triple", "cpu", torch.float32)
    assert (choice.backend, choice.implementation, choice.calls) == ("kernel", "cpu", "two numbers")
    (choice,) = clvp_fast.explain("test_triple", "cpu", torch.float64)
    assert (choice.backend, choice.implementation) == ("torch", "torch")
    assert choice.refused["kernel"] == "x must be narrow"


def test_bound_calls_may_choose_another_kernel(several, monkeypatch):
    triton, cpu, plain = several.implementations
    operators.use(monkeypatch, several, (triton, replace(cpu, pays_bound=lambda x: len(x) == 1), plain))
    for length, found in ((1, (103, 303)), (2, (303, 103))):
        out = torch.empty(length)
        several.bind((torch.ones(length),), out, Scratch(length, out.device))()
        assert (taken(several, length), out[0].item()) == found


def test_an_implementation_is_forced_by_its_name(several, monkeypatch):
    for backend in ("cpu", "kernel"):
        with clvp_fast.backend(backend):
            assert taken(several, 1) == 303  # it need not pay
            with pytest.raises(RuntimeError, match="on cpu: x must have two numbers; "):
                taken(several, 3)
            assert clvp_fast.explain("test_triple", "cpu")[0].implementation == "cpu"
    with clvp_fast.backend("cuda"):
        with pytest.raises(RuntimeError, match="on cpu: cuda is forced, and it has triton, cpu; "):
            taken(several, 2)
        (choice,) = clvp_fast.explain("test_triple", "cpu")
        assert choice.backend is choice.implementation is None
        assert choice.refused["kernel"] == "cuda is forced, and it has triton, cpu"
    with clvp_fast.backend("triton"), pytest.raises(RuntimeError, match="on cpu: kernels need an NVIDIA GPU"):
        taken(several, 2)
    operators.forget(monkeypatch, several)
    operator_reason[0] = "no compiler"
    with clvp_fast.backend("kernel"), pytest.raises(RuntimeError, match="on cpu: no compiler; "):
        taken(several, 2)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_an_interpreted_kernel_comes_first_where_it_is_forced(several, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert taken(several, 2) == 303
    with clvp_fast.backend("triton"):
        assert taken(several, 2) == 203
    with clvp_fast.backend("kernel"):
        assert taken(several, 2) == 203
        assert clvp_fast.explain("test_triple", "cpu")[0].implementation == "triton"
        assert taken(several, 2, torch.float64) == 303  # the next in the list
        with pytest.raises(RuntimeError, match="on cpu: x must be float32, not float64; "):
            taken(several, 3, torch.float64)


def test_a_call_that_may_yield_takes_torch_s(several, monkeypatch):
    monkeypatch.setattr(several, "_yields", lambda x: len(x) == 3)
    with clvp_fast.backend("kernel"):
        assert taken(several, 3) == 103
        assert call(several, training="an input requires grad") == 103
        with pytest.raises(RuntimeError, match="on cpu: x must have two numbers; "):
            taken(several, 4)


def test_a_device_is_asked_once(several, monkeypatch):
    asked = []
    for name in (None, "kernel"):
        with clvp_fast.backend(name):
            operators.change(monkeypatch, several, "cpu", missing=asked.append)
            for length in (2, 2, 1, 2):
                taken(several, length)
            assert asked == [torch.device("cpu")]
            asked.clear()


def test_requires_grad_means_training():
    leaf = torch.ones(1, requires_grad=True)
    assert dispatch.needs_grad(X, None, leaf) and not dispatch.needs_grad(X, None)
    with torch.no_grad():
        assert not dispatch.needs_grad(leaf)


def test_a_kernel_missing_on_a_gpu_warns_once(operator, monkeypatch):
    operator_reason[0] = "triton is not installed"
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.Tensor, "device", gpu)  # all that `choose` looks at
    with pytest.warns(
        UserWarning, match=r"clvp_fast\.test_triple takes the slower torch path: triton is not installed"
    ):
        assert call(operator) == 103
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(operator) == 103


def test_a_kernel_missing_on_a_cpu_is_no_news(operator):
    operator_reason[0] = "no compiler"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(operator) == 103


def test_arguments_that_the_kernel_does_not_serve(operator):
    """Warn once and take the torch path; raise if the kernel is forced; the registered operator agrees."""
    wide = X.double()
    with pytest.warns(UserWarning, match=r"test_triple takes the slower torch path: x must be float32, not float64"):
        assert call(operator, wide) == 103
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(operator, wide) == 103
        assert call(operator) == 203
        assert torch.ops.clvp_fast.test_triple(wide).item() == 103
        assert torch.ops.clvp_fast.test_triple(X).item() == 203
    with clvp_fast.backend("kernel"), pytest.raises(RuntimeError, match=r"on cpu: x must be float32, not float64; "):
        call(operator, wide)


def test_the_interpreter_runs_kernels_only_when_forced(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.missing_for_triton(cpu) == "Triton's interpreter runs a kernel only when it is forced"
    with clvp_fast.backend("kernel"):
        assert dispatch.missing_for_triton(cpu) is None
        monkeypatch.delenv("TRITON_INTERPRET")
        assert "need an NVIDIA GPU" in dispatch.missing_for_triton(cpu)


def test_the_choice_holds_in_compiled_code(operator):
    def run(x):
        return operator.choose((x,))(x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert compiled(X).item() == 203
    with clvp_fast.backend("torch"):
        assert compiled(X).item() == 103
    with clvp_fast.backend("reference"):
        assert compiled(X).item() == 3
    assert compiled(X).item() == 203


def test_explain(operator):
    choice = clvp_fast.explain("test_triple", device="cpu")[0]
    assert (choice.operator, choice.device, choice.backend) == ("test_triple", "cpu", "kernel")
    assert choice.refused == {"reference": "kernel is faster", "torch": "kernel is faster"}
    forget(operator)
    operator_reason[0] = "too old"
    choice = clvp_fast.explain("test_triple", device="cpu")[0]
    assert choice.backend == "torch" and choice.refused["kernel"] == "too old"
    with clvp_fast.backend("kernel"):
        choice = clvp_fast.explain("test_triple", device="cpu")[0]
        assert choice.backend is None and choice.refused["kernel"] == "too old"
    table = str(clvp_fast.explain(device="cpu"))
    for name in ("add_norm", "geglu_mlp", "gelu_mlp", "log_mel", "rotary_attention", "test_triple"):
        assert any(line.startswith(name) and " cpu " in line for line in table.splitlines())
    assert "too old" in table
    with pytest.raises(ValueError, match="there is no operator 'nonsense'; there are add_norm"):
        clvp_fast.explain("nonsense")


def test_unknown_backend_is_refused():
    with (
        pytest.raises(
            ValueError, match="backend\\(\\) must be one of reference, torch, kernel, triton, cuda, cpu, not 'gpu'"
        ),
        clvp_fast.backend("gpu"),
    ):
        pass


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("gpu", "CLVP_FAST_BACKEND must be one of reference, torch, kernel, triton, cuda, cpu, not 'gpu'"),
        ("reference", "None reference\nFalse"),
    ],
)
def test_environment_variable(value, expected):
    code = "import clvp_fast; c = clvp_fast.explain('add_norm')[0]; print(c.refused.get('reference'), c.backend);"
    code += "from clvp_fast.ops import paged_attention; print(paged_attention._debug)"
    environment = os.environ | {"CLVP_FAST_BACKEND": value, "CLVP_FAST_DEBUG": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert expected in run.stdout + run.stderr
    assert (run.returncode == 0) == (value == "reference")
