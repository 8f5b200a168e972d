"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const HEIGHT_PAD = 22, LEFT = 52, RIGHT = 10, TOP = 20, COLOURS = 8;

function node(space, tag, attributes, children) {
  const made = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
const html = (tag, attributes = {}, ...children) => node(null, tag, attributes, children);
const svg = (tag, attributes = {}, ...children) => node("http://www.w3.org/2000/svg", tag, attributes, children);

// --- numbers

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e3) {
    for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (size >= unit) return `${+(value / unit).toPrecision(3)}${name}`;
  }
  return size !== 0 && size < 1e-3 ? value.toExponential(1).replace(".0e", "e") : `${+value.toPrecision(3)}`;
}
const exact = value => Math.abs(value) >= 1e3 && Number.isInteger(value) ? value.toLocaleString("en")
  : value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(3) : `${+value.toPrecision(4)}`;

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(each => each * power >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step / 1e6 ? 0 : at);
  return found;
}

// The mean of a point and those of its phase before it, weighted by share ** distance.
function smoothed(xs, values, share) {
  let sum = 0, weight = 0;
  return values.map((value, index) => {
    if (index && data.marks.some(mark => mark.kind === "phase" && xs[index - 1] < mark.x && mark.x <= xs[index])) sum = weight = 0;
    sum = sum * share + value;
    weight = weight * share + 1;
    return sum / weight;
  });
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return x - xs[low] < xs[high] - x ? low : high;
}

// --- charts

const view = { smoothing: 0.6, log: false, range: null };
const charts = [];
const whole = [0, Math.max(1, data.end)];

class Chart {
  constructor(spec, id) {
    this.spec = spec;
    this.id = id;
    this.parts = spec.series.map((series, number) => ({
      name: series.name, colour: number % COLOURS, dash: ["", "6 3", "2 3", "8 3 2 3"][Math.floor(number / COLOURS) % 4], shown: true,
      runs: series.parts.map(([x, y, low, high]) => ({ x: data.xs[x], y, low, high })),
    }));
    this.at = null;
    this.plot = svg("svg", { tabindex: 0, role: "img", "aria-label": `${spec.title}: arrow keys read values, + and - zoom` });
    this.readout = html("div", { class: "readout", role: "status", hidden: "" });
    this.figure = html("section", { class: "chart" }, html("h3", {}, spec.title));
    if (spec.unit) this.figure.firstChild.append(html("span", { class: "soft" }, ` ${spec.unit}`));
    this.figure.append(this.legend(), this.plot, this.readout);
    this.listen();
  }

  legend() {
    const legend = html("div", { class: "legend" });
    for (const part of this.parts.length > 1 ? this.parts : []) {
      const button = html("button", { type: "button", "aria-pressed": "true" }, html("i", { class: `k${part.colour}` }), part.name);
      button.onclick = () => {
        part.shown = !part.shown;
        button.setAttribute("aria-pressed", part.shown);
        this.draw();
      };
      legend.append(button);
    }
    return legend;
  }

  listen() {
    let pressed = null;
    const place = event => {
      const box = this.plot.getBoundingClientRect();
      return this.unscale(event.clientX - box.left);
    };
    this.plot.addEventListener("pointermove", event => {
      this.at = place(event);
      if (pressed !== null) this.selected = [pressed, this.at];
      this.point();
    });
    this.plot.addEventListener("pointerleave", () => { this.at = null; this.point(); });
    this.plot.addEventListener("pointerdown", event => {
      if (event.pointerType !== "mouse") return;
      pressed = place(event);
      this.plot.setPointerCapture(event.pointerId);
    });
    this.plot.addEventListener("pointerup", () => {
      const range = this.selected && [...this.selected].sort((one, other) => one - other);
      pressed = this.selected = null;
      if (range && this.scale(range[1]) - this.scale(range[0]) > 6) zoom(range); else this.point();
    });
    this.plot.addEventListener("dblclick", () => zoom(null));
    this.plot.addEventListener("blur", () => { this.at = null; this.point(); });
    this.plot.addEventListener("keydown", event => {
      const [from, to] = view.range ?? whole;
      const known = this.xs();
      if (!known.length) return;
      const index = this.at === null ? (event.key === "ArrowLeft" ? known.length : -1) : nearest(known, this.at);
      const moves = { ArrowRight: index + 1, ArrowLeft: index - 1, PageDown: index + 10, PageUp: index - 10, Home: 0, End: known.length - 1 };
      if (event.key in moves) this.at = known[Math.max(0, Math.min(known.length - 1, moves[event.key]))];
      else if (event.key === "Escape") this.at = null;
      else if (event.key === "+" || event.key === "-") {
        const middle = this.at ?? (from + to) / 2, half = (to - from) * (event.key === "+" ? 0.25 : 1);
        zoom([middle - half, middle + half]);
      } else return;
      event.preventDefault();
      this.point();
    });
  }

  xs() {
    const [from, to] = view.range ?? whole;
    const found = new Set(this.parts.filter(part => part.shown).flatMap(part => part.runs.flatMap(run => run.x)));
    return [...found].filter(x => x >= from && x <= to).sort((one, other) => one - other);
  }

  scale(x) {
    const [from, to] = view.range ?? whole;
    return LEFT + (x - from) / (to - from) * (this.width - LEFT - RIGHT);
  }

  unscale(left) {
    const [from, to] = view.range ?? whole;
    const share = (left - LEFT) / (this.width - LEFT - RIGHT);
    return from + Math.max(0, Math.min(1, share)) * (to - from);
  }

  extent(lines) {
    const [from, to] = view.range ?? whole;
    let low = Infinity, high = -Infinity;
    for (const { run, soft } of lines) run.x.forEach((x, index) => {
      if (x < from || x > to) return;
      for (const value of [run.y[index], soft[index]]) {
        if (this.log && value <= 0) continue;
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    });
    if (low > high) return this.log ? [0.1, 1] : [0, 1];
    if (this.log) return low === high ? [low / 2, high * 2] : [low, high];
    // Smoothing alone makes the last digits of a constant differ.
    if (high - low < 1e-6 * Math.abs(high)) low = high;
    // A curve near zero is drawn from zero.
    if (low > 0 && low < 0.6 * high) low = 0;
    const pad = (high - low || Math.abs(high) || 1) * 0.06;
    return [low === 0 ? 0 : low - pad, high + pad];
  }

  draw() {
    this.width = Math.max(240, this.plot.clientWidth);
    this.height = Math.max(120, this.plot.clientHeight);
    this.log = view.log && this.parts.some(part => part.runs.some(run => run.y.some(value => value > 0)));
    const share = this.spec.smooth ? view.smoothing : 0;
    const lines = this.parts.filter(part => part.shown).flatMap(part => part.runs.map(run => ({ part, run, soft: smoothed(run.x, run.y, share) })));
    const [low, high] = this.extent(lines), bottom = this.height - HEIGHT_PAD;
    const turn = this.log ? Math.log10 : value => value;
    this.y = value => bottom - (turn(value) - turn(low)) / (turn(high) - turn(low)) * (bottom - TOP);
    this.lines = lines;
    const clip = `clip${this.id}`;
    const content = svg("g", { "clip-path": `url(#${clip})` });
    this.plot.replaceChildren(
      svg("clipPath", { id: clip }, svg("rect", { x: LEFT, y: TOP - 4, width: this.width - LEFT - RIGHT, height: bottom - TOP + 8 })),
      ...this.axes(low, high, bottom), content, this.pointed = svg("g"));
    for (const { part, run, soft } of lines) {
      const colour = `k${part.colour}`;
      if (run.low) content.append(svg("path", { class: `${colour} band`, d: this.band(run) }));
      else if (share > 0) content.append(svg("path", { class: colour, "stroke-opacity": 0.28, d: this.path(run.x, run.y) }));
      content.append(svg("path", { class: colour, "stroke-width": 1.8, "stroke-dasharray": part.dash, d: this.path(run.x, soft) }));
      if (run.x.length < 12) run.x.forEach((x, index) => this.dot(content, colour, x, soft[index], 2.2));
    }
    this.point();
  }

  dot(parent, colour, x, value, r) {
    // A log scale has no place for zero.
    if (!this.log || value > 0) parent.append(svg("circle", { class: colour, fill: "currentColor", cx: this.scale(x), cy: this.y(value), r }));
  }

  path(xs, ys) {
    let pen = "M";
    return xs.map((x, index) => {
      if (this.log && ys[index] <= 0) { pen = "M"; return ""; }
      const step = `${pen}${this.scale(x).toFixed(1)} ${this.y(ys[index]).toFixed(1)}`;
      pen = "L";
      return step;
    }).join("");
  }

  band(run) {
    const height = value => this.y(this.log ? Math.max(value, Number.MIN_VALUE) : value);
    const up = run.x.map((x, index) => `${this.scale(x).toFixed(1)} ${height(run.high[index]).toFixed(1)}`);
    const down = run.x.map((x, index) => `${this.scale(x).toFixed(1)} ${height(run.low[index]).toFixed(1)}`).reverse();
    return `M${[...up, ...down].join("L")}Z`;
  }

  axes(low, high, bottom) {
    const [from, to] = view.range ?? whole, made = [];
    let levels = ticks(low, high, 4);
    if (this.log) {
      const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
      levels = [];
      for (let power = first; power <= last; power++) for (const digit of last - first > 3 ? [1] : [1, 2, 5]) levels.push(digit * 10 ** power);
      levels = levels.filter(level => level >= low && level <= high);
      if (levels.length < 2) levels = [low, high];
    }
    for (const level of levels) {
      made.push(svg("line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: this.y(level), y2: this.y(level) }));
      made.push(svg("text", { x: LEFT - 6, y: this.y(level) + 4, "text-anchor": "end" }, short(level)));
    }
    for (const x of ticks(from, to, this.width < 420 ? 3 : 5))
      made.push(svg("text", { x: this.scale(x), y: this.height - 6, "text-anchor": x === to ? "end" : "middle" }, short(x)));
    const taken = [], marks = data.marks.filter(mark => mark.x >= from && mark.x <= to);
    // Stages come first where there is no room for all labels.
    for (const mark of [...marks].sort((one, other) => (other.kind === "stage") - (one.kind === "stage"))) {
      const x = this.scale(mark.x), end = x + mark.short.length * 6 + 10;
      if (mark.kind === "restart") {
        made.push(svg("path", { class: "restart", d: `M${x - 4} ${bottom + 5}h8l-4 -7z` }, svg("title", {}, mark.label)));
        continue;
      }
      made.push(svg("line", { class: mark.kind, x1: x, x2: x, y1: TOP - 6, y2: bottom }, svg("title", {}, mark.label)));
      if (end > this.width || taken.some(([left, right]) => x < right && left < end)) continue;
      made.push(svg("text", { x: x + 3, y: TOP - 8 }, mark.short));
      taken.push([x, end]);
    }
    return made;
  }

  point() {
    this.pointed.replaceChildren();
    this.readout.hidden = this.at === null;
    if (this.at === null) return;
    if (this.selected) {
      const [left, right] = this.selected.map(x => this.scale(x)).sort((one, other) => one - other);
      this.pointed.append(svg("rect", { class: "select", x: left, width: right - left, y: TOP, height: this.height - HEIGHT_PAD - TOP }));
    }
    const rows = html("table"), [from, to] = view.range ?? whole;
    let shown = this.at, gap = Infinity;
    for (const { run } of this.lines) if (run.x.length) {
      const x = run.x[nearest(run.x, this.at)];
      if (Math.abs(x - this.at) < gap) [shown, gap] = [x, Math.abs(x - this.at)];
    }
    for (const { part, run, soft } of this.lines) {
      if (!run.x.length) continue;
      const index = nearest(run.x, shown), x = run.x[index];
      // Another curve's point belongs here if none of its own is nearer to it.
      const step = run.x.length > 1 ? (run.x.at(-1) - run.x[0]) / (run.x.length - 1) : (to - from) / 100;
      if (Math.abs(x - shown) > step || x < from || x > to) continue;
      const range = run.low && run.low[index] !== run.high[index] ? ` (${exact(run.low[index])} to ${exact(run.high[index])})` : "";
      rows.append(html("tr", {}, html("td", { class: `k${part.colour}` }, part.name), html("td", {}, `${exact(run.y[index])}${range}`)));
      this.dot(this.pointed, `k${part.colour}`, x, soft[index], 3);
    }
    const left = this.scale(shown);
    this.pointed.append(svg("line", { class: "cursor", x1: left, x2: left, y1: TOP, y2: this.height - HEIGHT_PAD }));
    const where = data.stages.findLast(stage => stage.from <= shown);
    this.readout.replaceChildren(html("div", { class: "soft" }, `${Math.round(shown).toLocaleString("en")} samples${where ? `, ${where.name}` : ""}`), rows);
    const plot = this.plot.getBoundingClientRect(), figure = this.figure.getBoundingClientRect();
    const room = figure.width, offset = plot.left - figure.left + left, size = this.readout.offsetWidth;
    this.readout.style.left = `${Math.max(4, offset + 12 + size > room ? offset - 12 - size : offset + 12)}px`;
    this.readout.style.top = `${plot.top - figure.top + TOP}px`;
  }
}

function redraw() {
  for (const chart of charts) chart.draw();
}

function zoom(range) {
  if (range) range = [Math.max(whole[0], range[0]), Math.min(whole[1], range[1])];
  view.range = range && range[1] - range[0] < (whole[1] - whole[0]) * 0.999 ? range : null;
  document.getElementById("unzoom").disabled = view.range === null;
  redraw();
}

for (const section of data.sections) {
  const place = document.getElementById(section.id);
  for (const spec of section.charts) {
    const chart = new Chart(spec, charts.length);
    charts.push(chart);
    place.append(chart.figure);
  }
}
const smoothing = document.getElementById("smoothing"), log = document.getElementById("log");
if (smoothing) {
  smoothing.oninput = () => {
    view.smoothing = 1 - (1 - smoothing.value / 100) ** 1.5;
    redraw();
  };
  log.onchange = () => { view.log = log.checked; redraw(); };
  document.getElementById("unzoom").onclick = () => zoom(null);
  smoothing.oninput();
}
if (charts.length) new ResizeObserver(redraw).observe(charts[0].figure);

// --- samples over time

for (const film of data.films) {
  const image = html("img", { alt: "" }), label = html("p", { class: "soft", role: "status" });
  const slider = html("input", { type: "range", min: 0, max: film.moments.length - 1, step: 1, "aria-label": `${film.name}: moment` });
  const strip = html("div", { class: "strip" });
  const captions = html("ol"), texts = html("details", {}, html("summary", {}, "Captions as text"), captions);
  const buttons = film.moments.map((moment, index) => {
    const button = html("button", { type: "button", title: moment.label }, html("img", { src: moment.image, alt: moment.label, loading: "lazy" }), moment.short);
    button.onclick = () => show(index);
    return button;
  });
  const show = index => {
    const moment = film.moments[index];
    slider.value = index;
    image.src = moment.image;
    image.alt = `${film.name} after ${moment.label}`;
    label.textContent = moment.label;
    texts.hidden = moment.captions.length === 0;
    captions.replaceChildren(...moment.captions.map(line => html("li", {}, line)));
    buttons.forEach((button, each) => button.setAttribute("aria-current", each === index));
    strip.scrollLeft = buttons[index].offsetLeft - strip.offsetLeft - strip.clientWidth / 2;
  };
  slider.oninput = () => show(+slider.value);
  strip.append(...buttons);
  document.getElementById("films").append(html("section", { class: "film" }, html("h3", {}, film.name), label, image, texts, ...(film.moments.length > 1 ? [slider, strip] : [])));
  show(film.moments.length - 1);
}
