"""One job writes a folder at a time; the lock ends with the process that holds it."""

import os
import subprocess
import sys

import pytest

from engine.host.folder_lock import hold_folder

HOLDER = """
import sys, time
from pathlib import Path
from engine.host.folder_lock import hold_folder
lock = hold_folder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_held_folder_is_refused_and_the_holder_is_named(tmp_path):
    folder = tmp_path / "new" / "run"
    with hold_folder(folder), pytest.raises(ValueError, match=rf"is being written by process {os.getpid()} on .*, since 20"):
        hold_folder(folder)
    hold_folder(folder).close()


def test_a_killed_process_leaves_no_lock(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=f"process {holder.pid} on"):
        hold_folder(tmp_path)
    holder.kill()
    holder.wait()
    hold_folder(tmp_path).close()
