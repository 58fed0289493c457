"""Protocols of hidden-state sources and targets, and the registry of sources.

The trainer uses a target through these protocols only, whether it is running, stored or remote.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.batch import PackedBatch, TargetOutput
from engine.config.sections import Config
from engine.config.strict import registered
from engine.data.documents import Documents
from engine.host.telemetry import Telemetry
from engine.parallel.mesh import World
from engine.target.embedding import SharedEmbedding, TargetEmbedding
from engine.target.head import TargetHead


class Target(Protocol):
    """The target as training uses it, either running now or captured earlier.

    aux_layers: 0-based layers of the auxiliary hidden states, in ascending order.
    dtype: precision of its states and its embedding.
    embedding: its token embedding, on the device of the run.
    """

    aux_layers: tuple[int, ...]
    dtype: torch.dtype
    embedding: TargetEmbedding | SharedEmbedding

    def __call__(self, batch: PackedBatch, slots_N: Tensor) -> TargetOutput:
        """Return the target's states for the documents of a batch.

        Each document attends only to itself. The call is a collective if ranks share the target.
        batch: on the device or on the host.
        slots_N: int64 [N], on the host, positions at which the draft learns the target
        distribution, ascending.
        """
        ...

    def head_rows(self, target_ids_U: Tensor) -> TargetHead:
        """Return the head restricted to `target_ids_U`, int64 [U], on the device of the run."""
        ...


class HiddenStateSource(Protocol):
    """The source of a run's documents and hidden states.

    can_decode: whether the loaded target is a `FrozenTarget`, which can generate replies.
    Acceptance is measured only in this case.
    counted: phrase for the log that names the tokens that `count_tokens` counts.
    aux_layers: layers that were captured, or those that the recipe asks for; None = the draft
    method's default.
    target_identity: as computed by `engine.target.identity`; None if unknown.
    trained_with: fingerprints that a draft's config.json records.
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
        """Load the target; a collective of all ranks. aux_layers: layers that the draft reads."""
        ...


OpenSource = Callable[[Config, PreTrainedTokenizerBase, World, Telemetry], HiddenStateSource]
_SOURCES: dict[str, OpenSource] = {}


def register_source(name: str, open_it: OpenSource) -> None:
    """Register a source as `target.source=name`.

    open_it: opens the source; called on every rank, before the data is read.
    """
    _SOURCES[name] = open_it


def find_source(name: str) -> OpenSource:
    """Return the registered source `name`. Raises ConfigError with a suggestion if there is none."""
    return registered(_SOURCES, name, key="target.source")
