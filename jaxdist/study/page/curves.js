// Lines over x: curves (they follow the page's x, y, smoothing and hidden runs) and staircases.

const stepsOf = (panel, page) =>
  curvesOf({ ...panel, staircase: true, lines: panel.lines.map((line) => ({ series: null, ...line })) }, page);

function curvesOf(panel, page) {
  const canvas = canvasOf(panel, 300);
  const styles = stylesOf(panel, page);
  const below = h("div", { class: "below" });
  const reset = h(
    "button",
    { type: "button", class: "small", hidden: true, onclick: () => zoomTo(null) },
    "reset zoom",
  );
  const logY = h("button", { type: "button", class: "small", "aria-pressed": "false", onclick: toggleLog }, "log y");
  const chart = { frame: null, shown: [], zoom: null, key: null, log: null, active: null };

  function draw() {
    const width = canvas.element.clientWidth;
    if (width < 40) return;
    const key = panel.x === null ? page.view.x : null;
    if (key !== chart.key) Object.assign(chart, { key, zoom: null });
    const xAxis = panel.x ?? page.axis(key);
    const visible = panel.lines
      .map((line, i) => ({ line, style: styles[i], owner: page.owner(line), i }))
      .filter(({ line }) => !page.isHidden(line));
    const drawn = visible.filter(({ line }) => key === null || line.x[key]);
    const points = drawn.map((entry) => pointsOf(entry, key));
    const positive = points.some(({ ys }) => ys.some((y) => y > 0));
    const wantsLog = chart.log ?? (page.view.y === "auto" || panel.staircase ? panel.y.log : page.view.y === "log");
    const log = wantsLog && positive;
    sayBelow({ visible, drawn, points, xAxis, log, wantsLog });
    Object.assign(chart, { frame: null, shown: [], active: null });
    if (canvas.isEmpty(points.every(isBlank))) return;
    const domain =
      chart.zoom ??
      domainOf(
        points.flatMap(({ xs }) => xs),
        xAxis.log,
        0,
      );
    const inside = points.flatMap(({ xs, ys }) => ys.filter((_, i) => xs[i] >= domain[0] && xs[i] <= domain[1]));
    const marks = (panel.marks ?? []).filter(
      (mark) => mark.axis === "y" || panel.x !== null || key === (mark.key ?? page.steps),
    );
    const targets = marks.filter((mark) => mark.axis === "y").map((mark) => mark.value);
    const labels = sideLabels(points, width);
    const frame = frameOf({
      width,
      height: canvas.height,
      right: labels ? labels.room : 14,
      xAxis: { ...xAxis, domain },
      yAxis: { ...panel.y, log, domain: domainOf(inside.concat(targets), log, 0.04) },
    });
    drawBands(frame, panel.bands ?? []);
    chart.shown = points.map((entry) =>
      drawLine(frame, entry, isSmoothed(entry) ? page.view.smoothing : 0, panel.staircase),
    );
    drawMarks(frame, marks);
    if (labels) {
      const placed = labels.of.map(({ text, entries }) => {
        const ends = entries.map((entry) => lastInside(chart.shown[points.indexOf(entry)].end, frame));
        return { text, look: entries[0].style, ...middleOf(ends.filter(Boolean)) };
      });
      drawSideLabels(
        frame,
        placed.filter(({ x }) => x !== undefined),
      );
    }
    chart.frame = frame;
    canvas.show(frame.base);
    reset.hidden = chart.zoom === null;
    logY.setAttribute("aria-pressed", String(log));
  }

  // Few points, or points that are marked each, are shown as they are.
  const isSmoothed = ({ line, ys }) => !panel.staircase && !line.marker && ys.length >= 100;

  function sayBelow({ visible, drawn, points, xAxis, log, wantsLog }) {
    const empty = points.filter(isBlank).map(({ line }) => line.name);
    const absent = visible.filter((entry) => !drawn.includes(entry)).map(({ line }) => line.name);
    const dropped = log ? points.reduce((sum, { ys }) => sum + ys.filter((y) => y !== null && y <= 0).length, 0) : 0;
    const says = [
      panel.lines.length === 0 ? "No lines." : visible.length === 0 ? "All runs of this panel are hidden." : null,
      absent.length ? `${NOT_MEASURED} against ${xAxis.label}: ${absent.join(", ")}` : null,
      empty.length ? `${NOT_MEASURED}: ${empty.join(", ")}` : null,
      dropped ? `${dropped} values of 0 or less have no place on a logarithmic axis.` : null,
      page.view.smoothing > 0 && points.some(isSmoothed)
        ? `smoothed (${page.view.smoothing}); faint: as recorded`
        : null,
      wantsLog && !log && empty.length < points.length ? "No value is positive, so the axis is linear." : null,
    ];
    below.replaceChildren(...says.filter(Boolean).map((text) => h("p", null, text)));
  }

  // One label for each group (or name) at the end of its lines, where there is room for them.
  function sideLabels(points, width) {
    const texts = new Map();
    for (const entry of points) {
      const text = entry.style.label;
      if (text && entry.xs.length) texts.set(text, [...(texts.get(text) ?? []), entry]);
    }
    if (width < 480 || texts.size < 2 || texts.size > 12) return null;
    const of = [...texts].map(([text, entries]) => ({ text: shortened(text, 22), entries }));
    return { of, room: 22 + CHARACTER * Math.max(...of.map(({ text }) => [...text].length)) };
  }

  function zoomTo(domain) {
    chart.zoom = domain;
    canvas.clear();
    draw();
  }
  function toggleLog() {
    chart.log = logY.getAttribute("aria-pressed") !== "true";
    draw();
  }

  function nearest(px, py) {
    let best = null;
    let least = Infinity;
    for (const line of chart.shown) {
      for (let i = 0; i < line.px.length; i++) {
        if (line.px[i] < chart.frame.left - 1 || line.px[i] > chart.frame.right + 1) continue;
        const distance = Math.abs(line.px[i] - px) * 3 + Math.abs(line.py[i] - py);
        if (distance < least) [least, best] = [distance, { line, i }];
      }
    }
    return best;
  }

  function point(found) {
    chart.active = found;
    if (found === null) return canvas.clear();
    const { line, i } = found;
    const { frame } = chart;
    const [x, y] = [line.px[i], line.py[i]];
    const others = chart.shown
      .filter((other) => other !== line && other.px.length)
      .map((other) => ({ other, k: closest(other.px, x) }));
    canvas.overlay.replaceChildren(
      svg("line", { x1: x, x2: x, y1: frame.top, y2: frame.bottom, class: "cross" }),
      svg("line", { x1: frame.left, x2: frame.right, y1: y, y2: y, class: "cross" }),
      ...others.map(({ other, k }) => marker(other.entry.style, other.px[k], other.py[k], 2.6, { class: "dot" })),
      marker(line.entry.style, x, y, 4.6, { class: "dot active" }),
    );
    canvas.tip(x, y, ...describe(line, i, others));
  }

  function describe({ entry, at }, i, others) {
    const { line, style } = entry;
    const k = at[i];
    const key = chart.key;
    const axis = panel.x ?? page.axis(key);
    const rows = [
      [panel.y.label, exact(line.y[k], panel.y.unit)],
      [axis.label, exact(entry.xs[k], axis.unit)],
    ];
    if (key !== null && key !== page.steps && line.x[page.steps]) {
      rows.push([page.axis(page.steps).label, exact(line.x[page.steps][k])]);
    }
    const number = line.line_numbers?.[k];
    const near = others
      .map(({ other, k: j }) => ({ other, value: other.entry.ys[other.at[j]] }))
      .sort((a, b) => Math.abs(a.value - line.y[k]) - Math.abs(b.value - line.y[k]))
      .slice(0, 6);
    return [
      h("p", { class: "who" }, swatch(style), line.name),
      pairs(rows),
      number === null || number === undefined ? null : h("p", { class: "source" }, `line ${number} of metrics.jsonl`),
      near.length
        ? h(
            "ul",
            null,
            near.map(({ other, value }) =>
              h(
                "li",
                null,
                swatch(other.entry.style),
                h("span", null, other.entry.line.name),
                h("b", null, formatValue(value, panel.y.unit)),
              ),
            ),
          )
        : null,
    ].filter(Boolean);
  }

  listenForZoom(canvas, chart, zoomTo, (x, y) => point(nearest(x, y)));
  canvas.element.addEventListener("keydown", (event) => {
    const { active, shown, frame } = chart;
    const lines = shown.filter((line) => line.px.length);
    if (!lines.length) return;
    const row = Math.max(
      0,
      lines.findIndex((line) => line.entry.i === active?.line.entry.i),
    );
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (move) {
      const line = lines[(row + move[0] + lines.length) % lines.length];
      const to = active ? closest(line.px, active.line.px[active.i]) + move[1] : 0;
      point({ line, i: Math.max(0, Math.min(line.px.length - 1, to)) });
    } else if (event.key === "+" && active) {
      const middle = active.line.px[active.i];
      const reach = (frame.right - frame.left) / 4;
      zoomTo([
        frame.x.invert(Math.max(frame.left, middle - reach)),
        frame.x.invert(Math.min(frame.right, middle + reach)),
      ]);
    } else if (event.key === "-" || event.key === "Escape") zoomTo(null);
    else return;
    event.preventDefault();
  });

  const body = h("div", null, legendOf(styles), canvas.element, below);
  return { body, draw, tools: panel.staircase ? [reset] : [reset, logY], follows: true };
}

// Dragging over a canvas zooms into x, a double click resets, moving points.
function listenForZoom(canvas, chart, zoomTo, hover) {
  let from = null;
  const { element, overlay } = canvas;
  const clamped = (px) => Math.max(chart.frame.left, Math.min(chart.frame.right, px));
  element.addEventListener("pointerdown", (event) => {
    if (!chart.frame || event.button !== 0) return;
    from = clamped(canvas.at(event)[0]);
    element.setPointerCapture(event.pointerId);
  });
  element.addEventListener("pointermove", (event) => {
    if (!chart.frame) return;
    const [px, py] = canvas.at(event);
    if (from === null || Math.abs(px - from) < 5) return void hover(px, py);
    tooltip.hide();
    const { top, bottom } = chart.frame;
    overlay.replaceChildren(
      svg("rect", {
        class: "range",
        x: Math.min(from, clamped(px)),
        y: top,
        width: Math.abs(clamped(px) - from),
        height: bottom - top,
      }),
    );
  });
  element.addEventListener("pointerup", (event) => {
    if (from === null) return;
    const [px, py] = canvas.at(event);
    const ends = [from, clamped(px)].sort((a, b) => a - b);
    from = null;
    if (ends[1] - ends[0] >= 5) zoomTo(ends.map(chart.frame.x.invert));
    else hover(px, py); // a finger does not hover before
  });
  element.addEventListener("pointercancel", () => {
    from = null;
    canvas.clear();
  });
  element.addEventListener("dblclick", () => zoomTo(null));
}
