"""How the process treats freed host memory."""

import ctypes

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_HEAP_BLOCK_BYTES = 32 << 20
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MiB, 1 GiB in all, where its default returns them to the kernel.

    Tensors of a training step on a CPU come and go by the thousand; taking their pages from the kernel anew each time costs
    more than computing on them. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
