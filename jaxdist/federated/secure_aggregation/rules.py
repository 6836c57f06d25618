"""What all who take part in a round have agreed on before it."""

from dataclasses import dataclass

from jaxdist.config.errors import UserError
from jaxdist.federated.secure_aggregation.graph import least_clients


class ProtocolError(ValueError):
    """Somebody does not keep to the protocol, or what came was altered: whoever raises this takes no further part."""


class TooFewClients(ProtocolError):
    """So many are missing that there is no sum, and of no vector anything is learnt. A vector that was masked in the
    round may go into no other: see `Server`."""

    def __init__(self, what: str, have: int, needed: int):
        self.missing = needed - have
        super().__init__(
            f"{what}: {have} of the {needed} that are needed; {self.missing} missing, so there is no sum"
        )


@dataclass(frozen=True)
class Rules:
    """`num_clients` of the round; each one's `degree` neighbours; `threshold` of the degree + 1 holders of a client's
    secrets (its neighbours and itself) that can put them together; vectors of `length` words of `word_bits`.

    Fixed before the round: a server that leaves clients out of the roster does not lower what is needed.
    Raises UserError for numbers that do not go together.
    """

    num_clients: int
    threshold: int
    degree: int
    length: int
    word_bits: int = 32

    def __post_init__(self) -> None:
        problems = []
        if self.num_clients < 3:
            problems.append(f"{self.num_clients} clients: of two each learns the other's vector; at least 3")
        if not 2 <= self.degree < self.num_clients:
            problems.append(f"{self.degree} neighbours: at least 2, below the {self.num_clients} clients")
        elif self.degree % 2 and not self.is_complete:
            problems.append(f"{self.degree} neighbours: an even number, or all {self.num_clients - 1} others")
        if not self.holders / 2 < self.threshold <= self.holders or self.threshold < 2:
            problems.append(
                f"a threshold of {self.threshold}: more than half of a client's {self.holders} holders (of which no "
                "two halves may put together both its secrets), at least 2, at most all"
            )
        if self.word_bits not in (32, 64) or self.length < 1:
            problems.append(f"{self.length} words of {self.word_bits} bits: at least one word of 32 or 64")
        if problems:
            raise UserError("secure aggregation: " + "; ".join(problems))

    @property
    def is_complete(self) -> bool:
        return self.degree == self.num_clients - 1

    @property
    def holders(self) -> int:
        """Of the shares of one client."""
        return self.degree + 1

    @property
    def min_clients(self) -> int:
        """In all, that must stay."""
        return least_clients(self.num_clients, self.threshold, self.holders)

    @property
    def dtype(self) -> str:
        return f"uint{self.word_bits}"
