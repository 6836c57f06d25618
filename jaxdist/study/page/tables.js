// Panels that are tables: table, cards, checks, facts, and kinds that this page does not know.

const cellOf = (cell) =>
  cell !== null && typeof cell === "object" ? cell : typeof cell === "number" ? { value: cell } : { text: cell };

const isUnknown = (cell) => (cellOf(cell).text ?? cellOf(cell).value ?? null) === null;

function cellNodes(cell, unit) {
  const { value, text, sub } = cellOf(cell);
  const unknown = isUnknown(cell);
  const shown = text ?? formatValue(value, unit);
  return [h("span", { class: unknown ? "unknown" : "value" }, shown), sub ? h("small", null, sub) : null];
}

function cellHint(cell, unit) {
  const { value, hint } = cellOf(cell);
  const number = typeof value === "number" ? exact(value, unit) : null;
  return [hint, number].filter(Boolean).join("\n") || null;
}

const isNumber = (cell) => typeof cellOf(cell).value === "number";

function tableOf(panel, page) {
  const { columns, rows } = panel;
  const best = columns.map((column, i) =>
    bestOf(
      column.better,
      rows.map((row) => cellOf(row.cells[i]).value),
    ),
  );
  const isNumeric = columns.map(
    (_, i) => rows.some((row) => isNumber(row.cells[i])) || (i > 0 && rows.every((row) => isUnknown(row.cells[i]))),
  );
  const body = h("tbody");
  const lines = rows.map((row) => {
    const owner = page.owner(row);
    const cells = row.cells.map((cell, i) => {
      const { value, state } = cellOf(cell);
      const isBest = typeof value === "number" && value === best[i];
      const kind = [isNumeric[i] ? "number" : "", state ?? "", isBest ? "best" : ""].join(" ");
      const content = cellNodes(cell, columns[i]?.unit);
      if (isBest) content.unshift(h("span", { class: "star", title: "best of its column" }, "★"));
      if (i === 0 && (owner.run || owner.group)) content.unshift(swatch(owner.look));
      return h(
        i === 0 ? "th" : "td",
        { class: kind, scope: i === 0 ? "row" : null, title: cellHint(cell, columns[i]?.unit) },
        content,
      );
    });
    return h("tr", page.dimmable(row), cells);
  });
  const sorted = { column: null, direction: 1 };
  const heads = columns.map((column, i) => {
    const button = h("button", { type: "button", title: column.hint || null, onclick: () => sort(i) }, column.name);
    return h("th", { scope: "col", class: isNumeric[i] ? "number" : null }, button);
  });
  function sort(i) {
    // up, down, as it came
    if (sorted.column !== i) Object.assign(sorted, { column: i, direction: 1 });
    else if (sorted.direction === 1) sorted.direction = -1;
    else sorted.column = null;
    heads.forEach((head, k) => {
      if (k === sorted.column) head.setAttribute("aria-sort", sorted.direction > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
    const order = rows.map((_, k) => k);
    if (sorted.column !== null)
      order.sort((a, b) => compareCells(rows[a].cells[i], rows[b].cells[i], sorted.direction));
    body.replaceChildren(...order.map((k) => lines[k]));
  }
  body.append(...lines);
  return scrolling(panel, h("table", null, h("thead", null, h("tr", null, heads)), body), rows.length === 0);
}

const scrolling = (panel, table, empty) =>
  h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": panel.title },
    empty ? h("p", { class: "muted" }, "No rows.") : table,
  );

// The best of a column; null where nothing was compared or all are equal.
function bestOf(better, values) {
  const numbers = values.filter((value) => typeof value === "number");
  if (!better || new Set(numbers).size < 2) return null;
  return better === "min" ? Math.min(...numbers) : Math.max(...numbers);
}

// Numbers before texts before what was not measured, whichever way numbers go.
function compareCells(a, b, direction) {
  const rank = (cell) => (isNumber(cell) ? 0 : (cellOf(cell).text ?? null) === null ? 2 : 1);
  if (rank(a) !== rank(b)) return rank(a) - rank(b);
  if (rank(a) === 0) return (cellOf(a).value - cellOf(b).value) * direction;
  return String(cellOf(a).text).localeCompare(String(cellOf(b).text), undefined, { numeric: true }) * direction;
}

function cardsOf(panel, page) {
  const cards = panel.cards.map(({ label, cell, group }) => {
    const owner = page.owner({ group });
    return h(
      "div",
      { class: `card ${cellOf(cell).state ?? ""}`, title: cellHint(cell, ""), ...page.dimmable({ group }) },
      h("span", { class: "label" }, owner.group ? swatch(owner.look) : null, label),
      cellNodes(cell, cellOf(cell).unit),
    );
  });
  return h("div", { class: "cards" }, cards);
}

function checksOf(panel, page) {
  const outcomes = new Map([
    [true, ["good", "✓", "passed"]],
    [false, ["bad", "✗", "failed"]],
    [null, ["muted", "–", NOT_MEASURED]],
  ]);
  const rows = panel.rows.map((row) => {
    const [state, sign, word] = outcomes.get(row.passed ?? null);
    const owner = page.owner(row);
    return h(
      "tr",
      page.dimmable(row),
      h("th", { scope: "row" }, owner.run ? swatch(owner.look) : null, h("span", null, row.name)),
      h("td", { class: `outcome ${state}` }, h("span", { class: "sign", "aria-hidden": "true" }, sign), word),
      h("td", { class: "number", title: cellHint(row.measured) }, cellNodes(row.measured)),
      h("td", { class: "number", title: cellHint(row.predicted) }, cellNodes(row.predicted)),
      h("td", { class: "detail" }, row.detail),
    );
  });
  const heads = ["check", "outcome", "measured", "predicted", ""].map((name, i) =>
    h("th", { scope: "col", class: i === 2 || i === 3 ? "number" : null }, name),
  );
  const measured = panel.rows.filter((row) => row.passed !== null && row.passed !== undefined);
  const passed = measured.filter((row) => row.passed).length;
  return h(
    "div",
    null,
    h(
      "p",
      { class: "summary" },
      `${passed} of ${measured.length} checks passed`,
      measured.length < panel.rows.length ? `; ${panel.rows.length - measured.length} ${NOT_MEASURED}` : "",
    ),
    scrolling(
      panel,
      h("table", null, h("thead", null, h("tr", null, heads)), h("tbody", null, rows)),
      rows.length === 0,
    ),
  );
}

function factsOf(panel) {
  const rows = panel.rows.map((row) =>
    h(
      "tr",
      { class: row.differs ? "differs" : "same" },
      h("th", { scope: "row" }, row.name),
      row.values.map((value) => h("td", null, value ?? h("span", { class: "unknown" }, NOT_MEASURED))),
    ),
  );
  const box = h("div", { class: panel.only_differing ? "only-differing" : null });
  const count = panel.rows.filter((row) => row.differs).length;
  const toggle = h("input", {
    type: "checkbox",
    checked: panel.only_differing,
    onchange: () => box.classList.toggle("only-differing", toggle.checked),
  });
  const head = h(
    "tr",
    null,
    ["", ...panel.columns].map((name) => h("th", { scope: "col" }, name)),
  );
  box.append(
    h("label", { class: "check" }, toggle, `only what differs (${count} of ${panel.rows.length})`),
    scrolling(
      panel,
      h("table", { class: "facts" }, h("thead", null, head), h("tbody", null, rows)),
      rows.length === 0,
    ),
  );
  return box;
}

const missingOf = (panel) => h("p", { class: "missing" }, h("b", null, `${NOT_MEASURED}: `), panel.why);

function unknownOf(panel) {
  const rows = Object.entries(panel).map(([key, value]) =>
    h("tr", null, h("th", { scope: "row" }, key), h("td", null, h("code", null, JSON.stringify(value)))),
  );
  return h(
    "div",
    null,
    h("p", { class: "muted" }, "This page knows no such panel; this is what it holds."),
    scrolling(panel, h("table", { class: "facts" }, h("tbody", null, rows))),
  );
}
