"""The shipped draft methods, and the error for a name that is not registered."""

import pytest

from engine.config.recipe import load_config
from engine.config.sections import DRAFT_METHODS, Config, ConfigError, DraftSection, TargetSection
from engine.models.method_registry import SHIPPED, make_method


def test_the_methods_that_recipes_may_name_are_those_that_are_shipped():
    assert tuple(SHIPPED) == DRAFT_METHODS
    for name in DRAFT_METHODS:
        assert make_method(Config(draft=DraftSection(method=name))).title


def test_an_unknown_method_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match="draft.method = eagle: .*did you mean 'eagle3'"):
        load_config(None, ["draft.method=eagle"])
    recipe = Config(target=TargetSection(plugins=("mine.py",)), draft=DraftSection(method="eagle4"))
    with pytest.raises(ConfigError, match="did you mean 'eagle3'"):
        make_method(recipe)
