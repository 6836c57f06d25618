// Histograms, one above the other over a shared x, and heatmaps.

function histogramOf(panel, page) {
  const tall = 58;
  const usable = panel.rows.filter((row) => row.counts.length > 0);
  const canvas = canvasOf(panel, Math.max(1, usable.length) * tall + 70);
  const below = h("div", { class: "below" });

  function draw() {
    const width = canvas.element.clientWidth;
    if (width < 40) return;
    const rows = usable.filter((row) => !page.isHidden(row));
    const empty = panel.rows.filter((row) => !usable.includes(row)).map((row) => row.label);
    below.replaceChildren(
      empty.length ? `${NOT_MEASURED}: ${empty.join(", ")}` : panel.rows.length ? "" : "No rows.",
    );
    canvas.frame = null;
    if (canvas.isEmpty(rows.length === 0)) return;
    const height = rows.length * tall + 70;
    canvas.element.style.setProperty("--height", `${height}px`);
    const frame = frameOf({
      width,
      height,
      xAxis: {
        ...panel.x,
        log: false,
        domain: domainOf(
          rows.flatMap((row) => row.edges),
          false,
          0.01,
        ),
      },
      yAxis: { label: "share of the counts", unit: "", log: false, domain: [0, 1] },
    });
    frame.base.querySelectorAll(".grid, [text-anchor=end]:not(.title)").forEach((element) => element.remove());
    rows.forEach((row, r) => drawRow(frame, row, page.owner(row).look, frame.top + (r + 1) * tall));
    canvas.show(frame.base);
    canvas.rows = rows;
    canvas.frame = frame;
  }

  function drawRow(frame, { label, edges, counts }, look, floor) {
    const most = Math.max(...counts, 1e-300);
    const outline = counts.map(
      (count, i) => `V${(floor - (count / most) * (tall - 22)).toFixed(1)}H${frame.x(edges[i + 1]).toFixed(1)}`,
    );
    const d = `M${frame.x(edges[0]).toFixed(1)},${floor}${outline.join("")}V${floor}z`;
    frame.plot.append(svg("path", { d, class: "area", "--c": look.colour, "data-row": label }));
    frame.base.append(
      svg("line", { x1: frame.left, x2: frame.right, y1: floor, y2: floor, class: "grid" }),
      svg(
        "text",
        { x: frame.right, y: floor - tall + 20, "text-anchor": "end", class: "point-label" },
        shortened(label, 40),
      ),
    );
  }

  canvas.element.addEventListener("pointermove", (event) => {
    const { frame, rows } = canvas;
    if (!frame) return;
    const [px, py] = canvas.at(event);
    const row = rows[Math.floor((py - frame.top) / tall)];
    const value = frame.x.invert(px);
    const bin = row ? row.counts.findIndex((_, i) => value >= row.edges[i] && value < row.edges[i + 1]) : -1;
    if (bin < 0) return void canvas.clear();
    const total = row.counts.reduce((sum, count) => sum + count, 0);
    canvas.tip(
      px,
      py,
      h("p", { class: "who" }, row.label),
      pairs([
        [panel.x.label, `${exact(row.edges[bin])} to ${exact(row.edges[bin + 1], panel.x.unit)}`],
        ["count", exact(row.counts[bin])],
        ["share", formatValue((100 * row.counts[bin]) / total, "%")],
      ]),
    );
  });
  return { body: h("div", null, canvas.element, below), draw, follows: true };
}

function heatmapOf(panel) {
  const { columns, rows, values, unit } = panel;
  const tall = Math.max(14, Math.min(28, 420 / Math.max(1, rows.length)));
  const height = rows.length * tall + 62;
  const canvas = canvasOf(panel, height);
  const known = values.flat().filter((value) => value !== null);
  const low = known.reduce((a, b) => Math.min(a, b), Infinity);
  const high = known.reduce((a, b) => Math.max(a, b), -Infinity);
  const longest = Math.max(0, ...new Set(known.map((value) => formatValue(value, unit).length)));
  const strength = (value) => (high === low ? 0.5 : 0.06 + (0.94 * (value - low)) / (high - low));
  let place = null;

  function draw() {
    const width = canvas.element.clientWidth;
    if (width < 40) return;
    const left = Math.min(width / 3, 14 + CHARACTER * Math.max(1, ...rows.map((row) => row.length)));
    const wide = (width - left - 12) / Math.max(1, columns.length);
    const base = svg(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, class: "base axes", "aria-hidden": "true" },
      svg("text", { x: 0, y: 12, class: "title" }, panel.y.label),
      svg("text", { x: width - 12, y: height - 6, "text-anchor": "end", class: "title" }, panel.x.label),
    );
    rows.forEach((row, r) => {
      base.append(
        svg(
          "text",
          { x: left - 8, y: 24 + (r + 0.5) * tall + 4, "text-anchor": "end" },
          shortened(row, Math.floor((left - 10) / CHARACTER)),
        ),
      );
      columns.forEach((_, c) => base.append(...cell(values[r]?.[c] ?? null, left + c * wide, 24 + r * tall, wide)));
    });
    const every = Math.ceil((CHARACTER * Math.max(2, ...columns.map((column) => column.length)) + 12) / wide);
    columns.forEach((column, c) => {
      if (c % every === 0)
        base.append(
          svg(
            "text",
            { x: left + (c + 0.5) * wide, y: height - 22, "text-anchor": "middle" },
            shortened(column, Math.max(4, Math.floor((every * wide) / CHARACTER))),
          ),
        );
    });
    place = { left, wide };
    canvas.show(base);
  }

  function cell(value, x, y, wide) {
    const box = { x: x + 0.5, y: y + 0.5, width: Math.max(0.5, wide - 1), height: tall - 1, rx: 2 };
    if (value === null)
      return [
        svg("rect", { ...box, class: "heat none" }),
        svg("path", { d: `M${x + 2},${y + tall - 2}L${x + wide - 2},${y + 2}`, class: "none" }),
      ];
    const text = formatValue(value, unit);
    const parts = [svg("rect", { ...box, class: "heat", "fill-opacity": strength(value).toFixed(3) })];
    if (wide > CHARACTER * longest + 6 && tall >= 18) {
      parts.push(
        svg(
          "text",
          {
            x: x + wide / 2,
            y: y + tall / 2 + 4,
            "text-anchor": "middle",
            class: strength(value) > 0.55 ? "on-heat" : "on-pale",
          },
          text,
        ),
      );
    }
    return parts;
  }

  canvas.element.addEventListener("pointermove", (event) => {
    if (!place) return;
    const [px, py] = canvas.at(event);
    const [r, c] = [Math.floor((py - 24) / tall), Math.floor((px - place.left) / place.wide)];
    if (!(r in rows) || !(c in columns)) return void canvas.clear();
    canvas.tip(
      px,
      py,
      h("p", { class: "who" }, rows[r]),
      pairs([
        [panel.x.label, columns[c]],
        [panel.title, exact(values[r]?.[c] ?? null, unit)],
      ]),
    );
  });
  const key = h(
    "p",
    { class: "key" },
    known.length
      ? [
          formatValue(low, unit),
          h("i", { class: "ramp" }),
          formatValue(high, unit),
          known.length < values.flat().length ? h("span", null, h("i", { class: "blank" }), NOT_MEASURED) : null,
        ]
      : NOT_MEASURED,
  );
  return { body: h("div", null, canvas.element, key), draw };
}
