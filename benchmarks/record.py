"""Output of benchmarks: rows of figures with their machine, versions, commit and command."""

import contextlib
import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]


def show(rows: list[dict[str, float | str]], number: str = "{:,.3f}") -> None:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else number.format(value) for value in row.values()))
    Console(width=160).print(table)


def write_record(
    path: Path | None, command: str, rows: list[dict[str, Any]], device: str = "cpu", further: dict[str, Any] | None = None
) -> None:
    """Write the rows of a benchmark to a JSON file, unless `path` is None.

    device: type of device that the benchmark used. further: values that are no rows, by name.
    """
    if path is not None:
        record = {"command": command} | machine_and_versions(torch.device(device)) | (further or {}) | {"rows": rows}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def machine_and_versions(device: torch.device) -> dict[str, Any]:
    """Return the commit, machine and package versions that a figure depends on."""
    git = ["git", "describe", "--always", "--exclude=*", "--dirty"]
    described = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = {"processor": _processor(), "cores": os.cpu_count(), "memory_bytes": memory_bytes}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        machine |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory}
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    versions |= {name: _version(name) for name in ("torch", "triton", "transformers")}
    commit = described.removesuffix("-dirty") or None
    dirty = described.endswith("-dirty")
    return {"commit": commit, "dirty": dirty, "machine": machine, "versions": versions}


def _processor() -> str:
    with contextlib.suppress(OSError, TypeError):
        return re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)[1]
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
