// Keyboard, folding, evidence and guideline by category, lease renewal and focus time. Without it every form works all the same.
"use strict";

const byId = (id) => document.getElementById(id);
const isTyping = (element) => element.matches("textarea, select, input:not([type=radio]):not([type=checkbox])");

function onKey(event) {
  const send = byId("send");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && send) {
    event.preventDefault();
    send.click();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && isTyping(event.target)) event.target.blur();
  if (isTyping(event.target)) return;
  if (event.key === "Enter" && send && !event.target.matches("button, a, summary")) {
    event.preventDefault();
    send.click();
    return;
  }
  if (event.key === "g" && byId("guide")) {
    event.preventDefault();
    byId("guide").open = !byId("guide").open;
    return;
  }
  if (event.key === "e" && byId("attributes")) {
    event.preventDefault();
    byId("attributes").open = true;
    byId("task_category").focus();
    return;
  }
  const target = /^[a-z0-9]$/.test(event.key) ? document.querySelector(`[data-key="${event.key}"]`) : null;
  if (!target) return;
  event.preventDefault();
  if (isTyping(target)) target.focus();
  else target.click();
}

function showEvidence() {
  const form = byId("verdict");
  if (!form) return;
  const evidence = JSON.parse(form.dataset.evidence);
  const wanted = [evidence[form.dataset.tagged], evidence[byId("task_category").value]]; // what the pair came with counts too
  for (const field of document.querySelectorAll("[data-evidence-field]")) {
    const input = field.querySelector("input, textarea");
    const isWanted = wanted.includes(field.dataset.evidenceField);
    field.hidden = !isWanted && !input.value;
    field.querySelector(".must").hidden = !isWanted;
  }
}

async function showGuideline() {
  const values = new URLSearchParams();
  for (const field of document.querySelectorAll("[data-guideline]")) values.set(field.name, field.value);
  const answer = await fetch(`/guideline?${values}`);
  if (!answer.ok) return;
  const found = await answer.json();
  byId("guideline").textContent = found.guideline;
  byId("kind").textContent = found.kind;
}

function rememberFold(guide) {
  try {
    guide.open = localStorage.getItem("guide") !== "folded";
    guide.addEventListener("toggle", () => localStorage.setItem("guide", guide.open ? "open" : "folded"));
  } catch {
    // a browser that keeps nothing: it is open on every page
  }
}

function keepLease(task) {
  const body = new URLSearchParams({ csrf: task.dataset.csrf });
  const renew = () => {
    if (!document.hidden) fetch(task.dataset.renew, { method: "POST", body }).catch(() => {}); // offline: the next time will do
  };
  setInterval(renew, 1000 * Number(task.dataset.renewSeconds));
  document.addEventListener("visibilitychange", renew); // back from another tab, or from sleep
}

function countFocus(field) {
  let seconds = 0;
  setInterval(() => {
    if (!document.hidden && document.hasFocus()) field.value = String((seconds += 1));
  }, 1000);
}

document.addEventListener("keydown", onKey);
for (const button of document.querySelectorAll(".unfold")) {
  button.addEventListener("click", () => {
    const isWhole = button.previousElementSibling.classList.toggle("whole");
    button.setAttribute("aria-expanded", String(isWhole));
  });
}
for (const field of document.querySelectorAll("[data-guideline]")) {
  field.addEventListener("change", () => {
    showEvidence();
    showGuideline();
  });
}
for (const form of document.querySelectorAll("form")) {
  form.addEventListener("submit", () => setTimeout(() => form.querySelectorAll("button").forEach((button) => (button.disabled = true))));
}
showEvidence();
if (byId("guide")) rememberFold(byId("guide"));
if (byId("task") && byId("task").dataset.renew) keepLease(byId("task"));
if (byId("focus_seconds")) countFocus(byId("focus_seconds"));
