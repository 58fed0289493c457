"""A block drafter as a draft method: what the engine needs to know of it."""

from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from engine.batch import PackedBatch
from engine.config.block_sections import AUTOMODEL, DEEPSPEC, NO_PARITY, SPECFORGE, SPECULATORS
from engine.config.sections import OPTIONS, Config
from engine.config.strict import ConfigError
from engine.config.tree_shape import TreeShape
from engine.kernels import PLAIN, FrozenHead, Kernels, TokenTerms
from engine.kernels.interface import LogitTransform
from engine.models.block_drafter.anchors import AnchorRule
from engine.models.block_drafter.backbone import BlockDraft, BlockRotary
from engine.models.block_drafter.block_config import BlockConfig, choose_block_layers, shared_shapes
from engine.models.block_drafter.block_costs import BlockCounts, block_step_parts
from engine.models.block_drafter.block_export import export_block_draft, read_block_weights
from engine.models.block_drafter.block_memory import BlockStates, OwnStates
from engine.models.block_drafter.block_objective import BlockLossRule, BlockObjective
from engine.models.block_drafter.block_rows import BlockShape, prediction_slots
from engine.models.block_drafter.mask_token import choose_mask_token
from engine.models.block_drafter.served_block import ServedBlock
from engine.models.costs import StepPart
from engine.models.draft_folder import CONFIG, read_draft_config
from engine.models.draft_method import ActivationBytes, DraftMethod, TargetTables
from engine.models.target_families import text_config
from engine.models.vocab_map import VocabMap
from engine.parallel.objective import DivisorScope

ConfigT = TypeVar("ConfigT", bound=BlockConfig)
DraftT = TypeVar("DraftT", bound=BlockDraft)
# Constants of the decay for blocks of more than 10, of 9 or 10, and of fewer rows.
# Source: DFlash (arXiv:2602.06036), appendix A.1.
DECAYS = ((10, 7.0), (8, 5.0), (0, 4.0))
# What trainers add to a divisor.
DIVISOR_OFFSETS = {DEEPSPEC: 1e-6, AUTOMODEL: 1e-6, SPECULATORS: 1e-5}
# Families whose embedding is scaled by its module; a server would read other rows than the table's.
SCALED_EMBEDDINGS = ("gemma",)
# Fields of a config that do not change what the weights of a draft mean.
HARMLESS = ("dtype", "trained_with", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


class BlockMethod(DraftMethod[ConfigT, DraftT], Generic[ConfigT, DraftT]):
    """A draft that proposes a whole block of tokens in one forward.

    config_type, draft_type: classes of the method. default_size: rows of a block.
    row_tables: ends of the names of weights with a row per token, of which a forward reads single rows.
    default_cross_entropy, default_l1: weights of the loss's parts.
    scopes: micro-batches whose sum a trainer divides the method's loss by, for each value of `objective.parity`.
    dpace_parities: values of `objective.parity` that have D-PACE for the method.
    """

    config_type: ClassVar[type[BlockConfig]]
    draft_type: ClassVar[type[BlockDraft]]
    default_size: ClassVar[int]
    row_tables: ClassVar[tuple[str, ...]] = ()
    default_cross_entropy: ClassVar[float] = 1.0
    default_l1: ClassVar[float] = 0.0
    scopes: ClassVar[dict[str, DivisorScope]] = {
        NO_PARITY: DivisorScope.GLOBAL_BATCH,
        DEEPSPEC: DivisorScope.RANKS,
        SPECFORGE: DivisorScope.GLOBAL_BATCH,
        AUTOMODEL: DivisorScope.MICRO_BATCH,
        SPECULATORS: DivisorScope.MICRO_BATCH,
    }
    dpace_parities: ClassVar[tuple[str, ...]] = (NO_PARITY, SPECFORGE, SPECULATORS)
    # The embedded recipe sets draft.vocab_size, draft.fc_norm and draft.norm_output, which have no effect either.
    unread: ClassVar[tuple[str, ...]] = (
        "draft.options",
        "draft.config",
        "draft.vocab_from",
        "draft.vocab_map",
        "draft.hidden_size",
        "draft.train_embedding_projection",
        "draft.init_head",
        "ttt.steps",
        "ttt.mask_alignment",
        "ttt.recompute",
        "loss.kind",
        "loss.normaliser",
        "loss.step_decay",
        "loss.step_weights",
        "loss.gradient_dtype",
        "loss.lk_kl_scale",
        "loss.lk_kl_decay",
    )

    def __init__(self, recipe: Config) -> None:
        super().__init__(recipe)
        self.block = recipe.block
        self.section = recipe.objective
        self.recompute = self.block.recompute
        self.block_size = self.block.size or self.default_size
        self._check_weights()
        self.rule = self._loss_rule()
        self.anchors = self._anchor_rule()

    @property
    @abstractmethod
    def num_predictions(self) -> int:
        """Tokens that a block drafts."""

    @property
    def shape(self) -> BlockShape:
        """What plans of rows need to know of the draft."""
        parity = self.section.parity
        return BlockShape(
            self.block_size,
            shift=1 if self.num_predictions == self.block_size else 0,
            windows=self.block.windows_of(self.recipe.draft.num_layers),
            is_causal=self.block.causal,
            window_from_anchor=parity == SPECULATORS,
            window_in_block=parity in (NO_PARITY, DEEPSPEC),
        )

    @property
    def reads_decay(self) -> bool:
        """Whether a part of the loss has weights that decay."""
        return self.section.weights == "decay"

    def _check_weights(self) -> None:
        """Raise ConfigError for options of weights that have no effect, or that the trainer of `parity` does not have."""
        section = self.section
        is_dpace = section.weights == "dpace"
        if is_dpace and section.parity not in self.dpace_parities:
            problem = f"does not exist in {section.parity} for {self.title}; use decay, or another objective.parity"
            raise ConfigError(problem, key="objective.weights", value=section.weights)
        unread = []
        if not is_dpace:
            unread.append("dpace_alpha")
        if not self.reads_decay:
            unread.append("decay")
        for name in unread:
            if getattr(section, name) != OPTIONS[f"objective.{name}"].default:
                problem = f"has no effect with objective.weights = {section.weights}; delete it"
                raise ConfigError(problem, key=f"objective.{name}", value=getattr(section, name))

    def _loss_rule(self) -> BlockLossRule:
        section = self.section
        parity = section.parity
        default_label = "argmax" if parity == SPECULATORS else "token"
        decay = section.decay
        if decay is None:
            decay = next(constant for size, constant in DECAYS if self.block_size > size)
        is_dpace = section.weights == "dpace"
        divisor: Literal["weights", "rows", "documents"] = "weights"
        if parity == SPECULATORS:
            divisor = "rows"
        if parity == SPECFORGE and is_dpace:
            divisor = "documents"
        return BlockLossRule(
            terms=self._terms(),
            uses_argmax=(section.label or default_label) == "argmax",
            decay=decay,
            dpace_alpha=section.dpace_alpha if is_dpace else None,
            divisor=divisor,
            divisor_offset=DIVISOR_OFFSETS.get(parity, 0.0),
            scope=self.scopes[parity],
            separate_heads=is_dpace and parity == SPECULATORS,
        )

    def _terms(self) -> TokenTerms:
        """Return the weights of the loss's parts: those of the recipe, and otherwise the default ones."""
        section = self.section
        default = self.default_terms()
        learns_one_part = section.parity == SPECULATORS and section.weights == "dpace"
        if learns_one_part:
            default = TokenTerms(cross_entropy=1.0)
        terms = TokenTerms(
            cross_entropy=default.cross_entropy if section.cross_entropy is None else section.cross_entropy,
            kl=default.kl if section.kl is None else section.kl,
            total_variation=default.total_variation if section.l1 is None else 2 * section.l1,
        )
        if learns_one_part and terms.need_target:
            problem = "weighs the cross-entropy alone in speculators; delete objective.kl and objective.l1"
            raise ConfigError(problem, key="objective.weights", value=section.weights)
        return terms

    def default_terms(self) -> TokenTerms:
        """Return the weights of the loss's parts that the recipe does not give."""
        # speculators weighs half of sum |p - q| as much as the others weigh the whole.
        total_variation = self.default_l1 if self.section.parity == SPECULATORS else 2 * self.default_l1
        return TokenTerms(self.default_cross_entropy, total_variation=total_variation)

    def _anchor_rule(self) -> AnchorRule:
        parity = self.section.parity
        share = None
        share_of: Literal["tokens", "positions"] = "tokens"
        if self.block.anchor_share is not None:
            share = self.block.anchor_share
            share_of = "positions"
        elif isinstance(self.block.anchors, int):
            share = self.block.anchors / self.recipe.data.max_tokens
        has_prefix = parity in (NO_PARITY, DEEPSPEC) or (self.needs_prefix and parity != SPECULATORS)
        return AnchorRule(
            self.num_predictions,
            share=share,
            share_of=share_of,
            is_sweep=self.block.anchor_order == "sweep",
            seed=self.recipe.seed,
            needs_prefix=has_prefix,
            stays_in_document=parity != SPECULATORS,
            needs_next=parity in (NO_PARITY, DEEPSPEC, SPECFORGE),
            room_in_document=self.block_size if parity == AUTOMODEL and not self.needs_prefix else 0,
            room_in_pack=self.block_size + 1 if parity == SPECULATORS else 0,
            reads_mask_before_label=parity == SPECULATORS and self.num_predictions == self.block_size,
        )

    @property
    def needs_prefix(self) -> bool:
        """Whether all trainers of the method learn a row only if all rows before it in its block are learned."""
        return False

    @property
    def needs_target(self) -> bool:
        """Whether the loss needs the target's states at the slots."""
        return self.rule.uses_argmax or self.needs_distribution

    @property
    def needs_distribution(self) -> bool:
        """Whether the loss needs the target's distribution at the slots, and not its most likely token alone."""
        return self.rule.terms.need_target

    def check_shape(self, shape: TreeShape, draft: ConfigT) -> None:
        super().check_shape(shape, draft)
        if shape.num_steps > draft.num_predictions:
            problem = f"a block of {draft.block_size} rows drafts {draft.num_predictions} tokens; use at most that many"
            raise ConfigError(problem, key="evaluation.num_steps", value=shape.num_steps)

    def choose_aux_layers(self, target_config: PreTrainedConfig, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
        return choose_block_layers(target_config, wanted)

    def derive_config(
        self, target_config: PreTrainedConfig, aux_layers: tuple[int, ...] | None, trained_with: dict[str, str] | None = None
    ) -> ConfigT:
        target = text_config(target_config)
        if target.model_type.startswith(SCALED_EMBEDDINGS):
            raise ValueError(
                f"target family {target.model_type!r} scales its embedding in a way that servers of block drafters do not "
                "agree on; train an EAGLE-3 draft for it (draft.method=eagle3)"
            )
        mask_token_id = choose_mask_token(self.block.mask_token_id, self.recipe.target, target.vocab_size)
        shapes = shared_shapes(target_config, self.recipe.draft, self.block, aux_layers, self.block_size, mask_token_id)
        config: Any = self.config_type(**shapes, trained_with=trained_with, **self.own_shapes(target_config))
        return config

    def mixed_rows(self, config: ConfigT) -> int:
        """Return the number of rows of a block that the method mixes into each row, including itself; 0 = none."""
        return 0

    def own_shapes(self, target_config: PreTrainedConfig) -> dict[str, Any]:
        """Return the fields that the method adds to the config."""
        return {}

    def read_config(self, exported: dict[str, Any], source: Path) -> ConfigT:
        config: Any = self.config_type.from_dict(exported, source)
        return config

    def check_data(self, counts_V: Tensor, config: ConfigT) -> None:
        if counts_V[config.mask_token_id]:
            times = int(counts_V[config.mask_token_id])
            problem = f"occurs {times:,} times among the assistant tokens of the data; name a token that never does"
            raise ConfigError(problem, key="block.mask_token_id", value=config.mask_token_id)

    def allowed_rows(self, batch: PackedBatch) -> Tensor:
        return self.anchors.rows(batch)

    def slots(self, allowed_ST: Tensor) -> Tensor:
        if not self.needs_target:
            return torch.zeros(0, dtype=torch.long)
        return prediction_slots(allowed_ST)

    @property
    def needs_head_stats(self) -> bool:
        # Where the loss computes the distribution, it finds the most likely token itself.
        return self.rule.uses_argmax and not self.needs_distribution

    def stored_slots(self, batch: PackedBatch) -> Tensor:
        if not self.needs_target and self.recipe.store.slots == "needed":
            return torch.zeros(0, dtype=torch.long)
        return prediction_slots(self.anchors.possible_rows(batch))

    def new_draft(self, config: ConfigT, kernels: Kernels, target: TargetTables, vocab_map: VocabMap) -> DraftT:
        device = vocab_map.target_ids_U.device
        draft: Any = self.draft_type(config, kernels)
        draft.draw_weights()
        init_from = self.recipe.draft.init_from
        if init_from is not None:
            self._start_from(draft, Path(init_from), target, vocab_map.target_ids_U)
        self.freeze(draft)
        draft = draft.to(device)
        self._set_mask_embedding(draft, target.embedding.whole())
        return draft

    def freeze(self, draft: DraftT) -> None:
        """Freeze the weights that the recipe's objective does not train."""

    def _start_from(self, draft: DraftT, folder: Path, target: TargetTables, every_V: Tensor) -> None:
        """Load the weights of an exported or published draft. Raises ValueError if its shapes differ."""
        config = draft.config
        found = self.config_type.from_dict(read_draft_config(folder), folder / CONFIG, config.num_target_layers)
        changed = [name for name, value in vars(config).items() if name not in HARMLESS and getattr(found, name) != value]
        if changed:
            facts = ", ".join(f"{name}={getattr(found, name)}, not {getattr(config, name)}" for name in changed)
            raise ValueError(f"draft.init_from={folder} was trained with {facts}; set the same options")
        weights = read_block_weights(folder, draft, target, every_V, "cpu")
        draft.load_state_dict({name: weight.float() for name, weight in weights.items()})
        self.notes.append(f"starts from {folder}")

    def _set_mask_embedding(self, draft: DraftT, embed_weight_VD: Tensor) -> None:
        row_D = embed_weight_VD[draft.config.mask_token_id]
        draft.mask_embed_D = row_D.to(draft.mask_embed_D).clone()

    def frozen_head(self, target: TargetTables, vocab_map: VocabMap) -> tuple[Any, FrozenHead]:
        """Return the target's head over all tokens, and the draft's use of it."""
        head = target.head_rows(vocab_map.target_ids_U)
        if getattr(head, "bias_V", None) is not None:
            problem = "the target's head has a bias, which servers of block drafters do not apply"
            raise ValueError(f"{problem}; train an EAGLE-3 draft (draft.method=eagle3)")
        return head, FrozenHead(head.weight_VD, self.logit_transform(head))

    def logit_transform(self, head: Any) -> LogitTransform:
        """Return the transform from the products of the target's head to the draft's logits."""
        return LogitTransform()

    def make_objective(self, target: TargetTables, vocab_map: VocabMap) -> BlockObjective:
        head, frozen_head = self.frozen_head(target, vocab_map)
        return self.objective_of(
            num_predictions=self.num_predictions,
            shape=self.shape,
            rule=self.rule,
            head=head,
            frozen_head=frozen_head,
            compaction=self.recipe.ttt.compaction,
            chunk_mb=self.recipe.loss.chunk_mb,
        )

    def objective_of(self, **shared: Any) -> BlockObjective:
        """Return the objective of the method. shared: arguments of `BlockObjective`."""
        return BlockObjective(**shared)

    @abstractmethod
    def served(self, model: DraftT, embed_weight_VD: Tensor, head: FrozenHead) -> ServedBlock:
        """Return the draft as a server runs it."""

    def serve(self, draft: DraftT, target: TargetTables, vocab_map: VocabMap) -> ServedBlock:
        _, frozen_head = self.frozen_head(target, vocab_map)
        return self.served(draft, target.embedding.whole(), frozen_head)

    def export(
        self,
        folder: Path,
        weights: Iterable[tuple[str, Tensor]],
        config: ConfigT,
        vocab_map: VocabMap,
        embed_weight_VD: Tensor | None,
    ) -> None:
        with torch.device("meta"):
            draft = self.draft_type(config)
        export_block_draft(folder, weights, draft)

    def load(
        self,
        folder: Path,
        target: TargetTables | None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        kernels: Kernels = PLAIN,
    ) -> ServedBlock:
        if target is None:
            raise ValueError(f"{folder} ships no embedding and no head: it shares its target's, so name the target")
        config: Any = self.config_type.from_dict(read_draft_config(folder), folder / CONFIG)
        with torch.device("meta"):
            draft: Any = self.draft_type(config, kernels)
        every_V = torch.arange(config.vocab_size, device=device)
        draft.load_state_dict(read_block_weights(folder, draft, target, every_V, device), assign=True)
        draft.rotary = BlockRotary(config)
        draft.mask_embed_D = torch.zeros(config.hidden_size, device=device)
        dtype = dtype or getattr(torch, config.dtype)
        draft = draft.to(device, dtype).eval().requires_grad_(False)
        embed_weight_VD = target.embedding.whole().to(device, dtype)
        self._set_mask_embedding(draft, embed_weight_VD)
        head = target.head_rows(every_V)
        return self.served(draft, embed_weight_VD, FrozenHead(head.weight_VD, self.logit_transform_of(config)))

    def logit_transform_of(self, config: ConfigT) -> LogitTransform:
        """Return the transform from the products of the head to the logits of an exported draft."""
        return LogitTransform()

    def count_weights(self, config: ConfigT) -> int:
        with torch.device("meta"):
            draft = self.draft_type(config)
        return sum(weight.numel() for weight in draft.parameters())

    def count_read_weights(self, config: ConfigT) -> int:
        """Return the number of weights that a server reads to draft a block.

        The target's head is read too. Of tables with a row per token, only single rows are.
        """
        with torch.device("meta"):
            named = self.draft_type(config).named_parameters()
        own = sum(weight.numel() for name, weight in named if not name.endswith(self.row_tables))
        return own + config.vocab_size * config.hidden_size

    def count_work(self, batch: PackedBatch, allowed_ST: Tensor) -> BlockCounts:
        return BlockCounts.needed(batch, allowed_ST, self.shape, len(self.slots(allowed_ST)))

    def step_parts(self, config: ConfigT, counts: BlockCounts) -> dict[str, StepPart]:
        parts = block_step_parts(config, counts, self.needs_distribution, self.needs_head_stats, self.mixed_rows(config))
        return parts | self.own_parts(config, counts)

    def own_parts(self, config: ConfigT, counts: BlockCounts) -> dict[str, StepPart]:
        """Return the parts of a training step that the method adds."""
        return {}

    def activation_bytes(self, config: ConfigT, counts: BlockCounts, itemsize: int, fused: bool) -> ActivationBytes:
        states = BlockStates(
            config,
            counts,
            self.own_states(config),
            mixed_rows=self.mixed_rows(config),
            itemsize=itemsize,
            fused=fused,
            recompute=self.recompute,
            chunk_mb=self.recipe.loss.chunk_mb,
            needs_distribution=self.needs_distribution,
        )
        return states.bytes()

    def own_states(self, config: ConfigT) -> OwnStates:
        """Return the numbers per row that the method's own modules keep."""
        return OwnStates()
