// The page of `agentcg web`. All that comes from the server is put in as text, never as markup:
// names, command lines and sentences are those of programs that nobody trusts.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const NOW_MS = 2000, TIMELINE_MS = 6000, AWAY_MS = 5000, TIMEOUT_MS = 8000;
const LANE = 16, MEMORY_HEIGHT = 150, TOP = 8, GAP = 22;
const KINDS = {
  pause: "paused", go: "went on", slow: "slowed", deny: "denied", end: "ended", note: "other",
};
const by = (id) => document.getElementById(id);

// Words and numbers

function size(bytes) {
  if (bytes === null || bytes === undefined) return "-";
  let value = bytes;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (value < 1024) return `${value.toFixed(value >= 100 || unit === "B" ? 0 : 1)} ${unit}`;
    value /= 1024;
  }
  return `${value.toFixed(1)} TiB`;
}

function span(usec) {
  const s = usec / 1e6;
  if (s < 1) return `${Math.round(s * 1000)} ms`;
  if (s < 60) return `${s.toFixed(s < 10 ? 1 : 0)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

const two = (n) => String(n).padStart(2, "0");
function clock(usec, seconds = true) {
  const at = new Date(usec / 1000);
  const text = `${two(at.getHours())}:${two(at.getMinutes())}`;
  return seconds ? `${text}:${two(at.getSeconds())}` : text;
}
function day(usec) {
  const at = new Date(usec / 1000);
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${clock(usec)}`;
}
const cores = (value) => (value === null ? "-" : value.toFixed(2));
const percent = (value) => (value === null ? "-" : `${value.toFixed(0)} %`);
const count = (n, one, many) => `${n} ${n === 1 ? one : many}`;

// Elements

function make(name, words, ...inside) {
  const made = document.createElement(name);
  if (words) made.className = words;
  made.append(...inside);
  return made;
}

function shape(name, values, tip) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(values)) {
    made.setAttribute(key, typeof value === "number" ? value.toFixed(1) : value);
  }
  if (tip) tips.set(made, tip);
  return made;
}

function label(x, y, text, values = {}) {
  const made = shape("text", { x, y, ...values });
  made.textContent = text;
  return made;
}

// What is said of the shape under the pointer, or the finger

const tips = new WeakMap();
function showTip(event) {
  const text = tips.get(event.target), tip = by("tip");
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const x = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 16, above = event.clientY - tip.offsetHeight - 12;
  tip.style.left = `${Math.max(4, x)}px`;
  tip.style.top = `${below + tip.offsetHeight > window.innerHeight ? Math.max(4, above) : below}px`;
}

// Colours: a session keeps its own as long as it is drawn

const colours = new Map();
function colourOf(name, names) {
  for (const known of [...colours.keys()]) if (!names.includes(known)) colours.delete(known);
  if (!names.includes(name)) return "c8";
  if (!colours.has(name)) {
    const used = new Set(colours.values());
    colours.set(name, [0, 1, 2, 3, 4, 5, 6, 7].find((n) => !used.has(n)) ?? 8);
  }
  return `c${colours.get(name)}`;
}

// The pool as it is

function drawNow(found) {
  const pool = found.pool, most = pool.memory_max_bytes, held = pool.memory_current_bytes;
  const share = most && held !== null ? ` (${((100 * held) / most).toFixed(0)} %)` : "";
  by("pool-text").textContent =
    `${size(held)} of ${most ? size(most) : "no limit"}${share}`;
  const busy = pool.rate.cores === null ? "" : `${cores(pool.rate.cores)} of `;
  by("counts").textContent =
    `${busy}${pool.cpu_millicores / 1000} cores \u00b7 ${count(pool.sessions, "session", "sessions")}` +
    ` \u00b7 ${count(pool.calls, "call", "calls")}: ${pool.calls_running} run, ` +
    `${pool.calls_paused} paused, ${pool.calls_waiting} wait`;
  by("pressure").textContent =
    `tasks wait for: memory ${percent(pool.memory_some_percent)}, ` +
    `CPU ${percent(pool.cpu_some_percent)}, disks ${percent(pool.io_some_percent)}`;
  by("facts").textContent =
    `daemon ${pool.version}, Linux ${pool.kernel}, up ${span(found.at_unix_usec - pool.started_unix_usec)}`;
  by("clock").textContent = `seen ${clock(found.at_unix_usec)}`;
  drawBar(found);
  drawSessions(found);
  drawStuck(found);
  by("advice-rows").replaceChildren(...found.advice.map((sentence) => make("li", "", sentence)));
}

function drawBar(found) {
  const svg = by("bar"), width = svg.clientWidth || 600, pool = found.pool;
  const held = pool.memory_current_bytes || 0;
  const roof = Math.max(pool.memory_max_bytes || 0, held, 1);
  const names = lastNames.length ? lastNames : found.sessions.slice(0, 8).map((s) => s.id);
  const parts = [shape("rect", { x: 0, y: 0, width, height: 18, class: "free" }, "free")];
  let x = 0, sum = 0;
  for (const each of found.sessions) {
    const wide = Math.min((width * each.memory_bytes) / roof, width - x);
    if (wide < 0.5) continue;
    const look = `${colourOf(each.id, names)}`;
    parts.push(shape("rect", { x, y: 0, width: wide, height: 18, class: look },
      `${each.id}: ${size(each.memory_bytes)}`));
    x += wide;
    sum += each.memory_bytes;
  }
  const rest = Math.min((width * Math.max(0, held - sum)) / roof, width - x);
  if (rest >= 0.5) {
    parts.push(shape("rect", { x, y: 0, width: rest, height: 18, class: "c8" },
      `others: ${size(held - sum)}`));
  }
  svg.setAttribute("viewBox", `0 0 ${width} 18`);
  svg.replaceChildren(...parts);
}

function cell(text, words = "") {
  return make("td", text === "-" ? `${words} none` : words, text);
}

function drawSessions(found) {
  by("session-rows").replaceChildren(...found.sessions.map((each) => {
    const full = each.memory_max_bytes && each.memory_bytes >= 0.95 * each.memory_max_bytes;
    const name = cell(each.id);
    name.title = each.labels ? `${each.id} (${each.labels})` : each.id;
    return make("tr", "", name, cell(String(each.priority), "n"), cell(size(each.memory_bytes), "n"),
      cell(size(each.memory_max_bytes), full ? "n warn" : "n"), cell(cores(each.rate.cores), "n x"),
      cell(rate(each.rate.io_bytes), "n x"), cell(rate(each.rate.net_bytes), "n x"),
      cell(String(each.calls_running), "n"),
      cell(String(each.calls_paused), each.calls_paused ? "n bad" : "n"),
      cell(String(each.calls_waiting), each.calls_waiting ? "n warn" : "n"));
  }));
  const left = found.sessions_left_out;
  by("sessions-left-out").textContent = left ? `and ${left} more, which hold less` :
    found.sessions.length ? "" : "No session is open.";
}
const rate = (value) => (value === null ? "-" : size(Math.round(value)));

function drawStuck(found) {
  const rows = found.stuck.map((each) => {
    const waits = each.state === "waiting";
    const name = make("button", "name", `${each.name} of ${each.session_id}`);
    name.type = "button";
    name.addEventListener("click", () => tell(each.call_id));
    return make("li", "", make("span", waits ? "tag waits" : "tag paused", waits ? "waits" : "paused"),
      name, ` for ${span(each.for_usec)}`, make("span", "why", each.why));
  });
  if (found.stuck_left_out) rows.push(make("li", "", `and ${found.stuck_left_out} more`));
  if (!rows.length) rows.push(make("li", "", "No call is paused, none waits."));
  by("stuck-rows").replaceChildren(...rows);
}

// The timeline

let lastNames = [];
let lastTimeline = null;

function drawTimeline(found) {
  lastTimeline = found;
  const svg = by("timeline"), width = svg.clientWidth || 900, narrow = width < 560;
  const left = narrow ? 8 : 130, right = 8;
  const since = found.from_unix_usec, until = found.to_unix_usec;
  const x = (at) => left + Math.min(1, Math.max(0, (at - since) / (until - since))) *
    (width - left - right);
  const lanesTop = TOP + MEMORY_HEIGHT + GAP;
  const rows = lanesOf(found, narrow, lanesTop);
  const bottom = rows.bottom, height = bottom + 20;
  lastNames = found.memory.sessions;
  const parts = [...drawGrid(found, x, bottom, narrow), ...drawMemory(found, x, left, width - right),
    ...drawLabels(found, rows, narrow), ...drawCalls(found, rows, x), ...drawMarks(found, rows, x)];
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  svg.replaceChildren(...parts);
  drawLegend(found);
  const told = [];
  if (found.calls_left_out) told.push(`${count(found.calls_left_out, "call has", "calls have")} no room here.`);
  if (found.marks_left_out) told.push(`${found.marks_left_out} older decisions are left out.`);
  if (found.memory.guessed.length) told.push("Pale: before this page's server began to look, what calls held at most.");
  if (!found.calls.length) told.push("No call in this time.");
  by("left-out").textContent = told.join(" ");
  drawEnded(found.ended_sessions);
}

// Where each lane stands: on a narrow screen the name of a session has a line of its own above.
function lanesOf(found, narrow, top) {
  const ys = [], names = [];
  let y = top;
  found.lanes.forEach((name, number) => {
    const first = number === 0 || found.lanes[number - 1] !== name;
    if (first) {
      y += number === 0 ? 0 : 4;
      if (narrow) y += 13;
      names.push([name, narrow ? y - 3 : y + LANE - 4]);
    }
    ys.push(y);
    y += LANE;
  });
  return { ys, names, bottom: y + 4 };
}

function drawLabels(found, rows, narrow) {
  return rows.names.map(([name, y]) => {
    const most = narrow ? 44 : 18;
    const short = [...name].length > most ? `${[...name].slice(0, most - 1).join("")}\u2026` : name;
    const made = label(narrow ? 8 : 4, y, short);
    tips.set(made, name);
    return made;
  });
}

function* drawGrid(found, x, bottom, narrow) {
  const since = found.from_unix_usec, until = found.to_unix_usec, minutes = (until - since) / 6e7;
  const step = [1, 2, 5, 10, 15, 30, 60].find((m) => minutes / m <= (narrow ? 5 : 10)) || 60;
  const first = Math.ceil(since / 6e7 / step) * step;
  for (let at = first * 6e7; at < until; at += step * 6e7) {
    yield shape("line", { class: "grid", x1: x(at), x2: x(at), y1: TOP, y2: bottom });
    yield label(x(at), bottom + 14, clock(at, false), { "text-anchor": "middle" });
  }
}

function runs(points, gap) {
  const found = [];
  for (const point of points) {
    const last = found.at(-1);
    if (last && point[0] - last.at(-1)[0] <= gap) last.push(point);
    else found.push([point]);
  }
  return found;
}

function* drawMemory(found, x, left, end) {
  const memory = found.memory, names = memory.sessions;
  const all = [...memory.guessed, ...memory.points];
  const sums = (point) => Math.max(point[1], point[2].reduce((a, b) => a + b, 0));
  const top = Math.max(0, ...all.map(sums));
  const base = TOP + MEMORY_HEIGHT;
  yield shape("line", { class: "grid", x1: left, x2: end, y1: base, y2: base });
  if (!top) {
    yield label(left + 6, base - 8, "Nothing was measured in this time.");
    return;
  }
  // A limit far above what is used would press everything flat: it is left out, and said.
  const limit = memory.max_bytes && memory.max_bytes <= 2.5 * top ? memory.max_bytes : null;
  const roof = 1.04 * Math.max(top, limit || 0);
  const y = (value) => base - (MEMORY_HEIGHT * value) / roof;
  for (const [points, gap, words] of [[memory.guessed, Infinity, "guessed"],
    [memory.points, found.gap_usec, ""]]) {
    for (const run of runs(points, gap)) yield* drawRun(run, names, x, y, words);
  }
  if (limit) {
    yield shape("line", { class: "limit", x1: left, x2: end, y1: y(limit), y2: y(limit) },
      `the pool's limit: ${size(limit)}`);
  }
  yield label(left + 4, limit ? y(limit) + 13 : TOP + 10, limit ? `limit ${size(limit)}, most ${size(top)}` : `most ${size(top)}`);
}

function* drawRun(run, names, x, y, words) {
  let below = run.map(() => 0);
  for (let n = 0; n <= names.length; n++) {
    const above = run.map((point, i) => below[i] + point[2][n]);
    if (above.some((value, i) => value > below[i])) {
      const upper = run.map((point, i) => `${x(point[0]).toFixed(1)},${y(above[i]).toFixed(1)}`);
      const lower = run.map((point, i) => `${x(point[0]).toFixed(1)},${y(below[i]).toFixed(1)}`);
      const name = n < names.length ? names[n] : "others";
      const look = n < names.length ? colourOf(names[n], names) : "c8";
      const most = Math.max(...run.map((point) => point[2][n]));
      yield shape("polygon", { class: `${look} ${words}`, points: [...upper, ...lower.reverse()].join(" ") },
        `${name}: ${words ? "calls held at most" : "at most"} ${size(most)}, ` +
        `${size(run.at(-1)[2][n])} at ${clock(run.at(-1)[0])}`);
    }
    below = above;
  }
  if (!words) {
    const line = run.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" ");
    yield shape("polyline", { class: "pool", points: line });
  }
}

function lookOf(state) {
  if (state === "ok") return "s-ok";
  if (state === "failed" || state === "signaled") return "s-fail";
  if (["running", "frozen", "pending", "ending", "waiting"].includes(state)) return "s-run";
  return "s-bad";
}

function* drawCalls(found, rows, x) {
  const until = found.to_unix_usec;
  for (const call of found.calls) {
    const y = rows.ys[call.lane], end = call.ended_unix_usec ?? until;
    const began = x(call.began_unix_usec), wide = Math.max(2, x(end) - began);
    const told = tellOf(call, end);
    const open = () => tell(call.call_id);
    if (call.began_unix_usec - call.asked_unix_usec > 50000) {
      const asked = x(call.asked_unix_usec);
      const wait = shape("rect", { class: "bar s-wait", x: asked, y: y + 4, width: Math.max(1.5, began - asked),
        height: LANE - 8 }, `waited ${span(call.began_unix_usec - call.asked_unix_usec)} in the queue\n${told}`);
      wait.addEventListener("click", open);
      yield wait;
    }
    if (call.state === "waiting") continue;
    const bar = shape("rect", { class: `bar ${lookOf(call.state)}`, x: began, y: y + 2, width: wide,
      height: LANE - 4, rx: 2 }, told);
    bar.addEventListener("click", open);
    yield bar;
    for (const [from, to, sentence] of call.pauses) {
      yield shape("rect", { class: "s-pause", x: x(from), y: y + 4, width: Math.max(1, x(to) - x(from)),
        height: LANE - 8 }, `paused for ${span(to - from)}: ${sentence}`);
    }
    const letters = Math.floor((wide - 8) / 6.2);
    if (letters >= 3) {
      const name = [...call.name].length > letters ? `${[...call.name].slice(0, letters - 1).join("")}\u2026` : call.name;
      yield label(began + 4, y + LANE - 5, name, { class: "label" });
    }
  }
}

const STATES = {
  frozen: "paused", running: "runs", pending: "begins", ending: "ends", waiting: "waits",
  unspecified: "nobody saw how it ended",
};
const stateText = (state) => STATES[state] || state.replaceAll("_", " ");

function tellOf(call, end) {
  const lines = [call.command, `${stateText(call.state)}${call.sentence ? `: ${call.sentence}` : ""}`,
    `${span(end - call.began_unix_usec)}, ${call.ended_unix_usec ? "at most" : "holds"} ${size(call.memory_bytes)}`];
  return lines.join("\n");
}

function* drawMarks(found, rows, x) {
  const lanes = new Map(found.calls.map((call) => [call.call_id, call.lane]));
  for (const mark of found.marks) {
    const lane = lanes.get(mark.call_id);
    const y = lane === undefined ? TOP + MEMORY_HEIGHT + GAP / 2 : rows.ys[lane] + LANE / 2;
    const made = markShape(mark.kind, x(mark.at_unix_usec), y);
    tips.set(made, `${clock(mark.at_unix_usec)} ${mark.session_id}\n${mark.sentence}`);
    if (mark.call_id) made.addEventListener("click", () => tell(mark.call_id));
    yield made;
  }
}

// Each kind has a shape of its own as well as a colour.
function markShape(kind, x, y) {
  const r = 4.5;
  const points = {
    go: [[-r, -r], [r, 0], [-r, r]], slow: [[-r, -r], [r, -r], [0, r]],
    deny: [[0, -r - 1], [r + 1, 0], [0, r + 1], [-r - 1, 0]],
    pause: [[-r, -r], [r, -r], [r, r], [-r, r]],
    end: [[-r, -2], [-2, -r], [0, -2], [2, -r], [r, -2], [2, 0], [r, 2], [2, r], [0, 2], [-2, r], [-r, 2], [-2, 0]],
  }[kind];
  if (!points) return shape("circle", { class: `bar m-${kind}`, cx: x, cy: y, r: 3.5 });
  return shape("polygon", { class: `bar m-${kind}`,
    points: points.map(([dx, dy]) => `${(x + dx).toFixed(1)},${(y + dy).toFixed(1)}`).join(" ") });
}

function drawLegend(found) {
  const square = (words) => {
    const svg = shape("svg", { viewBox: "0 0 12 12" });
    svg.append(shape("rect", { x: 1, y: 1, width: 10, height: 10, class: words }));
    return svg;
  };
  const names = found.memory.sessions;
  const parts = [];
  const group = (title, entries) => {
    if (entries.length) parts.push(make("div", "", make("b", "", title), ...entries));
  };
  const sessions = names.map((name) => {
    const made = make("span", "", square(colourOf(name, names)), name);
    made.title = name;
    return made;
  });
  if ([...found.memory.points, ...found.memory.guessed].some((point) => point[2].at(-1) > 0)) {
    sessions.push(make("span", "", square("c8"), "others"));
  }
  group("memory", sessions);
  const calls = [];
  const states = new Set(found.calls.map((call) => lookOf(call.state)));
  const words = { "s-run": "runs", "s-ok": "ended well", "s-fail": "failed", "s-bad": "ended by others" };
  for (const [look, text] of Object.entries(words)) {
    if (states.has(look)) calls.push(make("span", "", square(look), text));
  }
  if (found.calls.some((call) => call.state === "waiting" || call.began_unix_usec - call.asked_unix_usec > 50000)) {
    calls.push(make("span", "", square("s-wait"), "waited"));
  }
  group("calls", calls);
  const decisions = [];
  const kinds = new Set(found.marks.map((mark) => mark.kind));
  for (const [kind, text] of Object.entries(KINDS)) {
    if (!kinds.has(kind)) continue;
    const svg = shape("svg", { viewBox: "0 0 12 12" });
    svg.append(markShape(kind, 6, 6));
    decisions.push(make("span", "", svg, text));
  }
  group("decisions", decisions);
  by("legend").replaceChildren(...parts);
}

function drawEnded(sessions) {
  by("ended").hidden = !sessions.length;
  by("ended-rows").replaceChildren(...sessions.map((each) => {
    const name = cell(each.id);
    name.title = each.id;
    return make("tr", "", name, cell(day(each.closed_unix_usec), "at"),
      cell(span(each.closed_unix_usec - each.opened_unix_usec), "n x"), cell(String(each.calls), "n"),
      cell(String(each.calls_not_ok), each.calls_not_ok ? "n warn" : "n"),
      cell(span(each.cpu_usage_usec), "n x"), cell(size(each.memory_peak_bytes), "n x"), cell(each.closed_why));
  }));
}

// What happened to one call

async function tell(id) {
  const { status, body } = await ask(`/api/story?call=${encodeURIComponent(id)}`);
  const is = status === 200;
  by("story-title").textContent = is ? `${body.name} of ${body.session_id}: ${stateText(body.state)}` : "This call";
  by("story-command").textContent = is ? body.command : "";
  by("story-end").textContent = is ? body.sentence : body.error;
  by("story-steps").replaceChildren(...(is ? body.steps : []).map((step) => {
    const at = make("time", "", step.at_unix_usec ? clock(step.at_unix_usec) : "when is not known");
    return make("li", "", at, step.sentence);
  }));
  by("story-advice").replaceChildren(...(is ? body.advice : []).map((text) => make("li", "", text)));
  if (!by("story").open) by("story").showModal();
}

// Asking

let token = "";
async function ask(path) {
  try {
    const reply = await fetch(path, {
      headers: { Authorization: `Bearer ${token}` }, signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    return { status: reply.status, body: await reply.json() };
  } catch (error) {
    return { status: 0, body: { error: "agentcg web does not answer: it has ended, or the way to it." } };
  }
}

function trouble(text) {
  by("trouble").hidden = !text;
  by("trouble").textContent = text;
}

let fellSilent = 0;
async function askNow() {
  const { status, body } = await ask("/api/now");
  if (status !== 200) {
    fellSilent ||= Date.now() * 1000;
    trouble(status === 0 ? `${body.error} Since ${clock(fellSilent)}.` : body.error);
    return false;
  }
  fellSilent = 0;
  const { daemon, found } = body;
  const old = found ? " What is shown was seen last." : "";
  trouble(daemon.answers ? "" : `${daemon.sentence} Since ${clock(daemon.since_unix_usec)}.${old}`);
  setMinutes(body.minutes);
  by("main").hidden = !found;
  if (found) drawNow(found);
  return true;
}

async function askTimeline() {
  const { status, body } = await ask(`/api/timeline?minutes=${encodeURIComponent(by("minutes").value)}`);
  if (status === 200) drawTimeline(body);
}

function setMinutes(most) {
  const select = by("minutes");
  if (select.options.length) return;
  const offered = [5, 15, 30, 60, 120, 240].filter((m) => m < most);
  for (const minutes of [...offered, most]) {
    const option = make("option", "", `${minutes} min`);
    option.value = String(minutes);
    select.append(option);
  }
  select.value = String(offered.includes(15) ? 15 : most);
}

async function go() {
  let timelineDue = 0;
  for (;;) {
    let wait = NOW_MS;
    if (!document.hidden) {
      const answered = await askNow();
      if (answered && Date.now() >= timelineDue) {
        await askTimeline();
        timelineDue = Date.now() + TIMELINE_MS;
        document.body.dataset.drawn = "yes";
      }
      wait = answered ? NOW_MS : AWAY_MS;
    }
    await new Promise((done) => setTimeout(done, wait));
  }
}

function begin() {
  // Behind "#" the token is sent nowhere, and an origin's storage is its own, unlike its cookies,
  // which every other port of this machine gets too.
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem("token", given);
    history.replaceState(null, "", location.pathname);
  }
  token = sessionStorage.getItem("token") || "";
  by("timeline").addEventListener("pointermove", showTip);
  by("timeline").addEventListener("pointerdown", showTip);
  by("bar").addEventListener("pointermove", showTip);
  for (const id of ["timeline", "bar"]) {
    by(id).addEventListener("pointerleave", () => { by("tip").hidden = true; });
  }
  by("minutes").addEventListener("change", askTimeline);
  window.addEventListener("resize", () => { if (lastTimeline) drawTimeline(lastTimeline); });
  go();
}

begin();
