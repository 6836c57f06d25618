"""A report as plain HTML, for readers without JavaScript: charts are named, their numbers are not repeated."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

NOT_MEASURED = "not measured"


def escape(text: Any) -> str:
    return html.escape(str(text))


def plain_sections(report: dict[str, Any]) -> str:
    """Every section: its text, its tables with every cell, and a line for each chart."""
    problems = [
        f"{s['name']}: {s['state']}. {s['problem'] or ''}" for s in report["series"] if s["state"] != "finished"
    ]
    parts = [f"<ul>{''.join(f'<li>{escape(problem)}</li>' for problem in problems)}</ul>"] if problems else []
    for section in report["sections"]:
        parts.append(f"<section><h2>{escape(section['title'])}</h2>")
        if section["text"]:
            parts.append(f'<p class="text">{escape(section["text"])}</p>')
        for panel in section["panels"]:
            parts.append(f"<h3>{escape(panel['title'])}</h3>")
            if panel.get("note"):
                parts.append(f'<p class="note">{escape(panel["note"])}</p>')
            parts.append(_plain_panel(panel))
        parts.append("</section>")
    return "\n".join(parts)


def _plain_panel(panel: dict[str, Any]) -> str:
    match panel["kind"]:
        case "table":
            columns = panel["columns"]
            units = [column["unit"] for column in columns]
            rows = [[cell_text(c, unit) for c, unit in zip(row["cells"], units)] for row in panel["rows"]]  # noqa: B905
            return _table([column["name"] for column in columns], rows)
        case "cards":
            return _table(["", ""], [[card["label"], cell_text(card["cell"])] for card in panel["cards"]])
        case "checks":
            outcome = {True: "passed", False: "failed", None: NOT_MEASURED}
            cells = (
                [r["name"], outcome[r["passed"]], cell_text(r["measured"]), cell_text(r["predicted"]), r["detail"]]
                for r in panel["rows"]
            )
            return _table(["check", "outcome", "measured", "predicted", "detail"], cells)
        case "facts":
            rows = [[row["name"], *map(cell_text, row["values"])] for row in panel["rows"]]
            return _table(["", *panel["columns"]], rows)
        case "bars":
            bars = panel["bars"]
            return _table(["", "value"], [[bar["label"], cell_text(bar["value"], panel["unit"])] for bar in bars])
        case "stacked":
            rows = [[r["label"], *(cell_text(v, panel["unit"]) for v in r["values"])] for r in panel["rows"]]
            return _table(["", *panel["parts"]], rows)
        case "missing":
            return f"<p>{NOT_MEASURED}: {escape(panel['why'])}</p>"
    return '<p class="muted">A chart: it needs JavaScript. Its numbers are in report.json.</p>'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def cell_text(cell: Any, unit: str = "") -> str:
    """A cell of a table in words: its text or its number with the unit, and the small line below."""
    match cell:
        case None:
            return NOT_MEASURED
        case dict():
            text = cell.get("text")
            shown = text if text is not None else cell_text(cell.get("value"), unit)
            return f"{shown} ({cell['sub']})" if cell.get("sub") else shown
        case bool() | str():
            return str(cell)
    is_whole = float(cell).is_integer() and abs(cell) < 1e15
    return f"{int(cell) if is_whole else format(cell, '.6g')} {unit}".rstrip()
