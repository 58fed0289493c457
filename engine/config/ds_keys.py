"""Table of DeepSpeed 0.19's JSON keys: supported keys with types, refused keys with the reason.

DeepSpeed silently accepts most misspelt keys and publishes no list of valid ones, hence this table.
"""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from engine.config.strict import dotted_keys

COUNT = Annotated[int, Ge(1)]
SIZE = Annotated[int, Ge(0)]
AMOUNT = Annotated[float, Ge(0)]
SHARE = Annotated[float, Ge(0), Le(1)]
LR = float | tuple[float, ...]
DTYPE = Literal["fp32", "fp16", "bf16"]
WARMUP_TYPE = Literal["log", "linear"]

# DeepSpeed accepts these keys under two names, with and without the prefix "stage3_".
STAGE3 = {
    "prefetch_bucket_size": SIZE,
    "param_persistence_threshold": SIZE,
    "model_persistence_threshold": SIZE,
    "max_live_parameters": SIZE,
    "max_reuse_distance": SIZE,
    "gather_16bit_weights_on_model_save": bool,
    "use_all_reduce_for_fetch_params": bool,
    "allgather_sequential": bool,
}

OFFLOAD_PARAM = {
    "device": Literal["none", "cpu", "nvme"],
    "nvme_path": str | None,
    "buffer_count": SIZE,
    "buffer_size": SIZE,
    "max_in_cpu": SIZE,
    "pin_memory": bool,
}

OFFLOAD_OPTIMIZER = {
    "device": Literal["none", "cpu", "nvme"],
    "nvme_path": str | None,
    "buffer_count": SIZE,
    "pin_memory": bool,
    "pipeline_read": bool,
    "pipeline_write": bool,
    "fast_init": bool,
    "ratio": SHARE,
    "super_offload": bool,
    "cpuadam_cores_perc": SHARE,
}

ZERO_OPTIMIZATION = {
    "stage": Literal[0, 1, 2, 3],
    "contiguous_gradients": bool,
    "reduce_scatter": bool,
    "reduce_bucket_size": COUNT,
    "use_multi_rank_bucket_allreduce": bool,
    "allgather_partitions": bool,
    "allgather_bucket_size": SIZE,
    "overlap_comm": bool | None,
    "compute_grad_norm": bool,
    "load_from_fp32_weights": bool,
    "elastic_checkpoint": bool,
    "offload_param": OFFLOAD_PARAM,
    "offload_optimizer": OFFLOAD_OPTIMIZER,
    "sub_group_size": SIZE,
    "ignore_unused_parameters": bool,
    "round_robin_gradients": bool,
    "parameter_alignment": bool,
    "zero_hpz_partition_size": SIZE,
    "zero_quantized_weights": bool,
    "zero_quantized_nontrainable_weights": bool,
    "zero_quantized_gradients": bool,
    "memory_efficient_linear": bool,
    "pipeline_loading_checkpoint": bool,
    "override_module_apply": bool,
    "log_trace_cache_warnings": bool,
    "enable_sanity_checks": bool,
    "save_muon_momentum_buffer_in_memory": bool,
    **STAGE3,
    **{f"stage3_{key}": kind for key, kind in STAGE3.items()},
}

BF16 = {
    "enabled": bool,
    "immediate_grad_update": bool,
    "check_grad_overflow": bool,
    "bf16_master_weights_and_grads": bool,
    "bf16_optimizer_states": bool,
}

FP16 = {
    "enabled": bool,
    "auto_cast": bool,
    "loss_scale": AMOUNT,
    "initial_scale_power": SIZE,
    "loss_scale_window": COUNT,
    "hysteresis": COUNT,
    "consecutive_hysteresis": bool,
    "min_loss_scale": SIZE,
    "fp16_master_weights_and_grads": bool,
}

OPTIMIZER = {
    "type": Literal["AdamW", "Muon"],
    "params": {
        "lr": AMOUNT,
        "betas": tuple[SHARE, ...],
        "eps": AMOUNT,
        "weight_decay": AMOUNT,
        "torch_adam": bool,
        "muon_lr": AMOUNT,
        "momentum": SHARE,
        "ns_method": Literal["gram", "standard"],
    },
}
OF_MUON = ("muon_lr", "momentum", "ns_method")

WARMUP = {"warmup_num_steps": COUNT, "warmup_type": WARMUP_TYPE, "last_batch_iteration": int}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "WarmupLR": {**WARMUP, "warmup_min_lr": LR, "warmup_max_lr": LR},
    "WarmupDecayLR": {**WARMUP, "total_num_steps": COUNT, "warmup_min_lr": LR, "warmup_max_lr": LR},
    "WarmupCosineLR": {**WARMUP, "total_num_steps": COUNT, "warmup_min_ratio": SHARE, "cos_min_ratio": SHARE},
    "OneCycle": {
        "cycle_min_lr": LR,
        "cycle_max_lr": LR,
        "decay_lr_rate": AMOUNT,
        "cycle_first_step_size": COUNT,
        "cycle_second_step_size": COUNT | None,
        "cycle_first_stair_count": SIZE,
        "cycle_second_stair_count": SIZE | None,
        "decay_step_size": SIZE,
        "cycle_momentum": bool,
        "cycle_min_mom": SHARE,
        "cycle_max_mom": SHARE,
        "decay_mom_rate": AMOUNT,
        "last_batch_iteration": int,
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": LR,
        "lr_range_test_step_size": COUNT,
        "lr_range_test_step_rate": AMOUNT,
        "lr_range_test_staircase": bool,
        "last_batch_iteration": int,
    },
}
# Parameters of schedulers that set learning rates of their own.
RATES = [name for params in SCHEDULERS.values() for name, kind in params.items() if kind == LR]
REQUIRED_BY_SCHEDULER = {
    "WarmupLR": ("warmup_max_lr",),
    "WarmupDecayLR": ("total_num_steps", "warmup_max_lr"),
    "WarmupCosineLR": ("total_num_steps",),
    "OneCycle": ("cycle_min_lr", "cycle_max_lr"),
}

MONITOR = {"enabled": bool, "output_path": str, "job_name": str}
COMET = {
    "enabled": bool,
    "samples_log_interval": COUNT,
    "project": str | None,
    "workspace": str | None,
    "api_key": str | None,
    "experiment_name": str | None,
    "experiment_key": str | None,
    "online": bool | None,
    "mode": str | None,
}

CHECKPOINT = {
    "tag_validation": Literal["Warn", "Ignore", "Fail", "WARN", "IGNORE", "FAIL"],
    "parallel_write": {"pipeline_stage": bool},
    "checkpoint_serialization": bool,
    "writer": {
        "type": Literal["python", "fast", "PYTHON", "FAST"],
        "io_buffer_size": COUNT,
        "io_buffer_double": bool,
        "io_multiplier": COUNT,
        "show_statistics": bool,
        "data_parallel": Literal["replica", "socket", "machine", "REPLICA", "SOCKET", "MACHINE"] | None,
    },
}

DS_KEYS: dict[str, Any] = {
    "train_batch_size": COUNT,
    "train_micro_batch_size_per_gpu": COUNT,
    "gradient_accumulation_steps": COUNT,
    "optimizer": OPTIMIZER,
    "scheduler": {"type": Literal[tuple(SCHEDULERS)], "params": {}},
    "gradient_clipping": AMOUNT,
    "bf16": BF16,
    "fp16": FP16,
    "zero_optimization": ZERO_OPTIMIZATION,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "data_types": {
        "grad_accum_dtype": DTYPE | None,
        "param_dtype": DTYPE | None,
        "buffer_dtype": DTYPE | None,
        "keep_in_fp32_modules": tuple[str, ...],
    },
    "communication_data_type": DTYPE | None,
    "prescale_gradients": bool,
    "gradient_predivide_factor": AMOUNT,
    "disable_allgather": bool,
    "disable_python_gc": bool,
    "dump_state": bool,
    "log_level": str | None,
    "steps_per_print": COUNT | None,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    "tensorboard": MONITOR,
    "csv_monitor": MONITOR,
    "wandb": {"enabled": bool, "group": str | None, "team": str | None, "project": str},
    "comet": COMET,
    "comms_logger": {"enabled": bool, "prof_all": bool, "prof_ops": tuple[str, ...], "verbose": bool, "debug": bool},
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": AMOUNT,
        "profile_step": COUNT,
        "module_depth": int,
        "top_modules": COUNT,
        "detailed": bool,
        "output_file": str | None,
    },
    "activation_checkpointing": {
        "partition_activations": bool,
        "number_checkpoints": COUNT | None,
        "contiguous_memory_optimization": bool,
        "synchronize_checkpoint_boundary": bool,
        "profile": bool,
        "cpu_checkpointing": bool,
    },
    "aio": {
        "block_size": COUNT,
        "queue_depth": COUNT,
        "intra_op_parallelism": COUNT,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
    "checkpoint": CHECKPOINT,
}

_REMOVED = "removed from DeepSpeed 0.19; delete it"
_LEAF = (
    "a draft module runs once per TTT step, and ZeRO-3 leaf modules that run several times silently train wrongly; delete it"
)
REFUSED = {
    "amp": f"{_REMOVED} and use bf16",
    "autotuning": "starts separate runs; measure with benchmarks/ and set the batch size",
    "bfloat16": "an old name; write bf16",
    "compile": "the draft's unroll is not one graph that DeepCompile can rewrite; delete it",
    "compression_training": _REMOVED,
    "curriculum_learning": _REMOVED,
    "data_efficiency": "the recipe's data section controls the order and length of documents; delete it",
    "dataloader_drop_last": "the engine packs and loads its own batches; delete it",
    "datastates_ckpt": "needs a checkpoint engine that DraftSpeed does not ship; delete it and use checkpoint.writer",
    "eigenvalue": _REMOVED,
    "elasticity": f"{_REMOVED} and set the batch size directly",
    "expert_parallel": "the draft has no experts; delete it",
    "gradient_allreduce_op": "the loss relies on DeepSpeed's mean over ranks; delete it",
    "graph_harvesting": _REMOVED,
    "hybrid_engine": "generates text with the trained model; here engine/evaluation/decoding.py does; delete it",
    "managed_gradient_accumulation": "the trainer relies on DeepSpeed to find the accumulation boundary; delete it",
    "nebula": f"{_REMOVED} and use checkpoint",
    "pipeline": "a draft of one layer has no pipeline stages; delete it",
    "progressive_layer_drop": _REMOVED,
    "quantize_training": _REMOVED,
    "seq_parallel_communication_data_type": "the draft is not sequence-parallel; delete it",
    "sequence_parallel_size": "the draft is not sequence-parallel; delete it",
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
    "tensor_parallel": "the draft is sharded by ZeRO alone; delete it and raise zero_optimization.stage",
    "torch_autocast": "the draft's kernels choose their own precision; use bf16",
    "use_data_before_expert_parallelism": "the draft has no experts; delete it",
    "vocabulary_size": "the draft vocabulary is the recipe's draft.vocab_size",
    "weight_quantization": "quantises for inference; delete it",
    "checkpoint.load_universal": "the recipe's checkpoint.resume rewrites checkpoints for other numbers of ranks; delete it",
    "checkpoint.use_node_local_storage": "a checkpoint is one folder that every rank reads; delete it and share output_dir",
    "checkpoint.writer.decoupled": "a save must be complete before the next step, or a killed run cannot resume; delete it",
    "optimizer.legacy_fusion": "belongs to optimizers other than AdamW and Muon; delete it",
    "optimizer.params.adam_lr": "of Muon's AdamW part is optimizer.params.lr here; rename it",
    "optimizer.params.per_head_muon": "needs attention whose heads DeepSpeed recognises, which a draft's are not; delete it",
    "optimizer.params.adam_w_mode": "AdamW always decays weights apart from the gradient; delete it",
    "optimizer.params.max_grad_norm": "DeepSpeed refuses it here; write gradient_clipping at the top level",
    "zero_optimization.cpu_offload": 'deprecated; write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'deprecated; write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "deprecated; write pin_memory inside offload_param or offload_optimizer",
    "zero_optimization.legacy_stage1": _REMOVED,
    "zero_optimization.leaf_module": _LEAF,
    "zero_optimization.mics_shard_size": f"{_REMOVED} or use zero_hpz_partition_size",
    "zero_optimization.module_granularity_threshold": _LEAF,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "deprecated; write stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.stage3_module_granularity_threshold": _LEAF,
    "zero_optimization.zenflow": "updates part of the weights late, which changes the result; delete it",
    "zero_optimization.zeropp_loco_param": f"{_REMOVED}; zero_quantized_gradients works without it",
}

# Names of the same settings in other trainers.
_OTHER_NAMES = {
    "accumulation_steps": "gradient_accumulation_steps",
    "adam_beta2": "optimizer.params.betas",
    "batch_size": "train_micro_batch_size_per_gpu",
    "clip_grad": "gradient_clipping",
    "grad_accum": "gradient_accumulation_steps",
    "learning_rate": "optimizer.params.lr",
    "lr_scheduler": "scheduler",
    "max_grad_norm": "gradient_clipping",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "per_device_train_batch_size": "train_micro_batch_size_per_gpu",
    "precision": "bf16",
    "warmup_ratio": "scheduler.params.warmup_num_steps",
    "warmup_steps": "scheduler.params.warmup_num_steps",
    "weight_decay": "optimizer.params.weight_decay",
    "zero_stage": "zero_optimization.stage",
}


def _homes() -> dict[str, str]:
    """Return the dotted key in DeepSpeed's JSON of each dotted key and of each unqualified name.

    Names that many sections use, such as 'type' and 'enabled', are left out.
    """
    every_key = list(dotted_keys(DS_KEYS))
    every_key += [f"scheduler.params.{key}" for params in SCHEDULERS.values() for key in params]
    general = {"type", "params", "enabled", "stage", "device", "profile", "debug", "verbose", "mode", "project", "ratio"}
    homes: dict[str, str] = {key: key for key in every_key}
    for key in sorted(every_key, key=lambda key: key.count(".")):
        name = key.rpartition(".")[2]
        if name not in general:
            homes.setdefault(name, key)
    return {**homes, **_OTHER_NAMES}


DS_HOMES = _homes()
