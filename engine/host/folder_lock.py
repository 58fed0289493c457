"""A lock on a folder that one job writes, which names its holder."""

import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from engine.host.files import writing

LOCK = ".lock"


def hold_folder(folder: Path) -> IO[str]:
    """Lock a folder for this process, and return the lock, which ends with the process or when it is closed.

    The folder is created if it does not exist. File systems without locks are used without one.
    Raises ValueError that names the holder if another process has the lock.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        problem = f"{folder} is being written by {holder}"
        raise ValueError(f"{problem}. Wait until it ends, end it, or name another folder") from error
    except OSError:  # for example on a network file system without locks
        return file
    with suppress(OSError):  # on a full disk the lock holds all the same
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
    return file
