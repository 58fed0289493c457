"""Config of a draft, derived from the target's config or read from a config.json.

It can be written as the config.json that servers load.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from engine.config.sections import DraftSection
from engine.config.strict import parse_json, read_text
from engine.models.eagle3.flops import NUM_AUX, DraftShape
from engine.models.target_families import (
    check_aux_layers,
    check_family,
    check_served_aux_layers,
    default_aux_layers,
    num_layers,
    text_config,
)
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

ARCHITECTURE = "LlamaForCausalLMEagle3"
AUX_IDS = "eagle_aux_hidden_state_layer_ids"
# Architecture names of published EAGLE-3 drafts with Llama layers: SGLang's, vLLM's, and those of
# two training frameworks.
_EAGLE3_ARCHITECTURES = (ARCHITECTURE, "Eagle3LlamaForCausalLM", "LlamaEagle3DraftModel", "Eagle3DraftModel")
# Keys of P-EAGLE (parallel drafting), block drafters and Medusa. Some of these drafts are published
# under EAGLE-3's architecture name.
_KEYS_OF_OTHER_METHODS = (
    "parallel_drafting",
    "pard_token",
    "ptd_token_id",
    "mask_token_id",
    "block_size",
    "dflash_config",
    "dspark_noise_token_id",
    "markov_rank",
    "num_medusa_heads",
)
MUST_BE_FALSE = ("attention_bias", "mlp_bias", "bias", "tie_word_embeddings", "norm_before_residual")


@dataclass(frozen=True)
class Eagle3Config:
    """Shapes of a draft, and the facts about the target that a server needs.

    vocab_size: V, the target's vocabulary size. target_hidden_size: the target's hidden size.
    max_position_embeddings: the target's. draft_vocab_size: U.
    rope_parameters: rope_type, rope_theta and the keys of its scaling.
    aux_layers: 0-based ids of the target layers that the draft reads; None = not stated in the
        file.
    fc_norm, norm_output: options of EAGLE-3.1.
    trained_with: hashes of the tokenizer and the template, so that they can be compared when
        serving.
    Raises ValueError for shapes that no draft can have.
    """

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
    draft_vocab_size: int
    target_hidden_size: int
    aux_layers: tuple[int, ...] | None
    bos_token_id: TokenId
    eos_token_id: TokenId
    pad_token_id: TokenId
    fc_norm: bool
    norm_output: bool
    dtype: str
    trained_with: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if self.aux_layers is not None and len(self.aux_layers) != NUM_AUX:
            raise ValueError(f"an EAGLE-3 draft reads {NUM_AUX} auxiliary layers, not {list(self.aux_layers)}")
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"draft.vocab_size={self.draft_vocab_size} exceeds the target's vocabulary; use at most {self.vocab_size}"
            )
        check_layer_shapes(self)

    @property
    def shape(self) -> DraftShape:
        """Sizes on which the FLOPs depend."""
        return DraftShape(
            self.hidden_size,
            self.intermediate_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.draft_vocab_size,
            self.target_hidden_size,
            self.vocab_size,
            self.num_hidden_layers,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the exported config.json, with sorted keys.

        RoPE and dtype are written under both their old and their new names. The auxiliary layers are
        written twice as well: SGLang reads their ids in `eagle_config`, as layers whose outputs it
        captures, and vLLM reads those at the top, as layers whose inputs it captures.
        """
        shape = asdict(self)
        layers = list(shape.pop("aux_layers"))
        trained_with = shape.pop("trained_with")
        rope = self.rope_parameters
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        exported = shape | {
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if rope["rope_type"] == "default" else scaling,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "torch_dtype": self.dtype,
            "eagle_config": {AUX_IDS: layers, "use_aux_hidden_state": True},
            AUX_IDS: [layer + 1 for layer in layers],
        }
        if trained_with:
            exported["draftspeed"] = trained_with
        if self.target_hidden_size == self.hidden_size:
            del exported["target_hidden_size"]
        for option in ("fc_norm", "norm_output"):
            if not exported[option]:
                del exported[option]
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if isinstance(exported[token], tuple):
                exported[token] = list(exported[token])
        return dict(sorted(exported.items()))

    @classmethod
    def from_dict(cls, exported: dict[str, Any], source: str | Path = "draft config") -> "Eagle3Config":
        """Return the config from a config.json, the inverse of `to_dict`.

        Published EAGLE-3 configs can be read too; keys that older ones lack get default values.

        source: the file that the config was read from, for error messages.
        Raises ValueError naming a key that is missing or has a value that a draft cannot represent.
        """
        _check_is_eagle3(exported, source)
        hidden_size = exported["hidden_size"]
        num_heads = exported["num_attention_heads"]
        return cls(
            hidden_size=hidden_size,
            intermediate_size=exported["intermediate_size"],
            num_attention_heads=num_heads,
            num_key_value_heads=exported.get("num_key_value_heads") or num_heads,
            head_dim=exported.get("head_dim") or hidden_size // num_heads,
            num_hidden_layers=exported.get("num_hidden_layers", 1),
            rms_norm_eps=exported.get("rms_norm_eps", 1e-6),
            hidden_act=exported.get("hidden_act", "silu"),
            max_position_embeddings=exported["max_position_embeddings"],
            rope_parameters=exported_rope(exported),
            vocab_size=exported["vocab_size"],
            draft_vocab_size=exported.get("draft_vocab_size") or exported["vocab_size"],
            target_hidden_size=exported.get("target_hidden_size") or hidden_size,
            aux_layers=exported_aux_layers(exported, source),
            bos_token_id=token_id_of(exported.get("bos_token_id")),
            eos_token_id=token_id_of(exported.get("eos_token_id")),
            pad_token_id=token_id_of(exported.get("pad_token_id")),
            fc_norm=bool(exported.get("fc_norm")),
            norm_output=bool(exported.get("norm_output")),
            dtype=exported.get("dtype") or exported.get("torch_dtype") or "bfloat16",
            trained_with=exported.get("draftspeed"),
        )


def exported_aux_layers(exported: dict[str, Any], source: str | Path) -> tuple[int, ...] | None:
    """Return the target layers that a config.json names, or None if it names none.

    Raises ValueError if a server would capture other layers than those, or no layers at all.
    """
    eagle = exported.get("eagle_config") or {}
    outputs = eagle.get(AUX_IDS)
    inputs = exported.get(AUX_IDS)
    for layers in (outputs, inputs):
        is_list = isinstance(layers, list | tuple) and all(isinstance(layer, int) for layer in layers)
        if layers is not None and not is_list:
            raise ValueError(f"{source}: {AUX_IDS}={layers!r}: expected a list of layer numbers")
    if outputs is None:
        if inputs is None:
            return None
        outputs = [layer - 1 for layer in inputs]
    if inputs is not None and list(inputs) != [layer + 1 for layer in outputs]:
        raise ValueError(
            f"{source}: {AUX_IDS}={inputs} must be one more than the ids in eagle_config, {outputs}: vLLM reads the former, "
            "as inputs of layers, and SGLang the latter, as outputs; correct one of them"
        )
    if len(outputs) != NUM_AUX or list(outputs) != sorted(set(outputs)) or outputs[0] < 0:
        raise ValueError(
            f"{source}: {AUX_IDS}={outputs}: expected {NUM_AUX} distinct layers in ascending order, as servers capture them"
        )
    return tuple(outputs)


def derive_draft_config(
    target_config: PreTrainedConfig, draft: DraftSection, aux_layers: tuple[int, ...] | None = None
) -> Eagle3Config:
    """Return the draft config for a target.

    If `draft.config` is set, that file is read and checked against the target. Otherwise the shapes
    follow the target's (text) config:

    - D, vocabulary, token ids, norm epsilon and max positions are the target's.
    - H, G and E are the target's; H * E need not equal D. Latent attention (MLA) has no such heads.
      For it, E = 128, H = D / 128 rounded up to a power of two, and G = min(8, H), so that G and H
      are powers of two and divide over power-of-two tensor parallelism.
    - F is the target's dense width (Llama 4's `intermediate_size_mlp`, else `intermediate_size`) if
      that is at least 2 D. A mixture of experts may state an expert's width there; then F = 3.5 D,
      rounded up to a multiple of 256.
    - RoPE: theta, and linear, Llama-3 or YaRN scaling, are the target's. If layer types differ,
      those of full attention are used. Partial and multimodal RoPE become plain RoPE over the whole
      head (positions of text are equal on all axes). A target without RoPE gets theta 10000.
      LongRoPE and dynamic RoPE are refused, because their angles change with the length of the
      text.
    - Options in `draft` override each shape.

    aux_layers: ids of the target layers that the draft reads; None = 1, L//2-1, L-4.
    Raises ValueError naming the option or the part of the target's config that does not fit.
    """
    target = text_config(target_config)
    check_family(target)
    if draft.config is not None:
        return _read_draft_config(target, Path(draft.config), aux_layers)
    layers = choose_aux_layers(target, aux_layers)
    heads, groups, head_dim = attention_shape(target, draft)
    return Eagle3Config(
        hidden_size=draft.hidden_size or target.hidden_size,
        intermediate_size=draft.intermediate_size or dense_width(target),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        num_hidden_layers=draft.num_layers,
        rms_norm_eps=first_of(target, ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), 1e-6),
        hidden_act="silu",
        max_position_embeddings=required(target, "max_position_embeddings"),
        rope_parameters=derived_rope(target),
        vocab_size=target.vocab_size,
        draft_vocab_size=draft.vocab_size,
        target_hidden_size=target.hidden_size,
        aux_layers=layers,
        bos_token_id=target_token(target_config, "bos_token_id"),
        eos_token_id=target_token(target_config, "eos_token_id"),
        pad_token_id=target_token(target_config, "pad_token_id"),
        fc_norm=draft.fc_norm,
        norm_output=draft.norm_output,
        dtype="bfloat16",
    )


def choose_aux_layers(target_config: PreTrainedConfig, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the target layers that the draft reads: `wanted`, or 1, L//2-1, L-4.

    Raises ValueError unless they are three layers of the target that servers capture.
    """
    target = text_config(target_config)
    count = num_layers(target)
    layers = check_aux_layers(wanted or default_aux_layers(count), count, how_many=NUM_AUX)
    check_served_aux_layers(target.model_type, layers)
    return layers


def _read_draft_config(target: PreTrainedConfig, path: Path, aux_layers: tuple[int, ...] | None) -> Eagle3Config:
    exported = parse_json(read_text(path), path)
    if not isinstance(exported, dict):
        raise ValueError(f"{path}: expected the object of a draft's config.json")
    check_architecture(exported, path)
    if aux_layers is not None or exported_aux_layers(exported, path) is None:
        layers = aux_layers or default_aux_layers(num_layers(target))
        exported["eagle_config"] = {AUX_IDS: list(layers)}
        exported.pop(AUX_IDS, None)
    config = Eagle3Config.from_dict(exported, path)
    assert config.aux_layers is not None  # given in the file or inserted above
    choose_aux_layers(target, config.aux_layers)
    facts = {"vocab_size": target.vocab_size, "target_hidden_size": target.hidden_size}
    for name, expected in facts.items():
        if getattr(config, name) != expected:
            raise ValueError(f"{path}: {name}={getattr(config, name)}, but the target has {expected}; correct the file")
    if config.max_position_embeddings < target.max_position_embeddings:
        raise ValueError(
            f"{path}: max_position_embeddings={config.max_position_embeddings} is below the target's "
            f"{target.max_position_embeddings}, and servers would refuse the draft; raise it"
        )
    return config


def check_architecture(exported: dict[str, Any], source: str | Path) -> None:
    """Raise ValueError unless the config belongs to an EAGLE-3 draft with Llama layers.

    The message names what was found.
    """
    expected = f"expected architectures [{ARCHITECTURE!r}]"
    of_others = []
    for key in _KEYS_OF_OTHER_METHODS:
        value = exported.get(key)
        if value is not None and value is not False:
            of_others.append(f"{key}={value!r}")
    speculator = exported.get("speculators_model_type") or "eagle3"
    if speculator != "eagle3":
        of_others.append(f"speculators_model_type={speculator!r}")
    names = exported.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{source} has architectures={names!r}; {expected}")
    found = f"architectures {names}" + "".join(f", {key}" for key in of_others)
    if of_others:
        raise ValueError(f"{source} is of another drafting method than EAGLE-3: found {found}; {expected} without these keys")
    has_eagle3_keys = "draft_vocab_size" in exported or "eagle_config" in exported
    if not names and not has_eagle3_keys:
        raise ValueError(f"{source} is not an EAGLE-3 draft's: it has no architectures; {expected}")
    for name in names:
        is_plain_llama = name == "LlamaForCausalLM" and has_eagle3_keys  # by EAGLE-3's own code
        if name not in _EAGLE3_ARCHITECTURES and not is_plain_llama:
            raise ValueError(f"{source} is not of an EAGLE-3 draft with Llama's layers: found {found}; {expected}")


def _check_is_eagle3(exported: dict[str, Any], source: str | Path) -> None:
    check_architecture(exported, source)
    if "transformer_layer_config" in exported:
        problem = "is in the format of speculators, which is written here and not read"
        raise ValueError(
            f"{source} {problem}; name the draft's folder in the format of servers (export_draft.py --format sglang)"
        )
    required = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
    missing = [key for key in required if exported.get(key) is None]
    if missing:
        raise ValueError(f"{source} lacks {missing}; add them")
    odd = [key for key in required if type(exported[key]) is not int]
    if odd:
        raise ValueError(f"{source} has {odd[0]}={exported[odd[0]]!r}; it must be a whole number")
    for key in MUST_BE_FALSE:
        if exported.get(key):
            raise ValueError(f"{source} has {key}=true, which an EAGLE-3 draft here cannot represent; it must be false")
    if exported.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{source} has partial_rotary_factor={exported['partial_rotary_factor']}; only 1.0 is possible")
    if (exported.get("eagle_config") or {}).get("use_aux_hidden_state") is False:
        raise ValueError(f"{source} has use_aux_hidden_state=false: that is EAGLE-1; it must be true")
