"""The page of a report: what is in the file, and what a real browser makes of it."""

import html.parser
import json
import re
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.study.page import page_text, write_page
from jaxdist.study.page.embed import pack, unpack
from jaxdist.study.page.plain import cell_text

HOSTILE = ["<script>alert(1)</script>", "</script><b>", "\"quotes\" & 'more'", "🦔 \u2028 line", "a" * 80]
AXES = [
    {"key": "step", "label": "steps", "unit": ""},
    {"key": "seconds", "label": "wall time", "unit": "s"},
    {"key": "bytes", "label": "bytes sent", "unit": "B"},
]


def report_of(panels, names=HOSTILE):
    """One section of the panels, and a run of its own group for each name."""
    return {
        "schema": 1, "title": "A report of <b>names</b>", "subtitle": "", "created": "2026-01-01T00:00:00Z",
        "jaxdist": "0.1.0", "x_axes": AXES,
        "groups": [{"id": i, "name": name} for i, name in enumerate(names)],
        "series": [{"id": i, "name": f"{name} · seed 0", "group": i, "state": "torn" if i == 1 else "finished",
                    "problem": "cut off </script>" if i == 1 else None} for i, name in enumerate(names)],
        "sections": [{"id": "verdict", "title": "Verdict", "text": "All <i>well</i>.", "panels": panels}],
    }  # fmt: skip


def line(run, x, y, name=None, **more):
    name = f"{HOSTILE[run]} · seed 0" if name is None else name
    return {"series": run, "group": run, "name": name, "dash": False, "x": x, "y": y, "line_numbers": None} | more


def by_step(steps):
    return {"step": steps, "seconds": [0.5 * s for s in steps], "bytes": [1000 * s for s in steps]}


def curves(lines, log=False, **more):
    return {"kind": "curves", "title": "Curves", "note": "", "x": None, "y": axis("loss", log), "lines": lines} | more


def axis(label, log=False, unit=""):
    return {"label": label, "unit": unit, "log": log}


def column(name, unit="", better=None):
    return {"name": name, "unit": unit, "better": better, "hint": ""}


def every_kind():
    """Each kind of panel, with what breaks pages: hostile names, nulls, one point, none, extremes, constants."""
    steps = list(range(1, 21))
    cell = {"value": 1e-12, "text": None, "sub": "1 to <2>", "state": "good", "hint": '"hint"'}
    lines = [
        line(0, by_step(steps), [2 / s for s in steps], line_numbers=[10 * s for s in steps]),
        line(1, by_step([3]), [1.5]),
        line(2, {"step": steps}, [None if s % 3 == 0 else 1e-12 * s for s in steps], dash=True, marker=True),
        line(3, by_step(steps), [1e15] * 20),
        line(4, by_step([]), []),
    ]
    points = [
        {"series": i, "group": i, "x": x, "y": y, "label": HOSTILE[i], "muted": i == 0} | dict.fromkeys(
            ("xlow", "xhigh", "ylow", "yhigh"), None) for i, (x, y) in enumerate([(1, 1e-12), (2, 1e15), (None, 3)])
    ]  # fmt: skip
    points[1] |= {"xlow": 1.5, "xhigh": 3}
    bar = {"series": None, "group": None, "low": None, "high": None, "hint": ""}
    check = {"series": None, "measured": cell, "predicted": None, "detail": "</td>"}
    return [
        {"kind": "cards", "title": "Cards", "note": "", "cards": [
            {"label": HOSTILE[0], "cell": cell, "group": 0}, {"label": "b", "cell": None, "group": None},
            {"label": "c", "cell": "text", "group": None}]},
        {"kind": "table", "title": HOSTILE[1], "note": HOSTILE[0],
         "columns": [column("run"), column("time", "s", "min"), column("bytes", "B"), column("gain", "×", "max")],
         "rows": [{"group": 0, "series": None, "cells": [HOSTILE[0], 92.5, 1234567, None]},
                  {"group": 1, "series": 1, "cells": [HOSTILE[1], 80, 0, cell]},
                  {"group": None, "series": None, "cells": ["none", None, 1e15, "text"]}]},
        {"kind": "table", "title": "No rows", "note": "", "columns": [column("run")], "rows": []},
        curves(lines, bands=[{"axis": "y", "low": 0.1, "high": 0.2, "label": "band"}],
               marks=[{"axis": "y", "value": 0.5, "label": HOSTILE[0]}, {"axis": "x", "value": 7, "label": "x"}]),
        curves(lines, log=True),
        curves([]),
        curves([line(3, by_step(steps), [0.0] * 20), line(3, by_step(steps), [None] * 20)], log=True),
        curves([line(0, [0.1, 1, 10], [-1, 0, 1], name="own x")], x=axis("rate", log=True)),
        {"kind": "scatter", "title": "Scatter", "note": "", "x": axis("time", unit="s"),
         "y": axis("bytes", True, "B"), "points": points, "front": [[1, 1e-12], [2, 1e15]]},
        {"kind": "scatter", "title": "No points", "note": "", "x": axis("x"), "y": axis("y"), "points": [],
         "front": None},
        {"kind": "steps", "title": "Profile", "note": "", "x": axis("tau"), "y": axis("share"),
         "lines": [{"group": i, "name": HOSTILE[i], "x": [1, 2, 4], "y": [0, 0.5, 1]} for i in range(2)]},
        {"kind": "bars", "title": "Bars", "note": "", "unit": "s", "log": True,
         "mark": {"value": 5, "label": "limit"}, "bars": [
             bar | {"label": HOSTILE[0], "value": 1e-12}, bar | {"label": "b", "value": None},
                  bar | {"label": "c", "value": 1e15, "low": 1e14, "high": 1e16}]},
        {"kind": "bars", "title": "No bars", "note": "", "unit": "", "log": False, "bars": [], "mark": None},
        {"kind": "stacked", "title": "Stacked", "note": "", "unit": "s", "parts": ["a", HOSTILE[0]],
         "rows": [{"label": "r", "series": 0, "values": [3, 1]},
                  {"label": "s", "series": None, "values": [None, 0]}]},
        {"kind": "histogram", "title": "Histogram", "note": "", "x": {"label": "staleness", "unit": ""},
         "rows": [{"label": HOSTILE[0], "series": 0, "edges": [0, 1, 2, 3], "counts": [5, 0, 2]},
                  {"label": "none", "series": None, "edges": [0], "counts": []}]},
        {"kind": "heatmap", "title": "Heatmap", "note": "", "x": {"label": "step"}, "y": {"label": "worker"},
         "columns": ["0", HOSTILE[0]], "rows": ["a", "b"], "values": [[1, None], [1e15, 1e-12]], "unit": ""},
        {"kind": "checks", "title": "Checks", "note": "", "rows": [
            {"name": HOSTILE[0], "passed": True} | check, {"name": "b", "passed": False} | check,
            {"name": "c", "passed": None} | check]},
        {"kind": "facts", "title": "Facts", "note": "", "columns": HOSTILE[:2], "only_differing": True, "rows": [
            {"name": "git", "values": ["1", "1"], "differs": False},
            {"name": "seed", "values": [HOSTILE[0], None], "differs": True}]},
        {"kind": "missing", "title": "Missing", "note": "", "why": "nobody <measured> it"},
        {"kind": "of tomorrow", "title": "Unknown", "note": "", "held": {"deep": [1, HOSTILE[0]]}},
    ]  # fmt: skip


def embedded(text):
    return json.loads(re.search(r'<script type="application/json" id="page-report">(.*?)</script>', text, re.S)[1])


class Elements(html.parser.HTMLParser):
    """What is drawn in each panel, in order: {kind, text, classes counted, values of data-* attributes}."""

    VOID = ("meta", "br", "input", "link", "img", "hr")

    def __init__(self, text):
        super().__init__()
        self.root, self.panels, self.alerts, self.stack = {}, [], [], []
        self.text = Counter()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = {name: value or "" for name, value in attributes}
        if tag == "html":
            self.root = attributes
        if tag == "article":
            self.panels.append({"kind": attributes["data-kind"], "text": "", "classes": Counter(), "data": []})
        if self.panels and "article" in [*self.stack, tag]:
            self.panels[-1]["classes"].update(attributes.get("class", "").split())
            names = ("data-line", "data-point", "data-row")
            self.panels[-1]["data"] += [attributes[name] for name in names if name in attributes]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag in self.stack:
            while self.stack.pop() != tag:
                pass

    def handle_data(self, data):
        if "noscript" in self.stack or "script" in self.stack:
            return
        self.text[data.strip()] += 1
        if "article" in self.stack:
            self.panels[-1]["text"] += data + " "


def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    return found


def opened(path, profile, fragment="", width=1200):
    """The document after a browser has drawn it."""
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
        "--virtual-time-budget=20000", f"--window-size={width},900", "--dump-dom", f"{path.as_uri()}{fragment}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The page of every kind of panel, as drawn on a phone's width in the dark."""
    folder = tmp_path_factory.mktemp("page")
    write_page(report_of(every_kind()), folder / "report.html")
    return Elements(opened(folder / "report.html", folder / "profile", "#theme=dark", width=500))


def test_what_a_page_embeds_is_the_report_to_the_last_bit():
    rng = np.random.default_rng(0)
    float32 = [float(np.float32(v)) for v in rng.normal(size=50)]
    report = report_of(
        [curves([line(0, by_step(list(range(50))), float32), line(1, by_step(list(range(50))), float32)])]
    )
    report["more"] = [rng.normal(size=50).tolist(), [*float32, None], [1] * 20, [1.0] * 20, [1e300] * 20, [True] * 20]
    assert unpack(embedded(page_text(report))) == report
    kinds = [[type(v) for v in values] for values in unpack(embedded(page_text(report)))["more"]]
    assert kinds == [[type(v) for v in values] for values in report["more"]]  # 1 == 1.0 == True
    assert unpack(embedded(page_text(report_of(every_kind())))) == report_of(every_kind())


def test_lines_that_share_an_axis_store_it_once():
    steps = by_step(list(range(1000)))
    packed = pack([curves([line(i % 2, steps, [float(i)] * 1000)]) for i in range(5)])
    assert len(packed["arrays"]) == 3 + 5


@given(st.lists(st.integers(0, 10**6), min_size=20, max_size=20), st.integers(-50, 50), st.integers(-9, 9),
       st.integers(1, 5), st.booleans())  # fmt: skip
def test_a_list_that_goes_with_another_comes_back_exactly(steps, times, plus, over, is_bent):
    scaled = [over * step for step in steps]
    other = [times * step + plus for step in steps]
    other[7] += is_bent
    report = {"lists": [scaled, other, [2**60 + step for step in steps]]}
    assert unpack(json.loads(json.dumps(pack(report)))) == report


def test_a_list_that_goes_with_the_steps_takes_no_room():
    steps = list(range(10, 10_000, 10))
    said = pack({"x": [steps, [256 * step for step in steps], [step // 10 + 3 for step in steps]]})["arrays"]
    assert said[1:] == [
        {"array": 0, "times": 256, "plus": 0, "over": 1},
        {"array": 1, "times": 1, "plus": 7680, "over": 2560},
    ]


def test_a_page_of_ten_runs_with_a_thousand_points_in_ten_panels_is_below_2_mb():
    rng = np.random.default_rng(0)
    names = [f"run {i}" for i in range(10)]
    axes = [by_step(list(range(1, 10_001, 10))) | {"seconds": np.cumsum(rng.random(1000)).tolist()} for _ in names]
    numbers = list(range(1, 1001))
    panels = [
        curves([line(i, axes[i], rng.normal(size=1000).astype("float32").tolist(), names[i], line_numbers=numbers)
                for i in range(10)]) for _ in range(10)
    ]  # fmt: skip
    assert len(page_text(report_of(panels, names)).encode()) < 2_000_000


def test_a_page_can_load_nothing_and_runs_only_its_own_script():
    text = page_text(report_of(every_kind()))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert not re.search(r"\b(src|href|action|data|srcset|poster)\s*=\s*[\"']?(https?:|//|file:)", text)
    assert not re.search(r"url\(\s*[\"']?(?!#)", text)
    assert not re.search(r"@import|innerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|XMLHttpRequest", text)
    assert text.count("</script>") == 2  # the report's and the page's: no name closes either


def test_a_number_that_json_has_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_page(report_of([curves([line(0, by_step([1]), [float("nan")])])]), tmp_path / "report.html")


def test_without_javascript_every_cell_is_there_to_read():
    text = page_text(report_of(every_kind()))
    plain = re.search(r"<noscript>(.*?)</noscript>", text, re.S)[1]
    cells = [re.sub(r"\s+", " ", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", plain, re.S)]
    assert "<script" not in plain
    for panel in every_kind():
        if panel["kind"] == "table":
            wanted = [
                cell_text(c, k["unit"])
                for row in panel["rows"]
                for c, k in zip(row["cells"], panel["columns"], strict=True)
            ]
        elif panel["kind"] == "cards":
            wanted = [cell_text(card["cell"]) for card in panel["cards"]]
        elif panel["kind"] == "facts":
            wanted = [value or "not measured" for row in panel["rows"] for value in row["values"]]
        else:
            continue
        assert {html_of(text) for text in wanted} <= set(cells)
    assert "<h1>A report of &lt;b&gt;names&lt;/b&gt;</h1>" in text
    assert "All &lt;i&gt;well&lt;/i&gt;." in plain
    assert "not measured: nobody &lt;measured&gt; it" in plain


def html_of(text):
    return re.sub(r"\s+", " ", html.escape(text))


def test_a_cell_in_words_has_its_number_unit_and_small_line():
    assert (
        cell_text({"value": 92.5, "text": None, "sub": "90 to 95", "state": None, "hint": ""}, "s")
        == "92.5 s (90 to 95)"
    )
    assert cell_text({"value": 92.5, "text": "3 of 3", "sub": ""}, "s") == "3 of 3"
    assert cell_text(None, "s") == cell_text({"value": None, "text": None, "sub": ""}, "s") == "not measured"


@pytest.mark.processes
def test_a_browser_draws_every_kind_of_panel_and_finds_no_fault(drawn):
    assert drawn.root.get("data-error") is None
    assert drawn.root["data-ready"] == "1"
    assert drawn.root["data-theme"] == "dark"
    assert [panel["kind"] for panel in drawn.panels] == [panel["kind"] for panel in every_kind()]
    assert all("could not be drawn" not in panel["text"] for panel in drawn.panels)


@pytest.mark.processes
def test_every_panel_shows_its_marks(drawn):
    found = {}
    for panel in drawn.panels:
        found.setdefault(panel["kind"], []).append(panel)
    first = found["curves"][0]
    assert first["data"] == [f"{name} · seed 0" for name in HOSTILE]
    assert first["classes"]["mark"] == 2
    assert first["classes"]["band"] == 1
    assert "No lines." in found["curves"][2]["text"]
    assert "No value is positive" in found["curves"][3]["text"]
    assert found["scatter"][0]["data"] == HOSTILE[:2]
    assert f"not measured: {HOSTILE[2]}" in found["scatter"][0]["text"]
    assert found["scatter"][0]["classes"]["front"] == 1
    assert found["steps"][0]["data"] == HOSTILE[:2]
    assert found["bars"][0]["classes"]["fill"] == 2
    assert found["stacked"][0]["classes"]["piece"] == 2
    assert found["histogram"][0]["data"] == HOSTILE[:1]
    assert found["heatmap"][0]["classes"]["heat"] == 4
    assert found["heatmap"][0]["classes"]["none"] == 2  # the rectangle and the stroke through it
    assert "1 of 2 checks passed; 1 not measured" in re.sub(r"\s+", " ", found["checks"][0]["text"]).replace(
        " ;", ";"
    )
    assert found["facts"][0]["classes"]["differs"] == found["facts"][0]["classes"]["same"] == 1
    assert "not measured: nobody <measured> it" in re.sub(r"\s+", " ", found["missing"][0]["text"])
    assert json.dumps({"deep": [1, HOSTILE[0]]}, separators=(",", ":")) in found["of tomorrow"][0]["text"]


@pytest.mark.processes
def test_names_are_shown_as_text_and_values_with_units(drawn):
    table = drawn.panels[1]
    assert table["text"].startswith(HOSTILE[1])  # its title
    for name in HOSTILE[:2]:
        assert name in table["text"]
    assert "92.5\u202fs" in table["text"]
    assert "1.23\u202fMB" in table["text"]
    assert "10⁻¹²×" in table["text"]
    assert table["classes"]["best"] == 1  # the shorter time; a single gain is the best of nothing
    assert table["classes"]["unknown"] == 2
    assert drawn.text[f"{HOSTILE[1]} · seed 0"] >= 1  # among the runs that need care
    assert any("torn" in text for text in drawn.text)


@pytest.mark.processes
def test_a_panel_that_cannot_be_drawn_says_so_and_the_others_go_on(tmp_path):
    broken = {"kind": "curves", "title": "Broken", "note": ""}
    write_page(report_of([broken, every_kind()[1]]), tmp_path / "report.html")
    page = Elements(opened(tmp_path / "report.html", tmp_path / "profile"))
    assert page.root["data-error"].startswith("Broken: ")
    assert page.root["data-ready"] == "1"
    assert "This panel could not be drawn" in page.panels[0]["text"]
    assert "92.5" in page.panels[1]["text"]
    assert any("This page has a fault" in text for text in page.text)


DRIVER = r"""
<script>
const wait = () => new Promise((done) => setTimeout(done, 400));
const chart = () => document.querySelector("article[data-kind=curves]");
const press = (key) => chart().querySelector(".canvas").dispatchEvent(new KeyboardEvent("keydown", { key }));
const lines = () => [...chart().querySelectorAll("[data-line]")].map((path) => path.dataset.line);
const ticks = () => [...chart().querySelectorAll(".axes text")].map((text) => text.textContent);
const said = () => document.querySelector("#page-tooltip").innerText;
(async () => {
  const found = {};
  await wait();
  found.all = lines();
  document.querySelector(".chip .group").click();
  await wait();
  found.hidden = lines();
  document.querySelector(".chip .group").click();
  const last = [...document.querySelectorAll(".chip .group")].at(-1);
  last.dispatchEvent(new MouseEvent("click", { shiftKey: true }));
  await wait();
  found.alone = lines();
  last.dispatchEvent(new MouseEvent("click", { shiftKey: true }));
  await wait();
  found.again = lines();
  press("ArrowRight");
  for (let i = 0; i < 4; i++) press("ArrowRight");
  found.record = said();
  const { left, top, width } = chart().querySelector(".canvas").getBoundingClientRect();
  const at = { clientX: left + width / 2, clientY: top + 100, bubbles: true };
  chart().querySelector(".canvas").dispatchEvent(new PointerEvent("pointermove", at));
  found.hovered = said();
  const before = ticks();
  press("+");
  found.zoomed = ticks().join() !== before.join();
  press("Escape");
  found.reset = ticks().join() === before.join();
  const x = document.querySelector("#page-bar select");
  x.value = "seconds";
  x.dispatchEvent(new Event("change"));
  document.querySelector(".choice [data-key=log]").click();
  await wait();
  found.seconds = ticks();
  found.below = chart().querySelector(".below").innerText;
  document.querySelectorAll("thead button")[1].click();
  const rows = document.querySelectorAll("article[data-kind=table] tbody th");
  found.sorted = [...rows].map((cell) => cell.innerText.trim());
  const result = document.createElement("pre");
  result.id = "found";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
})();
</script>
"""


@pytest.mark.processes
def test_a_reader_can_hide_isolate_hover_zoom_switch_and_sort(tmp_path):
    names = ["sync", "async", "diloco"]
    steps = list(range(1, 201))
    losses = [[float(np.float32((1 + i) / s)) for s in steps] for i in range(3)]
    axes = [by_step(steps), by_step(steps), {"step": steps}]
    lines = [
        line(i, axes[i], losses[i], f"{names[i]} · seed 0", line_numbers=[2 * s for s in steps]) for i in range(3)
    ]
    rows = [
        {"group": i, "series": None, "cells": [name, t]}
        for i, (name, t) in enumerate(zip(names, (9, None, 3), strict=True))
    ]
    table = {
        "kind": "table",
        "title": "t",
        "note": "",
        "columns": [column("run"), column("time", "s", "min")],
        "rows": rows,
    }
    text = page_text(report_of([curves(lines), table], names))
    text = re.sub(r"<meta http-equiv.*?>", "", text)  # the policy would refuse the driver, as it should
    (tmp_path / "report.html").write_text(text.replace("</body>", DRIVER + "</body>"))
    dom = opened(tmp_path / "report.html", tmp_path / "profile")
    assert "data-error" not in dom[:300]
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)[1]))
    everything = [f"{name} · seed 0" for name in names]
    assert found["all"] == found["again"] == everything
    assert found["hidden"] == everything[1:]
    assert found["alone"] == everything[2:]
    assert "line 10 of metrics.jsonl" in found["record"]  # the fifth record, as recorded and not as smoothed
    assert re.search(r"loss\s+0\.2\s", found["record"])
    number = int(re.search(r"line (\d+) of metrics", found["hovered"])[1])
    step = int(re.search(r"steps\s+(\d+)", found["hovered"])[1])
    assert number == 2 * step
    assert 80 < step < 130  # the pointer is in the middle
    assert found["zoomed"]
    assert found["reset"]
    assert "wall time (s)" in found["seconds"]
    assert "not measured against wall time: diloco · seed 0" in found["below"]
    assert found["sorted"] == ["diloco", "sync", "async"]  # what was not measured stays last
