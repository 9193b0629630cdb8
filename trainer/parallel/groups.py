"""A replica group of a quorum: processes that share one copy of the model, and are one member together.

Each process has a place in its group and the shards of that place. In a group, FSDP2 gathers and scatters; between
groups, the processes of one place reduce their shards. A process that dies takes its group with it, since its shards
are incomplete without it: inside a group nothing is mended, and its processes need only decide alike. The first one
alone is connected with the arbiter.
"""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.parallel import elastic
from trainer.parallel.membership import JobOver, Membership
from trainer.parallel.protocol import Epoch, Report
from trainer.parallel.sharding import FullySharded
from trainer.parallel.world import World, backend


@dataclass(frozen=True)
class Group:
    """The group that this process belongs to: by default itself alone."""

    world: World = field(default_factory=lambda: World(0, 1, torch.device("cpu")))

    @property
    def place(self) -> int:
        """Number of this process in the group, and so of the shards that it holds."""
        return self.world.rank

    @property
    def size(self) -> int:
        return self.world.size

    def decide(self, ok: bool) -> bool:
        """True if all processes of the group say so. Collective in the group."""
        if self.size == 1:
            return ok
        failed = torch.tensor(float(not ok), device=self.world.device)
        self.world.max(failed)
        return not failed

    def share(self, micro_batches: Sequence[int]) -> tuple[Any, ...]:
        """This process's part of what the group computes: indices, and None where only the others have one left."""
        rounds = self.world.assign_micro_batches(len(micro_batches))
        return tuple(None if position is None else micro_batches[position] for position in rounds)


def join(given: elastic.Quorum, device: torch.device, timeout_seconds: float, share_gpus: bool = False) -> Group:
    """Meet the other processes of the group, which the launcher has started together with this one."""
    if given.group_size == 1:
        return Group(World(0, 1, device))
    store = dist.FileStore(str(Path(given.meeting) / "store"), given.group_size)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    dist.init_process_group(
        backend(device, share_gpus), store=store, rank=given.place, world_size=given.group_size, timeout=timeout
    )
    return Group(World(given.place, given.group_size, device))


class Shards(FullySharded):
    """The layout of the model in a group: FSDP2 over its processes. Other groups have copies of the same shards."""

    def __init__(self, of: FullySharded) -> None:
        self.__dict__.update(of.__dict__)

    def renew_buffers(self) -> None:
        pass  # what goes to other groups goes in copies

    def reduced_in_place(self) -> list[Tensor]:
        for parameter in self.parameters.values():
            if parameter.grad is None:  # nothing was computed: the others may have kept all sums of the step
                parameter.grad = torch.zeros_like(parameter)
        return [gradient for _, gradient, _ in self.gradients()]

    def reduce_gradients(self, world: World) -> None:
        cast(BetweenGroups, world).sum_replicas(self.reduced_in_place())


class BetweenGroups(Protocol):
    """The part of `quorum.EpochWorld` that shards need."""

    def sum_replicas(self, tensors: Sequence[Tensor]) -> None:
        """Sum this process's shards, in place, with those of the other groups. The backward pass has summed them over
        its own."""
        ...


class GroupMembership:
    """The membership of a group, as each of its processes sees it: `own` is that of the first one, None in the others.

    What `meet` returns is the same in all. `ended` is heard by the first one, which leaves a file for the others: they
    look for it while they wait in a collective.
    """

    def __init__(self, group: Group, meeting: Path, connect: Callable[..., Membership]) -> None:
        """`connect` connects the first process, with `epoch_ended` of `Membership`. `meeting`: a directory."""
        self._group, self._meeting, self._number = group, meeting, 0
        self._own: Membership | None = None

        def connect_first() -> tuple[int, Any]:
            self._own = connect(epoch_ended=self._note_end)
            return self._own.member, dict(self._own.facts)

        self.member, self.facts = group.world.from_main(connect_first)

    def _note_end(self, number: int) -> None:
        self._file(number).touch()

    def _file(self, number: int) -> Path:
        return self._meeting / f"epoch-{number}-ended"

    @property
    def ended(self) -> bool:
        return self._own.ended if self._own is not None else self._file(self._number).exists()

    @property
    def change_wanted(self) -> bool:
        return self._own is not None and self._own.change_wanted

    def meet(self, report: Report, waiting: Callable[[], None] = lambda: None) -> Epoch:
        world = self._group.world
        have = sorted(index for held in world.agree(lambda: report.have) for index in held)

        def still_waiting() -> None:
            waiting()
            world.report_progress()

        def meet_first() -> Epoch | JobOver:
            assert self._own is not None
            try:
                return self._own.meet(replace(report, have=tuple(have)), still_waiting)
            except JobOver as over:
                return over

        met = world.from_main(meet_first)
        if isinstance(met, JobOver):
            raise met
        self._number = met.number
        return met

    def committed(self, step: int) -> None:
        if self._own is not None:
            self._own.committed(step)

    def at(self, place: str, step: int) -> None:
        if self._own is not None:
            self._own.at(place, step)

    def heartbeat(self, place: str, step: int) -> None:
        if self._own is not None:
            self._own.heartbeat(place, step)

    def leave(self, status: str, reason: str = "") -> None:
        if self._own is not None:
            self._own.leave(status, reason)

    def close(self) -> None:
        if self._own is not None:
            self._own.close()
