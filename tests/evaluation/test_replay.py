"""A target without a cache says what it says with one, and drafters fare by its replies as they fare in decoding."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.config.tree_shape import TreeShape
from engine.evaluation.decoding import PromptLookupDrafter, plain_decode, speculative_decode
from engine.evaluation.replay import batched_replies, greedy_replies, replay
from engine.models.eagle3.drafts_along import propose_along
from engine.models.eagle3.tree_drafter import TreeDrafter
from engine.parallel.mesh import TargetMesh
from engine.target.frozen import FrozenTarget, capture
from tests.distributed import run_ranks
from tests.drafters import SHAPE, Oracle, prompts, random_draft, tiny_target

CLOSE = 1e-5


@pytest.fixture(scope="module")
def target() -> FrozenTarget:
    return tiny_target("llama")


@pytest.fixture(scope="module")
def common(target) -> int:
    """The token that most replies have, for replies that end early."""
    return commonest([plain_decode(target, ids, 17, ()).token_ids for ids in prompts(8)])


def commonest(replies: list[list[int]]) -> int:
    return torch.tensor(replies).mode().values[0].item()


def differs(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("max_tokens", [1, 50, 4096])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 17])
def test_replies_are_those_of_decoding_with_a_cache(target, common, max_new_tokens, max_tokens):
    for eos_ids in ((), {common}):
        until = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids}
        replies = greedy_replies(target, prompts(8), **until, max_tokens=max_tokens)
        for prompt_ids, reply in zip(prompts(8), replies, strict=True):
            assert reply.prompt_ids == prompt_ids
            assert reply.token_ids == plain_decode(target, prompt_ids, **until).token_ids
            with capture(target.model, target.aux_layers) as seen:
                target.model(torch.tensor([prompt_ids + reply.token_ids[:-1]]))
            assert differs(reply.aux_TA, seen.aux()[0]) < CLOSE


@pytest.mark.parametrize("max_tokens", [1, 50, 4096])
def test_a_forward_reads_as_many_prompts_as_fit(target, max_tokens, monkeypatch):
    read = []
    run = FrozenTarget.__call__
    counted = []
    monkeypatch.setattr(
        FrozenTarget, "__call__", lambda self, batch, slots_N: read.append(batch.host_lengths) or run(self, batch, slots_N)
    )
    replies = greedy_replies(target, prompts(8), max_new_tokens=9, eos_ids=(), max_tokens=max_tokens, on_forward=counted.append)
    assert all(sum(lengths) <= max_tokens or len(lengths) == 1 for lengths in read)
    assert len(read) == {1: 8 * 9, 4096: 9}.get(max_tokens, len(read))
    assert counted == torch.tensor([len(lengths) for lengths in read]).cumsum(0).tolist() and counted[-1] == 8 * 9
    assert all(reply.aux_TA.untyped_storage().nbytes() == reply.aux_TA.nbytes for reply in replies), "a pack is not kept"


@pytest.mark.parametrize("kind", ["tree", "deep chain", "prompt lookup", "oracle", "branching oracle that errs"])
def test_a_drafter_fares_as_in_decoding_with_a_cache(target, kind):
    draft = random_draft(target, num_layers=2 if kind == "deep chain" else 1)
    limits = ((1, 3), (2, 1), (20, 3), (21, 9))
    for prompt_ids in prompts(3)[1:]:
        told = plain_decode(target, prompt_ids, 30, ()).token_ids

        def make(depth: int, ids=prompt_ids, told=told):
            return {
                "tree": lambda: TreeDrafter(draft, TreeShape(depth, 3, 4)),
                "deep chain": lambda: TreeDrafter(draft, TreeShape(depth)),
                "prompt lookup": lambda: PromptLookupDrafter(depth),
                "oracle": lambda: Oracle(ids, told, depth=depth),
                "branching oracle that errs": lambda: Oracle(ids, told, lambda index: index % 4 == 3, depth, 2),
            }[kind]()

        for eos_ids in ((), *({token_id} for token_id in sorted(set(told[:20]))[:2])):
            for max_new_tokens, depth in limits[2:] if eos_ids else limits:
                (reply,) = greedy_replies(
                    target, [prompt_ids], max_new_tokens=max_new_tokens + depth, eos_ids=eos_ids, max_tokens=4096
                )
                until = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids}
                replayed = replay(reply, make(depth), **until, num_steps=depth)
                decoded = speculative_decode(target, make(depth), prompt_ids, **until)
                assert replayed == replace(decoded, seconds=0.0)


@pytest.mark.parametrize("wrong_every", [1, 3, 99])
def test_a_drafter_reads_the_states_that_it_reads_with_a_cache(target, wrong_every):
    for prompt_ids in prompts(4):
        (reply,) = greedy_replies(target, [prompt_ids], max_new_tokens=20, eos_ids=(), max_tokens=64)
        request = {"max_new_tokens": 16, "eos_ids": ()}
        ours, theirs = (Oracle(prompt_ids, reply.token_ids, lambda index: index % wrong_every == 0, 4) for _ in range(2))
        replay(reply, ours, **request, num_steps=4)
        speculative_decode(target, theirs, prompt_ids, **request)
        assert ours.read_ids == theirs.read_ids == (prompt_ids + reply.token_ids)[: len(ours.read_ids)]
        assert [len(aux_QA) for aux_QA in ours.read_aux] == [len(aux_QA) for aux_QA in theirs.read_aux]
        assert differs(torch.cat(ours.read_aux), torch.cat(theirs.read_aux)) < CLOSE


def test_requests_that_cannot_be_met_are_refused(target):
    until = {"max_new_tokens": 3, "eos_ids": ()}
    with pytest.raises(ValueError, match="no token"):
        greedy_replies(target, [[1], []], **until, max_tokens=9)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        greedy_replies(target, [[1]], max_new_tokens=0, eos_ids=(), max_tokens=9)
    (reply,) = greedy_replies(target, [[1]], **until, max_tokens=9)
    with pytest.raises(AssertionError, match="too short"):
        replay(reply, PromptLookupDrafter(1), **until, num_steps=1)
    assert greedy_replies(target, [], **until, max_tokens=9) == []


def reply_together(world, family: str, sizes: tuple[int, int], shares: tuple[slice, ...]) -> tuple:
    """A rank's replies of the shared target, those of the whole one with a cache; how a drafter fares by both."""
    return reply_with(
        tiny_target(family, TargetMesh.make(world, *sizes)), tiny_target(family), family, prompts(8)[shares[world.rank]]
    )


def reply_to_all(world, family: str, sizes: tuple[int, int]) -> list[tuple]:
    """`reply_together` for each way to share the prompts."""
    shared = tiny_target(family, TargetMesh.make(world, *sizes))
    whole = tiny_target(family)
    return [reply_with(shared, whole, family, prompts(8)[shares[world.rank]]) for shares in UNEVEN.values()]


def reply_with(shared: FrozenTarget, whole: FrozenTarget, family: str, own: list[list[int]]) -> tuple:
    until = {"max_new_tokens": 12, "eos_ids": (7,)}
    assert shared.mesh.size > 1 and (shared.plan.shared or shared.plan.experts)
    replies = greedy_replies(shared, own, max_new_tokens=15, eos_ids=(7,), max_tokens=60)
    expected = [plain_decode(whole, prompt_ids, **until).token_ids for prompt_ids in own]
    draft = TreeDrafter(random_draft(whole), TreeShape(3, 2, 5))
    fared = [replay(reply, draft, **until, num_steps=3) for reply in replies]
    rolls_back = family != "qwen3_next"
    decoded = [speculative_decode(whole, draft, ids, **until) for ids in own if rolls_back]
    return [reply.token_ids[:12] for reply in replies], expected, fared, [replace(one, seconds=0.0) for one in decoded]


UNEVEN = {
    "one rank has more": (slice(0, 3), slice(3, 5)),
    "one rank has none": (slice(0, 4), slice(0)),
    "the first rank has none": (slice(0), slice(5, 7)),
}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("llama", (2, 1)), ("qwen3_moe", (1, 2)), ("qwen3_next", (2, 2))],
)
def test_ranks_that_share_a_target_get_its_replies_to_their_own_prompts(family, sizes):
    by_rank = run_ranks(reply_to_all, 2, family, sizes)
    for name, results in zip(UNEVEN, zip(*by_rank, strict=True), strict=True):
        for replies, expected, fared, decoded in results:
            assert replies == expected == [generation.token_ids for generation in fared], name
            assert fared == decoded or not decoded, name
        assert sum(len(replies) for replies, *_ in results) == sum(len(prompts(8)[share]) for share in UNEVEN[name])


def test_copies_of_a_shared_target_need_not_be_in_step():
    shares = (slice(0, 1), slice(0), slice(1, 4), slice(4, 6))
    for replies, expected, *_ in run_ranks(reply_together, 4, "llama", (2, 1), shares):
        assert replies == expected


SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]}


@pytest.fixture(scope="module", params=["llama", "qwen3_moe", "gemma3_text", "gpt_oss"])
def cached_target(request) -> FrozenTarget:
    """Targets whose cache rolls back: plain, with experts, with sliding windows, with sinks and sliding windows."""
    options = {"gemma3_text": SLIDING, "gpt_oss": SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2}}
    if request.param not in options:
        return tiny_target(request.param)
    torch.manual_seed(5)
    config = AutoConfig.for_model(request.param, **SHAPE, **options[request.param])
    return FrozenTarget(AutoModelForCausalLM.from_config(config, dtype=torch.float32), (0, 1, 3))


@pytest.fixture(scope="module")
def decoded_alone(cached_target) -> dict[tuple[int, ...], list[tuple[list[int], torch.Tensor]]]:
    """For two sets of end ids, the reply to each prompt by itself and the auxiliary states that one forward gives for it."""
    common = commonest([plain_decode(cached_target, ids, 17, ()).token_ids for ids in prompts(8)])
    return {eos_ids: [decode_alone(cached_target, ids, eos_ids) for ids in prompts(8)] for eos_ids in ((), (common,))}


def decode_alone(target: FrozenTarget, prompt_ids: list[int], eos_ids: tuple[int, ...]) -> tuple[list[int], torch.Tensor]:
    reply_ids = plain_decode(target, prompt_ids, 17, eos_ids).token_ids
    with capture(target.model, target.aux_layers) as seen:
        target.model(torch.tensor([prompt_ids + reply_ids[:-1]]))
    return reply_ids, seen.aux()[0]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_prompts_decoded_together_get_the_replies_that_each_gets_alone(cached_target, decoded_alone, batch_size):
    asked = prompts(8)
    for eos_ids, alone in decoded_alone.items():
        until = {"max_new_tokens": 17, "eos_ids": eos_ids}
        counted = []
        replies = batched_replies(cached_target, asked, **until, batch_size=batch_size, on_forward=counted.append)
        for prompt_ids, reply, (reply_ids, aux_TA) in zip(asked, replies, alone, strict=True):
            assert reply.prompt_ids == prompt_ids
            assert reply.token_ids == reply_ids
            assert differs(reply.aux_TA, aux_TA) < CLOSE
        assert counted == sorted(counted) and counted[-1] == sum(len(reply.token_ids) for reply in replies)
        assert len({tuple(reply_ids) for reply_ids, _ in alone}) > 1


def test_a_batch_takes_one_forward_per_token_and_refuses_what_greedy_decoding_refuses(target):
    until = {"max_new_tokens": 9, "eos_ids": ()}
    counted = []
    batched_replies(target, prompts(8), **until, batch_size=8, on_forward=counted.append)
    assert counted == [8 * (step + 1) for step in range(9)]
    with pytest.raises(ValueError, match="no token"):
        batched_replies(target, [[1], []], **until, batch_size=2)
    assert batched_replies(target, [], **until, batch_size=2) == []


@pytest.mark.parametrize("max_tokens", [1, 4096])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"fc_norm": True, "norm_output": True}])
def test_a_draft_proposes_behind_all_tokens_at_once_what_it_proposes_one_by_one(target, common, options, max_tokens):
    draft = random_draft(target, **options)
    asked = prompts(8)[1::2]
    seen = set()
    shapes = (TreeShape(3), TreeShape(1, 2, 3), TreeShape(4, 3, 9), TreeShape(3, 4, 8, "sglang"))
    for max_new_tokens, shape, eos_ids in zip((1, 2, 20, 20), shapes, ((), (), (), {common}), strict=True):
        until = {"max_new_tokens": max_new_tokens + shape.num_steps, "eos_ids": eos_ids}
        replies = greedy_replies(target, asked, **until, max_tokens=4096)
        along = propose_along(draft, replies, shape, max_tokens)
        for reply, proposals in zip(replies, along, strict=True):
            one_by_one = _Recorded(TreeDrafter(draft, shape))
            at_once = _Recorded(proposals)
            limits = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids, "num_steps": shape.num_steps}
            assert replay(reply, at_once, **limits) == replay(reply, one_by_one, **limits)
            assert at_once.proposed == one_by_one.proposed
            seen.update(tuple(token_ids) for token_ids, _ in at_once.proposed)
    assert len(seen) > 10


def test_trees_of_other_shapes_are_parts_of_those_that_were_drafted(target):
    draft = random_draft(target)
    replies = greedy_replies(target, prompts(6)[3:], max_new_tokens=19, eos_ids=(), max_tokens=4096)
    whole = propose_along(draft, replies, TreeShape(4, 3, 12), 4096)
    for shape in (TreeShape(1, 3, 3), TreeShape(2, 3, 4), TreeShape(4, 3, 31)):
        own = propose_along(draft, replies, shape, 4096)
        for reply, one, other in zip(replies, own, whole, strict=True):
            limits = {"max_new_tokens": 15, "eos_ids": (), "num_steps": shape.num_steps}
            assert replay(reply, one, **limits) == replay(reply, other.reshaped(shape), **limits)


class _Recorded:
    """A drafter that keeps what it proposed."""

    def __init__(self, drafter) -> None:
        self.drafter = drafter
        self.start = drafter.start
        self.extend = drafter.extend
        self.proposed: list[tuple[list[int], list[int]]] = []

    def propose(self):
        tree = self.drafter.propose()
        self.proposed.append((list(tree.token_ids), list(tree.parents)))
        return tree
