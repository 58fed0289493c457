"""What a recipe can say: one frozen dataclass a section, and the one home of every default.

What a recipe leaves out has its default here; `launcher/recipes/embedded.yaml` is the recipe of a run that names none.
What DeepSpeed's JSON owns (batch sizes, optimizer, schedule, precision, clipping, ZeRO, monitors) has no key here.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.config.data_section import EMBEDDED, DataSection, PrepareSection, RegenerateSection
from engine.config.strict import ConfigError, bounded, did_you_mean, option

LOSS_KINDS = ("kl", "lk_alpha", "lk_lambda", "total_variation", "jensen_shannon")
CHECKPOINTS, DRAFT = "checkpoints", "draft"  # folders in a run's output_dir


@dataclass(frozen=True)
class TargetSection:
    """The frozen large model that the draft learns from."""

    path: str = option(EMBEDDED, "Hugging Face folder or hub id of the target; 'embedded' is the model shipped with DraftSpeed")
    revision: str | None = option(None, "hub revision of the target; null = its default branch")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "precision the target runs in; auto = bfloat16 on a GPU, float32 on a CPU"
    )
    keep_quantised: Literal["none", "fp8", "all"] = option(
        "fp8", "which weights of a quantised target stay so in memory and are dequantised at use; all = MXFP4 and int4 too"
    )
    fp8_activations: bool = option(
        False,
        "quantise what fp8 weights are multiplied with, too, a scale a token and block of inputs, as their servers do",
    )
    aux_layers: tuple[int, ...] | None = option(
        None, "three 0-based layers whose outputs feed the draft; null = 1, L//2-1, L-4", unit="layers"
    )
    trust_remote_code: bool = option(False, "run Python code that the checkpoint ships")
    plugins: tuple[str, ...] = option(
        (), "Python files run at the start, which may register target families and sources of hidden states (docs/extending.md)"
    )
    store: str | None = option(
        None, "folder of captured hidden states: capture_hidden_states.py writes it, train.py learns from it without the target"
    )
    source: str | None = option(
        None, "registered source of hidden states; null = the store that target.store names, or else the running target"
    )
    non_finite: Literal["leave_out", "stop"] = option(
        "leave_out",
        "documents whose hidden states are NaN or infinite: leave_out = print their names and train without them; "
        "stop = end the run",
    )

    @property
    def hub_arguments(self) -> dict[str, Any]:
        """What every `from_pretrained` of the target takes beside the path."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def __post_init__(self):
        layers = self.aux_layers
        if layers is not None and (len(layers) != 3 or list(layers) != sorted(set(layers)) or layers[0] < 0):
            problem = "expected three distinct 0-based layers in ascending order, the order in which SGLang captures them"
            raise ConfigError(problem, key="target.aux_layers", value=layers)
        if self.revision is not None and self.path == EMBEDDED:
            problem = "the embedded target has no revisions; set target.path to a hub id, or leave target.revision null"
            raise ConfigError(problem, key="target.revision", value=self.revision)
        if self.fp8_activations and self.keep_quantised == "none":
            problem = "needs weights that stay in fp8; set target.keep_quantised=fp8, or set this to false"
            raise ConfigError(problem, key="target.fp8_activations", value=True)


def divisors(number: int) -> list[int]:
    """Every whole number that divides this one, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


@dataclass(frozen=True)
class DraftSection:
    """The trained EAGLE-3 model; every shape left null follows the target."""

    config: str | None = option(None, "draft config.json that fixes every shape; null = derived from the target's config")
    vocab_size: int = option(32000, "draft vocabulary U: the most frequent assistant tokens", unit="tokens", at_least=1)
    vocab_from: Literal["assistant", "argmax"] = option(
        "assistant", "what is counted for it: the assistant's tokens, or, with target.store, the target's most likely ones"
    )
    vocab_map: str | None = option(None, "vocab_map.safetensors of an earlier run to take the draft vocabulary from, uncounted")
    num_layers: int = option(1, "decoder layers", unit="layers", at_least=1)
    hidden_size: int | None = option(None, "hidden size D; null = the target's", unit="features", at_least=1)
    intermediate_size: int | None = option(None, "MLP width F; null = the target's dense width", unit="features", at_least=1)
    num_attention_heads: int | None = option(None, "query heads H; null = the target's", unit="heads", at_least=1)
    num_key_value_heads: int | None = option(None, "key/value heads G; null = the target's", unit="heads", at_least=1)
    fc_norm: bool = option(False, "EAGLE-3.1: an RMSNorm on each auxiliary hidden state before fc")
    norm_output: bool = option(False, "EAGLE-3.1: feed the normed output, not the pre-norm one, to the next step")
    train_embedding_projection: bool = option(False, "train the embedding projection of a draft narrower than its target")
    init_head: Literal["target", "random"] = option("target", "start lm_head from the target's mapped rows, or at random")

    def __post_init__(self):
        for name, value in vars(self).items():
            is_shape = name not in ("config", "vocab_from", "vocab_map", "train_embedding_projection", "init_head")
            if self.config is not None and is_shape and value != getattr(type(self), name):
                problem = f"draft.config = {self.config} fixes every shape; delete one of the two"
                raise ConfigError(problem, key=f"draft.{name}", value=value)
        if self.train_embedding_projection and self.config is None and self.hidden_size is None:
            problem = "there is no projection when the draft is as wide as its target; set draft.hidden_size or delete this"
            raise ConfigError(problem, key="draft.train_embedding_projection", value=True)
        queries = self.num_attention_heads
        keys = self.num_key_value_heads
        if queries is not None and keys is not None and queries % keys:
            problem = f"does not divide draft.num_attention_heads = {queries}; use one of {divisors(queries)}"
            raise ConfigError(problem, key="draft.num_key_value_heads", value=keys)


@dataclass(frozen=True)
class TttSection:
    """Training-time test: the draft unrolled on its own outputs."""

    steps: int = option(7, "steps S each position is unrolled", unit="steps", at_least=1)
    mask_alignment: Literal["inference", "specforge"] = option(
        "inference", "rows that carry loss: those that occur when serving, or SpecForge's rule"
    )
    compaction: bool = option(True, "leave out the rows that no loss depends on; the result is the same")
    recompute: Literal["none", "mlp", "step"] = option(
        "none", "activations computed again in the backward pass, not kept: those of the MLP, or of each whole step"
    )


CHUNK_MB = {"cpu": 64, "cuda": 1024}  # near a CPU's caches; on a GPU enough rows that adding up the head's gradient is cheap


@dataclass(frozen=True)
class LossSection:
    """How the draft's distribution is compared with the target's, and how losses are weighted."""

    kind: str = option("kl", f"how draft and target are compared: {' | '.join(LOSS_KINDS)}, or a loss that a plugin registers")
    normaliser: Literal["slots", "positions"] = option(
        "slots", "divide by slots of the global batch, or by micro-batch positions"
    )
    step_decay: float = option(0.8, "weight of step i is step_decay**i", at_least=0.0)
    step_weights: tuple[float, ...] | None = option(None, "explicit weights, one a TTT step; replaces step_decay")
    temperature: float = option(1.0, "softens (above 1) or sharpens (below 1) the target's distribution", at_least=1e-3)
    chunk_mb: int | None = option(
        None,
        f"memory that one chunk of the loss may take; null = {CHUNK_MB['cpu']} on a CPU, {CHUNK_MB['cuda']} on a GPU",
        unit="MiB",
        at_least=1,
    )
    gradient_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "precision in which the draft head's gradient adds up over the chunks of the loss"
    )
    lk_kl_scale: float = option(1.0, "lk_lambda: weight of the KL part at acceptance rate 0", at_least=0.0)
    lk_kl_decay: float = option(1.0, "lk_lambda: how fast that weight falls with the acceptance rate", at_least=0.0)

    def __post_init__(self):
        weights = self.step_weights
        if weights is not None and (min(weights, default=0.0) < 0 or not any(weights)):
            problem = "expected weights of at least 0, one of them above 0"
            raise ConfigError(problem, key="loss.step_weights", value=weights)


@dataclass(frozen=True)
class StoreSection:
    """How `target.store` is written and read."""

    dtype: Literal["auto", "float32", "bfloat16", "float8_e4m3"] = option(
        "auto", "precision of captured hidden states; auto = bfloat16 on a GPU, float32 on a CPU; fp8 has a scale a token"
    )
    shard_mb: int = option(2048, "size of a shard, which is written and kept whole", unit="MiB", at_least=1)
    threads: int = option(4, "threads of a rank that write shards while the target runs on", unit="threads", at_least=1)
    skip_bad: bool = option(False, "train without the shards that are missing or altered, instead of stopping")


@dataclass(frozen=True)
class ParallelSection:
    """How ranks share the target, and how patient they are."""

    tp_size: int = option(
        1, "ranks that share each layer of the target, head by head (tensor parallelism)", unit="ranks", at_least=1
    )
    ep_size: int = option(1, "ranks that share the experts of a mixture (expert parallelism)", unit="ranks", at_least=1)
    exchange_parts: int = option(
        0,
        "chunks per sharded layer, so that one chunk's communication overlaps with another's compute; "
        "0 = 2 on a GPU, 1 on a CPU",
        unit="chunks",
        at_least=0,
    )
    fp8_exchange: Literal["none", "dispatch", "both"] = option(
        "none",
        "send rows to other ranks' experts as fp8 (e4m3) with one scale per row, which rounds each value by up to "
        "6.25%: dispatch = rows on the way there, both = also results on the way back",
    )
    unproven: bool = option(
        False, "share also a target whose family was not shown to give the same results shared (docs/targets.md)"
    )
    timeout_s: int = option(1800, "seconds after which a stuck collective ends the job", unit="s", at_least=1)
    cpu_threads: int = option(
        0, "compute threads a rank on CPU; 0 = cores shared evenly by the local ranks", unit="threads", at_least=0
    )


AHEAD_OF_STORE = 2  # batches read ahead from a store: one being read, one ready


@dataclass(frozen=True)
class OverlapSection:
    """How far the target, or the reading of a store, runs ahead of the draft."""

    run_ahead: int | None = option(
        None,
        "batches that the target's forward, or the reading of a store, runs ahead of the draft step; 0 = one after the other; "
        f"null = {AHEAD_OF_STORE} with target.store, else 0",
        unit="batches",
        at_least=0,
    )


@dataclass(frozen=True)
class CheckpointSection:
    """DeepSpeed checkpoints, for resuming."""

    every_steps: int = option(0, "optimizer steps between checkpoints; 0 = none", unit="steps", at_least=0)
    resume: bool = option(False, "continue from the newest checkpoint of output_dir")
    keep: int = option(2, "newest checkpoints kept; older ones are deleted", unit="checkpoints", at_least=1)


@dataclass(frozen=True)
class EvaluationSection:
    """Real speculative decoding on held-out prompts, before and after training."""

    num_prompts: int = option(24, "held-out prompts decoded; 0 = no evaluation", unit="prompts", at_least=0)
    max_new_tokens: int = option(64, "tokens generated per prompt", unit="tokens", at_least=1)
    draft_tokens: int = option(5, "tokens the draft proposes per target forward", unit="tokens", at_least=1)
    prompts_per_batch: int | None = option(
        None,
        "prompts decoded together; null = 32 on a GPU, 1 on a CPU; 1 decodes them one by one and reports speeds too",
        unit="prompts",
        at_least=1,
    )


@dataclass(frozen=True)
class Config:
    """A whole run."""

    target: TargetSection = field(default_factory=TargetSection)
    data: DataSection = field(default_factory=DataSection)
    prepare: PrepareSection = field(default_factory=PrepareSection)
    regenerate: RegenerateSection = field(default_factory=RegenerateSection)
    draft: DraftSection = field(default_factory=DraftSection)
    ttt: TttSection = field(default_factory=TttSection)
    loss: LossSection = field(default_factory=LossSection)
    store: StoreSection = field(default_factory=StoreSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    overlap: OverlapSection = field(default_factory=OverlapSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    kernels: Literal["auto", "triton", "flash", "reference"] = option(
        "auto",
        "attention and loss; auto = Triton on a GPU, blocks of PyTorch on a CPU; flash = flash attention for the prefix; "
        "all but reference use liger-kernel in draft and target on a GPU",
    )
    output_dir: str = option("outputs/run", "folder for the draft, checkpoints, metrics and the resolved configuration")
    seed: int = option(0, "seed of shuffling and initialisation", at_least=0)
    epochs: int = option(1, "passes over the data", unit="epochs", at_least=1)
    max_steps: int | None = option(None, "optimizer steps after which training ends; null = what the epochs hold", at_least=1)
    log_every_steps: int = option(1, "optimizer steps between lines of metrics.jsonl", unit="steps", at_least=1)

    def __post_init__(self):
        kind = self.loss.kind
        if kind not in LOSS_KINDS and not self.target.plugins:
            hint = did_you_mean(kind, LOSS_KINDS) or "; a loss of your own needs target.plugins"
            problem = f"expected {' | '.join(LOSS_KINDS)}{hint}"
            raise ConfigError(problem, key="loss.kind", value=kind)
        weights = self.loss.step_weights
        if weights is not None and len(weights) != self.ttt.steps:
            problem = f"has {len(weights)} weights for ttt.steps = {self.ttt.steps}; give one weight a step"
            raise ConfigError(problem, key="loss.step_weights", value=weights)
        if self.draft.vocab_from == "argmax" and self.target.store is None:
            problem = "needs target.store, where the target's most likely tokens are; count the assistant's, or capture first"
            raise ConfigError(problem, key="draft.vocab_from", value="argmax")
        every = self.checkpoint.every_steps
        logged = self.log_every_steps
        if every % logged:
            problem = f"is no multiple of log_every_steps = {logged}, and a resumed run would log other means; use a multiple"
            raise ConfigError(problem, key="checkpoint.every_steps", value=every)
        if self.evaluation.num_prompts and not self.data.held_out and self.target.store is None:
            problem = (
                f"evaluation.num_prompts = {self.evaluation.num_prompts} needs held-out prompts; name a file or set it to 0"
            )
            raise ConfigError(problem, key="data.held_out", value=self.data.held_out)

    @property
    def run_ahead(self) -> int:
        """Batches that are prepared ahead of the draft step."""
        if self.overlap.run_ahead is not None:
            return self.overlap.run_ahead
        return 0 if self.target.store is None else AHEAD_OF_STORE

    @property
    def target_ranks(self) -> int:
        """Ranks that share one copy of the target; a store is read by each rank alone."""
        if self.target.store is not None:
            return 1
        return max(self.parallel.tp_size, self.parallel.ep_size)

    @property
    def kept_on_resume(self) -> dict[str, Any]:
        """Options by dotted key that a resumed run must share with the one that it continues: what its result depends on."""
        values = {f"{name}.{key}": x for name in ("draft", "ttt", "loss") for key, x in vars(getattr(self, name)).items()}
        for cost in ("ttt.compaction", "ttt.recompute", "loss.chunk_mb"):
            del values[cost]
        of_target = ("aux_layers", "fp8_activations")
        return {f"target.{name}": getattr(self.target, name) for name in of_target} | values


SECTIONS: dict[str, type[Any]] = {
    f.name: f.type for f in dataclasses.fields(Config) if isinstance(f.type, type) and dataclasses.is_dataclass(f.type)
}


def options() -> Iterator[tuple[str, dataclasses.Field]]:
    """Every option as (dotted key, field): those of the sections, then those at the top."""
    for section, kind in SECTIONS.items():
        yield from ((f"{section}.{f.name}", f) for f in dataclasses.fields(kind))
    yield from ((f.name, f) for f in dataclasses.fields(Config) if f.name not in SECTIONS)


OPTIONS = dict(options())
RECIPE_KEYS = (*SECTIONS, *OPTIONS)


def kind_of(field_: dataclasses.Field) -> Any:
    """An option's type with its bounds."""
    return bounded(field_.type, field_.metadata["at_least"], field_.metadata["at_most"])
