// The second text of Patch, and the loss when its stream is copied into the first, place by place.

import { alignedMatrix } from "../aligned_matrix.js";
import { diverging, palette, tint } from "../colour.js";
import { el } from "../dom.js";
import { cellText, divergingLegend, empty, monospace, tool } from "../figure_parts.js";
import { store } from "../state.js";
import { streamFigure, streamName, streamWords } from "../stream_figure.js";
import { fixed, glyphs, plural, quoted, quotedWhole, signed } from "../words.js";

const PORTION_FLOPS = 2e10; // of one answer about patches
const LEAST_RANGE = 0.2; // nats, that a full colour stands for
const CHANGED = 1e-4; // nats; smaller changes are rounding
const MOST_LINES = 8; // of the field of the second text

/**
 * The cost of reading the text up to the caret once, in floating-point operations.
 * @param {Scene} scene
 */
const passFlops = (scene) => 2 * scene.run.parameters * (scene.t + 1);

/**
 * The token whose loss counts: the one that comes, or at the end the first choice.
 * @param {Scene} scene
 */
export const goalOf = (scene) =>
	scene.target ?? scene.answer(`ablate?t=${scene.t}`)?.arrays.ids.at(0) ?? 0;

/** The field of the second text, and its figure. @param {Scene} scene */
export function secondText(scene) {
	const field = el("textarea", {
		rows: Math.min(MOST_LINES, scene.text.text.split("\n").length + 1),
		value: scene.state.other ?? scene.text.text,
		spellcheck: "false",
		on: {
			input: (event) => {
				const other = event.target.value;
				store.set({ other: other === scene.text.text ? null : other });
			},
			keydown: (event) => event.stopPropagation(),
		},
	});
	const hint = "change some of it: its stream is copied into this text, one place at a time";
	const note = scene.secondProblem || scene.second?.cut;
	const box = el(
		"div",
		{ class: "second indented" },
		el("label", {}, "Second text: ", hint, field),
		note && el("p", { class: "note" }, note),
	);
	return el("div", {}, box, scene.second ? copies(scene, scene.second) : null);
}

/**
 * The first position at which two texts differ.
 * @param {Scene} scene
 * @param {TokenizedText} second
 */
function firstDifference(scene, second) {
	const tokens = scene.text.tokens;
	const at = tokens.findIndex((token, t) => token.id !== second.tokens[t]?.id);
	return at < 0 ? tokens.length : at;
}

/** The positions that can be patched and are in sight. @param {Scene} scene */
function patchedRange(scene) {
	if (!scene.second) return null;
	const { first, count } = scene.columns;
	const from = Math.max(first, firstDifference(scene, scene.second));
	const to = Math.min(first + count - 1, scene.t, scene.second.tokens.length - 1);
	return from <= to ? { from, to } : null;
}

/** @param {Scene} scene */
const portion = (scene) => Math.max(2, Math.min(64, Math.floor(PORTION_FLOPS / passFlops(scene))));

/**
 * The portion that holds a position of a place.
 * @param {Scene} scene
 * @param {number} place
 * @param {number} p
 */
function patchAsk(scene, place, p) {
	const size = portion(scene);
	const first = Math.floor(p / size) * size;
	const last = Math.min(scene.t, first + size - 1);
	const other = scene.second?.id;
	return `patch?t=${scene.t}&other=${other}&place=${place}&first=${first}&last=${last}`;
}

/** @param {Scene} scene @returns {string[]} */
export function patchAsks(scene) {
	const range = patchedRange(scene);
	if (!range || !scene.state.open.includes("patch")) return [];
	const asks = new Set();
	for (let p = range.to; p >= range.from; p = Math.floor(p / portion(scene)) * portion(scene) - 1) {
		for (let place = 0; place <= scene.layers; place++) asks.add(patchAsk(scene, place, p));
	}
	return [...asks];
}

/**
 * The change of the goal's loss by a patch; null where it is not here.
 * @param {Scene} scene
 * @param {number} place
 * @param {number} p
 */
export function patched(scene, place, p) {
	if (!scene.second || p >= scene.second.tokens.length) return null;
	if (p < firstDifference(scene, scene.second)) return 0;
	const answer = scene.answer(patchAsk(scene, place, p));
	if (!answer?.arrays.ids) return null;
	const { positions, ids, before, logprobs } = answer.arrays;
	const row = Array.from(positions.data).indexOf(p);
	const goal = Math.max(0, Array.from(ids.data).indexOf(goalOf(scene)));
	return row < 0 ? null : before.at(goal) - logprobs.at(row, goal);
}

/**
 * Python that gives the change of the goal's loss by a patch; none of a second text of one token,
 * which `inspect` does not read, or of one that was cut, whose positions count from the cut.
 * @param {Scene} scene
 * @param {number} place
 * @param {number} p
 * @returns {(code: string) => string}
 */
export function copyPython(scene, place, p) {
	const { text = "", tokens = [], left = 0 } = scene.second ?? {};
	if (tokens.length < 2 || left > 0) return () => "";
	const goal = goalOf(scene);
	return (code) =>
		[
			`stream = ${code.replace("text", () => JSON.stringify(text))}[${p}]`,
			`edits = [("${streamName(place)}", np.s_[:, ${p}], stream)]`,
			`x = model.inspect(text, ["logits"])["logits"][${scene.t}]`,
			`y = model.inspect(text, ["logits"], edits)["logits"][${scene.t}]`,
			`np.logaddexp.reduce(y) - y[${goal}] - np.logaddexp.reduce(x) + x[${goal}]`,
		].join("\n");
}

/** @param {Scene} scene @param {TokenizedText} second */
function copies(scene, second) {
	const difference = firstDifference(scene, second);
	const tokens = secondTokens(scene, second);
	if (difference === scene.length) return empty("Both texts are the same.", "Change the second.");
	if (scene.t < difference) {
		const words = `Go past position ${difference} to see a difference. `;
		const go = tool("Go there", () => store.set({ t: difference }), { class: "tool framed" });
		return el("div", {}, tokens, empty("The two texts are still the same here.", words, go));
	}
	const problem = scene.problem(patchAsks(scene));
	if (problem) return el("div", {}, tokens, empty("No numbers here.", problem));
	const range = patchedRange(scene);
	if (!range) {
		const words = `The second text has ${plural(second.tokens.length, scene.unit)}: go back to them.`;
		return el("div", {}, tokens, empty("Nothing in sight can be copied.", words));
	}
	let most = LEAST_RANGE;
	let [here, all] = [0, 0];
	for (let place = 0; place <= scene.layers; place++) {
		for (let p = range.from; p <= range.to; p++) {
			const change = patched(scene, place, p);
			most = Math.max(most, Math.abs(change ?? 0));
			if (p < second.tokens.length) all++;
			if (change !== null) here++;
		}
	}
	const goal = quoted(scene.token(goalOf(scene)));
	const figure = streamFigure(scene, {
		id: "patch.copy",
		label: "Change of the loss when the stream of a place is copied from the second text",
		colour: (place, p) => {
			const change = patched(scene, place, p);
			if (change === null) return p < (scene.second?.tokens.length ?? 0) ? palette.line : null;
			const { quantity, alpha } = diverging(change, most);
			return Math.abs(change) < CHANGED ? null : tint(quantity, alpha);
		},
		describe: (place, p) => {
			const change = patched(scene, place, p);
			const where = `stream ${streamWords(place)}, position ${p}, copied from the second text`;
			if (p >= second.tokens.length) return ["the second text has ended"];
			return [change === null ? "not here yet" : `${signed(change, 3)} nats on ${goal}`, where];
		},
		later: "after the caret: it cannot matter",
	});
	const [low, high] = [`helps ${goal}, −${fixed(most, 1)}`, `+${fixed(most, 1)} nats, harms`];
	const scale = [divergingLegend(low, high), "blank: no change"];
	const progress = `grey: not computed yet … ${Math.floor((100 * here) / all)}%`;
	const caption = el("figcaption", {}, here < all ? progress : scale);
	return el("div", {}, tokens, figure, caption);
}

/**
 * The second text on the ruler's columns, its differences framed.
 * @param {Scene} scene
 * @param {TokenizedText} second
 */
function secondTokens(scene, second) {
	const isDifferent = (/** @type {number} */ t) => scene.text.tokens[t].id !== second.tokens[t]?.id;
	return alignedMatrix(scene, {
		id: "patch-second",
		label: "The second text",
		rows: [{ label: [scene.columns.isWide ? "second text" : "2nd"] }],
		rowHeight: 26,
		paint: (context, _, t, { x, y, width }) => {
			const token = second.tokens[t];
			if (!token) return;
			context.fillStyle = isDifferent(t) ? palette.ink : palette.soft;
			context.font = monospace(14, isDifferent(t) ? 700 : 400);
			cellText(context, glyphs(token.text), x + width / 2, y + 17, width - 3);
			if (!isDifferent(t)) return;
			context.strokeStyle = palette.ink;
			context.strokeRect(x + 1, y + 3, width - 3, 19);
		},
		describe: (_, t) => {
			const token = second.tokens[t];
			if (!token) return ["the second text has ended"];
			if (!isDifferent(t)) return [`${quotedWhole(token.text)} in both texts`];
			return [
				`${quotedWhole(scene.text.tokens[t].text)} is ${quotedWhole(token.text)} in the second text`,
			];
		},
		choose: (_, t) => store.set({ t }),
	});
}
