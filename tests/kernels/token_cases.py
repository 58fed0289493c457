"""Inputs of the loss of rows against tokens and target distributions, for all of its implementations."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.kernels import FrozenHead, LogitBias, SlotDistributions, TokenLoss, TokenRows, TokenTerms
from engine.kernels.interface import LogitTransform
from engine.kernels.reference import upcast

ROWS, SLOTS, HIDDEN, VOCAB, RANK = 11, 8, 12, 37, 3
# Terms, and whether there are targets: without a term that needs them, they only say which rows are correct.
PARTS = {
    "cross-entropy": (TokenTerms(), False),
    "weighted cross-entropy": (TokenTerms(0.3), True),
    "KL": (TokenTerms(0.0, 1.0), True),
    "total variation": (TokenTerms(0.0, 0.0, 0.9), True),
    "all": (TokenTerms(0.1, 0.4, 0.9), True),
}
TRANSFORMS = {"raw": LogitTransform(), "scaled": LogitTransform(0.5, None, 0.7), "capped": LogitTransform(1.5, 4.0, 0.7)}
BIASES = ("none", "factor is trained", "both are trained")


def fixed(cross_entropy_R: Tensor) -> Tensor:
    """Return weights that do not depend on the loss."""
    return torch.linspace(0.5, 1.5, len(cross_entropy_R)).to(cross_entropy_R) / max(len(cross_entropy_R), 1)


def by_likelihood(cross_entropy_R: Tensor) -> Tensor:
    """Return weights that depend on the loss."""
    return torch.exp(-cross_entropy_R) / max(len(cross_entropy_R), 1)


WEIGHTS = {"fixed": fixed, "by likelihood": by_likelihood}


@dataclass(frozen=True)
class TokenCase:
    """Arguments of a token loss; leaves: hidden_RD and, with a bias, its two tensors."""

    leaves: tuple[Tensor, ...]
    weight_VD: Tensor
    target_ND: Tensor
    transform: LogitTransform
    terms: TokenTerms
    rows: TokenRows
    has_targets: bool
    trains_bias: bool

    def moved(self, dtype: torch.dtype, device: str = "cpu") -> "TokenCase":
        """Return the case in another precision and place."""
        rows = self.rows
        label_R = None if rows.label_R is None else rows.label_R.to(device)
        return replace(
            self,
            leaves=tuple(leaf.to(device, dtype) for leaf in self.leaves),
            weight_VD=self.weight_VD.to(device, dtype),
            target_ND=self.target_ND.to(device, dtype),
            rows=replace(rows, label_R=label_R, slot_R=rows.slot_R.to(device)),
        )

    def loss(self, token_loss: Callable[..., TokenLoss], *arguments: object) -> tuple[TokenLoss, list[Tensor]]:
        """Return the loss, and the gradients of what is trained."""
        hidden_RD, *of_bias = (leaf.detach().clone().requires_grad_() for leaf in self.leaves)
        trained = [hidden_RD]
        bias = None
        if of_bias:
            factor_Rr, weight_Vr = of_bias
            bias = LogitBias(factor_Rr, weight_Vr.requires_grad_(self.trains_bias))
            trained += of_bias if self.trains_bias else of_bias[:1]
        head = FrozenHead(self.weight_VD, self.transform)
        loss = token_loss(hidden_RD, head, self.rows, self.terms, self._targets(), bias, *arguments)
        return loss, list(torch.autograd.grad(3 * loss.total, trained))

    def _targets(self) -> SlotDistributions | None:
        if not self.has_targets:
            return None

        def logits(hidden_ND: Tensor) -> Tensor:
            return upcast(hidden_ND @ self.weight_VD.T)

        return SlotDistributions(self.target_ND, logits)


def make_case(
    part: str = "all",
    transform: str = "raw",
    bias: str = "none",
    weights: str = "fixed",
    num_rows: int = ROWS,
    vocab: int = VOCAB,
) -> TokenCase:
    """Return rows near enough to their targets that some are correct; several rows share a slot."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g) * scale

    weight_VD = draw(vocab, HIDDEN, scale=0.6)
    target_ND = draw(SLOTS, HIDDEN)
    slot_R = (torch.arange(num_rows) * SLOTS // max(num_rows, 1)).clamp_max(SLOTS - 1)
    if num_rows > 3:
        slot_R[3] = 0  # the next block begins before the last one ends
    leaves = [target_ND[slot_R] + draw(num_rows, HIDDEN, scale=0.3)]
    if bias != "none":
        leaves += [draw(num_rows, RANK), draw(vocab, RANK, scale=0.3)]
    label_R = torch.randint(vocab, (num_rows,), generator=g)
    label_R[::2] = (target_ND @ weight_VD.T).argmax(1)[slot_R[::2]]
    terms, has_targets = PARTS[part]
    rows = TokenRows(label_R, slot_R, WEIGHTS[weights], has_fixed_weights=weights == "fixed")
    is_trained = bias == "both are trained"
    return TokenCase(tuple(leaves), weight_VD, target_ND, TRANSFORMS[transform], terms, rows, has_targets, is_trained)


def results(loss: TokenLoss, grads: list[Tensor]) -> list[Tensor]:
    """Return all numbers of a loss and its gradients."""
    numbers = [loss.total, loss.weight_R, loss.cross_entropy_R, loss.correct_R]
    if loss.kl_R is not None:
        numbers += [loss.kl_R, loss.total_variation_R]
    return [number.detach().cpu() for number in (*numbers, *grads)]
