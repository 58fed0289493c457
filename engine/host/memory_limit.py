"""The limit on the host memory of this process: that of its container or of its Slurm job."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

CGROUP = Path("/sys/fs/cgroup")  # where the kernel shows control groups, which have the limits
OWN_GROUPS = Path("/proc/self/cgroup")
UNLIMITED_BYTES = 1 << 60  # larger limits are none


@dataclass(frozen=True)
class MemoryLimit:
    """A limit on memory, and the memory that counts towards it.

    used_bytes: by all processes under the limit. Cached file contents, which the kernel gives up when memory runs
    short, do not count.
    """

    limit_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class _Version:
    """A version of control groups.

    controller: of memory, as /proc names it. folder: of the groups, in `CGROUP`. limit, used: names of files.
    cached: names of the entries of memory.stat that count file contents.
    """

    controller: str
    folder: str
    limit: str
    used: str
    cached: tuple[str, ...]


VERSIONS = (
    _Version("", "", "memory.max", "memory.current", ("inactive_file", "active_file")),
    _Version(
        "memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
    ),
)


def read_memory_limit(root: Path | None = None, own_groups: Path | None = None) -> MemoryLimit | None:
    """Return the least limit of the groups of this process and of their parents; None = there is none.

    Of several groups with this limit, the one that uses most of it counts, as it is the closest to its limit.
    root, own_groups: default to `CGROUP` and `OWN_GROUPS`.
    """
    found = []
    for version in VERSIONS:
        for folder in _groups(version, root or CGROUP, own_groups or OWN_GROUPS):
            limit_bytes = _number(folder / version.limit)
            used_bytes = _number(folder / version.used)
            if limit_bytes is not None and used_bytes is not None and limit_bytes < UNLIMITED_BYTES:
                cached_bytes = _sum_of_entries(folder / "memory.stat", version.cached)
                found.append(MemoryLimit(limit_bytes, max(0, used_bytes - cached_bytes)))
    return min(found, key=lambda group: (group.limit_bytes, -group.used_bytes), default=None)


def _groups(version: _Version, root: Path, own_groups: Path) -> Iterator[Path]:
    """Yield the folders of the group of this process and of its parents, as far as this process sees them.

    In a container /proc may name a group by its path outside of the container; then only the container's own
    group, which is the top folder, is seen.
    """
    top = root / version.folder
    own = PurePosixPath("/")
    try:
        lines = own_groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if version.controller in controllers.split(","):
            own = PurePosixPath(path)
    if ".." in own.parts:  # outside of what this process sees
        own = PurePosixPath("/")
    for group in (own, *own.parents):
        yield top / group.relative_to("/")


def _number(path: Path) -> int | None:
    """Return the number in a file of the kernel; None = there is no file, or its text is "max"."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _sum_of_entries(path: Path, names: tuple[str, ...]) -> int:
    """Return the sum of some entries of a file of the kernel; those that are missing count 0."""
    try:
        pairs = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
        return sum(int(value) for key, value in pairs if key in names)
    except (OSError, ValueError):
        return 0
