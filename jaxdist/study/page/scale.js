// From numbers to pixels.

// `scale(value)` is a pixel, `scale.invert(pixel)` a value. A logarithmic domain is positive.
function scaleOf([low, high], [from, to], log) {
  const bend = log ? Math.log10 : (value) => value;
  const start = bend(low);
  const slope = (to - from) / (bend(high) - start);
  const scale = (value) => from + (bend(value) - start) * slope;
  scale.invert = (pixel) => (log ? 10 ** (start + (pixel - from) / slope) : start + (pixel - from) / slope);
  return Object.assign(scale, { low, high, log });
}

// The domain that shows `values`, wider by the share `pad` on either side; nulls do not count.
function domainOf(values, log, pad) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value === null || (log && value <= 0)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return log ? [1, 10] : [0, 1];
  if (log) {
    const room = low === high ? 2 : (high / low) ** pad;
    return [Math.max(Number.MIN_VALUE, low / room), Math.min(Number.MAX_VALUE, high * room)];
  }
  const room = low === high ? Math.abs(low) / 10 || 1 : (high - low) * pad;
  return [low >= 0 && low !== high ? Math.max(0, low - room) : low - room, high + room];
}

// About `count` round numbers inside a scale, with their labels; `unit` is the axis's.
function ticksOf(scale, count, unit) {
  const decades = scale.log ? Math.log10(scale.high / scale.low) : 0;
  const values = decades > 1 ? logTicks(scale, count, decades) : linearTicks(scale, count, unit.divisor);
  const size = Math.max(...values.map(Math.abs)) / unit.divisor;
  const step = values.length > 1 ? (values[1] - values[0]) / unit.divisor : size;
  const label = (value) => {
    if (unit.each) return formatValue(value, unit.each);
    const scaled = value / unit.divisor;
    if (scale.log && decades > 1 && (scaled < 1e-3 || scaled >= 1e4)) return scientific(scaled, 2);
    if (size >= 1e4 && size < 1e18 && Math.abs(scaled) >= 1000) return inUnit(scaled, LARGE, "");
    if (scaled === 0 || scale.log || size >= 1e4 || size < 1e-3) return formatNumber(scaled);
    return minus(scaled.toFixed(Math.min(8, Math.max(0, -Math.floor(Math.log10(step) + 1e-9)))));
  };
  const isTold = new Set(values.map(label)).size === values.length; // 100 000 and 100 010 are both 100k
  return values.map((value) => ({ value, label: isTold ? label(value) : exact(value / unit.divisor) }));
}

function linearTicks({ low, high }, count, divisor) {
  const rough = (high - low) / divisor / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999) * power * divisor;
  const values = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9 && values.length < 50; i++) {
    values.push(i * step);
  }
  return values;
}

function logTicks({ low, high }, count, decades) {
  const every = Math.ceil(decades / count);
  const factors = decades < count / 3 ? [1, 2, 5] : decades < count * 0.7 ? [1, 3] : [1];
  const values = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high) + 1e-9; power += 1) {
    if (power % every !== 0) continue;
    for (const factor of factors) {
      const value = Number(`${factor}e${power}`);
      if (value >= low && value <= high) values.push(value);
    }
  }
  return values;
}
