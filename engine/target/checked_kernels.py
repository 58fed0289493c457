"""The self-check of the kernels that a frozen target runs."""

from transformers import PreTrainedConfig

from engine.config.sections import TargetSection
from engine.kernels import choose_target_kernels, stop_using
from engine.kernels.self_check import TARGET_ONLY, SelfCheck
from engine.models.target_families import text_config
from engine.target.structure import dtype_of
from engine.weights.quantised_checkpoint import HOLDS_FP8, layout_of

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_target_kernels(config: PreTrainedConfig, section: TargetSection, self_check: SelfCheck) -> None:
    """Self-check the kernels that a target runs, and replace those that fail with plain PyTorch.

    This is a collective of all ranks. Call it before the target is loaded.
    """
    device = self_check.device
    dtype = dtype_of(section, device)
    layout, _ = layout_of(config)
    stays_fp8 = layout in HOLDS_FP8 and section.keep_quantised in ("fp8", "all")
    kernels = choose_target_kernels(
        device,
        dtype,
        fp8=stays_fp8,
        fp8_activations=stays_fp8 and section.fp8_activations,
        experts=any(isinstance(getattr(text_config(config), name, None), int) for name in EXPERT_COUNTS),
    )
    head_dim = _head_dim(text_config(config))
    stop_using(self_check.failed(TARGET_ONLY, dtype, target=kernels, head_dim=head_dim))


def _head_dim(config: PreTrainedConfig) -> int:
    """Return the head dimension, or a common value if the config does not define one."""
    named = getattr(config, "head_dim", None)
    num_heads = getattr(config, "num_attention_heads", None)
    if isinstance(named, int):
        return named
    if isinstance(num_heads, int):
        return config.hidden_size // num_heads
    return 128
