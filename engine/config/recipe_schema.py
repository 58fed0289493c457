"""JSON schema of a recipe, which editors use to complete and check YAML files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from engine.config.sections import SECTIONS, Config
from engine.config.strict import option_type

TITLE = "DraftSpeed recipe"
FILE = Path(__file__).resolve().parents[2] / "launcher" / "recipes" / "recipe.schema.json"


def recipe_schema() -> dict[str, Any]:
    """Return the schema: every section and option with its type, bounds, default and help.

    The schema refuses unknown keys.
    """
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        section = SECTIONS.get(field.name)
        if section is None:
            fields[field.name] = _field(field)
        else:
            model = _model(section.__name__, section, {own.name: _field(own) for own in dataclasses.fields(section)})
            fields[field.name] = (model | None, Field(default=None, description=section.__doc__))
    schema = _model(TITLE, Config, fields).model_json_schema()
    for name in SECTIONS:
        del schema["properties"][name]["default"]  # a recipe may omit a section, whose options then have their defaults
    return schema


def _model(name: str, documented: type, fields: dict[str, Any]) -> type[BaseModel]:
    return create_model(name, __config__=ConfigDict(extra="forbid"), __doc__=documented.__doc__, **fields)


def _field(field: dataclasses.Field) -> tuple[Any, Any]:
    unit = field.metadata["unit"]
    text = field.metadata["text"]
    description = f"{text} [{unit}]" if unit else text
    return _as_written(option_type(field)), Field(default=field.default, description=description)


def _as_written(kind: Any) -> Any:
    """Return the type of a value in a recipe, where a single name may stand for a list of one."""
    return str | kind if kind == tuple[str, ...] else kind


if __name__ == "__main__":
    FILE.write_text(json.dumps(recipe_schema(), indent=2) + "\n", encoding="utf-8")
