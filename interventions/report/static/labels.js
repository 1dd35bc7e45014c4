"use strict";
// What the reader writes at nodes: a label, a group, a pin. Kept in the browser, given as a file for RUN/labels.

const LONGEST_LABEL = 80;

/** A circuit's labels. `given` came with the report; `changed()` is called after every change. */
function makeLabels(circuit, changed) {
  const key = `sparse-bridges labels ${circuit.fingerprint} ${circuit.key}`;
  const given = asLabels(circuit.labels);
  let kept = given;
  let stored = true;
  try {
    const found = localStorage.getItem(key);
    if (found !== null) kept = asLabels(JSON.parse(found));
  } catch {
    // what cannot be read is not shown
  }

  function keep(labels) {
    kept = labels;
    try {
      if (plain(kept) === plain(given)) localStorage.removeItem(key);
      else localStorage.setItem(key, plain(kept));
      stored = true;
    } catch {
      stored = false;
    }
    changed();
  }

  const of = (name) => kept.get(name) ?? asLabel({});
  return {
    of,
    /** Changes labels: `changes` has parts of a label by node. */
    set: (changes) => {
      const changed = mapped(changes, (part, name) => ({ ...of(name), ...part }));
      keep(asLabels({ ...Object.fromEntries(kept), ...changed }));
    },
    discard: () => keep(given),
    isGiven: () => plain(kept) === plain(given),
    isEmpty: () => kept.size === 0,
    isStored: () => stored,
    file: () => {
      const { key, fingerprint } = circuit;
      return `${JSON.stringify({ circuit: key, fingerprint, nodes: JSON.parse(plain(kept)) }, null, 1)}\n`;
    },
  };
}

const mapped = (object, made) =>
  Object.fromEntries(Object.entries(object).map(([name, value]) => [name, made(value, name)]));

const asText = (value) => (typeof value === "string" ? value.trim().slice(0, LONGEST_LABEL) : "");
const asLabel = (value) => ({
  label: asText(value?.label),
  group: asText(value?.group),
  pinned: value?.pinned === true,
});

/** A Map of labels by node in the order of names, without those that say nothing. */
function asLabels(object) {
  const all = Object.entries(object ?? {}).map(([name, value]) => [name, asLabel(value)]);
  const said = all.filter(([, { label, group, pinned }]) => label || group || pinned);
  return new Map(said.sort(([a], [b]) => (a < b ? -1 : 1)));
}

/** Labels as text, equal where they say the same. */
function plain(labels) {
  const short = (label) => Object.fromEntries(Object.entries(label).filter(([, value]) => value));
  return JSON.stringify(mapped(Object.fromEntries(labels), short));
}

/** The line that says where the labels are, with what can be done about it. */
function showKept(line, labels, circuit) {
  const file = `labels/${circuit.key}.json`;
  const button = (words, onclick) => el("button", { type: "button", onclick }, words);
  line.hidden = labels.isGiven() && labels.isEmpty();
  if (labels.isGiven()) {
    line.replaceChildren(el("span", {}, "Labels, pins and groups are those in the run's ", el("code", {}, file), "."));
    return;
  }
  const place = labels.isStored()
    ? "Your changes are in this browser alone."
    : "This browser keeps nothing: your changes are lost when you leave.";
  const how = [" To keep them with the run, download them into it as ", el("code", {}, file), ", and write the report again."];
  line.replaceChildren(
    el("span", {}, place, ...how),
    button("Download labels", () => save(labels.file(), `${circuit.key}.json`, "application/json")),
    button("Discard changes", labels.discard),
  );
}

/** The form of one node: what it is called, which group it is in, whether it is pinned. */
function labelForm(labels, circuit, name) {
  const { label, group, pinned } = labels.of(name);
  const groups = new Set(circuit.nodes.map((node) => labels.of(node.name).group).filter(Boolean));
  const input = (words, part, value, more = {}) =>
    el(
      "label",
      {},
      el("span", {}, words),
      el("input", {
        ...more,
        type: "text",
        value,
        maxlength: LONGEST_LABEL,
        autocomplete: "off",
        name: part,
        onchange: (event) => labels.set({ [name]: { [part]: event.target.value } }),
      }),
    );
  const names = el("datalist", { id: `groups-${circuit.key}` }, ...[...groups].map((value) => el("option", { value })));
  return el(
    "div",
    { class: "label-form screen" },
    input("Label", "label", label, { placeholder: "its meaning" }),
    input("Group", "group", group, { placeholder: "its name", list: `groups-${circuit.key}` }),
    names,
    el(
      "button",
      { type: "button", onclick: () => labels.set({ [name]: { pinned: !pinned } }) },
      pinned ? "Unpin" : "Pin",
    ),
  );
}
