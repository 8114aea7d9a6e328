// What every part of the page builds elements with.

export const byId = (id) => document.getElementById(id);

/** An element with properties, listeners (`onclick`), attributes (`aria-label`) and children. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role" || name === "dir") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, onclick) {
  return make("button", { className: "quiet", type: "button", title: label, "aria-label": label, onclick }, icon(name));
}

/** Tells screen readers alone. */
export function announce(text) {
  byId("status").textContent = text;
}

let toastTimer;

/** Tells everybody, for some seconds; with a way back where there is one. */
export function toast(text, undo) {
  const box = byId("toast");
  const button = box.querySelector("button");
  box.querySelector("span").textContent = text;
  button.hidden = !undo;
  if (undo) {
    button.textContent = "Undo";
    button.onclick = () => {
      box.hidden = true;
      undo();
    };
  }
  box.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (box.hidden = true), 8000);
}

/** Puts text on the clipboard and shows on the button that it is there. */
export async function copy(text, button) {
  if (!(await isCopied(text))) {
    toast("The browser did not let this page copy.");
    return;
  }
  const before = button.firstChild;
  before.replaceWith(icon("done"));
  announce("Copied");
  setTimeout(() => button.firstChild.replaceWith(before), 1500);
}

async function isCopied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return isCopiedByCommand(text);
  }
}

/** The older way, which is the only one without HTTPS. */
function isCopiedByCommand(text) {
  const focused = document.activeElement;
  const box = make("textarea", { className: "hidden", value: text });
  document.body.append(box);
  box.select();
  const isDone = document.execCommand("copy");
  box.remove();
  focused?.focus();
  return isDone;
}

const UNITS = ["B", "KiB", "MiB", "GiB"];

/** Bytes for a person, as the command line writes them. */
export function bytes(count) {
  let size = count;
  for (const unit of UNITS) {
    if (Math.abs(size) < 1024) return unit === "B" ? `${size} B` : `${size.toFixed(2)} ${unit}`;
    size /= 1024;
  }
  return `${size.toFixed(2)} TiB`;
}

export const number = (value) => value.toLocaleString("en");
