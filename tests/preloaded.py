"""Modules that the forked processes of `tests/distributed.py` need; imported once, by the server that forks them.

A process that imports one of them itself takes up to half a second for it. Objects of the server are frozen, so that a
collection in a forked process neither visits them nor copies their memory.
"""

import contextlib
import gc
import importlib

gc.disable()  # nothing that is imported here is garbage

import deepspeed.ops
import pytest  # noqa: F401  test modules import it, and a function of a test module is found by importing that module
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import engine.trainer  # noqa: F401
import tests.parallel.family_matrix  # noqa: F401
from engine.host.processes import collect_garbage_rarely

FAMILIES = ("deepseek_v3", "gemma3", "gpt_oss", "llama", "minimax", "qwen3_moe", "qwen3_next")
# DeepSpeed imports these, and with them the compiler of PyTorch and distutils, when it connects and when it gets an optimizer.
OF_DEEPSPEED = (
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.muon.original_muon",
    "pydantic.type_adapter",
    "torch._subclasses.schema_check_mode",
    "torch.profiler._cupti_monitor",
    "torch.utils.serialization.config",
)
OF_TRANSFORMERS = (
    *(f"transformers.models.{family}.modeling_{family}" for family in FAMILIES),
    "transformers.image_processing_backends",
    "transformers.models.auto.processing_auto",
    "transformers.video_processing_utils",
)

for module in (*OF_DEEPSPEED, *OF_TRANSFORMERS):
    with contextlib.suppress(ImportError):  # other releases may not have it
        importlib.import_module(module)
get_checkpoint_conversion_mapping("llama")  # compiles a thousand expressions
_ = deepspeed.ops.__compatible_ops__  # asks a compiler
gc.collect()
gc.freeze()
gc.enable()
collect_garbage_rarely()
