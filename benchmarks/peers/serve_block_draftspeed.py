"""Process that runs DraftSpeed's side of a comparison of block drafters; see side_process.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.block_forward import BlockInputs, make_forward
from benchmarks.peers.block_task import NORM_EPS, ROPE_THETA, BlockTask, BlockTaskTensors
from benchmarks.peers.side_process import read_command_line, serve
from engine.batch import PackedBatch
from engine.config.block_sections import BlockSection, ObjectiveSection
from engine.config.sections import Config, DataSection, DraftSection
from engine.host.freed_memory import keep_freed_memory
from engine.kernels import choose_kernels
from engine.models.block_drafter.backbone import BlockDraft
from engine.models.block_drafter.block_method import BlockMethod
from engine.models.method_registry import make_method
from engine.target.head import TargetHead


def method_of(task: BlockTask) -> BlockMethod:
    """Return the method with the peer's objective, which `objective.parity` states.

    It sets the divisor: the sum of the weights for SpecForge, the number of rows plus 1e-5 for
    speculators. For speculators, the label is the target's most likely token, and the weight of
    sum |p - q| is 0.45 instead of 0.9, because its total variation is half of this sum.
    """
    own: dict[str, Any] = {"markov_rank": task.markov_rank} if task.has_confidence else {}
    recipe = Config(
        data=DataSection(max_tokens=task.num_tokens),
        draft=DraftSection(method=task.method, num_layers=task.num_layers),
        block=BlockSection(size=task.block_size, mask_token_id=task.mask_token_id, **own),
        objective=ObjectiveSection(parity=task.peer, decay=task.decay),
    )
    method = make_method(recipe)
    assert isinstance(method, BlockMethod)
    return method


def make_draft(task: BlockTask, tensors: BlockTaskTensors, method: BlockMethod) -> BlockDraft:
    own: dict[str, Any] = {"markov_rank": task.markov_rank} if task.has_confidence else {}
    config = method.config_type(
        hidden_size=task.hidden_size,
        intermediate_size=task.intermediate_size,
        num_attention_heads=task.num_heads,
        num_key_value_heads=task.num_key_value_heads,
        head_dim=task.head_dim,
        num_hidden_layers=task.num_layers,
        rms_norm_eps=NORM_EPS,
        hidden_act="silu",
        max_position_embeddings=2 * task.num_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        vocab_size=task.vocab_size,
        num_target_layers=task.num_aux + 2,
        aux_layers=tuple(range(1, task.num_aux + 1)),
        block_size=task.block_size,
        mask_token_id=task.mask_token_id,
        windows=method.shape.windows,
        is_causal=False,
        attention_bias=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **own,
    )
    device = torch.device(task.device)
    dtype = getattr(torch, task.dtype)
    draft = method.draft_type(config, choose_kernels("auto", device, dtype, task.head_dim)).to(device, dtype)
    draft.load_state_dict(tensors.weights)
    draft.mask_embed_D.copy_(tensors.embed_VD[task.mask_token_id])
    return draft


def make_step(task: BlockTask) -> tuple[BlockDraft, Callable[[], tuple[Tensor, Tensor]]]:
    """Return the draft and the forward pass of a step, which returns the total loss, and the losses that are compared."""
    tensors = task.tensors()
    method = method_of(task)
    draft = make_draft(task, tensors, method)
    cu_seqlens = torch.tensor([0, task.num_tokens], dtype=torch.int32, device=task.device)
    mask_T = torch.ones_like(tensors.input_ids_T, dtype=torch.bool)
    batch = PackedBatch(tensors.input_ids_T, mask_T, cu_seqlens)

    # The rows of the drawn anchors. Row `(t, i)` belongs to the anchor `t + 1`.
    allowed_ST = torch.zeros(task.num_predictions, task.num_tokens, dtype=torch.bool, device=task.device)
    allowed_ST[:, tensors.anchor_N - 1] = True
    inputs = BlockInputs(
        batch=batch,
        allowed_ST=allowed_ST,
        aux_TA=tensors.aux_TA,
        last_hidden_TD=tensors.last_hidden_TD,
        embed=lambda: tensors.embed_VD[batch.input_ids_T],
    )
    compute = make_forward(draft, method, TargetHead(tensors.head_VD), inputs)

    def forward() -> tuple[Tensor, Tensor]:
        loss = compute().loss
        return loss, loss.detach()[None]

    return draft, forward


def main() -> None:
    options = read_command_line()
    task = BlockTask.from_json(options.task)
    draft, forward = make_step(task)
    if task.device == "cpu":
        keep_freed_memory()
    serve(draft, forward, task.device)


if __name__ == "__main__":
    main()
