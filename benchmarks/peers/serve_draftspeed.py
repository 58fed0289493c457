"""Process that runs DraftSpeed's side of a comparison; see side_process.py."""

import torch
from torch import Tensor

from benchmarks.peers.eagle3_task import STEPS, Task
from benchmarks.peers.side_process import read_command_line, serve
from engine.batch import LossNorms, MicroBatch, PackedBatch, TargetOutput
from engine.config.sections import LossSection, TttSection
from engine.host.freed_memory import keep_freed_memory
from engine.kernels import choose_kernels
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_config import Eagle3Config
from engine.models.eagle3.unroll import Teacher, TrainingTimeTest
from engine.models.training_rows import allowed_rows, slots_of
from engine.models.vocab_map import VocabMap
from engine.target.head import TargetHead


def main() -> None:
    options = read_command_line()
    task = Task.from_json(options.task)
    tensors = task.tensors()
    eagle = {"architectures": ["LlamaForCausalLMEagle3"], "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}}
    config = Eagle3Config.from_dict(task.config() | eagle)
    device = torch.device(task.device)
    dtype = getattr(torch, task.dtype)
    draft = Eagle3Draft(config, choose_kernels("auto", device, dtype, config.head_dim)).to(device, dtype)
    draft.load_state_dict(tensors.weights)
    head = TargetHead(tensors.head_VD)
    vocab_map = VocabMap(tensors.in_draft_V.nonzero().flatten(), tensors.in_draft_V)
    ttt = TttSection(steps=STEPS, mask_alignment="specforge")
    teacher = Teacher(head.rows(vocab_map.target_ids_U).logits, vocab_map)
    test = TrainingTimeTest(ttt, LossSection(normaliser="positions"), teacher)
    cu_seqlens = torch.tensor([0, task.num_tokens], dtype=torch.int32, device=task.device)
    batch = PackedBatch(tensors.input_ids_T, tensors.mask_T, cu_seqlens)
    norms = LossNorms(torch.tensor(float(task.num_tokens), device=task.device), torch.ones(STEPS, device=task.device))

    allowed_ST = allowed_rows(batch, ttt)  # A run computes this on the host while it reads data.
    slots_N = slots_of(allowed_ST)

    def forward() -> tuple[Tensor, Tensor]:
        last_hidden_ND = tensors.last_hidden_TD[slots_N]
        target = TargetOutput(tensors.aux_TA, slots_N, last_hidden_ND, *head.argmax_and_lse(last_hidden_ND))
        output = test(draft, MicroBatch(batch, target, tensors.embed_VD[batch.input_ids_T], allowed_ST), norms)
        return output.loss, output.loss_S

    if task.device == "cpu":
        keep_freed_memory()
    serve(draft, forward, task.device)


if __name__ == "__main__":
    main()
