"""Files of DeepSpeed's checkpoints: reading them without executing anything, and converting them."""

import contextlib
import glob
import io
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

UNIVERSAL = ".universal"  # appended to a checkpoint's tag
WEIGHT = "fp32"  # name of a weight among the states of a universal checkpoint
ADAM_STATES = ("exp_avg", "exp_avg_sq")


class CheckpointForm(Enum):
    """How a run reads a checkpoint.

    OWN: as it was written. UNIVERSAL: the output of `to_universal`, through DeepSpeed.
    STATES: the states of each weight in that output, which fit every stage above 0.
    """

    OWN = "own"
    UNIVERSAL = "universal"
    STATES = "states"


# What DeepSpeed and earlier versions keep in checkpoints besides tensors and plain values.
SAFE_CLASSES: list[Any] = [
    fragment_address,
    LossScaler,
    DynamicLossScaler,
    ZeroStageEnum,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    (np.empty(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
]


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """Context manager that gives a path to a folder which DeepSpeed can use as a pattern for `glob`."""
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place, "checkpoints")
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield link


def read_plain(path: Path, map_location: Any = None) -> Any:
    """Read a file of a checkpoint; nothing in it is executed.

    Raises ValueError if it holds other things than data, or is damaged.
    """
    with torch.serialization.safe_globals(SAFE_CLASSES):
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is damaged or holds more than data: {str(error).splitlines()[0]}") from error


def is_sharded(folder: Path, tag: str) -> bool:
    """Return whether a checkpoint has one part per rank, as with ZeRO stages above 0."""
    return any((folder / tag).glob("*_optim_states.pt"))


def to_universal(folder: Path, tag: str) -> None:
    """Convert a sharded checkpoint to a universal one, which any number of ranks can load.

    It is written next to the checkpoint. Raises ValueError if the conversion fails.
    """
    remove_universal(folder, tag)
    for path in sorted((folder / tag).glob("*.pt")):
        read_plain(path, "meta")  # the converter would execute what it finds
    paths = ("--input_folder", str(folder / tag), "--output_folder", str(folder / (tag + UNIVERSAL)))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *paths, "--inject_missing_state"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        remove_universal(folder, tag)
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ValueError(f"{folder / tag} cannot be converted for another number of ranks or ZeRO stage: {last}")


def remove_universal(folder: Path, tag: str) -> None:
    """Remove the output of `to_universal`, if there is any."""
    shutil.rmtree(folder / (tag + UNIVERSAL), ignore_errors=True)
    (folder / "latest_universal").unlink(missing_ok=True)


def consolidated_weights(folder: Path, tag: str) -> dict[str, torch.Tensor]:
    """Return the whole weights of a checkpoint of any ZeRO stage, in fp32.

    The names are those of the draft's parameters. Needs no process group. Raises FileNotFoundError
    if the checkpoint is incomplete.
    """
    whole = folder / tag / "mp_rank_00_model_states.pt"
    weights: dict[str, torch.Tensor] = {}
    for path in sorted((folder / tag).glob("*.pt")):
        read_plain(path, "meta")  # DeepSpeed would execute what it finds
    if whole.exists():  # below stage 3: weights in compute precision, including frozen ones
        weights |= read_plain(whole, "cpu")["module"]
    # Above stage 0, the optimizer holds the weights in fp32, in shards.
    if not whole.exists() or any(whole.parent.glob("*_optim_states.pt")):
        silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with silent[0], silent[1], plain_path(folder) as plain:
            weights |= get_fp32_state_dict_from_zero_checkpoint(str(plain), tag)
    return {name.removeprefix("draft."): weight.float() for name, weight in weights.items()}


def load_states(engine: Any, folder: Path, tag: str) -> dict[str, Any]:
    """Restore an engine of ZeRO stage 1, 2 or 3 from the converted checkpoint of another one of these stages.

    engine: of DeepSpeed, with AdamW. The checkpoint was converted by `to_universal`.
    Returns the rest of the state of rank 0, with the client state. Raises ValueError if a file is missing or damaged.
    """
    converted = folder / (tag + UNIVERSAL) / "zero"
    _create_states(engine.optimizer, engine.zero_optimization_stage())
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            _load_weight(parameter, converted / name)
    (path, *_) = sorted((folder / tag).glob("*_model_states.pt"))
    state = read_plain(path, "cpu")
    engine.global_steps = state["global_steps"]
    engine.global_samples = state["global_samples"]
    engine.skipped_steps = state["skipped_steps"]
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if engine.fp16_enabled():
        path = min((folder / tag).glob("*_optim_states.pt"))
        engine.optimizer.loss_scaler = read_plain(path, "cpu")["optimizer_state_dict"]["loss_scaler"]
    num_steps = engine.global_steps - engine.skipped_steps
    inner = engine.optimizer.optimizer
    for holder in (*inner.state.values(), *inner.param_groups):  # apex counts steps per group
        if "step" in holder:
            holder["step"] = num_steps if isinstance(holder["step"], int) else torch.full_like(holder["step"], num_steps)
    return state


def _create_states(optimizer: Any, stage: int) -> None:
    """Create the optimizer states, which otherwise appear in the first step, by a step that changes nothing.

    Raises ValueError for states on NVMe.
    """
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "partial_offload", 1.0) not in (0.0, 1.0):
        problem = "a checkpoint of another ZeRO stage cannot be loaded with offload_optimizer.device=nvme, or a ratio below 1"
        raise ValueError(f"{problem}; resume it once without this")
    groups = optimizer.optimizer.param_groups
    if stage == 3:
        groups = [
            groups[optimizer.sub_group_to_group_id[index]] for index in range(len(optimizer.fp32_partitioned_groups_flat))
        ]
    weights = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    for group, weight in zip(groups, weights, strict=True):
        kept = {"params": group["params"], "lr": group["lr"]}
        group |= {"params": [weight], "lr": 0.0}
        gradient = weight.grad  # of an offloaded weight, into which DeepSpeed will write
        weight.grad = torch.zeros_like(weight)
        optimizer.optimizer.step()
        weight.grad = gradient
        group |= kept
    if stage < 3:
        optimizer._lazy_init_hp_params_optimizer_state()


def _load_weight(parameter: torch.nn.Parameter, folder: Path) -> None:
    """Restore a weight and its optimizer state from their files, which hold them whole and perhaps padded."""
    is_partitioned = hasattr(parameter, "ds_shape")  # at stage 3
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    for key in (WEIGHT, *ADAM_STATES):
        stored = read_plain(folder / f"{key}.pt", "cpu")
        flat = (stored["param"] if isinstance(stored, dict) else stored).flatten()[: shape.numel()]
        if is_partitioned:
            own = _partition(flat, safe_get_local_fp32_param(parameter).numel())
            if key == WEIGHT:
                safe_set_local_fp32_param(parameter, own)
            else:
                safe_set_local_optimizer_state(parameter, own, key)
        elif key == WEIGHT:
            safe_set_full_fp32_param(parameter, flat.view(shape))
        else:
            safe_set_full_optimizer_state(parameter, flat.view(shape), key)


def _partition(flat: torch.Tensor, size: int) -> torch.Tensor:
    """Return this rank's part of a flat tensor that is padded at its end."""
    rank = torch.distributed.get_rank()
    own = torch.zeros(size, dtype=flat.dtype)
    part = flat[rank * size : (rank + 1) * size]
    own[: part.numel()] = part
    return own
