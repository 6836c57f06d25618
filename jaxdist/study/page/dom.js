// Elements. Data becomes text nodes and attribute values, never markup.

const SVG = "http://www.w3.org/2000/svg";

const h = (tag, attributes, ...children) => dressed(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => dressed(document.createElementNS(SVG, tag), attributes, children);

// Attributes by name; `on...` are listeners, `--...` are CSS variables; null, undefined and false are left out.
function dressed(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const find = (id) => document.getElementById(id);

// The one tooltip of the page: shown beside a point of the window, inside it.
const tooltip = {
  show(x, y, ...children) {
    const box = find("page-tooltip");
    box.replaceChildren(...children);
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    const room = document.documentElement.clientWidth;
    const left = x + 16 + width < room ? x + 16 : x - 16 - width;
    box.style.left = `${Math.max(4, Math.min(left, room - width - 4))}px`;
    box.style.top = `${Math.max(4, Math.min(y - height / 2, window.innerHeight - height - 4))}px`;
  },
  hide() {
    find("page-tooltip").hidden = true;
  },
};

// The report in the page: see embed.py.
function readReport() {
  const packed = JSON.parse(find("page-report").textContent);
  const arrays = [];
  for (const said of packed.arrays) {
    if (Array.isArray(said)) arrays.push(said);
    else if (said.float32) arrays.push(said.float32.map((value) => (value === null ? null : Math.fround(value))));
    else arrays.push(arrays[said.array].map((value) => (said.times * value + said.plus) / said.over));
  }
  const unpacked = (value) => {
    if (Array.isArray(value)) return value.map(unpacked);
    if (value === null || typeof value !== "object") return value;
    if ("$array" in value) return arrays[value.$array];
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, unpacked(inner)]));
  };
  return unpacked(packed.report);
}
