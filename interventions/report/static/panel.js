"use strict";
// What is known of one node: weights, prompts, examples.

/** Fills the panel and what is below it; `go(index)` selects another node, or none. */
function showNode(panel, evidence, circuit, edges, index, tokens, go, labels) {
  const node = circuit.nodes[index];
  panel.replaceChildren(
    el("button", { type: "button", class: "quiet back screen", onclick: () => go(null) }, "all nodes"),
    el("h4", {}, node.name),
    el("p", { class: "soft" }, el("code", {}, node.ours), el("br"), node.place),
    ...node.named.map(([name, id]) => el("p", {}, "Named channel ", el("a", { href: `#${id}` }, name))),
    labelForm(labels, circuit, node.name),
    facts(node, circuit),
    ...weights(circuit, edges, index, go),
    ...streamLinks(circuit, index, go),
    ...streamTokens(circuit, node, tokens),
  );
  evidence.replaceChildren(...onPrompts(circuit, node, tokens), ...examples(node, tokens));
}

/** The nodes of a group. */
function showGroup(panel, evidence, circuit, name, members, go, labels) {
  const rename = (group) => labels.set(Object.fromEntries(members.map((i) => [circuit.nodes[i].name, { group }])));
  panel.replaceChildren(
    el("button", { type: "button", class: "quiet back screen", onclick: () => go(null) }, "all nodes"),
    el("h4", {}, name),
    el("p", { class: "soft" }, `A group of ${members.length} nodes, drawn as one; lines are the weights of its nodes.`),
    el("p", { class: "jumps" }, ...members.map((i) => jump(circuit, i, go, name))),
    el("button", { type: "button", class: "screen", onclick: () => rename("") }, "Take the group apart"),
  );
  evidence.replaceChildren();
}

/** What the panel holds while no node is selected: all of them, the most important first. */
function showNodes(panel, evidence, circuit, go) {
  const place = ({ pinned, rank }) => (pinned ? 0 : circuit.nodes.length) + rank;
  const order = circuit.nodes.map((_, i) => i).sort((a, b) => place(circuit.nodes[a]) - place(circuit.nodes[b]));
  const rows = order.map((i) => {
    const { effect } = circuit.nodes[i];
    return el(
      "tr",
      {},
      el("th", {}, jump(circuit, i, go)),
      el("td", {}, effect === null ? "" : fixed(effect, 3, true)),
    );
  });
  const title = el("tr", {}, el("th", {}, "node"), el("th", { title: "Rise of the loss without it, nats" }, "effect"));
  const how =
    "Select a node for its weights, its activation on prompts and its examples, and to label, pin or group it. " +
    "Tab reaches the picture, arrow keys move in it, Enter selects, Escape leaves.";
  panel.replaceChildren(
    el("p", { class: "soft" }, how),
    el("div", { class: "list", tabindex: "0" }, el("table", {}, el("thead", {}, title), el("tbody", {}, ...rows))),
  );
  evidence.replaceChildren();
}

function facts(node, circuit) {
  const rows = [];
  const add = (name, value, tip) => rows.push(el("dt", { title: tip }, name), el("dd", {}, value));
  if (node.effect !== null) {
    const tip = "Rise of the circuit's loss when this node alone is ablated too";
    add(
      "necessity",
      `${fmt(node.effect, 3, { sign: true })} nats, rank ${node.rank + 1} of ${circuit.nodes.length}`,
      tip,
    );
  }
  if (node.ablated !== null) add("ablated to", fmt(node.ablated, 3), "Its value in every other circuit of this model");
  if (node.stats) {
    add("active", `${fmt(100 * node.stats.active, 3)} % of held-out tokens`, "Share of tokens at which it is not zero");
    add("range", `${fmt(node.stats.min)} … ${fmt(node.stats.max)}, mean ${fmt(node.stats.mean)}`, "On held-out text");
  }
  return el("dl", {}, ...rows);
}

/** A node's name, which selects it, with what the reader wrote. */
function jump(circuit, index, go, within = "") {
  const { name, label, group, pinned } = circuit.nodes[index];
  const words = [pinned ? "◆" : "", label, group && group !== within ? `(${group})` : ""].filter(Boolean).join(" ");
  const button = el("button", { type: "button", class: "jump", onclick: () => go(index) }, name);
  return words ? el("span", {}, button, " ", el("span", { class: "written" }, words)) : button;
}

function weights(circuit, edges, index, go) {
  const sides = [
    ["Weights in", edges.filter((edge) => edge.target === index), "source"],
    ["Weights out", edges.filter((edge) => edge.source === index), "target"],
  ];
  const largest = Math.max(...edges.map((edge) => Math.abs(edge.weight)), 1e-9);
  return sides.flatMap(([title, found, end]) => {
    if (!found.length) return [];
    const rows = [...found]
      .sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight))
      .map((edge) => {
        const bar = el("i", { class: `bar ${edge.weight > 0 ? "plus" : "minus"}` });
        bar.style.width = `${(100 * Math.abs(edge.weight)) / largest}%`;
        return el(
          "tr",
          {},
          el("th", {}, jump(circuit, edge[end], go)),
          el("td", { class: "soft l" }, edge.matrix),
          el("td", {}, fixed(edge.weight, 3, true)),
          el("td", { class: "bars" }, bar),
        );
      });
    return [el("h5", {}, title), el("table", { class: "weights" }, el("tbody", {}, ...rows))];
  });
}

function streamLinks(circuit, index, go) {
  const links = circuit.links.filter((link) => link[2] === "residual");
  const sides = [
    ["Written by", links.filter((link) => link[1] === index).map((link) => link[0])],
    ["Read by", links.filter((link) => link[0] === index).map((link) => link[1])],
  ];
  return sides.flatMap(([title, found]) =>
    found.length
      ? [
          el("h5", { title: "Nodes on the same residual channel, with weight 1" }, title),
          el("p", { class: "jumps" }, ...found.map((i) => jump(circuit, i, go))),
        ]
      : [],
  );
}

/** Tokens of the sparse model's embedding and unembedding on a residual channel. */
function streamTokens(circuit, node, tokens) {
  const found = node.stream === null ? null : circuit.stream[node.stream];
  if (!found) return [];
  const lists = [
    ["Embeddings on this channel", found.embed],
    ["Logits that read this channel", found.unembed],
  ];
  return lists.flatMap(([title, pairs]) => {
    if (!pairs.length) return [];
    const largest = Math.abs(pairs[0][1]);
    const chips = pairs.map(([id, weight]) =>
      el(
        "i",
        { class: `chip ${shade(weight, 2 * largest)}`, title: `token ${id}` },
        el("code", {}, tokens[id].replaceAll("\n", "")),
        fixed(weight, 2, true),
      ),
    );
    return [el("h5", {}, title), el("p", { class: "chips" }, ...chips)];
  });
}

function means(node) {
  if (!node.means) return [];
  const rows = [
    ["at the last token", node.means.last],
    ["since they differ", node.means.since],
  ].map(([title, pair]) => el("tr", {}, el("th", {}, title), ...pair.map((mean) => el("td", {}, fixed(mean, 3)))));
  const tip = "Over 64 evaluation pairs; their members differ in the feature that the task asks for";
  const head = el("tr", {}, el("th", { title: tip }, "mean"), el("th", {}, "first prompt"), el("th", {}, "second prompt"));
  return [el("table", { class: "means" }, el("thead", {}, head), el("tbody", {}, ...rows))];
}

function onPrompts(circuit, node, tokens) {
  if (!node.prompts) return [];
  const largest = Math.max(...node.prompts.flat().map(Math.abs), 1e-9);
  const texts = node.prompts.flatMap((values, i) => [
    el("p", { class: "soft title" }, circuit.prompts[i].title),
    coloured(circuit.prompts[i].tokens, values, largest, tokens),
  ]);
  return [el("div", {}, el("h5", {}, "On the task's prompts"), ...means(node), ...texts)];
}

function examples(node, tokens) {
  if (!node.stats) return [];
  const largest = Math.max(Math.abs(node.stats.min), Math.abs(node.stats.max), 1e-9);
  const lists = [
    ["Highest on held-out text", node.top, "Never above zero."],
    ["Lowest on held-out text", node.bottom, "Never below zero."],
  ];
  return lists.map(([title, windows, none]) => {
    const shown = windows.flatMap(([ids, values, at]) => [
      el("p", { class: "soft title" }, fmt(values[at], 3, { sign: true })),
      coloured(ids, values, largest, tokens, at),
    ]);
    return el("div", {}, el("h5", {}, title), ...(shown.length ? shown : [el("p", { class: "soft" }, none)]));
  });
}

/** Text with every token coloured by a value; `peak` is framed. */
function coloured(ids, values, largest, tokens, peak = -1) {
  const spans = ids.map((id, i) => {
    const classes = [shade(values[i], largest), i === peak ? "peak" : null].filter(Boolean).join(" ");
    return el("i", { class: classes || null, title: `${fmt(values[i], 3, { sign: true })} · token ${id}` }, tokens[id]);
  });
  return el("pre", { class: "tokens" }, ...spans);
}
