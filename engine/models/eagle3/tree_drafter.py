"""Drafting with an EAGLE-3 draft while the target decodes one prompt: a tree of tokens, or a chain."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.config.tree_shape import TreeShape
from engine.models.drafter import TokenTree
from engine.models.eagle3.draft_decoder import DraftDecoder
from engine.models.tree_growth import TreeGrowth

if TYPE_CHECKING:
    from engine.models.eagle3.served_draft import ServedEagle3

ROWS_PER_FORWARD = 512  # of a prompt


class TreeDrafter:
    """Drafter that runs an EAGLE-3 draft from the newest committed token."""

    def __init__(self, draft: "ServedEagle3", shape: TreeShape) -> None:
        self._draft = draft
        self._shape = shape

    def start(self, token_ids: list[int], aux_TA: Tensor) -> None:
        self._decoder = DraftDecoder(self._draft.decoding_weights)
        self.extend(token_ids[1:], aux_TA)

    @torch.inference_mode()
    def extend(self, token_ids: list[int], aux_QA: Tensor) -> None:
        embed_weight_VD = self._draft.embed_weight_VD
        token_Q = torch.tensor(token_ids, device=embed_weight_VD.device)
        aux_QA = aux_QA.to(embed_weight_VD)
        for rows_token_Q, rows_aux_QA in zip(token_Q.split(ROWS_PER_FORWARD), aux_QA.split(ROWS_PER_FORWARD), strict=True):
            output_QD = self._decoder.commit(rows_token_Q, rows_aux_QA)
        self._newest_output_1D = output_QD[-1:]

    @torch.inference_mode()
    def propose(self) -> TokenTree:
        return self._chain() if self._shape.is_chain else self._tree()

    def _chain(self) -> TokenTree:
        """Return a chain. All of its tokens are verified, so their probabilities are not computed."""
        logits_1U, state_1D = self._decoder.predict(self._newest_output_1D)
        tokens = [self._draft.best_id(logits_1U)]
        for step in range(1, self._shape.num_steps):
            output_1D = self._decoder.draft(tokens[-1], state_1D, step, None)
            logits_1U, state_1D = self._decoder.predict(output_1D)
            tokens.append(self._draft.best_id(logits_1U))
        return TokenTree.chain(torch.cat(tokens).tolist())

    def _tree(self) -> TokenTree:
        shape = self._shape
        growth = TreeGrowth(shape)
        logits_QU, state_QD = self._decoder.predict(self._newest_output_1D)
        growth.add(*self._draft.best_ids(logits_QU, shape.topk))
        for step in range(1, shape.num_steps):
            token_1K, parent_1K = growth.next_rows()
            mask_KM = _mask(growth.ancestors, shape.topk, token_1K.device)
            output_KD = self._decoder.draft(token_1K[0], state_QD[parent_1K[0]], step, mask_KM)
            logits_QU, state_QD = self._decoder.predict(output_KD)
            growth.add(*self._draft.best_ids(logits_QU, shape.topk))
        (tree,) = growth.candidates().trees(shape.num_nodes)
        return tree


def _mask(ancestors: list[Tensor], topk: int, device: torch.device) -> Tensor:
    """Return whether the rows of a level attend to the nodes of this and of earlier levels, bool [K, levels * K].

    ancestors: as in `TreeGrowth`.
    """
    own_K = torch.arange(topk, device=device)
    columns = [row_1K[0] + level * topk for level, row_1K in enumerate(ancestors)]
    columns.append(own_K + len(ancestors) * topk)
    mask_KM = torch.zeros(topk, len(columns) * topk, dtype=torch.bool, device=device)
    return mask_KM.scatter_(1, torch.stack(columns, 1), True)
