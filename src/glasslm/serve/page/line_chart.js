// Curves with their names at their ends, as SVG.

import { palette } from "./colour.js";
import { el } from "./dom.js";

const LEFT = 40;
const TOP = 20;
const BOTTOM = 34;
const NAME_PX = 7.9; // a character of a line's name
const LINE_PX = 13; // between two names

/** @param {Chart} chart */
export function lineChart({ title, width, height, xAxis, yAxis, lines, mark, describe }) {
	const longest = Math.max(0, ...lines.map(({ name }) => [...name].length));
	const right = Math.max(14, 12 + longest * NAME_PX);
	const least = xAxis.least ?? 0;
	const x = (/** @type {number} */ value) =>
		LEFT + ((value - least) / (xAxis.most - least || 1)) * (width - LEFT - right);
	const y = (/** @type {number} */ value) => {
		const share = (value - yAxis.least) / (yAxis.most - yAxis.least || 1);
		return TOP + (height - TOP - BOTTOM) * (1 - Math.max(0, Math.min(1, share)));
	};
	const bottom = height - BOTTOM;
	const centre = (LEFT + width - right) / 2;
	return el(
		"svg",
		{
			viewBox: `0 0 ${width} ${height}`,
			width,
			height,
			role: "img",
			"aria-label": describe,
		},
		el("text", { x: LEFT, y: 11, class: "strong" }, title),
		yAxis.ticks.flatMap((tick) => [
			el("line", { x1: LEFT, x2: width - right, y1: y(tick), y2: y(tick), stroke: palette.line }),
			el("text", { x: LEFT - 5, y: y(tick) + 4, "text-anchor": "end" }, yAxis.format(tick)),
		]),
		xAxis.ticks.map(({ at, text }) =>
			el("text", { x: x(at), y: bottom + 16, "text-anchor": "middle" }, text),
		),
		el("text", { x: centre, y: height - 3, "text-anchor": "middle" }, xAxis.label),
		mark === null || mark === undefined
			? null
			: el("line", {
					x1: x(mark),
					x2: x(mark),
					y1: TOP,
					y2: bottom,
					stroke: palette.ink,
					opacity: 0.5,
				}),
		lines.flatMap((line) => curve(line, x, y)),
		endNames(lines, y, bottom).map(({ line, top }) =>
			el(
				"text",
				{
					x: width - right + 6,
					y: top,
					class: "glyph",
					style: { "font-weight": line.isStrong ? "700" : "500" },
				},
				line.name,
				line.title && el("title", {}, line.title),
			),
		),
	);
}

/** @param {number[]} point */
export const hasValue = ([, value]) => Number.isFinite(value);

/** @param {Line} line @param {(x: number) => number} x @param {(y: number) => number} y */
function curve(line, x, y) {
	const points = line.points.filter(hasValue);
	/** @type {string[][]} the line has a gap where a value is missing */
	const pieces = [[]];
	for (const point of line.points) {
		if (!hasValue(point)) pieces.push([]);
		else pieces.at(-1)?.push(`${x(point[0]).toFixed(1)},${y(point[1]).toFixed(1)}`);
	}
	const stroke = { stroke: line.colour, "stroke-width": line.width ?? 1.8, fill: "none" };
	const dots = line.withDots
		? points.map(([a, b]) => el("circle", { cx: x(a), cy: y(b), r: 2.4, fill: line.colour }))
		: [];
	return [
		...pieces.map((piece) =>
			el("polyline", { points: piece.join(" "), ...stroke, "stroke-dasharray": line.dash || null }),
		),
		...dots,
	];
}

/**
 * The names at the ends of the lines, moved apart.
 * @param {Line[]} lines
 * @param {(y: number) => number} y
 * @param {number} bottom
 */
function endNames(lines, y, bottom) {
	const ends = lines
		.flatMap((line) => {
			const last = line.points.filter(hasValue).at(-1);
			return last ? [{ line, top: y(last[1]) + 4 }] : [];
		})
		.sort((a, b) => a.top - b.top);
	for (let i = 1; i < ends.length; i++) {
		ends[i].top = Math.max(ends[i].top, ends[i - 1].top + LINE_PX);
	}
	const lowest = bottom + 6;
	const last = ends.at(-1);
	if (last && last.top > lowest) {
		last.top = lowest;
		for (let i = ends.length - 2; i >= 0; i--) {
			ends[i].top = Math.min(ends[i].top, ends[i + 1].top - LINE_PX);
		}
	}
	return ends;
}
