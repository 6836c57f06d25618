"""The log as a server holds it, and how far others have it."""

from collections.abc import Sequence
from itertools import islice

from jaxdist.parameter_server.messages import Entry


class Log:
    """Entries `start + 1` to `end`; earlier ones are in the state that it began with, or nobody needs them."""

    def __init__(self, start: int):
        self.start = start
        self._entries: list[Entry] = []

    @property
    def end(self) -> int:
        return self.start + len(self._entries)

    def append(self, entry: Entry) -> None:
        self._entries.append(entry)

    def extend(self, first: int, entries: Sequence[Entry]) -> None:
        """Entries from position `first` on; those that are here already, or after a gap, are left."""
        if first <= self.end + 1:
            self._entries += entries[self.end + 1 - first :]

    def between(self, after: int, upto: int) -> tuple[Entry, ...]:
        """Entries after + 1 to upto."""
        assert self.start <= after <= upto <= self.end or after == upto, (self.start, after, upto, self.end)
        return tuple(islice(self._entries, after - self.start, upto - self.start))

    def trim(self, position: int) -> None:
        """Nobody needs entries up to this one."""
        if position > self.start:
            del self._entries[: position - self.start]
            self.start = position


class Follower:
    """How far another server has the log, by what it acknowledged."""

    def __init__(self, acknowledged: int):
        self.acknowledged = acknowledged
        self._sent = acknowledged

    def unsent(self, log: Log, upto: int) -> tuple[int, tuple[Entry, ...]] | None:
        """(position of the first, entries) to be sent now; None if there is nothing new."""
        after = max(self._sent, self.acknowledged)
        if after >= upto:
            return None
        self._sent = upto
        return after + 1, log.between(after, upto)

    def have(self, position: int) -> None:
        self.acknowledged = max(self.acknowledged, position)

    def again(self) -> None:
        """What was sent and not acknowledged may be lost."""
        self._sent = self.acknowledged
