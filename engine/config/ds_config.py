"""Strict reading of DeepSpeed's JSON: its own keys, checked against a table before models load."""

import copy
import re
from pathlib import Path
from typing import Any

from engine.config.ds_keys import DS_KEYS, OF_MUON, RATES, REFUSED, REQUIRED_BY_SCHEDULER, SCHEDULERS, STAGE3
from engine.config.secret_values import HIDDEN
from engine.config.sections import OPTIONS, SECTIONS
from engine.config.strict import ConfigError, checked, dotted_keys, parse_json, read_text, type_name, unknown_key

DEFAULT_LR = 1e-4
DEFAULT_LR_WIDTH = 4096
AUTO_WARMUP = "1.5%"
WARMUP_KEY = "scheduler.params.warmup_num_steps"
SHARE_OF_RUN = re.compile(r"\d+(\.\d+)?%")  # of the optimizer steps of a run
# Defaults of DeepSpeed's own AdamW. Torch's AdamW would decay weights when the file sets no decay.
OPTIMIZER_DEFAULTS = {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
MUON = "Muon"
# `muon_lr` is the rate of the matrices. Without it DeepSpeed would take `lr`, which is much too small for Muon's updates.
MUON_DEFAULTS = {"muon_lr": 0.02, "momentum": 0.95, "torch_adam": True}
AUTO_KEYS = ("optimizer.params.lr", "scheduler.params.total_num_steps", WARMUP_KEY)
# Below this many weights a draft's training states fit on every rank at stages 1 and 2 (16 bytes
# per weight on one rank), and the host work of stage 3 noticeably lengthens a step.
SMALL_DRAFT_WEIGHTS = 2_000_000_000
SMALL_DRAFT_CONFIG = "zero2.json"
LARGE_DRAFT_CONFIG = "zero3.json"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
GLOBAL = "train_batch_size"


def load_ds_config(path: Path) -> dict[str, Any]:
    """Load DeepSpeed's JSON as a dict; "auto" values, and a warm-up that is a share of the run, stay unresolved.

    Raises ConfigError for unknown, mistyped, unsupported or contradictory keys. It names the file,
    the key, the value and the nearest valid key.
    """
    raw = parse_json(read_text(path), path)
    if not isinstance(raw, dict):
        raise ConfigError(f"expected an object of DeepSpeed's keys, got {type_name(type(raw))}", source=path)
    schema = _schema_for(raw, path)
    _check_keys(raw, schema, "", list(dotted_keys(schema)), path)
    try:
        _check_contradictions(raw)
    except ConfigError as error:
        error.source = path
        raise
    return raw


def resolve_ds_config(raw: dict[str, Any], *, world_size: int, total_steps: int, hidden_size: int) -> dict[str, Any]:
    """Return a copy of a loaded configuration with every "auto" and every share of the run resolved, ready for DeepSpeed.

    The learning rate and the batch sizes are always set in the result.

    raw: result of `load_ds_config`.
    total_steps: optimizer steps of the whole run. The schedule covers all of them, and its warm-up
        1.5% of them, or the share that the file names.
    hidden_size: hidden size of the draft. The automatic learning rate is 1e-4 at hidden size 4096
        and inversely proportional to it, like Adam's optimal learning rate (muP, arXiv:2203.03466).

    Raises ConfigError if the three batch sizes do not fit world_size.
    """
    resolved = copy.deepcopy(raw)
    resolved[MICRO], resolved[ACCUMULATION] = _solve_batch(raw, world_size)
    defaults: dict[str, Any] = dict(OPTIMIZER_DEFAULTS)
    if resolved["optimizer"]["type"] == MUON:
        defaults |= MUON_DEFAULTS
        # DeepSpeed clips at 1.0 if the file says nothing, which would shrink the orthogonalised update to this norm.
        resolved.setdefault("gradient_clipping", 0.0)
    resolved["optimizer"]["params"] = {**defaults, **resolved["optimizer"].get("params", {})}
    values = (DEFAULT_LR * DEFAULT_LR_WIDTH / hidden_size, max(2, total_steps), AUTO_WARMUP)
    for key, value in zip(AUTO_KEYS, values, strict=True):
        section, _, name = key.split(".")
        params = resolved.get(section, {}).get("params", {})
        if params.get(name) == "auto":
            params[name] = value
    params = resolved.get("scheduler", {}).get("params", {})
    if isinstance(params.get("warmup_num_steps"), str):
        share = float(params["warmup_num_steps"].removesuffix("%")) / 100
        params["warmup_num_steps"] = max(1, round(share * total_steps))
    return resolved


def micro_batch_size(ds: dict[str, Any], world_size: int) -> int:
    """Return the packed batches per rank in one forward, derived as DeepSpeed does."""
    return _solve_batch(ds, world_size)[0]


def accumulation_steps(ds: dict[str, Any], world_size: int) -> int:
    """Return the micro-batches per rank in one optimizer step, derived as DeepSpeed does."""
    return _solve_batch(ds, world_size)[1]


def _solve_batch(ds: dict[str, Any], world_size: int) -> tuple[int, int]:
    """Return (micro-batch size, accumulation steps); each is 1 if the file leaves it undetermined.

    They satisfy train_batch_size = micro-batch size * accumulation steps * world_size.
    Raises ConfigError if the given sizes do not.
    """
    total = ds.get(GLOBAL)
    micro = ds.get(MICRO)
    accumulation = ds.get(ACCUMULATION)
    if total is None:
        return micro or 1, accumulation or 1
    if micro is None:
        accumulation = accumulation or 1
        micro = total // (accumulation * world_size)
    elif accumulation is None:
        accumulation = total // (micro * world_size)
    if total != micro * accumulation * world_size:
        problem = (
            f"is not {MICRO} * {ACCUMULATION} * ranks = {micro} * {accumulation} * {world_size}; "
            f"delete {GLOBAL}, or make it a multiple of the number of ranks"
        )
        raise ConfigError(problem, key=GLOBAL, value=total, source="--ds_config file")
    return micro, accumulation


def _schema_for(raw: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return the table of keys, with the parameters of the scheduler that the file names."""
    scheduler = raw.get("scheduler")
    if not isinstance(scheduler, dict):
        return DS_KEYS
    if "type" not in scheduler:
        raise ConfigError(f"is missing; use one of {', '.join(SCHEDULERS)}", key="scheduler.type", source=source)
    params = SCHEDULERS.get(str(scheduler["type"]), {})
    return {**DS_KEYS, "scheduler": {**DS_KEYS["scheduler"], "params": params}}


def _check_keys(raw: dict[str, Any], schema: dict[str, Any], prefix: str, valid: list[str], source: Path) -> None:
    """Raise ConfigError if a key, also a nested one, is unknown or its value has the wrong type."""
    for name, value in raw.items():
        key = prefix + name
        if key in REFUSED:
            raise ConfigError(f"not supported: {REFUSED[key]}", key=key, value=value, source=source)
        if name not in schema:
            raise unknown_key(key, value, valid, _home_in_recipe, source)
        kind = schema[name]
        if value == "auto":
            if key not in AUTO_KEYS:
                problem = f"'auto' is resolved for {', '.join(AUTO_KEYS)} only; write a value, or delete the key"
                raise ConfigError(problem, key=key, value=value, source=source)
        elif key == WARMUP_KEY and isinstance(value, str):
            _check_share(value, source)
        elif value == HIDDEN:
            problem = (
                "is hidden in files written by a run; write the secret itself, or delete the key and set it in the environment"
            )
            raise ConfigError(problem, key=key, source=source)
        elif not isinstance(kind, dict):
            checked(value, kind, key=key, source=source)
        elif isinstance(value, dict):
            _check_keys(value, kind, f"{key}.", valid, source)
        else:
            raise ConfigError(f"expected an object with {', '.join(kind)}", key=key, value=value, source=source)


def _check_share(value: str, source: Path) -> None:
    if not SHARE_OF_RUN.fullmatch(value) or float(value.removesuffix("%")) > 100:
        problem = 'expected a number of steps, "auto", or a share of the run\'s steps such as "4%"'
        raise ConfigError(problem, key=WARMUP_KEY, value=value, source=source)


def _home_in_recipe(key: str) -> str | None:
    name = key.rpartition(".")[2]
    if name in SECTIONS:
        return f"belongs to the recipe, where {name} is a section"
    homes = [option for option in OPTIONS if option in (key, name) or option.endswith(f".{name}")]
    return f"belongs to the recipe; set {homes[0]} there or on the command line" if homes else None


def default_stage_config(num_weights: int) -> str:
    """Return the name of the shipped file that suits a draft with `num_weights` trained weights."""
    return SMALL_DRAFT_CONFIG if num_weights < SMALL_DRAFT_WEIGHTS else LARGE_DRAFT_CONFIG


def drops_bad_gradients(ds: dict[str, Any]) -> bool:
    """Return whether DeepSpeed drops gradients that are not finite, as it does except in fp32 at stage 0."""
    checks_bf16 = ds.get("bf16", {}).get("check_grad_overflow", True)
    if compute_dtype(ds) == "bfloat16":
        return bool(checks_bf16)
    zero = ds.get("zero_optimization", {})
    checks_norm = zero.get("stage", 0) == 3 or zero.get("compute_grad_norm", True)
    return compute_dtype(ds) == "float16" or (zero.get("stage", 0) > 0 and checks_norm)


def schedule_facts(resolved: dict[str, Any]) -> dict[str, Any]:
    """Return what the learning rate of every step follows from, by dotted key. resolved: the resolved configuration."""
    scheduler = resolved.get("scheduler", {})
    params = resolved["optimizer"]["params"]
    facts = {f"optimizer.params.{name}": params[name] for name in ("lr", "muon_lr") if name in params}
    facts["scheduler.type"] = scheduler.get("type")
    return facts | {f"scheduler.params.{name}": value for name, value in scheduler.get("params", {}).items()}


def ds_kept_on_resume(ds: dict[str, Any]) -> dict[str, Any]:
    """Return the values of DeepSpeed's file that a resumed run must not change, by dotted key.

    DeepSpeed restores the optimizer's settings from the checkpoint, so that new ones would have no effect.
    """
    kept = {"zero_optimization.stage": ds.get("zero_optimization", {}).get("stage", 0)}
    optimizer = ds.get("optimizer", {})
    params = optimizer.get("params", {})
    values = {"optimizer.type": optimizer.get("type")}
    kept_params = ("betas", "eps", "weight_decay", "momentum", "ns_method")
    values |= {f"optimizer.params.{name}": params.get(name) for name in kept_params}
    return kept | {key: value for key, value in values.items() if value is not None}


def stage_advice(ds: dict[str, Any], num_weights: int) -> str | None:
    """Return a line of advice if the draft does not need the ZeRO stage 3 of the file, else None.

    num_weights: weights of the draft. A run that offloads the weights to host memory needs stage 3
        and gets no advice.
    """
    zero = ds.get("zero_optimization", {})
    offloads_weights = zero.get("offload_param", {}).get("device", "none") != "none"
    if zero.get("stage", 0) < 3 or offloads_weights or num_weights >= SMALL_DRAFT_WEIGHTS:
        return None
    size = f"{num_weights / 1e9:.2f} billion weights"
    limit = f"{SMALL_DRAFT_WEIGHTS / 1e9:.0f} billion"
    return f"ZeRO stage 3 for a draft of {size}: below {limit} stage 2 is enough and faster (ds_configs/{SMALL_DRAFT_CONFIG})"


def _check_contradictions(raw: dict[str, Any]) -> None:
    if raw.get("bf16", {}).get("enabled") and raw.get("fp16", {}).get("enabled"):
        raise ConfigError("bf16.enabled is true too; keep one precision", key="fp16.enabled", value=True)
    _check_optimizer(raw.get("optimizer", {}))
    _check_muon(raw)
    _check_scheduler(raw.get("scheduler"))
    _check_zero(raw.get("zero_optimization", {}))
    if raw.get("zero_optimization", {}).get("stage", 0) == 0:
        _check_one_precision(raw)


def _check_optimizer(optimizer: dict[str, Any]) -> None:
    if "type" not in optimizer:
        problem = 'is missing; write "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}'
        raise ConfigError(problem, key="optimizer.type")
    betas = optimizer.get("params", {}).get("betas", (0.9, 0.95))
    if len(betas) != 2:
        raise ConfigError("expected two numbers", key="optimizer.params.betas", value=betas)
    for name in OF_MUON:
        if optimizer["type"] != MUON and name in optimizer.get("params", {}):
            problem = f"belongs to optimizer.type=Muon, and the type is {optimizer['type']}; delete it"
            raise ConfigError(problem, key=f"optimizer.params.{name}", value=optimizer["params"][name])


def _check_muon(raw: dict[str, Any]) -> None:
    """Raise ConfigError for what DeepSpeed's Muon cannot do, or does differently than without it."""
    if raw["optimizer"]["type"] != MUON:
        return
    zero = raw.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage == 0 and compute_dtype(raw) != "float32":
        problem = "runs at stage 0 in fp32 only; raise zero_optimization.stage to 1 or 2"
        raise ConfigError(problem, key="optimizer.type", value=MUON)
    if stage == 3 and zero.get("reduce_scatter", True):
        problem = "must be false with Muon at stage 3, which orthogonalises whole gradients; set it, or use stage 2"
        raise ConfigError(problem, key="zero_optimization.reduce_scatter", value=True)
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        problem = "DraftSpeed runs Muon without offloading; delete zero_optimization.offload_optimizer"
        raise ConfigError(problem, key="optimizer.type", value=MUON)
    if raw.get("gradient_clipping", 0.0):
        problem = "with Muon, DeepSpeed clips the orthogonalised update instead of the gradient; delete it"
        raise ConfigError(problem, key="gradient_clipping", value=raw["gradient_clipping"])
    for name, value in raw.get("scheduler", {}).get("params", {}).items():
        if name in RATES and value != 0 and not (isinstance(value, list) and len(value) == 2):
            problem = "sets both rates of Muon; give two numbers, those of the matrices and of the rest, or use WarmupCosineLR"
            raise ConfigError(problem, key=f"scheduler.params.{name}", value=value)


def _check_scheduler(scheduler: dict[str, Any] | None) -> None:
    if scheduler is None:
        return
    for name in REQUIRED_BY_SCHEDULER.get(scheduler["type"], ()):
        if name not in scheduler.get("params", {}):
            hint = ' or "auto"' if f"scheduler.params.{name}" in AUTO_KEYS else ""
            problem = f"is missing, and {scheduler['type']} needs it; give it a value{hint}"
            raise ConfigError(problem, key=f"scheduler.params.{name}")


def _check_one_precision(raw: dict[str, Any]) -> None:
    """Raise ConfigError if gradients are to be accumulated in another precision than the weights'.

    DeepSpeed supports that from stage 1 on.
    """
    accumulated = raw.get("data_types", {}).get("grad_accum_dtype")
    weights = next((name for name in ("bf16", "fp16") if raw.get(name, {}).get("enabled")), "fp32")
    if accumulated not in (None, weights):
        problem = f"at stage 0 gradients are accumulated in the weights' precision, {weights}; delete it or raise the stage"
        raise ConfigError(problem, key="data_types.grad_accum_dtype", value=accumulated)


def compute_dtype(ds: dict[str, Any]) -> str:
    """Return the precision in which the draft computes, as the name of a torch dtype."""
    names = {"bf16": "bfloat16", "fp16": "float16"}
    return next((dtype for key, dtype in names.items() if ds.get(key, {}).get("enabled")), "float32")


def _check_zero(zero: dict[str, Any]) -> None:
    stage = zero.get("stage", 0)
    if stage == 3 and zero.get("elastic_checkpoint"):
        raise ConfigError(
            "stage 3 cannot save elastic checkpoints; delete it", key="zero_optimization.elastic_checkpoint", value=True
        )
    for section, needed in (("offload_param", 3), ("offload_optimizer", 1)):
        offload = zero.get(section, {})
        device = offload.get("device", "none")
        key = f"zero_optimization.{section}.device"
        if device != "none" and stage < needed:
            problem = f"needs zero_optimization.stage of at least {needed}, but it is {stage}"
            raise ConfigError(problem, key=key, value=device)
        if device == "nvme" and not offload.get("nvme_path"):
            raise ConfigError(f"needs a folder in zero_optimization.{section}.nvme_path", key=key, value=device)
    for name in STAGE3:
        if name in zero and f"stage3_{name}" in zero:
            problem = f"is the same option as stage3_{name}; keep one"
            raise ConfigError(problem, key=f"zero_optimization.{name}", value=zero[name])
