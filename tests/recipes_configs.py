"""What the targets of launcher/recipes publish in their config.json, as far as drafts and the memory of jobs depend on it."""

from transformers import AutoConfig, PreTrainedConfig

_LLAMA3_ROPE = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
_LLAMA31 = dict(
    model_type="llama",
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rope_scaling=_LLAMA3_ROPE,
    rms_norm_eps=1e-5,
    num_key_value_heads=8,
    bos_token_id=128000,
    eos_token_id=[128001, 128008, 128009],
)
_LLAMA4_TEXT = dict(
    vocab_size=202048,
    hidden_size=5120,
    intermediate_size=8192,
    intermediate_size_mlp=16384,
    num_hidden_layers=48,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    bos_token_id=200000,
    eos_token_id=[200001, 200007, 200008],
    pad_token_id=200018,
)
_QWEN3 = dict(
    vocab_size=151936,
    head_dim=128,
    max_position_embeddings=40960,
    rope_theta=1000000.0,
    rope_scaling=None,
    rms_norm_eps=1e-6,
    bos_token_id=151643,
    eos_token_id=151645,
)
_QWEN3_MOE = _QWEN3 | dict(model_type="qwen3_moe", num_experts=128, num_experts_per_tok=8, num_key_value_heads=4)
_GPT_OSS = dict(
    model_type="gpt_oss",
    vocab_size=201088,
    hidden_size=2880,
    intermediate_size=2880,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131072,
    rope_theta=150000,
    rope_scaling=dict(
        rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=4096
    ),
    rms_norm_eps=1e-5,
    eos_token_id=200002,
    pad_token_id=199999,
    quantization_config=dict(quant_method="mxfp4"),
)
_FP8 = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128])
# Kimi-K2 ships its own name, `kimi_k2`, for DeepSeek-V3's architecture.
_DEEPSEEK_V3 = dict(
    model_type="deepseek_v3",
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_experts_per_tok=8,
    n_shared_experts=1,
    num_hidden_layers=61,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
    rms_norm_eps=1e-6,
    quantization_config=_FP8,
)


def _deepseek_yarn(factor: float, beta_fast: float) -> dict:
    mscales = dict(mscale=1.0, mscale_all_dim=1.0)
    return dict(type="yarn", factor=factor, beta_fast=beta_fast, beta_slow=1, original_max_position_embeddings=4096) | mscales


_SCOUT_ROPE = _LLAMA3_ROPE | dict(factor=16.0, high_freq_factor=1.0)
_PUBLISHED = {
    "llama3.1-8b": _LLAMA31 | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "llama3.3-70b": _LLAMA31 | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "llama4-scout": dict(
        model_type="llama4",
        text_config=_LLAMA4_TEXT | dict(num_local_experts=16, max_position_embeddings=10485760, rope_scaling=_SCOUT_ROPE),
    ),
    "llama4-maverick": dict(
        model_type="llama4",
        text_config=_LLAMA4_TEXT
        | dict(num_local_experts=128, interleave_moe_layer_step=2, max_position_embeddings=1048576, rope_scaling=None),
    ),
    "qwen3-8b": _QWEN3
    | dict(
        model_type="qwen3",
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "qwen3-30b-a3b": _QWEN3_MOE
    | dict(hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32),
    "qwen3-235b-a22b": _QWEN3_MOE
    | dict(hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=94, num_attention_heads=64),
    "gpt-oss-20b": _GPT_OSS | dict(num_hidden_layers=24, num_local_experts=32),
    "gpt-oss-120b": _GPT_OSS | dict(num_hidden_layers=36, num_local_experts=128),
    "deepseek-v3": _DEEPSEEK_V3
    | dict(
        n_routed_experts=256,
        n_group=8,
        topk_group=4,
        first_k_dense_replace=3,
        vocab_size=129280,
        num_attention_heads=128,
        num_key_value_heads=128,
        max_position_embeddings=163840,
        rope_theta=10000,
        rope_scaling=_deepseek_yarn(factor=40, beta_fast=32),
        bos_token_id=0,
        eos_token_id=1,
    ),
    "kimi-k2": _DEEPSEEK_V3
    | dict(
        n_routed_experts=384,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        vocab_size=163840,
        num_attention_heads=64,
        num_key_value_heads=64,
        max_position_embeddings=131072,
        rope_theta=50000.0,
        rope_scaling=_deepseek_yarn(factor=32.0, beta_fast=1.0),
        bos_token_id=163584,
        eos_token_id=163585,
    ),
}
RECIPES = tuple(_PUBLISHED)


def target_config(recipe: str) -> PreTrainedConfig:
    """The Transformers config of a recipe's target."""
    published = {key: dict(value) if isinstance(value, dict) else value for key, value in _PUBLISHED[recipe].items()}
    if "text_config" in published and published["text_config"]["rope_scaling"] is not None:
        published["text_config"]["rope_scaling"] = dict(published["text_config"]["rope_scaling"])
    return AutoConfig.for_model(published.pop("model_type"), **published)
