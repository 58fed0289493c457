"""ZeRO on the draft, through DeepSpeed. The only file that imports it.

The whole training-time test is one forward of one module, so a weight is gathered at most once in forward and once in backward,
and its gradient is reduced once, however often the steps use it.
"""

import contextlib
import io
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import nn

from engine.batch import DraftOutput, LossNorms, MicroBatch
from engine.config.secret_values import without_secrets
from engine.host.freed_memory import keep_freed_memory
from engine.parallel.mesh import World

UNIVERSAL = ".universal"  # behind a checkpoint's tag


def connect(world: World, timeout_s: int, cpu_threads: int) -> None:
    """Join the job's process group and settle this process on its device and share of the cores."""
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed calls older names
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        keep_freed_memory()
        torch.set_num_threads(cpu_threads or max(1, len(os.sched_getaffinity(0)) // world.local_size))
        # compiling DeepSpeed's shared-memory collectives takes a minute and gains nothing at a draft's size
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s), verbose=False)


def disconnect() -> None:
    """Leave the process group, all ranks together: one that is alive when its process ends may abort it."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class Objective(Protocol):
    """How a draft method trains its draft on a micro-batch."""

    @property
    def num_steps(self) -> int:
        """Predictions that a position makes: TTT steps, or tokens of a block."""
        ...

    @property
    def step_weights(self) -> list[float]:
        """Weight of each of them in the total loss."""
        ...

    @property
    def is_normalised_globally(self) -> bool:
        """Whether losses are already divided by counts over the global batch, so that gradients are summed over ranks."""
        ...

    def __call__(self, draft: Any, micro: MicroBatch, norms: LossNorms) -> DraftOutput:
        """Compute the loss of a micro-batch and the counts behind its metrics."""
        ...

    def logits(self, draft: Any, micro: MicroBatch) -> list[torch.Tensor]:
        """Compute the draft's logits of every row: one tensor [T, U] for each prediction that a position makes."""
        ...


DraftT = TypeVar("DraftT", bound=nn.Module)
ObjectiveT = TypeVar("ObjectiveT", bound=Objective)


class _ObjectiveModule(nn.Module):
    """The draft and its objective as one module, whose inputs and outputs DeepSpeed sees as tensors."""

    def __init__(self, draft: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.draft = draft
        self.objective = objective

    def forward(self, micro: MicroBatch, norms: LossNorms | None) -> tuple[torch.Tensor, ...]:
        if norms is None:
            return tuple(self.objective.logits(self.draft, micro))
        return tuple(vars(self.objective(self.draft, micro, norms)).values())


class ZeroDraft(Generic[DraftT, ObjectiveT]):
    """The draft under DeepSpeed: forward, backward and optimizer step of micro-batches, checkpoints and gathered weights."""

    def __init__(self, draft: DraftT, objective: ObjectiveT, ds_config: dict[str, Any], universal: bool = False) -> None:
        """ds_config: a resolved DeepSpeed configuration, handed over as it is. universal: load what `to_universal` wrote."""
        self.draft = draft
        self.objective = objective
        self._universal = universal
        if universal:
            ds_config = ds_config | {"checkpoint": {**ds_config.get("checkpoint", {}), "load_universal": True}}
        module = _ObjectiveModule(draft, objective)
        optimizer = make_optimizer([p for p in module.parameters() if p.requires_grad], ds_config)
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config, dist_init_required=False)
        self.engine.config = without_secrets(self.engine.config)  # which it writes into checkpoints
        stage = self.engine.zero_optimization_stage()
        if stage == 0 and optimizer is not None:
            _forget_steps(optimizer)
        if stage == 3:
            # The module holds every weight during a whole pass; else each TTT step would gather what the last one released.
            for parameter in draft.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)
            _leave_hooks_to(module, self.engine.optimizer.parameter_offload)
        self.learning_rate = self.engine.get_lr()[0]  # of the last optimizer step

    @property
    def optimizer_name(self) -> str:
        inner = self.engine.basic_optimizer
        return f"{type(inner).__module__}.{type(inner).__name__}"

    @property
    def accumulation_steps(self) -> int:
        return self.engine.gradient_accumulation_steps()

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the draft's compute."""
        if self.engine.bfloat16_enabled():
            return torch.bfloat16
        return torch.float16 if self.engine.fp16_enabled() else torch.float32

    def forward(self, micro: MicroBatch, norms: LossNorms) -> DraftOutput:
        return DraftOutput(*self.engine(micro, norms))

    @torch.no_grad()
    def logits(self, micro: MicroBatch) -> torch.Tensor:
        """Draft logits of every row, [S, T, U]; a collective."""
        return torch.stack(self.engine(micro, None))

    def train(self, micro: MicroBatch, norms: LossNorms) -> DraftOutput:
        """Forward, backward and, at the last micro-batch of an accumulation, the optimizer step.

        DeepSpeed averages gradients over ranks and accumulation steps. Under the `slots` normaliser losses are already divided
        by counts over the global batch, so that division is undone.
        """
        output = self.forward(micro, norms)
        loss = output.loss
        if self.objective.is_normalised_globally:
            loss = loss * (self.engine.dp_world_size * self.accumulation_steps)
        self.engine.backward(loss)
        self.learning_rate = self.engine.get_lr()[0]
        self.engine.step()
        return output

    @property
    def num_skipped_steps(self) -> int:
        """Optimizer steps that DeepSpeed has left out because their gradient was not finite."""
        return self.engine.skipped_steps

    @torch.no_grad()
    def has_finite_weights(self, world: World) -> bool:
        """Return whether every weight is finite, on all ranks; waits for the device. A collective."""
        largest = [torch.zeros(1)]
        for parameter in self.engine.module.parameters():
            own = getattr(parameter, "ds_tensor", parameter)  # the rank's part, at stage 3
            if own.numel():
                largest.append(torch.linalg.vector_norm(own.flatten(), ord=float("inf")).float().cpu().reshape(1))
        is_bad = not torch.cat(largest).isfinite().all()
        return not world.any_rank([is_bad])[0]

    def write_monitors(self, values: dict[str, float], step: int) -> None:
        """Feed the monitors that the DeepSpeed configuration enables."""
        if self.engine.monitor.enabled:
            self.engine.monitor.write_events([(f"train/{name}", value, step) for name, value in values.items()])

    def save(self, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
        """Write a checkpoint to `folder / tag`; a collective that returns when every rank's part is written."""
        self.engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Restore weights, optimizer and schedule; returns the client state saved with them.

        The learning rate of the next step is the one that this run's configuration gives for it, not the one that was saved.
        """
        rates = [group["lr"] for group in self.engine.optimizer.param_groups]
        path, client_state = self.engine.load_checkpoint(str(folder), tag=tag + UNIVERSAL * self._universal)
        if path is None:
            raise ValueError(f"{folder / tag} is not a complete checkpoint; delete it or set checkpoint.resume=false")
        self._set_rates(rates)
        return client_state

    def _set_rates(self, configured: list[float]) -> None:
        """Set the next step's learning rate. configured: rates of the parameter groups, for runs without a schedule.

        A checkpoint holds the rate that its own schedule had reached. A run that is longer now has another schedule, which
        DeepSpeed moves to the right step but applies only after that step.
        """
        schedule = self.engine.lr_scheduler
        if schedule is None:
            for group, rate in zip(self.engine.optimizer.param_groups, configured, strict=True):
                group["lr"] = rate
        elif schedule.last_batch_iteration >= 0:
            schedule.step(schedule.last_batch_iteration)
        self.learning_rate = self.engine.get_lr()[0]

    def gathered_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each weight whole, on the CPU of rank 0, one at a time; a collective: every rank must iterate to the end."""
        for name, parameter in self.draft.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
                yield name, parameter.detach().cpu().clone() if self.engine.global_rank == 0 else torch.empty(0)


def make_optimizer(parameters: list[nn.Parameter], ds_config: dict[str, Any]) -> torch.optim.Optimizer | None:
    """Return the AdamW for the device, or None where DeepSpeed builds the optimizer that its configuration names.

    On a GPU that is NVIDIA apex's FusedAdam if apex is installed, else torch's fused AdamW: neither compiles anything.
    `optimizer.params.torch_adam` decides otherwise: true takes torch's AdamW at once, false takes DeepSpeed's own FusedAdam,
    which is compiled with nvcc at its first use. An offloaded optimizer is DeepSpeed's own.
    Raises ValueError if DeepSpeed's FusedAdam was asked for and cannot be built.
    """
    section = ds_config["optimizer"]
    offload = ds_config.get("zero_optimization", {}).get("offload_optimizer", {})
    if section["type"] != "AdamW" or offload.get("device", "none") != "none":
        return None
    params = section["params"]
    torch_adam = params.get("torch_adam")
    options = {name: params[name] for name in ("lr", "betas", "eps", "weight_decay")}
    on_gpu = torch.cuda.is_available()
    if torch_adam is False:
        return _deepspeed_adam(parameters, options)
    apex_adam = apex_fused_adam() if on_gpu and torch_adam is None else None
    if apex_adam is not None:
        return apex_adam(parameters, **options)
    return torch.optim.AdamW(parameters, fused=on_gpu, **options)


def apex_fused_adam() -> type | None:
    """Return NVIDIA apex's FusedAdam, or None where it is not installed. The package that PyPI calls `apex` is another one."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam


def _deepspeed_adam(parameters: list[nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        return deepspeed.ops.adam.FusedAdam(parameters, **options)
    except Exception as error:  # whatever the compiler, the linker or the loader of the compiled file raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        problem = "optimizer.params.torch_adam = false asks for DeepSpeed's FusedAdam, which cannot be built here"
        raise ValueError(f"{problem} ({reason}); delete the key to train with torch's fused AdamW") from error


def _leave_hooks_to(module: nn.Module, offload: Any) -> None:
    """Remove DeepSpeed's ZeRO-3 hooks from every submodule, so that they run once per pass, around `module`.

    `module` holds every weight from the beginning of a pass to its end, so the hooks of the submodules (about ninety calls
    per pass at seven TTT steps) find nothing to gather or release. Gradients are reduced by hooks on the weights, which stay.
    """
    kept = {id(module._forward_pre_hooks), id(module._forward_hooks)}
    for handles in (offload.forward_hooks, offload.backward_hooks):
        for handle in handles:
            if id(handle.hooks_dict_ref()) not in kept:
                handle.remove()


def _forget_steps(optimizer: torch.optim.Optimizer) -> None:
    """Unmake the step of zeros that DeepSpeed's 16-bit wrapper takes at stage 0: Adam's bias correction would count it."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.pop("step", None)


def is_sharded(folder: Path, tag: str) -> bool:
    """Whether each rank wrote a part of a checkpoint, as above stage 0."""
    return any((folder / tag).glob("*_optim_states.pt"))


def to_universal(folder: Path, tag: str) -> None:
    """Write a checkpoint of shards anew, beside it, as any number of ranks can load it. Raises ValueError if that fails."""
    remove_universal(folder, tag)
    paths = ("--input_folder", str(folder / tag), "--output_folder", str(folder / (tag + UNIVERSAL)))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *paths, "--inject_missing_state"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        remove_universal(folder, tag)
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ValueError(f"{folder / tag} cannot be rewritten for another number of ranks: {last}")


def remove_universal(folder: Path, tag: str) -> None:
    """What `to_universal` wrote, if anything."""
    shutil.rmtree(folder / (tag + UNIVERSAL), ignore_errors=True)
    (folder / "latest_universal").unlink(missing_ok=True)


def consolidated_weights(folder: Path, tag: str) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint of any ZeRO stage, fp32, whole, under the draft's own names; needs no process group.

    Raises FileNotFoundError if the checkpoint is incomplete.
    """
    whole = folder / tag / "mp_rank_00_model_states.pt"
    weights: dict[str, torch.Tensor] = {}
    if whole.exists():  # below stage 3: the weights as they compute, the frozen ones among them
        weights |= torch.load(whole, map_location="cpu", weights_only=False)["module"]
    if not whole.exists() or any(whole.parent.glob("*_optim_states.pt")):  # above stage 0: the optimizer's, in fp32, in shards
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            weights |= get_fp32_state_dict_from_zero_checkpoint(str(folder), tag)
    return {name.removeprefix("draft."): weight.float() for name, weight in weights.items()}
