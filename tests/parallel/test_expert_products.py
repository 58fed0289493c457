"""Rows that are sorted by expert, multiplied and summed up again give what the experts' own forward gives."""

import pytest
import torch

from engine.parallel.expert_products import LocalExperts, SortedChoices, compute_experts_in_order, grouped_products
from tests.device_reads import DeviceReads
from tests.parallel.families import tiny_model
from tests.parallel.grouped_experts import EXPERTS, grouped_experts, grouped_inputs


def test_choices_are_sorted_by_expert_and_those_of_others_left_out():
    index_TK = torch.tensor([[2, 0], [3, 2], [0, 3]])  # 3: another rank's
    choices = SortedChoices.of(index_TK, 3, 4)
    assert choices.expert_M.tolist() == [0, 0, 2, 2]
    assert choices.row_M.tolist() == [0, 2, 0, 1]
    assert choices.place_TK.tolist() == [[2, 0], [-1, 3], [1, -1]]
    assert choices.ends_X.tolist() == [2, 2, 4] and choices.ends_X.dtype == torch.int32


def test_local_experts_give_what_transformers_gives_and_the_host_reads_nothing():
    experts = grouped_experts()
    inputs = grouped_inputs(0)
    expected_TD = experts(*inputs)
    compute_experts_in_order(experts)
    with DeviceReads() as reads:
        found_TD = experts(*inputs)
    torch.testing.assert_close(found_TD, expected_TD)
    assert reads.names == []


def test_reads_by_the_host_are_seen():
    values = torch.tensor([1, 0, 2])
    with DeviceReads() as reads:
        values.nonzero()
        values[values > 0]
        values.tolist()
        bool(values[0])
        values.bincount()
    assert reads.names == ["nonzero", "index", "tolist", "__bool__", "bincount"]


def test_choices_of_other_ranks_add_nothing():
    experts = grouped_experts()
    hidden_TD, index_TK, weight_TK = grouped_inputs(0)
    is_here_TK = torch.arange(index_TK.numel()).view(index_TK.shape) % 2 == 0
    expected_TD = experts(hidden_TD, index_TK, weight_TK * is_here_TK)
    local = LocalExperts(experts.forward, EXPERTS, grouped_products(experts))
    index_TK = index_TK.masked_fill(~is_here_TK, EXPERTS)
    weight_TK = weight_TK.masked_fill(~is_here_TK, torch.nan)
    found_TD = local(hidden_TD, index_TK, weight_TK, int(is_here_TK.sum()), hidden_TD.dtype)
    torch.testing.assert_close(found_TD, expected_TD)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "deepseek_v3", "nemotron_h"])
def test_every_layout_of_experts_gives_what_transformers_gives(family):
    """Transposed weights, biases, gates of their own and none."""
    experts = next(m for m in tiny_model(family).modules() if grouped_products(m) is not None)
    num_experts = experts.down_proj.shape[0]
    width = experts.down_proj.shape[2 if experts.is_transposed else 1]
    for bias in (weight for name, weight in experts.named_parameters() if name.endswith("bias")):
        bias.data.normal_()
    generator = torch.Generator().manual_seed(0)
    weight_TK, index_TK = torch.rand(9, num_experts, generator=generator).topk(2, dim=-1)
    hidden_TD = torch.randn(9, width, generator=generator)
    with torch.no_grad():
        expected_TD = experts(hidden_TD, index_TK, weight_TK)
        compute_experts_in_order(experts)
        torch.testing.assert_close(experts(hidden_TD, index_TK, weight_TK), expected_TD)


def test_experts_of_another_kind_stay_as_they_are():
    module = torch.nn.Linear(2, 2)
    before = module.forward
    compute_experts_in_order(module)
    assert module.forward == before
