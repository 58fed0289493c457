"""Process that runs the side of vLLM's speculators in a comparison of block drafters; see side_process.py.

Requires speculators 0.9.0. What differs from its defaults, so that both sides compute the same:

- Its anchors are fixed instead of drawn.
- The losses are DFlash's cross-entropy and DSpark's 0.1 of the cross-entropy and 0.9 of the total
  variation, with the exponential decay. On a CPU they are its plain losses, because its Triton
  losses need a GPU.
- The target's last hidden state is normed already, so `verifier_norm` is the identity.

Its loss needs no constant factor: it divides by the number of rows plus 1e-5, and by plus 1e-8 for
the confidence head. DraftSpeed adds 1e-5 to both, a relative difference of 1e-8.
"""

import speculators.models.dflash.core as dflash
import torch
from speculators.losses import resolve_loss_config
from speculators.models.dflash.config import DFlashSpeculatorConfig
from speculators.models.dspark.config import DSparkSpeculatorConfig
from speculators.models.dspark.core import DSparkDraftModel
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config

from benchmarks.peers.block_task import DSPARK, BlockTask, BlockTaskTensors
from benchmarks.peers.side_process import read_command_line, serve

LOSS = {"dflash": "ce", "dspark": '{"ce": 0.1, "tv": 0.9}'}


def make_draft(task: BlockTask, tensors: BlockTaskTensors, attention: str) -> dflash.DFlashDraftModel:
    layer = Qwen3Config(**task.config())
    layer._attn_implementation = attention  # speculators' `--draft-attn-impl` sets the same field.
    shared = {
        "transformer_layer_config": layer,
        "draft_vocab_size": task.vocab_size,
        "block_size": task.block_size,
        "aux_hidden_state_layer_ids": list(range(1, task.num_aux + 1)),
        "mask_token_id": task.mask_token_id,
    }
    if task.method == DSPARK:
        draft = DSparkDraftModel(DSparkSpeculatorConfig(**shared, markov_rank=task.markov_rank))
    else:
        draft = dflash.DFlashDraftModel(DFlashSpeculatorConfig(**shared))
    draft.verifier_norm = torch.nn.Identity()
    state = tensors.weights | {"embed_tokens.weight": tensors.embed_VD}
    state |= {"lm_head.weight": tensors.head_VD, "verifier_lm_head.weight": tensors.head_VD}
    draft.load_state_dict(state)
    return draft.to(task.device, getattr(torch, task.dtype))


def main() -> None:
    options = read_command_line()
    task = BlockTask.from_json(options.task)
    tensors = task.tensors()
    draft = make_draft(task, tensors, options.attention)
    draft.train()
    anchor_N = tensors.anchor_N
    dflash.select_anchors = lambda *_: (anchor_N, torch.ones_like(anchor_N, dtype=torch.bool))
    implementation = "fused" if task.device == "cuda" else "eager"
    inputs = {
        "hidden_states": tensors.aux_TA[None],
        "input_ids": tensors.input_ids_T[None],
        "loss_mask": torch.ones(1, task.num_tokens, device=task.device),
        "verifier_last_hidden_states": tensors.last_hidden_TD[None],
        "document_ids": torch.zeros(1, task.num_tokens, dtype=torch.long, device=task.device),
        "loss_config": resolve_loss_config(LOSS[task.method], implementation),
        "gamma": task.decay,
        "max_anchors": task.anchors,
    }
    if task.method == DSPARK:
        inputs["tv_loss_fn"] = resolve_loss_config("tv", implementation)["tv"][0]

    def forward() -> tuple[Tensor, Tensor]:
        _, loss, _ = draft(**inputs)
        return loss, loss.detach()[None]

    serve(draft, forward, task.device)


if __name__ == "__main__":
    main()
