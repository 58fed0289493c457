"""Measurements of a server under load, compared with the same load on a server without the draft."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from engine.config.tree_shape import TreeShape
from engine.serving.endpoint import ServedAcceptance
from engine.serving.request_load import LoadResult

PERCENTILES = (50, 90, 99)
PLAIN = "no draft"  # setting of a server without a draft


@dataclass(frozen=True)
class Ratio:
    """A ratio of two measured values that were each repeated.

    middle: ratio of the medians. low, high: smallest and largest ratio of any repeat of one to any of the other.
    """

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], reference: Sequence[float]) -> "Ratio":
        """Return the ratio of values to those of a reference; neither is empty and all are positive."""
        return cls(median(values) / median(reference), min(values) / max(reference), max(values) / min(reference))


@dataclass(frozen=True)
class ServingCell:
    """Measurements of one setting: a server, a set of prompts and a batch size.

    setting: the shape of the draft in words, or `PLAIN`. shape: None also for a running server's draft.
    prompts: name of the set of prompts. batch: number of concurrent requests.
    repeats: the load, once per repeat, with the same requests.
    acceptance: over all repeats; None without a draft.
    mismatches: replies of all repeats whose tokens differ from the reference's; None without one. The
    reference is the first repeat without the draft, also for the later repeats without it.
    num_compared: replies that were compared.
    speed_up: ratio of output tokens per second to that without the draft; None if that was not measured.
    """

    setting: str
    shape: TreeShape | None
    prompts: str
    batch: int
    repeats: Sequence[LoadResult]
    acceptance: ServedAcceptance | None = None
    mismatches: int | None = None
    num_compared: int = 0
    speed_up: Ratio | None = None

    @property
    def tokens_per_s(self) -> list[float]:
        """Output tokens per second, once per repeat."""
        return [repeat.num_tokens / repeat.seconds for repeat in self.repeats]

    @property
    def requests_per_s(self) -> list[float]:
        """Completed requests per second, once per repeat."""
        return [len(repeat.replies) / repeat.seconds for repeat in self.repeats]

    @property
    def first_token_s(self) -> dict[int, float]:
        """Percentiles of the time in seconds until the first tokens of a reply, over all repeats."""
        return percentiles([reply.first_token_s for repeat in self.repeats for reply in repeat.replies])

    @property
    def latency_s(self) -> dict[int, float]:
        """Percentiles of the time in seconds until a reply is complete, over all repeats."""
        return percentiles([reply.total_s for repeat in self.repeats for reply in repeat.replies])

    def to_dict(self) -> dict[str, Any]:
        """Return the cell as plain values, for JSON."""
        found = self.acceptance
        acceptance = None
        if found is not None:
            acceptance = {
                "length": found.length,
                "num_verifies": found.num_verifies,
                "accepted_per_position": list(found.accepted_per_position),
                "server_average": found.own_average,
            }
        speed_up = self.speed_up
        return {
            "setting": self.setting,
            "shape": None if self.shape is None else self.shape.sizes,
            "prompts": self.prompts,
            "batch": self.batch,
            "num_requests": len(self.repeats[0].replies),
            "num_tokens": [repeat.num_tokens for repeat in self.repeats],
            "seconds": [repeat.seconds for repeat in self.repeats],
            "tokens_per_s": self.tokens_per_s,
            "requests_per_s": self.requests_per_s,
            "first_token_s": {f"p{share}": value for share, value in self.first_token_s.items()},
            "latency_s": {f"p{share}": value for share, value in self.latency_s.items()},
            "acceptance": acceptance,
            "mismatches": self.mismatches,
            "num_compared": self.num_compared,
            "speed_up": None if speed_up is None else {"ratio": speed_up.middle, "low": speed_up.low, "high": speed_up.high},
        }


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """Return the 50th, 90th and 99th percentile of values, with linear interpolation between neighbours."""
    ordered = sorted(values)
    found = {}
    for share in PERCENTILES:
        place = (len(ordered) - 1) * share / 100
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        found[share] = ordered[below] + (place - below) * (ordered[above] - ordered[below])
    return found


def speed_table(cells: Sequence[ServingCell], title: str) -> Table:
    """Return a table of rates, acceptance and speed-ups with one row per cell."""
    caption = (
        f"medians of {len(cells[0].repeats)} repeats; after the speed-up the smallest and largest of any two repeats; other "
        f"tokens: replies that differ from those without the draft"
    )
    headings = ("tokens\nper s", "requests\nper s", "acceptance\nlength", "other\ntokens", "speed-up")
    table = _table(cells, title, caption, headings)
    for cell in cells:
        length = None if cell.acceptance is None else cell.acceptance.length
        ratio = cell.speed_up
        table.add_row(
            *_names(cell, cells),
            f"{median(cell.tokens_per_s):,.1f}",
            f"{median(cell.requests_per_s):.2f}",
            "-" if length is None else f"{length:.2f}",
            "-" if cell.mismatches is None else f"{cell.mismatches}/{cell.num_compared}",
            "-" if ratio is None else f"{ratio.middle:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})",
        )
    return table


def latency_table(cells: Sequence[ServingCell]) -> Table:
    """Return a table of the percentiles of times in milliseconds, over the requests of all repeats."""
    first = [f"first\ntoken\np{share}" for share in PERCENTILES]
    whole = [f"whole\nreply\np{share}" for share in PERCENTILES]
    table = _table(cells, "Latency in milliseconds", "", (*first, *whole))
    for cell in cells:
        times = [*cell.first_token_s.values(), *cell.latency_s.values()]
        table.add_row(*_names(cell, cells), *(f"{1000 * value:,.1f}" for value in times))
    return table


def _table(cells: Sequence[ServingCell], title: str, caption: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    if _has_several_sets(cells):
        table.add_column("prompts")
    table.add_column("setting")
    for heading in ("batch", *headings):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _names(cell: ServingCell, cells: Sequence[ServingCell]) -> list[str]:
    """Return the first texts of a cell's row."""
    prompts = [escape(cell.prompts)] if _has_several_sets(cells) else []
    return [*prompts, cell.setting, str(cell.batch)]


def _has_several_sets(cells: Sequence[ServingCell]) -> bool:
    return len({cell.prompts for cell in cells}) > 1
