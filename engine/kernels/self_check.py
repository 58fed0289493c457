"""Comparison of each chosen kernel with plain PyTorch at the first start on a GPU.

The tests run kernels in Triton's interpreter and compile them ahead of time; neither shows whether
the compiled kernel is correct on a particular machine. Each kernel therefore runs once, forward and
backward, on small inputs with odd sizes. `plain` is the same operation in plain PyTorch
(`reference.py`), and norms run over all numbers of a tensor:

    error = |kernel - float64|        bound = 2 roundings |plain - float64| + floor |float64|

where `roundings` counts how often a kernel rounds its results to the precision of the run; plain
PyTorch does so once. A kernel that raises or has an error above the bound is replaced by plain
PyTorch. Results are stored by `kernel_cache.py`.
"""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.kernels import (
    FlashWhereDense,
    Kernels,
    TargetKernels,
    anchored_blocks,
    attention_tiles,
    blocked_attention,
    tile_timing,
)
from engine.kernels.check_cases import FLOOR, PLAIN_ATTENTION, Case, Operation, draft_cases, target_cases
from engine.kernels.elementwise import Elementwise
from engine.kernels.kernel_cache import KernelCache
from engine.kernels.token_loss import token_row_loss
from engine.kernels.vocab_loss import row_loss

SECTION = "self_check"
OUT_OF_MEMORY = "out of memory"
TILED = ("ancestor_attention", "anchored_attention")  # kernels whose tiles are chosen by timing
ELEMENTWISE = ("rms_norm", "swiglu", "rotate_both")
TARGET_ONLY = Kernels()  # plain PyTorch: no draft kernel is checked


@dataclass(frozen=True)
class KernelCheck:
    """The result of one kernel's check.

    name: stem of the kernel's file, or the name of an elementwise operation.
    ok: whether the kernel passed.
    error, bound: of the tensor closest to its bound, relative to its norm.
    seconds: duration, including compilation.
    message: what went wrong; empty if `ok`.
    """

    name: str
    ok: bool
    error: float
    bound: float
    seconds: float
    message: str


def check_kernels(
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    cache_dir: Path | None,
    *,
    target: TargetKernels | None = None,
    head_dim: int = 128,
    on_check: Callable[[KernelCheck], None] = lambda check: None,
) -> list[KernelCheck]:
    """Compare every kernel in use with plain PyTorch, and return one result per kernel.

    Operations that plain PyTorch computes anyway are not checked. The order of the results depends
    only on the arguments, so that ranks can compare theirs.

    dtype: precision of the run.
    cache_dir: folder of earlier results; None = results are not stored.
    target: kernels of a frozen target, checked as well.
    head_dim: of the attention kernels.
    on_check: called with each result when it is available.
    Raises RuntimeError if a kernel left the device in a state in which nothing else can run.
    """
    cases: dict[str, list[Case]] = {}
    for case in draft_cases(kernels, head_dim, device):
        cases.setdefault(case.name, []).append(case)
    for case in target_cases(target or TargetKernels(), head_dim, device):
        cases.setdefault(case.name, []).append(case)

    cache = KernelCache(cache_dir, device)
    known = cache.read(SECTION)
    checks = []
    for name, of_one in cases.items():
        key = f"{name}, {dtype}, head dim {head_dim}"
        if name in TILED:
            key += f", {sorted(attention_tiles.tiles_in_use().items())}"
        check = _known_check(known.get(key))
        if check is None:
            check = check_kernel(name, of_one, device, dtype)
            if not _may_pass_later(check):
                cache.add(SECTION, {key: _entry(check)})
            if not check.ok:
                _check_device(name, device)
        checks.append(check)
        on_check(check)
    return checks


def _may_pass_later(check: KernelCheck) -> bool:
    """Return whether a kernel failed because memory ran out, so that it may pass later."""
    return OUT_OF_MEMORY in check.message


def _entry(check: KernelCheck) -> dict[str, object]:
    """Return a result as a cache entry. Numbers are stored as text, since JSON has no infinity."""
    return asdict(check) | {"error": str(check.error), "bound": str(check.bound)}


def _known_check(entry: object) -> KernelCheck | None:
    """Return the result stored in a cache entry, or None if the entry cannot be read."""
    try:
        check = KernelCheck(**entry)  # type: ignore[arg-type]
        return replace(check, error=float(check.error), bound=float(check.bound))
    except (TypeError, ValueError):
        return None


def check_kernel(name: str, cases: Sequence[Case], device: torch.device, dtype: torch.dtype) -> KernelCheck:
    """Compare one kernel with plain PyTorch on all of `cases`."""
    started = time.perf_counter()
    error = 0.0
    bound = FLOOR
    message = ""
    for case in cases:
        try:
            worst_error, worst_bound, message = _compare(case, device, dtype)
        except Exception as problem:
            # Compilers, drivers and launches raise many types of errors. The run works without the
            # kernel in any case.
            message = f"{type(problem).__name__}: {str(problem).strip() or 'no message'}"
            if isinstance(problem, torch.OutOfMemoryError):
                message = f"{OUT_OF_MEMORY}: {message}"
            error = float("inf")
            bound = FLOOR
            break
        if message or worst_error * bound > error * worst_bound:
            error = worst_error
            bound = worst_bound
        if message:
            break
    seconds = round(time.perf_counter() - started, 3)
    return KernelCheck(name, not message, error, bound, seconds, message)


def _compare(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[float, float, str]:
    """Return error and bound of the tensor closest to its bound, and a message if it failed."""
    rounded = [leaf.to(dtype) for leaf in case.leaves]
    ours = _results(case.ours, rounded, device, dtype, case.differentiates)
    plain = _results(case.plain, rounded, device, dtype, case.differentiates)
    exact = _results(case.plain, rounded, device, torch.float64, case.differentiates)
    nearest = (0.0, FLOOR, "")
    for index, (own, plainly, true) in enumerate(zip(ours, plain, exact, strict=True)):
        label = f"result {index}"
        if index >= len(ours) - len(rounded) and case.differentiates:
            label = f"the gradient of argument {index - len(ours) + len(rounded)}"
        if own.shape != true.shape:
            message = f"{label} has the shape {list(own.shape)}, not {list(true.shape)}"
            return float("inf"), FLOOR, message
        scale = true.norm().item() or 1.0
        error = (own - true).norm().item() / scale
        bound = 2 * case.roundings * (plainly - true).norm().item() / scale + case.floor
        if not error <= bound:
            found = "is not finite" if error != error or error == float("inf") else f"errs by {error:.1e}"
            return error, bound, f"{label} {found}; at most {bound:.1e} was expected"
        if error * nearest[1] >= nearest[0] * bound:
            nearest = (error, bound, "")
    return nearest


def _results(
    operation: Operation,
    leaves: Iterable[Tensor],
    device: torch.device,
    dtype: torch.dtype,
    differentiates: bool,
) -> list[Tensor]:
    """Return the outputs and the gradients of the leaves in float64.

    Gradients are those of the outputs' products with fixed random directions.
    """
    moved = [leaf.to(device, dtype).requires_grad_(differentiates) for leaf in leaves]
    with torch.set_grad_enabled(differentiates):
        outputs = [output for output in operation(*moved)]
    results = [output.detach().double() for output in outputs]
    if differentiates:
        reached = [output for output in outputs if output.requires_grad]
        directions = []
        for output in reached:
            generator = torch.Generator().manual_seed(7)
            direction = torch.randn(output.shape, generator=generator)
            # All precisions use the same direction, rounded so that each represents it exactly.
            directions.append(direction.to(torch.bfloat16).to(device, output.dtype))
        gradients = torch.autograd.grad(reached, moved, directions)
        results += [gradient.double() for gradient in gradients]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return results


def _check_device(name: str, device: torch.device) -> None:
    """Raise RuntimeError if a failed kernel left the device unusable."""
    if device.type != "cuda":
        return
    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError as error:
        raise RuntimeError(
            f"the kernel {name} left {device} unusable ({error}). Start the same command again: "
            f"the failure is recorded, and plain PyTorch will take the kernel's place"
        ) from error


def without_failed(kernels: Kernels, failed: Collection[str]) -> Kernels:
    """Return `kernels` with the failed ones replaced by plain PyTorch.

    Attention falls back to the blocked and tiled implementations and losses to the chunked ones. They
    compute what `reference.py` does, in memory that does not grow with the square of the tokens.
    """
    if not failed:
        return kernels
    attention = kernels.attention
    plain_attention = blocked_attention.ancestor_attention
    if isinstance(attention, FlashWhereDense):
        if "ancestor_attention" in failed:
            attention = FlashWhereDense(plain_attention)
        if "prefix_flash" in failed:
            attention = attention.otherwise
    elif "ancestor_attention" in failed:
        attention = plain_attention
    loss_pass = kernels.loss_pass
    if "row_loss" in failed:
        loss_pass = replace(loss_pass, row_loss=row_loss, in_place=False)
    anchored_attention = kernels.anchored_attention
    if "anchored_attention" in failed:
        anchored_attention = anchored_blocks.anchored_attention
    token_pass = kernels.token_pass
    if "token_row_loss" in failed:
        token_pass = replace(token_pass, row_loss=token_row_loss)
    plain = Elementwise()
    replaced = {name: getattr(plain, name) for name in ELEMENTWISE if name in failed}
    elementwise = replace(kernels.elementwise, **replaced)
    names = ", ".join(sorted(failed))
    reason = f"{kernels.reason}; plain PyTorch in place of {names}, which failed the self-check"
    return replace(
        kernels,
        attention=attention,
        loss_pass=loss_pass,
        anchored_attention=anchored_attention,
        token_pass=token_pass,
        elementwise=elementwise,
        reason=reason,
    )


def warning(check: KernelCheck, device: torch.device, cache_dir: Path | None) -> str:
    """Return the warning for a kernel that failed on this or another rank."""
    found = check.message or "it failed on another rank"
    path = KernelCache(cache_dir, device).path
    kept = "" if path is None else f" and {path}; delete that file to try the kernel again"
    return (
        f"Warning: the kernel {check.name} failed its self-check on {device}: {found}. "
        f"Plain PyTorch takes its place, which gives correct results but is slower. "
        f"Please report this with the output of `python -m torch.utils.collect_env`{kept}."
    )


class Ranks(Protocol):
    """Interface to the processes of a run; `engine.parallel.mesh.World` implements it."""

    @property
    def device(self) -> torch.device: ...

    def any_rank(self, flags: list[bool]) -> list[bool]: ...

    def sum(self, values: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class SelfCheck:
    """The self-check of a run: where kernels are checked and how ranks agree on the result.

    cache_dir: folder of earlier results; None = results are not stored.
    any_rank: maps this rank's failure flags, one per kernel, to failures on any rank; a collective.
    warn: prints one line.
    even_on_cpu: whether to check kernels without a GPU, in Triton's interpreter.
    total: sums each number over all ranks; a collective.
    """

    device: torch.device
    cache_dir: Path | None
    any_rank: Callable[[list[bool]], list[bool]]
    warn: Callable[[str], None]
    even_on_cpu: bool = False
    total: Callable[[list[float]], list[float]] = list

    @classmethod
    def of(cls, world: Ranks, cache_dir: str | Path | None, warn: Callable[[str], None]) -> "SelfCheck":
        """Return the self-check of a run. cache_dir: as in `data`."""
        folder = None if cache_dir is None else Path(cache_dir)

        def total(values: list[float]) -> list[float]:
            summed = world.sum(torch.tensor(values, dtype=torch.float64, device=world.device))
            return summed.tolist()

        return cls(world.device, folder, world.any_rank, warn, total=total)

    def failed(
        self,
        kernels: Kernels,
        dtype: torch.dtype,
        *,
        target: TargetKernels | None = None,
        head_dim: int = 128,
    ) -> set[str]:
        """Return the names of the kernels that failed on any rank, and print a warning for each.

        A collective. Nothing is checked on a CPU, which runs plain PyTorch.
        """
        if self.device.type == "cpu" and not self.even_on_cpu:
            return set()
        checks = check_kernels(kernels, self.device, dtype, self.cache_dir, target=target, head_dim=head_dim)
        flags = self.any_rank([not check.ok for check in checks])
        failed = set()
        for check, has_failed in zip(checks, flags, strict=True):
            if has_failed:
                failed.add(check.name)
                self.warn(warning(check, self.device, self.cache_dir))
        return failed

    def sound(self, kernels: Kernels, dtype: torch.dtype, head_dim: int) -> Kernels:
        """Choose tiles, and return `kernels` without those that failed on any rank; a collective."""
        if self.device.type == "cuda":
            self.choose_tiles(kernels, dtype, head_dim)
        return without_failed(kernels, self.failed(kernels, dtype, head_dim=head_dim))

    def choose_tiles(
        self,
        kernels: Kernels,
        dtype: torch.dtype,
        head_dim: int,
        timer: tile_timing.Timer = tile_timing.cuda_seconds,
    ) -> None:
        """Use the tiles of ancestor attention that are fastest over all ranks; a collective."""
        attention = kernels.attention
        if isinstance(attention, FlashWhereDense):
            attention = attention.otherwise
        if attention in PLAIN_ATTENTION:
            return
        cache = KernelCache(self.cache_dir, self.device)
        times_s = tile_timing.tile_times(head_dim, dtype, self.device, cache, timer)
        shared = {key: self.total(of_one) for key, of_one in times_s.items()}
        capability = torch.cuda.get_device_capability(self.device)
        attention_tiles.use_tiles(tile_timing.choose_tiles(shared, capability))
