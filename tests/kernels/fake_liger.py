"""Stand-ins for liger-kernel, which is an optional package."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

UNUSED = SimpleNamespace(apply=None)


def install_liger(monkeypatch: Any, *, rms_norm: Any = UNUSED, rope: Any = UNUSED, swiglu: Any = UNUSED) -> None:
    """Let liger-kernel be importable, with these in place of its autograd functions."""
    functions = {"rms_norm": ("LigerRMSNorm", rms_norm), "rope": ("LigerRope", rope), "swiglu": ("LigerSiLUMul", swiglu)}
    for name, (published, function) in functions.items():
        module = ModuleType(name)
        setattr(module, f"{published}Function", function)
        monkeypatch.setitem(sys.modules, f"liger_kernel.ops.{name}", module)
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
