"""Who joined and left a parameter server, and who served what, from events.jsonl."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any

from jaxdist.study.report.panels import Panel, State, cell, column, row_of, table
from jaxdist.study.report.runs import Record, StudiedRun
from jaxdist.study.report.study import Run, Subject

MAX_EVENTS = 60  # of one run


@dataclass(frozen=True)
class Happening:
    seconds: float | None  # since the run's first start, or virtual
    who: str
    what: str
    state: State = None


def membership(subject: Subject, runs: list[Run], left_out: str) -> list[Panel]:
    rows = []
    for run in runs:
        happenings = list(merged(happenings_of(run.of)))
        for happening in happenings[:MAX_EVENTS]:
            cells = [run.name, happening.seconds, happening.who, cell(text=happening.what, state=happening.state)]
            rows.append(row_of(subject, run, cells))
        if more := len(happenings) - MAX_EVENTS:
            rows += (
                [row_of(subject, run, [run.name, None, "", f"and {more} more, in events.jsonl"])] if more > 0 else []
            )
    columns = [column("run"), column("at", "since the first start, or virtual", "s"), column("who"), column("what")]
    note = f"Members and views, from events.jsonl; alike in a row are one line, at the first one's time.{left_out}"
    return [table("Who came and went", columns, rows, note)] if rows else []


def happenings_of(run: StudiedRun) -> Iterator[Happening]:
    """What events.jsonl says of members and views."""
    starts = [event["time"] for event in run.events if event.get("kind") == "start" and "time" in event]
    began = datetime.fromisoformat(starts[0]) if starts else None
    for event in run.events:
        at = event.get("virtual_seconds")
        if at is None and began is not None and "time" in event:
            at = (datetime.fromisoformat(event["time"]) - began).total_seconds()
        if (told := _told(event)) is not None:
            yield Happening(at, *told)


def _told(event: Record) -> tuple[str, str, State] | None:
    """(who, what, state of the cell); None for what is no news."""
    reason = event.get("reason")
    match event.get("kind"):
        case "membership":
            again = f" (its process number {event['incarnation']})" if event.get("incarnation", 1) > 1 else ""
            if event.get("joined"):
                return str(event.get("worker")), f"joined{again}", None
            return str(event.get("worker")), f"left: {reason}", None if reason == "finished" else "warn"
        case "view":
            shards = event.get("shards")
            number, epoch = event.get("number"), event.get("epoch")
            return ", ".join(_served(shards)), f"view {number}, epoch {epoch}", None
        case "server_lost":
            return str(event.get("name")), f"lost: {reason}", "bad"
        case "rollback":
            cut, reported = event.get("cut"), event.get("reported_version")
            what = f"back to version {cut or 0}, from {reported} or later; epoch {event.get('epoch')}"
            return "all servers", what, "bad"
        case "finished":
            return "all", f"finished: {reason}", None
    return None


def _served(shards: Any) -> Iterator[str]:
    """Who has each shard."""
    for number, shard in enumerate(shards if isinstance(shards, list) else []):
        backup = f" and {shard['backup']}" if shard.get("backup") else ""
        yield f"shard {number}: {shard.get('primary') or 'nobody'}{backup}"


def merged(happenings: Iterable[Happening]) -> Iterator[Happening]:
    """What happened to several one after another is told once."""
    for (what, state), alike in groupby(happenings, lambda happening: (happening.what, happening.state)):
        same = list(alike)
        yield Happening(same[0].seconds, ", ".join(happening.who for happening in same), what, state)
