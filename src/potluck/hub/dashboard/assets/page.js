// Swaps in newer pieces of the page as the hub sends them; the page is complete without this.
"use strict";

const state = document.getElementById("state");
const main = document.getElementById("main");
const held = new Map(); // pieces that wait until the reader lets go of a text selection
let have = main.dataset.frame;
let queue = Promise.resolve();

function say(text, kind) {
  state.hidden = false;
  if (state.textContent !== text) state.textContent = text;
  state.className = kind;
}

function localTimes(root) {
  const styles = {
    time: { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" },
    day: { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", hourCycle: "h23" },
  };
  for (const time of root.querySelectorAll("time[data-as]")) {
    time.textContent = new Intl.DateTimeFormat(navigator.language, styles[time.dataset.as]).format(new Date(time.dateTime));
  }
}

const key = (element) =>
  element.id || element.getAttribute("href") || element.getAttribute("formaction") || element.getAttribute("aria-label");

// What changed in words, for those who do not see it change.
let told = document.querySelector("[data-say]")?.dataset.say;
function tell(region) {
  const news = region.querySelector("[data-say]")?.dataset.say;
  if (news && news !== told) document.getElementById("said").textContent = told = news;
}

async function swap(id, html) {
  const region = document.getElementById(id);
  if (!region) return;
  const marked = getSelection();
  if (!marked.isCollapsed && region.contains(marked.anchorNode)) return void held.set(id, html);
  const fresh = document.createElement("div");
  fresh.innerHTML = html; // rendered and escaped by the hub
  localTimes(fresh);
  const pictures = [...fresh.querySelectorAll("img:not([loading])")].map((picture) => picture.decode().catch(() => {}));
  await Promise.race([Promise.all(pictures), new Promise((done) => setTimeout(done, 3000))]); // no flicker
  const focused = region.contains(document.activeElement) ? key(document.activeElement) : null;
  const places = new Map([...region.querySelectorAll("[tabindex]")].map((box) => [key(box), [box.scrollLeft, box.scrollTop]]));
  const open = [...region.querySelectorAll("details")].map((part) => part.open);
  region.replaceChildren(...fresh.childNodes);
  for (const box of region.querySelectorAll("[tabindex]")) [box.scrollLeft, box.scrollTop] = places.get(key(box)) ?? [0, 0];
  region.querySelectorAll("details").forEach((part, index) => (part.open = open[index] ?? false));
  if (focused) [...region.querySelectorAll("a, button, [tabindex]")].find((element) => key(element) === focused)?.focus({ preventScroll: true });
  tell(region);
}

async function show(pieces) {
  const waiting = [...held];
  held.clear();
  for (const [id, html] of [...waiting.filter(([id]) => !(id in pieces)), ...Object.entries(pieces)]) await swap(id, html);
}

function connect() {
  const source = new EventSource(`/live?${main.dataset.live}&after=${encodeURIComponent(have)}`);
  source.onopen = () => say("live", "live");
  source.addEventListener("page", (event) => {
    have = event.lastEventId;
    queue = queue.then(() => show(JSON.parse(event.data))).catch(console.error);
  });
  source.addEventListener("bye", () => (source.close(), say("signed out", "lost")));
  source.onerror = () => {
    say("reconnecting", "lost");
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
  };
}

localTimes(document);
connect();
