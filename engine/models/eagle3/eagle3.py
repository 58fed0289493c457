"""EAGLE-3 as a draft method: what the engine needs to know of it.

Source: EAGLE-3 (arXiv:2503.01840).
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from engine.batch import PackedBatch
from engine.config.sections import Config
from engine.kernels import PLAIN, Kernels
from engine.models.costs import StepPart
from engine.models.draft_method import ActivationBytes, DraftMethod, TargetFacts, TargetTables
from engine.models.eagle3.activation_memory import DraftStates
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_config import Eagle3Config, choose_aux_layers, derive_draft_config
from engine.models.eagle3.export import PROJECTION, export_draft, load_draft
from engine.models.eagle3.flops import StepCounts, step_parts
from engine.models.eagle3.initial_weights import start_from_target
from engine.models.eagle3.served_draft import ServedEagle3
from engine.models.eagle3.speculators_export import export_speculators
from engine.models.eagle3.unroll import Teacher, TrainingTimeTest
from engine.models.eagle3.warm_start import start_from_draft
from engine.models.training_rows import allowed_rows, slots_of
from engine.models.vocab_map import VocabMap


class Eagle3(DraftMethod[Eagle3Config, Eagle3Draft]):
    """An autoregressive draft of one or more decoder layers, trained on its own outputs."""

    title = "EAGLE-3"
    drafts_trees = True
    unread = ("draft.options",)

    def __init__(self, recipe: Config) -> None:
        super().__init__(recipe)
        self.recompute = recipe.ttt.recompute

    def choose_aux_layers(self, target_config: PreTrainedConfig, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
        return choose_aux_layers(target_config, wanted)

    def derive_config(
        self, target_config: PreTrainedConfig, aux_layers: tuple[int, ...] | None, trained_with: dict[str, str] | None = None
    ) -> Eagle3Config:
        config = derive_draft_config(target_config, self.recipe.draft, aux_layers)
        return replace(config, trained_with=trained_with)

    def read_config(self, exported: dict[str, Any], source: Path) -> Eagle3Config:
        return Eagle3Config.from_dict(exported, source)

    def allowed_rows(self, batch: PackedBatch) -> Tensor:
        return allowed_rows(batch, self.recipe.ttt)

    def slots(self, allowed_ST: Tensor) -> Tensor:
        return slots_of(allowed_ST)

    def new_draft(self, config: Eagle3Config, kernels: Kernels, target: TargetTables, vocab_map: VocabMap) -> Eagle3Draft:
        section = self.recipe.draft
        draft = Eagle3Draft(config, kernels).to(vocab_map.target_ids_U.device)
        head_UD = None
        if section.init_head == "target":
            head_UD = target.head_rows(vocab_map.target_ids_U).weight_VD
        if draft.embed_projection is None:
            start_from_target(draft, None, head_UD)
        else:
            start_from_target(draft, target.embedding.whole(), head_UD)
            draft.embed_projection.requires_grad_(section.train_embedding_projection)
        if section.init_from is not None:
            self.notes.append(start_from_draft(draft, Path(section.init_from), vocab_map))
        return draft

    def make_objective(self, target: TargetTables, vocab_map: VocabMap) -> TrainingTimeTest:
        teacher = Teacher(target.head_rows(vocab_map.target_ids_U).logits, vocab_map)
        return TrainingTimeTest(self.recipe.ttt, self.recipe.loss, teacher)

    def serve(self, draft: Eagle3Draft, target: TargetTables, vocab_map: VocabMap) -> ServedEagle3:
        return ServedEagle3(draft, vocab_map, draft.embed(target.embedding.whole()))

    def export(
        self,
        folder: Path,
        weights: Iterable[tuple[str, Tensor]],
        config: Eagle3Config,
        vocab_map: VocabMap,
        embed_weight_VD: Tensor | None,
    ) -> None:
        export_draft(folder, weights, config, vocab_map, embed_weight_VD)

    def export_speculators(
        self,
        folder: Path,
        weights: Iterable[tuple[str, Tensor]],
        config: Eagle3Config,
        vocab_map: VocabMap,
        embed_weight_VD: Tensor,
        target: TargetFacts,
    ) -> None:
        export_speculators(folder, weights, config, vocab_map, embed_weight_VD, target)

    def ships_embedding(self, config: Eagle3Config) -> bool:
        return config.hidden_size != config.target_hidden_size

    def load(
        self,
        folder: Path,
        target: TargetTables | None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        kernels: Kernels = PLAIN,
    ) -> ServedEagle3:
        embed_weight_VD = None if target is None else target.embedding.whole()
        return load_draft(folder, embed_weight_VD, dtype, device, kernels)

    def count_weights(self, config: Eagle3Config) -> int:
        with torch.device("meta"):
            named = Eagle3Draft(config).named_parameters()
        frozen = () if self.recipe.draft.train_embedding_projection else (PROJECTION,)
        return sum(weight.numel() for name, weight in named if name not in frozen)

    def count_work(self, batch: PackedBatch, allowed_ST: Tensor) -> StepCounts:
        return StepCounts.needed(batch, allowed_ST, len(self.slots(allowed_ST)))

    def step_parts(self, config: Eagle3Config, counts: StepCounts) -> dict[str, StepPart]:
        return step_parts(config.shape, counts)

    def activation_bytes(self, config: Eagle3Config, counts: StepCounts, itemsize: int, fused: bool) -> ActivationBytes:
        states = DraftStates(config.shape, counts, self.recipe.loss, itemsize, fused, self.recompute)
        return ActivationBytes(states.kept(), states.on_top())
