"""What servers need to be told of a draft, decided by the config.json of its folder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

SGLANG_NAME = "SGLang"
VLLM_NAME = "vLLM"
EAGLE3_NAME = "eagle3"  # part of the architecture in EAGLE-3 drafts, in lower case


@dataclass(frozen=True)
class DraftKind:
    """How servers name a draft's method, and how many tokens they let it draft.

    sglang_algorithm, vllm_method: names of the method in the servers' options. vllm_method is None if vLLM cannot serve it.
    block_size: rows of a block; None = the draft drafts one token per forward, as many as it is asked for.
    unused_rows: rows of a block that draft no token.
    """

    sglang_algorithm: str
    vllm_method: str | None
    block_size: int | None = None
    unused_rows: int = 0

    @property
    def block_tokens(self) -> int | None:
        """Tokens that one forward drafts, which is what servers verify; None = one token per forward."""
        return None if self.block_size is None else self.block_size - self.unused_rows

    @property
    def servers(self) -> str:
        """Names of the servers that load the draft."""
        return SGLANG_NAME if self.vllm_method is None else f"{SGLANG_NAME} and {VLLM_NAME}"


EAGLE3 = DraftKind("EAGLE3", "eagle3")
DFLASH = DraftKind("DFLASH", "dflash", unused_rows=1)
DSPARK = DraftKind("DSPARK", "dspark")
BLOCK_KINDS = {
    "DFlashDraftModel": DFLASH,
    "DFlash2DraftModel": DFLASH,
    "Qwen3DSparkModel": DSPARK,
    "DSparkDraftModel": DSPARK,
}


def draft_kind(config: Mapping[str, Any]) -> DraftKind | None:
    """Return how servers run the draft with this config.json, or None if no server knows its architecture.

    Raises ValueError if a block drafter's config does not state the size of its blocks.
    """
    names = config.get("architectures") or ()
    if any(EAGLE3_NAME in name.lower() for name in names):
        return EAGLE3
    found = next((BLOCK_KINDS[name] for name in names if name in BLOCK_KINDS), None)
    if found is None:
        return None
    nested = config.get("dflash_config") or {}
    block_size = config.get("block_size", nested.get("block_size"))
    if type(block_size) is not int or block_size <= found.unused_rows:
        raise ValueError(f"the draft's config.json has block_size={block_size!r}; state how many rows its blocks have")
    kind = replace(found, block_size=block_size)
    # vLLM builds the vanilla head whatever the config says, and then refuses the tensors of the others.
    is_vanilla = config.get("markov_head_type", "vanilla") == "vanilla"
    return kind if is_vanilla else replace(kind, vllm_method=None)
