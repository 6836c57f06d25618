"""A table made ready to run: its ticks as few loops, and where every activation waits until it is used.

The ticks of a table in lockstep, an F beside the B that follows it, are steps. Neighbouring steps that do the same
kinds of work are one loop, and what repeats of these is a loop of loops: 1F1B is three, F, then F and B, then B.

S stages, N steps, v chunks. Slots are places of a stage's own buffers, given away again when their content was used:
as many as the table needs at once, on the stage that needs most.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxdist.sync.pipeline.schedule import Op, Table


class Work(NamedTuple):
    """What a step does, on all stages alike."""

    forward: bool
    head: bool  # a microbatch leaves the last part: its loss, and the cotangent that comes back
    backward: bool


class Run(NamedTuple):
    work: Work
    times: int


class Loop(NamedTuple):
    body: tuple[Run, ...]
    repeats: int

    @property
    def steps(self) -> int:
        return self.repeats * sum(run.times for run in self.body)


@dataclass(frozen=True)
class Program:
    """Numbers [N, S] of each stage, or [N] where all stages need the same; 0 where there is none, `*_on` says so."""

    loops: tuple[Loop, ...]
    num_inputs: int  # slots of inputs of blocks
    num_cotangents: int  # slots of cotangents of outputs
    # Forward: the microbatch and chunk, whether its input is an embedding, the slot of the input
    f_on: np.ndarray
    f_microbatch: np.ndarray
    f_chunk: np.ndarray
    f_first: np.ndarray
    f_slot: np.ndarray
    # What arrives from the stage before when the tick has ended
    f_arrives: np.ndarray
    f_to: np.ndarray
    # The microbatch that stage 0 embeds, and the one that leaves the last part: its cotangent's slot there
    embed: np.ndarray
    h_on: np.ndarray
    h_microbatch: np.ndarray
    h_to: np.ndarray
    # Backward: the microbatch and chunk, the slots of the input and of the cotangent of the output
    b_on: np.ndarray
    b_microbatch: np.ndarray
    b_chunk: np.ndarray
    b_slot: np.ndarray
    b_from: np.ndarray
    b_arrives: np.ndarray
    b_to: np.ndarray
    # The microbatch whose cotangent has come back to the embedding
    u_on: np.ndarray
    u_microbatch: np.ndarray

    @property
    def rows(self) -> dict[str, np.ndarray]:
        """The arrays, by name."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), np.ndarray)
        }

    @property
    def num_ticks(self) -> int:
        return sum(
            loop.repeats * sum(run.times * (run.work.forward + run.work.backward) for run in loop.body)
            for loop in self.loops
        )


def program(table: Table, chunks: int) -> Program:
    """Of a table in lockstep; of its F ticks alone, an evaluation."""
    steps, S = _steps(table), len(table[0])
    N, last = len(steps), chunks - 1
    arrays: dict[str, np.ndarray] = {}
    for names, shape in (
        (("f_microbatch", "f_chunk", "f_slot", "f_to"), (N, S)),
        (("b_microbatch", "b_chunk", "b_slot", "b_from", "b_to"), (N, S)),
        (("embed", "h_microbatch", "h_to", "u_microbatch"), (N,)),
    ):
        arrays |= {name: np.zeros(shape, np.int32) for name in names}
    arrays |= {name: np.zeros((N, S), bool) for name in ("f_on", "f_first", "f_arrives", "b_on", "b_arrives")}
    arrays |= {name: np.zeros(N, bool) for name in ("h_on", "u_on")}

    for n, (forward, backward) in enumerate(steps):
        for kind, row in (("f", forward), ("b", backward)):
            for s, op in enumerate(row or ()):
                if op is not None:
                    arrays[f"{kind}_on"][n, s] = True
                    arrays[f"{kind}_microbatch"][n, s], arrays[f"{kind}_chunk"][n, s] = op.microbatch, op.chunk
        if forward and (op := forward[0]) is not None:
            arrays["embed"][n], arrays["f_first"][n, 0] = op.microbatch, op.chunk == 0
        if forward and (op := forward[-1]) is not None and op.chunk == last:
            arrays["h_on"][n], arrays["h_microbatch"][n] = True, op.microbatch
        if backward and (op := backward[0]) is not None and op.chunk == 0:
            arrays["u_on"][n], arrays["u_microbatch"][n] = True, op.microbatch

    num_inputs = _inputs(steps, chunks, arrays)
    num_cotangents = _cotangents(steps, chunks, arrays)
    works = [Work(f is not None, bool(arrays["h_on"][n]), b is not None) for n, (f, b) in enumerate(steps)]
    return Program(_loops(works), num_inputs, num_cotangents, **arrays)


Row = tuple[Op | None, ...]
Steps = list[tuple[Row | None, Row | None]]


def _steps(table: Table) -> Steps:
    kinds = ["F" if any(op is not None and op.kind == "F" for op in row) else "B" for row in table]
    take_turns = "BF" in "".join(kinds)  # else all F come first, and the last of them stays with the others
    steps: Steps = []
    for kind, row in zip(kinds, table, strict=True):
        if kind == "F":
            steps.append((row, None))
        elif take_turns and steps[-1][1] is None:
            steps[-1] = (steps[-1][0], row)
        else:
            steps.append((None, row))
    return steps


def _loops(works: Iterable[Work]) -> tuple[Loop, ...]:
    runs: list[Run] = []
    for work in works:
        if runs and runs[-1].work == work:
            runs[-1] = Run(work, runs[-1].times + 1)
        else:
            runs.append(Run(work, 1))
    loops, i = [], 0
    while i < len(runs):
        pair, repeats = tuple(runs[i : i + 2]), 1
        while len(pair) == 2 and tuple(runs[i + 2 * repeats : i + 2 * repeats + 2]) == pair:
            repeats += 1
        if repeats == 1:
            pair = pair[:1]
        loops.append(Loop(pair, repeats))
        i += len(pair) * repeats
    return tuple(loops)


# A time is 4 x step + what happens in it: 0 a stage's forward pass reads its input, 1 what forward passes and the
# head made arrives, 2 the backward pass reads, 3 what it made arrives.
Key = tuple[int, int]  # (microbatch, chunk)


def _times(steps: Steps) -> dict[tuple[str, int, Key], int]:
    """The step of each (kind, stage, (microbatch, chunk))."""
    return {
        (op.kind, s, (op.microbatch, op.chunk)): n
        for n, rows in enumerate(steps)
        for row in rows
        for s, op in enumerate(row or ())
        if op is not None
    }


def _inputs(steps: Steps, chunks: int, arrays: dict[str, np.ndarray]) -> int:
    """Slots of inputs: from where an embedding is made or an output arrives to the backward pass, if there is one."""
    times, S = _times(steps), arrays["f_on"].shape[1]
    most = 0
    for s in range(S):
        spans = {}
        for (kind, stage, (m, c)), n in times.items():
            if (kind, stage) == ("F", s):
                before = None if (s, c) == (0, 0) else ("F", (s - 1) % S, (m, c - (s == 0)))
                begin = 4 * n if before is None else 4 * times[before] + 1
                spans[m, c] = (begin, 4 * times["B", s, (m, c)] + 2 if ("B", s, (m, c)) in times else 4 * n)
                if before is not None:
                    arrays["f_arrives"][times[before], s] = True
        slots, count = _slots(spans)
        most = max(most, count)
        for (m, c), slot in slots.items():
            arrays["f_slot"][times["F", s, (m, c)], s] = slot
            if ("B", s, (m, c)) in times:
                arrays["b_slot"][times["B", s, (m, c)], s] = slot
            if (s, c) != (0, 0):
                arrays["f_to"][times["F", (s - 1) % S, (m, c - (s == 0))], s] = slot
    return most


def _cotangents(steps: Steps, chunks: int, arrays: dict[str, np.ndarray]) -> int:
    """Slots of cotangents: from where the head or the next part made one to the backward pass."""
    times, S = _times(steps), arrays["f_on"].shape[1]
    most = 1
    for s in range(S):
        spans, arrival = {}, {}
        for (kind, stage, (m, c)), n in times.items():
            if (kind, stage) == ("B", s):
                of_head = (s, c) == (S - 1, chunks - 1)
                made = times["F", s, (m, c)] if of_head else times["B", (s + 1) % S, (m, c + (s == S - 1))]
                spans[m, c], arrival[m, c] = (4 * made + (1 if of_head else 3), 4 * n + 2), (made, of_head)
        slots, count = _slots(spans)
        most = max(most, count)
        for (m, c), slot in slots.items():
            made, of_head = arrival[m, c]
            arrays["b_from"][times["B", s, (m, c)], s] = slot
            if of_head:
                arrays["h_to"][made] = slot
            else:
                arrays["b_to"][made, s], arrays["b_arrives"][made, s] = slot, True
    return most


def _slots(spans: dict[Key, tuple[int, int]]) -> tuple[dict[Key, int], int]:
    """A slot for each span of time, first come first served: as few as the most that overlap."""
    free_from: list[int] = []  # of each slot
    found = {}
    by_begin: Callable[[Key], tuple[int, int]] = lambda key: spans[key]  # noqa: E731
    for key in sorted(spans, key=by_begin):
        begin, end = spans[key]
        slot = next((i for i, until in enumerate(free_from) if until < begin), len(free_from))
        if slot == len(free_from):
            free_from.append(end)
        free_from[slot] = end
        found[key] = slot
    return found, len(free_from)
