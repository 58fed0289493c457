"""What holds the house together: imports go down the floors, files and functions fit a reader."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A module may import those above its own line, and its own package. docs/architecture.md says what each is for.
FLOORS = (
    "secret_values",
    "files",
    "strict",
    "ds_keys",
    "data_config",
    "config",
    "recipe",
    "ds_config",
    "host_memory",
    "host_copy",
    "batch",
    "finite",
    "flops",
    "kernels",
    "models",
    "rows",
    "ttt",
    "parallel",
    "normaliser",
    "data",
    "store",
    "target",
    "planning",
    "overlap",
    "decode",
    "replies",
    "evaluate",
    "metrics",
    "fault_watch",
    "telemetry",
    "conversations",
    "corpus",
    "origin",
    "held_out",
    "report",
    "portrait",
    "portrait_page",
    "capture",
    "checkpoint",
    "export",
    "train_log",
    "trainer",
)
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 60
NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, at its top and inside functions; `.` begins those of relative imports."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def floor_of(path: Path) -> str:
    return path.relative_to(ROOT / "engine").with_suffix("").parts[0]


@pytest.fixture(params=files("engine"), ids=relative)
def engine_file(request) -> Path:
    return request.param


def test_every_module_has_a_floor_and_every_floor_a_module():
    found = {floor_of(path) for path in files("engine")} - {"__init__"}
    assert found == set(FLOORS)


def test_imports_only_go_down(engine_file):
    own = floor_of(engine_file)
    below = set() if own == "__init__" else {*FLOORS[: FLOORS.index(own)], own}
    for name in imports(engine_file):
        assert not name.startswith((".", "launcher", "tests", "benchmarks")), name
        if name.partition(".")[0] == "engine":
            assert name.split(".")[1] in below, f"{own} must not import {name}"


def test_a_module_outside_a_package_never_imports_itself(engine_file):
    if engine_file.parent == ROOT / "engine":
        assert not [name for name in imports(engine_file) if name.startswith(f"engine.{engine_file.stem}.")]


def test_only_one_file_imports_deepspeed():
    found = [p for p in files("engine", "launcher", "benchmarks") if any(n.split(".")[0] == "deepspeed" for n in imports(p))]
    assert [relative(path) for path in found] == ["engine/parallel/zero.py"]


def test_only_commands_read_the_environment():
    readers = {"environ", "environb", "getenv", "putenv"}
    for path in files("engine"):
        attributes = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
        names = {name.rpartition(".")[2] for name in imports(path)}
        assert not readers & (attributes | names), f"{relative(path)} reads environment variables"


@pytest.mark.parametrize("path", files("engine", "launcher", "tests", "benchmarks"), ids=relative)
def test_a_file_fits_a_reader(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    assert path.stem not in NAMES_THAT_SAY_NOTHING


@pytest.mark.parametrize("path", files("engine", "launcher"), ids=relative)
def test_a_function_fits_a_screen(path):
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: lines for node in functions if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES}
    assert not long


def test_every_module_says_what_it_is(engine_file):
    assert ast.get_docstring(tree(engine_file))


def test_a_test_mirrors_the_file_it_tests():
    free_standing = {
        "test_published_templates",
        "test_architecture",
        "test_device",
        "test_fake_device",
        "test_equalities",
        "test_golden",
        "test_recipes",
    }
    homes = {path.relative_to(ROOT / "engine").with_suffix("") for path in files("engine")}
    homes |= {Path("launcher", path.stem) for path in files("launcher")}
    homes |= {path.relative_to(ROOT).with_suffix("") for path in files("benchmarks")}
    for path in files("tests"):
        if path.stem.startswith("test_") and path.stem not in free_standing:
            home = path.relative_to(ROOT / "tests").with_name(path.stem.removeprefix("test_"))
            assert home in homes, f"{relative(path)} tests no file of that name"
