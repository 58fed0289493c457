"""Versions that setup.py asks for, compared with those installed. Imports nothing that could be missing."""

import ast
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from engine.setup_checks.finding import Finding, problem

PACKAGE = "draftspeed"
INSTALL = "pip install -c constraints.txt -e ."
COMPARISONS = {
    ">=": lambda found, bound: found >= bound,
    "<=": lambda found, bound: found <= bound,
    "==": lambda found, bound: found == bound,
    "!=": lambda found, bound: found != bound,
    ">": lambda found, bound: found > bound,
    "<": lambda found, bound: found < bound,
}


@dataclass(frozen=True)
class Requirement:
    """A package and the versions that are allowed, as text such as `>=2.8,<3`; "" = every version."""

    name: str
    versions: str

    @classmethod
    def parse(cls, text: str) -> "Requirement":
        """Return the requirement of a line such as `torch>=2.8`; markers after `;` are ignored."""
        name, versions = re.fullmatch(r"([\w.-]*)(?:\[.*\])?\s*(.*)", text.partition(";")[0].strip()).groups()  # type: ignore[union-attr]
        return cls(name.lower(), versions.strip("() "))

    def allows(self, version: str) -> bool:
        """Return whether a version is allowed. Its release numbers alone are compared, as in 2.9.0 of 2.9.0a0+git."""
        found = release(version)
        for part in filter(None, self.versions.split(",")):
            sign, bound = re.fullmatch(r"\s*([<>=!]+)\s*(\S+)\s*", part).groups()  # type: ignore[union-attr]
            if not COMPARISONS[sign](found, release(bound)):
                return False
        return True


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a release without zeros at the end, such as (2, 13) of 2.13.0+cu130."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [] if match is None else [int(number) for number in match[0].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


@dataclass(frozen=True)
class Requirements:
    """Versions of Python and of packages that setup.py asks for.

    python: allowed versions. packages: those that every installation needs. optional: those of all extras.
    """

    python: Requirement
    packages: tuple[Requirement, ...]
    optional: tuple[Requirement, ...]

    @classmethod
    def read(cls, setup_file: Path) -> "Requirements":
        """Read setup.py, or the metadata of the installed package if there is no such file."""
        if not setup_file.is_file():
            return cls._of_metadata()
        tree = ast.parse(setup_file.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        (call,) = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "setup"]
        parts = {keyword.arg: _texts(keyword.value) for keyword in call.keywords}
        extras = [text for text in parts["extras_require"] if re.search("[<>=]", text)]
        return cls(
            python=Requirement("python", parts["python_requires"][0]),
            packages=tuple(Requirement.parse(text) for text in parts["install_requires"]),
            optional=tuple(Requirement.parse(text) for text in extras),
        )

    @classmethod
    def _of_metadata(cls) -> "Requirements":
        lines = metadata.requires(PACKAGE) or []
        python = metadata.metadata(PACKAGE)["Requires-Python"] or ""
        return cls(
            python=Requirement("python", python),
            packages=tuple(Requirement.parse(line) for line in lines if "extra" not in line),
            optional=tuple(Requirement.parse(line) for line in lines if "extra" in line),
        )

    def optional_versions(self, name: str) -> Requirement:
        """Return the requirement of an optional package."""
        return next((known for known in self.optional if known.name == name), Requirement(name, ""))


def _texts(node: ast.expr) -> list[str]:
    """Return all strings of an expression, in their order; names in it are left out."""
    parts = [part for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return [str(part.value) for part in parts]


def installed_versions(names: Sequence[str]) -> dict[str, str]:
    """Return the version of each package that is installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def judge_installed(requirements: Requirements, versions: Mapping[str, str]) -> list[Finding]:
    """Return a problem for each required package that is not installed, before anything is imported.

    versions: of the installed packages, by name.
    """
    missing = [needed for needed in requirements.packages if needed.name not in versions]
    return [
        problem(needed.name, f"is not installed; needs {needed.versions}", f"Run `{INSTALL}` with this Python, {python()}")
        for needed in missing
    ]


def python() -> str:
    """Return the version of the running Python."""
    return platform.python_version()
