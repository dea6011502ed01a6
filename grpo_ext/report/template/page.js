// Draws the curves of the report, and lets people look through what the policy wrote.
// In: the JSON in the element `data`, made by page.py. Text of the model only ever becomes text nodes, never markup.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);

function node(name, attributes = {}, ...children) {
  const isDrawn = ["svg", "path", "line", "text", "circle", "rect"].includes(name);
  const element = isDrawn ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
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

const WIDTH = 340, HEIGHT = 190, LEFT = 42, TOP = 22, BOTTOM = 34;

// A few round numbers between low and high.
function ticks(low, high) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}

function range(values, pad) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low === high) { low -= Math.abs(low) * 0.1 || 0.5; high += Math.abs(high) * 0.1 || 0.5; }
  return [low - pad * (high - low), high + pad * (high - low)];
}

// The layers of a stack, running means, each from the top of the one below it.
function stack(lines) {
  const floor = new Array(lines[0].x.length).fill(0);
  return lines.map((line) => {
    const low = [...floor];
    line.mean.forEach((value, i) => { floor[i] += value; });
    return { ...line, low, high: [...floor] };
  });
}

function draw(panel) {
  const lines = panel.stacked ? stack(panel.lines) : panel.lines;
  const left = lines.filter((line) => !line.is_right), right = lines.filter((line) => line.is_right);
  const endOfPlot = WIDTH - (right.length ? 38 : 18), isByStep = panel.x_label === "step";
  const xRange = range(lines.flatMap((line) => line.x), isByStep ? 0 : 0.04);
  let yRange = range(left.flatMap((line) => [...(panel.stacked ? [] : line.y), ...line.low, ...line.high]), 0.06);
  if (panel.stacked) yRange = [0, yRange[1]];
  if (panel.is_share) yRange = [0, 1];
  const rightRange = [0, Math.max(1, ...right.flatMap((line) => line.y))];
  const px = (value) => LEFT + ((value - xRange[0]) / (xRange[1] - xRange[0])) * (endOfPlot - LEFT);
  const py = (value, line) => {
    const [low, high] = line && line.is_right ? rightRange : yRange;
    return HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - BOTTOM - TOP);
  };
  const path = (line, ys) => line.x.map((x, i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(ys[i], line).toFixed(1)}`).join("");
  const area = (line) => `${path(line, line.high)}L${path({ ...line, x: [...line.x].reverse() }, [...line.low].reverse()).slice(1)}Z`;
  const text = (x, y, anchor, content) => node("text", { x, y, "text-anchor": anchor }, content);

  const picture = node("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: 0, "aria-label": `${panel.title}, ${panel.unit}` });
  for (const tick of ticks(...yRange)) {
    picture.append(node("line", { class: "grid", x1: LEFT, x2: endOfPlot, y1: py(tick), y2: py(tick) }));
    picture.append(text(LEFT - 5, py(tick) + 4, "end", shown(tick)));
  }
  if (right.length) for (const tick of ticks(...rightRange)) picture.append(text(endOfPlot + 5, py(tick, right[0]) + 4, "start", shown(tick)));
  for (const tick of ticks(...xRange)) if (!isByStep || Number.isInteger(tick)) picture.append(text(px(tick), HEIGHT - BOTTOM + 15, "middle", shown(tick)));
  picture.append(text(endOfPlot, HEIGHT - 4, "end", panel.x_label), text(2, 10, "start", panel.unit));
  if (right.length) picture.append(text(WIDTH - 2, 10, "end", panel.right));
  for (const line of lines) {
    if (panel.stacked) { picture.append(node("path", { class: `layer ${line.colour}`, d: area(line) })); continue; }
    if (line.low.length) picture.append(node("path", { class: `band ${line.colour}`, d: area(line) }));
    const isFew = !line.mean.length && !line.is_right && line.x.length <= 60;
    if (line.mean.length || isFew) {
      const d = line.x.map((x, i) => `M${px(x).toFixed(1)} ${py(line.y[i], line).toFixed(1)}h0`).join("");
      picture.append(node("path", { class: `dots ${line.colour}${isFew ? " alone" : ""}`, d }));
    }
    const d = path(line, line.mean.length ? line.mean : line.y);
    picture.append(node("path", { class: `line ${line.colour}${line.is_dashed ? " dashed" : ""}`, d }));
  }

  const cursor = node("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  const marks = lines.map((line) => node("circle", { class: `mark ${line.colour}`, r: 4, visibility: "hidden" }));
  const values = node("ul", { class: "values" });
  picture.append(cursor, ...marks);

  // Where the longest line is, and what the others have nearest to it.
  const main = lines.reduce((a, b) => (b.x.length > a.x.length ? b : a));
  let place = main.x.length - 1;
  function show(isPointed) {
    const x = main.x[place];
    const items = lines.map((line, k) => {
      const i = line === main ? place : line.x.reduce((best, other, j) => (Math.abs(other - x) < Math.abs(line.x[best] - x) ? j : best), 0);
      const y = panel.stacked ? line.high[i] : line.y[i];
      marks[k].setAttribute("cx", px(line.x[i]));
      marks[k].setAttribute("cy", py(y, line));
      marks[k].setAttribute("visibility", isPointed ? "visible" : "hidden");
      const band = line.low.length && !panel.stacked ? ` [${shown(line.low[i])}, ${shown(line.high[i])}]` : "";
      const where = line.x[i] === x ? "" : ` at ${shown(line.x[i])}`;
      const swatch = node("span", { class: `swatch ${line.colour}${line.is_dashed ? " dashed" : ""}` });
      return node("li", {}, swatch, `${line.label} `, node("b", {}, shown(line.y[i])), band + where);
    });
    cursor.setAttribute("x1", px(x));
    cursor.setAttribute("x2", px(x));
    cursor.setAttribute("visibility", isPointed && isByStep ? "visible" : "hidden");
    values.replaceChildren(node("li", { class: "at" }, isByStep ? `step ${shown(x)}` : `KL ${shown(x)}`), ...items);
  }
  function point(event) {
    const box = picture.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * WIDTH, y = ((event.clientY - box.top) / box.height) * HEIGHT;
    const distance = (i) => Math.abs(px(main.x[i]) - x) + (isByStep ? 0 : Math.abs(py(main.y[i], main) - y));
    place = main.x.reduce((best, _, i) => (distance(i) < distance(best) ? i : best), 0);
    show(true);
  }
  picture.addEventListener("pointermove", point);
  picture.addEventListener("pointerdown", point);
  picture.addEventListener("pointerleave", () => { place = main.x.length - 1; show(false); });
  picture.addEventListener("keydown", (event) => {
    const last = main.x.length - 1;
    const next = { ArrowLeft: Math.max(0, place - 1), ArrowRight: Math.min(last, place + 1), Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    place = next;
    show(true);
  });
  show(false);
  return node("figure", {}, node("figcaption", {}, panel.title), picture, values);
}

document.getElementById("panels").append(...data.panels.map(draw));

// Groups

const at = (id) => document.getElementById(id);
const firstLine = (text) => { const line = text.trim().replace(/\s+/g, " "); return line.length > 60 ? `… ${line.slice(-60)}` : line; };

function card(answer) {
  const sign = answer.advantage > 0 ? "blue" : answer.advantage < 0 ? "orange" : "";
  const advantage = answer.advantage === null ? "not judged" : `${answer.advantage > 0 ? "+" : answer.advantage < 0 ? "−" : ""}${shown(Math.abs(answer.advantage))}`;
  const lines = Object.entries(answer.rewards).map(([name, value]) => node("p", {}, `${name} `, node("b", {}, value === null ? "not judged" : shown(value))));
  const length = node("p", { class: "soft" }, `${answer.tokens} tokens `);
  if (answer.cut) length.append(node("span", { class: "badge" }, "cut off"));
  if (answer.found !== null) lines.push(node("p", {}, "answer found ", node("b", { dir: "auto" }, answer.found)));
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
  at("gold").replaceChildren(...(group.gold === null ? [] : ["right answer ", node("b", { dir: "auto" }, group.gold)]));
  at("answers").replaceChildren(...group.answers.map(card));
}

function showStep() {
  const rollout = data.rollouts[at("step").value], place = Math.max(0, at("prompt").selectedIndex);
  at("step-name").textContent = `step ${rollout.step.toLocaleString("en")}`;
  at("step").setAttribute("aria-valuetext", `step ${rollout.step}`);
  at("left-out").textContent = rollout.left_out ? `${rollout.left_out} more prompts of this step are not recorded.` : "";
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
  at("problem-text").textContent = problem.prompt + (problem.gold === null ? "" : `\n\nright answer: ${problem.gold}`);
  at("timeline").replaceChildren(...data.evaluations.map(({ step, answers }) => {
    const answer = answers[place];
    const mark = node("span", { class: answer.right ? "right" : "wrong" }, answer.right ? "✓ right" : "✗ wrong");
    return node("li", {}, node("span", {}, `step ${step.toLocaleString("en")} `, mark), node("pre", { class: "text", dir: "auto" }, answer.text));
  }));
}

if (at("heldout")) {
  at("problem").append(...data.evaluations[0].answers.map((answer, i) => node("option", { value: i }, firstLine(answer.prompt))));
  at("problem").addEventListener("change", showProblem);
  showProblem();
}
