"""Pipeline schedules as data: table[tick][stage] is what the stage does in that tick, None where it waits.

A tick is one stage's share of one microbatch, forward (F) or backward (B); zero-bubble schedules cut B in two: the
cotangent of the input (B) and then, at any time, the gradient of the weights (W).

S stages, M microbatches, v chunks of blocks on each stage: chunk c of stage s is part c S + s of the v S parts that a
microbatch runs through.

GPipe, 1F1B and interleaved 1F1B are here in lockstep form, which one SPMD program can run: all stages do the same
kind of work in a tick. They wait in the same share of ticks as stages that run freely. What lockstep costs is stash:
stage s of 1F1B keeps 2(S - 1 - s) + 1 inputs where a free one keeps S - s; interleaved it costs nothing.
"""

from typing import Literal, NamedTuple

Name = Literal["gpipe", "1f1b", "interleaved", "zb_h1"]
NAMES: tuple[Name, ...] = ("gpipe", "1f1b", "interleaved", "zb_h1")
EXECUTED: tuple[Name, ...] = ("gpipe", "1f1b", "interleaved")


class Op(NamedTuple):
    kind: Literal["F", "B", "W"]
    microbatch: int
    chunk: int


Table = tuple[tuple[Op | None, ...], ...]


def table(name: Name, stages: int, microbatches: int, chunks: int = 1) -> Table:
    """The table of a schedule. Raises ValueError for numbers that it cannot have, with those that it can."""
    if stages < 1 or microbatches < 1 or chunks < 1:
        raise ValueError(f"{stages} stages, {microbatches} microbatches, {chunks} chunks: each must be at least 1")
    if name != "interleaved" and chunks != 1:
        raise ValueError(f"{name} has one chunk of blocks on each stage, not {chunks}; interleaved has several")
    if name == "interleaved" and microbatches % stages:
        around = [m for m in (microbatches // stages * stages, -(-microbatches // stages) * stages) if m]
        raise ValueError(
            f"interleaved takes microbatches in rounds of one for each stage: {microbatches} is no multiple of "
            f"{stages} stages; use {' or '.join(map(str, around))}"
        )
    if name == "zb_h1":
        return _zero_bubble_h1(stages, microbatches)
    return _lockstep(stages, microbatches, chunks, all_forward_first=name == "gpipe")


def _lockstep(S: int, M: int, v: int, *, all_forward_first: bool) -> Table:
    """F ticks and B ticks: the f-th F tick is number f - s of stage s, the b-th B tick number b - (S - 1 - s).

    GPipe (Huang et al. 2019): all F, then all B. 1F1B (Narayanan et al. 2019, 2021): B 0 follows the F tick in which
    the first microbatch leaves the last part, v S - 1, and from there F and B take turns. A stage takes S
    microbatches through one chunk, then the same ones through the next; backward the chunks the other way round.
    """
    num = v * M + S - 1  # ticks of either kind

    def op(kind: Literal["F", "B"], number: int) -> Op | None:
        if not 0 <= number < v * M:
            return None
        round_, place = divmod(number, v * S)
        chunk, microbatch = place // S, round_ * S + place % S
        if v == 1:
            chunk, microbatch = 0, number
        return Op(kind, microbatch, chunk if kind == "F" else v - 1 - chunk)

    forward = [tuple(op("F", f - s) for s in range(S)) for f in range(num)]
    backward = [tuple(op("B", b - (S - 1 - s)) for s in range(S)) for b in range(num)]
    before = num if all_forward_first else v * S - 1
    turns = [row for pair in zip(forward[before:], backward, strict=False) for row in pair]
    return (*forward[:before], *turns, *backward[num - before :])


def _zero_bubble_h1(S: int, M: int) -> Table:
    """ZB-H1 (Qi et al. 2023, arXiv 2401.10241, figure 3): 1F1B whose bubble is filled with W, in no more memory.

    Stage s takes S - s microbatches forward, then turns of B, W and F, its W running s microbatches behind its B, so
    that every stage keeps S inputs; each does its next piece of work as soon as it can.
    """
    to_do = [_order_of_zero_bubble(S, M, s) for s in range(S)]
    done: dict[tuple[str, int, int], int] = {}  # (kind, microbatch, stage) -> tick
    rows: list[tuple[Op | None, ...]] = []
    while any(to_do):
        tick, row = len(rows), []
        for s, ops in enumerate(to_do):
            needed = {"F": ("F", s - 1), "B": ("B", s + 1), "W": ("B", s)}  # of the same microbatch
            op = ops[0] if ops else None
            if op is not None:
                kind, stage = needed[op.kind]
                if 0 <= stage < S and done.get((kind, op.microbatch, stage), tick) >= tick:
                    op = None
            row.append(op)
        for s, op in enumerate(row):
            if op is not None:
                done[op.kind, op.microbatch, s] = tick
                to_do[s].pop(0)
        rows.append(tuple(row))
    return tuple(rows)


def _order_of_zero_bubble(S: int, M: int, s: int) -> list[Op]:
    forward = [Op("F", m, 0) for m in range(M)]
    ops, forward = forward[: S - s], forward[S - s :]
    for m in range(M):
        ops.append(Op("B", m, 0))
        ops += [Op("W", m - s, 0)] if m >= s else []
        ops += [forward.pop(0)] if forward else []
    return ops + [Op("W", m, 0) for m in range(max(0, M - s), M)]
