"""Operators whose implementations a test changes, that know nothing of this machine yet, or that torch checks."""

from dataclasses import replace

import torch

from clvp_fast.ops.dispatch import OPERATORS


def change(monkeypatch, operator, of: str = "kernel", **changes) -> None:
    """Change fields of an operator's implementations until the test ends: of its kernels, of torch's or of one by name.

    A function that is given as `around_run` takes an implementation's own `run` and returns the new one.
    """
    around = changes.pop("around_run", None)

    def changed(each):
        if of not in (each.name, "torch" if each.name == "torch" else "kernel"):
            return each
        run = {"run": around(each.run)} if around else {}
        # Of another `run`, what is bound is that.
        return replace(each, **changes, **run, **({"bind": None} if run or "run" in changes else {}))

    use(monkeypatch, operator, tuple(changed(each) for each in operator.implementations))


def use(monkeypatch, operator, implementations: tuple) -> None:
    """Give an operator other implementations until the test ends; it has warned of nothing."""
    for name in ("implementations", "torch", "_refusals", "_asked"):
        monkeypatch.setattr(operator, name, getattr(operator, name))  # restored at the end
    monkeypatch.setattr(operator, "_warned", set())
    operator.use(implementations)


def forget(monkeypatch, operator) -> None:
    """Let an operator ask again where its kernels can run, and warn again."""
    use(monkeypatch, operator, operator.implementations)


def opcheck(backend, registered, args, **options) -> None:
    """`torch.library.opcheck` of a registered operator, whose kernel on `backend` serves these arguments.

    A registered operator takes torch's implementation where its kernel does not serve, as compiled graphs must; the
    check would be of that, and tell of no kernel.
    """
    refusals = why_no_kernel(backend.name, registered, args)
    assert None in refusals, f"{registered} takes torch's path on {backend.id}: {refusals or 'it has no kernel'}"
    torch.library.opcheck(registered, args, **options)


def why_no_kernel(name: str, registered, args) -> list[str | None]:
    """Of each kernel that a `Backend` of that name runs, why it does not serve these arguments, or None."""
    operator = OPERATORS[registered.name().removeprefix("clvp_fast::")]
    kinds = {"cpu": ("cpu",), "interpreted": ("triton",), "gpu": ("triton", "cuda")}[name]
    kernels = [each for each in operator.implementations if each.name in kinds]
    return [operator._refusal(each.name, args[0].device) or each.why_not(*args) for each in kernels]
