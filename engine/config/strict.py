"""Strict reading of options: unknown keys and wrong types raise one-line errors that name the fix."""

import dataclasses
import difflib
import json
import math
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Le

from engine.config.secret_values import HIDDEN, hidden_in_text, is_secret_name, without_secrets

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic import TypeAdapter

Entry = TypeVar("Entry")
Section = TypeVar("Section", bound="DataclassInstance")
NO_VALUE = object()
TYPE_NAMES = {types.NoneType: "null", dict: "mapping with text keys", Any: "anything"}
EXPONENT_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")


class ConfigError(ValueError):
    """Error for an unusable option; str() gives 'source: key = value: problem' on one line."""

    def __init__(self, problem: str, *, key: str = "", value: Any = NO_VALUE, source: str | Path = ""):
        super().__init__(problem)
        self.problem = problem
        self.key = key
        self.value = value
        self.source = source

    def __str__(self) -> str:
        option = self.key if self.value is NO_VALUE else f"{self.key} = {as_yaml(shown_value(self.key, self.value))}"
        message = ": ".join(part for part in (str(self.source), option, self.problem) if part)
        return hidden_in_text(message)


def shown_value(key: str, value: Any) -> Any:
    """Return the value of an option with its secrets hidden, so that it can be shown."""
    return HIDDEN if is_secret_name(key) else without_secrets(value)


def as_yaml(value: Any) -> str:
    """Return a value as it is typed in a recipe or on the command line, shortened if it is long."""
    value = list(value) if isinstance(value, tuple) else value
    text = " ".join(dump_yaml(value, default_flow_style=True, width=math.inf).removesuffix("\n...\n").split())
    return text if len(text) <= 200 else text[:200] + "..."


def type_name(kind: Any) -> str:
    """Return a type as text for users: 'int >= 1 or null', 'cut | split', 'list of str'."""
    origin = get_origin(kind)
    args = get_args(kind)
    if origin is Annotated:
        limits = [f">= {limit.ge:g}" for limit in args[1:] if isinstance(limit, Ge)]
        limits += [f"<= {limit.le:g}" for limit in args[1:] if isinstance(limit, Le)]
        return " and ".join((f"{type_name(args[0])} {limits[0]}", *limits[1:])) if limits else type_name(args[0])
    if origin is Literal:
        return " | ".join(as_yaml(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(arg) for arg in args)
    if origin is tuple:
        return f"list of {type_name(args[0])}"
    return TYPE_NAMES.get(origin or kind) or kind.__name__


def option(default: Any, text: str, *, unit: str = "", at_least: float | None = None, at_most: float | None = None) -> Any:
    """Return a dataclass field for an option of a section.

    text: help text. unit: unit of the value, for the help. at_least, at_most: inclusive bounds.
    """
    metadata = {"text": text, "unit": unit, "at_least": at_least, "at_most": at_most}
    assert not isinstance(default, list | dict), "defaults are immutable: use a tuple"
    return field(default=default, metadata=metadata)


def bounded(kind: Any, at_least: float | None, at_most: float | None) -> Any:
    """Return the type with inclusive bounds on each number, also in unions."""
    limits: list[Ge | Le] = []
    if at_least is not None:
        limits.append(Ge(at_least))
    if at_most is not None:
        limits.append(Le(at_most))
    if not limits:
        return kind
    if get_origin(kind) in (Union, types.UnionType):
        return Union[tuple(bounded(arg, at_least, at_most) for arg in get_args(kind))]  # noqa: UP007 (built at run time)
    return Annotated[(kind, *limits)] if kind in (int, float) else kind


def option_type(of: dataclasses.Field, kind: Any = None) -> Any:
    """Return the type of an `option` field with its bounds. kind: its type where the field holds it as text."""
    return bounded(of.type if kind is None else kind, of.metadata["at_least"], of.metadata["at_most"])


@cache
def _adapter(kind: Any) -> "TypeAdapter":
    from pydantic import ConfigDict, TypeAdapter  # only when an option is read, since the import takes a while

    return TypeAdapter(_exact(kind), config=ConfigDict(strict=True, allow_inf_nan=False))


def _exact(kind: Any) -> Any:
    """Return the type with choices that must be equal in type too: for pydantic, True and 1.0 are the choice 1."""
    from pydantic import BeforeValidator

    args = get_args(kind)
    if get_origin(kind) is Literal:

        def check(value: Any) -> Any:
            if not any(type(value) is type(choice) and value == choice for choice in args):
                raise ValueError("no choice")
            return value

        return Annotated[kind, BeforeValidator(check)]
    if get_origin(kind) in (Union, types.UnionType):
        return Union[tuple(_exact(member) for member in args)]  # noqa: UP007 (built at run time)
    if get_origin(kind) is tuple:
        item: Any = _exact(args[0])
        return tuple[item, ...]
    return kind


def _with_tuples(value: Any, kind: Any) -> Any:
    """Return the value with a tuple for each list for which the type has a tuple."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for member in members:
        if get_origin(member) is tuple and isinstance(value, list):
            return tuple(_with_tuples(item, get_args(member)[0]) for item in value)
    return value


def read_as(value: Any, kind: Any) -> Any:
    """Return the value converted to its type: an int to float, a list to a tuple.

    Raises ConfigError if the value does not fit. A bool is not a number, and numbers must be
    finite.
    """
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(_with_tuples(value, kind))
    except ValidationError:
        raise ConfigError(f"expected {type_name(kind)}", value=value) from None


def checked(value: Any, kind: Any, *, key: str, source: str | Path) -> Any:
    """Return the value converted by `read_as`.

    Raises ConfigError that names the file, the key, the whole value and, for choices, the nearest
    one.
    """
    try:
        return read_as(value, kind)
    except ConfigError:
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        problem = f"expected {type_name(kind)}" + did_you_mean(str(value), [str(choice) for choice in choices])
        raise ConfigError(problem, key=key, value=value, source=source) from None


def read_section(section: type[Section], values: Mapping[str, Any] | None, key: str) -> Section:
    """Return a section, a dataclass of `option` fields, from a mapping; missing options have their defaults.

    key: dotted key of the mapping, for messages.
    Raises ConfigError for an unknown key, with the nearest valid one, and for a value of another type.
    """
    known = {own.name: own for own in dataclasses.fields(section)}
    kinds = get_type_hints(section, include_extras=True)
    read: dict[str, Any] = {}
    for name, value in (values or {}).items():
        if name not in known:
            problem = f"unknown key; valid are {', '.join(known)}{did_you_mean(name, known)}"
            raise ConfigError(problem, key=f"{key}.{name}", value=value)
        read[name] = checked(value, option_type(known[name], kinds[name]), key=f"{key}.{name}", source="")
    return section(**read)


def nearest(key: str, valid: Iterable[str]) -> str | None:
    """Return the valid dotted key most similar to `key`, or None if none is similar.

    All sections are searched. The name counts most, then the section.
    """

    def likeness(candidate: str) -> tuple[float, float, bool]:
        (section, _, name), (other_section, _, other_name) = key.rpartition("."), candidate.rpartition(".")
        same_name = difflib.SequenceMatcher(None, name.lower(), other_name.lower()).ratio()
        same_section = difflib.SequenceMatcher(None, section.lower(), other_section.lower()).ratio() if section else 0.0
        return same_name, same_name + 0.3 * same_section, section == other_section

    scored = [(likeness(candidate), candidate) for candidate in valid]
    plausible = [(rest, candidate) for (same_name, *rest), candidate in scored if same_name >= 0.6]
    return max(plausible, key=lambda pair: pair[0])[1] if plausible else None


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """Return the end of an error message that names the choice most similar to `value`.

    It is empty if no choice is similar.
    """
    guess = nearest(value, choices)
    return f"; did you mean '{guess}'?" if guess else ""


def registered(registry: Mapping[str, Entry], name: str, *, key: str) -> Entry:
    """Return the entry `name` of a registry. Raises ConfigError for the option `key` if there is none."""
    if name not in registry:
        raise ConfigError(f"expected {' | '.join(registry)}{did_you_mean(name, registry)}", key=key, value=name)
    return registry[name]


def unknown_key(
    key: str, value: Any, valid: Sequence[str], elsewhere: Callable[[str], str | None], source: str | Path
) -> ConfigError:
    """Return the error for an unknown key, which belongs to the other file or is misspelt.

    valid: all valid dotted keys. elsewhere: returns a sentence on where a key of the other file
    belongs, or None for any other key.
    """
    guess = nearest(key, valid)
    if guess is not None and is_secret_name(guess):
        value = HIDDEN
    section, _, name = key.rpartition(".")
    if guess is not None and guess.rpartition(".")[2] == name:
        problem = f"unknown key; did you mean '{guess}'?"
    elif home := elsewhere(key):
        problem = home
    elif guess is not None:
        problem = f"unknown key; did you mean '{guess}'?"
    else:
        siblings = [other for other in valid if other.rpartition(".")[0] == section]
        problem = f"unknown key; valid are {', '.join(siblings or [other for other in valid if '.' not in other])}"
    return ConfigError(problem, key=key, value=value, source=source)


def read_text(path: Path) -> str:
    """Return the text of a configuration file.

    Raises ConfigError if it cannot be read, and names the most similar file in the same folder.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        beside = path.parent.glob(f"*{path.suffix}") if path.parent.is_dir() else ()
        guess = nearest(path.stem, [other.stem for other in beside])
        hint = f"; did you mean '{path.parent / guess}{path.suffix}'?" if guess else ""
        raise ConfigError(f"cannot be read ({error.strerror}){hint}", source=path) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text ({error.reason} at byte {error.start})", source=path) from error


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ConfigError(f"given twice, again on line {key.start_mark.line + 1}", key=key.value)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _StrictDumper(yaml.SafeDumper):
    """SafeDumper that quotes text which _StrictLoader would read as a number."""


# PyYAML follows YAML 1.1, which reads 1e-4 as text. YAML 1.2 reads it as a number, as users expect.
for _side in (_StrictLoader, _StrictDumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT_NUMBER, list("-+0123456789"))


def dump_yaml(value: Any, **style: Any) -> str:
    """Convert plain Python to YAML that `parse_yaml` reads back as equal; keys keep their order."""
    return yaml.dump(value, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, **style)


def parse_yaml(text: str, source: str | Path) -> Any:
    """Convert YAML to plain Python.

    Raises ConfigError for bad syntax, with its line, and for duplicate keys.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except ConfigError as error:
        error.source = source
        raise
    except yaml.MarkedYAMLError as error:
        place = "" if error.problem_mark is None else f" on line {error.problem_mark.line + 1}"
        raise ConfigError(f"is not valid YAML: {error.problem}{place}", source=source) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"is not valid YAML: {error}", source=source) from error


def parse_json(text: str, source: str | Path) -> Any:
    """Convert JSON to plain Python.

    A whole number written with an exponent (5e8) becomes an int, as in DeepSpeed.
    Raises ConfigError for bad syntax, with its line, for duplicate keys and for NaN.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                first, second = (as_yaml(shown_value(key, given)) for given in (seen[key], value))
                raise ConfigError(f"given twice, as {first} and as {second}", key=key, source=source)
            seen[key] = value
        return seen

    def number(digits: str) -> int | float:
        value = float(digits)
        return int(value) if value.is_integer() else value

    def refuse(constant: str) -> None:
        raise ConfigError(f"{constant} is not a valid JSON number", source=source)

    try:
        return json.loads(text, object_pairs_hook=without_duplicates, parse_float=number, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"is not valid JSON: {error.msg} on line {error.lineno}, column {error.colno}", source=source
        ) from error


def dotted_keys(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a nested table {key: type or table}, sections before their keys."""
    for key, kind in schema.items():
        yield prefix + key
        if isinstance(kind, dict):
            yield from dotted_keys(kind, f"{prefix}{key}.")
