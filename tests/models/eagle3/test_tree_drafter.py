"""Trees take as many verify steps, and accept as many tokens, as SGLang's server does with the same draft."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.config.sections import TargetSection
from engine.config.tree_shape import TreeShape
from engine.evaluation.decoding import plain_decode, reads_trees, speculative_decode
from engine.evaluation.replay import greedy_replies, replay
from engine.models.drafter import ROOT, TokenTree
from engine.models.eagle3.export import load_draft
from engine.models.eagle3.served_draft import ServedEagle3
from engine.models.tree_growth import Candidates
from engine.target.frozen import FrozenTarget
from tests.distributed import ROOT as REPOSITORY

SERVING = Path(__file__).parents[2] / "golden" / "serving"
NEW_TOKENS = 60
# steps, topk, draft tokens: verify steps and accepted tokens of SGLang 0.5.14 and 0.5.23; verify steps with true ancestors.
SGLANG = {
    (5, 1, 6): (480, 468, 480),
    (3, 4, 8): (434, 517, 434),
    (5, 4, 16): (375, 580, 372),
    (4, 8, 12): (395, 561, 395),
    (5, 8, 8): (413, 540, 413),
}


@pytest.fixture(scope="module")
def target() -> FrozenTarget:
    folder = REPOSITORY / "launcher" / "embedded" / "target"
    section = TargetSection(path=str(folder), dtype="float32", aux_layers=(1, 3, 4))
    return FrozenTarget.load(section, torch.device("cpu"))


@pytest.fixture(scope="module")
def draft(target) -> ServedEagle3:
    return load_draft(SERVING / "draft", target.embedding.whole(), torch.float32)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return json.loads((SERVING / "prompts.json").read_text())


@pytest.fixture(scope="module")
def replies(target, prompts):
    return greedy_replies(target, prompts, max_new_tokens=NEW_TOKENS + 5, eos_ids=(), max_tokens=4096)


def verify_steps(generations) -> int:
    return sum(generation.num_target_forwards for generation in generations)


@pytest.mark.parametrize("sizes", SGLANG)
def test_verify_steps_and_accepted_tokens_are_sglangs(draft, replies, sizes):
    steps, correct, steps_with_ancestors = SGLANG[sizes]
    limits = {"max_new_tokens": NEW_TOKENS, "eos_ids": (), "num_steps": sizes[0]}
    shape = TreeShape(*sizes, rule="sglang")
    by_row = [replay(*pair, **limits) for pair in zip(replies, draft.propose_along(replies, shape, 4096), strict=True)]
    assert verify_steps(by_row) == steps
    assert sum(sum(generation.accepted_per_forward) for generation in by_row) == correct
    along = draft.propose_along(replies, TreeShape(*sizes), 4096)
    assert verify_steps(replay(*pair, **limits) for pair in zip(replies, along, strict=True)) == steps_with_ancestors


@pytest.mark.parametrize("rule", ["ancestors", "sglang"])
def test_decoding_takes_the_steps_of_the_replay_and_gives_the_targets_own_tokens(target, draft, prompts, replies, rule):
    shape = TreeShape(5, 4, 16, rule)
    chosen = range(0, len(prompts), 4)
    along = draft.propose_along(replies, shape, 4096)
    for index in chosen:
        decoded = speculative_decode(target, draft.drafter(shape), prompts[index], max_new_tokens=NEW_TOKENS, eos_ids=())
        assert decoded.token_ids == replies[index].token_ids[:NEW_TOKENS]
        replayed = replay(replies[index], along[index], max_new_tokens=NEW_TOKENS, eos_ids=(), num_steps=5)
        assert decoded.accepted_per_forward == replayed.accepted_per_forward
    assert plain_decode(target, prompts[0], NEW_TOKENS, ()).token_ids == replies[0].token_ids[:NEW_TOKENS]
    assert reads_trees(target)


def test_every_tensor_of_a_tree_is_on_the_device_of_the_draft(draft, monkeypatch):
    """Operations of a draft on the meta device refuse tensors of the CPU."""
    meta = torch.device("meta")
    model = copy.deepcopy(draft.model).to(meta)
    vocab_map = SimpleNamespace(target_ids_U=draft.vocab_map.target_ids_U.to(meta))
    on_meta = ServedEagle3(model, vocab_map, draft.embed_weight_VD.to(meta))
    drafter = on_meta.drafter(TreeShape(3, 4, 8))
    monkeypatch.setattr(Candidates, "trees", lambda self, num_nodes: [self])
    drafter.start([5, 6, 7], torch.zeros(2, 576, device="meta"))
    assert drafter.propose().score_QC.device.type == "meta"


def test_the_accepted_path_follows_the_targets_choices():
    #          0   1   2   3   4   5
    tree = TokenTree([7, 8, 7, 9, 7, 5], [ROOT, ROOT, 1, 1, 2, 4])
    assert tree.depths == [1, 1, 2, 2, 3, 4] and tree.depth == 4 and not tree.is_chain
    choices = {ROOT: 8, 0: 1, 1: 7, 2: 7, 3: 2, 4: 6, 5: 3}
    assert tree.accepted(choices.get) == [1, 2, 4]
    assert tree.accepted({**choices, ROOT: 3}.get) == []
    assert tree.accepted({ROOT: 8, 1: 9}.get) == [1, 3]
    assert TokenTree.chain([4, 4, 4]).is_chain and TokenTree.chain([]).depth == 0
