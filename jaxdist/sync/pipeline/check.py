"""A table run through: is every dependency met, how many inputs does each stage keep, how much of it is bubble?"""

from dataclasses import dataclass
from fractions import Fraction

from jaxdist.sync.pipeline.schedule import Name, Op, Table


@dataclass(frozen=True)
class Checked:
    ticks: int
    bubble: Fraction  # of all stages' ticks those in which they wait
    peak_stash: tuple[int, ...]  # inputs that a stage keeps at once, by stage


def check(table: Table, microbatches: int, chunks: int = 1) -> Checked:
    """What a table comes to.

    Raises:
      ValueError: it leaves something out or does it twice, or takes what is not there yet. What a stage makes in a
        tick, another has in the next.
    """
    stages = len(table[0])
    when: dict[tuple[str, int, int], int] = {}  # (kind, microbatch, part) -> tick
    for tick, row in enumerate(table):
        for stage, op in enumerate(row):
            if op is not None:
                place = (op.kind, op.microbatch, op.chunk * stages + stage)
                if place in when:
                    raise ValueError(f"tick {tick}, stage {stage}: {op} was done in tick {when[place]} already")
                when[place] = tick
    parts = stages * chunks
    kinds = sorted({kind for kind, _, _ in when})
    wanted = {(kind, m, part) for kind in kinds for m in range(microbatches) for part in range(parts)}
    if kinds not in (["B", "F"], ["B", "F", "W"]) or wanted != when.keys():
        raise ValueError(f"left out or beyond: {sorted(wanted ^ when.keys())[:5]}")
    for (kind, m, part), tick in when.items():
        for needed in _needs(kind, m, part, parts):
            if not when[needed] < tick:
                raise ValueError(
                    f"tick {tick}: {kind} of microbatch {m} in part {part} needs {needed[0]} of part {needed[2]}, "
                    f"which is done in tick {when[needed]}"
                )
    last = kinds[-1] if "W" in kinds else "B"  # until then the input is kept
    busy = sum(op is not None for row in table for op in row)
    return Checked(
        len(table),
        1 - Fraction(busy, len(table) * stages),
        tuple(_peak(when, last, stage, stages, len(table)) for stage in range(stages)),
    )


def _needs(kind: str, m: int, part: int, parts: int) -> list[tuple[str, int, int]]:
    match kind:
        case "F":
            return [("F", m, part - 1)] if part else []
        case "B":
            return [("F", m, part), *([("B", m, part + 1)] if part < parts - 1 else [])]
    return [("B", m, part)]


def _peak(when: dict[tuple[str, int, int], int], last: str, stage: int, stages: int, ticks: int) -> int:
    change = [0] * (ticks + 1)
    for (kind, _, part), tick in when.items():
        if part % stages == stage:
            change[tick] += kind == "F"
            change[tick + 1] -= kind == last
    kept = peak = 0
    for step in change:
        kept += step
        peak = max(peak, kept)
    return peak


def bubble_formula(name: Name, stages: int, microbatches: int, chunks: int = 1) -> Fraction:
    """The share of ticks in which a stage waits: (S-1)/(vM+S-1), with v = 1 but for interleaved (Narayanan et al.
    2021, section 2.2); of ZB-H1 (S-1)/(3M+S-1), where F, B and W take as long as each other."""
    work = {"zb_h1": 3, "interleaved": chunks}.get(name, 1) * microbatches
    return Fraction(stages - 1, work + stages - 1)


def in_lockstep(table: Table) -> bool:
    """Whether all stages do the same kind of work in every tick."""
    return all(len({op.kind for op in row if op is not None}) == 1 for row in table)


def rows_of(table: Table, kind: str) -> list[tuple[Op | None, ...]]:
    """The ticks of one kind of a table in lockstep."""
    return [row for row in table if any(op is not None and op.kind == kind for op in row)]
