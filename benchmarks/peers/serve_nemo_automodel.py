"""Process that runs the side of NeMo Automodel; see side_process.py. Requires nemo-automodel 0.7.0.

NeMo Automodel divides the loss of a step by its number of rows with loss, and the total by the sum
of the steps' weights. Both are constant here, so the loss is multiplied by them.
"""

import torch
from nemo_automodel.components.speculative.eagle import core
from nemo_automodel.components.speculative.eagle.draft_llama import LlamaEagle3DraftModel
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.peers.eagle3_task import STEP_DECAY, STEPS, Task, TaskTensors
from benchmarks.peers.side_process import read_command_line, serve


class RecordedLoss:
    """NeMo Automodel's loss of a step, which also keeps its values; the model returns only their mean."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self._loss = core.masked_soft_cross_entropy

    def __call__(self, **arguments: Tensor) -> Tensor:
        loss = self._loss(**arguments)
        self.values.append(loss.detach())
        return loss


def common_name(name: str) -> str:
    return name.removeprefix("model.").replace("layers.0.", "midlayer.")


def make_model(task: Task, tensors: TaskTensors, attention: str) -> LlamaEagle3DraftModel:
    config = LlamaConfig(**task.config())
    config.draft_vocab_size = task.draft_vocab_size
    config.attn_implementation = attention
    config.tie_word_embeddings = False
    model = LlamaEagle3DraftModel(config).to(task.device, getattr(torch, task.dtype))
    target_ids_U = tensors.in_draft_V.nonzero().flatten()
    missing = model.load_state_dict(tensors.state_of(model, common_name), strict=False).missing_keys
    if sorted(missing) != ["d2t", "model.embed_tokens.weight", "t2d"]:
        raise RuntimeError(f"expected only embeddings and the vocabulary map to be missing, found {missing}")
    model.model.embed_tokens.weight.data.copy_(tensors.embed_VD)
    model.set_vocab_mapping(target_ids_U)
    model.freeze_embeddings()
    return model


def main() -> None:
    options = read_command_line()
    task = Task.from_json(options.task)
    tensors = task.tensors()
    model = make_model(task, tensors, options.attention)
    recorded = RecordedLoss()
    core.masked_soft_cross_entropy = recorded
    trainer = core.Eagle3TrainerModule(
        model,
        selected_token_ids=tensors.in_draft_V.nonzero().flatten(),
        selected_token_mask=tensors.in_draft_V,
        ttt_steps=STEPS,
    )
    # NeMo Automodel's target passes tokens, logits and mask shifted by one position. The mask here
    # is not shifted: row (t, i) learns if m[u-1] = 1, as in SpecForge, and not if m[u] = 1.
    input_ids_1T = torch.nn.functional.pad(tensors.input_ids_T[1:], (0, 1))[None]
    everywhere_1T = torch.ones_like(input_ids_1T)
    mask_1T = tensors.mask_T[None].long()
    per_position = num_loss_slots(tensors) / task.num_tokens
    weight_sum = sum(STEP_DECAY**step for step in range(STEPS))

    def forward() -> tuple[Tensor, Tensor]:
        recorded.values.clear()
        with torch.no_grad():
            logits_TV = tensors.last_hidden_TD @ tensors.head_VD.T
            logits_1TV = torch.nn.functional.pad(logits_TV[1:], (0, 0, 0, 1))[None]
        loss = trainer(
            input_ids=input_ids_1T,
            attention_mask=everywhere_1T,
            loss_mask=mask_1T,
            aux_hidden_states=tensors.aux_TA[None],
            target_logits=logits_1TV,
        ).loss
        return per_position * weight_sum * loss, per_position * torch.stack(recorded.values)

    serve(model, forward, task.device, common_name)


def num_loss_slots(tensors: TaskTensors) -> int:
    """Return the number of slots in the mask whose most likely token is in the draft vocabulary."""
    slots_N = tensors.mask_T.nonzero().flatten() + 1
    best_N = (tensors.last_hidden_TD[slots_N] @ tensors.head_VD.T).argmax(-1)
    return int(tensors.in_draft_V[best_N].sum())


if __name__ == "__main__":
    main()
