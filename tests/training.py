"""The same training in two ways: plain PyTorch in one process, and DeepSpeed on the ranks of a process group."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.batch import LossNorms, MicroBatch, PackedBatch, TargetOutput
from engine.config.ds_config import load_ds_config, resolve_ds_config
from engine.kernels import Kernels
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.unroll import TrainingTimeTest
from engine.models.normaliser import Normaliser
from engine.models.training_rows import loss_rows
from engine.parallel.mesh import World
from engine.parallel.zero import ZeroDraft
from tests.tiny import make_draft, make_micro, make_test

FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"
LR = 3e-3
MUON_LR = 0.01
CLIP = 0.5
RANKS = 2

torch.set_num_threads(1)  # on tensors this small, threads do little but wait for each other


@dataclass(frozen=True)
class Job:
    """One training of a tiny draft on two ranks.

    config: a shipped DeepSpeed configuration. sgd: one with which a weight's change is its gradient, unclipped, so that a wrong
    scale shows, which Adam would hide. empty: (step, rank) of micro-batches without loss.
    """

    config: str
    kind: str = "kl"
    normaliser: str = "slots"
    ttt_steps: int = 3
    num_steps: int = 20
    accumulation: int = 1
    bf16: bool = False
    recompute: str = "none"
    sgd: bool = False
    muon: bool = False
    empty: tuple[tuple[int, int], ...] = ()

    def test(self) -> TrainingTimeTest:
        return make_test(steps=self.ttt_steps, kind=self.kind, normaliser=self.normaliser)

    def draft(self) -> Eagle3Draft:
        return make_draft(kernels=Kernels(recompute=self.recompute))

    def ds_config(self) -> dict[str, Any]:
        """The shipped configuration with a constant learning rate, and no weight small enough to be left whole at stage 3."""
        raw = load_ds_config(FOLDER / f"{self.config}.json")
        raw["gradient_accumulation_steps"] = self.accumulation
        raw["bf16"]["enabled"] = self.bf16
        del raw["scheduler"]
        raw["optimizer"]["params"]["lr"] = LR
        if raw["zero_optimization"]["stage"] == 3:
            raw["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        if self.muon:
            del raw["gradient_clipping"]
            raw["optimizer"] = {"type": "Muon", "params": {"lr": LR, "betas": [0.9, 0.95], "muon_lr": MUON_LR}}
            raw["zero_optimization"]["reduce_scatter"] = False
        resolved = resolve_ds_config(raw, world_size=RANKS, total_steps=self.num_steps, hidden_size=32)
        if self.sgd:
            resolved |= {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "zero_allow_untested_optimizer": True}
            resolved["gradient_clipping"] = 0.0
        return resolved

    def micros(self, step: int, rank: int) -> list[MicroBatch]:
        """What one rank learns from in one optimizer step; of `empty` ones, odd steps hold documents of a single token."""
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        empty = (step, rank) in self.empty
        seeds = range(seed := 100 * (step % 4) + 10 * rank, seed + self.accumulation)
        lengths = (1, 1, 1) if empty and step % 2 else (17, 23 - 6 * rank)
        return [make_micro(self.test(), seed=seed, lengths=lengths, masked=empty, dtype=dtype) for seed in seeds]

    def global_micros(self, step: int) -> list[MicroBatch]:
        """What all ranks learn from in one optimizer step."""
        return [micro for rank in range(RANKS) for micro in self.micros(step, rank)]


def zero_run(world: World, job: Job) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Global loss of each step, and on rank 0 the final weights, whole."""
    zero = ZeroDraft(job.draft(), job.test(), job.ds_config())
    normalise = Normaliser(zero.objective, zero.forward, world)
    losses = [zero_step(zero, normalise, world, job.micros(step, world.rank)) for step in range(job.num_steps)]
    return losses, {name: weight.float() for name, weight in zero.gathered_weights()}


def zero_step(zero: ZeroDraft, normalise: Normaliser, world: World, micros: list[MicroBatch]) -> float:
    """Take one optimizer step; returns its loss over all ranks."""
    outputs = [zero.train(micro, norms) for micro, norms in zip(micros, normalise(micros), strict=True)]
    loss = world.sum(sum(output.loss.detach() for output in outputs)).item()
    return loss if zero.objective.loss.normaliser == "slots" else loss / (world.size * len(micros))


def plain_run(job: Job) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same in fp32 without DeepSpeed, Normaliser or ranks."""
    draft = make_draft()
    test = job.test()
    losses = []
    parameters = list(draft.parameters())
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)]
    if job.sgd:
        optimizers = [torch.optim.SGD(parameters, lr=1.0)]
    if job.muon:
        named = dict(draft.named_parameters())
        inner = [name for name, weight in named.items() if weight.ndim == 2 and not name.startswith(("embed", "lm_head"))]
        matrices = [named.pop(name) for name in inner]
        others = list(named.values())
        optimizers = [torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.0)]
        optimizers.append(torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.95), weight_decay=0.0))
    for step in range(job.num_steps):
        loss = plain_loss(draft, test, job.global_micros(step))
        draft.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, float("inf") if job.sgd or job.muon else CLIP)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses, {name: weight.detach() for name, weight in draft.named_parameters()}


def plain_loss(draft: Eagle3Draft, test: TrainingTimeTest, micros: list[MicroBatch]) -> torch.Tensor:
    """What an optimizer step minimises, by definition.

    `slots`: the loss of one micro-batch that holds the global batch. `positions`: the mean of the micro-batches' losses.
    """

    def loss_of(micro: MicroBatch, divisor: int) -> torch.Tensor:
        rows_S = loss_rows(micro.allowed_ST, micro.target, test.teacher.vocab_map).sum(1).float()
        return test(draft, micro, LossNorms(torch.tensor(float(divisor)), rows_S)).loss

    if test.loss.normaliser == "slots":
        whole = merged(micros)
        return loss_of(whole, max(whole.target.slots_N.numel(), 1))
    return torch.stack([loss_of(micro, micro.batch.num_tokens) for micro in micros]).mean()


def merged(micros: list[MicroBatch]) -> MicroBatch:
    """All documents of several micro-batches in one."""
    batches = [micro.batch for micro in micros]
    targets = [micro.target for micro in micros]
    starts = list(itertools.accumulate((batch.num_tokens for batch in batches), initial=0))
    bounds = [batch.cu_seqlens[1:] + start for batch, start in zip(batches, starts, strict=False)]
    slots = [target.slots_N + start for target, start in zip(targets, starts, strict=False)]
    names = ("aux_TA", "last_hidden_ND", "argmax_N", "lse_N")
    columns = {name: torch.cat([getattr(target, name) for target in targets]) for name in names}
    batch = PackedBatch(
        torch.cat([batch.input_ids_T for batch in batches]),
        torch.cat([batch.assistant_mask_T for batch in batches]),
        torch.cat((bounds[0].new_zeros(1), *bounds)),
    )
    target = TargetOutput(slots_N=torch.cat(slots), **columns)
    embed_TD = torch.cat([micro.embed_TD for micro in micros])
    allowed_ST = torch.cat([micro.allowed_ST for micro in micros], 1)
    return MicroBatch(batch, target, embed_TD, allowed_ST)
