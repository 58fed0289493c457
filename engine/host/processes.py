"""Limits of this process, and its life next to others."""

import ctypes
import gc
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1  # of prctl(2)


def end_with_parent() -> None:
    """Let the kernel end this process when the one that has started it ends, however it ends. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def collect_garbage_rarely() -> None:
    """Let Python's garbage collector run after 10,000 new objects instead of 700 (2,000 in Python 3.13).

    Imports and the embedded corpus create a million objects that live on, which it would visit again and again. Call it
    before them.
    """
    gc.set_threshold(10_000)


def allow_many_files() -> None:
    """Raise the number of files that this process may have open to the most that it may ask for.

    A store has a file per shard, and many systems allow 1024 files or fewer unless a process asks.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
