"""Memory-mapped files, of which a limited number is open at a time.

A mapping holds a file descriptor. A store may have more shards than a process may have open files,
even after it has asked for as many as it may have.
"""

import itertools
import mmap
import resource
import threading
import weakref
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path

SHARE_OF_LIMIT = 4  # one of so many of a process's files may be a mapped one; sockets and other files need the rest
MIN_OPEN = 8


class MappingPool:
    """The mappings of a process; the least recently used one is closed when there are too many.

    A closed mapping stays in memory until the last array that was made of it is gone.
    """

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._mappings: OrderedDict[int, mmap.mmap] = OrderedDict()
        # Reentrant, because collecting garbage within `get` may call `forget`.
        self._lock = threading.RLock()

    def get(self, key: int, path: Path) -> mmap.mmap:
        """Return the mapping of a file for reading; it is opened if it is not open. key: of the file, for `forget`.

        Raises OSError if the file cannot be opened.
        """
        with self._lock:
            mapping = self._mappings.get(key)
            if mapping is None:
                with path.open("rb") as file:
                    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._mappings[key] = mapping
                if len(self._mappings) > self._max_open:
                    self._mappings.popitem(last=False)
            self._mappings.move_to_end(key)
            return mapping

    def forget(self, key: int) -> None:
        """Close a mapping if it is open."""
        with self._lock:
            self._mappings.pop(key, None)

    def __len__(self) -> int:
        return len(self._mappings)


@lru_cache(maxsize=1)
def shared_pool() -> MappingPool:
    """Return the pool of this process; its size follows from the limit at the first call."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        allowed = 1 << 20
    return MappingPool(max(MIN_OPEN, allowed // SHARE_OF_LIMIT))


class MappedFile:
    """A file that is memory-mapped while it is in use."""

    _keys = itertools.count()

    def __init__(self, path: Path, pool: MappingPool | None = None) -> None:
        self._path = path
        self._pool = pool or shared_pool()
        self._key = next(self._keys)
        weakref.finalize(self, self._pool.forget, self._key)

    @property
    def mapping(self) -> mmap.mmap:
        """The mapping; keep it only for as long as it is used. Raises OSError if the file cannot be opened."""
        return self._pool.get(self._key, self._path)
