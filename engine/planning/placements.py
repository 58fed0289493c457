"""Comparison of the placements of the target for a job of a given size: which is fastest, and at which ratio."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from engine.config.sections import COLOCATED, SERIAL, SPLIT, OverlapSection
from engine.overlap.bridge import Sides
from engine.overlap.event_model import BatchCost, EventModel
from engine.overlap.look_ahead import Limits
from engine.planning.job import ENOUGH_TOKENS, GLOBAL, DocumentSizes, JobPlan, Planner, Ranks, SideTimes

MODEL_STEPS = 24  # steps of the event model
WARM_UP_STEPS = 8
TRIED_SPLITS = 7  # numbers of target ranks around the ratio of the two sides' times


@dataclass(frozen=True)
class PlacedJob:
    """A job with a placement of its target; all figures are computed.

    num_target: ranks of their own that run the target; 0 = the ranks of the draft run it.
    tp_size, ep_size: how ranks share the target. tokens: per micro-batch.
    step_s: time of a micro-batch. tokens_per_s: of all ranks.
    """

    placement: str
    num_ranks: int
    num_target: int
    tp_size: int
    ep_size: int
    tokens: int
    step_s: float
    tokens_per_s: float

    @property
    def cells(self) -> tuple[str, ...]:
        """Texts for a row of a table: GPUs, placement, ratio, parallel sizes, tokens, speed per GPU and hours."""
        ratio = f"{self.num_target}:{self.num_ranks - self.num_target}" if self.num_target else "-"
        sizes = (str(self.tp_size), str(self.ep_size), f"{self.tokens:,}")
        speed = (f"{self.tokens_per_s_per_gpu:,.0f}", f"{self.hours_per_billion_tokens:,.1f}")
        return (str(self.num_ranks), self.placement, ratio, *sizes, *speed)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens_per_s / self.num_ranks

    @property
    def hours_per_billion_tokens(self) -> float:
        return 1e9 / self.tokens_per_s / 3600


def split_step_s(sides: Sides, times: SideTimes) -> float:
    """Return the time of a step with one micro-batch per draft rank, according to the event model."""
    cost = BatchCost(times.target_s, times.draft_s, times.transfer_s)
    limits = Limits(sides.default_look_ahead)
    return EventModel(sides, limits, MODEL_STEPS, 1, lambda rank, index: cost).run().step_s(WARM_UP_STEPS)


class PlacementPlanner:
    """Compares placements on GPUs of one model."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._serial = planner.with_config(replace(planner.config, overlap=OverlapSection(placement="serial")))
        self._colocated = planner.with_config(replace(planner.config, overlap=OverlapSection(placement="colocated")))

    def compare(self, num_ranks: int) -> list[PlacedJob]:
        """Return the fastest job of each placement that fits `num_ranks` GPUs, the fastest placement first."""
        candidates: dict[str, list[PlacedJob]] = {SERIAL: [], COLOCATED: [], SPLIT: []}
        for placement, planner in ((SERIAL, self._serial), (COLOCATED, self._colocated)):
            for plan in planner.fitting(num_ranks):
                times = self._planner.times(plan)
                step_s = times.serial_s if placement == SERIAL else times.colocated_s
                candidates[placement].append(_job(placement, plan, num_ranks, 0, step_s, plan.num_tokens * num_ranks))
        candidates[SPLIT] = list(self._splits(num_ranks))
        best = [max(jobs, key=lambda job: job.tokens_per_s) for jobs in candidates.values() if jobs]
        return sorted(best, key=lambda job: job.tokens_per_s, reverse=True)

    def _splits(self, num_ranks: int) -> Iterator[PlacedJob]:
        """Yield the best job in which some of the ranks run the target, if there is one.

        The number of target ranks is chosen by the longer side's time, and its step is then modelled.
        """
        if GLOBAL in self._planner.ds_config:
            return
        best: tuple[float, JobPlan, Sides] | None = None
        for shared in self._planner.possible(num_ranks):
            if shared.ranks.mesh.size == num_ranks:
                continue  # no rank would be left for the draft
            for plan, sides in self._largest_splits(shared.ranks):
                times = self._planner.times(plan)
                longer_s = max(times.draft_s, times.target_s * sides.num_draft / sides.num_target)
                tokens_per_s = plan.num_tokens * sides.num_draft / longer_s
                if best is None or tokens_per_s > best[0]:
                    best = tokens_per_s, plan, sides
        if best is not None:
            _, plan, sides = best
            step_s = split_step_s(sides, self._planner.times(plan))
            yield _job(SPLIT, plan, num_ranks, sides.num_target, step_s, plan.num_tokens * sides.num_draft)

    def _largest_splits(self, copy: Ranks) -> list[tuple[JobPlan, Sides]]:
        """Return jobs with different numbers of target ranks and the largest micro-batch with which one of them fits."""
        size = copy.mesh.size
        max_tokens = self._planner.config.data.max_tokens
        micro_batch = 1
        while 2 * micro_batch * max_tokens <= ENOUGH_TOKENS:
            micro_batch *= 2
        while micro_batch:
            ranks = replace(copy, micro_batch=micro_batch)
            times = self._planner.times(self._planner.plan(ranks))
            ideal = round(copy.size * times.target_s / times.serial_s / size)
            around = range(ideal - TRIED_SPLITS // 2, ideal + TRIED_SPLITS // 2 + 1)
            tried = {size * min(max(count, 1), (copy.size - 1) // size) for count in around}
            jobs = [self._split(ranks, num_target) for num_target in sorted(tried)]
            fitting = [(plan, sides) for plan, sides in jobs if self._fits_split(plan, sides)]
            if fitting:
                return fitting
            micro_batch //= 2
        return []

    def _split(self, ranks: Ranks, num_target: int) -> tuple[JobPlan, Sides]:
        num_draft = ranks.size - num_target
        return self._planner.plan(ranks, num_draft), Sides(num_draft, num_target, ranks.mesh.size)

    def _fits_split(self, plan: JobPlan, sides: Sides) -> bool:
        counts = plan.counts(DocumentSizes(self._planner.config.data.max_tokens, 1.0))
        usable = self._planner.usable_bytes
        needed = (plan.draft_side_bytes(counts, sides.default_look_ahead), plan.target_side_bytes(counts))
        return all(sum(by_part.values()) <= usable for by_part in needed)


def _job(placement: str, plan: JobPlan, num_ranks: int, num_target: int, step_s: float, tokens: int) -> PlacedJob:
    return PlacedJob(
        placement=placement,
        num_ranks=num_ranks,
        num_target=num_target,
        tp_size=plan.ranks.tp_size,
        ep_size=plan.ranks.ep_size,
        tokens=plan.num_tokens,
        step_s=step_s,
        tokens_per_s=tokens / step_s,
    )
