"""The trainers that DraftSpeed is compared with, and how to install each into a folder of its own.

A peer is installed from the package index without its dependencies. It uses the torch and
Transformers of this environment, so that both sides run the same products, and a comparison
downloads a few megabytes. `packages` names what it imports besides.
"""

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Peer:
    """A trainer of drafts by other authors.

    title: its name in tables. package: its import name. requirement: its name and version in the
    package index. packages: further packages that it imports and this project does not need.
    """

    title: str
    package: str
    requirement: str
    packages: tuple[str, ...] = ()

    @property
    def folder_name(self) -> str:
        return self.requirement.replace("==", "-")

    def install(self, folder: Path) -> None:
        """Install the peer into `folder`, unless it is there or can be imported without it."""
        if importlib.util.find_spec(self.package) or (folder / self.package).is_dir():
            return
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, self.requirement, *missing(self.packages)], check=True)


def missing(packages: tuple[str, ...]) -> list[str]:
    """Return the packages that this environment cannot import."""
    return [package for package in packages if not importlib.util.find_spec(import_name(package))]


def import_name(requirement: str) -> str:
    return requirement.split("==")[0].replace("-", "_")


PEERS = {
    "specforge": Peer("SpecForge", "specforge", "specforge==0.2.0", ("triton",)),
    "speculators": Peer(
        "speculators",
        "speculators",
        "speculators==0.9.0",
        ("hs-connectors==0.9.0", "loguru==0.7.3", "pydantic-settings==2.16.3"),
    ),
    "nemo_automodel": Peer("NeMo Automodel", "nemo_automodel", "nemo-automodel==0.7.0"),
}
