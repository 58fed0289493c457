"""Check every kernel of a draft and of a frozen target against plain PyTorch.

These are the checks of a run's first start on a GPU. Without a GPU, Triton's interpreter runs the
kernels of the draft in fp32.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # The module imports Triton, which reads the environment at import.
    from engine.kernels.self_check import KernelCheck

HEAD_DIM = 128


def main() -> int:
    options = parse_options()
    if options.device == "cpu":
        # Triton reads this when kernels are defined, so it is set before they are imported.
        os.environ["TRITON_INTERPRET"] = "1"
    results: list[dict[str, object]] = []

    def keep(where: str, check: "KernelCheck") -> None:
        # JSON has no infinite numbers.
        numbers = {"error": str(check.error), "bound": str(check.bound)}
        results.append({"where": where} | asdict(check) | numbers)
        write(results, options.json)

    run_checks(options.device, keep)
    failed = [result for result in results if not result["ok"]]
    print("\n".join(lines_of(results)))
    return 1 if failed or not results else 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path, required=True, help="file for the results, rewritten after every check")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    return parser.parse_args()


def run_checks(device_type: str, keep: Callable[[str, "KernelCheck"], None]) -> None:
    """Check all kernels, without a cache of results.

    keep: called after every check, with a description of where the kernel is used, and the check.
    """
    from engine.kernels import PLAIN, choose_target_kernels, flash, flash_where_dense, fused
    from engine.kernels.self_check import check_kernels

    device = torch.device(device_type)
    draft = fused(PLAIN)
    if device_type == "cpu":
        where = partial(keep, "draft, fp32")
        check_kernels(draft, device, torch.float32, None, head_dim=HEAD_DIM, on_check=where)
        return
    for dtype in (torch.bfloat16, torch.float32):
        target = choose_target_kernels(device, dtype, fp8=True, fp8_activations=True, experts=True)
        where = partial(keep, f"draft and target, {dtype}")
        check_kernels(draft, device, dtype, None, target=target, head_dim=HEAD_DIM, on_check=where)
    if flash.refusal(torch.bfloat16, device) is None:
        where = partial(keep, "draft with kernels=flash, torch.bfloat16")
        check_kernels(flash_where_dense(draft), device, torch.bfloat16, None, head_dim=HEAD_DIM, on_check=where)


def lines_of(results: list[dict[str, object]]) -> list[str]:
    """Return one readable line per check, failed ones first."""
    ordered = sorted(results, key=lambda result: bool(result["ok"]))
    return [
        f"{'ok' if result['ok'] else 'FAILED':<7} {result['name']} ({result['where']}): error {float(result['error']):.1e}, "
        f"bound {float(result['bound']):.1e}, {result['seconds']:.1f} s {result['message']}".rstrip()
        for result in ordered
    ]


def write(results: list[dict[str, object]], file: Path) -> None:
    """Replace the results file atomically."""
    record = {"lines": lines_of(results), "checks": results}
    scratch = file.with_suffix(".new")
    scratch.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    scratch.replace(file)


if __name__ == "__main__":
    sys.exit(main())
