"""Benchmark of servers with and without a draft, over sets of prompts and batch sizes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from engine.config.tree_shape import TreeShape
from engine.serving.endpoint import Endpoint, ReplySettings, ServedReply
from engine.serving.http_stream import ServingError
from engine.serving.request_load import LoadResult, RequestLoad
from engine.serving.serving_results import PLAIN, Ratio, ServingCell


@dataclass(frozen=True)
class LoadPlan:
    """The loads that every server gets.

    batches: numbers of concurrent requests. repeats: measurements per batch size and set of prompts.
    num_warmup: requests before the first of them; None = one per concurrent request.
    """

    batches: Sequence[int]
    settings: ReplySettings
    repeats: int
    num_warmup: int | None = None

    def num_loads(self, num_sets: int) -> int:
        """Return the number of measured loads per server."""
        return len(self.batches) * self.repeats * num_sets


class ServingBenchmark:
    """Measures one server after another and compares each with the server without a draft.

    prompt_sets: token ids of prompts, by the name of the set. cells: what was measured so far.
    after_load: called after each measured load with a line of text.
    """

    def __init__(
        self,
        prompt_sets: Mapping[str, Sequence[Sequence[int]]],
        plan: LoadPlan,
    ) -> None:
        self.prompt_sets = prompt_sets
        self.plan = plan
        self.cells: list[ServingCell] = []
        self.after_load: Callable[[str], None] | None = None
        self._plain: dict[tuple[str, int], ServingCell] = {}

    def measure(self, endpoint: Endpoint, setting: str, shape: TreeShape | None = None) -> None:
        """Measure one server. Measure the one without a draft (setting `PLAIN`) first, if at all.

        Raises ServingError if a request fails, if the server has no draft although it should, or
        has one although it should not.
        """
        endpoint.prepare()
        for name, prompts in self.prompt_sets.items():
            for batch in self.plan.batches:
                cell = self._measure_load(endpoint, setting, shape, name, with_repeats(prompts, batch), batch)
                if setting == PLAIN:
                    self._plain[name, batch] = cell
                self.cells.append(cell)

    def _measure_load(
        self, endpoint: Endpoint, setting: str, shape: TreeShape | None, name: str, prompts: Sequence[Sequence[int]], batch: int
    ) -> ServingCell:
        settings = self.plan.settings
        num_warmup = batch if self.plan.num_warmup is None else self.plan.num_warmup
        if num_warmup:
            warmup = [prompts[index % len(prompts)] for index in range(num_warmup)]
            RequestLoad(endpoint, warmup, batch, settings).run()
        before = endpoint.counters()
        repeats = []
        for _ in range(self.plan.repeats):
            repeat = RequestLoad(endpoint, prompts, batch, settings).run()
            repeats.append(repeat)
            if self.after_load is not None:
                self.after_load(f"{setting}, {name}, batch {batch}: {repeat.num_tokens / repeat.seconds:,.1f} tokens/s")
        after = endpoint.counters()
        replies = [reply for repeat in repeats for reply in repeat.replies]
        acceptance = endpoint.acceptance(before, after, replies)
        if setting == PLAIN and acceptance is not None:
            raise ServingError(f"{endpoint.url}: the server without a draft drafts tokens; start it without one")
        if setting != PLAIN and acceptance is None:
            raise ServingError(f"{endpoint.url}: {endpoint.missing_acceptance}")
        cell = ServingCell(setting, shape, name, batch, repeats, acceptance)
        return self._compared(cell)

    def _compared(self, cell: ServingCell) -> ServingCell:
        """Return the cell with its comparison with the server without a draft."""
        if cell.setting == PLAIN:
            reference = cell.repeats[0].replies
            compared = cell.repeats[1:]
            speed_up = None
        else:
            plain = self._plain.get((cell.prompts, cell.batch))
            if plain is None:
                return cell
            reference = plain.repeats[0].replies
            compared = cell.repeats
            speed_up = Ratio.of(cell.tokens_per_s, plain.tokens_per_s)
        if not self.plan.settings.is_greedy:  # sampled replies differ anyway
            return replace(cell, speed_up=speed_up)
        mismatches = count_mismatches(compared, reference)
        num_compared = len(compared) * len(reference)
        if num_compared == 0:
            return cell
        return replace(cell, mismatches=mismatches, num_compared=num_compared, speed_up=speed_up)


def with_repeats(prompts: Sequence[Sequence[int]], batch: int) -> list[Sequence[int]]:
    """Return each prompt equally often, and at least `batch` prompts."""
    times = -(-batch // len(prompts))
    return [prompt for _ in range(times) for prompt in prompts]


def count_mismatches(repeats: Sequence[LoadResult], reference: Sequence[ServedReply]) -> int:
    """Return how many replies differ in their tokens from the reference's reply to the same request."""
    count = 0
    for repeat in repeats:
        for reply, expected in zip(repeat.replies, reference, strict=True):
            count += reply.token_ids != expected.token_ids
    return count
