from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.batch import MicroBatch
from engine.config.recipe import load_config
from engine.data.documents import Document
from engine.data.packing import collate
from engine.hidden_states.micro_batches import MicroBatchMaker
from engine.models.method_registry import make_method
from engine.overlap.streams import size_of
from engine.target.frozen import FrozenTarget

CPU = torch.device("cpu")
GOOD = Document(np.arange(20, 32, dtype=np.int32), np.arange(12) >= 3, (12,))
BAD = replace(GOOD, input_ids=np.array([20, 21, 22, 17, *range(24, 32)], dtype=np.int32))


@pytest.fixture
def make(tmp_path, tiny_target) -> MicroBatchMaker:
    options = [
        f"output_dir={tmp_path}",
        f"target.path={tiny_target}",
        "target.aux_layers=[0,1,3]",
        "ttt.steps=3",
        "draft.vocab_size=48",
    ]
    config = load_config(None, options)
    target = FrozenTarget.load(config.target, CPU)
    target.embedding.weight_VD.data[17, 3] = float("nan")
    return MicroBatchMaker(make_method(config), target, torch.float32, CPU)


def test_a_step_learns_nothing_from_a_document_whose_states_are_not_finite(make):
    micro = make(collate([GOOD, BAD]))
    assert micro.num_left_out == 1 and micro.num_tokens == 12
    assert micro.allowed_ST[:, :12].any() and not micro.allowed_ST[:, 12:].any()
    assert all(x.isfinite().all() for x in (micro.embed_TD, micro.target.aux_TA, micro.target.last_hidden_ND))


@pytest.mark.parametrize(
    "method, objective, expected",
    [
        ("eagle3", [], True),
        ("dflash", [], False),
        ("dflash", ["objective.label=argmax"], True),
        ("dspark", [], False),
        ("dspark", ["objective.label=argmax"], False),
        ("dspark", ["objective.label=argmax", "objective.l1=0", "objective.confidence=0"], True),
        ("dflash2", ["objective.label=argmax", "objective.l1=1"], True),
    ],
)
def test_the_target_s_head_runs_before_the_loss_only_for_losses_that_read_its_choice(
    tmp_path, tiny_target, method, objective, expected
):
    block = [] if method == "eagle3" else ["block.size=4", "block.anchors=null", "block.mask_token_id=63"]
    options = [
        f"output_dir={tmp_path}",
        f"target.path={tiny_target}",
        "target.aux_layers=[0,1,3]",
        "data.max_tokens=24",
        f"draft.method={method}",
    ]
    config = load_config(None, [*options, *block, *objective])
    target = FrozenTarget.load(config.target, CPU)
    makes = MicroBatchMaker(make_method(config), target, torch.float32, CPU)
    micro = makes(collate([GOOD, GOOD]))
    assert (micro.target.argmax_N is not None) == (micro.target.lse_N is not None) == expected
    assert target(micro.batch, micro.target.slots_N).argmax_N is not None, "the target itself is unchanged"


def test_a_micro_batch_takes_at_most_the_memory_that_is_said(make):
    batch = collate([GOOD] * 40)
    micro = make(batch)
    widths = make.widths(make._method.derive_config(make._target.config, make._target.aux_layers), num_predictions=3)
    bound = MicroBatch.num_bytes(batch.num_tokens, int(batch.assistant_mask_T.sum()), widths)
    assert 0.8 * bound <= size_of(micro) <= 1.05 * bound, "each tensor is aligned"
