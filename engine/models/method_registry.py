"""Registry of the draft methods that `draft.method` selects."""

from collections.abc import Callable

from engine.config.block_sections import DFLASH, DFLASH2, DSPARK
from engine.config.sections import EAGLE3, Config
from engine.config.strict import registered
from engine.models.dflash.dflash import DFlash
from engine.models.dflash2.dflash2 import DFlash2
from engine.models.draft_method import DraftMethod
from engine.models.dspark.dspark import DSpark
from engine.models.eagle3.eagle3 import Eagle3

MakeMethod = Callable[[Config], DraftMethod]
SHIPPED: dict[str, MakeMethod] = {EAGLE3: Eagle3, DFLASH: DFlash, DSPARK: DSpark, DFLASH2: DFlash2}
_METHODS = dict(SHIPPED)


def register_method(name: str, make_method: MakeMethod) -> None:
    """Register a draft method as `draft.method=name`.

    make_method: returns the method for a recipe; usually the class itself.
    """
    _METHODS[name] = make_method


def make_method(recipe: Config) -> DraftMethod:
    """Return the draft method of a recipe.

    Raises ConfigError if no method has this name; the message suggests the closest one.
    """
    return registered(_METHODS, recipe.draft.method, key="draft.method")(recipe)
