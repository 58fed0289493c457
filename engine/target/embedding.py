"""The target's token embedding, replicated on every rank or sharded by rows across ranks."""

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from engine.parallel.collectives import gather_objects, gather_rows
from engine.parallel.vocab_shard import VocabShard


def gives_rows(embedding: nn.Module) -> bool:
    """Return whether an embedding returns the rows of its table unchanged; Gemma's scales them."""
    return type(embedding).forward is nn.Embedding.forward


@dataclass(frozen=True)
class TargetEmbedding:
    """A token embedding that this rank holds whole.

    weight_VD: [V, D] embedding table.
    """

    weight_VD: Tensor

    def rows(self, token_ids_T: Tensor) -> Tensor:
        """Return the embeddings of token ids, int64 [T] -> [T, D]."""
        return F.embedding(token_ids_T, self.weight_VD)

    def whole(self) -> Tensor:
        """Return the whole table, [V, D]."""
        return self.weight_VD


@dataclass(frozen=True)
class SharedEmbedding:
    """A token embedding sharded by rows across the ranks of a group.

    weight_VD: this rank's rows of the embedding table. own: which rows these are.
    Every method is a collective of the group.
    """

    weight_VD: Tensor
    own: VocabShard

    def rows(self, token_ids_T: Tensor) -> Tensor:
        """Return embeddings of this rank's token ids, int64 [T] -> [T, D]; T may differ by rank."""
        counts_R = gather_objects(len(token_ids_T), self.own.group)
        return self.own.look_up(partial(F.embedding, weight=self.weight_VD), token_ids_T, counts_R)

    def whole(self) -> Tensor:
        """Return the whole table, [V, D], on every rank."""
        return gather_rows(self.weight_VD, 0, self.own.counts_R, self.own.group)
