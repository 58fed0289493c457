"""Attention of a target that reads a tree of tokens in one forward, after the tokens in its cache.

A token of the tree attends to the cached tokens, to its ancestors in the tree and to itself. Windows
and chunks are still those of the model family, counted by the position that a token has in its own
path.

Shapes: N tokens of the tree, of which the first is the root; P cached tokens, K = P + N keys.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from engine.batch import to_device
from engine.kernels import AttentionRows, choose_tree_attention
from engine.kernels.packed_attention import Scores, under_mask
from engine.target.attention import attending_with, check_known, tuned_here, tuned_queries

NAME = "tree_of_tokens"
NO_ANCESTOR = -1


@dataclass(frozen=True)
class TreeRow:
    """A tree of tokens that a target reads.

    num_cached: tokens in its cache.
    parents: for each token its parent, which comes before it; that of the root is ignored.
    """

    num_cached: int
    parents: Sequence[int]
    device: torch.device

    @cached_property
    def depth_N(self) -> Tensor:
        """Depth of each token, int64 [N]; 0 for the root."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return to_device(torch.tensor(depths), self.device)

    @cached_property
    def position_N(self) -> Tensor:
        """Position of each token in its sequence, int64 [N]."""
        return self.num_cached + self.depth_N

    @cached_property
    def paths(self) -> list[list[int]]:
        """Tokens from the root to each token, including both."""
        paths = [[0]]
        for token, parent in enumerate(self.parents[1:], start=1):
            paths.append([*paths[parent], token])
        return paths

    @cached_property
    def is_ancestor_NN(self) -> Tensor:
        """Whether a token (row) attends to a token of the tree (column), bool [N, N]."""
        is_ancestor_NN = torch.zeros(len(self.paths), len(self.paths), dtype=torch.bool)
        for token, path in enumerate(self.paths):
            is_ancestor_NN[token, path] = True
        return to_device(is_ancestor_NN, self.device)

    @cached_property
    def rows(self) -> AttentionRows:
        """The keys of each token as `ancestor_attention` takes them: the cached ones, then one ancestor per depth."""
        count = len(self.paths)
        longest = max(map(len, self.paths))
        padded = [path + [NO_ANCESTOR] * (longest - len(path)) for path in self.paths]
        ancestor_AN = to_device(torch.tensor(padded).t().contiguous(), self.device)
        last_N = torch.full((count,), self.num_cached - 1, device=self.device)
        cu_seqlens = to_device(torch.tensor([0, self.num_cached]), self.device)
        return AttentionRows(last_N, cu_seqlens, tuple(ancestor_AN), is_tree=True)


@dataclass(frozen=True)
class TreeMask:
    """The keys that each token of a tree reads in one kind of layer.

    allowed_NK: bool.
    """

    row: TreeRow
    allowed_NK: Tensor

    def __getitem__(self, slices: tuple[Any, ...]) -> "TreeMask":
        """Return the mask with fewer keys or tokens; some families, such as Gemma 4, slice masks of the shape [1, 1, N, K]."""
        return TreeMask(self.row, self.allowed_NK[None, None][slices][0, 0])

    @cached_property
    def reads_whole_cache(self) -> bool:
        """Whether every token reads all cached tokens, and the layer's cache holds all of them."""
        num_cached = self.row.num_cached
        num_tokens = len(self.row.parents)
        is_whole = self.allowed_NK.shape == (num_tokens, num_cached + num_tokens)
        return is_whole and bool(self.allowed_NK[:, :num_cached].all())


_row_of_forward: ContextVar[TreeRow] = ContextVar("the tree that a target is run on")


@contextmanager
def tree_attention(decoder: PreTrainedModel, row: TreeRow) -> Iterator[None]:
    """Context manager in which forwards of `decoder` read the tree `row`.

    The forward has to be given `row.position_N` as its positions.
    """
    token = _row_of_forward.set(row)
    try:
        with attending_with(decoder, NAME), tuned_here(decoder):
            yield
    finally:
        _row_of_forward.reset(token)


def tree_mask(
    *,
    q_length: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[[Any, Any, Tensor, Tensor], Tensor],
    device: torch.device,
    **_: Any,
) -> TreeMask:
    """Return the mask of one kind of layer; Transformers calls it.

    kv_length, kv_offset: keys that the layer's cache returns, and the position of the first one.
    mask_function: the family's own mask, as a function of two positions.
    """
    row = _row_of_forward.get()
    assert q_length == len(row.parents), f"the tree has {len(row.parents)} tokens, the forward {q_length}"
    num_cached = kv_length - q_length
    position_K = torch.cat((torch.arange(kv_offset, kv_offset + num_cached, device=device), row.position_N))
    first = torch.zeros((), dtype=torch.int64, device=device)
    allowed_NK = mask_function(first, first, row.position_N[:, None], position_K[None, :]).expand(q_length, kv_length).clone()
    allowed_NK[:, num_cached:] &= row.is_ancestor_NN
    return TreeMask(row, allowed_NK)


def attend_tree(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **others
) -> tuple[Tensor, None]:
    """Compute the attention of a tree of tokens; Transformers calls it.

    Shapes: query [1, H, N, E], key and value [1, G, K, E] -> [1, N, H, E].
    scaling: factor of the scores; None = E**-0.5. softcap: soft cap of the scores.
    s_aux: [H] sink logits.
    Raises ValueError if a family passes its own mask or an argument that would change the result.
    """
    check_known(module, others)
    if not isinstance(attention_mask, TreeMask):
        raise ValueError(f"{type(module).__name__} makes its own masks, so it cannot read a tree of tokens")
    query = tuned_queries(module, query, attention_mask.row.position_N)
    head_dim = query.shape[-1]
    scores = Scores.of(query, scaling, softcap, s_aux)
    fused = choose_tree_attention(query.device, query.dtype, head_dim)
    is_plain = softcap is None and s_aux is None and value.shape[-1] == head_dim
    if fused is not None and is_plain and attention_mask.reads_whole_cache:
        return attend_ancestors(fused, query[0], key[0], value[0], attention_mask.row, scores.scale)[None], None
    attended_HNF = under_mask(query[0], key[0], value[0], attention_mask.allowed_NK, scores)
    return attended_HNF.transpose(0, 1)[None].contiguous(), None


def attend_ancestors(
    attention: Callable[..., tuple[Tensor, Tensor]],
    query_HNE: Tensor,
    key_GKE: Tensor,
    value_GKE: Tensor,
    row: TreeRow,
    scale: float,
) -> Tensor:
    """Compute the attention of a tree by ancestor attention, [N, H, E]. scale: factor of the scores."""
    head_dim = query_HNE.shape[-1]
    query_NHE = query_HNE.transpose(0, 1) * (scale * head_dim**0.5)  # ancestor attention scales by E**-0.5 itself
    key_KGE = key_GKE.transpose(0, 1)
    value_KGE = value_GKE.transpose(0, 1)
    num_ancestors = len(row.rows.ancestors)
    own_keys = [key_KGE[row.num_cached :]] * num_ancestors
    own_values = [value_KGE[row.num_cached :]] * num_ancestors
    cached = (key_KGE[: row.num_cached], value_KGE[: row.num_cached])
    output_NHE, _ = attention(query_NHE, *cached, own_keys, own_values, row.rows)
    return output_NHE


AttentionInterface.register(NAME, attend_tree)
AttentionMaskInterface.register(NAME, tree_mask)
