// The memory view: the plan, part by part, against the budget, with what the process holds and does.
// All figures are the server's own, from /plan and /metrics.

import * as api from "./api.js";
import { byId, bytes, make, number } from "./dom.js";
import { isOpen } from "./panels.js";

const OPEN_MS = 1000;
const CLOSED_MS = 5000;
const NUM_SLICES = 60;
const MAX_SPEEDS = 60;

let before = null;
let speeds = [];
let timer;

/** Asks the server how it stands, now and again and again. */
export async function refresh() {
  clearTimeout(timer);
  if (!document.hidden) await look();
  clearTimeout(timer);
  timer = setTimeout(refresh, isOpen("memory") ? OPEN_MS : CLOSED_MS);
}

async function look() {
  try {
    const found = await api.plan();
    showGauge(found);
    document.dispatchEvent(new CustomEvent("plan", { detail: found }));
    if (isOpen("memory")) show(found, measured(await api.metrics()));
  } catch (error) {
    byId("gauge-budget").textContent = "";
    byId("gauge-text").textContent = error.status === 401 ? "Key needed" : "No server";
    byId("open-memory").classList.add("lost");
    before = null;
  }
}

/** The counters, with the speed since they were read last. */
function measured(counters) {
  const now = performance.now();
  const isLater = before && counters.completion_tokens_total >= before.tokens;
  const speed = isLater ? ((counters.completion_tokens_total - before.tokens) * 1000) / (now - before.at) : 0;
  speeds = [...speeds, speed].slice(-MAX_SPEEDS);
  before = { at: now, tokens: counters.completion_tokens_total };
  return { ...counters, speed };
}

/** The pools of a plan: the memory that is computed in, and the process's where that is another. */
export function poolsOf({ plan }) {
  const { device } = plan;
  const first = { name: device ? device.name : "", budget: plan.budget_bytes, parts: Object.entries(plan.parts) };
  return device ? [first, { name: "host", budget: device.host_budget_bytes, parts: device.host_parts }] : [first];
}

function showGauge(found) {
  const host = poolsOf(found).at(-1);
  byId("gauge-fill").style.width = `${Math.min((found.rss_bytes / host.budget) * 100, 100)}%`;
  byId("gauge-text").textContent = bytes(found.rss_bytes);
  byId("gauge-budget").textContent = ` of ${bytes(host.budget)}`;
  byId("open-memory").classList.remove("lost");
}

/** A bar of a pool's parts, of the width that each has of the budget. */
export function planBar(pool, peak) {
  const bar = make("div", { className: "plan-bar" });
  for (const [name, size] of pool.parts) {
    const part = make("span", { className: `part ${classOf(name)}` });
    part.style.width = `${(size / pool.budget) * 100}%`;
    bar.append(part);
  }
  if (peak !== undefined) {
    const mark = make("i", { className: "peak" });
    mark.style.insetInlineStart = `${Math.min((peak / pool.budget) * 100, 100)}%`;
    bar.append(mark);
  }
  return bar;
}

const classOf = (name) => `part-${name.replaceAll(" ", "-")}`;

function show(found, numbers) {
  const pools = poolsOf(found);
  const body = byId("memory-body");
  body.replaceChildren(
    ...pools.flatMap((pool, place) => poolPart(pool, place === pools.length - 1 ? found : null)),
    ...weightsPart(found.plan),
    ...workPart(found.plan, numbers),
  );
}

function poolPart(pool, found) {
  const planned = pool.parts.reduce((sum, [, size]) => sum + size, 0);
  const bar = planBar(pool, found?.peak_bytes);
  bar.setAttribute("role", "img");
  const told = found ? `, held at most ${bytes(found.peak_bytes)}` : "";
  bar.setAttribute("aria-label", `Planned ${bytes(planned)} of ${bytes(pool.budget)}${told}`);
  const rows = [...pool.parts.map(([name, size]) => row(name, size, classOf(name))), row("headroom", pool.budget - planned, "part-headroom")];
  const table = make("table", { className: "parts" }, make("caption", { className: "hidden", textContent: "Parts of the plan" }), make("tbody", {}, ...rows));
  const head = found ? figures([["holds", bytes(found.rss_bytes), "rss"], ["peak", bytes(found.peak_bytes), "peak"], ["budget", bytes(pool.budget), "budget"]]) : figures([[pool.name, bytes(planned), ""], ["budget", bytes(pool.budget), ""]]);
  return [head, bar, table];
}

function row(name, size, className) {
  const cell = make("td", { className: "size", textContent: bytes(size) });
  cell.dataset.part = name;
  return make("tr", {}, make("th", { scope: "row" }, make("span", { className: `swatch ${className}` }), name), cell);
}

function figures(list) {
  return make("dl", { className: "figures" }, ...list.map(([name, value, id]) => figure(name, value, id)));
}

function figure(name, value, id) {
  const told = make("dd", { textContent: value });
  told.dataset.figure = id;
  return make("div", {}, make("dt", { textContent: name }), told);
}

function weightsPart({ streaming, dtype, kv_dtype: kvDtype, context }) {
  const total = streaming?.num_slices ?? 0;
  const pinned = streaming?.num_pinned ?? 0;
  const share = streaming ? pinned / total : 1;
  const told = streaming ? `${number(pinned)} of ${number(total)} slices resident, ${number(total - pinned)} streamed` : "All weights are resident";
  const slices = make("div", { className: "slices", role: "img", "aria-label": told });
  for (let place = 0; place < NUM_SLICES; place += 1) {
    const isHere = Math.floor((place + 1) * share) > Math.floor(place * share);
    slices.append(make("span", { className: isHere ? "here" : "" }));
  }
  const line = make("p", { textContent: told });
  line.dataset.figure = "weights";
  const about = `${dtype}, KV cache ${kvDtype}, ${number(context)} tokens of context`;
  return [make("h3", { textContent: "Weights" }), slices, line, make("p", { className: "about", textContent: about })];
}

function workPart(plan, numbers) {
  const { drafted_tokens_total: drafted, accepted_tokens_total: accepted } = numbers;
  const drafts = drafted ? `${((accepted / drafted) * 100).toFixed(0)}% of ${number(drafted)}` : plan.draft ? "none yet" : "off";
  const list = [
    ["tokens/s", numbers.speed.toFixed(1), "speed"],
    ["running", number(numbers.num_running), "running"],
    ["waiting", number(numbers.num_waiting), "waiting"],
    ["drafts accepted", drafts, "drafts"],
    ["KV blocks used", `${number(numbers.kv_blocks_used)} of ${number(numbers.kv_blocks)}`, "blocks"],
    ["tokens written", number(numbers.completion_tokens_total), "tokens"],
    ["read from disk", bytes(numbers.streamed_bytes_total), "streamed"],
  ];
  return [make("h3", { textContent: "Work" }), speedLine(), figuresTable(list)];
}

function figuresTable(list) {
  const rows = list.map(([name, value, id]) => {
    const cell = make("td", { textContent: value });
    cell.dataset.figure = id;
    return make("tr", {}, make("th", { scope: "row", textContent: name }), cell);
  });
  return make("table", { className: "parts" }, make("caption", { className: "hidden", textContent: "What the server does" }), make("tbody", {}, ...rows));
}

/** The speeds of the last minute as thin slices. */
function speedLine() {
  const highest = Math.max(...speeds, 1);
  const line = make("div", { className: "speeds", role: "img", "aria-label": `At most ${highest.toFixed(0)} tokens/s in the last minute` });
  for (const speed of [...Array(MAX_SPEEDS - speeds.length).fill(0), ...speeds]) {
    const bar = make("span");
    bar.style.height = `${(speed / highest) * 100}%`;
    line.append(bar);
  }
  return line;
}

/** What the empty state says of the model. */
export function facts(found) {
  const pool = poolsOf(found)[0];
  const { streaming, context } = found.plan;
  const weights = streaming ? "weights streamed" : "weights resident";
  byId("model-name").textContent = found.model;
  byId("model-facts").textContent = `on this machine, within ${bytes(pool.budget)} · ${weights} · ${number(context)} tokens of context`;
  byId("welcome-bar").replaceChildren(...planBar(pool).childNodes);
}
