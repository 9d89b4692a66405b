"use strict";
// Steps through the data of one backward pass (viewer.py). The state is a mode, a step of that mode, and an element;
// draw() makes the page from them, and the fragment of the address holds them.

const data = JSON.parse(document.getElementById("data").textContent);
const {nodes, leaves, rows, ops} = data;
const $ = id => document.getElementById(id);
const MODES = {backward: [], forward: [], recursion: []};
nodes.forEach((node, n) => {
  MODES.backward.push({n, kind: "rule"});
  node.inputs.forEach((x, i) => {
    if (x.raw != null) MODES.backward.push({n, kind: "unbroadcast", i});
    if (x.parts > 1) MODES.backward.push({n, kind: "accumulate", i});
  });
  MODES.forward.unshift({n, kind: "forward"});
});
data.recursion.visits.forEach((visit, v) => MODES.recursion.push({n: visit.node, kind: "recursion", v}));
const visitOf = new Map(data.recursion.visits.map(visit => [visit.node, visit]));
const state = {mode: "backward", step: 0, chosen: null};  // chosen: {key, at}, an element of a picture
const here = () => MODES[state.mode][state.step];

// ---------------------------------------------------------------- small tools

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child != null && child !== ""));
  return element;
}
const shapeText = shape => `(${shape.join(", ")}${shape.length === 1 ? "," : ""})`;
const place = at => at.length ? `[${at.join(", ")}]` : "";

function exact(value, bytes) {  // the shortest decimal that is this number in its own dtype
  if (!Number.isFinite(value)) return String(value).replace("Infinity", "Inf");
  for (let digits = 1; bytes === 4 && digits <= 9; digits++)
    if (Math.fround(value.toPrecision(digits)) === value) return String(Number(value.toPrecision(digits)));
  return String(value);
}
function short(value) {
  if (value == null) return "";
  const x = Number(value);
  return Number.isFinite(x) ? String(Number(x.toPrecision(4))) : exact(x);
}

// ---------------------------------------------------------------- arrays and pictures

function array(number) {  // decoded when it is first asked for
  const a = data.arrays[number];
  if (a && !a.values) {
    const bytes = Uint8Array.from(atob(a.data), c => c.charCodeAt(0));
    a.values = a.bytes === 4 ? new Float32Array(bytes.buffer) : new Float64Array(bytes.buffer);
    a.data = "";
  }
  return a;
}
function valueAt(number, at) {  // undefined if the page has not kept that element
  const a = array(number);
  if (!a || !at || at.length !== a.crop.length || at.some((k, axis) => k >= a.crop[axis])) return undefined;
  return a.values[at.reduce((flat, k, axis) => flat * a.crop[axis] + k, 0)];
}
function elements(a) {  // [index, column, row] of each element kept, in the picture
  if (a.cells) return a.cells;
  const found = a.cells = [], at = a.crop.map(() => 0), [c, r, tc, tr] = a.axes;
  for (let flat = 0; flat < a.values.length; flat++) {
    const column = c === undefined ? 0 : at[c] + (tc === undefined ? 0 : at[tc] * (a.crop[c] + 1));
    const row = r === undefined ? 0 : at[r] + (tr === undefined ? 0 : at[tr] * (a.crop[r] + 1));
    const tall = a.axes.length === 3 ? at[tc] * (a.crop[r] + 1) : 0;  // blocks stand below each other
    found.push([at.slice(), a.axes.length === 3 ? at[c] : column, row + tall]);
    for (let axis = at.length - 1; axis >= 0 && ++at[axis] === a.crop[axis]; axis--) at[axis] = 0;
  }
  return found;
}
function colour(value, scale) {  // blue, white at 0, orange; magenta for NaN and Inf
  if (!Number.isFinite(value)) return [214, 0, 214, 255];
  const t = scale > 0 ? Math.max(-1, Math.min(1, value / scale)) : 0, end = t < 0 ? [8, 81, 156] : [179, 76, 0];
  const shade = c => Math.round(255 + (c - 255) * Math.abs(t));
  return [shade(end[0]), shade(end[1]), shade(end[2]), 255];
}
const largest = values => values.reduce((m, v) => Number.isFinite(v) ? Math.max(m, Math.abs(v)) : m, 0);

function paint(cells, values, scales, size, text) {  // a canvas of cells [.., column, row]
  const width = 1 + cells.reduce((m, c) => Math.max(m, c[1]), 0), height = 1 + cells.reduce((m, c) => Math.max(m, c[2]), 0);
  const small = make("canvas", {width, height}), image = new ImageData(width, height);
  cells.forEach(([, x, y], k) => image.data.set(colour(values[k], scales[k] ?? scales), 4 * (y * width + x)));
  small.getContext("2d").putImageData(image, 0, 0);
  const s = Math.max(1, Math.min(size.cell, Math.floor(size.width / width), Math.floor(size.height / height)));
  const canvas = make("canvas", {width: 2 * s * width, height: 2 * s * height, "data-rows": height, tabindex: 0, role: "img"});
  canvas.style.width = `${s * width}px`;
  const brush = canvas.getContext("2d");
  brush.imageSmoothingEnabled = false;
  brush.fillStyle = "#a9b3bd";
  brush.fillRect(0, 0, canvas.width, canvas.height);
  brush.drawImage(small, 0, 0, canvas.width, canvas.height);
  if (text && s >= 40) {
    brush.font = "22px system-ui, sans-serif";
    brush.textAlign = "center";
    cells.forEach(([, x, y], k) => {
      const scale = scales[k] ?? scales;
      brush.fillStyle = Math.abs(values[k]) > .55 * scale || !Number.isFinite(values[k]) ? "#fff" : "#1c2733";
      brush.fillText(Number.isFinite(values[k]) ? String(Number(values[k].toPrecision(4))) : exact(values[k]),
        2 * s * (x + .5), 2 * s * (y + .5) + 8, 2 * s - 4);
    });
  }
  return {canvas, s};
}

// view: {key, number, name, input, kind, note, checks}; kind: value, arrives, leaves, raw or sum
function picture(view) {
  const a = array(view.number), caption = make("figcaption", {}, make("code", {}, view.name), " ",
    view.shape ? make("span", {class: "soft"}, shapeText(view.shape)) : "", view.note ? ` ${view.note}` : "");
  if (!a) {
    caption.append(make("small", {}, view.missing || "a constant"));
    return make("figure", {}, caption);
  }
  const scale = Math.max(largest(a.values), view.like == null ? 0 : largest(array(view.like).values));  // to be compared
  const cells = elements(a), few = cells.length <= 16;
  const limits = {cell: few ? 48 : 12, width: Math.min(430, innerWidth - 40), height: innerWidth > 900 ? 130 : 170};
  const {canvas, s} = paint(cells, a.values, scale, limits, true);
  const range = a.low == null ? "" : cells.length === 1 && !a.said ? exact(a.values[0], a.bytes) : `from ${short(a.low)} to ${short(a.high)}, norm ${short(a.norm)}`;
  caption.append(make("small", {}, few ? range : `${range}; colour: ±${short(scale)}`),
    a.bad ? make("small", {class: "wrong"}, `${a.bad} elements are NaN or Inf: magenta`) : "",
    a.said ? make("small", {}, a.said) : "");
  canvas.setAttribute("aria-label", `${view.name} ${shapeText(a.shape)}, ${range}. Shift and arrows choose an element.`);
  const frame = make("div", {class: "picture", "data-key": view.key}, canvas);
  const mark = (at, name) => {
    const cell = cells.find(c => c[0].join() === at.join());
    if (cell) frame.append(make("i", {class: name,
      style: `left:${s * cell[1]}px;top:${s * cell[2]}px;width:${s}px;height:${s}px`}));
  };
  for (const check of view.checks || []) if (check.at && !few) mark(check.at, "");
  if (state.chosen && state.chosen.key === view.key) mark(state.chosen.at, "chosen");
  const choose = cell => cell && go({chosen: {key: view.key, at: cell[0]}}, view.key);
  canvas.addEventListener("click", event => {
    const x = Math.floor(event.offsetX / s), y = Math.floor(event.offsetY / s);
    choose(cells.find(c => c[1] === x && c[2] === y));
  });
  canvas.addEventListener("keydown", event => {
    const move = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!move || !event.shiftKey) return;
    event.preventDefault();
    event.stopPropagation();
    const from = state.chosen && state.chosen.key === view.key && cells.find(c => c[0].join() === state.chosen.at.join());
    if (!from) return choose(cells[0]);
    for (const far of [1, 2]) {  // 2: over the gap between two tiles
      const to = cells.find(c => c[1] === from[1] + far * move[0] && c[2] === from[2] + far * move[1]);
      if (to) return choose(to);
    }
  });
  return make("figure", {}, frame, caption);
}

// ---------------------------------------------------------------- the node of this step

const source = x => x.node != null ? nodes[x.node] : leaves[x.leaf];

function views(step) {  // {key: view} of every picture of a step
  const node = nodes[step.n], visit = step.kind === "recursion" ? data.recursion.visits[step.v] : null, found = {};
  const add = view => { found[view.key] = view; };
  node.inputs.forEach((x, i) => {
    if (x.shape || x.array != null) add({key: `x${i}`, number: x.array, name: x.name, shape: x.shape, kind: "value",
      input: i, missing: "not kept: the rule does not read it"});
  });
  add({key: "y", number: node.out, name: node.name, shape: node.shape, kind: "value", missing: node.origin});
  add({key: "g", number: visit ? visit.g : node.g, name: node.bar, shape: node.shape, kind: "arrives", right: node.g,
    like: visit ? node.g : null});
  node.inputs.forEach((x, i) => {
    if (x.to == null) return;
    add({key: `a${i}`, number: visit ? visit.to[i] : x.to, name: x.bar, shape: x.shape, kind: "leaves", input: i,
      note: x.parts > 1 ? `part ${x.part} of ${x.parts}` : "", checks: visit ? [] : x.checks, right: x.to});
    if (x.raw != null) add({key: `r${i}`, number: x.raw, name: x.bar, shape: array(x.raw).shape, kind: "raw", input: i,
      note: "before the sum"});
    if (x.parts > 1) {
      const [m, k] = source(x).from[Math.max(0, x.part - 2)];
      if (x.part > 1) add({key: `b${i}`, number: nodes[m].inputs[k].sum, name: x.bar, shape: x.shape, kind: "sum",
        input: i, upTo: x.part - 1, note: `the sum of ${x.part - 1} of ${x.parts}`});
      add({key: `s${i}`, number: x.sum, name: x.bar, shape: x.shape, kind: "sum", input: i, upTo: x.part,
        note: `the sum of ${x.part} of ${x.parts}`});
    }
  });
  if (visit && visit.error) {
    add({key: "right", number: node.g, name: node.bar, shape: node.shape, kind: "value", note: "as it should be",
      like: visit.g});
  }
  return found;
}

function drawNode() {
  const step = here(), node = nodes[step.n], v = views(step), page = $("node"), op = ops[node.op];
  const row = rows.find(r => r.nodes.includes(step.n));
  const show = keys => make("div", {class: "pictures"}, ...keys.filter(k => v[k]).map(k => picture(v[k])));
  const flow = text => make("p", {class: "flow"}, text);
  const [tone, text] = {wrong: ["wrong", "✗ the rule disagrees with the numeric derivative"],
    right: ["right", "✓ the rule agrees with the numeric derivative: in a random direction, and at each element listed under “Checked”"],
    "": ["soft", "the rule was not checked: there was no time, or no numeric value"]}[node.verdict];
  const verdict = make("p", {class: `verdict ${tone}`}, text);
  page.replaceChildren(make("span", {class: "crumb"}, row.path || row.ops || ""),
    make("h2", {}, make("code", {}, `${node.name} = ${node.forward}`)));
  page.className = node.verdict === "wrong" ? "is-wrong" : "";
  const inputs = node.inputs.map((_, i) => `x${i}`), leaving = node.inputs.map((_, i) => `a${i}`);
  for (const [name, value] of node.constants) page.append(make("p", {class: "code soft"}, `where ${name} = ${value}`));
  if (state.mode === "backward") {
    const mine = MODES.backward.map((s, k) => [s, k]).filter(([s]) => s.n === step.n);
    if (mine.length > 1) page.append(make("div", {id: "steps", role: "group", "aria-label": "Steps of this node"},
      ...mine.map(([s, k]) => make("button", {"aria-pressed": k === state.step, onclick: () => go({step: k, chosen: null})},
        s.kind === "rule" ? "the rule" : s.kind === "unbroadcast" ? `sum ${node.inputs[s.i].bar} to its shape`
          : `${node.inputs[s.i].name} receives ${node.inputs[s.i].part} of ${node.inputs[s.i].parts}`))));
  }
  if (step.kind === "forward") {
    page.append(flow("inputs"), show(inputs), flow(`output: ${node.origin}`), show(["y"]), formula(op));
  } else if (step.kind === "unbroadcast") {
    const x = node.inputs[step.i], raw = array(x.raw);
    page.append(make("p", {}, `The forward had broadcast ${x.name} ${shapeText(x.shape)} to ${shapeText(raw.shape)}: it used each `,
      `element several times. So the adjoint of each element is the sum over its copies. The engine does this, not the rule.`),
      flow("what the rule gives"), show([`r${step.i}`]), flow("summed to the shape of the input"), show([`a${step.i}`]));
  } else if (step.kind === "accumulate") {
    const x = node.inputs[step.i];
    page.append(make("p", {}, make("b", {}, `${x.name} receives ${x.part} of ${x.parts}. `), x.part < x.parts
      ? `It is used ${x.parts} times, and its adjoint is the sum of ${x.parts} parts. It waits for the others before it passes anything on.`
      : "Now its adjoint is complete."),
      x.part > 1 ? flow("so far") : "", x.part > 1 ? show([`b${step.i}`]) : "",
      flow("this part"), show([`a${step.i}`]), flow("the sum now"), show([`s${step.i}`]));
  } else {
    const visit = step.kind === "recursion" ? data.recursion.visits[step.v] : null;
    if (visit) page.append(mistake(visit, node)); else page.append(verdict);
    page.append(flow("inputs and output"), show([...inputs, "y"]),
      flow(visit ? `${node.bar} when the node is visited: ${visit.got} of ${visit.of} parts have arrived` : arrives(node)),
      show(["g", "right"]), flow("the rule"), rule(node), formula(op), flow("what leaves"), show(leaving));
    if (visit) page.append(flow("what the leaves get in the end"), damage());
  }
}
function arrives(node) {
  const names = node.from.map(([m]) => `${nodes[m].name} (${nodes[m].op})`);
  return names.length ? `${node.bar} arrives from ${names.join(" and ")}` : `${node.bar} is where the pass starts`;
}
function rule(node) {
  const lines = node.lets.map(([name, text]) => `${name} = ${text}`);
  for (const x of node.inputs) if (x.to != null) {
    lines.push(`${x.bar} ${x.part > 1 ? "+=" : "="} ${x.expression}    # ${shapeText(x.shape)}${x.raw != null ? ", summed to it by the engine" : ""}`);
  }
  return make("pre", {"aria-label": "The rule, with the names of this node"}, lines.join("\n"));
}
function formula(op) {
  return make("details", {}, make("summary", {}, "formula and source of the rule"), make("pre", {}, op.formula),
    make("p", {class: "soft"}, `${op.module}, run as it stands; a faster version of it may have computed the numbers`),
    make("pre", {}, op.source));
}
function mistake(visit, node) {
  const text = visit.got < visit.of
    ? `Too early: ${node.name} is visited on the first of ${visit.of} arrivals, and passes on ${visit.got} of ${visit.of} parts. `
    : visit.error ? "All its parts are here, but some of them were wrong. " : "Nothing is wrong here yet. ";
  return make("p", {class: visit.error ? "late" : ""}, text,
    visit.error ? `The adjoint is off by ${short(100 * visit.error)} % of its norm.` : "");
}
function damage() {
  const bad = data.recursion.leaves.filter(leaf => leaf.error).length;
  if (!bad) return make("p", {}, "All gradients are right: no node that passes on is used twice.");
  return make("div", {}, make("p", {}, `${bad} of ${leaves.length} gradients are wrong:`), make("table", {},
    make("tr", {}, make("th", {}, "leaf"), make("th", {}, "norm, right"), make("th", {}, "norm, by recursion"), make("th", {}, "off by")),
    ...leaves.map((leaf, k) => [leaf, data.recursion.leaves[k]]).filter(([, r]) => r.error).map(([leaf, r]) => make("tr", {},
      make("td", {}, leaf.name), make("td", {}, short(data.arrays[leaf.g].norm)), make("td", {}, short(data.arrays[r.g].norm)),
      make("td", {class: "late"}, `${short(100 * r.error)} %`)))));
}

// ---------------------------------------------------------------- the chosen element

function drawElement() {
  const panel = $("element"), step = here(), node = nodes[step.n], v = views(step);
  const view = state.chosen && v[state.chosen.key], a = view && array(view.number);
  panel.replaceChildren();
  if (!a) {
    panel.append(make("h2", {}, "No element chosen"), make("p", {class: "soft"}, "Click an element of a picture, or Tab to a picture and use shift and the arrows."));
    if (step.kind !== "forward" && step.kind !== "recursion") node.inputs.forEach((x, i) => x.checks && panel.append(checked(x, i)));
    return;
  }
  const at = state.chosen.at, value = valueAt(view.number, at), told = exact(value, a.bytes);
  panel.append(make("h2", {}, make("code", {}, `${view.name}${place(at)}`), view.note ? make("span", {class: "soft"}, ` ${view.note}`) : ""),
    make("p", {class: "big"}, make("code", {id: "value", class: Number.isFinite(value) ? "" : "wrong"}, told)));
  if (step.kind === "recursion" && view.right != null) {
    const right = valueAt(view.right, at);
    panel.append(make("p", {}, `as it should be: `, make("code", {id: "should"}, exact(right, a.bytes))),
      make("p", {class: value === right ? "right" : "late"}, value === right ? "the same" : `off by ${short(value - right)}`));
  } else if (view.kind === "arrives" || view.kind === "sum") parts(panel, view, node, at, a);
  else if (view.kind === "leaves") chainRule(panel, view, node, at);
  else if (view.kind === "raw") panel.append(make("p", {}, "One of the copies: the sum over all of them is the adjoint."));
  else if (view.key === "y") panel.append(make("p", {}, `its adjoint ${node.bar}${place(at)}: `, make("code", {}, exact(valueAt(node.g, at), a.bytes))));
}
function parts(panel, view, node, at, a) {
  const from = view.kind === "arrives" ? node.from : source(node.inputs[view.input]).from.slice(0, view.upTo);
  if (!from.length) return panel.append(make("p", {}, "The pass starts here: the derivative of the result by itself."));
  panel.append(make("p", {}, from.length > 1 ? "The sum of what came from each use:" : "It came from its only use:"),
    make("table", {}, ...from.map(([m, i]) => make("tr", {}, make("td", {}, make("button",
      {onclick: () => go({step: MODES.backward.findIndex(s => s.n === m), mode: "backward", chosen: {key: `a${i}`, at}})},
      `${nodes[m].name} (${nodes[m].op})`)), make("td", {}, exact(valueAt(nodes[m].inputs[i].to, at), a.bytes))))));
}
function chainRule(panel, view, node, at) {
  const x = node.inputs[view.input], y = node.name, check = (x.checks || []).find(c => c.at && c.at.join() === at.join());
  panel.append(make("p", {}, `The chain rule: `, make("code", {}, `${x.bar}_i = Σ_j ${node.bar}_j ∂${y}_j/∂${x.name}_i`)));
  if (check) {
    const row = cells => make("tr", {}, ...cells.map(cell => make("td", {}, cell)));
    const total = (name, id, value, style) => make("tr", {class: style}, make("td", {}, name), make("td", {colspan: 3, id}, value));
    const [others, rest] = check.rest;
    panel.append(make("table", {id: "sum"},
      make("tr", {}, ...["j", `${node.bar}_j`, `∂${y}_j/∂…_i`, "product"].map(t => make("th", {}, t))),
      ...check.terms.map(([g, d, j]) => row([make("button", {onclick: () => go({step: ruleStep(), chosen: {key: "g", at: j}})}, place(j) || "·"),
        short(g), short(d), short(g * d)])),
      others ? row([`${others} more`, "", "", short(rest)]) : "",
      total("their sum", "numeric", String(check.numeric), "total"),
      total("by the rule", "rule", exact(Number(check.value), array(view.number).bytes)),
      total("difference", "difference", short(check.value - check.numeric))),
      make("p", {class: check.verdict === "wrong" ? "wrong" : "right", id: "verdict"}, {right: "✓ equal but for rounding",
        wrong: "✗ the rule is wrong here", kink: "at a kink: the value lies between the derivatives of the two sides",
        "no numeric value": "the numeric derivative is not finite"}[check.verdict]),
      make("p", {class: "soft"}, `The derivatives are numeric, in float64, of this op alone: ${check.method}.`));
  } else panel.append(make("p", {class: "soft"}, "The terms of this element were not computed. They were for those listed under “Checked”."));
  if (x.jacobian != null) panel.append(jacobian(x, view, node, at));
  if (x.checks) panel.append(checked(x, view.input));
}
const ruleStep = () => MODES.backward.findIndex(s => s.n === here().n);

function checked(x, i) {
  const [direction, ...few] = x.checks;
  return make("section", {}, make("h3", {}, `Checked: ${x.bar}`),
    make("p", {class: direction.verdict === "wrong" ? "wrong" : ""}, `all elements, along a random direction: ${short(direction.value)} by the rule, `,
      `${short(direction.numeric)} by ${direction.method}, difference ${short(direction.value - direction.numeric)}`),
    make("div", {class: "places"}, ...few.slice(0, 64).map(c => make("button", {class: c.verdict === "wrong" ? "wrong" : "",
      onclick: () => go({step: ruleStep(), chosen: {key: `a${i}`, at: c.at}})}, `${c.verdict === "wrong" ? "✗" : "✓"} ${place(c.at) || "·"}`))));
}
function jacobian(x, view, node, at) {  // ȳ on the left, the matrix, and below it the row ȳᵀ J = x̄
  const J = array(x.jacobian), [m, n] = J.crop, g = array(node.g), a = array(view.number), cells = [], values = [], scales = [];
  const put = (column, row, value, scale) => { cells.push([null, column, row]); values.push(value); scales.push(scale); };
  const top = [largest(g.values), largest(J.values), largest(a.values)];
  for (let j = 0; j < m; j++) {
    put(0, j, g.values[j], top[0]);
    for (let i = 0; i < n; i++) put(i + 2, j, J.values[j * n + i], top[1]);
  }
  for (let i = 0; i < n; i++) put(i + 2, m + 1, a.values[i], top[2]);
  const {canvas, s} = paint(cells, values, scales, {cell: 44, width: 300, height: 320}, true);
  const flat = at.reduce((f, k, axis) => f * a.shape[axis] + k, 0);
  canvas.setAttribute("aria-label", `The Jacobian of ${node.name} by ${x.name}; column ${flat} is contracted with ${node.bar}.`);
  canvas.removeAttribute("tabindex");
  canvas.addEventListener("click", event => {
    let i = Math.floor(event.offsetX / s) - 2;
    if (i < 0 || i >= n) return;
    const to = a.shape.map(() => 0);
    for (let axis = to.length - 1; axis >= 0; axis--) { to[axis] = i % a.shape[axis]; i = Math.floor(i / a.shape[axis]); }
    go({chosen: {key: view.key, at: to}});
  });
  return make("figure", {id: "jacobian"}, make("h3", {}, "The Jacobian"), make("div", {class: "picture"}, canvas,
    make("i", {class: "chosen", style: `left:${s * (flat + 2)}px;top:0;width:${s}px;height:${s * m}px`})),
    make("figcaption", {}, `left ${node.bar}, a row per element of ${node.name}; a column per element of ${x.name}; below, the row ${node.bar}ᵀ J = ${x.bar}`));
}

// ---------------------------------------------------------------- the graph

const norms = [...nodes, ...leaves].map(x => Number(data.arrays[x.g].norm)).filter(norm => norm > 0).map(Math.log);
const least = Math.min(...norms), most = Math.max(...norms);
function bar(number) {
  const norm = Number(data.arrays[number].norm), width = norm > 0 ? 4 + 96 * (Math.log(norm) - least) / (most - least || 1) : 0;
  return make("span", {class: "bar", style: `width:${width}%`, title: `norm ${short(norm)}`});
}
const label = (name, shape, number) => [make("span", {}, name), make("span", {class: "shape"}, shapeText(shape)), bar(number)];

function drawRows() {
  const direction = state.mode === "forward" ? -1 : 1, list = rows.slice();
  if (direction < 0) list.reverse();
  const nodeItem = n => {
    const node = nodes[n], items = [make("button", {"data-n": n, onclick: () => goTo(n)}, ...label(`${node.name} ${node.op}`, node.shape, node.g))];
    node.inputs.forEach((x, i) => x.leaf != null && items.push(make("button", {class: "leaf", "data-leaf": x.leaf,
      onclick: () => goTo(n, {key: `a${i}`, at: x.shape.map(() => 0)})}, ...label(x.name, x.shape, leaves[x.leaf].g))));
    return make("li", {}, ...items);
  };
  const moduleRow = (row, depth) => {
    const inside = direction < 0 ? row.nodes.slice().reverse() : row.nodes, end = row.nodes[0];
    const name = row.path.split(".").slice(depth).join(".") || row.ops || "(the program)";
    return make("details", {class: "row"}, make("summary", {}, ...label(row.path && row.ops ? `${name}: ${row.ops}` : name, nodes[end].shape, nodes[end].g)),
      make("ol", {}, ...inside.map(nodeItem)));
  };
  const folded = (some, depth) => {  // neighbours whose paths share their next part become one group
    const out = [];
    for (let k = 0; k < some.length;) {
      const parts = some[k].path.split("."), name = parts[depth];
      let end = k + 1;
      while (name && end < some.length && some[end].path.split(".")[depth] === name) end++;
      if (end - k < 2) out.push(moduleRow(some[k], depth));
      else {
        const last = some[direction < 0 ? end - 1 : k].nodes[0];
        out.push(make("details", {class: "group"}, make("summary", {}, ...label(`${name} (${end - k} modules)`, nodes[last].shape, nodes[last].g)),
          ...folded(some.slice(k, end), depth + 1)));
      }
      k = end;
    }
    return out;
  };
  $("rows").replaceChildren(...folded(list, 0));
  for (const button of $("rows").querySelectorAll("button")) {
    const {n, leaf} = button.dataset;
    let mark = n !== undefined && nodes[n].verdict === "wrong" ? "is-wrong" : "";
    if (state.mode === "recursion" && (n !== undefined ? visitOf.get(+n) : data.recursion.leaves[leaf]).error) mark = "is-late";
    if (mark) for (let e = button; e.id !== "rows"; e = e.parentElement) if (e === button || e.tagName === "DETAILS") e.classList.add(mark);
  }
  $("legend").textContent = "bar: norm of the adjoint, on a logarithmic scale" +
    (state.mode === "recursion" ? "; orange: wrong by recursion" : nodes.some(n => n.verdict === "wrong") ? "; red: a rule that is wrong" : "");
  drawn = state.mode;
}
let drawn = null;

function markRow() {
  for (const e of $("rows").querySelectorAll(".here")) e.classList.remove("here");
  for (const e of $("rows").querySelectorAll("details[data-auto]")) {
    e.removeAttribute("data-auto");
    e.open = false;
  }
  const button = $("rows").querySelector(`[data-n="${here().n}"]`);
  button.classList.add("here");
  button.setAttribute("aria-current", "step");
  for (let e = button.closest("details"); e; e = e.parentElement.closest("details")) if (!e.open) {
    e.open = true;
    e.setAttribute("data-auto", "");
  }
  const box = $("rows").parentElement, middle = button.getBoundingClientRect().top - box.getBoundingClientRect().top;
  if (middle < 60 || middle > box.clientHeight - 60) box.scrollTop += middle - box.clientHeight / 2;  // never the page
}
function find(text) {
  const wanted = text.trim().toLowerCase();
  let first = null;
  for (const row of $("rows").querySelectorAll("details.row")) {
    const hits = [...row.querySelectorAll("button")].filter(b => b.textContent.toLowerCase().includes(wanted));
    const inName = row.querySelector("summary").textContent.toLowerCase().includes(wanted);
    row.hidden = wanted !== "" && !hits.length && !inName;
    if (!row.hidden && wanted) first ??= hits[0] || row.querySelector("button");
  }
  for (const group of $("rows").querySelectorAll("details.group")) {
    group.hidden = ![...group.querySelectorAll("details.row")].some(row => !row.hidden);
    if (wanted && !group.hidden) group.open = true;
  }
  return first;
}

// ---------------------------------------------------------------- moving about

function go(change, focus) {  // focus: the key of the picture that keeps the focus
  const step = here();
  Object.assign(state, change);
  if (change.mode && change.step === undefined) {  // stay at the same node
    state.step = Math.max(0, MODES[state.mode].findIndex(s => s.n === step.n));
    state.chosen = null;
  }
  draw(focus);
}
const goTo = (n, chosen = null) => go({step: MODES[state.mode].findIndex(s => s.n === n), chosen});
function move(by) {
  const to = state.step + by;
  if (to >= 0 && to < MODES[state.mode].length) go({step: to, chosen: null});
  else stop();
}
let timer = 0;
function stop() {
  clearInterval(timer);
  timer = 0;
  $("play").setAttribute("aria-pressed", "false");
}
function play() {
  if (timer) return stop();
  timer = setInterval(() => move(1), 1200);
  $("play").setAttribute("aria-pressed", "true");
  move(1);
}
const turn = mode => go({mode: state.mode === mode ? "backward" : mode});

function draw(focus) {
  if (drawn !== state.mode) drawRows();
  markRow();
  drawNode();
  drawElement();
  $("where").textContent = `${state.mode}, step ${state.step + 1} of ${MODES[state.mode].length}`;
  for (const mode of ["forward", "recursion"]) $(mode).setAttribute("aria-pressed", String(state.mode === mode));
  const canvas = focus && document.querySelector(`[data-key="${focus}"] canvas`);
  if (canvas) canvas.focus({preventScroll: true});
  const view = state.chosen && views(here())[state.chosen.key];
  $("chosen").textContent = view ? `${view.name}${place(state.chosen.at)}` : "";  // on a phone: to what is said of it
  history.replaceState(null, "", `#${fragment()}`);
}
function fragment() {  // node=y12&step=1&at=a0,0,3,1: the step counts from 0 among those of this node
  const step = here(), first = MODES[state.mode].findIndex(s => s.n === step.n), found = [];
  if (state.mode !== "backward") found.push(`mode=${state.mode}`);
  found.push(`node=${encodeURIComponent(nodes[step.n].name)}`);
  if (state.step > first) found.push(`step=${state.step - first}`);
  if (state.chosen) found.push(`at=${[state.chosen.key, ...state.chosen.at].join()}`);
  return found.join("&");
}
function readFragment() {
  const given = new URLSearchParams(location.hash.slice(1)), mode = MODES[given.get("mode")] ? given.get("mode") : "backward";
  const n = nodes.findIndex(node => node.name === given.get("node")), first = MODES[mode].findIndex(s => s.n === n);
  const step = Math.max(0, first) + (parseInt(given.get("step")) || 0), [key, ...at] = (given.get("at") || "").split(",");
  Object.assign(state, {mode, step: MODES[mode][step] ? step : Math.max(0, first), chosen: key ? {key, at: at.map(Number)} : null});
  draw();
}

$("back").onclick = () => move(-1);
$("next").onclick = () => move(1);
$("play").onclick = play;
$("forward").onclick = () => turn("forward");
$("recursion").onclick = () => turn("recursion");
$("help").onclick = () => {
  $("keys").hidden = !$("keys").hidden;
  $("help").setAttribute("aria-expanded", String(!$("keys").hidden));
};
$("chosen").onclick = event => {
  event.preventDefault();
  $("element").scrollIntoView();
};
$("find").oninput = () => find($("find").value);
$("find").onkeydown = event => {
  if (event.key === "Escape") { $("find").value = ""; find(""); $("find").blur(); }
  if (event.key === "Enter") { const first = find($("find").value); if (first) first.click(); }
  event.stopPropagation();
};
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey && event.key !== "?") return;
  const onButton = event.key === " " && event.target.closest("button, summary");  // the space bar presses these
  const key = {ArrowLeft: () => move(-1), ArrowRight: () => move(1), " ": play, f: () => turn("forward"), r: () => turn("recursion"),
    "/": () => $("find").focus(), "?": () => $("help").click(), Escape: () => go({chosen: null})}[event.key];
  if (!key || onButton) return;
  event.preventDefault();
  key();
});
addEventListener("hashchange", readFragment);
readFragment();
