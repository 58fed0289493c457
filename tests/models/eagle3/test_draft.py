"""Names, shapes and rotary embeddings of the draft, as docs/formats.md has them."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from engine.config.sections import DraftSection
from engine.kernels.elementwise import rotate
from engine.models.draft_layers import RotaryTable
from engine.models.eagle3.draft import Eagle3Draft, LayerKeys
from engine.models.eagle3.draft_config import derive_draft_config
from engine.models.eagle3.served_draft import ServedEagle3
from engine.models.vocab_map import VocabMap
from tests.tiny import DRAFT_VOCAB, HIDDEN, VOCAB, make_draft

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA31_8B = AutoConfig.for_model(
    "llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_parameters=LLAMA3_ROPE,
)
LAYER = {
    "self_attn.q_proj.weight": [4096, 8192],
    "self_attn.k_proj.weight": [1024, 8192],
    "self_attn.v_proj.weight": [1024, 8192],
    "self_attn.o_proj.weight": [4096, 4096],
    "mlp.gate_proj.weight": [14336, 4096],
    "mlp.up_proj.weight": [14336, 4096],
    "mlp.down_proj.weight": [4096, 14336],
    "hidden_norm.weight": [4096],
    "input_layernorm.weight": [4096],
    "post_attention_layernorm.weight": [4096],
}
OUTSIDE = {"fc.weight": [4096, 12288], "norm.weight": [4096], "lm_head.weight": [32000, 4096]}


def listing(**options: object) -> dict[str, list[int]]:
    """Names and shapes of the draft of Llama-3.1-8B, none of it in memory."""
    with torch.device("meta"):
        draft = Eagle3Draft(derive_draft_config(LLAMA31_8B, DraftSection(vocab_size=32000, **options)))
    return {name: list(weight.shape) for name, weight in draft.state_dict().items()}


def test_names_and_shapes_are_those_of_the_checkpoint():
    assert listing() == OUTSIDE | {f"midlayer.{name}": shape for name, shape in LAYER.items()}


def test_eagle_3_1_adds_a_norm_per_auxiliary_state():
    added = {f"fc_norm.{index}.weight": [4096] for index in range(3)}
    assert listing(fc_norm=True, norm_output=True) == listing() | added


def test_later_layers_read_the_state_alone():
    narrow = {
        name: [shape[0], 4096] if "q_proj" in name or "k_proj" in name or "v_proj" in name else shape
        for name, shape in LAYER.items()
    }
    del narrow["input_layernorm.weight"]
    layers = {"layers.0.": LAYER, "layers.1.": narrow, "layers.2.": narrow}
    expected = {prefix + name: shape for prefix, layer in layers.items() for name, shape in layer.items()}
    assert listing(num_layers=3) == OUTSIDE | expected


def test_a_draft_of_another_width_projects_its_target_s_embedding():
    shapes = listing(hidden_size=2048)
    assert shapes["embed_projection.weight"] == [2048, 4096]
    assert shapes["fc.weight"] == [2048, 12288]
    assert shapes["midlayer.self_attn.q_proj.weight"] == [4096, 4096]
    assert shapes["midlayer.self_attn.o_proj.weight"] == [2048, 4096]
    assert listing(hidden_size=2048, fc_norm=True)["fc_norm.2.weight"] == [4096]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
        LLAMA3_ROPE,
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 2048},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_embeddings_are_those_of_transformers(rope):
    config = replace(make_draft().config, head_dim=16, max_position_embeddings=8192, rope_parameters=rope)
    position_Q = torch.tensor([0, 1, 2, 77, 4095, 8191])
    llama = LlamaRotaryEmbedding(LlamaConfig(head_dim=16, max_position_embeddings=8192, rope_parameters=dict(rope)))
    x_QHE = torch.randn(6, 3, 16)
    cos, sin = llama(x_QHE, position_Q[None])
    theirs, _ = apply_rotary_pos_emb(x_QHE[None], x_QHE[None], cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(rotate(x_QHE, RotaryTable(config).cos_sin(position_Q)), theirs[0], rtol=1e-5, atol=1e-5)


def test_casting_the_draft_leaves_its_rotary_table_alone():
    draft = make_draft()
    position_Q = torch.arange(100)
    before = draft.rotary.cos_sin(position_Q)
    after = draft.to(torch.bfloat16).rotary.cos_sin(position_Q)
    assert draft.fc.weight.dtype == torch.bfloat16
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(after, before, strict=True))


def test_the_rotary_table_is_no_weight_and_no_buffer():
    assert {id(tensor) for tensor in make_draft().buffers()} == set()


def test_the_embedding_comes_before_the_state():
    draft = make_draft()
    seen = []
    draft.midlayer.self_attn.q_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    embed_QD = torch.randn(2, HIDDEN)
    state_QD = torch.randn(2, HIDDEN)
    draft.step(embed_QD, state_QD, torch.arange(2), [LayerKeys(torch.arange(2), torch.tensor([0, 2]))])
    expected = torch.cat([draft.midlayer.input_layernorm(embed_QD), draft.midlayer.hidden_norm(state_QD)], -1)
    assert torch.equal(seen[0], expected)


def test_the_next_step_reads_the_pre_norm_output_or_in_eagle_3_1_the_normed_one():
    output_QD = torch.randn(3, HIDDEN)
    draft = make_draft()
    assert draft.next_state(output_QD) is output_QD
    normed = Eagle3Draft(replace(draft.config, norm_output=True))
    assert torch.equal(normed.next_state(output_QD), normed.norm(output_QD))
    assert torch.equal(normed.logits(output_QD), normed.lm_head(normed.norm(output_QD)))


def test_a_served_draft_proposes_target_ids():
    draft = make_draft().requires_grad_(False)
    vocab_map = VocabMap.most_frequent(torch.arange(VOCAB), DRAFT_VOCAB)
    embed_VD = torch.randn(VOCAB, HIDDEN)
    output_QD = torch.randn(5, HIDDEN)
    served = ServedEagle3(draft, vocab_map, embed_VD)
    best_Q = draft.logits(output_QD).argmax(-1)
    assert torch.equal(served.best_id(draft.logits(output_QD)), best_Q + vocab_map.d2t[best_Q])
    assert torch.equal(served.embed(torch.tensor([7, 0])), embed_VD[[7, 0]])
