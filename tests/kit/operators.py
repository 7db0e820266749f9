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
    """Run `torch.library.opcheck` of a registered operator; a kernel's backend must serve `args`.

    A registered operator takes torch's implementation where no kernel serves, as compiled graphs must: the check would
    be of that, and tell of no kernel.
    """
    kinds = {"cpu": ("cpu",), "interpreted": ("triton",), "gpu": ("triton", "cuda")}.get(backend.name)
    if kinds is not None:
        operator = OPERATORS[registered.name().removeprefix("clvp_fast::")]
        kernels = [each for each in operator.implementations if each.name in kinds]
        refusals = [operator._refusal(each.name, args[0].device) or each.why_not(*args) for each in kernels]
        assert None in refusals, f"{registered} is torch's on {backend.id}: {refusals or 'it has no kernel there'}"
    torch.library.opcheck(registered, args, **options)
