"""Editors complete recipes from a schema that says what the engine accepts."""

import json
from pathlib import Path

from engine.config.recipe_schema import recipe_schema
from engine.config.sections import OPTIONS

RECIPES = Path(__file__).resolve().parents[2] / "launcher" / "recipes"
WRITE = "python -m engine.config.recipe_schema"


def test_the_shipped_schema_is_the_current_one():
    assert json.loads((RECIPES / "recipe.schema.json").read_text()) == recipe_schema(), f"write the file again with {WRITE}"


def test_it_knows_every_option_with_its_bounds_and_refuses_others():
    schema = recipe_schema()
    for key in OPTIONS:
        section, _, name = key.rpartition(".")
        properties = schema["properties"]
        if section:
            reference = properties[section]["anyOf"][0]["$ref"]
            model = schema["$defs"][reference.rpartition("/")[2]]
            assert model["additionalProperties"] is False
            properties = model["properties"]
        assert properties[name]["description"]
    loss = schema["$defs"]["LossSection"]["properties"]
    train = schema["$defs"]["DataSection"]["properties"]["train"]
    assert [kind["type"] for kind in train["anyOf"]] == ["string", "array"]
    assert loss["step_decay"]["minimum"] == 0 and loss["normaliser"]["enum"] == ["slots", "positions"]


def test_every_recipe_names_the_schema():
    for path in RECIPES.glob("*.yaml"):
        assert path.read_text().splitlines()[0] == "# yaml-language-server: $schema=recipe.schema.json", path
