"""Messages between clusters that live and die apart: each is a file, written once and kept until nobody can need it.

A cluster's work is a function of the config. Begun again from a checkpoint, it sends the same messages in the same
order, wherever it runs and however often: so a message is named by the step, its number in the step, and the cluster
that gives it. A cluster that comes back finds what the others have said meanwhile, and catches up without waiting for
them. One that never was away finds the messages of the dead as if they lived. Nobody has to know who died.

    RUN/islands/post-3f2a/step-00000060/02-1     message number 2 of step 60, from cluster 1
                          start/00-1             of the start
"""

import contextlib
import os
import pickle
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import CorruptionError
from trainer.islands import letters
from trainer.log.events import ClusterAwaited, Event, Warned
from trainer.parallel.world import PeerLostError, World

AWAITED_SECONDS = 1.0
"""A wait for another cluster that is longer is logged when it ends."""
NOTICE_SECONDS = 30.0
"""One that is longer is told while it lasts."""
FIRST_POLL_SECONDS, POLL_SECONDS = 0.001, 0.05


class Post:
    """Messages that one cluster gives to the others, and takes from them."""

    def __init__(
        self, place: Path, cluster: int, clusters: int, patience_seconds: float,
        waiting: Callable[[int], None] = lambda step: None, report: Callable[[Event], None] = lambda event: None,
    ) -> None:  # fmt: skip
        """`place` is the directory of this job's messages. `waiting` is called while a message is waited for, with the
        step. A message that has not come after `patience_seconds` raises PeerLostError.
        """
        self.cluster, self.clusters = cluster, clusters
        self._place, self._patience_seconds, self._waiting = place, patience_seconds, waiting
        self.report = report
        self._step, self._number = 0, 0

    @property
    def has_begun(self) -> bool:
        """True from this attempt's first step on."""
        return self._step > 0

    def at(self, step: int) -> None:
        """Begin `step`, counted from 1: the messages that follow belong to it."""
        self._step, self._number = step, 0

    def next(self) -> Path:
        """Name the next message: all clusters call this in the same order."""
        self._number += 1
        return self._place / letters.directory_of(self._step) / f"{self._number:02d}"

    def give(self, name: Path, content: bytes, is_function_of_config: bool = True) -> None:
        """Give this cluster's message, unless it was given before: then that one holds.

        Raises CorruptionError if it was another one, though it is a function of the config.
        """
        path = _of(name, self.cluster)
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes() != content and is_function_of_config:
                raise CorruptionError(
                    f"cluster {self.cluster} has computed step {self._step} again, and it gives other bits to the "
                    "others than before.\n  One of the two is wrong, and what the others have made of it may be: "
                    "resume from a checkpoint before that step, on another machine."
                )
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        partial.write_bytes(content)
        try:
            os.link(partial, path)  # readers see all of it or nothing, and nobody another one
        except FileExistsError:  # another process that plays this cluster was faster
            self.give(name, content, is_function_of_config)
        partial.unlink()

    def has_given(self, name: Path) -> bool:
        return _of(name, self.cluster).exists()

    def take(self, name: Path, cluster: int) -> bytes:
        """Return a cluster's message; wait until it is there."""
        path, started, pause, said = _of(name, cluster), time.monotonic(), FIRST_POLL_SECONDS, False
        while True:
            with contextlib.suppress(FileNotFoundError):
                content = path.read_bytes()
                break
            self._waiting(self._step)
            if self._step and self._step <= letters.forgotten(self._place):
                raise PeerLostError(f"messages of step {self._step} are gone: a newer checkpoint is there by now")
            waited = time.monotonic() - started
            if waited > NOTICE_SECONDS and not said:
                said = True
                place = f"step {self._step}" if self._step else "the start"
                self.report(Warned(message=f"{place} waits for cluster {cluster}, which says nothing."))
            if waited > self._patience_seconds:
                raise PeerLostError(
                    f"cluster {cluster} has given no message for {self._patience_seconds:g} s (step {self._step})"
                )
            time.sleep(pause)
            # Unasked, a network file system may repeat for a minute that there is no such file.
            with contextlib.suppress(OSError):
                list(path.parent.iterdir())
            pause = min(POLL_SECONDS, 1.5 * pause)
        waited = time.monotonic() - started
        if waited > AWAITED_SECONDS:
            self.report(ClusterAwaited(step=self._step, cluster=cluster, seconds=round(waited, 3)))
        return content

    def forget(self, step: int) -> None:
        """Remove the messages up to `step`. A cluster that has begun before it must begin again, from a newer state."""
        letters.forget(self._place, step)


def _of(name: Path, cluster: int) -> Path:
    return name.with_name(f"{name.name}-{cluster}")


class Later(Protocol):
    """A transfer that goes on beside the steps."""

    def wait(self) -> Any:
        """Return once it has arrived."""
        ...


class Between(World):
    """One rank of each cluster; what they send may travel beside the steps."""

    def sum_later(self, tensor: Tensor) -> Later:
        """Begin the sum over clusters, in place. The caller makes it exact."""
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        assert work is not None
        return work

    def broadcast_later(self, tensor: Tensor, source: int) -> Later:
        """Begin to overwrite a tensor, in place, with that of cluster `source`."""
        work = dist.broadcast(tensor, group=self.group, group_src=source, async_op=True)
        assert work is not None
        return work


@dataclass(frozen=True)
class _Letter:
    arrived: Callable[[], None]

    def wait(self) -> None:
        self.arrived()


@dataclass(frozen=True)
class Apart(Between):
    """The first ranks of clusters that live apart, which exchange messages by `post`. Others do not call this."""

    post: Post | None = None

    def max(self, tensor: Tensor) -> None:
        self._together(tensor, torch.maximum).wait()

    def sum(self, tensor: Tensor) -> None:
        self._together(tensor, torch.add).wait()

    def sum_later(self, tensor: Tensor) -> Later:
        return self._together(tensor, torch.add)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        self.broadcast_later(tensor, source).wait()

    def broadcast_later(self, tensor: Tensor, source: int) -> Later:
        name = self._post.next()
        if source == self.rank:
            self._post.give(name, _bytes(tensor))
            return _Letter(lambda: None)
        return _Letter(lambda: _fill(tensor, self._post.take(name, source)))

    def _together(self, tensor: Tensor, combine: Callable[..., Tensor]) -> Later:
        name = self._post.next()
        self._post.give(name, _bytes(tensor))

        def arrived() -> None:
            for cluster in range(self.size):
                other = torch.empty_like(tensor)
                _fill(other, self._post.take(name, cluster))
                tensor.copy_(combine(tensor, other) if cluster else other)

        return _Letter(arrived)

    def _exchange(self, mine: Any) -> list[Any]:
        # Stop requests are in it, which are no function of the config: what was said first holds.
        name = self._post.next()
        self._post.give(name, pickle.dumps(mine), is_function_of_config=False)
        return [pickle.loads(self._post.take(name, cluster)) for cluster in range(self.size)]

    @property
    def _post(self) -> Post:
        assert self.post is not None
        return self.post


@dataclass(frozen=True)
class Together(World):
    """All ranks of clusters that live apart. The first rank of each cluster speaks for it, and tells the others.

    If that one is lost, so is its cluster: its collectives raise in the others.
    """

    within: World | None = None
    """The ranks of this rank's cluster."""
    between: Apart | None = None

    @classmethod
    def of(cls, within: World, between: Apart) -> "Together":
        rank, size = between.rank * within.size + within.rank, between.size * within.size
        return cls(rank, size, within.device, within=within, between=between)

    def max(self, tensor: Tensor) -> None:
        within, between = self._levels
        within.max(tensor)
        if within.is_main:
            between.max(tensor)
        within.broadcast(tensor, 0)

    def sum(self, tensor: Tensor) -> None:
        within, between = self._levels
        within.sum(tensor)
        if within.is_main:
            between.sum(tensor)
        within.broadcast(tensor, 0)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        within, between = self._levels
        cluster, place = divmod(source, within.size)
        if cluster == between.rank:
            within.broadcast(tensor, place)
        if within.is_main:
            between.broadcast(tensor, cluster)
        within.broadcast(tensor, 0)

    def _exchange(self, mine: Any) -> list[Any]:
        within, between = self._levels
        own = within._exchange(mine)  # pyright: ignore[reportPrivateUsage]
        all_of_all = between._exchange(own) if within.is_main else None
        (found, *_) = within._exchange(all_of_all)  # pyright: ignore[reportPrivateUsage]
        return [value for of_cluster in found for value in of_cluster]

    @property
    def _levels(self) -> tuple[World, Apart]:
        assert self.within is not None
        assert self.between is not None
        return self.within, self.between


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _fill(tensor: Tensor, content: bytes) -> None:
    tensor.copy_(torch.frombuffer(bytearray(content), dtype=tensor.dtype).view_as(tensor))


def as_bytes(parts: Sequence[Tensor]) -> Tensor:
    """Return all tensors as one flat uint8 tensor."""
    return torch.cat([part.detach().reshape(-1).contiguous().view(torch.uint8) for part in parts])


def from_bytes(content: Tensor, parts: Sequence[Tensor]) -> None:
    """Overwrite tensors, in place, with what `as_bytes` made of such ones."""
    sizes = [part.numel() * part.element_size() for part in parts]
    for part, own in zip(parts, content.split(sizes), strict=True):
        part.copy_(own.clone().view(part.dtype).view_as(part))  # a copy: a view must begin at a multiple of its width
