"""Evaluations during a run: which draft is the best so far, and since when no draft has been better."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.config.sections import ACCEPTANCE, LOSS, SIMULATED_ACCEPTANCE, EvaluationSection
from engine.evaluation.acceptance import AcceptanceReport
from engine.evaluation.held_out import HeldOutReport
from engine.host.files import write_text

EVALUATIONS = "evaluations.jsonl"


def _tree(section: EvaluationSection) -> str:
    shape = section.tree
    return "" if shape.is_chain else f"{shape}, {shape.rule}"


@dataclass(frozen=True)
class Evaluation:
    """What was measured after an optimizer step.

    acceptance_length, confidence, acceptance_per_depth, num_prompts: as in `AcceptanceReport`; None
    and 0 if nothing was decoded.
    draft_tokens: `num_steps` of the evaluation section. tree: its tree in words; empty for a chain.
    max_new_tokens, best_by: of the evaluation section; under other settings results are not comparable.
    held_out_*: as in `HeldOutReport`, and the checksum of the documents; None if there were no held-out conversations.
    draft_sha256: checksum of the draft's weights.
    is_kept: whether the draft was the best so far, and therefore became the one in `draft`.
    is_gone: whether it is no longer compared with later ones.
    """

    step: int
    acceptance_length: float | None
    confidence: float | None
    acceptance_per_depth: list[float | None]
    num_prompts: int
    draft_tokens: int
    max_new_tokens: int
    draft_sha256: str = ""
    is_kept: bool = False
    is_gone: bool = False
    best_by: str = ACCEPTANCE
    held_out_loss: float | None = None
    held_out_loss_confidence: float | None = None
    held_out_loss_per_step: list[float] | None = None
    held_out_accuracy_per_step: list[float] | None = None
    held_out_acceptance_length: float | None = None
    held_out_acceptance_length_confidence: float | None = None
    held_out_documents: int = 0
    held_out_checksum: int = 0
    tree: str = ""

    @classmethod
    def of(
        cls,
        step: int,
        decoded: AcceptanceReport | None,
        held_out: HeldOutReport | None,
        section: EvaluationSection,
        draft_sha256: str,
        held_out_checksum: int = 0,
    ) -> "Evaluation":
        """Return the evaluation of a step.

        decoded, held_out: results; None = not measured. held_out_checksum: of the held-out documents.
        """
        evaluation = cls(
            step=step,
            acceptance_length=None,
            confidence=None,
            acceptance_per_depth=[],
            num_prompts=0,
            draft_tokens=section.num_steps,
            tree=_tree(section),
            max_new_tokens=section.max_new_tokens,
            draft_sha256=draft_sha256,
            best_by=section.best_by,
        )
        if decoded is not None and decoded.num_prompts:
            evaluation = replace(
                evaluation,
                acceptance_length=decoded.acceptance_length,
                confidence=decoded.confidence,
                acceptance_per_depth=decoded.acceptance_per_depth,
                num_prompts=decoded.num_prompts,
            )
        if held_out is not None:
            evaluation = replace(
                evaluation,
                held_out_loss=held_out.loss,
                held_out_loss_confidence=held_out.loss_confidence,
                held_out_loss_per_step=held_out.loss_per_step,
                held_out_accuracy_per_step=held_out.accuracy_per_step,
                held_out_acceptance_length=held_out.acceptance_length,
                held_out_acceptance_length_confidence=held_out.acceptance_length_confidence,
                held_out_documents=held_out.num_documents,
                held_out_checksum=held_out_checksum,
            )
        return evaluation

    @property
    def score(self) -> float:
        """The number by which drafts are compared; larger is better.

        Raises ValueError if it was not measured.
        """
        values = {
            ACCEPTANCE: self.acceptance_length,
            LOSS: self.held_out_loss,
            SIMULATED_ACCEPTANCE: self.held_out_acceptance_length,
        }
        value = values[self.best_by]
        if value is None:
            raise ValueError(f"the evaluation of step {self.step} has nothing for evaluation.best_by={self.best_by}")
        return -value if self.best_by == LOSS else value

    def scalars(self) -> dict[str, float]:
        """Return the results for monitors, by name."""
        named = {
            "acceptance_length": self.acceptance_length,
            "held_out_loss": self.held_out_loss,
            "held_out_acceptance_length": self.held_out_acceptance_length,
        }
        return {name: value for name, value in named.items() if value is not None}

    def settings(self) -> tuple[Any, ...]:
        """Return what must be equal for two scores to be comparable."""
        if self.best_by == ACCEPTANCE:
            return self.best_by, self.num_prompts, self.draft_tokens, self.tree, self.max_new_tokens
        return self.best_by, self.held_out_checksum

    def is_under(self, section: EvaluationSection) -> bool:
        """Return whether the evaluation can be compared with those under the settings of a recipe."""
        if self.best_by != section.best_by:
            return False
        lengths = (self.draft_tokens, self.tree, self.max_new_tokens)
        return self.best_by != ACCEPTANCE or lengths == (section.num_steps, _tree(section), section.max_new_tokens)

    def describe(self) -> str:
        """Return the results in words, for the log."""
        parts = [f"step {self.step}"]
        if self.acceptance_length is not None:
            parts.append(f"acceptance length {self.acceptance_length:.2f}")
        if self.held_out_loss is not None:
            parts.append(f"held-out loss {self.held_out_loss:.3f}")
            parts.append(f"simulated acceptance length {self.held_out_acceptance_length:.2f}")
        return ", ".join(parts)

    def describe_score(self) -> str:
        """Return the compared number in words, for the log."""
        digits = 3 if self.best_by == LOSS else 2
        return f"{abs(self.score):.{digits}f} after step {self.step}"


@dataclass
class EvaluationHistory:
    """The evaluations of a run, in order.

    The best draft is the one with the largest score, and the earliest of equal ones.
    evaluations: those whose drafts can be compared. earlier: those of which `draft` no longer holds
    the best, because a later draft, of steps that are taken again, has replaced it.
    last_step: of the last evaluation of an earlier run, which may be after its checkpoint.
    """

    evaluations: list[Evaluation] = field(default_factory=list)
    earlier: list[Evaluation] = field(default_factory=list)
    last_step: int = 0

    @classmethod
    def read(
        cls, output_dir: Path, first_step: int, section: EvaluationSection, warn: Callable[[str], None]
    ) -> "EvaluationHistory":
        """Read the evaluations of an earlier run up to its checkpoint.

        first_step: steps already taken by it. section: settings of this run.
        Evaluations with other settings than this run's or than the last one are left out with a warning.
        """
        path = output_dir / EVALUATIONS
        if not first_step or not path.exists():
            return cls()
        found = []
        for line in path.read_text(encoding="utf-8").splitlines():
            known: dict[str, Any] = json.loads(line)
            found.append(Evaluation(**known))
        before = [evaluation for evaluation in found if evaluation.step <= first_step]
        gone = [evaluation for evaluation in before if evaluation.is_gone]
        kept = [evaluation for evaluation in before if not evaluation.is_gone]
        alike = [evaluation for evaluation in kept if evaluation.is_under(section)]
        comparable = [evaluation for evaluation in alike if evaluation.settings() == alike[-1].settings()]
        if len(comparable) < len(kept):
            warn(f"  {len(kept) - len(comparable)} evaluations with other settings are not compared with later ones")
            gone += [evaluation for evaluation in kept if evaluation not in comparable]
        is_replaced = any(evaluation.is_kept for evaluation in found if evaluation.step > first_step)
        last_step = max((evaluation.step for evaluation in found), default=0)
        return cls([], gone + comparable, last_step) if is_replaced else cls(comparable, gone, last_step)

    @property
    def best(self) -> Evaluation | None:
        """The best evaluation, or None if there is none."""
        return max(self.evaluations, key=lambda evaluation: evaluation.score, default=None)

    @property
    def last(self) -> Evaluation | None:
        every = self.earlier + self.evaluations
        return every[-1] if every else None

    def has(self, step: int) -> bool:
        """Return whether the draft of a step was evaluated and can be compared."""
        return any(evaluation.step == step for evaluation in self.evaluations)

    def add(self, evaluation: Evaluation) -> bool:
        """Add an evaluation and return whether it is the best. Those with other settings are no longer compared."""
        comparable = [other for other in self.evaluations if other.settings() == evaluation.settings()]
        gone = [other for other in self.evaluations if other.settings() != evaluation.settings()]
        self.earlier += gone
        is_best = all(evaluation.score > other.score for other in comparable)
        self.evaluations = [*comparable, replace(evaluation, is_kept=is_best)]
        return is_best

    def write(self, output_dir: Path) -> None:
        """Write all evaluations. Raises WriteError."""
        earlier = [replace(evaluation, is_gone=True) for evaluation in self.earlier]
        lines = [json.dumps(asdict(evaluation)) for evaluation in earlier + self.evaluations]
        write_text(output_dir / EVALUATIONS, "".join(f"{line}\n" for line in lines))

    def first_without_gain(self, patience: int) -> int | None:
        """Return the step of the first evaluation that is the `patience`-th one in a row without a better draft, or None.

        Earlier evaluations with the settings of the last one count, also if their best draft is gone.
        """
        best_score = -math.inf
        num_without_gain = 0
        last = self.last
        by_step = {evaluation.step: evaluation for evaluation in self.earlier + self.evaluations}  # a later one replaces
        for evaluation in by_step.values():
            if last is None or evaluation.settings() != last.settings():
                continue
            num_without_gain += 1
            if evaluation.score > best_score:
                best_score = evaluation.score
                num_without_gain = 0
            if num_without_gain == patience:
                return evaluation.step
        return None
