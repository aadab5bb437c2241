// A table whose cells are buttons, each tinted by its number.

import { textTint } from "./colour.js";
import { el } from "./dom.js";
import { slideHint } from "./table.js";

/**
 * @typedef {object} TintedCell
 * @property {string} text
 * @property {string} title what it is, with its number
 * @property {import("./colour.js").Quantity} quantity
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
			type: "button",
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
 * @param {[import("./dom.js").Child, (TintedCell | null)[]][]} rows
 * @param {number} room in pixels
 */
export function tintedTable(columns, rows, room) {
	const least = 32 + columns.length * 44;
	const head = columns.map((title) => el("th", { scope: "col" }, title));
	const body = rows.map(([label, cells]) => {
		const row = cells.map((cell) => el("td", {}, cell && tintedCell(cell)));
		return el("tr", {}, el("th", { scope: "row" }, label), row);
	});
	return el(
		"table",
		{ class: "switches", style: { "min-width": `${least}px` } },
		slideHint(least, room),
		el("thead", {}, el("tr", {}, el("th", { class: "corner" }), head)),
		el("tbody", {}, body),
	);
}
