"""Rows of a shared embedding are exchanged once per forward where the target reads them as the draft does."""

import torch
from torch import nn

from engine.data.packing import collate
from engine.parallel.mesh import TargetMesh
from engine.target.embedding import gives_rows
from engine.target.frozen import FrozenTarget
from tests.distributed import run_ranks
from tests.parallel.families import tiny_model
from tests.parallel.family_matrix import AUX, LENGTHS, as_documents


def exchanged(world, families: tuple[str, ...]) -> dict[str, tuple[torch.Tensor | None, torch.Tensor]]:
    """Rows that a forward hands on, and those that the embedding gives."""
    found = {}
    mesh = TargetMesh.make(world, 2, 1)
    for family in families:
        target = FrozenTarget(tiny_model(family), AUX, mesh=mesh)
        batch = collate(as_documents(world.rank))
        output = target(batch, torch.arange(sum(LENGTHS[world.rank])))
        found[family] = output.embed_TD, target.embedding.rows(batch.input_ids_T)
    return found


def test_rows_that_a_forward_exchanged_are_handed_on_where_they_are_those_of_the_table():
    for found in run_ranks(exchanged, 2, ("llama", "qwen3_moe", "gemma3_text")):
        for family in ("llama", "qwen3_moe"):
            handed_TD, rows_TD = found[family]
            assert torch.equal(handed_TD, rows_TD)
        handed_TD, _ = found["gemma3_text"]
        assert handed_TD is None, "Gemma's embedding scales them"


def test_an_embedding_that_changes_its_rows_is_recognised():
    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    assert gives_rows(nn.Embedding(3, 2)) and not gives_rows(Scaled(3, 2))
