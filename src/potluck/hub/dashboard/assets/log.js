// The live log: asks for what is new, follows the end, searches. Whatever a job prints only ever becomes text.

const MOST_LINES = 5000;
const LONGEST_LINE = 4000; // a job that never ends its line must not end the browser
const PIECE = 65536;

const box = document.getElementById("log");
const lines = document.getElementById("log-lines");
const status = document.getElementById("log-state");
const search = document.getElementById("log-search");
const found = document.getElementById("log-found");
const toEnd = document.getElementById("log-end");
const address = `/api/v1/jobs/${encodeURIComponent(box.dataset.job)}/log`;

// --- from bytes to lines

const ESCAPE = /\x1b(?:\[([0-?]*)[ -/]*([@-~])|[\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c|$)|[ -/]*[0-~]?)/g;
const UNFINISHED = /\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b\x9c]{0,2000}\x1b?|[ -/]*)$/;
// what cannot be seen, or turns the reading order around
const INVISIBLE = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;
let style = { bold: false, colour: 0 };

function paint(codes) {
  for (const code of (codes || "0").split(";").map(Number)) {
    if (code === 0) style = { bold: false, colour: 0 };
    else if (code === 1) style = { ...style, bold: true };
    else if (code === 22) style = { ...style, bold: false };
    else if (code >= 31 && code <= 36) style = { ...style, colour: code - 30 };
    else if (code >= 91 && code <= 96) style = { ...style, colour: code - 90 };
    else if (code === 30 || code === 37 || code === 39 || code === 90 || code === 97) style = { ...style, colour: 0 };
    else if (code === 38 || code === 48) return; // one of many colours: the rest are its parts
  }
}

function classes() {
  return [style.bold ? "bold" : "", style.colour ? `ansi${style.colour}` : ""].join(" ").trim();
}

// `\r` begins a line anew, as progress bars do; one at the very end waits for what comes next.
const newest = (raw) => raw.slice(raw.lastIndexOf("\r", raw.length - 2) + 1);

// Pieces of a line, each with its look.
function pieces(text) {
  const parts = [];
  let at = 0;
  const add = (raw) => {
    const plain = raw.replace(INVISIBLE, "");
    if (plain) parts.push([plain, classes()]);
  };
  for (const match of text.matchAll(ESCAPE)) {
    add(text.slice(at, match.index));
    if (match[2] === "m") paint(match[1]);
    at = match.index + match[0].length;
  }
  add(text.slice(at));
  return parts;
}

// --- from lines to the page

let rest = ""; // a line that has not ended yet, raw
let open = null; // its element
let before = style; // the look at its beginning
let wanted = "";

function fill(element, parts) {
  element.replaceChildren(
    ...parts.map(([text, look]) => {
      if (!look) return document.createTextNode(text);
      const span = document.createElement("span");
      span.className = look;
      span.textContent = text;
      return span;
    }),
  );
  mark(element);
}

function line() {
  const element = document.createElement("div");
  element.dir = "auto";
  return element;
}

function put(text) {
  const following = atEnd();
  const fresh = document.createDocumentFragment();
  const all = (rest + text).split("\n");
  let last = all.pop();
  if (open) open.remove();
  style = before;
  const write = (raw) => {
    const element = line();
    fill(element, pieces(raw));
    if (!element.hasChildNodes()) element.append("\u200b"); // an empty line has a height, too
    fresh.append(element);
  };
  const cut = (raw) => {
    while (raw.length > LONGEST_LINE) {
      write(raw.slice(0, LONGEST_LINE));
      raw = raw.slice(LONGEST_LINE);
    }
    return raw;
  };
  for (const raw of all) write(cut(newest(raw.replace(/\r+$/, ""))));
  rest = cut(newest(last));
  before = style;
  open = null;
  const whole = rest.replace(UNFINISHED, "").replace(/\r+$/, "");
  if (whole) {
    open = line();
    fill(open, pieces(whole));
    fresh.append(open);
    style = before;
  }
  lines.append(fresh);
  while (lines.childElementCount > MOST_LINES) lines.firstElementChild.remove();
  if (following) lines.scrollTop = lines.scrollHeight;
  count();
}

const atEnd = () => lines.scrollHeight - lines.scrollTop - lines.clientHeight < 24;

lines.addEventListener("scroll", () => (toEnd.hidden = atEnd()));
toEnd.addEventListener("click", () => {
  lines.scrollTop = lines.scrollHeight;
  lines.focus({ preventScroll: true });
});

// --- search

let current = -1;

function mark(element) {
  element.classList.toggle("hit", Boolean(wanted) && element.textContent.toLowerCase().includes(wanted));
}

function count() {
  if (!wanted) return void (found.textContent = "");
  const number = lines.getElementsByClassName("hit").length;
  const text = number ? `${number} ${number === 1 ? "line" : "lines"}` : "none";
  if (found.textContent !== text) found.textContent = text;
}

search.addEventListener("input", () => {
  wanted = search.value.toLowerCase();
  current = -1;
  for (const element of lines.children) mark(element);
  count();
});
search.addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  const hits = [...lines.getElementsByClassName("hit")];
  if (!hits.length) return;
  current = current < 0 ? (event.shiftKey ? 0 : hits.length - 1) : (current + (event.shiftKey ? 1 : -1) + hits.length) % hits.length;
  lines.querySelector(".current")?.classList.remove("current");
  hits[current].classList.add("current");
  hits[current].scrollIntoView({ block: "center" });
});

// --- from the hub

const say = (text) => status.textContent !== text && (status.textContent = text);
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

async function follow() {
  const attempt = box.dataset.attempt;
  let offset = Number(box.dataset.offset);
  let empty = true;
  for (let wait = 0; ; wait = 20) {
    let piece;
    try {
      const answer = await fetch(`${address}?attempt=${attempt}&offset=${offset}&wait=${wait}&limit=${PIECE}`, { headers: { Accept: "application/json" } });
      if (answer.status === 401 || answer.status === 403) return say("signed out");
      if (!answer.ok) throw new Error(answer.statusText);
      piece = await answer.json();
    } catch {
      say("reconnecting");
      await pause(2000);
      continue;
    }
    if (empty && piece.text) {
      lines.replaceChildren();
      empty = false;
    }
    if (piece.offset > offset && !empty) put("\n… the beginning was rotated away …\n");
    if (piece.text) put(piece.text);
    offset = piece.next_offset;
    if (piece.over) return say("ended");
    say("live");
    await pause(100); // a job that prints without end still leaves the browser time
  }
}

document.querySelector(".log-tools").hidden = false;
lines.scrollTop = lines.scrollHeight;
follow();
