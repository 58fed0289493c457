"""The draft's loss on held-out conversations: sums over packed batches, and what follows from them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import DraftOutput
from engine.evaluation.acceptance import FEWEST_PROMPTS, students_quantile

PER_STEP = 4  # sums per prediction: loss, allowed rows, correct rows, acceptance rates
ALLOWED = 1  # index of the allowed rows among them


@dataclass(frozen=True)
class HeldOutReport:
    """Results on held-out conversations, with the loss and the rates of training.

    loss: weighted sum over the predictions. With the KL loss of EAGLE-3, and with a block drafter, it is
    that of training, as if all documents were one batch; other losses are means over batches, weighted
    by their slots.
    loss_per_step, accuracy_per_step, acceptance_rate_per_step: of each prediction.
    acceptance_length: simulated, 1 + a0 + a0 * a1 + ... of the acceptance rates.
    loss_confidence, acceptance_length_confidence: half the width of the 95% confidence interval,
    from the spread over packed batches; None with fewer than `FEWEST_PROMPTS`.
    """

    loss: float
    loss_per_step: list[float]
    accuracy_per_step: list[float]
    acceptance_rate_per_step: list[float]
    acceptance_length: float
    loss_confidence: float | None
    acceptance_length_confidence: float | None
    num_documents: int


def batch_sums(output: DraftOutput, divisor: Tensor, num_normalised: int | Tensor) -> Tensor:
    """Return the sums of one batch, fp64 [4 S + 1], from which `held_out_report` computes everything.

    divisor: by which the loss of the output was divided.
    num_normalised: this batch's share of it, as `loss_share` returns it.
    """
    rows = (output.loss_S * divisor, output.num_allowed_rows_S, output.num_correct_S, output.accepted_S)
    share = output.loss_S.new_zeros(1, dtype=torch.float64) + num_normalised
    return torch.cat([*(row.double() for row in rows), share])


def held_out_report(sums_BX: Tensor, step_weights: list[float], num_documents: int) -> HeldOutReport | None:
    """Return the results of all batches, or None if no batch has a row that the mask allows.

    sums_BX: fp64 [batches, 4 S + 1] on the host, results of `batch_sums`.
    step_weights: weight of each prediction in the loss.
    """
    num_rows_B = sums_BX[:, :-1].view(len(sums_BX), PER_STEP, -1)[:, ALLOWED].sum(1)
    sums_BX = sums_BX[num_rows_B > 0]  # the last step is filled with documents that carry no loss
    if not len(sums_BX):
        return None
    weights_S = torch.tensor(step_weights, dtype=torch.float64)
    loss_S, accuracy_S, rate_S = _means(sums_BX.sum(0))

    def loss_of(sums_X: Tensor) -> float:
        return (_means(sums_X)[0] * weights_S).sum().item()

    def length_of(sums_X: Tensor) -> float:
        return _simulated_length(_means(sums_X)[2])

    return HeldOutReport(
        loss=(loss_S * weights_S).sum().item(),
        loss_per_step=loss_S.tolist(),
        accuracy_per_step=accuracy_S.tolist(),
        acceptance_rate_per_step=rate_S.tolist(),
        acceptance_length=_simulated_length(rate_S),
        loss_confidence=jackknife_half_width(sums_BX, loss_of),
        acceptance_length_confidence=jackknife_half_width(sums_BX, length_of),
        num_documents=num_documents,
    )


def _means(sums_X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, accuracy and acceptance rate of each prediction, [S]."""
    loss_S, allowed_S, correct_S, accepted_S = sums_X[:-1].view(PER_STEP, -1)
    num_rows_S = allowed_S.clamp_min(1)
    return loss_S / sums_X[-1], correct_S / num_rows_S, accepted_S / num_rows_S


def _simulated_length(rate_S: Tensor) -> float:
    return 1 + rate_S.cumprod(0).sum().item()


def jackknife_half_width(sums_BX: Tensor, statistic: Callable[[Tensor], float]) -> float | None:
    """Return half the width of the 95% confidence interval of a statistic of sums, or None with too few batches.

    The statistic is computed once without each of the batches; its standard error follows from the
    spread of these values.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 11.
    """
    num_batches = len(sums_BX)
    if num_batches < FEWEST_PROMPTS:
        return None
    without_each = torch.tensor([statistic(sums_X) for sums_X in sums_BX.sum(0) - sums_BX], dtype=torch.float64)
    squared_error = (num_batches - 1) * without_each.var(correction=0)
    return students_quantile(num_batches - 1) * squared_error.sqrt().item()
