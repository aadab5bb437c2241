// Backward: the gradient of one token's loss, and what one step against it would change.

import { changeLane } from "../change_lane.js";
import { tint } from "../colour.js";
import { el } from "../dom.js";
import { legend, number, segments, strong } from "../figure_parts.js";
import { isWorthIt } from "../scene.js";
import { store } from "../state.js";
import { streamFigure, streamWords } from "../stream_figure.js";
import { oneTabStop } from "../tab_stops.js";
import { asTable, tintedCell, tintedTable } from "../table.js";
import { count, fixed, glyphs, quoted, significant } from "../words.js";

const RATES = ["0.001", "0.01", "0.1"];
const SPAN = 1000; // between the largest norm and the one that is drawn faintest
const FAINTEST = 0.04;
const POWER = 0.8; // of a matrix's norm
const GAINS = 1e-6; // nats; smaller changes are rounding
const NORMS = "norm of the gradient of each weight matrix";
const STEP_PASSES = 8; // forward passes that cost as much as a step

/** @param {Scene} scene */
const backwardAsk = (scene) => `backward?t=${scene.t}`;

/** @param {Scene} scene */
const stepAsk = (scene) => `step?t=${scene.t}&lr=${scene.state.lr}`;

/** @type {View} */
export const backward = {
	id: "backward",
	title: "Backward",
	purpose: "How the loss on one token pulls at every weight.",
	sentenceAsks: (scene) => (isWorthIt(scene, "backward", STEP_PASSES) ? [stepAsk(scene)] : []),
	asks: (scene) => [backwardAsk(scene), stepAsk(scene)],

	sentence(scene) {
		const { arrays, header } = scene.answer(stepAsk(scene)) ?? {};
		if (!arrays?.nats_before || scene.target === null) return [backward.purpose];
		const { nats_before: before, nats_after: after } = arrays;
		const next = scene.t + 1;
		const isTooLong = after.at(next) > before.at(next) + GAINS;
		const norm = header?.norm * scene.state.lr;
		let better = 0;
		for (let t = 1; t < scene.length; t++) {
			if (t !== next && after.at(t) < before.at(t) - GAINS) better++;
		}
		return [
			"One SGD step of ",
			strong(String(scene.state.lr)),
			" on ",
			strong(quoted(scene.token(scene.target))),
			isTooLong ? " would raise its loss from " : " would take its loss from ",
			number(fixed(before.at(next)), "backward.before"),
			" to ",
			number(fixed(after.at(next)), "backward.after"),
			` nats; ${count(better)} of the ${count(scene.length - 2)} other ${scene.unit}s become more `,
			"probable (lower loss).",
			isTooLong
				? ` The step is too long (its norm is ${significant(norm)}): try a smaller learning rate.`
				: "",
		];
	},

	draw(scene) {
		const rates = RATES.map((rate) => /** @type {[string, string]} */ ([rate, rate]));
		const choose = (/** @type {string} */ rate) => store.set({ lr: Number(rate) });
		const { nats_before: before, nats_after: after } = scene.answer(stepAsk(scene))?.arrays ?? {};
		return [
			...norms(scene),
			el("div", { class: "wide" }, matrices(scene)),
			el("p", { class: "cap" }, `${NORMS}; choose one for the lines that computed it`),
			el(
				"div",
				{ class: "dials" },
				"one step of ",
				segments("Learning rate", rates, String(scene.state.lr), choose),
				"really taken, on a copy of the weights",
			),
			changeLane(scene, {
				id: "backward-step",
				label: `Change of every ${scene.unit}’s loss after the step`,
				short: "after the step",
				change: (t) => after.at(t) - before.at(t),
				describe: (t) => [
					`${quoted(scene.text.tokens[t].text)}: ${fixed(before.at(t))} → ${fixed(after.at(t))} nats`,
					`after a step on ${quoted(scene.token(scene.target ?? -1))} alone`,
				],
			}),
			asTable(() => backward.rows(scene)),
		];
	},

	rows(scene) {
		const { places, stream, parameters, norms } = gradients(scene);
		const { nats_before: before, nats_after: after } = scene.answer(stepAsk(scene))?.arrays ?? {};
		const tokens = scene.text.tokens;
		return [
			["gradient at", ...tokens.map(({ text }, t) => `${t} ${glyphs(text)}`)],
			...places.map((place, i) => [place, ...tokens.map((_, t) => stream.at(i, t))]),
			["loss before, nats", ...tokens.map((_, t) => (t ? before.at(t) : ""))],
			["loss after, nats", ...tokens.map((_, t) => (t ? after.at(t) : ""))],
			...parameters.map((name, i) => [name, norms.at(i), ...tokens.slice(1).map(() => "")]),
		];
	},

	origin(scene, [kind, ...key]) {
		const { places, stream, names, weights } = gradients(scene);
		const goal = quoted(scene.token(scene.target ?? -1));
		if (kind === "before" || kind === "after") {
			const nats = scene.answer(stepAsk(scene))?.arrays[`nats_${kind}`];
			const step = `${kind} the step w − ${scene.state.lr} × gradient, taken on a copy`;
			if (!nats) return null;
			return {
				value: `${fixed(nats.at(scene.t + 1), 4)} nats`,
				words: [`the loss on ${goal} ${step}`],
				...(kind === "before"
					? { name: "nats", index: `[${scene.t}]` }
					: { name: `step/${scene.state.lr}`, index: `[${scene.t + 1}]` }),
			};
		}
		if (kind === "matrix") {
			const i = Number(key[0]);
			if (!(i < names.length)) return null;
			return {
				value: fixed(weights.at(i), 4),
				words: [`norm of the gradient of ${names[i]}, of the loss on ${goal} alone`],
				name: `gradient/${names[i].replace("*", "0")}`,
				python: (code) => {
					if (!names[i].includes("*")) return `np.linalg.norm(${code})`;
					const one = code.replaceAll("'g", "f'g").replaceAll("experts.0", "experts.{i}");
					const n = scene.run.config.experts;
					return `np.linalg.norm([np.linalg.norm(${one}) for i in range(${n})])`;
				},
			};
		}
		const [i, t] = key.map(Number);
		if (kind !== "stream" || !(i < places.length && t <= scene.t)) return null;
		return {
			value: significant(stream.at(i, t)),
			words: [`norm of the gradient ${streamWords(i)}, position ${t}, of the loss on ${goal}`],
			name: `gradient/${places[i]}`,
			python: (code) => `np.linalg.norm(${code}[${t}])`,
			shape: `(${scene.length}, ${scene.run.config.width})`,
		};
	},
};

/** @param {Scene} scene */
function gradients(scene) {
	const answer = scene.answer(backwardAsk(scene));
	const { stream, weights: norms, joined } = answer?.arrays ?? {};
	/** @type {string[]} */
	const parameters = answer?.header.names ?? [];
	return {
		stream,
		norms,
		weights: joined ?? norms,
		places: /** @type {string[]} */ (answer?.header.places ?? []),
		parameters,
		/** With all experts as one. @type {string[]} */
		names: answer?.header.joined ?? parameters,
	};
}

/** The norm that reaches each place and position, on a log scale. @param {Scene} scene */
function norms(scene) {
	const { places, stream } = gradients(scene);
	let most = 0;
	for (let i = 0; i < places.length; i++) {
		for (let t = 0; t <= scene.t; t++) most = Math.max(most, stream.at(i, t));
	}
	const least = most / SPAN;
	const alpha = (/** @type {number} */ norm) =>
		norm > 0 ? Math.max(FAINTEST, Math.log(norm / least) / Math.log(SPAN)) : 0;
	const figure = streamFigure(scene, {
		id: "backward.stream",
		label: "Norm of the gradient that reaches each layer and position",
		colour: (place, t) => tint("slope", alpha(stream.at(place, t))),
		describe: (place, t) => [
			significant(stream.at(place, t)),
			`norm of the gradient ${streamWords(place)}, at ${t}`,
		],
		later: "0: what comes later gets no gradient",
	});
	const [low, high] = [significant(least), significant(most)];
	const caption = el(
		"figcaption",
		{},
		legend("slope", { low, high, what: "norm, log scale" }),
		"read it upwards: the loss is below, the gradient climbs",
	);
	return [figure, caption];
}

/**
 * The norms of all weights: layers down, matrices across; the others below.
 * @param {Scene} scene
 */
function matrices(scene) {
	const { names, weights } = gradients(scene);
	const most = Math.max(...Array.from(weights.data));
	/** @type {Map<string, Map<string, number>>} by the last words of the name, then by layer */
	const table = new Map();
	/** @type {number[]} */
	const others = [];
	names.forEach((name, i) => {
		const found = /^blocks\.(\d+)\.(?:attention|feedforward)\.(.+)$/.exec(name);
		const isMatrix = found && /^([a-z*]+\.)+(weight|lora_[ab])$/.test(found[2]);
		if (!found || !isMatrix) {
			if (!name.startsWith("blocks.")) others.push(i);
			return;
		}
		const column = found[2].replace(".weight", "");
		const rows = table.get(column) ?? new Map();
		table.set(column, rows.set(found[1], i));
	});
	const columns = [...table.keys()];
	const cell = (/** @type {number} */ i) => {
		const key = `backward.matrix.${i}`;
		return {
			text: significant(weights.at(i)),
			title: `gradient of ${names[i]}: ${significant(weights.at(i))}`,
			quantity: /** @type {const} */ ("slope"),
			alpha: most > 0 ? (weights.at(i) / most) ** POWER : 0,
			isPressed: scene.state.n === key,
			choose: () => store.set({ n: key }),
		};
	};
	const rows = Array.from({ length: scene.layers }, (_, layer) => {
		const indices = columns.map((column) => table.get(column)?.get(String(layer)));
		const cells = indices.map((i) => (i === undefined ? null : cell(i)));
		const label = scene.columns.isWide ? `layer ${layer}` : layer;
		return /** @type {[string | number, ReturnType<typeof cell>[]]} */ ([label, cells]);
	});
	const single = others.map((i) =>
		el("span", {}, `${names[i].replace(".weight", "")} `, tintedCell(cell(i))),
	);
	return [
		columns.length ? tintedTable(columns, rows, scene.columns.room, NORMS) : null,
		oneTabStop("other matrices", el("p", { class: "chips indented" }, single)),
	];
}
