"""The training job: target, data, draft, measurement, training, export, measurement, report."""

import collections
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from engine.batch import MicroBatch, PackedBatch
from engine.config.ds_config import (
    compute_dtype,
    drops_bad_gradients,
    ds_kept_on_resume,
    resolve_ds_config,
    schedule_facts,
    stage_advice,
)
from engine.config.recipe import dump_config
from engine.config.secret_values import without_secrets
from engine.config.sections import ACCEPTANCE, BAD_STEPS, CHECKPOINTS, DRAFT, DRAFT_LAST, RECIPE, Config, ConfigError
from engine.config.strict import as_yaml
from engine.data.corpus import read_held_out
from engine.data.documents import Document
from engine.data.fingerprint import tokenizer_hash
from engine.data.packed_loader import PackedLoader
from engine.data.packing import collate
from engine.data.templates import load_tokenizer, template_token_ids
from engine.evaluation.acceptance import Prompt, check_prompts, read_prompts
from engine.evaluation.evaluator import AcceptanceEvaluator
from engine.evaluation.history import EvaluationHistory
from engine.evaluation.model_card import write_model_card
from engine.evaluation.remote_evaluator import RemoteEvaluator
from engine.evaluation.report import PAGE, SUMMARY, RunReport
from engine.evaluation.run_page import write_run_page
from engine.evaluation.run_record import WORK
from engine.evaluation.samples import SAMPLES, write_samples
from engine.hidden_states.finite import NonFiniteError
from engine.hidden_states.held_out_data import HeldOutData
from engine.hidden_states.micro_batches import MicroBatchMaker
from engine.hidden_states.protocol import HiddenStateSource, Target
from engine.hidden_states.remote_target import RemoteSource, RemoteTarget
from engine.hidden_states.sources import open_source
from engine.host.files import write_json, write_text
from engine.host.hardware import HardwareSampler
from engine.host.telemetry import Telemetry
from engine.kernels import Kernels, choose_kernels
from engine.kernels.self_check import SelfCheck
from engine.kernels.vocab_loss import LossPass
from engine.models.draft_folder import (
    CONFIG,
    VOCAB,
    WEIGHTS,
    check_replaceable,
    load_vocab_map,
    save_vocab_map,
)
from engine.models.draft_method import DraftConfig, DraftMethod, DraftModel, DraftObjective, ServedDraft
from engine.models.losses.loss_registry import make_loss
from engine.models.method_registry import make_method
from engine.models.normaliser import Normaliser
from engine.models.vocab_map import VocabMap
from engine.overlap.bridge import Bridge
from engine.overlap.schedule import write_trace
from engine.overlap.step_clock import StepClock
from engine.parallel.mesh import World
from engine.parallel.nodes import copy_from_main
from engine.parallel.zero import ZeroDraft
from engine.parallel.zero_checkpoint import CheckpointForm
from engine.runtime.checkpoint import Checkpoint, Checkpoints, CheckpointWriter, DraftExport, check_finite_weights
from engine.runtime.fault_watch import FaultWatch, WatchSettings
from engine.runtime.held_out_loss import HeldOutLoss
from engine.runtime.model_flops import ELSEWHERE, CountedTarget
from engine.runtime.periodic_evaluation import PeriodicEvaluation
from engine.runtime.progress import Progress
from engine.runtime.run_stop import StopAgreement
from engine.runtime.run_warnings import RunWarnings
from engine.runtime.step_work import StepWork
from engine.runtime.train_log import LogSettings, TrainLog
from engine.runtime.training_loop import Annealing, RunSpan, Segment, TrainingLoop
from engine.runtime.training_schedule import Training, TrainingSchedules, check_look_ahead
from engine.target.configuration import load_target_config
from engine.target.frozen import FrozenTarget
from engine.weights.quantised_checkpoint import check_fp8_activations

TrainedDraft = ZeroDraft[DraftModel, DraftObjective]
Evaluator = AcceptanceEvaluator | RemoteEvaluator
TRACE = "trace.json"
EXCERPT_TOKENS = 24
# Relative to the largest logit: a few bf16 roundings. A wrong tensor causes errors near 1.
RELOAD_TOLERANCE = 2**-5


@dataclass(frozen=True)
class Corpus:
    """Training data of a run.

    loader: stream of batches. sample: a batch with one document. vocab_map: the draft vocabulary.
    vocab_facts: tokenizer, counted data, coverage and target of the draft vocabulary.
    name_of: returns the name of a document, given its index.
    """

    loader: PackedLoader
    sample: PackedBatch
    vocab_map: VocabMap
    vocab_facts: dict[str, Any]
    name_of: Callable[[int], str]


class Trainer:
    """One run of the training job on one rank."""

    def __init__(
        self,
        config: Config,
        ds_config: dict[str, Any],
        world: World,
        bridge: Bridge | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Create a run.

        ds_config: DeepSpeed configuration as read from its file, without computed values.
        bridge: connection to the ranks that run the target, if these are others.
        progress: what this rank does, for the watch over the job; None = nobody watches.
        """
        if config.checkpoint.on_bad_step == "skip" and not drops_bad_gradients(ds_config):
            problem = "needs ZeRO stage 1 or above, or bf16, with which DeepSpeed drops a gradient that is not finite"
            raise ConfigError(problem, key="checkpoint.on_bad_step", value="skip")
        self.bridge = bridge
        self.progress = progress or Progress()
        self.config = config
        self.ds_config = ds_config
        self.world = world
        self.method: DraftMethod = make_method(config)
        self.output_dir = Path(config.output_dir)
        kept = config.kept_on_resume | ds_kept_on_resume(ds_config)
        self.checkpoints = Checkpoints(self.output_dir / CHECKPOINTS, config.checkpoint.keep, kept)
        self.count_target: Callable[[], CountedTarget] = partial(CountedTarget, None, ELSEWHERE)
        self.unlogged: list[Any] = []  # metrics of every rank that a resumed run has yet to log
        self.telemetry = Telemetry(speaks=world.is_main)
        if not world.is_main:
            disable_progress_bar()

    def run(self) -> RunReport:
        """Run the whole job and return its report, the same on every rank.

        Raises ValueError for an invalid configuration, before any expensive work where possible.
        Raises RunStoppedError if it was asked to stop before its last step.
        """
        self.check_output()
        checkpoint = self.world.decide(self.find_checkpoint)
        torch.manual_seed(self.config.seed)
        make_loss(self.config.loss)  # Raises here if no plugin has registered the kind.
        section = self.config.target
        tokenizer = load_tokenizer(section, self.config.data)
        target_config = load_target_config(section)
        check_fp8_activations(target_config, section)
        source = self.open_source(tokenizer)
        self.check_evaluation(source)
        self.checkpoints = replace(self.checkpoints, target_identity=source.target_identity)
        if checkpoint is not None:
            unknown = checkpoint.check_target(source.target_identity)
            if unknown is not None:
                self.telemetry.note(f"  {unknown}")
        draft_config = self.method.derive_config(target_config, source.aux_layers, source.trained_with)
        if source.can_decode and self.config.evaluation.num_prompts:
            self.method.check_shape(self.config.evaluation.tree, draft_config)
        if self.bridge is not None:
            check_look_ahead(self.config, self.ds_config, self.method, draft_config, self.bridge.sides, self.world.device)
        kernels = self.choose_kernels(draft_config)
        with self.telemetry.stage("Reading the data"):
            corpus = self.read_corpus(source, tokenizer, draft_config)
            span = self.resume(corpus.loader, checkpoint)
            prompts = self.read_prompts(tokenizer, draft_config.vocab_size) if source.can_decode else []
            held_out = self.read_held_out(source, tokenizer)
        with self.telemetry.stage("Loading the target"):
            assert draft_config.aux_layers is not None  # `derive_config` fills them in
            target = source.load_target(draft_config.aux_layers)
            self.count_target = self.counter_of(target)
        if checkpoint is not None and self.config.draft.init_from is not None:
            # The checkpoint holds the weights; the draft that the run began with may be gone.
            self.method = make_method(replace(self.config, draft=replace(self.config.draft, init_from=None)))
        draft = self.method.new_draft(draft_config, kernels, target, corpus.vocab_map)
        for line in self.method.notes:
            self.telemetry.note(f"  {line}")
        evaluator = self.make_evaluator(target, tokenizer, prompts) if source.can_decode else None
        report = RunReport(self.output_dir, self.telemetry.stage_s, corpus.vocab_facts["coverage"])
        if evaluator is not None:
            with self.telemetry.stage("Measuring acceptance before training"):
                report = replace(report, before=evaluator.measure_draft(self.served(draft, corpus.vocab_map, target)))

        zero = self.start_zero(draft, corpus, target, span)
        self.write_work(zero, corpus, span)
        with self.telemetry.stage("Training"):
            periodic = self.periodic_evaluation(zero, corpus, target, evaluator, held_out, span)
            left_out = self.train(zero, corpus, target, span, periodic)
            report = replace(report, left_out=left_out)
        with self.telemetry.stage("Exporting"):
            exported = self.final_draft(zero, corpus, target, span, periodic)
        if evaluator is not None:
            with self.telemetry.stage("Measuring acceptance after training"):
                after = evaluator.measure_draft(exported.to(target.dtype))
                best_step = None if periodic is None else periodic.best_step()
                self.write_samples(evaluator, best_step or span.last)
                report = replace(report, after=after, prompt_lookup=evaluator.measure_prompt_lookup())
        if isinstance(target, RemoteTarget):
            target.calls.start("end")
        return report

    def open_source(self, tokenizer: PreTrainedTokenizerBase) -> HiddenStateSource:
        """Open the source of hidden states, on these ranks or on others."""
        if self.bridge is None:
            return open_source(self.config, tokenizer, self.world, self.telemetry)
        return RemoteSource(self.config, tokenizer, self.world, self.telemetry, self.bridge)

    def counter_of(self, target: Target) -> Callable[[], CountedTarget]:
        """Return a function that counts the target's work, at most once per process; a collective.

        Ranks that run the target do this, because a model without weights may need code of the checkpoint.
        """
        if isinstance(target, RemoteTarget):
            counted: CountedTarget = target.calls.call("count_target")
            return lambda: counted
        if isinstance(target, FrozenTarget):
            num_aux = len(target.aux_layers)
            return cache(partial(CountedTarget.read, self.config, self.world.device, num_aux, self.method.needs_head_stats))
        return partial(CountedTarget, None, ELSEWHERE)

    def make_evaluator(self, target: Target, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]) -> Evaluator:
        """Return the evaluator of a target that can decode. Raises ValueError for another target."""
        if isinstance(target, RemoteTarget):
            return RemoteEvaluator(target, self.config.evaluation.num_prompts)
        if not isinstance(target, FrozenTarget):
            problem = f"loaded a {type(target).__name__}, which cannot decode; set can_decode = False in the source"
            raise ValueError(f"target.source = {self.config.target.source}: {problem}")
        section = self.config.evaluation
        max_tokens = self.config.data.max_tokens
        return AcceptanceEvaluator(section, target, tokenizer, prompts, self.world, self.telemetry, max_tokens)

    def check_evaluation(self, source: HiddenStateSource) -> None:
        """Raise ConfigError if the source of hidden states cannot serve the evaluation that the recipe asks for."""
        section = self.config.evaluation
        if not section.every_steps or source.can_decode or section.store is not None:
            return
        problem = f"needs a target that decodes, and target.source={self.config.target.source} has none; set it to 0"
        raise ConfigError(problem, key="evaluation.every_steps", value=section.every_steps)

    def check_output(self) -> None:
        """Check the output folder, and print whether the nodes share it.

        Raises ValueError if this run could not write its output there.
        """
        for draft in (self.output_dir / DRAFT, self.output_dir / DRAFT_LAST):
            self.world.decide(partial(check_replaceable, draft))
            if self.world.writes_output and not self.world.is_main:
                check_replaceable(draft)
        if self.world.num_nodes == 1:
            return
        if self.world.shares_output:
            self.telemetry.note(f"Output folder: shared by {self.world.num_nodes} nodes")
            return
        resume = self.config.checkpoint.resume
        if resume is not False:
            asked = f"checkpoint.resume={as_yaml(resume)}"
            raise ValueError(
                f"{self.output_dir} is not one folder on all {self.world.num_nodes} nodes, and {asked} needs the files of "
                "every rank in one folder. Set output_dir to a folder that the nodes share"
            )
        writes = "rank 0 writes the run's record, and every node the exported draft"
        self.telemetry.note(f"Output folder: not shared, so there are no checkpoints; {writes}")

    def find_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint to resume from, or None.

        Raises ValueError if there is none that this run can continue.
        """
        resume = self.config.checkpoint.resume
        if resume is False:
            return None
        checkpoint = self.checkpoints.find(lambda problem: self.telemetry.warn(f"  {problem}"))
        if checkpoint is not None:
            checkpoint.check_options(self.checkpoints.options)
            checkpoint.check_end(self.config.max_steps)
        elif resume is True:
            problem = f"checkpoint.resume=true, and {self.checkpoints.folder} holds no complete checkpoint"
            raise ValueError(f"{problem}. Use checkpoint.resume=auto to begin a new run in this case")
        return checkpoint

    def read_corpus(self, source: HiddenStateSource, tokenizer: PreTrainedTokenizerBase, config: DraftConfig) -> Corpus:
        documents = source.documents()
        counts_V = source.count_tokens(documents, config.vocab_size)
        self.method.check_data(counts_V, config)
        vocab_map = self.draft_vocabulary(counts_V, tokenizer, config)
        loader = PackedLoader.of(documents, self.config, self.ds_config, self.world.rank, self.world.size)
        loader.check_stream(self.world.decide(lambda: loader.stream), self.world.rank)
        coverage = vocab_map.coverage(counts_V)
        self.telemetry.note(f"  draft vocabulary: {vocab_map.size} tokens, {coverage:.1%} of {source.counted}")
        facts = {"tokenizer_hash": tokenizer_hash(tokenizer), "coverage": coverage, "counted": self.config.draft.vocab_from}
        facts["trained_with"] = config.trained_with

        def name_of(index: int) -> str:
            return f"{documents.name_of(index)} ({excerpt(tokenizer, documents[index])})"

        return Corpus(loader, collate([documents[0]], [0]), vocab_map.to(self.world.device), facts, name_of)

    def draft_vocabulary(self, counts_V: torch.Tensor, tokenizer: PreTrainedTokenizerBase, config: DraftConfig) -> VocabMap:
        path = self.config.draft.vocab_map
        if path is None:
            return VocabMap.most_frequent(counts_V, config.draft_vocab_size, template_token_ids(tokenizer))
        vocab_map = load_vocab_map(Path(path), tokenizer_hash(tokenizer))
        if vocab_map.size != config.draft_vocab_size:
            problem = f"{path} holds {vocab_map.size} tokens, draft.vocab_size is {config.draft_vocab_size}"
            raise ValueError(f"{problem}; set draft.vocab_size={vocab_map.size}")
        return vocab_map

    def read_prompts(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[Prompt]:
        prompts = read_prompts(self.config, tokenizer)
        check_prompts(prompts, vocab_size)
        return prompts

    def read_held_out(self, source: HiddenStateSource, tokenizer: PreTrainedTokenizerBase) -> HeldOutData | None:
        """Return the held-out conversations of evaluations during training; None = their loss is not measured.

        Raises ValueError if there are none that can be used, and `evaluation.best_by` needs them.
        """
        section = self.config.evaluation
        if not section.every_steps or not section.num_documents:
            return None
        try:
            if section.store is not None:
                held_out = HeldOutData.stored(self.config, source, self.world, self.telemetry)
            else:
                held_out = HeldOutData(read_held_out(self.config, tokenizer, self.world))
        except ValueError as error:
            if section.best_by != ACCEPTANCE:
                raise
            self.telemetry.note(f"  the held-out loss is not measured: {error}")
            return None
        num_documents = len(held_out.documents)
        num_assistant = int(held_out.documents.assistant_tokens.sum())
        self.telemetry.note(f"  held-out loss: {num_documents:,} documents, {num_assistant:,} assistant tokens")
        return held_out

    def resume(self, loader: PackedLoader, checkpoint: Checkpoint | None) -> RunSpan:
        """Move the loader to a checkpoint's position and return the optimizer steps of this run.

        Raises ValueError if this run would end before that position.
        """
        step = 0
        if checkpoint is not None:
            step = checkpoint.step
            loader.load_state(checkpoint.data_state)
        end = step + loader.num_steps
        if checkpoint is not None and end < step:
            checkpoint.refuse_end(f"epochs={self.config.epochs}", "epochs")
        last = end if self.config.max_steps is None else min(end, self.config.max_steps)
        if checkpoint is not None and step == last:
            longer = "raise max_steps or epochs to train longer"
            self.telemetry.note(f"  the checkpoint of step {step} is the end of this run: no step is left to train; {longer}")
        return RunSpan(step, last, checkpoint)

    def choose_kernels(self, draft_config: DraftConfig) -> Kernels:
        loss_pass = LossPass(gradient_dtype=getattr(torch, self.config.loss.gradient_dtype))
        own = Kernels(loss_pass=loss_pass, recompute=self.method.recompute)
        dtype = getattr(torch, compute_dtype(self.ds_config))
        kernels = choose_kernels(self.config.kernels, self.world.device, dtype, draft_config.head_dim, own)
        self_check = SelfCheck.of(self.world, self.config.data.cache_dir, self.telemetry.warn)
        kernels = self_check.sound(kernels, dtype, draft_config.head_dim)
        self.telemetry.note(f"Kernels: {kernels.reason}")
        return kernels

    def start_zero(self, draft: DraftModel, corpus: Corpus, target: Target, span: RunSpan) -> TrainedDraft:
        """Wrap the draft with DeepSpeed, restore its checkpoint, and write the run's record.

        span: the steps of this run; a checkpoint is loaded if some were taken before.
        """
        resolved = resolve_ds_config(
            self.ds_config,
            world_size=self.world.size,
            total_steps=span.last,
            hidden_size=draft.config.hidden_size,
        )
        schedule = schedule_facts(resolved) | {"anneal_steps": self.config.anneal_steps}
        if self.config.anneal_steps:
            schedule["last step"] = span.last
        self.checkpoints = replace(self.checkpoints, schedule=schedule)
        objective = self.method.make_objective(target, corpus.vocab_map)
        checkpoint = span.checkpoint
        form = CheckpointForm.OWN
        if checkpoint is not None:
            stage = self.ds_config.get("zero_optimization", {}).get("stage", 0)
            form = checkpoint.reshape(draft, self.world, stage)
        num_weights = sum(parameter.numel() for parameter in draft.parameters() if parameter.requires_grad)
        zero: TrainedDraft = ZeroDraft(draft, objective, resolved, form)
        self.telemetry.note(f"  optimizer: {zero.optimizer_name}, {span.last} steps")
        advice = stage_advice(self.ds_config, num_weights)
        if advice is not None:
            self.telemetry.note(f"  {advice}")
        if checkpoint is not None:
            self.unlogged = checkpoint.load(zero, self.world)
            how = "" if form == CheckpointForm.OWN else ", converted from another number of ranks or ZeRO stage"
            self.telemetry.note(f"  resumed after step {span.done}{how}")
            changed = checkpoint.changed_schedule(self.checkpoints.schedule)
            if changed is not None:
                self.telemetry.note(f"  {changed}")
        if self.world.is_main:
            (self.output_dir / SUMMARY).unlink(missing_ok=True)  # of an earlier run that had ended
            for name in (SAMPLES, WORK) if checkpoint is None else ():
                (self.output_dir / name).unlink(missing_ok=True)
            write_text(self.output_dir / RECIPE, dump_config(self.config))
            write_json(self.output_dir / "ds_config.json", without_secrets(resolved))
            save_vocab_map(corpus.vocab_map, self.output_dir / VOCAB, corpus.vocab_facts)
        return zero

    def train(
        self, zero: TrainedDraft, corpus: Corpus, target: Target, span: RunSpan, periodic: PeriodicEvaluation | None
    ) -> tuple[str, ...]:
        """Train to the last step, or to the end of `evaluation.patience`.

        Returns why documents of any rank were left out, by the index of the document.
        Raises RunStoppedError, after a checkpoint was saved, if the run was asked to stop before.
        """
        stops = self.config.target.non_finite == "stop"
        watch_settings = WatchSettings(
            aux_layers=target.aux_layers,
            name_of=corpus.name_of,
            stops=stops,
            skips=self.config.checkpoint.on_bad_step == "skip",
            folder=self.output_dir / BAD_STEPS,
            rank=self.world.rank,
            searches_scale=zero.dtype == torch.float16 and not self.ds_config["fp16"].get("loss_scale"),
        )
        watch = FaultWatch(watch_settings, self.telemetry.warn, zero.num_skipped_steps)
        settings = LogSettings(self.output_dir, self.config.log_every_steps, span.done, span.last)
        clock = StepClock(self.world.device, self.config.overlap.traced)
        note = self.telemetry.note
        note_of_node = partial(self.telemetry.note_of_node, local_rank=self.world.local_rank)
        warnings = RunWarnings(
            self.output_dir, self.world, span.done, self.telemetry.warn, self.config.target.store is not None
        )
        schedules = TrainingSchedules(self.training_facts(zero), corpus.loader, target, clock, note)
        with (
            HardwareSampler.open(self.world.device, self.world.local_rank, note_of_node) as hardware,
            self.progress.training(),
            self.telemetry.progress(span.last, "steps") as bar,
            TrainLog(settings, zero, self.world, watch, clock, hardware, warnings) as log,
        ):
            bar.start_at(span.done)
            log.restore(self.unlogged)
            loop = TrainingLoop(
                zero=zero,
                world=self.world,
                span=span,
                normalise=Normaliser(zero.objective, zero.forward, self.world),
                open_schedule=schedules.open,
                log=log,
                bar=bar,
                progress=self.progress,
                agreement=StopAgreement(self.world, self.progress, self.output_dir),
                writer=self.checkpoint_writer(zero, corpus, target, periodic),
                every_steps=self.config.checkpoint.every_steps,
                annealing=Annealing(span.last, self.config.anneal_steps),
            )
            try:
                if periodic is not None:
                    self.train_and_evaluate(loop, periodic)
                elif span.done < span.last:
                    loop.run(Segment(span.done + 1, span.last))
            except NonFiniteError:
                loop.writer.wait_until_complete()  # from which the user will resume
                raise
            with self.progress.pause():
                loop.writer.finish()
        self.telemetry.note(f"  {loop.writer.summary()}")
        if isinstance(target, FrozenTarget) and log.split_ratio is not None:
            self.telemetry.note(f"  overlap.placement=split would balance with {log.split_ratio}")
        if self.config.overlap.traced is not None:
            events = target.calls.call("trace") if isinstance(target, RemoteTarget) else []
            write_trace(self.output_dir / TRACE, clock, self.world, events)
        left_out: dict[int, str] = {}
        for own in self.world.gather(watch.left_out):
            left_out |= own
        return tuple(problem for _, problem in sorted(left_out.items()))

    def checkpoint_writer(
        self, zero: TrainedDraft, corpus: Corpus, target: Target, periodic: PeriodicEvaluation | None
    ) -> CheckpointWriter:
        """Return the writer of the run's checkpoints; a collective."""
        checkpoints = self.checkpoints
        if periodic is not None:
            checkpoints = replace(checkpoints, best_step=periodic.best_step)
        export = None
        if self.config.checkpoint.export and self.config.checkpoint.every_steps:
            draft_config = zero.draft.config
            embed_weight_VD = self.shipped_embedding(draft_config, target)
            if embed_weight_VD is not None:  # rank 0 writes it in the background
                embed_weight_VD = embed_weight_VD.cpu() if self.world.is_main else None
            further_bytes = draft_config.vocab_size * draft_config.hidden_size * zero.dtype.itemsize
            export = DraftExport(
                partial(self.method.export, config=draft_config, vocab_map=corpus.vocab_map, embed_weight_VD=embed_weight_VD),
                0 if embed_weight_VD is None else further_bytes,
            )
        timeout_s = self.config.parallel.timeout_s / 2
        return CheckpointWriter(checkpoints, zero, self.world, self.telemetry.warn, timeout_s, export)

    def train_and_evaluate(self, loop: TrainingLoop, periodic: PeriodicEvaluation) -> None:
        """Train to the last step, or until `evaluation.patience` ends the run, with an evaluation after each segment."""
        step = loop.span.done
        with loop.pause():
            periodic.catch_up(step)
        while step < periodic.end_step:
            loop.annealing = replace(loop.annealing, last=periodic.end_step)
            segment = Segment.after(step, self.config.evaluation.every_steps, periodic.end_step)
            loop.run(segment)
            step = segment.last
            loop.stop_if_asked(step)
            with loop.pause():
                is_best = periodic.evaluate(step)
            if is_best or step == periodic.end_step:
                loop.save(step)
        loop.log.finish(step)

    def write_work(self, zero: TrainedDraft, corpus: Corpus, span: RunSpan) -> None:
        """Write the work of a step for the report, on rank 0. A failure is a warning."""
        if not self.world.is_main or span.done == span.last:
            return
        target_ranks = 0 if self.bridge is None else self.bridge.sides.num_target
        try:
            work = StepWork.of(self.training_facts(zero), corpus.loader, target_ranks)
            work.write(self.output_dir / WORK)
        except Exception as error:  # a draft method of a plugin may count wrongly, which must not end the run
            self.telemetry.warn(f"  {WORK} was not written: {type(error).__name__}: {error}")

    def write_samples(self, evaluator: Evaluator | None, step: int) -> None:
        """Write replies of the draft that was measured last, on rank 0. A failure is a warning. step: of the draft."""
        if evaluator is None or not self.world.is_main:
            return
        try:
            write_samples(self.output_dir / SAMPLES, evaluator.samples, step)
        except Exception as error:  # the tokenizer may be code of the checkpoint
            self.telemetry.warn(f"  {SAMPLES} was not written: {type(error).__name__}: {error}")

    def write_page(self) -> None:
        """Write the report of the run so far. A page that cannot be written is a warning."""
        if not self.world.is_main:
            return
        try:
            write_run_page([self.output_dir], self.output_dir / PAGE)
        except (ValueError, OSError, ArithmeticError, LookupError, TypeError) as error:
            self.telemetry.warn(f"  {PAGE} was not written: {type(error).__name__}: {error}")

    def write_card(self) -> None:
        """Write the model card of the exported draft, on rank 0. A failure is a warning."""
        try:
            write_model_card(self.output_dir, self.output_dir / DRAFT)
        except (ValueError, OSError, LookupError, TypeError) as error:
            self.telemetry.warn(f"  the model card was not written: {type(error).__name__}: {error}")

    def training_facts(self, zero: TrainedDraft) -> Training:
        return Training(
            config=self.config,
            ds_config=self.ds_config,
            world=self.world,
            method=self.method,
            draft=zero.draft.config,
            dtype=zero.dtype,
            num_predictions=zero.objective.num_steps,
            count_target=self.count_target,
        )

    def periodic_evaluation(
        self,
        zero: TrainedDraft,
        corpus: Corpus,
        target: Target,
        evaluator: Evaluator | None,
        held_out: HeldOutData | None,
        span: RunSpan,
    ) -> PeriodicEvaluation | None:
        """Return the evaluation during training; None = the recipe asks for none."""
        section = self.config.evaluation
        if not section.every_steps:
            return None
        held_out_loss = None
        if held_out is not None:
            states_from = held_out.target or target
            held_out_loss = HeldOutLoss(zero, self.training_facts(zero), held_out.documents, states_from, self.telemetry)
        read = partial(EvaluationHistory.read, self.output_dir, span.done, section, self.telemetry.warn)
        return PeriodicEvaluation(
            section=section,
            output_dir=self.output_dir,
            world=self.world,
            history=self.world.decide(read),
            last_step=span.last,
            anneal_steps=self.config.anneal_steps,
            export=lambda folder, step: self.export(folder, zero, corpus, target, step).to(target.dtype),
            measure=None if evaluator is None else evaluator.measure_draft,
            keep_samples=partial(self.write_samples, evaluator),
            held_out=held_out_loss,
            monitor=partial(zero.write_monitors, group="evaluation"),
            note=self.telemetry.note,
            write_page=self.write_page,
        )

    def final_draft(
        self, zero: TrainedDraft, corpus: Corpus, target: Target, span: RunSpan, periodic: PeriodicEvaluation | None
    ) -> ServedDraft:
        """Return the draft in `draft`: the best of those that were evaluated during training, or the last one."""
        folder = self.output_dir / DRAFT
        if periodic is None:
            return self.export(folder, zero, corpus, target, span.last)
        best = periodic.history.best
        assert best is not None, "the last step is evaluated"
        self.telemetry.note(f"  {folder}: the draft of step {best.step}; the last one is in {self.output_dir / DRAFT_LAST}")
        return self.method.load(folder, target, zero.dtype, self.world.device, zero.draft.kernels)

    def export(self, folder: Path, zero: TrainedDraft, corpus: Corpus, target: Target, step: int) -> ServedDraft:
        """Export the draft of a step, reload it on every rank and compare its logits with the trained ones.

        Raises NonFiniteError, before an earlier draft is replaced, if a weight is not finite.
        Raises RuntimeError if the logits differ by more than `RELOAD_TOLERANCE`.
        """
        check_finite_weights(zero, self.world, step)
        weights = zero.gathered_weights()
        embed_weight_VD = self.shipped_embedding(zero.draft.config, target)
        if self.world.is_main:
            self.method.export(folder, weights, zero.draft.config, corpus.vocab_map, embed_weight_VD)
        else:
            collections.deque(weights, maxlen=0)
        self.world.barrier()
        if not self.world.shares_output:
            copy_from_main(folder, (WEIGHTS, CONFIG), self.world)
        exported = self.method.load(folder, target, zero.dtype, self.world.device, zero.draft.kernels)
        micro = MicroBatchMaker(self.method, target, zero.dtype, self.world.device)(corpus.sample)
        if micro.num_left_out:
            # The states of left-out documents are zeros, for which any two drafts agree.
            random_TA = torch.randn(micro.target.aux_TA.shape, generator=torch.Generator().manual_seed(0))
            micro = replace(micro, target=replace(micro.target, aux_TA=random_TA.to(micro.target.aux_TA)))
        difference = reload_difference(zero, exported, micro)
        self.telemetry.note(f"  {folder}, reloaded: largest logit difference {difference:.1e}")
        if not difference <= RELOAD_TOLERANCE:
            raise RuntimeError(f"the exported draft does not reproduce the trained one: logits differ by {difference:.3g}")
        return exported

    def shipped_embedding(self, config: DraftConfig, target: Target) -> torch.Tensor | None:
        """Return the target's embedding if exported drafts contain it, otherwise None; a collective."""
        return target.embedding.whole() if self.method.ships_embedding(config) else None

    def served(self, draft: DraftModel, vocab_map: VocabMap, target: Target) -> ServedDraft:
        """Return a copy of the draft in the target's precision, as a server would run it."""
        frozen = copy.deepcopy(draft).to(target.dtype).eval().requires_grad_(False)
        return self.method.serve(frozen, target, vocab_map)


def excerpt(tokenizer: PreTrainedTokenizerBase, document: Document) -> str:
    """Return the beginning of a document's text, quoted."""
    text = tokenizer.decode(document.input_ids[:EXCERPT_TOKENS].tolist())
    return json.dumps(text, ensure_ascii=False) + ("..." if len(document) > EXCERPT_TOKENS else "")


@torch.no_grad()
def reload_difference(zero: TrainedDraft, exported: ServedDraft, micro: MicroBatch) -> float:
    """Return the largest difference between the logits of the trained and the reloaded draft.

    It is taken over all rows and divided by the largest magnitude of the trained logits.
    """
    trained_STU = zero.logits(micro)
    reloaded_STU = exported.logits(micro)
    return ((trained_STU - reloaded_STU).abs().max() / trained_STU.abs().max()).item()
