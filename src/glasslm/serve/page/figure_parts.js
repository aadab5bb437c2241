// The small parts of all figures: numbers that lead to their origin, legends, choices, reasons.

import { diverging, tint } from "./colour.js";
import { el } from "./dom.js";
import { store } from "./state.js";

/**
 * A number that leads to its origin.
 * @param {Child} text
 * @param {string} key `VIEW.REST`, which the view's `origin` reads
 */
export function number(text, key) {
	return el(
		"button",
		{
			class: "n",
			title: "where this number comes from",
			"aria-current": String(store.state.n === key),
			on: { click: () => store.set({ n: key }) },
		},
		text,
	);
}

/** @param {Child} text */
export const strong = (text) => el("b", {}, text);

/**
 * The colours from one value to another. `power` and `top`: how the figure makes an alpha of a value.
 * @param {Quantity} quantity
 * @param {{low: string, high: string, what?: string, power?: number, top?: number}} labels
 */
export function legend(quantity, { low, high, what = "", power = 1, top = 1 }) {
	const stops = [0, 0.1, 0.25, 0.5, 0.75, 1].map(
		(x) => `${tint(quantity, x ** power * top)} ${x * 100}%`,
	);
	const bar = el("i", { style: { background: `linear-gradient(90deg, ${stops.join(", ")})` } });
	return el("span", { class: "key" }, what ? `${what} ` : "", low, bar, high);
}

/** From what helps to what costs. @param {string} low @param {string} high */
export function divergingLegend(low, high) {
	const stops = [-1, -0.5, -0.15, 0, 0.15, 0.5, 1].map((x) => {
		const { quantity, alpha } = diverging(x, 1);
		return `${tint(quantity, alpha)} ${50 + 50 * x}%`;
	});
	const background = `linear-gradient(90deg, ${stops.join(", ")})`;
	return el("span", { class: "key" }, low, el("i", { class: "both", style: { background } }), high);
}

/**
 * Buttons of which one is chosen.
 * @param {string} label
 * @param {[string, string][]} choices value and words
 * @param {string} chosen
 * @param {(value: string) => void} choose
 */
export function segments(label, choices, chosen, choose) {
	const buttons = choices.map(([value, words]) =>
		el(
			"button",
			{
				"aria-pressed": String(value === chosen),
				on: { click: () => choose(value) },
			},
			words,
		),
	);
	return el("span", { class: "seg", role: "group", "aria-label": label }, buttons);
}

/** Why there is nothing to see, and what to do. @param {string} what @param {Child[]} rest */
export const empty = (what, ...rest) => el("div", { class: "empty" }, el("b", {}, what), " ", rest);

/**
 * A canvas on which one draws in CSS pixels.
 * @param {number} width
 * @param {number} height
 * @returns {[HTMLCanvasElement, CanvasRenderingContext2D]}
 */
export function makeCanvas(width, height) {
	const ratio = Math.min(3, devicePixelRatio || 1);
	const canvas = el("canvas", {
		width: Math.max(1, Math.round(width * ratio)),
		height: Math.max(1, Math.round(height * ratio)),
		style: { width: `${width}px`, height: `${height}px` },
	});
	const context = canvas.getContext("2d");
	context.scale(ratio, ratio);
	return [canvas, context];
}

/**
 * A button without the looks of one.
 * @param {Child | Child[]} content
 * @param {() => void} act
 * @param {Props} [props]
 */
export const tool = (content, act, props = {}) =>
	el("button", { class: "tool", ...props, on: { click: act } }, content);

/** The page's monospaced type, for canvases. @param {number} px @param {number} [weight] */
export const monospace = (px, weight = 500) =>
	`${weight} ${px}px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace`;

/**
 * Text in a cell of a canvas, cut with an ellipsis where it does not fit.
 * @param {CanvasRenderingContext2D} context
 * @param {string} text
 * @param {number} x centre
 * @param {number} y baseline
 * @param {number} width
 */
export function cellText(context, text, x, y, width) {
	const fits = Math.max(1, Math.floor(width / context.measureText("0").width + 0.01));
	const characters = [...text];
	const shown = characters.length > fits ? `${characters.slice(0, fits - 1).join("")}…` : text;
	context.textAlign = "center";
	context.fillText(fits === 1 && characters.length > 1 ? characters[0] : shown, x, y);
}
