"""Trees hold the most likely paths of a draft, as a search over all paths finds them."""

import itertools

import pytest
import torch

from engine.config.strict import ConfigError
from engine.config.tree_shape import TreeShape
from engine.models.drafter import ROOT, TokenTree
from engine.models.tree_growth import TreeGrowth

VOCAB = 9


def probabilities(path: tuple[int, ...], root: int) -> torch.Tensor:
    """The distribution that a made-up draft gives after a path."""
    seed = root + 1
    for token in path:
        seed = (seed * 31 + token + 7) % 2**31
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def grow(shape: TreeShape, num_roots: int) -> list[TokenTree]:
    growth = TreeGrowth(shape)
    rows = [[()] for _ in range(num_roots)]
    for step in range(shape.num_steps):
        if step:
            token_QK, parent_QK = growth.next_rows()
            rows = [
                [(*rows[root][parent], token) for token, parent in zip(tokens, parents, strict=True)]
                for root, (tokens, parents) in enumerate(zip(token_QK.tolist(), parent_QK.tolist(), strict=True))
            ]
            check_ancestors(growth.ancestors, rows, shape)
        best = [probabilities(path, root).topk(shape.topk) for root, paths in enumerate(rows) for path in paths]
        growth.add(torch.stack([one.values for one in best]), torch.stack([one.indices for one in best]))
    return growth.candidates().trees(shape.num_nodes)


levels: list = []


def check_ancestors(ancestors, rows, shape) -> None:
    """The rows that are named at earlier levels hold the beginnings of each row's path."""
    level = len(ancestors)
    if level == 0:
        levels.clear()
    levels.append(rows)
    for root, paths in enumerate(rows):
        for row, path in enumerate(paths):
            named = [levels[earlier][root][ancestors[earlier][root, row]] for earlier in range(level)]
            if shape.rule == "ancestors":
                assert named == [path[: earlier + 1] for earlier in range(level)]
            else:
                assert [ancestors[earlier][root, row] for earlier in range(level)] == [row] * level


def expected(shape: TreeShape, root: int) -> set[tuple[int, ...]]:
    """The paths of EAGLE-2's tree, by sorting whole lists."""
    topk = shape.topk
    scored: dict[tuple[int, ...], float] = {}
    level: list[tuple[int, ...]] = [()]
    for _ in range(shape.num_steps):
        children = []
        for path in level:
            best = probabilities(path, root).topk(topk)
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                scored[(*path, token)] = scored.get(path, 1.0) * value
                children.append((*path, token))
        level = sorted(children, key=scored.__getitem__, reverse=True)[:topk]
    return set(sorted(scored, key=scored.__getitem__, reverse=True)[: shape.num_nodes])


def paths_of(tree: TokenTree) -> set[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.token_ids, tree.parents, strict=True):
        paths.append((token,) if parent == ROOT else (*paths[parent], token))
    return set(paths)


SIZES = [(1, 1, None), (4, 1, None), (1, 3, 4), (2, 3, 2), (2, 3, 13), (4, 2, 7), (3, 5, 20), (5, 4, 16)]


@pytest.mark.parametrize(("sizes", "rule"), [*itertools.product(SIZES, ["ancestors"]), ((4, 3, 9), "sglang")])
def test_a_tree_holds_the_most_likely_paths(sizes, rule):
    shape = TreeShape(*sizes, rule)
    trees = grow(shape, num_roots=3)
    for root, tree in enumerate(trees):
        assert len(tree) == shape.num_nodes and all(parent < node for node, parent in enumerate(tree.parents))
        assert paths_of(tree) == expected(shape, root)
        assert tree.is_chain or not shape.is_chain
    assert len({tuple(tree.token_ids) for tree in trees}) > 1


@pytest.mark.parametrize(
    ("sizes", "key"),
    [
        ((0, 1, None), "num_steps = 0"),
        ((3, 0, None), "topk = 0"),
        ((3, 4, None), "num_draft_tokens = null.*2 to 37"),
        ((3, 1, 5), "num_draft_tokens = 5.*has 4"),
        ((2, 2, 8), "num_draft_tokens = 8.*2 to 7"),
        ((2, 2, 1), "num_draft_tokens = 1"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(sizes, key):
    with pytest.raises(ConfigError, match=key):
        TreeShape(*sizes)


def test_a_draft_whose_probabilities_are_no_numbers_still_gives_a_tree():
    shape = TreeShape(3, 2, 7)
    growth = TreeGrowth(shape)
    growth.add(torch.tensor([[0.5, torch.nan]]), torch.tensor([[1, 2]]))
    for _ in range(2):
        growth.next_rows()
        growth.add(torch.tensor([[torch.nan, 0.2], [0.6, 0.4]]), torch.tensor([[3, 4], [5, 6]]))
    (tree,) = growth.candidates().trees(shape.num_nodes)
    assert tree.depth <= 3 and all(parent < node for node, parent in enumerate(tree.parents))
