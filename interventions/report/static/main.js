"use strict";

const report = JSON.parse(document.getElementById("data").textContent);

for (const figure of document.querySelectorAll("figure.chart")) makeChart(figure, report.charts[figure.dataset.chart]);

const choice = document.getElementById("circuit-choice");
const articles = [...document.querySelectorAll("article.circuit")];

/** Shows one circuit; its explorer is made when it is first seen. */
function showCircuit(key) {
  for (const article of articles) {
    article.hidden = article.dataset.circuit !== key;
    if (article.hidden || article.dataset.ready) continue;
    article.dataset.ready = "yes";
    makeExplorer(article, report.circuits[key], report.tokens, report.name);
  }
}

if (articles.length) showCircuit(articles[0].dataset.circuit);
choice?.addEventListener("change", () => showCircuit(choice.value));
for (const link of choice ? document.querySelectorAll("[data-show]") : []) {
  link.addEventListener("click", () => {
    choice.value = link.dataset.show;
    showCircuit(choice.value);
  });
}

// On a phone a row becomes a block whose cells carry the names of their columns.
for (const table of document.querySelectorAll(".scroll > table")) {
  const heads = [...(table.tHead?.rows[table.tHead.rows.length - 1].cells ?? [])].map((head) => head.textContent.trim());
  const groups = [...(table.tHead?.rows.length > 1 ? table.tHead.rows[0].cells : [])].flatMap((group) =>
    Array(group.colSpan).fill(group.textContent.trim()),
  );
  for (const row of table.tBodies[0].rows)
    for (const [at, cell] of [...row.cells].entries())
      cell.dataset.label = [groups[at], heads[at]].filter(Boolean).join(", ");
  table.classList.add("stacks");
}

document.getElementById("theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
systemDark.addEventListener("change", themeChanged);

// Paper is white, and narrower than the window.
const PAPER = 330;
let screenTheme = null;
addEventListener("beforeprint", () => {
  screenTheme = document.documentElement.dataset.theme ?? "";
  document.documentElement.dataset.theme = "light";
  for (const chart of charts) resize(chart, chart.plot.closest(".wide") ? 2 * PAPER : PAPER);
  themeChanged();
});
addEventListener("afterprint", () => {
  if (screenTheme) document.documentElement.dataset.theme = screenTheme;
  else delete document.documentElement.dataset.theme;
  for (const chart of charts) resize(chart);
  themeChanged();
});
