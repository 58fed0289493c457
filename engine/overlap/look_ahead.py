"""The rule that decides when work may be prepared ahead of its consumer."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """Limits on work that is prepared before its consumer asks for it.

    batches: number of batches; 0 = prepare a batch only when the consumer asks for it.
    num_bytes: total size of these batches; None = no limit.
    """

    batches: int
    num_bytes: int | None = None


@dataclass
class LookAhead:
    """State of the batches between their producers and one consumer, which takes them in order.

    Batches are numbered from 0. Several producers may prepare different batches, so they may begin
    and finish out of order. All placements and the event model of the planner share this rule. It
    knows neither time nor threads; its callers must serialise the calls.

    limits: may be changed between calls.
    num_asked, num_taken: batches that the consumer has asked for and taken.
    """

    limits: Limits
    num_asked: int = 0
    num_taken: int = 0
    _sizes: dict[int, int] = field(default_factory=dict)
    _finished: set[int] = field(default_factory=set)

    @property
    def bytes_ahead(self) -> int:
        """Bytes of the batches that are begun but not asked for."""
        return sum(size for batch, size in self._sizes.items() if batch >= self.num_asked)

    def may_begin(self, batch: int, num_bytes: int) -> bool:
        """Return whether a producer may begin a batch, which takes `num_bytes`.

        A batch that the consumer has asked for is not ahead of it, so it may always begin.
        Otherwise a batch larger than the limit could never be prepared.
        """
        if batch < self.num_asked:
            return True
        if batch >= self.num_asked + self.limits.batches:
            return False
        limit = self.limits.num_bytes
        return limit is None or self.bytes_ahead + num_bytes <= limit

    def begin(self, batch: int, num_bytes: int) -> None:
        """Record that a producer begins a batch."""
        assert self.may_begin(batch, num_bytes), "the look-ahead is full"
        assert batch >= self.num_taken and batch not in self._sizes, f"batch {batch} was begun before"
        self._sizes[batch] = num_bytes

    def finish(self, batch: int) -> None:
        """Record that a batch is prepared."""
        assert batch in self._sizes, f"batch {batch} was not begun"
        self._finished.add(batch)

    def ask(self) -> None:
        """Record that the consumer wants its next batch."""
        assert self.num_asked == self.num_taken, "the consumer has asked for this batch already"
        self.num_asked += 1

    @property
    def is_ready(self) -> bool:
        """Whether the consumer's next batch is prepared."""
        return self.num_taken in self._finished

    def take(self) -> None:
        """Record that the consumer takes the batch that it has asked for."""
        assert self.is_ready and self.num_asked > self.num_taken, "the batch is not prepared or was not asked for"
        self._finished.remove(self.num_taken)
        del self._sizes[self.num_taken]
        self.num_taken += 1
