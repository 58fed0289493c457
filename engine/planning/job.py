"""Plans of a whole job: peak memory per rank, estimated speed, and the fewest GPUs that suffice."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from engine.batch import PackedBatch
from engine.config.ds_config import GLOBAL, accumulation_steps, compute_dtype, micro_batch_size
from engine.config.sections import COLOCATED, Config, ConfigError, divisors
from engine.models.costs import PEAKS, HardwarePeak
from engine.models.draft_method import DraftConfig, DraftCounts, DraftMethod
from engine.models.method_registry import make_method
from engine.parallel.mesh import Group, TargetMesh
from engine.planning.draft_memory import Sharing
from engine.planning.target_cost import Forward, TargetCost
from engine.target.embedding import gives_rows
from engine.weights.quantised_checkpoint import StaysQuantised

MOST_RANKS_OF_A_COPY = 64  # that are tried; collectives of more ranks take longer than they save
BUFFERS_OF_A_TARGET = 2  # of states that are sent to other ranks
ENOUGH_TOKENS = 32_768  # tokens per micro-batch; more do not make the products faster

# From NVIDIA's datasheets (see engine/models/costs.py), in units of 1e9 bytes: memory, and
# NVLink bandwidth per second in each direction.
_MEMORY_AND_LINK = {
    "NVIDIA A100-SXM4-40GB": (40, 300),
    "NVIDIA A100-SXM4-80GB": (80, 300),
    "NVIDIA H100 80GB HBM3": (80, 450),
    "NVIDIA H200": (141, 450),
    "NVIDIA B200": (180, 900),
}


@dataclass(frozen=True)
class Gpus:
    """GPUs that a job may use.

    peak: peak rates of one GPU. memory_bytes: memory of one GPU.
    link_bytes_per_s: rate at which one GPU sends to GPUs of its node.
    network_bytes_per_s: rate at which one GPU sends to GPUs of other nodes.
    per_node: GPUs per node.
    """

    peak: HardwarePeak
    memory_bytes: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    per_node: int = 8

    @classmethod
    def named(cls, name: str, memory_gb: float | None, network_gb_per_s: float, per_node: int) -> "Gpus":
        """Return the GPUs of a model with a known datasheet.

        name: the model's name, or a part of it that no other model's name contains.
        memory_gb: memory of one GPU, in units of 1e9 bytes; None uses the datasheet's.
        Raises ValueError if the name is unknown or ambiguous.
        """
        known = [full for full in _MEMORY_AND_LINK if name.lower() in full.lower()]
        if len(known) != 1:
            raise ValueError(f"no datasheet for {name!r}; use one of {known or sorted(_MEMORY_AND_LINK)}")
        published_gb, link = _MEMORY_AND_LINK[known[0]]
        memory = published_gb if memory_gb is None else memory_gb
        return cls(PEAKS[known[0]], memory * 1e9, link * 1e9, network_gb_per_s * 1e9, per_node)

    def rate(self, num_ranks: int) -> float:
        """Return the bytes/s that a rank sends to the other ranks of its group.

        If the group spans several nodes, all its traffic is counted at the network's rate.
        """
        return self.link_bytes_per_s if num_ranks <= self.per_node else self.network_bytes_per_s


@dataclass(frozen=True)
class DocumentSizes:
    """Assumed documents of a micro-batch.

    num_tokens: tokens per document.
    assistant_share: share of assistant tokens, which are the last ones of each document.
    """

    num_tokens: int
    assistant_share: float

    def batch(self, num_tokens: int) -> PackedBatch:
        """Return one micro-batch of `num_tokens` tokens in total."""
        lengths = [self.num_tokens] * (num_tokens // self.num_tokens)
        lengths += [rest] if (rest := num_tokens - sum(lengths)) else []
        mask_T = torch.cat([torch.arange(length) >= round(length * (1 - self.assistant_share)) for length in lengths])
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        return PackedBatch(torch.zeros(num_tokens, dtype=torch.long), mask_T, cu_seqlens)


@dataclass(frozen=True)
class Assumed:
    """Assumptions of an estimate.

    documents: documents for the estimate of the speed.
    share_of_peak: share of the peak FLOP/s that products reach.
    headroom: share of the memory that stays free.
    target_share_of_peak, draft_share_of_peak: measured shares of a side; None = `share_of_peak`.
    """

    documents: DocumentSizes
    share_of_peak: float
    headroom: float
    target_share_of_peak: float | None = None
    draft_share_of_peak: float | None = None


@dataclass(frozen=True)
class SideTimes:
    """Estimated seconds of a micro-batch on one rank.

    transfer_s: way of its states to another rank, over the network.
    """

    target_compute_s: float
    target_traffic_s: float
    draft_compute_s: float
    draft_traffic_s: float
    transfer_s: float

    @property
    def target_s(self) -> float:
        return self.target_compute_s + self.target_traffic_s

    @property
    def draft_s(self) -> float:
        return self.draft_compute_s + self.draft_traffic_s

    @property
    def serial_s(self) -> float:
        return self.target_s + self.draft_s

    @property
    def colocated_s(self) -> float:
        """Time if one side's communication hides behind the other side's compute; compute shares the GPU."""
        compute_s = self.target_compute_s + self.draft_compute_s
        traffic_s = self.target_traffic_s + self.draft_traffic_s
        return max(compute_s, traffic_s, self.target_s, self.draft_s)

    @property
    def by_part(self) -> dict[str, float]:
        traffic_s = self.target_traffic_s + self.draft_traffic_s
        return {"target": self.target_compute_s, "draft": self.draft_compute_s, "traffic": traffic_s}


# Work of the draft on a micro-batch, by its tokens and documents.
Counted = dict[tuple[int, DocumentSizes], DraftCounts]


class JobPlan:
    """A job on a given number of ranks, each of which holds a part of the target and of the draft.

    target: cost of the target, sharded by the mesh of `ranks`.
    fused: whether the ranks have GPU kernels.
    """

    def __init__(
        self,
        config: Config,
        ds_config: dict[str, Any],
        draft: DraftConfig,
        target: TargetCost,
        ranks: "Ranks",
        fused: bool,
        counted: "Counted | None" = None,
        num_draft: int | None = None,
    ) -> None:
        """Create a plan.

        counted: work that plans of one planner have counted; new results are added.
        num_draft: ranks that train the draft, if others run the target; None = all ranks do both.
        """
        self.num_draft = ranks.size if num_draft is None else num_draft
        self.config = config
        self.method: DraftMethod = make_method(config)
        self.draft = draft
        self.target = target
        self.ranks = ranks
        self.fused = fused
        self.sharing = Sharing.of(ds_config, self.num_draft)
        self.accumulation = accumulation_steps(ds_config, self.num_draft)
        self.draft_dtype = getattr(torch, compute_dtype(ds_config))
        self.num_tokens = ranks.micro_batch * config.data.max_tokens
        self._counted: Counted = {} if counted is None else counted

    def counts(self, documents: DocumentSizes) -> DraftCounts:
        """Return the work of the draft on a micro-batch."""
        key = (self.num_tokens, documents)
        if key not in self._counted:
            batch = documents.batch(self.num_tokens)
            self._counted[key] = self.method.count_work(batch, self.method.allowed_rows(batch))
        return self._counted[key]

    def bytes_by_part(self, counts: DraftCounts) -> dict[str, int]:
        """Return the peak memory of a rank in bytes, by category."""
        # With `auto`, a job runs serially if its memory would not suffice for both sides at once.
        ahead = self.config.look_ahead if self.config.placement == COLOCATED else 0
        passing = self.target.passing_bytes(self._forward(counts))
        drafting = self._draft_bytes(counts, ahead)
        drafting_peak = drafting.pop("activations")
        if ahead:  # The target runs meanwhile, and its states are copied to a buffer at the end.
            drafting_peak += passing + self._output_bytes(counts)
        # The next batch's states arrive while the previous ones are still in memory.
        forward_peak = drafting["hidden states"] + passing
        own = {"target": self.target.weight_bytes + self._head_rows_bytes, **drafting}
        return own | {"activations": max(drafting_peak, forward_peak)}

    def draft_side_bytes(self, counts: DraftCounts, look_ahead: int) -> dict[str, int]:
        """Return the peak memory of a rank that trains the draft while the target runs on other ranks.

        look_ahead: micro-batches that may wait.
        """
        embedding: Any = self.target.model.get_input_embeddings()
        table = embedding.weight
        tables = table.numel() * table.element_size() + self._head_rows_bytes
        return {"target's embedding and head": tables, **self._draft_bytes(counts, look_ahead)}

    def target_side_bytes(self, counts: DraftCounts) -> dict[str, int]:
        """Return the peak memory of a rank that runs the target while the draft is trained on other ranks."""
        output = self._output_bytes(counts)
        passing = self.target.passing_bytes(self._forward(counts))
        return {
            "target": self.target.weight_bytes,
            "sent states": BUFFERS_OF_A_TARGET * output,
            "activations": output + passing,
        }

    def _draft_bytes(self, counts: DraftCounts, ahead: int) -> dict[str, int]:
        """Return the peak memory of training the draft, by category. ahead: batches that wait."""
        num_weights = self.num_draft_weights
        sharing = self.sharing
        output = self._output_bytes(counts)
        states = self.method.activation_bytes(self.draft, counts, sharing.itemsize, self.fused)
        drafting = states.kept + states.on_top + sharing.gathered(num_weights) + sharing.gradients(num_weights)
        drafting += sharing.buckets()
        stepping = sharing.gradients(num_weights) + sharing.step(num_weights, self.fused)
        return {
            "draft": sharing.weights(num_weights),
            "optimizer": sharing.optimizer(num_weights),
            "buffers": sharing.buffers(num_weights),
            "hidden states": output * self.accumulation,
            "activations": max(drafting, stepping) + ahead * output,
        }

    def _output_bytes(self, counts: DraftCounts) -> int:
        return self.target.output_bytes(self._forward(counts), len(self.draft.aux_layers or ()))

    @property
    def _head_rows_bytes(self) -> int:
        return self.draft.draft_vocab_size * self.draft.target_hidden_size * self.target.itemsize

    def side_times(self, counts: DraftCounts, gpus: Gpus, assumed: "Assumed") -> "SideTimes":
        """Return the estimated seconds of a micro-batch.

        Products run at a share of the peak FLOP/s, and links at their full rate.
        """
        rate = gpus.peak.flops_per_s
        dtype = torch.bfloat16 if self.target.itemsize < 4 else torch.float32
        by_group = {name: sent / gpus.rate(self._group(name)) for name, sent in self.traffic(counts).items()}
        of_draft = sum(seconds for name, seconds in by_group.items() if "ZeRO" in name)
        target_flops = self.target.flops(self._forward(counts))
        draft_flops = self.method.step_flops(self.draft, counts)
        return SideTimes(
            target_compute_s=target_flops / (rate[dtype] * (assumed.target_share_of_peak or assumed.share_of_peak)),
            target_traffic_s=sum(by_group.values()) - of_draft,
            draft_compute_s=draft_flops / (rate[self.draft_dtype] * (assumed.draft_share_of_peak or assumed.share_of_peak)),
            draft_traffic_s=of_draft,
            transfer_s=self._output_bytes(counts) / gpus.network_bytes_per_s,
        )

    def traffic(self, counts: DraftCounts) -> dict[str, int]:
        """Return the bytes that a rank sends per micro-batch, by collective."""
        sent = self.target.traffic(self._forward(counts))
        others = self.sharing.num_ranks - 1
        if self.target.plan.embedding is not None and not gives_rows(self.target.decoder.get_input_embeddings()):
            sent["reduce-scatter of embeddings (TP)"] = self.target.tokens_sent(counts.num_tokens)
        whole = self.num_draft_weights * self.sharing.itemsize * others // self.sharing.num_ranks
        if others and self.sharing.stage == 3:
            sent["all-gather of weights (ZeRO)"] = whole
        if others and self.sharing.stage >= 2:
            sent["reduce-scatter of gradients (ZeRO)"] = whole
        elif others:
            sent["all-reduce of gradients (ZeRO)"] = 2 * whole // self.accumulation
        if others and self.sharing.stage in (1, 2):
            sent["all-gather of weights (ZeRO)"] = whole // self.accumulation
        return sent

    @property
    def is_sensible(self) -> bool:
        """Whether every requested parallel size above 1 shards something."""
        return self.ranks.ep_size == 1 or bool(self.target.plan.experts)

    @cached_property
    def num_draft_weights(self) -> int:
        """Number of trained weights of the draft."""
        return self.method.count_weights(self.draft)

    def _forward(self, counts: DraftCounts) -> Forward:
        return Forward(counts.num_tokens, counts.num_slots, counts.prefix_pairs)

    def _group(self, collective: str) -> int:
        """Return the number of ranks in the group of a collective."""
        if "ZeRO" in collective:
            return self.num_draft
        return self.ranks.ep_size if "EP" in collective else self.ranks.tp_size


@dataclass(frozen=True)
class Ranks:
    """The ranks of a job.

    size: number of ranks. tp_size, ep_size: how they shard the target.
    micro_batch: packs of `data.max_tokens` tokens per micro-batch.
    """

    size: int
    tp_size: int
    ep_size: int
    micro_batch: int

    @classmethod
    def of(cls, config: Config, ds_config: dict[str, Any], size: int) -> "Ranks":
        """Return `size` ranks with the parallel sizes and the micro-batch of the configuration."""
        return cls(size, config.parallel.tp_size, config.parallel.ep_size, micro_batch_size(ds_config, size))

    def shared_otherwise(self) -> Iterator["Ranks"]:
        """Yield these ranks with every valid combination of `tp_size` and `ep_size`."""
        for tp_size in divisors(self.size):
            for ep_size in divisors(self.size):
                if tp_size % ep_size == 0 or ep_size % tp_size == 0:
                    yield replace(self, tp_size=tp_size, ep_size=ep_size)

    @property
    def mesh(self) -> TargetMesh:
        """Target mesh of the first rank, without process groups."""
        return TargetMesh(Group(self.tp_size, 0), Group(self.ep_size, 0))


class Planner:
    """Planner of one job on GPUs of one model.

    model: the target on the meta device. quantised: which of its weights stay quantised.
    may_share: whether ranks may shard the target.
    assumed: assumptions. Speed is estimated for its documents, and memory for the worst case, in
    which every token is an assistant token.
    """

    def __init__(
        self,
        config: Config,
        ds_config: dict[str, Any],
        model: PreTrainedModel,
        gpus: Gpus,
        assumed: Assumed,
        quantised: StaysQuantised | None = None,
        may_share: bool = True,
    ) -> None:
        self.config = config
        self.ds_config = ds_config
        self.model = model
        self.quantised = quantised
        self.gpus = gpus
        self.assumed = assumed
        self.may_share = may_share
        self.method: DraftMethod = make_method(config)
        self.draft: DraftConfig = self.method.derive_config(model.config, config.target.aux_layers)
        self._costs: dict[tuple[int, int], TargetCost] = {}
        self._counted: Counted = {}

    @property
    def num_draft_weights(self) -> int:
        """Number of trained weights of the draft."""
        return self.method.count_weights(self.draft)

    def plan(self, ranks: Ranks, num_draft: int | None = None) -> "JobPlan":
        """Return the plan for some ranks. num_draft: as in `JobPlan`."""
        sizes = ranks.tp_size, ranks.ep_size
        if sizes not in self._costs:
            mesh = replace(ranks.mesh, fp8_exchange=self.config.parallel.fp8_exchange)
            self._costs[sizes] = TargetCost(self.model, mesh, self.quantised, self.method.needs_head_stats)
        return JobPlan(self.config, self.ds_config, self.draft, self._costs[sizes], ranks, True, self._counted, num_draft)

    def with_max_tokens(self, max_tokens: int) -> "Planner":
        """Return the planner of the same job with packs of `max_tokens` tokens."""
        data = replace(self.config.data, max_tokens=max_tokens)
        planner = self.with_config(replace(self.config, data=data))
        documents = self.assumed.documents
        shorter = replace(documents, num_tokens=min(documents.num_tokens, max_tokens))
        planner.assumed = replace(self.assumed, documents=shorter)
        return planner

    def with_config(self, config: Config) -> "Planner":
        """Return the planner of a job that differs in options other than the target's."""
        planner = Planner(config, self.ds_config, self.model, self.gpus, self.assumed, self.quantised, self.may_share)
        planner._costs = self._costs
        return planner

    def fitting(self, size: int) -> list["JobPlan"]:
        """Return a plan with its largest micro-batch for every way to share the target over `size` ranks."""
        if not self.divides(size):
            return []
        return [self.with_largest_micro_batch(plan) for plan in self.possible(size) if self.fits(plan)]

    def smallest(self, limit: int) -> list["JobPlan"]:
        """Return the plans for the smallest number of GPUs that suffices, the fastest first.

        Returns an empty list if even `limit` GPUs do not suffice. Each plan has the largest
        micro-batch that fits, up to `ENOUGH_TOKENS` tokens: the configuration's times a power of
        two.
        """
        for size in _sizes(limit, self.gpus.per_node):
            fitting = self.fitting(size)
            if fitting:
                return sorted(fitting, key=self.tokens_per_s, reverse=True)
        return []

    def possible(self, size: int) -> list["JobPlan"]:
        """Return a plan, fitting or not, for every way to shard the target over `size` ranks."""
        ways = Ranks.of(self.config, self.ds_config, size).shared_otherwise()
        most = MOST_RANKS_OF_A_COPY if self.may_share else 1
        plans = [self.plan(ranks) for ranks in ways if ranks.mesh.size <= most]
        return [plan for plan in plans if not plan.target.misfits and plan.is_sensible]

    def with_largest_micro_batch(self, plan: "JobPlan") -> "JobPlan":
        """Return the plan with its micro-batch doubled as often as it fits."""
        if GLOBAL in self.ds_config:  # The global batch size then determines the micro-batch.
            return plan
        more = self.plan(replace(plan.ranks, micro_batch=2 * plan.ranks.micro_batch))
        if more.num_tokens > ENOUGH_TOKENS or not self.fits(more):
            return plan
        return self.with_largest_micro_batch(more)

    def why_nothing_fits(self, limit: int) -> str:
        """Return why `smallest` found no plan, and how much memory would be needed."""
        sizes = [size for size in _sizes(limit, self.gpus.per_node) if self.divides(size)]
        if not sizes:
            return (
                f"cannot be trained on at most {limit} GPUs with {GLOBAL}={self.ds_config[GLOBAL]}, "
                "because the number of GPUs must divide it"
            )
        best = min(self.possible(sizes[-1]), key=self.bytes_of)
        need = self.bytes_of(best) / 1e9
        usable = self.usable_bytes / 1e9
        why = "" if self.may_share else "; its family is not verified to give the same results when sharded"
        return (
            f"needs {need:,.0f} GB per rank on {best.ranks.size} {self.gpus.peak.name}, but only {usable:,.0f} GB can be used"
            f"{why}; allow more with --gpus, lower data.max_tokens, or offload the optimizer (ds_configs/zero3_offload.json)"
        )

    def target_line(self) -> str:
        """Return a line with the target's path, number of weights and size."""
        cost = self.plan(Ranks(1, 1, 1, 1)).target
        total = _in_words(cost.num_weights)
        active = _in_words(cost.num_active_weights)
        size = f"{total} weights, {active} active layer weights per token"
        return f"{self.config.target.path}: {size}, {cost.weight_bytes / 1e9:,.2f} GB"

    def facts(self, plan: "JobPlan") -> dict[str, Any]:
        """Return a plan as plain values, for JSON."""
        counts = plan.counts(self.assumed.documents)
        return {
            "target": self.config.target.path,
            "gpus": plan.ranks.size,
            "tp_size": plan.ranks.tp_size,
            "ep_size": plan.ranks.ep_size,
            "micro_batch": plan.ranks.micro_batch,
            "tokens": plan.num_tokens,
            "bytes": self.bytes_by_part(plan),
            "traffic_bytes": plan.traffic(counts),
            "seconds": self.times(plan).by_part,
            "tokens_per_s": self.tokens_per_s(plan),
            "fits": self.fits(plan),
        }

    def divides(self, size: int) -> bool:
        """Return whether `size` ranks can split the configured global batch, if any, evenly."""
        try:
            return accumulation_steps(self.ds_config, size) > 0
        except ConfigError:
            return False

    def fits(self, plan: "JobPlan") -> bool:
        return self.bytes_of(plan) <= self.usable_bytes

    @property
    def usable_bytes(self) -> float:
        """Bytes of one GPU's memory that the job may use."""
        return self.gpus.memory_bytes * (1 - self.assumed.headroom)

    def bytes_of(self, plan: "JobPlan") -> int:
        return sum(self.bytes_by_part(plan).values())

    def bytes_by_part(self, plan: "JobPlan") -> dict[str, int]:
        """Return the bytes per rank by category.

        This is the worst case, in which every token is an assistant token.
        """
        return plan.bytes_by_part(plan.counts(DocumentSizes(self.config.data.max_tokens, 1.0)))

    def tokens_per_s(self, plan: "JobPlan") -> float:
        """Return the estimated tokens per second of all ranks together."""
        return plan.ranks.size * plan.num_tokens / self.times(plan).serial_s

    def times(self, plan: "JobPlan") -> SideTimes:
        """Return the estimated seconds of a micro-batch of a plan."""
        return plan.side_times(plan.counts(self.assumed.documents), self.gpus, self.assumed)


def _in_words(count: float) -> str:
    return f"{count / 1e9:,.2f} billion" if count >= 1e9 else f"{count / 1e6:,.2f} million"


def _sizes(limit: int, per_node: int) -> list[int]:
    """Return the numbers of GPUs to try: divisors of a node's, then whole nodes."""
    return [size for size in divisors(per_node) if size < min(limit + 1, per_node)] + list(range(per_node, limit + 1, per_node))
