"""The frozen target: packed documents see themselves alone, and what is captured is what Transformers reports."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cohere2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    Llama4Config,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2_5_VLConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from engine.batch import PackedBatch
from engine.config.sections import TargetSection
from engine.models.target_families import CHUNKS_START_WITH_DOCUMENTS
from engine.parallel.mesh import Group, TargetMesh
from engine.target.frozen import FrozenTarget, capture
from tests.parallel.families import tiny_config, tiny_model

AUX = (1, 3, 4)
LENGTHS = (9, 1, 17, 2)
SHAPE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
WINDOWED = dict(head_dim=8, sliding_window=4)
SMALL_LLAMA4 = SHAPE | dict(
    head_dim=8,
    intermediate_size_mlp=48,
    num_local_experts=2,
    attention_chunk_size=4,
    no_rope_layers=[1, 1, 0, 1, 1, 0],
    floor_scale=3,
)
VISION = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14)

CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4),
    "gemma2": lambda: Gemma2Config(**SHAPE, **WINDOWED, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3_text": lambda: Gemma3TextConfig(**SHAPE, **WINDOWED, sliding_window_pattern=3),
    "gpt_oss": lambda: GptOssConfig(**SHAPE, **WINDOWED, num_local_experts=4, num_experts_per_tok=2),
    "llama4_text": lambda: Llama4TextConfig(**SMALL_LLAMA4),
    "llama4_text untuned": lambda: Llama4TextConfig(**SMALL_LLAMA4, attn_temperature_tuning=False),
    "phi3": lambda: Phi3Config(**SHAPE, sliding_window=4),
    "deepseek_v3": lambda: DeepseekV3Config(
        **SHAPE | dict(num_key_value_heads=4),
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=16,
    ),
    "cohere2": lambda: Cohere2Config(**SHAPE, sliding_window=4, logit_scale=0.5),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=4.0),
    "qwen3_next": lambda: Qwen3NextConfig(
        **SHAPE,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "gemma3 with images": lambda: Gemma3Config(
        text_config=Gemma3TextConfig(**SHAPE, **WINDOWED).to_dict(), vision_config=VISION, mm_tokens_per_image=4
    ),
    "llama4 with images": lambda: Llama4Config(text_config=SMALL_LLAMA4),
    "qwen2.5-vl": lambda: Qwen2_5_VLConfig(
        text_config=SHAPE | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])),
        vision_config=dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=1, out_hidden_size=32),
    ),
}
ONE_BY_ONE = {"qwen3_next"}
if not CHUNKS_START_WITH_DOCUMENTS:
    ONE_BY_ONE |= {"llama4_text", "llama4_text untuned", "llama4 with images"}


def _model(name: str):
    config = CONFIGS[name]()
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if name in ("gemma3 with images", "qwen2.5-vl") else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough for attention to matter: at the usual 0.02 a missing mask hides in rounding.
            parameter.normal_(0, 0.15)
    return model


def _batch(lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    ids_T = torch.randint(3, 97, (sum(lengths),), generator=generator)
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    return PackedBatch(ids_T, torch.ones_like(ids_T, dtype=torch.bool), cu_seqlens)


def _reference(model, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Transformers itself, one document at a time: aux [T, 3D], last hidden [T, D], logits [T, V]."""
    aux = []
    last = []
    logits = []
    for ids_L in batch.input_ids_T.split(batch.lengths.tolist()):
        with torch.no_grad():
            out = model(input_ids=ids_L[None], output_hidden_states=True, use_cache=False)
        aux.append(torch.cat([out.hidden_states[layer + 1][0] for layer in AUX], dim=-1))
        last.append(out.hidden_states[-1][0])
        logits.append(out.logits[0].float())
    return torch.cat(aux), torch.cat(last), torch.cat(logits)


def _error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_transformers_one_document_at_a_time(name):
    model = _model(name)
    batch = _batch()
    if name == "gemma2":
        # The family's sdpa path drops the cap of the scores; eager is its definition.
        model.set_attn_implementation("eager")
    aux_TA, last_TD, logits_TV = _reference(model, batch)
    target = FrozenTarget(model, AUX)
    assert target.packs == (name not in ONE_BY_ONE)
    slots_N = torch.tensor([0, 3, 8, 9, 12, 26, 28])
    out = target(batch, slots_N)
    assert _error(out.aux_TA, aux_TA) < 1e-5
    assert _error(out.last_hidden_ND, last_TD[slots_N]) < 1e-5
    assert _error(target.head.logits(out.last_hidden_ND), logits_TV[slots_N]) < 1e-5
    assert torch.equal(out.argmax_N, logits_TV[slots_N].argmax(-1).to(torch.int32))
    torch.testing.assert_close(out.lse_N, logits_TV[slots_N].logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(out.slots_N, slots_N)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_document_bounds_the_result_is_another(name):
    target = FrozenTarget(_model(name), AUX)
    batch = _batch()
    slots_N = torch.arange(sum(LENGTHS))
    one_document = PackedBatch(batch.input_ids_T, batch.assistant_mask_T, torch.tensor([0, sum(LENGTHS)], dtype=torch.int32))
    packed = target(batch, slots_N)
    merged = target(one_document, slots_N)
    assert _error(merged.aux_TA, packed.aux_TA) > 1e-2
    assert _error(merged.last_hidden_ND, packed.last_hidden_ND) > 1e-2


def test_windows_matter_beyond_their_length():
    # Guards the tests above: a window that is ignored would make its own reference.
    batch = _batch()
    windowed = FrozenTarget(_model("gemma3_text"), AUX)(batch, torch.arange(29)).aux_TA
    wide = _model("gemma3_text")
    wide.config.sliding_window = 64
    unwindowed = FrozenTarget(wide, AUX)(batch, torch.arange(29)).aux_TA
    inside = batch.position_T < 4
    assert _error(windowed[inside], unwindowed[inside]) < 1e-5
    assert _error(windowed[~inside], unwindowed[~inside]) > 1e-2


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2"])
def test_plain_decoding_with_a_cache_is_undisturbed_by_packed_forwards(name):
    target = FrozenTarget(_model(name), AUX)
    batch = _batch((12,))
    ids_1T = batch.input_ids_T[None]
    packed = target(batch, torch.arange(12))
    with torch.no_grad(), capture(target.model, AUX) as seen:
        first = target.model(input_ids=ids_1T[:, :7], use_cache=True)
        prefix = (seen.aux(), seen.last_hidden())
        target.model(input_ids=ids_1T[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    aux_1TA = torch.cat([prefix[0], seen.aux()], dim=1)
    last_1TD = torch.cat([prefix[1], seen.last_hidden()], dim=1)
    assert _error(aux_1TA[0], packed.aux_TA) < 1e-5
    assert _error(last_1TD[0], packed.last_hidden_ND) < 1e-5


def test_capture_leaves_no_hooks_behind():
    target = FrozenTarget(_model("llama"), AUX)
    with capture(target.model, AUX):
        pass
    assert not any(module._forward_hooks for module in target.model.modules())


def test_a_batch_without_slots_gives_aux_states_and_no_rows():
    target = FrozenTarget(_model("llama"), AUX)
    out = target(_batch(), torch.empty(0, dtype=torch.int64))
    assert out.aux_TA.shape == (29, 96)
    assert out.last_hidden_ND.shape == (0, 32) and out.argmax_N.shape == (0,) and out.lse_N.shape == (0,)


def test_nothing_of_the_target_can_be_trained():
    target = FrozenTarget(_model("llama"), AUX)
    assert not target.model.training
    assert not any(parameter.requires_grad for parameter in target.model.parameters())


def test_vision_towers_are_freed():
    model = _model("gemma3 with images")
    before = sum(parameter.numel() for parameter in model.parameters())
    target = FrozenTarget(model, AUX)
    assert sum(parameter.numel() for parameter in target.model.parameters()) < before
    assert not any("vision" in name or "multi_modal" in name for name, _ in target.model.named_parameters())


@pytest.mark.parametrize("family", ["deepseek_v4", "hy_v4", "qwen4_exp_text"])
def test_a_draft_reads_the_mean_of_residual_streams(family):
    target = FrozenTarget(tiny_model(family), (0, 1, 2))
    batch = _batch((7,))
    width = target.config.hidden_size
    with torch.no_grad():
        states = target.model(input_ids=batch.input_ids_T[None], output_hidden_states=True, use_cache=False).hidden_states
    streams = [states[layer + 1].reshape(7, 2, width) for layer in (0, 1, 2)]
    aux_TA = target(batch, torch.arange(7)).aux_TA
    assert _error(aux_TA, torch.cat([(state[:, 0] + state[:, 1]) / 2 for state in streams], dim=-1)) < 1e-5
    assert max((state[:, 0] - state[:, 1]).abs().max() for state in streams) > 1e-2  # or any one of them would do


def test_rows_behind_the_vocabulary_are_no_tokens():
    target = FrozenTarget(tiny_model("inkling_text"), (0, 1, 2))
    batch = _batch((9, 4))
    out = target(batch, torch.arange(13))
    real = target.config.unpadded_vocab_size
    assert real < target.config.vocab_size
    logits_TV = target.head.logits(out.last_hidden_ND)
    torch.testing.assert_close(out.lse_N, logits_TV[:, :real].logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert out.argmax_N.max() < real and logits_TV[:, real:].max() < -1e3


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("family", ["gemma3n_text", "hrm_text", "inkling2_text"])
def test_a_family_that_no_draft_can_read_is_refused_by_its_config_alone(family, tp_size, tmp_path):
    tiny_config(family).save_pretrained(tmp_path)
    mesh = TargetMesh(Group(tp_size, 0), Group())
    with pytest.raises(ValueError, match=f"target family '{family}' .*; use another target"):
        FrozenTarget.load(TargetSection(path=str(tmp_path)), torch.device("cpu"), (0, 1, 2), mesh=mesh)


def test_temperature_reaches_the_log_sum_exp():
    model = _model("llama")
    batch = _batch()
    slots_N = torch.arange(29)
    out = FrozenTarget(model, AUX, temperature=0.5)(batch, slots_N)
    _, _, logits_TV = _reference(model, batch)
    torch.testing.assert_close(out.lse_N, (logits_TV / 0.5).logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3 with images"])
def test_a_saved_target_loads_as_it_was(name, tmp_path):
    model = _model(name)
    model.save_pretrained(tmp_path)
    section = TargetSection(path=str(tmp_path), dtype="float32", aux_layers=AUX)
    loaded = FrozenTarget.load(section, torch.device("cpu"))
    slots_N = torch.arange(29)
    assert loaded.aux_layers == AUX and loaded.config.vocab_size == 97
    assert loaded.embedding.whole().shape == (97, 32)
    assert torch.equal(loaded(_batch(), slots_N).aux_TA, FrozenTarget(model, AUX)(_batch(), slots_N).aux_TA)


def test_a_head_that_does_more_than_we_know_is_refused():
    model = _model("llama")
    head = model.lm_head
    head.register_forward_hook(lambda module, args, output: output + torch.arange(97))
    with pytest.raises(ValueError, match="changes its logits"):
        FrozenTarget(model, AUX)


def test_a_target_says_how_its_documents_attend():
    assert FrozenTarget(_model("gpt_oss"), AUX).attention.startswith("in blocks")
    assert FrozenTarget(_model("qwen3_next"), AUX).attention.startswith("a document at a time")


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="target.aux_layers"):
        FrozenTarget(_model("llama"), (1, 3, 5))
    with pytest.raises(ValueError, match="target.aux_layers"):
        FrozenTarget(_model("llama"), None)
