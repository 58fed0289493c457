"""Check of whether models can be downloaded from the hub."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.setup_checks.finding import Finding, ok, warning


@dataclass(frozen=True)
class HubFacts:
    """The folder of models from the hub, HF_HOME, as one node sees it. is_offline: whether downloads are switched off."""

    host: str
    folder: str
    is_writeable: bool
    is_offline: bool

    @classmethod
    def own(cls, host: str, folder: Path, is_offline: bool) -> "HubFacts":
        """Return the facts of this process."""
        return cls(host, str(folder), is_writeable(folder), is_offline)


def is_writeable(folder: Path) -> bool:
    """Return whether files can be created in a folder, or the folder itself if it does not exist."""
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if existing != folder:
        return existing.is_dir() and os.access(existing, os.W_OK)
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def judge_hub(nodes: Sequence[HubFacts]) -> Finding:
    """Return the finding on the hub's folder. nodes: facts of each node."""
    first = nodes[0]
    if first.is_offline:
        return ok("models", f"HF_HUB_OFFLINE is set: models are read from {first.folder}, and nothing is downloaded")
    read_only = [node for node in nodes if not node.is_writeable]
    if read_only:
        hosts = ", ".join(node.host for node in read_only)
        text = f"{read_only[0].folder} is not writeable on {hosts}, so models cannot be downloaded"
        return warning("models", text, "Set HF_HOME to a folder that is writeable, or HF_HUB_OFFLINE=1 if the models are there")
    return ok("models", f"downloaded to {first.folder}, which is writeable")
