"""A plugin with a draft method: independent heads on one target layer; docs/extending.md shows parts of it.

Head `i` reads the layer's state at position `t` and the token after it, and learns the target's
most likely token at slot `t + 1 + i` with cross-entropy. All heads draft in one pass.
"""

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad, silu
from transformers import PreTrainedConfig

from engine.batch import DraftOutput, LossNorms, MicroBatch, PackedBatch
from engine.config.sections import Config, TttSection
from engine.config.strict import option, read_section
from engine.config.tree_shape import TreeShape
from engine.kernels import PLAIN, Kernels
from engine.kernels.matmul import Linear
from engine.models.costs import StepPart, frozen_head_part, head_part, map_part
from engine.models.draft_folder import (
    CONFIG,
    check_finite,
    check_names,
    read_draft_config,
    read_draft_weights,
    write_draft_folder,
)
from engine.models.draft_method import ActivationBytes, DraftMethod, DraftModel, ServedDraft, TargetRows, TargetTables
from engine.models.drafter import TokenTree
from engine.models.method_registry import register_method
from engine.models.target_families import check_aux_layers, num_layers, text_config
from engine.models.training_rows import allowed_rows, loss_rows, row_slots, slots_of
from engine.models.vocab_map import VocabMap
from engine.parallel.objective import DivisorScope

ARCHITECTURE = "IndependentHeadsDraft"


@dataclass(frozen=True)
class HeadOptions:
    """Options of the method, from the mapping `draft.options`."""

    num_heads: int = option(3, "heads, each of which drafts one token", unit="heads", at_least=1)


@dataclass(frozen=True)
class HeadsConfig:
    """Shapes of the draft, as in its config.json."""

    num_heads: int
    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    aux_layers: tuple[int, ...]
    trained_with: dict[str, str] | None = None
    dtype: str = "bfloat16"

    @property
    def target_hidden_size(self) -> int:
        return self.hidden_size

    @property
    def head_dim(self) -> int:
        return 64  # kernels are chosen for this width; the method has no attention


class HeadsDraft(DraftModel[HeadsConfig]):
    """One linear map per head, and a norm and an LM head that they share."""

    def __init__(self, config: HeadsConfig, kernels: Kernels = PLAIN) -> None:
        super().__init__(config, kernels)
        size = config.hidden_size
        self.heads = nn.ModuleList(Linear(2 * size, size) for _ in range(config.num_heads))
        self.norm = nn.RMSNorm(size)
        self.lm_head = Linear(size, config.draft_vocab_size)

    def forward(self, state_TD: Tensor, next_embed_TD: Tensor) -> list[Tensor]:
        """Compute the logits of every head, [T, U] each.

        next_embed_TD: embedding of the token after each position.
        """
        both_TE = torch.cat((state_TD, next_embed_TD), -1)
        return [self.lm_head(self.norm(state_TD + silu(head(both_TE)))) for head in self.heads]


@dataclass(frozen=True)
class HeadsLoss:
    """Cross-entropy with the target's most likely tokens."""

    num_steps: int
    head: TargetRows
    vocab_map: VocabMap
    divisor_scope: ClassVar[DivisorScope] = DivisorScope.GLOBAL_BATCH
    needs_acceptance: ClassVar[bool] = False

    @property
    def step_weights(self) -> list[float]:
        return [1.0] * self.num_steps

    def _rows(self, micro: MicroBatch) -> Tensor:
        return loss_rows(micro.allowed_ST, micro.target, self.vocab_map)

    def count_loss_rows(self, micro: MicroBatch) -> Tensor:
        return self._rows(micro).sum(1).float()

    def loss_share(self, micro: MicroBatch) -> int | Tensor:
        return micro.num_slots

    def logits(self, draft: HeadsDraft, micro: MicroBatch) -> list[Tensor]:
        next_embed_TD = pad(micro.embed_TD, (0, 0, 0, 1))[1:]
        return draft(micro.target.aux_TA, next_embed_TD)

    def __call__(self, draft: HeadsDraft, micro: MicroBatch, norms: LossNorms) -> DraftOutput:
        target = micro.target
        rows_ST = self._rows(micro)
        slot_ST = row_slots(target.slots_N, micro.allowed_ST)
        label_N = self.vocab_map.draft_ids(target.argmax_N)
        p_NU = (self.head.logits(target.last_hidden_ND) - target.lse_N[:, None]).exp()
        losses = []
        correct = []
        accepted = []
        for rows_T, slot_T, logits_TU in zip(rows_ST, slot_ST, self.logits(draft, micro), strict=True):
            slot_R = slot_T[rows_T]
            log_q_RU = logits_TU[rows_T].float().log_softmax(-1)
            label_log_q_R = log_q_RU.gather(1, label_N[slot_R][:, None])[:, 0]
            losses.append(-label_log_q_R.sum() / norms.slots)
            correct.append((label_log_q_R >= log_q_RU.amax(1)).sum())
            accepted.append(torch.minimum(p_NU[slot_R], log_q_RU.detach().exp()).sum())
        loss_S = torch.stack(losses)
        return DraftOutput(
            loss=loss_S.sum(),
            loss_S=loss_S,
            num_loss_rows_S=rows_ST.sum(1),
            num_allowed_rows_S=micro.allowed_ST.sum(1),
            num_correct_S=torch.stack(correct).float(),
            accepted_S=torch.stack(accepted),
        )


@dataclass(frozen=True)
class ServedHeads(ServedDraft):
    """The heads with their vocabulary and the target's embedding, [V, D]."""

    model: HeadsDraft
    vocab_map: VocabMap
    embed_weight_VD: Tensor

    def to(self, dtype: torch.dtype) -> "ServedHeads":
        model = copy.deepcopy(self.model).to(dtype)
        return ServedHeads(model, self.vocab_map, self.embed_weight_VD.to(dtype))

    def drafter(self, shape: TreeShape) -> "HeadsDrafter":
        return HeadsDrafter(self, shape.num_steps)

    @torch.no_grad()
    def logits(self, micro: MicroBatch) -> Tensor:
        next_ids_T = pad(micro.batch.input_ids_T, (0, 1))[1:]
        next_embed_TD = embedding(next_ids_T, self.embed_weight_VD)
        next_embed_TD[-1] = 0  # no token follows the last one
        return torch.stack(self.model(micro.target.aux_TA, next_embed_TD))


class HeadsDrafter:
    """Drafter that proposes one token per head."""

    def __init__(self, draft: ServedHeads, num_tokens: int) -> None:
        self._draft = draft
        self._num_tokens = num_tokens
        self._newest_id = 0
        self._aux_1A = torch.empty(0)

    def start(self, token_ids: list[int], aux_TA: Tensor) -> None:
        self.extend(token_ids[1:], aux_TA)

    def extend(self, token_ids: list[int], aux_QA: Tensor) -> None:
        self._newest_id = token_ids[-1]
        self._aux_1A = aux_QA[-1:]

    @torch.inference_mode()
    def propose(self) -> TokenTree:
        table_VD = self._draft.embed_weight_VD
        logits = self._draft.model(self._aux_1A.to(table_VD), table_VD[self._newest_id][None])
        draft_ids = torch.cat(logits[: self._num_tokens]).argmax(-1)
        return TokenTree.chain(self._draft.vocab_map.target_ids_U[draft_ids].tolist())


@dataclass(frozen=True)
class HeadsCounts:
    """Work of a step: tokens, slots, pairs that the target attends to, rows of each head."""

    num_tokens: int
    num_slots: int
    prefix_pairs: int
    rows_S: tuple[int, ...]

    def without_compaction(self) -> "HeadsCounts":
        return self  # every head runs at every token anyway


class IndependentHeads(DraftMethod[HeadsConfig, HeadsDraft]):
    """Draft method that predicts the next tokens independently of each other."""

    title = "independent heads"
    # The embedded recipe sets draft.fc_norm and draft.norm_output, which have no effect either.
    unread = (
        "draft.config",
        "draft.num_layers",
        "draft.hidden_size",
        "draft.intermediate_size",
        "draft.num_attention_heads",
        "draft.num_key_value_heads",
        "draft.train_embedding_projection",
        "draft.init_head",
        "draft.init_from",
        "ttt.steps",
        "ttt.compaction",
        "ttt.recompute",
        "loss.kind",
        "loss.normaliser",
        "loss.step_decay",
        "loss.step_weights",
    )

    def __init__(self, recipe: Config) -> None:
        super().__init__(recipe)
        self.options = read_section(HeadOptions, recipe.draft.options, "draft.options")
        # Head i learns the slots that TTT step i of EAGLE-3 learns.
        self._rows = TttSection(steps=self.options.num_heads, mask_alignment=recipe.ttt.mask_alignment)

    def choose_aux_layers(self, target_config: PreTrainedConfig, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
        count = num_layers(target_config)
        return check_aux_layers(wanted or (count - 2,), count, how_many=1)

    def derive_config(
        self, target_config: PreTrainedConfig, aux_layers: tuple[int, ...] | None, trained_with: dict[str, str] | None = None
    ) -> HeadsConfig:
        target = text_config(target_config)
        return HeadsConfig(
            num_heads=self.options.num_heads,
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            draft_vocab_size=self.recipe.draft.vocab_size,
            aux_layers=self.choose_aux_layers(target_config, aux_layers),
            trained_with=trained_with,
        )

    def read_config(self, exported: dict[str, Any], source: Path) -> HeadsConfig:
        if exported.get("architectures") != [ARCHITECTURE]:
            raise ValueError(f"{source} is of another draft method: expected architectures [{ARCHITECTURE!r}]")
        names = {own.name for own in fields(HeadsConfig)}
        missing = sorted(names - exported.keys())
        if missing:
            raise ValueError(f"{source} lacks {missing}; add them")
        values = {name: exported[name] for name in names}
        return HeadsConfig(**values | {"aux_layers": tuple(values["aux_layers"])})

    def allowed_rows(self, batch: PackedBatch) -> Tensor:
        return allowed_rows(batch, self._rows)

    def slots(self, allowed_ST: Tensor) -> Tensor:
        return slots_of(allowed_ST)

    def new_draft(self, config: HeadsConfig, kernels: Kernels, target: TargetTables, vocab_map: VocabMap) -> HeadsDraft:
        draft = HeadsDraft(config, kernels).to(vocab_map.target_ids_U.device)
        with torch.no_grad():
            draft.lm_head.weight.copy_(target.head_rows(vocab_map.target_ids_U).weight_VD)
        return draft

    def make_objective(self, target: TargetTables, vocab_map: VocabMap) -> HeadsLoss:
        return HeadsLoss(self.options.num_heads, target.head_rows(vocab_map.target_ids_U), vocab_map)

    def serve(self, draft: HeadsDraft, target: TargetTables, vocab_map: VocabMap) -> ServedHeads:
        return ServedHeads(draft, vocab_map, target.embedding.whole())

    def export(
        self,
        folder: Path,
        weights: Iterable[tuple[str, Tensor]],
        config: HeadsConfig,
        vocab_map: VocabMap,
        embed_weight_VD: Tensor | None,
    ) -> None:
        tensors = {name: weight.to("cpu", getattr(torch, config.dtype)).contiguous() for name, weight in weights}
        with torch.device("meta"):
            check_names(tensors, dict(HeadsDraft(config).state_dict()))
        check_finite(tensors)
        tables = {"d2t": vocab_map.d2t.cpu(), "t2d": vocab_map.in_draft_V.cpu()}
        write_draft_folder(folder, tensors | tables, asdict(config) | {"architectures": [ARCHITECTURE]})

    def load(
        self,
        folder: Path,
        target: TargetTables | None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        kernels: Kernels = PLAIN,
    ) -> ServedHeads:
        config = self.read_config(read_draft_config(folder), folder / CONFIG)
        embed_weight_VD = None if target is None else target.embedding.whole()
        if embed_weight_VD is None or embed_weight_VD.shape != (config.vocab_size, config.hidden_size):
            raise ValueError(f"{folder} shares its target's embedding, so name the target that it was trained for")
        tensors = read_draft_weights(folder, device)
        model = HeadsDraft(config, kernels)
        tables = {"d2t": torch.empty(config.draft_vocab_size), "t2d": torch.empty(config.vocab_size)}
        check_names(tensors, dict(model.state_dict()) | tables)
        vocab_map = VocabMap.from_tables(tensors.pop("d2t"), tensors.pop("t2d"))
        model.load_state_dict(tensors)
        dtype = dtype or getattr(torch, config.dtype)
        model = model.to(device, dtype).eval().requires_grad_(False)
        return ServedHeads(model, vocab_map, embed_weight_VD.to(device, dtype))

    def count_weights(self, config: HeadsConfig) -> int:
        size = config.hidden_size
        return config.num_heads * 2 * size * size + size + config.draft_vocab_size * size

    def count_work(self, batch: PackedBatch, allowed_ST: Tensor) -> HeadsCounts:
        return HeadsCounts(
            num_tokens=batch.num_tokens,
            num_slots=len(self.slots(allowed_ST)),
            prefix_pairs=int((batch.position_T + 1).sum()),
            rows_S=(batch.num_tokens,) * self.options.num_heads,
        )

    def step_parts(self, config: HeadsConfig, counts: HeadsCounts) -> dict[str, StepPart]:
        size = config.hidden_size
        num_rows = sum(counts.rows_S)
        return {
            "heads": map_part(num_rows, 2 * size, 2 * size * size, size, input_gradient=False),
            "head": head_part(num_rows, size, config.draft_vocab_size),
            "teacher": frozen_head_part(counts.num_slots, size, config.draft_vocab_size),
            "target_head": frozen_head_part(counts.num_slots, size, config.vocab_size),
        }

    def activation_bytes(self, config: HeadsConfig, counts: HeadsCounts, itemsize: int, fused: bool) -> ActivationBytes:
        num_rows = sum(counts.rows_S)
        inputs = 2 * config.hidden_size * counts.num_tokens
        states = num_rows * (3 * config.hidden_size + config.draft_vocab_size)
        log_q = num_rows * config.draft_vocab_size * torch.float32.itemsize
        p = counts.num_slots * config.draft_vocab_size * torch.float32.itemsize
        return ActivationBytes((inputs + states) * itemsize + log_q + p, on_top=log_q // config.num_heads)


register_method("independent_heads", IndependentHeads)
