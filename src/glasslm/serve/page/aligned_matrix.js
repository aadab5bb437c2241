// A figure whose columns are the ruler's: labelled rows of cells, for pointer and keyboard.

import { columnX, positions } from "./columns.js";
import { announce, el } from "./dom.js";
import { keptCanvas } from "./drawn.js";
import { makeCanvas } from "./figure_parts.js";
import { store } from "./state.js";
import { hideTip, showTip } from "./tip.js";

/** Where the keyboard stands in each figure: row and position. @type {Map<string, number[]>} */
const cursors = new Map();

/** @param {Scene} scene @param {Matrix} matrix @returns {HTMLElement} */
export function alignedMatrix(scene, matrix) {
	const { columns } = scene;
	const { tops, height } = stack(matrix);
	const { count, first, width } = columns;
	const draw = () => {
		const [canvas, context] = makeCanvas(count * width, height + (matrix.extra ?? 0));
		matrix.rows.forEach((_, row) => {
			matrix.paintRow?.(context, row, tops[row]);
			for (const t of positions(columns)) {
				const cell = { x: columnX(columns, t), y: tops[row] };
				matrix.paint(context, row, t, { ...cell, width, height: matrix.rowHeight });
			}
		});
		return canvas;
	};
	const { shows } = matrix;
	const canvas = shows ? keptCanvas(matrix.id, [shows, count, first, width], draw) : draw();
	const frame = el("span", { class: "cell", hidden: true });
	const cells = el(
		"div",
		{
			class: "cells",
			tabindex: 0,
			role: "application",
			"aria-roledescription": "figure",
			"aria-label": `${matrix.label}. Arrow keys move from cell to cell, Enter chooses.`,
			style: { "margin-left": `${columns.gutter}px`, width: `${count * width}px` },
			on: cellHandlers(scene, matrix, tops),
		},
		canvas,
		frame,
	);
	const caret = el("span", {
		class: "cross",
		hidden: scene.t < columns.first - 1 || scene.t >= columns.first + columns.count,
		style: { left: `${columns.gutter + columnX(columns, scene.t + 1)}px` },
	});
	const labels = matrix.rows.map((row, i) => rowLabel(row, tops[i], matrix.rowHeight));
	const id = { "data-key": matrix.id };
	return el("figure", { class: "fig", ...id }, el("div", { class: "rows" }, labels), cells, caret);
}

/** @param {Matrix} matrix the top of each row, and the height of all */
function stack(matrix) {
	let height = 0;
	const tops = matrix.rows.map((_, i) => {
		height += matrix.gap?.(i) ?? 0;
		const top = height;
		height += matrix.rowHeight;
		return top;
	});
	return { tops, height };
}

/** @param {RowLabel} row @param {number} top @param {number} height */
function rowLabel(row, top, height) {
	const style = { top: `${top}px`, height: `${height}px`, "line-height": `${height}px` };
	if (!row.choose) return el("span", { title: row.title, style }, row.label);
	const pressed = { "aria-pressed": String(Boolean(row.isPressed)) };
	const props = { title: row.title, tabindex: row.isPressed ? 0 : -1, style };
	return el("button", { ...props, ...pressed, on: { click: row.choose } }, row.label);
}

/** @param {Scene} scene @param {Matrix} matrix @param {number[]} tops */
function cellHandlers(scene, matrix, tops) {
	const { columns } = scene;
	const last = columns.first + columns.count - 1;

	/** @param {any} event */
	function find(event) {
		const box = event.currentTarget.getBoundingClientRect();
		const y = event.clientY - box.top;
		const row = tops.findIndex((top) => y >= top && y < top + matrix.rowHeight);
		const t = columns.first + Math.floor((event.clientX - box.left) / columns.width);
		return row < 0 || t < columns.first || t > last ? null : [row, t];
	}

	/** @param {any} at @param {number} row @param {number} t */
	function explain(at, row, t) {
		const [text, detail] = matrix.describe(row, t);
		showTip(at, text, detail);
		store.look(matrix.preview?.(row, t) ?? {});
		return detail ? `${text}; ${detail}` : text;
	}

	/** Where the keyboard stands, kept inside the figure. */
	function cursor() {
		const [row, t] = cursors.get(matrix.id) ?? [0, scene.t];
		const bounded = [
			Math.max(0, Math.min(matrix.rows.length - 1, row)),
			Math.max(columns.first, Math.min(last, t)),
		];
		cursors.set(matrix.id, bounded);
		return bounded;
	}

	/** @param {any} element */
	function showCursor(element) {
		const [row, t] = cursor();
		const frame = element.querySelector(".cell");
		frame.hidden = false;
		frame.style.left = `${columnX(columns, t) - 1}px`;
		frame.style.top = `${tops[row] - 1}px`;
		frame.style.width = `${columns.width + 1}px`;
		frame.style.height = `${matrix.rowHeight + 1}px`;
		const box = frame.getBoundingClientRect();
		announce(explain({ clientX: box.right, clientY: box.bottom - 8 }, row, t));
	}

	function leave() {
		hideTip();
		store.look({});
	}

	return {
		pointermove: (/** @type {any} */ event) => {
			const cell = find(event);
			if (cell) explain(event, cell[0], cell[1]);
			else leave();
		},
		pointerleave: leave,
		click: (/** @type {any} */ event) => {
			const cell = find(event);
			if (cell) matrix.choose?.(cell[0], cell[1]);
		},
		focus: (/** @type {any} */ event) => {
			if (event.currentTarget.matches(":focus-visible")) showCursor(event.currentTarget);
		},
		blur: (/** @type {any} */ event) => {
			event.currentTarget.querySelector(".cell").hidden = true;
			leave();
		},
		keydown: (/** @type {any} */ event) => {
			const move = ARROWS[event.key];
			if (event.ctrlKey || event.metaKey || event.altKey || (!move && event.key !== "Enter"))
				return;
			event.preventDefault();
			event.stopPropagation();
			const [row, t] = cursor();
			if (!move) return matrix.choose?.(row, t);
			cursors.set(matrix.id, [row + move[0], t + move[1]]);
			showCursor(event.currentTarget);
		},
	};
}

/** @type {Record<string, number[]>} rows and positions */
const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
