"""The page of a report: one HTML file that needs nothing else, drawn from a dictionary of panels.

    embed    the report as JSON inside a page: each list of numbers once
    plain    title, verdict and tables as HTML, for readers without JavaScript
    *.js     the page itself, joined in the order below into one strict function

The scripts know kinds of panel (curves, table, ...), not what is in them: a new panel needs no change here.
The page's Content-Security-Policy lets it run its own script and style, found by their hashes, and nothing more;
it can load nothing, from the network or from disk.
"""

import base64
import hashlib
import re
from importlib import resources
from pathlib import Path
from typing import Any

from jaxdist.study.page.embed import script_json
from jaxdist.study.page.plain import escape, plain_sections

SCRIPTS = (
    "dom.js",
    "format.js",
    "scale.js",
    "style.js",
    "tables.js",
    "chart.js",
    "lines.js",
    "curves.js",
    "scatter.js",
    "bars.js",
    "grids.js",
    "bar.js",
    "page.js",
)


def write_page(report: dict[str, Any], path: Path) -> None:
    """Write a report as one HTML file. Raises ValueError for numbers that JSON has not (NaN is null)."""
    path.write_text(page_text(report), encoding="utf-8", errors="replace")  # file names may be no Unicode


def page_text(report: dict[str, Any]) -> str:
    """The HTML of a report."""
    script = '(() => {\n"use strict";\n' + "\n".join(_file(name) for name in SCRIPTS) + "})();"
    style = _file("style.css")
    parts = {
        "title": escape(report["title"]),
        "subtitle": escape(report["subtitle"]),
        "policy": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'",
        "style": style,
        "script": script,
        "plain": plain_sections(report),
        "made": escape(f"Made {report['created']} by jaxdist {report['jaxdist']}."),
        "report": script_json(report),
    }
    # In one pass: what is put in is never searched for places.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _file("page.html"))


def _file(name: str) -> str:
    return resources.files("jaxdist.study.page").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
