"""On every path the draft's losses, rates and gradients are those of a published trainer (see tests/golden/README.md)."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from engine.batch import LossNorms, MicroBatch, PackedBatch, TargetOutput
from engine.config.sections import LossSection, TttSection
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_config import Eagle3Config
from engine.models.eagle3.unroll import Teacher, TrainingTimeTest
from engine.models.training_rows import allowed_rows, loss_rows, slots_of
from engine.models.vocab_map import VocabMap
from tests.paths import PATHS, ComputePath

FOLDER = Path(os.environ.get("DRAFTSPEED_GOLDEN", Path(__file__).parent / "golden"))
CASES = sorted(FOLDER.glob("*.safetensors"))
LOSS_KINDS = {"None": "kl", "alpha": "lk_alpha", "lambda": "lk_lambda"}


def read(case: Path, device: torch.device) -> tuple[dict, dict]:
    with safe_open(case, "pt", str(device)) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 (not a dict)


def packed(tensors: dict) -> tuple[PackedBatch, torch.Tensor]:
    """The case's rows end to end without padding, and the kept positions bool [B, T]."""
    keep_BT = tensors["in.attention_mask"]
    lengths = keep_BT.sum(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return PackedBatch(tensors["in.input_ids"][keep_BT], tensors["in.loss_mask"][keep_BT].bool(), cu_seqlens), keep_BT


def load_draft(tensors: dict, metadata: dict, path: ComputePath) -> Eagle3Draft:
    config = Eagle3Config.from_dict(json.loads(metadata["config"]) | {"num_hidden_layers": 1})
    draft = Eagle3Draft(config, path.kernels()).to(path.device)
    weights = {key.removeprefix("draft."): value for key, value in tensors.items() if key.startswith("draft.")}
    outside = {"embed_tokens.weight", "d2t", "t2d"}
    draft.load_state_dict({key: value for key, value in weights.items() if key not in outside})
    return draft


def target_output(tensors: dict, keep_BT: torch.Tensor, slots_N: torch.Tensor) -> TargetOutput:
    last_hidden_ND = tensors["in.last_hidden_state"][keep_BT][slots_N]
    logits_NV = last_hidden_ND @ tensors["in.target_lm_head"].T
    aux_TA = tensors["in.aux_hidden_states"][keep_BT]
    return TargetOutput(aux_TA, slots_N, last_hidden_ND, logits_NV.argmax(-1).int(), logits_NV.logsumexp(-1))


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


# Triton's interpreter is slow: the paths of its kernels that differ in compaction or chunks alone take the first case. The
# other losses meet the kernels on the paths that are left, and chunks on the plain ones; test_equalities.py has other rows
# on all paths.
ON_FIRST_CASE = ("triton, uncompacted", "triton, small chunks, recompute step", "flash, uncompacted")
ON_PATHS = [(path, case) for path in PATHS for case in CASES if path not in ON_FIRST_CASE or case is CASES[0]]


@pytest.mark.parametrize(("path", "case"), ON_PATHS, indirect=["path"], ids=lambda value: getattr(value, "stem", value))
def test_losses_rates_and_gradients_match(case, path):
    tensors, metadata = read(case, path.device)
    assert metadata["normaliser"] == "positions"
    draft, (batch, keep_BT) = load_draft(tensors, metadata, path), packed(tensors)
    ttt = TttSection(int(metadata["ttt_steps"]), mask_alignment=metadata["mask_alignment"], compaction=path.compaction)
    loss = LossSection(kind=LOSS_KINDS[metadata["lk"]], normaliser="positions")
    vocab_map = VocabMap.from_tables(tensors["draft.d2t"], tensors["draft.t2d"])
    allowed_ST = allowed_rows(batch, ttt)
    target = target_output(tensors, keep_BT, slots_of(allowed_ST))
    head_UD = tensors["in.target_lm_head"][vocab_map.target_ids_U]
    test = TrainingTimeTest(ttt, loss, Teacher(lambda hidden_QD: hidden_QD @ head_UD.T, vocab_map), path.slots_per_chunk)
    rows_S = loss_rows(allowed_ST, target, vocab_map).sum(1).float()
    norms = LossNorms(rows_S.new_tensor(keep_BT.numel()), rows_S)

    micro = MicroBatch(batch, target, tensors["draft.embed_tokens.weight"][batch.input_ids_T], allowed_ST)
    output = test(draft, micro, norms)
    output.loss.backward()

    assert relative(output.loss_S, tensors["out.loss_per_step"]) < 2e-6
    assert relative(output.loss.detach(), tensors["out.loss"][0]) < 2e-6
    accuracy_S = output.num_correct_S / output.num_allowed_rows_S
    assert torch.allclose(accuracy_S, tensors["out.accuracy_per_step"], atol=1e-6)
    rate_S = output.accepted_S / output.num_loss_rows_S
    assert torch.allclose(rate_S, tensors["out.acceptance_rate_per_step"], rtol=1e-5)
    for name, parameter in draft.named_parameters():
        assert relative(parameter.grad, tensors[f"grad.{name}"]) < 5e-6, name


def test_there_are_cases():
    assert CASES, f"no golden case in {FOLDER}"
