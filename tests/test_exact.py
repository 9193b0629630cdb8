"""The arithmetic promise: what is rounded onto the grid adds up to the same bits in every order and grouping."""

import itertools
import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.exact import QUIET_ROW_BITS, Grids

ROWS, COLUMNS = 3, 5
SHAPES = {"matrix": torch.Size([ROWS, COLUMNS]), "vector": torch.Size([COLUMNS])}
CPU = torch.device("cpu")

# Every float32 that is finite: huge, tiny, denormal, signed zeros, and neighbours of powers of two.
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
edges = st.builds(
    lambda exponent, ulps, sign: sign * float(np.float32(2.0**exponent) * np.float32(1 + ulps * 2.0**-23)),
    st.integers(-126, 90),
    st.integers(-2, 2),
    st.sampled_from([-1.0, 1.0]),
)
values = st.one_of(edges, finite.map(lambda x: math.remainder(x, 1e28)), st.sampled_from([0.0, -0.0, 1e-45, -1e-40]))


@st.composite
def micro_batches(draw) -> list[Tensor]:
    count = draw(st.integers(1, 9))
    flat = draw(st.lists(values, min_size=count * ROWS * COLUMNS, max_size=count * ROWS * COLUMNS))
    return list(torch.tensor(flat).view(count, ROWS, COLUMNS))


def rounded(grids: Grids, gradients: list[Tensor]) -> list[Tensor]:
    """Act as a step does: try, widen once where the grid is too fine, try again."""
    rounder = grids.rounder("matrix")
    for _ in range(2):
        grids.begin(counting=False)
        result = [rounder(gradient) for gradient in gradients]
        if not grids.overflowed(lambda seen: None):
            return result
        grids.widen()
    raise AssertionError("a widened grid must fit what it was made from")


def make(count: int, headroom_bits: int = 4) -> Grids:
    return Grids(SHAPES, count, headroom_bits, CPU)


@given(micro_batches(), st.randoms())
def test_sums_of_hostile_gradients_are_the_same_bits_in_any_order_and_grouping(gradients, random):
    addends = rounded(make(len(gradients)), gradients)
    in_order = sum(addends[1:], addends[0].clone())
    shuffled = random.sample(addends, len(addends))
    cut = random.randint(0, len(addends))
    zero = torch.zeros(ROWS, COLUMNS)
    grouped = sum(shuffled[:cut], zero) + sum(shuffled[cut:], zero)
    assert torch.equal(in_order, grouped)
    exact = torch.stack(addends).double().sum(0)  # 53 bits hold 24 plus the spread of a grid: the true sum
    assert torch.equal(in_order.double(), exact), "a partial sum was rounded"


@given(micro_batches())
def test_each_entry_is_off_by_at_most_half_a_spacing(gradients):
    grids = make(len(gradients))
    addends = rounded(grids, gradients)
    spacing = grids._shift.view(-1)[:ROWS].double() / 1.5 / 2**23
    for gradient, addend in zip(gradients, addends, strict=True):
        assert ((gradient.double() - addend.double()).abs() <= spacing.unsqueeze(1) / 2).all()


@given(micro_batches(), st.integers(1, ROWS), st.integers(1, COLUMNS))
def test_square_sums_do_not_depend_on_how_rows_and_vectors_are_sharded(gradients, row_chunk, vector_chunk):
    grids = make(len(gradients))
    total = sum(rounded(grids, gradients), torch.zeros(ROWS, COLUMNS))
    _, whole = grids.square_sums("matrix", total, slice(0, ROWS))
    parts = [
        grids.square_sums("matrix", total[start : start + row_chunk], slice(start, min(ROWS, start + row_chunk)))
        for start in range(0, ROWS, row_chunk)
    ]
    assert torch.equal(whole, torch.cat([sums for _, sums in parts]))
    assert [segments.start for segments, _ in parts] == list(range(0, ROWS, row_chunk))

    grids.rounder("vector")(gradients[0][0])
    grids.widen()
    vector = grids.rounder("vector")(gradients[0][0])
    pieces = [
        grids.square_sums("vector", vector[start : start + vector_chunk], slice(start, start + vector_chunk))[1]
        for start in range(0, COLUMNS, vector_chunk)
    ]
    assert all(
        torch.equal(
            sum(order, torch.zeros(1, dtype=torch.float64)), grids.square_sums("vector", vector, slice(0, 5))[1]
        )
        for order in itertools.islice(itertools.permutations(pieces), 6)
    )


def test_plain_sums_do_depend_on_order():
    """The oracle above can fail: without rounding, it does."""
    gradients = list(torch.randn(8, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(sum(gradients, torch.zeros(64, 64)), sum(reversed(gradients), torch.zeros(64, 64)))


def test_norm_agrees_with_the_plain_norm_to_a_part_in_ten_thousand():
    gradients = list(torch.randn(8, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)))
    grids = make(8)
    total = sum(rounded(grids, gradients), torch.zeros(ROWS, COLUMNS))
    _, sums = grids.square_sums("matrix", total, slice(0, ROWS))
    plain = sum(gradients, torch.zeros(ROWS, COLUMNS)).norm().item()
    assert math.isclose(math.sqrt(sums.sum().item()), plain, rel_tol=1e-4)


def test_a_gradient_beyond_the_bound_is_noticed_and_fits_when_computed_again():
    grids = make(4)
    ordinary, burst = torch.ones(ROWS, COLUMNS), torch.full((ROWS, COLUMNS), 1000.0)
    rounded(grids, [ordinary] * 4)
    grids.commit()
    grids.begin(counting=False)
    grids.rounder("matrix")(burst)
    assert grids.overflowed(lambda seen: None)
    grids.widen()
    grids.begin(counting=False)
    assert torch.equal(grids.rounder("matrix")(burst), burst)
    assert not grids.overflowed(lambda seen: None)


def test_a_value_that_is_not_finite_shows_in_the_norm_and_is_no_overflow_even_beside_one():
    for bad in (math.nan, math.inf, -math.inf):
        grids = make(4)
        rounded(grids, [torch.ones(ROWS, COLUMNS)] * 4)
        grids.begin(counting=False)
        gradient = torch.ones(ROWS, COLUMNS)
        gradient[1, 2], gradient[0, 0] = bad, 2.0**40
        total = grids.rounder("matrix")(gradient)
        assert not grids.overflowed(lambda seen: None), "a coarser grid would not help"
        _, sums = grids.square_sums("matrix", total, slice(0, ROWS))
        assert not math.isfinite(sums.sum().item())
        assert not grids.finite


def test_bounds_follow_the_gradient_down_and_spare_quiet_rows():
    grids = make(4)
    gradient = torch.ones(ROWS, COLUMNS)
    gradient[2] = 2.0**-40
    rounded(grids, [gradient] * 4)
    grids.commit()
    before = grids._bound.clone()
    assert before[2] == before[0] * 2.0**-QUIET_ROW_BITS, "a sleeping row may wake up to 2^-6 of the loudest unnoticed"
    for _ in range(100):
        rounded(grids, [gradient / 1024] * 4)
        grids.commit()
    assert (grids._bound[:ROWS] < before[:ROWS]).all()


def test_flushed_entries_are_counted():
    grids = make(4)
    gradient = torch.ones(ROWS, COLUMNS)
    gradient[0, 0] = 2.0**-30
    gradient[0, 1] = 0.0
    rounded(grids, [gradient] * 4)
    grids.begin(counting=True)
    grids.rounder("matrix")(gradient)
    assert grids.nonzero.tolist() == [ROWS * COLUMNS - 1, ROWS * COLUMNS - 2]
