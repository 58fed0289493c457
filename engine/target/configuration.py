"""The config of a target, including quantisation settings that are stored in a separate file."""

from transformers import AutoConfig, PreTrainedConfig

from engine.config.sections import TargetSection
from engine.config.strict import parse_json, read_text
from engine.weights.weight_files import find_published

MODELOPT_CONFIG = "hf_quant_config.json"


def load_target_config(section: TargetSection) -> PreTrainedConfig:
    """Load the config of a target.

    NVIDIA's ModelOpt describes the quantisation in `hf_quant_config.json`. If `config.json` does
    not repeat this description, it is added as `quantization_config`.

    Raises ValueError or OSError if a file cannot be read.
    """
    config = AutoConfig.from_pretrained(section.path, **section.hub_arguments)
    if getattr(config, "quantization_config", None):
        return config
    path = find_published(section.path, MODELOPT_CONFIG, section.revision)
    if path is None:
        return config
    content = parse_json(read_text(path), path)
    facts = content.get("quantization") if isinstance(content, dict) else None
    if not isinstance(facts, dict):
        raise ValueError(f"{path}: expected an object with the key 'quantization', as ModelOpt writes it; fetch it again")
    if facts.get("quant_algo") is not None:
        config.quantization_config = {"quant_method": "modelopt", **facts}
    return config
