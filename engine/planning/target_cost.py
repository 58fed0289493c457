"""Cost of a target per rank: weight memory, and FLOPs, traffic and temporary memory of a forward.

All figures follow from a model's modules on the meta device and from how `TargetPlan` shards them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import comb
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.parallel.mesh import TargetMesh
from engine.parallel.names import Names, names_of
from engine.parallel.plan import TargetPlan, parts_of_layers
from engine.parallel.rules import compares_pairs, is_experts
from engine.target.structure import decoder_of
from engine.weights.quantised_checkpoint import StaysQuantised
from engine.weights.weight_loader import own_bytes

CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "num_selected_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
# Tensors [T, D] in addition to a block's own: the residual stream, its norm and the result.
PASSING_TENSORS = 3


@dataclass(frozen=True)
class Forward:
    """Sizes of one target forward on a rank.

    num_tokens: the rank's tokens. num_slots: slots that the head reads.
    num_pairs: pairs of query and key, summed over all tokens.
    """

    num_tokens: int
    num_slots: int
    num_pairs: int


class TargetCost:
    """Cost of a target that is sharded by a mesh.

    model: the target on the meta device. quantised: which of its weights stay quantised in memory.
    runs_head: whether a forward multiplies the slots by the head, as in `DraftMethod.needs_head_stats`.
    """

    def __init__(
        self, model: PreTrainedModel, mesh: TargetMesh, quantised: StaysQuantised | None = None, runs_head: bool = True
    ) -> None:
        self.model = model
        self.mesh = mesh
        self.quantised = quantised
        self.runs_head = runs_head
        self.itemsize = model.dtype.itemsize
        self.decoder = decoder_of(model)
        self.config = self.decoder.config
        self.plan = TargetPlan.of(self.decoder, mesh)
        self._passing: dict[Forward, int] = {}

    @property
    def misfits(self) -> list[str]:
        """Reasons why shardable modules cannot be sharded by this number of ranks."""
        return sorted({reason for reason in self.plan.replicated.values() if "cannot be shared by" in reason})

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of weights per rank. A head not tied to the embedding is sharded by vocabulary."""
        head = self.model.get_output_embeddings().weight
        embedding = self.model.get_input_embeddings().weight
        total = sum(self._held_bytes(name, weight) for name, weight in self.decoder.named_parameters())
        return total + (0 if head is embedding else -(-head.nbytes // self.mesh.tp.size))

    def _held_bytes(self, name: str, weight: Tensor) -> int:
        owner = self.decoder.get_submodule(name.rpartition(".")[0])
        is_expert = weight.ndim == 3
        is_linear = isinstance(owner, nn.Linear) and weight.ndim == 2
        whole = own_bytes(weight, self.plan.cuts.get(name))
        if self.quantised is None or not self.quantised.holds(name, is_expert, is_linear):
            return whole
        return round(whole / weight.itemsize * self.quantised.value_bytes)

    def flops(self, forward: Forward) -> int:
        """Return the FLOPs of a forward per rank.

        All ranks have the same number of tokens, so this equals the FLOPs that a replicated target
        needs for one rank's tokens. The state updates of linear attention are not counted: they are
        small next to its linear maps, and they differ between kernels.
        """
        width = self.config.hidden_size
        vocab_size = self.model.get_output_embeddings().weight.shape[0]
        of_heads = forward.num_pairs * sum(map(self.pair_flops, self._attentions()))
        num_slots = forward.num_slots if self.runs_head else 0
        return 2 * forward.num_tokens * self.num_active_weights + of_heads + 2 * num_slots * width * vocab_size

    def least_bytes(self, forward: Forward, num_aux: int) -> int:
        """Return the bytes of memory traffic of a forward per rank, at least.

        Each weight is read once, the head only if it runs, and of the embedding only the rows that are
        looked up. The output for the draft is written once. States between layers are not counted.
        num_aux: auxiliary layers that are captured.
        """
        head = self.model.get_output_embeddings().weight
        embedding = self.model.get_input_embeddings().weight
        weights = self.weight_bytes
        if head is not embedding or not self.runs_head:
            tables = [(name, weight) for name, weight in self.decoder.named_parameters() if weight is embedding]
            weights -= sum(self._held_bytes(name, weight) for name, weight in tables)
        if head is not embedding and not self.runs_head:
            weights -= -(-head.nbytes // self.mesh.tp.size)
        looked_up = forward.num_tokens * self.config.hidden_size * self.itemsize
        return weights + looked_up + self.output_bytes(forward, num_aux)

    def traffic(self, forward: Forward) -> dict[str, int]:
        """Return the bytes that a rank sends per forward, by collective."""
        tokens_bytes = forward.num_tokens * self.config.hidden_size * self.itemsize
        sent = {}
        if self.mesh.tp.size > 1:
            of_tokens = self.tokens_sent(forward.num_tokens)
            sent["all-gather of tokens (TP)"] = of_tokens * len(self.plan.shared)
            # Embeddings of a sharded vocabulary are reduced like layer outputs.
            looked_up = self.plan.embedding is not None
            sent["reduce-scatter of tokens (TP)"] = of_tokens * (len(self.plan.shared) + looked_up)
            if self.runs_head:
                sent["all-gather of slots (head)"] = self.tokens_sent(forward.num_slots)
        if self.plan.experts:
            rows = sum(self._ranks_of_a_token(count) for count in self.plan.experts.values())
            in_fp8 = tokens_bytes // self.itemsize  # without scales
            there = tokens_bytes if self.mesh.fp8_exchange == "none" else in_fp8
            back = in_fp8 if self.mesh.fp8_exchange == "both" else tokens_bytes
            sent["all-to-all of tokens (EP)"] = round(rows * there)
            sent["all-to-all back (EP)"] = round(rows * back)
        return sent

    def tokens_sent(self, num_tokens: int) -> int:
        """Return the bytes that a rank sends to gather states of `num_tokens` tokens over TP."""
        return (self.mesh.tp.size - 1) * num_tokens * self.config.hidden_size * self.itemsize

    def passing_bytes(self, forward: Forward) -> int:
        """Return the peak temporary bytes of a forward, without weights and captured states."""
        if forward not in self._passing:
            self._passing[forward] = self._count_passing(forward)
        return self._passing[forward]

    def _count_passing(self, forward: Forward) -> int:
        width = self.config.hidden_size * self.itemsize
        own = forward.num_tokens
        most = 0
        for name, block in parts_of_layers(self.decoder):
            shared = any(part == name or part.startswith(f"{name}.") for part in self.plan.shared)
            tokens = own * (self.mesh.tp.size if shared else 1)
            features = self._own_features(name, block)
            most = max(most, tokens * (2 * width + 2 * features * self.itemsize) + self._quantised_bytes(name, block, tokens))
            if any(is_experts(module, names_of(self.config)) for module in block.modules()):
                most = max(most, self._passing_experts(block, own))
        return most + PASSING_TENSORS * own * width

    def output_bytes(self, forward: Forward, num_aux: int) -> int:
        """Return the bytes of a forward's output for the draft, including token embeddings.

        num_aux: auxiliary layers that are captured.
        """
        states = (num_aux + 1) * forward.num_tokens + forward.num_slots
        return states * self.config.hidden_size * self.itemsize

    @property
    def _chosen(self) -> int:
        """Number of experts per token."""
        return next((value for name in CHOSEN if isinstance(value := getattr(self.config, name, None), int)), 1)

    @property
    def num_weights(self) -> int:
        """Number of weights of the whole target."""
        head = self.model.get_output_embeddings().weight
        embedding = self.model.get_input_embeddings().weight
        return sum(weight.numel() for weight in self.decoder.parameters()) + (0 if head is embedding else head.numel())

    @cached_property
    def num_active_weights(self) -> float:
        """Number of layer weights that multiply each token, on average."""
        total = 0.0
        for name, module in self.decoder.named_modules():
            if is_experts(module, names_of(self.config)):
                weights = [weight for weight in module.parameters(recurse=False) if weight.ndim == 3]
                total += sum(weight[0].numel() for weight in weights) * self._chosen
            elif isinstance(module, nn.Linear):
                total += module.weight.numel() * self._share_of(name)
            elif not isinstance(module, nn.Embedding):  # Routers hold a weight matrix directly.
                total += sum(weight.numel() for weight in module.parameters(recurse=False) if weight.ndim == 2)
        return total

    def _share_of(self, name: str) -> float:
        """Return the share of tokens that a linear map reads; below 1 for an expert's map."""
        owner, _, rest = name.partition(".experts.")
        if not rest:
            return 1.0
        experts: Any = self.decoder.get_submodule(f"{owner}.experts")  # a ModuleList
        return self._chosen / len(experts)

    def pair_flops(self, attention: nn.Module) -> int:
        """Return the FLOPs of an attention layer's scores and outputs per pair of query and key."""
        # The output projections of all families, including those that are not sharded.
        reads = [getattr(attention, name, None) for name in Names().outputs]
        config = self.config
        output = next((read for read in reads if isinstance(read, nn.Linear)), None)
        heads = config.num_attention_heads
        values = heads * config.head_dim if output is None else output.in_features
        latent = [getattr(config, name, None) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
        return 2 * ((heads * sum(latent) if all(latent) else values) + values)

    def _attentions(self) -> Iterator[nn.Module]:
        return (block for _, block in parts_of_layers(self.decoder) if compares_pairs(block))

    def _own_features(self, name: str, block: nn.Module) -> int:
        """Return the number of features per token within a block on this rank, without experts."""
        features = 0
        for inner, module in block.named_modules():
            if isinstance(module, nn.Linear) and ".experts." not in f".{inner}.":
                cut = self.plan.cuts.get(f"{name}.{inner}.weight")
                whole = module.out_features
                features += whole if cut is None or cut.dim else sum(stop - start for start, stop in cut.intervals)
        return features

    def _passing_experts(self, block: nn.Module, own: int) -> int:
        """Return the bytes of temporary tensors in a layer of experts, with tokens spread evenly.

        These are the rows that are sent and received, and one copy of a row per chosen expert.
        """
        width = self.config.hidden_size
        ranks = self.mesh.ep.size
        experts = next(module for module in block.modules() if is_experts(module, names_of(self.config)))
        features = experts.get_parameter("down_proj")[0].numel() // width
        split = self.mesh.tp.size if ranks == 1 else 1
        rows = own * min(self._chosen, ranks) * split
        choices = own * self._chosen * split
        passing = (4 * rows * width + choices * (2 * width + 3 * features // split)) * self.itemsize
        return passing + round(choices * max(width, features // split) * self._input_bytes)

    @property
    def _input_bytes(self) -> float:
        return 0.0 if self.quantised is None else self.quantised.input_bytes

    def _quantised_bytes(self, name: str, block: nn.Module, tokens: int) -> int:
        """Return the bytes of the quantised input of a block's widest map, 0 if not quantised."""
        widest = 0
        for inner, module in block.named_modules():
            if isinstance(module, nn.Linear):
                cut = self.plan.cuts.get(f"{name}.{inner}.weight")
                width = module.in_features
                if cut is not None and cut.dim == 1:
                    width = sum(stop - start for start, stop in cut.intervals)
                widest = max(widest, width)
        return round(tokens * widest * self._input_bytes)

    def _ranks_of_a_token(self, num_experts: int) -> float:
        """Return the expected number of other ranks that a token is sent to.

        All experts are assumed to be equally likely.
        """
        ranks = self.mesh.ep.size
        held = num_experts // self.mesh.ep.size
        missed = comb(num_experts - held, self._chosen) / comb(num_experts, self._chosen)
        return (ranks - 1) * (1 - missed)
