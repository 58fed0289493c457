"""Evaluations during a run: which draft is the best so far, and since when no draft has been better."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.config.sections import EvaluationSection
from engine.evaluation.acceptance import AcceptanceReport
from engine.host.files import write_text

EVALUATIONS = "evaluations.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """The acceptance that was measured after an optimizer step. Fields as in `AcceptanceReport`.

    draft_tokens, max_new_tokens: of the evaluation section; lengths under other settings are not comparable.
    draft_sha256: checksum of the draft's weights.
    is_kept: whether the draft was the best so far, and therefore became the one in `draft`.
    is_gone: whether it is no longer compared with later ones.
    """

    step: int
    acceptance_length: float
    confidence: float | None
    acceptance_per_depth: list[float | None]
    num_prompts: int
    draft_tokens: int
    max_new_tokens: int
    draft_sha256: str = ""
    is_kept: bool = False
    is_gone: bool = False

    @classmethod
    def of(cls, step: int, report: AcceptanceReport, section: EvaluationSection, draft_sha256: str) -> "Evaluation":
        return cls(
            step=step,
            acceptance_length=report.acceptance_length,
            confidence=report.confidence,
            acceptance_per_depth=report.acceptance_per_depth,
            num_prompts=report.num_prompts,
            draft_tokens=section.draft_tokens,
            max_new_tokens=section.max_new_tokens,
            draft_sha256=draft_sha256,
        )

    def settings(self) -> tuple[int, int, int]:
        return self.num_prompts, self.draft_tokens, self.max_new_tokens


@dataclass
class EvaluationHistory:
    """The evaluations of a run, in order.

    The best draft is the one with the largest acceptance length, and the earliest of equal ones.
    evaluations: those whose drafts can be compared. earlier: those of which `draft` no longer holds
    the best, because a later draft, of steps that are taken again, has replaced it.
    """

    evaluations: list[Evaluation] = field(default_factory=list)
    earlier: list[Evaluation] = field(default_factory=list)

    @classmethod
    def read(cls, output_dir: Path, first_step: int, warn: Callable[[str], None]) -> "EvaluationHistory":
        """Read the evaluations of an earlier run up to its checkpoint. first_step: steps already taken by it.

        Evaluations with other settings than the last one are left out with a warning.
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
        comparable = [evaluation for evaluation in kept if evaluation.settings() == kept[-1].settings()]
        if len(comparable) < len(kept):
            warn(f"  {len(kept) - len(comparable)} evaluations with other settings are not compared with later ones")
            gone += [evaluation for evaluation in kept if evaluation not in comparable]
        is_replaced = any(evaluation.is_kept for evaluation in found if evaluation.step > first_step)
        return cls([], gone + comparable) if is_replaced else cls(comparable, gone)

    @property
    def best(self) -> Evaluation | None:
        """The best evaluation, or None if there is none."""
        return max(self.evaluations, key=lambda evaluation: evaluation.acceptance_length, default=None)

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
        best = max((other.acceptance_length for other in comparable), default=0.0)
        is_best = evaluation.acceptance_length > best
        self.evaluations = [*comparable, replace(evaluation, is_kept=is_best)]
        return is_best

    def write(self, output_dir: Path) -> None:
        """Write all evaluations. Raises WriteError."""
        earlier = [replace(evaluation, is_gone=True) for evaluation in self.earlier]
        lines = [json.dumps(asdict(evaluation)) for evaluation in earlier + self.evaluations]
        write_text(output_dir / EVALUATIONS, "".join(f"{line}\n" for line in lines))

    def num_without_gain(self) -> int:
        """Return the number of evaluations since the best one."""
        best = self.best
        return 0 if best is None else len(self.evaluations) - 1 - self.evaluations.index(best)
