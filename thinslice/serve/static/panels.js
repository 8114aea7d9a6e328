// The two panels at the sides: beside the messages where there is room, over them where there is not.

import { byId } from "./dom.js";

const openers = new Map();
const NARROW = matchMedia("(max-width: 1099px)");
const SMALL = matchMedia("(max-width: 819px)");

export const isOpen = (name) => byId("app").classList.contains(`with-${name}`);

/** Has a button open and close a panel. */
export function addPanel(name, button, onchange = () => {}) {
  openers.set(name, { button, onchange });
  button.addEventListener("click", () => setOpen(name, !isOpen(name)));
}

export function setOpen(name, isOn) {
  const { button, onchange } = openers.get(name);
  if (isOpen(name) === isOn) return;
  byId("app").classList.toggle(`with-${name}`, isOn);
  button.setAttribute("aria-expanded", String(isOn));
  document.querySelector("main").inert = isOn && isOver(name);
  onchange(isOn);
  if (isOn && isOver(name)) byId(name).querySelector("button:not([hidden])").focus();
  if (!isOn && byId(name).contains(document.activeElement)) button.focus();
}

function isOver(name) {
  return (name === "sidebar" ? SMALL : NARROW).matches;
}

/** Closes panels that lie over the messages; true where one did. */
export function closePanels() {
  const over = [...openers.keys()].filter((name) => isOpen(name) && isOver(name));
  for (const name of over) setOpen(name, false);
  return over.length > 0;
}

export function start() {
  for (const one of document.querySelectorAll("[data-closes]")) {
    one.addEventListener("click", () => {
      const panel = one.closest("#sidebar, #memory");
      if (panel) setOpen(panel.id, false);
      else closePanels();
    });
  }
}
