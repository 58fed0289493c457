"""What a training step is judged by: loss, top-1 accuracy, acceptance rate, simulated acceptance length.

Rates are over the rows that the mask allows; one whose target lies outside the draft vocabulary counts as wrong and rejected.
"""

import json
from pathlib import Path
from typing import Any

import torch

from engine.batch import DraftOutput
from engine.parallel.mesh import World

COUNTS = ("num_loss_rows_S", "num_allowed_rows_S", "num_correct_S", "accepted_S")


class StepMetrics:
    """Sums over the micro-batches of the steps since the last log; read once, on steps that are logged."""

    def __init__(self, steps: int, step_weights: list[float], device: torch.device) -> None:
        self._weights_S = torch.tensor(step_weights, device=device)
        self._sums = torch.zeros(1 + len(COUNTS), steps, dtype=torch.float64, device=device)

    def add(self, output: DraftOutput) -> None:
        """Count one micro-batch, without a host sync."""
        rows = [output.loss_S.detach(), *(getattr(output, name) for name in COUNTS)]
        self._sums += torch.stack([row.double() for row in rows])

    def read(self, world: World, loss_divisor: int) -> dict[str, Any]:
        """Metrics over all ranks since the last read, then start anew; a collective.

        loss_divisor: what summed micro-batch losses are divided by to give one step's loss.
        """
        loss_S, loss_rows_S, allowed_S, correct_S, accepted_S = world.sum(self._sums)
        loss_S = loss_S / loss_divisor
        rate_S = accepted_S / allowed_S.clamp_min(1)
        metrics = {
            "loss": (loss_S * self._weights_S).sum().item(),
            "loss_per_step": loss_S.tolist(),
            "accuracy_per_step": (correct_S / allowed_S.clamp_min(1)).tolist(),
            "acceptance_rate_per_step": rate_S.tolist(),
            "simulated_acceptance_length": 1 + rate_S.cumprod(0).sum().item(),
            "loss_row_share": (loss_rows_S.sum() / allowed_S.sum().clamp_min(1)).item(),
        }
        self._sums.zero_()
        return metrics


class MetricsFile:
    """`metrics.jsonl`: one JSON object a logged step, appended and flushed as training goes."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Keeps the lines of steps up to `first_step`: a resumed run goes on where its checkpoint stands.

        A line without its end was cut by a kill; no checkpoint came after it, so it is dropped.
        """
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if first_step and path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first_step]
        path.write_text("".join(kept), encoding="utf-8")

    def write(self, metrics: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
