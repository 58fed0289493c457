"""Recipe sections: one frozen dataclass per section, with the default of every option.

`launcher/recipes/embedded.yaml` is the recipe of a run that names none. Settings of DeepSpeed's
JSON (batch sizes, optimizer, schedule, precision, clipping, ZeRO, monitors) have no option here.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.config.block_sections import BLOCK_METHODS, BlockSection, ObjectiveSection
from engine.config.data_section import EMBEDDED, DataSection, PrepareSection, RegenerateSection
from engine.config.strict import ConfigError, did_you_mean, option
from engine.config.tree_shape import TreeRule, TreeShape

ONLINE = "online"  # target.source: the running target
STORED = "stored"  # target.source: target.store
EAGLE3 = "eagle3"
DRAFT_METHODS = (EAGLE3, *BLOCK_METHODS)
LOSS_KINDS = ("kl", "lk_alpha", "lk_lambda", "total_variation", "jensen_shannon")
CHECKPOINTS, DRAFT, DRAFT_LAST = "checkpoints", "draft", "draft_last"  # folders in a run's output_dir
BAD_STEPS = "bad_steps"  # folder of the lists of bad steps
METRICS, WARNINGS, RECIPE = "metrics.jsonl", "warnings.jsonl", "config.yaml"  # files in it
SHOWN_TTT_STEPS = (0, 2, 6)  # TTT steps whose accuracy is shown: the 1st, 3rd and 7th


@dataclass(frozen=True)
class TargetSection:
    """The frozen large model that the draft learns from."""

    path: str = option(EMBEDDED, "Hugging Face folder or hub id of the target; 'embedded' is the model shipped with DraftSpeed")
    revision: str | None = option(None, "hub revision of the target; null = its default branch")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "precision in which the target runs; auto = bfloat16 on a GPU, float32 on a CPU"
    )
    keep_quantised: Literal["none", "fp8", "all"] = option(
        "fp8",
        "weights of a quantised target that stay quantised in memory and are dequantised at use; all = fp8 and 4-bit formats; "
        "none = dequantise at loading",
    )
    fp8_activations: bool = option(
        False,
        "also quantise the activations that fp8 weights are multiplied with, with one scale per token and block of inputs, "
        "as servers of fp8 checkpoints do",
    )
    aux_layers: tuple[int, ...] | None = option(
        None,
        "0-based layers whose outputs feed the draft, ascending; null = the method's default: for eagle3 1, L//2-1 and L-4 "
        "of L layers",
        unit="layers",
    )
    trust_remote_code: bool = option(False, "run Python code that the checkpoint ships")
    plugins: tuple[str, ...] = option(
        (),
        "Python files that run at the start and may register draft methods, losses, sources of hidden states and target "
        "families (docs/extending.md); export_draft.py and measure_acceptance.py take them from --plugins",
    )
    store: str | None = option(
        None,
        "folder of captured hidden states; capture_hidden_states.py writes it, and train.py trains from it without loading "
        "the target",
    )
    source: str | None = option(
        None, "registered source of hidden states; null = target.store if it is set, otherwise the running target"
    )
    non_finite: Literal["leave_out", "stop"] = option(
        "leave_out",
        "what to do with documents whose hidden states are NaN or infinite; leave_out = print their names and train without "
        "them; stop = end the run",
    )

    @property
    def hub_arguments(self) -> dict[str, Any]:
        """Arguments, in addition to the path, of every `from_pretrained` call for the target."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def __post_init__(self):
        layers = self.aux_layers
        if layers is not None and (not layers or list(layers) != sorted(set(layers)) or layers[0] < 0):
            problem = "expected distinct 0-based layers in ascending order, the order in which SGLang captures them"
            raise ConfigError(problem, key="target.aux_layers", value=layers)
        if self.revision is not None and self.path == EMBEDDED:
            problem = "the embedded target has no revisions; set target.path to a hub id, or leave target.revision null"
            raise ConfigError(problem, key="target.revision", value=self.revision)
        if self.fp8_activations and self.keep_quantised == "none":
            problem = "needs weights that stay in fp8; set target.keep_quantised=fp8, or set this option to false"
            raise ConfigError(problem, key="target.fp8_activations", value=True)


def divisors(number: int) -> list[int]:
    """Return all divisors of a positive integer, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


# Options of `draft` that do not belong to the shapes that `draft.config` sets.
_NOT_SHAPES = ("method", "options", "config", "vocab_from", "vocab_map", "train_embedding_projection", "init_head", "init_from")


@dataclass(frozen=True)
class DraftSection:
    """The draft model; shapes that are null follow the target."""

    method: str = option(
        EAGLE3,
        f"draft method: {' | '.join(DRAFT_METHODS)}, or one that a plugin registers; if the command line names another one, "
        "the recipe's options of ttt, or of block and objective, are left out where they are choices for its own method",
    )
    options: dict[str, Any] | None = option(None, "options of a method that a plugin registers, as a mapping")
    config: str | None = option(None, "draft config.json that sets every shape; null = derived from the target's config")
    vocab_size: int = option(
        32000, "size U of the draft vocabulary, which holds the most frequent tokens", unit="tokens", at_least=1
    )
    vocab_from: Literal["assistant", "argmax"] = option(
        "assistant",
        "tokens counted to choose the draft vocabulary; assistant = assistant tokens of the data; argmax = the target's most "
        "likely tokens, which needs target.store",
    )
    vocab_map: str | None = option(
        None, "vocab_map.safetensors of an earlier run; its draft vocabulary is used and no tokens are counted"
    )
    num_layers: int = option(1, "decoder layers", unit="layers", at_least=1)
    hidden_size: int | None = option(None, "hidden size D; null = the target's", unit="features", at_least=1)
    intermediate_size: int | None = option(None, "MLP width F; null = the target's dense width", unit="features", at_least=1)
    num_attention_heads: int | None = option(None, "query heads H; null = the target's", unit="heads", at_least=1)
    num_key_value_heads: int | None = option(None, "key/value heads G; null = the target's", unit="heads", at_least=1)
    fc_norm: bool = option(False, "EAGLE-3.1: an RMSNorm on each auxiliary hidden state before fc")
    norm_output: bool = option(False, "EAGLE-3.1: feed the output after the final norm, not before it, to the next step")
    train_embedding_projection: bool = option(
        False, "train the projection of token embeddings in a draft that is narrower than its target"
    )
    init_head: Literal["target", "random"] = option(
        "target", "initial lm_head; target = the target's rows of the draft vocabulary; random = random weights"
    )

    init_from: str | None = option(
        None,
        "folder of an exported draft whose weights the draft starts from, written by this project, SpecForge, EAGLE or vLLM; "
        "its shapes must be the same, its draft vocabulary may differ",
    )

    def __post_init__(self):
        for name, value in vars(self).items():
            is_shape = name not in _NOT_SHAPES
            if self.config is not None and is_shape and value != getattr(type(self), name):
                problem = f"draft.config = {self.config} sets every shape; delete one of the two options"
                raise ConfigError(problem, key=f"draft.{name}", value=value)
        if self.train_embedding_projection and self.config is None and self.hidden_size is None:
            problem = "a draft as wide as its target has no projection; set draft.hidden_size or delete this option"
            raise ConfigError(problem, key="draft.train_embedding_projection", value=True)
        queries = self.num_attention_heads
        keys = self.num_key_value_heads
        if queries is not None and keys is not None and queries % keys:
            problem = f"does not divide draft.num_attention_heads = {queries}; use one of {divisors(queries)}"
            raise ConfigError(problem, key="draft.num_key_value_heads", value=keys)


@dataclass(frozen=True)
class TttSection:
    """Training-time test (TTT): the draft is unrolled on its own outputs."""

    steps: int = option(7, "number of steps S for which each position is unrolled", unit="steps", at_least=1)
    mask_alignment: Literal["inference", "specforge"] = option(
        "inference", "rows that carry loss; inference = those that occur when serving; specforge = SpecForge's rule"
    )
    compaction: bool = option(True, "skip the rows that no loss depends on; the result is the same")
    recompute: Literal["none", "mlp", "step"] = option(
        "none",
        "activations that are recomputed in the backward pass instead of kept in memory; mlp = those of the MLP; "
        "step = those of each whole step",
    )


# On a CPU, a chunk stays near the size of the caches. On a GPU, it has enough rows to make the
# summation of the head's gradient cheap.
CHUNK_MB = {"cpu": 64, "cuda": 1024}


@dataclass(frozen=True)
class LossSection:
    """How the draft's distribution is compared with the target's, and how losses are weighted."""

    kind: str = option("kl", f"loss between target and draft: {' | '.join(LOSS_KINDS)}, or a loss that a plugin registers")
    normaliser: Literal["slots", "positions"] = option(
        "slots",
        "divisor of the loss; slots = positions of the global batch whose target distribution is learned; "
        "positions = all positions of the micro-batch",
    )
    step_decay: float = option(0.8, "weight of TTT step i is step_decay**i", at_least=0.0)
    step_weights: tuple[float, ...] | None = option(None, "explicit weights, one per TTT step; replaces step_decay")
    temperature: float = option(
        1.0, "temperature of the target's distribution; above 1 softens it, below 1 sharpens it", at_least=1e-3
    )
    chunk_mb: int | None = option(
        None,
        f"memory limit of one chunk of the loss; null = {CHUNK_MB['cpu']} on a CPU, {CHUNK_MB['cuda']} on a GPU",
        unit="MiB",
        at_least=1,
    )
    gradient_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "precision in which the gradient of the draft head is summed over the chunks of the loss"
    )
    lk_kl_scale: float = option(1.0, "lk_lambda: weight of the KL term at acceptance rate 0", at_least=0.0)
    lk_kl_decay: float = option(
        1.0, "lk_lambda: rate of the exponential decay of the KL term's weight with the acceptance rate", at_least=0.0
    )

    def __post_init__(self):
        weights = self.step_weights
        if weights is not None and (min(weights, default=0.0) < 0 or not any(weights)):
            problem = "expected weights of at least 0, at least one of them above 0"
            raise ConfigError(problem, key="loss.step_weights", value=weights)


@dataclass(frozen=True)
class StoreSection:
    """How the store of hidden states, `target.store`, is written and read."""

    dtype: Literal["auto", "float32", "bfloat16", "float8_e4m3"] = option(
        "auto",
        "precision of captured hidden states; auto = bfloat16 on a GPU, float32 on a CPU; float8_e4m3 has one scale per token",
    )
    shard_mb: int = option(
        2048,
        "size of a shard; an interrupted capture keeps complete shards and writes the others again",
        unit="MiB",
        at_least=1,
    )
    threads: int = option(
        4, "threads per rank that write shards while the target continues to compute", unit="threads", at_least=1
    )
    slots: Literal["needed", "all"] = option(
        "needed",
        "positions whose target distribution is stored; needed = none if the draft learns from tokens alone, as DFlash does by "
        "default; all = so that other losses can train from the store too",
    )
    skip_bad: bool = option(False, "skip shards that are missing or altered, instead of stopping")


@dataclass(frozen=True)
class ParallelSection:
    """How ranks share the target, and the collective timeout."""

    tp_size: int = option(
        1, "ranks that share each layer of the target, split by heads (tensor parallelism)", unit="ranks", at_least=1
    )
    ep_size: int = option(
        1, "ranks that share the experts of a mixture of experts (expert parallelism)", unit="ranks", at_least=1
    )
    exchange_parts: int = option(
        0,
        "chunks per sharded layer, so that one chunk's communication overlaps with another's compute; "
        "0 = 2 on a GPU, 1 on a CPU",
        unit="chunks",
        at_least=0,
    )
    fp8_exchange: Literal["none", "dispatch", "both"] = option(
        "none",
        "exchange rows with other ranks' experts as fp8 (e4m3) with one scale per row, which rounds each value by up to "
        "6.25%; dispatch = rows sent to experts; both = also the results sent back",
    )
    allow_unverified: bool = option(
        False,
        "allow sharing a target of a family for which sharing was not shown to give the same results (docs/targets.md)",
    )
    timeout_s: int = option(1800, "time after which a stuck collective ends the job", unit="s", at_least=1)
    hang_s: int = option(
        20,
        "time without progress in a training step after which the job ends and names the rank that the others wait for; at "
        "least 10 times the longest part of the steps so far; 0 = no limit",
        unit="s",
        at_least=0,
    )
    cpu_threads: int = option(
        0, "compute threads per rank on a CPU; 0 = cores divided evenly among the local ranks", unit="threads", at_least=0
    )


AHEAD_OF_STORE = 2  # batches read ahead from a store: one being read, one ready
AHEAD_OF_DRAFT = 1  # batches that the target runs ahead of the draft
AUTO, SERIAL, COLOCATED, SPLIT = "auto", "serial", "colocated", "split"  # overlap.placement


@dataclass(frozen=True)
class OverlapSection:
    """Where and when the target runs, relative to the draft; the batches and the result are the same."""

    placement: Literal["auto", "serial", "colocated", "split"] = option(
        AUTO,
        "serial = target and draft one after the other; colocated = at the same time on the same ranks; split = on different "
        "ranks; auto = serial or colocated, whichever is faster in the first steps; a store is read at the same time",
    )
    target_ranks: int | None = option(
        None,
        "split: ranks that run the target, a multiple of the ranks that share one copy; the others train the draft",
        unit="ranks",
        at_least=1,
    )
    transfer_dtype: Literal["auto", "float32", "bfloat16", "float8_e4m3"] = option(
        "auto",
        "split: precision of hidden states on their way; auto = that in which the draft reads them; float8_e4m3 has one scale "
        "per token",
    )
    look_ahead: int | None = option(
        None,
        "micro-batches that the target, or the reading of a store, may be ahead of the draft; "
        f"null = {AHEAD_OF_STORE} with target.store, {AHEAD_OF_DRAFT} on the same ranks and in captures, "
        "and with split as many as keep all target ranks busy",
        unit="micro-batches",
        at_least=0,
    )
    look_ahead_mb: int | None = option(
        None, "limit on the memory of these micro-batches per rank; null = none", unit="MiB", at_least=1
    )
    layer_groups: int = option(
        6,
        "groups of layers into which the forward of a target that ranks share is divided; the groups are interleaved with "
        "the forward, backward and optimizer step of the draft",
        unit="groups",
        at_least=1,
    )
    priority: Literal["none", "target", "draft"] = option("none", "side whose work a GPU prefers while both run on it")
    check_order: bool = option(
        False, "compare after each step the order in which the ranks have issued collectives; for debugging"
    )
    trace_steps: tuple[int, ...] | None = option(
        None, "first and last optimizer step of which trace.json records the timeline, for ui.perfetto.dev; null = none"
    )

    @property
    def traced(self) -> tuple[int, int] | None:
        """First and last step of the trace."""
        return None if self.trace_steps is None else (self.trace_steps[0], self.trace_steps[1])

    def __post_init__(self):
        steps = self.trace_steps
        if steps is not None and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise ConfigError("expected two steps, the first and the last", key="overlap.trace_steps", value=steps)
        if (self.placement == SPLIT) != (self.target_ranks is not None):
            problem = "and overlap.placement=split belong together; set both or neither"
            raise ConfigError(problem, key="overlap.target_ranks", value=self.target_ranks)
        if self.placement != SPLIT and self.transfer_dtype != "auto":
            problem = "states are sent only with overlap.placement=split; delete this option"
            raise ConfigError(problem, key="overlap.transfer_dtype", value=self.transfer_dtype)
        if self.placement in (SPLIT, SERIAL) and self.priority != "none":
            problem = "needs overlap.placement=colocated or auto; otherwise the two sides do not share a GPU at the same time"
            raise ConfigError(problem, key="overlap.priority", value=self.priority)
        if self.placement == SERIAL and self.look_ahead_mb is not None:
            problem = "needs another overlap.placement; serial execution prepares nothing ahead"
            raise ConfigError(problem, key="overlap.look_ahead_mb", value=self.look_ahead_mb)
        if self.placement == SPLIT and self.check_order:
            problem = "checks ranks that run both sides, which overlap.placement=split does not have; set it to false"
            raise ConfigError(problem, key="overlap.check_order", value=True)
        if self.placement == SERIAL and self.look_ahead:
            problem = "needs overlap.placement=colocated or auto; serial execution prepares nothing ahead"
            raise ConfigError(problem, key="overlap.look_ahead", value=self.look_ahead)


@dataclass(frozen=True)
class CheckpointSection:
    """DeepSpeed checkpoints, from which a run can be resumed."""

    every_steps: int = option(
        500, "optimizer steps between checkpoints; there is one after the last step too; 0 = none", unit="steps", at_least=0
    )
    resume: Literal[False, True, "auto"] = option(
        False, "true = continue from the newest complete checkpoint of output_dir; auto = or begin a new run if there is none"
    )
    on_bad_step: Literal["stop", "skip"] = option(
        "stop",
        "what follows a step whose loss is not finite: stop = the run ends; skip = its gradient is dropped, and the run "
        "continues; in both cases the documents of the step are listed in output_dir/bad_steps",
    )
    keep: int = option(
        2,
        "number of newest checkpoints to keep, in addition to that of the best draft by evaluation.best_by; others are deleted",
        unit="checkpoints",
        at_least=1,
    )
    export: bool = option(False, "write the draft in the format of servers next to each checkpoint, in its folder 'draft'")


ACCEPTANCE, LOSS, SIMULATED_ACCEPTANCE = "acceptance", "loss", "simulated_acceptance"  # evaluation.best_by


@dataclass(frozen=True)
class EvaluationSection:
    """Acceptance and loss on held-out conversations, before, during and after training."""

    every_steps: int = option(
        0,
        "optimizer steps between evaluations during training; the best draft is then exported; 0 = none during training",
        unit="steps",
        at_least=0,
    )
    best_by: Literal["acceptance", "loss", "simulated_acceptance"] = option(
        ACCEPTANCE,
        "what makes a draft the best during training: acceptance = largest acceptance length on held-out prompts; "
        "loss = smallest loss on held-out conversations; simulated_acceptance = largest simulated acceptance length on them",
    )
    patience: int | None = option(
        None,
        "evaluations without a better draft after which training ends early; null = never",
        unit="evaluations",
        at_least=1,
    )
    num_documents: int = option(
        64,
        "held-out conversations whose loss, accuracy and acceptance rates are measured with each evaluation during training; "
        "0 = none",
        unit="documents",
        at_least=0,
    )
    store: str | None = option(
        None,
        "folder with hidden states of held-out conversations, captured as those of target.store; for a run that reads "
        "target.store",
    )
    num_prompts: int = option(24, "held-out prompts decoded; 0 = no acceptance is measured", unit="prompts", at_least=0)
    max_new_tokens: int = option(64, "tokens generated per prompt", unit="tokens", at_least=1)
    num_steps: int = option(
        5, "depth of the tokens that are drafted per target forward; SGLang's speculative-num-steps", unit="steps", at_least=1
    )
    topk: int = option(
        1,
        "tokens drafted after each node of a tree, and nodes read per level; SGLang's speculative-eagle-topk; 1 = a chain",
        unit="tokens",
        at_least=1,
    )
    num_draft_tokens: int | None = option(
        None,
        "tokens of a tree that a target forward reads, with the newest committed one; SGLang's speculative-num-draft-tokens; "
        "null = num_steps + 1, for a chain",
        unit="tokens",
        at_least=2,
    )
    tree_rule: TreeRule = option(
        "ancestors",
        "keys that a node of a tree attends to in the draft; ancestors = those of its ancestors; sglang = those of its row at "
        "earlier levels, as SGLang does",
    )
    min_confidence: float = option(
        0.0,
        "dspark: a block's drafted tokens end where the confidence head's probability that all are accepted falls below this; "
        "0 = all are verified",
        at_least=0.0,
        at_most=1.0,
    )
    prompts_per_batch: int | None = option(
        None,
        "prompts decoded together; null = 32 on a GPU, 1 on a CPU; 1 decodes them one by one and also reports speeds",
        unit="prompts",
        at_least=1,
    )

    def __post_init__(self):
        _ = self.tree  # which checks the sizes

    @property
    def tree(self) -> TreeShape:
        """The shape of what the draft proposes."""
        return TreeShape(self.num_steps, self.topk, self.num_draft_tokens, self.tree_rule)


_LEARNING = ("draft", "ttt", "block", "objective", "loss")  # sections that affect the trained weights


@dataclass(frozen=True)
class Config:
    """Configuration of a whole run."""

    target: TargetSection = field(default_factory=TargetSection)
    data: DataSection = field(default_factory=DataSection)
    prepare: PrepareSection = field(default_factory=PrepareSection)
    regenerate: RegenerateSection = field(default_factory=RegenerateSection)
    draft: DraftSection = field(default_factory=DraftSection)
    ttt: TttSection = field(default_factory=TttSection)
    block: BlockSection = field(default_factory=BlockSection)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    loss: LossSection = field(default_factory=LossSection)
    store: StoreSection = field(default_factory=StoreSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    overlap: OverlapSection = field(default_factory=OverlapSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    kernels: Literal["auto", "triton", "flash", "reference"] = option(
        "auto",
        "implementation of attention and loss; auto = Triton on a GPU, blocked PyTorch on a CPU; flash = Triton, with flash "
        "attention for the prefix; reference = plain PyTorch; all but reference use liger-kernel in draft and target on a GPU",
    )
    output_dir: str = option("outputs/run", "folder for the draft, checkpoints, metrics and the resolved configuration")
    seed: int = option(0, "random seed of shuffling and initialisation", at_least=0)
    epochs: int = option(1, "passes over the data", unit="epochs", at_least=1)
    max_steps: int | None = option(
        None, "optimizer steps after which training ends; null = all steps of the epochs", at_least=1
    )
    anneal_steps: int = option(
        0,
        "last optimizer steps, also of a run that evaluation.patience ends, in which the learning rate of the DeepSpeed file's "
        "schedule falls linearly to almost 0; with WarmupLR this is a warmup-stable-decay schedule",
        unit="steps",
        at_least=0,
    )
    log_every_steps: int = option(1, "optimizer steps between lines of metrics.jsonl", unit="steps", at_least=1)

    def __post_init__(self):
        self._check_shipped("loss.kind", self.loss.kind, LOSS_KINDS)
        self._check_shipped("draft.method", self.draft.method, DRAFT_METHODS)
        is_eagle3 = self.draft.method == EAGLE3
        layers = self.target.aux_layers
        if is_eagle3 and layers is not None and len(layers) != 3:
            problem = "expected three distinct 0-based layers in ascending order, the order in which SGLang captures them"
            raise ConfigError(problem, key="target.aux_layers", value=layers)
        source = self.target.source
        if source == ONLINE and self.target.store is not None:
            problem = "runs the target, but target.store is set; leave one of them out"
            raise ConfigError(problem, key="target.source", value=source)
        if source == STORED and self.target.store is None:
            problem = "needs target.store, the folder that capture_hidden_states.py wrote"
            raise ConfigError(problem, key="target.source", value=source)
        if is_eagle3:
            self._check_unread(("block", "objective"))
        weights = self.loss.step_weights
        if is_eagle3 and weights is not None and len(weights) != self.ttt.steps:
            problem = f"has {len(weights)} weights for ttt.steps = {self.ttt.steps}; give one weight per step"
            raise ConfigError(problem, key="loss.step_weights", value=weights)
        if self.draft.vocab_from == "argmax" and self.target.store is None:
            problem = "needs target.store, which holds the target's most likely tokens; capture first, or set it to assistant"
            raise ConfigError(problem, key="draft.vocab_from", value="argmax")
        if self.overlap.placement == SPLIT and self.target.source not in (None, ONLINE):
            problem = "runs the target on other ranks, so the source must be the running target; delete target.source"
            raise ConfigError(problem, key="overlap.placement", value=SPLIT)
        if self.overlap.placement == SPLIT and self.target.store is not None:
            problem = "a store is written and read without ranks of their own for the target; use another placement"
            raise ConfigError(problem, key="overlap.placement", value=SPLIT)
        if self.max_steps is not None and self.anneal_steps >= self.max_steps:
            problem = f"leaves no step at the full learning rate, since max_steps is {self.max_steps}"
            raise ConfigError(problem, key="anneal_steps", value=self.anneal_steps)
        self._check_evaluation()
        if self.evaluation.num_prompts and not self.data.held_out and self.target.store is None:
            problem = (
                f"evaluation.num_prompts = {self.evaluation.num_prompts} needs held-out prompts; name a file or set it to 0"
            )
            raise ConfigError(problem, key="data.held_out", value=self.data.held_out)

    def _check_evaluation(self) -> None:
        """Raise ConfigError if an evaluation during training could not measure what it is asked for."""
        section = self.evaluation
        reads_store = self.target.store is not None
        if section.store is not None and not reads_store:
            problem = "belongs to a run that reads target.store; where the target runs, name conversations in data.held_out"
            raise ConfigError(problem, key="evaluation.store", value=section.store)
        for name in ("patience", "store", "best_by"):
            value = getattr(section, name)
            if value != OPTIONS[f"evaluation.{name}"].default and not section.every_steps:
                problem = "is about evaluations during training; set evaluation.every_steps too"
                raise ConfigError(problem, key=f"evaluation.{name}", value=value)
        if not section.every_steps:
            return
        if section.best_by == ACCEPTANCE and reads_store:
            problem = "needs a target that decodes, and target.store has none; use loss with evaluation.store"
            raise ConfigError(problem, key="evaluation.best_by", value=section.best_by)
        if section.best_by == ACCEPTANCE and not section.num_prompts:
            problem = "needs held-out prompts; set evaluation.num_prompts, or use loss"
            raise ConfigError(problem, key="evaluation.best_by", value=section.best_by)
        if section.best_by != ACCEPTANCE and not section.num_documents:
            problem = "needs held-out conversations; set evaluation.num_documents"
            raise ConfigError(problem, key="evaluation.best_by", value=section.best_by)
        if section.best_by != ACCEPTANCE and reads_store and section.store is None:
            problem = "needs the hidden states of held-out conversations; capture them too, and set evaluation.store"
            raise ConfigError(problem, key="evaluation.best_by", value=section.best_by)
        if section.best_by != ACCEPTANCE and not reads_store and not self.data.held_out:
            problem = f"evaluation.best_by={section.best_by} needs held-out conversations; name a file"
            raise ConfigError(problem, key="data.held_out", value=self.data.held_out)

    def _check_unread(self, sections: tuple[str, ...]) -> None:
        """Raise ConfigError if an option of sections that EAGLE-3 does not read differs from its default."""
        for section in sections:
            for name, value in vars(getattr(self, section)).items():
                if not is_default(f"{section}.{name}", value):
                    problem = f"is for block drafters, and draft.method is {EAGLE3}; set draft.method to one, or delete it"
                    raise ConfigError(problem, key=f"{section}.{name}", value=value)

    def _check_shipped(self, key: str, value: str, shipped: tuple[str, ...]) -> None:
        """Raise ConfigError for a name that is not shipped if no plugin could register it."""
        if value not in shipped and not self.target.plugins:
            hint = did_you_mean(value, shipped) or "; a name of your own needs target.plugins"
            raise ConfigError(f"expected {' | '.join(shipped)}{hint}", key=key, value=value)

    @property
    def placement(self) -> str:
        """The placement of the target; reading a store is always colocated unless it is set to serial."""
        placement = self.overlap.placement
        return COLOCATED if placement == AUTO and self.target.store is not None else placement

    @property
    def look_ahead(self) -> int:
        """Number of micro-batches that may be prepared ahead on the same ranks, unless execution is serial."""
        if self.overlap.look_ahead is not None:
            return self.overlap.look_ahead
        return AHEAD_OF_DRAFT if self.target.store is None else AHEAD_OF_STORE

    @property
    def replica_size(self) -> int:
        """Ranks that share one copy of the target; 1 with a store, which each rank reads alone."""
        if self.target.store is not None:
            return 1
        return max(self.parallel.tp_size, self.parallel.ep_size)

    @property
    def kept_on_resume(self) -> dict[str, Any]:
        """Options that affect the result and that a resumed run must not change, by dotted key."""
        values = {f"{name}.{key}": x for name in _LEARNING for key, x in vars(getattr(self, name)).items()}
        for cost in ("ttt.compaction", "ttt.recompute", "block.recompute", "loss.chunk_mb"):
            del values[cost]
        del values["draft.init_from"]  # a checkpoint has its own weights
        of_target = ("aux_layers", "fp8_activations", "source")
        return {f"target.{name}": getattr(self.target, name) for name in of_target} | values


SECTIONS: dict[str, type[Any]] = {
    f.name: f.type for f in dataclasses.fields(Config) if isinstance(f.type, type) and dataclasses.is_dataclass(f.type)
}


def options() -> Iterator[tuple[str, dataclasses.Field]]:
    """Yield every option as (dotted key, field): first those of sections, then top-level ones."""
    for section, kind in SECTIONS.items():
        yield from ((f"{section}.{f.name}", f) for f in dataclasses.fields(kind))
    yield from ((f.name, f) for f in dataclasses.fields(Config) if f.name not in SECTIONS)


OPTIONS = dict(options())
RECIPE_KEYS = (*SECTIONS, *OPTIONS)
# Defaults of earlier versions, which the config.yaml of their runs states. Without a parity they mean what null means now.
FORMER_DEFAULTS = {"objective.kl": 0.0, "objective.selector_inject": False, "objective.selector_normaliser": "same"}


def is_default(key: str, value: Any) -> bool:
    """Return whether an option has its default, or the one of an earlier version."""
    return value == OPTIONS[key].default or (key in FORMER_DEFAULTS and value == FORMER_DEFAULTS[key])
