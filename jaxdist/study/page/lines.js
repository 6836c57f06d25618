// Lines of a panel of curves: how they look and the paths that they take.

// How each line looks. Groups give the colour; where all lines are of one run, their own names do; where runs
// have several lines each, the names give the dash.
function stylesOf(panel, page) {
  const owners = panel.lines.map((line) => page.owner(line));
  const names = panel.lines.map((line, i) => ownName(line.name, owners[i].run, owners[i].group));
  const distinct = [...new Set(names)];
  const isOne = new Set(panel.lines.map((line) => `${line.series} ${line.group}`)).size <= 1;
  const byName = distinct.length > 1 && isOne;
  const solid = distinct.filter((name) => panel.lines.some((line, i) => names[i] === name && !line.dash));
  return panel.lines.map((line, i) => {
    const look = byName ? lookOf(distinct.indexOf(names[i])) : owners[i].look;
    const place = solid.indexOf(names[i]) > 0 ? solid.indexOf(names[i]) + 1 : 0;
    const dash = line.dash
      ? DASHES[1]
      : byName || place === 0
        ? look.dash
        : DASHES[1 + (place % (DASHES.length - 1))];
    const inLegend =
      distinct.length > 1 && (byName || !owners[i].group || distinct.length <= DASHES.length)
        ? names[i] || "run"
        : null;
    const label =
      byName || !owners[i].group
        ? names[i] || line.name
        : distinct.length === 1 || !line.dash
          ? owners[i].group.name
          : null;
    return { ...look, dash, inLegend, byName: byName || !owners[i].group, label };
  });
}

function legendOf(styles) {
  const entries = new Map();
  for (const style of styles) if (style.inLegend && !entries.has(style.inLegend)) entries.set(style.inLegend, style);
  if (entries.size < 2) return null;
  return h(
    "ul",
    { class: "legend" },
    [...entries].map(([name, style]) =>
      h("li", null, swatch(style.byName ? style : { ...PLAIN, shape: () => "" }, style.dash), name),
    ),
  );
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

// x and y of a line; null where there is no point.
function pointsOf(entry, key) {
  const xs = key === null ? entry.line.x : entry.line.x[key];
  return { ...entry, xs, ys: entry.line.y.map((y, i) => ((xs[i] ?? null) === null ? null : y)) };
}

const isBlank = ({ ys }) => ys.every((y) => y === null);

// An exponential mean over a line's points that counts what it has seen; 0 smooths nothing.
function smoothed(ys, smoothing) {
  let sum = 0;
  let weight = 0;
  return ys.map((y) => {
    if (y === null) return null;
    sum = smoothing * sum + (1 - smoothing) * y;
    weight = smoothing * weight + (1 - smoothing);
    return sum / weight;
  });
}

function drawLine(frame, entry, smoothing, isStaircase) {
  const { xs, ys, style, line } = entry;
  const raw = pathOf(frame, xs, ys, isStaircase);
  const attributes = { "--c": style.colour, "stroke-dasharray": style.dash, "data-line": line.name };
  const seen = smoothing > 0 ? pathOf(frame, xs, smoothed(ys, smoothing)) : raw;
  if (seen !== raw) frame.faint.append(svg("path", { d: raw.d, class: "line raw", "--c": style.colour }));
  frame.plot.append(svg("path", { d: seen.d, class: "line", ...attributes }));
  const { px, py } = seen;
  const dots = line.marker ? px.keys() : seen.single;
  for (const i of dots) frame.plot.append(marker(style, px[i], py[i], line.marker ? 3.2 : 2.4, { class: "dot" }));
  const spots = px.length < 2 || line.dash ? [] : [px.length - 1, ...spotsOf(px, frame, entry.i)];
  if (!line.marker) for (const i of spots) frame.plot.append(marker(style, px[i], py[i], 3.4, { class: "dot" }));
  return { entry, ...raw, end: seen };
}

// A point along a line that carries its marker, at another place than its neighbours'.
function spotsOf(px, { left, right }, i) {
  const spot = closest(px, left + (0.25 + 0.1 * (i % 6)) * (right - left));
  return px[spot] > left && px[spot] < right ? [spot] : [];
}

// The path through the points that have a place, in pieces; `at` are their positions in the line, `single` those
// that no piece joins to another.
function pathOf({ x, y }, xs, ys, isStaircase) {
  const found = { px: [], py: [], at: [], single: [], d: "" };
  const parts = [];
  let length = 0; // of the piece
  const end = () => {
    if (length === 1) found.single.push(found.px.length - 1);
  };
  for (let i = 0; i < ys.length; i++) {
    if (ys[i] === null || (y.log && ys[i] <= 0) || (x.log && xs[i] <= 0)) {
      end();
      length = 0;
      continue;
    }
    const [px, py] = [x(xs[i]), y(ys[i])];
    if (length > 0 && isStaircase) parts.push(`H${px.toFixed(1)}`);
    parts.push(`${length === 0 ? "M" : "L"}${px.toFixed(1)},${py.toFixed(1)}`);
    found.px.push(px);
    found.py.push(py);
    found.at.push(i);
    length += 1;
  }
  end();
  return Object.assign(found, { d: parts.join("") });
}

function closest(px, x) {
  let best = 0;
  for (let i = 1; i < px.length; i++) if (Math.abs(px[i] - x) < Math.abs(px[best] - x)) best = i;
  return best;
}

// The last point of a path in the window of x; null where there is none.
function lastInside({ px, py }, frame) {
  for (let i = px.length - 1; i >= 0; i--) {
    if (px[i] <= frame.right + 1 && px[i] >= frame.left - 1)
      return [px[i], Math.max(frame.top, Math.min(frame.bottom, py[i]))];
  }
  return null;
}

// Where one label stands for several lines: at the mean of those that reach as far as the farthest.
function middleOf(ends) {
  if (!ends.length) return null;
  const x = Math.max(...ends.map(([px]) => px));
  return { x, y: mean(ends.filter(([px]) => px > x - 12).map(([, py]) => py)) };
}
