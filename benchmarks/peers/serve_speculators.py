"""Process that runs the side of vLLM's speculators; see side_process.py. Requires speculators 0.9.0.

What differs from its defaults, so that both sides compute the same gradients:

- The loss is `kl_div` with a decay of 0.8 per step, which by default is 1. It is the cross-entropy
  minus the target's entropy, which depends on no weight and is added to the losses that are
  compared.
- The draft's head is trained. speculators keeps it frozen at the target's rows.
- speculators lets row (t, i) learn if m[u] = 1, SpecForge if m[u-1] = 1. The mask reaches the model
  without the shift by one token of speculators' `shift_batch`, so that both sides learn the same
  rows.
- The target's last hidden state is normed already, so `verifier_norm` is the identity.

speculators computes no logits of the target outside the draft vocabulary. It therefore also learns
slots whose most likely token is outside, and is compared on tasks without such slots.
"""

import torch
from speculators.losses import resolve_loss_config
from speculators.models.eagle3.config import Eagle3SpeculatorConfig
from speculators.models.eagle3.core import Eagle3DraftModel
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.peers.eagle3_task import STEP_DECAY, STEPS, Task, TaskTensors
from benchmarks.peers.side_process import read_command_line, serve

LOSS_EPSILON = 1e-5  # speculators adds it to the number of rows that it divides a loss by.


def common_name(name: str) -> str:
    return name.replace("layers.0.", "midlayer.")


def make_model(task: Task, tensors: TaskTensors, attention: str) -> Eagle3DraftModel:
    layer = LlamaConfig(**task.config(), num_hidden_layers=1)
    layer._attn_implementation = attention  # speculators' `--draft-attn-impl` sets the same field.
    config = Eagle3SpeculatorConfig(transformer_layer_config=layer, draft_vocab_size=task.draft_vocab_size)
    model = Eagle3DraftModel(config)
    target_ids_U = tensors.in_draft_V.nonzero().flatten()
    state = tensors.state_of(model, common_name)
    state |= {"embed_tokens.weight": tensors.embed_VD, "verifier_lm_head.weight": tensors.head_VD[target_ids_U]}
    offsets_U = target_ids_U - torch.arange(len(target_ids_U), device=task.device)
    state |= {"t2d": tensors.in_draft_V, "d2t": offsets_U}
    missing = model.load_state_dict(state, strict=False).missing_keys
    if missing != ["verifier_norm.weight"]:
        raise RuntimeError(f"expected only verifier_norm.weight to be missing, found {missing}")
    model.verifier_norm = torch.nn.Identity()
    model.lm_head.weight.requires_grad_(True)
    return model.to(task.device, getattr(torch, task.dtype))


def entropy(tensors: TaskTensors) -> Tensor:
    """Return the sum of the target's entropies over the slots of a step, in nats."""
    slots_N = tensors.mask_T.nonzero().flatten() + 1
    logits_NU = tensors.last_hidden_TD[slots_N] @ tensors.head_VD[tensors.in_draft_V].T
    log_p_NU = torch.log_softmax(logits_NU.float(), -1)
    return -(log_p_NU.exp() * log_p_NU).sum()


def main() -> None:
    options = read_command_line()
    task = Task.from_json(options.task)
    tensors = task.tensors()
    model = make_model(task, tensors, options.attention)
    model.train()
    loss_config = resolve_loss_config("kl_div", "fused" if task.device == "cuda" else "eager")
    per_position = (tensors.mask_T.sum().item() + LOSS_EPSILON) / task.num_tokens
    entropy_per_position = entropy(tensors) / task.num_tokens
    num_rows = task.num_tokens - 1
    batch = {
        "hidden_states": tensors.aux_TA[None, :-1],
        "input_ids": tensors.input_ids_T[None, 1:],
        "document_ids": torch.zeros(1, num_rows, dtype=torch.long, device=task.device),
        "loss_mask": tensors.mask_T[None, :-1],
        "position_ids": torch.arange(1, task.num_tokens, device=task.device)[None],
        "verifier_last_hidden_states": tensors.last_hidden_TD[None, 1:],
    }

    def forward() -> tuple[Tensor, Tensor]:
        _, loss, metrics = model(**batch, ttt_steps=STEPS, ttt_step_loss_decay=STEP_DECAY, loss_config=loss_config)
        decayed_S = torch.stack([metrics[f"loss_{step}_sum"] for step in range(STEPS)])
        weights_S = STEP_DECAY ** torch.arange(STEPS, device=task.device)
        return per_position * loss, per_position * decayed_S / weights_S + entropy_per_position

    serve(model, forward, task.device, common_name)


if __name__ == "__main__":
    main()
