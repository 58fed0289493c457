"""A target that reads a tree in one forward sees on each path what it sees when the path is read alone."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from engine.evaluation.decoding import keep_newest, reads_trees
from engine.kernels import reference
from engine.kernels.blocked_attention import ancestor_attention
from engine.target import tree_attention as module
from engine.target.frozen import FrozenTarget
from engine.target.tree_attention import TreeRow, tree_attention
from tests.drafters import EXPERTS, SHAPE, VOCAB

PARENTS = [-1, 0, 0, 1, 1, 3, 2, 5]
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]}
FAMILIES = {
    "llama": {},
    "qwen3_moe": EXPERTS,
    "gemma2": SLIDING,  # a soft cap
    "gemma3_text": SLIDING,
    "gpt_oss": SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},  # sinks
    "gemma4_text": SLIDING  # layers that read the cache of others
    | {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB},
    "llama4_text": {"floor_scale": 4, "num_local_experts": 2, "intermediate_size_mlp": 40},  # queries scaled by position
    "gpt2": None,  # learned positions
}


def make(family: str) -> FrozenTarget:
    torch.manual_seed(4)
    options = FAMILIES[family]
    if options is None:
        config = AutoConfig.for_model(family, vocab_size=VOCAB, n_embd=24, n_layer=5, n_head=4, n_positions=64)
    else:
        config = AutoConfig.for_model(family, **SHAPE, **options)
    return FrozenTarget(AutoModelForCausalLM.from_config(config, dtype=torch.float32), (0, 1, 3))


def logits_of(target: FrozenTarget, token_ids: list[int]) -> torch.Tensor:
    return target.model(torch.tensor([token_ids])).logits[0]


@pytest.fixture(params=["mask", "ancestors", "blocks"])
def implementation(request, monkeypatch) -> str:
    """How attention is computed: under a mask, or by ancestor attention, the reference and the blocked one."""
    chosen = {"mask": None, "ancestors": reference.ancestor_attention, "blocks": ancestor_attention}[request.param]
    monkeypatch.setattr(module, "choose_tree_attention", lambda *arguments: chosen)
    return request.param


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_each_path_is_read_as_it_is_alone(family, implementation):
    target = make(family)
    assert reads_trees(target)
    generator = torch.Generator().manual_seed(1)
    prompt_ids = torch.randint(0, VOCAB, (11,), generator=generator).tolist()
    tree_ids = torch.randint(0, VOCAB, (len(PARENTS),), generator=generator).tolist()
    cache = DynamicCache(config=target.model.config)
    target.model(torch.tensor([prompt_ids]), past_key_values=cache)
    cache.activate_past_recording()
    row = TreeRow(len(prompt_ids), PARENTS, target.device)
    with tree_attention(target.decoder, row):
        output = target.model(torch.tensor([tree_ids]), position_ids=row.position_N[None], past_key_values=cache)
    for token, path in enumerate(row.paths):
        alone = logits_of(target, prompt_ids + [tree_ids[one] for one in path])[-1]
        torch.testing.assert_close(output.logits[0, token], alone, rtol=1e-3, atol=1e-4)
    kept = [0, 1, 3]
    keep_newest(cache, len(PARENTS), kept)
    following = target.model(torch.tensor([[7, 8]]), past_key_values=cache).logits[0]
    alone = logits_of(target, [*prompt_ids, *(tree_ids[one] for one in kept), 7, 8])[-2:]
    torch.testing.assert_close(following, alone, rtol=1e-3, atol=1e-4)
