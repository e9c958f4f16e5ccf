// The page of `daybreak report` and `daybreak watch`: one JSON object in, charts and tables out. Whatever comes from a
// run reaches the document as text only (textContent), never as markup.
"use strict";
const $ = (id) => document.getElementById(id);
const COLOURS = ["#2a78d6", "#d9731a", "#2d9d5b", "#b23a9b", "#7a5cd0", "#a88b00", "#c0392b", "#138d9e"];
const AXES = {
  step: ["step", (c) => c.step],
  tokens: ["tokens", (c) => c.tokens],
  hours: ["hours of running", (c) => c.hours],
  flops: ["FLOPs", (c, run) => run.flops_per_token && c.tokens.map((t) => t * run.flops_per_token)],
  dollars: ["dollars", (c, run) => run.price && c.hours.map((h) => h * run.price)],
};
// title, curve of a run, column, smoothed?, on the loss scale?, which reference line
const CHARTS = [
  ["training loss", (r) => r.train, "loss", true, true, ""],
  ["validation loss", (r) => r.val, "loss", false, true, "loss"],
  ["HellaSwag accuracy (llm.c's rules)", (r) => r.evals.hellaswag, "accuracy", false, false, "hellaswag"],
  ["bits per byte, validation", (r) => r.val, "bpb", false, false, ""],
  ["tokens a second", (r) => r.train, "tok_s", true, false, ""],
  ["gradient norm", (r) => r.train, "norm", true, true, ""],
  ["learning rate", (r) => r.train, "lr", false, false, ""],
  ["utilisation (MFU)", (r) => r.train, "mfu", true, false, ""],
  ["memory, MiB", (r) => r.train, "mem_mib", false, false, ""],
  ["temperature, °C", (r) => r.train, "temp_c", true, false, ""],
  ["power, W", (r) => r.train, "power_w", true, false, ""],
];
let data = JSON.parse($("data").textContent), charts = [], pinned = true;
const view = { x: "step", logx: false, logy: false, smooth: 0, reference: "" };
for (const [key, value] of new URLSearchParams(location.hash.slice(1)))
  if (key in view) view[key] = typeof view[key] === "boolean" ? value === "1" : typeof view[key] === "number" ? +value : value;

function short(v) {
  if (v == null || typeof v !== "number") return v == null ? "" : String(v);
  const size = Math.abs(v);
  if (size >= 1e13 || (size && size < 1e-3)) return v.toExponential(3);
  return Number.isInteger(v) || size >= 1e3 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(5));
}

function smoothed(values, weight) {  // exponential, its start from nothing undone
  let sum = 0, norm = 0;
  return values.map((v) => {
    if (v == null) return null;
    sum = weight * sum + (1 - weight) * v, norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

function cells(tag, values) {
  const row = document.createElement("tr");
  for (const value of values) {
    const cell = document.createElement(tag);
    cell.textContent = short(value);
    if (typeof value === "number") cell.className = "number";
    row.append(cell);
  }
  return row;
}
const table = (id, head, rows) => $(id).replaceChildren(cells("th", head), ...rows.map((r) => cells("td", r)));

function options(id, names, chosen) {
  $(id).replaceChildren(...names.map(([value, text]) => {
    const option = document.createElement("option");
    option.value = value, option.textContent = text;
    return option;
  }));
  $(id).value = chosen;
}

function marks(u) {  // restarts: dashed lines; skipped updates and outliers: dots at the top
  const { ctx, bbox } = u, shown = u.root.parentElement.dataset;
  let lines = 0, dots = 0;
  ctx.save();
  data.runs.forEach((run, i) => {
    const curve = run.train, xs = AXES[view.x][1](curve, run);
    if (!xs) return;
    const place = (step) => {
      const at = curve.step.findIndex((s) => s >= step);
      return u.valToPos(xs[at < 0 ? xs.length - 1 : at], "x", true);
    };
    const inside = (p) => p >= bbox.left && p <= bbox.left + bbox.width;
    ctx.strokeStyle = ctx.fillStyle = COLOURS[i % COLOURS.length];
    ctx.setLineDash([4, 4]);
    for (const step of run.restarts) {
      const p = place(step);
      if (inside(p)) lines++, ctx.beginPath(), ctx.moveTo(p, bbox.top), ctx.lineTo(p, bbox.top + bbox.height), ctx.stroke();
    }
    ctx.fillStyle = "#c33";
    for (const step of [...run.outliers, ...run.skipped.map((s) => s.step)]) {
      const p = place(step);
      if (inside(p)) dots++, ctx.beginPath(), ctx.arc(p, bbox.top + 5, 3, 0, 7), ctx.fill();
    }
  });
  ctx.restore();
  // what was drawn, for whoever reads the document: marks, scales (3 = logarithmic), each line's last value
  shown.marks = `${lines} ${dots}`, shown.scales = `${u.scales.x.distr} ${u.scales.y.distr}`;
  shown.last = u.data.slice(1).map((ys) => ys.findLast((y) => y != null));
}

function chart([title, curveOf, column, smooth, lossLike, reference]) {
  const tables = [], series = [{ label: AXES[view.x][0], value: (u, v) => short(v) }], scales = { x: { time: false } };
  data.runs.forEach((run, i) => {
    const curve = curveOf(run), xs = curve && AXES[view.x][1](curve, run);
    if (!xs || !curve[column] || !curve[column].some((v) => v != null)) return;
    const keep = xs.map((x, j) => x != null && !(view.logx && x <= 0) && !(view.logy && lossLike && !(curve[column][j] > 0)));
    const pick = (list) => list.filter((_, j) => keep[j]);
    tables.push([pick(xs), pick(smooth && view.smooth ? smoothed(curve[column], view.smooth) : curve[column])]);
    const points = curve.step.length < 60 ? { show: true, size: 5 } : { show: false };
    series.push({ label: run.name, stroke: COLOURS[i % COLOURS.length], width: 1.5, spanGaps: true, points, value: (u, v) => short(v) });
  });
  if (!tables.length || !tables.some((t) => t[0].length)) return;
  const lines = reference && view.reference ? data.references[view.reference] : {};
  const ends = [Math.min(...tables.flatMap((t) => t[0].slice(0, 1))), Math.max(...tables.flatMap((t) => t[0].slice(-1)))];
  for (const [who, values] of Object.entries(lines))
    if (values[reference] != null && ends[0] < ends[1]) {
      tables.push([ends, [values[reference], values[reference]]]);
      series.push({ label: `${who} ${view.reference}`, stroke: "#888", dash: [6, 4], spanGaps: true, points: { show: false }, value: () => short(values[reference]) });
    }
  if (view.logx) scales.x.distr = 3;
  if (view.logy && lossLike) scales.y = { distr: 3, range: (u, low, high) => [low * 0.97, high * 1.03] };
  const figure = document.createElement("figure"), caption = document.createElement("figcaption");
  caption.textContent = title;
  figure.append(caption);
  $("charts").append(figure);
  const ink = getComputedStyle(document.body).color, grid = { stroke: "#8883", width: 1 };
  const axis = { stroke: ink, grid, ticks: grid, values: (u, splits) => splits.map((v) => v == null ? "" : v >= 1e5 && v < 1e15
    ? v.toLocaleString("en", { notation: "compact" }) : short(v)) };
  charts.push(new uPlot({
    width: figure.clientWidth, height: 230, scales, series, cursor: { sync: { key: "all" } },
    axes: [{ ...axis }, { ...axis, size: 68 }], hooks: { draw: [marks] },
  }, uPlot.join(tables), figure));
}

function samples() {
  const run = data.runs[+$("who").value || 0], list = run ? run.samples : [];
  $("when").max = Math.max(list.length - 1, 0);
  if (pinned) $("when").value = $("when").max;
  const sample = list[+$("when").value];
  $("whenis").textContent = sample ? sample.step : "";
  $("sample").textContent = sample ? sample.text : "none yet";
}

function tables() {
  const runs = data.runs, last = (list) => list && list.length ? list[list.length - 1] : null, names = runs.map((r) => r.name);
  table("summary", ["run", "step", "of", "tokens", "hours", "dollars", "loss", "validation", "HellaSwag", "tok/s", "MFU", "state"], runs.map((r) => {
    const hours = last(r.train.hours);
    return [r.name, last(r.train.step), r.steps, last(r.train.tokens), hours == null ? null : hours.toFixed(2), r.price && hours != null ? (hours * r.price).toFixed(2) : null, last(r.train.loss),
      last(r.val.loss), r.evals.hellaswag && last(r.evals.hellaswag.accuracy), last(r.train.tok_s), last(r.train.mfu), r.state];
  }));
  const points = [...new Set(runs.flatMap((r) => Object.keys(r.tok_s)))];
  table("rates", ["run", "device", ...points], runs.map((r) => [r.name, r.device, ...points.map((p) => r.tok_s[p])]));
  const keys = [...new Set(runs.flatMap((r) => Object.keys(r.config)))], text = (v) => typeof v === "object" ? JSON.stringify(v) : String(v ?? "");
  const differ = keys.filter((k) => runs.length < 2 || new Set(runs.map((r) => text(r.config[k]))).size > 1);
  $("same").textContent = runs.length < 2 ? "" : `${keys.length - differ.length} of ${keys.length} keys are equal and not shown.`;
  table("config", ["key", ...names], differ.map((k) => [k, ...runs.map((r) => text(r.config[k]))]));
  table("events", ["run", "step", "what", ""], runs.flatMap((r) => [
    ...r.restarts.map((s) => [r.name, s, "restart", ""]), ...r.skipped.map((s) => [r.name, s.step, "skipped", s.detail]),
    ...r.checkpoints.map((c) => [r.name, c.step, "checkpoint", `${c.path}, ${short(c.bytes)} bytes in ${short(c.seconds)} s`]),
  ]));
  const env = [...new Set(runs.flatMap((r) => Object.keys(r.env)))];
  table("env", ["", ...names], env.map((k) => [k, ...runs.map((r) => text(r.env[k]))]));
}

function draw() {
  charts.forEach((c) => c.destroy());
  charts = [], $("charts").replaceChildren();
  CHARTS.forEach(chart);
}

function show() {
  document.title = data.runs.map((r) => r.name).join(", ") + " · daybreak";
  tables(), samples();
  if (!document.querySelector("#charts:hover")) draw();  // not under the pointer of who reads values off
}

options("x", Object.entries(AXES).filter(([k, [, f]]) => data.runs.some((r) => (f(r.train, r) || []).some((v) => v != null))).map(([k, [t]]) => [k, t]), view.x);
if (!$("x").value) $("x").value = view.x = "step";
const near = Object.keys(data.references).sort((a, b) => gap(a) - gap(b))[0];
function gap(name) { return Math.abs(Math.log(parseFloat(name) * 1e6 / (data.runs[0]?.parameters || 124e6))); }
view.reference ||= gap(near) < 0.5 ? near : "";
options("reference", [["", "nothing"], ...Object.keys(data.references).map((k) => [k, "GPT-2 and GPT-3, " + k])], view.reference);
options("who", data.runs.map((r, i) => [i, r.name]), 0);
for (const id of ["x", "logx", "logy", "smooth", "reference"]) {
  const box = $(id), checks = box.type === "checkbox";
  checks ? box.checked = view[id] : box.value = view[id];
  box.addEventListener("input", () => {
    view[id] = checks ? box.checked : id === "smooth" ? +box.value : box.value;
    history.replaceState(null, "", "#" + new URLSearchParams(Object.entries(view).map(([k, v]) => [k, v === true ? 1 : v === false ? 0 : v])));
    draw();
  });
}
$("who").addEventListener("input", () => { pinned = true; samples(); });
$("when").addEventListener("input", () => { pinned = $("when").value === $("when").max; samples(); });
let resized;
addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(draw, 150); });
show();
$("state").textContent = data.made;

if (data.live) {
  const poll = async () => {
    try {
      const answer = await fetch("data" + location.search + (location.search ? "&" : "?") + "v=" + data.version);
      if (answer.status === 200) data = await answer.json(), show();
      $("state").textContent = answer.ok ? "live" : "the server refuses: " + answer.status;
    } catch { $("state").textContent = "the server is gone; these are its last figures"; }
    setTimeout(poll, 2000);
  };
  poll();
}
