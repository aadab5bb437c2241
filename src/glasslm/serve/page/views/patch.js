// Patch: what the loss and the next token become without a part, or with another text's stream.

import { changeLane } from "../change_lane.js";
import { diverging } from "../colour.js";
import { el } from "../dom.js";
import { divergingLegend, number, strong, tool } from "../figure_parts.js";
import { isWorthIt, partName } from "../scene.js";
import { store } from "../state.js";
import { streamName, streamWords } from "../stream_figure.js";
import { oneTabStop } from "../tab_stops.js";
import { asTable, tintedTable } from "../table.js";
import { fixed, glyphs, percent, quoted, quotedWhole, signed } from "../words.js";
import { copyPython, goalOf, patchAsks, patched, secondText } from "./second_text.js";

const LEAST_RANGE = 0.2; // nats, that a full colour stands for
const SHOWN = 6; // candidates

/** @param {Scene} scene */
const ablateAsk = (scene) => `ablate?t=${scene.t}`;

/** The parts that are switched off. @param {Scene} scene */
const offParts = (scene) => (scene.state.off ? scene.state.off.split(",") : []);

/** @param {Scene} scene @param {string[]} [parts] */
const offAsk = (scene, parts = offParts(scene)) => `off?t=${scene.t}&parts=${parts.join(",")}`;

/** @param {Scene} scene */
const offAsks = (scene) => (offParts(scene).length ? [offAsk(scene)] : []);

/** What a chosen layer or neuron does alone: `ablate` has the other parts. @param {Scene} scene */
function aloneAsks(scene) {
	const part = /^patch\.off\.(\d+(-n\d+)?)$/.exec(store.state.n ?? "")?.[1];
	return part ? [offAsk(scene, [part.replace("-", ".")])] : [];
}

/** The loss on the goal with and without parts; nan where it is not here. @param {Scene} scene @param {string} ask */
function lossesOf(scene, ask) {
	const { ids, before, after } = scene.answer(ask)?.arrays ?? {};
	const place = Array.from(ids?.data ?? []).indexOf(goalOf(scene));
	return place < 0 ? [NaN, NaN] : [-before.at(place), -after.at(place)];
}

/** @param {string[]} parts */
const list = (parts) =>
	parts
		.map(partName)
		.join(", ")
		.replace(/, ([^,]*)$/, " and $1");

/** @param {Scene} scene */
const offWords = (scene) => list(offParts(scene));

/** @param {string} part */
function toggle(part) {
	const parts = store.state.off ? store.state.off.split(",") : [];
	const rest = parts.filter((other) => other !== part);
	const next = rest.length < parts.length ? rest : [...parts, part];
	store.set({ off: next.length ? next.join(",") : null, n: `patch.off.${part.replace(".", "-")}` });
}

/** @type {View} */
export const patch = {
	id: "patch",
	title: "Patch",
	purpose: "Switch parts off, or copy what a second text computes.",
	sentenceAsks: (scene) =>
		isWorthIt(scene, "patch", scene.layers * (scene.heads + 2))
			? [ablateAsk(scene), ...offAsks(scene)]
			: [],
	asks: (scene) => [ablateAsk(scene), ...offAsks(scene), ...aloneAsks(scene)],
	wishes: (scene) => [neuronsAsk(scene), ...patchAsks(scene)].filter((ask) => ask !== null),
	extra: (scene) => [
		scene.problem(patchAsks(scene)),
		...[neuronsAsk(scene), ...patchAsks(scene)].map((ask) => ask && scene.has([ask])),
	],

	sentence(scene) {
		if (!scene.answer(ablateAsk(scene))) return [patch.purpose];
		const { goal, parts, before, change } = ablations(scene);
		if (offParts(scene).length) {
			const [, after] = lossesOf(scene, offAsk(scene));
			return [
				"Without ",
				strong(offWords(scene)),
				" the loss on ",
				strong(quoted(scene.token(goal))),
				" goes from ",
				number(fixed(before), "patch.before"),
				" to ",
				number(fixed(after), "patch.all"),
				` nats (${signed(after - before)}).`,
			];
		}
		const single = parts.map((_, i) => i).filter((i) => !parts[i].endsWith(".attention"));
		const best = single.reduce((a, i) => (Math.abs(change(i)) > Math.abs(change(a)) ? i : a));
		return [
			"Without ",
			strong(partName(parts[best])),
			" the loss on ",
			strong(quoted(scene.token(goal))),
			scene.target === null ? " (its first choice: the text ends here)" : "",
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
				el("div", {}, el("div", { class: "wide" }, switches(scene)), neuronChips(scene)),
				candidateBars(scene),
			),
			offLane(scene),
			secondText(scene),
			asTable(() => patch.rows(scene)),
		].filter((x) => x !== null);
	},

	rows(scene) {
		const { ids, parts, logprobs, before, beforeOf, change } = ablations(scene);
		const tokens = Array.from(ids.data);
		const head = ["without", "change of the loss, nats"];
		return [
			[...head, ...tokens.map((id) => `probability of ${glyphs(scene.token(id))}`)],
			["nothing", 0, ...tokens.map((_, c) => Math.exp(beforeOf(c)))],
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
		if (kind === "off" || kind === "all") {
			const isAll = kind === "all";
			const off = isAll ? offParts(scene) : [(key[0] ?? "").replace("-", ".")];
			const i = isAll ? -1 : parts.indexOf(off[0]);
			const after = i < 0 ? lossesOf(scene, offAsk(scene, off))[1] : before + change(i);
			if (!off.length) return null;
			const alone = off.length === 1 && offParts(scene).length > 1 ? " alone" : "";
			const words = [
				`${loss} is ${fixed(after, 4)}, not ${fixed(before, 4)}, without ${list(off)}${alone}`,
			];
			const value = `${signed(after - before, 4)} nats`;
			return { value, words, name: editedName(off[0]), python: editPython(scene, off, goal) };
		}
		if (kind !== "copy") return null;
		const [place, p] = key.map(Number);
		const x = patched(scene, place, p);
		if (x === null) return null;
		const where = `${streamWords(place)}, position ${p},`;
		const words = [`change of ${loss} when the stream ${where} is that of the second text`];
		const value = `${signed(x, 4)} nats`;
		return { value, words, name: streamName(place), python: copyPython(scene, place, p) };
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
 * Python that gives the loss without some parts.
 * @param {Scene} scene
 * @param {string[]} off
 * @param {number} goal
 * @returns {(code: string) => string}
 */
function editPython(scene, off, goal) {
	const parts = off.flatMap((part) =>
		part.includes(".") ? [part] : [`${part}.attention`, `${part}.feedforward`],
	);
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
		scene.columns.room * (isWide ? 0.57 : 1),
		"Change of the loss without each part",
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
			"a click switches the part off, several together",
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
function neuronPair(scene) {
	const ids = scene.answer(ablateAsk(scene))?.arrays.ids;
	if (!ids || scene.run.config.experts) return null;
	const tokens = Array.from(ids.data);
	const candidate = scene.target ?? tokens[0];
	const rival = tokens.find((id) => id !== candidate);
	return rival === undefined ? null : { candidate, rival };
}

/** @param {Scene} scene */
function neuronsAsk(scene) {
	const pair = neuronPair(scene);
	if (!pair) return null;
	const { candidate, rival } = pair;
	return `neurons?t=${scene.t}&layer=${scene.state.layer}&candidate=${candidate}&rival=${rival}`;
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
			const title = `neuron ${neuron}: ${signed(shares.at(i), 3)} in the difference of the logits`;
			return offTool(scene, `${layer}.n${neuron}`, `${neuron}: ${signed(shares.at(i))}`, title);
		});
	const [asked, rival] = Object.values(neuronPair(scene) ?? {}).map((id) =>
		quoted(scene.token(id)),
	);
	const words = `neurons that push ${asked} over ${rival} up or down most`;
	const step = (/** @type {number} */ by, /** @type {string} */ sign) =>
		tool(sign, () => store.set({ layer: layer + by }), {
			"aria-label": `Neurons of layer ${layer + by}`,
			disabled: layer + by < 0 || layer + by >= scene.layers,
		});
	return oneTabStop(
		"neurons",
		el(
			"p",
			{ class: "chips indented", role: "group", "aria-label": words },
			el("span", {}, step(-1, "‹"), ` layer ${layer} `, step(1, "›")),
			`${words} (share of the difference of the two logits; a click switches one off): `,
			chips,
		),
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
			el(
				"span",
				{ class: id === scene.target ? "ch hit" : "ch", title: quotedWhole(scene.token(id)) },
				glyphs(scene.token(id), 8),
			),
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
		? ["Without ", strong(offWords(scene)), ": "]
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
	const name = offWords(scene);
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
