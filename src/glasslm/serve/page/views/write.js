// Write: what could come next, with and without the settings, and how the model goes on from each.

import { tint } from "../colour.js";
import { el } from "../dom.js";
import { legend, number, strong, tool } from "../figure_parts.js";
import { store } from "../state.js";
import { oneTabStop } from "../tab_stops.js";
import { asTable } from "../table.js";
import { hideTip, showTip } from "../tip.js";
import { fixed, glyphs, percent, plural, quoted, quotedWhole } from "../words.js";

const SHOWN = 6; // candidates, beside the token that comes
const CHUNK = 12; // tokens of a continuation that are asked for at once
const LONGEST = 48; // tokens of a continuation
const ALPHA = 0.3; // of a token with probability 1
const CONTEXT = 9; // characters shown before a candidate

/**
 * A token of a continuation.
 * @typedef {{id: number, p: number, top: [number, number][]}} Written
 */

/**
 * Where the tree of continuations branches: tokens after the caret, by place.
 * @type {Map<string, number[][]>}
 */
const branches = new Map();
/**
 * The continuation whose token shows its alternatives.
 * @type {{place: string, path: number[], at: number} | null}
 */
let opened = null;
/** The text from which a candidate was taken last. */
let before = "";

/** @param {Scene} scene */
const placeOf = (scene) => `${scene.checkpoint.hash} ${scene.text.id} ${scene.t}`;

/** @param {Scene} scene */
function sampling(scene) {
	const { temperature, topK, topP } = scene.state;
	return `temperature=${temperature}&top_k=${topK}&top_p=${topP}`;
}

/** @param {Scene} scene */
const distributionAsk = (scene) => `distribution?t=${scene.t}&${sampling(scene)}`;

/** @param {Scene} scene @param {number[]} then */
const writeAsk = (scene, then) =>
	`write?t=${scene.t}&then=${then.join(",")}&count=${CHUNK}&${sampling(scene)}`;

/** @param {Scene} scene */
function candidates(scene) {
	const { ids, before, after } = scene.answer(distributionAsk(scene))?.arrays ?? {};
	return Array.from(ids?.data ?? [], (id, i) => ({ id, before: before.at(i), after: after.at(i) }));
}

/** The candidates that have a row: the likeliest, and the one that comes. @param {Scene} scene */
function shownCandidates(scene) {
	const all = candidates(scene);
	const shown = all.slice(0, SHOWN);
	const comes = all.find(({ id }) => id === scene.target);
	return comes && !shown.includes(comes) ? [...shown, comes] : shown;
}

/**
 * What the model has written after these tokens, and the ask for more of it; null at its end.
 * @param {Scene} scene
 * @param {number[]} path tokens after the caret
 * @returns {{tokens: Written[], next: string | null, asks: string[]}}
 */
function continuation(scene, path) {
	/** @type {Written[]} */
	const tokens = [];
	const asks = [];
	while (tokens.length < LONGEST) {
		const ask = writeAsk(scene, [...path, ...tokens.map(({ id }) => id)]);
		asks.push(ask);
		const answer = scene.answer(ask);
		if (!answer) return { tokens, next: ask, asks };
		const { ids, logprobs, top_ids: topIds, top_logprobs: topLogprobs } = answer.arrays;
		if (!ids) break;
		for (let i = 0; i < ids.shape[0]; i++) {
			const top = topIds.row(i).map((id, k) => [id, Math.exp(topLogprobs.at(i, k))]);
			const p = Math.exp(logprobs.at(i));
			tokens.push({ id: ids.at(i), p, top: /** @type {[number, number][]} */ (top) });
		}
		if (answer.header.is_finished || ids.shape[0] < CHUNK) break;
	}
	return { tokens, next: null, asks };
}

/** The probability of a candidate, on one line. @param {{id: number, before: number}} candidate */
const probabilityOf = ({ id, before }) =>
	el("span", { class: "line" }, "(", number(percent(before), `write.${id}`), ")");

/** All rows: each candidate, below it the branches that begin with it. @param {Scene} scene */
function paths(scene) {
	const own = branches.get(placeOf(scene)) ?? [];
	return shownCandidates(scene).flatMap(({ id }) => [
		[id],
		...own.filter((path) => path[0] === id && path.length > 1),
	]);
}

/** @type {View} */
export const write = {
	id: "write",
	title: "Write",
	purpose: "What the model expects next, and how it goes on.",
	sentenceAsks: (scene) => [distributionAsk(scene)],
	asks: (scene) => [distributionAsk(scene)],
	wishes: (scene) => paths(scene).flatMap((path) => continuation(scene, path).asks),
	extra: (scene) => [
		paths(scene).map((path) => continuation(scene, path).tokens.length),
		opened,
		branches.get(placeOf(scene))?.length,
	],

	sentence(scene) {
		const all = candidates(scene);
		const [best] = all;
		const expects = ["It expects ", strong(quoted(scene.token(best.id))), " ", probabilityOf(best)];
		const comes = all.find(({ id }) => id === scene.target);
		if (!comes) return [...expects, "; the text ends here, so nothing comes to compare."];
		if (comes === best) return [...expects, ", and that is what comes."];
		return [
			...expects,
			"; what comes is ",
			strong(quoted(scene.token(comes.id))),
			" ",
			probabilityOf(comes),
			".",
		];
	},

	draw(scene) {
		const { others } = scene.answer(distributionAsk(scene))?.header ?? {};
		const hidden = candidates(scene)
			.slice(SHOWN)
			.filter(({ id, after }) => after > 0 && id !== scene.target);
		const rest = hidden.length + (others ?? 0);
		const back = before && before !== scene.text.id;
		return [
			back ? tool("↶ back to the text before", () => history.back()) : null,
			dials(scene),
			el(
				"div",
				{ class: "alts" },
				paths(scene).flatMap((path) => [row(scene, path), alternatives(scene, path)]),
			),
			el(
				"p",
				{ class: "cap" },
				barKey("", "the model’s own"),
				barKey("outlined", "with these settings"),
				legend("look", { low: "0", high: "1", what: "probability of what it wrote", top: ALPHA }),
				el("span", { class: "key" }, el("i", { class: "frame" }), "what the text has"),
				`${plural(rest, `other ${scene.unit} is`, `other ${scene.unit}s are`)} still possible`,
			),
			asTable(() => write.rows(scene)),
		];
	},

	rows(scene) {
		return [
			["candidate", "token", "probability", "with these settings", "goes on"],
			...candidates(scene).map(({ id, before, after }) => {
				const text = continuation(scene, [id]).tokens.map((token) => scene.token(token.id));
				return [glyphs(scene.token(id)), id, before, after, glyphs(text.join(""))];
			}),
		];
	},

	origin(scene, [key]) {
		const candidate = candidates(scene).find(({ id }) => String(id) === key);
		if (!candidate) return null;
		const place = `for ${quoted(scene.token(candidate.id))} after position ${scene.t}`;
		return {
			value: fixed(candidate.before, 4),
			words: [`softmax of the logits, ${place}, before the settings`],
			name: "logits",
			python: (code) =>
				`x = ${code}[${scene.t}]\nnp.exp(x - np.logaddexp.reduce(x))[${candidate.id}]`,
			shape: `(${scene.length}, ${scene.run.vocab_size})`,
		};
	},
};

/** @param {string} kind @param {string} words */
const barKey = (kind, words) =>
	el("span", { class: "key" }, el("i", { class: `bar ${kind}` }), words);

/** @param {Scene} scene */
function dials(scene) {
	const { temperature, topK, topP } = scene.state;
	const most = Math.min(scene.run.vocab_size, 50);
	/**
	 * @param {string} name
	 * @param {number} value
	 * @param {{min: number, max: number, step: number}} range
	 * @param {string} shown
	 * @param {(value: number) => void} set
	 */
	const dial = (name, value, range, shown, set) =>
		el(
			"label",
			{},
			name,
			el("input", {
				type: "range",
				...range,
				value: String(value),
				"aria-valuetext": shown,
				on: { input: (event) => set(Number(event.target.value)) },
			}),
			el("output", {}, shown),
		);
	return el(
		"div",
		{ class: "dials" },
		dial("temperature", temperature, { min: 0, max: 2, step: 0.05 }, fixed(temperature), (value) =>
			store.set({ temperature: value }),
		),
		dial("top-k", topK, { min: 0, max: most, step: 1 }, topK ? String(topK) : "all", (value) =>
			store.set({ topK: value }),
		),
		dial("top-p", topP, { min: 0, max: 1, step: 0.01 }, fixed(topP), (value) =>
			store.set({ topP: value }),
		),
	);
}

/** A candidate, or a branch, with its continuation. @param {Scene} scene @param {number[]} path */
function row(scene, path) {
	const candidate = shownCandidates(scene).find(({ id }) => id === path[0]);
	const { tokens } = continuation(scene, path);
	const isBranch = path.length > 1;
	const isNext = path[0] === scene.target && !isBranch;
	const own = candidate && !isBranch ? candidate : null;
	const last = path[path.length - 1];
	const { gutter, room: whole } = scene.columns;
	const room = gutter > 80 ? gutter - 56 : whole - 60;
	const classes = ["alt", isNext && "chosen", isBranch && "branch", own?.after === 0 && "gone"];
	const full = [...path, ...tokens.map(({ id }) => id)];
	return el(
		"div",
		{ class: classes.filter(Boolean).join(" "), "data-key": path.join(",") },
		el(
			"span",
			{ class: "p" },
			own
				? [
						el("i", { style: { width: `${Math.max(1, own.before * room)}px` } }),
						el("i", { style: { width: `${Math.max(0, own.after * room)}px` } }),
						number(percent(own.before), `write.${own.id}`),
					]
				: "from there",
		),
		el(
			"button",
			{
				class: isNext ? "ch hit" : "ch",
				"aria-label": `Take ${quoted(scene.token(last))} and go on from it`,
				title: `${quotedWhole(scene.token(last))}: take it, and the text goes on from here`,
				on: { click: () => takeOver(scene, path) },
			},
			glyphs(scene.token(last), 12),
		),
		el(
			"span",
			{ class: "line" },
			written(scene, path, tokens),
			takeAll(scene, full, tokens.length),
		),
	);
}

/** @param {Scene} scene @param {number[]} full @param {number} written */
function takeAll(scene, full, written) {
	if (!written) return null;
	return tool("use", () => takeOver(scene, full), {
		class: "tool use",
		title: "make this the text on the ruler",
		"aria-label": "Use this continuation as the text",
	});
}

/**
 * The text up to the caret, then these tokens, becomes the text.
 * @param {Scene} scene
 * @param {number[]} path
 */
function takeOver(scene, path) {
	const ids = [...scene.text.tokens.slice(0, scene.t + 1).map(({ id }) => id), ...path];
	const t = scene.t + path.length;
	hideTip();
	before = scene.text.id;
	if (scene.unit === "token" || scene.unit === "byte") {
		store.set({ ids: ids.join("."), text: null, t });
	} else {
		store.set({ text: ids.map((id) => scene.token(id)).join(""), t });
	}
}

/**
 * The written tokens: hover or focus shows the alternatives of one, a click lists them below.
 * @param {Scene} scene
 * @param {number[]} path
 * @param {Written[]} tokens
 */
function written(scene, path, tokens) {
	const before = scene.text.tokens.slice(0, scene.t + 1).map(({ text }) => text);
	const context = scene.columns.isWide ? glyphs([...before.join("")].slice(-CONTEXT).join("")) : "";
	const inner = path.map((id) => glyphs(scene.token(id))).join("");
	const tell = (/** @type {any} */ event, /** @type {Written} */ token) => {
		const box = event.currentTarget.getBoundingClientRect();
		const others = token.top.map(([id, p]) => `${quoted(scene.token(id))} ${percent(p)}`);
		const at = { clientX: box.left, clientY: box.bottom - 12 };
		showTip(at, others.join("  "), "click: choose another");
	};
	const buttons = tokens.map((token, i) =>
		el(
			"button",
			{
				style: { background: tint("look", token.p * ALPHA) },
				"aria-label": `${glyphs(scene.token(token.id))}, ${percent(token.p)}`,
				on: {
					click: () => {
						opened = { place: placeOf(scene), path, at: i };
						hideTip();
						store.set({});
					},
					pointerenter: (event) => tell(event, token),
					pointerleave: hideTip,
					focus: (event) => tell(event, token),
					blur: hideTip,
				},
			},
			glyphs(scene.token(token.id)),
		),
	);
	const text = el("span", { class: "txt" }, el("s", {}, context), el("b", {}, inner), buttons);
	return oneTabStop(`write ${path}`, text);
}

/**
 * What could stand in the place of the opened token.
 * @param {Scene} scene
 * @param {number[]} path
 */
function alternatives(scene, path) {
	if (!opened || opened.place !== placeOf(scene) || opened.path.join() !== path.join()) return null;
	const { at } = opened;
	const { tokens } = continuation(scene, path);
	const token = tokens[at];
	if (!token) return null;
	const choose = (/** @type {number} */ id) => {
		const branch = [...path, ...tokens.slice(0, at).map((other) => other.id), id];
		const own = branches.get(placeOf(scene)) ?? [];
		if (!own.some((other) => other.join() === branch.join())) own.push(branch);
		branches.set(placeOf(scene), own);
		close();
	};
	const buttons = token.top
		.filter(([id]) => id !== token.id)
		.map(([id, p]) =>
			el(
				"button",
				{ title: quotedWhole(scene.token(id)), on: { click: () => choose(id) } },
				el("code", {}, glyphs(scene.token(id), 12)),
				` ${percent(p)}`,
			),
		);
	const close = () => {
		opened = null;
		store.set({});
	};
	return el(
		"div",
		{ class: "choices", role: "group", "aria-label": "Alternatives" },
		`instead of ${quoted(scene.token(token.id))} ${percent(token.p)}:`,
		buttons,
		tool("✕", close, { "aria-label": "Close the alternatives" }),
	);
}
