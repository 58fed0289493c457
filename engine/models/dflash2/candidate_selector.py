"""DFlash2's candidate selector: it rescores the most likely tokens of a row, given the token before.

With `U` the logits of a row, its `K` most likely tokens are candidates. Candidate `c` after token `p` has the
score `U[c] + <predecessor[p] * (projection h), successor[c]>`.
"""

import torch
from torch import Tensor, nn

from engine.kernels.matmul import linear
from engine.models.block_drafter.backbone import INITIAL_STD


class CandidateSelector(nn.Module):
    """Codebooks of tokens, [V, r], and a projection of the row's state, [r, D]."""

    def __init__(self, vocab_size: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.empty(vocab_size, rank).normal_(std=INITIAL_STD))
        self.successor_codebook = nn.Parameter(torch.zeros(vocab_size, rank))
        self.hidden_projection = nn.Linear(hidden_size, rank, bias=False)

    def scores(self, logits_QK: Tensor, candidate_QK: Tensor, previous_Q: Tensor, hidden_QD: Tensor) -> Tensor:
        """Return the scores of candidates, [Q, K].

        logits_QK: their logits. candidate_QK, previous_Q: int64, candidates, and the token before each row.
        """
        query_Qr = self._queries(previous_Q, hidden_QD)
        successor_QKr = nn.functional.embedding(candidate_QK, self.successor_codebook)
        return logits_QK + torch.einsum("qr,qkr->qk", query_Qr, successor_QKr)

    def all_scores(self, previous_Q: Tensor, hidden_QD: Tensor) -> Tensor:
        """Return what is added to the logits of all tokens, [..., V]."""
        return self._queries(previous_Q, hidden_QD).float() @ self.successor_codebook.float().T

    def _queries(self, previous_Q: Tensor, hidden_QD: Tensor) -> Tensor:
        state_Qr = linear(hidden_QD.flatten(0, -2), self.hidden_projection.weight).unflatten(0, hidden_QD.shape[:-1])
        return nn.functional.embedding(previous_Q, self.predecessor_codebook) * state_Qr
