// A lane of changes of every token's loss, on the ruler's columns.

import { alignedMatrix } from "./aligned_matrix.js";
import { palette, tint } from "./colour.js";
import { el } from "./dom.js";
import { store } from "./state.js";
import { fixed } from "./words.js";

const LANE_PX = 44;
const LEAST_RANGE = 0.05; // nats, that the whole height stands for

/**
 * Up is worse, down is better, on a square-root scale.
 * @param {Scene} scene
 * @param {{id: string, label: string, short: string, change: (t: number) => number,
 *   describe: (t: number) => [string, string?]}} lane
 */
export function changeLane(scene, { id, label, short, change, describe }) {
	let most = LEAST_RANGE;
	for (let t = 1; t < scene.length; t++) most = Math.max(most, Math.abs(change(t)) || 0);
	const middle = LANE_PX / 2;
	const figure = alignedMatrix(scene, {
		id,
		label,
		rows: [{ label: [scene.columns.isWide ? short : "Δ"] }],
		rowHeight: LANE_PX,
		paint: (context, _, t, { x, width }) => {
			context.fillStyle = palette.line;
			context.fillRect(x, middle - 0.5, width, 1);
			if (t === 0) return;
			const height = Math.sqrt(Math.abs(change(t)) / most) * (middle - 2);
			context.fillStyle = tint(change(t) > 0 ? "cost" : "look", 0.85);
			const top = change(t) > 0 ? middle - height : middle;
			context.fillRect(x + 2, top, width - 4, Math.max(0.6, height));
		},
		describe: (_, t) => (t === 0 ? [`nothing predicts the first ${scene.unit}`] : describe(t)),
		choose: (_, t) => store.set({ t: Math.max(0, t - 1) }),
	});
	const words = `nats; up: worse, down: better; the largest change is ${fixed(most)}`;
	const caption = el("figcaption", {}, `${words} (square-root scale)`);
	return el("div", { class: "lane-figure" }, figure, caption);
}
