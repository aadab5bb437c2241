// Any figure as a table, drawn when it is opened.

import { el } from "./dom.js";

const MOST_ROWS = 2000; // of a table on the page; the CSV has all

/** @param {() => import("./scene.js").Rows} makeRows */
export function asTable(makeRows) {
  const body = el("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Table" });
  const details = el(
    "details",
    { class: "astable", on: { toggle: (/** @type {Event} */ event) => fill(event.target) } },
    el("summary", {}, "as a table"),
    body,
  );
  /** @param {any} opened */
  function fill(opened) {
    if (opened.open) opened.lastElementChild.replaceChildren(table(makeRows()));
  }
  return details;
}

/** @param {import("./scene.js").Rows} rows */
function table([head, ...rows]) {
  const shown = rows.slice(0, MOST_ROWS);
  const more = rows.length - shown.length;
  return el(
    "table",
    {},
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        head.map((x) => el("th", { scope: "col" }, x)),
      ),
    ),
    el(
      "tbody",
      {},
      shown.map(([first, ...rest]) =>
        el(
          "tr",
          {},
          el("th", { scope: "row" }, first),
          rest.map((x) => el("td", {}, x)),
        ),
      ),
    ),
    more ? el("caption", {}, `${more} more rows: save the CSV`) : null,
  );
}

/**
 * As CSV (RFC 4180). A text that a spreadsheet would compute gets an apostrophe before it.
 * @param {import("./scene.js").Rows} rows
 */
export function toCsv(rows) {
  const field = (/** @type {string | number} */ x) => {
    if (typeof x === "number") return String(x);
    const number = x.replace("−", "-");
    if (number !== "" && Number.isFinite(Number(number))) return number;
    const safe = /^[=+\-@\t\r]/.test(x) ? `'${x}` : x;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return rows.map((row) => row.map(field).join(",")).join("\r\n") + "\r\n";
}
