"""A silo's part of the protocol: it says that it is there, trains when it is told to, and sends what came of it until
that was heard. No I/O, no jax."""

from dataclasses import dataclass

import numpy as np

from jaxdist.federated.secure_aggregation.client import Client
from jaxdist.federated.secure_aggregation.in_one_process import answer
from jaxdist.federated.secure_aggregation.messages import Forwarded
from jaxdist.federated.secure_aggregation.messages import Message as SumMessage
from jaxdist.federated.secure_aggregation.rules import Rules as SumRules
from jaxdist.federated.silos.gathering import round_id
from jaxdist.federated.silos.messages import NEVER, Bye, Decline, Heard, Here, Over, Refused, Secure, Train, Update
from jaxdist.federated.silos.rules import Trained, Work
from jaxdist.runtime.exit_codes import DONE, USAGE
from jaxdist.transport.machine import TICK, StateMachine, index_of, is_due
from jaxdist.transport.plain import Message, from_plain, to_plain

SERVER = "server"


@dataclass(frozen=True)
class SiloRules:
    """Times in seconds."""

    identity: str  # of the config
    retry: float = 1.0  # before something is said again
    sums: SumRules | None = None


class Silo(StateMachine):
    """`nonce`: the process's own. After the effect Work call `trained`."""

    def __init__(self, name: str, nonce: str, rules: SiloRules):
        super().__init__(name)
        self.nonce, self.rules = nonce, rules
        self.is_known = False  # to the server
        self._task: Train | None = None  # the newest
        self._training: Work | None = None
        self._done: tuple[Work, Trained] | None = None
        self._unheard: Update | Decline | Secure | None = None  # of this task, for all that is known here
        self._ticks = 0  # since that was said first
        self._sum: Client | None = None  # of the attempt at a round that the task is
        self._waits: Forwarded | None = None  # is to be answered when it has trained
        self._masked: tuple[str, int] | None = None  # run and round of the last update that went under masks

    def start(self, now: float) -> list:
        return self.step(now, self._tick)

    def wake(self, timer: str, now: float) -> list:
        return self.step(now, self._tick)

    def receive(self, sender: str, message: Message, now: float) -> list:
        return self.step(now, self._receive, sender, message)

    def trained(self, work: Work, result: Trained, now: float) -> list:
        return self.step(now, self._trained, work, result)

    def leave(self, now: float) -> list:
        """It takes part no more, and the server need not wait for it."""
        return self.step(now, self._leave, DONE, "it was told to leave")

    def _tick(self) -> None:
        self.set_timer(TICK, self.rules.retry)
        has = (NEVER,) * 3 if self._task is None else _number(self._task)
        self.send(SERVER, Here(self.nonce, self.rules.identity, *has))
        if self._unheard is not None:
            self._ticks += 1
            if is_due(self._ticks):
                self.send(SERVER, self._unheard)

    def _receive(self, sender: str, message: Message) -> None:
        if sender != SERVER or getattr(message, "nonce", None) != self.nonce:
            return
        match message:
            case Train():
                self.is_known = True
                self._train(message)
            case Secure():
                self._secure(message)
            case Heard(epoch=epoch, round=number):
                if self._unheard is not None and (self._unheard.epoch, self._unheard.round) == (epoch, number):
                    self._unheard = None
            case Refused(reason=reason):
                self.end(USAGE, reason)
            case Over(code=code, reason=reason):
                self._leave(code, reason)

    def _leave(self, code: int, reason: str) -> None:
        self.send(SERVER, Bye(self.nonce))
        self.end(code, reason)

    def _train(self, task: Train) -> None:
        if self._task is not None and _number(task) <= _number(self._task):
            return
        self._task, self._unheard, self._waits = task, None, None
        if self.rules.sums is not None:
            if self._masked == (task.run, task.round):
                self._decline("its update of this round has been under masks before")
                return
            name = round_id(self.rules.identity, task.epoch, task.round, task.attempt)
            self._sum = Client(self.rules.sums, name, index_of(self.name))
            self._say_until_heard(self._of_sum(self._sum.advertise()))
        self._go_on()

    def _go_on(self) -> None:
        task = self._task
        assert task is not None
        if self._done is not None and _is_of(self._done[0], task):
            self._answer(self._done[1])
        elif self._training is None:
            self._training = Work(task.epoch, task.run, task.round, task.after, task.keep, task.arrays)
            self.emit(self._training)

    def _trained(self, work: Work, result: Trained) -> None:
        self._training, self._done = None, (work, result)
        self._go_on()

    def _answer(self, result: Trained) -> None:
        task = self._task
        assert task is not None
        if self.rules.sums is None:
            self._say_until_heard(Update(self.nonce, task.epoch, task.round, result.arrays))
        elif self._waits is not None:
            forwarded, self._waits = self._waits, None
            self._add(forwarded)

    def _secure(self, message: Secure) -> None:
        if self._task is None or self._sum is None or _number(message) != _number(self._task):
            return
        self._unheard = None  # what is said next it will ask for again
        try:
            said = from_plain(message.said, message.arrays, of=SumMessage)
        except ValueError as error:
            self._decline(str(error))
            return
        assert isinstance(said, SumMessage)
        self._add(said)

    def _add(self, said: SumMessage) -> None:
        """What secure aggregation answers."""
        assert self._sum is not None
        assert self._task is not None
        vector = np.zeros(0)
        if isinstance(said, Forwarded):
            if self._done is None or not _is_of(self._done[0], self._task):
                self._waits = said
                return
            if not self._done[1].arrays:
                self._decline("its update is not finite, or was under masks before")
                return
            (vector,) = self._done[1].arrays
        try:
            answered = answer(self._sum, said, vector)
        except ValueError as error:
            self._decline(str(error))
            return
        if isinstance(said, Forwarded):
            self._masked = (self._task.run, self._task.round)
        self.send(SERVER, self._of_sum(answered))

    def _decline(self, reason: str) -> None:
        """It says nothing more in this attempt: somebody has lied, or too many have dropped."""
        assert self._task is not None
        self.note("declined", round=self._task.round, reason=reason)
        self._sum = None
        self._say_until_heard(Decline(self.nonce, *_number(self._task)))

    def _say_until_heard(self, message: Update | Decline | Secure) -> None:
        self._unheard, self._ticks = message, 0
        self.send(SERVER, message)

    def _of_sum(self, said: SumMessage) -> Secure:
        assert self._task is not None
        return Secure(self.nonce, *_number(self._task), to_plain(said), getattr(said, "arrays", ()))


def _number(of: Train | Secure) -> tuple[int, int, int]:
    return of.epoch, of.round, of.attempt


def _is_of(work: Work, task: Train) -> bool:
    return (work.epoch, work.round) == (task.epoch, task.round)
