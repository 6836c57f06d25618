// The frame that every chart with axes shares: grid, ticks, titles, a clipped plot, and an overlay for the pointer.

const CHARACTER = 6.6; // width of one of the small digits, in pixels
let numFrames = 0;

// A drawn frame: `plot`, and `faint` behind it, take what is clipped to the axes, `base` what is not; `x` and `y` are
// scales.
// `xAxis`, `yAxis`: {label, unit, log, domain}; `right` is room for labels beside the plot.
function frameOf({ width, height, xAxis, yAxis, right = 12 }) {
  const top = 26;
  const bottom = height - 38;
  const y = scaleOf(yAxis.domain, [bottom, top], yAxis.log);
  const yUnit = axisUnit(yAxis.unit, y);
  const yTicks = ticksOf(y, 5, yUnit);
  const left = 14 + CHARACTER * Math.max(2, ...yTicks.map((tick) => [...tick.label].length));
  const x = scaleOf(xAxis.domain, [left, width - right], xAxis.log);
  const xUnit = axisUnit(xAxis.unit, x);
  const xTicks = ticksOf(x, Math.max(2, Math.min(8, (width - left - right) / 62)), xUnit);

  const clip = `clip-${numFrames++}`;
  const axes = svg("g", { class: "axes" });
  for (const { value, label } of yTicks) {
    axes.append(
      svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "grid" }),
      svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, label),
    );
  }
  for (const { value, label } of xTicks) {
    axes.append(
      svg("line", { x1: x(value), x2: x(value), y1: bottom, y2: bottom + 4, class: "tick" }),
      svg("text", { x: x(value), y: bottom + 17, "text-anchor": "middle" }, label),
    );
  }
  axes.append(
    svg("line", { x1: left, x2: width - right, y1: bottom, y2: bottom, class: "axis" }),
    svg("text", { x: 0, y: 12, class: "title" }, axisTitle(yAxis.label, yUnit.name)),
    svg(
      "text",
      { x: width - right, y: height - 4, "text-anchor": "end", class: "title" },
      axisTitle(xAxis.label, xUnit.name),
    ),
  );
  const faint = svg("g", { class: "faint", "clip-path": `url(#${clip})` });
  const plot = svg("g", { "clip-path": `url(#${clip})` });
  const base = svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, class: "base", "aria-hidden": "true" },
    svg(
      "clipPath",
      { id: clip },
      svg("rect", {
        x: left - 5,
        y: top - 6,
        width: Math.max(0, width - left - right + 10),
        height: bottom - top + 12,
      }),
    ),
    axes,
    faint,
    plot,
  );
  return { base, plot, faint, x, y, left, right: width - right, top, bottom, width, height };
}

// Where charts of one panel are drawn: a base that is redrawn with the data and an overlay, a layer of its own, that
// follows the pointer, so that moving it never paints the lines again.
function canvasOf(panel, height) {
  const overlay = svg("svg", { class: "overlay", "aria-hidden": "true" });
  const element = h(
    "div",
    { class: "canvas", tabindex: "0", role: "img", "aria-label": panel.title, "--height": `${height}px` },
    overlay,
  );
  const canvas = { element, overlay, height };
  canvas.show = (base) => {
    overlay.replaceChildren();
    overlay.setAttribute("viewBox", base.getAttribute("viewBox"));
    element.replaceChildren(base, overlay);
  };
  // Without data there are no axes: their numbers would be made up.
  canvas.isEmpty = (isEmpty) => {
    if (isEmpty) element.replaceChildren(overlay);
    element.classList.toggle("empty", isEmpty);
    return isEmpty;
  };
  canvas.at = (event) => {
    const box = element.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.tip = (x, y, ...children) => {
    const box = element.getBoundingClientRect();
    tooltip.show(box.left + x, box.top + y, ...children);
  };
  canvas.clear = () => {
    overlay.replaceChildren();
    tooltip.hide();
  };
  element.addEventListener("pointerleave", (event) => {
    if (event.pointerType !== "touch") canvas.clear();
  });
  element.addEventListener("blur", canvas.clear);
  return canvas;
}

// Lines of a panel at given values, across the plot, each with its label.
function drawMarks(frame, marks) {
  for (const { axis, value, label } of marks) {
    const scale = frame[axis];
    const at = scale(value);
    if (!Number.isFinite(at) || value < scale.low || value > scale.high) continue;
    const isY = axis === "y";
    const line = isY
      ? { x1: frame.left, x2: frame.right, y1: at, y2: at }
      : { x1: at, x2: at, y1: frame.top, y2: frame.bottom };
    const late = !isY && at > (frame.left + frame.right) / 2;
    const text = isY
      ? { x: frame.left + 6, y: at - 5 }
      : { x: at + (late ? -6 : 6), y: frame.top + 8, "text-anchor": late ? "end" : "start" };
    frame.base.append(svg("line", { ...line, class: "mark" }), svg("text", { ...text, class: "mark-label" }, label));
  }
}

function drawBands(frame, bands) {
  for (const { low, high, label } of bands) {
    const inside = (value) => Math.max(frame.y.low, Math.min(frame.y.high, value));
    const top = frame.y(inside(high));
    const bottom = frame.y(inside(low));
    frame.plot.append(
      svg("rect", { x: frame.left, y: top, width: frame.right - frame.left, height: bottom - top, class: "band" }),
    );
    frame.base.append(
      svg("text", { x: frame.right - 4, y: top + 13, "text-anchor": "end", class: "mark-label" }, label),
    );
  }
}

// Labels to the right of the ends of their lines, moved apart so that none covers another: [{x, y, text, look}].
function drawSideLabels(frame, labels) {
  const gap = 14;
  const sorted = labels.toSorted((a, b) => a.y - b.y).map((label) => ({ ...label, at: label.y }));
  sorted.forEach((label, i) => {
    if (i > 0) label.at = Math.max(label.at, sorted[i - 1].at + gap);
  });
  for (let i = sorted.length - 1, limit = frame.bottom; i >= 0; i--, limit -= gap) {
    sorted[i].at = Math.min(sorted[i].at, limit);
  }
  for (const { x, y, at, text, look } of sorted) {
    if (x < frame.right - 12 || Math.abs(at - y) > gap / 2) {
      frame.base.append(
        svg("path", {
          d: `M${x + 6},${y}H${frame.right}L${frame.right + 7},${at}`,
          class: "leader",
          "--c": look.colour,
        }),
      );
    }
    frame.base.append(svg("text", { x: frame.right + 10, y: at + 4, class: "side-label", "--c": look.colour }, text));
  }
}

// A little table for the tooltip: [[name, text], ...].
const pairs = (rows) =>
  h(
    "dl",
    null,
    rows.map(([name, text]) => [h("dt", null, name), h("dd", null, text)]),
  );
