// Numbers as text.

const THIN = "\u202f"; // a narrow space that never breaks
const NOT_MEASURED = "not measured";
const LARGE = [
  [1e15, "P"],
  [1e12, "T"],
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "k"],
];
const BYTES = [
  [1e15, "PB"],
  [1e12, "TB"],
  [1e9, "GB"],
  [1e6, "MB"],
  [1e3, "kB"],
  [1, "B"],
];
const SECONDS = [
  [172800, "d", 86400],
  [7200, "h", 3600],
  [120, "min", 60],
  [1, "s"],
  [1e-3, "ms"],
  [1e-6, "µs"],
];

const withUnit = (unit) => (!unit || unit === "×" ? (unit ?? "") : THIN + unit);
const trimmed = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
const minus = (text) => text.replace(/^-/, "\u2212");
const grouped = (digits) => digits.replace(/\B(?=(\d{3})+$)/g, THIN);
const RAISED = "⁻⁰¹²³⁴⁵⁶⁷⁸⁹";
const superscript = (power) => String(power).replace(/./g, (c) => RAISED["-0123456789".indexOf(c)]);

function scientific(value, digits) {
  const [mantissa, power] = value.toExponential(digits - 1).split("e");
  const short = trimmed(mantissa);
  const tens = `10${superscript(Number(power))}`;
  return minus(short === "1" ? tens : short === "-1" ? `-${tens}` : `${short}×${tens}`);
}

// Three or four significant digits: 0.1234, 12 345, 1.23M, 3×10⁻⁴.
function formatNumber(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3 || size >= 1e18) return scientific(value, 3);
  if (Number.isInteger(value) && size < 1e5) return minus(size < 1e4 ? String(value) : grouped(String(value)));
  if (size >= 99999.5) return inUnit(value, LARGE, "");
  return minus(size >= 9999.5 ? grouped(value.toFixed(0)) : trimmed(value.toPrecision(4)));
}

// A unit's row is [the least value shown in it, its name, its size if that is another number].
function unitFor(size, units) {
  const [least, name, divisor] = units.find(([limit]) => size >= limit) ?? units.at(-1);
  return { name, divisor: divisor ?? least };
}

function inUnit(value, units, space = THIN) {
  if (value === 0) return `0${space}${units === SECONDS ? "s" : "B"}`;
  const { name, divisor } = unitFor(Math.abs(value) * 1.0005, units);
  const scaled = value / divisor;
  if (Math.abs(scaled) >= 1e4 || Math.abs(scaled) < 1e-3) return `${scientific(scaled, 3)}${space}${name}`;
  return minus(trimmed(scaled.toPrecision(units === LARGE || Math.abs(scaled) >= 999.5 ? 4 : 3))) + space + name;
}

function formatValue(value, unit) {
  if (value === null || value === undefined) return NOT_MEASURED;
  if (unit === "s") return inUnit(value, SECONDS);
  if (unit === "B" || unit?.startsWith("B/")) return inUnit(value, BYTES) + unit.slice(1);
  return formatNumber(value) + withUnit(unit);
}

// As recorded, to the seven digits that a float32 holds.
function exact(value, unit) {
  if (value === null || value === undefined) return NOT_MEASURED;
  const size = Math.abs(value);
  const text = Number.isInteger(value) && size < 1e15 ? grouped(String(value)) : String(Number(value.toPrecision(7)));
  return minus(text) + withUnit(unit);
}

// The unit of a whole axis: seconds become minutes, bytes megabytes. Where the axis spans several such units,
// `each` is the unit and every number names its own.
function axisUnit(unit, scale) {
  const units = { s: SECONDS, B: BYTES }[unit];
  if (!units) return { name: unit, divisor: 1 };
  if (scale.log && scale.high > 1000 * scale.low) return { name: "", divisor: 1, each: unit };
  return unitFor(Math.max(Math.abs(scale.low), Math.abs(scale.high)), units);
}

const axisTitle = (label, unit) => (unit ? `${label} (${unit})` : label);
