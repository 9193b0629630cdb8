"""Real clusters: ranks in groups, each of which computes some of the islands."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from trainer.islands.post import Apart, Between, Post, Together
from trainer.parallel.world import World


@dataclass(frozen=True)
class Clusters:
    """The ranks of a job as clusters of equal size, as one of them sees it.

    Ranks of a cluster hold the same islands and share their micro-batches. Changes of weights travel between the first
    ranks of the clusters alone.
    """

    world: World
    """All ranks."""
    within: World
    """Those of this rank's cluster."""
    between: Between
    """The ranks that have this one's place in their clusters; the rank in it is the number of the cluster."""
    mesh: DeviceMesh | None
    """Clusters by ranks of one; None for a job of one rank, and for clusters that live apart."""
    post: Post | None = None
    """Messages between clusters that live apart; None where clusters do not."""

    @classmethod
    def of(cls, world: World, ranks: int, post: Post | None = None) -> "Clusters":
        """Group the ranks of a job into clusters of `ranks`, which divides their number. Collective.

        With `post` the job is one cluster of several that live apart, and has `ranks` ranks.
        """
        if post is not None:
            assert world.size == ranks
            between = Apart(post.cluster, post.clusters, world.device, post=post)
            return cls(Together.of(world, between), world, between, None, post)
        if world.size == 1:
            return cls(world, world, Between(0, 1, world.device), None)
        mesh = init_device_mesh(world.device.type, (world.size // ranks, ranks), mesh_dim_names=("cluster", "rank"))
        number, place = divmod(world.rank, ranks)
        within = World(place, ranks, world.device, mesh.get_group("rank"))
        between = Between(number, world.size // ranks, world.device, mesh.get_group("cluster"))
        return cls(world, within, between, mesh)

    def owner_of(self, island: int, islands: int) -> int:
        """Return the cluster that computes an island."""
        return owner_of(island, islands, self.between.size)

    def own(self, islands: int) -> list[int]:
        """Return the islands that this rank's cluster computes."""
        return [island for island in range(islands) if self.owner_of(island, islands) == self.between.rank]

    def stacked(self, local: Tensor, islands: int) -> Tensor:
        """Return the tensor of all islands along a first dim; `local` has this cluster's, or all without a mesh."""
        if self.mesh is None:
            return local
        shape = torch.Size((islands, *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, [Shard(0), Replicate()], run_check=False, shape=shape, stride=stride
        )  # fmt: skip


def owner_of(island: int, islands: int, clusters: int) -> int:
    """Return the cluster that computes an island: they take equal runs of them, the last ones fewer or none."""
    return island // -(-islands // clusters)
