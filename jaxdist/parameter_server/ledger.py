"""Which samples of the global order are whose."""

from dataclasses import dataclass

from jaxdist.parameter_server.messages import Ranges


def num_samples(ranges: Ranges) -> int:
    return sum(count for _, count in ranges)


@dataclass
class Ledger:
    """Every position below `next_position` is leased, applied, discarded or free; at every moment exactly one of it.

    The ledger holds the free ones and counts the others; leases are with who holds them (`state.Member`).
    """

    next_position: int = 0
    free: Ranges = ()  # in order, no two adjacent
    leased: int = 0
    applied: int = 0
    discarded: int = 0

    def take(self, count: int) -> Ranges:
        """Lease the first `count` free positions, and so many new ones as they do not suffice."""
        taken = []
        missing = count
        free = list(self.free)
        while free and missing:
            first, length = free.pop(0)
            taken.append((first, min(length, missing)))
            if length > missing:
                free.insert(0, (first + missing, length - missing))
            missing -= taken[-1][1]
        self.free = tuple(free)
        if missing:
            taken.append((self.next_position, missing))
            self.next_position += missing
        self.leased += count
        return _joined(taken)

    def claim(self, ranges: Ranges) -> bool:
        """Lease exactly these, if all of them are free or new; new ones before them become free."""
        ordered = sorted(ranges)
        overlap = any(first + count > after for (first, count), (after, _) in zip(ordered, ordered[1:], strict=False))
        if overlap or any(not self._is_free(first, count) for first, count in ranges):
            return False
        end = max((first + count for first, count in ranges), default=0)
        free = list(self.free)
        if end > self.next_position:
            free = list(_joined([*free, (self.next_position, end - self.next_position)]))
            self.next_position = end
        for first, count in ranges:
            index = next(i for i, (start, length) in enumerate(free) if start <= first < start + length)
            start, length = free.pop(index)
            rest = [(start, first - start), (first + count, start + length - first - count)]
            free[index:index] = [piece for piece in rest if piece[1]]
        self.free = tuple(free)
        self.leased += num_samples(ranges)
        return True

    def release(self, ranges: Ranges) -> None:
        """Leased before; to be done by somebody else."""
        self.free = _joined(sorted([*self.free, *ranges]))
        self.leased -= num_samples(ranges)

    def settle(self, ranges: Ranges, applied: bool) -> None:
        """Leased before; applied or discarded now."""
        self.leased -= num_samples(ranges)
        if applied:
            self.applied += num_samples(ranges)
        else:
            self.discarded += num_samples(ranges)

    def check(self) -> None:
        """Every position has exactly one fate."""
        assert self.applied + self.discarded + self.leased + num_samples(self.free) == self.next_position, self

    def _is_free(self, first: int, count: int) -> bool:
        if first < 0 or count <= 0:
            return False
        if first + count > self.next_position:
            if first >= self.next_position:
                return True
            count = self.next_position - first
        return any(start <= first and first + count <= start + length for start, length in self.free)


def _joined(ranges: list[tuple[int, int]]) -> Ranges:
    """Of ranges in order, adjacent ones as one."""
    joined: list[tuple[int, int]] = []
    for first, count in ranges:
        if joined and joined[-1][0] + joined[-1][1] == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((first, count))
    return tuple(joined)
