"""Block drafters of a few thousand weights, and micro-batches for them, all made from seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.batch import LossNorms, MicroBatch, PackedBatch, TargetOutput
from engine.config.block_sections import DFLASH, DFLASH2, DSPARK, BlockSection, ObjectiveSection
from engine.config.sections import Config, DataSection, DraftSection
from engine.kernels import PLAIN, Kernels
from engine.models.block_drafter.backbone import BlockDraft
from engine.models.block_drafter.block_method import BlockMethod
from engine.models.block_drafter.block_objective import BlockObjective
from engine.models.method_registry import make_method
from engine.models.vocab_map import VocabMap
from engine.target.embedding import TargetEmbedding
from engine.target.head import TargetHead

VOCAB = 96
HIDDEN = 32
NUM_AUX = 2
METHODS = (DFLASH, DSPARK, DFLASH2)
MASK_TOKEN = VOCAB - 1


@dataclass(frozen=True)
class Tables:
    """Embedding and head of a target."""

    embedding: TargetEmbedding
    head: TargetHead

    def head_rows(self, target_ids_U: Tensor) -> TargetHead:
        return self.head.rows(target_ids_U)


def make_tables() -> Tables:
    generator = torch.Generator().manual_seed(2)
    embed_VD = torch.randn(VOCAB, HIDDEN, generator=generator) / 2
    head_VD = torch.randn(VOCAB, HIDDEN, generator=generator) / 4
    return Tables(TargetEmbedding(embed_VD), TargetHead(head_VD))


def make_recipe(method: str, *, objective: dict[str, Any] | None = None, **block: Any) -> Config:
    """A recipe of a draft of two layers, with blocks of five rows at every position; `block`: fields of the section."""
    own = {
        DFLASH: {},
        DSPARK: {"markov_rank": 6},
        DFLASH2: {"conv_group": 8, "selector_rank": 5, "selector_top_k": 12},
    }
    options = {"size": 5, "mask_token_id": MASK_TOKEN, "anchors": None, **own[method]} | block
    return Config(
        data=DataSection(max_tokens=64),
        draft=DraftSection(method=method, num_layers=2),
        block=BlockSection(**options),
        objective=ObjectiveSection(**(objective or {})),
    )


def make_method_of(method: str, **options: Any) -> BlockMethod:
    made = make_method(make_recipe(method, **options))
    assert isinstance(made, BlockMethod)
    return made


def make_config(method: BlockMethod) -> Any:
    extras = {}
    if method.config_type.architecture.startswith("DFlash2"):
        extras = {"conv_taps": method.block.conv_taps, "conv_group": 8, "selector_rank": 5}
        extras["selector_top_k"] = method.block.selector_top_k
    if "DSpark" in method.config_type.architecture:
        extras = {"markov_head": method.block.markov_head, "markov_rank": 6, "has_confidence": method.block.confidence_head}
    return method.config_type(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=2,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        vocab_size=VOCAB,
        num_target_layers=6,
        aux_layers=(1, 3),
        block_size=method.block_size,
        mask_token_id=MASK_TOKEN,
        windows=method.shape.windows,
        is_causal=method.block.causal,
        attention_bias=method.block.attention_bias,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype="float32",
        **extras,
    )


def every_token() -> VocabMap:
    return VocabMap.whole(VOCAB)


def make_draft(method: BlockMethod, kernels: Kernels = PLAIN, seed: int = 0) -> BlockDraft:
    """A draft whose weights are all random, also those that start at zero or one."""
    torch.manual_seed(seed)
    draft = method.new_draft(make_config(method), kernels, make_tables(), every_token())
    for parameter in draft.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    return draft


def make_objective(method: BlockMethod) -> BlockObjective:
    return method.make_objective(make_tables(), every_token())


def make_batch(lengths: tuple[int, ...] = (17, 23), seed: int = 0, document_ids: tuple[int, ...] = ()) -> PackedBatch:
    """Documents of these lengths whose first third is the prompt, with a gap in the mask of the longest ones."""
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for length in lengths:
        mask_T = torch.arange(length) >= length // 3
        if length > 20:
            mask_T[length // 2] = False
        masks.append(mask_T)
    ids_T = torch.randint(VOCAB - 1, (sum(lengths),), generator=generator)
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).int()
    return PackedBatch(ids_T, torch.cat(masks), cu_seqlens, document_ids)


def make_micro(method: BlockMethod, batch: PackedBatch, seed: int = 0, dtype: torch.dtype = torch.float32) -> MicroBatch:
    """The micro-batch of a batch, with random states of the target."""
    generator = torch.Generator().manual_seed(seed)
    tables = make_tables()
    allowed_ST = method.allowed_rows(batch)
    slots_N = method.slots(allowed_ST)
    last_hidden_TD = torch.randn(batch.num_tokens, HIDDEN, generator=generator)
    aux_TA = torch.randn(batch.num_tokens, NUM_AUX * HIDDEN, generator=generator)
    last_hidden_ND = last_hidden_TD[slots_N]
    stats = tables.head.argmax_and_lse(last_hidden_ND) if method.needs_head_stats else (None, None)
    target = TargetOutput(aux_TA.to(dtype), slots_N, last_hidden_ND, *stats)
    return MicroBatch(batch, target, tables.embedding.rows(batch.input_ids_T).to(dtype), allowed_ST)


def gradients(draft: BlockDraft, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a loss by parameter, zeros where there is none."""
    parameters = {name: weight for name, weight in draft.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: torch.zeros_like(weight) if grad is None else grad for (name, weight), grad in pairs}


def norms_of(objective: BlockObjective, micros: Sequence[MicroBatch]) -> LossNorms:
    """Return the divisors of a step of these micro-batches."""
    counts_S = torch.stack([objective.count_loss_rows(micro) for micro in micros]).sum(0)
    share = torch.as_tensor(sum(objective.loss_share(micro) for micro in micros), dtype=torch.float32)
    return LossNorms(torch.where(share > 0, share, 1), counts_S)
