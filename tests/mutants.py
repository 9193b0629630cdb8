"""Bugs that other trainers had, put back on purpose: -m tests.mutants NAME CONFIG --run RUN [--set KEY=VALUE …]

Each is a patched copy of the worker: without this module none of them exists. A campaign of faults
must catch every one of them; MUTANTS says with which faults and by what, and tests/test_mutations.py holds it to that.
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer import checkpoint, cli, loop
from trainer.checkpoint import files, loading, saving
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.data import Batches
from trainer.errors import CheckpointError
from trainer.faults.checker import ATTRIBUTED, EQUAL, KEPT, SAMPLES, STATUS
from trainer.log import events
from trainer.log.events import AttemptStarted, CheckpointFailed
from trainer.loop import Collaborators
from trainer.parallel import elastic
from trainer.step import TrainState


def moments_dropped() -> None:
    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("optim.")}

    begin, restore = saving.Saver.begin, loading.restore
    setattr(saving.Saver, "begin", lambda saver, step, tensors: begin(saver, step, without(tensors)))  # noqa: B010
    loading.restore = lambda run, tensors, *rest: restore(run, without(tensors), *rest)


def stale_after_a_resume() -> None:
    copy = saving._RankPlan.copy  # pyright: ignore[reportPrivateUsage]
    resumed, copied = [], []
    _on_resume(lambda step, run: resumed.append(step))

    def once(layout: Any, tensors: Any) -> None:
        if not (resumed and copied):
            copy(layout, tensors)
        copied.append(True)

    setattr(saving._RankPlan, "copy", once)  # noqa: B010  # pyright: ignore[reportPrivateUsage]


def data_forgotten_at_another_size() -> None:
    def shift(step: int, run: Path) -> int:
        sizes = [entry.event.world_size for entry in events.read(run) if isinstance(entry.event, AttemptStarted)]
        return -step if sizes and sizes[0] != elastic.expected_size() else 0

    _shift_data(shift)


def data_one_step_ahead() -> None:
    _shift_data(lambda step, run: 1)


def newest_before_it_is_durable() -> None:
    def stage(run: Path, step: int) -> Path:
        for older in files.committed(run):
            shutil.rmtree(older.path)
        final = files.final_path(run, step)
        final.mkdir(parents=True)
        return final

    saving.files.stage = stage
    saving.files.commit = lambda staging, final: files.sync(final)
    saving.files.discard = lambda path: None


def truncated_still_chosen() -> None:
    load = loading._failure  # pyright: ignore[reportPrivateUsage]

    def trusting(saved: Any, tensors: Any) -> None:
        reason = load(saved, tensors)
        if reason is not None:
            raise RuntimeError(reason)

    loading._refusal = lambda *_: None  # pyright: ignore[reportPrivateUsage]
    loading._failure = trusting  # pyright: ignore[reportPrivateUsage]


def a_damaged_checkpoint_is_fatal() -> None:
    agreed = loading._agreed  # pyright: ignore[reportPrivateUsage]

    def fatal(world: Any, problem: str | None) -> None:
        reason = agreed(world, problem)
        if reason is not None:
            raise CheckpointError(reason)

    loading._agreed = fatal  # pyright: ignore[reportPrivateUsage]


def a_failed_save_is_fatal() -> None:
    log = Checkpointer._record  # pyright: ignore[reportPrivateUsage]

    def fatal(checkpoints: Any, ended: list[events.Event]) -> None:
        log(checkpoints, ended)
        if any(isinstance(event, CheckpointFailed) for event in ended):
            raise RuntimeError("a save failed")

    setattr(Checkpointer, "_record", fatal)  # noqa: B010


def a_finished_run_cannot_resume() -> None:
    train = loop.train

    def forgetful(state: TrainState, collaborators: Collaborators) -> bool:
        if state.step == collaborators.context.config.budget.steps:
            raise UnboundLocalError("cannot access local variable 'stop'")
        return train(state, collaborators)

    loop.train = forgetful


def _on_resume(then: Callable[[int, Path], Any]) -> None:
    restore = checkpoint.restore

    def noted(run: Path, *rest: Any) -> checkpoint.Saved | None:
        found = restore(run, *rest)
        if found is not None:
            then(found.step, run)
        return found

    setattr(checkpoint, "restore", noted)  # noqa: B010


def _shift_data(by: Callable[[int, Path], int]) -> None:
    """Read the data of another step than the one that is trained, after a resume."""
    micro_batch, shift = Batches.micro_batch, [0]
    _on_resume(lambda step, run: shift.__setitem__(0, by(step, run)))
    setattr(Batches, "micro_batch", lambda batches, step, index: micro_batch(batches, step + shift[0], index))  # noqa: B010


@dataclass(frozen=True)
class Mutant:
    apply: Callable[[], None]
    had_by: str
    breaks: str
    """The invariant that must fail."""
    faults: tuple[str, ...]
    """Faults that bring it to light, as TOML; after a second save has begun, which has waited for the first."""
    nodes: int = 1
    """Number of nodes, of one rank each."""
    set: str = "{}"
    """Overrides of this run, as TOML."""


# Slow enough to be met from outside, and saved twice before the node leaves.
MET_OUTSIDE = "{ eval.every_steps = 1, eval.max_tokens = 1024, checkpoint.every_steps = 3 }"
KILL = '{kind = "sigkill", at_step = 16, rank = 0}'
KILLED_AGAIN = '{kind = "sigkill", at_step = 34, rank = 0}'
KILLED_SAVING = '{kind = "sigkill", at_step = 12, rank = 0, phase = "in_save_shard"}'
KILLED_AT_THE_END = '{kind = "sigkill", phase = "before_end", rank = 0}'
TRUNCATED = '{kind = "truncated_shard", at_step = 20, rank = 0}'
FLIPPED = '{kind = "flipped_shard", at_step = 27, rank = 0}'
NO_SPACE = '{kind = "no_space", at_step = 30, rank = 0}'
NODE_LEAVES = '{kind = "node_leaves", at_step = 9}'
MUTANTS = {
    mutant.apply.__name__: mutant
    for mutant in (
        Mutant(moments_dropped, "KempnerForge #114", EQUAL, (KILL,)),
        Mutant(stale_after_a_resume, "torchtitan #647", EQUAL, (KILL, KILLED_AGAIN)),
        Mutant(data_forgotten_at_another_size, "torchtitan #816", SAMPLES, (NODE_LEAVES,), nodes=2, set=MET_OUTSIDE),
        Mutant(data_one_step_ahead, "torchtitan #4686", SAMPLES, (KILL,)),
        Mutant(newest_before_it_is_durable, "KempnerForge #102", KEPT, (KILLED_SAVING,)),
        Mutant(truncated_still_chosen, "torchtitan #4011", STATUS, (TRUNCATED,)),
        Mutant(a_damaged_checkpoint_is_fatal, "torchtitan #1729", STATUS, (FLIPPED,)),
        Mutant(a_failed_save_is_fatal, "Megatron-LM #1435", ATTRIBUTED, (NO_SPACE,)),
        Mutant(a_finished_run_cannot_resume, "lingua", STATUS, (KILLED_AT_THE_END,)),
    )
}


def nothing() -> None:
    """The unchanged worker: it must pass under these faults, or a failure would not show a bug."""


EVERY_FAULT = tuple(dict.fromkeys(fault for mutant in MUTANTS.values() for fault in mutant.faults))
CONTROL = Mutant(nothing, "none", "", EVERY_FAULT, nodes=2, set=MET_OUTSIDE)
"""All of them in one run: it passes, so each list of them alone is survived without a mutant."""


def main() -> None:
    (MUTANTS | {"control": CONTROL})[sys.argv.pop(1)].apply()
    sys.argv[1:1] = ["train"]
    cli.main()


if __name__ == "__main__":
    os.environ.setdefault("WANDB_MODE", "disabled")
    main()
