"""Inputs of ancestor attention, and its meaning written out in float64: what every implementation is held to."""

from dataclasses import dataclass

import torch

from engine.kernels import AttentionRows

LENGTHS = {"one document": (13,), "several": (1, 6, 1, 11, 2), "one token": (1,)}
HEADS = {"MHA": (4, 4), "GQA": (6, 2), "MQA": (3, 1)}
QUERIES = {
    "every row": lambda total: torch.arange(total),
    "some rows": lambda total: torch.arange(total)[torch.arange(total) % 3 != 1],
    "the last row alone": lambda total: torch.tensor([total - 1]),
    "none": lambda total: torch.arange(0),
}
ANCESTORS = {"no ancestor": (0, False), "one each": (1, False), "chains": (4, False), "a tree": (3, True)}


@dataclass(frozen=True)
class AttentionCase:
    """Arguments of an ancestor attention; all but `rows` are leaves to be differentiated."""

    query_QHE: torch.Tensor
    key_TGE: torch.Tensor
    value_TGE: torch.Tensor
    extra_keys: list[torch.Tensor]
    extra_values: list[torch.Tensor]
    rows: AttentionRows

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.query_QHE, self.key_TGE, self.value_TGE, *self.extra_keys, *self.extra_values]

    def arguments(self, dtype: torch.dtype | None = None, device: str = "cpu") -> tuple[list, list[torch.Tensor]]:
        """What to call with, and the leaves in it, in another precision or place."""
        leaves = [leaf.detach().to(device, dtype).requires_grad_() for leaf in self.leaves]
        num_extra = len(self.extra_keys)
        moved = [ancestor_Q.to(device) for ancestor_Q in self.rows.ancestors]
        positions = self.rows.position_Q.to(device), self.rows.cu_seqlens.to(device)
        rows = AttentionRows(*positions, tuple(moved), self.rows.is_tree, longest=self.rows.longest)
        return [*leaves[:3], leaves[3 : 3 + num_extra], leaves[3 + num_extra :], rows], leaves


def make_case(lengths, heads, position_Q, ancestors=(0, False), head_dim=10, scale=1.0) -> AttentionCase:
    """lengths: tokens a document. heads: (H, G). ancestors: (A, is_tree)."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (torch.randn(*shape, generator=g) * scale).requires_grad_()

    (num_heads, num_groups), (num_extra, is_tree), num_rows = heads, ancestors, len(position_Q)
    spare = 3  # rows that nobody descends from
    if is_tree:
        chosen = [torch.randint(-1, 2, (num_rows,), generator=g) for _ in range(num_extra)]
    else:
        chosen = [torch.randperm(num_rows + spare, generator=g)[:num_rows].sort().values for _ in range(num_extra)]
    extras = [[draw(num_rows + spare, num_groups, head_dim) for _ in range(num_extra)] for _ in range(2)]
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).int()
    return AttentionCase(
        draw(num_rows, num_heads, head_dim),
        draw(sum(lengths), num_groups, head_dim),
        draw(sum(lengths), num_groups, head_dim),
        *extras,
        AttentionRows(position_Q, cu_seqlens, tuple(chosen), is_tree),
    )


def written_out(query_QHE, key_TGE, value_TGE, extra_keys, extra_values, rows: AttentionRows):
    """One masked softmax for each row and head over the prefix and all extra keys: output [Q, H, E], log-sum-exp [Q, H]."""
    num_rows, num_heads, head_dim = query_QHE.shape
    key_T = torch.arange(key_TGE.shape[0])
    document_T = torch.searchsorted(rows.cu_seqlens, key_T, right=True)
    allowed = [(document_T[rows.position_Q][:, None] == document_T) & (key_T <= rows.position_Q[:, None])]
    for key_MGE, ancestor_Q in zip(extra_keys, rows.ancestors, strict=True):
        allowed.append(torch.arange(key_MGE.shape[0]) == ancestor_Q[:, None])
    allowed_QK = torch.cat(allowed, 1)
    outputs = []
    lses = []
    for head in range(num_heads):
        group = head // (num_heads // key_TGE.shape[1])
        key_KE = torch.cat([key[:, group] for key in (key_TGE, *extra_keys)])
        value_KE = torch.cat([value[:, group] for value in (value_TGE, *extra_values)])
        scores_QK = (query_QHE[:, head] @ key_KE.T / head_dim**0.5).masked_fill(~allowed_QK, -torch.inf)
        outputs.append(scores_QK.softmax(1) @ value_KE)
        lses.append(scores_QK.logsumexp(1))
    return torch.stack(outputs, 1), torch.stack(lses, 1)


def with_gradients(attention, case: AttentionCase, dtype=None, device="cpu") -> tuple[torch.Tensor, torch.Tensor, list]:
    """Output, log-sum-exp and the gradients of every leaf for one direction, drawn from a fixed seed."""
    arguments, leaves = case.arguments(dtype, device)
    output, lse = attention(*arguments)
    direction = torch.randn(case.query_QHE.shape, generator=torch.Generator().manual_seed(1)).to(output)
    grads = torch.autograd.grad((output * direction).sum(), leaves, allow_unused=True)
    return output.detach().cpu(), lse.detach().cpu(), [None if grad is None else grad.cpu() for grad in grads]
