// What the user has set; what is not set is the model's advice, which the server knows.

import { byId, make } from "./dom.js";

const PLACE = "thinslice.settings";
const THOUGHT = "max_thinking_tokens";
// By the names of OpenAI's API and of the servers that have more than it.
const FIELDS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.05 }],
  ["top_p", "Top-p", { min: 0, max: 1, step: 0.01 }],
  ["top_k", "Top-k", { min: 0, max: 1000, step: 1 }],
  ["min_p", "Min-p", { min: 0, max: 1, step: 0.01 }],
  ["repetition_penalty", "Repetition penalty", { min: 0.5, max: 2, step: 0.05 }],
  ["max_tokens", "Most tokens", { min: 1, max: 1000000, step: 1, placeholder: "no limit" }],
  ["seed", "Seed", { min: 0, max: 9007199254740991, step: 1, placeholder: "random" }],
  [THOUGHT, "Longest thought", { min: 0, max: 1000000, step: 1, placeholder: "no limit" }],
];

let thinks = true;

function read() {
  try {
    return JSON.parse(localStorage.getItem(PLACE)) ?? {};
  } catch {
    return {};
  }
}

/** What is set, as a request has it, and the system prompt. */
export function sampling() {
  const { system = "", ...given } = read();
  if (!thinks) delete given[THOUGHT];
  return { system, ...given };
}

/** What the model that is served makes of the settings; they stay for one that makes more of them. */
export function know(plan) {
  thinks = plan.thinks;
  const input = byId("settings").querySelector(`[name=${THOUGHT}]`);
  input.disabled = !thinks;
  input.placeholder = thinks ? "no limit" : "";
  byId("no-thought").hidden = thinks;
}

export function start() {
  const dialog = byId("settings");
  const form = dialog.querySelector("form");
  byId("no-thought").before(make("div", { className: "fields" }, ...FIELDS.map(field)));
  dialog.querySelector(`[name=${THOUGHT}]`).setAttribute("aria-describedby", "no-thought");
  show(form);
  form.addEventListener("input", () => keep(form));
  byId("reset-settings").addEventListener("click", () => {
    localStorage.removeItem(PLACE);
    show(form);
  });
  byId("open-settings").addEventListener("click", () => dialog.showModal());
  for (const one of form.elements.theme) one.addEventListener("change", () => useTheme(one.value));
  // Enter in a field is no way to close the dialog with what is not valid.
  form.addEventListener("submit", (event) => {
    if (event.submitter?.value !== "close") event.preventDefault();
  });
}

function field([name, label, limits]) {
  const input = make("input", { type: "number", name, inputMode: "decimal", placeholder: "as advised", ...limits });
  return make("label", { className: "field" }, label, input);
}

function show(form) {
  const given = read();
  for (const [name] of FIELDS) form.elements[name].value = given[name] ?? "";
  form.elements.system.value = given.system ?? "";
  form.elements.theme.value = localStorage.getItem("thinslice.theme") ?? "auto";
}

function keep(form) {
  const given = {};
  for (const [name] of FIELDS) {
    const input = form.elements[name];
    if (input.value !== "" && input.validity.valid) given[name] = input.valueAsNumber;
  }
  if (form.elements.system.value.trim()) given.system = form.elements.system.value;
  localStorage.setItem(PLACE, JSON.stringify(given));
}

function useTheme(theme) {
  if (theme === "auto") {
    localStorage.removeItem("thinslice.theme");
    delete document.documentElement.dataset.theme;
  } else {
    localStorage.setItem("thinslice.theme", theme);
    document.documentElement.dataset.theme = theme;
  }
}
