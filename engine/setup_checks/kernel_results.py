"""The self-check of all kernels on the devices of all ranks, in the precisions of training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.kernels import choose_kernels, choose_target_kernels
from engine.kernels.self_check import KernelCheck, check_kernels
from engine.setup_checks.finding import Finding, first_line, ok, warning

DTYPES = (torch.bfloat16, torch.float32)
HEAD_DIM = 128  # of most targets
LEAST_CAPABILITY_FOR_FP8 = (8, 9)  # which can convert fp8
FIX = "Report it with the output of `python -m torch.utils.collect_env`; until then training runs correctly, but slower"


@dataclass(frozen=True)
class KernelResult:
    """The self-check of a kernel on one rank. message: what went wrong; "" if the kernel passed."""

    kernel: str
    dtype: str
    rank: int
    seconds: float
    message: str


def check_all_kernels(
    device: torch.device, rank: int, cache_dir: Path, on_check: Callable[[str], None]
) -> tuple[list[KernelResult], str]:
    """Check the kernels that drafts and targets run on a device; returns the results and which kernels a draft runs.

    on_check: called with a line about each kernel. On a CPU no kernel differs from plain PyTorch, so there are no results.
    Raises RuntimeError if a kernel left the device unusable.
    """
    results: list[KernelResult] = []
    reason = ""
    for dtype in DTYPES:
        kernels = choose_kernels("auto", device, dtype, HEAD_DIM)
        reason = reason or kernels.reason
        has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY_FOR_FP8
        target = choose_target_kernels(device, dtype, fp8=has_fp8, fp8_activations=has_fp8, experts=True)
        name = str(dtype).removeprefix("torch.")

        def note(check: KernelCheck, name: str = name) -> None:
            on_check(f"{check.name} in {name}: {check.seconds:.1f} s")

        for check in check_kernels(kernels, device, dtype, cache_dir, target=target, head_dim=HEAD_DIM, on_check=note):
            message = "" if check.ok else check.message
            results.append(KernelResult(check.name, name, rank, check.seconds, message))
    return results, reason


def judge_kernels(results: Sequence[KernelResult], reason: str) -> list[Finding]:
    """Return the findings on the kernels of all ranks. reason: which kernels a draft runs, and why."""
    if not results:
        return [ok("kernels", f"{reason}; no compiled kernel to compare with plain PyTorch")]
    failed: dict[tuple[str, str], list[KernelResult]] = {}
    for result in results:
        if result.message:
            failed.setdefault((result.kernel, result.dtype), []).append(result)
    findings = []
    for (kernel, dtype), of_one in failed.items():
        ranks = ", ".join(str(result.rank) for result in of_one)
        text = f"{kernel} failed in {dtype} on rank {ranks}: {first_line(of_one[0].message)}; plain PyTorch takes its place"
        findings.append(warning("kernels", text, FIX))
    names = {result.kernel for result in results}
    num_checks = len({(result.kernel, result.dtype) for result in results})
    passed = f"{num_checks - len(failed)} of {num_checks} checks of {len(names)} kernels passed in bfloat16 and float32"
    return [ok("kernels", f"{reason}; {passed}"), *findings]
