"""ZeRO for the draft, through DeepSpeed. Only this file and `zero_checkpoint.py` import DeepSpeed.

The whole training-time test is one forward of one module. A weight is therefore gathered at most
once in the forward pass and once in the backward pass, and its gradient is reduced once, regardless
of the number of TTT steps that use it.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

import deepspeed
import torch
from torch import nn

from engine.batch import DraftOutput, LossNorms, MicroBatch
from engine.config.ds_config import MUON
from engine.config.secret_values import without_secrets
from engine.host.checkpoint_files import CheckpointFiles
from engine.host.freed_memory import keep_freed_memory
from engine.parallel.mesh import World
from engine.parallel.objective import Objective
from engine.parallel.zero_checkpoint import UNIVERSAL, CheckpointForm, load_states, plain_path, read_plain


def connect(world: World, timeout_s: int, cpu_threads: int, store: torch.distributed.Store | None = None) -> None:
    """Join the process group of `world`, and select this process's device and number of CPU threads.

    timeout_s: timeout of collectives in seconds.
    cpu_threads: 0 = an equal share of the cores. Used only without a GPU.
    store: through which the ranks of `world` find each other; None = as the environment says.
    """
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed calls deprecated functions.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        keep_freed_memory()
        torch.set_num_threads(cpu_threads or max(1, len(os.sched_getaffinity(0)) // world.local_size))
        # Compiling DeepSpeed's shared-memory collectives takes a minute without gain for a draft.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(seconds=timeout_s)
    if store is not None:
        backend = deepspeed.accelerator.get_accelerator().communication_backend_name()
        torch.distributed.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    deepspeed.init_distributed(timeout=timeout, verbose=False)


def disconnect() -> None:
    """Leave the process group; a collective.

    A process that ends without leaving its process group may abort.
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


Part = Callable[[str], AbstractContextManager[None]]


def no_part(name: str) -> AbstractContextManager[None]:
    """Return a context manager that does nothing."""
    return contextlib.nullcontext()


DraftT = TypeVar("DraftT", bound=nn.Module)
ObjectiveT = TypeVar("ObjectiveT", bound=Objective)


class _ObjectiveModule(nn.Module):
    """The draft and its objective as one module. It returns a tuple of tensors for DeepSpeed."""

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

    def __init__(
        self, draft: DraftT, objective: ObjectiveT, ds_config: dict[str, Any], form: CheckpointForm = CheckpointForm.OWN
    ) -> None:
        """Initialise DeepSpeed for the draft.

        ds_config: a resolved DeepSpeed configuration, passed on unchanged. form: of the checkpoint that `load` reads.
        """
        self.draft = draft
        self.objective = objective
        self._form = form
        if form == CheckpointForm.UNIVERSAL:
            ds_config = ds_config | {"checkpoint": {**ds_config.get("checkpoint", {}), "load_universal": True}}
        module = _ObjectiveModule(draft, objective)
        if ds_config["optimizer"]["type"] == MUON and not torch.cuda.is_available():
            # DeepSpeed compiles its Muon; on a CPU this takes longer than it saves.
            torch.compiler.set_stance("force_eager")
        optimizer = make_optimizer([p for p in module.parameters() if p.requires_grad], ds_config)
        plain_linear = nn.functional.linear
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config, dist_init_required=False)
        # At stage 3 DeepSpeed replaces this function in the whole process, so that weights can be released after each
        # module. The draft's are held during a whole pass, and the target would pay for the replacement at every call.
        nn.functional.linear = plain_linear
        self.engine.config = without_secrets(self.engine.config)  # saved in checkpoints
        self.files = CheckpointFiles(self.engine.global_rank, self.engine.dp_world_size, read_plain)
        self.engine.checkpoint_engine = self.files
        # DeepSpeed copies a script for its users next to each checkpoint; here export_draft.py does its work.
        self.engine._copy_recovery_script = lambda folder: None
        stage = self.engine.zero_optimization_stage()
        if stage == 0 and optimizer is not None:
            _forget_steps(optimizer)
        if stage == 3:
            # The module holds every weight during a whole pass. Otherwise each TTT step would
            # gather the weights that the previous one released.
            for parameter in draft.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)
            _leave_hooks_to(module, self.engine.optimizer.parameter_offload)
        self.learning_rate = self.engine.get_lr()[0]  # of the last optimizer step
        self.rate_factor = 1.0  # the learning rate of the next step is that of the schedule times this

    @property
    def optimizer_name(self) -> str:
        inner = self.engine.basic_optimizer
        return f"{type(inner).__module__}.{type(inner).__name__}"

    @property
    def accumulation_steps(self) -> int:
        return self.engine.gradient_accumulation_steps()

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the draft computes."""
        if self.engine.bfloat16_enabled():
            return torch.bfloat16
        return torch.float16 if self.engine.fp16_enabled() else torch.float32

    def forward(self, micro: MicroBatch, norms: LossNorms) -> DraftOutput:
        return DraftOutput(*self.engine(micro, norms))

    @torch.no_grad()
    def logits(self, micro: MicroBatch) -> torch.Tensor:
        """Return the draft's logits for the S predictions per position, [S, T, U]; a collective."""
        return torch.stack(self.engine(micro, None))

    def train(self, micro: MicroBatch, norms: LossNorms, part: Part = no_part) -> DraftOutput:
        """Run forward, backward and, after the last accumulated micro-batch, the optimizer step.

        part: context manager around each of the three, which gets its name.

        DeepSpeed averages gradients over ranks and accumulation steps. Losses that are divided by counts
        over several of these micro-batches are to be summed, so DeepSpeed's division is undone for them.
        """
        with part("draft_forward"):
            output = self.forward(micro, norms)
        num_ranks = self.engine.dp_world_size
        num_means = self.objective.divisor_scope.num_means(num_ranks, self.accumulation_steps)
        loss = output.loss * (num_ranks * self.accumulation_steps // num_means)
        with part("backward"):
            self.engine.backward(loss)
        self.learning_rate = self.engine.get_lr()[0] * self.rate_factor
        with part("optimizer"):
            self._step()
        return output

    def _step(self) -> None:
        """Take the optimizer step, if all micro-batches are accumulated, with the learning rate times `rate_factor`."""
        groups = self.engine.optimizer.param_groups
        scheduled = [group["lr"] for group in groups]
        position = self._schedule_position
        for group, rate in zip(groups, scheduled, strict=True):
            group["lr"] = rate * self.rate_factor
        self.engine.step()
        if self._schedule_position == position:  # otherwise the schedule has set the rates of the next step
            for group, rate in zip(groups, scheduled, strict=True):
                group["lr"] = rate

    @property
    def _schedule_position(self) -> int | None:
        """Steps that the schedule of the learning rate has taken; None = there is no schedule."""
        schedule = self.engine.lr_scheduler
        return None if schedule is None else schedule.last_batch_iteration

    @property
    def num_skipped_steps(self) -> int:
        """Optimizer steps that DeepSpeed has skipped because their gradient was not finite."""
        return self.engine.skipped_steps

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """Norm of the last step's gradient before clipping, a scalar that may be on the device; None = unknown."""
        norm = self.engine.get_global_grad_norm()
        if norm is None:
            return None
        return torch.as_tensor(norm, dtype=torch.float32).detach()

    @torch.no_grad()
    def has_finite_weights(self, world: World) -> bool:
        """Return whether every weight is finite on all ranks.

        A collective that waits for the device.
        """
        largest = [torch.zeros(1)]
        for parameter in self.engine.module.parameters():
            own = getattr(parameter, "ds_tensor", parameter)  # at stage 3, this rank's part
            if own.numel():
                largest.append(torch.linalg.vector_norm(own.flatten(), ord=float("inf")).float().cpu().reshape(1))
        is_bad = not torch.cat(largest).isfinite().all()
        return not world.any_rank([is_bad])[0]

    def write_monitors(self, values: dict[str, float], step: int, group: str = "train") -> None:
        """Write values to the monitors that the DeepSpeed configuration enables, each under `group/name`."""
        if self.engine.monitor.enabled:
            self.engine.monitor.write_events([(f"{group}/{name}", value, step) for name, value in values.items()])

    def save(self, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
        """Copy the state of a checkpoint to the host, from where `files.write` writes it to `folder / tag`.

        A collective.
        """
        self.engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Restore weights, optimizer and schedule, and return the client state saved with them.

        The learning rate of the next step follows from this run's configuration, not from the
        checkpoint.
        Raises ValueError if the checkpoint is incomplete.
        """
        rates = [group["lr"] for group in self.engine.optimizer.param_groups]
        if self._form == CheckpointForm.STATES:
            client_state = load_states(self.engine, folder, tag)
        else:
            client_state = self._load(folder, tag + UNIVERSAL * (self._form == CheckpointForm.UNIVERSAL))
        self._set_rates(rates)
        return client_state

    def _load(self, folder: Path, tag: str) -> dict[str, Any]:
        with plain_path(folder) as plain:
            path, client_state = self.engine.load_checkpoint(str(plain), tag=tag)
        if path is None:
            raise ValueError(f"{folder / tag} is not a complete checkpoint; delete it or set checkpoint.resume=false")
        return client_state

    def _set_rates(self, configured: list[float]) -> None:
        """Set the learning rate of the next step.

        A checkpoint holds the learning rate of its own schedule. A run with a new length has a
        different schedule. DeepSpeed moves it to the right step, but applies it only after that
        step.
        configured: learning rates of the parameter groups, for runs without a schedule.
        """
        schedule = self.engine.lr_scheduler
        if schedule is None:
            for group, rate in zip(self.engine.optimizer.param_groups, configured, strict=True):
                group["lr"] = rate
        elif schedule.last_batch_iteration >= 0:
            schedule.step(schedule.last_batch_iteration)
        self.learning_rate = self.engine.get_lr()[0]

    def gathered_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each weight's name and whole value on the CPU of rank 0.

        Other ranks get empty tensors. A collective: every rank must iterate to the end.
        """
        for name, parameter in self.draft.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
                yield name, parameter.detach().cpu().clone() if self.engine.global_rank == 0 else torch.empty(0)


def make_optimizer(parameters: list[nn.Parameter], ds_config: dict[str, Any]) -> torch.optim.Optimizer | None:
    """Return the AdamW for the device, or None if DeepSpeed builds the configured optimizer.

    On a GPU this is NVIDIA apex's FusedAdam if apex is installed, otherwise torch's fused AdamW.
    Neither compiles anything. `optimizer.params.torch_adam` overrides the choice: true selects
    torch's AdamW, and false selects DeepSpeed's FusedAdam, which is compiled with nvcc at its first
    use. DeepSpeed builds offloaded optimizers itself.
    Raises ValueError if DeepSpeed's FusedAdam was requested and cannot be built.
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
    """Return NVIDIA apex's FusedAdam, or None if it is not installed.

    The package `apex` on PyPI is unrelated.
    """
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam


def _deepspeed_adam(parameters: list[nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        return deepspeed.ops.adam.FusedAdam(parameters, **options)
    except Exception as error:  # from the compiler, the linker or the loader of the compiled file
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        problem = "optimizer.params.torch_adam = false asks for DeepSpeed's FusedAdam, which cannot be built here"
        raise ValueError(f"{problem} ({reason}); delete the key to train with torch's fused AdamW") from error


def _leave_hooks_to(module: nn.Module, offload: Any) -> None:
    """Remove DeepSpeed's ZeRO-3 hooks from submodules, so that they run only around `module`.

    `module` holds every weight from the start of a pass to its end, so the hooks of the submodules
    (about 90 calls per pass with 7 TTT steps) have nothing to gather or release. The hooks on the
    weights, which reduce gradients, are kept.
    """
    kept = {id(module._forward_pre_hooks), id(module._forward_hooks)}
    for handles in (offload.forward_hooks, offload.backward_hooks):
        for handle in handles:
            if id(handle.hooks_dict_ref()) not in kept:
                handle.remove()


def _forget_steps(optimizer: torch.optim.Optimizer) -> None:
    """Clear the optimizer state that DeepSpeed creates at stage 0 before training.

    Its 16-bit wrapper takes a step with zero gradients. Otherwise Adam's bias correction would
    count it.
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.pop("step", None)
