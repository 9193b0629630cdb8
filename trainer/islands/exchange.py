"""The end of a step with islands: each moves on by its own gradient, and now and then they exchange their changes.

To the training loop this is the run's only optimizer. The run's own weights are the outer ones: those that all islands
agreed on last, and that are evaluated.

Sources: outer Nesterov step, Douillard et al. 2023 (DiLoCo, arXiv:2311.08105); fragments, overlap, mixing and 4-bit
changes, Douillard et al. 2025 (Streaming DiLoCo, arXiv:2501.18512).
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer import step
from trainer.config import Config
from trainer.islands import deltas
from trainer.islands.clusters import Clusters
from trainer.islands.post import Later
from trainer.islands.schedule import Schedule
from trainer.log.events import ChangesApplied, Event
from trainer.parallel.sharding import Sharding
from trainer.phases import Hook, Phase, no_hook
from trainer.step import TrainState


@dataclass
class Travelling:
    """Changes of a fragment that are on their way."""

    scales: Mapping[str, Tensor]
    packets: list[Tensor] = field(default_factory=list)
    """The packed integers of each island; empty where the sum itself travels."""
    under_way: list[Later] = field(default_factory=list)
    sent_after: int = 0
    sent_bytes: int = 0


class Exchange(Optimizer):
    """Moves the islands of this rank and the outer weights; the latter have the same bits on all ranks.

    Outer weights and momentum are updated from the mean change Δ of the islands since they last took the outer weights:
    m ← μ·m + Δ, w ← w − η·(Δ + μ·m).
    """

    def __init__(
        self, config: Config, clusters: Clusters, sharding: Sharding, own: Mapping[int, TrainState],
        residuals: Mapping[int, Mapping[str, Tensor]],
    ) -> None:  # fmt: skip
        """`sharding` has the outer weights, `own` the states of this rank's islands by number.

        `residuals` are what rounding has left out so far, by island and parameter; empty where nothing is packed.
        """
        # Not Optimizer's own constructor: groups and moments are those of the islands' optimizers.
        self.param_groups = [
            group for island in own.values() for opt in island.optimizers for group in opt.param_groups
        ]
        self.state = defaultdict(dict)
        self._clusters, self._own, self._residuals = clusters, own, residuals
        self._travelling: dict[int, Travelling] = {}
        self._arrived: dict[int, ChangesApplied] = {}
        self.hook: Hook = no_hook
        self.report: Callable[[Event], None] = lambda event: None
        """Takes an event that all ranks know alike."""
        self._settings, self._schedule = config.islands, Schedule.of(config)
        self._outer = {name: parameter.data for name, parameter in sharding.parameters.items()}
        (self._flat,) = sharding.reduced_in_place()
        self._changes = {name: gradient for name, gradient, _ in sharding.gradients()}
        """Mean changes that have been sent and not applied yet; views of `_flat`. Complete once they have arrived."""
        self._momentum = (
            {n: torch.zeros_like(w) for n, w in self._outer.items()} if self._settings.outer_momentum else {}
        )
        self.islands, self.last_step = self._settings.count, config.budget.steps
        self._fragments = _fragments(self._outer, self._settings.fragments)
        self.completed = 0
        """Completed steps of the run."""

    def tensors(self) -> dict[str, Tensor]:
        """Outer momentum, and changes on their way: waits until they have arrived."""
        for number in list(self._travelling):  # all ranks have the same ones, in the same order
            self._wait_for(number)
        tensors = {f"outer.{name}.momentum": momentum for name, momentum in self._momentum.items()}
        if self._settings.overlap_steps:
            tensors |= {f"outer.{name}.travelling": change for name, change in self._changes.items()}
        return tensors

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the gradients of this rank's islands, then send and apply the changes that are due. Collective."""
        for island in self._own.values():
            step.apply(island)
        self.completed += 1
        for number in self._schedule.arriving(self.completed):
            self.hook(Phase.IN_RECEIVE, self.completed)
            if self._is_on_its_way(number):
                self._apply(number)
        for number in self._schedule.sent(self.completed):
            self._send(number)
            if not self._schedule.overlap_steps or self.completed == self._schedule.steps:
                self.hook(Phase.IN_RECEIVE, self.completed)
                self._apply(number, self._schedule.ends_round(number, self.completed))

    @torch.no_grad()
    def begin(self) -> None:
        """Let this rank's islands begin from the outer weights."""
        for island in self._own.values():
            for name, parameter in island.sharding.parameters.items():
                parameter.data.copy_(self._outer[name])

    def _send(self, number: int) -> None:
        """Let the changes of a fragment travel to all ranks; until then `_changes` has them in part. Collective."""
        names, kind, islands = self._fragments[number], self._settings.quantise, self._settings.count
        if not names:
            return
        travelling = self._travelling[number] = Travelling(self._scales(names), sent_after=self.completed)
        flat = self._flat_of(names).zero_()
        if kind in deltas.BITS:
            for island in range(islands):
                travelling.packets.append(self._packet(island, names, travelling.scales))
                owner = self._clusters.owner_of(island, islands)
                self._start(travelling, travelling.packets[-1], owner)
                if not island:
                    self.hook(Phase.IN_SEND, self.completed)
            return
        for island in self._own:
            for name in names:
                change = self._change(island, name)
                self._changes[name].add_(deltas.rounded(change, travelling.scales[name], kind, islands))
        self._start(travelling, flat)
        self.hook(Phase.IN_SEND, self.completed)

    def _start(self, travelling: Travelling, tensor: Tensor, owner: int | None = None) -> None:
        """Begin to sum a tensor over clusters, or to give them that of `owner`."""
        # On connections of their own: what travels beside the steps must not hold up what the ranks wait for.
        between = self._clusters.between
        if self._clusters.within.is_main and between.size > 1:
            later = between.sum_later(tensor) if owner is None else between.broadcast_later(tensor, owner)
            travelling.under_way.append(later)
            if owner in (None, between.rank):
                travelling.sent_bytes += tensor.numel() * tensor.element_size()

    def _wait_for(self, number: int) -> None:
        """Complete the mean changes of a fragment that was sent."""
        travelling, names, started = self._travelling.pop(number), self._fragments[number], time.perf_counter()
        for work in travelling.under_way:
            work.wait()
        flat, kind, within = self._flat_of(names), self._settings.quantise, self._clusters.within
        for packet in travelling.packets if within.is_main else ():
            flat.add_(deltas.unpack(packet, deltas.BITS[kind], flat.numel()))
        within.broadcast(flat, 0)
        for name in names:
            self._changes[name].mul_(travelling.scales[name] / self._settings.count)
        self._arrived[number] = ChangesApplied(
            step=0, sent_after=travelling.sent_after, fragment=number, bytes=travelling.sent_bytes,
            waited_seconds=round(time.perf_counter() - started, 4),
        )  # fmt: skip

    def _flat_of(self, names: Sequence[str]) -> Tensor:
        """Return the part of the flat buffer that holds the changes of a fragment's parameters."""
        first = self._changes[names[0]].storage_offset()
        return self._flat[first : first + sum(self._outer[name].numel() for name in names)]

    def _scales(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The distances of neighbouring values by parameter, the same for all islands. Collective."""
        zero = [torch.zeros_like(deltas.largest(self._outer[name])) for name in names]
        flat = torch.cat([part.reshape(-1) for part in zero])
        parts = flat.split([part.numel() for part in zero])
        magnitudes = {name: part.view_as(like) for name, part, like in zip(names, parts, zero, strict=True)}
        for island in self._own:
            for name, magnitude in magnitudes.items():
                torch.maximum(magnitude, deltas.largest(self._change(island, name)), out=magnitude)
        flat.nan_to_num_(nan=torch.inf)  # a maximum over ranks may drop a NaN; the next loss shows it
        self._clusters.world.max(flat)
        settings = self._settings
        return {n: deltas.scale_of(part, settings.quantise, settings.count) for n, part in magnitudes.items()}

    def _change(self, island: int, name: str) -> Tensor:
        """Return how far an island's parameter has moved, against the direction of learning, as a gradient points."""
        change = self._outer[name] - self._own[island].sharding.parameters[name].data
        residual = self._residuals.get(island, {}).get(name)
        return change if residual is None else change.add_(residual)

    def _packet(self, island: int, names: Sequence[str], scales: Mapping[str, Tensor]) -> Tensor:
        """Return an island's changes as bytes, if this rank computes it; else room for them."""
        kind, islands = self._settings.quantise, self._settings.count
        if island not in self._own:
            count = sum(self._outer[name].numel() for name in names)
            room = deltas.packed_bytes(count, deltas.BITS[kind])
            return torch.empty(room, dtype=torch.uint8, device=self._flat.device)
        integers = []
        for name in names:
            change = self._change(island, name)
            integers.append(deltas.rounded(change, scales[name], kind, islands))
            self._residuals[island][name].copy_(change.sub_(integers[-1] * scales[name]))
        return deltas.pack(torch.cat([part.reshape(-1) for part in integers]), deltas.BITS[kind])

    def _is_on_its_way(self, number: int) -> bool:
        """Wait for a fragment that was sent. False if none was: a branch may begin later than its schedule sends it.

        The outer weights are then older than what the islands have learnt. It is told by the changes alone, which are
        in the state, so that a resumed run decides alike.
        """
        if number in self._travelling:  # else it has arrived when the state was saved
            self._wait_for(number)
        return any(bool(self._changes[name].any()) for name in self._fragments[number])

    def _apply(self, number: int, whole_round: bool = True) -> None:
        """Take the outer step of a fragment that was sent, and give the new outer weights to the islands.

        A round that the end of the run has cut short ends in the mean of the islands' weights: momentum is that of
        whole rounds.
        """
        if number in self._travelling:  # else it has been waited for, or has no parameters
            self._wait_for(number)
        rate, decay, kept = self._settings.outer_learning_rate, self._settings.outer_momentum, self._settings.mixing
        if not whole_round:
            rate, decay = 1.0, 0.0
        for name in (names := self._fragments[number]):
            outer, change = self._outer[name], self._changes[name]
            # One rounding an operation: a fused one might differ between the body and the tail of a kernel.
            if decay:
                momentum = self._momentum[name].mul_(decay).add_(change)
                change = change + momentum * decay
            outer.sub_(change * rate)
            self._changes[name].zero_()
            if name == names[0]:
                self.hook(Phase.IN_OUTER_UPDATE, self.completed)
            for island in self._own.values():
                weights = island.sharding.parameters[name].data
                if kept:
                    weights.mul_(kept).add_(outer * (1 - kept))
                else:
                    weights.copy_(outer)
        if arrived := self._arrived.pop(number, None):  # else another attempt has sent it, and knows
            self.report(replace(arrived, step=self.completed))


def _fragments(weights: Mapping[str, Tensor], count: int) -> list[list[str]]:
    """Cut the parameters, in their order, into `count` fragments of about equal size; a large one may leave some empty.

    Neighbours in a fragment are neighbours in the flat buffer, so that it travels as one piece.
    """
    fragments: list[list[str]] = [[] for _ in range(count)]
    total, before = sum(tensor.numel() for tensor in weights.values()), 0
    for name, tensor in weights.items():
        middle = before + tensor.numel() / 2
        fragments[min(count - 1, int(middle * count / total))].append(name)
        before += tensor.numel()
    return fragments
