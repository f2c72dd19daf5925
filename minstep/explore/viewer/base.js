"use strict";
const trace = JSON.parse(document.getElementById("trace").textContent);
const { layers, tokens, words, count } = trace;
const byId = (id) => document.getElementById(id);

// What is chosen; every drawer shows it. `key` is the position that the token looks at.
const now = {
  layer: firstLayer(),
  token: Math.max(0, count - 1),
  head: 0,
  key: Math.max(0, count - 1),
  row: 0,
  measure: "state",
};
const drawers = [];
const NO_POSITION = "this depth has no such position";

function choose(change) {
  Object.assign(now, change);
  for (const draw of drawers) draw();
}

function firstLayer() {
  const fullest = layers.findIndex((layer) => layer.probs && layer.ids);
  return fullest >= 0 ? fullest : Math.max(0, layers.findIndex((layer) => !isAbsent(layer)));
}

// Words

function isAbsent(layer) {
  return !layer.state && !layer.probs && !layer.ids && !layer.attention && !layer.mlp;
}
function piece(id) {
  return words[id] ?? `⟨${id}⟩`;
}
function visible(text) {
  return text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥");
}
function token(at) {
  return tokens && at < tokens.length ? visible(piece(tokens[at])) : `position ${at}`;
}
function named(at) {
  return tokens ? `“${token(at)}” at ${at}` : `position ${at}`;
}
function title(layer) {
  return layer.depth ? `MTP depth ${layer.depth} (layer ${layer.n})` : `layer ${layer.n}`;
}
function short(layer) {
  return layer.depth ? `MTP ${layer.depth}` : `${layer.n}`;
}
function kind(layer) {
  return layer.kind ? layer.kind.split("_")[0] : "unsaid";
}
function quoted(ids) {
  return ids.map((id) => `“${visible(piece(id))}”`).join(" ");
}
function percent(p) {
  if (p > 0 && p < 0.0005) return "< 0.1 %";
  return `${(100 * p).toFixed(p < 0.0995 ? 1 : 0)} %`;
}
function plain(x) {
  return x == null ? "none" : String(Number(x.toPrecision(3)));
}

// Elements: text only ever becomes a text node, so that no token can be markup.

function make(tag, properties = {}, ...inside) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...inside);
  return element;
}
function note(text, more = "") {
  return make("p", { className: `note ${more}` }, text);
}
function swatch(classes, text) {
  return make("span", {}, make("i", { className: `swatch ${classes}` }), text);
}

const palette = {}; // the style's colours as canvases need them: read again for each drawing
function colour(name) {
  palette[name] ??= getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  return palette[name];
}

// Numbers from 0 to 1 as they are packed: bytes, or 16-bit words with the low byte first.

function unpack(text, wide) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  if (!wide) return (n) => bytes[n] / 255;
  return (n) => (bytes[2 * n] + 256 * bytes[2 * n + 1]) / 65535;
}
for (const layer of layers) {
  if (layer.probs) {
    // Row by row what each query may see: up to W positions that end with its own.
    const at = unpack(layer.probs, true),
      W = Math.min(layer.window ?? layer.queries, layer.queries);
    const before = (query) =>
      query < W ? (query * (query + 1)) / 2 : (W * (W + 1)) / 2 + (query - W) * W;
    const first = (query) => Math.max(0, query - W + 1),
      size = before(layer.queries);
    layer.sees = (query, key) => key <= query && key >= first(query);
    layer.prob = (head, query, key) => at(head * size + before(query) + key - first(query));
  }
  if (layer.scores) {
    const at = unpack(layer.scores),
      E = layer.experts;
    layer.score = (position, expert) => at(position * E + expert);
  }
  if (layer.gate) {
    const at = unpack(layer.gate),
      H = layer.heads;
    layer.open = (position, head) => at(position * H + head);
  }
}

// The tip: beside the box that `where` gives. What keys reach is also read out, and the tip stays
// with it when the page scrolls.

let anchor = null;
function tell(text, where, isRead) {
  const tip = byId("tip");
  tip.textContent = text;
  tip.hidden = false;
  anchor = isRead ? where : null;
  place(where());
  if (isRead) byId("live").textContent = text;
}
function place(box) {
  const tip = byId("tip"),
    { width, height } = tip.getBoundingClientRect();
  const isBelow = box.bottom + 8 + height < innerHeight;
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - width - 4))}px`;
  tip.style.top = `${isBelow ? box.bottom + 8 : Math.max(4, box.top - height - 8)}px`;
}
function hush() {
  byId("tip").hidden = true;
  anchor = null;
}
function boxOf(element) {
  return () => element.getBoundingClientRect();
}
addEventListener("keydown", (event) => {
  if (event.key === "Escape") hush();
});
addEventListener(
  "scroll",
  () => {
    if (anchor) place(anchor());
    else hush();
  },
  { passive: true, capture: true },
);

// Arrow keys over a table of `rows` by `columns`: where they lead from [row, column], or null.

function step(event, [row, column], rows, columns, key = event.key) {
  const moves = {
    ArrowUp: [-1, 0],
    ArrowDown: [1, 0],
    ArrowLeft: [0, -1],
    ArrowRight: [0, 1],
    Home: [0, -column],
    End: [0, columns - 1 - column],
  };
  const move = moves[key];
  if (!move || event.ctrlKey || event.metaKey || event.altKey) return null;
  event.preventDefault();
  const clamp = (n, most) => Math.max(0, Math.min(most - 1, n));
  return [clamp(row + move[0], rows), clamp(column + move[1], columns)];
}

// One stop for Tab among many elements: arrows lead to the others. `chosen` is the one that is it.

function roving(host, items, chosen, pick) {
  items.forEach((item, n) => {
    item.tabIndex = n === chosen ? 0 : -1;
  });
  host.onkeydown = (event) => {
    const key = { ArrowUp: "ArrowLeft", ArrowDown: "ArrowRight" }[event.key];
    const to = step(event, [0, items.indexOf(document.activeElement)], 1, items.length, key);
    if (to) pick(to[1]);
  };
}
