// The page: its state, its panels, and when they are drawn.

const KINDS = {
  table: tableOf,
  cards: cardsOf,
  curves: curvesOf,
  scatter: scatterOf,
  steps: stepsOf,
  bars: barsOf,
  stacked: stackedOf,
  histogram: histogramOf,
  heatmap: heatmapOf,
  checks: checksOf,
  facts: factsOf,
  missing: missingOf,
};
const TABLES = ["table", "cards", "checks", "facts"];

function fail(message) {
  document.documentElement.dataset.error = message;
  const box = find("page-failure");
  box.textContent = `This page has a fault, so part of it may be missing: ${message}`;
  box.hidden = false;
}
window.addEventListener("error", (event) => fail(event.message));
window.addEventListener("unhandledrejection", (event) => fail(String(event.reason)));

function pageOf(report) {
  const groups = new Map(report.groups.map((group, i) => [group.id, { ...group, look: lookOf(i) }]));
  const runs = new Map(report.series.map((run) => [run.id, run]));
  const steps = report.x_axes[0]?.key ?? "step";
  const view = { x: steps, y: "auto", smoothing: 0.8, hidden: new Set() };
  const page = { report, view, steps, listeners: [] };
  page.axis = (key) => report.x_axes.find((axis) => axis.key === key) ?? { label: String(key), unit: "" };
  page.owner = ({ series, group }) => {
    const run = runs.get(series) ?? null;
    const its = groups.get(group ?? run?.group) ?? null;
    return { run, group: its, look: its?.look ?? PLAIN };
  };
  const idsOf = ({ series, group }) => {
    if (runs.has(series)) return [series];
    return group === null || group === undefined
      ? []
      : report.series.filter((run) => run.group === group).map((run) => run.id);
  };
  page.isHidden = (item) => {
    const ids = idsOf(item);
    return ids.length > 0 && ids.every((id) => view.hidden.has(id));
  };
  // Attributes of an element that pales when all its runs are hidden.
  page.dimmable = (item) => ({ "data-runs": idsOf(item).join(" ") || null });
  page.change = (changes) => {
    Object.assign(view, changes);
    page.listeners.forEach((listener) => listener());
  };
  return page;
}

function buildSections(page) {
  const panels = [];
  for (const section of page.report.sections) {
    const grid = h("div", { class: "panels" });
    const built = section.panels.map((panel) => buildPanel(panel, page));
    widenOdd(built);
    grid.append(...built.map(({ element }) => element));
    find("page-sections").append(
      h(
        "section",
        { id: section.id },
        h("h2", null, section.title),
        section.text ? h("p", { class: "text" }, section.text) : null,
        grid,
      ),
    );
    panels.push(...built);
  }
  return panels;
}

// A panel that cannot be made or drawn says so in its place; the others go on.
function buildPanel(panel, page) {
  const box = h("div", { class: "body" });
  const guarded = (work) => {
    try {
      work();
    } catch (error) {
      box.replaceChildren(h("p", { class: "missing" }, `This panel could not be drawn: ${error.message}`));
      fail(`${panel.title}: ${error.message}`);
    }
  };
  const tools = h("span", { class: "tools" });
  const element = h(
    "article",
    { class: `panel ${TABLES.includes(panel.kind) ? "wide" : ""}`, "data-kind": panel.kind },
    h(
      "header",
      null,
      h("div", null, h("h3", null, panel.title), tools),
      panel.note ? h("p", { class: "note" }, panel.note) : null,
    ),
    box,
  );
  const built = { element, kind: panel.kind, draw: null, follows: false };
  guarded(() => {
    const made = (Object.hasOwn(KINDS, panel.kind) ? KINDS[panel.kind] : unknownOf)(panel, page);
    box.append(made.body ?? made);
    tools.append(...(made.tools ?? []));
    if (made.draw) Object.assign(built, { draw: () => guarded(made.draw), follows: made.follows });
  });
  return built;
}

// Charts stand in pairs; of an odd number in a row the first has the width for itself.
function widenOdd(panels) {
  let start = 0;
  panels.concat({ element: h("i", { class: "wide" }) }).forEach(({ element }, i) => {
    if (!element.classList.contains("wide")) return;
    if ((i - start) % 2 === 1) panels[start].element.classList.add("wide");
    start = i + 1;
  });
}

// Draws panels near the window at once and the others when there is time, so that printing and searching find all.
function drawWhenNear(panels, done) {
  const dirty = new Set();
  const near = new Set(panels);
  let frame = 0;
  let later = 0;
  const drawAll = (some) =>
    some.forEach((panel) => {
      dirty.delete(panel);
      panel.draw();
    });
  const rest = () => {
    const next = dirty.values().next().value;
    if (next === undefined) return done();
    drawAll([next]);
    later = setTimeout(rest, 0);
    return undefined;
  };
  const request = (some) => {
    some.forEach((panel) => dirty.add(panel));
    clearTimeout(later);
    later = setTimeout(rest, 150);
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(() => drawAll([...dirty].filter((panel) => near.has(panel))));
  };
  if ("IntersectionObserver" in window) {
    near.clear();
    const byElement = new Map(panels.map((panel) => [panel.element, panel]));
    const observer = new IntersectionObserver(
      (entries) => {
        for (const { target, isIntersecting } of entries)
          near[isIntersecting ? "add" : "delete"](byElement.get(target));
        drawAll([...dirty].filter((panel) => near.has(panel)));
      },
      { rootMargin: "400px" },
    );
    panels.forEach((panel) => observer.observe(panel.element));
  }
  window.addEventListener("beforeprint", () => drawAll([...dirty]));
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    // A phone's own bars change the height alone.
    if (window.innerWidth !== width) request(panels);
    width = window.innerWidth;
  });
  return request;
}

function sayProblems(page) {
  const bad = page.report.series.filter((run) => run.state !== "finished" || run.problem);
  if (!bad.length) return;
  find("page-sections").before(
    h(
      "ul",
      { class: "problems" },
      bad.map((run) =>
        h(
          "li",
          null,
          swatch(page.owner({ series: run.id }).look),
          h("b", null, run.name),
          ` ${run.state}`,
          run.problem ? `: ${run.problem}` : "",
        ),
      ),
    ),
  );
}

// #theme=dark&x=seconds&y=log&smoothing=0.6 sets the view; any other hash is a section.
function readHash(page) {
  if (!location.hash.includes("=")) return;
  const asked = new URLSearchParams(location.hash.slice(1));
  if (["light", "dark"].includes(asked.get("theme"))) setTheme(asked.get("theme"));
  const changes = {};
  if (page.report.x_axes.some((axis) => axis.key === asked.get("x"))) changes.x = asked.get("x");
  if (["auto", "linear", "log"].includes(asked.get("y"))) changes.y = asked.get("y");
  if (asked.has("smoothing")) changes.smoothing = Math.min(0.99, Math.max(0, Number(asked.get("smoothing")) || 0));
  page.change(changes);
}

function start() {
  const page = pageOf(readReport());
  const panels = buildSections(page);
  sayProblems(page);
  buildBar(page);
  const request = drawWhenNear(
    panels.filter((panel) => panel.draw),
    () => {
      document.documentElement.dataset.ready = "1";
    },
  );
  const following = panels.filter((panel) => panel.draw && panel.follows);
  page.listeners.push(() => {
    document.querySelectorAll("[data-runs]").forEach((element) => {
      element.classList.toggle(
        "off",
        element.dataset.runs.split(" ").every((id) => page.view.hidden.has(Number(id))),
      );
    });
    request(following);
  });
  window.addEventListener("hashchange", () => readHash(page));
  page.change({});
  readHash(page);
  request(panels.filter((panel) => panel.draw));
  find(location.hash.slice(1))?.scrollIntoView();
}

try {
  start();
} catch (error) {
  fail(error.message);
}
