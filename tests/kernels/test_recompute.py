"""What is computed again in the backward pass changes memory, not the result."""

import pytest
import torch

from engine.batch import LossNorms
from engine.config.sections import TttSection
from engine.kernels import Kernels
from engine.models.eagle3.draft import Eagle3Draft
from tests.models.eagle3.test_unroll import SHAPES, draft_with, gradients
from tests.tasks import Task, make_documents


@pytest.mark.parametrize("compaction", [True, False])
@pytest.mark.parametrize("shape", ["one layer", "three layers", "EAGLE-3.1"])
@pytest.mark.parametrize("recompute", ["mlp", "step"])
def test_recomputing_gives_the_same_loss_and_gradients_bit_for_bit(recompute, shape, compaction):
    kept = draft_with(**SHAPES[shape])
    task = Task(TttSection(steps=5, compaction=compaction))
    again = Eagle3Draft(kept.config, Kernels(recompute=recompute))
    again.load_state_dict(kept.state_dict())
    micro = task.micro(make_documents((40, 1, 70), "reply", 4))
    norms = LossNorms(torch.tensor(9.0), torch.ones(5))
    results = []
    for draft in (kept, again):
        output = task.test(draft, micro, norms)
        output.loss.backward()
        results.append((output.loss, gradients(draft)))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


@pytest.mark.parametrize("recompute", ["mlp", "step"])
def test_recomputing_keeps_fewer_activations(recompute):
    sizes = {}
    for choice in ("none", recompute):
        draft = Eagle3Draft(draft_with().config, Kernels(recompute=choice))
        task = Task(TttSection(steps=5, compaction=False))
        kept = []

        def keep(tensor: torch.Tensor, kept=kept) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            task.test(draft, task.micro(make_documents((90,), "reply", 4)), LossNorms(torch.tensor(9.0), torch.ones(5)))
        sizes[choice] = sum({tensor.data_ptr(): tensor.nbytes for tensor in kept}.values())
    assert sizes[recompute] < 0.8 * sizes["none"]
