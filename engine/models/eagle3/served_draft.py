"""An EAGLE-3 draft as a server runs it: with a vocabulary map and an embedding table."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from engine.batch import MicroBatch
from engine.config.tree_shape import TreeShape
from engine.models.draft_method import ServedDraft
from engine.models.drafter import Drafter, TargetReply
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_decoder import DecodingWeights
from engine.models.eagle3.drafts_along import propose_along
from engine.models.eagle3.tree_drafter import TreeDrafter
from engine.models.eagle3.unroll import unroll
from engine.models.vocab_map import VocabMap


@dataclass(frozen=True)
class ServedEagle3(ServedDraft):
    """An EAGLE-3 draft ready to propose tokens: model, vocabulary map and embedding table.

    embed_weight_VD: [V, D], in the draft's width; the target's table if the widths agree.
    """

    model: Eagle3Draft
    vocab_map: VocabMap
    embed_weight_VD: torch.Tensor

    def to(self, dtype: torch.dtype) -> "ServedEagle3":
        """Return a copy that computes in `dtype`."""
        return ServedEagle3(copy.deepcopy(self.model).to(dtype), self.vocab_map, self.embed_weight_VD.to(dtype))

    def embed(self, token_ids_Q: torch.Tensor) -> torch.Tensor:
        """Look up embeddings [Q, D] of target token ids, int64 [Q]."""
        return nn.functional.embedding(token_ids_Q, self.embed_weight_VD)

    @cached_property
    def decoding_weights(self) -> DecodingWeights:
        """What `TreeDrafter` reads: a copy of most weights of the layers, made when it is first used."""
        return DecodingWeights(self)

    def best_id(self, logits_QU: torch.Tensor) -> torch.Tensor:
        """Return the most likely target token id of each row, int64 [Q]."""
        return self.vocab_map.target_ids_U[logits_QU.argmax(-1)]

    def best_ids(self, logits_QU: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the `count` most likely tokens of each row, the most likely one first.

        Returns their probabilities, fp32 [Q, count], and their target token ids, int64 [Q, count].
        """
        probability_QK, draft_id_QK = logits_QU.float().softmax(-1).topk(count)
        return probability_QK, self.vocab_map.target_ids_U[draft_id_QK]

    def drafter(self, shape: TreeShape) -> Drafter:
        """Return a new drafter for one prompt."""
        return TreeDrafter(self, shape)

    def propose_along(self, replies: Sequence[TargetReply], shape: TreeShape, max_tokens: int) -> Sequence[Drafter]:
        """Return one drafter per reply, which drafts from all of its tokens at once."""
        return propose_along(self, replies, shape, max_tokens)

    def propose_shapes(
        self, replies: Sequence[TargetReply], shapes: Sequence[TreeShape], max_tokens: int
    ) -> Iterator[tuple[TreeShape, Sequence[Drafter]]]:
        """Yield the drafters of each shape. The draft runs once per `topk` and rule, for the largest number of steps."""
        kinds = dict.fromkeys((shape.topk, shape.rule) for shape in shapes)
        for kind in kinds:
            own = [shape for shape in shapes if (shape.topk, shape.rule) == kind]
            whole = propose_along(self, replies, max(own, key=lambda shape: shape.num_steps), max_tokens)
            for shape in own:
                yield shape, [drafter.reshaped(shape) for drafter in whole]

    @torch.no_grad()
    def logits(self, micro: MicroBatch) -> torch.Tensor:
        """Compute the logits of every row, [S, T, U], from the draft's own embedding table."""
        embedded = replace(micro, embed_TD=self.embed(micro.batch.input_ids_T))
        outputs = unroll(self.model, embedded, steps=micro.allowed_ST.shape[0])
        return torch.stack([self.model.logits(output_TD) for output_TD in outputs])
