"""What a round has gathered so far: updates as they are, or under masks that come off their sum alone."""

from collections.abc import Collection, Mapping

from jaxdist.federated.secure_aggregation.messages import Message
from jaxdist.federated.secure_aggregation.rules import Rules as SumRules
from jaxdist.federated.secure_aggregation.server import SecureSum
from jaxdist.federated.secure_aggregation.server import Server as SumServer
from jaxdist.federated.silos.messages import Update
from jaxdist.transport.plain import from_plain


class Updates:
    """One of each silo of a cohort; a round needs `least`."""

    def __init__(self, cohort: Collection[int], least: int):
        self.came: dict[int, Update] = {}
        self._cohort, self._least = frozenset(cohort), least

    @property
    def waiting_for(self) -> frozenset[int]:
        return self._cohort - self.came.keys()

    @property
    def enough(self) -> bool:
        return len(self.came) >= self._least

    def receive(self, client: int, update: Update) -> bool:
        """Whether it counts: the first of each silo."""
        if client not in self.waiting_for:
            return False
        self.came[client] = update
        return True


class Masked:
    """The same under secure aggregation: several phases, in each of which all who are left are waited for. Of a
    single update nothing is kept, and nothing is seen but words that look random."""

    def __init__(self, rules: SumRules, round_id: bytes, cohort: Collection[int]):
        self.asked: dict[int, Message] = {}  # what each was told in this phase
        self.declined: set[int] = set()  # say nothing more
        self._server = SumServer(rules, round_id, cohort)

    @property
    def phase(self) -> str:
        return self._server.phase

    @property
    def can_begin_anew(self) -> bool:
        """Nobody can have masked an update yet, which may be done once only."""
        return self.phase in ("keys", "shares") and not self.declined

    @property
    def waiting_for(self) -> frozenset[int]:
        return self._server.waiting_for - self.declined

    @property
    def enough(self) -> bool:
        return self._server.enough

    @property
    def total(self) -> SecureSum | None:
        return self._server.result

    def receive(self, client: int, said: Mapping[str, object], arrays: tuple) -> bool:
        """Whether it counts. Raises ValueError for what no honest client says."""
        message = from_plain(dict(said), arrays, of=Message)
        assert isinstance(message, Message)
        return self._server.receive(client, message)

    def advance(self) -> None:
        """To the next phase. Raises ProtocolError where there will be no sum."""
        self.asked = self._server.advance()


def round_id(identity: str, epoch: int, round_: int, attempt: int) -> bytes:
    """By which secure aggregation knows an attempt at a round."""
    return f"{identity} {epoch} {round_} {attempt}".encode()
