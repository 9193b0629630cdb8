"""A step's reaction to non-finite or too large values. Exact sums are tested in test_exact and test_equality."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import SMOKE, settings, torchrun, with_faults
from trainer import config as configs
from trainer import job, loop, step
from trainer.data import Batches, MicroBatch
from trainer.errors import EXIT_FAILED
from trainer.exact import Grids
from trainer.log.events import StepDone
from trainer.parallel.sharding import Sharding
from trainer.parallel.world import AllRanks, StepMembers, World
from trainer.phases import Phase


@pytest.mark.parametrize(
    ("ranks", "overrides", "micro_batch"),
    [
        (1, {"data__micro_batches": 1}, 0),
        (2, {"numerics__exact": False}, 5),
        (2, {"numerics__exact": False, "parallel__strategy": "fsdp"}, 5),
    ],
    ids=["one micro-batch", "replicate", "fsdp"],
)
def test_a_gradient_that_stays_not_finite_is_named_where_nothing_is_rounded_too(
    tmp_path: Path, ranks: int, overrides: dict[str, Any], micro_batch: int
):
    """The value is named behind finite outputs, and in no other micro-batch of the same round."""
    nth = micro_batch // ranks + 1  # of the rank's own
    fault = {"kind": "nan_sample", "rank": ranks - 1, "at_step": 2, "nth": nth, "where": "gradient"}
    command = ["train", SMOKE, "--run", tmp_path / "run", *settings(**overrides), *with_faults([fault])]
    ended = torchrun(ranks, *command, module="tests.worker", check=False)
    assert ended.returncode == EXIT_FAILED
    for named in ("step 2:", f"micro-batch {micro_batch} (samples ", "gradient of blocks.0.mlp."):
        assert named in ended.stderr, ended.stderr


@pytest.mark.parametrize("passes", [[math.nan], [1e6, math.nan], [1e6, 1e5, math.inf]])
def test_a_pass_that_is_not_finite_ends_the_step_and_leaves_the_grid_as_it_was(monkeypatch, passes: list[float]):
    """First or after an overflow, in which a wider grid was tried; also after two passes that disagree."""
    grids = Grids({"matrix": torch.Size((3, 4))}, 4, 5, torch.device("cpu"))
    round_gradient = grids.rounder("matrix")
    grids.begin(counting=False)
    round_gradient(torch.ones(3, 4))
    grids.commit()
    before, remaining = grids.magnitude.clone(), iter(passes)

    def one_pass(state: Any, context: Any, members: Any) -> Any:
        value = next(remaining)
        grids.begin(counting=False)
        round_gradient(torch.full((3, 4), value))
        return lambda: step.StepResult(value, value, "", 0, None, False)

    monkeypatch.setattr(step, "_one_pass", one_pass)
    state = cast(step.TrainState, SimpleNamespace(step=1, grids=grids))
    members = StepMembers(World(0, 1, torch.device("cpu")), range(4))
    result = step.compute_gradients(state, cast(step.StepContext, None), members)
    assert not math.isfinite(result.loss)
    assert result.redone == len(passes) - 1
    assert torch.equal(grids.magnitude, before)


class Trained:
    """Steps of smoke in this process, one rank, on random tokens, with a note of what happens in which order."""

    def __init__(self, *more: str, device: str = "cpu") -> None:
        self.config = configs.load(SMOKE, ["budget.steps=20", "data.micro_batches=4", *more])
        world, data, context = World(0, 1, torch.device(device)), self.config.data, self.config.model.context
        self.state, self.notes = job.build(self.config, 320, world), list[Any]()
        tokens = np.random.default_rng(0).integers(0, 257, 2**14).astype(np.uint16)
        sizes: dict[str, Any] = {"micro_batches": data.micro_batches, "sequences": data.micro_batch_sequences}
        self.batches = Batches(tokens, seed=0, context=context, **sizes)
        self.members = AllRanks(world, data.micro_batches)
        self.context = step.StepContext(self.config, self.members, self.batches, lambda p, _: self.notes.append(p))
        none: Any = None
        self.done = list[Any]()
        self._collaborators = loop.Collaborators(self.context, self.done.append, lambda model, step: (), none)

    def take_step(self) -> StepDone:
        loop.take_step(self.state, self._collaborators)
        return self.done[-1]

    def settle(self) -> None:
        """Train until the grids fit, so that no step is computed twice; forget what was noted."""
        while self.take_step().redone:
            pass
        self.notes.clear()

    def note_cuts(self) -> None:
        """Note each micro-batch that is cut as (step, index)."""
        cut = self.batches.micro_batch

        def noted(number: int, index: int) -> MicroBatch:
            self.notes.append((number, index))
            return cut(number, index)

        vars(self.batches)["micro_batch"] = noted


def pretend_gpu(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have micro-batches cut ahead as for a GPU, and kept on the CPU."""
    monkeypatch.setattr(step, "sent", lambda tensor, device: tensor)
    vars(trained.context.feed)["_device"] = torch.device("cuda")


def test_the_next_steps_first_micro_batch_is_cut_before_the_host_waits_and_none_is_cut_twice(monkeypatch):
    ahead, plain = Trained(), Trained()
    pretend_gpu(ahead, monkeypatch)
    for trained in (ahead, plain):
        trained.settle()
        trained.note_cuts()
        assert [trained.take_step().redone for _ in range(2)] == [0, 0]
    first = plain.state.step - 2
    cuts = [(number, index) for number in (first, first + 1) for index in range(4)]
    assert [note for note in plain.notes if isinstance(note, tuple)] == cuts
    assert [note for note in ahead.notes if isinstance(note, tuple)] == [*cuts[1:], (first + 2, 0)]
    following = (first + 1, 0)
    assert ahead.notes.index(following) == ahead.notes.index(Phase.BEFORE_REDUCE) - 1
    assert plain.notes.index(following) > plain.notes.index(Phase.AFTER_UPDATE), "a CPU would compute no sooner"
    assert ahead.state.state_sha256() == plain.state.state_sha256()


def test_nothing_is_cut_for_a_step_beyond_the_last(monkeypatch):
    trained = Trained("budget.steps=2", "optim.warmup_steps=0")
    pretend_gpu(trained, monkeypatch)
    trained.note_cuts()
    for _ in range(2):
        trained.take_step()
    assert max(note for note in trained.notes if isinstance(note, tuple)) == (1, 3)


@pytest.mark.parametrize("share", [[3, 1, 0, 2], [2, 3, 1, 0], [1]])
def test_what_was_cut_ahead_is_not_used_for_another_micro_batch_where_the_share_changes(monkeypatch, share: list[int]):
    """In quorum mode a step that was interrupted goes on with whatever share the arbiter deals out."""
    ahead, plain = Trained(), Trained()
    pretend_gpu(ahead, monkeypatch)

    def compute(trained: Trained, own: Sequence[int]) -> step.StepResult:
        members = StepMembers(trained.members.world, range(4), own=own)
        return step.compute_gradients(trained.state, trained.context, members)

    for trained in (ahead, plain):
        trained.take_step()
    assert compute(ahead, share) == compute(plain, share)
    gradients = [[grad for _, grad, _ in trained.state.sharding.gradients()] for trained in (ahead, plain)]
    assert all(map(torch.equal, *gradients))


def test_gradients_that_are_added_all_at_once_train_the_same_bits(monkeypatch):
    """As on a GPU, where a kernel reads the gradients of all parameters once; also after a sum was shown and hidden."""
    plain = Trained()
    monkeypatch.setattr(Sharding, "round_with", lambda self, rounder_of: self.add_with(rounder_of.__self__.add))
    at_once = Trained()
    for _ in range(6):
        plain.take_step()
        at_once.take_step()
        assert at_once.state.state_sha256() == plain.state.state_sha256()
    sums = [[grad.clone() for _, grad, _ in trained.state.sharding.gradients()] for trained in (plain, at_once)]
    assert all(map(torch.equal, *sums))


class NotesReads(TorchDispatchMode):
    """Notes "read" whenever the host reads a number of a tensor: on a GPU it waits for all work then."""

    def __init__(self, notes: list[Any]) -> None:
        super().__init__()
        self._notes = notes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self._notes.append("read")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("exact", ["true", "false"])
def test_a_step_reads_nothing_of_the_device_before_all_of_its_work_is_under_way(monkeypatch, exact: str):
    trained = Trained(f"numerics.exact={exact}")
    trained.settle()
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: trained.notes.append("result") or tolist(tensor))
    square = step.gradient_square
    monkeypatch.setattr(step, "gradient_square", lambda state: trained.notes.append("norm") or square(state))
    with NotesReads(trained.notes):
        trained.take_step()
    start = trained.notes.index(Phase.BEFORE_REDUCE)
    assert "read" not in trained.notes[:start] and "result" not in trained.notes[:start]
    # The second is of a copy that has arrived by then.
    waits = ["read", "result"] if exact == "true" else ["result"]
    assert trained.notes[start:] == [
        Phase.BEFORE_REDUCE, Phase.AFTER_REDUCE, "norm", *waits, Phase.BEFORE_UPDATE, Phase.AFTER_UPDATE
    ]  # fmt: skip


@pytest.mark.gpu
def test_on_a_gpu_the_host_waits_once_in_a_step():
    trained = Trained('parallel.device="cuda"', device="cuda")
    trained.settle()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trained.take_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Not the notice that the mode is a prototype.
    assert sum("called a synchronizing" in str(warning.message) for warning in caught) <= 1
