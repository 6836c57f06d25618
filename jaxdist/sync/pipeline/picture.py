"""A schedule for a person to look at: a line a stage, a column a tick."""

from collections.abc import Iterator

from jaxdist.sync.pipeline.schedule import Op, Table

LEGEND = "F forward, B backward, number of the microbatch, . waits"
WITH_CHUNKS = "; a, b, ... the stage's chunk of blocks"
WITH_W = "; B of the input alone, W of the weights"


def picture(table: Table, width: int = 116) -> Iterator[str]:
    """Lines of at most `width` characters; a longer table goes on below."""
    ops = [op for row in table for op in row if op is not None]
    chunks = 1 + max(op.chunk for op in ops)
    cell = max(len(_text(op, chunks)) for op in ops)
    cell = max(cell, len(str(len(table) - 1)))
    margin = len(f"stage {len(table[0]) - 1}")
    at_once = max(1, (width - margin) // (cell + 1))
    for start in range(0, len(table), at_once):
        part = table[start : start + at_once]
        if start:
            yield ""
        yield _line("tick", [str(start + i) for i in range(len(part))], margin, cell)
        for stage in range(len(table[0])):
            yield _line(f"stage {stage}", [_text(row[stage], chunks) for row in part], margin, cell)
    yield LEGEND + (WITH_CHUNKS if chunks > 1 else "") + (WITH_W if any(op.kind == "W" for op in ops) else "")


def _text(op: Op | None, chunks: int) -> str:
    if op is None:
        return "."
    return f"{op.kind}{op.microbatch}" + (chr(ord("a") + op.chunk) if chunks > 1 else "")


def _line(name: str, cells: list[str], margin: int, cell: int) -> str:
    return f"{name:<{margin}} " + " ".join(f"{text:>{cell}}" for text in cells)
