"""Editors complete recipes from a schema that says what the engine accepts."""

import json
from pathlib import Path

from engine.config.recipe_schema import recipe_schema
from engine.config.sections import OPTIONS

RECIPES = Path(__file__).resolve().parents[2] / "launcher" / "recipes"
WRITE = "json.dumps(recipe_schema(), indent=2) + a line break"


def test_the_shipped_schema_is_the_current_one():
    assert json.loads((RECIPES / "recipe.schema.json").read_text()) == recipe_schema(), f"write the file again: {WRITE}"


def test_it_knows_every_option_with_its_bounds_and_refuses_others():
    schema = recipe_schema()
    for key in OPTIONS:
        section, _, name = key.rpartition(".")
        properties = schema["properties"]
        if section:
            model = schema["$defs"][properties[section]["$ref"].rpartition("/")[2]]
            assert model["additionalProperties"] is False
            properties = model["properties"]
        assert properties[name]["description"]
    loss = schema["$defs"]["LossSection"]["properties"]
    assert loss["step_decay"]["minimum"] == 0 and loss["normaliser"]["enum"] == ["slots", "positions"]


def test_every_recipe_names_the_schema():
    for path in RECIPES.glob("*.yaml"):
        assert path.read_text().splitlines()[0] == "# yaml-language-server: $schema=recipe.schema.json", path
