"""A target that runs on other ranks, as the ranks that train the draft see it."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.batch import PackedBatch, TargetOutput
from engine.config.sections import Config
from engine.data.corpus import read_documents
from engine.data.documents import Documents
from engine.host.telemetry import Telemetry
from engine.overlap.bridge import ANSWER, Bridge
from engine.parallel.mesh import World
from engine.target.embedding import SharedEmbedding, TargetEmbedding
from engine.target.head import TargetHead

PATIENCE = timedelta(days=7)  # for work whose time depends on its size, such as loading the target


@dataclass(frozen=True)
class SourceFacts:
    """What the target's ranks know of their source. Fields as in `HiddenStateSource`."""

    aux_layers: tuple[int, ...] | None
    target_identity: str | None
    trained_with: dict[str, str]


@dataclass(frozen=True)
class TargetFacts:
    """What the target's ranks know of the loaded target. Fields as in `Target`."""

    aux_layers: tuple[int, ...]
    dtype: torch.dtype
    embed_weight_VD: Tensor


class TargetCalls:
    """Calls from the draft's ranks to those of the target; every call is a collective of the draft's ranks.

    A call is a name and arguments, which `TargetServer` executes on all ranks of the target.
    """

    def __init__(self, bridge: Bridge, world: World) -> None:
        self.bridge = bridge
        self.world = world

    def call(self, name: str, *arguments: Any) -> Any:
        """Return the answer of the first target rank, on the host.

        arguments: picklable, with tensors on the host.
        """
        self.start(name, *arguments)
        first = self.bridge.sides.num_draft
        # Every rank waits here as long as it takes, and not in a collective, which has a timeout.
        self.bridge.receive_number(first, ANSWER, PATIENCE).wait()
        return self.world.decide(lambda: self.bridge.receive(first))

    def start(self, name: str, *arguments: Any) -> None:
        """Make a call that has no answer."""
        sides = self.bridge.sides
        for rank in range(sides.num_draft, sides.size):
            if self.world.is_main:
                self.bridge.send((name, arguments), rank, PATIENCE)


class RemoteTarget:
    """The target as training uses it (see `Target`), on other ranks.

    In training, states arrive through the schedule, so that the target can run ahead. Calling the
    target itself waits for its answer.
    """

    def __init__(self, calls: TargetCalls, facts: TargetFacts) -> None:
        self.calls = calls
        self._device = calls.world.device
        self.aux_layers = facts.aux_layers
        self.dtype = facts.dtype
        self.embedding: TargetEmbedding | SharedEmbedding = TargetEmbedding(facts.embed_weight_VD.to(self._device))

    def head_rows(self, target_ids_U: Tensor) -> TargetHead:
        """Return the head restricted to `target_ids_U`, on this device; a collective of the draft's ranks."""
        head: TargetHead = self.calls.call("head_rows", target_ids_U.cpu())
        bias_U = None if head.bias_V is None else head.bias_V.to(self._device)
        return TargetHead(head.weight_VD.to(self._device), head.scale, head.soft_cap, head.temperature, bias_U)

    def __call__(self, batch: PackedBatch, slots_N: Tensor) -> TargetOutput:
        """Return the target's output; the draft's ranks must all pass the same batch."""
        output: TargetOutput = self.calls.call("forward", batch.to(torch.device("cpu")), slots_N.cpu())
        return TargetOutput(
            output.aux_TA.to(self._device),
            output.slots_N.to(self._device),
            output.last_hidden_ND.to(self._device),
            *(stat_N.to(self._device) for stat_N in output.head_stats),
        )


class RemoteSource:
    """Source that runs the target on other ranks of this job (see `HiddenStateSource`)."""

    can_decode = True
    counted = "the assistant tokens"

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, world: World, telemetry: Telemetry, bridge: Bridge
    ) -> None:
        """Wait for the target's ranks to check its files; a collective of all ranks of the job."""
        self._config = config
        self._tokenizer = tokenizer
        self._telemetry = telemetry
        self._world = world
        self._calls = TargetCalls(bridge, world)
        facts: SourceFacts = self._calls.call("source_facts")
        self.aux_layers = facts.aux_layers
        self.target_identity = facts.target_identity
        self.trained_with = facts.trained_with

    def documents(self) -> Documents:
        """Read the conversations of `data.train`. Raises ValueError for conversations that cannot be used."""
        return read_documents(self._config.data, self._tokenizer, self._world, self._telemetry)[0]

    def count_tokens(self, documents: Documents, vocab_size: int) -> Tensor:
        """Return how often each token occurs among the assistant tokens, int64 [V]."""
        return torch.from_numpy(documents.count_assistant_tokens(vocab_size))

    def load_target(self, aux_layers: tuple[int, ...]) -> RemoteTarget:
        """Let the target's ranks load it; a collective of the draft's ranks."""
        sides = self._calls.bridge.sides
        replicas = sides.num_target // sides.replica_size
        ranks = f"{sides.num_target} ranks run {replicas} copies of the target"
        self._telemetry.note(f"  {ranks}, {sides.num_draft} ranks train the draft")
        return RemoteTarget(self._calls, self._calls.call("load", aux_layers))
