"""DSpark's Markov head: a bias of the logits that depends on the token before.

With `E` the embedding of the token before, [r], and `h` the state of the row, the bias is
`weight @ factor(E, h)`. Kinds: `vanilla`: E. `gated`: sigmoid(gate [h; E]) * E. `rnn`: a state that
runs along the block, `[g; c; o] = joint [s; E; h]`, `s <- sigmoid(g) s + (1 - sigmoid(g)) tanh(c)`,
and the factor is tanh(o).
Source: DSpark (arXiv:2607.05147).
"""

import torch
from torch import Tensor, nn

from engine.kernels import LogitBias
from engine.kernels.matmul import linear
from engine.models.block_drafter.backbone import INITIAL_STD
from engine.models.block_drafter.block_rows import BlockPlan

VANILLA, GATED, RNN = "vanilla", "gated", "rnn"


class _Table(nn.Module):
    """A matrix with a row per token, [V, r], as the checkpoint stores it."""

    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, rank).normal_(std=INITIAL_STD))


class MarkovHead(nn.Module):
    """Bias of the logits of a row that depends on the token before it."""

    def __init__(self, kind: str, vocab_size: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.kind = kind
        self.markov_w1 = _Table(vocab_size, rank)
        self.markov_w2 = _Table(vocab_size, rank)
        if kind == GATED:
            self.gate_proj = nn.Linear(hidden_size + rank, rank)
        if kind == RNN:
            self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def embed(self, token_Q: Tensor) -> Tensor:
        """Return the embeddings of the tokens before, [Q, r]."""
        return nn.functional.embedding(token_Q, self.markov_w1.weight)

    def step(self, embed_Qr: Tensor, hidden_QD: Tensor, state_Qr: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the factors of rows, [Q, r], and the state after them; `rnn` begins a block with the state None."""
        if self.kind == VANILLA:
            return embed_Qr, None
        if self.kind == GATED:
            gate_Qr = torch.sigmoid(self._project(self.gate_proj, torch.cat((hidden_QD, embed_Qr), -1)))
            return gate_Qr * embed_Qr, None
        if state_Qr is None:
            state_Qr = torch.zeros_like(embed_Qr)
        joint = self._project(self.joint_proj, torch.cat((state_Qr, embed_Qr, hidden_QD), -1))
        gate_Qr, candidate_Qr, out_Qr = joint.chunk(3, -1)
        gate_Qr = torch.sigmoid(gate_Qr)
        state_Qr = gate_Qr * state_Qr + (1 - gate_Qr) * torch.tanh(candidate_Qr)
        return torch.tanh(out_Qr), state_Qr

    def _project(self, layer: nn.Linear, x_QK: Tensor) -> Tensor:
        return linear(x_QK, layer.weight) + layer.bias

    def bias(self, plan: BlockPlan, hidden_RD: Tensor, previous_R: Tensor) -> LogitBias:
        """Return the bias of the rows with loss. previous_R: int64, the token before each row's label.

        The rows of each block must be its first ones, without gaps, as the prefix rule makes them.
        """
        embed_Rr = self.embed(previous_R)
        if self.kind != RNN:
            factor_Rr, _ = self.step(embed_Rr, hidden_RD, None)
            return LogitBias(factor_Rr, self.markov_w2.weight)
        return LogitBias(self._along_blocks(plan, hidden_RD, embed_Rr), self.markov_w2.weight)

    def _along_blocks(self, plan: BlockPlan, hidden_RD: Tensor, embed_Rr: Tensor) -> Tensor:
        """Run `rnn` from row to row, all blocks at once."""
        block_R = plan.block_P[plan.loss_row_R]
        factors: list[Tensor] = []
        rows: list[Tensor] = []
        state_Nr: Tensor | None = None
        num_predictions = int(plan.prediction_R.max()) + 1 if len(block_R) else 1
        for prediction in range(num_predictions):
            row_Q = (plan.prediction_R == prediction).nonzero().flatten()
            before_Qr = None if state_Nr is None else state_Nr[block_R[row_Q]]
            factor_Qr, after_Qr = self.step(embed_Rr[row_Q], hidden_RD[row_Q], before_Qr)
            assert after_Qr is not None, "rnn has a state"
            empty_Nr = after_Qr.new_zeros(len(plan.anchor_N), after_Qr.shape[1])
            state_Nr = empty_Nr.index_copy(0, block_R[row_Q], after_Qr)
            factors.append(factor_Qr)
            rows.append(row_Q)
        order_R = torch.cat(rows).argsort()
        return torch.cat(factors)[order_R]


class ConfidenceHead(nn.Module):
    """Logit of the probability that the token of a row is accepted."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        """Create it. rank: features of the Markov head's embedding, which the head reads too; 0 = it does not."""
        super().__init__()
        self.reads_embedding = rank > 0
        self.proj = nn.Linear(hidden_size + rank, 1)

    def forward(self, hidden_QD: Tensor, embed_Qr: Tensor) -> Tensor:
        """Return the logit of each row, [Q]."""
        x_QK = torch.cat((hidden_QD, embed_Qr), -1) if self.reads_embedding else hidden_QD
        return nn.functional.linear(x_QK, self.proj.weight, self.proj.bias)[:, 0]
