"use strict";
// Tables sort by their heads, and the verdict table is filtered and paged. Without this script all rows are shown.

const COLLATOR = new Intl.Collator("en", { numeric: true });
const LAST = Number.NEGATIVE_INFINITY;

function key(row, column, words) {
  const text = row.cells[column].textContent.trim();
  if (words) return text;
  const number = parseFloat(text.replaceAll(",", ""));
  return Number.isNaN(number) ? LAST : number;
}

function sorted(rows, column, words, sign) {
  const keyed = rows.map((row) => [key(row, column, words), row]);
  const compare = words
    ? (a, b) => sign * COLLATOR.compare(a[0], b[0])
    : (a, b) => (a[0] === LAST || b[0] === LAST ? (b[0] === LAST) * -1 + (a[0] === LAST) : sign * (a[0] - b[0]));
  return keyed.sort(compare).map((pair) => pair[1]);
}

function makeSortable(table, show) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (head.classList.contains("drawn")) return;
    const words = head.classList.contains("words");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const up = before ? before === "descending" : words;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      show((rows) => sorted(rows, column, words, up ? 1 : -1));
    });
  });
}

for (const table of document.querySelectorAll("table.sortable:not(#verdict-table)")) {
  const body = table.tBodies[0];
  makeSortable(table, (order) => body.replaceChildren(...order([...body.rows])));
}

// the verdict table of a report: filtered, paged, and led to from the map
function pageThrough(verdicts) {
  const filter = document.querySelector(".filter");
  const { verdict, rows: size, back, next } = filter.elements;
  const search = filter.querySelector("input");
  const body = verdicts.tBodies[0];
  let rows = [...body.rows];
  let page = 0;

  function matches(row) {
    const [id, says, config] = [0, 1, 2].map((column) => row.cells[column].textContent);
    const asked = search.value.trim().toLowerCase();
    return (!verdict.value || says === verdict.value) && (id === asked || config.toLowerCase().includes(asked));
  }

  function show() {
    const found = rows.filter(matches);
    const each = Number(size.value) || found.length || 1;
    const pages = Math.max(1, Math.ceil(found.length / each));
    page = Math.min(Math.max(page, 0), pages - 1);
    const shown = found.slice(page * each, (page + 1) * each);
    body.replaceChildren(...shown);
    back.disabled = page === 0;
    next.disabled = page === pages - 1;
    const from = shown.length ? page * each + 1 : 0;
    filter.querySelector("output").textContent =
      `${from} to ${page * each + shown.length} of ${found.length} patterns`;
  }

  function showFrom(first) {
    page = first;
    show();
  }

  makeSortable(verdicts, (order) => { rows = order(rows); showFrom(0); });
  for (const control of [search, verdict, size]) control.addEventListener("input", () => showFrom(0));
  filter.addEventListener("submit", (event) => event.preventDefault());
  back.addEventListener("click", () => showFrom(page - 1));
  next.addEventListener("click", () => showFrom(page + 1));
  filter.hidden = false;
  show();

  document.querySelector("#map .chart").addEventListener("click", (event) => {
    const title = event.target.closest(".dot")?.querySelector("title").textContent;
    if (!title) return;
    search.value = title.match(/pattern (\d+)/)[1];
    verdict.value = "";
    showFrom(0);
    document.getElementById("verdicts").scrollIntoView();
  });
}

const verdicts = document.getElementById("verdict-table");
if (verdicts) pageThrough(verdicts);

// paper cannot be opened
let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not(.node):not([open])")];
  opened.forEach((one) => { one.open = true; });
});
window.addEventListener("afterprint", () => opened.forEach((one) => { one.open = false; }));
