"""Documents, a target's view of them, and the training-time test against it; all from seeds."""

from dataclasses import dataclass

import torch

from engine.batch import MicroBatch, PackedBatch, TargetOutput
from engine.config.sections import LossSection, TttSection
from engine.models.eagle3.unroll import Teacher, TrainingTimeTest
from engine.models.training_rows import allowed_rows, slots_of
from engine.models.vocab_map import VocabMap
from engine.target.head import TargetHead

VOCAB = 96
HIDDEN = 32
DRAFT_VOCAB = 64
ALIGNMENTS = ("inference", "specforge")
STEPS = (1, 2, 7)
MASKS = {
    "random": lambda length, generator: torch.rand(length, generator=generator) < 0.6,
    "reply": lambda length, generator: torch.arange(length) >= length // 3,
    "two replies": lambda length, generator: (torch.arange(length) // 4) % 2 == 1,
    "none": lambda length, generator: torch.zeros(length, dtype=torch.bool),
    "all": lambda length, generator: torch.ones(length, dtype=torch.bool),
}
LENGTHS = ((1,), (2,), (3,), (23,), (1, 1, 1), (1, 13, 1, 2, 9), (5, 1, 7))


@dataclass(frozen=True)
class Document:
    """One document and what a target would make of each of its positions."""

    ids_T: torch.Tensor
    mask_T: torch.Tensor
    aux_TA: torch.Tensor
    hidden_TD: torch.Tensor


def make_documents(lengths: tuple[int, ...], mask: str, seed: int = 0) -> list[Document]:
    g = torch.Generator().manual_seed(seed)
    return [
        Document(
            torch.randint(VOCAB, (length,), generator=g),
            MASKS[mask](length, g),
            torch.randn(length, 3 * HIDDEN, generator=g),
            2 * torch.randn(length, HIDDEN, generator=g),
        )
        for length in lengths
    ]


def make_batch(documents: list[Document]) -> PackedBatch:
    cu_seqlens = torch.tensor([0, *(len(document.ids_T) for document in documents)]).cumsum(0).int()
    return PackedBatch(torch.cat([d.ids_T for d in documents]), torch.cat([d.mask_T for d in documents]), cu_seqlens)


@dataclass(frozen=True)
class Task:
    """A target's embedding and head, a draft vocabulary and the test against them."""

    ttt: TttSection = TttSection(steps=3)
    loss: LossSection = LossSection()
    seed: int = 1
    device: torch.device = torch.device("cpu")

    def tensor(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed)) * scale).to(self.device)

    @property
    def embed_VD(self) -> torch.Tensor:
        return self.tensor(VOCAB, HIDDEN)

    @property
    def head(self) -> TargetHead:
        return TargetHead(self.tensor(VOCAB, HIDDEN, scale=0.3), temperature=self.loss.temperature)

    @property
    def vocab_map(self) -> VocabMap:
        counts_V = torch.randint(9, (VOCAB,), generator=torch.Generator().manual_seed(5))
        return VocabMap.most_frequent(counts_V, DRAFT_VOCAB).to(self.device)

    @property
    def test(self) -> TrainingTimeTest:
        return TrainingTimeTest(
            self.ttt, self.loss, Teacher(self.head.rows(self.vocab_map.target_ids_U).logits, self.vocab_map)
        )

    def micro(self, documents: list[Document]) -> MicroBatch:
        batch = make_batch(documents)
        allowed_ST = allowed_rows(batch, self.ttt)
        slots_N = slots_of(allowed_ST)
        hidden_ND = torch.cat([document.hidden_TD for document in documents])[slots_N].to(self.device)
        aux_TA = torch.cat([document.aux_TA for document in documents]).to(self.device)
        target = TargetOutput(aux_TA, slots_N.to(self.device), hidden_ND, *self.head.argmax_and_lse(hidden_ND))
        batch = batch.to(self.device)
        return MicroBatch(batch, target, self.embed_VD[batch.input_ids_T], allowed_ST.to(self.device))
