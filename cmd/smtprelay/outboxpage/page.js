// The page of "smtprelay outbox page". It asks for the counts every two seconds, and for the messages when these have changed. What comes from
// messages and from the relay becomes text, never HTML.
"use strict";

const $ = (id) => document.getElementById(id);

// h makes an element. Properties that begin with "on" are listeners; the others are attributes.
function h(tag, props, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(props || {})) {
    if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
    else if (v !== false && v != null) e.setAttribute(k, v === true ? "" : v);
  }
  e.append(...children.filter((c) => c != null && c !== false));
  return e;
}

async function ask(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const r = await fetch("/api/v1" + path, options);
  const answer = await r.json();
  if (!r.ok) throw new Error(r.status === 401 ? "The page wants its token anew: reload it." : answer.error || r.statusText);
  return answer;
}

function complain(err) {
  $("alert").textContent = err instanceof TypeError ? "The command does not answer. Trying again …" : err.message;
  $("alert").hidden = false;
}
const calm = () => { $("alert").hidden = true; };

function ago(seconds) {
  if (seconds < 120) return `${Math.max(0, Math.floor(seconds))} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} days`;
}
const since = (t) => ago((Date.now() - new Date(t)) / 1000);

// ---- counts

const minute = []; // the counts of the last minute

function showCounts(c) {
  minute.push(c);
  while (minute.length > 1 && new Date(c.time) - new Date(minute[0].time) > 60000) minute.shift();
  const passed = (new Date(c.time) - new Date(minute[0].time)) / 60000;
  const change = passed > 0 ? Math.round((c.queued - minute[0].queued) / passed) : 0;
  const figures = [
    ["queued", c.queued], ["change a minute", (change > 0 ? "+" : "") + change.toLocaleString()], ["sending", c.sending],
    ["unknown", c.unknown, c.unknown > 0], ["dead", c.dead, c.dead > 0], ["oldest has been due for", ago(c.oldest_seconds)],
  ];
  $("figures").replaceChildren(...figures.map(([name, n, bad]) => h("div", null, h("dt", null, name), h("dd", bad && { class: "bad" }, n.toLocaleString()))));
}

let seen = "";

async function update() {
  try {
    const c = await ask("/counts");
    calm();
    showCounts(c);
    const now = [c.queued, c.sending, c.unknown, c.dead].join();
    if (now !== seen && pages === 1) await load(); // with more pages shown the list stays as it is
    seen = now;
  } catch (err) { complain(err); }
  setTimeout(update, 2000);
}

// ---- messages

const deeds = {
  unknown: ["sent", "resend", "drop"],
  dead: ["requeue", "sent", "drop"],
  queued: ["cancel"],
};
const words = {
  sent: ["It was sent", "Take it as sent?"],
  resend: ["Send again", "The relay may have it. If it has, the recipients get it twice. Send it again?"],
  drop: ["Drop", "It is not sent again. Drop it?"],
  requeue: ["Send again", "Send it again, to those who have not got it?"],
  cancel: ["Cancel", "It is not sent. Cancel it?"],
};

let pages = 0, more = "", latest = 0;

async function load(next) {
  const q = new URLSearchParams();
  if ($("state").value) q.set("state", $("state").value);
  if ($("to").value) q.set("to", $("to").value.trim());
  if ($("tenant").value) q.set("tenant", $("tenant").value);
  if (next) q.set("after", more);
  const mine = ++latest;
  const page = await ask("/messages?" + q);
  if (mine !== latest) return; // another one has been asked for meanwhile
  const focused = document.activeElement?.dataset?.key;
  if (!next) $("messages").replaceChildren();
  $("messages").append(...page.messages.map(row));
  if (focused) [...$("messages").querySelectorAll("button")].find((b) => b.dataset.key === focused)?.focus({ preventScroll: true });
  pages = next ? pages + 1 : 1;
  more = page.more;
  $("more").hidden = !more;
}

function row(m) {
  const to = m.to.length > 1 ? `${m.to[0]} +${m.to.length - 1}` : m.to.join("");
  return h("tr", null,
    h("td", { class: m.state === "unknown" || m.state === "dead" ? "bad" : null }, m.state),
    h("td", null, h("button", { type: "button", class: "link", "data-key": "show " + m.id, onclick: () => show(m.id) }, m.id), m.tenant && h("div", { class: "quiet" }, m.tenant)),
    h("td", null, to),
    h("td", { class: "n" }, since(m.changed)),
    h("td", { class: "n" }, String(m.attempts)),
    h("td", null, m.reason || ""),
    h("td", { class: "do" }, ...(deeds[m.state] || []).map((deed) =>
      h("button", { type: "button", "data-key": deed + " " + m.id, "aria-label": `${words[deed][0]}: ${m.id}`, onclick: () => decide(m, deed) }, words[deed][0]))),
  );
}

async function decide(m, deed) {
  if (!confirm(`${m.id}\n\n${words[deed][1]}`)) return;
  try {
    const now = await ask("/message", { id: m.id, deed, changed: m.changed });
    $("done").textContent = `${now.id}: ${now.state}`;
    calm();
    await load();
  } catch (err) { complain(err); }
}

async function show(id) {
  try {
    const m = await ask("/message?" + new URLSearchParams({ id }));
    const facts = [
      ["State", `${m.state} for ${since(m.changed)}`], ["Reason", m.reason], ["Attempts", m.attempts], ["Due", m.due], ["Created", m.created], ["Not before", m.not_before],
      ["Not after", m.not_after], ["Tenant", m.tenant], ["Priority", m.priority], ["From", `<${m.from}>`], ["To", m.to.join(", ")],
    ].filter(([, v]) => v !== "" && v != null);
    $("message").replaceChildren(
      h("h2", null, m.id),
      h("dl", { class: "facts" }, ...facts.flatMap(([k, v]) => [h("dt", null, k), h("dd", null, String(v))])),
      h("h2", null, "What the relay has said"),
      m.recipients.length ? h("dl", { class: "facts" }, ...m.recipients.flatMap((r) => [h("dt", null, r.to), h("dd", null, [r.outcome, r.reply, r.queue_id].filter(Boolean).join("  "))])) : h("p", { class: "quiet" }, "Nothing yet."),
      h("h2", null, "Header"),
      m.header == null ? h("p", { class: "quiet" }, "It is gone, with the body.") : h("pre", null, m.header),
    );
    $("message").hidden = false;
    $("message").focus();
    calm();
  } catch (err) { complain(err); }
}

$("filter").addEventListener("submit", (e) => { e.preventDefault(); load().then(calm, complain); });
$("state").addEventListener("change", () => load().then(calm, complain));
$("more").addEventListener("click", () => load(true).catch(complain));
load().then(update, (err) => { complain(err); update(); });
