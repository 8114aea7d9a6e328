// Puts the page together.

import * as api from "./api.js";
import * as chat from "./chat.js";
import { byId } from "./dom.js";
import * as memory from "./memory.js";
import * as panels from "./panels.js";
import * as settings from "./settings.js";
import * as sidebar from "./sidebar.js";
import * as store from "./store.js";

const prompt = byId("prompt");
const composer = byId("composer");
// Where a keyboard on the screen has no other key for a new line.
const hasTouch = matchMedia("(pointer: coarse)");

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  byId("send").disabled = !prompt.value.trim();
}

prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !hasTouch.matches) {
    event.preventDefault();
    composer.requestSubmit();
  }
  if (event.key === "ArrowUp" && !prompt.value) {
    event.preventDefault();
    chat.editLast();
  }
});
composer.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value;
  if (!text.trim() || chat.isAnswering()) return;
  prompt.value = "";
  fit();
  chat.send(text);
});

document.addEventListener("keydown", (event) => {
  const isTyping = /^(INPUT|TEXTAREA)$/.test(event.target.tagName);
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (!panels.closePanels()) chat.stop();
  } else if (event.altKey && event.code === "KeyN") {
    event.preventDefault();
    byId("new").click();
  } else if (event.altKey && event.code === "KeyM") {
    event.preventDefault();
    byId("open-memory").click();
  } else if (!isTyping && event.key === "/") {
    event.preventDefault();
    prompt.focus();
  } else if (!isTyping && event.key === "?") {
    byId("keys").showModal();
  }
});

byId("open-keys").addEventListener("click", () => byId("keys").showModal());
addEventListener("pagehide", () => chat.leave());
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) memory.refresh();
});

/** Asks for the key until the server takes one. */
function askForKey() {
  const dialog = byId("key-dialog");
  if (dialog.open) return Promise.resolve();
  byId("key-wrong").hidden = !api.key.get();
  byId("key").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.querySelector("form").onsubmit = async (event) => {
      event.preventDefault();
      api.key.set(byId("key").value.trim(), byId("key-kept").checked);
      try {
        await api.plan();
      } catch (error) {
        byId("key-wrong").hidden = error.status !== 401;
        if (error.status === 401) return byId("key").select();
      }
      dialog.close();
      resolve();
    };
  });
}
byId("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
/** Which model is served: another one perhaps, once the server has been started again. */
function know(found) {
  chat.setModel(found.model);
  memory.facts(found);
  settings.know(found);
  prompt.placeholder = `Message ${found.model}`;
}
document.addEventListener("plan", (event) => know(event.detail));
document.addEventListener("key-needed", async () => {
  await askForKey();
  memory.refresh();
});
byId("forget-key").addEventListener("click", () => {
  api.key.forget();
  location.reload();
});

/** The plan, for which the key may have to be given first; null where no server answers. */
async function firstPlan() {
  for (;;) {
    try {
      return await api.plan();
    } catch (error) {
      if (error.status !== 401) return null;
      await askForKey();
    }
  }
}

async function start() {
  settings.start();
  panels.addPanel("sidebar", byId("open-sidebar"));
  panels.addPanel("memory", byId("open-memory"), () => memory.refresh());
  panels.start();
  sidebar.start();
  chat.start(sidebar.refresh);
  const found = await firstPlan();
  if (found) know(found);
  byId("forget-key").hidden = !api.key.get();
  chat.show(await opened());
  memory.refresh();
  fit();
  if (!hasTouch.matches) prompt.focus({ preventScroll: true });
  document.documentElement.dataset.ready = "";
}

/** The conversation that the address names. */
async function opened() {
  try {
    return (await store.get(location.hash.slice(1))) ?? undefined;
  } catch {
    return undefined;
  }
}

start();
