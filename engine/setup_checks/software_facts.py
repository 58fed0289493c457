"""Versions of what a rank runs: Python, packages, CUDA, driver and the source code of DraftSpeed."""

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.kernels.flash import available_flash
from engine.parallel.zero import apex_fused_adam
from engine.setup_checks.required_packages import Requirements, installed_versions, python

OPTIONAL = ("triton", "flash-attn", "liger-kernel", "nvidia-ml-py", "apex")
DRIVER_VERSION = Path("/sys/module/nvidia/version")


@dataclass(frozen=True)
class SoftwareFacts:
    """Versions of what a rank runs.

    versions: of the installed packages, by name. draftspeed: version. source: digest of DraftSpeed's Python files.
    cuda: CUDA of torch's build; None = built without it. nccl: NCCL of torch; None = no GPU is used.
    driver: NVIDIA's driver; None = there is none. sees_gpu: whether torch can use a GPU.
    hides_gpus: whether the environment hides all GPUs.
    has_nvidia_apex: whether NVIDIA's apex can be imported; `has_apex`: whether any package of this name is there.
    flash: the implementation of flash attention; None = there is none.
    """

    python: str
    versions: Mapping[str, str]
    draftspeed: str
    source: str
    cuda: str | None
    nccl: str | None
    driver: str | None
    sees_gpu: bool
    hides_gpus: bool
    has_nvidia_apex: bool
    has_apex: bool
    flash: str | None

    @classmethod
    def own(cls, requirements: Requirements, root: Path, version: str, hides_gpus: bool) -> "SoftwareFacts":
        """Return the facts of this process. root: folder that holds DraftSpeed's packages. version: of DraftSpeed."""
        names = [*(needed.name for needed in requirements.packages), *OPTIONAL]
        sees_gpu = torch.cuda.is_available()
        flash = available_flash() if sees_gpu else None
        return cls(
            python=python(),
            versions=installed_versions(names),
            draftspeed=version,
            source=source_digest(root),
            cuda=torch.version.cuda,
            nccl=".".join(map(str, torch.cuda.nccl.version())) if sees_gpu else None,
            driver=_driver(),
            sees_gpu=sees_gpu,
            hides_gpus=hides_gpus,
            has_nvidia_apex=apex_fused_adam() is not None,
            has_apex=importlib.util.find_spec("apex") is not None,
            flash=None if flash is None else flash.name,
        )


def source_digest(root: Path) -> str:
    """Return a short hash of all Python files of `engine` and `launcher`, with their names."""
    digest = hashlib.sha256()
    for folder in ("engine", "launcher"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _driver() -> str | None:
    try:
        return DRIVER_VERSION.read_text(encoding="utf-8").strip()
    except OSError:
        return None
