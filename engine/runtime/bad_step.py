"""Replay of a bad step: each of its documents alone, through target and draft, on one rank."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.data.documents import Documents
from engine.data.packing import collate
from engine.hidden_states.finite import place_names
from engine.hidden_states.micro_batches import MicroBatchMaker
from engine.host.files import write_json
from engine.models.draft_method import DraftModel, DraftObjective
from engine.models.normaliser import Normaliser
from engine.parallel.mesh import World


@dataclass(frozen=True)
class BadStep:
    """A step as `FaultWatch` has listed it.

    documents: index among the loaded documents and name of each.
    """

    step: int
    rank: int
    reason: str
    documents: list[tuple[int, str]]

    def write(self, path: Path) -> None:
        """Write the list of the step. Raises OSError."""
        documents = [{"index": index, "name": name} for index, name in self.documents]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"step": self.step, "rank": self.rank, "reason": self.reason, "documents": documents})

    @classmethod
    def read(cls, path: Path) -> "BadStep":
        """Read the list of a step. Raises ValueError if it is none."""
        try:
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            documents = [(int(document["index"]), str(document["name"])) for document in facts["documents"]]
            return cls(int(facts["step"]), int(facts["rank"]), str(facts["reason"]), documents)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"{path} is not the list of a bad step ({type(error).__name__}: {error})"
            raise ValueError(f"{problem}; a run writes them to its folder bad_steps") from error


@dataclass(frozen=True)
class Replayed:
    """What a document alone gives.

    fault: first place of the target whose states are not finite; None = all are finite.
    loss_S: loss of each TTT step. grad_norm: norm of the gradient of all trained weights.
    """

    name: str
    num_tokens: int
    fault: str | None
    loss_S: list[float]
    grad_norm: float

    @property
    def is_bad(self) -> bool:
        values = torch.tensor([*self.loss_S, self.grad_norm])
        return self.fault is not None or not bool(values.isfinite().all())


class Replay:
    """Runs documents one by one, with the loss and the normalisation of training."""

    def __init__(
        self,
        documents: Documents,
        make: MicroBatchMaker,
        draft: DraftModel,
        objective: DraftObjective,
        aux_layers: tuple[int, ...],
    ) -> None:
        self._documents = documents
        self._make = make
        self._draft = draft
        self._objective = objective
        self._places = place_names(aux_layers)
        self._normalise = Normaliser(objective, lambda micro, norms: objective(draft, micro, norms), World.alone())

    def __call__(self, step: BadStep) -> Iterator[Replayed]:
        """Yield what each document of a step gives. Raises ValueError if the data has other documents."""
        for index, name in step.documents:
            if index >= len(self._documents):
                problem = f"the data has {len(self._documents)} documents, and the step had document {index} ({name})"
                raise ValueError(f"{problem}; replay it with the files that the run has read")
            yield self._replay(index, name)

    def _replay(self, index: int, name: str) -> Replayed:
        document = self._documents[index]
        micro = self._make(collate([document], [index]))
        fault = None
        if micro.faults is not None:
            places = micro.faults.by_place[0].tolist()
            fault = self._places[places.index(True)] if any(places) else None
        (norms,) = self._normalise([micro])
        output = self._objective(self._draft, micro, norms)
        trained = [parameter for parameter in self._draft.parameters() if parameter.requires_grad]
        grads = torch.autograd.grad(output.loss, trained, allow_unused=True) if output.loss.requires_grad else []
        norms_of_weights = [grad.float().norm() for grad in grads if grad is not None]
        grad_norm = torch.stack(norms_of_weights).norm().item() if norms_of_weights else 0.0
        return Replayed(name, len(document), fault, output.loss_S.tolist(), grad_norm)
