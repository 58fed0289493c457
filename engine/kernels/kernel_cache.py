"""Cache file of self-check results and tile times of the kernels on this machine.

There is one file per combination of GPU type, driver, package versions and source code of our
kernels. A change of any of them starts a new file, so the entries of a file are never out of date.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from engine.host.files import write_json

PACKAGES = ("torch", "triton", "liger-kernel", "flash-attn")
DRIVER = Path("/proc/driver/nvidia/version")


def environment(device: torch.device) -> dict[str, str]:
    """Return what determines whether a kernel works: device, driver, versions and our source."""
    facts = {"device": "cpu", "driver": "none", "kernels": _source_digest()}
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        facts["device"] = f"{torch.cuda.get_device_name(device)}, compute capability {capability}"
        facts["driver"] = _driver()
    return facts | {name: _version(name) for name in PACKAGES}


@cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _driver() -> str:
    try:
        return DRIVER.read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return f"CUDA {torch.version.cuda}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


class KernelCache:
    """One cache file.

    A file consists of sections, which map text to JSON values. An unreadable file counts as empty.
    If the file cannot be written, nothing is stored.
    """

    def __init__(self, folder: Path | None, device: torch.device) -> None:
        """folder: where the cache file lies; None stores nothing on disk."""
        self._facts = environment(device)
        digest = hashlib.sha256(json.dumps(self._facts, sort_keys=True).encode()).hexdigest()[:16]
        self.path = None if folder is None else folder / f"kernels-{digest}.json"

    def read(self, section: str) -> dict[str, Any]:
        """Return the entries of a section; empty if there is no readable file."""
        return _section(self._content(), section)

    def add(self, section: str, entries: Mapping[str, Any]) -> None:
        """Add entries to a section. The file is replaced as a whole."""
        if self.path is None or not entries:
            return
        content = self._content()
        content |= {"environment": self._facts, section: _section(content, section) | dict(entries)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, content, shared=True)
        except OSError:
            # Without a writable folder the checks run again at the next start; the run goes on.
            self.path = None

    def _content(self) -> dict[str, Any]:
        if self.path is None:
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def _section(content: dict[str, Any], section: str) -> dict[str, Any]:
    entries = content.get(section)
    return entries if isinstance(entries, dict) else {}
