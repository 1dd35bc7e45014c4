"use strict";
// The circuit explorer: labels, groups, size, search, hovering, selection, keys, zoom, saving. One per circuit.

function makeExplorer(article, circuit, tokens, runName) {
  const find = (selector) => article.querySelector(selector);
  for (const end of circuit.ends) end.text = tokens[end.token].replaceAll("\n", "");
  const picture = drawCircuit(circuit);
  find(".canvas").append(picture.root);
  find(".stage").classList.toggle("below", picture.many);
  const state = { shown: circuit.nodes.length, selected: null, group: null, onlyPinned: false };
  const isNode = (index) => index < circuit.nodes.length;
  const isShown = (index) => !isNode(index) || circuit.nodes[index].rank < state.shown;
  const labels = makeLabels(circuit, refresh);
  const together = (index) => picture.groupOf.get(index)?.members ?? [index];
  const elementOf = (index) => (picture.groupOf.get(index) ?? picture.nodes[index]).element;

  /** What the reader wrote, into the picture and the panel. */
  function refresh() {
    const groups = new Map();
    circuit.nodes.forEach((node, index) => {
      Object.assign(node, labels.of(node.name));
      if (node.group) groups.set(node.group, [...(groups.get(node.group) ?? []), index]);
      writeNode(picture.nodes[index], node);
    });
    placeGroups(picture, groups, ({ element, members, name }) => listen(element, members[0], () => selectGroup(name)));
    showKept(find(".kept"), labels, circuit);
    const pins = circuit.nodes.some((node) => node.pinned);
    find("[data-pinned]").hidden = !pins;
    state.onlyPinned &&= pins;
    setSize(state.shown);
    if (state.group !== null && groups.has(state.group)) selectGroup(state.group);
    else select(state.selected);
  }

  /** Nodes and ends that one can come to along lines between shown nodes, downstream or upstream. */
  function reach(starts, from, to) {
    const seen = new Set(starts);
    const queue = [...starts];
    while (queue.length) {
      const here = queue.pop();
      for (const line of picture.lines) {
        if (line[from] === here && isShown(line[to]) && !seen.has(line[to])) {
          seen.add(line[to]);
          queue.push(line[to]);
        }
      }
    }
    return seen;
  }

  /** Lights what is connected to nodes; without any, the pinned ones where only they are wanted. */
  function highlight(starts) {
    const active = starts.filter(isShown);
    const pinned = circuit.nodes.flatMap((node, index) => (node.pinned ? [index] : []));
    const sides = active.length
      ? [reach(active, "target", "source"), reach(active, "source", "target")]
      : [new Set(state.onlyPinned ? pinned : [])];
    const on = (index) => sides.some((side) => side.has(index));
    picture.root.classList.toggle("focused", active.length > 0 || state.onlyPinned);
    for (const { index, element } of [...picture.nodes, ...picture.ends]) element.classList.toggle("lit", on(index));
    for (const { members, element } of picture.groupOf.values()) element.classList.toggle("lit", members.some(on));
    for (const { source, target, element } of picture.lines) {
      element.classList.toggle("lit", sides.some((side) => side.has(source) && side.has(target)));
    }
  }

  function selection() {
    if (state.selected === null) return [];
    return state.group === null ? [state.selected] : together(state.selected);
  }

  function select(index, focus = false) {
    Object.assign(state, { selected: index, group: null });
    mark(index, focus);
    if (index === null) showNodes(find(".panel"), find(".evidence"), circuit, go);
    else showNode(find(".panel"), find(".evidence"), circuit, picture.edges, index, tokens, go, labels);
  }

  function selectGroup(name, focus = false) {
    const { members } = [...picture.groupOf.values()].find((group) => group.name === name);
    Object.assign(state, { selected: members[0], group: name });
    mark(members[0], focus);
    showGroup(find(".panel"), find(".evidence"), circuit, name, members, go, labels);
  }

  const go = (index) => select(index, true);

  function mark(index, focus) {
    const chosen = index === null ? null : elementOf(index);
    for (const { element } of [...picture.nodes, ...picture.groupOf.values()]) {
      element.classList.toggle("selected", element === chosen);
      element.setAttribute("aria-pressed", String(element === chosen));
    }
    if (index !== null) {
      rove(index);
      if (focus) chosen.focus({ preventScroll: true });
    }
    highlight(selection());
  }

  /** The one node or group that Tab reaches. */
  function rove(index) {
    for (const { element } of [...picture.nodes, ...picture.groupOf.values()]) element.setAttribute("tabindex", "-1");
    elementOf(index).setAttribute("tabindex", "0");
  }

  function setSize(count) {
    state.shown = count;
    const off = (element, members) => element.classList.toggle("off", !members.some(isShown));
    for (const { index, element } of picture.nodes) off(element, [index]);
    for (const { members, element } of picture.groupOf.values()) off(element, members);
    for (const line of picture.lines) {
      line.element.classList.toggle("off", !isShown(line.source) || !isShown(line.target));
    }
    const first = circuit.nodes.findIndex((node) => node.rank === 0);
    if (state.selected !== null && !isShown(state.selected)) select(null);
    rove(state.selected ?? first);
    highlight(selection());
  }

  function neighbour(index, key) {
    const here = picture.at[index];
    const sideways = key === "ArrowLeft" || key === "ArrowRight";
    const sign = key === "ArrowLeft" || key === "ArrowUp" ? -1 : 1;
    let best = null;
    let least = Infinity;
    picture.at.forEach((there, i) => {
      const [dx, dy] = [(there.x - here.x) * sign, (there.y - here.y) * sign];
      if (!isNode(i) || !isShown(i) || (sideways ? dx <= 0 : dx !== 0 || dy <= 0)) return;
      const distance = sideways ? dx * 10 + Math.abs(dy) : dy;
      if (distance < least) [best, least] = [i, distance];
    });
    return best;
  }

  function onKey(event, index, choose) {
    if (event.key === "Enter" || event.key === " ") choose();
    else if (event.key === "Escape") select(null);
    else if (event.key.startsWith("Arrow")) {
      const next = neighbour(index, event.key);
      if (next !== null) {
        rove(next);
        elementOf(next).focus();
      }
    } else return;
    event.preventDefault();
  }

  function listen(element, index, choose) {
    element.addEventListener("click", () => choose(true));
    element.addEventListener("keydown", (event) => onKey(event, index, choose));
    for (const name of ["pointerenter", "focus"]) element.addEventListener(name, () => highlight(together(index)));
    for (const name of ["pointerleave", "blur"]) element.addEventListener(name, () => highlight(selection()));
  }

  for (const { index, element } of picture.nodes) listen(element, index, (focus = false) => select(index, focus));
  for (const { index, element } of picture.ends) {
    element.addEventListener("pointerenter", () => highlight([index]));
    element.addEventListener("pointerleave", () => highlight(selection()));
  }
  find("[data-pinned]").addEventListener("click", (event) => {
    state.onlyPinned = !state.onlyPinned;
    event.target.setAttribute("aria-pressed", String(state.onlyPinned));
    highlight(selection());
  });
  refresh();
  makeSizes(find(".size"), find(".size-text"), find(".sizes"), circuit, picture.edges, setSize);
  makeSearch(find("[type=search]"), find(".found"), circuit, picture, isShown, select);
  makeZoom(find(".canvas"), picture, article.querySelectorAll("[data-zoom]"));
  find("[data-export]").addEventListener("click", () =>
    save(standalone(picture.root), `${runName}-${circuit.key}.svg`, "image/svg+xml"),
  );
}

/** The slider, its text, and the curve of loss against size. */
function makeSizes(label, text, figure, circuit, edges, setSize) {
  const slider = label.querySelector("input");
  const sizes = circuit.sizes.length ? circuit.sizes : [[circuit.nodes.length, null]];
  const curve = circuit.sizes.length > 1 ? drawSizes(circuit) : null;
  if (curve) figure.append(curve.root);
  slider.max = String(sizes.length - 1);
  slider.value = slider.max;
  slider.disabled = sizes.length < 2;
  const update = () => {
    const [count, loss] = sizes[Number(slider.value)];
    const kept = (index) => circuit.nodes[index].rank < count;
    const among = edges.filter((edge) => kept(edge.source) && kept(edge.target)).length;
    const words = `${fmt(count)} of ${fmt(circuit.nodes.length)} nodes, ${fmt(among)} edges${loss === null ? "" : `, loss ${fixed(loss)} nats`}`;
    text.textContent = words;
    slider.setAttribute("aria-valuetext", words);
    curve?.mark(Number(slider.value));
    setSize(count);
  };
  slider.addEventListener("input", update);
  curve?.points.forEach((point, i) =>
    point.addEventListener("click", () => {
      slider.value = String(i);
      update();
    }),
  );
  update();
}

function drawSizes(circuit) {
  const [width, height, left, right, top, bottom] = [760, 140, 40, 128, 10, 26];
  const sizes = circuit.sizes;
  const most = Math.max(...sizes.map(([, loss]) => loss), circuit.target ?? 0, Math.LN2) * 1.08;
  const x = (count) => left + ((width - left - right) * count) / circuit.nodes.length;
  const y = (loss) => height - bottom - ((height - top - bottom) * loss) / most;
  const rule = (loss, words) => [
    svg("path", { class: "rule", d: `M${left} ${y(loss)}H${width - right}` }),
    svg("text", { class: "rule-name", x: width - right + 6, y: y(loss) + 3.5 }, words),
  ];
  const ticks = sizes.filter((_, i) => sizes.length < 14 || i % 2 === 0 || i === sizes.length - 1);
  const points = sizes.map(([count, loss]) =>
    svg("circle", { cx: x(count), cy: y(loss), r: 3.5 }, svg("title", {}, `${count} nodes: ${fixed(loss)} nats`)),
  );
  const root = svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Task loss against the number of nodes kept" },
    ...rule(Math.LN2, "ln 2: no information"),
    ...(circuit.target ? rule(circuit.target, `target ${fmt(circuit.target)}`) : []),
    svg("path", { class: "axis", d: `M${left} ${top}V${height - bottom}H${width - right}` }),
    ...[0, 0.5, 1, 1.5, 2]
      .filter((v) => v < most)
      .map((v) => svg("text", { class: "tick y", x: left - 7, y: y(v) + 3.5 }, String(v))),
    ...ticks.map(([count]) => svg("text", { class: "tick", x: x(count), y: height - bottom + 14 }, String(count))),
    svg("text", { class: "tick title", x: width - right + 14, y: height - bottom + 14 }, "nodes kept"),
    svg("path", { class: "curve", d: `M${sizes.map(([count, loss]) => `${x(count)} ${y(loss)}`).join("L")}` }),
    ...points,
  );
  const mark = (at) => points.forEach((point, i) => point.classList.toggle("now", i === at));
  return { root, points, mark };
}

function makeSearch(input, found, circuit, picture, isShown, select) {
  const matches = () => {
    const wanted = input.value.trim().toLowerCase();
    if (!wanted) return [];
    return circuit.nodes.flatMap((node, i) => {
      const own = [node.name, node.ours, node.place, node.short, node.label, node.group];
      const names = [...own, ...node.named.map(([name]) => name)];
      return isShown(i) && names.some((name) => name.toLowerCase().includes(wanted)) ? [i] : [];
    });
  };
  const update = () => {
    const hits = new Set(matches());
    for (const { index, element } of picture.nodes) element.classList.toggle("match", hits.has(index));
    for (const { members, element } of picture.groupOf.values()) {
      element.classList.toggle("match", members.some((index) => hits.has(index)));
    }
    found.textContent = input.value.trim() ? `${hits.size} found` : "";
  };
  input.addEventListener("input", update);
  input.addEventListener("keydown", (event) => {
    const hits = matches();
    if (event.key === "Enter" && hits.length) select(hits[0], true);
  });
}

function makeZoom(canvas, picture, buttons) {
  let scale = null;
  const fit = () => {
    const room = canvas.clientWidth;
    return room ? Math.min(1.25, Math.max(0.7, room / picture.width)) : 1;
  };
  const apply = () => {
    const now = scale ?? fit();
    picture.root.style.width = `${picture.width * now}px`;
    picture.root.style.height = `${picture.height * now}px`;
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const step = Number(button.dataset.zoom);
      scale = step ? Math.min(3, Math.max(0.3, (scale ?? fit()) * 1.25 ** step)) : null;
      apply();
    });
  }
  new ResizeObserver(() => scale === null && apply()).observe(canvas);
  apply();
}

function save(text, name, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
