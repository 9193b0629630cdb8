"""The right results of torch's operators: computed by numpy in float64, with the rounding error that each may have.

A reference must not share the bug that it is to find, so none of it is torch's code, not even in another precision. A
tolerance is that of the operator and of the length of its reductions: a sum of n addends may be off by n roundings of
the sum of their magnitudes, whatever the order. Kernels add long sums in blocks; rounding errors of blocks behave as
independent ones and grow with the square root of their number (Higham & Mary 2019, SIAM J. Sci. Comput. 41(5)). An
operator that moves numbers must return them to the bit.
"""

from trainer.sentinel.operators import attention, functions, moves, softmax, sums  # noqa: F401  (they register theirs)
from trainer.sentinel.operators.expected import REFERENCES, WITHOUT_VALUE, Expected

__all__ = ["REFERENCES", "WITHOUT_VALUE", "Expected"]
