"""Time one training step of a draft: the target's head, the training-time test and the backward.

    python -m benchmarks.bench_train_step --shapes 'llama3.1-8b-8k-*' --json step.json

Run from the repository's root. A shape's name gives the target, the tokens per micro-batch, and the
share of assistant tokens, which are the last ones of each document. The micro-batch is one
document, or with `packed` several documents of 2048 tokens. The draft is the one that
launcher/train.py derives, with recipes from launcher/recipes and target configs from
tests/recipes_configs.py. Weights and hidden states are random, and the target's most likely token
is always in the draft vocabulary.
The target's decoder and the optimizer do not run.

A provider is a set of recipe options. All providers are compared with the same floor, which counts
only the rows that a loss depends on. MFU counts the same FLOPs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Place, Provider, choose_tiles, main
from engine.batch import LossNorms, MicroBatch, PackedBatch, TargetOutput
from engine.config.recipe import load_config
from engine.config.sections import TttSection
from engine.kernels import Kernels, choose_kernels
from engine.models.costs import StepPart
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_config import Eagle3Config, derive_draft_config
from engine.models.eagle3.flops import StepCounts, step_parts
from engine.models.eagle3.unroll import Teacher, TrainingTimeTest
from engine.models.training_rows import allowed_rows, slots_of
from engine.models.vocab_map import VocabMap
from engine.target.head import TargetHead
from tests.recipes_configs import target_config

RECIPES = Path(__file__).resolve().parents[1] / "launcher" / "recipes"
MODELS = ("llama3.1-8b", "llama3.3-70b", "qwen3-30b-a3b", "kimi-k2")
SHARES = (1.0, 0.5, 0.3, 0.1)
PACKED_TOKENS = 2048
OPTIONS = {  # provider -> the recipe options that it changes, by dotted key
    "compacted": {},
    "uncompacted": {"ttt.compaction": "false"},
    "recompute mlp": {"ttt.recompute": "mlp"},
    "recompute step": {"ttt.recompute": "step"},
}
ON_A_GPU = {"flash": {"kernels": "flash"}}


@dataclass(frozen=True)
class StepShape:
    """A draft and a micro-batch for it.

    model: name of a recipe, or a key of `ON_A_CPU`.
    assistant: share of each document's tokens that carry loss; they are its last tokens.
    """

    model: str
    num_tokens: int
    document_tokens: int
    assistant: float

    @property
    def draft(self) -> Eagle3Config:
        if self.model in ON_A_CPU:
            return Eagle3Config.from_dict(ON_A_CPU[self.model])
        recipe = load_config(RECIPES / f"{self.model}.yaml")
        return derive_draft_config(target_config(self.model), recipe.draft, recipe.target.aux_layers)

    @property
    def batch(self) -> PackedBatch:
        position_T = torch.arange(self.num_tokens)
        first = self.document_tokens - round(self.document_tokens * self.assistant)
        cu_seqlens = torch.arange(0, self.num_tokens + 1, self.document_tokens, dtype=torch.int32)
        return PackedBatch(torch.zeros_like(position_T), position_T % self.document_tokens >= first, cu_seqlens)


SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "draft_vocab_size": 8000,
    "max_position_embeddings": 4096,
}
TINY = SMALL | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 512, "draft_vocab_size": 256}
ON_A_CPU = {"cpu": SMALL, "cpu-tiny": TINY}  # cpu-tiny is used by tests
TINY_TOKENS = 128


def _shapes() -> dict[str, StepShape]:
    sizes = [(model, 1024 * thousands, "") for model in MODELS for thousands in (2, 8, 16, 32, 128)]
    sizes += [("llama3.1-8b", 1024 * thousands, "-packed") for thousands in (8, 16, 32, 128)]
    sizes += [("qwen3-30b-a3b", 16 * 1024, "-packed"), ("cpu", 1024, "")]
    shapes = {}
    for share in SHARES:
        shapes[f"cpu-tiny-{share}"] = StepShape("cpu-tiny", TINY_TOKENS, TINY_TOKENS, share)
        for model, num_tokens, packed in sizes:
            document_tokens = PACKED_TOKENS if packed else num_tokens
            name = f"{model}-{num_tokens // 1024}k{packed}-{share}"
            shapes[name] = StepShape(model, num_tokens, document_tokens, share)
    return shapes


@dataclass(frozen=True)
class StepTensors:
    """A draft's configuration, a target's head and hidden states, and a micro-batch."""

    place: Place
    config: Eagle3Config
    head: TargetHead
    vocab_map: VocabMap
    batch: PackedBatch
    aux_TA: Tensor
    last_hidden_TD: Tensor
    embed_TD: Tensor


def prepare(shape: StepShape, place: Place) -> StepTensors:
    """Create all tensors on the device, so that large weights are never copied from the CPU."""
    torch.manual_seed(0)
    config = shape.draft
    batch = shape.batch.to(place.device)
    vocab_size = config.vocab_size
    size = config.target_hidden_size
    with place.device:
        chosen_U = torch.randperm(vocab_size)[: config.draft_vocab_size].sort().values
        in_draft_V = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, chosen_U, True)
        head_VD = torch.randn(vocab_size, size, dtype=place.dtype) * (4 * size**-0.5)
        head_VD *= torch.where(in_draft_V, 1.0, 0.05).to(place.dtype)[:, None]
        sizes = 3 * size, size, size
        states = [torch.randn(shape.num_tokens, width, dtype=place.dtype) for width in sizes]
    return StepTensors(place, config, TargetHead(head_VD), VocabMap(chosen_U, in_draft_V), batch, *states)


def _random_draft(config: Eagle3Config, kernels: Kernels, place: Place) -> Eagle3Draft:
    torch.manual_seed(1)
    with place.device:
        draft = Eagle3Draft(config, kernels).to(place.dtype)
    if draft.embed_projection is not None:
        draft.embed_projection.requires_grad_(False)
    return draft


def setup(options: dict[str, str], tensors: StepTensors) -> Callable[[], object]:
    config = load_config(None, [f"{key}={value}" for key, value in options.items()])
    head = tensors.head
    batch = tensors.batch
    place = tensors.place
    own = Kernels(recompute=config.ttt.recompute)
    kernels = choose_kernels(config.kernels, place.device, place.dtype, tensors.config.head_dim, own)
    choose_tiles(kernels, place, tensors.config.head_dim)
    draft = _random_draft(tensors.config, kernels, place)
    teacher = Teacher(head.rows(tensors.vocab_map.target_ids_U).logits, tensors.vocab_map)
    test = TrainingTimeTest(config.ttt, config.loss, teacher)
    # A run computes these rows on the host while it reads data.
    allowed_ST = allowed_rows(batch, config.ttt)
    slots_N = slots_of(allowed_ST)
    num_allowed_S = allowed_ST.sum(1)
    norms = LossNorms(num_allowed_S[0].float().clamp_min(1), num_allowed_S.float())

    def step() -> None:
        last_hidden_ND = tensors.last_hidden_TD[slots_N]
        target = TargetOutput(tensors.aux_TA, slots_N, last_hidden_ND, *head.argmax_and_lse(last_hidden_ND))
        test(draft, MicroBatch(batch, target, tensors.embed_TD, allowed_ST), norms).loss.backward()
        draft.zero_grad()

    return step


def parts(shape: StepShape) -> dict[str, StepPart]:
    batch = shape.batch
    allowed_ST = allowed_rows(batch, TttSection())
    return step_parts(shape.draft.shape, StepCounts.needed(batch, allowed_ST, slots_of(allowed_ST).numel()))


def figures(shape: StepShape, seconds: float) -> dict[str, float]:
    return {"tokens/s": shape.num_tokens / seconds}


BENCHMARK = Benchmark(
    module="benchmarks.bench_train_step",
    shapes=_shapes(),
    default_shapes={"cpu": ("cpu-1k-*",), "cuda": ("llama3.1-8b-*", "*-8k-*")},
    providers={name: Provider(lambda options=options: options) for name, options in OPTIONS.items()}
    | {name: Provider(lambda options=options: options, devices=("cuda",)) for name, options in ON_A_GPU.items()},
    prepare=prepare,
    setup=setup,
    parts=parts,
    figures=figures,
)

if __name__ == "__main__":
    main(BENCHMARK)
