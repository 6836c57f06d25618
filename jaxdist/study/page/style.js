// Which colour, dash and shape stand for what. A group has one of each: never a colour alone.

const COLOURS = 8; // --c0 ... in style.css
const DASHES = ["", "6 3", "2 3", "9 3 2 3", "1 4"];
const SHAPES = [
  (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`,
  (r) => `M${-0.9 * r},${-0.9 * r}h${1.8 * r}v${1.8 * r}h${-1.8 * r}z`,
  (r) => `M0,${-1.15 * r}L${1.1 * r},${0.85 * r}H${-1.1 * r}z`,
  (r) => `M0,${-1.3 * r}L${1.3 * r},0L0,${1.3 * r}L${-1.3 * r},0z`,
  (r) => `M0,${1.15 * r}L${1.1 * r},${-0.85 * r}H${-1.1 * r}z`,
  (r) => `M${-r},${-r}H${r}L${-r},${r}H${r}z`,
];

// The n-th of a set: colours first, then dashed.
const lookOf = (n) => ({
  colour: `var(--c${n % COLOURS})`,
  dash: DASHES[Math.floor(n / COLOURS) % DASHES.length],
  shape: SHAPES[n % SHAPES.length],
});
const PLAIN = { colour: "var(--ink-2)", dash: "", shape: SHAPES[0] };

const marker = (look, x, y, r, attributes) =>
  svg("path", {
    d: look.shape(r),
    transform: `translate(${x.toFixed(1)},${y.toFixed(1)})`,
    "--c": look.colour,
    ...attributes,
  });

// A swatch for legends and tables: a bit of the line with its marker.
const swatch = (look, dash = look.dash) =>
  svg(
    "svg",
    { class: "swatch", viewBox: "-12 -6 24 12", "aria-hidden": "true", "--c": look.colour },
    svg("path", { d: "M-12,0H12", class: "line", "stroke-dasharray": dash }),
    marker(look, 0, 0, 3.6, { class: "dot" }),
  );

// What a line is called beside its run and its group: "batch 32 · seed 0 · head" is the "head" of its run.
function ownName(name, run, group) {
  for (const owner of [run?.name, group?.name]) {
    if (owner && name.startsWith(owner)) return name.slice(owner.length).replace(/^[\s·:/,–-]+/, "");
  }
  return name;
}

const shortened = (text, length) => (text.length > length ? `${[...text].slice(0, length - 1).join("")}…` : text);
