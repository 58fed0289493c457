"""Count host reads, memory traffic and bytes sent of a layer of experts sharded over ranks.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.bench_experts --json experts.json

Run from the repository's root, on CPUs. Nothing is timed.

- `reads`: values that the host waits for, and operations whose result size depends on values. On a
  GPU, each of them waits for all preceding work.
- `moved`: bytes that operations read and write, without products and collectives, divided by the
  bytes of the hidden states that enter the layer. A gather counts only the rows that it picks. Each
  function of `TokenPermute` counts as a single launch, as on a GPU.
- `sent`: bytes of rows, choices and weights sent to all ranks, including this one, divided by the
  same number.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.record import show, write_record
from engine import kernels
from engine.parallel import experts as experts_module
from engine.parallel.mesh import TargetMesh, World
from engine.parallel.zero import connect, disconnect
from launcher.command import join_environment

START = "python -m torch.distributed.run --standalone --nproc_per_node {} -m benchmarks.bench_experts"
TIMEOUT_S = 600
OF_UNKNOWN_SIZE = ("nonzero", "masked_select", "_unique2", "bincount", "_local_scalar_dense")
GATHERS = ("index", "index_select", "gather", "embedding", "scatter_")
PRODUCTS = ("_grouped_mm", "mm", "bmm")
NOTHING_MOVED = ("empty", "new_empty", "empty_like", "empty_strided")


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer of experts, with the number of tokens per rank."""

    num_tokens: int = 1024
    hidden_size: int = 256
    expert_size: int = 96
    num_experts: int = 32
    num_chosen: int = 8


class Moved(TorchDispatchMode):
    """Context manager that counts reads by the host, bytes moved and bytes sent."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.moved_bytes = 0
        self.sent_bytes = 0
        self._is_paused = False
        self._patches = ExitStack()

    def __enter__(self) -> "Moved":
        tolist = Tensor.tolist
        exchange = distributed.all_to_all_single

        def noted_tolist(tensor: Tensor) -> Any:
            self.reads["tolist"] += 1
            return tolist(tensor)

        def noted_exchange(received: Tensor, sent: Tensor, *splits: Any, **options: Any) -> Any:
            self.sent_bytes += sent.nbytes
            return exchange(received, sent, *splits, **options)

        self._patches.enter_context(mock.patch.object(Tensor, "tolist", noted_tolist))
        self._patches.enter_context(mock.patch.object(distributed, "all_to_all_single", noted_exchange))
        if hasattr(kernels, "TokenPermute"):
            self._patch_permute()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _patch_permute(self) -> None:
        from engine.parallel import expert_products

        plain = kernels.TokenPermute()
        counted = kernels.TokenPermute(
            self._as_one(plain.permute_rows, self._permuted),
            self._as_one(plain.quantise_rows, self._quantised),
            self._as_one(plain.unpermute_rows, self._unpermuted),
        )
        for module in (expert_products, experts_module):
            self._patches.enter_context(mock.patch.object(module, "choose_token_permute", lambda device: counted))

    def _as_one(self, function: Callable, num_bytes: Callable[..., int]) -> Callable:
        def counted(*arguments: Any) -> Any:
            self.moved_bytes += num_bytes(*arguments)
            self._is_paused = True
            result = function(*arguments)
            self._is_paused = False
            return result

        return counted

    @staticmethod
    def _permuted(rows_TD: Tensor, source_N: Tensor, out_ND: Tensor, scale_T: Tensor | None = None) -> int:
        return out_ND.numel() * rows_TD.itemsize + source_N.nbytes + out_ND.nbytes

    @staticmethod
    def _quantised(rows_TD: Tensor, source_N: Tensor | None, codes_ND: Tensor, scale_N: Tensor) -> int:
        return codes_ND.numel() * rows_TD.itemsize + codes_ND.nbytes + 2 * scale_N.nbytes

    @staticmethod
    def _unpermuted(rows_MD: Tensor, place_TJ: Tensor, out_TD: Tensor, weight_TJ: Tensor | None = None) -> int:
        weight_bytes = 0 if weight_TJ is None else weight_TJ.nbytes
        return rows_MD.nbytes + place_TJ.nbytes + weight_bytes + out_TD.nbytes

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if self._is_paused or function.namespace == "c10d" or name in (*PRODUCTS, *NOTHING_MOVED):
            return result
        if name in OF_UNKNOWN_SIZE:
            self.reads[name] += 1
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if function.is_view or not written:
            return result
        written_bytes = sum(x.nbytes for x in written)
        if name in GATHERS:
            read_bytes = written_bytes + sum(x.nbytes for x in read if not x.is_floating_point())
        elif name in ("index_add_", "index_add"):
            read_bytes = sum(x.nbytes for x in read[1:]) + read[-1].nbytes
            written_bytes = read[-1].nbytes
        else:
            is_in_place = name.endswith("_") and name not in ("copy_", "zero_", "fill_")
            read_bytes = sum(x.nbytes for x in (read if is_in_place or not name.endswith("_") else read[1:]))
        self.moved_bytes += read_bytes + written_bytes
        return result


def make_experts(shape: LayerShape, num_held: int) -> nn.Module:
    """Return Qwen3-MoE experts with random weights; a rank holds `num_held` of them."""
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.expert_size,
        num_experts=num_held,
        num_experts_per_tok=shape.num_chosen,
    )
    config._experts_implementation = "grouped_mm"
    experts = Qwen3MoeExperts(config).requires_grad_(False)
    for weight in experts.parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5)
    return experts


def measure(world: World, shape: LayerShape) -> list[dict[str, Any]]:
    """Return one row of figures per way to distribute the experts; a collective of all ranks."""
    torch.manual_seed(world.rank)
    hidden_TD = torch.randn(shape.num_tokens, shape.hidden_size)
    weight_TK, index_TK = torch.rand(shape.num_tokens, shape.num_experts).softmax(-1).topk(shape.num_chosen, dim=-1)
    mesh = TargetMesh.make(world, 1, world.size)
    rows = []
    for name, options in _ways(mesh).items():
        ep_size = 1 if options is None else world.size
        experts = make_experts(shape, shape.num_experts // ep_size)
        if options is not None:
            experts_module.dispatch(experts, shape.num_experts, mesh.ep, *options)
        elif hasattr(kernels, "TokenPermute"):
            from engine.parallel.expert_products import compute_experts_in_order

            compute_experts_in_order(experts)
        with Moved() as moved:
            experts.forward(hidden_TD, index_TK, weight_TK)
        reads = {"reads": float(sum(moved.reads.values())), "which": ", ".join(sorted(moved.reads.elements())) or "-"}
        figures = {"moved": moved.moved_bytes / hidden_TD.nbytes, "sent": moved.sent_bytes / hidden_TD.nbytes}
        rows.append({"experts": name} | reads | figures)
    return rows


def _ways(mesh: TargetMesh) -> dict[str, tuple | None]:
    """Return the further arguments of `dispatch` per way; None if every rank holds all experts."""
    ways: dict[str, tuple | None] = {"not shared": None, f"shared by {mesh.ep.size}": ()}
    if hasattr(kernels, "TokenPermute"):
        ways |= {"in two parts": (2,), "fp8 there": (1, "dispatch"), "fp8 both ways": (1, "both")}
    return ways


def main() -> None:
    world = World(**join_environment())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the figures, machine, versions and commit to")
    options = parser.parse_args()
    if world.size == 1:
        parser.error(f"this benchmark needs several ranks; start it with: {START.format(2)}")
    connect(world, TIMEOUT_S, cpu_threads=1)
    rows = measure(world, LayerShape())
    if world.is_main:
        show(rows)
        write_record(options.json, START.format(world.size), rows)
    disconnect()


if __name__ == "__main__":
    main()
