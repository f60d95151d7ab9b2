/** The server of this page: what it answers, and why not. Knows HTTP, never the page. */

import { eventsOf } from "./event_stream.js";

const KEY = "paged_kv API key"; // its name in sessionStorage, which ends with the tab
const REASONS = {
  401: "The server asks for an API key.",
  404: "The server does not know this.",
  413: "This is too long for the server.",
  429: "The server is busy. Try again in a moment.",
  503: "The server is shutting down.",
  504: "This took longer than the server allows.",
};
const TOO_LONG = "The conversation is too long for the model. Begin a new one.";

/** An error that people can read; `detail` is what the server says itself, if it says anything. */
export class Refusal extends Error {
  constructor(message, { status = 0, detail = "" } = {}) {
    super(message);
    this.status = status;
    this.detail = detail;
  }
}

export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Names that requests may call the model. */
export async function modelNames() {
  const { data } = await (await ask("v1/models")).json();
  return data.map((card) => card.id);
}

/** Live figures, as an object. */
export async function statistics() {
  return (await ask("statistics", { signal: AbortSignal.timeout(5000) })).json();
}

/**
 * The answer to a chat as it comes: `{text}` pieces, the `{reason}` of its end, its `{usage}`.
 * Throws a `Refusal`, or an AbortError when the signal is given.
 */
export async function* answerTo(chat, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...chat, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  try {
    for await (const data of eventsOf(response.body)) {
      if (data === "[DONE]") return;
      const { error, choices, usage } = JSON.parse(data);
      if (error) throw refusalOf(500, error);
      const [choice] = choices ?? [];
      if (choice?.delta?.content) yield { text: choice.delta.content };
      if (choice?.finish_reason) yield { reason: choice.finish_reason };
      if (usage) yield { usage };
    }
  } catch (error) {
    throw error instanceof TypeError ? brokenOff() : error;
  }
  throw brokenOff();
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server does not answer.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw refusalOf(response.status, body.error);
}

function refusalOf(status, error) {
  const detail = error?.message ?? "";
  const isTooLong = error?.code === "context_length_exceeded";
  const isSlow = error?.code === "timeout";
  const unknown = status < 500 ? "The server refused this." : "The server failed at this.";
  const message = isTooLong ? TOO_LONG : (REASONS[isSlow ? 504 : status] ?? unknown);
  return new Refusal(message, { status, detail });
}

function brokenOff() {
  return new Refusal("The answer broke off: the connection was lost.");
}
