"use strict";
// Draws the report from the JSON in #data. Text of the runs only ever becomes text nodes.
const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");
const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "6 3", "2 3"];
const hidden = new Set();
const redraws = [];
let smoothing = 0;

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((c) => c !== null && c !== undefined));
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const color = (i) => `var(--c${i % 8})`;
const dash = (i) => DASHES[Math.floor(i / 8) % 3];
const known = (x) => x !== null && x !== undefined;

function format(x) {
  if (!known(x)) return "none";
  const size = Math.abs(x);
  if (size >= 1e6) return `${trim((x / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${trim((x / 1e3).toPrecision(3))}k`;
  if (size !== 0 && size < 1e-3) return x.toExponential(1).replace("e-", "e\u2212");
  return trim(size >= 100 ? x.toFixed(size >= 1000 ? 0 : 1) : x.toPrecision(3)).replace("-", "\u2212");
}
const trim = (text) => (text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text);
const fixed = (x) => (!known(x) ? "none" : Math.abs(x) >= 100 ? format(x) : x.toFixed(3).replace("-", "\u2212"));
const count = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
const between = (low, high) => (known(low) && known(high) ? ` [${fixed(low)}, ${fixed(high)}]` : "");

function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 60) return seconds < 10 ? `${seconds.toFixed(1)} s` : `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

const tip = el("div", { class: "tip", hidden: "" });
document.body.append(tip);
function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - box.width - 6))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18}px`;
}
const hideTip = () => { tip.hidden = true; };
addEventListener("scroll", hideTip, { passive: true });

function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-6; t += step) found.push(Math.abs(t) < step * 1e-6 ? 0 : t);
  return found;
}

// Labels of an axis, with the digits that tell its ticks apart.
function tickLabels(found) {
  const step = found.length > 1 ? found[1] - found[0] : Math.abs(found[0]) || 1;
  const most = Math.max(...found.map(Math.abs));
  if (most !== 0 && most < 1e-3) return found.map(format);
  for (const [unit, sign] of [[1e6, "M"], [1e3, "k"]]) {
    if (most >= 10 * unit) return tickLabels(found.map((t) => t / unit)).map((label) => (Number(label) === 0 ? "0" : label + sign));
  }
  const digits = [0, 1, 2, 3, 4, 5, 6].find((d) => Math.abs(step * 10 ** d - Math.round(step * 10 ** d)) < 1e-6) ?? 6;
  return found.map((t) => t.toFixed(digits).replace("-", "\u2212"));
}

function smoothed(values) {
  if (smoothing === 0) return values;
  let sum = 0, weight = 0;
  return values.map((v) => {
    if (!known(v)) return v;
    sum = smoothing * sum + (1 - smoothing) * v;
    weight = smoothing * weight + (1 - smoothing);
    return sum / weight;
  });
}

function path(x, values, X, Y) {
  let out = "", pen = "M";
  values.forEach((v, i) => {
    if (!known(v)) pen = "M";
    else { out += `${pen}${X(x[i]).toFixed(1)},${Y(v).toFixed(1)}`; pen = "L"; }
  });
  return out;
}

function band(x, low, high, X, Y) {
  const runs = [];
  let open = null;
  x.forEach((_, i) => {
    if (known(low[i]) && known(high[i])) (open ||= []).push(i);
    else if (open) { runs.push(open); open = null; }
  });
  if (open) runs.push(open);
  return runs.filter((r) => r.length > 1).map((r) => {
    const there = r.map((i) => `${X(x[i]).toFixed(1)},${Y(high[i]).toFixed(1)}`);
    const back = r.slice().reverse().map((i) => `${X(x[i]).toFixed(1)},${Y(low[i]).toFixed(1)}`);
    return `M${there.join("L")}L${back.join("L")}Z`;
  }).join("");
}

// The range of the lines, widened to the bands but at most by its own size: two runs give intervals that dwarf them.
function range(series, points) {
  const lines = series.flatMap((s) => s.mean.filter(known));
  if (!lines.length) return null;
  let low = Math.min(...lines), high = Math.max(...lines);
  const room = (high - low) || Math.abs(high) * 0.1 || 1;
  const bands = series.flatMap((s) => [...s.low, ...s.high].filter(known));
  if (bands.length && points && low >= 0 && high <= 1) { // shares of prompts
    low = Math.max(0, Math.min(low, ...bands));
    high = Math.min(1, Math.max(high, ...bands));
  } else if (bands.length) {
    const least = Math.max(Math.min(...bands), low - room), most = Math.min(Math.max(...bands), high + room);
    low = Math.min(low, least);
    high = Math.max(high, most);
  }
  if (low >= 0 && low < 0.4 * high) low = 0;
  if (high === 0 && low === 0) return [0, 1];
  if (high === low) return [low - room / 2, high + room / 2];
  const margin = (high - low) * 0.06;
  return [low === 0 ? 0 : low - margin, high + margin];
}

// At the end of this file, and when its width or what is hidden changes.
function drawsToFit(body, draw) {
  redraws.push(draw);
  new ResizeObserver(() => requestAnimationFrame(draw)).observe(body);
}

let clips = 0;
function chart(panel) {
  const body = el("div");
  const card = el("div", { class: "card panel" }, el("h3", {}, panel.name), el("p", {}, panel.note || ""), body);
  function draw() {
    const width = body.clientWidth, height = 190;
    if (!width) return;
    const shown = panel.series.map((s, i) => ({ ...s, i })).filter((s) => s.x && !hidden.has(s.i));
    body.replaceChildren();
    const limits = range(shown, panel.points);
    if (!limits) { body.append(el("p", { class: "soft small" }, "no finite value")); return; }
    const yTicks = ticks(limits[0], limits[1], 4), labels = tickLabels(yTicks);
    const left = Math.max(...labels.map((label) => label.length)) * 6.4 + 12, right = 10, top = 6, bottom = 32;
    const xs = shown.flatMap((s) => s.x);
    let first = Math.min(...xs), last = Math.max(...xs);
    if (first === last) { first -= 1; last += 1; }
    const X = (x) => left + ((x - first) / (last - first)) * (width - left - right);
    const Y = (y) => height - bottom - ((y - limits[0]) / (limits[1] - limits[0])) * (height - top - bottom);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${panel.name} over training steps` });
    yTicks.forEach((t, i) => {
      root.append(svg("line", { x1: left, x2: width - right, y1: Y(t), y2: Y(t), stroke: "var(--grid)" }));
      root.append(svg("text", { x: left - 6, y: Y(t) + 4, "text-anchor": "end" }, labels[i]));
    });
    root.append(svg("line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, stroke: "var(--line)" }));
    for (const t of ticks(first, last, width > 420 ? 6 : 4).filter(Number.isInteger)) {
      root.append(svg("line", { x1: X(t), x2: X(t), y1: height - bottom, y2: height - bottom + 4, stroke: "var(--line)" }));
      root.append(svg("text", { x: X(t), y: height - bottom + 15, "text-anchor": "middle" }, format(t)));
    }
    root.append(svg("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, "step"));
    const id = `clip${clips++}`;
    root.append(svg("clipPath", { id }, svg("rect", { x: left - 4, y: top - 4, width: width - left - right + 8, height: height - top - bottom + 8 })));
    const plot = svg("g", { "clip-path": `url(#${id})` });
    for (const s of shown) drawSeries(plot, s, panel.points, X, Y);
    root.append(plot);
    const rule = svg("line", { y1: top, y2: height - bottom, stroke: "var(--soft)", "stroke-dasharray": "2 2", visibility: "hidden" });
    root.append(rule);
    root.addEventListener("pointermove", (event) => {
      const at = first + ((event.clientX - root.getBoundingClientRect().left - left) / (width - left - right)) * (last - first);
      const nearest = xs.reduce((a, b) => (Math.abs(b - at) < Math.abs(a - at) ? b : a));
      rule.setAttribute("x1", X(nearest));
      rule.setAttribute("x2", X(nearest));
      rule.setAttribute("visibility", "visible");
      showTip([`step ${Math.round(nearest)}`, ...shown.map((s) => value(s, nearest))].join("\n"), event.clientX, event.clientY);
    });
    root.addEventListener("pointerleave", () => { rule.setAttribute("visibility", "hidden"); hideTip(); });
    body.append(root);
  }
  drawsToFit(body, draw);
  return card;
}

function value(s, at) {
  const i = s.x.reduce((best, x, j) => (Math.abs(x - at) < Math.abs(s.x[best] - at) ? j : best), 0);
  const runs = s.n[i] > 1 ? `, ${s.n[i]} runs` : "";
  return `${data.studies[s.i].name}: ${format(s.mean[i])}${between(s.low[i], s.high[i])}${runs}`;
}

function drawSeries(plot, s, points, X, Y) {
  const stroke = color(s.i);
  const curve = (f) => (points ? f : smoothed(f));
  const area = band(s.x, curve(s.low), curve(s.high), X, Y);
  if (area) plot.append(svg("path", { d: area, fill: stroke, opacity: 0.18 }));
  if (!points && smoothing > 0 && !area) plot.append(svg("path", { d: path(s.x, s.mean, X, Y), fill: "none", stroke, opacity: 0.25 }));
  plot.append(svg("path", { d: path(s.x, curve(s.mean), X, Y), fill: "none", stroke, "stroke-width": 1.8, "stroke-dasharray": dash(s.i), "stroke-linejoin": "round" }));
  if (!points && s.x.length > 1) return;
  s.x.forEach((x, i) => {
    if (!known(s.mean[i])) return;
    if (known(s.low[i])) plot.append(svg("line", { x1: X(x), x2: X(x), y1: Y(s.low[i]), y2: Y(s.high[i]), stroke, opacity: 0.6 }));
    plot.append(svg("circle", { cx: X(x), cy: Y(s.mean[i]), r: 3, fill: stroke }));
  });
}

function swatch(i) {
  return svg("svg", { width: 22, height: 8 }, svg("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: color(i), "stroke-width": 3, "stroke-dasharray": dash(i) }));
}

function legend() {
  const chips = data.studies.map((study, i) => {
    const chip = el("button", { class: "chip", "aria-pressed": "true", title: study.runs.join(", "), onclick: () => {
      if (hidden.has(i)) hidden.delete(i); else hidden.add(i);
      chip.setAttribute("aria-pressed", String(!hidden.has(i)));
      redraws.forEach((draw) => draw());
    } }, swatch(i), el("span", {}, study.name), study.runs.length > 1 ? el("span", { class: "soft" }, `${study.runs.length} runs`) : null);
    return chip;
  });
  const long = Math.max(0, ...data.sections.flatMap((s) => s.panels.flatMap((p) => p.series.map((c) => (c ? c.x.length : 0)))));
  smoothing = long > 60 ? 0.6 : 0;
  const knob = el("input", { type: "range", min: 0, max: 0.95, step: 0.05, value: smoothing, "aria-label": "smoothing", oninput: (event) => {
    smoothing = Number(event.target.value);
    redraws.forEach((draw) => draw());
  } });
  return el("div", { class: "bar" }, chips, el("label", { class: "knob push" }, "smoothing", knob));
}

function header() {
  const names = [...new Set(data.studies.flatMap((s) => s.numbers.map((n) => n.name)))];
  const kind = (name) => data.studies.flatMap((s) => s.numbers).find((n) => n.name === name).kind;
  const head = el("tr", {}, ["experiment", "runs", "steps", "time"].map((t) => el("th", {}, t)),
    names.map((n) => el("th", {}, n, el("br"), el("span", { class: "small" }, kind(n) === "held-out" ? "held-out, before \u2192 after" : "training, last tenth"))));
  const cell = (study, name) => {
    const n = study.numbers.find((m) => m.name === name);
    if (!n) return el("td", { class: "soft" }, "\u2013");
    const before = known(n.before) ? el("span", { class: "soft" }, `${fixed(n.before)} \u2192 `) : null;
    return el("td", {}, before, el("b", {}, fixed(n.value)), el("span", { class: "soft" }, between(n.low, n.high)));
  };
  const rows = data.studies.map((study, i) => el("tr", {},
    el("td", {}, swatch(i), " ", study.name), el("td", {}, String(study.runs.length)), el("td", {}, String(study.steps)),
    el("td", {}, study.seconds ? duration(study.seconds) : "\u2013"), names.map((name) => cell(study, name))));
  const several = data.studies.some((s) => s.runs.length > 1);
  const meaning = several ? "95% intervals: Student\u2019s, over the runs of an experiment; of a single run, over its evaluation prompts. Bands are drawn from three runs on." : "95% intervals are over evaluation prompts; several runs with different seeds would show the spread of the method.";
  return [el("h1", {}, data.studies.map((s) => s.name).join(" \u00b7 ")),
    el("div", { class: "soft" }, `${count(data.studies.flatMap((s) => s.runs).length, "run")}, ${count(data.studies.length, "experiment")}`),
    el("div", { class: "card scroll", style: "margin-top:16px" }, el("table", {}, head, rows)),
    el("p", { class: "soft small" }, meaning)];
}

function timeSection() {
  const timed = data.studies.map((s, i) => ({ ...s, i })).filter((s) => Object.keys(s.times).length);
  if (!timed.length) return [];
  const phases = [...new Set(timed.flatMap((s) => Object.keys(s.times)))];
  const hue = (phase) => (phase === "other" ? "var(--line)" : color(phases.indexOf(phase)));
  return [el("h2", {}, "Where the time went"), el("div", { class: "grid" }, timed.map((study) => {
    const total = Object.values(study.times).reduce((a, b) => a + b, 0);
    const share = (phase) => (100 * study.times[phase]) / total;
    return el("div", { class: "card" }, el("div", { class: "small" }, el("b", {}, study.name), ` ${duration(total)} in ${study.steps} steps${study.runs.length > 1 ? ", mean over runs" : ""}`),
      el("div", { class: "phases" }, Object.keys(study.times).map((phase) => el("div", { style: `background:${hue(phase)};flex:${share(phase)} 0 0`, title: phase }))),
      el("div", { class: "keys" }, Object.keys(study.times).map((phase) => el("span", {}, el("i", { style: `background:${hue(phase)}` }), `${phase} `, el("span", { class: "soft" }, `${duration(study.times[phase])}, ${share(phase).toFixed(share(phase) < 10 ? 1 : 0)}%`)))));
  }))];
}

function histogram(h, study) {
  const body = el("div");
  const names = Object.keys(h.shares);
  const hue = (i) => (names.length > 1 && i === 0 ? "var(--faint)" : color(study));
  const keys = el("div", { class: "keys" }, names.map((name, i) => el("span", {}, el("i", { style: `background:${hue(i)}` }), `${name} of the steps `, el("span", { class: "soft" }, `${h.rows[name]} rows`))));
  function draw() {
    const width = body.clientWidth, height = 190, left = 40, right = 10, top = 6, bottom = 32;
    if (!width) return;
    const most = Math.max(...names.flatMap((n) => h.shares[n])) || 1;
    const last = h.edges[h.edges.length - 1];
    const X = (x) => left + (x / last) * (width - left - right);
    const Y = (y) => height - bottom - (y / (most * 1.06)) * (height - top - bottom);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "histogram of completion lengths" });
    for (const t of ticks(0, most, 3)) {
      root.append(svg("line", { x1: left, x2: width - right, y1: Y(t), y2: Y(t), stroke: "var(--grid)" }));
      root.append(svg("text", { x: left - 6, y: Y(t) + 4, "text-anchor": "end" }, `${format(100 * t)}%`));
    }
    names.forEach((name, i) => h.shares[name].forEach((share, b) => {
      const from = X(h.edges[b]), slot = X(h.edges[b + 1]) - from, thick = (slot - 2) / names.length;
      root.append(svg("rect", { x: from + 1 + i * thick, y: Y(share), width: Math.max(thick, 0.5), height: Y(0) - Y(share), fill: hue(i) },
        svg("title", {}, `${h.edges[b]}\u2013${h.edges[b + 1] - 1} tokens: ${(100 * share).toFixed(1)}% (${name})`)));
    }));
    for (const t of ticks(0, last, 5).filter(Number.isInteger)) root.append(svg("text", { x: X(t), y: height - bottom + 15, "text-anchor": "middle" }, format(t)));
    root.append(svg("line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, stroke: "var(--line)" }));
    root.append(svg("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, "tokens in a completion"));
    body.replaceChildren(root);
  }
  drawsToFit(body, draw);
  return el("div", { class: "card panel" }, el("h3", {}, data.studies[study].name), keys, body);
}

function tokenColor(mode, row, t, scale) {
  const x = mode === "log-prob" ? row.log_probs[t] : row.advantages[t];
  if (mode === "plain" || !known(x)) return "";
  if (mode === "log-prob") return `rgba(var(--unlikely), ${(0.75 * Math.min(1, -x / 4)).toFixed(2)})`;
  return `rgba(var(${x > 0 ? "--good" : "--bad"}), ${(0.5 * Math.min(1, Math.abs(x) / scale)).toFixed(2)})`;
}

function sampleCard(row, mode, scale) {
  const fact = (name, x) => (known(x) ? el("span", {}, `${name} `, el("b", {}, typeof x === "number" ? format(x) : String(x))) : null);
  const tokens = Array.isArray(row.tokens) ? row.tokens : [];
  const facts = el("div", { class: "facts" }, fact("reward", row.reward), fact("outcome", row.outcome), Object.entries(row.parts || {}).filter(([n, x]) => x !== 0 || !n.startsWith("unscored/")).map(([n, x]) => fact(n, x)),
    fact("tokens", tokens.length), fact("group", row.group), row.role ? fact("role", row.role) : null,
    row.truncated ? el("span", { class: "badge warn" }, "truncated") : null, row.scored === false ? el("span", { class: "badge warn" }, "unscored") : null);
  const told = (t) => ((row.observed || {})[t] === undefined ? [] : [el("span", { class: "mark" }, `\u27e8${row.observed[t]}\u27e9`)]);
  const spans = tokens.flatMap((token, t) => {
    const mark = token === "" ? "\u25a1" : token.replace(/\n/g, "\u21b5\n");
    return [...told(t), el("span", { "data-t": t, class: token === "" ? "mark" : null, style: `background:${tokenColor(mode, row, t, scale)}` }, mark)];
  }).concat(told(tokens.length));
  const text = el("div", { class: "tokens" }, spans.length ? spans : row.completion || "");
  const tell = (event) => {
    const t = event.target.dataset && event.target.dataset.t;
    if (t === undefined) { hideTip(); return; }
    const p = (row.log_probs || [])[t], a = (row.advantages || [])[t];
    showTip(`token ${Number(t) + 1} of ${tokens.length}: ${JSON.stringify(tokens[t])}\nlog-prob ${known(p) ? `${fixed(p)} (p = ${format(Math.exp(p))})` : "none"}\nadvantage ${fixed(a)}`, event.clientX, event.clientY);
  };
  text.addEventListener("pointermove", tell);
  text.addEventListener("pointerdown", tell);
  text.addEventListener("pointerleave", hideTip);
  return el("div", { class: "card row" }, facts, el("div", { class: "prompt" }, row.prompt || ""), text);
}

function sampleSection() {
  if (!data.samples.length) return [];
  const state = { run: 0, step: 0, mode: "log-prob", order: "as sampled" };
  const list = el("div", { class: "rows" }), label = el("span", { class: "small" }), scale = el("span", { class: "scale" });
  const slider = el("input", { type: "range", min: 0, value: 0, "aria-label": "step", oninput: () => { state.step = Number(slider.value); draw(); } });
  const move = (by) => { state.step += by; draw(); };
  const run = el("select", { "aria-label": "run", onchange: () => { state.run = Number(run.value); state.step = Infinity; draw(); } }, data.samples.map((s, i) => el("option", { value: i }, s.run)));
  const order = el("select", { "aria-label": "order", onchange: () => { state.order = order.value; draw(); } }, ["as sampled", "best first", "worst first"].map((o) => el("option", {}, o)));
  const modes = ["log-prob", "advantage", "plain"].map((mode) => el("button", { onclick: () => { state.mode = mode; draw(); } }, mode));
  function draw() {
    const rows = data.samples[state.run].rows;
    const steps = [...new Set(rows.map((r) => r.step))];
    state.step = Math.max(0, Math.min(state.step, steps.length - 1));
    slider.max = steps.length - 1;
    slider.value = state.step;
    label.textContent = `step ${steps[state.step]} (${state.step + 1} of ${steps.length})`;
    const here = rows.filter((r) => r.step === steps[state.step]);
    if (state.order !== "as sampled") here.sort((a, b) => ((b.reward || 0) - (a.reward || 0)) * (state.order === "best first" ? 1 : -1));
    const largest = Math.max(1e-6, ...here.flatMap((r) => (r.advantages || []).filter(known).map(Math.abs)));
    modes.forEach((b) => b.setAttribute("aria-pressed", String(b.textContent === state.mode)));
    const bar = (from, to) => el("i", { style: `background:linear-gradient(90deg, ${from}, ${to})` });
    scale.replaceChildren(...(state.mode === "log-prob" ? ["certain", bar("rgba(var(--unlikely),0)", "rgba(var(--unlikely),.75)"), "p \u2264 0.02"]
      : state.mode === "advantage" ? [`\u2212${format(largest)}`, el("i", { style: "background:linear-gradient(90deg, rgba(var(--bad),.5), transparent, rgba(var(--good),.5))" }), `+${format(largest)}`] : []));
    list.replaceChildren(...here.map((row) => sampleCard(row, state.mode, largest)));
  }
  state.step = Infinity;
  draw();
  return [el("h2", {}, "Sampled rows"), el("div", { class: "tools" }, data.samples.length > 1 ? run : null,
    el("button", { onclick: () => move(-1), "aria-label": "earlier" }, "\u2039"), slider, el("button", { onclick: () => move(1), "aria-label": "later" }, "\u203a"), label,
    el("span", { class: "segments" }, modes), scale, order), list];
}

function evaluationSection() {
  if (!data.evaluations.length) return [];
  const table = (t) => el("div", { class: "scroll" }, el("table", {}, el("tr", {}, t.head.map((h) => el("th", {}, h))), t.rows.map((row) => el("tr", {}, row.map((c) => el("td", {}, c))))));
  const several = data.evaluations.length > 1;
  return [el("h2", {}, "Evaluations"), data.evaluations.map((t) => (several
    ? el("details", { class: "card" }, el("summary", {}, t.run), table(t)) : el("div", { class: "card" }, table(t))))];
}

function configSection() {
  const lines = (text) => text.map((line) => el("span", { class: line[0] === "-" ? "minus" : "plus" }, `${line}\n`));
  const differences = data.differences.map((d) => el("div", { class: "card", style: "margin-bottom:12px" },
    el("div", { class: "small" }, el("b", {}, d.name), ` against `, el("b", {}, data.studies[0].name), " (seeds left out)"),
    el("pre", {}, d.lines.length ? lines(d.lines) : "no configuration to compare")));
  const texts = data.configs.filter((c) => c.text).map((c) => el("details", { class: "card" }, el("summary", {}, `config.gin of ${c.name}`), el("pre", {}, c.text)));
  if (!differences.length && !texts.length) return [];
  return [el("h2", {}, "Configuration"), differences, texts];
}

// The value of a metric that is the same everywhere: it is told, not drawn.
function constant(panel) {
  const values = new Set(panel.series.flatMap((s) => (s ? s.mean : [])));
  return values.size === 1 && !panel.points ? [...values][0] : undefined;
}

function section(s) {
  const still = s.panels.filter((p) => known(constant(p)));
  const drawn = s.panels.filter((p) => !still.includes(p));
  return [el("h2", {}, s.title), drawn.length ? el("div", { class: "grid" }, drawn.map(chart)) : null,
    still.length ? el("p", { class: "small still" }, el("span", { class: "soft" }, "The same at every step: "),
      still.map((p) => el("span", { title: p.note }, el("span", { class: "mono" }, p.name), ` ${format(constant(p))}`))) : null];
}

const sections = Object.fromEntries(data.sections.map((s) => [s.title, s]));
const drawn = (title) => (sections[title] ? section(sections[title]) : []);
page.append(...[
  header(), legend(), drawn("Learning"), drawn("Reward parts"), sampleSection(), drawn("Policy"), drawn("Rows"),
  data.lengths.some(known) ? [el("h2", {}, "Lengths of sampled completions"),
    el("div", { class: "grid" }, data.lengths.map((h, i) => (known(h) ? histogram(h, i) : null)))] : [],
  timeSection(), drawn("Speed"), evaluationSection(), drawn("Everything else"), configSection(),
].flat(3).filter(known));
// A printer or a reader of the page does not wait for a frame.
redraws.forEach((draw) => draw());
