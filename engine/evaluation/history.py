"""Evaluations during a run: which draft is the best so far, and whether the run should end early."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.evaluation.acceptance import AcceptanceReport
from engine.host.files import write_text

EVALUATIONS = "evaluations.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """The acceptance that was measured after an optimizer step. Fields as in `AcceptanceReport`."""

    step: int
    acceptance_length: float
    confidence: float | None
    acceptance_per_depth: list[float | None]
    num_prompts: int

    @classmethod
    def of(cls, step: int, report: AcceptanceReport) -> "Evaluation":
        return cls(step, report.acceptance_length, report.confidence, report.acceptance_per_depth, report.num_prompts)


class EvaluationHistory:
    """The evaluations of a run, in `evaluations.jsonl`; a resumed run continues with those up to its checkpoint.

    The best draft is the one with the largest acceptance length, and the earliest of equal ones.
    """

    def __init__(self, output_dir: Path, first_step: int) -> None:
        """Read the evaluations of an earlier run. first_step: steps already taken by it."""
        self._path = output_dir / EVALUATIONS
        self._evaluations: list[Evaluation] = []
        if first_step and self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                evaluation = Evaluation(**json.loads(line))
                if evaluation.step <= first_step:
                    self._evaluations.append(evaluation)

    @property
    def best(self) -> Evaluation | None:
        """The best evaluation, or None if there is none."""
        return max(self._evaluations, key=lambda evaluation: evaluation.acceptance_length, default=None)

    def add(self, evaluation: Evaluation) -> bool:
        """Add an evaluation and return whether it is the best; one of the same step is replaced. Raises WriteError."""
        self._evaluations = [other for other in self._evaluations if other.step < evaluation.step]
        self._evaluations.append(evaluation)
        return self.best is evaluation

    def write(self) -> None:
        """Write all evaluations. Raises WriteError."""
        write_text(self._path, "".join(json.dumps(asdict(evaluation)) + "\n" for evaluation in self._evaluations))

    def num_without_gain(self) -> int:
        """Return the number of evaluations since the best one."""
        best = self.best
        return 0 if best is None else len(self._evaluations) - 1 - self._evaluations.index(best)
