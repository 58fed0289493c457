"""Allocator setting that keeps freed host memory in the process."""

import ctypes

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_HEAP_BLOCK_BYTES = 32 << 20
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MiB, 1 GiB in total, for reuse.

    By default glibc returns them to the kernel. A training step on a CPU allocates and frees
    thousands of tensors. Requesting their pages from the kernel again each time costs more than
    computing on them. Does nothing if the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
