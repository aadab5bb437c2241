// One head's attention pattern as a square: who looks (rows) at what (columns).

import { channels, palette } from "./colour.js";
import { el } from "./dom.js";
import { keptCanvas } from "./drawn.js";
import { makeCanvas, monospace } from "./figure_parts.js";
import { store } from "./state.js";
import { hideTip, showTip } from "./tip.js";
import { fixed, glyphs, headName, quotedWhole } from "./words.js";

const POWER = 0.75; // of a weight, which gives its alpha
const VISIBLE_WEIGHT = 0.01;
const LARGEST_CELL_PX = 28;
const LABEL_PX = 14; // the smallest column that has room for a token's first character

/**
 * A square pattern: one pixel a cell, then enlarged.
 * @param {ArrayLike<number>} weights rows of the pattern, one after the other
 * @param {number} size rows and columns
 * @param {number} side in pixels
 * @param {number} [scale] of the weights
 * @returns {HTMLCanvasElement}
 */
export function drawPattern(weights, size, side, scale = 1) {
	const image = new ImageData(size, size);
	const pixels = new Uint32Array(image.data.buffer);
	const [look, sink] = [palette.look, palette.sink].map((colour) => {
		const [r, g, b] = channels(colour);
		return r | (g << 8) | (b << 16);
	});
	for (let i = 0; i < size * size; i++) {
		const weight = weights[i] * scale;
		if (i % size > i / size) pixels[i] = sink | (255 << 24);
		else if (weight > VISIBLE_WEIGHT) pixels[i] = look | ((255 * weight ** POWER) << 24);
	}
	const cells = el("canvas", { width: size, height: size });
	cells.getContext("2d").putImageData(image, 0, 0);
	const [canvas, context] = makeCanvas(side, side);
	context.fillStyle = palette.card;
	context.fillRect(0, 0, side, side);
	context.imageSmoothingEnabled = side < size;
	context.drawImage(cells, 0, 0, side, side);
	return canvas;
}

/**
 * A head's pattern for pointer and keyboard. The row of the caret is framed; a click on a cell stands
 * at its row and shows where its weight comes from.
 * @param {Scene} scene
 * @param {{weight: Tensor | undefined, layer: number, head: number,
 *   side: number, withTokens?: boolean, id: string}} given `weight` (T, T)
 */
export function headPattern(scene, { weight, layer, head, side, withTokens = false, id }) {
	const T = scene.length;
	const whole = Math.max(1, Math.floor((side / T) * 2) / 2); // half pixels keep cells equal
	const z = Math.min(LARGEST_CELL_PX, whole * T <= side ? whole : side / T);
	const canvas = keptCanvas(id, [weight, z * T], () => drawPattern(weight?.data ?? [], T, z * T));
	const frame = el("span", {
		class: "row-frame",
		style: {
			top: `${scene.t * z}px`,
			width: `${(scene.t + 1) * z}px`,
			height: `${Math.max(2, z)}px`,
		},
	});
	const tell = (/** @type {any} */ at, /** @type {number} */ i, /** @type {number} */ j) => {
		const from = `${i} ${quotedWhole(scene.text.tokens[i].text)}`;
		const to = `${j} ${quotedWhole(scene.text.tokens[j].text)}`;
		showTip(at, `${fixed(weight?.at(i, j) ?? 0, 3)}: from ${from} to ${to}`, "click: stand here");
	};
	const find = (/** @type {any} */ event) => {
		const box = event.currentTarget.getBoundingClientRect();
		const i = Math.floor((event.clientY - box.top) / z);
		const j = Math.floor((event.clientX - box.left) / z);
		return i >= 0 && i < T && j >= 0 && j <= i ? [i, j] : null;
	};
	const square = el(
		"div",
		{
			class: "pattern",
			"data-key": id,
			role: "img",
			"aria-label":
				`Attention pattern of head ${headName(layer, head)}; the table of Attention has the row of ` +
				"the caret",
			style: { width: `${z * T}px`, height: `${z * T}px` },
			on: {
				pointermove: (event) => {
					const cell = find(event);
					if (cell) tell(event, cell[0], cell[1]);
					else hideTip();
				},
				pointerleave: hideTip,
				click: (event) => {
					const cell = find(event);
					if (!cell) return;
					store.set({ t: cell[0], layer, head, n: `attention.${layer}.${head}.${cell[1]}` });
				},
			},
		},
		canvas,
		frame,
	);
	if (!withTokens || z < LABEL_PX / 2) return square;
	return withTokenNames(scene, square, z);
}

/** @param {Scene} scene @param {HTMLElement} square @param {number} z */
function withTokenNames(scene, square, z) {
	const side = 22;
	const size = Math.min(13, Math.max(7, z));
	const names = (/** @type {boolean} */ isAcross) => {
		const [canvas, context] = makeCanvas(
			isAcross ? z * scene.length : side,
			isAcross ? side : z * scene.length,
		);
		context.font = monospace(size);
		context.textAlign = "center";
		context.textBaseline = "middle";
		scene.text.tokens.forEach(({ text }, t) => {
			context.fillStyle = t === scene.t ? palette.ink : palette.soft;
			const glyph = [...glyphs(text)][0] ?? "";
			const middle = (t + 0.5) * z;
			if (isAcross) context.fillText(glyph, middle, side / 2);
			else context.fillText(glyph, side / 2, middle);
		});
		return canvas;
	};
	return el("div", { class: "with-names" }, el("span"), names(true), names(false), square);
}
