// A view as a table, drawn when it is opened; and tables whose cells are tinted buttons.

import { textTint } from "./colour.js";
import { el } from "./dom.js";
import { oneTabStop } from "./tab_stops.js";

const MOST_ROWS = 2000; // of a table on the page; the CSV has all

/** @param {() => Rows} makeRows */
export function asTable(makeRows) {
	const body = el("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Table" });
	const fill = (/** @type {any} */ { target }) => {
		const isNew = !target.isConnected; // and takes the place of an open one
		if (target.open || isNew) target.lastElementChild.replaceChildren(table(makeRows()));
	};
	const props = { class: "astable", on: { toggle: fill } };
	return el("details", props, el("summary", {}, "as a table"), body);
}

/** What says that a table goes on. @param {number} least its width @param {number} room in pixels */
export const slideHint = (least, room) =>
	least > room ? el("caption", {}, "slide sideways: more columns →") : null;

/** Four significant digits of a number. @param {string | number} x */
function shown(x) {
	if (typeof x !== "number" || Number.isInteger(x) || !Number.isFinite(x)) return x;
	return Math.abs(x) < 1e-4 ? x.toExponential(1) : Number(x.toPrecision(4));
}

/** @param {Rows} rows */
export function table([head, ...rows]) {
	const first = rows.slice(0, MOST_ROWS);
	const more = rows.length - first.length;
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
			first.map(([name, ...rest]) =>
				el(
					"tr",
					{},
					el("th", { scope: "row" }, shown(name)),
					rest.map((x) => el("td", {}, shown(x))),
				),
			),
		),
		more ? el("caption", {}, `${more} more rows: save the CSV`) : null,
	);
}

/**
 * As CSV (RFC 4180). A text that a spreadsheet would compute gets an apostrophe before it.
 * @param {Rows} rows
 */
export function toCsv(rows) {
	const field = (/** @type {string | number} */ x) => {
		if (typeof x === "number") return Number.isFinite(x) ? String(Number(x.toPrecision(8))) : "";
		const number = x.replace("−", "-");
		if (number !== "" && Number.isFinite(Number(number))) return number;
		const safe = /^[=+\-@\t\r]/.test(x) ? `'${x}` : x;
		return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
	};
	return rows.map((row) => row.map(field).join(",")).join("\r\n") + "\r\n";
}

/**
 * @typedef {object} TintedCell
 * @property {string} text
 * @property {string} title what it is, with its number
 * @property {Quantity} quantity
 * @property {number} alpha
 * @property {boolean} isPressed
 * @property {() => void} choose
 */

/** @param {TintedCell} cell */
export function tintedCell({ text, title, quantity, alpha, isPressed, choose }) {
	const { background, text: color } = textTint(quantity, alpha);
	return el(
		"button",
		{
			title,
			"aria-label": title,
			"aria-pressed": String(isPressed),
			style: { background, color },
			on: { click: choose },
		},
		text,
	);
}

/**
 * @param {string[]} columns
 * @param {[Child, (TintedCell | null)[]][]} rows
 * @param {number} room in pixels
 * @param {string} label what it shows, for a screen reader
 */
export function tintedTable(columns, rows, room, label) {
	const least = 32 + columns.length * 44;
	const head = columns.map((title) => el("th", { scope: "col" }, title));
	const body = rows.map(([label, cells]) => {
		const row = cells.map((cell) => el("td", {}, cell && tintedCell(cell)));
		return el("tr", {}, el("th", { scope: "row" }, label), row);
	});
	return numberGrid(
		{ class: "switches", "aria-label": label, style: { "min-width": `${least}px` } },
		slideHint(least, room),
		el("thead", {}, el("tr", {}, el("th", { class: "corner" }), head)),
		el("tbody", {}, body),
	);
}

/** A table of buttons, with one tab stop. @param {Props} props @param {Child[]} parts */
export const numberGrid = (props, ...parts) =>
	oneTabStop(props["aria-label"], el("table", { role: "grid", ...props }, parts));
