"""Compiles the Triton kernels that a call would launch for a GPU that is not there, and launches none.

    echo ancestor_attention 86 | python -m tests.kernels.compile_only

Reads a case and a compute capability times ten per line, and prints a JSON list of [kernel, bytes of shared memory] for each;
null = it cannot be compiled. A process of its own, for elsewhere in the tests Triton interprets; one for all cases, since it
takes seconds to start.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from engine.kernels.attention_tiles import Tile


class Compiler:
    """Context manager of the process that compiles."""

    def __init__(self, log: IO[str]) -> None:
        """log: receives the error output of the process."""
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.compile_only"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        self._process = subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes)

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def compile(self, case: str, capability: int) -> list[tuple[str, int]] | None:
        """Return the kernels that a case of `CASES` launches on such a GPU, and the shared memory that each takes."""
        self._process.stdin.write(f"{case} {capability}\n")
        return json.loads(self._process.stdout.readline() or "null")


class AbsentGpu:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def attend(attention: Callable, head_dims: dict[torch.dtype, tuple[int, ...]]) -> None:
    """The head dims that take most memory; on the newest architecture also a tree, on which memory does not depend.

    Each ancestor is unrolled and takes seconds, so there is one.
    """
    from triton.runtime import driver

    from tests.kernels.attention_cases import make_case, with_gradients

    cases = [(dtype, head_dim, (8, 2), (0, False)) for dtype, sizes in head_dims.items() for head_dim in sizes]
    if driver.active.get_current_target().arch >= 90:
        cases.append((torch.bfloat16, 128, (6, 2), (1, True)))
    for dtype, head_dim, heads, ancestors in cases:
        with_gradients(attention, make_case((64, 33), heads, torch.arange(97), ancestors, head_dim), dtype)


def ancestor_attention() -> None:
    """fp32 takes a third of any GPU's memory, whatever the architecture, so one compiles it."""
    from triton.runtime import driver

    from engine.kernels.ancestor_attention import ancestor_attention

    head_dims = {torch.bfloat16: (256,)}
    if driver.active.get_current_target().arch < 90:
        head_dims[torch.float32] = (128,)
    attend(ancestor_attention, head_dims)


def attention_tiles() -> None:
    """The largest tile of each kernel that would be tried on this GPU and is no default; those are compiled above."""
    from triton.runtime import driver

    from engine.kernels.ancestor_attention import ancestor_attention
    from engine.kernels.attention_tiles import KERNELS, TileKey, candidates, use_tiles
    from tests.kernels.attention_cases import make_case, with_gradients

    capability = divmod(driver.active.get_current_target().arch, 10)
    for head_dim in (128,):  # 256 has the default alone
        keys = [TileKey(kernel, head_dim, 2) for kernel in KERNELS]
        tiles = {key: candidates(key, capability)[1:] for key in keys}
        use_tiles({key: max(own, key=lambda tile: _numbers(key.kernel, tile)) for key, own in tiles.items() if own})
        case = make_case((64, 33), (8, 2), torch.arange(97), (0, False), head_dim)  # no ancestor: they take no shared memory
        with_gradients(ancestor_attention, case, torch.bfloat16)


def _numbers(kernel: str, tile: "Tile") -> tuple[int, int]:
    """What grows with the shared memory of a tile: rows that stay, and two operands that are staged; then its size."""
    stays, staged = (tile.keys, tile.members) if kernel == "keys" else (tile.members, tile.keys)
    return stays + 2 * staged * tile.num_stages, tile.members * tile.keys


def anchored_attention() -> None:
    """The head dim of most drafts; other tiles are those of ancestor attention, whose memory is tested above."""
    from engine.kernels.anchored_attention import anchored_attention
    from tests.kernels.anchored_cases import gradients, make_blocks

    gradients(anchored_attention, make_blocks(head_dim=128, heads=(8, 2)), torch.bfloat16)


def prefix_flash() -> None:
    from engine.kernels import flash, prefix_flash
    from tests.kernels.plain_flash import PLAIN

    flash.available_flash = lambda: PLAIN
    attend(prefix_flash.ancestor_attention, {torch.bfloat16: (64, 256)})


def row_loss() -> None:
    from engine.kernels.interface import LossChunk
    from engine.kernels.row_loss import row_loss

    for dtype, vocab, mixes in ((torch.bfloat16, 32000, False), (torch.bfloat16, 201088, True), (torch.float32, 500, True)):
        slot_r = torch.arange(3)
        lse_n = torch.zeros(3)
        logits_rU = torch.zeros(3, vocab, dtype=dtype)
        target_nU = torch.zeros(3, vocab)
        row_loss(LossChunk(logits_rU, target_nU, slot_r, lse_n, slot_r, torch.zeros(3, 3), [3], mixes), True)


def token_row_loss() -> None:
    from engine.kernels.token_row_loss import token_row_loss
    from tests.kernels.test_token_row_loss import make_chunk

    token_row_loss(make_chunk("cross-entropy", "raw", False, 65536, torch.bfloat16), True)
    token_row_loss(make_chunk("all", "capped", True, 65536, torch.bfloat16), True)


def head_stats() -> None:
    from engine.kernels.head_stats import head_stats
    from engine.kernels.interface import LogitTransform

    for dtype, vocab_size in ((torch.bfloat16, 65536), (torch.float32, 500)):
        head_stats(torch.zeros(3, vocab_size, dtype=dtype), LogitTransform(0.5, 30.0, 0.7))
    head_stats(torch.zeros(3, 65536, dtype=torch.bfloat16), LogitTransform())


def fp8_linear() -> None:
    from triton.runtime import driver

    from engine.kernels import fp8_linear

    fp8_linear.reads_fp8 = lambda device: driver.active.get_current_target().arch >= 89
    fp8_linear.LEAST_PART = 128  # few rows split K
    for dtype, num_rows, columns in ((torch.bfloat16, 8, 128), (torch.float32, 4096, 96)):
        codes_XNK = torch.zeros(3, 256, 384, dtype=torch.float8_e4m3fn)
        scale_XGJ = torch.zeros(3, 2, 384 // columns)
        ends_X = torch.tensor([0, num_rows, num_rows], dtype=torch.int32)
        rows_MK = torch.zeros(num_rows, 384, dtype=dtype)
        fp8_linear.fp8_linear(rows_MK, codes_XNK, scale_XGJ, (128, columns), ends_X)
        for ends_of_one in (None, ends_X[:1]):
            fp8_linear.fp8_linear(rows_MK, codes_XNK[:1], scale_XGJ[:1], (128, columns), ends_of_one)


def fp8_activations() -> None:
    from engine.kernels import fp8_activations

    for num_rows, block in ((8, (128, 128)), (4096, (32, 64))):
        codes_XNK = torch.zeros(3, 256, 384, dtype=torch.float8_e4m3fn)
        scale_XGJ = torch.zeros(3, 256 // block[0], 384 // block[1])
        ends_X = torch.tensor([0, num_rows, num_rows]).int()
        rows_MK = torch.zeros(num_rows, 384, dtype=torch.bfloat16)
        fp8_activations.fp8_activations(rows_MK, codes_XNK, scale_XGJ, block, ends_X, group=128)
        fp8_activations.fp8_activations(rows_MK, codes_XNK[:1], scale_XGJ[:1], block, None, group=128)


def token_permute() -> None:
    from engine.kernels import token_permute

    place_TJ = torch.zeros(4, 8, dtype=torch.int64)
    weight_TJ = torch.zeros(4, 8)
    for dtype, width in ((torch.bfloat16, 7168), (torch.float16, 2880), (torch.float32, 48)):
        rows_TD = torch.zeros(4, width, dtype=dtype)
        source_N = place_TJ[:, 0].contiguous()
        codes_ND = torch.zeros(4, width, dtype=torch.float8_e4m3fn)
        scale_N = torch.zeros(4)
        token_permute.permute_rows(rows_TD, source_N, torch.zeros_like(rows_TD))
        token_permute.permute_rows(codes_ND, source_N, torch.zeros_like(rows_TD), scale_N)
        token_permute.quantise_rows(rows_TD, source_N, codes_ND, scale_N)
        token_permute.quantise_rows(rows_TD, None, codes_ND, scale_N)
        token_permute.unpermute_rows(rows_TD, place_TJ, torch.zeros_like(rows_TD), weight_TJ)
        token_permute.unpermute_rows(rows_TD, place_TJ, torch.zeros_like(rows_TD))
        token_permute.unpermute_rows(codes_ND, place_TJ, torch.zeros_like(rows_TD), weight_TJ)


OF_DRAFTS = (ancestor_attention, attention_tiles, anchored_attention, prefix_flash, row_loss, token_row_loss)
OF_TARGETS = (head_stats, fp8_linear, fp8_activations, token_permute)
CASES = {case.__name__: case for case in (*OF_DRAFTS, *OF_TARGETS)}


def print_compiled(capability: int, name: str) -> None:
    from triton.runtime import driver, jit

    run = jit.JITFunction.run
    compiled = []

    def compile_alone(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled.append((self.__name__, kernel.metadata.shared))
        return kernel

    jit.JITFunction.run = compile_alone
    driver.set_active(AbsentGpu(capability))
    CASES[name]()
    print(json.dumps(compiled), flush=True)


def main() -> None:
    from triton.runtime.cache import triton_key

    triton_key()  # hashes Triton's own files for half a second; the processes that are forked know it then
    for line in sys.stdin:
        name, capability = line.split()
        child = os.fork()  # Triton and the kernels remember what they chose for a GPU
        if child == 0:
            print_compiled(int(capability), name)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print("null", flush=True)


if __name__ == "__main__":
    main()
