// A conversation is a tree: a message that is edited or answered again gets a sibling, and nothing
// is lost. `leaf` is the last message of the branch that is shown.

const FORMAT = "thinslice-conversations";
const FINISHES = ["stop", "length", "stopped", "error", null];
const MAX_TITLE = 80;
const ID = /^[0-9a-f-]{36}$/;

/** A name that nothing else has; randomUUID is not there without HTTPS. */
function newId() {
  const hex = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/(.{8})(.{4})(.{4})(.{4})(.{12})/, "$1-$2-$3-$4-$5");
}

export function create() {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, nodes: {}, leaf: null };
}

/** Adds a message behind another, or at the beginning, and shows it. */
export function add(conversation, parent, role, content) {
  const node = { id: newId(), parent, role, content, reasoning: "", finish: null, created: Date.now() };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  if (!conversation.title) conversation.title = titleOf(content);
  return node;
}

/** The beginning of a message: whole characters, and mostly whole words. */
function titleOf(content) {
  const text = content.trim().replace(/\s+/g, " ");
  if (text.length <= MAX_TITLE) return text;
  const start = text.slice(0, MAX_TITLE - 1).replace(/[\ud800-\udbff]$/, "");
  return `${start.replace(/ \S{0,20}$/, "")}…`;
}

/** The messages that are shown, in order. */
export function path(conversation, leaf = conversation.leaf) {
  const found = [];
  for (let node = conversation.nodes[leaf]; node; node = conversation.nodes[node.parent]) found.unshift(node);
  return found;
}

/** The versions of a message, the eldest first. */
export function siblings(conversation, node) {
  return children(conversation, node.parent);
}

function children(conversation, parent) {
  const found = Object.values(conversation.nodes).filter((one) => one.parent === parent);
  return found.sort((one, other) => one.created - other.created);
}

/** Shows another version of a message, with what followed it last. */
export function choose(conversation, node) {
  let leaf = node;
  for (let next = node; next; next = children(conversation, next.id).at(-1)) leaf = next;
  conversation.leaf = leaf.id;
}

/** What the model is asked: the messages up to one, without its thoughts. */
export function asked(conversation, node, system) {
  const said = path(conversation, node.id).filter((one) => one.content.trim());
  const messages = said.map(({ role, content }) => ({ role, content }));
  return system.trim() ? [{ role: "system", content: system }, ...messages] : messages;
}

export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** The conversations of an exported file, which may have come from anywhere. Throws an Error. */
export function imported(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    throw new Error("The file is no JSON.");
  }
  if (found?.format !== FORMAT || found.version !== 1 || !Array.isArray(found.conversations)) {
    throw new Error("The file holds no conversations of thinslice.");
  }
  return found.conversations.map(checked);
}

function checked(given) {
  const whole = create();
  whole.id = id(given?.id);
  whole.title = text(given.title).slice(0, MAX_TITLE);
  whole.created = time(given.created);
  whole.updated = time(given.updated);
  for (const node of Object.values(given.nodes ?? {})) {
    if (!["user", "assistant"].includes(node?.role)) throw new Error("A message in the file is nobody's.");
    const { role } = node;
    const kept = { id: id(node.id), parent: node.parent === null ? null : id(node.parent), role };
    Object.assign(kept, { content: text(node.content), reasoning: text(node.reasoning), created: time(node.created) });
    kept.finish = FINISHES.includes(node.finish) ? node.finish : null;
    for (const name of ["thoughtMs", "tokens", "tokensPerSecond"]) {
      if (Number.isFinite(node[name])) kept[name] = node[name];
    }
    if (node.error) kept.error = text(node.error);
    whole.nodes[kept.id] = kept;
  }
  if (given.leaf !== null && !Object.hasOwn(whole.nodes, text(given.leaf))) throw new Error("The file is incomplete.");
  whole.leaf = given.leaf;
  for (const node of Object.values(whole.nodes)) checkParents(whole, node);
  return whole;
}

function checkParents(conversation, node) {
  const seen = new Set();
  for (let one = node; one.parent !== null; one = conversation.nodes[one.parent]) {
    seen.add(one.id);
    if (!Object.hasOwn(conversation.nodes, one.parent) || seen.has(one.parent)) {
      throw new Error("A message in the file follows none.");
    }
  }
}

function text(value) {
  if (typeof value !== "string") throw new Error("A message in the file is no text.");
  return value;
}

function id(value) {
  if (!ID.test(text(value))) throw new Error("A message in the file has no name of ours.");
  return value;
}

function time(value) {
  return Number.isFinite(value) ? value : Date.now();
}
