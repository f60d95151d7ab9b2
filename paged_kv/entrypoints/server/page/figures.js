/** Live figures of the server's cache, drawn every second. Knows figures, never what is said. */

import { statistics } from "./server.js";

const INTERVAL = 1000; // milliseconds
const SECONDS = 60; // that the sparkline shows
const KINDS = [
  ["head", "first tokens, full precision"],
  ["body", "quantized"],
  ["tail", "newest tokens, full precision"],
  ["cached", "idle, can still be found"],
  ["free", "empty"],
];
const IN_USE = ["head", "body", "tail"];
const UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB"];
const NONE = "–"; // for a figure that the server does not tell

const element = (id) => document.getElementById(id);
const rates = []; // of the last minute: {time, rate}
let isAsking = false;
let isLocked = false; // until there is a key

/** Draw the figures every second, while somebody can see them. */
export function watch() {
  drawLegend();
  setInterval(look, INTERVAL);
  document.addEventListener("visibilitychange", look);
  look();
}

/** Ask again: there is a key now. */
export function unlock() {
  isLocked = false;
  look();
}

async function look() {
  if (document.hidden || isAsking || isLocked) return;
  isAsking = true;
  try {
    draw(await statistics());
    element("trouble").textContent = "";
  } catch (error) {
    isLocked = error.status === 401;
    element("trouble").textContent = `No figures: ${lowered(error.message)}`;
    element("in-short").textContent = "no figures";
  } finally {
    isAsking = false;
  }
}

function draw({ requests = {}, blocks = {}, bytes = {}, prefix_cache = {}, tokens = {}, ...rest }) {
  const rate = tokens.generated_per_second;
  tell("running", count(requests.running));
  tell("waiting", count(requests.waiting));
  tell("rate", count(rate, 1));
  tell("hit-rate", percent(prefix_cache.hit_rate));
  tell("format", rest.kv_format ?? NONE);
  tell("memory", `${size(bytes.allocated)} of ${size(bytes.total)}`);
  const inUse = IN_USE.reduce((sum, kind) => sum + blocks[kind], 0);
  const share = inUse / blocks.total;
  tell("blocks-in-use", `${count(inUse)} of ${count(blocks.total)} in use`);
  tell("in-short", `${percent(share)} in use, ${count(rate, 1)} tokens/s`);
  drawBar(blocks);
  drawSparkline(rate ?? 0);
}

function drawLegend() {
  for (const [kind, meaning] of KINDS) {
    const row = element("kinds").insertRow();
    const name = document.createElement("th");
    name.scope = "row";
    name.className = kind;
    name.textContent = kind;
    row.append(name);
    row.insertCell().textContent = meaning;
    row.insertCell().id = `num-${kind}`;
    const part = document.createElement("span");
    part.className = kind;
    element("bar").append(part);
  }
}

function drawBar(blocks) {
  KINDS.forEach(([kind, meaning], i) => {
    const part = element("bar").children[i];
    part.hidden = !blocks[kind];
    part.style.flexGrow = blocks[kind] ?? 0;
    part.title = `${kind}: ${count(blocks[kind])}, ${meaning}`;
    tell(`num-${kind}`, count(blocks[kind]));
  });
  const said = KINDS.map(([kind]) => `${count(blocks[kind])} ${kind}`).join(", ");
  element("bar").setAttribute("aria-label", `Blocks: ${said}`);
}

function drawSparkline(rate) {
  const now = performance.now() / 1000;
  rates.push({ time: now, rate });
  while (rates[0].time < now - SECONDS) rates.shift();
  const most = Math.max(1, ...rates.map((sample) => sample.rate));
  const [width, height] = [240, 48];
  const x = (time) => (width * (1 - (now - time) / SECONDS)).toFixed(1);
  const y = (value) => (height - 2 - (height - 4) * (value / most)).toFixed(1);
  const line = rates.map((sample) => `${x(sample.time)},${y(sample.rate)}`).join(" ");
  const svg = element("sparkline");
  const shapes = [
    ["polygon", `${x(rates[0].time)},${height} ${line} ${width},${height}`],
    ["polyline", line],
  ].map(([name, points]) => {
    const shape = document.createElementNS(svg.namespaceURI, name);
    shape.setAttribute("points", points);
    return shape;
  });
  svg.replaceChildren(...shapes);
  const said = `Tokens a second in the last minute: ${count(rate, 1)} now, ${count(most, 1)} at most`;
  svg.setAttribute("aria-label", said);
}

function tell(id, text) {
  if (element(id).textContent !== text) element(id).textContent = text;
}

function count(value, digits = 0) {
  if (!Number.isFinite(value)) return NONE;
  return value.toLocaleString("en", { maximumFractionDigits: digits });
}

function percent(share) {
  return Number.isFinite(share) ? `${count(100 * share)} %` : NONE;
}

function size(bytes) {
  if (!Number.isFinite(bytes)) return NONE;
  const power = bytes < 1 ? 0 : Math.min(UNITS.length - 1, Math.floor(Math.log2(bytes) / 10));
  return `${count(bytes / 1024 ** power, 1)} ${UNITS[power]}`;
}

function lowered(sentence) {
  return sentence.charAt(0).toLowerCase() + sentence.slice(1);
}
