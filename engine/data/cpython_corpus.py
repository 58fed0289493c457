"""English conversations made from the running CPython: the corpus of the embedded default recipe.

There are two sources, both shipped with every CPython: `pydoc_data.topics` (the language reference
as plain text) and the docstrings of the standard library. Python modules are parsed, never
imported. Built-in modules are imported and inspected, since their import has no side effects. The
result depends only on the CPython version: the same interpreter gives the same conversations in the
same order.
"""

import ast
import hashlib
import importlib
import inspect
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from engine.host.files import write_text, writing

HELD_OUT_SHARE = 0.05
MIN_TEXT_CHARS = 40
MAX_TURN_CHARS = 700
MAX_TURNS = 12
MAX_SIGNATURE_CHARS = 72
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "ensurepip"}
_HOW = ("What does {whole} do?", "Explain {whole}.", "What is {whole} for?", "How does {whole} work?")
QUESTIONS = {
    "function": _HOW,
    "method": _HOW,
    "class": ("What is {whole}?", "What does the class {whole} represent?", "Explain the class {whole}."),
    "module": ("What is the module {whole} for?", "Introduce the module {whole}."),
    "topic": ("Explain this topic of the Python language: {whole}.", "What should I know about {whole} in Python?"),
}
OPENINGS = {
    "function": "{name} is a function of {home}. ",
    "method": "{name} is a method of {home}. ",
    "class": "{name} is a class of {home}. ",
    "module": "{name} is a module of Python. ",
    "topic": "",
}

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")  # fields of a node that hold statements, or nodes that hold them


class DocEntry(NamedTuple):
    """One documented object or topic.

    kind: a key of `QUESTIONS`.
    home: dotted name of the module or class that contains it; "" if there is none.
    name: name without `home`.
    signature: its arguments; "" if it has none.
    text: documentation as written, including indentation.
    """

    kind: str
    home: str
    name: str
    signature: str
    text: str


def cpython_conversations() -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield (conversation, is held out) sorted by entry; no two have the same first answer.

    A conversation has the keys `id` and `conversations`. Whether it is held out follows from a hash
    of the text's first sentence, so texts with the same first sentence are in the same split.
    """
    seen: set[str] = set()
    for entry in sorted(_entries()):
        turns = _answer_turns(entry.text)
        if sum(map(len, turns)) < MIN_TEXT_CHARS or _key(turns[0]) in seen:
            continue
        seen.add(_key(turns[0]))
        identifier = f"{entry.kind}:{_dotted(entry.home, entry.name)}"
        yield {"id": identifier, "conversations": _messages(entry, turns)}, _is_held_out(turns[0])


def write_corpus(folder: Path) -> tuple[Path, Path]:
    """Write `train.jsonl` and `held_out.jsonl` and return both paths. Raises WriteError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lines: dict[bool, list[str]] = {False: [], True: []}
    for conversation, is_held_out in cpython_conversations():
        lines[is_held_out].append(json.dumps(conversation, ensure_ascii=False) + "\n")
    train = folder / "train.jsonl"
    held_out = folder / "held_out.jsonl"
    write_text(train, "".join(lines[False]))
    write_text(held_out, "".join(lines[True]))
    return train, held_out


def _is_held_out(text: str) -> bool:
    first_sentence = re.split(r"(?<=[.!?:])\s", text, maxsplit=1)[0]
    draw = int.from_bytes(hashlib.sha256(_key(first_sentence).encode()).digest()[:8], "big")
    return draw < HELD_OUT_SHARE * 2**64


def _dotted(home: str, name: str) -> str:
    return f"{home}.{name}" if home else name


def _key(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def _entries() -> Iterator[DocEntry]:
    yield from _topic_entries()
    yield from _source_entries(Path(sysconfig.get_path("stdlib")))
    yield from _builtin_entries()


def _topic_entries() -> Iterator[DocEntry]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError("this Python has no pydoc_data.topics; install your system's full python3 package") from error
    for label, text in topics.items():
        title, _, body = text.partition("\n")
        yield DocEntry("topic", "", title.strip() or label, "", body.lstrip("*=-~\n"))


def _source_entries(stdlib: Path) -> Iterator[DocEntry]:
    for path in stdlib.rglob("*.py"):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # the standard library contains deliberately broken fixtures and templates
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts).replace("posixpath", "os.path")
        yield from _documented_nodes(tree, "module", "", module)


def _documented_nodes(node: ast.Module | Definition, kind: str, home: str, name: str) -> Iterator[DocEntry]:
    text = ast.get_docstring(node)
    if text:
        signature = ""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            signature = ast.unparse(node.args)
        yield DocEntry(kind, home, name, signature, text)
    for child in _definitions(node):
        function = "method" if kind == "class" else "function"
        child_kind = "class" if isinstance(child, ast.ClassDef) else function
        yield from _documented_nodes(child, child_kind, _dotted(home, name), child.name)


def _definitions(node: ast.AST) -> Iterator[Definition]:
    """Yield classes and functions of `node`, also under `if` or `try`, but no nested ones."""
    for field in BLOCKS:
        for child in getattr(node, field, ()):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield child
            else:
                yield from _definitions(child)


def _builtin_entries() -> Iterator[DocEntry]:
    for module_name in sys.builtin_module_names:
        for attribute, value in vars(importlib.import_module(module_name)).items():
            if not attribute.startswith("__loader"):  # set by the import system
                yield from _runtime_entries(value, "function", module_name, attribute)


def _runtime_entries(value: Any, kind: str, home: str, name: str) -> Iterator[DocEntry]:
    if inspect.isclass(value):
        text = inspect.getdoc(value)
        if text:
            yield DocEntry("class", home, name, "", text)
        for attribute, member in vars(value).items():
            if inspect.isroutine(member):
                yield from _runtime_entries(member, "method", _dotted(home, name).removeprefix("builtins."), attribute)
    elif inspect.isroutine(value) and isinstance(value.__doc__, str):
        yield DocEntry(kind, home, name, _text_signature(value), inspect.cleandoc(value.__doc__))


def _text_signature(value: Any) -> str:
    """Return the arguments of a built-in from its C source, without the leading `$module`."""
    signature = " ".join((getattr(value, "__text_signature__", None) or "()").strip("()").split())
    return re.sub(r"^\$module(, /)?(, )?", "", signature).replace("$", "")


def _answer_turns(text: str) -> list[str]:
    """Return the prose of `text`, reflowed into turns of about `MAX_TURN_CHARS` characters."""
    turns: list[str] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        paragraph = " ".join(block.split())
        if not _is_prose(block, paragraph):
            continue
        for piece in _pieces(paragraph):
            if turns and len(turns[-1]) + len(piece) < MAX_TURN_CHARS:
                turns[-1] += "\n\n" + piece
            else:
                turns.append(piece)
    return turns[:MAX_TURNS]


def _is_prose(block: str, paragraph: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    is_code = ">>>" in block or block.startswith(("    ", "\t")) or "::=" in block
    return not is_code and len(paragraph) >= 16 and letters >= 0.8 * len(paragraph) and paragraph.isascii()


def _pieces(paragraph: str) -> Iterator[str]:
    """Split a paragraph that is longer than a turn at the ends of sentences."""
    piece = ""
    for sentence in re.split(r"(?<=[.!?])\s", paragraph):
        if piece and len(piece) + len(sentence) > MAX_TURN_CHARS:
            yield piece
            piece = ""
        piece = f"{piece} {sentence}".strip()
    yield piece[: 2 * MAX_TURN_CHARS]


def _messages(entry: DocEntry, turns: list[str]) -> list[dict[str, str]]:
    signature = f"({entry.signature})" if entry.kind in ("function", "method") else ""
    name = entry.name + (signature if len(signature) <= MAX_SIGNATURE_CHARS else "")
    questions = QUESTIONS[entry.kind]
    whole = _dotted(entry.home, name).removeprefix("builtins.")
    question = questions[hashlib.sha256(entry.name.encode()).digest()[0] % len(questions)].format(whole=whole)
    opening = OPENINGS[entry.kind].format(name=name, home=entry.home)
    messages = []
    for index, turn in enumerate(turns):
        messages.append({"role": "user", "content": question if index == 0 else "Go on."})
        messages.append({"role": "assistant", "content": opening + turn if index == 0 else turn})
    return messages
