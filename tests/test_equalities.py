"""What must not change a result: every path of the training-time test, and whole runs of a tiny target and its draft.

Part by part these equalities stand beside the code: the unroll in test_ttt.py, exported tensors in test_export.py, decoding in
test_decode.py, ZeRO stages and ranks in tests/parallel/, resuming in test_checkpoint.py.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from engine.batch import LossNorms, MicroBatch, PackedBatch
from engine.config.sections import DraftSection, LossSection, TargetSection, TttSection
from engine.config.tree_shape import TreeShape
from engine.evaluation.decoding import plain_decode, speculative_decode
from engine.kernels import Kernels, reference
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_config import derive_draft_config
from engine.models.eagle3.export import export_draft, load_draft
from engine.models.eagle3.served_draft import ServedEagle3
from engine.models.eagle3.unroll import Teacher, TrainingTimeTest
from engine.models.training_rows import allowed_rows, slots_of
from engine.models.vocab_map import VocabMap
from engine.target.frozen import FrozenTarget
from tests.models.eagle3.test_unroll import SHAPES, draft_with, gradients
from tests.pairwise import pairwise
from tests.paths import PATHS
from tests.pipelines import prepared
from tests.tasks import Task, make_documents

CPU = torch.device("cpu")
VOCAB_MAP = VocabMap.most_frequent(torch.arange(64), 40)
NORMS = LossNorms(torch.tensor(20.0), torch.full((3,), 20.0))


@pytest.fixture(scope="module")
def target(tiny_target) -> FrozenTarget:
    return FrozenTarget.load(TargetSection(path=str(tiny_target), dtype="float32"), CPU, aux_layers=(0, 1, 3))


def new_draft(target: FrozenTarget, **options: object) -> Eagle3Draft:
    torch.manual_seed(0)
    config = derive_draft_config(target.config, DraftSection(vocab_size=40, **options), target.aux_layers)
    return Eagle3Draft(replace(config, dtype="float32"))


def new_test(target: FrozenTarget) -> TrainingTimeTest:
    head_UD = target.head.rows(VOCAB_MAP.target_ids_U)
    return TrainingTimeTest(TttSection(steps=3), LossSection(), Teacher(head_UD.logits, VOCAB_MAP))


def packs(*lengths: tuple[int, ...]) -> Iterator[PackedBatch]:
    generator = torch.Generator().manual_seed(1)
    for documents in lengths:
        ids_T = torch.randint(4, 64, (sum(documents),), generator=generator)
        mask_T = torch.cat([torch.arange(length) >= 2 for length in documents])
        yield PackedBatch(ids_T, mask_T, torch.tensor([0, *documents]).cumsum(0).int())


def prepare(target: FrozenTarget, batch: PackedBatch) -> MicroBatch:
    allowed_ST = allowed_rows(batch, TttSection(steps=3))
    embed_TD = target.embedding.rows(batch.input_ids_T)
    return MicroBatch(batch, target(batch, slots_of(allowed_ST)), embed_TD, allowed_ST)


def train(target: FrozenTarget, draft: Eagle3Draft, look_ahead: int) -> list[float]:
    """Losses of six optimizer steps."""
    test = new_test(target)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=0.01)
    losses = []
    batches = packs((9, 5), (14,), (3, 3, 8), (7, 7), (12, 2), (13,))
    for micro in prepared(batches, lambda batch: prepare(target, batch), look_ahead):
        loss = test(draft, micro, NORMS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_overlapped_training_is_sequential_training_bit_for_bit(target):
    drafts = [new_draft(target) for _ in range(3)]
    sequential, *overlapped = (train(target, draft, depth) for draft, depth in zip(drafts, (0, 1, 3), strict=True))
    assert all(losses == sequential for losses in overlapped)
    assert len(set(sequential)) == 6
    for weights in zip(*(draft.parameters() for draft in drafts), strict=True):
        assert all(torch.equal(weights[0], weight) for weight in weights[1:])


def test_packed_documents_through_target_and_draft_are_one_document_at_a_time(target):
    draft = new_draft(target)
    test = new_test(target)
    (packed,) = packs((9, 1, 14, 5))
    bounds = packed.cu_seqlens.tolist()
    alone = [
        PackedBatch(packed.input_ids_T[a:b], packed.assistant_mask_T[a:b], torch.tensor([0, b - a], dtype=torch.int32))
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    outputs = [test(draft, prepare(target, batch), NORMS) for batch in (packed, *alone)]
    for name in vars(outputs[0]):
        together, *apart = (getattr(output, name).detach() for output in outputs)
        assert together.any(), name
        torch.testing.assert_close(sum(apart), together, rtol=1e-4, atol=1e-5)


@pairwise(
    indirect=["path"],
    path=PATHS,
    mask=["random", "two replies", "all", "none"],
    shape=["one layer", "two layers, normed output"],
)
def test_packed_documents_on_every_path_are_one_document_at_a_time_on_the_plain_one(path, mask, shape):
    """The plain one runs all rows through the specification. Either may be 2e-5 from float64, see test_ttt.py."""
    plain = draft_with(**SHAPES[shape])
    documents = make_documents((21, 1, 12), mask, 4)
    specification = Kernels(reference.ancestor_attention, reference.vocab_loss)
    norms = (torch.tensor(9.0), torch.ones(7))
    alone = Eagle3Draft(plain.config, specification)
    alone.load_state_dict(plain.state_dict())
    task = Task(TttSection(steps=7, compaction=False))
    apart = [task.test(alone, task.micro([document]), LossNorms(*norms)) for document in documents]
    sum(output.loss for output in apart).backward()

    draft = Eagle3Draft(plain.config, path.kernels()).to(path.device)
    draft.load_state_dict(plain.state_dict())
    task = Task(TttSection(steps=7, compaction=path.compaction), device=path.device)
    packed = replace(task.test, slots_per_chunk=path.slots_per_chunk)(
        draft, task.micro(documents), LossNorms(*(norm.to(path.device) for norm in norms))
    )
    packed.loss.backward()
    for name, column in vars(packed).items():
        torch.testing.assert_close(sum(getattr(output, name) for output in apart), column.cpu(), rtol=1e-5, atol=1e-6)
    together = gradients(draft)
    for name, gradient in gradients(alone).items():
        assert (together[name].cpu() - gradient).norm() <= 4e-5 * gradient.norm(), name


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "fc_norm": True, "norm_output": True}, {"hidden_size": 12}])
def test_a_trained_draft_exported_and_reloaded_decodes_the_same_and_decoding_is_greedy(target, options, tmp_path):
    draft = new_draft(target, **options)
    train(target, draft, look_ahead=0)
    draft.requires_grad_(False)
    export_draft(tmp_path / "draft", draft.state_dict().items(), draft.config, VOCAB_MAP, target.embedding.whole())
    reloaded = load_draft(tmp_path / "draft", embed_weight_VD=target.embedding.whole())
    in_engine = ServedEagle3(draft, VOCAB_MAP, draft.embed(target.embedding.whole()))
    for batch in packs((3,), (8,), (17,)):
        prompt_ids = batch.input_ids_T.tolist()
        plain = plain_decode(target, prompt_ids, 20, ())
        replies = [
            speculative_decode(target, served.drafter(TreeShape(3, 3, 7)), prompt_ids, max_new_tokens=20, eos_ids=())
            for served in (in_engine, reloaded)
        ]
        assert [reply.token_ids for reply in replies] == [plain.token_ids] * 2
        assert replies[0].accepted_per_forward == replies[1].accepted_per_forward
