"""Copies in the memory of several machines: each keeps the shards of its own ranks, and those of the machine before it.

    machine 0: its own shards, and those of machine 2
    machine 1: its own shards, and those of machine 0        so any one machine may die with all that it holds
    machine 2: its own shards, and those of machine 1

Files travel over the gloo group of the ranks, from one memory to the other. Every machine has a manifest of all files.
Before a start, whatever a machine lacks of the newest copy comes from one that has it (`gather`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint import files
from trainer.errors import CheckpointError
from trainer.files import json_sha256, write
from trainer.parallel.world import World

PIECE_BYTES = 64 * 2**20
"""So much of a file is sent at once: progress is seen after each piece."""


@dataclass(frozen=True)
class Machines:
    """Ranks that see the same memory, by machine. Machines are numbered in the order of their first ranks."""

    of_rank: tuple[int, ...]
    """By rank: the number of its machine."""

    @classmethod
    def told_by(cls, tokens: Sequence[str]) -> "Machines":
        """`tokens`, by rank: what it reads in its memory."""
        order = list(dict.fromkeys(tokens))
        return cls(tuple(order.index(token) for token in tokens))

    @property
    def count(self) -> int:
        return max(self.of_rank) + 1

    def ranks(self, machine: int) -> list[int]:
        return [rank for rank, its_own in enumerate(self.of_rank) if its_own == machine]

    def leader(self, rank: int) -> int:
        """The first rank on the machine of a rank: it makes the directories there, and names them at the end."""
        return self.of_rank.index(self.of_rank[rank])

    def keeper(self, rank: int) -> int:
        """The rank of the next machine that keeps a copy of this one's shard."""
        own, following = self.ranks(self.of_rank[rank]), self.ranks((self.of_rank[rank] + 1) % self.count)
        return following[own.index(rank) % len(following)]


class Move(NamedTuple):
    """A file that one rank reads in its memory, and another one writes into its own."""

    name: str
    bytes: int
    sender: int
    receiver: int


def move(moves: Sequence[Move], directory: Path, world: World, progress: Callable[[], None] = lambda: None) -> str:
    """Do these moves between the ranks' own `directory`. Collective; all ranks know the same moves.

    Returns why a file could not be read or written here, or "": the peers are not left waiting.
    """
    problem = ""
    for begin in range(0, max((m.bytes for m in moves), default=0) or 1, PIECE_BYTES):
        works: list[Any] = []
        received: list[tuple[Path, Tensor]] = []
        for tag, m in enumerate(moves):
            size, path = min(m.bytes - begin, PIECE_BYTES), directory / m.name
            if size <= 0 and begin:
                continue
            if world.rank == m.sender and size:
                piece, why = _read(path, begin, size)
                problem = problem or why
                works.append(dist.isend(piece, group=world.group, group_dst=m.receiver, tag=tag))
            elif world.rank == m.receiver:
                received.append((path, piece := torch.empty(max(size, 0), dtype=torch.uint8)))
                if size:
                    works.append(dist.irecv(piece, group=world.group, group_src=m.sender, tag=tag))
        for work in works:
            work.wait()
        for path, piece in received:
            try:
                with path.open("ab" if begin else "wb") as file:
                    file.write(piece.numpy().tobytes())
            except OSError as error:
                problem = problem or files.one_line(error)
        progress()
    return problem


def _read(path: Path, begin: int, size: int) -> tuple[Tensor, str]:
    """Part of a file, or zeros and why it cannot be read."""
    why = f"{path.name} is shorter than it was"
    try:
        content = torch.from_numpy(np.fromfile(path, np.uint8, size, offset=begin))
        if len(content) == size:
            return content, ""
    except OSError as error:
        why = files.one_line(error)
    return torch.zeros(size, dtype=torch.uint8), why


class _Copy(NamedTuple):
    """One machine's part of a copy."""

    step: int
    digest: str
    """Digest of the list of all its files. Copies of one step that differ in it are of different attempts."""
    manifest: bytes
    listed: dict[str, dict[str, Any]]
    intact: frozenset[str]


def gather(place: Path, machines: Machines, world: World, above_step: int = -1) -> None:
    """Give every machine all files of the newest copy that is whole when the machines are taken together. Collective.

    Other copies are removed: a start then finds the same in each memory. So is what is not newer than `above_step`,
    which is on disk.
    """
    leads = machines.leader(world.rank) == world.rank
    held = world.agree(lambda: _held(place) if leads else [])
    by_machine = [held[machines.ranks(machine)[0]] for machine in range(machines.count)]
    chosen = _newest_whole([copy for copies in by_machine for copy in copies if copy.step > above_step])
    mine = next((c for c in held[world.rank] if chosen and c.digest == chosen.digest), None)
    if leads:
        for saved in files.committed(place):
            if mine is None or saved.step != mine.step:
                files.discard(saved.path)
    if chosen is not None:
        moves = _missing(chosen, by_machine, machines)
        directory = files.final_path(place, chosen.step)
        world.agree(lambda: _make(directory) if leads else None)
        problem = move(moves, directory, world)
        if leads:
            _complete(directory, chosen, [m.name for m in moves if m.receiver == world.rank], problem)
    world.agree(lambda: None)  # nobody reads a memory before it is whole


def _held(place: Path) -> list[_Copy]:
    copies = []
    for saved in files.committed(place):
        try:
            listed = files.read_manifest(saved)["files"]
            content = (saved.path / files.MANIFEST).read_bytes()
        except (CheckpointError, OSError):
            continue
        intact = frozenset(name for name in listed if not files.verify(saved, names=[name]))
        copies.append(_Copy(saved.step, json_sha256([saved.step, listed]), content, listed, intact))
    return copies


def _newest_whole(copies: Sequence[_Copy]) -> _Copy | None:
    for copy in sorted(copies, key=lambda copy: copy.step, reverse=True):
        found = frozenset[str]().union(*(other.intact for other in copies if other.digest == copy.digest))
        if found == copy.listed.keys():
            return copy
    return None


def _missing(chosen: _Copy, by_machine: Sequence[Sequence[_Copy]], machines: Machines) -> list[Move]:
    """By which moves every machine gets what it lacks: each file from the first machine that has it."""
    intact = [
        frozenset[str]().union(*(copy.intact for copy in copies if copy.digest == chosen.digest))
        for copies in by_machine
    ]
    leaders = [machines.ranks(machine)[0] for machine in range(machines.count)]
    giver = {name: leaders[m] for m in reversed(range(machines.count)) for name in intact[m]}
    return [
        Move(name, chosen.listed[name]["bytes"], giver[name], leader)
        for leader, own in zip(leaders, intact, strict=True)
        for name in sorted(chosen.listed.keys() - own)
    ]


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # writing into it fails too, and that is dealt with


def _complete(directory: Path, chosen: _Copy, received: Sequence[str], problem: str) -> None:
    """Describe what was received; remove all of it if it isn't what was sent: the start then takes the disk."""
    try:
        if not problem and received:
            write(directory / files.MANIFEST, chosen.manifest)
            problem = "; ".join(files.verify(files.open_saved(directory), names=received))
    except OSError as error:
        problem = files.one_line(error)
    if problem:
        files.discard(directory)
