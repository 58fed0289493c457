"""Growth of the trees that autoregressive drafts propose, one level after the other, for many roots at once.

Level 1 holds the `topk` most likely tokens after the root. The draft then reads the `topk` most
likely nodes of a level, and each of them gets `topk` children. How likely a node is, is the product
of the draft's probabilities along its path. At the end, the most likely nodes of all levels are
verified.

Shapes: Q roots, K nodes that are read per level and root, C candidates per root.
Source: EAGLE-2 (arXiv:2406.16858), section 4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config.tree_shape import TreeShape
from engine.models.drafter import ROOT, TokenTree


@dataclass(frozen=True)
class Candidates:
    """All tokens that were drafted after each root, level by level.

    token_QC: int64, target ids. score_QC: fp32, product of the probabilities along the path.
    parent_QC: int64, candidate that each one follows; `ROOT` = the root.
    """

    token_QC: Tensor
    score_QC: Tensor
    parent_QC: Tensor

    def of_steps(self, shape: TreeShape) -> "Candidates":
        """Return the candidates of fewer steps with the same `topk`."""
        count = shape.num_candidates
        return Candidates(self.token_QC[:, :count], self.score_QC[:, :count], self.parent_QC[:, :count])

    def trees(self, num_nodes: int) -> list[TokenTree]:
        """Return the tree of the `num_nodes` most likely candidates of each root.

        A node is at most as likely as its parent and comes after it, so the parent of a chosen node is chosen.
        """
        token_QN = self.token_QC
        parent_QN = self.parent_QC
        if num_nodes < token_QN.shape[1]:
            best_QN = self.score_QC.sort(dim=1, descending=True, stable=True).indices[:, :num_nodes]
            chosen_QN = best_QN.sort(dim=1).values
            token_QN = token_QN.gather(1, chosen_QN)
            parent_QN = self._among(chosen_QN, parent_QN.gather(1, chosen_QN))
        rows = zip(token_QN.tolist(), parent_QN.tolist(), strict=True)
        return [TokenTree(token_ids, parents) for token_ids, parents in rows]

    @staticmethod
    def _among(chosen_QN: Tensor, parent_QN: Tensor) -> Tensor:
        """Return the place of each parent among the chosen candidates."""
        place_QN = torch.searchsorted(chosen_QN, parent_QN)
        return torch.where(parent_QN == ROOT, ROOT, place_QN)


class TreeGrowth:
    """Trees of `shape` that grow by one level at a time.

    ancestors: for each level before the one that is read, the row there whose keys each row attends
    to, int64 [Q, K].
    """

    def __init__(self, shape: TreeShape) -> None:
        self.ancestors: list[Tensor] = []
        self._shape = shape
        self._tokens: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._parents: list[Tensor] = []
        self._read_score_QK = torch.empty(0)  # of the rows that were read last
        self._read_place_QK = torch.empty(0)  # their places among all candidates
        self._num_before_level = 0  # candidates of the levels before the newest one

    def add(self, probability_RK: Tensor, token_RK: Tensor) -> None:
        """Add the children of the rows that were read: Q roots first, then Q * K nodes per level.

        probability_RK: fp32, of the most likely tokens after each row, descending; NaN counts as 0.
        token_RK: int64.
        """
        topk = self._shape.topk
        probability_RK = probability_RK.nan_to_num(0.0)  # else a child could be chosen without its parent
        if not self._tokens:
            self._tokens.append(token_RK)
            self._scores.append(probability_RK)
            self._parents.append(torch.full_like(token_RK, ROOT))
            return
        self._num_before_level = sum(tokens.shape[1] for tokens in self._tokens)
        score_QKK = self._read_score_QK[..., None] * probability_RK.view(-1, topk, topk)
        self._tokens.append(token_RK.view(-1, topk * topk))
        self._scores.append(score_QKK.flatten(1))
        self._parents.append(self._read_place_QK[..., None].expand(-1, -1, topk).flatten(1))

    def next_rows(self) -> tuple[Tensor, Tensor]:
        """Return the tokens of the nodes that are read next, and the rows that they follow, int64 [Q, K] each.

        A row of the level before is a number below K; after the root it is 0.
        """
        score_QC = self._scores[-1]
        is_first_level = len(self._scores) == 1
        if is_first_level or self._shape.topk == 1:
            self._read_score_QK = score_QC
            chosen_QK = torch.arange(score_QC.shape[1], device=score_QC.device).expand_as(score_QC)
        else:
            self._read_score_QK, chosen_QK = score_QC.topk(self._shape.topk, dim=1)
        self._read_place_QK = chosen_QK + self._num_before_level
        token_QK = self._tokens[-1].gather(1, chosen_QK)
        parent_QK = torch.zeros_like(chosen_QK) if is_first_level else chosen_QK // self._shape.topk
        if not is_first_level:
            self._follow(parent_QK)
        return token_QK, parent_QK

    def _follow(self, parent_QK: Tensor) -> None:
        if self._shape.rule == "sglang":
            own_QK = torch.arange(self._shape.topk, device=parent_QK.device).expand_as(parent_QK)
            self.ancestors = [own_QK] * (len(self.ancestors) + 1)
        else:
            self.ancestors = [row_QK.gather(1, parent_QK) for row_QK in self.ancestors] + [parent_QK]

    def candidates(self) -> Candidates:
        """Return all tokens that were drafted."""
        return Candidates(torch.cat(self._tokens, 1), torch.cat(self._scores, 1), torch.cat(self._parents, 1))
