// Answers as HTML, which the server makes of their text, block by block: it parses markdown, colours
// code, sets formulas and lets nothing else through. Blocks that are finished are rendered once.

import * as api from "./api.js";
import { copy, icon, make } from "./dom.js";

// The most the server takes at once, in characters; see MAX_TEXT there.
const MAX_TEXT = 16384;
// Times as long as rendering took that nothing is rendered: a fifth of a core, and where no answer
// comes that would be slowed by it, half a core.
const REST_LIVE = 4;
const REST = 1;
const RETRY_MS = 1000;
const MAX_KEPT = 200;

const policy = globalThis.trustedTypes?.createPolicy("answers", { createHTML: (html) => html }) ?? {
  createHTML: (html) => html,
};

// Whole texts and their blocks.
const kept = new Map();
const waiting = [];
let isBusy = false;

/** Shows a text in an element, and keeps up with it while it grows. */
export class Blocks {
  #element;
  #tail = make("div", { className: "block", dir: "auto" });
  #text = "";
  #isWhole = false;
  #taken = 0;
  #isPlain = false;
  #isEmpty = true;
  #isDone = false;
  #html = [];

  constructor(element) {
    this.#element = element;
    element.replaceChildren(this.#tail);
  }

  /** The text so far. What is before stays what it was. */
  update(text, isWhole) {
    if (this.#isDone || (text === this.#text && isWhole === this.#isWhole)) return;
    this.#text = text;
    this.#isWhole = isWhole;
    const html = isWhole && this.#taken === 0 ? kept.get(text) : undefined;
    if (html) return this.#finish(html);
    if (isWhole && this.#isEmpty) this.#showPlain();
    this.#want();
  }

  #want() {
    this.#element.setAttribute("aria-busy", "true");
    // Of a conversation that is opened, what is seen comes first, which is its end.
    if (!waiting.includes(this)) waiting[this.#isWhole ? "push" : "unshift"](this);
    if (!isBusy) work();
  }

  /** Renders what has come; returns how long to leave the server alone, in ms. */
  async step() {
    if (this.#isDone) return 0;
    if (this.#isPlain) {
      this.#showPlain();
      if (this.#isWhole) this.#element.removeAttribute("aria-busy");
      return 0;
    }
    const rest = this.#text.slice(this.#taken);
    const piece = wholeCharacters(rest.slice(0, MAX_TEXT));
    const isLast = piece.length === rest.length;
    const isLive = !this.#isWhole;
    const began = performance.now();
    let found;
    try {
      found = await api.render(piece, !isLive && isLast);
      if (this.#isDone) return 0;
    } catch (error) {
      this.#showPlain();
      if (error.status === 429) this.#want();
      else this.#element.removeAttribute("aria-busy");
      return RETRY_MS;
    }
    this.#show(found);
    // One block that is larger than what is rendered at once.
    this.#isPlain = !isLast && found.taken === 0;
    if (!isLast) this.#want();
    else if (!isLive) this.#end();
    return (performance.now() - began) * (isLive ? REST_LIVE : REST);
  }

  #show({ finished, rest, taken }) {
    this.#taken += taken;
    this.#html.push(...finished);
    for (const html of finished) this.#tail.before(block(html));
    fill(this.#tail, rest);
    this.#isEmpty = false;
  }

  #showPlain() {
    this.#isEmpty = false;
    this.#tail.replaceChildren(make("p", { className: "plain", textContent: this.#text.slice(this.#taken) }));
  }

  #finish(html) {
    this.#isDone = true;
    this.#element.removeAttribute("aria-busy");
    this.#element.replaceChildren(...html.map(block), this.#tail);
    this.#tail.replaceChildren();
  }

  #end() {
    this.#isDone = true;
    this.#element.removeAttribute("aria-busy");
    kept.set(this.#text, this.#html);
    if (kept.size > MAX_KEPT) kept.delete(kept.keys().next().value);
  }
}

async function work() {
  isBusy = true;
  while (waiting.length) await pause(await waiting.pop().step());
  isBusy = false;
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function wholeCharacters(text) {
  return /[\ud800-\udbff]$/.test(text) ? text.slice(0, -1) : text;
}

function block(html) {
  const element = make("div", { className: "block", dir: "auto" });
  fill(element, html);
  return element;
}

function fill(element, html) {
  element.innerHTML = policy.createHTML(html);
  for (const pre of element.querySelectorAll("pre")) addHead(pre);
  for (const wide of element.querySelectorAll(".table, .math, .wide")) wide.tabIndex = 0;
}

function addHead(pre) {
  const language = pre.dataset.language ?? "";
  const button = make("button", { className: "quiet", type: "button" }, icon("copy"), "Copy");
  button.addEventListener("click", () => copy(pre.textContent, button));
  const head = make("div", { className: "code-head" }, make("span", { textContent: language || "text" }), button);
  const box = make("div", { className: "code", dir: "ltr" });
  pre.replaceWith(box);
  box.append(head, pre);
  pre.tabIndex = 0;
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
}
