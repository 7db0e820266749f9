"""Atomic operations (PTX ISA, "Parallel Synchronization and Communication Instructions": atom, red)."""

import numpy as np

_NEW = {
    "add": lambda old, a, *_: old + a,
    "min": lambda old, a, *_: min(old, a),
    "max": lambda old, a, *_: max(old, a),
    "exch": lambda old, a, *_: a,
    "and": lambda old, a, *_: old & a,
    "or": lambda old, a, *_: old | a,
    "xor": lambda old, a, *_: old ^ a,
    "cas": lambda old, a, b: b if old == a else old,
    "inc": lambda old, a, *_: type(old)(0) if old >= a else old + type(old)(1),
    "dec": lambda old, a, *_: a if old == 0 or old > a else old - type(old)(1),
}


def perform(view, places, lanes, name, kind, values, done):
    """Perform an operation, and return the former value at each thread's place; `done(lane)` is called for each."""
    result = np.zeros(len(places), kind)
    for lane in lanes:
        at = places[lane]
        result[lane] = old = view[at]
        view[at] = _NEW[name](old, *(value[lane] for value in values))
        done(lane)
    return result
