"""Recipe sections of block drafters (dflash, dspark, dflash2): their blocks, and what they learn."""

from dataclasses import dataclass
from typing import Literal

from engine.config.strict import ConfigError, did_you_mean, option

# Values of objective.parity.
NO_PARITY = "none"
DEEPSPEC = "deepspec"
SPECFORGE = "specforge"
AUTOMODEL = "automodel"
SPECULATORS = "speculators"
PARITIES = (NO_PARITY, DEEPSPEC, SPECFORGE, AUTOMODEL, SPECULATORS)
DFLASH, DSPARK, DFLASH2 = "dflash", "dspark", "dflash2"
BLOCK_METHODS = (DFLASH, DSPARK, DFLASH2)


def depth_name(method: str | None) -> str:
    """Return what a list with a value per drafted token calls each of them."""
    return "token of a block" if method in BLOCK_METHODS else "TTT step"


@dataclass(frozen=True)
class BlockSection:
    """Blocks of a block drafter: how large they are, how their rows attend, and where they start in the data."""

    size: int | None = option(
        None,
        "rows of a block, the newest committed token included; null = 16 for dflash and dflash2, 7 for dspark",
        unit="rows",
        at_least=2,
    )
    mask_token_id: int | None = option(
        None,
        "token whose embedding the rows of a block read, except the first; it must not occur in the data; null = the "
        "tokenizer's mask token, or else the first row of the target's embedding that is no token",
        at_least=0,
    )
    anchors: int | Literal["all"] | None = option(
        512,
        "blocks per pack of data.max_tokens tokens that are trained in an epoch; each document gets its share; all or null = a "
        "block at every position that can start one",
        unit="blocks",
        at_least=1,
    )
    anchor_share: float | None = option(
        None,
        "share of each document's possible anchors at which a block starts in an epoch, above 0; replaces block.anchors; "
        "null = block.anchors counts",
        at_least=0.0,
        at_most=1.0,
    )
    anchor_order: Literal["random", "sweep"] = option(
        "random",
        "how the epochs choose the blocks of a document; random = independently of each other; sweep = each epoch takes "
        "others, until every position was taken",
    )
    windows: tuple[int, ...] | None = option(
        None,
        "sliding window of each draft layer, in tokens; 0 = the layer attends to the whole document; null = all layers do",
        unit="tokens",
    )
    causal: bool | None = option(
        False,
        "let the rows of a block attend to earlier rows of the block only; null = in the layers that have a window, as servers "
        "assume of a draft whose config.json does not say",
    )
    attention_bias: bool = option(False, "give the projections of attention a bias")
    markov_head: Literal["vanilla", "gated", "rnn"] = option(
        "vanilla", "dspark: how a drafted token changes the logits of the next one; vLLM serves vanilla only"
    )
    markov_rank: int = option(256, "dspark: rank of this change", unit="features", at_least=1)
    confidence_head: bool = option(True, "dspark: also predict how likely each drafted token is accepted")
    conv_taps: int = option(2, "dflash2: rows that the convolutions within a block read", unit="rows", at_least=1)
    conv_group: int = option(16, "dflash2: features that share a dynamic kernel", unit="features", at_least=1)
    selector_rank: int = option(256, "dflash2: rank of the candidate selector", unit="features", at_least=1)
    selector_top_k: int = option(16, "dflash2: candidates per row that the selector chooses from", unit="tokens", at_least=1)
    recompute: Literal["none", "mlp", "layer"] = option(
        "none",
        "activations of block drafters that are recomputed in the backward pass instead of kept in memory; mlp = those of the "
        "MLPs; layer = those of whole layers",
    )

    def __post_init__(self):
        windows = self.windows
        if windows is not None and min(windows, default=0) < 0:
            raise ConfigError("expected window sizes of at least 1, or 0 for no window", key="block.windows", value=windows)
        if self.anchor_share == 0:
            problem = "expected a share above 0; without blocks nothing is learned"
            raise ConfigError(problem, key="block.anchor_share", value=0)

    def windows_of(self, num_layers: int) -> tuple[int | None, ...]:
        """Return the sliding window of each draft layer; None = full attention."""
        return tuple(window or None for window in self.windows or (0,) * num_layers)


@dataclass(frozen=True)
class ObjectiveSection:
    """What a block drafter learns. Options that are null are those of the method and of `parity`."""

    parity: str = option(
        NO_PARITY,
        f"choose, count and divide losses as another trainer does: {' | '.join(PARITIES)}; none = learn exactly the rows that "
        "occur when serving, divided by their weights in the global batch",
    )
    cross_entropy: float | None = option(
        None,
        "weight of the cross-entropy with a token; null = 1 for dflash and dflash2, 0.1 for dspark; with "
        "objective.parity=speculators 0 for dflash2, and 1 for all with D-PACE",
        at_least=0.0,
    )
    label: Literal["token", "argmax"] | None = option(
        None,
        "the token of the cross-entropy; token = the one in the data; argmax = the target's most likely one; null = token, or "
        "argmax with objective.parity=speculators",
    )
    kl: float | None = option(
        None,
        "weight of the KL divergence from the target's distribution; null = 0; with objective.parity=speculators 1 for "
        "dflash2, and 0 with D-PACE",
        at_least=0.0,
    )
    l1: float | None = option(
        None,
        "weight of sum |p - q|, which is 0 to 2, with the target's distribution p; null = 0 for dflash and dflash2, 0.9 for "
        "dspark; with objective.parity=speculators 0.45 for dspark, and 0 with D-PACE",
        at_least=0.0,
    )
    weights: Literal["decay", "dpace"] = option(
        "decay",
        "weights of the rows of a block; decay = exp(-i / objective.decay) of the i-th drafted token; dpace = the estimated "
        "probability that the tokens up to this one are accepted, summed over the later ones (D-PACE)",
    )
    decay: float | None = option(
        None,
        "constant of the exponential decay; null = 7 for blocks of more than 10 rows, 5 for 9 or 10, 4 for fewer; 0 = no decay",
        unit="tokens",
        at_least=0.0,
    )
    dpace_alpha: float = option(0.5, "D-PACE: acceptance that is assumed of any token", at_least=0.0, at_most=1.0)
    confidence: float = option(1.0, "dspark: weight of the confidence head's cross-entropy", at_least=0.0)
    selector: float = option(1.0, "dflash2: weight of the candidate selector's cross-entropy", at_least=0.0)
    selector_inject: bool | None = option(
        None,
        "dflash2: let a label that is no candidate replace the weakest candidate; false = the selector does not learn such "
        "rows, which it does not meet when serving; null = false, or true with objective.parity=speculators",
    )
    selector_normaliser: Literal["same", "covered"] | None = option(
        None,
        "dflash2: divisor of the selector's loss; same = that of the cross-entropy; covered = the weights of its own rows; "
        "null = same, or covered with objective.parity=automodel",
    )

    def __post_init__(self):
        if self.parity not in PARITIES:
            problem = f"expected {' | '.join(PARITIES)}{did_you_mean(self.parity, PARITIES) or ''}"
            raise ConfigError(problem, key="objective.parity", value=self.parity)
