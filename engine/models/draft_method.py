"""Interface of draft methods. The trainer, the capture, the evaluation and the planner know a method by it only.

A draft makes `S` predictions at each position: TTT steps, heads, or tokens of a block. Prediction
`i` at position `t` is row `(t, i)`, and it learns the target's distribution at a position that is
called its slot.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from engine.batch import MicroBatch, PackedBatch
from engine.config.sections import Config, ConfigError, is_default
from engine.config.tree_shape import TreeShape
from engine.kernels import PLAIN, Kernels
from engine.models.costs import StepPart
from engine.models.drafter import Drafter, DraftSampling, TargetReply
from engine.models.vocab_map import VocabMap
from engine.parallel.objective import Objective


class DraftConfig(Protocol):
    """Shapes of a draft, and what a server must know of it.

    hidden_size: width of the draft.
    head_dim: width of its attention heads; without attention, any width that kernels support.
    vocab_size, target_hidden_size: of the target. draft_vocab_size: tokens that the draft can propose.
    aux_layers: target layers that the draft reads; None if a config.json does not state them.
    trained_with: hashes of tokenizer, template and target.
    """

    @property
    def hidden_size(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def draft_vocab_size(self) -> int: ...
    @property
    def target_hidden_size(self) -> int: ...
    @property
    def aux_layers(self) -> tuple[int, ...] | None: ...
    @property
    def trained_with(self) -> dict[str, str] | None: ...


ConfigT = TypeVar("ConfigT", bound=DraftConfig)


class DraftModel(nn.Module, Generic[ConfigT]):
    """Base class of the modules that are trained."""

    def __init__(self, config: ConfigT, kernels: Kernels = PLAIN) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels


DraftT = TypeVar("DraftT", bound=DraftModel)


class TargetTable(Protocol):
    """A target's token embedding."""

    def whole(self) -> Tensor:
        """Return the table, [V, D]; a collective if ranks share it."""
        ...


class TargetRows(Protocol):
    """A target's LM head, restricted to some tokens."""

    @property
    def weight_VD(self) -> Tensor: ...

    def logits(self, hidden_QD: Tensor) -> Tensor:
        """Compute fp32 logits from last hidden states, [Q, U]."""
        ...


class TargetTables(Protocol):
    """Embedding and LM head of a target: what a draft may start from, or be compared with."""

    @property
    def embedding(self) -> TargetTable: ...

    def head_rows(self, target_ids_U: Tensor) -> TargetRows:
        """Return the head restricted to `target_ids_U`, int64 [U]."""
        ...


class DraftObjective(Objective, Protocol):
    """Loss function of a draft method, with what its normalisation needs to know."""

    @property
    def needs_acceptance(self) -> bool:
        """Whether the loss depends on the mean acceptance rate of each prediction."""
        ...

    def count_loss_rows(self, micro: MicroBatch) -> Tensor:
        """Return the number of rows with loss of each prediction, fp32 [S]."""
        ...

    def loss_share(self, micro: MicroBatch) -> int | Tensor:
        """Return what a micro-batch contributes to the divisor of the loss, a number or a scalar on the device."""
        ...


class ServedDraft(ABC):
    """A draft ready to propose tokens, as a server would run it."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> "ServedDraft":
        """Return a copy that computes in `dtype`."""

    @abstractmethod
    def drafter(self, shape: TreeShape) -> Drafter:
        """Return a new drafter for one prompt. shape: a chain, unless the method drafts trees."""

    def sampling_drafter(self, shape: TreeShape, sampling: DraftSampling) -> Drafter:
        """Return a new drafter for one prompt whose reply is sampled.

        A method of which servers draw the drafted tokens overrides this. Others take the most likely
        tokens for sampled replies as well.
        """
        return self.drafter(shape)

    @abstractmethod
    def logits(self, micro: MicroBatch) -> Tensor:
        """Compute the logits of rows, from the draft's own embedding table.

        Returns [S, T, U], or as many positions as the objective's `logits` returns.
        """

    def propose_along(self, replies: Sequence[TargetReply], shape: TreeShape, max_tokens: int) -> Sequence[Drafter]:
        """Return one drafter per reply, for replays.

        A method that can draft from all positions of a reply at once overrides this.
        shape: what is drafted at each position. max_tokens: largest number of tokens in a draft forward.
        """
        return [self.drafter(shape) for _ in replies]

    def propose_shapes(
        self, replies: Sequence[TargetReply], shapes: Sequence[TreeShape], max_tokens: int
    ) -> Iterator[tuple[TreeShape, Sequence[Drafter]]]:
        """Yield what `propose_along` returns for each of several shapes, in any order.

        A method for which some shapes are parts of others overrides this.
        """
        for shape in shapes:
            yield shape, self.propose_along(replies, shape, max_tokens)


@dataclass(frozen=True)
class TargetFacts:
    """What some exported formats say about the target and about serving.

    name: folder or hub id of the target. architectures: those of its config.
    num_steps: tokens drafted per target forward, unless a server is told otherwise.
    """

    name: str
    architectures: tuple[str, ...]
    num_steps: int


class DraftCounts(Protocol):
    """Work of one training step on a micro-batch.

    num_tokens: T. num_slots: positions whose target distribution is computed.
    prefix_pairs: pairs of a token and an earlier token of its document, or the token itself.
    rows_S: rows that are computed of each prediction.
    """

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def prefix_pairs(self) -> int: ...
    @property
    def rows_S(self) -> tuple[int, ...]: ...

    def without_compaction(self) -> "DraftCounts":
        """Return the work if every row is computed, also those that no loss depends on."""
        ...


@dataclass(frozen=True)
class ActivationBytes:
    """Memory of a micro-batch's activations, in bytes.

    kept: from the forward pass to the backward pass. on_top: what the loss or a part of the
    backward pass adds at most.
    """

    kept: int
    on_top: int


class DraftMethod(ABC, Generic[ConfigT, DraftT]):
    """A draft method, set up by a recipe.

    title: name of the method in messages.
    drafts_trees: whether it drafts trees as well as chains.
    unread: options of the recipe that the method does not read, by dotted key.
    recompute: activations that are recomputed in the backward pass, as in `ttt.recompute`.
    notes: lines for the log about the draft that was made.
    """

    title: ClassVar[str]
    drafts_trees: ClassVar[bool] = False
    unread: ClassVar[tuple[str, ...]] = ()

    def __init__(self, recipe: Config) -> None:
        """Read the options of the recipe.

        Raises ConfigError if an option that the method does not read differs from its default.
        """
        self.recipe = recipe
        self.recompute = "none"
        self.notes: list[str] = []
        for key in self.unread:
            section, _, name = key.rpartition(".")
            value = getattr(getattr(recipe, section) if section else recipe, name)
            if not is_default(key, value):
                raise ConfigError(f"has no effect on {self.title}; delete it", key=key, value=value)

    def check_shape(self, shape: TreeShape, draft: ConfigT) -> None:
        """Raise ConfigError if a draft cannot propose trees of a shape."""
        if shape.topk > 1 and not self.drafts_trees:
            raise ConfigError(f"{self.title} drafts chains only; set it to 1", key="evaluation.topk", value=shape.topk)
        if shape.topk > draft.draft_vocab_size:
            problem = f"is more than the {draft.draft_vocab_size} tokens that the draft can propose"
            raise ConfigError(problem, key="evaluation.topk", value=shape.topk)

    @abstractmethod
    def choose_aux_layers(self, target_config: PreTrainedConfig, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
        """Return the target layers that the draft reads, ascending.

        wanted: the layers that the recipe names; None = the method's default.
        Raises ValueError if the method, the target or a server does not support them.
        """

    @abstractmethod
    def derive_config(
        self, target_config: PreTrainedConfig, aux_layers: tuple[int, ...] | None, trained_with: dict[str, str] | None = None
    ) -> ConfigT:
        """Return the draft's config for a target. Raises ValueError if the draft cannot follow the target."""

    @abstractmethod
    def read_config(self, exported: dict[str, Any], source: Path) -> ConfigT:
        """Return the config from an exported config.json. Raises ValueError if it is of another method."""

    @abstractmethod
    def allowed_rows(self, batch: PackedBatch) -> Tensor:
        """Return the rows that have a slot in their document and that the mask allows, bool [S, T]."""

    @abstractmethod
    def slots(self, allowed_ST: Tensor) -> Tensor:
        """Return the positions that at least one allowed row learns, int64 [N], ascending."""

    @property
    def needs_head_stats(self) -> bool:
        """Whether the loss reads `argmax_N` or `lse_N` of the target's output.

        If not, the target's head does not run before the loss. A document whose states are finite but
        whose logits are not is then not left out: the loss is not finite, and `on_bad_step` decides.
        """
        return True

    def stored_slots(self, batch: PackedBatch) -> Tensor:
        """Return the positions whose target distribution a store keeps, int64 [N], ascending.

        They are the slots of every micro-batch that may be made of these documents.
        """
        return self.slots(self.allowed_rows(batch))

    def check_data(self, counts_V: Tensor, config: ConfigT) -> None:
        """Raise ConfigError if the draft cannot be trained on data with these tokens.

        counts_V: int64 [V], how often each token is counted.
        """
        return None

    @abstractmethod
    def new_draft(self, config: ConfigT, kernels: Kernels, target: TargetTables, vocab_map: VocabMap) -> DraftT:
        """Return an untrained draft on the device of the vocabulary map; frozen weights require no gradient."""

    @abstractmethod
    def make_objective(self, target: TargetTables, vocab_map: VocabMap) -> DraftObjective:
        """Return the training objective. Raises ConfigError for an unknown loss."""

    @abstractmethod
    def serve(self, draft: DraftT, target: TargetTables, vocab_map: VocabMap) -> ServedDraft:
        """Return a draft in training as a server would run it, without copying its weights."""

    @abstractmethod
    def export(
        self,
        folder: Path,
        weights: Iterable[tuple[str, Tensor]],
        config: ConfigT,
        vocab_map: VocabMap,
        embed_weight_VD: Tensor | None,
    ) -> None:
        """Write the folder that servers load, as `write_draft_folder` does.

        weights: names and tensors of the draft's parameters. Iterate to the end: it is a collective.
        embed_weight_VD: the target's embedding; may be None unless `ships_embedding`.
        Raises ValueError, before anything is written, if a tensor is missing, unknown or not finite.
        """

    def export_speculators(
        self,
        folder: Path,
        weights: Iterable[tuple[str, Tensor]],
        config: ConfigT,
        vocab_map: VocabMap,
        embed_weight_VD: Tensor,
        target: TargetFacts,
    ) -> None:
        """Write the folder in the format of the `speculators` library, as `export` writes that of servers.

        embed_weight_VD: the target's embedding.
        Raises ValueError as `export` does, and if the format cannot express the draft.
        """
        raise ValueError(f"drafts of {self.title} cannot be written in the format of speculators; use --format sglang")

    def ships_embedding(self, config: ConfigT) -> bool:
        """Return whether an exported draft holds an embedding of its own, made from the target's."""
        return False

    @abstractmethod
    def load(
        self,
        folder: Path,
        target: TargetTables | None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        kernels: Kernels = PLAIN,
    ) -> ServedDraft:
        """Load an exported folder as a server does; a collective of the ranks that share the target.

        target: its embedding and head, which the draft may share; None = not available.
        dtype: None = the checkpoint's. Raises ValueError if the folder does not fit its config.
        """

    @abstractmethod
    def count_weights(self, config: ConfigT) -> int:
        """Return the number of weights that are trained."""

    def count_read_weights(self, config: ConfigT) -> int:
        """Return the number of weights that a server reads for a forward of the draft, for the cost model of a grid."""
        return self.count_weights(config)

    @abstractmethod
    def count_work(self, batch: PackedBatch, allowed_ST: Tensor) -> DraftCounts:
        """Return the work of a training step if every allowed row carries loss.

        allowed_ST: from `allowed_rows`.
        """

    @abstractmethod
    def step_parts(self, config: ConfigT, counts: Any) -> dict[str, StepPart]:
        """Return the cost of a training step by part.

        counts: from `count_work`. The part `target_head`, if any, is the target's whole LM head.
        """

    @abstractmethod
    def activation_bytes(self, config: ConfigT, counts: Any, itemsize: int, fused: bool) -> ActivationBytes:
        """Return the memory of activations. itemsize: bytes of a number. fused: whether GPU kernels run."""

    def step_flops(self, config: ConfigT, counts: Any) -> int:
        """Return the FLOPs of a training step, without the target's whole LM head."""
        return sum(part.flops for name, part in self.step_parts(config, counts).items() if name != "target_head")
