"""Detection of non-finite numbers in a training run, read from the device one step late.

A document whose hidden states are not finite is named once. The run then continues without it or
stops, depending on the recipe. A non-finite loss of the draft always stops the run, because the
weights would become non-finite too.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.batch import DraftOutput, MicroBatch
from engine.hidden_states.finite import MAX_NAMED, NonFiniteError, check_share, fault_of, place_names
from engine.host.pinned_copy import HostCopy
from engine.runtime.bad_step import BadStep

# Consecutive optimizer steps that DeepSpeed may skip. fp16 needs some to find its loss scale.
MAX_SKIPPED = 50
MAX_LISTED = 100  # bad steps whose documents are listed
# A gradient's norm varies by a factor of two or three between steps; ten times the median is an accident.
SPIKE = 10.0
SPIKE_WINDOW = 50  # norms that the median is taken over
FEWEST_NORMS = 20  # before which no norm is judged


@dataclass(frozen=True)
class WatchSettings:
    """Settings of a `FaultWatch`.

    aux_layers: the target's auxiliary layers.
    name_of: returns the name of a document, given its index among the loaded documents.
    stops: whether a document with non-finite states ends the run.
    skips: whether the run goes on after a step whose loss is not finite.
    searches_scale: whether DeepSpeed skips steps to find the loss scale of fp16, which is no fault.
    folder: where the documents of bad steps are listed. rank: rank of this process.
    """

    aux_layers: tuple[int, ...]
    name_of: Callable[[int], str]
    stops: bool
    skips: bool
    folder: Path
    rank: int = 0
    searches_scale: bool = False


@dataclass(frozen=True)
class _Seen:
    """A micro-batch whose flags are being copied to the host.

    flags: one flag per document and place, unless the states were not checked, then one flag for the loss.
    """

    step: int
    document_ids: Sequence[int]
    flags: HostCopy


class FaultWatch:
    """Detector of non-finite numbers on one rank.

    left_out: what was found, by the document's index among the loaded documents.
    """

    def __init__(self, settings: WatchSettings, warn: Callable[[str], None], num_skipped: int = 0) -> None:
        """Create a detector. num_skipped: steps that DeepSpeed has skipped before, in an earlier run."""
        self._settings = settings
        self._warn = warn
        self._places = place_names(settings.aux_layers)
        self._queue: list[_Seen] = []
        self._seen_documents: set[int] = set()
        self._num_skipped = num_skipped
        self._num_skipped_in_a_row = 0
        self._num_listed = 0
        self._recent: deque[_Seen] = deque()  # micro-batches of this step and the one before
        self._norms: deque[float] = deque(maxlen=SPIKE_WINDOW)  # of gradients
        self._is_spike = False
        self.left_out: dict[int, str] = {}

    def add(self, step: int, output: DraftOutput, micro: MicroBatch) -> None:
        """Start to copy the flags of one micro-batch to the host, without a host sync.

        `read` evaluates them later.
        """
        flags = [~output.loss_S.detach().isfinite().all().reshape(1)]
        document_ids = micro.batch.document_ids or range(len(micro.batch.host_lengths))
        if micro.faults is not None:
            flags.insert(0, micro.faults.by_place.flatten())
        seen = _Seen(step, document_ids, HostCopy(torch.cat(flags)))
        self._queue.append(seen)
        self._recent.append(seen)
        while self._recent[0].step < step - 1:
            self._recent.popleft()

    def read(self, until_step: int) -> None:
        """Read the flags of all steps up to `until_step`.

        Raises NonFiniteError if the run cannot continue.
        """
        while self._queue and self._queue[0].step <= until_step:
            seen = self._queue.pop(0)
            *by_place, is_loss_bad = seen.flags.wait().tolist()
            self._name_documents(seen, by_place)
            if is_loss_bad:
                self._judge_loss(seen)

    def _judge_loss(self, seen: "_Seen") -> None:
        """List the documents of a micro-batch whose loss is not finite, and end the run if it does not skip such steps."""
        problem = f"step {seen.step}: the draft's loss is not finite, although the target's states are finite"
        place = self._list(seen.step, "the draft's loss is not finite")
        if self._settings.skips:
            self._warn_of_step(f"{problem}; its gradient is dropped{place}")
            return
        raise NonFiniteError(
            f"{problem}{place}. Training has stopped, and the current weights were not saved. Resume from the newest "
            "checkpoint (checkpoint.resume=true), or start again, with a lower learning rate (optimizer.params.lr), "
            "gradient_clipping, bf16 instead of fp16, or checkpoint.on_bad_step=skip"
        )

    def _warn_of_step(self, problem: str) -> None:
        if self._num_listed <= MAX_NAMED:
            self._warn(f"  rank {self._settings.rank}: {problem}")

    def _list(self, step: int, reason: str) -> str:
        """List this rank's documents of a bad step in a file; returns words that name it, for a message."""
        self._num_listed += 1
        if self._num_listed > MAX_LISTED:
            return ""
        indices = [index for seen in self._recent if seen.step == step for index in seen.document_ids]
        documents = [(index, self._settings.name_of(index)) for index in indices]
        path = self._settings.folder / f"step_{step}_rank_{self._settings.rank}.json"
        try:
            BadStep(step, self._settings.rank, reason, documents).write(path)
        except OSError:  # the list is a help, and the run has a more important message
            return ""
        return f"; {path} lists its {len(documents)} documents, for launcher/replay_batch.py"

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
        if not self._settings.searches_scale:
            self._list(step, "the gradient is not finite")
            if self._settings.rank == 0 and self._num_skipped_in_a_row <= MAX_NAMED:
                self._warn(f"  {problem}")
        if self._num_skipped_in_a_row == MAX_SKIPPED:
            raise NonFiniteError(f"{problem}, as in the {MAX_SKIPPED - 1} steps before it; lower the learning rate")

    def judge_grad_norm(self, step: int, norm: float) -> None:
        """Warn if the norm of a step's gradient is far above those of the steps before it, and list the step's documents.

        norm: of the gradient of all ranks, before clipping. Called at the end of the next step at the latest.
        """
        if not math.isfinite(norm):
            return
        was_spike = self._is_spike
        median = statistics.median(self._norms) if len(self._norms) >= FEWEST_NORMS else math.inf
        self._is_spike = 0 < SPIKE * median < norm
        self._norms.append(norm)
        if not self._is_spike or was_spike:
            return
        problem = f"the norm of the gradient is {norm:.3g}, {norm / median:.0f} times the median of the logged steps before"
        place = self._list(step, problem)
        if self._settings.rank == 0:
            self._warn_of_step(f"step {step}: {problem}{place}")

    def _name_documents(self, seen: _Seen, by_place: list[bool]) -> None:
        num_places = len(self._places)
        if not by_place:  # the states were not checked
            return
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
