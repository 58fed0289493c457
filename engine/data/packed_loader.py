"""Distribute a stream of packs over ranks, one optimizer step at a time."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from engine.batch import PackedBatch
from engine.config.ds_config import accumulation_steps, micro_batch_size
from engine.config.sections import Config
from engine.data.documents import Document, Documents
from engine.data.packing import alike_steps, collate, pack


class Plan(NamedTuple):
    """Grouping of packs into steps of `packs_per_step` packs, from pack `origin` of the stream."""

    packs_per_step: int
    origin: int


class PackedLoader:
    """One rank's micro-batches, grouped by optimizer step.

    Each epoch is shuffled by (seed, epoch) and packed; the epochs form one stream of packs. A step
    takes world_size * packs_per_batch * accumulation_steps packs of similar cost from the stream.
    The stream therefore does not depend on how a step is divided over ranks. The last step is
    filled with silent packs, which carry no loss, so that every rank issues the same collectives.
    No document is dropped or repeated, even if a run resumes with another number of ranks in the
    middle of an epoch.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        max_tokens: int,
        packs_per_batch: int,
        rank: int,
        world_size: int,
        accumulation_steps: int,
        seed: int,
        epochs: int,
        balance_steps: int,
    ):
        """Pack the documents for one rank.

        max_tokens: capacity of a pack.
        packs_per_batch: packs in one micro-batch of a rank.
        balance_steps: see `data.balance_steps`.
        Raises ValueError if there are no documents.
        """
        if not documents:
            raise ValueError("nothing to load: there are no documents")
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self._documents = documents
        self._lengths = documents.lengths
        self._assistant_tokens = documents.assistant_tokens
        self._max_tokens = max_tokens
        self._packs_per_batch = packs_per_batch
        self._rank = rank
        self._world_size = world_size
        self._accumulation_steps = accumulation_steps
        self._seed = seed
        self._epochs = epochs
        self._balance_steps = balance_steps
        self._packed: tuple[int, list[np.ndarray]] = (-1, [])
        self._first_pack = 0
        self._plan = Plan(self._packs_per_step, 0)
        self._begun: dict[int, Plan] = {}  # epochs started by a run with another global batch size

    @classmethod
    def of(cls, documents: Documents, config: Config, ds_config: dict[str, Any], rank: int, world_size: int) -> "PackedLoader":
        """Return the loader of a job. ds_config: DeepSpeed's configuration, for the sizes of batches."""
        return cls(
            documents,
            max_tokens=config.data.max_tokens,
            packs_per_batch=micro_batch_size(ds_config, world_size),
            rank=rank,
            world_size=world_size,
            accumulation_steps=accumulation_steps(ds_config, world_size),
            seed=config.seed,
            epochs=config.epochs,
            balance_steps=config.data.balance_steps,
        )

    @classmethod
    def held_out(
        cls, documents: Documents, config: Config, ds_config: dict[str, Any], rank: int, world_size: int
    ) -> "PackedLoader":
        """Return a loader that yields each document once, in steps of one micro-batch per rank."""
        return cls(
            documents,
            max_tokens=config.data.max_tokens,
            packs_per_batch=micro_batch_size(ds_config, world_size),
            rank=rank,
            world_size=world_size,
            accumulation_steps=1,
            seed=0,
            epochs=1,
            balance_steps=0,
        )

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per rank and step."""
        return self._accumulation_steps

    def check_stream(self, expected: dict[str, int], rank: int, kind: str = "training") -> None:
        """Raise ValueError if rank 0 reads other data.

        expected: the `stream` of rank 0. rank: this rank, and kind: of the data, for the message.
        """
        if expected != self.stream:
            problem = f"rank {rank} reads other {kind} data than rank 0"
            raise ValueError(f"{problem}: {self.stream}, expected {expected}. Give every node the same files")

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps from the start of iteration to the end of the last epoch."""
        return -(-(self._epoch_ends[-1] - self._first_pack) // self._packs_per_step)

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue after the step that yielded `state`.

        Raises ValueError if the state was saved with other data or settings.
        """
        saved = state["stream"]
        current = self.stream
        changes = [f"{key} was {saved.get(key)}, now {current[key]}" for key in current if saved.get(key) != current[key]]
        if changes:
            raise ValueError(
                "the data position was saved for another stream of batches: "
                + "; ".join(changes)
                + ". Restore these settings, or start a new run in another output_dir"
            )
        self._first_pack = first = state["packs"]
        plan = Plan(*state["plan"])
        if plan.packs_per_step != self._packs_per_step:
            self._plan = Plan(self._packs_per_step, first)
        else:
            self._plan = plan
        epoch = self._epoch_of(first)
        if first > self._start_of(epoch):
            self._begun[epoch] = Plan(*state["epoch_plan"])

    def __iter__(self) -> Iterator[tuple[list[PackedBatch], dict[str, Any]]]:
        """Yield this rank's micro-batches of each step and the state for resuming after it."""
        num_packs = self._epoch_ends[-1]
        for first in range(self._first_pack, num_packs, self._packs_per_step):
            batches = [self._micro_batch(first, index, self._rank) for index in range(self._accumulation_steps)]
            yield batches, self._state_at(min(first + self._packs_per_step, num_packs))

    @property
    def _packs_per_step(self) -> int:
        return self._world_size * self._packs_per_batch * self._accumulation_steps

    @cached_property
    def stream(self) -> dict[str, int]:
        return {
            "num_documents": len(self._lengths),
            "num_tokens": int(self._lengths.sum()),
            "checksum": self._documents.checksum,
            "max_tokens": self._max_tokens,
            "balance_steps": self._balance_steps,
            "seed": self._seed,
        }

    def _state_at(self, num_packs: int) -> dict[str, Any]:
        epoch_plan = self._plan_of(self._epoch_of(num_packs))
        return {"packs": num_packs, "plan": list(self._plan), "epoch_plan": list(epoch_plan), "stream": self.stream}

    def micro_batch(self, step: int, index: int, rank: int) -> PackedBatch:
        """Return micro-batch `index` of any rank in a step. step: counted from where iteration starts."""
        return self._micro_batch(self._first_pack + step * self._packs_per_step, index, rank)

    def _micro_batch(self, first: int, index: int, rank: int) -> PackedBatch:
        begin = first + (index * self._world_size + rank) * self._packs_per_batch
        documents: list[Document] = []
        places: list[int] = []
        epochs: list[int] = []
        for offset in range(self._packs_per_batch):
            pack_documents, pack_places = self._pack(begin + offset)
            documents += pack_documents
            places += pack_places
            epochs += [self._epoch_of(begin + offset)] * len(pack_places)
        return collate(documents, places, epochs)

    def _pack(self, index: int) -> tuple[list[Document], list[int]]:
        """Return a pack's documents and their indices; past the stream's end, a silent pack."""
        if index >= self._epoch_ends[-1]:
            return [self._silent_document], [self._shortest]
        epoch = self._epoch_of(index)
        places: list[int] = self._packs_of(epoch)[index - self._start_of(epoch)].tolist()
        return [self._documents[place] for place in places], places

    def _packs_of(self, epoch: int) -> list[np.ndarray]:
        """Return the packs of an epoch, in the order of its steps."""
        if self._packed[0] != epoch:
            packs = self._drawn(epoch)
            plan = self._plan_of(epoch)
            assistant_tokens_P = np.array([self._assistant_tokens[places].sum() for places in packs])
            begun = self._start_of(epoch) - plan.origin
            generator = np.random.default_rng([self._seed, epoch, 1])
            steps = alike_steps(assistant_tokens_P, begun, plan.packs_per_step, self._balance_steps, generator)
            self._packed = epoch, [packs[index] for index in np.concatenate(list(steps))]
        return self._packed[1]

    def _drawn(self, epoch: int) -> list[np.ndarray]:
        return pack(self._lengths, self._assistant_tokens, self._max_tokens, np.random.default_rng([self._seed, epoch]))

    def _plan_of(self, epoch: int) -> "Plan":
        return self._begun.get(epoch, self._plan)

    def _epoch_of(self, index: int) -> int:
        return int(np.searchsorted(self._epoch_ends, index, side="right"))

    def _start_of(self, epoch: int) -> int:
        return self._epoch_ends[epoch - 1] if epoch else 0

    @cached_property
    def _epoch_ends(self) -> list[int]:
        """Number of packs in the stream up to the end of each epoch."""
        return list(accumulate(len(self._drawn(epoch)) for epoch in range(self._epochs)))

    @property
    def _shortest(self) -> int:
        return int(self._lengths.argmin())

    @cached_property
    def _silent_document(self) -> Document:
        shortest = self._documents[self._shortest]
        return replace(shortest, assistant_mask=np.zeros_like(shortest.assistant_mask))
