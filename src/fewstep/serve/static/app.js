// The page: a form, runs with their pictures, and one picture at a time in a dialog.

import { asCurl, asPython, getJson, onKeyNeeded, stream } from "./api.js";

const $ = (id) => document.getElementById(id);
const state = { models: [], controller: null, open: null, cards: [] };

// -- small things -------------------------------------------------------------------------------

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const seconds = (milliseconds) => `${(milliseconds / 1000).toFixed(2)} s`;
const say = (text) => { $("status").textContent = text; };
const newSeed = () => Math.floor(Math.random() * 1e6);
const dataUrl = (event) => `data:image/${event.output_format};base64,${event.b64_json}`;

function fail(error) {
  const again = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  $("error").textContent = `${error.message}.${again}`.replace("..", ".");
  $("error").hidden = false;
}

function setTheme(dark) {
  document.documentElement.classList.toggle("dark", dark);
  localStorage.setItem("fewstep-theme", dark ? "dark" : "light");
}

// -- the form -----------------------------------------------------------------------------------

const model = () => state.models.find((one) => one.id === $("model").value) ?? state.models[0];

function showModel() {
  const { classes, text, solvers } = model();
  $("class-field").hidden = !classes.length;
  $("prompt-field").hidden = $("negative-field").hidden = !text;
  $("classes").replaceChildren(
    ...["any", ...classes].map((name, i) => {
      const input = element("input", { type: "radio", name: "label", value: name });
      input.checked = i === 1;
      return element("label", {}, input, element("span", {}, name));
    }),
  );
  $("solver").replaceChildren(...solvers.map((name) => element("option", {}, name)));
}

function asked() {
  const { classes } = model();
  const body = { n: Number($("n").value), nfe: Number($("nfe").value) };
  if (state.models.length > 1) body.model = model().id;
  const label = document.querySelector('input[name="label"]:checked')?.value;
  if (classes.length) body.prompt = label === "any" ? "" : label;
  else body.prompt = $("prompt").value.trim();
  if ($("solver").value !== "auto") body.solver = $("solver").value;
  const conditioned = classes.length ? label !== "any" : body.prompt;
  if (Number($("guidance").value) > 1 && conditioned) body.guidance_scale = Number($("guidance").value);
  if (!$("negative-field").hidden && $("negative").value) body.negative_prompt = $("negative").value;
  body.seed = $("seed").value === "" ? newSeed() : Number($("seed").value);
  return body;
}

// -- runs ---------------------------------------------------------------------------------------

function newCard(total) {
  const image = element("img", { alt: "" });
  image.hidden = true;
  const bar = element("i");
  const left = element("span");
  const right = element("span");
  const button = element(
    "button",
    { class: "card waiting", type: "button", "aria-label": "waiting" },
    element("span", { class: "picture" }, image),
    element("span", { class: "bar" }, bar),
    element("span", { class: "caption" }, left, right),
  );
  const card = { button, image, bar, left, right, total, fact: null, before: null };
  button.disabled = true;
  button.addEventListener("click", () => openDetail(card));
  button.addEventListener("keydown", move);
  return card;
}

function show(card, event, subject) {
  card.image.src = dataUrl(event);
  card.image.hidden = false;
  card.image.classList.toggle("small", parseInt(event.size, 10) <= 128);
  card.button.classList.remove("waiting");
  card.left.textContent = `#${event.seed}`;
  card.right.textContent = `${event.nfe} / ${card.total}`;
  card.bar.style.width = `${(100 * event.nfe) / card.total}%`;
  const what = `${subject}, seed ${event.seed}`;
  card.button.setAttribute("aria-label", `${what}, ${event.nfe} of ${card.total} evaluations`);
}

function move(event) {
  const cards = [...document.querySelectorAll(".card:not(:disabled)")];
  const place = cards.indexOf(event.currentTarget);
  const columns = cards.filter((one) => one.offsetTop === cards[place].offsetTop).length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (!step) return;
  event.preventDefault();
  cards[Math.max(0, Math.min(cards.length - 1, place + step))].focus();
}

// Makes pictures and shows them in a section of their own.
async function run(title, path, body, { count, total, subject }) {
  state.controller?.abort();
  const controller = (state.controller = new AbortController());
  $("error").hidden = true;
  $("empty").hidden = true;
  $("stop").hidden = false;
  for (const id of ["queue", "first", "last", "speed"]) $(id).textContent = "…";
  const cards = Array.from({ length: count }, () => newCard(total));
  const note = element("small", {}, `${total} evaluations${body.solver ? `, ${body.solver}` : ""}`);
  const grid = element("ul", { class: "grid" }, ...cards.map((one) => element("li", {}, one.button)));
  const section = element("section", { class: "run", "aria-label": title }, element("h2", {}, title, note), grid);
  $("runs").prepend(section);
  while ($("runs").children.length > 20) $("runs").lastElementChild.remove();
  const begun = performance.now();
  let spent = 0, first = 0, done = 0;
  say(`making ${count} pictures`);
  if (section.getBoundingClientRect().top > innerHeight - 120) $("results").scrollIntoView({ block: "start" });
  try {
    await stream(path, body, (event) => {
      if (event.type.endsWith(".queued")) {
        $("queue").textContent = event.position ? `${event.position} ahead, ${event.estimated_seconds} s` : "next";
        return;
      }
      $("queue").textContent = "running";
      if (!first) $("first").textContent = seconds((first = performance.now() - begun));
      const card = cards[event.index];
      spent += event.nfe - (card.spent ?? 0);
      card.spent = event.nfe;
      show(card, event, subject);
      $("speed").textContent = ((1000 * spent) / (performance.now() - begun)).toFixed(0);
      if (!event.type.endsWith(".completed")) return;
      finish(card, event, path, body, subject);
      done += 1;
    }, controller.signal);
    $("queue").textContent = "done";
    $("last").textContent = seconds(performance.now() - begun);
    say(`${done} pictures are done`);
    return cards;
  } catch (error) {
    $("queue").textContent = error.name === "AbortError" ? "stopped" : "failed";
    if (error.name !== "AbortError") fail(error);
    for (const card of cards.filter((one) => one.button.disabled && !one.spent)) card.button.parentElement.remove();
    if (!grid.children.length) section.remove();
    $("empty").hidden = $("runs").children.length > 0;
    return null;
  } finally {
    if (state.controller === controller) {
      state.controller = null;
      $("stop").hidden = true;
    }
  }
}

function finish(card, event, path, body, subject) {
  // one picture of several is made again by its own seed
  const own = { ...body, seed: event.seed, ...("n" in body ? { n: 1 } : {}) };
  if (path.endsWith("/refine")) delete own.seed;
  card.fact = { ...event, url: dataUrl(event), path, body: own, subject };
  card.button.classList.add("done");
  card.button.disabled = false;
  card.right.textContent = `${event.nfe} nfe`;
}

// -- one picture --------------------------------------------------------------------------------

function openDetail(card) {
  state.open = card;
  showDetail();
  if (!$("detail").open) $("detail").showModal();
}

function showDetail() {
  const { fact, before } = state.open;
  const comparing = $("compare").getAttribute("aria-pressed") === "true" && before;
  const shown = comparing ? before : fact;
  $("detail-image").src = shown.url;
  $("detail-image").classList.toggle("small", parseInt(fact.size, 10) <= 128);
  $("detail-image").alt = `${fact.subject}, seed ${fact.seed}, ${shown.nfe} evaluations`;
  $("detail-title").textContent = fact.subject;
  const rows = { Seed: fact.seed, Evaluations: shown.nfe, Size: fact.size.replace("x", " × ") };
  $("facts").replaceChildren(
    ...Object.entries(rows).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]),
  );
  $("compare").hidden = !before;
  $("nearness").textContent = before
    ? `${before.nfe} against ${fact.nfe} evaluations: ${fact.pixel_error.rms.toFixed(1)} grey levels apart (root mean square)`
    : "The same picture from the same noise, with a larger budget.";
  const most = Number($("refine-nfe").max);
  $("refine-nfe").value = Math.min(most, Math.max(2 * fact.nfe, 8));
  $("refine-out").textContent = `${$("refine-nfe").value} evaluations`;
}

async function refine() {
  const card = state.open;
  if (!card || $("refine").disabled) return;
  $("refine").disabled = true;
  $("nearness").textContent = "refining…";
  const path = `/v1/images/${card.fact.id}/refine`;
  const body = { nfe: Number($("refine-nfe").value) };
  const before = card.fact;
  card.total = body.nfe;
  try {
    await stream(path, body, (event) => {
      if (event.type.endsWith(".queued")) return;
      show(card, event, before.subject);
      if (state.open === card) $("detail-image").src = dataUrl(event);
      if (!event.type.endsWith(".completed")) return;
      card.before = before;
      finish(card, event, path, body, before.subject);
      say(`refined to ${event.nfe} evaluations`);
    });
    $("compare").setAttribute("aria-pressed", "false");
    if (state.open === card) showDetail();
  } catch (error) {
    $("nearness").textContent = error.message;
  } finally {
    $("refine").disabled = false;
  }
}

function more() {
  const { fact } = state.open;
  const strength = document.querySelector('input[name="strength"]:checked').value;
  const body = { n: 6, strength, seed: newSeed(), nfe: fact.nfe };
  $("detail").close();
  $("results").scrollIntoView({ block: "start" });
  run(`Like ${fact.subject}, seed ${fact.seed}`, `/v1/images/${fact.id}/variations`, body, {
    count: body.n, total: fact.nfe, subject: fact.subject,
  });
}

function download() {
  const { fact } = state.open;
  const name = `${fact.subject}-${fact.seed}.${fact.output_format}`.replaceAll(/[^\w.-]+/g, "-").slice(-120);
  element("a", { href: fact.url, download: name }).click();
}

async function copy(button, text) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    say("copied");
  } catch {
    button.textContent = "Not allowed here";
  }
  setTimeout(() => { button.textContent = label; }, 1500);
}

function compare() {
  if (!state.open?.before) return;
  const on = $("compare").getAttribute("aria-pressed") !== "true";
  $("compare").setAttribute("aria-pressed", String(on));
  $("compare").firstChild.textContent = on ? "Show the refined one " : "Show the draft ";
  const slider = $("refine-nfe").value;
  showDetail();
  $("refine-nfe").value = slider;
}

// -- wiring -------------------------------------------------------------------------------------

function bindOutput(input, output, format = (value) => value) {
  const update = () => { $(output).textContent = format($(input).value); };
  $(input).addEventListener("input", update);
  update();
}

function bind() {
  bindOutput("nfe", "nfe-out");
  bindOutput("n", "n-out");
  bindOutput("guidance", "guidance-out", (value) => (Number(value) === 1 ? "none" : value));
  bindOutput("refine-nfe", "refine-out", (value) => `${value} evaluations`);
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!state.models.length || !$("form").reportValidity()) return;
    const body = asked();
    const subject = body.prompt || "any picture";
    run(subject, "/v1/images/generations", body, { count: body.n, total: body.nfe, subject });
  });
  $("stop").addEventListener("click", () => state.controller?.abort());
  $("model").addEventListener("change", showModel);
  $("dice").addEventListener("click", () => { $("seed").value = newSeed(); });
  $("theme").addEventListener("click", () => setTheme(!document.documentElement.classList.contains("dark")));
  $("close").addEventListener("click", () => $("detail").close());
  $("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });
  $("detail").addEventListener("close", () => {
    const card = state.open;
    state.open = null;
    $("compare").setAttribute("aria-pressed", "false");
    $("compare").firstChild.textContent = "Show the draft ";
    card?.button.focus();
  });
  $("refine").addEventListener("click", refine);
  $("compare").addEventListener("click", compare);
  $("more").addEventListener("click", more);
  $("download").addEventListener("click", download);
  $("copy-curl").addEventListener("click", () => copy($("copy-curl"), asCurl(state.open.fact.path, state.open.fact.body)));
  $("copy-python").addEventListener("click", () => copy($("copy-python"), asPython(state.open.fact.path, state.open.fact.body)));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
    if (!state.open || event.ctrlKey || event.metaKey || event.altKey) return;
    const acts = { r: refine, m: more, d: download, b: compare };
    const act = acts[event.key.toLowerCase()];
    if (act) {
      event.preventDefault();
      act();
    }
  });
  onKeyNeeded(() => new Promise((resolve) => {
    $("key-dialog").showModal();
    $("key-dialog").addEventListener("close", () => resolve($("key").value.trim()), { once: true });
  }));
}

async function watchService() {
  for (;;) {
    if (!document.hidden) {
      try {
        const now = await getJson("/v1/status");
        const waiting = now.waiting ? `${now.waiting} waiting, ` : "";
        const busy = now.running ? `${waiting}${now.running} running` : "idle";
        $("service").textContent = busy;
      } catch {
        $("service").textContent = "no connection";
      }
    }
    await new Promise((resolve) => setTimeout(resolve, 3000));
  }
}

async function start() {
  const known = localStorage.getItem("fewstep-theme");
  setTheme(known ? known === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  bind();
  try {
    const [models, status] = await Promise.all([getJson("/v1/models"), getJson("/v1/status")]);
    state.models = models.data;
    $("model").replaceChildren(...state.models.map((one) => element("option", { value: one.id }, one.id)));
    $("model-field").hidden = state.models.length < 2;
    $("n").max = Math.min(12, status.most_images);
    $("nfe").max = Math.min(16, status.most_evaluations);
    $("refine-nfe").max = Math.min(30, status.most_evaluations);
    showModel();
  } catch (error) {
    fail(error);
  }
  watchService();
}

start();
