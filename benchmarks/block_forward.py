"""The forward pass of a block drafter's training step on one micro-batch, as benchmarks time it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import DraftOutput, LossNorms, MicroBatch, PackedBatch, TargetOutput
from engine.models.block_drafter.backbone import BlockDraft
from engine.models.block_drafter.block_method import BlockMethod
from engine.models.vocab_map import VocabMap
from engine.target.head import TargetHead


@dataclass(frozen=True)
class OnlyHead:
    """The part of a target that a block drafter's objective reads."""

    head: TargetHead

    def head_rows(self, target_ids_U: Tensor) -> TargetHead:
        """Return the head of all tokens, which is what a block drafter asks for, without copying it."""
        return self.head


@dataclass(frozen=True)
class BlockInputs:
    """What a target gives to a block drafter for a micro-batch, on the device.

    allowed_ST: bool [S, T], rows that learn. A run finds them on the host while it reads data.
    aux_TA: auxiliary hidden states. last_hidden_TD: states after the target's last norm.
    embed: returns the embeddings of the tokens, [T, D].
    """

    batch: PackedBatch
    allowed_ST: Tensor
    aux_TA: Tensor
    last_hidden_TD: Tensor
    embed: Callable[[], Tensor]


def make_forward(draft: BlockDraft, method: BlockMethod, head: TargetHead, inputs: BlockInputs) -> Callable[[], DraftOutput]:
    """Return the forward pass of a step, with the target's head where the loss needs it."""
    device = inputs.allowed_ST.device
    objective = method.make_objective(OnlyHead(head), VocabMap.whole(len(head.weight_VD), device))
    slots_N = method.slots(inputs.allowed_ST).to(device)

    def micro_batch() -> MicroBatch:
        last_hidden_ND = inputs.last_hidden_TD[slots_N]
        stats = head.argmax_and_lse(last_hidden_ND) if method.needs_head_stats else (None, None)
        target = TargetOutput(inputs.aux_TA, slots_N, last_hidden_ND, *stats)
        return MicroBatch(inputs.batch, target, inputs.embed(), inputs.allowed_ST)

    divisor = torch.as_tensor(objective.loss_share(micro_batch()), dtype=torch.float32, device=device)
    norms = LossNorms(divisor, inputs.allowed_ST.sum(1).float())
    return lambda: objective(draft, micro_batch(), norms)
