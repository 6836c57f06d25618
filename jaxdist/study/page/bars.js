// Rows of bars: one measure (bars) or the parts of a whole (stacked).

function barsOf(panel, page) {
  const { unit, log, bars, mark } = panel;
  const values = bars
    .flatMap((bar) => [bar.value, bar.low ?? null, bar.high ?? null])
    .concat(mark ? [mark.value] : []);
  const [low, high] = domainOf(log ? values : values.concat(0), log, 0);
  const scale = scaleOf(log ? [low / 1.5, high] : [low, high === low ? low + 1 : high], [0, 100], log);
  const usable = (value) => typeof value === "number" && (!log || value > 0);
  const share = (value) => `${scale(value).toFixed(2)}%`;
  const zero = log ? scale.low : 0;
  const rows = bars.map((bar) => {
    const owner = page.owner(bar);
    const ends = usable(bar.value) ? [Math.min(bar.value, zero), Math.max(bar.value, zero)].map(scale) : null;
    const track = h(
      "div",
      { class: "track" },
      ends
        ? h("div", {
            class: "fill",
            "--from": `${ends[0]}%`,
            "--long": `${ends[1] - ends[0]}%`,
            "--c": owner.look.colour,
          })
        : null,
      usable(bar.low) && usable(bar.high)
        ? h("div", { class: "span", "--from": share(bar.low), "--long": `${scale(bar.high) - scale(bar.low)}%` })
        : null,
      mark && usable(mark.value) ? h("div", { class: "at", "--from": share(mark.value) }) : null,
    );
    const hint = [
      bar.hint,
      typeof bar.value === "number" ? exact(bar.value, unit) : null,
      typeof bar.low === "number" && typeof bar.high === "number"
        ? `${exact(bar.low, unit)} to ${exact(bar.high, unit)}`
        : null,
    ];
    return h(
      "div",
      { class: "bar-row", title: hint.filter(Boolean).join("\n"), ...page.dimmable(bar) },
      h("span", { class: "name" }, owner.group ? swatch(owner.look) : null, bar.label),
      track,
      h("span", { class: typeof bar.value === "number" ? "number" : "unknown" }, formatValue(bar.value, unit)),
    );
  });
  return h(
    "div",
    { class: "bars" },
    rows.length ? rows : h("p", { class: "muted" }, "No bars."),
    mark
      ? h("p", { class: "key" }, h("i", { class: "at" }), `${mark.label}: ${formatValue(mark.value, unit)}`)
      : null,
    log ? h("p", { class: "key" }, "The lengths are logarithmic.") : null,
  );
}

function stackedOf(panel, page) {
  const { unit, parts, rows } = panel;
  const totals = rows.map((row) => row.values.reduce((sum, value) => sum + (value ?? 0), 0));
  const longest = Math.max(...totals, Number.MIN_VALUE);
  const tone = (k) => ({ "--c": `var(--s${k % 8})` });
  const percent = (value, total) => formatValue(total > 0 ? Number(((100 * value) / total).toPrecision(3)) : 0, "%");
  const lines = rows.map((row, r) => {
    const owner = page.owner(row);
    const pieces = row.values.map((value, k) => {
      if (!value) return null;
      const share = value / totals[r];
      const says = `${parts[k]}: ${formatValue(value, unit)}, ${percent(value, totals[r])}`;
      const isWide = (share * totals[r]) / longest > 0.07;
      return h(
        "div",
        { class: "piece", title: says, "--long": `${(100 * value) / longest}%`, ...tone(k) },
        isWide ? `${Math.round(100 * share)}%` : "",
      );
    });
    return h(
      "div",
      { class: "bar-row", ...page.dimmable(row) },
      h("span", { class: "name" }, owner.group ? swatch(owner.look) : null, row.label),
      h("div", { class: "track pieces" }, pieces),
      h("span", { class: "number" }, cellNodes(row.values.some((value) => value !== null) ? totals[r] : null, unit)),
    );
  });
  const legend = h(
    "ul",
    { class: "legend" },
    parts.map((part, k) => h("li", null, h("i", { class: "tone", ...tone(k) }), part)),
  );
  const table = h(
    "table",
    null,
    h(
      "thead",
      null,
      h(
        "tr",
        null,
        h("th"),
        parts.map((part) => h("th", { scope: "col", class: "number" }, part)),
      ),
    ),
    h(
      "tbody",
      null,
      rows.map((row, r) =>
        h(
          "tr",
          page.dimmable(row),
          h("th", { scope: "row" }, row.label),
          row.values.map((value) =>
            h(
              "td",
              { class: "number", title: cellHint(value, unit) },
              cellNodes(value, unit),
              value ? h("small", null, percent(value, totals[r])) : null,
            ),
          ),
        ),
      ),
    ),
  );
  return h(
    "div",
    { class: "bars" },
    legend,
    lines.length ? lines : h("p", { class: "muted" }, "No rows."),
    h("details", null, h("summary", null, "the numbers"), scrolling(panel, table)),
  );
}
