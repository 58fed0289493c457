"""Time online training steps in serial execution, and with the target running ahead of the draft.

    python -m benchmarks.bench_colocated --shapes 'llama3.1-8b-*' --json colocated.json

Run from the repository's root. One call runs the target's forward, the training-time test and the
backward pass of four micro-batches, without the optimizer. A shape's name gives the target, the
tokens per micro-batch, in documents of 2048 tokens (64 for `cpu-tiny`), and the share of tokens
that carry loss. Weights are random and created on the device. `serial` is the reference, and
`run ahead` computes the same losses from the same batches in the same order. The floor covers both
halves together, because they share one device.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from benchmarks.bench_target import TINY, TargetShape, random_model
from benchmarks.bench_target import parts as target_parts
from benchmarks.harness import Benchmark, Place, Provider, choose_tiles, main
from engine.batch import LossNorms, MicroBatch, PackedBatch, to_device
from engine.config.sections import DraftSection, LossSection, TttSection
from engine.kernels import choose_kernels
from engine.models.costs import StepPart
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_config import Eagle3Config, derive_draft_config
from engine.models.eagle3.flops import StepCounts, step_parts
from engine.models.eagle3.unroll import Teacher, TrainingTimeTest
from engine.models.training_rows import allowed_rows, slots_of
from engine.models.vocab_map import VocabMap
from engine.planning.job import DocumentSizes
from engine.target.frozen import FrozenTarget
from tests.pipelines import prepared
from tests.recipes_configs import target_config

NUM_MICRO_BATCHES = 4
LOOK_AHEAD = {"serial": 0, "run ahead": 1}  # number of batches that the target may run ahead
SHARES = (1.0, 0.5, 0.3)
TTT = TttSection()


@dataclass(frozen=True)
class OverlapShape:
    """A target, the draft that a recipe derives for it, and the documents of a micro-batch.

    assistant: share of assistant tokens.
    """

    config: PreTrainedConfig
    num_tokens: int
    document_tokens: int
    assistant: float
    draft_vocab_size: int

    @property
    def draft(self) -> Eagle3Config:
        section = DraftSection(vocab_size=self.draft_vocab_size)
        return derive_draft_config(self.config, section, None)

    def batch(self, seed: int) -> PackedBatch:
        """Return a packed batch of random tokens, on the host."""
        generator = torch.Generator().manual_seed(seed)
        input_ids_T = torch.randint(self.config.vocab_size, (self.num_tokens,), generator=generator)
        documents = DocumentSizes(self.document_tokens, self.assistant).batch(self.num_tokens)
        return replace(documents, input_ids_T=input_ids_T)


def _shapes() -> dict[str, OverlapShape]:
    llama = target_config("llama3.1-8b")
    tiny = AutoConfig.for_model("llama", **TINY)
    shapes = {}
    for share in SHARES:
        shapes[f"llama3.1-8b-16k-{share}"] = OverlapShape(llama, 16 * 1024, 2048, share, 32000)
        shapes[f"cpu-tiny-{share}"] = OverlapShape(tiny, 128, 64, share, 128)
    return shapes


@dataclass(frozen=True)
class OverlapTensors:
    """A target and a draft on one device, and the batches that both process."""

    place: Place
    target: FrozenTarget
    draft: Eagle3Draft
    test: TrainingTimeTest
    batches: list[PackedBatch]


def prepare(shape: OverlapShape, place: Place) -> OverlapTensors:
    config = shape.draft
    target = FrozenTarget(random_model(shape.config, place), config.aux_layers)
    chosen_U = torch.arange(config.draft_vocab_size, device=place.device)
    in_draft_V = torch.arange(config.vocab_size, device=place.device) < config.draft_vocab_size
    teacher = Teacher(target.head_rows(chosen_U).logits, VocabMap(chosen_U, in_draft_V))
    kernels = choose_kernels("auto", place.device, place.dtype, config.head_dim)
    choose_tiles(kernels, place, config.head_dim)
    with place.device:
        draft = Eagle3Draft(config, kernels).to(place.dtype)
    batches = [shape.batch(seed) for seed in range(NUM_MICRO_BATCHES)]
    return OverlapTensors(place, target, draft, TrainingTimeTest(TTT, LossSection(), teacher), batches)


def setup(look_ahead: int, tensors: OverlapTensors) -> Callable[[], list[Tensor]]:
    """Return a call that runs all micro-batches and returns their losses."""
    return partial(_steps, look_ahead, tensors)


def _steps(look_ahead: int, tensors: OverlapTensors) -> list[Tensor]:
    losses = []
    device = tensors.place.device
    for micro, norms in prepared(tensors.batches, partial(_target_half, tensors), look_ahead, device):
        loss = tensors.test(tensors.draft, micro, norms).loss
        loss.backward()
        tensors.draft.zero_grad()
        losses.append(loss.detach())
    return losses


def _target_half(tensors: OverlapTensors, batch: PackedBatch) -> tuple[MicroBatch, LossNorms]:
    """Return the draft's inputs for a batch, and the divisors of its losses."""
    device = tensors.place.device
    allowed_ST = allowed_rows(batch, TTT)
    output = tensors.target(batch, slots_of(allowed_ST))
    batch = batch.to(device)
    embed_TD = tensors.target.embedding.rows(batch.input_ids_T)
    num_allowed_S = to_device(allowed_ST.sum(1).float(), device)
    norms = LossNorms(num_allowed_S[0].clamp_min(1), num_allowed_S)
    return MicroBatch(batch, output, embed_TD, to_device(allowed_ST, device)), norms


def parts(shape: OverlapShape) -> dict[str, StepPart]:
    """Return the work of the target and the draft over all micro-batches."""
    batch = shape.batch(0)
    allowed_ST = allowed_rows(batch, TTT)
    slots_N = slots_of(allowed_ST)
    counts = StepCounts.needed(batch, allowed_ST, slots_N.numel())
    target = TargetShape(shape.config, shape.num_tokens, shape.document_tokens)
    halves = {f"target: {name}": part for name, part in target_parts(target).items()}
    halves |= step_parts(shape.draft.shape, counts)
    every = {}
    for number in range(NUM_MICRO_BATCHES):
        every |= {f"{name} {number}": part for name, part in halves.items()}
    return every


def figures(shape: OverlapShape, seconds: float) -> dict[str, float]:
    return {"tokens/s": NUM_MICRO_BATCHES * shape.num_tokens / seconds}


BENCHMARK = Benchmark(
    module="benchmarks.bench_colocated",
    shapes=_shapes(),
    default_shapes={"cpu": ("cpu-tiny-*",), "cuda": ("llama3.1-8b-*",)},
    providers={name: Provider(lambda depth=depth: depth) for name, depth in LOOK_AHEAD.items()},
    prepare=prepare,
    setup=setup,
    parts=parts,
    figures=figures,
)

if __name__ == "__main__":
    main(BENCHMARK)
