"""Every Triton kernel compiles for GPUs that are not there, and fits into their shared memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.compile_only import Compiler

pytest.importorskip("triton", reason="Triton is not installed")
# That a program may use: CUDA C++ programming guide, compute capabilities.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
SMALL_AND_NEW = (86, 90)
# Kernels that take longest to compile stand first. Tiles have one architecture for each set of them.
CAPABILITIES = {
    "ancestor_attention": SMALL_AND_NEW,
    "attention_tiles": (80, *SMALL_AND_NEW),
    "anchored_attention": SMALL_AND_NEW,
    "token_row_loss": (90,),  # it uses little shared memory
    "prefix_flash": (90,),  # its own kernels take part with ancestors alone
    "fp8_linear": SMALL_AND_NEW,
    "fp8_activations": (89, 90),  # GPUs that multiply fp8
    "token_permute": SMALL_AND_NEW,
    "row_loss": SMALL_AND_NEW,
    "head_stats": SMALL_AND_NEW,
}
LAUNCHED = {
    "ancestor_attention": {"_forward", "_backward_rows", "_backward_keys"},
    "attention_tiles": {"_forward", "_backward_rows", "_backward_keys"},
    "anchored_attention": {"_forward", "_backward_rows", "_backward_keys"},
    "token_row_loss": {"_row_kernel"},
    "prefix_flash": {"_merge_kernel", "_merge_backward_kernel"},
    "fp8_linear": {"_product_kernel", "_dequantise_kernel"},
    "fp8_activations": {"_quantise_kernel", "_product_kernel"},
    "token_permute": {"_permute_kernel", "_quantise_kernel", "_unpermute_kernel"},
    "row_loss": {"_row_kernel"},
    "head_stats": {"_stats_kernel"},
}


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """What the compiler says."""
    return tmp_path_factory.mktemp("compiler") / "log"


@pytest.fixture(scope="module")
def compiler(log) -> Iterator[Compiler]:
    with log.open("w") as file, Compiler(file) as compiler:
        yield compiler


@pytest.mark.parametrize(
    ("case", "capability"), [(case, capability) for case, capabilities in CAPABILITIES.items() for capability in capabilities]
)
def test_it_compiles_for_a_gpu_within_its_shared_memory(compiler, log, case, capability):
    compiled = compiler.compile(case, capability)
    assert compiled is not None, log.read_text()
    assert {name for name, _ in compiled} == LAUNCHED[case]
    assert all(shared <= SHARED_BYTES[capability] for _, shared in compiled)
