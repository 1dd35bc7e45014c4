"use strict";
// The drawing of one circuit: places come from Python (circuits/picture_layout.py, report/ends.py), sizes and colours are decided here.

const MOST_COLUMNS = 14; // beside the panel; a wider picture gets the whole width
const HEAD = 46;
const SIDE = 34;

/** Draws a circuit; returns the svg, and its nodes, ends and lines as {element, ...}, nodes and ends by their index. */
function drawCircuit(circuit) {
  const outer = circuit.ends.length ? 1 : 0; // a column of tokens before the layers, one behind
  const columns = circuit.layers.length + 2 * outer;
  const many = columns > MOST_COLUMNS + 2;
  const columnWidth = many ? 66 : 92 - 6 * outer;
  const rows = Math.max(circuit.rows, ...circuit.ends.map((end) => end.row + 1));
  const rowHeight = Math.min(46, Math.max(17, 560 / rows));
  const x = (column) => SIDE + (column + outer + 0.5) * columnWidth;
  const y = (row) => HEAD + 26 + row * rowHeight;
  const width = 2 * SIDE + columns * columnWidth;
  const height = y(rows - 1) + 30;
  const root = svg("svg", {
    class: "circuit-picture",
    viewBox: `0 0 ${width} ${height}`,
    width,
    height,
    role: "group",
    "aria-label": `Circuit for ${circuit.task}: ${circuit.nodes.length} nodes, ${circuit.edges.length} edges`,
  });
  const home = [
    ...circuit.nodes.map((node) => ({ x: x(node.column), y: y(node.row) })),
    ...circuit.ends.map((end) => ({ x: x(end.side === "input" ? -1 : circuit.layers.length), y: y(end.row) })),
  ];
  root.append(drawHeads(circuit, x, columnWidth, height), drawWires(circuit, home, x(-outer), x(columns - 1 - outer)));
  const look = {
    // Strokes get thinner and dots smaller where there are many: thousands of lines would be a blot.
    thin: 1 / Math.sqrt(Math.max(1, circuit.edges.length / 150)),
    small: Math.min(1, rowHeight / 30),
    weight: Math.max(...circuit.edges.map((edge) => Math.abs(edge[2])), 1e-9),
    effect: Math.max(...circuit.nodes.map((node) => node.effect ?? 0), 1e-9),
    column: columnWidth,
    row: rowHeight,
  };
  const links = [...circuit.links, ...headLinks(circuit)].map(drawLink);
  const edges = circuit.edges.map((edge) => drawEdge(edge, look, circuit));
  const ties = circuit.ends.flatMap((end, i) => drawTies(end, circuit.nodes.length + i, look, circuit));
  const nodes = circuit.nodes.map((node, i) => drawNode(node, i, home[i], look));
  const ends = circuit.ends.map((end, i) => {
    const index = circuit.nodes.length + i;
    return drawEnd(end, index, home[index], look);
  });
  const groups = svg("g", { class: "groups" });
  root.classList.toggle("crowded", rowHeight < 22);
  for (const part of [ties, links, edges, ends, nodes]) root.append(svg("g", {}, ...part.map((one) => one.element)));
  root.append(groups);
  return { root, nodes, ends, edges, lines: [...edges, ...links, ...ties], groups, width, height, home, many, look };
}

/** Puts the nodes of each group, a Map of indices by name, into one place; `drawn(group)` is told of each element. */
function placeGroups(picture, groups, drawn) {
  picture.at = [...picture.home];
  picture.groupOf = new Map();
  picture.groups.replaceChildren();
  for (const [name, members] of groups) {
    const group = { name, members, half: Math.min(70, 14 + 3.1 * clip(name, 20).length) };
    const spot = freeSpot(picture, group);
    for (const index of members) {
      picture.at[index] = spot;
      picture.groupOf.set(index, group);
    }
    group.element = drawGroup(group, spot);
    picture.groups.append(group.element);
    drawn(group);
  }
  for (const { index, element } of picture.nodes) element.classList.toggle("grouped", picture.groupOf.has(index));
  for (const { source, target, path, element } of picture.lines) {
    const [a, b] = [picture.at[source], picture.at[target]];
    element.classList.toggle("inside", a === b);
    element.setAttribute("d", path(a, b));
  }
}

/** The middle of a group's nodes, or the nearest place above or below it where it covers no other node. */
function freeSpot({ at, home, look }, { members, half }) {
  const mean = (axis) => members.reduce((sum, index) => sum + home[index][axis], 0) / members.length;
  const [x, y] = [mean("x"), mean("y")];
  const others = at.filter((_, index) => !members.includes(index));
  const free = (height) =>
    height >= HEAD + 20 && !others.some((o) => Math.abs(o.x - x) < half + 16 && Math.abs(o.y - height) < 26);
  const steps = Array.from({ length: 60 }, (_, i) => (i % 2 ? 1 : -1) * Math.ceil(i / 2) * (look.row / 2));
  return { x, y: y + (steps.find((step) => free(y + step)) ?? 0) };
}

function drawGroup({ name, members, half }, { x, y }) {
  return svg(
    "g",
    {
      class: "group",
      transform: `translate(${x} ${y})`,
      role: "button",
      tabindex: "-1",
      "data-group": name,
      "aria-label": `Group ${name}: ${members.length} nodes`,
    },
    svg("rect", { x: -half, y: -13, width: 2 * half, height: 26, rx: 8 }),
    svg("text", { y: 1 }, clip(name, 20)),
    svg("text", { class: "count", y: 23 }, `${members.length} nodes`),
    svg("title", {}, `${name}: ${members.length} nodes`),
  );
}

function drawHeads(circuit, x, columnWidth, height) {
  const group = svg("g", { class: "heads", "aria-hidden": "true" });
  const title = (column, words) => svg("text", { class: "place", x: x(column), y: 40 }, words);
  circuit.layers.forEach(([layer, words], column) => {
    if (column === 0 || circuit.layers[column - 1][0] !== layer) {
      const count = circuit.layers.filter((other) => other[0] === layer).length;
      const left = x(column) - columnWidth / 2;
      group.append(
        svg("rect", { class: "band", x: left + 3, y: 4, width: count * columnWidth - 6, height: height - 8, rx: 7 }),
        svg("text", { class: "layer", x: left + 14, y: 22 }, `layer ${layer}`),
      );
    }
    group.append(title(column, words));
  });
  if (circuit.ends.length) group.append(title(-1, "input token"), title(circuit.layers.length, "answer’s logit"));
  return group;
}

/** One hairline per residual channel: the stream that its reads and writes sit on. */
function drawWires(circuit, at, left, right) {
  const rows = new Set(circuit.nodes.flatMap((node, i) => (node.stream === null ? [] : [at[i].y])));
  const wires = [...rows].map((y) => svg("path", { d: `M${left} ${y}H${right}` }));
  return svg("g", { class: "wires", "aria-hidden": "true" }, ...wires);
}

/** Queries and keys of a head decide from where its values are taken: no weight, but a connection. */
function headLinks(circuit) {
  const found = [];
  circuit.nodes.forEach((node, i) => {
    if (node.head === null || /^v/.test(node.short)) return;
    circuit.nodes.forEach((value, j) => {
      if (value.layer === node.layer && value.head === node.head && /^v/.test(value.short)) found.push([i, j, "head"]);
    });
  });
  return found;
}

function drawLink([source, target, kind]) {
  const bend = (a, b) => a.x + 14 + Math.min(30, Math.abs(b.y - a.y) / 6);
  const path = (a, b) =>
    kind === "residual"
      ? `M${a.x} ${a.y}L${b.x} ${b.y}`
      : `M${a.x} ${a.y}Q${bend(a, b)} ${(a.y + b.y) / 2} ${b.x} ${b.y}`;
  return { source, target, path, element: svg("path", { class: `link ${kind === "residual" ? "stream" : "head"}` }) };
}

function drawEdge([source, target, weight, matrix], look, circuit) {
  const share = Math.abs(weight) / look.weight;
  const name = (index) => circuit.nodes[index].name;
  const element = svg(
    "path",
    {
      class: `edge ${weight > 0 ? "plus" : "minus"}`,
      "stroke-width": ((0.9 + 3.1 * share) * Math.max(0.4, look.thin)).toFixed(2),
      "stroke-opacity": ((0.45 + 0.5 * share) * Math.max(0.35, look.thin)).toFixed(2),
    },
    svg("title", {}, `${name(source)} → ${name(target)}: ${fmt(weight, 3, { sign: true })} (${matrix})`),
  );
  return { source, target, weight, matrix, path: curve, element };
}

function curve(a, b) {
  const middle = (a.x + b.x) / 2;
  return `M${a.x} ${a.y}C${middle} ${a.y} ${middle} ${b.y} ${b.x} ${b.y}`;
}

/** From an input token to the reads of the channels that it writes, along the stream; from writes to a logit. */
function drawTies(end, index, look, circuit) {
  const largest = Math.max(...end.ties.map(([, weight]) => Math.abs(weight)));
  const isInput = end.side === "input";
  const turn = look.column * 0.8;
  const into = (a, b) => {
    const x = Math.min(a.x + turn, b.x);
    return `${curve(a, { x, y: b.y })}H${b.x}`;
  };
  const out = (a, b) => {
    const x = Math.max(b.x - turn, a.x);
    return `M${a.x} ${a.y}H${x}${curve({ x, y: a.y }, b)}`;
  };
  return end.ties.map(([node, weight]) => {
    const { name } = circuit.nodes[node];
    const words = isInput ? `${end.text} → ${name}` : `${name} → ${end.text}`;
    const matrix = isInput ? "embedding" : "unembedding";
    const element = svg(
      "path",
      {
        class: `tie ${weight > 0 ? "plus" : "minus"}`,
        "stroke-width": (0.8 + (1.6 * Math.abs(weight)) / largest).toFixed(2),
      },
      svg("title", {}, `${words}: ${fmt(weight, 3, { sign: true })} (${matrix})`),
    );
    const [source, target] = isInput ? [index, node] : [node, index];
    return { source, target, path: isInput ? into : out, element };
  });
}

function drawEnd(end, index, at, look) {
  const words = clip(end.text, 11);
  const half = Math.min(look.column / 2 - 3, 8 + 3.4 * words.length);
  const what = end.side === "input" ? "input token" : "logit of an answer";
  const none = end.ties.length ? "" : `, no weight ties it to the circuit`;
  const element = svg(
    "g",
    {
      class: `end ${end.side}${end.ties.length ? "" : " loose"}`,
      transform: `translate(${at.x} ${at.y})`,
      role: "img",
      "aria-label": `${what} ${end.text}${none}`,
    },
    svg("rect", { x: -half, y: -10, width: 2 * half, height: 20, rx: 4 }),
    svg("text", { y: 3.5 }, words),
    svg("title", {}, `${what} ${end.text}, token ${end.token}${none}`),
  );
  return { index, element };
}

function drawNode(node, index, at, look) {
  const r = Math.max(0.6, look.small) * (4.5 + 6.5 * Math.sqrt(Math.max(node.effect ?? 0, 0) / look.effect));
  const element = svg(
    "g",
    {
      class: `node ${node.stream === null ? "inner" : "stream"}${node.named.length ? " named" : ""}`,
      transform: `translate(${at.x} ${at.y})`,
      role: "button",
      tabindex: "-1",
      "data-node": node.name,
    },
    svg("circle", { class: "halo", r: r + 6 }),
    svg("circle", { class: "dot", r }),
    svg("text", { y: -r - 5 }, node.short),
    svg("text", { class: "name", y: r + 14 }),
    svg("text", { class: "pin-mark", x: r + 5, y: 4, "aria-hidden": "true" }, "◆"),
    svg("title", {}),
  );
  return { index, r, element };
}

/** Writes a node's label, or the channel that it belongs to, and its pin. */
function writeNode({ element }, node) {
  const effect = node.effect === null ? "" : `, effect ${fmt(node.effect, 3, { sign: true })} nats`;
  const names = [...(node.label ? [node.label] : []), ...node.named.map(([name]) => name)];
  const pinned = node.pinned ? ", pinned" : "";
  element.setAttribute("aria-label", `${[node.name, node.place, ...names].join(", ")}${effect}${pinned}`);
  element.querySelector(".name").textContent = names.length ? clip(names[0], 18) : "";
  element.querySelector("title").textContent = `${[node.name, node.ours, ...names].join("\n")}${effect}${pinned}`;
  element.classList.toggle("labelled", node.label !== "");
  element.classList.toggle("pinned", node.pinned);
}

const clip = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

/** The picture as a file of its own: what style sheets decide is written into the elements. */
function standalone(root) {
  const copy = root.cloneNode(true);
  const wanted = ["fill", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "opacity", "font-size", "display"];
  const from = [root, ...root.querySelectorAll("*")];
  const to = [copy, ...copy.querySelectorAll("*")];
  to.forEach((element, i) => {
    const style = getComputedStyle(from[i]);
    for (const name of wanted) element.setAttribute(name, style.getPropertyValue(name));
    if (element.tagName === "text") {
      element.setAttribute("text-anchor", style.textAnchor);
      element.setAttribute("font-weight", style.fontWeight);
      element.setAttribute("font-family", "system-ui, sans-serif");
      element.setAttribute("paint-order", style.paintOrder);
    }
    for (const name of ["class", "style", "tabindex", "role"]) element.removeAttribute(name);
  });
  const [, , width, height] = root.getAttribute("viewBox").split(" ");
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  copy.prepend(svg("rect", { width, height, fill: colour("panel") }));
  return new XMLSerializer().serializeToString(copy);
}
