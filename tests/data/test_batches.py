"""Batches: what a micro-batch holds is decided by seed, step and index alone."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.batches import Batches, EvalWindows, digest, permutation, windows

CONTEXT = 8


def tokens(n_windows: int, left_over: int = 0) -> np.ndarray:
    """Token i is i, so that a window shows where it was taken."""
    return np.arange(n_windows * CONTEXT + 1 + left_over, dtype=np.uint16)


def make(
    n_windows: int, *, seed: int = 1, micro_batches: int = 3, sequences: int = 4, left_over: int = 0, unique: int = 0
) -> Batches:
    flat = tokens(n_windows, left_over)
    return Batches(
        flat, seed=seed, context=CONTEXT, micro_batches=micro_batches, sequences=sequences, unique_tokens=unique
    )


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 9), st.integers(0, CONTEXT - 1), st.integers(0, 2**63 - 1))
def test_each_epoch_reads_each_window_once(n_windows, micro_batches, sequences, left_over, seed):
    batches = make(n_windows, seed=seed, micro_batches=micro_batches, sequences=sequences, left_over=left_over)
    assert batches.n_windows == n_windows
    steps = -(-3 * n_windows // (micro_batches * sequences))
    read = np.concatenate([m.sample_ids for step in range(steps) for m in batches.for_step(step)])
    for epoch in range(3):
        assert sorted(read[epoch * n_windows : (epoch + 1) * n_windows]) == list(range(n_windows))


def windows_read(batches: Batches, epochs: int) -> np.ndarray:
    """Windows of so many epochs, one row each."""
    positions = batches.n_windows * epochs
    steps = -(-positions // (batches.micro_batches * batches.sequences))
    read = np.concatenate([m.sample_ids for step in range(steps) for m in batches.for_step(step)])
    return read[:positions].reshape(epochs, -1)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**63 - 1))
def test_each_epoch_of_unique_text_reads_its_windows_once_and_more_text_contains_less(first, second, seed):
    less, more = sorted((first, second))
    read = [windows_read(make(40, seed=seed, unique=n * CONTEXT + 3), 3) for n in (less, more)]
    for count, rows in zip((less, more), read, strict=True):
        assert [len(set(row)) for row in rows] == [count] * 3
        assert {*rows[0]} == {*rows[1]} == {*rows[2]}
    assert {*read[0][0]} <= {*read[1][0]}


def test_all_of_the_text_as_unique_text_is_read_in_another_order_but_whole():
    assert {*windows_read(make(40, unique=40 * CONTEXT), 1)[0]} == set(range(40))
    assert {*windows_read(make(40, unique=8 * CONTEXT), 1)[0]} != {
        *windows_read(make(40, unique=8 * CONTEXT, seed=2), 1)[0]
    }, "each seed draws text of its own"


def test_epochs_and_seeds_read_in_different_orders():
    orders = [permutation(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_of_an_epoch_is_the_same_on_every_machine_and_numpy():
    assert permutation(7, 3, 10).tolist() == EXPECTED
    assert permutation(7, 3, 10).dtype == np.int64


EXPECTED = [5, 0, 6, 9, 8, 7, 4, 2, 3, 1]


def test_a_step_is_the_same_whatever_was_asked_before():
    used = make(10)
    for step in (5, 90, 2, 5):
        used.for_step(step)
    for step in (0, 5, 7):
        for again, first in zip(used.for_step(step), make(10).for_step(step), strict=True):
            assert all(np.array_equal(getattr(again, name), value) for name, value in vars(first).items())


def test_any_assignment_of_micro_batches_to_ranks_reads_the_same_samples():
    batches = make(50)
    alone = [m.sample_ids.tolist() for m in batches.for_step(4)]
    by_rank = {index: make(50).micro_batch(4, index).sample_ids.tolist() for rank in range(2) for index in (2, 0, 1)}
    assert [by_rank[index] for index in range(3)] == alone


def test_a_step_that_straddles_epochs_holds_the_end_of_one_and_the_start_of_the_next():
    batches = make(10, micro_batches=1, sequences=4)
    (micro_batch,) = batches.for_step(2)
    expected = [*permutation(1, 0, 10)[8:], *permutation(1, 1, 10)[:2]]
    assert micro_batch.sample_ids.tolist() == expected


def test_targets_are_the_inputs_one_token_later():
    (micro_batch, *_) = make(10, left_over=3).for_step(0)
    assert micro_batch.inputs.shape == micro_batch.targets.shape == (4, CONTEXT)
    assert micro_batch.inputs.dtype == micro_batch.targets.dtype == micro_batch.sample_ids.dtype == np.int64
    assert np.array_equal(micro_batch.inputs[:, 0], micro_batch.sample_ids * CONTEXT)
    assert np.array_equal(micro_batch.targets, micro_batch.inputs + 1)


def test_a_digest_passes_through_a_float64_unchanged():
    ids = np.array([1, 2, 3])
    value = digest(ids)
    assert value == int.from_bytes(hashlib.sha256(ids.astype("<i8").tobytes()).digest()[:6], "big")
    assert int(np.float64(value)) == value < 2**48
    assert digest(np.array([3, 2, 1])) != value


@given(st.integers(2, 400), st.integers(1, 5), st.integers(1, 200))
def test_evaluation_windows_do_not_overlap_and_spread_over_the_set(n_tokens, sequences, max_tokens):
    flat = np.arange(n_tokens, dtype=np.uint16)
    evaluation = EvalWindows(flat, context=CONTEXT, sequences=sequences, max_tokens=max_tokens)
    pairs = [evaluation.batch(i) for i in range(len(evaluation))]
    targets = np.concatenate([targets.ravel() for _, targets in pairs])
    assert len(set(targets.tolist())) == len(targets) == evaluation.n_tokens
    assert all(np.array_equal(inputs + 1, targets) and len(inputs) <= sequences for inputs, targets in pairs)
    assert len(targets) <= max(max_tokens, CONTEXT)
    possible = (n_tokens - 1) // CONTEXT * CONTEXT or n_tokens - 1
    assert len(targets) == min(possible, max(max_tokens // CONTEXT, 1) * CONTEXT)


def test_evaluation_reads_from_begin_to_end_of_a_large_set():
    evaluation = EvalWindows(tokens(100), context=CONTEXT, sequences=5, max_tokens=10 * CONTEXT)
    firsts = np.concatenate([evaluation.batch(i)[0][:, 0] for i in range(len(evaluation))]) // CONTEXT
    assert firsts.tolist() == list(range(0, 100, 10))


def test_the_last_evaluation_batch_may_be_smaller_and_a_short_set_is_one_short_window():
    evaluation = EvalWindows(tokens(7), context=CONTEXT, sequences=3, max_tokens=1000)
    assert [len(evaluation.batch(i)[0]) for i in range(len(evaluation))] == [3, 3, 1]
    short = EvalWindows(np.array([5, 6, 7], dtype=np.uint32), context=CONTEXT, sequences=3, max_tokens=1000)
    assert [array.tolist() for array in short.batch(0)] == [[[5, 6]], [[6, 7]]]


def test_an_evaluation_digest_names_the_tokens_that_are_scored():
    def of(array: np.ndarray, max_tokens: int = 1000) -> str:
        return EvalWindows(array, context=CONTEXT, sequences=3, max_tokens=max_tokens).digest

    changed = tokens(7)
    changed[20] = 0
    assert of(tokens(7)) == of(tokens(7).astype(np.uint32)) != of(changed)
    assert of(tokens(7)) != of(tokens(7), max_tokens=16)


def test_windows_copy_nothing():
    flat = tokens(1000)
    assert np.shares_memory(windows(flat, CONTEXT), flat)


@pytest.mark.parametrize(("step", "index"), [(-1, 0), (0, 3), (0, -1)])
def test_a_micro_batch_that_no_step_has_is_a_bug(step, index):
    with pytest.raises(AssertionError):
        make(10).micro_batch(step, index)
