"""Functions that read, write and describe configurations from recipes and the command line."""

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.config.block_sections import BLOCK_METHODS
from engine.config.ds_keys import DS_HOMES
from engine.config.secret_values import without_secrets
from engine.config.sections import EAGLE3, OPTIONS, RECIPE_KEYS, SECTIONS, Config
from engine.config.strict import (
    ConfigError,
    as_yaml,
    checked,
    dump_yaml,
    option_type,
    parse_yaml,
    read_text,
    type_name,
    unknown_key,
)

COMMAND_LINE = "command line"
METHOD = "draft.method"
TTT_SECTION = ("ttt.",)
BLOCK_SECTIONS = ("block.", "objective.")

# Earlier names of options, which the config.yaml of an old run may hold.
RENAMED = {"parallel.unproven": "parallel.allow_unverified", "evaluation.draft_tokens": "evaluation.num_steps"}


def load_config(recipe: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Load a configuration: a YAML recipe replaces defaults, and dotted overrides replace both.

    If an override names another draft method, the recipe's choices for its own method are left out:
    `ttt` for EAGLE-3, and `block` and `objective` for block drafters unless the new one is one too.
    overrides: such as 'ttt.steps=5'.
    Raises ConfigError for unknown, mistyped or contradictory options. It names the file, the key,
    the value and the nearest valid key.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str | Path] = {}
    if recipe is not None:
        values.update(_read_mapping(parse_yaml(read_text(recipe), recipe), recipe))
        sources.update(dict.fromkeys(values, recipe))
    of_recipe = dict(values)
    for override in overrides:
        key, value = _read_override(override)
        if sources.get(key) == COMMAND_LINE:
            raise ConfigError("given twice", key=key, value=value, source=COMMAND_LINE)
        values[key], sources[key] = value, COMMAND_LINE
    for key in _of_other_method(of_recipe, values.get(METHOD, EAGLE3)):
        if sources[key] != COMMAND_LINE:
            del values[key], sources[key]
    try:
        return _assemble(values)
    except ConfigError as error:
        error.source = sources.get(error.key, "")
        raise


def _of_other_method(of_recipe: dict[str, Any], method: str) -> list[str]:
    """Return the recipe's options that are choices for its own draft method, if that is another one than `method`."""
    own = of_recipe.get(METHOD, EAGLE3)
    sections: tuple[str, ...] = ()
    if own == EAGLE3 != method:
        sections = TTT_SECTION
    elif own in BLOCK_METHODS and method not in BLOCK_METHODS:
        sections = BLOCK_SECTIONS
    return [key for key in of_recipe if key.startswith(sections)]


def _assemble(values: dict[str, Any]) -> Config:
    arguments = {key: value for key, value in values.items() if "." not in key}
    for section, kind in SECTIONS.items():
        own = {key.removeprefix(f"{section}."): value for key, value in values.items() if key.startswith(f"{section}.")}
        arguments[section] = kind(**own)
    return Config(**arguments)


def _read_mapping(mapping: Any, source: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield the options of a recipe as (dotted key, value); a section may be empty."""
    if mapping is None:
        return
    if not isinstance(mapping, dict):
        raise ConfigError(f"expected sections and options, got {type_name(type(mapping))}", source=source)
    for key, value in mapping.items():
        if key not in SECTIONS:
            yield _read_option(str(key), value, source)
        elif isinstance(value, dict):
            yield from (_read_option(f"{key}.{name}", inner, source) for name, inner in value.items())
        elif value is not None:
            raise ConfigError("is a section; give it options, each on its own line", key=key, value=value, source=source)


def _read_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"'{override}' is not an override; expected section.key=value", source=COMMAND_LINE)
    if key in SECTIONS:
        raise ConfigError(f"is a section; set one of its options, {key}.name=value", key=key, source=COMMAND_LINE)
    return _read_option(key, parse_yaml(text, f"{COMMAND_LINE}: {key}"), COMMAND_LINE)


def _read_option(key: str, value: Any, source: str | Path) -> tuple[str, Any]:
    key = RENAMED.get(key, key)
    if key not in OPTIONS:
        raise unknown_key(key, value, RECIPE_KEYS, _home_in_deepspeed, source)
    kind = option_type(OPTIONS[key])
    if kind == tuple[str, ...] and isinstance(value, str):
        value = [value]
    return key, checked(value, kind, key=key, source=source)


def _home_in_deepspeed(key: str) -> str | None:
    for name in (key, key.rpartition(".")[2], key.partition(".")[0]):
        if name in DS_HOMES and name not in SECTIONS:
            return f"belongs to DeepSpeed; set {DS_HOMES[name]} in the --ds_config file"
    return None


def dump_config(config: Config) -> str:
    """Return the whole configuration as a YAML recipe, with secrets hidden.

    `load_config` reads it back to an equal Config.
    """

    def plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in pairs}

    return dump_yaml(without_secrets(dataclasses.asdict(config, dict_factory=plain)), width=120)


def describe_options(sections: Sequence[str] = ()) -> str:
    """Return the help text of options: type, default, unit and description, grouped by section.

    sections: those to describe; () = all.
    """
    shown = {key: f for key, f in OPTIONS.items() if not sections or key.rpartition(".")[0] in sections}
    columns = {key: (key, type_name(option_type(f)), as_yaml(f.default), f.metadata["unit"]) for key, f in shown.items()}
    key_width, type_width, default_width = (max(len(row[i]) for row in columns.values()) for i in range(3))
    titles = {section: f"{section}: {kind.__doc__}" for section, kind in SECTIONS.items()}
    lines: list[str] = []
    group = None
    for key, (_, kind, default, unit) in columns.items():
        section = key.rpartition(".")[0]
        if section != group:
            lines += ["", titles.get(section, "At the top:")]
            group = section
        lines.append(f"  {key:{key_width}}  {kind:{type_width}}  {default:{default_width}}  {unit}".rstrip())
        lines += textwrap.wrap(
            OPTIONS[key].metadata["text"], width=110, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
        )
    return "\n".join(lines[1:]) + "\n"
