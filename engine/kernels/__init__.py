"""The hot operations, of draft training and of frozen targets; which implementation of each runs is decided here alone."""

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import Tensor

from engine.kernels import blocked_attention, flash, reference
from engine.kernels.attention_tiles import MAX_HEAD_DIM
from engine.kernels.elementwise import Elementwise, liger_elementwise
from engine.kernels.interface import AttentionRows, LossRows, RowScore, RowWeights, SlotTargets, VocabLoss
from engine.kernels.packed_attention import PackedAttention
from engine.kernels.vocab_loss import Walk, vocab_loss

__all__ = [
    "PLAIN",
    "AttentionRows",
    "FlashWhereDense",
    "Kernels",
    "LossRows",
    "RowScore",
    "RowWeights",
    "SlotTargets",
    "TargetKernels",
    "TokenPermute",
    "VocabLoss",
    "choose_fp8_activations",
    "choose_fp8_linear",
    "choose_head_stats",
    "choose_kernels",
    "choose_packed_attention",
    "choose_target_kernels",
    "choose_token_permute",
    "stop_using",
]

# Kernels of frozen targets that failed their self-check in this process, by the name of their file.
_failed: set[str] = set()


def plain_attention(query_QHE: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    """`reference.ancestor_attention`, in blocks on a CPU."""
    on_cpu = query_QHE.device.type == "cpu"
    return (blocked_attention if on_cpu else reference).ancestor_attention(query_QHE, *arguments)


@dataclass(frozen=True)
class Kernels:
    """The implementations that a draft runs, each with the meaning of its namesake in reference.py.

    walk: how `vocab_loss` walks its chunks. recompute: what is computed again in the backward pass instead of being kept,
    "none", "mlp" or "step". reason: what was chosen and why, one sentence.
    """

    attention: Callable[..., tuple[Tensor, Tensor]] = plain_attention
    vocab_loss: Callable[..., VocabLoss] = vocab_loss
    elementwise: Elementwise = field(default_factory=Elementwise)
    walk: Walk = field(default_factory=Walk)
    recompute: str = "none"
    reason: str = "plain PyTorch"


PLAIN = Kernels()


def choose_kernels(wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int, own: Kernels = PLAIN) -> Kernels:
    """The implementations for a draft of this precision and head size. own: what is settled already, `walk` and `recompute`.

    wanted: "auto", "triton", "flash" or "reference". Raises ValueError where that cannot run, naming what can.
    """
    if wanted == "reference":
        plain = replace(own, attention=reference.ancestor_attention, vocab_loss=reference.vocab_loss)
        return replace(plain, reason="the readable specification, as asked")
    if device.type == "cpu":
        if wanted != "auto":
            raise ValueError(f"kernels={wanted} needs a GPU, and this run is on a CPU; use kernels=auto or kernels=reference")
        return replace(own, reason="plain PyTorch in blocks, since this is a CPU")
    if importlib.util.find_spec("triton") is None:
        if wanted != "auto":
            raise ValueError(f"kernels={wanted} needs Triton, which is not installed; pip install triton, or use kernels=auto")
        return replace(own, attention=reference.ancestor_attention, reason="plain PyTorch, since Triton is not installed")
    if wanted == "flash":
        from engine.kernels import prefix_flash  # it needs Triton

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
    """Return the file of a target's kernel; None where Triton does not run or the kernel failed its self-check."""
    if not _runs_triton(device) or name in _failed:
        return None
    return importlib.import_module(f"engine.kernels.{name}")


def choose_fp8_linear(device: torch.device) -> Callable[..., Tensor] | None:
    """`reference.fp8_linear` on the chip, where Triton runs; elsewhere None, and weights have to be dequantised first."""
    file = _triton_file("fp8_linear", device)
    return None if file is None else file.fp8_linear


def choose_fp8_activations(device: torch.device) -> Callable[..., Tensor] | None:
    """`reference.fp8_activations` on the chip, where Triton runs; elsewhere None, and both operands have to be dequantised."""
    file = _triton_file("fp8_activations", device)
    return None if file is None else file.fp8_activations


@dataclass(frozen=True)
class TokenPermute:
    """Implementations of the reference's `permute_rows`, `quantise_rows` and `unpermute_rows`."""

    permute_rows: Callable[..., Tensor] = reference.permute_rows
    quantise_rows: Callable[..., None] = reference.quantise_rows
    unpermute_rows: Callable[..., Tensor] = reference.unpermute_rows


def choose_token_permute(device: torch.device) -> TokenPermute:
    """Return what sorts rows by expert and sums them up again on a device: one launch each where Triton runs."""
    file = _triton_file("token_permute", device)
    return TokenPermute() if file is None else TokenPermute(file.permute_rows, file.quantise_rows, file.unpermute_rows)


def choose_head_stats(device: torch.device) -> Callable[..., tuple[Tensor, ...]] | None:
    """Return `reference.head_stats` in one pass, None where Triton does not run."""
    file = _triton_file("head_stats", device)
    return None if file is None else file.head_stats


def choose_packed_attention(device: torch.device, dtype: torch.dtype) -> PackedAttention:
    """Attention of packed documents in a frozen target of this precision."""
    refused = flash.refusal(dtype, device)
    if refused is None and "packed_attention" in _failed:
        refused = "flash attention failed its self-check"
    if refused:
        return PackedAttention(None, f"in blocks, a document at a time, since {refused}")
    library = flash.available_flash()
    assert library is not None  # else it was refused
    return PackedAttention(library, f"{library.name}, all documents in one call")


@dataclass(frozen=True)
class TargetKernels:
    """The kernels that a frozen target runs; None where plain PyTorch takes their place."""

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
    """Return the kernels of a target of this precision.

    fp8: whether weights stay in fp8. fp8_activations: whether their inputs are quantised as well.
    experts: whether it has any.
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
    """Let plain PyTorch take the place of these kernels of frozen targets, in this process."""
    _failed.update(names)


def _runs_triton(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None and not _is_too_old(device)


def _is_too_old(device: torch.device) -> bool:
    """Tiles of our Triton kernels need the shared memory of an A100 or later."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) < (8, 0)


def _refusal(head_dim: int, device: torch.device) -> str | None:
    """Why Triton's attention cannot run there, None where it can."""
    if _is_too_old(device):
        return "Triton's attention needs a CUDA device of compute capability 8.0, the A100's, or later"
    if head_dim > MAX_HEAD_DIM:
        return f"Triton's attention holds head dims of at most {MAX_HEAD_DIM}, not {head_dim}"
    return None


def fused(own: Kernels) -> Kernels:
    """Triton's attention and loss, and liger-kernel's norms where it is installed."""
    from engine.kernels import ancestor_attention, row_loss  # they need Triton

    walk = replace(own.walk, row_loss=row_loss.row_loss, in_place=True)
    chosen = replace(own, attention=ancestor_attention.ancestor_attention, walk=walk, reason="Triton attention and loss")
    if importlib.util.find_spec("liger_kernel") is None:
        return replace(chosen, reason=f"{chosen.reason}, PyTorch norms (pip install liger-kernel for faster ones)")
    return replace(chosen, elementwise=liger_elementwise(), reason=f"{chosen.reason}, liger-kernel norms")


@dataclass(frozen=True)
class FlashWhereDense:
    """Flash attention for the prefix where the rows of each document stand at successive positions.

    otherwise: the attention of rows with gaps.
    """

    otherwise: Callable[..., tuple[Tensor, Tensor]]

    def __call__(self, *arguments) -> tuple[Tensor, Tensor]:
        from engine.kernels import prefix_flash  # it needs Triton

        rows = arguments[-1]
        attention = prefix_flash.ancestor_attention if rows.is_dense else self.otherwise
        return attention(*arguments)


def flash_where_dense(otherwise: Kernels) -> Kernels:
    """Return `otherwise` with flash attention for the prefix wherever that is possible."""
    reason = f"flash attention for the prefix, as asked; else {otherwise.reason}"
    return replace(otherwise, attention=FlashWhereDense(otherwise.attention), reason=reason)
