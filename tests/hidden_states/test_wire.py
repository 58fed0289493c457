"""States that travel between ranks arrive as they were, in tensors that the other side could lay out before."""

from dataclasses import fields

import pytest
import torch

from engine.batch import TargetOutput
from engine.hidden_states.wire import EXACT, WireFormat


@pytest.mark.parametrize("has_head_stats", [True, False])
@pytest.mark.parametrize("dtype", [EXACT, "float8_e4m3"])
def test_a_layout_is_that_of_what_is_written(dtype, has_head_stats):
    torch.manual_seed(0)
    wire = WireFormat(dtype, 8, 2, torch.bfloat16, torch.float32, has_head_stats)
    slots_N = torch.tensor([1, 4, 6])
    stats = (torch.arange(3).int(), torch.randn(3)) if has_head_stats else (None, None)
    output = TargetOutput(torch.randn(7, 16).to(torch.bfloat16), slots_N, torch.randn(3, 8), *stats)
    written = wire.write(output)
    layout = wire.layout(7, 3)
    for field in fields(written):
        ours, expected = getattr(layout, field.name), getattr(written, field.name)
        assert (ours is None) == (expected is None), field.name
        if expected is not None:
            assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype), field.name
    found = wire.read(written, slots_N)
    assert found.slots_N is slots_N and found.argmax_N is stats[0] and found.lse_N is stats[1]
    if dtype == EXACT:
        assert torch.equal(found.aux_TA, output.aux_TA) and torch.equal(found.last_hidden_ND, output.last_hidden_ND)
