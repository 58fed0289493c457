"""Config of a block drafter, derived from the target's config or read from a config.json.

The keys and where they stand are those that SGLang 0.5.23 and vLLM 0.33 read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from transformers import PreTrainedConfig

from engine.config.block_sections import BlockSection
from engine.config.sections import DraftSection
from engine.models.block_drafter.block_facts import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    block_fact,
    causality,
    check_without_effect,
    checked_layers,
    one_causality,
    require_numbers,
    windows_of_layers,
)
from engine.models.target_families import check_aux_layers, check_family, num_layers, text_config
from engine.models.target_shapes import (
    TokenId,
    attention_shape,
    check_layer_shapes,
    dense_width,
    derived_rope,
    exported_rope,
    first_of,
    required,
    target_token,
    token_id_of,
)

NUM_AUX = 5  # auxiliary layers that are read by default, of targets that have as many
# Families whose layers SGLang counts from their inputs when it captures them for block drafters.
OTHER_CAPTURES = ("kimi_k3", "bailing", "inkling", "minimax")
ConfigT = TypeVar("ConfigT", bound="BlockConfig")


@dataclass(frozen=True)
class BlockConfig:
    """Shapes of a block drafter, and the facts about the target that a server needs.

    hidden_size, vocab_size: the target's. num_target_layers: layers of the target.
    aux_layers: 0-based ids of the target layers whose outputs the draft reads, ascending.
    block_size: rows B of a block. mask_token_id: token of all its rows but the first.
    windows: sliding window of each layer in tokens; None = full attention.
    is_causal: whether rows of a block attend to earlier rows of it only; None = in the layers that have a window.
    trained_with: hashes of the tokenizer and the template, so that they can be compared when serving.
    Raises ValueError for shapes that no draft can have.
    """

    # Name in config.json, values of `projector_type` that trainers write for it, and whether the first row of a block drafts.
    architecture: ClassVar[str]
    projector_types: ClassVar[tuple[str, ...]]
    samples_from_anchor: ClassVar[bool] = False

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_hidden_layers: int
    rms_norm_eps: float
    hidden_act: str
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    vocab_size: int
    num_target_layers: int
    aux_layers: tuple[int, ...]
    block_size: int
    mask_token_id: int
    windows: tuple[int | None, ...]
    is_causal: bool | None
    attention_bias: bool
    bos_token_id: TokenId
    eos_token_id: TokenId
    pad_token_id: TokenId
    dtype: str = "bfloat16"
    trained_with: dict[str, str] | None = None

    def __post_init__(self) -> None:
        check_layer_shapes(self)
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"block.mask_token_id={self.mask_token_id} is no row of the target's embedding, which has {self.vocab_size}"
            )
        if len(self.windows) != self.num_hidden_layers:
            raise ValueError(
                f"block.windows has {len(self.windows)} entries for a draft of {self.num_hidden_layers} layers; give one each"
            )
        if self.block_size < 2:
            raise ValueError(f"block_size={self.block_size}: a block has at least 2 rows")

    @property
    def draft_vocab_size(self) -> int:
        """Tokens that the draft can propose: the target's whole vocabulary, since servers use the target's head."""
        return self.vocab_size

    @property
    def target_hidden_size(self) -> int:
        return self.hidden_size

    @property
    def num_predictions(self) -> int:
        """Tokens that a block drafts."""
        return self.block_size if self.samples_from_anchor else self.block_size - 1

    def to_dict(self) -> dict[str, Any]:
        """Return the exported config.json, with sorted keys. Every number is written, for servers' defaults differ."""
        rope = self.rope_parameters
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        is_sliding = any(window is not None for window in self.windows)
        exported: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": "qwen3",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "num_hidden_layers": self.num_hidden_layers,
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": self.hidden_act,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": dict(rope),
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if rope["rope_type"] == "default" else scaling,
            "vocab_size": self.vocab_size,
            "num_target_layers": self.num_target_layers,
            "block_size": self.block_size,
            "layer_types": [FULL_ATTENTION if window is None else SLIDING_ATTENTION for window in self.windows],
            "use_sliding_window": is_sliding,
            "sliding_window": next((window for window in self.windows if window is not None), None),
            "max_window_layers": 0,
            "attention_bias": self.attention_bias,
            "tie_word_embeddings": False,
            "torch_dtype": self.dtype,
            "dtype": self.dtype,
            "dflash_config": self.block_facts(),
        }
        if self.is_causal is not None:
            exported["is_causal"] = self.is_causal
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            exported[name] = list(value) if isinstance(value, tuple) else value
        if self.trained_with:
            exported["draftspeed"] = self.trained_with
        return dict(sorted((exported | self.top_level_facts()).items()))

    def block_facts(self) -> dict[str, Any]:
        """Return the contents of `dflash_config`."""
        return {
            "block_size": self.block_size,
            "mask_token_id": self.mask_token_id,
            "target_layer_ids": list(self.aux_layers),
        }

    def top_level_facts(self) -> dict[str, Any]:
        """Return the keys of the method at the top of config.json."""
        return {}

    @classmethod
    def own_facts(cls, exported: dict[str, Any], source: str | Path) -> dict[str, Any]:
        """Return the fields that a method adds, read from a config.json."""
        return {}

    @classmethod
    def from_dict(
        cls: type[ConfigT],
        exported: dict[str, Any],
        source: str | Path = "draft config",
        num_target_layers: int | None = None,
    ) -> ConfigT:
        """Return the config from a config.json, the inverse of `to_dict`; published ones can be read too.

        source: the file that the config was read from, for error messages.
        num_target_layers: layers of the target, for a config.json that does not state them; None = as few as the ids allow.
        Raises ValueError naming a key that is missing or has a value that servers would read differently.
        """
        cls.check_architecture(exported, source)
        nested = exported.get("dflash_config") or {}
        require_numbers(
            exported, ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"), source
        )
        cls.check_served_keys(exported, nested, source)
        layers = block_fact(exported, nested, "target_layer_ids", source)
        num_target_layers = exported.get("num_target_layers") or num_target_layers
        windows = windows_of_layers(exported, nested, source)
        return cls(
            hidden_size=exported["hidden_size"],
            intermediate_size=exported["intermediate_size"],
            num_attention_heads=exported["num_attention_heads"],
            num_key_value_heads=exported.get("num_key_value_heads", 32),
            head_dim=exported.get("head_dim", 128),
            num_hidden_layers=exported["num_hidden_layers"],
            rms_norm_eps=exported.get("rms_norm_eps", 1e-6),
            hidden_act=exported.get("hidden_act", "silu"),
            max_position_embeddings=exported.get("max_position_embeddings", 32768),
            rope_parameters=exported_rope(exported),
            vocab_size=exported["vocab_size"],
            num_target_layers=checked_layers(layers, num_target_layers, source),
            aux_layers=tuple(layers),
            block_size=block_fact(exported, nested, "block_size", source),
            mask_token_id=block_fact(exported, nested, "mask_token_id", source),
            windows=windows,
            is_causal=causality(exported, nested, windows, source),
            attention_bias=bool(exported.get("attention_bias", False)),
            bos_token_id=token_id_of(exported.get("bos_token_id")),
            eos_token_id=token_id_of(exported.get("eos_token_id")),
            pad_token_id=token_id_of(exported.get("pad_token_id")),
            dtype=exported.get("dtype") or exported.get("torch_dtype") or "bfloat16",
            trained_with=exported.get("draftspeed"),
            **cls.own_facts(exported, source),
        )

    @classmethod
    def check_architecture(cls, exported: dict[str, Any], source: str | Path) -> None:
        """Raise ValueError unless a config.json is of this method."""
        names = exported.get("architectures")
        if names != [cls.architecture]:
            raise ValueError(
                f"{source} is of another draft method: found architectures {names}; expected [{cls.architecture!r}]"
            )

    @classmethod
    def check_served_keys(cls, exported: dict[str, Any], nested: dict[str, Any], source: str | Path) -> None:
        """Raise ValueError for a key with which a server, or the draft's own trainer, computes something else.

        nested: the contents of `dflash_config`.
        """
        check_without_effect(exported, nested, source)
        projector_type = nested.get("projector_type")
        if projector_type not in (None, *cls.projector_types):
            raise ValueError(
                f"{source} has projector_type={projector_type!r} in dflash_config, whose heads a {cls.architecture} does not "
                f"have; use a draft with {' or '.join(cls.projector_types)}"
            )
        for value in (nested.get("sample_from_anchor"), exported.get("sample_from_anchor")):
            if value is not None and value != cls.samples_from_anchor:
                drafted = "a token" if cls.samples_from_anchor else "no token"
                raise ValueError(
                    f"{source} has sample_from_anchor={value!r}; use a {cls.architecture} in which the first row of a block "
                    f"drafts {drafted}"
                )


def shared_shapes(
    target_config: PreTrainedConfig,
    draft: DraftSection,
    block: BlockSection,
    aux_layers: tuple[int, ...] | None,
    block_size: int,
    mask_token_id: int,
) -> dict[str, Any]:
    """Return the fields of `BlockConfig` for a target.

    The draft is as wide as its target, for it shares the target's embedding and head. Heads, MLP
    width and RoPE follow the target as those of an EAGLE-3 draft do; options in `draft` override them.
    Raises ValueError if the draft cannot follow the target.
    """
    target = text_config(target_config)
    check_family(target)
    heads, groups, head_dim = attention_shape(target, draft)
    windows = block.windows_of(draft.num_layers)
    return {
        "hidden_size": target.hidden_size,
        "intermediate_size": draft.intermediate_size or dense_width(target),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "num_hidden_layers": draft.num_layers,
        "rms_norm_eps": first_of(target, ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), 1e-6),
        "hidden_act": "silu",
        "max_position_embeddings": required(target, "max_position_embeddings"),
        "rope_parameters": derived_rope(target),
        "vocab_size": target.vocab_size,
        "num_target_layers": num_layers(target),
        "aux_layers": choose_block_layers(target_config, aux_layers),
        "block_size": block_size,
        "mask_token_id": mask_token_id,
        "windows": windows,
        "is_causal": one_causality(block.causal, windows),
        "attention_bias": block.attention_bias,
        "bos_token_id": target_token(target_config, "bos_token_id"),
        "eos_token_id": target_token(target_config, "eos_token_id"),
        "pad_token_id": target_token(target_config, "pad_token_id"),
    }


def choose_block_layers(target_config: PreTrainedConfig, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the target layers that the draft reads, ascending.

    Their default is spread from layer 1 to layer L - 3 of L layers; five of them, or fewer of a small target.
    Raises ValueError unless servers capture all of them.
    """
    target = text_config(target_config)
    if target.model_type.startswith(OTHER_CAPTURES):
        raise ValueError(
            f"target family {target.model_type!r}: SGLang captures the layers before the ones that a block drafter names; "
            "train an EAGLE-3 draft for it (draft.method=eagle3)"
        )
    count = num_layers(target)
    if wanted is None:
        wanted = spread_layers(count)
    return check_aux_layers(wanted, count)


def spread_layers(num_target_layers: int) -> tuple[int, ...]:
    """Return up to five layers at even distances from layer 1 to layer L - 3; 1, 9, 17, 25 and 33 of 36 layers.

    Source: published DFlash drafts and SGLang's default for a config.json that names no layers.
    """
    first = min(1, num_target_layers - 2)
    last = max(first, num_target_layers - 3)
    count = min(NUM_AUX, last - first + 1)
    if count < 2:
        return (last,)
    return tuple(round(first + index * (last - first) / (count - 1)) for index in range(count))
