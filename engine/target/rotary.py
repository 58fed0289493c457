"""Rotary embeddings that depend on the length of a document, for each document of a packed row.

Long-RoPE (arXiv:2402.13753) has one set of factors for forwards up to the length of pretraining,
and another for longer ones. Transformers chooses between them by the largest position of a forward.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.batch import to_device
from engine.models.target_families import rope_kinds
from engine.target.packed_row import row_of_forward


def rotate_by_length(decoder: PreTrainedModel) -> None:
    """Make long-RoPE choose its factors per document in forwards of packed documents only."""
    ropes = [rope for rope in rope_kinds(decoder.config) if rope.get("rope_type") == "longrope"]
    limits = {rope["original_max_position_embeddings"] for rope in ropes}
    for name, module in decoder.named_modules() if limits else ():
        if name.endswith("rotary_emb"):
            _by_length(module, limits)


def _by_length(module: nn.Module, limits: set[int]) -> None:
    """Replace the forward of a rotary embedding by one that chooses frequencies per document.

    limits: lengths above which a document has other frequencies.
    """
    inner = module.forward

    def forward(x: Tensor, position_ids: Tensor, *others, **options) -> tuple[Tensor, Tensor]:
        row = row_of_forward.get(None)
        lengths = torch.tensor(() if row is None else row.lengths, dtype=torch.long)
        passed_L = sum(((lengths > limit).long() for limit in limits), start=torch.zeros_like(lengths))
        kinds = passed_L.unique()
        if len(kinds) < 2 or lengths.sum() != position_ids.shape[-1]:
            return inner(x, position_ids, *others, **options)
        on_host = [(passed_L == kind).repeat_interleave(lengths) for kind in kinds]
        is_own_KT = [to_device(is_own_T, x.device) for is_own_T in on_host]
        # Other documents' positions are zeroed, so that a kind's documents do not look longer.
        tables = [inner(x, position_ids * is_own_T, *others, **options) for is_own_T in is_own_KT]
        cos_1TE, sin_1TE = tables[0]
        for is_own_T, (own_cos, own_sin) in zip(is_own_KT[1:], tables[1:], strict=True):
            is_own_T1 = is_own_T[:, None]
            cos_1TE = torch.where(is_own_T1, own_cos, cos_1TE)
            sin_1TE = torch.where(is_own_T1, own_sin, sin_1TE)
        return cos_1TE, sin_1TE

    module.forward = forward
