"""Held-out conversations of a run, and where their hidden states come from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from engine.batch import PackedBatch, TargetOutput
from engine.config.sections import Config
from engine.data.documents import Documents, chosen_documents, evenly_spread
from engine.hidden_states.protocol import HiddenStateSource, Target
from engine.hidden_states.sources import StoredSource
from engine.hidden_states.stored_target import StoredTarget
from engine.host.telemetry import Telemetry
from engine.parallel.mesh import World
from engine.target.head import TargetHead
from engine.target.identity import what_changed

FORMAT = {"tokenizer_hash": "tokenizer", "template_hash": "chat template"}  # in `trained_with`


@dataclass(frozen=True)
class HeldOutData:
    """Held-out documents. target: gives their hidden states; None = the target of the run."""

    documents: Documents
    target: Target | None = None

    @classmethod
    def stored(cls, config: Config, source: HiddenStateSource, world: World, telemetry: Telemetry) -> "HeldOutData":
        """Open `evaluation.store`. source: that of the run.

        Raises ValueError if the store cannot be read, or was captured with other options, another
        target, tokenizer or chat template.
        """
        folder = config.evaluation.store
        assert folder is not None, "the caller has looked"
        target = replace(config.target, store=folder)
        draft = replace(config.draft, vocab_from="assistant")  # the draft vocabulary follows from the training data
        stored = StoredSource(replace(config, target=target, draft=draft), world, telemetry)
        change = what_changed(source.target_identity, stored.target_identity)
        for key, name in FORMAT.items():
            hashes = {found.trained_with.get(key) for found in (source, stored)} - {None}
            if len(hashes) == 2:
                change = f"another {name}"
        if change is not None:
            problem = f"evaluation.store: {folder} was not captured as target.store was: {change}"
            raise ValueError(f"{problem}. Capture the held-out conversations again")
        assert stored.aux_layers is not None, "a store knows its layers"
        every = stored.documents()
        indices = evenly_spread(len(every), config.evaluation.num_documents)
        return cls(chosen_documents(every, indices), RenumberedTarget(stored.load_target(stored.aux_layers), indices))


class RenumberedTarget:
    """A captured target of which some documents are used, numbered from 0 (see `Target`)."""

    def __init__(self, target: StoredTarget, indices: Sequence[int]) -> None:
        """indices: of the used documents in the store."""
        self._target = target
        self._indices = indices
        self.aux_layers = target.aux_layers
        self.dtype = target.dtype
        self.embedding = target.embedding

    def __call__(self, batch: PackedBatch, slots_N: Tensor) -> TargetOutput:
        """Return the captured states of a batch, as `StoredTarget` does."""
        in_store = tuple(self._indices[document] for document in batch.document_ids)
        return self._target(replace(batch, document_ids=in_store), slots_N)

    def head_rows(self, target_ids_U: Tensor) -> TargetHead:
        """Return the head restricted to `target_ids_U`."""
        return self._target.head_rows(target_ids_U)
