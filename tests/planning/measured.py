"""A draft and its target, trained for two steps on a few ranks, and how many bytes live meanwhile."""

import contextlib
import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.batch import MicroBatch
from engine.config.ds_config import load_ds_config, resolve_ds_config
from engine.config.sections import DraftSection, LossSection, TttSection
from engine.kernels import Kernels
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_config import Eagle3Config, derive_draft_config
from engine.models.eagle3.unroll import Teacher, TrainingTimeTest
from engine.models.normaliser import Normaliser
from engine.models.training_rows import allowed_rows, slots_of
from engine.models.vocab_map import VocabMap
from engine.parallel.mesh import TargetMesh, World
from engine.parallel.zero import ZeroDraft
from engine.planning.job import DocumentSizes
from engine.target.frozen import FrozenTarget
from tests.live_bytes import LiveBytes

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
SHAPE = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=7, num_attention_heads=8, num_key_value_heads=4)
TARGET = LlamaConfig(**SHAPE, head_dim=16, vocab_size=4096)
LAYERS = (1, 2, 4)
DRAFT_VOCAB = 2048
TOKENS = 1024
RANKS = 2
LOSS = LossSection(chunk_mb=4)
TTT = TttSection()


@dataclass(frozen=True)
class Training:
    """What is trained: at a ZeRO stage, on documents of which the assistant says a share, with a target shared by tp_size."""

    stage: int = 3
    bf16: bool = True
    assistant_share: float = 1.0
    num_layers: int = 1
    recompute: str = "none"
    tp_size: int = 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def documents(self) -> DocumentSizes:
        return DocumentSizes(TOKENS // 2, self.assistant_share)

    @property
    def draft(self) -> Eagle3Config:
        return derive_draft_config(TARGET, DraftSection(vocab_size=DRAFT_VOCAB, num_layers=self.num_layers), LAYERS)

    def ds_config(self) -> dict[str, Any]:
        """A shipped one, with buckets no larger than a draft this small needs, and no weight small enough to stay whole."""
        raw = load_ds_config(FOLDER / f"zero{self.stage}.json")
        raw["bf16"]["enabled"] = self.bf16
        raw["zero_optimization"]["reduce_bucket_size"] = 1_000_000
        if self.stage == 3:
            raw["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return resolve_ds_config(raw, world_size=RANKS, total_steps=10, hidden_size=128)


def train(world: World, training: Training) -> dict[str, int]:
    """Most bytes that live while the target runs, while the draft trains and in the optimizer's step; those of the target."""
    live = LiveBytes()
    peaks = {}

    def end_of(phase: str) -> None:
        gc.collect()
        peaks[phase], peaks[f"after {phase}"], live.peak = live.peak, live.now(), 0

    with live if world.rank == 0 else contextlib.nullcontext():  # the mode takes longer than what it measures
        mesh = TargetMesh.make(world, training.tp_size, 1)
        target = FrozenTarget(LlamaForCausalLM(TARGET).to(training.dtype), LAYERS, mesh=mesh)
        ids_U = torch.arange(DRAFT_VOCAB)
        vocab_map = VocabMap(ids_U, torch.arange(TARGET.vocab_size) < DRAFT_VOCAB)
        head_rows = target.head_rows(ids_U)
        test = TrainingTimeTest(TTT, LOSS, Teacher(head_rows.logits, vocab_map))
        draft = Eagle3Draft(training.draft, Kernels(recompute=training.recompute))
        count = sum(weight.numel() for weight in draft.parameters())
        zero = ZeroDraft(draft, test, training.ds_config())
        del draft
        normalise = Normaliser(zero.objective, zero.forward, world)
        for tokens in (TOKENS // 2, TOKENS):  # Adam's moments are there from the end of a first step, of whatever size
            batch = replace(training.documents.batch(tokens), input_ids_T=torch.randint(DRAFT_VOCAB, (tokens,)))
            end_of("between")
            allowed_ST = allowed_rows(batch, TTT)
            output = target(batch, slots_of(allowed_ST))
            output = replace(output, argmax_N=output.argmax_N % DRAFT_VOCAB)
            micro = MicroBatch(batch, output, target.embedding.rows(batch.input_ids_T), allowed_ST)
            del output
            end_of("target")
            loss = zero.forward(micro, normalise([micro])[0]).loss
            zero.engine.backward(loss)
            del loss
            end_of("draft")
            zero.engine.step()
            end_of("step")
            del micro
        end_of("training")
    held = sum(weight.nbytes for weight in target.model.parameters()) + head_rows.weight_VD.nbytes
    return peaks | {"weights of the target": held, "weights of the draft": count}
