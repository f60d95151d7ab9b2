/** The conversation: what was asked, and the answers as they come. Knows the page, never HTTP. */

import { unlock, watch } from "./figures.js";
import { answerTo, keepKey, modelNames, Refusal } from "./server.js";

const ENDS = { length: "cut off at the limit of tokens", stopped: "stopped" };
const NEAR = 48; // pixels: so far from the end is at the end
const WIDE = matchMedia("(min-width: 56rem)"); // as in style.css

const element = (id) => document.getElementById(id);
let turns = [];
let running = null; // the AbortController of the answer that comes
let isAtEnd = true; // whoever scrolls back to read stays there

/** A question and its answer, which may be none, cut short or failed. */
class Turn {
  constructor(question) {
    this.question = question;
    const item = element("turn").content.cloneNode(true).firstElementChild;
    const part = (selector) => item.querySelector(selector);
    this.item = item;
    this.parts = {
      text: part(".text"),
      usage: part(".usage"),
      error: part(".error"),
      again: part(".again"),
    };
    part(".question p").textContent = question;
    part("h3").textContent = element("model").value || "Model";
    this.parts.again.addEventListener("click", () => run(this));
    this.begin();
  }

  begin() {
    this.answer = "";
    this.error = null;
    this.item.classList.add("coming");
    this.parts.text.setAttribute("aria-busy", "true"); // read out when it is whole
    this.parts.text.hidden = false;
    this.parts.error.hidden = this.parts.again.hidden = true;
    for (const name of ["text", "usage", "error"]) this.parts[name].replaceChildren();
  }

  add(text) {
    this.answer += text;
    this.parts.text.append(text);
  }

  end({ reason, usage, seconds, error = null }) {
    this.error = error;
    this.item.classList.remove("coming");
    this.parts.text.removeAttribute("aria-busy");
    this.parts.text.hidden = this.answer === "";
    this.parts.usage.textContent = [ENDS[reason], usage && usageInWords(usage, seconds)]
      .filter(Boolean)
      .join(" · ");
    this.parts.error.hidden = error === null;
    if (error) this.parts.error.append(paragraph(error.message), paragraph(error.detail ?? ""));
    this.parts.again.hidden = error === null && reason !== "stopped";
  }

  /** As the model is told of it; one without an answer it is not told of. */
  get messages() {
    if (this.answer === "") return [];
    return [
      { role: "user", content: this.question },
      { role: "assistant", content: this.answer },
    ];
  }
}

function ask(question) {
  if (running || !question.trim()) return;
  turns.at(-1)?.parts.again.setAttribute("hidden", "");
  const turn = new Turn(question);
  turns.push(turn);
  element("welcome").hidden = true;
  element("turns").append(turn.item);
  isAtEnd = true;
  run(turn);
}

/** Get an answer to the last turn, in place of the one that it may have. */
async function run(turn) {
  if (running) return;
  const controller = new AbortController();
  const began = performance.now();
  const end = {};
  keepInView(() => turn.begin());
  setRunning(controller);
  try {
    for await (const piece of answerTo(chatUpTo(turn), controller.signal)) {
      if (piece.text) keepInView(() => turn.add(piece.text));
      Object.assign(end, piece);
    }
  } catch (error) {
    if (controller.signal.aborted) end.reason = "stopped";
    else end.error = error instanceof Refusal ? error : unexpected(error);
  }
  end.seconds = (performance.now() - began) / 1000;
  keepInView(() => turn.end(end));
  if (running === controller) setRunning(null);
  if (end.error?.status === 401) askForKey();
}

function chatUpTo(turn) {
  const system = element("system").value.trim();
  const before = turns.slice(0, turns.indexOf(turn)).flatMap((each) => each.messages);
  const messages = [...before, { role: "user", content: turn.question }];
  if (system) messages.unshift({ role: "system", content: system });
  const chosen = {
    model: element("model").value || null,
    temperature: numberIn("temperature"),
    max_tokens: numberIn("max-tokens"),
  };
  const told = Object.entries(chosen).filter(([, value]) => value !== null);
  return { ...Object.fromEntries(told), messages };
}

function numberIn(id) {
  const value = element(id).valueAsNumber;
  return Number.isNaN(value) ? null : value;
}

function setRunning(controller) {
  running = controller;
  element("stop").hidden = controller === null;
  element("send").hidden = controller !== null;
}

/** Change the conversation; whoever was at its end stays there. */
function keepInView(change) {
  change();
  if (isAtEnd) element("scroller").scrollTop = element("scroller").scrollHeight;
}

function usageInWords(usage, seconds) {
  const { prompt_tokens, completion_tokens, prompt_tokens_details } = usage;
  const cached = prompt_tokens_details?.cached_tokens;
  const found = cached === undefined ? "" : `, ${cached} of them cached`;
  const times = `${completion_tokens} generated in ${seconds.toFixed(1)} s`;
  return `${prompt_tokens} prompt tokens${found} · ${times}`;
}

function paragraph(text) {
  const found = document.createElement("p");
  found.textContent = text;
  return found;
}

function unexpected(error) {
  console.error(error);
  return new Refusal("This page failed.", { detail: String(error) });
}

function begin() {
  running?.abort();
  setRunning(null);
  turns = [];
  element("turns").replaceChildren();
  element("welcome").hidden = false;
  element("question").focus();
}

// -- the server's models, and its key --------------------------------------------------------------

async function loadModels() {
  const names = await modelNames();
  element("model").replaceChildren(...names.map((name) => new Option(name)));
  showModel();
}

function showModel() {
  const name = element("model").value;
  element("model-name").textContent = name;
  element("model-name").title = name;
}

function askForKey() {
  element("key-form").hidden = false;
  element("key").focus();
}

async function takeKey() {
  keepKey(element("key").value);
  try {
    await loadModels();
  } catch (error) {
    const isWrong = error.status === 401;
    element("key-note").textContent = isWrong ? "The server refused this key." : error.message;
    element("key").select();
    return;
  }
  element("key-form").hidden = true;
  element("key").value = "";
  unlock();
  const last = turns.at(-1);
  if (last?.error?.status === 401) run(last);
  element("question").focus();
}

// -- what people do --------------------------------------------------------------------------------

function sendQuestion(event) {
  event.preventDefault();
  if (running) return;
  const question = element("question").value;
  element("question").value = "";
  ask(question);
}

function listen() {
  element("composer").addEventListener("submit", sendQuestion);
  element("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    sendQuestion(event);
  });
  element("stop").addEventListener("click", () => {
    running?.abort();
    element("question").focus();
  });
  element("scroller").addEventListener("scroll", ({ target }) => {
    isAtEnd = target.scrollHeight - target.scrollTop - target.clientHeight < NEAR;
  });
  element("new").addEventListener("click", begin);
  element("model").addEventListener("change", showModel);
  element("examples").addEventListener("click", (event) => {
    if (event.target.matches("button")) ask(event.target.textContent);
  });
  element("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    takeKey();
  });
}

function unfold() {
  for (const id of ["cache", "settings"]) element(id).open = WIDE.matches;
}

listen();
unfold();
WIDE.addEventListener("change", unfold);
loadModels().catch((error) => {
  if (error.status === 401) askForKey();
});
watch();
