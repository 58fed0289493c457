"""Choice of the token whose embedding the rows of a block read, except the first."""

from functools import cache

from transformers import AutoTokenizer

from engine.config.sections import TargetSection
from engine.config.strict import ConfigError


def choose_mask_token(wanted: int | None, target: TargetSection, vocab_size: int) -> int:
    """Return the id of the mask token.

    wanted: as in the recipe. vocab_size: rows of the target's embedding.
    Raises ConfigError if the target's tokenizer uses every row, or `wanted` is no row.
    """
    if wanted is not None:
        if wanted >= vocab_size:
            raise ConfigError(f"the target's embedding has {vocab_size} rows", key="block.mask_token_id", value=wanted)
        return wanted
    mask_token_id, num_tokens = _of_tokenizer(target.path, target.revision, target.trust_remote_code)
    if mask_token_id is not None and mask_token_id < vocab_size:
        return mask_token_id
    if num_tokens < vocab_size:
        return num_tokens
    problem = (
        f"the tokenizer of {target.path} has no mask token and uses all {vocab_size} rows of the embedding; name a token that "
        "never occurs in the data"
    )
    raise ConfigError(problem, key="block.mask_token_id", value=None)


@cache
def _of_tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> tuple[int | None, int]:
    """Return the id of a tokenizer's mask token, or None, and the first id after those of all tokens."""
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    return getattr(tokenizer, "mask_token_id", None), 1 + max(tokenizer.get_vocab().values(), default=-1)
