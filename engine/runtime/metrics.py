"""Metrics of training steps: loss, top-1 accuracy, acceptance rate and simulated acceptance length.

Rates are computed over the rows that the mask allows. A row whose target token lies outside the
draft vocabulary counts as wrong and rejected.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from engine.batch import DraftOutput, to_device
from engine.host.files import finite_or_null, write_whole, writing
from engine.overlap.step_clock import PARTS
from engine.parallel.mesh import PendingSum, World

SCALARS = ("tokens", "left_out_documents")  # counted per micro-batch, not per TTT step
# Measured on the host. joules: energy that was used. peak_s: seconds that the FLOPs would take at the
# peak rate of the rank's device. A rank on which one of them is unknown adds NaN.
ON_HOST = ("joules", "peak_s")
MEASURED = (*ON_HOST, *PARTS)
COUNTS = ("num_loss_rows_S", "num_allowed_rows_S", "num_correct_S", "accepted_S")


def used_memory(device: torch.device) -> int:
    """Return the bytes that this process has used: the most allocated on a GPU, or the host memory that it holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class StepMetrics:
    """Sums over the micro-batches since the last log, kept on the device.

    sums: in the order `loss_S` and `COUNTS`, `SCALARS`, then `MEASURED`, which are added by `start_read`.
    """

    def __init__(self, steps: int, step_weights: list[float], device: torch.device) -> None:
        self._steps = steps
        self._weights_S = torch.tensor(step_weights)
        self._num_row_sums = (1 + len(COUNTS)) * steps
        num_sums = self._num_row_sums + len(SCALARS) + len(MEASURED)
        self.sums = torch.zeros(num_sums, dtype=torch.float64, device=device)
        self._measured = dict.fromkeys(MEASURED, 0.0)

    def add(self, output: DraftOutput, num_tokens: int | torch.Tensor, num_left_out: int | torch.Tensor = 0) -> None:
        """Add one micro-batch, without a host sync.

        num_tokens: tokens of the documents that are trained on. num_left_out: documents left out.
        """
        rows = [output.loss_S.detach(), *(getattr(output, name) for name in COUNTS)]
        self.sums[: self._num_row_sums] += torch.cat([row.double() for row in rows])
        self.sums[self._num_row_sums] += num_tokens
        self.sums[self._num_row_sums + 1] += num_left_out

    def measure(self, values: Mapping[str, float | None]) -> None:
        """Add measurements of this rank, some of `MEASURED`; None = unknown."""
        for name, value in values.items():
            self._measured[name] += math.nan if value is None else value

    def _add_measured(self) -> None:
        own = torch.tensor([self._measured[name] for name in MEASURED], dtype=torch.float64)
        self.sums[-len(MEASURED) :] += to_device(own, self.sums.device)
        self._measured = dict.fromkeys(MEASURED, 0.0)

    def start_read(self, world: World) -> PendingSum:
        """Start to read the sums over all ranks and reset them; a collective without host sync."""
        self._add_measured()
        pending = world.start_sum(self.sums)
        self.sums.zero_()
        return pending

    def state(self) -> torch.Tensor:
        """Return the sums of this rank so far, on the host; waits for the device."""
        self._add_measured()
        return self.sums.cpu()

    def restore(self, sums: torch.Tensor) -> None:
        """Add what `state` has returned; checkpoints of earlier versions may lack the last sums."""
        self.sums[: len(sums)] += sums.to(self.sums.device)

    def values(self, sums: torch.Tensor, loss_divisor: int) -> dict[str, Any]:
        """Return the metrics computed from the sums of `start_read`.

        loss_divisor: divisor that turns the summed micro-batch losses into the mean loss per step.
        """
        per_step = sums[: self._num_row_sums]
        scalars = sums[self._num_row_sums : -len(MEASURED)]
        loss_S, loss_rows_S, allowed_S, correct_S, accepted_S = per_step.view(-1, self._steps)
        loss_S = loss_S / loss_divisor
        rate_S = accepted_S / allowed_S.clamp_min(1)
        return {
            "loss": (loss_S * self._weights_S).sum().item(),
            "loss_per_step": loss_S.tolist(),
            "accuracy_per_step": (correct_S / allowed_S.clamp_min(1)).tolist(),
            "acceptance_rate_per_step": rate_S.tolist(),
            "simulated_acceptance_length": 1 + rate_S.cumprod(0).sum().item(),
            "loss_row_share": (loss_rows_S.sum() / allowed_S.sum().clamp_min(1)).item(),
            **{name: int(scalar) for name, scalar in zip(SCALARS, scalars.tolist(), strict=True)},
        }

    def on_host(self, sums: torch.Tensor) -> dict[str, float | None]:
        """Return the sums of `ON_HOST`; None = unknown on some rank."""
        values = sums[-len(MEASURED) : -len(PARTS)].tolist()
        return {name: None if math.isnan(value) else value for name, value in zip(ON_HOST, values, strict=True)}

    def seconds(self, sums: torch.Tensor, divisor: int) -> dict[str, float]:
        """Return the mean seconds of each of `PARTS`. divisor: number of steps of all ranks."""
        means = sums[-len(PARTS) :] / divisor
        return dict(zip(PARTS, means.tolist(), strict=True))


class MetricsFile:
    """The file `metrics.jsonl`: one JSON object per logged step, flushed after each line.

    last_step: that an earlier run has logged, 0 = none. A resumed run may take some of these steps again.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        """Open the file and keep its lines up to step `first_step`, where a resumed run continues.

        An incomplete line, left by a killed run or a full disk, is dropped. Raises WriteError.
        """
        self.path = path
        kept, self.last_step = lines_until(path, first_step) if first_step and path.exists() else ([], 0)
        self.last_kept_step = max((_step_of(line) or 0 for line in kept), default=0)
        write_whole(path, lambda place: place.write_bytes(b"".join(kept)))

    def write(self, metrics: dict[str, Any]) -> None:
        """Append a line. Non-finite numbers become null, and `non_finite` then counts them."""
        metrics, num_replaced = finite_or_null(metrics)
        if num_replaced:
            metrics["non_finite"] = num_replaced
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics, allow_nan=False) + "\n")


def lines_until(path: Path, last_step: int) -> tuple[list[bytes], int]:
    """Return the whole lines of a file of steps up to `last_step`, and the last step that any line has, 0 = none."""
    kept = []
    last_found = 0
    for line in path.read_bytes().splitlines(keepends=True):
        step = _step_of(line)
        if step is not None:
            last_found = max(last_found, step)
            if step <= last_step:
                kept.append(line)
    return kept, last_found


def _step_of(line: bytes) -> int | None:
    """Return the step of a line, or None if the line is incomplete."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None
