"""Process that runs SpecForge's side of a comparison of block drafters; see side_process.py. Requires specforge 0.2.0.

Its anchors are fixed instead of drawn. Otherwise it runs as it is: its loss needs no constant
factor. It computes the logits of chunks of 128 blocks, its default, and computes them again in the
backward pass.
"""

import torch
from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel, OnlineDSparkModel
from specforge.modeling.draft.dflash import DFlashDraftModel
from specforge.modeling.draft.dspark import DSparkDraftModel
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config

from benchmarks.peers.block_task import DSPARK, BlockTask, BlockTaskTensors
from benchmarks.peers.side_process import read_command_line, serve


def frozen(module: nn.Module, weight_VD: Tensor) -> nn.Module:
    """Return a module whose weight is the target's, without a copy."""
    module.weight = nn.Parameter(weight_VD, requires_grad=False)
    return module


def make_draft(task: BlockTask, tensors: BlockTaskTensors, attention: str) -> DFlashDraftModel:
    config = Qwen3Config(**task.config())
    config.block_size = task.block_size
    config.num_target_layers = task.num_aux + 2
    config._attn_implementation = attention
    config.dflash_config = {"target_layer_ids": list(range(1, task.num_aux + 1)), "mask_token_id": task.mask_token_id}
    draft_type = DFlashDraftModel
    if task.method == DSPARK:
        draft_type = DSparkDraftModel
        config.dflash_config |= {
            "markov_rank": task.markov_rank,
            "markov_head_type": "vanilla",
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
        }
    draft = draft_type(config)
    draft.load_state_dict(tensors.weights)
    return draft.to(task.device, getattr(torch, task.dtype))


def main() -> None:
    options = read_command_line()
    task = BlockTask.from_json(options.task)
    tensors = task.tensors()
    draft = make_draft(task, tensors, options.attention)
    draft.train()
    with torch.device("meta"):
        head = nn.Linear(task.hidden_size, task.vocab_size, bias=False)
        embedding = nn.Embedding(task.vocab_size, task.hidden_size)
    model_type = OnlineDSparkModel if task.method == DSPARK else OnlineDFlashModel
    model = model_type(
        draft,
        frozen(head, tensors.head_VD),
        frozen(embedding, tensors.embed_VD),
        task.mask_token_id,
        block_size=task.block_size,
        attention_backend=options.attention,
        num_anchors=task.anchors,
        loss_decay_gamma=task.decay,
    )
    anchor_1N = tensors.anchor_N[None]
    model._sample_anchor_positions = lambda *_: (anchor_1N, torch.ones_like(anchor_1N, dtype=torch.bool))
    inputs = {
        "input_ids": tensors.input_ids_T[None],
        "hidden_states": tensors.aux_TA[None],
        "loss_mask": torch.ones(1, task.num_tokens, device=task.device),
    }
    if task.method == DSPARK:
        inputs["target_last_hidden_states"] = tensors.last_hidden_TD[None]

    def forward() -> tuple[Tensor, Tensor]:
        loss, *_ = model(**inputs)
        return loss, loss.detach()[None]

    serve(draft, forward, task.device)


if __name__ == "__main__":
    main()
