// Puts the address that really led here, with its fingerprint, into the command; copies it.
"use strict";

// Only what cannot say anything else to a shell: whoever passes a link on could have written anything behind its "#".
const address = /^https?:\/\/[\w.:[\]-]+\/j\/[\w-]+$/;
const fingerprint = /^#fp=[0-9a-f]{64}$/i;
const join = document.getElementById("join");
const copied = document.getElementById("copied");

if (join) {
  const given = new URL(join.dataset.link);
  const here = location.origin + location.pathname;
  const print = fingerprint.test(location.hash) ? location.hash : given.hash;
  if (address.test(here)) join.textContent = `potluck join '${here}${print}'`;
}

for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const code = document.getElementById(button.dataset.copy);
    getSelection().selectAllChildren(code); // also what remains to be done by hand if the browser says no
    const done = navigator.clipboard
      ? await navigator.clipboard.writeText(code.textContent).then(() => true, () => false)
      : document.execCommand("copy"); // plain http, as in a classroom's network, has no clipboard object
    copied.textContent = done ? "Copied: paste it into a terminal." : "Marked: copy it with Ctrl-C or ⌘-C.";
  });
}

for (const time of document.querySelectorAll("time[data-as]")) {
  time.textContent = new Date(time.dateTime).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}
