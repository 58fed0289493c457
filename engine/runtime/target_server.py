"""The job of the ranks that run the target for other ranks (`overlap.placement=split`)."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from engine.batch import PackedBatch, TargetOutput
from engine.config.sections import Config
from engine.data.corpus import read_documents, read_held_out
from engine.data.packed_loader import PackedLoader
from engine.data.templates import load_tokenizer
from engine.evaluation.acceptance import AcceptanceReport, read_prompts
from engine.evaluation.evaluator import AcceptanceEvaluator
from engine.evaluation.samples import Sample
from engine.hidden_states.remote_target import PATIENCE, SourceFacts, TargetFacts
from engine.hidden_states.sources import OnlineSource
from engine.hidden_states.wire import WireFormat, WireStates
from engine.host.telemetry import Telemetry
from engine.models.draft_method import DraftMethod, ServedDraft
from engine.models.method_registry import make_method
from engine.overlap.bridge import ANSWER, Bridge
from engine.overlap.schedule import gather_trace
from engine.overlap.split_pipeline import send_batches
from engine.overlap.step_clock import StepClock, TraceEvent
from engine.parallel.mesh import World
from engine.runtime.model_flops import CountedTarget
from engine.runtime.progress import Progress
from engine.target.frozen import FrozenTarget
from engine.target.head import TargetHead
from engine.weights.quantised_checkpoint import check_fp8_activations


@dataclass(frozen=True)
class Served:
    """Steps for which the target's ranks prepare micro-batches.

    first_step: number of the first one. is_held_out: whether the batches are held-out conversations.
    """

    first_step: int
    num_steps: int
    wire: WireFormat
    is_held_out: bool = False


class TargetServer:
    """Executes the calls of `TargetCalls` on one rank of the target.

    A public method is a call. All ranks of the target execute every call; the first one answers.
    """

    def __init__(
        self, config: Config, ds_config: dict[str, Any], world: World, bridge: Bridge, progress: Progress | None = None
    ) -> None:
        """Create a server.

        world: the ranks of the target. ds_config: DeepSpeed's configuration, for the sizes of batches.
        progress: what this rank does, for the watch over the job; None = nobody watches.
        """
        self._progress = progress or Progress()
        self._config = config
        self._ds_config = ds_config
        self._world = world
        self._bridge = bridge
        self._method: DraftMethod = make_method(config)
        self._telemetry = Telemetry(speaks=world.is_main)
        self._tokenizer = load_tokenizer(config.target, config.data)
        self._clock = StepClock(world.device, config.overlap.traced)
        if not world.is_main:
            disable_progress_bar()
        self._source = OnlineSource(config, self._tokenizer, world, self._telemetry)

    def run(self) -> None:
        """Execute calls until the last one. Raises OtherSideError if the draft's ranks end before."""
        calls: dict[str, Callable[..., Any]] = {
            "source_facts": self.source_facts,
            "load": self.load,
            "count_target": self.count_target,
            "head_rows": self.head_rows,
            "forward": self.forward,
            "open_data": self.open_data,
            "serve": self.serve,
            "measure_draft": self.measure_draft,
            "measure_prompt_lookup": self.measure_prompt_lookup,
            "trace": self.trace,
        }
        while True:
            name, arguments = self._bridge.receive(0, patience=PATIENCE)
            if name == "end":
                return
            answer = calls[name](*arguments)
            if name != "serve" and self._world.is_main:
                for draft_rank in range(self._bridge.sides.num_draft):
                    self._bridge.send_number(0, draft_rank, ANSWER)
                self._bridge.send(answer, 0)

    def source_facts(self) -> SourceFacts:
        source = self._source
        return SourceFacts(source.aux_layers, source.target_identity, source.trained_with)

    def load(self, aux_layers: tuple[int, ...]) -> TargetFacts:
        """Load the target."""
        check_fp8_activations(self._source.target_config, self._config.target)
        self._target: FrozenTarget = self._source.load_target(aux_layers)
        return TargetFacts(self._target.aux_layers, self._target.dtype, self._target.embedding.whole().cpu())

    def count_target(self) -> CountedTarget | None:
        """Return the work of the target for the report, on the first rank."""
        if not self._world.is_main:
            return None
        num_aux = len(self._target.aux_layers)
        return CountedTarget.read(self._config, self._world.device, num_aux, self._method.needs_head_stats)

    def head_rows(self, target_ids_U: Tensor) -> TargetHead:
        head = self._target.head_rows(target_ids_U.to(self._world.device))
        bias_U = None if head.bias_V is None else head.bias_V.cpu()
        return replace(head, weight_VD=head.weight_VD.cpu(), bias_V=bias_U)

    def forward(self, batch: PackedBatch, slots_N: Tensor) -> TargetOutput | None:
        """Run the target on one batch, on the first rank; the other ranks of its copy take part."""
        output = None
        if self._world.is_main:
            output = replace(self._target(batch, slots_N), embed_TD=None)  # the draft's ranks have the embedding
            on_host = {name: value.cpu() for name, value in vars(output).items() if isinstance(value, Tensor)}
            output = replace(output, **on_host)
        self._target.join_other_forwards()
        return output

    def open_data(self, stream: dict[str, int], position: dict[str, Any] | None, is_held_out: bool) -> None:
        """Read the documents, before the draft's ranks begin to wait for batches.

        stream: of the draft's loader. position: of the data, from which a run resumes; None = the beginning.
        is_held_out: whether the documents are held-out conversations.
        Raises ValueError if these ranks read other documents.
        """
        loader = self._held_out_loader if is_held_out else self._loader
        loader.check_stream(stream, self._bridge.rank, "held-out" if is_held_out else "training")
        if position is not None:
            loader.load_state(position)
        _ = loader.num_steps  # packs the epochs, which takes time

    def serve(self, served: Served) -> None:
        """Prepare and send this rank's share of the micro-batches of a run, after `open_data`."""

        target = self._target.with_head_stats(served.wire.has_head_stats)

        def states(batch: PackedBatch) -> WireStates:
            slots_N = self._method.slots(self._method.allowed_rows(batch))
            return served.wire.write(target(batch, slots_N))

        # The timeline of a trace holds training steps only.
        clock = StepClock(self._world.device) if served.is_held_out else self._clock
        clock.on_part = self._progress.mark
        with self._progress.training():
            send_batches(self._batches(served, clock), states, self._bridge, clock, self._world.device)
            target.join_other_forwards()

    def _batches(self, served: Served, clock: StepClock) -> Iterator[tuple[int, int, PackedBatch]]:
        """Yield draft rank, index and documents of each micro-batch that this rank prepares."""
        loader = self._held_out_loader if served.is_held_out else self._loader
        accumulation = loader.accumulation_steps
        own = self._bridge.sides.batches_of(self._world.rank, served.num_steps * accumulation)
        for draft_rank, index in own:
            step = index // accumulation
            clock.step = served.first_step + step
            self._progress.begin_step(clock.step)
            yield draft_rank, index, loader.micro_batch(step, index % accumulation, draft_rank)

    @cached_property
    def _loader(self) -> PackedLoader:
        silent = Telemetry(speaks=False)  # the draft's ranks describe the same conversations
        documents = read_documents(self._config.data, self._tokenizer, self._world, silent)[0]
        num_draft = self._bridge.sides.num_draft
        return PackedLoader.of(documents, self._config, self._ds_config, rank=0, world_size=num_draft)

    @cached_property
    def _held_out_loader(self) -> PackedLoader:
        documents = read_held_out(self._config, self._tokenizer, self._world)
        num_draft = self._bridge.sides.num_draft
        return PackedLoader.held_out(documents, self._config, self._ds_config, rank=0, world_size=num_draft)

    @cached_property
    def _evaluator(self) -> AcceptanceEvaluator:
        config = self._config
        prompts = read_prompts(config, self._tokenizer)
        return AcceptanceEvaluator(
            config.evaluation, self._target, self._tokenizer, prompts, self._world, self._telemetry, config.data.max_tokens
        )

    def measure_draft(self, written: bytes) -> tuple[AcceptanceReport, list[Sample]]:
        """Measure a draft; return its report and some of its replies."""
        draft: ServedDraft = torch.load(io.BytesIO(written), map_location=self._world.device, weights_only=False)
        report = self._evaluator.measure_draft(draft)
        return report, self._samples()

    def _samples(self) -> list[Sample]:
        """Return replies to a few prompts of the first rank. A failure is a warning."""
        if not self._world.is_main:
            return []
        try:
            return self._evaluator.samples
        except Exception as error:  # the tokenizer may be code of the checkpoint
            self._telemetry.warn(f"  no replies for the report: {type(error).__name__}: {error}")
            return []

    def measure_prompt_lookup(self) -> AcceptanceReport:
        return self._evaluator.measure_prompt_lookup()

    def trace(self) -> list[TraceEvent]:
        """Return the timeline of all ranks of the target."""
        return gather_trace(self._clock, self._bridge.rank, self._world)
