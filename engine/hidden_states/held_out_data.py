"""Held-out conversations of a run, and where their hidden states come from."""

from dataclasses import dataclass, replace

from engine.config.sections import Config
from engine.data.documents import Documents, first_documents
from engine.hidden_states.protocol import HiddenStateSource, Target
from engine.hidden_states.sources import StoredSource
from engine.host.telemetry import Telemetry
from engine.parallel.mesh import World
from engine.target.identity import what_changed


@dataclass(frozen=True)
class HeldOutData:
    """Held-out documents. target: gives their hidden states; None = the target of the run."""

    documents: Documents
    target: Target | None = None

    @classmethod
    def stored(cls, config: Config, source: HiddenStateSource, world: World, telemetry: Telemetry) -> "HeldOutData":
        """Open `evaluation.store`. source: that of the run.

        Raises ValueError if the store cannot be read, or was captured with other options or another target.
        """
        folder = config.evaluation.store
        assert folder is not None, "the caller has looked"
        target = replace(config.target, store=folder)
        draft = replace(config.draft, vocab_from="assistant")  # the draft vocabulary follows from the training data
        stored = StoredSource(replace(config, target=target, draft=draft), world, telemetry)
        change = what_changed(source.target_identity, stored.target_identity)
        if change is not None:
            problem = f"evaluation.store: {folder} was captured with another target than target.store: {change}"
            raise ValueError(f"{problem}. Capture the held-out conversations again")
        assert stored.aux_layers is not None, "a store knows its layers"
        documents = first_documents(stored.documents(), config.evaluation.num_documents)
        return cls(documents, stored.load_target(stored.aux_layers))
