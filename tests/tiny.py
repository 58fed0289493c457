"""A draft of a few thousand weights, what it is compared with, and micro-batches, all made from seeds."""

import torch

from engine.batch import MicroBatch, PackedBatch, TargetOutput
from engine.config.sections import LossSection, TttSection
from engine.kernels import PLAIN, Kernels
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_config import Eagle3Config
from engine.models.eagle3.unroll import Teacher, TrainingTimeTest
from engine.models.training_rows import allowed_rows, slots_of
from engine.models.vocab_map import VocabMap

VOCAB = 96
DRAFT_VOCAB = 64
HIDDEN = 32


def make_draft(*, hidden_size: int = HIDDEN, seed: int = 0, kernels: Kernels = PLAIN) -> Eagle3Draft:
    """A draft with random weights; narrower than its target if `hidden_size` is below 32, with a frozen projection then."""
    config = Eagle3Config(
        hidden_size=hidden_size,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=1,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        vocab_size=VOCAB,
        draft_vocab_size=DRAFT_VOCAB,
        target_hidden_size=HIDDEN,
        aux_layers=(1, 2, 3),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        fc_norm=False,
        norm_output=False,
        dtype="float32",
    )
    torch.manual_seed(seed)
    draft = Eagle3Draft(config, kernels)
    if draft.embed_projection is not None:
        draft.embed_projection.requires_grad_(False)
    return draft


def make_test(*, steps: int = 3, **loss: object) -> TrainingTimeTest:
    """A training-time test against a random head; `loss`: fields of LossSection."""
    ids_U = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:DRAFT_VOCAB].sort().values
    in_draft_V = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, ids_U, True)
    head_UD = _head_VD()[ids_U]
    teacher = Teacher(lambda hidden_QD: hidden_QD.float() @ head_UD.T, VocabMap(ids_U, in_draft_V))
    return TrainingTimeTest(TttSection(steps=steps), LossSection(**loss), teacher)


def make_micro(
    test: TrainingTimeTest, *, seed: int, lengths: tuple[int, ...] = (17, 23), masked: bool = False, dtype=torch.float32
) -> MicroBatch:
    """Documents of these lengths whose first third is the prompt; `masked`: nobody's reply, so no row carries loss."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).int()
    num_tokens = sum(lengths)
    mask_T = torch.cat([torch.arange(length) >= length // 3 for length in lengths]) & (not masked)
    batch = PackedBatch(torch.randint(VOCAB, (num_tokens,), generator=generator), mask_T, cu_seqlens)
    allowed_ST = allowed_rows(batch, test.ttt)
    slots_N = slots_of(allowed_ST)
    last_hidden_ND = torch.randn(slots_N.numel(), HIDDEN, generator=generator)
    logits_NV = last_hidden_ND @ _head_VD().T
    aux_TA = torch.randn(num_tokens, 3 * HIDDEN, generator=generator)
    embed_TD = torch.randn(num_tokens, HIDDEN, generator=generator)
    target = TargetOutput(aux_TA.to(dtype), slots_N, last_hidden_ND, logits_NV.argmax(-1).int(), logits_NV.logsumexp(-1))
    return MicroBatch(batch, target, embed_TD.to(dtype), allowed_ST)


def _head_VD() -> torch.Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(2)) / 4
