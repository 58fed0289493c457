"""Who takes part in a run: the process's place among the others, and its device."""

from dataclasses import dataclass

import torch
from torch import distributed


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
