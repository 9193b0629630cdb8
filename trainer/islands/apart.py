"""One cluster of several that live apart: a job of its own, which trains its islands of another job's run.

The first cluster is the run: its directory, log, evaluations and checkpoints. Each other one has a run directory below
it, with its own attempts and incidents, and begins from the run's checkpoints.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer import checkpoint
from trainer.checkpoint import memory
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.config import Config, differences
from trainer.errors import CheckpointError, RunDirectoryError
from trainer.islands.post import Post
from trainer.islands.state import IslandsState
from trainer.log import rundir
from trainer.log.events import Event
from trainer.parallel import elastic
from trainer.parallel.world import PeerLostError, World
from trainer.phases import Hook, Phase
from trainer.step import TrainState

JOB = "job"
"""File beside copies in memory: name of the directory of messages of the job that made them."""


def post_of(config: Config, heartbeat: Hook, report: Callable[[Event], None]) -> Post | None:
    """Return how this job's cluster speaks with the others; None if it is a run of its own.

    `report` takes events that this cluster alone knows.
    """
    given = elastic.apart()
    if given is None:
        return None
    # As long as ranks wait for one another in a collective: another cluster may have to be started again first.
    limits = config.elastic.step_timeout_seconds, config.elastic.startup_timeout_seconds
    patience = config.islands.inner_steps * (2 * max(limits) + 60)
    return Post(
        Path(given.post), given.cluster, given.clusters, patience,
        functools.partial(heartbeat, Phase.BEFORE_REDUCE), report,
    )  # fmt: skip


def check_machines(post: Post, ranks: World, computes_with: Mapping[str, str], accepts: bool) -> None:
    """Raise RunDirectoryError if this cluster computes with something else than the first one, unless that is accepted.

    Collective in the cluster.
    """

    def compare() -> list[str]:
        name = post.next()
        post.give(name, json.dumps(dict(computes_with)).encode(), is_function_of_config=False)
        return differences(json.loads(post.take(name, 0)), computes_with)

    if (lines := ranks.from_main(compare)) and not accepts:
        listed = "".join(f"    {line}\n" for line in lines)
        raise RunDirectoryError(
            f"cluster {post.cluster} was not started: it computes with something else than cluster 0:\n{listed}"
            "  Any cluster may compute any island, so bits would depend on which one does. Use the same on all nodes "
            "(toprope, torch, kind of machine), or accept other bits with --accept-other-bits."
        )


class ApartCheckpointer(Checkpointer):
    """Saves and restores the state of a run whose clusters live apart: all read checkpoints, the first one writes them.

    A save is a meeting: the first cluster must have the islands of all.
    """

    def __init__(self, post: Post, run: Path, world: World, facts: dict[str, Any], *more: Any) -> None:
        """As of a Checkpointer; `run` is this cluster's own run directory."""
        given = elastic.apart()
        assert given is not None
        self._post, self._is_first = post, post.cluster == 0
        self._gathered_step = -1
        if not self._is_first:  # the first one has written it: all have met since
            run = Path(given.run)
            facts = facts | {"run_id": rundir.read(run)["run_id"]}
        super().__init__(run, world, facts, *more)
        self._job = Path(given.post).name

    def restore(self, state: TrainState) -> str:
        name, post, ranks = self._post.next(), self._post, self._world
        if self._is_first:
            state_from = super().restore(state)

            def begin() -> int:
                post.give(name, str(state.step).encode(), is_function_of_config=False)
                return int(post.take(name, 0))

            self._check_begun(state.step, ranks.from_main(begin))
            return state_from
        begun_at, is_begun = ranks.from_main(lambda: (int(post.take(name, 0)), post.has_given(name)))
        if not is_begun:
            # The job begins, with the state that the first cluster has found intact; nobody has gone on from it yet.
            saved = self._of_step(begun_at) if begun_at else None
            if saved is not None:
                checkpoint.load(saved, state.tensors())
            ranks.from_main(lambda: post.give(name, b""))
        else:
            saved = checkpoint.restore(
                self._run, state.tensors(), ranks, self._identity["fingerprint"], self._log.append, self._hook,
                self._identity["run_id"], ranks.from_main(lambda: self._in_memory),
            )  # fmt: skip
        self._check_begun(saved.step if saved else 0, begun_at)
        if saved is None:
            return ""
        state.restored(saved.step)
        return "disk" if saved.path.is_relative_to(checkpoint.directory(self._run)) else "memory"

    def _check_begun(self, step: int, begun_at: int) -> None:
        if step < begun_at:
            raise CheckpointError(
                f"the job has begun from step {begun_at}, and the newest intact state here is of step {step}: no "
                "cluster has messages of the steps between.\n  End all launchers and start them again."
            )

    @property
    def _in_memory(self) -> Path | None:
        """The place of this job's copies. Those of an earlier job may be of steps of which this one has no messages."""
        with contextlib.suppress(OSError, ValueError):
            if (self._memory_place / JOB).read_text(encoding="utf-8") == self._job:
                return self._memory_place
        return None

    def _open_memory(self, state: TrainState) -> None:
        is_main = self._world.is_main
        if is_main and self._in_memory is None:
            memory.discard(self._memory_place)
        super()._open_memory(state)
        if is_main and self._copier is not None:
            with contextlib.suppress(OSError):  # without the mark, a restart begins from the disk
                (self._memory_place / JOB).write_text(self._job, encoding="utf-8")

    def _of_step(self, step: int) -> checkpoint.Saved:
        for saved in checkpoint.committed(self._run):
            if saved.step == step:
                return saved
        raise PeerLostError(f"the checkpoint of step {step}, from which the first cluster has begun, is not there")

    def reserve(self, state: TrainState) -> None:
        if self._is_first:
            super().reserve(state)

    def save(self, state: TrainState) -> None:
        self._gather(state)
        if self._is_first:
            super().save(state)

    def keep(self, state: TrainState) -> None:
        self._gather(state)
        if self._is_first:
            super().keep(state)

    def _gather(self, state: TrainState) -> None:
        assert isinstance(state, IslandsState)
        # Before the first step, what was restored is all there, and the others may have begun elsewhere.
        if self._post.has_begun and self._gathered_step != state.step:  # a copy and a save may be due in one step
            self._gathered_step = state.step
            state.gather(self._is_first or state.step == state.exchange.last_step)

    def poll(self) -> None:
        if self._is_first:
            super().poll()

    def finish(self, state: TrainState) -> None:
        # The others need not wait: if the first one dies now, it is begun again, and finds their last messages.
        if self._is_first:
            super().finish(state)

    def _record(self, ended: list[Event]) -> None:
        before = self._durable_step
        super()._record(ended)
        if (
            self._world.is_main and 0 < before < self._durable_step
        ):  # whoever finds the newest one damaged begins from the one before
            self._post.forget(before)
