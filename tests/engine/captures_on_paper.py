"""Captures on a CPU, for tests of what surrounds them: a graph is the call that it would launch again."""

from functools import partial
from types import SimpleNamespace
from weakref import WeakMethod

from clvp_fast.engine import generation
from clvp_fast.engine.captures import Captures
from clvp_fast.engine.runner import Runner


def capture_on_paper(monkeypatch) -> list[tuple]:
    """Let runners capture; return a list that gets ("launched" | "captured" | "replayed", name of the call)."""
    happened, replaying = [], []
    init, step = Runner.__init__, Runner._step

    def capturing(self, *args, capture_late=False, **options):
        init(self, *args, **options)
        self._captures, self._graphs.late = True, capture_late

    def launch(self, rows, **shortcuts):
        if not replaying:
            happened.append(("launched", rows))
        step(self, rows, **shortcuts)

    def record(self, key, call):
        call = call if isinstance(call, partial) else partial(call)
        method, arguments, keywords = WeakMethod(call.func), call.args, call.keywords  # a graph holds no runner

        def replay():
            happened.append(("replayed", key))
            replaying.append(key)
            method()(*arguments, **keywords)
            replaying.pop()

        happened.append(("captured", key))
        self._graphs[key] = SimpleNamespace(replay=replay)

    monkeypatch.setattr(Runner, "__init__", capturing)
    monkeypatch.setattr(Runner, "_step", launch)
    monkeypatch.setattr(Captures, "_record", record)
    monkeypatch.setattr(generation, "_device_bytes", lambda device: 1 << 40)
    return happened
