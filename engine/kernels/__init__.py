"""Selection of the kernels that drafts and frozen targets run.

This package decides in one place which implementation of each performance-critical operation runs.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import Tensor

from engine.kernels import anchored_blocks, blocked_attention, flash, reference
from engine.kernels.attention_tiles import MAX_HEAD_DIM
from engine.kernels.elementwise import Elementwise, liger_elementwise
from engine.kernels.interface import (
    AttentionRows,
    BlockRows,
    FrozenHead,
    LogitBias,
    LossRows,
    RowScore,
    RowWeights,
    SlotDistributions,
    SlotTargets,
    TokenLoss,
    TokenRows,
    TokenTerms,
    VocabLoss,
)
from engine.kernels.packed_attention import PackedAttention
from engine.kernels.token_loss import TokenPass, token_loss
from engine.kernels.vocab_loss import LossPass, vocab_loss

__all__ = [
    "PLAIN",
    "AttentionRows",
    "BlockRows",
    "FlashWhereDense",
    "FrozenHead",
    "Kernels",
    "LogitBias",
    "LossRows",
    "RowScore",
    "RowWeights",
    "SlotDistributions",
    "SlotTargets",
    "TargetKernels",
    "TokenLoss",
    "TokenPermute",
    "TokenRows",
    "TokenTerms",
    "VocabLoss",
    "choose_fp8_activations",
    "choose_fp8_linear",
    "choose_head_stats",
    "choose_kernels",
    "choose_packed_attention",
    "choose_target_kernels",
    "choose_token_permute",
    "choose_tree_attention",
    "stop_using",
]

# Kernels of frozen targets that failed their self-check in this process, named by file stem.
_failed: set[str] = set()


def plain_attention(query_QHE: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    """Compute ancestor attention in plain PyTorch, in blocks if it runs on a CPU."""
    on_cpu = query_QHE.device.type == "cpu"
    return (blocked_attention if on_cpu else reference).ancestor_attention(query_QHE, *arguments)


def plain_anchored_attention(query_QHE: Tensor, *arguments: object) -> Tensor:
    """Compute the attention of draft blocks in plain PyTorch, in tiles if it runs on a CPU."""
    on_cpu = query_QHE.device.type == "cpu"
    return (anchored_blocks if on_cpu else reference).anchored_attention(query_QHE, *arguments)


@dataclass(frozen=True)
class Kernels:
    """The kernels that a draft runs, each with the semantics of its namesake in reference.py.

    loss_pass: how `vocab_loss` processes its chunks. token_pass: how `token_loss` processes its chunks.
    recompute: what the backward pass computes again instead of keeping it: "none", "mlp" or "step".
    reason: which kernels were chosen and why, in one sentence.
    """

    attention: Callable[..., tuple[Tensor, Tensor]] = plain_attention
    vocab_loss: Callable[..., VocabLoss] = vocab_loss
    anchored_attention: Callable[..., Tensor] = plain_anchored_attention
    token_loss: Callable[..., TokenLoss] = token_loss
    elementwise: Elementwise = field(default_factory=Elementwise)
    loss_pass: LossPass = field(default_factory=LossPass)
    token_pass: TokenPass = field(default_factory=TokenPass)
    recompute: str = "none"
    reason: str = "plain PyTorch"


PLAIN = Kernels()


def choose_kernels(wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int, own: Kernels = PLAIN) -> Kernels:
    """Return the kernels for a draft of this precision and head dim.

    wanted: "auto", "triton", "flash" or "reference".
    own: kernels whose `loss_pass` and `recompute` settings are kept.
    Raises ValueError if `wanted` cannot run here; the message names a choice that can.
    """
    if wanted == "reference":
        plain = replace(
            own,
            attention=reference.ancestor_attention,
            vocab_loss=reference.vocab_loss,
            anchored_attention=reference.anchored_attention,
            token_loss=reference.token_loss,
        )
        return replace(plain, reason="the PyTorch reference, as asked")
    if device.type == "cpu":
        if wanted != "auto":
            raise ValueError(f"kernels={wanted} needs a GPU, and this run is on a CPU; use kernels=auto or kernels=reference")
        return replace(own, reason="plain PyTorch in blocks, since this is a CPU")
    if importlib.util.find_spec("triton") is None:
        if wanted != "auto":
            raise ValueError(f"kernels={wanted} needs Triton, which is not installed; pip install triton, or use kernels=auto")
        return replace(own, attention=reference.ancestor_attention, reason="plain PyTorch, since Triton is not installed")
    if wanted == "flash":
        from engine.kernels import prefix_flash  # requires Triton

        refused = prefix_flash.refusal(dtype, head_dim, device)
        if refused:
            raise ValueError(f"kernels=flash cannot run: {refused}; use kernels=auto")
        return flash_where_dense(fused(own))
    refused = _refusal(head_dim, device)
    if refused and wanted == "triton":
        raise ValueError(f"kernels=triton cannot run: {refused}; use kernels=auto")
    if refused:
        return replace(own, attention=reference.ancestor_attention, reason=f"plain PyTorch, since {refused}")
    chosen = fused(own)
    return replace(chosen, reason=f"{chosen.reason}, {'as asked' if wanted == 'triton' else 'since this is a GPU'}")


def _triton_file(name: str, device: torch.device) -> ModuleType | None:
    """Return the module of a target's Triton kernel.

    Returns None if Triton cannot run on the device or the kernel failed its self-check.
    """
    if not _runs_triton(device) or name in _failed:
        return None
    return importlib.import_module(f"engine.kernels.{name}")


def choose_fp8_linear(device: torch.device) -> Callable[..., Tensor] | None:
    """Return the Triton kernel of `reference.fp8_linear`.

    Returns None if it cannot run; the caller then has to dequantise weights in memory.
    """
    file = _triton_file("fp8_linear", device)
    return None if file is None else file.fp8_linear


def choose_fp8_activations(device: torch.device) -> Callable[..., Tensor] | None:
    """Return the Triton kernel of `reference.fp8_activations`.

    Returns None if it cannot run; the caller then has to dequantise both operands.
    """
    file = _triton_file("fp8_activations", device)
    return None if file is None else file.fp8_activations


@dataclass(frozen=True)
class TokenPermute:
    """Implementations of the reference's `permute_rows`, `quantise_rows` and `unpermute_rows`."""

    permute_rows: Callable[..., Tensor] = reference.permute_rows
    quantise_rows: Callable[..., None] = reference.quantise_rows
    unpermute_rows: Callable[..., Tensor] = reference.unpermute_rows


def choose_token_permute(device: torch.device) -> TokenPermute:
    """Return the functions that sort rows by expert and sum them by token.

    Where Triton runs, each is one kernel launch; elsewhere they are the PyTorch reference.
    """
    file = _triton_file("token_permute", device)
    return TokenPermute() if file is None else TokenPermute(file.permute_rows, file.quantise_rows, file.unpermute_rows)


def choose_head_stats(device: torch.device) -> Callable[..., tuple[Tensor, ...]] | None:
    """Return the one-pass Triton kernel of `reference.head_stats`, or None if it cannot run."""
    file = _triton_file("head_stats", device)
    return None if file is None else file.head_stats


def choose_packed_attention(device: torch.device, dtype: torch.dtype) -> PackedAttention:
    """Return the attention over packed documents for a frozen target of this precision."""
    refused = flash.refusal(dtype, device)
    if refused is None and "packed_attention" in _failed:
        refused = "flash attention failed its self-check"
    if refused:
        return PackedAttention(None, f"in blocks, one document at a time, since {refused}")
    library = flash.available_flash()
    assert library is not None  # `refusal` checked that a library exists
    return PackedAttention(library, f"{library.name}, all documents in one call")


def choose_tree_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return the Triton kernel of ancestor attention for a frozen target that reads a tree of tokens.

    Returns None if it cannot run; the caller then has to apply a mask.
    """
    if not _runs_triton(device) or dtype == torch.float64 or head_dim > MAX_HEAD_DIM:
        return None
    file = _triton_file("ancestor_attention", device)
    return None if file is None else file.ancestor_attention


@dataclass(frozen=True)
class TargetKernels:
    """The kernels that a frozen target runs. None means plain PyTorch."""

    packed_attention: PackedAttention | None = None
    fp8_linear: Callable[..., Tensor] | None = None
    fp8_activations: Callable[..., Tensor] | None = None
    token_permute: TokenPermute | None = None
    head_stats: Callable[..., tuple[Tensor, ...]] | None = None


def choose_target_kernels(
    device: torch.device,
    dtype: torch.dtype,
    *,
    fp8: bool = False,
    fp8_activations: bool = False,
    experts: bool = False,
) -> TargetKernels:
    """Return the kernels for a frozen target of this precision.

    fp8: whether weights stay in fp8.
    fp8_activations: whether the inputs of fp8 weights are quantised as well.
    experts: whether the target has mixture-of-experts layers.
    """
    attention = choose_packed_attention(device, dtype)
    permute = choose_token_permute(device) if experts else TokenPermute()
    return TargetKernels(
        packed_attention=attention if attention.flash is not None else None,
        fp8_linear=choose_fp8_linear(device) if fp8 else None,
        fp8_activations=choose_fp8_activations(device) if fp8_activations else None,
        token_permute=permute if permute != TokenPermute() else None,
        head_stats=choose_head_stats(device),
    )


def stop_using(names: Iterable[str]) -> None:
    """Use plain PyTorch instead of these frozen-target kernels for the rest of this process.

    names: file stems of the kernels.
    """
    _failed.update(names)


def _runs_triton(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None and not _is_too_old(device)


def _is_too_old(device: torch.device) -> bool:
    """Return whether the device lacks the shared memory that our tiles need (A100 or later)."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) < (8, 0)


def _refusal(head_dim: int, device: torch.device) -> str | None:
    """Return why Triton's attention cannot run on the device, or None if it can."""
    if _is_too_old(device):
        return "Triton's attention needs a CUDA device of compute capability 8.0 (A100) or later"
    if head_dim > MAX_HEAD_DIM:
        return f"Triton's attention supports head dims up to {MAX_HEAD_DIM}, not {head_dim}"
    return None


def fused(own: Kernels) -> Kernels:
    """Return Triton's attentions and losses, with liger-kernel's norms if it is installed.

    own: kernels whose other settings are kept.
    """
    from engine.kernels import ancestor_attention, anchored_attention, row_loss, token_row_loss  # require Triton

    chosen = replace(
        own,
        attention=ancestor_attention.ancestor_attention,
        anchored_attention=anchored_attention.anchored_attention,
        loss_pass=replace(own.loss_pass, row_loss=row_loss.row_loss, in_place=True),
        token_pass=replace(own.token_pass, row_loss=token_row_loss.token_row_loss),
        reason="Triton attention and loss",
    )
    if importlib.util.find_spec("liger_kernel") is None:
        return replace(chosen, reason=f"{chosen.reason}, PyTorch norms (pip install liger-kernel for faster ones)")
    return replace(chosen, elementwise=liger_elementwise(), reason=f"{chosen.reason}, liger-kernel norms")


@dataclass(frozen=True)
class FlashWhereDense:
    """Attention that uses flash attention for the prefix if each document's rows have no gaps.

    otherwise: the attention to use for rows with gaps.
    """

    otherwise: Callable[..., tuple[Tensor, Tensor]]

    def __call__(self, *arguments) -> tuple[Tensor, Tensor]:
        from engine.kernels import prefix_flash  # requires Triton

        rows = arguments[-1]
        attention = prefix_flash.ancestor_attention if rows.is_dense else self.otherwise
        return attention(*arguments)


def flash_where_dense(otherwise: Kernels) -> Kernels:
    """Return the kernels `otherwise`, with flash attention for the prefix of rows without gaps."""
    reason = f"flash attention for the prefix, as asked; else {otherwise.reason}"
    return replace(otherwise, attention=FlashWhereDense(otherwise.attention), reason=reason)
