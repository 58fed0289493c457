"""The shape of the tree of tokens that a draft proposes."""

from dataclasses import dataclass
from typing import Literal

from engine.config.strict import ConfigError

TreeRule = Literal["ancestors", "sglang"]


@dataclass(frozen=True)
class TreeShape:
    """How a draft proposes tokens. The sizes mean the same as the options of SGLang's server.

    num_steps: depth of the tree; `--speculative-num-steps`.
    topk: tokens drafted after each node that is read, and nodes read per level;
    `--speculative-eagle-topk`. 1 = a chain.
    num_draft_tokens: tokens that a target forward reads, which are the newest committed token and
    the most likely drafted ones; `--speculative-num-draft-tokens`. None = all of a chain.
    rule: the keys that a node of the tree attends to in the draft. "ancestors": those of its
    ancestors. "sglang": those that its row held at earlier levels, as in SGLang.

    Raises ConfigError if the sizes contradict each other.
    Source: EAGLE-2 (arXiv:2406.16858), section 4.
    """

    num_steps: int = 5
    topk: int = 1
    num_draft_tokens: int | None = None
    rule: TreeRule = "ancestors"

    def __post_init__(self) -> None:
        for name in ("num_steps", "topk"):
            if getattr(self, name) < 1:
                raise _error("expected at least 1", name, getattr(self, name))
        most = self.num_candidates + 1
        chosen = self.num_draft_tokens
        if chosen is None and self.topk > 1:
            problem = (
                f"a tree needs it (evaluation.topk = {self.topk}); name the tokens that a target forward reads, 2 to {most}"
            )
            raise _error(problem, "num_draft_tokens", None)
        if chosen is not None and self.topk == 1 and chosen != most:
            problem = (
                f"a chain of evaluation.num_steps = {self.num_steps} has {most}, one more than its steps; delete this option"
            )
            raise _error(problem, "num_draft_tokens", chosen)
        if chosen is not None and not 2 <= chosen <= most:
            sizes = f"evaluation.num_steps = {self.num_steps} and evaluation.topk = {self.topk}"
            raise _error(f"{sizes} allow 2 to {most}", "num_draft_tokens", chosen)

    @property
    def num_candidates(self) -> int:
        """Tokens that are drafted: `topk` after the root, and `topk` after each node that is read."""
        return num_candidates(self.num_steps, self.topk)

    @property
    def num_nodes(self) -> int:
        """Drafted tokens that a target forward verifies."""
        return self.num_candidates if self.num_draft_tokens is None else self.num_draft_tokens - 1

    @property
    def tokens_per_forward(self) -> int:
        """Tokens that a target forward reads: the drafted ones and the newest committed one."""
        return self.num_nodes + 1

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by the names of their options, for JSON."""
        return {"num_steps": self.num_steps, "topk": self.topk, "num_draft_tokens": self.tokens_per_forward}

    @property
    def is_chain(self) -> bool:
        return self.topk == 1

    def __str__(self) -> str:
        if self.is_chain:
            return f"a chain of {self.num_steps}"
        return f"a tree of {self.num_steps} steps, top {self.topk}, {self.num_draft_tokens} draft tokens"


def num_candidates(num_steps: int, topk: int) -> int:
    """Return how many tokens are drafted, of which a tree holds the most likely ones."""
    return topk + topk**2 * (num_steps - 1)


def _error(problem: str, name: str, value: int | None) -> ConfigError:
    return ConfigError(problem, key=f"evaluation.{name}", value=value)
