// Draws the page of viewer.html from the JSON in its element "data" (viewer.py: Page.data says what is in it).
// What a model wrote becomes text, never markup: elements are made by make() below, nothing is parsed.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const GAMES = {numberline: "NumberLine", ezpoints: "EZPoints", points24: "Points24", blackjack: "Blackjack",
               alfworld: "ALFWorld"};
const last = Math.max(...data.sides.map(side => side.steps.length));    // the place of the end, behind all steps
const opened = new Set();                                               // which details stay open from step to step
let here = 0, timer = null;

// ---- small helpers ---------------------------------------------------------------------------------------------
const $ = id => document.getElementById(id);

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children.filter(child => child !== null));
  return element;
}

const minus = text => text.replace("-", "−");
const fixed = (number, digits = 3) => minus(number.toFixed(digits));
const signed = number => {                          // two decimals at most: 1, −0.5, +50.67
  const text = String(+number.toFixed(2));
  return (Number(text) > 0 ? "+" : "") + minus(text);
};
const tone = number => number > 0 ? "good" : number < 0 ? "bad" : "";
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

function percent(logp) {
  const share = 100 * Math.exp(logp);
  return (share > 99.9 ? "over 99.9" : share >= 1 ? share.toFixed(1) : share.toPrecision(2)) + " %";
}

function shade(element, logp) {     // nothing at 100 %, full at 1 %; the root makes 60 % visible
  element.style.setProperty("--surprise", (0.85 * Math.sqrt(Math.min(1, -logp / Math.log(100)))).toFixed(3));
}

// ---- one player's side -----------------------------------------------------------------------------------------
function drawSide(side) {
  const step = side.steps[here], state = step || side.end;
  const picture = make("img", {src: state.picture, width: 300, height: 300,
                               alt: step ? `what the player sees at step ${here + 1}` : "the last picture"});
  const box = make("section", {class: "side", "aria-label": side.name}, heading(side),
                   make("div", {class: "scene"}, picture, step ? played(side, step) : end(side.end)));
  if (step && step.text !== null) box.append(...answer(side, step));
  if (step) box.append(folded("prompt v_in", step.prompt));
  box.append(folded("what the game knows of this state", known(state.info)));
  return box;
}

function heading(side) {
  const outcome = side.end.success ? "wins" : side.end.truncated ? "runs out of time"
    : side.end.success === null ? "ends" : "does not win";
  const told = `${outcome} in ${plural(side.steps.length, "step")}, return ${signed(side.end.return)}`;
  return make("h2", null, side.name, make("small", null, told));
}

function entry(name, value, meaning, style = "") {
  return make("div", {title: meaning}, make("dt", null, name), make("dd", {class: "number " + style}, value));
}

function played(side, step) {
  const expert = step.expert && (step.expert.includes(step.action) ? "✓ so would the expert"
    : `the expert would play ${step.expert.join(" or ")}`);             // null: the game knows none
  const list = make("dl", null,
    entry("reward", signed(step.reward), "what the game pays for this step", tone(step.reward)),
    entry("return so far", signed(step.return), "the sum of the rewards up to this step", tone(step.return)));
  if (step.tokens) list.append(
    entry("V", side.learned ? fixed(step.value, 2) : "–", "what the value head expects from here on"),
    entry("advantage", side.learned ? signed(step.advantage) : "–",
          "how much better than V expected the game went from here"));
  return make("div", null,
    make("p", {class: step.named ? "played" : "played drawn"}, "plays", make("b", null, step.action)),
    step.named ? (step.text === null ? null : make("small", null, "named in the answer"))
      : make("small", {class: "bad"}, "drawn at random: " + (step.text === null ? "the call failed"
                                                             : "the answer names no legal action")),
    expert && make("small", null, expert),
    list);
}

function end(state) {
  const told = state.success ? "The end: won." : state.truncated ? "The end: time is up."
    : state.success === null ? "The end." : "The end: not won.";
  const list = make("dl", null, entry("return", signed(state.return), "the sum of all rewards", tone(state.return)));
  if ("value" in state) list.append(entry("V", fixed(state.value, 2), "of the state where time ran out"));
  return make("div", null, make("p", {class: "played"}, told), list);
}

function answer(side, step) {
  const label = (name, symbol) => make("small", null, name + " ", make("span", null, symbol));
  const thoughts = make("div", {class: "part thoughts"}, label(side.cot ? "thoughts" : "before the action", "v_tht"));
  const action = make("div", {class: "part action"}, label("action", "v_act"));
  if (step.tokens) return [thoughts, action, shaded(step, thoughts, action), sum(side, step)];
  const characters = [...step.text];                                    // as Python counts them
  thoughts.append(characters.slice(0, step.action_character).join(""));
  action.append(characters.slice(step.action_character).join(""));
  return [thoughts, action];
}

function shaded(step, thoughts, action) {   // fills both parts; returns the line with the chosen token's figures
  const readout = make("p", {class: "readout", "aria-live": "polite"});
  const names = step.tokens.map((text, k) => text ? `“${text}”` : k === step.tokens.length - 1 ? "end" : "“”");
  const tokens = step.tokens.map((text, k) => {
    const token = make("span", {class: "token", role: "button", tabindex: -1,
      "aria-label": `${names[k]} probability ${percent(step.logp[k])}`}, text || (names[k] === "end" ? "⏹" : "·"));
    shade(token, step.logp[k]);
    (k < step.action_token ? thoughts : action).append(token);
    return token;
  });
  const choose = (chosen, why = "") => {
    tokens.forEach((token, k) => {
      token.setAttribute("aria-pressed", k === chosen);
      token.tabIndex = k === chosen ? 0 : -1;
    });
    readout.replaceChildren(why, make("code", null, names[chosen]),
      ` log π ${fixed(step.logp[chosen])}, probability ${percent(step.logp[chosen])}`);
  };
  tokens.forEach((token, k) => {
    for (const event of ["mouseenter", "click", "focus"]) token.addEventListener(event, () => choose(k));
    token.addEventListener("keydown", event => {
      const other = tokens[k + ({ArrowDown: 1, ArrowUp: -1}[event.key] || NaN)];
      if (other) { event.preventDefault(); other.focus(); }
    });
  });
  if (tokens.length) choose(step.logp.indexOf(Math.min(...step.logp)), "least likely: ");
  return readout;
}

function sum(side, step) {
  const term = (value, name, part = "") => make("span", {class: "number " + part}, value, make("small", null, name));
  const sign = text => make("i", null, text);
  return make("div", {class: "sum"},
    term(String(side.lambda), "λ"), sign("·"), term(fixed(step.thought_logp), "log π(v_tht)", "thoughts"), sign("+"),
    term(fixed(step.action_logp), "log π(v_act)", "action"), sign("="),
    term(fixed(step.weighted_logp), "log π of the answer"));
}

function folded(kind, text) {
  const box = make("details", null, make("summary", null, kind), make("pre", null, text));
  box.open = opened.has(kind);
  box.addEventListener("toggle", () => box.open ? opened.add(kind) : opened.delete(kind));
  return box;
}

function known(info) {
  return Object.entries(info).filter(([key]) => key !== "is_success")
    .map(([key, value]) => `${key}: ${typeof value === "string" ? value : JSON.stringify(value)}`).join("\n");
}

// ---- the page --------------------------------------------------------------------------------------------------
function draw() {
  const place = here === last ? "the end" : `step ${here + 1} of ${last}`;
  $("sides").replaceChildren(...data.sides.map(drawSide));
  const name = GAMES[data.task] ?? data.task;               // a game from outside
  $("title").replaceChildren(name, make("small", null, `one held-out game, ${place}`));
  document.title = `${name}, ${place}`;
  [...$("dots").children].forEach((dot, k) => dot.toggleAttribute("aria-current", k === here));
  $("previous").disabled = here === 0;
  $("next").disabled = here === last;
}

function follow() {                 // the address names the step: game.html#2
  here = Math.max(0, Math.min(last, (parseInt(location.hash.slice(1), 10) || 1) - 1));
  draw();
}

function go(step) {
  location.hash = 1 + Math.max(0, Math.min(last, step));
}

function play(on) {
  clearInterval(timer);
  timer = on ? setInterval(() => here < last ? go(here + 1) : play(false), 2500) : null;
  $("play").textContent = on ? "Pause" : "Play";
}

function begin() {
  const scored = data.sides.filter(side => side.steps[0].tokens);
  for (let k = 0; k <= last; k++) {
    const dot = make("button", {"aria-label": k < last ? `Step ${k + 1}` : "The end"});
    dot.addEventListener("click", () => go(k));
    $("dots").append(dot);
  }
  if (last > 20) $("dots").style.cssText = "--dot: 11px; --size: 6px";
  for (const share of [1, 0.5, 0.1, 0.01]) {
    const sample = make("span", {class: "token"}, `${share > 0.01 ? "" : "≤ "}${100 * share} %`);
    shade(sample, Math.log(share));
    $("legend").append(sample);
  }
  $("legend").hidden = !scored.length;
  document.body.classList.toggle("alone", data.sides.length === 1);
  $("goal").textContent = data.goal;
  $("notes").append(...notes(scored).map(text => make("p", null, text)));
  $("previous").addEventListener("click", () => go(here - 1));
  $("next").addEventListener("click", () => go(here + 1));
  $("play").addEventListener("click", () => {
    if (timer === null && here === last) go(0);
    play(timer === null);
  });
  document.addEventListener("keydown", event => {
    const way = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!way || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    play(false);
    go(here + way);
  });
  addEventListener("hashchange", follow);
  follow();
}

function notes(scored) {
  const found = [], learned = scored.filter(side => side.learned);
  const each = (sides, tell) => [...new Set(sides.map(tell))].join("; ");
  if (scored.length) found.push(
    "Point at a token, or tap it, for its probability. log π is the natural logarithm of a probability, at " +
    `temperature ${each(scored, side => side.temperature)}, summed over a part's tokens; λ weighs the thoughts ` +
    "against the action. For PPO the whole answer is one action.");
  if (learned.length) found.push(
    "V is the value head's guess of the discounted rewards to come. The advantage is GAE's, with " +
    each(learned, side => `γ = ${side.gamma}, gae_lambda = ${side.gae_lambda}, on rewards × ${side.reward_scale}`) +
    ", before a rollout's are normalised.");
  if (learned.length < scored.length) found.push("A dash: this model's value head has not learned yet.");
  if (data.sides.some(side => side.steps.some(step => step.unnamed_reward))) found.push(
    "Where an answer names no legal action PPO sees the game's reward minus one; the return leaves that out.");
  found.push(`Dealt by seed ${data.seed}. Keys: ← and → from step to step, ↑ and ↓ from token to token.`);
  return found;
}

begin();
