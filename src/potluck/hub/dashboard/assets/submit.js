// Sends the project's files before the form is sent. The hub hashes them: a page over plain http may not.
"use strict";

const PIECE = 4 << 20;
const SMALL = 1 << 20; // files up to this go many at a time
const MOST_IN_ONE = 200;
const AT_ONCE = 3;
const IGNORE_FILES = /(^|\/)\.(gitignore|potluckignore)$/;
const NEVER = /(^|\/)(\.git|__pycache__|\.venv|node_modules|\.mypy_cache|\.pytest_cache|\.ipynb_checkpoints)\//;

const form = document.getElementById("job");
const says = document.getElementById("give-says");
const bar = document.getElementById("give-progress");
const stop = document.getElementById("give-stop");
const skipped = document.getElementById("give-skipped");
const buttons = [document.getElementById("submit"), document.getElementById("check")];
let sending = new AbortController();

const size = (bytes) => {
  for (const unit of ["B", "kB", "MB"]) {
    if (bytes < 1000) return `${bytes < 10 ? Math.round(bytes * 10) / 10 : Math.round(bytes)} ${unit}`;
    bytes /= 1000;
  }
  return `${Math.round(bytes * 10) / 10} GB`;
};

async function ask(path, body) {
  const headers = { "Potluck-Page": "1", "Content-Type": body instanceof Blob ? "application/octet-stream" : "application/json" };
  const answer = await fetch(path, { method: "POST", headers, body: body instanceof Blob ? body : JSON.stringify(body), signal: sending.signal });
  if (answer.ok) return answer.json();
  const problem = await answer.json().catch(() => null);
  throw new Error(problem?.detail ?? `the hub said ${answer.status} ${answer.statusText}`);
}

// --- files

async function sendWhole(file, name, sent) {
  let answer;
  for (let offset = 0; offset === 0 || offset < file.size; offset += PIECE) {
    const piece = file.slice(offset, offset + PIECE);
    answer = await ask(`/submit/piece?upload=${name}&offset=${offset}&size=${file.size}`, piece);
    sent(piece.size);
  }
  return answer;
}

const newName = () => [...crypto.getRandomValues(new Uint8Array(32))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

function jobsOf(files, sent) {
  const jobs = [];
  let batch = [];
  let weight = 0;
  const close = () => {
    const these = batch;
    if (these.length) {
      jobs.push(async () => {
        const head = JSON.stringify(these.map(({ file }) => file.size)) + "\n";
        const answers = await ask("/submit/batch", new Blob([head, ...these.map(({ file }) => file)]));
        sent(these.reduce((sum, { file }) => sum + file.size, 0));
        return these.map((one, index) => ({ path: one.path, ...answers[index] }));
      });
    }
    batch = [];
    weight = 0;
  };
  for (const one of files) {
    if (one.file.size > SMALL) {
      jobs.push(async () => [{ path: one.path, ...(await sendWhole(one.file, newName(), sent)) }]);
      continue;
    }
    if (weight + one.file.size > PIECE || batch.length >= MOST_IN_ONE) close();
    batch.push(one);
    weight += one.file.size;
  }
  close();
  return jobs;
}

async function sendFolder(list) {
  const files = [];
  for (const file of list) {
    const path = file.webkitRelativePath.split("/").slice(1).join("/");
    if (path && !NEVER.test(path)) files.push({ path, file });
  }
  const ignores = {};
  for (const { path, file } of files.filter(({ path, file }) => IGNORE_FILES.test(path) && file.size < 65536).slice(0, 50)) ignores[path] = await file.text();
  const plan = await ask("/submit/plan", { files: files.map(({ path, file }) => [path, file.size]), ignores });
  const kept = plan.keep.map((index) => files[index]);
  const total = kept.reduce((sum, { file }) => sum + file.size, 0);
  const sent = progress(total, `${kept.length.toLocaleString("en")} files`);
  const jobs = jobsOf(kept, sent);
  const done = [];
  const work = async () => {
    for (let job = jobs.shift(); job; job = jobs.shift()) done.push(...(await job()));
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  return ask("/submit/tree", { files: done, skipped: plan.skipped });
}

async function sendZip(file) {
  const name = newName();
  await sendWhole(file, `${name}&keep=1`, progress(file.size, file.name));
  says.textContent = `Opening ${file.name}`;
  return ask(`/submit/zip?upload=${name}&size=${file.size}`, {});
}

function progress(total, what) {
  let done = 0;
  bar.hidden = false;
  return (bytes) => {
    done += bytes;
    bar.value = total ? (1000 * done) / total : 1000;
    says.textContent = `Sending ${what}: ${size(done)} of ${size(total)}`;
  };
}

// --- the form

function give(project, text) {
  document.getElementById("project").value = project;
  document.getElementById("project_says").value = text;
  says.textContent = text;
}

const inputs = [document.getElementById("folder"), document.getElementById("zip")];

async function send(what, how) {
  sending = new AbortController();
  give("", `Looking through ${what}`);
  skipped.hidden = true;
  stop.hidden = false;
  for (const control of [...buttons, ...inputs]) control.disabled = true; // one project at a time
  try {
    const answer = await how();
    give(answer.project, `${what}: ${answer.says}`);
    if (answer.skipped.length) {
      skipped.hidden = false;
      skipped.querySelector("summary").textContent = `${answer.skipped.length} left out`;
      skipped.querySelector("ul").replaceChildren(...answer.skipped.map((note) => Object.assign(document.createElement("li"), { textContent: note })));
    }
    const { requirements, image } = form.elements;
    if (answer.requirements && !requirements.value && !image.value) requirements.value = answer.requirements;
  } catch (error) {
    give("", sending.signal.aborted ? "Stopped: no project is chosen." : `No project is chosen: ${error.message}`);
  } finally {
    sending.abort(); // whatever else was under way
    bar.hidden = stop.hidden = true;
    for (const control of [...buttons, ...inputs]) control.disabled = false;
  }
}

for (const input of inputs) {
  input.addEventListener("change", () => {
    const files = [...input.files];
    input.value = ""; // the same folder again is a change, too
    if (!files.length) return;
    if (input.id === "zip") send(files[0].name, () => sendZip(files[0]));
    else send(files[0].webkitRelativePath.split("/")[0], () => sendFolder(files));
  });
}
stop.addEventListener("click", () => sending.abort());
document.getElementById("give").hidden = false;
(document.getElementById("problem") ?? document.getElementById("outlook"))?.focus();
