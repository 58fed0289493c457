"""Exchange of facts between ranks before they form a process group, so that a rank that does not come is named.

Rank 0 hosts a store, or a launcher does. Each rank writes its facts there; rank 0 reads them and
writes whether all shall go on.
"""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from engine.host.units import counted
from engine.setup_checks.finding import Finding, ok, problem
from engine.setup_checks.rank_facts import Located, RankFacts, UnreadableRank, load_facts, names_of, numbers

PREFIX = "setup_checks"
GO_ON = "go_on"
FACTS = "facts/{}"
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_FOR_ANSWER = 30.0  # in which rank 0 judges what it has read
OPEN_FIX = "Check that rank 0 was started, that the nodes reach this port, and that no other job uses it"
FIX = "Look for messages of these ranks; check that their nodes reach {place}, and that the job starts as many ranks as it says"


def open_store(host: str, port: int, size: int, is_server: bool, timeout_s: float) -> Store:
    """Return the store in which the ranks find each other.

    size: number of ranks. is_server: whether this process hosts the store.
    Raises ValueError if it cannot be hosted or reached.
    """
    if size == 1:
        return HashStore()
    timeout = timedelta(seconds=timeout_s)
    try:
        # Several stores of one process share one server, so the process group can use the port too.
        store = TCPStore(host, port, None, is_server, timeout, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if is_server:
            raise ValueError(f"port {port} of {host} cannot be used: {reason}") from error
        raise ValueError(f"rank 0 was not reached at {host}, port {port}, within {timeout_s:.0f} s: {reason}") from error
    return PrefixStore(PREFIX, store)


def collect_facts(
    store: Store, own: RankFacts, size: int, timeout_s: float, busy: Callable[[str], None]
) -> tuple[list[RankFacts], list[UnreadableRank]]:
    """Return on rank 0 the ranks that came within `timeout_s`, by rank: their facts, and those whose facts cannot be read.

    busy: shows a text.
    """
    arrived: dict[int, RankFacts | UnreadableRank] = {own.rank: own}
    deadline_s = time.monotonic() + timeout_s
    while len(arrived) < size and time.monotonic() < deadline_s:
        waited_for = [rank for rank in range(size) if rank not in arrived]
        for rank in waited_for:
            if store.check([FACTS.format(rank)]):
                arrived[rank] = load_facts(store.get(FACTS.format(rank)).decode(), rank)
        if len(arrived) < size:
            busy(f"{len(arrived)} of {size} ranks have come; waiting for {numbers(waited_for[:8])}")
            time.sleep(SECONDS_BETWEEN_LOOKS)
    by_rank = [facts for _, facts in sorted(arrived.items())]
    readable = [facts for facts in by_rank if isinstance(facts, RankFacts)]
    return readable, [facts for facts in by_rank if isinstance(facts, UnreadableRank)]


def send_facts(store: Store, own: RankFacts) -> None:
    """Send the facts of a rank other than 0."""
    store.set(FACTS.format(own.rank), own.dumps())


def let_go_on(store: Store, shall_go_on: bool) -> None:
    """Tell the other ranks whether they shall form a process group; called by rank 0."""
    store.set(GO_ON, "yes" if shall_go_on else "no")


def shall_go_on(store: Store, timeout_s: float) -> bool:
    """Return whether rank 0 lets the ranks form a process group; waits for its answer. Raises ValueError if there is none."""
    deadline_s = time.monotonic() + timeout_s + SECONDS_FOR_ANSWER
    try:
        while not store.check([GO_ON]):
            if time.monotonic() > deadline_s:
                raise ValueError("rank 0 came and does not answer")
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return store.get(GO_ON) == b"yes"
    except RuntimeError as error:
        raise ValueError("rank 0 came and has ended") from error


def judge_arrival(arrived: Sequence[Located], size: int, timeout_s: float, place: str) -> Finding:
    """Return the finding on which ranks have come. place: where rank 0 waits for them, for the message."""
    by_rank = sorted(arrived, key=lambda facts: facts.rank)
    missing = sorted(set(range(size)) - {facts.rank for facts in arrived})
    if not missing:
        num_nodes = by_rank[-1].node + 1
        counts = f"{counted(size, 'rank')} on {counted(num_nodes, 'node')}"
        return ok("ranks", f"{counts}: {names_of(by_rank)}")
    text = f"{numbers(missing)} of {size} did not come within {timeout_s:.0f} s; {names_of(by_rank)} came"
    return problem("ranks", text, FIX.format(place=place))
