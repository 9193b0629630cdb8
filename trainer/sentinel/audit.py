"""Audits: a keyed choice of micro-batches is computed by a second rank too, and hashes of the two are compared."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.parallel.world import StepMembers
from trainer.sentinel.bits import bits_hash, combined
from trainer.sentinel.finding import Finding
from trainer.step import StepContext, TrainState, backward

Pick = tuple[int, int]
"""(round, number that chooses its auditors)."""


class Audit(NamedTuple):
    """A micro-batch that two ranks compute."""

    micro_batch: int
    owner: int
    auditor: int


class Audits:
    """This rank's part in the audits: what it computes for others, and hashes of what it computes anyway."""

    def __init__(self, seed: int, share: Fraction, micro_batches: int) -> None:
        self._seed, self._share, self._micro_batches = seed, share, micro_batches
        self.names: list[str] = []
        """The parameters, in the order of `look`'s numbers."""
        self.planned: list[Audit] = []
        """The audits of the computation under way."""
        self._round: list[int | None] = []  # the micro-batches that this rank computes in a pass
        self._position = 0
        self._audited: set[int] = set()  # this rank's micro-batches that another one audits
        self._sink: Tensor | None = None  # where hashes of the gradients under way go, by parameter
        self._sinks: dict[tuple[int, bool], Tensor] = {}  # by (micro-batch, True if it is the audit)

    def pick(self, step: int, size: int) -> list[Pick]:
        """The rounds of a step whose micro-batches `size` ranks audit: a function of the seed, the same on all of them.

        In a round every rank computes one micro-batch, and audits that of another: no rank waits for one that audits.
        """
        rounds = -(-self._micro_batches // size)
        draw = random.Random(f"{self._seed}-{step}-audit")
        count = int(self._share * rounds + Fraction(draw.random()))
        return [(number, draw.randrange(2**16)) for number in sorted(draw.sample(range(rounds), count))]

    def look(self, number: int, gradient: Tensor) -> None:
        """Take a hash of parameter `number`'s gradient, if its micro-batch is audited."""
        if self._sink is not None:
            self._sink[number] = bits_hash(gradient)

    def begin(self, members: StepMembers, picked: Iterable[Pick], trial: int, lockstep: bool) -> None:
        """Begin a computation of a step. In the second one another rank is the auditor, where there are three."""
        own, size, indices = members.world.rank, members.world.size, members.micro_batches
        self.planned, self._sinks = [], {}
        for number, chooses in picked:
            distance = 1 + (chooses + trial) % max(1, size - 1)
            share = indices[number * size : (number + 1) * size]
            self.planned += [Audit(index, owner, (owner + distance) % size) for owner, index in enumerate(share)]
        self._audited = {audit.micro_batch for audit in self.planned if audit.owner == own}
        self._round = [index for index in members.own_micro_batches() if index is not None or lockstep]
        self.end_pass()

    def compute(self, members: StepMembers, state: TrainState, context: StepContext) -> None:
        """Compute what this rank audits. The gradients that it adds to are thrown away when the pass begins."""
        own, size, lockstep = members.world.rank, members.world.size, state.sharding.needs_lockstep
        for number in range(0, len(self.planned), size):
            of_round = self.planned[number : number + size]
            mine = next((audit.micro_batch for audit in of_round if audit.auditor == own), None)
            if mine is not None or lockstep:
                if mine is not None:
                    self._open_sink(mine, audit=True)
                state.sharding.last_micro_batch(True)
                backward(state, context, mine, context.feed.take(state.step, mine or 0))
                self._sink = None

    def next_micro_batch(self) -> None:
        """This rank begins its next micro-batch of the pass."""
        index = self._round[self._position] if self._position < len(self._round) else None
        self._position += 1
        self._sink = None
        if index is not None and index in self._audited:
            self._open_sink(index, audit=False)

    def end_pass(self) -> None:
        self._sink, self._position = None, 0

    def rest(self) -> None:
        """Nothing is audited from here on, until `begin`."""
        self.planned, self._round = [], []

    def hashes(self, own: int) -> list[tuple[int, int]]:
        """By planned audit: the hash as its owner and as its auditor; 0 where rank `own` is not that."""
        return [
            (
                combined(self._sinks[index, False].tolist()) if own == owner else 0,
                combined(self._sinks[index, True].tolist()) if own == auditor else 0,
            )
            for index, owner, auditor in self.planned
        ]

    def by_parameter(self) -> dict[tuple[int, bool], list[int]]:
        """Hashes of the parameters' gradients, by (micro-batch, True if it is the audit)."""
        return {key: sink.tolist() for key, sink in self._sinks.items()}

    def _open_sink(self, index: int, audit: bool) -> None:
        self._sink = self._sinks[index, audit] = torch.zeros(len(self.names), dtype=torch.int64)


class Seen(NamedTuple):
    """An audit's outcome, as all ranks know it: the hashes of its owner and of its auditor."""

    audit: Audit
    by_owner: int
    by_auditor: int


def blame(finding: Finding, before: Sequence[Seen], after: Sequence[Seen]) -> Finding:
    """A finding of the first of two computations, with the rank that the second one shows to be wrong."""
    if finding.micro_batch is None:
        return finding
    number = [seen.audit.micro_batch for seen in before].index(finding.micro_batch)
    first, second = before[number], after[number]
    (_, owner, auditor), another = first.audit, second.audit.auditor != first.audit.auditor
    if second.by_owner == second.by_auditor:
        values = ((owner, first.by_owner), (auditor, first.by_auditor))
        wrong = [rank for rank, value in values if value != second.by_owner]
    elif another and first.by_auditor == second.by_auditor:
        wrong = [owner]
    else:
        wrong = sorted({owner, auditor})
    return replace(finding, ranks=tuple(wrong))
