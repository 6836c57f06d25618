"""A shard as a server holds it, and how far its backup has it."""

from dataclasses import dataclass

from jaxdist.parameter_server.contracts import Contribution, Store
from jaxdist.parameter_server.entries import Apply, Keep, Leaves
from jaxdist.parameter_server.log import Follower, Log
from jaxdist.parameter_server.messages import Entry, Push, Transfer
from jaxdist.parameter_server.state import State
from jaxdist.transport.plain import plain

Key = tuple[str, int, int]  # of a push: worker, incarnation, seq


@dataclass
class Held:
    """A part of a push that is not decided yet."""

    push: Push
    safe: bool  # the backup has it, or there was none when it came: others may be told of it


class Replica:
    """A shard in an epoch: the log, what it adds up to, the numbers, and the pushes that are not decided.

    Two replicas that were given the same log hold the same bits.
    """

    def __init__(self, shard: int, store: Store, state: State):
        self.shard, self.store, self.state = shard, store, state
        self.log = Log(state.position)
        self.held: dict[Key, Held] = {}

    def can_apply(self) -> bool:
        """Whether there is a next entry, and the parts of its pushes are here: a new backup gets them late."""
        if self.state.position == self.log.end:
            return False
        (entry,) = self.log.between(self.state.position, self.state.position + 1)
        pushes = entry.contributions if isinstance(entry, Apply) else ()
        return all((push.worker, push.incarnation, push.seq) in self.held for push in pushes)

    def apply_all(self) -> None:
        while self.can_apply():
            self.apply_next()

    def apply_next(self) -> Entry:
        """Does what the next entry says."""
        (entry,) = self.log.between(self.state.position, self.state.position + 1)
        self.state.fold(entry)
        match entry:
            case Apply():
                contributions = []
                for one in entry.contributions:
                    push = self.held.pop((one.worker, one.incarnation, one.seq)).push
                    contributions.append(
                        Contribution(
                            one.worker,
                            one.incarnation,
                            one.seq,
                            push.weight,
                            one.staleness,
                            push.base_version,
                            push.norm,
                            push.arrays,
                        )
                    )
                self.store.apply(contributions, self.state.version, entry.oldest_base)
            case Keep():
                self.store.keep(self.state.version)
            case Leaves():
                self.store.forget(entry.worker)
        if not isinstance(entry, Apply):
            self.held = {key: held for key, held in self.held.items() if not self.state.knows(*key)}
        return entry


class Backup:
    """The backup of a shard, as its primary knows it.

    It is given all of the shard as it is now, and from then on every entry and every part. Once it has the first,
    nothing is stable, and no part safe, that it does not have. Once it has the parts that were spoken of before that,
    too, it may take over.
    """

    def __init__(self, name: str, incarnation: int, epoch: int, replica: Replica):
        self.name, self.incarnation = name, incarnation
        self.joined = False
        self.follower = Follower(replica.state.position)
        self.owed = {key: held.push for key, held in replica.held.items()}  # parts that it has not acknowledged
        self.ticks = 0  # since it last acknowledged a part, or the transfer
        arrays = tuple(replica.store.arrays_of(replica.store.capture()))
        self.transfer: Transfer | None = Transfer(epoch, replica.shard, incarnation, plain(replica.state), arrays)
