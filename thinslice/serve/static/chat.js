// The conversation that is shown, and the one answer that may be coming.

import * as api from "./api.js";
import * as tree from "./conversation.js";
import { announce, byId, make, toast } from "./dom.js";
import { MessageView } from "./messages.js";
import { sampling } from "./settings.js";
import * as store from "./store.js";

// What helps where asking again does not.
const ADVICE = {
  context_length_exceeded:
    "Edit your message to make it shorter, ask for fewer tokens in the settings, or start a new conversation.",
};
const SAVE_MS = 1000;
const NEAR_END_PX = 80;
const EXAMPLES = [
  ["Explain a thing", "Explain in two sentences why the sky is blue."],
  ["Work it out", "A train covers 210 km in 2.5 hours. What is its average speed? Show the steps."],
  ["Write code", "Write a Python function that reverses a string, and explain it."],
  ["Put in order", "Compare tea and coffee in a small table: taste, caffeine, how to make it."],
];

let conversation = tree.create();
let views = new Map();
let live = null;
let isAtEnd = true;
let modelName = "";
/** Called where a conversation has changed in what the list of them shows. */
let onchanged = () => {};

export const current = () => conversation;
export const isAnswering = () => live !== null;

export function setModel(name) {
  modelName = name;
}

export function start(changed) {
  onchanged = changed;
  const scroller = byId("scroller");
  let top = 0;
  // Away from the end by going up, not by what comes below.
  scroller.addEventListener("scroll", () => {
    const isNear = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END_PX;
    isAtEnd = isNear || (isAtEnd && scroller.scrollTop >= top);
    top = scroller.scrollTop;
    byId("to-end").hidden = isAtEnd;
  });
  const grown = new ResizeObserver(() => toEnd(false));
  for (const one of [scroller, byId("messages")]) grown.observe(one);
  byId("to-end").addEventListener("click", () => toEnd(true));
  byId("stop").addEventListener("click", stop);
  byId("examples").append(...EXAMPLES.map(example));
}

function example([title, text]) {
  const use = () => {
    byId("prompt").value = text;
    byId("prompt").dispatchEvent(new Event("input"));
    byId("prompt").focus();
  };
  const button = make("button", { type: "button", onclick: use }, make("strong", { textContent: title }), make("span", { textContent: text }));
  return make("li", {}, button);
}

/** Shows a conversation; a new one where none is given. */
export function show(given = tree.create()) {
  conversation = live?.conversation.id === given.id ? live.conversation : given;
  location.replace(`#${conversation.leaf ? conversation.id : ""}`);
  draw();
  toEnd(true);
  onchanged();
}

function draw() {
  const nodes = tree.path(conversation);
  views = new Map(nodes.map((node) => [node.id, viewOf(node)]));
  byId("messages").replaceChildren(...[...views.values()].map((view) => view.element));
  byId("welcome").hidden = nodes.length > 0;
  byId("title").textContent = conversation.title || "New conversation";
  document.title = conversation.title ? `${conversation.title} · thinslice` : "thinslice";
  byId("app").classList.toggle("empty", nodes.length === 0);
}

function viewOf(node) {
  const actions = { edit, retry, choose };
  return new MessageView(conversation, node, { modelName, actions, isLive: live?.node === node });
}

function toEnd(isForced) {
  if (isForced) isAtEnd = true;
  if (isAtEnd) byId("scroller").scrollTop = byId("scroller").scrollHeight;
}

/** Sends a message behind the last one. */
export async function send(text) {
  const node = tree.add(conversation, conversation.leaf, "user", text);
  await answer(node);
}

async function edit(node, text) {
  if (isBusy()) return;
  await answer(tree.add(conversation, node.parent, "user", text));
}

async function retry(node) {
  if (isBusy()) return;
  // An answer of which nothing came is no version of it.
  if (node.error && !node.content && !node.reasoning) delete conversation.nodes[node.id];
  await answer(conversation.nodes[node.parent]);
}

function choose(node) {
  if (isBusy()) return;
  tree.choose(conversation, node);
  draw();
  save(conversation);
  views.get(node.id)?.article.querySelector(".versions button:enabled")?.focus();
}

function isBusy() {
  if (live) toast("An answer is still coming. Stop it first.");
  return live !== null;
}

/** Edits the user's last message. */
export function editLast() {
  const last = tree.path(conversation).findLast((node) => node.role === "user");
  if (last && !live) views.get(last.id).edit();
}

export function stop() {
  live?.abort.abort();
}

/** Lets a conversation go; an answer to it ends. */
export function forget(id) {
  if (live?.conversation.id === id) {
    live.isForgotten = true;
    stop();
  }
  if (conversation.id === id) show();
}

async function answer(question) {
  const body = request(question);
  const node = tree.add(conversation, question.id, "assistant", "");
  live = { conversation, node, abort: new AbortController(), savedAt: 0 };
  location.replace(`#${conversation.id}`);
  draw();
  toEnd(true);
  setAnswering(true);
  announce(`${modelName} is answering`);
  const clock = setInterval(shownLive, 100);
  save(conversation).then(onchanged);
  try {
    await follow(body);
  } catch (error) {
    ended(error);
  }
  clearInterval(clock);
  const { conversation: answered, isForgotten } = live;
  live = null;
  setAnswering(false);
  views.get(node.id)?.update(false);
  announce(node.error ?? "The answer is complete");
  if (isForgotten) return;
  await save(answered);
  onchanged();
}

function request(question) {
  const { system, ...given } = sampling();
  const messages = tree.asked(conversation, question, system);
  return { model: modelName, messages, stream: true, stream_options: { include_usage: true }, ...given };
}

async function follow(body) {
  const { node, abort } = live;
  let firstAt;
  let lastAt;
  for await (const chunk of api.chat(body, abort.signal)) {
    if (chunk.usage) {
      node.tokens = chunk.usage.completion_tokens;
      if (lastAt > firstAt) node.tokensPerSecond = ((node.tokens - 1) * 1000) / (lastAt - firstAt);
    }
    const choice = chunk.choices[0];
    if (!choice) continue;
    const { reasoning_content: thought = "", content = "" } = choice.delta;
    if (thought || content) {
      lastAt = performance.now();
      firstAt ??= lastAt;
    }
    if (thought) node.reasoning += thought;
    if (node.reasoning && !node.content) node.thoughtMs = performance.now() - firstAt;
    node.content += content;
    if (choice.finish_reason) node.finish = choice.finish_reason;
    if (thought || content) changed();
  }
}

function ended(error) {
  if (error.name === "AbortError") {
    live.node.finish = "stopped";
    return;
  }
  live.node.finish = "error";
  live.node.error = [error.message, ADVICE[error.code]].filter(Boolean).join(" ");
  if (error.status === 401) document.dispatchEvent(new CustomEvent("key-needed"));
  if (!(error instanceof api.ApiError)) throw error;
}

function changed() {
  if (Date.now() - live.savedAt > SAVE_MS) {
    live.savedAt = Date.now();
    save(live.conversation);
  }
  shownLive();
}

function shownLive() {
  if (live && conversation === live.conversation) views.get(live.node.id)?.update(true);
}

function setAnswering(isOn) {
  byId("stop").hidden = !isOn;
  byId("send").hidden = isOn;
  byId("app").classList.toggle("answering", isOn);
}

async function save(one) {
  one.updated = Date.now();
  try {
    await store.put(one);
  } catch {
    toast("The browser does not keep this conversation: its storage is full or off.");
  }
}

/** Gives the conversation that is shown another title. */
export async function rename(title) {
  conversation.title = title;
  byId("title").textContent = title;
  await save(conversation);
}

/** Keeps what has come where the page is left in the middle of an answer. */
export function leave() {
  if (live) store.put(live.conversation);
}
