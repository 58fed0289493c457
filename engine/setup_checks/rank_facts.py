"""Facts about one rank, which rank 0 judges together with those of the others."""

import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from engine.host.units import counted, plural
from engine.setup_checks.machine_facts import GpuFacts, MachineFacts
from engine.setup_checks.software_facts import SoftwareFacts

Value = TypeVar("Value", bound=Hashable)
MOST_NAMED = 8  # nodes in a message


class Located(Protocol):
    """A rank and its node."""

    @property
    def rank(self) -> int: ...

    @property
    def host(self) -> str: ...

    @property
    def node(self) -> int: ...


@dataclass(frozen=True)
class UnreadableRank:
    """A rank that has sent facts which this copy of DraftSpeed cannot read, because it runs another copy.

    node: its number, from 0. draftspeed: version of its copy. source: digest of the Python files of its copy.
    """

    rank: int
    host: str
    node: int
    draftspeed: str
    source: str


@dataclass(frozen=True)
class RankFacts:
    """Facts about one rank. local_rank: its number on its node, from 0. local_size: ranks of the node."""

    rank: int
    local_rank: int
    local_size: int
    host: str
    software: SoftwareFacts
    machine: MachineFacts

    def dumps(self) -> str:
        """Return the facts as JSON, next to those by which a copy of DraftSpeed with other facts names this rank."""
        copy = {"draftspeed": self.software.draftspeed, "source": self.software.source}
        return json.dumps({"host": self.host, "node": self.node, **copy, "facts": asdict(self)})

    @classmethod
    def _of(cls, values: dict[str, Any]) -> "RankFacts":
        """Return the facts of `asdict`. Raises KeyError or TypeError if they are those of another copy of DraftSpeed."""
        machine = values["machine"]
        gpu = machine["gpu"] and GpuFacts(**machine["gpu"])
        machine_facts = MachineFacts(**machine | {"gpu": gpu, "cores": tuple(machine["cores"])})
        software = SoftwareFacts(**values["software"])
        return cls(**values | {"machine": machine_facts, "software": software})

    @property
    def node(self) -> int:
        """Number of the rank's node, from 0."""
        return self.rank // self.local_size


def load_facts(text: str, rank: int) -> RankFacts | UnreadableRank:
    """Return the facts that `RankFacts.dumps` has written on a rank, perhaps with another copy of DraftSpeed."""
    values = json.loads(text)
    try:
        return RankFacts._of(values["facts"])
    except (KeyError, TypeError):
        host = str(values.get("host", "unknown node"))
        copy = [str(values.get(name, "unknown")) for name in ("draftspeed", "source")]
        return UnreadableRank(rank, host, int(values.get("node", rank)), *copy)


def names_of(ranks: Iterable[Located]) -> str:
    """Return the nodes of some ranks with the numbers of these ranks, such as `node1 (ranks 0-7), node2 (rank 8)`."""
    by_node: dict[tuple[int, str], list[int]] = {}
    for rank in ranks:
        by_node.setdefault((rank.node, rank.host), []).append(rank.rank)
    named = [f"{host} ({numbers(of_node)})" for (_, host), of_node in sorted(by_node.items())]
    hidden = len(named) - MOST_NAMED
    return ", ".join(named[:MOST_NAMED]) + (f" and {counted(hidden, 'more node')}" if hidden > 0 else "")


def numbers(ranks: Sequence[int]) -> str:
    """Return ascending ranks as text, such as `ranks 0-3, 6`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"{plural('rank', len(ranks))} {text}"


def by_value(ranks: Sequence[RankFacts], values: Sequence[Value]) -> list[tuple[Value, list[RankFacts]]]:
    """Return the ranks that have each value; the most frequent value is first."""
    groups: dict[Value, list[RankFacts]] = {}
    for rank, value in zip(ranks, values, strict=True):
        groups.setdefault(value, []).append(rank)
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[1][0].rank))
