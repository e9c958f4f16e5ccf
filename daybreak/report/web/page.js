// The page of `daybreak report` and `daybreak watch`: one JSON object in, charts and tables out. Whatever comes from a
// run reaches the document as text only (textContent), never as markup.
"use strict";
const $ = (id) => document.getElementById(id);
const COLOURS = ["#2a78d6", "#d9731a", "#2d9d5b", "#b23a9b", "#7a5cd0", "#a88b00", "#c0392b", "#138d9e"];
const VALIDATION = "#d9731a"; // beside one run's training loss; several runs have a colour each
const AXES = {
  step: ["step", (c) => c.step],
  tokens: ["tokens", (c) => c.tokens],
  hours: ["hours of running", (c) => c.hours],
  flops: ["FLOPs", (c, run) => run.flops_per_token && c.tokens.map((t) => t * run.flops_per_token)],
  dollars: ["dollars", (c, run) => run.price && c.hours.map((h) => h * run.price)],
};
// title, [curve of a run, column, what it is, smoothed?, role], on the loss scale?, which reference line
const CHARTS = [
  ["Loss", [[(r) => r.train, "loss", "training", true], [(r) => r.val, "loss", "validation", false]], true, "loss"],
  ["HellaSwag accuracy (llm.c's rules)", [[(r) => r.evals.hellaswag, "accuracy", "", false]], false, "hellaswag"],
  ["Validation, bits per byte", [[(r) => r.val, "bpb", "", false]], false, ""],
  ["Validation, nats per token of pictures", [[(r) => r.val, "image_loss", "", false]], false, ""],
  ["Validation, nats per token of text", [[(r) => r.val, "text_loss", "", false]], false, ""],
  ["Tokens a second", [[(r) => r.train, "tok_s", "", false]], false, ""],
  ["Gradient norm", [[(r) => r.train, "norm", "", true]], true, ""],
  ["Learning rate", [[(r) => r.train, "lr", "", false]], false, ""],
  ["Utilisation (MFU)", [[(r) => r.train, "mfu", "", true]], false, ""],
  ["Memory, MiB", [[(r) => r.train, "mem_mib", "", false]], false, ""],
  ["Temperature, °C", [[(r) => r.train, "temp_c", "", true]], false, ""],
  ["Power, W", [[(r) => r.train, "power_w", "", true]], false, ""],
  ["Steps so far in which fp8 saturated", [[(r) => r.train, "saturated", "", false]], false, ""],
];
let data = JSON.parse($("data").textContent), charts = [], pinned = true;
const view = { x: "step", logx: false, logy: false, smooth: -1, reference: "" };
for (const [key, value] of new URLSearchParams(location.hash.slice(1)))
  if (key in view) view[key] = typeof view[key] === "boolean" ? value === "1" : typeof view[key] === "number" ? +value : value;

const last = (list) => (list && list.findLast((v) => v != null)) ?? null;
const best = (list) => list && list.some((v) => v != null) ? Math.min(...list.filter((v) => v != null)) : null;
const text = (v) => v == null ? "" : typeof v === "object" ? JSON.stringify(v) : String(v);

function short(v) {
  if (v == null || typeof v !== "number") return v == null ? "" : String(v);
  const size = Math.abs(v);
  if (size >= 1e13 || (size && size < 1e-3)) return (+v.toPrecision(4)).toExponential();
  return Number.isInteger(v) || size >= 1e3 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(4));
}
const four = (v) => typeof v !== "number" || Number.isInteger(v) || Math.abs(v) < 1e-3 ? short(v) : Math.abs(v) < 1e3 ? v.toPrecision(4) : short(v); // 3.400, to stand beside 3.783
const FOUR = ["loss", "validation", "bits per byte"]; // columns of the table of runs
const tick = (v) => v == null ? "" : Math.abs(v) < 1e-3 && v ? (+v.toPrecision(3)).toExponential() : compact(v);
const WHOLE = Array.from({ length: 36 }, (_, i) => [1, 2, 5][i % 3] * 10 ** Math.floor(i / 3)); // steps between ticks
const compact = (v) => v >= 1e5 && v < 1e15 ? v.toLocaleString("en", { notation: "compact", maximumFractionDigits: 1 }) : short(v);
function span(seconds) {
  if (seconds < 90) return Math.round(seconds) + " s";
  return seconds < 5400 ? Math.round(seconds / 60) + " min" : seconds < 172800 ? (seconds / 3600).toFixed(1) + " h" : (seconds / 86400).toFixed(1) + " days";
}

function smoothed(values, weight) { // exponential, its start from nothing undone
  let sum = 0, norm = 0;
  return values.map((v) => {
    if (v == null) return null;
    sum = weight * sum + (1 - weight) * v, norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

function make(tag, content = "", name = "") {
  const element = document.createElement(tag);
  element.textContent = content;
  if (name) element.className = name;
  return element;
}

function table(id, head, rows) { // columns without any value are left out
  const used = head.map((_, j) => j === 0 || rows.some((r) => r[j] != null && r[j] !== ""));
  const row = (tag, values) => {
    const line = make("tr");
    values.forEach((value, j) => {
      if (!used[j]) return;
      const cell = value instanceof Node ? make(tag) : make(tag, FOUR.includes(head[j]) && tag === "td" ? four(value) : short(value), typeof value === "number" && "number");
      if (value instanceof Node) cell.append(value);
      if (tag === "th") cell.scope = "col", cell.classList.toggle("number", rows.some((r) => typeof r[j] === "number"));
      else cell.dataset.label = head[j];
      line.append(cell);
    });
    return line;
  };
  const top = make("thead"), body = make("tbody");
  if (head.some((h) => h)) top.append(row("th", head));
  body.append(...rows.map((r) => row("td", r)));
  $(id).replaceChildren(top, body);
}

function options(id, names, chosen) {
  $(id).replaceChildren(...names.map(([value, label]) => {
    const option = make("option", label);
    option.value = value;
    return option;
  }));
  $(id).value = chosen;
}

function marks(u, shown) { // restarts: dashed lines; skipped updates and outliers: dots at the top
  const { ctx, bbox } = u;
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
    ctx.strokeStyle = COLOURS[i % COLOURS.length], ctx.fillStyle = "#c33";
    ctx.setLineDash([4, 4]);
    for (const step of run.restarts) {
      const p = place(step);
      if (inside(p)) lines++, ctx.beginPath(), ctx.moveTo(p, bbox.top), ctx.lineTo(p, bbox.top + bbox.height), ctx.stroke();
    }
    for (const step of [...run.outliers, ...run.skipped.map((s) => s.step)]) {
      const p = place(step);
      if (inside(p)) dots++, ctx.beginPath(), ctx.arc(p, bbox.top + 5, 3, 0, 7), ctx.fill();
    }
  });
  ctx.restore();
  // for whoever reads the document: marks, scales (3 = logarithmic), each line's last value
  shown.marks = `${lines} ${dots}`, shown.scales = `${u.scales.x.distr} ${u.scales.y.distr}`;
  shown.last = u.data.slice(1).filter((_, i) => !u.series[i + 1].raw).map((ys) => last(ys));
}

const around = (low, high) => { // a range for a linear axis, of a single point too
  const room = high > low ? (high - low) * 0.06 : Math.abs(low) * 0.2 || 1;
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
};

function collect([, parts, lossLike, reference]) { // the columns and what uPlot is told of each
  const tables = [], series = [{}], many = data.runs.length > 1;
  data.runs.forEach((run, i) => parts.forEach(([curveOf, column, kind, smooth], k) => {
    const curve = curveOf(run), xs = curve && AXES[view.x][1](curve, run);
    if (!xs || !curve[column] || !curve[column].some((v) => v != null)) return;
    const keep = xs.map((x, j) => x != null && !(view.logx && x <= 0) && !(view.logy && lossLike && !(curve[column][j] > 0)));
    const pick = (list) => list.filter((_, j) => keep[j]), x = pick(xs), y = pick(curve[column]);
    if (!x.length) return;
    const colour = many || !k ? COLOURS[i % COLOURS.length] : VALIDATION;
    const line = { label: [many || !kind ? run.name : "", kind].filter(Boolean).join(" "), stroke: colour, width: k ? 2 : 1.7, spanGaps: true,
      dash: many && k ? [8, 4] : undefined, points: { show: x.length < (curve === run.train ? 3 : 60), size: 5, fill: colour } };
    if (smooth && view.smooth > 0 && x.length > 2) {
      tables.push([x, y]), series.push({ ...line, raw: true, width: 1, stroke: colour + "66", points: { show: false } });
      tables.push([x, smoothed(y, view.smooth)]), series.push(line);
    } else tables.push([x, y]), series.push(line);
  }));
  const lines = tables.length && reference && view.reference ? data.references[view.reference] : {};
  const ends = [Math.min(...tables.map((t) => t[0][0])), Math.max(...tables.map((t) => t[0].at(-1)))];
  for (const [who, values] of Object.entries(lines))
    if (values[reference] != null && ends[0] < ends[1] && (reference !== "loss" || gpt2())) {
      tables.push([ends, [values[reference], values[reference]]]);
      series.push({ label: `OpenAI's ${who} ${view.reference}`, stroke: "#888", dash: [6, 4], spanGaps: true, points: { show: false } });
    }
  return [tables, series];
}
const gpt2 = () => data.runs.every((r) => r.vocabulary === "gpt2");

function at(ys, i) { // a line's value at or before a place, nothing beyond its end
  if (ys.findLastIndex((y) => y != null) < i) return null;
  while (i >= 0 && ys[i] == null) i--;
  return i < 0 ? null : ys[i];
}

function chart(spec) {
  const [tables, series] = collect(spec), [title, , lossLike] = spec, digits = lossLike || title.startsWith("Validation") ? four : short;
  if (!tables.length) return;
  const figure = make("figure", "", charts.length ? "" : "main"), legend = make("ul", "", "legend"), tip = make("div", "", "tip");
  figure.append(make("figcaption", title)), $("charts").append(figure);
  const scales = { x: { time: false, range: (u, low, high) => low < high ? [low, high] : view.logx ? [low / 2, low * 2] : [Math.max(low - 1, 0), low + 1] },
    y: { range: (u, low, high) => low == null ? [0, 1] : around(low, high) } };
  if (view.logx) scales.x.distr = 3;
  if (view.logy && lossLike) scales.y = { distr: 3, range: (u, low, high) => [low * 0.97, high * 1.03] };
  const ink = getComputedStyle(document.body).color, grid = { stroke: "#8883", width: 1 };
  const axis = { stroke: ink, grid, ticks: grid, font: "12px system-ui, sans-serif", values: (u, splits) => splits.map(tick) };
  const height = Math.min(charts.length ? 220 : 340, innerWidth * 0.7), shown = figure.dataset;
  const move = (u) => {
    const i = u.cursor.idx;
    tip.hidden = i == null || u.cursor.left < 0;
    if (tip.hidden) return;
    const rows = u.series.flatMap((s, k) => k && !s.raw && s.show ? [[s, at(u.data[k], i)]] : []).filter(([, v]) => v != null);
    tip.replaceChildren(make("b", `${AXES[view.x][0]} ${short(u.data[0][i])}`), ...rows.map(([s, v]) => {
      const row = make("div"), dot = make("i");
      dot.style.background = s.colour, row.append(dot, `${s.label}: ${digits(v)}`);
      return row;
    }));
    const left = u.bbox.left / devicePixelRatio + u.cursor.left, wide = tip.offsetWidth;
    tip.style.left = Math.max(0, left + 14 + wide > figure.clientWidth ? left - wide - 4 : left + 14) + "px", tip.style.top = "3rem";
  };
  const u = new uPlot({
    width: figure.clientWidth - 26, height, scales, series: series.map((s) => ({ ...s, colour: s.stroke })), legend: { show: false },
    cursor: { sync: { key: "all" }, focus: { prox: 24 } }, focus: { alpha: 1 },
    axes: [{ ...axis, ...(view.x === "step" || view.x === "tokens" ? { incrs: WHOLE } : {}), size: 32, label: AXES[view.x][0], labelSize: 18, labelGap: 0, labelFont: "12px system-ui, sans-serif" }, { ...axis, size: 62 }],
    hooks: { draw: [(p) => marks(p, shown)], setCursor: [move] },
  }, uPlot.join(tables), figure);
  charts.push(u), figure.append(legend, tip), tip.hidden = true;
  u.series.forEach((s, k) => {
    if (!k || s.raw) return;
    const item = make("li"), line = make("i");
    line.style.borderColor = s.colour, line.style.borderTopStyle = s.dash ? "dashed" : "solid";
    item.append(line, make("span", s.label, "u-label"), " ", make("b", digits(last(u.data[k])))), legend.append(item);
  });
  if (shown.marks && shown.marks !== "0 0" || data.runs.some((r) => r.restarts.length || r.skipped.length || r.outliers.length))
    if (charts.length === 1) figure.append(make("p", "Dashed vertical line: a restart. Red dot: a skipped update, or a loss more than 5 standard deviations off.", "note"));
  const canvas = figure.querySelector("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${title} against ${AXES[view.x][0]}. ` + u.series.flatMap((s, k) => k && !s.raw ?
    [`${s.label}: from ${short(u.data[k].find((v) => v != null))} to ${short(last(u.data[k]))}.`] : []).join(" "));
}

const none = (run) => run && run.config["eval.sample_tokens"] === 0 ? "None, because eval.sample_tokens is 0." : run && run.state === "running" ? "None yet." : "None.";
function samples() {
  const run = data.runs[+$("who").value || 0], list = run ? run.samples : [];
  $("when").max = Math.max(list.length - 1, 0);
  if (pinned) $("when").value = $("when").max;
  const sample = list[+$("when").value], said = sample ? sample.text : none(run), drawn = sample && sample.pictures || [], prompt = run && run.prompt;
  $("whens").hidden = list.length < 2;
  $("whenis").textContent = sample ? short(sample.step) : "";
  const begun = sample && prompt && said.startsWith(prompt);
  $("sample").replaceChildren(...(begun ? [make("mark", prompt), said.slice(prompt.length)] : [said]));
  $("pictures").replaceChildren(...drawn.map(({ caption, src }) => {
    const figure = make("figure"), image = make("img");
    if (src.startsWith("data:image/png;base64,")) image.src = src;
    image.alt = caption, figure.append(image, make("figcaption", caption));
    return figure;
  }));
}

function facts(r) { // [name, value, smaller line]
  const step = last(r.train.step), tokens = last(r.train.tokens), hours = last(r.train.hours), val = last(r.val.loss), low = best(r.val.loss);
  const found = [];
  const add = (name, value, more) => { if (value != null && value !== "") found.push([name, value, more || ""]); };
  add("step", step == null ? null : short(step), r.steps ? `of ${short(r.steps)}` : "");
  add("validation loss", four(val), val != null && low < val ? `lowest ${four(low)}` : last(r.val.step) != null ? `at step ${short(last(r.val.step))}` : "");
  add("bits per byte", four(last(r.val.bpb)));
  add("training loss", four(last(r.train.loss)), val == null || step == null ? "" : `at step ${short(step)}`);
  add("HellaSwag", r.evals.hellaswag ? short(last(r.evals.hellaswag.accuracy)) : null);
  add("tokens", tokens == null ? null : compact(tokens), last(r.train.tok_s) == null ? "" : `${compact(last(r.train.tok_s))} a second`);
  add("time", hours == null ? null : span(hours * 3600), r.state === "running" && r.eta != null ? `${span(r.eta)} left` : "");
  add("MFU", last(r.train.mfu) == null ? null : (100 * last(r.train.mfu)).toFixed(1) + " %");
  add("fp8 saturated", short(last(r.train.saturated)), last(r.train.saturated) == 1 ? "step" : "steps");
  add("cost", r.price && hours != null ? "$" + (hours * r.price).toFixed(2) : null, r.price ? `at $${short(r.price)} an hour` : "");
  return found;
}

function pill(r) {
  const found = make("span", r.state || "llm.c", "pill " + r.state);
  found.title = r.why;
  return found;
}

function head() {
  const runs = data.runs, one = runs.length === 1, r = runs[0];
  $("title").textContent = runs.map((x) => x.name).join(", ");
  $("pill").replaceChildren(...(one ? [pill(r)] : []));
  $("about").textContent = !one ? `${runs.length} runs` : [r.parameters && compact(r.parameters) + " parameters", r.device, r.vocabulary && `tokenizer ${r.vocabulary}`, r.state !== "finished" && r.why].filter(Boolean).join(" · ");
  $("several").hidden = one, $("cards").hidden = !one;
  $("cards").replaceChildren(...(one ? facts(r) : []).map(([name, value, more], i) => {
    const card = make("div"), said = make("dd", value);
    if (more) said.append(make("small", more));
    if (!i && r.steps) {
      const bar = make("progress");
      bar.max = r.steps, bar.value = last(r.train.step) || 0, bar.setAttribute("aria-label", "steps done"), said.append(bar);
    }
    card.append(make("dt", name), said);
    return card;
  }));
  table("summary", ["run", "state", "step", "of", "tokens", "time", "cost", "loss", "validation", "bits per byte", "HellaSwag", "tok/s", "MFU", "fp8 saturated, steps"], runs.map((x, i) => {
    const hours = last(x.train.hours), name = make("span"), swatch = make("i", "● ");
    swatch.style.color = COLOURS[i % COLOURS.length], swatch.setAttribute("aria-hidden", "true"), name.append(swatch, x.name);
    return [name, pill(x), last(x.train.step), x.steps, last(x.train.tokens), hours == null ? null : span(hours * 3600), x.price && hours != null ? "$" + (hours * x.price).toFixed(2) : null,
      last(x.train.loss), last(x.val.loss), last(x.val.bpb), x.evals.hellaswag && last(x.evals.hellaswag.accuracy), last(x.train.tok_s), last(x.train.mfu), last(x.train.saturated)];
  }));
  const kinds = [...new Set(runs.map((x) => x.vocabulary || "unknown"))];
  $("vocabularies").hidden = kinds.length < 2;
  $("vocabularies").textContent = `These runs have different tokenizers (${kinds.join(", ")}): compare bits per byte, not loss per token.`;
}

function tables() {
  const runs = data.runs, names = runs.map((r) => r.name), many = runs.length > 1;
  const points = [...new Set(runs.flatMap((r) => Object.keys(r.tok_s)))];
  table("rates", ["run", ...points], runs.map((r) => [r.name, ...points.map((p) => r.tok_s[p])]));
  const keys = [...new Set(runs.flatMap((r) => Object.keys(r.config)))], values = (k) => runs.map((r) => text(r.config[k]));
  const changed = keys.filter((k) => !k.startsWith("run.") && values(k).some((v, i) => k in runs[i].config && v !== text(data.defaults[k])));
  const differ = many ? keys.filter((k) => new Set(values(k)).size > 1) : changed;
  $("configuration").hidden = !keys.length;
  $("differ").textContent = `Configuration: ${differ.length} of ${keys.length} settings differ ${many ? "between the runs" : "from the defaults"}`;
  table("config", ["setting", ...names, "default"], differ.map((k) => [k, ...values(k), text(data.defaults[k])]));
  table("all", ["setting", ...names], keys.map((k) => [k, ...values(k)]));
  const happened = runs.flatMap((r) => [
    ...r.restarts.map((s) => [r.name, s, "restart", ""]), ...r.skipped.map((s) => [r.name, s.step, "skipped", s.detail]),
    ...r.checkpoints.map((c) => [r.name, c.step, "checkpoint", `${c.path}, ${short(c.bytes)} bytes in ${short(c.seconds)} s`]),
  ]);
  const count = (kind, word) => ((n) => `${n} ${word}${n === 1 ? "" : "s"}`)(happened.filter((e) => e[2] === kind).length);
  $("happened").textContent = `Events: ${count("checkpoint", "checkpoint")}, ${count("restart", "restart")}, ${count("skipped", "skipped update")}`;
  table("events", ["run", "step", "what", "details"], happened);
  $("happened").parentElement.hidden = !happened.length, $("rates").closest("details").hidden = !points.length;
  const env = [...new Set(runs.flatMap((r) => Object.keys(r.env)))];
  $("env").closest("details").hidden = !env.length;
  table("env", many ? ["", ...names] : ["", ""], env.map((k) => [k, ...runs.map((r) => text(r.env[k]))]));
}

function draw() {
  charts.forEach((c) => c.destroy());
  charts = [], $("charts").replaceChildren();
  CHARTS.forEach(chart);
  $("smoothis").textContent = view.smooth > 0 ? view.smooth.toFixed(2) : "off";
}

function show() {
  document.title = data.runs.map((r) => r.name).join(", ") + " · daybreak";
  head(), tables(), samples();
  if (!document.querySelector("#charts:hover")) draw(); // not under the pointer of who reads values off
}

const longest = Math.max(...data.runs.map((r) => r.train.step.length));
if (view.smooth < 0) view.smooth = longest > 1000 ? 0.9 : longest > 100 ? 0.8 : 0;
options("x", Object.entries(AXES).filter(([, [, f]]) => data.runs.some((r) => (f(r.train, r) || []).some((v) => v != null))).map(([k, [t]]) => [k, t]), view.x);
if (!$("x").value) $("x").value = view.x = "step";
const near = Object.keys(data.references).sort((a, b) => gap(a) - gap(b))[0];
function gap(name) { return Math.abs(Math.log(parseFloat(name) * 1e6 / (data.runs[0]?.parameters || 124e6))); }
view.reference ||= gap(near) < 0.5 ? near : "";
options("reference", [["", "nothing"], ...Object.keys(data.references).map((k) => [k, "GPT-2 and GPT-3, " + k])], view.reference);
$("compare").hidden = !gpt2() && !data.runs.some((r) => r.evals.hellaswag);
options("who", data.runs.map((r, i) => [i, r.name]), 0);
$("whose").hidden = data.runs.length < 2;
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
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
show();
const told = `daybreak ${data.daybreak}, ${data.made}`;
$("made").textContent = told;

if (data.live) {
  const poll = async () => {
    try {
      const answer = await fetch("data" + location.search + (location.search ? "&" : "?") + "v=" + data.version);
      if (answer.status === 200) data = await answer.json(), show();
      $("made").textContent = answer.ok ? `Live. daybreak ${data.daybreak}` : "The server refuses: " + answer.status;
    } catch { $("made").textContent = "The server is gone; these are its last figures."; }
    setTimeout(poll, 2000);
  };
  poll();
}
