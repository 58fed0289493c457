"""A tiny random causal LM of every family of the installed Transformers that publishes a TP or EP plan.

One rule shrinks a family's default config: widths and counts by name, and layers so that every kind of layer occurs. What a
family needs beyond the rule stands in `OVERRIDES`, mostly features of its released checkpoints that its defaults leave out.
A document for them repeats no token: Doge's first layer keeps its best keys by token alone, and two of one token tie.
`python tests/parallel/families.py [FAMILY ...]` checks each family and prints one line for it.
"""

import copy
import dataclasses
import functools
import sys
import time

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 96
HIDDEN = 32
LAYERS = 4
HEADS = 4
EXPERTS = 4
STD = 0.2  # of new weights, near 1 / sqrt(HIDDEN): logits and scores spread by about 1

FULL = "full_attention"
SLIDING = "sliding_attention"
LINEAR = "linear_attention"
DENSE = "dense"
SPARSE = "sparse"
ROPE, LOCAL_ROPE = ({"rope_type": "default", "rope_theta": theta} for theta in (1e6, 1e4))
HALF_ROTARY = {"partial_rotary_factor": 0.5}
LONG_ROPE = LOCAL_ROPE | dict(rope_type="longrope", short_factor=[1.0, 1.2, 1.5, 2.0], long_factor=[1.0, 2.0, 4.0, 8.0])

# Alternating mixers over halves of MLPs: four layers hold every pair of two kinds of mixer and two kinds of MLP.
KINDS = {"layer_types": (0, 1, 0, 1), "mlp_layer_types": (0, 0, 1, 1)}
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# The most that a field of this name keeps; a default below it stays, so top-1 routing and a single KV head do.
MOST = {
    name: most
    for most, names in (
        (VOCAB, "vocab_size vocab_size_per_layer_input"),
        (VOCAB - 4, "unpadded_vocab_size"),
        (256, "max_position_embeddings"),
        (LAYERS, "num_hidden_layers"),
        (HIDDEN, "hidden_size"),
        (48, "intermediate_size dense_intermediate_size intermediate_size_mlp ffn_hidden_size"),
        (16, "moe_intermediate_size expert_ffn_hidden_size router_hidden_size"),
        (16, "shared_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"),
        (16, "moe_shared_expert_intermediate_size"),
        (HEADS, "num_attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads"),
        (2, "num_key_value_heads swa_num_key_value_heads linear_num_key_heads"),
        (8, "head_dim swa_head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim query_pre_attn_scalar"),
        (8, "linear_head_dim linear_key_head_dim linear_value_head_dim"),
        (16, "q_lora_rank kv_lora_rank o_lora_rank"),
        (2, "o_groups"),
        (5, "sliding_window sliding_window_size keep_window_size"),
        (4, "attention_chunk_size floor_scale log_scaling_n_floor"),
        (6, "rel_extent"),
        (4, "index_topk"),
        (2, "index_block_size index_topk_blocks"),
        (8, "index_head_dim"),
        (16, "index_n_heads"),  # a ReLU mutes each with chance 1/2, and keys that all of them mute would tie
        (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
        (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k zero_expert_num"),
        (2, "n_group num_expert_group"),
        (1, "topk_group"),
        (2, "first_k_dense_replace num_dense_layers"),
        (8, "mamba_num_heads mamba_n_heads mamba_head_dim mamba_d_head mamba_d_state ssm_state_size"),
        (2, "n_groups"),
        (4, "chunk_size mamba_chunk_size block_size"),
        (2, "hc_mult hc_count"),
        (8, "hc_lowrank laurel_rank hidden_size_per_layer_input"),
        (16, "dim_model_base"),
    )
    for name in names.split()
}

MULTIPLIERS = dict(embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.25)
WINDOWED = dict(use_sliding_window=True, sliding_window=5, layer_types=[FULL, SLIDING, FULL, SLIDING])
GROUPED = dict(n_routed_experts=8)  # two groups of four
MIXED_MLPS = [DENSE, DENSE, SPARSE, SPARSE]
GEMMA4 = dict(num_key_value_heads=4, num_global_key_value_heads=2, global_head_dim=16, attention_k_eq_v=True)
ROPE_BY_LAYER = dict(layer_types=[FULL, SLIDING, FULL, SLIDING], layer_rope_theta=[0.0, 1e4, 1e6, 1e4])

OVERRIDES = {
    "afmoe": dict(mup_enabled=True, route_scale=2.5),
    "aria_text": dict(num_key_value_heads=4),
    "axk1": GROUPED,
    "bailing_hybrid": dict(num_experts=8),
    "beam": dict(num_experts=8),
    "cohere": dict(use_qk_norm=True, logit_scale=0.5),
    "cohere2": dict(logit_scale=0.5),
    "cohere2_moe": dict(mlp_layer_types=MIXED_MLPS, prefix_dense_intermediate_size=48, num_shared_experts=1, logit_scale=0.5),
    "cohere_compass_text": dict(
        layer_types=[SLIDING, FULL, SLIDING, FULL],
        rope_parameters={SLIDING: LOCAL_ROPE | {"mrope_section": [2, 1, 1]}, FULL: None},
    ),
    "deepseek_v2": GROUPED
    | dict(num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=2)
    | dict(topk_method="group_limited_greedy"),
    "deepseek_v3": GROUPED,
    "deepseek_v32": GROUPED,
    "deepseek_v4": dict(
        partial_rotary_factor=0.5,
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        index_topk=2,
    ),
    "dots1": dict(n_routed_experts=4, n_shared_experts=2, num_experts_per_tok=2, first_k_dense_replace=2)
    | dict(num_key_value_heads=4, layer_types=[FULL, SLIDING, FULL, SLIDING]),
    "dots3_note_text": dict(
        swa_num_attention_heads=2,
        swa_num_key_value_heads=2,
        swa_q_lora_rank=16,
        swa_kv_lora_rank=32,
        swa_head_dim=24,
        swa_qk_nope_head_dim=16,
        swa_v_head_dim=8,
    ),
    "gemma": dict(num_key_value_heads=1),
    "gemma3n_text": dict(intermediate_size=48, num_kv_shared_layers=2, activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0]),
    "gemma4_text": GEMMA4
    | dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16, num_kv_shared_layers=2),
    "gemma4_unified_text": GEMMA4 | dict(num_kv_shared_layers=2, use_double_wide_mlp=True),
    "glm4_moe": dict(use_qk_norm=True, attention_bias=True),
    "glm_moe_dsa": dict(indexer_types=["full", "shared", "full", "shared"]),
    "granite": MULTIPLIERS,
    "granite_swa": MULTIPLIERS | ROPE_BY_LAYER,
    "granitemoe": MULTIPLIERS,
    "granitemoe_swa": MULTIPLIERS | ROPE_BY_LAYER | dict(shared_intermediate_size=16),
    "granitemoehybrid": MULTIPLIERS | dict(layer_types=[LINEAR, FULL, LINEAR, FULL]),
    "granitemoeshared": MULTIPLIERS | dict(shared_intermediate_size=16),
    "hrm_text": dict(num_hidden_layers=2, L_cycles=1, embedding_scale=5.0),
    "hunyuan_v1_moe": dict(head_dim=8, num_experts=4, moe_topk=2),
    "hy_v4": dict(indexer_types=["full", "shared", "full", "shared"]),
    "hyperclovax": MULTIPLIERS,
    "inkling2_text": dict(n_layers_per_attn_res_block=2),
    "inkling_text": dict(
        logits_mup_width_multiplier=2.0, mlp_layer_types=MIXED_MLPS, log_scaling_n_floor=4, unpadded_vocab_size=VOCAB - 4
    ),
    "jais2": dict(num_key_value_heads=4),
    "jamba": dict(attn_layer_period=4, attn_layer_offset=2),
    "laguna": dict(layer_types=[FULL, SLIDING, FULL, SLIDING], num_attention_heads_per_layer=[4, 8, 4, 8]),
    "lfm2_moe": dict(layer_types=["conv", FULL, "conv", FULL]),
    "llama4_text": dict(
        intermediate_size=16,
        layer_types=["chunked_attention", FULL, FULL, "chunked_attention"],
        no_rope_layers=[1, 0, 0, 1],
        floor_scale=3,  # short documents reach it
        moe_layers=[1, 3],
    ),
    "longcat_flash": dict(num_layers=4),
    "mellum": dict(layer_types=[FULL, SLIDING, FULL, SLIDING], mlp_layer_types=MIXED_MLPS),
    "mimo_v2_flash": dict(head_dim=12),
    "minimax": dict(head_dim=8, full_attn_alpha_factor=2.0, linear_attn_alpha_factor=2.0, mlp_alpha_factor=2.0),
    "minimax_m3_vl_text": dict(
        index_n_heads=2,  # as many as key heads
        layer_types=[FULL, "minimax_m3_sparse"] * 2,
        mlp_layer_types=MIXED_MLPS,
        intermediate_size=16,
        rope_parameters=ROPE | HALF_ROTARY,
    ),
    "ministral": dict(head_dim=8, layer_types=[SLIDING, FULL, SLIDING, FULL]),
    "ministral3": dict(
        rope_parameters=ROPE
        | dict(rope_type="yarn", factor=64.0, original_max_position_embeddings=4, llama_4_scaling_beta=0.1)
        | dict(beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
    ),
    "nemotron": dict(num_key_value_heads=2),
    "nemotron_h": dict(moe_latent_size=16),
    "olmo": dict(clip_qkv=1.0),
    "olmo_hybrid": dict(linear_num_key_heads=4),
    "olmoe": dict(num_key_value_heads=4),
    "phi": dict(num_key_value_heads=4),
    "phi3": dict(sliding_window=5),
    "phi4_multimodal": dict(
        original_max_position_embeddings=6,  # some documents are longer
        rope_parameters=LONG_ROPE,
        vision_config=dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, crop_size=28),
        audio_config=dict(
            hidden_size=8,
            intermediate_size=8,
            num_blocks=2,
            num_attention_heads=1,
            ext_pw_out_channel=8,
            depthwise_separable_out_channel=8,
            nemo_conv_channels=8,
            input_size=8,
            bias_max_distance=8,
        ),
    ),
    "phimoe": dict(attention_bias=True, lm_head_bias=True, sliding_window=5)
    | dict(rope_parameters=LONG_ROPE | dict(short_mscale=1.2, long_mscale=1.3, original_max_position_embeddings=6)),
    "qwen2": WINDOWED,
    "qwen2_moe": WINDOWED | dict(mlp_only_layers=[0, 1]),
    "qwen3": WINDOWED,
    "qwen3_moe": dict(mlp_only_layers=[0], norm_topk_prob=True),
    "qwen3_next": dict(mlp_only_layers=[0, 1]),
    "qwen4_exp_text": dict(
        indexer_n_heads=16,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=4,
        indexer_compress_ratio=2,
        ple_layer_ids=[1],
        heads_per_ngram=2,
        ngram_vocab_size_base=32,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=1,
    ),
    "starcoder2": dict(sliding_window=5),
    "youtu": dict(pad_token_id=None),  # loading zeroes the embedding of a pad token
    "zaya": dict(layer_types=["hybrid", "hybrid_sliding"] * 2, sliding_window=5),
}

# Families that no CPU runs without extra packages, and why.
CANNOT_RUN: dict[str, str] = {}


def _publishes_plan(family: str) -> bool:
    """Whether `family` is a config type with a tensor or expert parallel plan."""
    if family not in CONFIG_MAPPING:
        return False
    plans = ("base_model_tp_plan", "base_model_ep_plan")
    return any(getattr(CONFIG_MAPPING[family], plan, None) for plan in plans)


@functools.cache
def all_families() -> tuple[str, ...]:
    """Return every family that publishes a plan, sorted; imports all configs, which takes more than a second."""
    return tuple(sorted(filter(_publishes_plan, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))


def tiny_config(family: str) -> PreTrainedConfig:
    """The family's default config, shrunk; of a multimodal wrapper, the text config that its causal LM takes."""
    defaults = CONFIG_MAPPING[family]().get_text_config(decoder=True)
    # Not through getattr: a config whose layers differ refuses to name one value for them all.
    values = vars(defaults)
    alias = defaults.attribute_map
    fields = {field.name for field in dataclasses.fields(defaults)}
    values = {name: values.get(alias.get(name, name)) for name in fields}
    shrunk = {name: min(values[name], MOST[name]) for name in fields & MOST.keys() if isinstance(values[name], int)}
    shrunk |= {name: TOKEN_IDS[name] for name in fields & TOKEN_IDS.keys()}
    for name in fields & KINDS.keys():
        kinds = list(dict.fromkeys(values[name] or ()))
        if kinds:
            shrunk[name] = [kinds[place % len(kinds)] for place in KINDS[name]]
    if "kv_lora_rank" in fields:
        shrunk["num_key_value_heads"] = HEADS  # latent attention expands to a key and a value a head
    return type(defaults)(**shrunk | copy.deepcopy(OVERRIDES.get(defaults.model_type, {})))


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A causal LM of `tiny_config(family)` on the CPU, fp32, in eval mode, every weight and bias drawn from `seed`.

    Leaves the global random state as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).eval()
        _redraw(model)
    return model


@torch.no_grad()
def _redraw(model: PreTrainedModel) -> None:
    """Draw matrices anew, and move vectors and constants from their start, which for a norm or a decay rate means something.

    Of the buffers, routers' correction biases move and hash routers get their table; the rest is arithmetic, not weights.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict().items():
        if name.endswith("tid2eid"):
            tensor.copy_(torch.rand(len(tensor), EXPERTS).topk(tensor.shape[1]).indices)
        elif tensor.is_floating_point() and (name in parameters or tensor.dim() == 1):
            if tensor.dim() > 1 and (tensor != tensor.flatten()[0]).any():
                tensor.zero_()
            # Loading gives Zaya's skip expert its bias of -1 back, whatever the checkpoint holds.
            tensor.add_(torch.randn(tensor.shape) * (tensor != -1), alpha=STD)


def _kinds(model: PreTrainedModel) -> str:
    """The kinds of layer that the config names, then the parts of each distinct decoder layer, norms left out."""
    named = ["+".join(dict.fromkeys(getattr(model.config, name, None) or ())) for name in KINDS]
    family = type(model).__name__.removesuffix("ForCausalLM")
    stacks = [(name, stack) for name, stack in model.named_modules() if name.endswith("layers")]
    _, layers = min(stacks, key=lambda found: len(found[0]))
    parts = [[type(part).__name__ for part in layer.children()] for layer in layers]
    parts = ["+".join(name.removeprefix(family) for name in names if family in name and "Norm" not in name) for names in parts]
    return " ".join([*filter(None, named), "|", *dict.fromkeys(parts)])


@torch.no_grad()
def _check(family: str) -> str:
    """What the family's tiny model is made of; AssertionError for one that the tests could not rely on."""
    ids_1T = 3 + torch.randperm(VOCAB - 3, generator=torch.Generator().manual_seed(0))[None, :12]
    model = tiny_model(family)
    logits_TV, again_TV, other_TV = (
        tiny(input_ids=ids_1T, use_cache=False).logits[0] for tiny in (model, tiny_model(family), tiny_model(family, seed=1))
    )
    shorter_TV = model(input_ids=ids_1T[:, :7], use_cache=False).logits[0]
    spread = logits_TV.std().item()
    assert logits_TV.isfinite().all(), "logits are not finite"
    assert logits_TV.equal(again_TV), "one seed gives two models"
    assert 0.1 < spread < 100, f"logits spread by {spread}"
    assert (logits_TV - other_TV).abs().max() > 0.1 * spread, "seeds do not differ"
    assert (logits_TV[1:] - logits_TV[:-1]).abs().amax(-1).min() > 0.01 * spread, "positions do not differ"
    gap = (logits_TV[:7] - shorter_TV).abs().max().item()
    assert gap < 1e-4 * spread, f"not causal: a longer document changes earlier logits by {gap}"
    decoder = model.get_decoder()
    candidates = model.children() if decoder is model else (decoder,)
    assert any(isinstance(candidate, PreTrainedModel) for candidate in candidates), "no decoder inside"
    return f"{sum(parameter.numel() for parameter in model.parameters()):>8} weights  {_kinds(model)}"


def main(families: list[str]) -> int:
    """Print one line a family; returns how many failed."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    failed = 0
    for family in families or all_families():
        try:
            print(f"{family:20} ok {_check(family)}")
        except Exception as error:  # the next family is to be checked all the same
            failed += 1
            print(f"{family:20} {type(error).__name__}: {error}"[:300].replace("\n", " "))
    print(f"{failed} of {len(families or all_families())} failed; {time.perf_counter() - begin:.1f} s")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
