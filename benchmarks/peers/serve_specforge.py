"""Process that runs SpecForge's side of a comparison; see side_process.py. Requires specforge 0.2.0.

SpecForge divides a loss by all positions, so its loss is compared as it is. On a CPU it uses its
plain loss, because its Triton loss needs a GPU.
"""

import specforge.algorithms.eagle3.model as eagle3
import torch
from specforge.core.loss import _compute_loss
from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.peers.eagle3_task import STEPS, Task, TaskTensors, weighted
from benchmarks.peers.side_process import read_command_line, serve


class PlainLoss:
    """SpecForge's own loss without its Triton kernel, which needs a GPU."""

    apply = staticmethod(_compute_loss)


def make_model(task: Task, tensors: TaskTensors, attention: str) -> LlamaForCausalLMEagle3:
    config = LlamaConfig(**task.config())
    config.draft_vocab_size = task.draft_vocab_size
    model = LlamaForCausalLMEagle3(config, attention_backend=attention).to(task.device, getattr(torch, task.dtype))
    target_ids_U = tensors.in_draft_V.nonzero().flatten()
    tables = {"t2d": tensors.in_draft_V, "d2t": target_ids_U - torch.arange(len(target_ids_U), device=task.device)}
    model.load_state_dict(tensors.weights | tables | {"embed_tokens.weight": tensors.embed_VD})
    model.embed_tokens.weight.requires_grad_(False)
    return model


def main() -> None:
    options = read_command_line()
    task = Task.from_json(options.task)
    torch._dynamo.config.suppress_errors = True  # Code that cannot be compiled runs eagerly.
    if task.device == "cpu":
        eagle3.LogSoftmaxLoss = PlainLoss
    tensors = task.tensors()
    model = make_model(task, tensors, options.attention)
    trainer = eagle3.OnlineEagle3Model(model, length=STEPS, attention_backend=options.attention)
    # SpecForge's data pipeline passes tokens and target logits shifted by one position.
    input_ids_1T = torch.nn.functional.pad(tensors.input_ids_T[1:], (0, 1))[None]
    everywhere_1T = torch.ones_like(input_ids_1T, dtype=torch.bool)
    mask_1T1 = tensors.mask_T[None, :, None].int()

    def forward() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits_TV = tensors.last_hidden_TD @ tensors.head_VD.T
            logits_1TV = torch.nn.functional.pad(logits_TV[1:], (0, 0, 0, 1))[None]
        losses, *_ = trainer(
            input_ids=input_ids_1T,
            attention_mask=everywhere_1T,
            target=logits_1TV,
            loss_mask=mask_1T1,
            hidden_states=tensors.aux_TA[None],
        )
        loss_S = torch.stack(losses)
        return weighted(loss_S), loss_S.detach()

    serve(model, forward, task.device)


if __name__ == "__main__":
    main()
