"use strict";
// what is folded is printed too, and folded again afterwards
const folded = new Set();
addEventListener("beforeprint", () => document.querySelectorAll("details:not([open])").forEach((d) => { folded.add(d); d.open = true; }));
addEventListener("afterprint", () => { folded.forEach((d) => { d.open = false; }); folded.clear(); });
// a column's heading sorts its table: numbers as numbers, the other way round at the second click
document.querySelectorAll("table.sortable").forEach((table) => {
  const body = table.tBodies[0], rows = [...body.rows];
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim(), number = parseFloat(text.replace("−", "-"));
    return Number.isNaN(number) ? text : number;
  };
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
      const place = new Map(rows.map((row, n) => [row, n]));
      const sorted = [...rows].sort((a, b) => {
        const x = value(a, column), y = value(b, column);
        const order = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? -1 : 1;
        return down * order || place.get(a) - place.get(b);
      });
      body.append(...sorted);
    });
  });
});
