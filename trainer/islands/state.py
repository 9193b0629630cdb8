"""The state of a run with islands: the outer weights, and everything that each island must remember."""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer import config as configs
from trainer import model as models
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.islands import deltas, post
from trainer.islands.clusters import Clusters
from trainer.islands.exchange import Exchange
from trainer.islands.post import Post
from trainer.parallel.sharding import Sharding
from trainer.parallel.world import World
from trainer.step import TrainState

PREFIX = "islands."
"""Begins the names of tensors that hold one entry for each island, along their first dim."""
WEIGHTS = f"{PREFIX}model."
ALIGNED_ELEMENTS = 64
"""An island's tensors begin where a tensor of their own might: kernels may round otherwise elsewhere."""


@dataclass
class IslandsState(TrainState):
    """`model` holds the outer weights; each island has a whole `TrainState` of its own, in one cluster."""

    own: Mapping[int, TrainState]
    """Those of this rank's cluster, by number."""
    stacks: Mapping[str, Tensor]
    """The tensors of all islands, one entry each along a first dim that is sharded over the clusters."""
    exchange: Exchange
    clusters: Clusters

    def gather(self, is_reader: bool) -> None:
        """Give this cluster's islands to the others, where clusters live apart; a reader also takes theirs. Collective.

        Else nobody needs it: each rank saves and hashes what it holds.
        """
        if self.clusters.post is None:
            return
        self.exchange.tensors()  # all wait for what travels: once the save is there, its messages may be removed
        within, between = self.clusters.within, self.clusters.between
        for island in range(self.exchange.islands):
            slots = [stack[island] for stack in self.stacks.values()]
            owner = self.clusters.owner_of(island, self.exchange.islands)
            content = post.as_bytes(slots)
            letter = between.broadcast_later(content, owner) if within.is_main else None
            if is_reader and owner != between.rank:
                if letter is not None:
                    letter.wait()
                within.broadcast(content, 0)
                post.from_bytes(content, slots)

    def tensors(self) -> dict[str, Tensor]:
        """Outer weights and momentum, changes on their way, and weights, moments, grids and residuals of islands."""
        outer = {f"model.{name}": p.data for name, p in self.sharding.parameters.items()}
        return outer | self.exchange.tensors() | dict(self.stacks)

    def restored(self, step: int, missing: Collection[str] = ()) -> None:
        self.step = self.exchange.completed = step
        for island in self.own.values():
            island.moments_from = self.moments_from
            island.restored(step)
        if any(name.startswith(WEIGHTS) for name in missing):  # the state of a run without islands
            self.exchange.begin()


def build(
    config: Config, vocab_size: int, ranks: World, build_one: Callable[[Config, World], TrainState],
    letters: Post | None = None,
) -> IslandsState:  # fmt: skip
    """Build the state of step 0. `build_one` builds that of a run without islands, here of each island for itself.

    With `letters` this is one cluster of several that live apart. It has room for the islands of all: it reads whole
    checkpoints, and the first cluster writes them.
    """
    count, clusters = config.islands.count, Clusters.of(ranks, config.parallel.island_ranks, letters)
    check_alike(config, clusters.world)
    model = models.build(config, vocab_size, ranks.device)
    sharding = Sharding(model, ranks)
    own = {k: build_one(config_of(config, k), clusters.within) for k in clusters.own(count)}
    # A cluster without an island must know the shapes: it helps to read and write checkpoints.
    example = next(iter(own.values()), None) or build_one(config_of(config, 0), clusters.within)
    like = example.tensors()
    if config.islands.quantise in deltas.BITS:
        like |= {f"residual.{name}": p.data.new_zeros(p.shape) for name, p in sharding.parameters.items()}
    places = {k: place if letters is None else k for place, k in enumerate(own)}
    local = {name: _slots(len(own) if letters is None else count, tensor) for name, tensor in like.items()}
    residuals: dict[int, dict[str, Tensor]] = {}
    for k, island in own.items():
        slots = {name: stack[places[k]] for name, stack in local.items()}
        _move(island, slots)
        residuals[k] = {n.removeprefix("residual."): slot for n, slot in slots.items() if n.startswith("residual.")}
    exchange = Exchange(config, clusters, sharding, own, residuals)
    exchange.begin()
    stacks = {PREFIX + name: clusters.stacked(stack, count) for name, stack in local.items()}
    return IslandsState(0, model, sharding, [exchange], None, own, stacks, exchange, clusters)


def check_alike(config: Config, ranks: World) -> None:
    """Raise ConfigError on all ranks if one was started with another config.

    Its islands would be another run's, or it would meet the others after other steps and wait in vain.
    """
    meetings = {
        "parallel.island_ranks": config.parallel.island_ranks,
        "eval.every_steps": config.eval.every_steps,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.memory_every_steps": config.checkpoint.memory_every_steps,
    }
    own = configs.mathematics(config) | meetings
    found = ranks.agree(lambda: own)
    # A cluster that is begun again finds what it said the first time.
    for rank, settings in [*enumerate(found), (ranks.rank, own)]:
        if lines := configs.differences(found[0], settings):
            first = "rank 0" if rank else "before"
            raise ConfigError(
                [
                    f"rank {rank} was started with another config than {first}: {'; '.join(lines)}.\n"
                    "  All clusters compute islands of one run. Start them with the same config."
                ]
            )


def config_of(config: Config, island: int) -> Config:
    """Return the config of an island as a run of its own: its share of a step's micro-batches, its own dropout."""
    data = config.data.model_copy(update={"micro_batches": config.data.micro_batches // config.islands.count})
    seed = config.seed
    if island:
        seed = int.from_bytes(hashlib.sha256(repr((seed, "island", island)).encode()).digest()[:8], "big") >> 1
    return config.model_copy(update={"seed": seed, "data": data, "islands": configs.Islands()})


def _slots(count: int, like: Tensor) -> Tensor:
    """Return zeros for `count` tensors such as `like`, stacked."""
    size = like.numel()
    padded = -(-size // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS
    return like.new_zeros(count, padded)[:, :size].unflatten(1, like.shape)


def _move(island: TrainState, slots: Mapping[str, Tensor]) -> None:
    """Make an island keep its tensors in `slots` from now on."""

    def moved(name: str, tensor: Tensor) -> Tensor:
        return slots[name].copy_(tensor)

    names: dict[Tensor, str] = {parameter: name for name, parameter in island.sharding.parameters.items()}
    with torch.no_grad():
        for parameter, name in names.items():
            parameter.data = moved(f"model.{name}", parameter.data)
        for optimizer in island.optimizers:
            for parameter, moments in optimizer.state.items():
                for key, tensor in moments.items():
                    if key != "step":
                        moments[key] = moved(f"optim.{names[parameter]}.{key}", tensor)
        if island.grids is not None:
            island.grids.magnitude = moved("grids.magnitude", island.grids.magnitude)
