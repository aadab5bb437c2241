// Patch: what the loss and the next token become without a part, or with another text's stream.

import { changeLane } from "../change_lane.js";
import { diverging } from "../colour.js";
import { el } from "../dom.js";
import { divergingLegend, number, strong, tool } from "../figure_parts.js";
import { isWorthIt, partName } from "../scene.js";
import { store } from "../state.js";
import { streamName, streamWords } from "../stream_figure.js";
import { asTable } from "../table.js";
import { tintedTable } from "../tinted_table.js";
import { fixed, glyphs, percent, quoted, signed } from "../words.js";
import { goalOf, patchAsks, patched, secondText } from "./second_text.js";

/** @typedef {import("../scene.js").Scene} Scene */

const LEAST_RANGE = 0.2; // nats, that a full colour stands for
const SHOWN = 6; // candidates

/** @param {Scene} scene */
const ablateAsk = (scene) => `ablate?t=${scene.t}`;

/** The parts that are switched off. @param {Scene} scene */
const offParts = (scene) => (scene.state.off ? scene.state.off.split(",") : []);

/** @param {Scene} scene */
const offAsk = (scene) => `off?t=${scene.t}&parts=${offParts(scene).join(",")}`;

/** @param {string} part */
function toggle(part) {
	const parts = store.state.off ? store.state.off.split(",") : [];
	const rest = parts.filter((other) => other !== part);
	const next = rest.length < parts.length ? rest : [...parts, part];
	store.set({ off: next.length ? next.join(",") : null, n: `patch.off.${part.replace(".", "-")}` });
}

/** @type {import("../scene.js").View} */
export const patch = {
	id: "patch",
	title: "Patch",
	purpose: "Switch parts off, or copy what a second text computes.",
	sentenceAsks: (scene) =>
		isWorthIt(scene, "patch", scene.layers * (scene.heads + 2)) ? [ablateAsk(scene)] : [],
	asks: (scene) => [ablateAsk(scene), ...(offParts(scene).length ? [offAsk(scene)] : [])],
	wishes: (scene) => [neuronsAsk(scene), ...patchAsks(scene)].filter((ask) => ask !== null),
	extra: (scene) => [neuronsAsk(scene), ...patchAsks(scene)].map((ask) => ask && scene.has([ask])),

	sentence(scene) {
		if (!scene.answer(ablateAsk(scene))) return [patch.purpose];
		const { goal, parts, before, change } = ablations(scene);
		const single = parts.map((_, i) => i).filter((i) => !parts[i].endsWith(".attention"));
		const best = single.reduce((a, i) => (Math.abs(change(i)) > Math.abs(change(a)) ? i : a));
		return [
			"Without ",
			strong(partName(parts[best])),
			" the loss on ",
			strong(quoted(scene.token(goal))),
			change(best) > 0 ? " would rise from " : " would fall from ",
			number(fixed(before), "patch.before"),
			" to ",
			number(fixed(before + change(best)), `patch.off.${parts[best].replace(".", "-")}`),
			" nats; no other part matters as much here.",
		];
	},

	draw(scene) {
		return [
			el(
				"div",
				{ class: "two" },
				el("div", { class: "wide" }, switches(scene), neuronChips(scene)),
				candidateBars(scene),
			),
			offLane(scene),
			secondText(scene),
			asTable(() => patch.rows(scene)),
		].filter((x) => x !== null);
	},

	rows(scene) {
		const { ids, parts, logprobs, before } = ablations(scene);
		const tokens = Array.from(ids.data);
		const head = ["without", "change of the loss, nats"];
		const { change } = ablations(scene);
		return [
			[...head, ...tokens.map((id) => `probability of ${glyphs(scene.token(id))}`)],
			["nothing", 0, ...tokens.map((_, c) => Math.exp(ablations(scene).beforeOf(c)))],
			...parts.map((part, i) => [
				partName(part),
				change(i),
				...tokens.map((_, c) => Math.exp(logprobs.at(i, c))),
			]),
			["loss before, nats", before, ...tokens.map(() => "")],
		];
	},

	origin(scene, [kind, ...key]) {
		const { goal, before, parts, change } = ablations(scene);
		const loss = `the loss on ${quoted(scene.token(goal))}`;
		const logits = { name: "logits", index: `[${scene.t}]` };
		if (kind === "before") {
			const words = [`−log softmax of the logits after position ${scene.t}: ${loss}`];
			return { value: `${fixed(before, 4)} nats`, words, ...logits };
		}
		if (kind === "off") {
			const part = (key[0] ?? "").replace("-", ".");
			const i = parts.indexOf(part);
			const effect = i < 0 ? "" : ` is ${fixed(before + change(i), 4)}, not ${fixed(before, 4)},`;
			const words = [`${loss}${effect} when ${partName(part)} writes zeros`];
			const value = i < 0 ? "switched off" : `${signed(change(i), 4)} nats`;
			return { value, words, name: editedName(part), python: editPython(scene, part, goal) };
		}
		if (kind !== "copy") return null;
		const [place, p] = key.map(Number);
		const x = patched(scene, place, p);
		if (x === null) return null;
		const where = `${streamWords(place)}, position ${p},`;
		const words = [`change of ${loss} when the stream ${where} is that of the second text`];
		const value = `${signed(x, 4)} nats`;
		return { value, words, name: streamName(place), python: () => "" };
	},
};

/**
 * What each part that is off does to the goal: the token that comes, or the first choice.
 * @param {Scene} scene
 */
function ablations(scene) {
	const answer = scene.answer(ablateAsk(scene));
	const { ids, before, logprobs } = answer?.arrays ?? {};
	const goal = goalOf(scene);
	const place = Math.max(0, Array.from(ids?.data ?? []).indexOf(goal));
	return {
		goal,
		ids,
		logprobs,
		parts: /** @type {string[]} */ (answer?.header.parts ?? []),
		before: -before?.at(place),
		beforeOf: (/** @type {number} */ c) => before.at(c),
		change: (/** @type {number} */ i) => before.at(place) - logprobs.at(i, place),
	};
}

/** @param {string} part the name of the activation that is overwritten by zeros */
function editedName(part) {
	const [layer, rest] = part.split(".");
	if (rest === undefined) return `blocks.${layer}.attention`;
	if (rest === "attention" || rest === "feedforward") return `blocks.${layer}.${rest}`;
	const inner = rest.startsWith("n") ? "feedforward.activation" : "attention.heads";
	return `blocks.${layer}.${inner}`;
}

/**
 * Python that gives the loss without a part.
 * @param {Scene} scene
 * @param {string} part
 * @param {number} goal
 * @returns {(code: string) => string}
 */
function editPython(scene, part, goal) {
	const [layer, rest] = part.split(".");
	const parts = rest === undefined ? [`${layer}.attention`, `${layer}.feedforward`] : [part];
	const edits = parts.map((one) => {
		const inner = /\.n?(\d+)$/.exec(one)?.[1];
		return `("${editedName(one)}", np.s_[:${inner ? `, :, ${inner}` : ""}], 0.0)`;
	});
	return (code) => {
		const call = code.slice(0, code.lastIndexOf(", ['"));
		const logits = `${call}, ["logits"], [${edits.join(", ")}])["logits"]`;
		return `x = ${logits}[${scene.t}]\nnp.logaddexp.reduce(x) - x[${goal}]`;
	};
}

/**
 * The grid of all parts: the change of the loss without each; a click switches it off.
 * @param {Scene} scene
 */
function switches(scene) {
	const { parts, change, goal } = ablations(scene);
	const { isWide } = scene.columns;
	const heads = Array.from({ length: scene.heads }, (_, h) => String(h));
	const most = Math.max(LEAST_RANGE, ...parts.map((_, i) => Math.abs(change(i))));
	const titles = [
		...heads.map((h) => (isWide && scene.heads <= 6 ? `head ${h}` : `h${h}`)),
		...(isWide ? ["all heads", "feed-fwd"] : ["all", "ff"]),
	];
	const cell = (/** @type {string} */ part) => {
		const value = change(parts.indexOf(part));
		return {
			text: signed(value),
			title: `without ${partName(part)}: ${signed(value, 3)} nats`,
			...diverging(value, most),
			isPressed: offParts(scene).includes(part),
			choose: () => toggle(part),
		};
	};
	const rests = [...heads, "attention", "feedforward"];
	const table = tintedTable(
		titles,
		Array.from({ length: scene.layers }, (_, layer) => [
			offTool(scene, String(layer), isWide ? `layer ${layer}` : String(layer), "the whole layer"),
			rests.map((rest) => cell(`${layer}.${rest}`)),
		]),
	);
	const words = `change of the loss on ${quoted(scene.token(goal))} without the part; `;
	const bound = fixed(most, 1);
	return [
		table,
		el(
			"p",
			{ class: "cap" },
			divergingLegend(`−${bound}`, `+${bound} nats`),
			words,
			"choose some to switch them off together",
		),
	];
}

/**
 * A button that switches a part off.
 * @param {Scene} scene
 * @param {string} part
 * @param {string} words
 * @param {string} title
 */
function offTool(scene, part, words, title) {
	const pressed = { "aria-pressed": String(offParts(scene).includes(part)) };
	return tool(words, () => toggle(part), { ...pressed, title });
}

/** @param {Scene} scene */
function neuronsAsk(scene) {
	const ids = scene.answer(ablateAsk(scene))?.arrays.ids;
	if (!ids || scene.run.config.experts) return null;
	const tokens = Array.from(ids.data);
	const candidate = scene.target ?? tokens[0];
	const rival = tokens.find((id) => id !== candidate);
	if (rival === undefined) return null;
	const query = { t: scene.t, layer: scene.state.layer, candidate, rival };
	const words = Object.entries(query).map(([name, value]) => `${name}=${value}`);
	return `neurons?${words.join("&")}`;
}

/** The strongest neurons of the chosen layer, to switch off. @param {Scene} scene */
function neuronChips(scene) {
	const ask = neuronsAsk(scene);
	const { neurons, shares } = (ask && scene.answer(ask)?.arrays) || {};
	if (!neurons) return null;
	const { layer } = scene.state;
	const chips = Array.from(neurons.data)
		.slice(0, 8)
		.map((neuron, i) => {
			const title = `its direct share in the difference of the logits: ${signed(shares.at(i), 3)}`;
			return offTool(scene, `${layer}.n${neuron}`, `${neuron} ${signed(shares.at(i))}`, title);
		});
	const words = `neurons of layer ${layer} that push hardest`;
	return el(
		"p",
		{ class: "chips indented", role: "group", "aria-label": words },
		`${words}: `,
		chips,
	);
}

/** The candidates with and without what is off. @param {Scene} scene */
function candidateBars(scene) {
	const parts = offParts(scene);
	const { ids, before, after } = scene.answer(offAsk(scene))?.arrays ?? {};
	const all = ablations(scene);
	const tokens = Array.from((ids ?? all.ids).data);
	const rows = tokens.map((id, c) => {
		const p = Math.exp(before ? before.at(c) : all.beforeOf(c));
		const q = after ? Math.exp(after.at(c)) : p;
		const words = after ? `${percent(p)} → ${percent(q)}` : percent(p);
		return el(
			"div",
			{ class: "compared" },
			el("span", { class: id === scene.target ? "ch hit" : "ch" }, glyphs(scene.token(id), 8)),
			el(
				"span",
				{ class: "bars" },
				el("i", { style: { width: `${p * 100}%` } }),
				after ? el("i", { style: { width: `${q * 100}%` } }) : null,
			),
			el("span", {}, words),
		);
	});
	const shown = rows.slice(0, SHOWN);
	const next = tokens.findIndex((id) => id === scene.target);
	if (next >= SHOWN) shown.push(rows[next]);
	const heading = parts.length
		? ["Without ", strong(parts.map(partName).join(", ")), ": "]
		: ["Choose parts to switch them off."];
	const letGo = parts.length
		? tool("all on again", () => store.set({ off: null, n: null }), { class: "tool framed" })
		: null;
	return el("div", {}, el("p", { class: "soft small" }, heading, letGo), shown);
}

/** The change of every token's loss by what is off. @param {Scene} scene */
function offLane(scene) {
	const { nats_before: before, nats_after: after } = scene.answer(offAsk(scene))?.arrays ?? {};
	if (!offParts(scene).length || !before) return null;
	const change = (/** @type {number} */ t) => after.at(t) - before.at(t);
	const name = offParts(scene).map(partName).join(", ");
	return changeLane(scene, {
		id: "patch-off",
		label: `Change of every ${scene.unit}’s loss without ${name}`,
		short: "loss without",
		change,
		describe: (t) => [
			`${quoted(scene.text.tokens[t].text)}: ${fixed(before.at(t))} → ${fixed(after.at(t))} nats`,
			`without ${name}`,
		],
	});
}
