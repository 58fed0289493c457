"""The structure of the code base: imports go in one direction, names are unique, and tests mirror the files they test."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A package may import itself and those above its own line. docs/architecture.md says what each is for.
LAYERS = (
    "config",
    "host",
    "batch",
    "kernels",
    "parallel",
    "overlap",
    "models",
    "data",
    "weights",
    "target",
    "hidden_states",
    "serving",
    "evaluation",
    "planning",
    "conversations",
    "runtime",
    "trainer",
    "setup_checks",
)
NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
TESTS_OF_NO_SINGLE_FILE = {
    "test_published_templates",
    "test_compile_only",
    "test_kubernetes",
    "test_architecture",
    "test_device",
    "test_fake_device",
    "test_fast_interpreter",
    "test_equalities",
    "test_golden",
    "test_pairwise",
    "test_parity",
    "test_plugins",
    "test_recipes",
    "test_faults",
    "test_slurm",
}


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


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT / "engine").with_suffix("").parts[0]


def test_imports_go_in_one_direction():
    paths = files("engine")
    assert {layer_of(path) for path in paths} - {"__init__"} == set(LAYERS)
    wrong = []
    for path in paths:
        own = layer_of(path)
        allowed = set() if own == "__init__" else {*LAYERS[: LAYERS.index(own)], own}
        for name in imports(path):
            is_upward = name.startswith("engine.") and name.split(".")[1] not in allowed
            if is_upward or name.startswith((".", "launcher", "tests", "benchmarks")):
                wrong.append(f"{relative(path)} imports {name}")
    assert not wrong


def test_only_two_files_import_deepspeed():
    found = [p for p in files("engine", "launcher", "benchmarks") if any(n.split(".")[0] == "deepspeed" for n in imports(p))]
    assert [relative(path) for path in found] == ["engine/parallel/zero.py", "engine/parallel/zero_checkpoint.py"]


def test_only_commands_read_the_environment():
    readers = {"environ", "environb", "getenv", "putenv"}
    for path in files("engine"):
        attributes = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
        names = {name.rpartition(".")[2] for name in imports(path)}
        assert not readers & (attributes | names), f"{relative(path)} reads environment variables"


def test_every_file_has_a_name_of_its_own_and_a_docstring():
    paths = files("engine", "launcher")
    stems = Counter(path.stem for path in paths)
    assert [stem for stem, count in stems.items() if count > 1] == ["__init__"]
    assert not NAMES_THAT_SAY_NOTHING & set(stems)
    assert [relative(path) for path in paths if ast.get_docstring(tree(path)) is None] == []


def test_a_test_mirrors_the_file_it_tests():
    homes = {path.relative_to(ROOT / "engine").with_suffix("") for path in files("engine")}
    homes |= {Path("launcher", path.stem) for path in files("launcher")}
    homes |= {path.relative_to(ROOT).with_suffix("") for path in files("benchmarks")}
    for path in files("tests"):
        if path.stem.startswith("test_") and path.stem not in TESTS_OF_NO_SINGLE_FILE:
            home = path.relative_to(ROOT / "tests").with_name(path.stem.removeprefix("test_"))
            assert home in homes, f"{relative(path)} tests no file of that name"
