"""The right result of a call, and the registry of the references that compute it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

LONGEST_BLOCK = 512  # addends that a kernel adds one after the other; untested on other devices than CPUs


@dataclass(frozen=True)
class Expected:
    """The right result of one output. It may be off by `roundings` roundings of `scale`, and by that of the result."""

    value: Any
    scale: Any = 0.0
    """Sum of the magnitudes of what is added up, of the shape of `value`."""
    roundings: float = 0.0
    """In the precision in which the operator computes: float32 for bfloat16."""
    stored: float = 0.0
    """Roundings of `scale` in the precision of the inputs, where a kernel stores intermediate results in it."""


Reference = Callable[..., Expected | Sequence[Expected | None]]
R = TypeVar("R", bound=Reference)
REFERENCES: dict[str, Reference] = {}
"""By the operator's name in aten, without the underscore of those that work in place."""
WITHOUT_VALUE = frozenset({"bernoulli", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "native_dropout", "normal", "rand", "rand_like", "randint", "randn", "randn_like", "random", "uniform", "set",
    "resize"})  # fmt: skip
"""Operators whose result is random, or memory that nothing was written to."""


def reference(*names: str) -> Callable[[R], R]:
    def register(function: R) -> R:
        REFERENCES.update(dict.fromkeys(names or (function.__name__.strip("_"),), function))
        return function

    return register


def sum_of(length: float) -> float:
    """Roundings that a sum of `length` addends may be off by, in any order."""
    # Equal addends round alike, so within a block their errors really add up.
    return 8 + min(length, LONGEST_BLOCK + 4 * math.sqrt(length))
