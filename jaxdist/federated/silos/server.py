"""The server's part of the protocol: who is there, who is sent what, and when a round is closed. No I/O, no jax."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from jaxdist.federated.secure_aggregation.rules import ProtocolError
from jaxdist.federated.silos.gathering import Masked, Updates, round_id
from jaxdist.federated.silos.messages import NEVER, Bye, Decline, Heard, Here, Over, Refused, Secure, Train, Update
from jaxdist.federated.silos.rules import Close, Opened, Rules
from jaxdist.runtime.exit_codes import DONE
from jaxdist.transport.machine import TICK, Leases, StateMachine, index_of, is_due, is_named
from jaxdist.transport.plain import Message, to_plain

Phase = Literal["idle", "meeting", "open", "closed", "over"]


@dataclass
class Known:
    """A silo, as its newest process."""

    nonce: str
    past: frozenset[str] = frozenset()  # processes that had its name before
    has: tuple[int, int, int] = (NEVER, NEVER, NEVER)  # epoch, round, attempt of the newest Train that it has
    told: tuple[int, int, int] = (NEVER, NEVER, NEVER)  # that it was sent last
    times: int = 0  # that it was heard of since, without having it
    left: bool = False
    counted: tuple[int, int] = (NEVER, NEVER)  # epoch and round of the last update that was


@dataclass
class _Round:
    opened: Opened
    attempt: int
    gathering: Updates | Masked
    due: float  # when whoever is late is left out
    ticks: int = 0  # since this phase began

    @property
    def number(self) -> tuple[int, int]:
        return self.opened.round, self.attempt

    @property
    def begins(self) -> bool:
        """Whether a silo that comes now can still take part."""
        return isinstance(self.gathering, Updates) or self.gathering.phase == "keys"


class Server(StateMachine):
    """Call `begin` for each round; after `Close` the next, or `finish`. `epoch`: larger than of any server before."""

    def __init__(self, rules: Rules, epoch: int):
        super().__init__("server")
        self.rules, self.epoch = rules, epoch
        self.counts: Counter[str] = Counter()  # of updates that came in vain: late, duplicate, fenced
        self.silos: dict[int, Known] = {}
        self._leases = Leases(rules.lease)
        self._phase: Phase = "idle"
        self._met: float | None = None  # when the first silo was there
        self._has_met = False  # all were there at once, or have been waited for
        self._opened: Opened | None = None  # what waits for that
        self._round: _Round | None = None
        self._over: tuple[int, str, float] | None = None  # exit code, reason, until when silos are waited for

    @property
    def num_present(self) -> int:
        return sum(map(self._is_present, self.silos))

    def start(self, now: float) -> list:
        return self.step(now, self._tick)

    def wake(self, timer: str, now: float) -> list:
        return self.step(now, self._tick)

    def receive(self, sender: str, message: Message, now: float) -> list:
        return self.step(now, self._receive, sender, message)

    def begin(self, opened: Opened, now: float) -> list:
        return self.step(now, self._begin, opened)

    def finish(self, code: int, reason: str, now: float) -> list:
        """All silos are told, and the machine ends when they have answered, or a lease later."""
        return self.step(now, self._finish, code, reason)

    def is_in_want(self, now: float) -> bool:
        """Of silos, for which it waits beyond the deadline, or to begin at all."""
        late = self._phase == "open" and self._round is not None and now > self._round.due
        return late or self._phase == "meeting"

    # What happens.

    def _tick(self) -> None:
        self.set_timer(TICK, self.rules.retry)
        for name in self._leases.expired(self.now):
            self._leases.forget(name)
            if not self.silos[index_of(name)].left:
                self.note("silo", silo=index_of(name), there=False, reason="lost")
        if self._round is not None and self._phase == "open":
            self._round.ticks += 1
            if isinstance(self._round.gathering, Masked) and is_due(self._round.ticks):
                self._ask(self._round.gathering)
        self._look()

    def _receive(self, sender: str, message: Message) -> None:
        if not is_named(sender, "silo") or index_of(sender) >= self.rules.num_silos:
            return
        client = index_of(sender)
        match message:
            case Here():
                self._here(client, message)
            case Update() if self._is_known(client, message.nonce):
                self._update(client, message)
            case Secure() if self._is_known(client, message.nonce):
                self._secure(client, message)
            case Decline() if self._is_known(client, message.nonce):
                self._decline(client, message)
            case Bye() if self._is_known(client, message.nonce):
                if not self.silos[client].left and self._over is None:
                    self.note("silo", silo=client, there=False, reason="left")
                self.silos[client].left = True
        self._look()

    def _here(self, client: int, message: Here) -> None:
        name, known = f"silo-{client}", self.silos.get(client)
        if message.identity != self.rules.identity:
            self.send(name, Refused(message.nonce, "it was started with another config than the server"))
            return
        if known is not None and message.nonce in known.past:
            self.counts["fenced"] += 1
            self.send(name, Over(message.nonce, DONE, "another process has taken its place"))
            return
        if known is None or known.nonce != message.nonce:
            past = known.past | {known.nonce} if known is not None else frozenset()
            counted = known.counted if known is not None else (NEVER, NEVER)
            known = self.silos[client] = Known(message.nonce, past, counted=counted)
            self.note("silo", silo=client, there=True, incarnation=len(past) + 1)
            self._met = self.now if self._met is None else self._met
        elif not self._leases.alive(name, self.now) and not known.left:
            self.note("silo", silo=client, there=True, incarnation=len(known.past) + 1)
        self._leases.heard(name, self.now)
        known.has = (message.epoch, message.round, message.attempt)
        if self._over is not None:
            self.send(name, Over(message.nonce, *self._over[:2]))
        elif self._is_to_train(client):
            self._tell_unless_it_has(client, known)

    def _update(self, client: int, message: Update) -> None:
        now, name, which = self._round, f"silo-{client}", (message.epoch, message.round)
        self._leases.heard(name, self.now)
        if which == self.silos[client].counted:
            self.counts["duplicate"] += 1
        elif now is None or self._phase != "open" or which != (self.epoch, now.opened.round):
            self.counts["late"] += 1
        elif isinstance(now.gathering, Updates) and not now.gathering.receive(client, message):
            self.counts["duplicate"] += 1
        self.send(name, Heard(message.nonce, *which))

    def _secure(self, client: int, message: Secure) -> None:
        now = self._round
        self._leases.heard(f"silo-{client}", self.now)
        if now is None or self._phase != "open" or not isinstance(now.gathering, Masked):
            return
        if (message.epoch, message.round, message.attempt) != (self.epoch, *now.number):
            self.counts["late"] += 1
            return
        try:
            now.gathering.receive(client, message.said, message.arrays)
        except ValueError as error:
            self.note("refused", silo=client, round=now.opened.round, reason=str(error))

    def _decline(self, client: int, message: Decline) -> None:
        now = self._round
        self._leases.heard(f"silo-{client}", self.now)
        self.send(f"silo-{client}", Heard(message.nonce, message.epoch, message.round))
        if now is None or not isinstance(now.gathering, Masked):
            return
        if (message.epoch, message.round, message.attempt) == (self.epoch, *now.number):
            now.gathering.declined.add(client)

    # What is made of it.

    def _begin(self, opened: Opened) -> None:
        self._opened, self._phase = opened, "meeting"
        self._look()

    def _finish(self, code: int, reason: str) -> None:
        self._phase, self._round, self._opened = "over", None, None
        # Those that are yet to come are waited for, too, unless all were told to stop.
        patience = self.rules.lease if self._has_met or code != DONE else self.rules.deadline
        self._over = (code, reason, self.now + patience)
        for client, known in self.silos.items():
            self.send(f"silo-{client}", Over(known.nonce, code, reason))
        self._look()

    def _look(self) -> None:
        """Whether anything is complete."""
        if self._phase == "over":
            assert self._over is not None
            code, reason, until = self._over
            all_came = self._has_met or len(self.silos) == self.rules.num_silos or code != DONE
            if (self.num_present == 0 and all_came) or self.now >= until:
                self.end(code, reason)
        elif self._phase == "meeting" and self._all_have_met():
            self._open(attempt=0)
        elif self._phase == "open" and self._round is not None:
            now = self._round
            expected = any(map(self._is_expected, now.gathering.waiting_for))
            if now.gathering.enough and (not expected or self.now >= now.due):
                self._advance(now)
            elif isinstance(now.gathering, Masked):
                lost = not expected and not now.gathering.can_begin_anew
                if lost or self.now >= now.due:
                    self._without_sum(now, f"too few answered in phase {now.gathering.phase}")

    def _all_have_met(self) -> bool:
        """Nothing is begun before all are there, or have been waited for as long as a round lasts."""
        if not self._has_met:
            waited = self._met is not None and self.now >= self._met + self.rules.deadline
            self._has_met = waited or self.num_present == self.rules.num_silos
        return self._has_met

    def _open(self, attempt: int) -> None:
        opened, rules = self._opened, self.rules
        assert opened is not None
        gathering: Updates | Masked
        if rules.sums is None:
            gathering = Updates(opened.cohort, rules.min_silos)
        else:
            name = round_id(rules.identity, self.epoch, opened.round, attempt)
            gathering = Masked(rules.sums, name, opened.cohort)
        self._round, self._phase = _Round(opened, attempt, gathering, self.now + rules.deadline), "open"
        for client in opened.cohort:
            if self._is_present(client):
                self._tell_unless_it_has(client, self.silos[client])

    def _without_sum(self, now: _Round, reason: str) -> None:
        """With new keys the round begins anew, unless an update may have been masked: of that two sums, one of them
        secret, could show what it is. Then the round is lost."""
        assert isinstance(now.gathering, Masked)
        lost = not now.gathering.can_begin_anew
        self.note("no_sum", round=now.opened.round, attempt=now.attempt, lost=lost, reason=reason)
        if lost:
            self._phase = "closed"
            self.emit(Close(now.opened.round, {}))
        else:
            self._open(now.attempt + 1)

    def _advance(self, now: _Round) -> None:
        if isinstance(now.gathering, Updates):
            self._close(now, dict(sorted(now.gathering.came.items())))
            return
        try:
            now.gathering.advance()
        except ProtocolError as error:
            self._without_sum(now, str(error))
            return
        if now.gathering.total is not None:
            self._close(now, {})
            return
        now.due, now.ticks = self.now + self.rules.deadline, 0
        self._ask(now.gathering)

    def _close(self, now: _Round, updates: dict[int, Update]) -> None:
        total = now.gathering.total if isinstance(now.gathering, Masked) else None
        came = updates.keys() if total is None else set(total.clients)
        if left_out := [client for client in now.opened.cohort if client not in came]:
            self.note("left_out", round=now.opened.round, silos=left_out)
        for client in came:
            self.silos[client].counted = (self.epoch, now.opened.round)
        self._phase = "closed"
        self.emit(Close(now.opened.round, updates, total))

    def _is_known(self, client: int, nonce: str) -> bool:
        known = self.silos.get(client)
        if known is not None and nonce in known.past:
            self.counts["fenced"] += 1
        return known is not None and known.nonce == nonce

    def _is_present(self, client: int) -> bool:
        known = self.silos.get(client)
        return known is not None and not known.left and self._leases.alive(f"silo-{client}", self.now)

    def _is_to_train(self, client: int) -> bool:
        now = self._round
        return self._phase == "open" and now is not None and client in now.gathering.waiting_for and now.begins

    def _is_expected(self, client: int) -> bool:
        """Whether it is worth waiting for: a process that was not there at the beginning has no part in later phases
        of secure aggregation."""
        now = self._round
        assert now is not None
        return self._is_present(client) and (now.begins or self.silos[client].told == (self.epoch, *now.number))

    def _tell_unless_it_has(self, client: int, known: Known) -> None:
        assert self._round is not None
        wanted = (self.epoch, *self._round.number)
        if known.told != wanted:
            known.times = 0
            self._tell(client)
        elif known.has != wanted:
            known.times += 1  # it may have said this before what it was sent came
            if known.times > 1 and is_due(known.times):
                self._tell(client)

    def _tell(self, client: int) -> None:
        now, known = self._round, self.silos[client]
        assert now is not None
        opened = now.opened
        known.told = (self.epoch, *now.number)
        after, keep = opened.after.get(client, NEVER), opened.keep.get(client, ())
        self.send(f"silo-{client}", Train(known.nonce, *known.told, opened.run, after, keep, opened.arrays))

    def _ask(self, gathering: Masked) -> None:
        """What silos are to answer in this phase of secure aggregation."""
        now = self._round
        assert now is not None
        for client in sorted(gathering.waiting_for & gathering.asked.keys()):
            if self._is_expected(client):
                said = to_plain(gathering.asked[client])
                self.send(f"silo-{client}", Secure(self.silos[client].nonce, self.epoch, *now.number, said, ()))
