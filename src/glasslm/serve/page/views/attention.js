// Attention: where the heads look from the caret, one head at full size, all patterns.

import { alignedMatrix } from "../aligned_matrix.js";
import { palette, tint } from "../colour.js";
import { columnX } from "../columns.js";
import { el } from "../dom.js";
import { legend, number, segments, strong } from "../figure_parts.js";
import { headDoes, headScore, KINDS, scoreName, SCORES } from "../head_names.js";
import { drawPattern, headPattern } from "../pattern.js";
import { headAsk } from "../rail.js";
import { store } from "../state.js";
import { oneTabStop } from "../tab_stops.js";
import { asTable } from "../table.js";
import { count, fixed, glyphs, headName, percent, quoted, quotedWhole, score } from "../words.js";

const MOST_ROWS = 64; // of heads; of a larger model the chosen layer is shown
const POWER = 0.75; // of a weight, which gives its alpha

/** @param {Scene} scene */
const rowAsk = (scene) => `attention?t=${scene.t}`;

/** The weights (L, H, T) from the caret. @param {Scene} scene */
const weights = (scene) => scene.answer(rowAsk(scene))?.arrays.weights;

/** @type {View} */
export const attention = {
	id: "attention",
	title: "Attention",
	purpose: "Where each head looks from the caret.",
	sentenceAsks: (scene) => [rowAsk(scene), SCORES],
	asks: (scene) => {
		const asks = [rowAsk(scene), SCORES];
		if (scene.state.look === "patterns") asks.push("thumbnails");
		if (scene.state.look === "head") asks.push(headAsk(scene));
		return asks;
	},

	sentence(scene) {
		if (scene.t === 0) return ["At the first token there is only itself to look at."];
		const best = hardestLook(scene);
		const all = scene.allHeads.length;
		return [
			"Among earlier tokens head ",
			strong(headName(best.layer, best.head)),
			" looks back hardest, ",
			number(percent(best.weight), `attention.${best.layer}.${best.head}.${best.t}`),
			" at ",
			strong(quoted(scene.text.tokens[best.t].text)),
			` ${count(scene.t - best.t)} back. ${count(countPrevious(scene))} of ${count(all)} heads `,
			"read the previous token.",
		];
	},

	draw(scene) {
		const look = scene.state.look;
		const figure = { layers: byLayer, head: oneHead, patterns: allPatterns }[look] ?? fromHere;
		const choices = /** @type {[string, string][]} */ ([
			["heads", "from here"],
			["layers", "by layer"],
			["head", "one head"],
			["patterns", "all patterns"],
		]);
		const caption = el(
			"figcaption",
			{},
			legend("look", { low: "0", high: "1", what: "weight", power: POWER }),
			look === "patterns" ? "row: who looks; column: at what" : "each row sums to 1",
			segments("Show", choices, look, (value) => store.set({ look: value })),
		);
		return [figure(scene), caption, asTable(() => attention.rows(scene))];
	},

	rows(scene) {
		const w = weights(scene);
		const read = scene.text.tokens.slice(0, scene.t + 1);
		/** @type {Rows} */
		const rows = [["head", "does", ...read.map(({ text }, t) => `${t} ${glyphs(text)}`)]];
		for (const { layer, head } of scene.allHeads) {
			const does = headDoes(scene, layer, head)?.long ?? "";
			const cells = read.map((_, t) => w?.at(layer, head, t) ?? "");
			rows.push([`head ${headName(layer, head)}`, does, ...cells]);
		}
		return rows;
	},

	origin(scene, key) {
		if (key[0] === "score") return scoreOrigin(scene, key);
		const [layer, head, t] = key.map(Number);
		const w = weights(scene);
		if (!w || !(layer < scene.layers && head < scene.heads && t <= scene.t)) return null;
		return {
			value: fixed(w.at(layer, head, t), 4),
			words: [
				`how much head ${headName(layer, head)} at position ${scene.t} takes from `,
				`${quoted(scene.text.tokens[t].text)} at ${t}`,
			],
			name: `blocks.${layer}.attention.weights`,
			index: `[${head}, ${scene.t}, ${t}]`,
			shape: `(${scene.heads}, ${scene.length}, ${scene.length})`,
		};
	},
};

/** @param {Scene} scene @param {string[]} key */
function scoreOrigin(scene, [, name, layer, head]) {
	const kind = KINDS.find((other) => other.kind === name);
	const value = kind ? headScore(scene, kind, Number(layer), Number(head)) : null;
	if (!kind || value === null) return null;
	const { repeated_tokens: tokens, kinds } = scene.answer(SCORES)?.header ?? {};
	const text = kind.on === "text" ? "this text" : `${tokens} random tokens, the half repeated`;
	return {
		value: fixed(value, 4),
		words: [`${kind.long} score of head ${layer}.${head}: its mean weight there, on ${text}`],
		name: scoreName(kind),
		index: `[${kinds.indexOf(name)}, ${layer}, ${head}]`,
	};
}

/** @param {Scene} scene */
function hardestLook(scene) {
	const w = weights(scene);
	let best = { layer: 0, head: 0, t: 0, weight: -1 };
	if (!w) return best;
	for (const { layer, head } of scene.allHeads) {
		for (let t = 0; t < scene.t; t++) {
			const weight = w.at(layer, head, t);
			if (weight > best.weight) best = { layer, head, t, weight };
		}
	}
	return best;
}

/** @param {Scene} scene */
const countPrevious = (scene) =>
	scene.allHeads.filter(
		({ layer, head }) => headDoes(scene, layer, head)?.kind === "previous_token",
	).length;

/** One row a head. @param {Scene} scene */
function fromHere(scene) {
	const w = weights(scene);
	const isOneLayer = scene.allHeads.length > MOST_ROWS;
	const heads = scene.allHeads.filter(({ layer }) => !isOneLayer || layer === scene.state.layer);
	const rows = heads.map(({ layer, head }) => {
		const does = headDoes(scene, layer, head);
		const name = does && scene.columns.isWide ? `${does.short} ${score(does.score)}  ` : "";
		return {
			label: [name, strong(headName(layer, head))],
			title: does ? `${does.long}, score ${fixed(does.score)}` : "no score is above its threshold",
			isPressed: layer === scene.state.layer && head === scene.state.head,
			choose: () => store.set({ layer, head }),
		};
	});
	const figure = alignedMatrix(scene, {
		id: "attention",
		label: `Where each head looks from position ${scene.t}`,
		rows,
		...weightRows(scene, 15, (i, t) => w?.at(heads[i].layer, heads[i].head, t) ?? 0),
		gap: (i) => (i && i % scene.heads === 0 ? 5 : 0),
		describe: (i, t) => describeWeight(scene, heads[i], t),
		preview: (i) => heads[i],
		choose: (i, t) => {
			if (t > scene.t) return;
			store.set({ ...heads[i], n: `attention.${heads[i].layer}.${heads[i].head}.${t}` });
		},
	});
	if (!isOneLayer) return figure;
	const words = `The ${scene.heads} heads of layer ${scene.state.layer} of ${scene.layers}; ↑ ↓ go to another.`;
	return el("div", {}, el("p", { class: "cap" }, words), figure);
}

/** The mean over the heads of each layer. @param {Scene} scene */
function byLayer(scene) {
	const w = weights(scene);
	const mean = (/** @type {number} */ l, /** @type {number} */ t) => {
		let sum = 0;
		for (let h = 0; h < scene.heads; h++) sum += w?.at(l, h, t) ?? 0;
		return sum / scene.heads;
	};
	const all = (/** @type {number} */ t) => {
		let sum = 0;
		for (let l = 0; l < scene.layers; l++) sum += mean(l, t);
		return sum / scene.layers;
	};
	const isWide = scene.columns.isWide;
	const rows = Array.from({ length: scene.layers }, (_, l) => ({
		label: [isWide ? `mean of layer ${l}` : `l ${l}`],
	}));
	const value = (/** @type {number} */ i, /** @type {number} */ t) =>
		i < scene.layers ? mean(i, t) : all(t);
	return alignedMatrix(scene, {
		id: "attention-layers",
		label: `Where the heads of each layer look from position ${scene.t}, on average`,
		rows: [...rows, { label: [isWide ? "mean of all" : "all"] }],
		...weightRows(scene, 24, value),
		gap: (i) => (i === scene.layers ? 6 : 0),
		describe: (i, t) => {
			if (t > scene.t) return ["not yet read: hidden from here"];
			const on = `on ${quotedWhole(scene.text.tokens[t].text)}, ${scene.t - t} back`;
			return [`${fixed(value(i, t), 3)} ${on}`, "mean over the heads"];
		},
		choose: (_, t) => store.set({ t }),
	});
}

/**
 * How rows of weights are painted: first what is read, up to the caret, and what is hidden.
 * @param {Scene} scene
 * @param {number} rowHeight
 * @param {(row: number, t: number) => number} weight
 * @returns {Pick<Matrix, "rowHeight" | "paintRow" | "paint">}
 */
function weightRows({ columns, t: caret }, rowHeight, weight) {
	const size = columns.count * columns.width;
	return {
		rowHeight,
		paintRow(context, _, y) {
			context.fillStyle = palette.sink;
			context.fillRect(0, y, size, rowHeight - 1);
			context.fillStyle = palette.card;
			context.fillRect(0, y, Math.min(columnX(columns, caret + 1), size), rowHeight - 1);
		},
		paint(context, row, t, { x, y, width, height }) {
			const look = t > caret ? 0 : weight(row, t);
			if (look < 0.004) return;
			context.fillStyle = tint("look", look ** POWER);
			context.fillRect(x, y, width - 1, height - 1);
		},
	};
}

/**
 * @param {Scene} scene
 * @param {{layer: number, head: number}} head
 * @param {number} t
 * @returns {[string, string?]}
 */
function describeWeight(scene, { layer, head }, t) {
	const name = `head ${headName(layer, head)}`;
	if (t > scene.t) return ["not yet read: hidden from here", name];
	const text = quotedWhole(scene.text.tokens[t].text);
	const weight = fixed(weights(scene)?.at(layer, head, t), 3);
	return [`${weight} on ${text}, ${scene.t - t} back`, `${name} · click: where it comes from`];
}

/** The selected head at full size, with its tokens. @param {Scene} scene */
function oneHead(scene) {
	const weight = scene.answer(headAsk(scene))?.arrays.weights;
	const { gutter, room, isWide } = scene.columns;
	const side = Math.min(isWide ? 560 : 400, room - (isWide ? gutter : 22));
	const { layer, head } = scene.state;
	return el(
		"div",
		{ class: "indented" },
		headPattern(scene, { weight, layer, head, side, withTokens: true, id: "one-head" }),
	);
}

/** Thumbnails of all heads; each chooses its head. @param {Scene} scene */
function allPatterns(scene) {
	const { weights: all, scale } = scene.answer("thumbnails")?.arrays ?? {};
	if (!all) return null;
	const size = all.shape[2];
	const { room, gutter, isWide } = scene.columns;
	const across = Math.min(scene.heads, isWide ? 8 : 4);
	const free = room - (isWide ? gutter : 0) - 16 * across;
	const side = Math.max(44, Math.min(170, Math.floor(free / across)));
	const buttons = scene.allHeads.map(({ layer, head }) => {
		const weights = all.row(layer, head);
		const does = headDoes(scene, layer, head);
		return el(
			"button",
			{
				"aria-pressed": String(layer === scene.state.layer && head === scene.state.head),
				"aria-label": `Head ${headName(layer, head)}${does ? `, ${does.long}` : ""}`,
				on: { click: () => store.set({ layer, head }) },
			},
			drawPattern(weights, size, side, scale.at(layer, head) / 255),
			`${headName(layer, head)}${does && isWide ? ` ${does.short} ${score(does.score)}` : ""}`,
		);
	});
	const style = { "grid-template-columns": `repeat(${across}, max-content)` };
	return oneTabStop("patterns", el("div", { class: "patterns", style }, buttons));
}
