"""The test kit: error budgets, poisoned memory, inputs that tell right from wrong; its own tests plant bugs."""

from tests.kit.budget import assert_within_budget
from tests.kit.inputs import RAGGED, generator, in_int8, linear_operands, queries_keys_values, random
from tests.kit.memory import POISON, Guarded, strided
from tests.kit.pages import PagePool, Stored
from tests.kit.threads import at_threads

__all__ = [
    "POISON",
    "RAGGED",
    "Guarded",
    "PagePool",
    "Stored",
    "assert_within_budget",
    "at_threads",
    "generator",
    "in_int8",
    "linear_operands",
    "queries_keys_values",
    "random",
    "strided",
]
