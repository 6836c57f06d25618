"""What exactly ran: configs and how they differ, versions, commits, seeds, meshes, flags."""

from typing import Any

from jaxdist.config.dotted import flatten
from jaxdist.study.report.panels import Panel, section
from jaxdist.study.report.study import Run, Subject

OF_THE_RUN = ("run.dir", "name", "seed")  # of a config: not the variant's


def provenance(subject: Subject) -> dict[str, Any]:
    names = [run.name for run in subject.runs]
    configs = [flatten(run.of.config) for run in subject.runs]
    paths = dict.fromkeys(path for config in configs for path in config if path not in OF_THE_RUN)
    facts = [_facts_of(run) for run in subject.runs]
    return section(
        "provenance",
        "Provenance",
        [
            _panel("Config", names, {path: [_value(c, path) for c in configs] for path in paths}, len(names) > 1),
            _panel(
                "What ran",
                names,
                {n: [own.get(n) for own in facts] for n in dict.fromkeys(n for f in facts for n in f)},
            ),
        ],
    )


def _panel(title: str, columns: list[str], rows: dict[str, list[str | None]], only_differing: bool = False) -> Panel:
    return {
        "kind": "facts",
        "title": title,
        "note": "",
        "columns": columns,
        "rows": [{"name": n, "values": values, "differs": len(set(values)) > 1} for n, values in rows.items()],
        "only_differing": only_differing,
    }


def _facts_of(run: Run) -> dict[str, str | None]:
    summary = run.of.summary
    facts: dict[str, Any] = {
        "directory": run.of.path,
        "seed": run.seed,
        "git commit": summary.get("git_sha"),
        "mesh": summary and (summary.get("mesh") or "one device"),
    }
    for title, block in (("version of", "versions"), ("device", "devices"), ("host", "host"), ("", "environment")):
        facts |= {f"{title} {name}".strip(): value for name, value in run.of.told(block).items()}
    return {name: _text(value) for name, value in facts.items()}


def _value(config: dict[str, Any], path: str) -> str | None:
    """None for a run whose config is not there."""
    return (_text(config.get(path)) or "not set") if config else None


def _text(value: Any) -> str | None:
    if isinstance(value, dict):
        return " x ".join(f"{name} {own}" for name, own in value.items()) or None
    return None if value is None else str(value)
