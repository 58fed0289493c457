"""Kernels that failed are named with their ranks."""

import torch

from engine.setup_checks.kernel_results import KernelResult, check_all_kernels, judge_kernels


def test_a_failed_kernel_is_a_warning_that_names_its_ranks():
    results = [KernelResult("row_loss", "bfloat16", rank, 1.0, "errs by 1e-1" if rank else "") for rank in range(3)]
    results += [KernelResult("packed_attention", "bfloat16", rank, 1.0, "") for rank in range(3)]
    passed, failed = judge_kernels(results, "Triton attention and loss")
    assert passed.status == "ok" and "1 of 2 checks of 2 kernels passed" in passed.text
    assert failed.status == "warning" and failed.text.startswith("row_loss failed in bfloat16 on rank 1, 2: errs by 1e-1")


def test_a_cpu_has_no_compiled_kernels(tmp_path):
    results, reason = check_all_kernels(torch.device("cpu"), 0, tmp_path, print)
    (finding,) = judge_kernels(results, reason)
    assert finding.status == "ok" and "CPU" in finding.text
