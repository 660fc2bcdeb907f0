// The page of "smtprelay serve". The relay tells that something has changed (server-sent events), and the page asks for the changes
// of the view that is shown. What comes from mail or from clients becomes text, never HTML; a mail's HTML is shown in a sandboxed
// frame alone.
"use strict";

const $ = (id) => document.getElementById(id);
const API = "/api/v1";

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

async function ask(method, path, body) {
  const options = { method };
  if (body !== undefined) {
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  const r = await fetch(API + path, options);
  const answer = await r.json();
  if (!r.ok) throw Object.assign(new Error(answer.error || r.statusText), { status: r.status });
  return answer;
}

function complain(err) {
  $("alert").textContent = err.message;
  $("alert").hidden = false;
}
const calm = () => { $("alert").hidden = true; };

const clock = (t) => new Date(t).toLocaleTimeString([], { hour12: false });
const plural = (n, one, many) => `${n.toLocaleString()} ${n === 1 ? one : many || one + "s"}`;
function octets(n) {
  if (n < 1024) return `${n} B`;
  if (n < 1024 * 1024) return `${(n / 1024).toFixed(1)} KB`;
  return `${(n / 1024 / 1024).toFixed(1)} MB`;
}

// once returns a function that runs work, never twice at a time: who calls it meanwhile has it run once more.
function once(work) {
  let running = false, again = false;
  return async () => {
    if (running) { again = true; return; }
    running = true;
    do {
      again = false;
      try { await work(); } catch (err) { complain(err); }
    } while (again);
    running = false;
  };
}

// fill replaces the children of a list, and keeps the focus on the link that had it.
function fill(list, children) {
  const focused = list.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  list.replaceChildren(...children);
  if (focused) [...list.querySelectorAll("a")].find((a) => a.getAttribute("href") === focused)?.focus({ preventScroll: true });
}

// ---- the relay at a glance

let state = null;

function showState() {
  $("name").textContent = state.name;
  $("url").textContent = state.url;
  $("limits").textContent = "Limits: " + state.limits;
  const turns = state.accepted > 0 ? (state.message_turns / state.accepted).toFixed(2) : "–";
  const figures = [["taken", state.accepted], ["open", `${state.open} / ${state.max_conns}`], ["turns", state.turns], ["turns a message", turns]];
  $("figures").replaceChildren(...figures.map(([name, n]) => h("div", null, h("dt", null, name), h("dd", null, n.toLocaleString()))));
  $("count-messages").textContent = state.messages.toLocaleString();
  $("count-connections").textContent = state.connections.toLocaleString();
  $("count-refusals").textContent = state.refusals.toLocaleString();
  $("count-faults").textContent = state.faults_on ? `${state.faults_on} on` : "";
  $("count-faults").className = state.faults_on ? "on" : "";
}

function listen() {
  const events = new EventSource(API + "/events");
  events.onmessage = (e) => {
    const before = state;
    state = JSON.parse(e.data);
    calm();
    showState();
    if (!before || before.last_message !== state.last_message || before.gone !== state.gone) mails.update();
    if (!before || before.line_rev !== state.line_rev) { conns.update(); refusals.update(); }
    if (!before || before.fault_rev !== state.fault_rev) faults.update();
  };
  events.onerror = () => {
    complain(new Error(events.readyState === EventSource.CLOSED ? "The relay has ended, or wants the token anew: reload the page." : "The relay does not answer. Trying again …"));
  };
}

// ---- messages

const mails = {
  list: [], last: 0, gone: 0, more: false, found: 0, total: 0, query: "", shown: null,

  path(extra) { return "/messages?" + new URLSearchParams({ ...(this.query ? { q: this.query } : {}), ...extra }); },

  // update asks for what has come since, or for all that is shown where messages have gone.
  update: once(async () => {
    if (view() !== "messages") return;
    if (!mails.last || mails.gone !== state?.gone) return mails.load();
    const page = await ask("GET", mails.path({ after: mails.last, limit: 100 }));
    if (page.more || page.gone !== mails.gone) return mails.load();
    mails.found += page.messages.length;
    mails.total = page.total;
    mails.last = page.last;
    mails.list.unshift(...page.messages);
    $("mails").prepend(...page.messages.map(mails.row));
    const cut = () => { mails.list.pop(); $("mails").lastChild.remove(); };
    while (mails.list.at(-1)?.seq < page.first) cut(); // dropped for newer ones
    for (; mails.list.length > 1000; mails.more = true) cut();
    mails.count();
  }),

  async load() {
    const page = await ask("GET", this.path({ limit: Math.min(500, Math.max(50, this.list.length)) }));
    Object.assign(this, { list: page.messages, last: page.last, gone: page.gone, more: page.more, found: page.found, total: page.total });
    fill($("mails"), this.list.map(this.row));
    this.count();
  },

  async older() {
    const page = await ask("GET", this.path({ before: this.list.at(-1).seq, limit: 50 }));
    this.list.push(...page.messages);
    this.more = page.more;
    const rows = page.messages.map(this.row);
    $("mails").append(...rows);
    rows[0]?.querySelector("a").focus();
    this.count();
  },

  row(m) {
    return h("li", null, h("a", { href: "#/messages/" + m.id, "aria-current": m.id === mails.shown ? "true" : null },
      h("span", { class: "strong" }, m.subject || "(no subject)"), h("time", { datetime: m.received }, clock(m.received)),
      h("span", { class: "quiet" }, "to " + (m.to[0] || "") + (m.to.length > 1 ? ` and ${m.to.length - 1} more` : "")),
      h("span", { class: "side" }, (m.attachments ? plural(m.attachments, "file") + ", " : "") + octets(m.size))));
  },

  count() {
    $("found").textContent = this.query ? `${plural(this.found, "match", "matches")} in ${plural(this.total, "message")}` : `${plural(this.total, "message")} kept`;
    $("more").hidden = !this.more;
  },

  async show(id) {
    this.shown = id;
    mark($("mails"), id && "#/messages/" + id);
    if (!id) return nothing($("mail"), "Choose a message.");
    try {
      const m = await ask("GET", "/messages/" + encodeURIComponent(id));
      if (this.shown === id) this.render(m);
    } catch (err) { nothing($("mail"), err.message, "#/messages"); }
  },

  render(m) {
    const base = API + "/messages/" + encodeURIComponent(m.id);
    const tabs = [];
    if (m.html) tabs.push(["HTML", () => h("iframe", { sandbox: "", referrerpolicy: "no-referrer", title: "The HTML of the message", src: `/mail/${encodeURIComponent(m.id)}/html` })]);
    if (m.text || !m.html) tabs.push(["Text", () => h("pre", { tabindex: 0 }, m.text || "(no text)")]);
    if (m.links.length) tabs.push([`Links ${m.links.length}`, () => h("ul", { class: "links" }, ...m.links.map((l) => h("li", null,
      /^https?:\/\//i.test(l) ? h("a", { href: l, target: "_blank", rel: "noopener noreferrer" }, l) : l)))]);
    if (m.parts.length) tabs.push([`Attachments ${m.parts.length}`, () => table(["Name", "Type", "Size"], m.parts.map((p) =>
      [h("a", { href: `${base}/parts/${p.part}`, download: p.name }, p.name), p.type, octets(p.size)]))]);
    tabs.push(["Header", () => table(null, m.header.map((f) => [f.name, f.value]))]);
    tabs.push(["Source", () => {
      const pre = h("pre", { tabindex: 0 }, "…");
      fetch(base + "/source").then((r) => r.text()).then((text) => {
        pre.textContent = text.length > 1e6 ? text.slice(0, 1e6) + "\n… the rest is in the download" : text;
      }).catch(complain);
      return pre;
    }]);
    const facts = [["From", m.sender || "–"], ["Envelope", `${m.from || "<>"} → ${m.to.slice(0, 20).join(", ")}${m.to.length > 20 ? ` and ${m.to.length - 20} more` : ""}`],
      ["Taken", `${new Date(m.received).toLocaleString()}, ${plural(m.size, "octet")}, as ${m.id}`]];
    $("mail").replaceChildren(
      h("a", { class: "back", href: "#/messages" }, "← Messages"),
      h("h2", null, m.subject || "(no subject)"),
      h("dl", { class: "facts" }, ...facts.flatMap(([k, v]) => [h("dt", null, k), h("dd", null, v)]),
        h("dt", null, "Came on"), h("dd", null, h("a", { href: "#/connections/" + m.connection }, "connection " + m.connection))),
      m.problem ? h("p", { class: "bad" }, "Not all of it can be read: " + m.problem) : "",
      ...tabbed(tabs,
        h("a", { href: base + "/source?download=1", download: m.id + ".eml" }, "Download"),
        h("button", { type: "button", class: "danger", onclick: () => ask("DELETE", "/messages/" + encodeURIComponent(m.id)).then(() => { location.hash = "#/messages"; }).catch(complain) }, "Delete")));
  },
};

function nothing(where, text, back) {
  where.replaceChildren(back ? h("a", { class: "back", href: back }, "← Back") : "", h("p", { class: "quiet" }, text));
}

function table(head, rows) {
  return h("div", { class: "scroll" }, h("table", null,
    head ? h("thead", null, h("tr", null, ...head.map((t) => h("th", { scope: "col" }, t)))) : null,
    h("tbody", null, ...rows.map((cells) => h("tr", null, ...cells.map((c, i) => h(!head && i === 0 ? "th" : "td", !head && i === 0 ? { scope: "row" } : null, c)))))));
}

// tabbed returns tabs and the panel below them, with the keys that people expect: arrows, Home and End.
function tabbed(tabs, ...tools) {
  const panel = h("div", { role: "tabpanel", id: "panel", "aria-live": "off" });
  const buttons = tabs.map(([name], i) => h("button", { type: "button", role: "tab", "aria-controls": "panel", onclick: () => choose(i) }, name));
  function choose(i, focus) {
    buttons.forEach((b, k) => { b.setAttribute("aria-selected", String(k === i)); b.tabIndex = k === i ? 0 : -1; });
    panel.setAttribute("aria-label", tabs[i][0]);
    panel.replaceChildren(tabs[i][1]());
    if (focus) buttons[i].focus();
  }
  const list = h("div", { role: "tablist", onkeydown: (e) => {
    const i = buttons.indexOf(document.activeElement), n = buttons.length;
    const to = { ArrowRight: (i + 1) % n, ArrowLeft: (i + n - 1) % n, Home: 0, End: n - 1 }[e.key];
    if (i >= 0 && to !== undefined) { e.preventDefault(); choose(to, true); }
  } }, ...buttons);
  choose(0);
  return [h("div", { class: "tools" }, list, h("span", null, ...tools.flatMap((t) => [t, " "]))), panel];
}

// ---- connections and their dialogues

const conns = {
  shown: 0, lines: 0, turn: -1, opened: null,

  update: once(async () => {
    if (view() !== "connections") return;
    const { connections } = await ask("GET", "/connections?limit=200");
    fill($("conns"), connections.map(conns.row));
    if (conns.shown) await conns.follow();
  }),

  row(c) {
    const turns = c.messages ? ` (${(c.turns / c.messages).toFixed(1)} a message)` : "";
    return h("li", null, h("a", { href: "#/connections/" + c.n, "aria-current": c.n === conns.shown ? "true" : null },
      h("span", { class: "strong" }, `${c.n}  ${c.client}`), h("span", { class: c.closed ? "side" : "side live" }, c.closed ? clock(c.closed) : "● open"),
      h("span", { class: "quiet" }, `${plural(c.messages, "message")}, ${plural(c.turns, "turn")}${turns}${c.tls ? ", TLS" : ""}`),
      h("span", { class: c.refusals ? "side bad" : "side" }, c.refusals ? plural(c.refusals, "refusal") : "")));
  },

  show: async (n) => {
    Object.assign(conns, { shown: n, lines: 0, turn: -1 });
    mark($("conns"), n && "#/connections/" + n);
    if (!n) return nothing($("conn"), "Choose a connection.");
    $("conn").replaceChildren(
      h("a", { class: "back", href: "#/connections" }, "← Connections"),
      h("h2", null, "Connection " + n), h("p", { class: "quiet", id: "conn-facts" }), h("p", { class: "quiet", id: "lost", hidden: true }),
      h("ol", { class: "lines", id: "lines", role: "log", "aria-live": "off", "aria-label": "Dialogue", tabindex: 0 }));
    await conns.update();
  },

  // follow appends the lines that have come since.
  async follow() {
    const n = this.shown;
    let c;
    try { c = await ask("GET", `/connections/${n}?after=${this.lines}`); } catch (err) { if (this.shown === n && !this.lines) nothing($("conn"), err.message, "#/connections"); return; }
    if (this.shown !== n || !$("lines")) return;
    const list = $("lines"), atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
    this.opened = Date.parse(c.opened);
    $("conn-facts").textContent = `${c.client}, ${c.closed ? "closed " + clock(c.closed) : "open"}${c.tls ? ", TLS" : ", in the clear"}: ${plural(c.messages, "message")}, ${plural(c.turns, "turn")}, ${plural(c.refusals, "refusal")}`;
    if (c.lines.length && c.lines[0].n > this.lines + 1) {
      $("lost").textContent = `${plural(c.lines[0].n - this.lines - 1, "line")} before these are forgotten.`;
      $("lost").hidden = false;
    }
    for (const l of c.lines) {
      if (l.turn !== this.turn) list.append(h("li", { class: "turn" }, l.turn ? "turn " + l.turn : "the relay begins"));
      this.turn = l.turn;
      this.lines = l.n;
      list.append(h("li", { class: l.who + (l.refusal ? " refusal" : "") },
        h("time", { datetime: l.time, title: l.time }, since(Date.parse(l.time) - this.opened)),
        h("span", { title: l.who }, { client: "→", relay: "←", note: "·" }[l.who]),
        h("span", null, l.message ? h("a", { href: "#/messages/" + l.message }, l.text) : l.text)));
    }
    while (list.children.length > 1000) list.firstChild.remove();
    if (atEnd) list.scrollTop = list.scrollHeight;
  },
};

const since = (ms) => ms < 10000 ? `${ms} ms` : `${(ms / 1000).toFixed(1)} s`;

// ---- refusals

const refusals = {
  update: once(async () => {
    if (view() !== "refusals") return;
    const answer = await ask("GET", "/refusals?limit=200");
    fill($("refusals"), answer.refusals.length ? answer.refusals.map((r) => h("tr", null, h("td", { class: "when" }, clock(r.time)),
      h("td", { class: "n" }, h("a", { href: "#/connections/" + r.connection }, String(r.connection))),
      h("td", null, h("code", null, r.command)), h("td", { class: "bad" }, h("code", null, r.reply)))) : [h("tr", null, h("td", { colspan: 4, class: "quiet" }, "Nothing was refused."))]);
  }),
};

// ---- faults

const presets = [
  ["Each recipient: later", "rcpt=450 4.2.1 mailbox busy, try again later"],
  ["Bob does not exist", "rcpt=550 5.1.1 no such user; rcpt=bob@example.org"],
  ["Each tenth message is too much", "dot=451 4.7.1 try again later; every=10"],
  ["Looks like spam", "dot=554 5.7.1 looks like spam"],
  ["Taken, but the client never learns it", "accepted=drop; count=1"],
  ["14 messages a second and no more", "dot=454 4.7.0 Throttling failure: maximum sending rate exceeded; rate=14; burst=14"],
  ["Closing down: 421 and goodbye", "mail=421 4.3.2 service shutting down; drop"],
  ["Five messages a session", "mail=452 4.4.5 too many messages in this session; after-messages=5"],
  ["The login is refused", "auth=535 5.7.8 authentication failed"],
  ["A slow relay", "dot=delay=5s"],
  ["No greeting at all", "connect=stall"],
  ["Silence at the final dot", "dot=stall; count=1"],
  ["Reset in the midst of a body", "body=abort; after-bytes=1000; count=1"],
  ["Idle connections are closed after 5 s", "idle=421 4.4.2 timeout; delay=5s; drop"],
];

const faults = {
  update: once(async () => {
    if (view() !== "faults") return;
    const answer = await ask("GET", "/faults");
    const focused = document.activeElement?.id;
    $("faults").replaceChildren(...answer.faults.map((f) => h("li", null,
      h("button", { id: "switch-" + f.id, type: "button", role: "switch", "aria-checked": String(f.on), "aria-label": f.text, onclick: () => faults.change("PATCH", "/" + f.id, { on: !f.on }) }),
      h("code", null, f.text), h("span", { class: "quiet hits" }, f.hits ? `struck ${f.hits}×` : "has not struck"),
      h("button", { id: "delete-" + f.id, type: "button", class: "danger", "aria-label": "Delete " + f.text, onclick: () => faults.change("DELETE", "/" + f.id) }, "Delete"))));
    if (focused && document.activeElement?.id !== focused) $(focused)?.focus();
  }),

  async change(method, path, body) {
    try { await ask(method, "/faults" + path, body); } catch (err) { complain(err); }
    this.update();
  },

  async add(spec) {
    $("fault-error").textContent = "";
    try { await ask("POST", "/faults", spec); } catch (err) { $("fault-error").textContent = err.message; }
    this.update();
  },

  fromForm() {
    const spec = { at: $("f-at").value };
    for (const name of ["reply", "delay", "rcpt"]) if ($("f-" + name).value) spec[name] = $("f-" + name).value;
    for (const name of ["count", "connection", "nth", "every", "after_messages", "after_bytes", "rate"]) if ($("f-" + name).value) spec[name] = Number($("f-" + name).value);
    if ($("f-deed").value) spec[$("f-deed").value] = true;
    return spec;
  },
};

// ---- where we are: the view and what is chosen in it stand in the address

function route() {
  const [, name, rest] = location.hash.split("/");
  return { name: ["messages", "connections", "refusals", "faults"].includes(name) ? name : "messages", rest: rest && decodeURIComponent(rest) };
}
const view = () => route().name;

function mark(list, href) {
  for (const a of list.querySelectorAll("a")) a.getAttribute("href") === href ? a.setAttribute("aria-current", "true") : a.removeAttribute("aria-current");
}

function go() {
  const { name, rest } = route();
  for (const s of document.querySelectorAll("main > section")) s.hidden = s.id !== "view-" + name;
  for (const a of document.querySelectorAll("nav a")) a.hash === "#/" + name ? a.setAttribute("aria-current", "page") : a.removeAttribute("aria-current");
  $("view-" + name).classList.toggle("open", Boolean(rest));
  switch (name) {
    case "messages": mails.update(); mails.show(rest || null); break;
    case "connections": conns.show(Number(rest) || 0); conns.update(); break;
    case "refusals": refusals.update(); break;
    case "faults": fillSteps(); faults.update(); break;
  }
}

function fillSteps() {
  if ($("f-at").options.length || !state) return;
  $("f-at").append(...state.steps.map((s) => h("option", { value: s, selected: s === "rcpt" }, s)));
}

function keys(e) {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  const typing = e.target.matches("input, select, textarea");
  const { name, rest } = route();
  if (e.key === "Escape") {
    if (typing) e.target.blur();
    else if (rest) location.hash = "#/" + name;
    return;
  }
  if (typing) return;
  if (e.key === "/") { e.preventDefault(); location.hash = "#/messages"; setTimeout(() => $("q").focus()); return; }
  const views = { 1: "messages", 2: "connections", 3: "refusals", 4: "faults" };
  if (views[e.key]) { location.hash = "#/" + views[e.key]; return; }
  if (e.key !== "j" && e.key !== "k") return;
  const links = [...document.querySelectorAll(`#view-${name} .rows a`)];
  const at = links.findIndex((a) => a.hasAttribute("aria-current"));
  const next = links[Math.max(0, Math.min(links.length - 1, at + (e.key === "j" ? 1 : at < 0 ? 1 : -1)))];
  if (next) { location.hash = next.getAttribute("href"); next.focus(); }
}

function start() {
  $("presets").append(...presets.map(([name, text]) => h("li", null, h("button", { type: "button", onclick: () => faults.add({ text }) }, name, h("code", null, text)))));
  $("copy").addEventListener("click", async () => {
    try { await navigator.clipboard.writeText($("url").textContent); $("copy").textContent = "Copied"; } catch { getSelection().selectAllChildren($("url")); }
  });
  let typing;
  $("q").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => { mails.query = $("q").value.trim(); mails.last = 0; mails.list = []; mails.update(); }, 150);
  });
  $("search").addEventListener("submit", (e) => e.preventDefault());
  $("more").addEventListener("click", () => mails.older().catch(complain));
  $("delete-all").addEventListener("click", () => { if (confirm("Delete all messages?")) ask("DELETE", "/messages").catch(complain); });
  $("cut").addEventListener("click", () => ask("DELETE", "/connections").catch(complain));
  $("fault").addEventListener("submit", (e) => { e.preventDefault(); faults.add(faults.fromForm()); });
  window.addEventListener("hashchange", go);
  document.addEventListener("keydown", keys);
  ask("GET", "/relay").then((s) => { state = s; showState(); go(); listen(); }).catch(complain);
}

start();
