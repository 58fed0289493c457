"""The target's token embeddings, whole, or shared by ranks row by row."""

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from engine.parallel.collectives import gather_objects, gather_rows
from engine.parallel.vocab_shard import VocabShard


def gives_rows(embedding: nn.Module) -> bool:
    """Return whether a module gives rows of its table as they are; Gemma's, for one, scales them."""
    return type(embedding).forward is nn.Embedding.forward


@dataclass(frozen=True)
class TargetEmbedding:
    """weight_VD: [V, D]."""

    weight_VD: Tensor

    def rows(self, token_ids_T: Tensor) -> Tensor:
        """int64 [T] -> [T, D]."""
        return F.embedding(token_ids_T, self.weight_VD)

    def whole(self) -> Tensor:
        """[V, D], on every rank."""
        return self.weight_VD


@dataclass(frozen=True)
class SharedEmbedding:
    """weight_VD: own rows of it. Every method is a collective of the group."""

    weight_VD: Tensor
    own: VocabShard

    def rows(self, token_ids_T: Tensor) -> Tensor:
        """As `TargetEmbedding.rows`, of own token ids; ranks may bring different numbers of them."""
        counts_R = gather_objects(len(token_ids_T), self.own.group)
        return self.own.look_up(partial(F.embedding, weight=self.weight_VD), token_ids_T, counts_R)

    def whole(self) -> Tensor:
        """[V, D], on every rank."""
        return gather_rows(self.weight_VD, 0, self.own.counts_R, self.own.group)
