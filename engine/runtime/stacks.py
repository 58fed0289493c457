"""Where the threads of a rank are, and which ranks of a hung job the others wait for."""

import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType

from engine.overlap.pipeline import PRODUCER_THREAD
from engine.runtime.progress import Progress

# A thread waits for another rank if one of its innermost calls is in one of these files.
FILES_OF_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "engine/overlap/bridge.py", "engine/parallel/mesh.py")
# ... and for another thread of its own rank if it is in one of these.
FILES_OF_THREADS = ("/threading.py", "engine/overlap/thread_turns.py")
INNERMOST = 12  # calls that are looked at


@dataclass(frozen=True)
class Stacks:
    """Where the threads of a rank are.

    text: the stacks of all threads. waits: whether the rank waits for another rank.
    count, where: of its `Progress`.
    """

    text: str
    waits: bool
    count: int
    where: str


def own_stacks(progress: Progress) -> Stacks:
    """Return where the threads of this process are, other than the calling one."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {ident: frame for ident, frame in sys._current_frames().items() if ident != threading.get_ident()}
    blocks = []
    for ident, frame in frames.items():
        calls = "".join(traceback.format_stack(frame))
        blocks.append(f"Thread {names.get(ident, ident)}:\n{calls}")
    main = threading.main_thread().ident
    working = [frame for ident, frame in frames.items() if ident == main or names.get(ident) == PRODUCER_THREAD]
    is_idle = all(_is_in(frame, FILES_OF_COLLECTIVES + FILES_OF_THREADS) for frame in working)
    in_collective = any(_is_in(frame, FILES_OF_COLLECTIVES) for frame in working)
    return Stacks("\n".join(blocks), is_idle and in_collective, progress.count, progress.where)


def _is_in(frame: FrameType | None, files: tuple[str, ...]) -> bool:
    for _ in range(INNERMOST):
        if frame is None:
            return False
        if any(name in frame.f_code.co_filename for name in files):
            return True
        frame = frame.f_back
    return False


def is_of_collective(error: BaseException) -> bool:
    """Return whether an error was raised in a collective, perhaps because another rank has ended."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return _is_in(frames[-1] if frames else None, FILES_OF_COLLECTIVES)


def find_causes(stacks: Mapping[int, Stacks]) -> list[int]:
    """Return the ranks that the others wait for: those that do not wait themselves, or those furthest behind."""
    working = [rank for rank, own in stacks.items() if not own.waits]
    if working and len(working) < len(stacks):
        return working
    least = min(own.count for own in stacks.values())
    return [rank for rank, own in stacks.items() if own.count == least]
