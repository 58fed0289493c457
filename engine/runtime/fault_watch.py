"""Detection of non-finite numbers in a training run, read from the device one step late.

A document whose hidden states are not finite is named once. The run then continues without it or
stops, depending on the recipe. A non-finite loss of the draft always stops the run, because the
weights would become non-finite too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.batch import DraftOutput, MicroBatch
from engine.hidden_states.finite import MAX_NAMED, NonFiniteError, check_share, fault_of, place_names
from engine.host.pinned_copy import HostCopy

# Consecutive optimizer steps that DeepSpeed may skip. fp16 needs some to find its loss scale.
MAX_SKIPPED = 50


@dataclass(frozen=True)
class WatchSettings:
    """Settings of a `FaultWatch`.

    aux_layers: the target's auxiliary layers.
    name_of: returns the name of a document, given its index among the loaded documents.
    stops: whether a document with non-finite states ends the run.
    rank: rank of this process.
    """

    aux_layers: tuple[int, ...]
    name_of: Callable[[int], str]
    stops: bool
    rank: int = 0


@dataclass(frozen=True)
class _Seen:
    """A micro-batch whose flags are being copied to the host.

    flags: one flag per document and place, then one flag for the loss.
    """

    step: int
    document_ids: Sequence[int]
    flags: HostCopy


class FaultWatch:
    """Detector of non-finite numbers on one rank.

    left_out: what was found, by the document's index among the loaded documents.
    """

    def __init__(self, settings: WatchSettings, warn: Callable[[str], None]) -> None:
        self._settings = settings
        self._warn = warn
        self._places = place_names(settings.aux_layers)
        self._queue: list[_Seen] = []
        self._seen_documents: set[int] = set()
        self._num_skipped = self._num_skipped_in_a_row = 0
        self.left_out: dict[int, str] = {}

    def add(self, step: int, output: DraftOutput, micro: MicroBatch) -> None:
        """Start to copy the flags of one micro-batch to the host, without a host sync.

        `read` evaluates them later.
        """
        flags = [~output.loss_S.detach().isfinite().all().reshape(1)]
        document_ids: Sequence[int] = ()
        if micro.faults is not None:
            flags.insert(0, micro.faults.by_place.flatten())
            document_ids = micro.batch.document_ids or range(len(micro.batch.host_lengths))
        self._queue.append(_Seen(step, document_ids, HostCopy(torch.cat(flags))))

    def read(self, until_step: int) -> None:
        """Read the flags of all steps up to `until_step`.

        Raises NonFiniteError if the run cannot continue.
        """
        while self._queue and self._queue[0].step <= until_step:
            seen = self._queue.pop(0)
            *by_place, is_loss_bad = seen.flags.wait().tolist()
            self._name_documents(seen, by_place)
            if is_loss_bad:
                raise NonFiniteError(
                    f"step {seen.step}: the draft's loss is not finite, although the target's states are finite. Training "
                    "has stopped, and the current weights were not saved. Resume from the newest checkpoint "
                    "(checkpoint.resume=true), or start again, with a lower learning rate (optimizer.params.lr), "
                    "gradient_clipping, or bf16 instead of fp16"
                )

    def count_skipped(self, step: int, num_skipped: int) -> None:
        """Warn about a step that DeepSpeed skipped because its gradient was not finite.

        num_skipped: number of skipped steps so far.
        Raises NonFiniteError after `MAX_SKIPPED` consecutive skipped steps.
        """
        if num_skipped == self._num_skipped:
            self._num_skipped_in_a_row = 0
            return
        self._num_skipped = num_skipped
        self._num_skipped_in_a_row += 1
        problem = f"step {step}: the gradient is not finite, so the weights were not changed"
        if self._settings.rank == 0 and self._num_skipped_in_a_row <= MAX_NAMED:
            self._warn(f"  {problem}")
        if self._num_skipped_in_a_row == MAX_SKIPPED:
            raise NonFiniteError(f"{problem}, as in the {MAX_SKIPPED - 1} steps before it; lower the learning rate")

    def _name_documents(self, seen: _Seen, by_place: list[bool]) -> None:
        num_places = len(self._places)
        for index, document in enumerate(seen.document_ids):
            self._seen_documents.add(document)
            faults = by_place[index * num_places : (index + 1) * num_places]
            if any(faults) and document not in self.left_out:
                self._name(seen.step, document, self._places[faults.index(True)])
        check_share(len(self.left_out), len(self._seen_documents), f"step {seen.step}: ")

    def _name(self, step: int, document: int, place: str) -> None:
        problem = fault_of(self._settings.name_of(document), place)
        self.left_out[document] = problem
        if self._settings.stops:
            raise NonFiniteError(f"step {step}: {problem}. Delete it, or set target.non_finite=leave_out to learn without it")
        rank = f"rank {self._settings.rank}: " if self._settings.rank else ""
        if len(self.left_out) <= MAX_NAMED:
            self._warn(f"  {rank}step {step}: left out {problem}")
        if len(self.left_out) == MAX_NAMED:
            self._warn(f"  {rank}further left-out documents are only counted here, and listed in summary.json")
