// Draws the curves of the report with Bokeh, and lets readers browse the completions.
// In: the JSON in the element `data`, made by page.py. Text of the model only becomes text nodes, never markup.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);

function node(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function shown(number) {
  if (number === 0 || Math.abs(number) >= 1e5) return number.toLocaleString("en", { maximumSignificantDigits: 4 });
  if (Math.abs(number) < 1e-3) return number.toExponential(1);
  return number.toLocaleString("en", { maximumSignificantDigits: Math.abs(number) >= 1000 ? 5 : 3 });
}

// Curves

const at = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");

function draw() {
  data.panels.forEach((panel, i) => {
    let item = JSON.stringify(panel.item);
    if (dark.matches) for (const [light, other] of Object.entries(data.inTheDark)) item = item.replaceAll(light, other);
    at(`plot-${i}`).replaceChildren();
    Bokeh.embed.embed_item(JSON.parse(item), `plot-${i}`);
  });
}

function frame(panel, i) {
  const plot = node("div", { class: "plot", id: `plot-${i}`, role: "img", "aria-label": `${panel.title} by ${panel.x_label}` });
  return node("figure", {}, node("figcaption", {}, panel.title), plot, node("ul", { class: "values", id: `values-${i}` }));
}

// Show the last value of each line up to the chosen step.
function showValues() {
  const step = at("moment").valueAsNumber;
  at("moment-name").textContent = `step ${step.toLocaleString("en")}`;
  data.panels.forEach((panel, i) => {
    const items = panel.lines.map((line, k) => {
      const place = panel.x.findLastIndex((x, j) => x <= step && panel.values[k][j]);
      const swatch = node("span", { class: `swatch ${line.colour}${line.dashed ? " dashed" : ""}` });
      return node("li", {}, swatch, `${line.label} `, node("b", {}, place < 0 ? "" : panel.values[k][place]));
    });
    const hasNothing = items.length === 1 && !panel.x.length;
    at(`values-${i}`).replaceChildren(...(hasNothing ? [] : items));
  });
}

at("panels").append(...data.panels.map(frame));
const lastStep = Math.max(0, ...data.panels.flatMap((panel) => panel.x.slice(-1)));
at("moment").max = at("moment").value = lastStep;
at("moment").addEventListener("input", showValues);
dark.addEventListener("change", draw);
showValues();
draw();

// Groups

const firstLine = (text) => { const line = text.trim().replace(/\s+/g, " "); return line.length > 60 ? `\u2026 ${line.slice(-60)}` : line; };

function card(answer) {
  const sign = answer.advantage > 0 ? "blue" : answer.advantage < 0 ? "orange" : "";
  const advantage = answer.advantage === null ? "not judged" : `${answer.advantage > 0 ? "+" : answer.advantage < 0 ? "\u2212" : ""}${shown(Math.abs(answer.advantage))}`;
  const lines = Object.entries(answer.rewards).map(([name, value]) => node("p", {}, `${name} `, node("b", {}, value === null ? "not judged" : shown(value))));
  const length = node("p", { class: "soft" }, `${answer.tokens} tokens `);
  if (answer.cut) length.append(node("span", { class: "badge" }, "cut off"));
  if (answer.found !== null) lines.push(node("p", {}, "final answer ", node("b", { dir: "auto" }, answer.found)));
  for (const [name, value] of Object.entries(answer.extra)) lines.push(node("p", { class: "soft" }, `${name}: ${value}`));
  return node("article", { class: sign }, node("p", { class: "head" }, node("span", {}, "advantage"), node("span", {}, advantage)), ...lines, length, node("pre", { class: "text", dir: "auto", tabindex: 0 }, answer.text));
}

function meanReward(group) {
  const names = Object.keys(group.answers[0].rewards);
  const sums = group.answers.map((answer) => names.reduce((sum, name) => sum + (answer.rewards[name] ?? 0), 0));
  return sums.reduce((a, b) => a + b, 0) / sums.length;
}

function showGroup() {
  const rollout = data.rollouts[at("step").value], group = rollout.groups[Math.max(0, at("prompt").selectedIndex)];
  at("prompt-text").textContent = group.prompt;
  at("gold").replaceChildren(...(group.gold === null ? [] : ["gold answer ", node("b", { dir: "auto" }, group.gold)]));
  at("answers").replaceChildren(...group.answers.map(card));
}

function showStep() {
  const rollout = data.rollouts[at("step").value], place = Math.max(0, at("prompt").selectedIndex);
  at("step-name").textContent = `step ${rollout.step.toLocaleString("en")}`;
  at("step").setAttribute("aria-valuetext", `step ${rollout.step}`);
  at("left-out").textContent = rollout.left_out ? `Prompts of this step that are not recorded: ${rollout.left_out}.` : "";
  const options = rollout.groups.map((group, i) => node("option", { value: i }, `${i + 1}: mean ${shown(meanReward(group))}, ${firstLine(group.prompt)}`));
  at("prompt").replaceChildren(...options);
  at("prompt").selectedIndex = Math.min(place, options.length - 1);
  showGroup();
}

if (at("groups")) {
  at("step").addEventListener("input", showStep);
  at("prompt").addEventListener("change", showGroup);
  showStep();
  const groups = data.rollouts[at("step").value].groups;
  at("prompt").selectedIndex = Math.max(0, groups.findIndex((group) => group.answers.some((answer) => answer.advantage)));
  showGroup();
}

// The same held-out problems over time

function showProblem() {
  const place = Math.max(0, at("problem").selectedIndex), problem = data.evaluations[0].answers[place];
  at("problem-text").textContent = problem.prompt + (problem.gold === null ? "" : `\n\ngold answer: ${problem.gold}`);
  at("timeline").replaceChildren(...data.evaluations.map(({ step, answers }) => {
    const answer = answers[place];
    const mark = node("span", { class: answer.right ? "right" : "wrong" }, answer.right ? "\u2713 right" : "\u2717 wrong");
    return node("li", {}, node("span", {}, `step ${step.toLocaleString("en")} `, mark), node("pre", { class: "text", dir: "auto" }, answer.text));
  }));
}

if (at("heldout")) {
  at("problem").append(...data.evaluations[0].answers.map((answer, i) => node("option", { value: i }, firstLine(answer.prompt))));
  at("problem").addEventListener("change", showProblem);
  showProblem();
}
