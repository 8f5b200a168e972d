"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const KEY = `vdtrain-votes-${data.comparison}`;
const on = id => document.getElementById(id);

function fresh() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return { format: data.format, comparison: data.comparison, rater: [...bytes].map(byte => byte.toString(16).padStart(2, "0")).join(""), name: "", votes: [] };
}

function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY));
    const fits = (vote, index) => vote.pair === data.pairs[index]?.number;
    if (kept.comparison === data.comparison && kept.votes.every(fits)) return kept;
  } catch { /* nothing is kept, or the browser forbids it */ }
  return fresh();
}

let state = load(), shownAt = 0;

function save() {
  try { localStorage.setItem(KEY, JSON.stringify(state)); }
  catch { on("kept").textContent = "This browser keeps nothing: download the votes before you leave the page."; }
}

function side(place, sample) {
  place.replaceChildren();
  if (sample.image) place.append(Object.assign(document.createElement("img"), { src: sample.image, alt: "" }));
  else place.append(sample.text ?? "");
}

function show() {
  const at = state.votes.length, pair = data.pairs[at];
  on("progress").value = at;
  on("place").textContent = pair ? `Pair ${at + 1} of ${data.pairs.length}` : `${at} pairs judged`;
  on("voting").hidden = !pair;
  on("done").hidden = Boolean(pair);
  on("back").disabled = at === 0;
  shownAt = performance.now();
  if (!pair) return;
  on("task").textContent = pair.given ? `${pair.task}, from:` : pair.task;
  on("given").replaceChildren();
  if (pair.given) side(on("given"), pair.given);
  side(on("left"), pair.left);
  side(on("right"), pair.right);
}

function vote(choice) {
  const pair = data.pairs[state.votes.length];
  if (!pair) return;
  state.votes.push({ pair: pair.number, choice, seconds: Math.round((performance.now() - shownAt) / 100) / 10 });
  save();
  show();
}

function back() {
  state.votes.pop();
  save();
  show();
}

for (const choice of ["left", "right", "equal"]) on(choice).onclick = event => {
  vote(choice);
  event.currentTarget.blur();
};
on("back").onclick = back;
on("name").value = state.name;
on("name").oninput = () => { state.name = on("name").value; save(); };
on("anew").onclick = () => {
  if (!confirm("Remove all votes from this browser, for another person to judge?")) return;
  state = fresh();
  on("name").value = "";
  save();
  show();
};
on("download").onclick = () => {
  const file = new Blob([JSON.stringify(state, null, 1)], { type: "application/json" });
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(file), download: `votes-${data.comparison.slice(0, 6)}-${state.rater.slice(0, 6)}.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};
document.addEventListener("keydown", event => {
  if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const choice = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "equal" }[event.key];
  if (choice) vote(choice);
  else if (event.key === "Backspace" && state.votes.length) back();
  else return;
  event.preventDefault();
});
show();
