// Messages as elements, with what can be done to each.

import { Blocks } from "./blocks.js";
import { siblings } from "./conversation.js";
import { copy, icon, iconButton, make, number } from "./dom.js";

const NOTES = {
  length: "The answer reached the limit of tokens and ends here.",
  stopped: "You stopped this answer.",
  null: "This answer was cut off.",
};

/** One message of a conversation. `actions` has edit, retry and choose. */
export class MessageView {
  #node;
  #actions;
  #modelName;
  #body = make("div", { className: "body" });
  #notes = make("div", { className: "notes" });
  #foot = make("div", { className: "foot" });
  #thought;
  #blocks;
  #thoughtBlocks;

  constructor(conversation, node, { modelName, actions, isLive }) {
    this.#node = node;
    this.#actions = actions;
    this.#modelName = modelName;
    const isUser = node.role === "user";
    const label = isUser ? "You" : modelName;
    this.article = make("article", { "aria-label": label }, this.#body, this.#notes, this.#foot);
    this.element = make("li", { className: node.role }, this.article);
    this.conversation = conversation;
    if (isUser) this.#showUser();
    else this.#blocks = new Blocks(this.#body);
    this.update(isLive);
  }

  /** Shows what the message has become. */
  update(isLive) {
    const node = this.#node;
    this.element.classList.toggle("live", isLive);
    if (node.role === "assistant") {
      this.#showThought(isLive);
      this.element.classList.toggle("waiting", isLive && !node.content && !node.reasoning);
      if (node.content) this.#blocks.update(node.content, !isLive);
      this.#showNotes(isLive);
    }
    this.#foot.replaceChildren(...(isLive ? [] : this.#buttons()));
  }

  #showUser() {
    this.#body.append(make("p", { className: "plain", dir: "auto", textContent: this.#node.content }));
  }

  #showThought(isLive) {
    const node = this.#node;
    if (!node.reasoning) return;
    if (!this.#thought) this.#makeThought();
    const isThinking = isLive && !node.content;
    const seconds = ((node.thoughtMs ?? 0) / 1000).toFixed(node.thoughtMs < 9950 ? 1 : 0);
    this.#thought.classList.toggle("thinking", isThinking);
    this.#thought.querySelector(".told").textContent = isThinking ? `Thinking, ${seconds} s` : `Thought for ${seconds} s`;
    if (this.#thought.open) this.#thoughtBlocks.update(node.reasoning, !isThinking);
  }

  #makeThought() {
    const inner = make("div", { className: "body" });
    this.#thoughtBlocks = new Blocks(inner);
    const told = make("span", { className: "told" });
    this.#thought = make("details", { className: "thought" }, make("summary", {}, icon("right"), told), inner);
    this.#thought.addEventListener("toggle", () => this.#showThought(this.element.classList.contains("live")));
    this.#body.before(this.#thought);
  }

  #showNotes(isLive) {
    const node = this.#node;
    const notes = [];
    if (!isLive && node.error) {
      const retry = make("button", { type: "button", onclick: () => this.#actions.retry(node) }, icon("retry"), "Retry");
      notes.push(make("div", { className: "error" }, icon("warn"), make("p", { textContent: node.error }), retry));
    } else if (!isLive && NOTES[node.finish]) {
      notes.push(make("p", { className: "note", textContent: NOTES[node.finish] }));
    }
    if (this.#notes.childElementCount || notes.length) this.#notes.replaceChildren(...notes);
  }

  #buttons() {
    const node = this.#node;
    const copyButton = iconButton("copy", "Copy the message", () => copy(node.content, copyButton));
    const other = [];
    if (node.role === "user") other.push(iconButton("edit", "Edit the message", () => this.edit()));
    else if (!node.error) other.push(iconButton("retry", "Answer again", () => this.#actions.retry(node)));
    return [...this.#versions(), ...(node.content ? [copyButton] : []), ...other, ...this.#speed()];
  }

  #versions() {
    const all = siblings(this.conversation, this.#node);
    if (all.length < 2) return [];
    const place = all.indexOf(this.#node);
    const to = (name, label, other) => {
      const button = iconButton(name, label, () => this.#actions.choose(other));
      button.disabled = !other;
      return button;
    };
    const told = make("span", { className: "place", textContent: `${place + 1}/${all.length}` });
    told.setAttribute("aria-label", `Version ${place + 1} of ${all.length}`);
    told.setAttribute("role", "img");
    return [
      make("span", { className: "versions" }, to("left", "Version before", all[place - 1]), told, to("right", "Next version", all[place + 1])),
    ];
  }

  #speed() {
    const { tokens, tokensPerSecond } = this.#node;
    if (!tokens) return [];
    const speed = tokensPerSecond ? `, ${tokensPerSecond.toFixed(1)} tokens/s` : "";
    return [make("span", { className: "speed", textContent: `${number(tokens)} ${tokens === 1 ? "token" : "tokens"}${speed}` })];
  }

  /** Puts the message into a box to change it. */
  edit() {
    const node = this.#node;
    const box = make("textarea", { value: node.content, dir: "auto", "aria-label": "Edit the message" });
    const close = () => {
      form.replaceWith(this.article);
      this.article.querySelector("[aria-label='Edit the message']")?.focus();
    };
    const send = () => {
      if (box.value.trim()) this.#actions.edit(node, box.value);
    };
    const form = make(
      "form",
      { className: "editing", onsubmit: (event) => (event.preventDefault(), send()) },
      box,
      make("div", { className: "row" }, make("button", { type: "button", textContent: "Cancel", onclick: close }), make("button", { className: "filled", type: "submit", textContent: "Send" })),
    );
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    this.article.replaceWith(form);
    box.focus();
  }
}
