"""A block drafter proposes the same tokens with a cache, along whole replies, and by the rows that training computes."""

from dataclasses import replace

import pytest
import torch

from engine.config.tree_shape import TreeShape
from engine.models.block_drafter.block_proposer import FIRST_CAPACITY, ContextCache
from engine.models.drafter import TargetReply
from tests.block_drafts import (
    HIDDEN,
    METHODS,
    NUM_AUX,
    VOCAB,
    every_token,
    make_draft,
    make_method_of,
    make_tables,
)

VARIANTS = [(method, {}) for method in METHODS]
VARIANTS += [
    ("dflash", {"windows": (4, 0)}),
    ("dflash", {"windows": (3, 3), "causal": True}),
    ("dflash", {"windows": (3, 0), "causal": None}),
    ("dspark", {"markov_head": "gated"}),
    ("dspark", {"markov_head": "rnn", "causal": True, "windows": (6, 6)}),
    ("dflash2", {"windows": (5, 5), "conv_taps": 3}),
]


def make_reply(num_prompt: int, num_reply: int, seed: int) -> TargetReply:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB - 1, (num_prompt + num_reply,), generator=generator).tolist()
    aux_TA = torch.randn(len(ids) - 1, NUM_AUX * HIDDEN, generator=generator)
    return TargetReply(ids[:num_prompt], ids[num_prompt:], aux_TA)


@pytest.fixture(params=VARIANTS, ids=str)
def served(request):
    name, block = request.param
    method = make_method_of(name, **block)
    draft = make_draft(method).double().eval().requires_grad_(False)
    served = method.serve(draft, make_tables(), every_token())
    return served.to(torch.float64)


def chains_with_cache(served, reply: TargetReply, num_tokens: int) -> list[list[int]]:
    drafter = served.drafter(TreeShape(num_tokens))
    num_read = len(reply.prompt_ids)
    drafter.start([*reply.prompt_ids, reply.token_ids[0]], reply.aux_TA[:num_read])
    chains = [list(drafter.propose().token_ids)]
    for token_id in reply.token_ids[1:-1]:
        drafter.extend([token_id], reply.aux_TA[num_read : num_read + 1])
        num_read += 1
        chains.append(list(drafter.propose().token_ids))
    return chains


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_drafting_along_replies_equals_drafting_with_a_cache(served, num_tokens):
    replies = [make_reply(7, 6, 1), make_reply(3, 1, 2), make_reply(12, 9, 3)]
    for max_tokens in (10, 1000):
        drafters = served.propose_along(replies, TreeShape(num_tokens), max_tokens)
        for reply, drafter in zip(replies, drafters, strict=True):
            if len(reply.token_ids) == 1:
                continue
            expected = chains_with_cache(served, reply, num_tokens)
            drafter.start([], reply.aux_TA)
            for chain in expected:
                proposed = drafter.propose()
                assert list(proposed.token_ids) == chain
                assert proposed.is_chain
                drafter.extend([0], reply.aux_TA)


def test_several_tokens_may_be_committed_at_once(served):
    reply = make_reply(5, 8, 4)
    drafter = served.drafter(TreeShape(4))
    drafter.start([*reply.prompt_ids, reply.token_ids[0]], reply.aux_TA[:5])
    drafter.propose()
    drafter.extend(reply.token_ids[1:4], reply.aux_TA[5:8])
    assert list(drafter.propose().token_ids) == chains_with_cache(served, reply, 4)[3]


def test_a_block_leaves_no_trace_in_the_cache():
    cache = ContextCache()
    first = torch.randn(FIRST_CAPACITY - 2, 2, 8), torch.randn(FIRST_CAPACITY - 2, 2, 8)
    cache.append(*first)
    block = torch.randn(5, 2, 8), torch.randn(5, 2, 8)  # which does not fit, so the cache grows
    for _ in range(2):
        keys, values = cache.followed_by(*block)
        for found, context, own in zip((keys, values), first, block, strict=True):
            torch.testing.assert_close(found, torch.cat((context, own)).transpose(0, 1), rtol=0, atol=0)
        assert cache.length == FIRST_CAPACITY - 2


def test_dspark_stops_where_acceptance_becomes_unlikely():
    method = make_method_of("dspark")
    draft = make_draft(method).eval().requires_grad_(False)
    served = method.serve(draft, make_tables(), every_token())
    reply = make_reply(7, 20, 1)
    whole = chains_with_cache(served, reply, 5)
    careful = replace(served, min_confidence=0.3)
    shorter = chains_with_cache(careful, reply, 5)
    assert all(chain == full[: len(chain)] for chain, full in zip(shorter, whole, strict=True))
    assert {len(chain) for chain in shorter} > {1}
    assert {len(chain) for chain in shorter} != {5}
    assert all(len(chain) == 1 for chain in chains_with_cache(replace(served, min_confidence=1.0), reply, 5))
