"""What the apps of server and clients say to each other, as Flower's records.

The server asks who is there (`query`), and has clients train (`train`). Records of a message: `arrays` and `round`;
the answer to a query is in `client`.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from jaxdist.federated.silos.messages import NEVER, Update
from jaxdist.federated.silos.rules import Arrays, Opened, Work
from jaxdist.transport import plain

ARRAYS, ROUND, CLIENT = "arrays", "round", "client"


@dataclass(frozen=True)
class Known:
    """What a SuperNode says of itself."""

    client: int
    identity: str  # of its config
    refused: str = ""  # why it can have no part


def to_records(arrays: Arrays) -> ArrayRecord:
    """NumPy's files, in which Flower sends arrays, know no bfloat16: that goes as integers."""
    return ArrayRecord([x.view(f"u{x.itemsize}") if x.dtype.kind == "V" else x for x in arrays])


def from_records(record: Any, expected: Any) -> Arrays:
    """Of the shapes and dtypes `expected`, ShapeDtypeStructs; raises ValueError for others."""
    if not isinstance(record, ArrayRecord) or len(record) != len(expected):
        raise ValueError(f"not {len(expected)} arrays")
    found = []
    for i, spec in enumerate(expected):
        if str(i) not in record:
            raise ValueError(f"no array {i}")
        x = record[str(i)].numpy()
        is_bits = spec.dtype.kind == "V" and x.dtype == np.dtype(f"u{spec.dtype.itemsize}")
        found.append(x.view(spec.dtype) if is_bits else x)
    plain.check(found, expected)
    return tuple(found)


def push(grid: Grid, message: Message) -> str | None:
    """Its id; None where the SuperLink did not take it, which says why in the log."""
    return next(iter(grid.push_messages([message])), None)


def pull(grid: Grid, asked: Collection[str]) -> Iterable[Message]:
    """Replies that have come to messages with these ids."""
    return grid.pull_messages(list(asked)) if asked else ()


def ask(node: int) -> Message:
    return Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY)


def known(content: RecordDict) -> Known:
    """Raises ValueError for what is no answer to a query."""
    said = content.get(CLIENT)
    if not isinstance(said, ConfigRecord):
        raise ValueError("its ClientApp is not that of jaxdist.flower")
    return plain.read(Known, dict(said))


def say(of: Known) -> RecordDict:
    return RecordDict({CLIENT: ConfigRecord(plain.plain(of))})


def instruction(opened: Opened, identity: str, client: int, node: int, arrays: ArrayRecord) -> Message:
    """Of a round, for one client. `arrays`: those of `opened`, for all clients the same."""
    said: dict[str, Any] = {
        "identity": identity,
        "client": client,
        "run": opened.run,
        "round": opened.round,
        "after": opened.after.get(client, NEVER),
        "keep": list(opened.keep.get(client, ())),
    }
    content = RecordDict({ARRAYS: arrays, ROUND: ConfigRecord(said)})
    return Message(content, dst_node_id=node, message_type=MessageType.TRAIN, group_id=str(opened.round))


@dataclass(frozen=True)
class Instruction:
    """As it came, without its arrays."""

    identity: str
    client: int
    run: str
    round: int
    after: int
    keep: tuple[int, ...]

    def work(self, arrays: Arrays) -> Work:
        return Work(0, self.run, self.round, self.after, self.keep, arrays)


def instructed(content: RecordDict) -> Instruction:
    """Raises ValueError for what no server of ours says."""
    said = content.get(ROUND)
    if not isinstance(said, ConfigRecord):
        raise ValueError("the ServerApp is not that of jaxdist.flower")
    return plain.read(Instruction, dict(said))


def trained(arrays: Arrays) -> RecordDict:
    """What came of it."""
    return RecordDict({ARRAYS: to_records(arrays)})


def update(reply: Message, round_: int, specs: Any) -> Update:
    """Raises ValueError for an error, and for what is no update."""
    if reply.has_error():
        raise ValueError(reply.error.reason)
    return Update("", 0, round_, from_records(reply.content.get(ARRAYS), specs))
