"""Who takes part in a run: the process's place among the others, its device, and with whom it runs one target."""

from dataclasses import dataclass

import torch
from torch import distributed

from engine.config import divisors


@dataclass(frozen=True)
class World:
    """One process of a job.

    rank: 0 .. size - 1 over all nodes; local_rank: 0 .. local_size - 1 on this node.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def alone(cls) -> "World":
        """A job of one process."""
        return cls(rank=0, size=1, local_rank=0, local_size=1)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all ranks; every rank gets the result."""
        values = values.clone()
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def send_from_main(self, values: torch.Tensor) -> None:
        """Give every rank what rank 0 has, in place."""
        if self.size > 1:
            distributed.broadcast(values, src=0)

    def barrier(self) -> None:
        if self.size > 1:
            distributed.barrier()


@dataclass(frozen=True)
class Group:
    """Ranks that work on something together: how many, which of them this one is, and what their collectives run over.

    process_group: None for a group of one, which has no collectives.
    """

    size: int = 1
    rank: int = 0
    process_group: distributed.ProcessGroup | None = None


@dataclass(frozen=True)
class TargetMesh:
    """With whom a rank runs the target. tp: shares attention, dense MLPs and the head. ep: shares the experts.

    Ranks of a group follow one another. Each rank brings micro-batches of its own and gets their hidden states back.
    """

    tp: Group = Group()
    ep: Group = Group()

    @classmethod
    def make(cls, world: World, tp_size: int, ep_size: int) -> "TargetMesh":
        """The groups of a rank; a collective of all ranks, which must ask for the same sizes.

        Raises ValueError, naming sizes that would do, if they do not divide the world or each other.
        """
        check_sizes(world.size, tp_size, ep_size)
        return cls(_own_group(world, tp_size), _own_group(world, ep_size))

    @property
    def whole(self) -> Group:
        """The ranks that one copy of the target takes: one of the groups holds the other."""
        return max(self.tp, self.ep, key=lambda group: group.size)

    @property
    def size(self) -> int:
        return self.whole.size


ALONE = TargetMesh()


def check_sizes(num_ranks: int, tp_size: int, ep_size: int) -> None:
    """Raises ValueError, naming sizes that would do, unless both divide the ranks and one of them the other."""
    fitting = divisors(num_ranks)
    for name, size in (("tp_size", tp_size), ("ep_size", ep_size)):
        if size not in fitting:
            raise ValueError(f"parallel.{name}={size} does not divide {num_ranks} ranks; use one of {fitting}")
    if tp_size % ep_size and ep_size % tp_size:
        fitting = [size for size in fitting if size % tp_size == 0 or tp_size % size == 0]
        raise ValueError(f"parallel.ep_size={ep_size} and tp_size={tp_size}: one must divide the other; use one of {fitting}")


def _own_group(world: World, size: int) -> Group:
    if size == 1:
        return Group()
    groups = [distributed.new_group(range(first, first + size)) for first in range(0, world.size, size)]
    return Group(size, world.rank % size, groups[world.rank // size])
