// The list of conversations: open, rename, delete, import and export.

import * as chat from "./chat.js";
import { exported, imported } from "./conversation.js";
import { byId, iconButton, make, toast } from "./dom.js";
import { closePanels } from "./panels.js";
import * as store from "./store.js";

const MAX_FILE = 64 * 1024 * 1024;

export function start() {
  byId("new").addEventListener("click", () => {
    chat.show();
    closePanels();
    byId("prompt").focus();
  });
  byId("export").addEventListener("click", async () => save(await store.all()));
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", load);
}

/** Draws the list again. */
export async function refresh() {
  let all;
  try {
    all = await store.all();
  } catch {
    return toast("This browser keeps no conversations for this page.");
  }
  const list = byId("conversations");
  if (list.querySelector("input")) return; // a title is being written
  const focused = [...list.querySelectorAll("button")].indexOf(document.activeElement);
  list.replaceChildren(...all.map(entry));
  if (focused >= 0) list.querySelectorAll("button")[focused]?.focus();
  byId("export").disabled = all.length === 0;
}

function entry(conversation) {
  const title = conversation.title || "Without a title";
  const open = make("button", { className: "entry", dir: "auto", textContent: title, title });
  open.addEventListener("click", () => {
    chat.show(conversation);
    closePanels();
  });
  const isCurrent = conversation.id === chat.current().id;
  if (isCurrent) open.setAttribute("aria-current", "true");
  const rename = iconButton("edit", `Rename “${title}”`, () => editTitle(item, conversation));
  const remove = iconButton("delete", `Delete “${title}”`, () => drop(conversation));
  const item = make("li", {}, open, rename, remove);
  return item;
}

function editTitle(item, conversation) {
  const box = make("input", { className: "entry", value: conversation.title, maxLength: 80, dir: "auto", "aria-label": "Title" });
  let isOver = false;
  const finish = async (isKept) => {
    if (isOver) return;
    isOver = true;
    box.remove();
    if (isKept && box.value.trim()) {
      conversation.title = box.value.trim();
      if (chat.current().id === conversation.id) await chat.rename(conversation.title);
      else await store.put(conversation);
    }
    await refresh();
  };
  box.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter" && !event.isComposing) finish(true);
    if (event.key === "Escape") finish(false);
  });
  box.addEventListener("blur", () => finish(true));
  item.replaceChildren(box);
  box.select();
}

async function drop(conversation) {
  await store.remove(conversation.id);
  chat.forget(conversation.id);
  await refresh();
  toast("The conversation is deleted.", async () => {
    await store.put(conversation);
    await refresh();
  });
}

function save(conversations) {
  const file = new Blob([exported(conversations)], { type: "application/json" });
  const link = make("a", { href: URL.createObjectURL(file), download: `thinslice-${new Date().toISOString().slice(0, 10)}.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

async function load(event) {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  try {
    if (file.size > MAX_FILE) throw new Error("The file is larger than 64 MiB.");
    const found = imported(await file.text());
    const before = new Map((await store.all()).map((one) => [one.id, one.updated]));
    const newer = found.filter((one) => !(before.get(one.id) >= one.updated));
    for (const one of newer) await store.put(one);
    toast(`${newer.length} of ${found.length} conversations imported; the others are here as new or newer.`);
    if (newer.length === found.length) toast(found.length === 1 ? "1 conversation imported." : `${found.length} conversations imported.`);
    if (newer.some((one) => one.id === chat.current().id)) chat.show(await store.get(chat.current().id));
  } catch (error) {
    toast(`Nothing is imported. ${error.message}`);
  }
  await refresh();
}
