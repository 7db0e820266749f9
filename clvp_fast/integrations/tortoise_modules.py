"""The live modules of a `TextToSpeech` whose parameters the engine reads; they may not be replaced or modified."""

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from clvp_fast.models.common.plain import is_plain

# Only Tortoise calls these, or nothing does, so that hooks on them work as in stock Tortoise.
_CALLED = ("conditioning_encoder", "text_head")
# The methods that the engine's replace.
_METHODS = ("forward", "inference_speech", "get_generator")
# The attribute of a `TextToSpeech` that has its engine.
MARK = "_clvp_fast"
_PACKAGES = ("tortoise", "torch", "transformers")
# Modules whose parameters an engine reads; two engines would move them away from each other.
_taken: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def refuse_shared(name: str, root: nn.Module) -> None:
    """Raise `ValueError` if a module of `tts.NAME` is part of another accelerated object."""
    if shared := [inner for inner, module in root.named_modules() if module in _taken]:
        raise ValueError(
            f"tts.{name}{f'.{shared[0]}' if shared[0] else ''} is part of another TextToSpeech that is accelerated: "
            "call restore() of that one first, or load another"
        )


class LiveModules:
    """The modules `tts.autoregressive` and `tts.clvp` (if any), and a check that they stay unchanged.

    Args:
        tts: a `TextToSpeech`.
        names: of its attributes.

    Raises:
        ValueError: a module inside has hooks, another forward or a class of another package, which would not run.
    """

    def __init__(self, tts: Any, names: tuple[str, ...]):
        self._tts, self._roots = tts, {name: getattr(tts, name) for name in names}
        self._modules: list[tuple[str, nn.Module, type, tuple]] = []
        for name, root in self._roots.items():
            for method in _METHODS:
                if method in vars(root):
                    raise ValueError(f"tts.{name} has a {method}() of its own, which the engine's replaces: {_ADVICE}")
            if root._compiled_call_impl is not None:
                raise ValueError(f"tts.{name} is compiled, and the engine takes its place: {_ADVICE}")
            packages = {*_PACKAGES, _package(type(root))} - {"__main__"}
            for inner, module in _read(root):
                kind = type(module)
                if _package(kind) not in packages or (module is not root and not is_plain(module, kind)):
                    raise ValueError(f"{_described(name, inner, module, packages)}, {_READ}: {_ADVICE}")
                self._modules.append((f"{name}.{inner}", module, kind, _children(module)))

    def take(self) -> None:
        """Claim the modules: until `give_back`, no other object with one of them can be accelerated."""
        _taken.update(self._all())

    def give_back(self) -> None:
        """Undo `take`."""
        for module in self._all():
            _taken.discard(module)

    def _all(self) -> Iterator[nn.Module]:
        return (module for root in self._roots.values() for module in root.modules())

    def check(self) -> None:
        """Raise `ValueError` if a module was replaced, or got a hook or another forward, since construction."""
        for name, root in self._roots.items():
            if getattr(self._tts, name, None) is not root:
                raise ValueError(f"tts.{name} was replaced after accelerate(tts): {_AGAIN}")
        for name, module, kind, children in self._modules:
            if _children(module) != children:
                raise ValueError(f"a module of tts.{name.rstrip('.')} was replaced after accelerate(tts): {_AGAIN}")
            if type(module) is not kind or not (name.endswith(".") or is_plain(module, kind)):
                raise ValueError(f"tts.{name} got hooks or another forward after accelerate(tts), {_READ}: {_AGAIN}")


def _read(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in root.named_modules():
        if name.partition(".")[0] not in _CALLED:
            yield name, module


def _children(module: nn.Module) -> tuple:
    return tuple(child for name, child in module._modules.items() if name not in _CALLED)


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _described(root: str, name: str, module: nn.Module, packages: set[str]) -> str:
    where = f"tts.{root}.{name}" if name else f"tts.{root}"
    if _package(type(module)) not in packages:
        return f"{where} is a {type(module).__name__} of {type(module).__module__}"
    return f"{where} has hooks, a forward of its own or parameters of another kind"


_READ = "and the engine reads the parameters of Tortoise's modules without calling them"
_ADVICE = "take it off (merge adapters) before accelerate(tts)"
_AGAIN = "call restore(tts), put it right, and call accelerate(tts) again"
