"""Initial weights of a draft that are derived from its target."""

import torch

from engine.models.eagle3.draft import Eagle3Draft

ROWS_PER_CHUNK = 16384


@torch.no_grad()
def start_from_target(draft: Eagle3Draft, embed_weight_VD: torch.Tensor | None, head_weight_UD: torch.Tensor | None) -> None:
    """Initialise the draft's embedding projection or LM head from its target.

    embed_weight_VD: the target's embedding. If the widths differ, the draft projects it on its
        leading singular directions, the best projection of that rank.
    head_weight_UD: rows of the target's LM head for the draft vocabulary, copied into `lm_head` if
        the widths agree; None keeps the random initialisation.
    """
    if draft.embed_projection is not None:
        assert embed_weight_VD is not None, "a draft with a projection starts from the target's embedding"
        draft.embed_projection.weight.copy_(_leading_directions(embed_weight_VD, draft.config.hidden_size))
    elif head_weight_UD is not None:
        draft.lm_head.weight.copy_(head_weight_UD)


def _leading_directions(weight_VD: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the `rank` leading right singular vectors of a [V, D] table, [rank, D].

    Rows beyond D are zero.
    """
    gram_DD = sum(rows_ND.T @ rows_ND for rows_ND in map(torch.Tensor.double, weight_VD.split(ROWS_PER_CHUNK)))
    directions_DD = torch.linalg.eigh(gram_DD).eigenvectors.flip(1).T[:rank]
    padded = torch.zeros(rank, weight_VD.shape[1], dtype=torch.float64, device=weight_VD.device)
    padded[: directions_DD.shape[0]] = directions_DD
    return padded.to(weight_VD.dtype)
