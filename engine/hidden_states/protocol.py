"""What a source of hidden states provides: all that the trainer knows of a target, running, stored or remote."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.batch import PackedBatch, TargetOutput
from engine.config.sections import Config
from engine.config.strict import did_you_mean
from engine.data.documents import Documents
from engine.host.telemetry import Telemetry
from engine.parallel.mesh import World
from engine.target.embedding import SharedEmbedding, TargetEmbedding
from engine.target.head import TargetHead


class Target(Protocol):
    """A target as training sees it, whether it runs now or ran long ago.

    aux_layers: 0-based layers whose outputs it gives, in ascending order. dtype: of its states and its embedding.
    embedding: its token embedding, on the device of the run.
    """

    aux_layers: tuple[int, ...]
    dtype: torch.dtype
    embedding: TargetEmbedding | SharedEmbedding

    def __call__(self, batch: PackedBatch, slots_N: Tensor) -> TargetOutput:
        """Return the target's states for the documents of a batch, each of which sees itself alone.

        batch: on the device or on the host. slots_N: int64 [N], on the host, ascending: positions whose distribution the
        draft learns. In a job of several ranks a collective, if the ranks share the target.
        """
        ...

    def head_rows(self, target_ids_U: Tensor) -> TargetHead:
        """Return the head restricted to `target_ids_U`, int64 [U], on the device of the run."""
        ...


class HiddenStateSource(Protocol):
    """Where a run's documents and hidden states come from.

    can_decode: whether the loaded target is a `FrozenTarget`, which can be asked for replies; acceptance is measured only
    then. counted: names the tokens that `count_tokens` counts, for the log. aux_layers: layers that were captured, or those
    the recipe asks for; None = the default of the target's depth. target_identity: as `engine.target.identity` computes it;
    None if unknown. trained_with: fingerprints that a draft's config.json records.
    """

    can_decode: bool
    counted: str
    aux_layers: tuple[int, ...] | None
    target_identity: str | None
    trained_with: dict[str, str]

    def documents(self) -> Documents:
        """Return the documents to train on. Raises ValueError for data that cannot be used."""
        ...

    def count_tokens(self, documents: Documents, vocab_size: int) -> Tensor:
        """Return how often each token counts for the draft vocabulary, int64 [V]."""
        ...

    def load_target(self, aux_layers: tuple[int, ...]) -> Target:
        """Load what the training loop runs; a collective of all ranks. aux_layers: those that the draft reads."""
        ...


OpenSource = Callable[[Config, PreTrainedTokenizerBase, World, Telemetry], HiddenStateSource]
_SOURCES: dict[str, OpenSource] = {}


def register_source(name: str, open_it: OpenSource) -> None:
    """Make a source known as `target.source=name`. open_it: called on every rank, before the data is read."""
    _SOURCES[name] = open_it


def find_source(name: str) -> OpenSource:
    """Return a registered source. Raises ValueError, naming the nearest one, if there is none of that name."""
    if name not in _SOURCES:
        hint = did_you_mean(name, _SOURCES)
        raise ValueError(f"target.source = {name}: expected {' | '.join(sorted(_SOURCES))}{hint}")
    return _SOURCES[name]
