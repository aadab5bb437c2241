// A figure of the residual stream: its places down, the ruler's positions across, up to the caret.

import { alignedMatrix } from "./aligned_matrix.js";
import { palette } from "./colour.js";
import { store } from "./state.js";

const ROW_PX = 22;

/** Where a place of the stream is: 0 is the embedding. @param {number} place */
export const streamWords = (place) => (place ? `after layer ${place - 1}` : "at the embedding");

/** The name of a place in engines/inspection. @param {number} place */
export const streamName = (place) => (place ? `blocks.${place - 1}` : "embedding");

/**
 * @param {Scene} scene
 * @param {{id: string, label: string, colour: (place: number, t: number) => string | null,
 *   describe: (place: number, t: number) => [string, string?], later: string}} figure
 *   `later`: what is said of positions after the caret. A cell is the number `ID.PLACE.T`.
 */
export function streamFigure(scene, { id, label, colour, describe, later }) {
	const { isWide } = scene.columns;
	const name = (/** @type {number} */ place) => {
		if (!place) return isWide ? "embedding" : "emb";
		return isWide ? streamWords(place) : String(place - 1);
	};
	return alignedMatrix(scene, {
		id: id.replace(".", "-"),
		label,
		rows: Array.from({ length: scene.layers + 1 }, (_, place) => ({ label: [name(place)] })),
		rowHeight: ROW_PX,
		paint: (context, place, t, { x, y, width, height }) => {
			const isLater = t > scene.t;
			context.fillStyle = isLater ? palette.sink : palette.card;
			context.fillRect(x, y, isLater ? width : width - 1, height - 1);
			const tint = isLater ? null : colour(place, t);
			if (!tint) return;
			context.fillStyle = tint;
			context.fillRect(x, y, width - 1, height - 1);
		},
		describe: (place, t) => (t > scene.t ? [later] : describe(place, t)),
		choose: (place, t) => {
			if (t <= scene.t) store.set({ n: `${id}.${place}.${t}` });
		},
	});
}
