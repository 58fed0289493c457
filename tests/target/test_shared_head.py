"""A head by parts of the vocabulary gives what the whole one gives."""

from dataclasses import replace

import pytest
import torch

from engine.parallel.mesh import TargetMesh
from engine.parallel.rules import part_of_rows
from engine.parallel.vocab_shard import VocabShard
from engine.target.head import TargetHead
from engine.target.shared_head import SharedHead
from tests.distributed import run_ranks

VOCAB = 53
WIDTH = 12
RANKS = 4
COUNTS = (5, 0, 9, 1)
KINDS = {"plain": {}, "capped": {"soft_cap": 3.0, "scale": 0.7}, "sharp": {"temperature": 0.5}}


def whole_head(kind: str, bias: bool, ties: bool) -> TargetHead:
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(VOCAB, WIDTH, generator=generator)
    if ties:
        weight_VD[40:] = weight_VD[3]  # the most likely token of some slots is there many times, on several ranks
    return TargetHead(weight_VD, bias_V=torch.randn(VOCAB, generator=generator) if bias and not ties else None, **KINDS[kind])


def hidden(rank: int, ties: bool) -> torch.Tensor:
    states = torch.randn(COUNTS[rank], WIDTH, generator=torch.Generator().manual_seed(7 + rank))
    return states + (whole_head("plain", False, True).weight_VD[3] * 2 if ties else 0)


def share(world, kind: str, bias: bool, ties: bool):
    whole = whole_head(kind, bias, ties)
    group = TargetMesh.make(world, RANKS, 1).tp
    own = slice(*part_of_rows(VOCAB, group))
    bias_V = None if whole.bias_V is None else whole.bias_V[own]
    shared = SharedHead(replace(whole, weight_VD=whole.weight_VD[own], bias_V=bias_V), VocabShard(VOCAB, group))
    ids_U = torch.tensor([0, 52, 13, 26, 14, 40])
    return *shared.argmax_and_lse(hidden(world.rank, ties)), shared.rows(ids_U), shared.whole(), shared.own.weight_VD.shape[0]


@pytest.mark.parametrize(("kind", "bias", "ties"), [("plain", False, False), ("capped", True, False), ("sharp", False, True)])
def test_argmax_lse_and_rows_are_those_of_the_whole_head(kind, bias, ties):
    whole = whole_head(kind, bias, ties)
    results = run_ranks(share, RANKS, kind, bias, ties)
    for rank, (argmax_N, lse_N, rows, everything, _) in enumerate(results):
        expected_argmax_N, expected_lse_N = whole.argmax_and_lse(hidden(rank, ties))
        assert argmax_N.dtype == torch.int32 and torch.equal(argmax_N, expected_argmax_N)
        torch.testing.assert_close(lse_N, expected_lse_N)
        assert torch.equal(rows.weight_VD, whole.weight_VD[[0, 52, 13, 26, 14, 40]])
        assert torch.equal(everything.weight_VD, whole.weight_VD)
        assert (everything.bias_V is None) is (whole.bias_V is None)
    assert sum(own for *_, own in results) == VOCAB
    assert not ties or (results[2][0] == 3).any()
