"""Folders of block drafters as other projects publish them: the keys, their places and the unused ones are theirs.

DFlash is written as z-lab and SpecForge write it, DSpark as DeepSpec, and DFlash2 as Muse-Glimmer.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.config.block_sections import DFLASH, DFLASH2, DSPARK
from engine.host.weight_index import INDEX
from engine.models.draft_folder import CONFIG, WEIGHTS
from tests.block_drafts import HIDDEN, MASK_TOKEN, VOCAB

Json = dict[str, Any]
# A target of a few thousand weights, as in `tests.block_drafts`, and a large one.
TINY: Json = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "num_target_layers": 6,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000,
    "vocab_size": VOCAB,
    "bos_token_id": None,
    "eos_token_id": None,
    "block_size": 5,
}
QWEN3_8B: Json = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 5,
    "num_target_layers": 36,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "vocab_size": 151936,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "block_size": 16,
}
OF_TRANSFORMERS: Json = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "qwen3",
    "tie_word_embeddings": False,
    "transformers_version": "4.57.1",
    "use_cache": True,
}
OF_TARGET: Json = {"mask_token_id": MASK_TOKEN, "target_layer_ids": [1, 3]}


def dflash_config(sizes: Json = TINY, of_target: Json = OF_TARGET) -> Json:
    """The facts about the target stand in `dflash_config`, the size of the blocks at the top, and no `is_causal` anywhere."""
    layers = sizes["num_hidden_layers"]
    return (
        OF_TRANSFORMERS
        | sizes
        | {
            "architectures": ["DFlashDraftModel"],
            "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
            "dflash_config": dict(of_target),
            "layer_types": ["full_attention"] * layers,
            "max_window_layers": layers,
            "rope_scaling": None,
            "sliding_window": None,
            "use_sliding_window": False,
        }
    )


def dspark_config(sizes: Json = TINY, of_target: Json = OF_TARGET) -> Json:
    """The target's config with everything of the draft at the top, and RoPE in its new place."""
    rope_theta = sizes["rope_theta"]
    config = (
        OF_TRANSFORMERS
        | sizes
        | of_target
        | {
            "architectures": ["Qwen3DSparkModel"],
            "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
            "layer_types": ["full_attention"] * sizes["num_hidden_layers"],
            "max_window_layers": sizes["num_target_layers"],
            "sliding_window": None,
            "use_sliding_window": False,
            "num_anchors": 512,
            "markov_rank": 6,
            "markov_head_type": "vanilla",
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
        }
    )
    del config["rope_theta"]
    return config


def dflash2_config(sizes: Json = TINY, of_target: Json = OF_TARGET) -> Json:
    """Everything of the draft stands in `dflash_config`, and all layers have a window."""
    layers = sizes["num_hidden_layers"]
    own = {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 5, "selector_top_k": 12}
    config = (
        OF_TRANSFORMERS
        | sizes
        | {
            "architectures": ["DFlash2DraftModel"],
            "dflash_config": of_target
            | own
            | {"block_size": sizes["block_size"], "output_multiplier": 1.0, "final_logit_softcapping": 0.0},
            "is_causal": False,
            "layer_types": ["sliding_attention"] * layers,
            "max_window_layers": 0,
            "sliding_window": 9,
            "use_sliding_window": True,
        }
    )
    del config["block_size"]
    return config


CONFIGS = {DFLASH: dflash_config, DSPARK: dspark_config, DFLASH2: dflash2_config}


def shapes_of(method: str, config: Json) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a draft's tensors by name, as published."""
    size = config["hidden_size"]
    width = config["intermediate_size"]
    head_dim = config["head_dim"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    num_aux = len(OF_TARGET["target_layer_ids"])
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (size, num_aux * size),
        "hidden_norm.weight": (size,),
        "norm.weight": (size,),
    }
    for layer in range(config["num_hidden_layers"]):
        of_layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (size,),
            "post_attention_layernorm.weight": (size,),
            "self_attn.q_proj.weight": (queries, size),
            "self_attn.k_proj.weight": (keys, size),
            "self_attn.v_proj.weight": (keys, size),
            "self_attn.o_proj.weight": (size, queries),
            "self_attn.q_norm.weight": (head_dim,),
            "self_attn.k_norm.weight": (head_dim,),
            "mlp.gate_proj.weight": (width, size),
            "mlp.up_proj.weight": (width, size),
            "mlp.down_proj.weight": (size, width),
        }
        if method == DFLASH2:
            for side in ("attention_conv", "mlp_conv"):
                of_layer[f"{side}.base_kernel"] = (2, 2, size)
                of_layer[f"{side}.kernel_projection.weight"] = (2 * 2 * size // 8, size)
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    if method == DSPARK:
        shapes["markov_head.markov_w1.weight"] = (config["vocab_size"], 6)
        shapes["markov_head.markov_w2.weight"] = (config["vocab_size"], 6)
        shapes["confidence_head.proj.weight"] = (1, size + 6)
        shapes["confidence_head.proj.bias"] = (1,)
    if method == DFLASH2:
        shapes["candidate_selector.predecessor_codebook"] = (config["vocab_size"], 5)
        shapes["candidate_selector.successor_codebook"] = (config["vocab_size"], 5)
        shapes["candidate_selector.hidden_projection.weight"] = (5, size)
    return shapes


def published_tensors(method: str) -> dict[str, Tensor]:
    """Return random tensors of a tiny draft, in bf16."""
    generator = torch.Generator().manual_seed(4)
    shapes = shapes_of(method, TINY)
    return {name: (torch.randn(shape, generator=generator) / 4).bfloat16() for name, shape in shapes.items()}


def write_published(folder: Path, config: Json, tensors: dict[str, Tensor], num_files: int = 1) -> None:
    """Write a folder with one file of weights, or with several and their index."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
    if num_files == 1:
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for index in range(num_files):
        name = f"model-{index + 1:05}-of-{num_files:05}.safetensors"
        part = dict(list(tensors.items())[index::num_files])
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
