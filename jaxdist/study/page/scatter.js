// Points over two measures, with the front of those that no other beats.

function scatterOf(panel, page) {
  const canvas = canvasOf(panel, 320);
  const below = h("div", { class: "below" });
  let places = [];

  function draw() {
    const width = canvas.element.clientWidth;
    if (width < 40) return;
    const shown = panel.points.filter((point) => !page.isHidden(point));
    const usable = shown.filter(
      ({ x, y }) =>
        typeof x === "number" && typeof y === "number" && (!panel.x.log || x > 0) && (!panel.y.log || y > 0),
    );
    const front = panel.front ?? [];
    const reach = (name, at) =>
      usable
        .flatMap((p) => [p[name], p[`${name}low`] ?? null, p[`${name}high`] ?? null])
        .concat(front.map((p) => p[at]));
    const absent = shown.filter((point) => !usable.includes(point)).map((point) => point.label);
    const says = absent.length ? `${NOT_MEASURED}: ${absent.join(", ")}` : panel.points.length ? "" : "No points.";
    below.replaceChildren(says);
    places = [];
    if (canvas.isEmpty(usable.length === 0)) return;
    const frame = frameOf({
      width,
      height: canvas.height,
      right: 14,
      xAxis: { ...panel.x, domain: domainOf(reach("x", 0), panel.x.log, 0.1) },
      yAxis: { ...panel.y, domain: domainOf(reach("y", 1), panel.y.log, 0.1) },
    });
    const corners = drawFront(frame, front);
    places = usable.map((point) => drawPoint(frame, point, page.owner(point).look));
    labelPoints(frame, places, corners);
    canvas.show(frame.base);
  }

  canvas.element.addEventListener("pointermove", (event) => {
    const [px, py] = canvas.at(event);
    const near = places.toSorted((a, b) => Math.hypot(a.px - px, a.py - py) - Math.hypot(b.px - px, b.py - py))[0];
    if (!near || Math.hypot(near.px - px, near.py - py) > 60) return void canvas.clear();
    point(near);
  });
  let active = -1;
  canvas.element.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !places.length) return;
    active = (active + by + places.length) % places.length;
    point(places[active]);
    event.preventDefault();
  });
  function point({ point: { x, y, xlow, xhigh, ylow, yhigh, label, muted }, look, px, py }) {
    const range = (value, low, high, unit) => {
      if (typeof low !== "number" || typeof high !== "number") return exact(value, unit);
      return `${exact(value, unit)} (${formatValue(low, unit)} to ${formatValue(high, unit)})`;
    };
    canvas.overlay.replaceChildren(svg("circle", { cx: px, cy: py, r: 10, class: "ring", "--c": look.colour }));
    canvas.tip(
      px,
      py,
      h("p", { class: "who" }, swatch(look), label),
      pairs([
        [panel.x.label, range(x, xlow, xhigh, panel.x.unit)],
        [panel.y.label, range(y, ylow, yhigh, panel.y.unit)],
      ]),
      muted ? h("p", { class: "source" }, "another is better in both") : "",
    );
  }
  return { body: h("div", null, canvas.element, below), draw, follows: true };
}

// Returns the boxes [left, top, right, bottom] of the front's pieces, which labels keep clear of.
function drawFront(frame, front) {
  const sorted = front
    .filter(([x, y]) => Number.isFinite(frame.x(x)) && Number.isFinite(frame.y(y)))
    .toSorted((a, b) => a[0] - b[0]);
  const d = sorted
    .map(
      ([x, y], i) =>
        `${i === 0 ? "M" : `H${frame.x(x).toFixed(1)}L`}${frame.x(x).toFixed(1)},${frame.y(y).toFixed(1)}`,
    )
    .join("");
  if (sorted.length > 1) frame.plot.append(svg("path", { d, class: "front" }));
  return sorted.slice(1).flatMap(([x, y], i) => {
    const [left, right, top, bottom] = [frame.x(sorted[i][0]), frame.x(x), frame.y(sorted[i][1]), frame.y(y)];
    return [
      [left, top, right, top],
      [right, Math.min(top, bottom), right, Math.max(top, bottom)],
    ];
  });
}

function drawPoint(frame, point, look) {
  const [px, py] = [frame.x(point.x), frame.y(point.y)];
  const bars = [];
  const whisker = (low, high, scale, line) => {
    if (typeof low !== "number" || typeof high !== "number") return;
    const ends = line(scale(low), scale(high));
    frame.plot.append(svg("line", { ...ends, class: "whisker", "--c": look.colour }));
    bars.push([ends.x1, Math.min(ends.y1, ends.y2), ends.x2, Math.max(ends.y1, ends.y2)]);
  };
  whisker(point.xlow, point.xhigh, frame.x, (x1, x2) => ({ x1, x2, y1: py, y2: py }));
  whisker(point.ylow, point.yhigh, frame.y, (y1, y2) => ({ x1: px, x2: px, y1, y2 }));
  frame.plot.append(
    marker(look, px, py, 5.2, { class: point.muted ? "dot hollow" : "dot", "data-point": point.label }),
  );
  return { point, look, px, py, bars, box: [px - 6, py - 6, px + 6, py + 6] };
}

// Each label at the first free side of its point; where none is free the tooltip has to do.
function labelPoints(frame, places, corners) {
  const taken = places.flatMap(({ box, bars }) => [box, ...bars]).concat(corners);
  for (const { point, px, py } of places.toSorted(
    (a, b) => Number(a.point.muted ?? 0) - Number(b.point.muted ?? 0),
  )) {
    const text = shortened(point.label, 30);
    const long = CHARACTER * [...text].length;
    const sides = [
      [px + 10, py + 4],
      [px - 10 - long, py + 4],
      [px - long / 2, py - 11],
      [px - long / 2, py + 20],
      [px + 9, py - 8],
      [px + 9, py + 16],
      [px - 9 - long, py - 8],
      [px - 9 - long, py + 16],
    ];
    const free = sides
      .map(([x, y]) => ({ x, y, box: [x, y - 10, x + long, y + 3] }))
      .find(
        ({ box }) =>
          box[0] >= frame.left &&
          box[2] <= frame.right &&
          box[1] >= frame.top - 6 &&
          box[3] <= frame.bottom &&
          taken.every((other) => box[0] > other[2] || box[2] < other[0] || box[1] > other[3] || box[3] < other[1]),
      );
    if (!free) continue;
    taken.push(free.box);
    frame.base.append(
      svg("text", { x: free.x, y: free.y, class: point.muted ? "point-label muted" : "point-label" }, text),
    );
  }
}
