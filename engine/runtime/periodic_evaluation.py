"""Evaluation of the draft during training: the best one is kept, and a run may end early."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.config.sections import DRAFT, DRAFT_LAST, EvaluationSection
from engine.evaluation.acceptance import AcceptanceReport
from engine.evaluation.history import Evaluation, EvaluationHistory
from engine.host.checkpoint_files import facts_of
from engine.models.draft_folder import WEIGHTS, copy_draft_folder
from engine.models.draft_method import ServedDraft
from engine.parallel.mesh import World
from engine.runtime.held_out_loss import HeldOutLoss


@dataclass
class PeriodicEvaluation:
    """Exports, measures and compares drafts; every method is a collective.

    last_step: of the run, unless it ends early. anneal_steps: steps between the evaluation that ends a run early, and its end.
    export: writes the draft of a step to a folder and loads it again.
    measure: returns its acceptance, the same on every rank; None = the target does not decode.
    keep_samples: writes some of the replies that were measured, given the step.
    held_out: measures the loss on held-out conversations; None = there are none.
    monitor: writes numbers to the monitors, given the step. note: writes a line to the log.
    write_page: writes the report of the run so far, on rank 0.
    """

    section: EvaluationSection
    output_dir: Path
    world: World
    history: EvaluationHistory
    last_step: int
    anneal_steps: int
    export: Callable[[Path, int], ServedDraft]
    measure: Callable[[ServedDraft], AcceptanceReport] | None
    keep_samples: Callable[[int], None]
    held_out: HeldOutLoss | None
    monitor: Callable[[dict[str, float], int], None]
    note: Callable[[str], None]
    write_page: Callable[[], None]

    @property
    def end_step(self) -> int:
        """Last step of the run, as the evaluations so far decide."""
        patience = self.section.patience
        out_of_patience = None if patience is None else self.history.first_without_gain(patience)
        if out_of_patience is None:
            return self.last_step
        return min(self.last_step, out_of_patience + self.anneal_steps)

    def best_step(self) -> int | None:
        """Return the step of the best draft so far, or None if there is none."""
        best = self.history.best
        return None if best is None else best.step

    def catch_up(self, step: int) -> None:
        """Evaluate a step that an earlier run has saved but not evaluated. step: the last one of that run; 0 = none."""
        best = self.history.best
        if best is not None and best == self.history.last and best.draft_sha256 == self._last_sha256():
            self._keep_last()  # the earlier run may have ended before it had copied the draft
        is_due = step > 0 and (step % self.section.every_steps == 0 or step == self.end_step)
        if is_due and not self.history.has(step):
            self.evaluate(step)
        elif self.end_step < self.last_step:
            self.note(f"  ends after step {max(step, self.end_step)}: {self._why_it_ends}")

    def evaluate(self, step: int) -> bool:
        """Export the draft of a step to `draft_last`, measure it, and keep it as `draft` if it is the best so far.

        Returns whether it is.
        """
        exported = self.export(self.output_dir / DRAFT_LAST, step)
        decoded = None if self.measure is None else self.measure(exported)
        self.keep_samples(step)
        held_out = None if self.held_out is None else self.held_out.measure()
        checksum = 0 if self.held_out is None else self.held_out.checksum
        evaluation = Evaluation.of(step, decoded, held_out, self.section, self._last_sha256(), checksum)
        end_before = self.end_step
        is_best = self.history.add(evaluation)
        if self.world.is_main:
            self.history.write(self.output_dir)
            if step > self.history.last_step:  # monitors have earlier steps already
                self.monitor(evaluation.scalars(), step)
        if is_best:
            self._keep_last()
        self.write_page()
        self.world.barrier()
        best = self.history.best
        assert best is not None, "one was just added"
        compared = "the best so far" if is_best else f"the best so far is {best.describe_score()}"
        self.note(f"  {evaluation.describe()}: {compared}")
        if self.end_step < end_before:
            self.note(f"  ends early, after step {self.end_step}: {self._why_it_ends}")
        return is_best

    @property
    def _why_it_ends(self) -> str:
        return f"{self.section.patience} evaluations brought no better draft"

    def _last_sha256(self) -> str:
        """Return the checksum of the weights in `draft_last`, or "" if there are none."""
        weights = self.output_dir / DRAFT_LAST / WEIGHTS
        return self.world.decide(lambda: facts_of(weights).sha256 if weights.is_file() else "")

    def _keep_last(self) -> None:
        last = self.output_dir / DRAFT_LAST
        if self.world.writes_output and last.is_dir():
            copy_draft_folder(last, self.output_dir / DRAFT)
        self.world.barrier()
