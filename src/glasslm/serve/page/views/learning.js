// Learning: a run over its steps, and two checkpoints or runs side by side on the same text.

import { changeLane } from "../change_lane.js";
import { palette } from "../colour.js";
import { el } from "../dom.js";
import { empty, number, strong } from "../figure_parts.js";
import { KINDS, scoreName } from "../head_names.js";
import { hasValue, lineChart } from "../line_chart.js";
import { comparedWith, isWorthIt } from "../scene.js";
import { store } from "../state.js";
import { asTable, table } from "../table.js";
import { count, fixed, glyphs, headName, percent, plural, quoted, score } from "../words.js";

const ASK = "learning";
const FEW = 5; // checkpoints, of which no curve can be drawn
const MOST_POINTS = 24; // checkpoints of a curve
const PROBE_TOKENS = 2048; // read for the loss by position
const SHOWN = 5; // first choices of each side
const LEAST_INDUCTION = 0.1; // of a score that is spoken of

/** @param {Scene} scene */
function isOpenOrCheap(scene) {
	return isWorthIt(scene, "learning", PROBE_TOKENS / Math.max(1, scene.t + 1));
}

/** @type {View} */
export const learning = {
	id: "learning",
	title: "Learning",
	purpose: "The run over its steps, and two checkpoints side by side.",
	sentenceAsks: (scene) => (isOpenOrCheap(scene) ? [ASK] : []),
	asks: (scene) => [ASK, ...againstAsks(scene)],
	wishes: (scene) => curveCheckpoints(scene).map((other) => scene.pathAt(other, ASK)),
	extra: (scene) => [
		curveCheckpoints(scene).map((other) => scene.has([scene.pathAt(other, ASK)])),
		scene.runs.map((run) => [run.name, run.checkpoints.length, run.curve.length]),
	],

	sentence(scene) {
		if (!scene.answer(ASK)) return [learning.purpose];
		const [previous, induction] = ["previous_token", "induction"].map((kind) => best(scene, kind));
		const { step } = scene.checkpoint;
		return [
			`At step ${count(step)} the strongest previous-token score on random repeated tokens is `,
			number(score(previous.score), "learning.previous_token"),
			induction.score < LEAST_INDUCTION
				? "; no head does induction there (best "
				: ", that of induction ",
			number(score(induction.score), "learning.induction"),
			induction.score < LEAST_INDUCTION ? "). " : ". ",
			strong(plural(keptOf(scene.run).length, "checkpoint")),
			" to slide over.",
		];
	},

	draw(scene) {
		return [
			fewCheckpoints(scene),
			el("div", { class: "charts" }, lossChart(scene), scoreChart(scene), positionChart(scene)),
			probeNote(scene),
			...comparison(scene),
			asTable(() => learning.rows(scene)),
		].filter((x) => x !== null);
	},

	rows(scene) {
		/** @type {Rows} */
		const rows = [["step", ...KINDS.map(({ long }) => `best ${long} score`), "validation loss"]];
		for (const checkpoint of curveCheckpoints(scene)) {
			if (!scene.has([scene.pathAt(checkpoint, ASK)])) continue;
			const scores = KINDS.map(({ kind }) => best(scene, kind, checkpoint).score);
			rows.push([checkpoint.step, ...scores, checkpoint.val_loss ?? ""]);
		}
		return rows;
	},

	origin(scene, [kind]) {
		const known = KINDS.find((other) => other.kind === kind);
		if (!known || !scene.answer(ASK)) return null;
		const { score: value, layer, head } = best(scene, kind);
		const words = [
			`${known.long} score of head ${headName(layer, head)}, the highest of all: its mean weight `,
			"there, on random tokens that are repeated once",
		];
		const place = scene.answer(ASK)?.header.kinds.indexOf(kind);
		const index = `[${place}, ${layer}, ${head}]`;
		return { value: fixed(value, 4), words, name: scoreName(known, "repeated"), index };
	},
};

/**
 * The best head of a kind.
 * @param {Scene} scene
 * @param {string} kind
 * @param {Checkpoint} [checkpoint]
 */
function best(scene, kind, checkpoint = scene.checkpoint) {
	const answer = scene.answer(scene.pathAt(checkpoint, ASK));
	const place = answer?.header.kinds?.indexOf(kind) ?? -1;
	if (!answer || place < 0) return { score: NaN, layer: 0, head: 0 };
	const { scores, layers, heads } = answer.arrays;
	return { score: scores.at(place), layer: layers.at(place), head: heads.at(place) };
}

/** The checkpoints of a run; of a saved one, all that there were. @param {Run} run */
const keptOf = (run) => run.kept ?? run.checkpoints;

/** The checkpoints of the curves over steps, evenly. @param {Scene} scene */
function curveCheckpoints(scene) {
	const all = keptOf(scene.run);
	if (!scene.state.open.includes("learning")) return [];
	if (all.length <= MOST_POINTS) return all;
	const places = Array.from({ length: MOST_POINTS }, (_, i) =>
		Math.round((i * (all.length - 1)) / (MOST_POINTS - 1)),
	);
	return places.map((place) => all[place]);
}

/** @param {Scene} scene */
function fewCheckpoints(scene) {
	const { max_steps: steps, keep, is_training: isTraining } = scene.run;
	const checkpoints = keptOf(scene.run);
	if (checkpoints.length >= FEW) return null;
	const interval = Math.max(1, Math.round((steps ?? 1000) / 20));
	const kept = `This run has ${plural(checkpoints.length, "checkpoint")}`;
	return empty(
		`${kept}${isTraining ? " so far" : ""}.`,
		`It keeps step 0, the best one and the latest ${plural(keep, "one")}; curves over the steps `,
		"need more. Train with ",
		el("code", {}, `--keep 100 --checkpoint-interval ${interval}`),
		".",
	);
}

/**
 * One of three charts side by side, over `most` steps or tokens.
 * @param {Scene} scene
 * @param {Pick<Chart, "title" | "yAxis" | "lines" | "mark" | "describe">
 *   & {most: number, label: string}} chart
 */
function chart(scene, { most, label, ...rest }) {
	const { room, isWide } = scene.columns;
	const ticks = [0, most].map((at) => ({ at, text: count(at) }));
	const width = isWide ? Math.floor((room - 56) / 3) : room;
	return lineChart({ ...rest, width, height: 180, xAxis: { most, label, ticks } });
}

/** The curves of the run, and of the one that it is compared with. @param {Scene} scene */
function lossChart(scene) {
	const other = comparedWith(scene)?.run;
	const runs = [scene.run, ...(other && other.name !== scene.run.name ? [other] : [])];
	const lines = runs.flatMap((run, i) => [
		{
			name: i ? "other" : "val",
			points: run.val_curve.filter(hasValue),
			colour: i ? palette.soft : `rgb(${palette.cost})`,
			dash: i ? "4 3" : "",
			withDots: run.val_curve.length < 30,
		},
		...(i
			? []
			: [{ name: "train", points: run.curve.filter(hasValue), colour: palette.soft, width: 1 }]),
	]);
	const all = lines.flatMap(({ points }) => points);
	if (!all.length) return null;
	const most = Math.max(1, ...all.map(([step]) => step));
	return chart(scene, {
		title: scene.run.is_training ? "Loss, while it trains" : "Loss over the steps",
		most,
		label: "steps",
		yAxis: lossAxis(all.map(([, loss]) => loss)),
		lines,
		mark: scene.checkpoint.step,
		describe: `Training and validation loss in nats over ${count(most)} steps`,
	});
}

/** @param {number[]} losses */
function lossAxis(losses) {
	const least = Math.floor(Math.min(...losses) * 2) / 2;
	const most = Math.max(least + 0.5, Math.ceil(Math.max(...losses) * 2) / 2);
	const ticks = [least, (least + most) / 2, most];
	return { least, most, ticks, format: (/** @type {number} */ y) => fixed(y, 1) };
}

/** The best head of each kind over the steps. @param {Scene} scene */
function scoreChart(scene) {
	const checkpoints = curveCheckpoints(scene);
	const colours = [`rgb(${palette.look})`, `rgb(${palette.cost})`, `rgb(${palette.slope})`];
	const dashes = ["", "2 3", "6 3", "1 2"];
	const n = checkpoints.filter((other) => scene.answer(scene.pathAt(other, ASK))).length;
	const most = Math.max(1, checkpoints.at(-1)?.step ?? 1);
	return chart(scene, {
		title: "Best heads, random repeated tokens",
		most,
		label: n < checkpoints.length ? `steps (${n} of ${checkpoints.length} read)` : "steps",
		yAxis: { least: 0, most: 1, ticks: [0, 0.5, 1], format: (y) => fixed(y, 1) },
		lines: KINDS.map(({ kind, short }, i) => ({
			name: short,
			points: checkpoints.map((other) => [other.step, best(scene, kind, other).score]),
			colour: colours[i] ?? palette.soft,
			dash: dashes[i],
			withDots: checkpoints.length < 30,
		})),
		mark: scene.checkpoint.step,
		describe: "The highest score of any head, of each kind, over the steps",
	});
}

/**
 * The loss by position in the context, here and at what it is compared with.
 * @param {Scene} scene
 */
function positionChart(scene) {
	const compared = comparedWith(scene);
	const first = keptOf(scene.run)[0];
	const second = compared?.checkpoint ?? (first === scene.checkpoint ? null : first);
	const curveOf = (/** @type {Checkpoint} */ checkpoint) =>
		scene.answer(scene.pathAt(checkpoint, ASK))?.arrays.probe_smooth;
	const sides = [scene.checkpoint, ...(second ? [second] : [])];
	const lines = sides.flatMap((checkpoint, i) => {
		const curve = curveOf(checkpoint);
		if (!curve) return [];
		const name = compared && i ? "other" : `step ${count(checkpoint.step)}`;
		const points = Array.from(curve.data, (nats, t) => [t, nats]);
		const colour = i ? palette.soft : `rgb(${palette.cost})`;
		return [{ name, points, colour, dash: i ? "4 3" : "" }];
	});
	if (!lines.length) return null;
	const most = Math.max(...lines.map(({ points }) => points.length - 1));
	return chart(scene, {
		title: "Loss by position in the context",
		most,
		label: "tokens before",
		yAxis: lossAxis(lines.flatMap(({ points }) => points.map(([, nats]) => nats))),
		lines,
		describe: "Validation loss in nats by the number of tokens that were read before",
	});
}

/** @param {Scene} scene */
function probeNote(scene) {
	const reason = scene.answer(ASK)?.header.probe_reason;
	return reason ? el("p", { class: "cap" }, `No loss by position: ${reason}`) : null;
}

/** @param {Scene} scene */
function againstAsks(scene) {
	const compared = comparedWith(scene);
	if (!compared) return [];
	const { checkpoint } = compared;
	return ["read", scene.pathAt(checkpoint, "read"), scene.pathAt(checkpoint, ASK)];
}

/** @param {Scene} scene */
function comparisonChoice(scene) {
	if (scene.run.kept) return null; // a saved file has one comparison
	const options = scene.runs.flatMap((run) =>
		run.checkpoints
			.filter((other) => other !== scene.checkpoint)
			.map((other) => {
				const value = `${run.name}@${other.step}`;
				const words = `${run === scene.run ? "" : `${run.name}, `}step ${count(other.step)}`;
				const isLike = run.tokenizer_sha256 === scene.run.tokenizer_sha256;
				const props = { value, selected: value === scene.state.against, disabled: !isLike };
				return el("option", props, isLike ? words : `${words} (another tokenizer)`);
			}),
	);
	const choose = (/** @type {any} */ event) => store.set({ against: event.target.value || null });
	const none = el("option", { value: "", selected: !comparedWith(scene) }, "nothing");
	return el(
		"div",
		{ class: "dials" },
		el("label", {}, "side by side with ", el("select", { on: { change: choose } }, none, options)),
	);
}

/** Two checkpoints on the same text. @param {Scene} scene */
function comparison(scene) {
	const compared = comparedWith(scene);
	const choice = comparisonChoice(scene);
	if (!compared) return [choice];
	const here = scene.answer("read");
	const there = scene.answer(scene.pathAt(compared.checkpoint, "read"));
	if (!here || !there) return [choice];
	const change = (/** @type {number} */ t) => here.arrays.nats.at(t) - there.arrays.nats.at(t);
	const name = sideName(scene, compared);
	return [
		choice,
		el("div", { class: "wide sides indented" }, sideTable(scene, compared)),
		changeLane(scene, {
			id: "learning-change",
			label: `Surprise here, less that of ${name}`,
			short: "here − there",
			change,
			describe: (t) => [
				`${quoted(scene.text.tokens[t].text)}: ${fixed(there.arrays.nats.at(t))} nats at ${name}, ` +
					`${fixed(here.arrays.nats.at(t))} here`,
			],
		}),
	];
}

/** @param {Scene} scene @param {Compared} side */
function sideName(scene, { run, checkpoint }) {
	const step = `step ${count(checkpoint.step)}`;
	return run.name === scene.run.name ? step : `${run.name}, ${step}`;
}

/** @param {Scene} scene @param {Compared} compared */
function sideTable(scene, compared) {
	const sides = [{ run: scene.run, checkpoint: scene.checkpoint }, compared];
	const read = sides.map(({ checkpoint }) => scene.answer(scene.pathAt(checkpoint, "read")));
	const next = scene.t + 1;
	/** @type {Rows} */
	const rows = [
		["", ...sides.map((side) => sideName(scene, side))],
		["weights", ...sides.map(({ run }) => count(run.parameters))],
		["validation loss", ...sides.map(({ checkpoint }) => fixed(checkpoint.val_loss, 3))],
		["bits per byte of this text", ...read.map((x) => fixed(x?.header.bits_per_byte, 3))],
		["first choices here", ...read.map((x) => firstChoices(scene, x))],
		...KINDS.map(({ kind, long }) => {
			const cells = sides.map(({ checkpoint }) => {
				const { score: value, layer, head } = best(scene, kind, checkpoint);
				return Number.isFinite(value) ? `${score(value)} (head ${headName(layer, head)})` : "–";
			});
			return [`best ${long} score`, ...cells];
		}),
	];
	if (scene.target !== null) {
		const words = `surprise of ${quoted(scene.token(scene.target))}, nats`;
		rows.splice(4, 0, [words, ...read.map((x) => fixed(x?.arrays.nats.at(next)))]);
	}
	return table(rows);
}

/** @param {Scene} scene @param {Answer | undefined} read */
function firstChoices(scene, read) {
	if (!read) return "–";
	const { top_ids: ids, top_logprobs: logprobs } = read.arrays;
	return Array.from({ length: Math.min(SHOWN, ids.shape[1]) }, (_, k) => {
		const p = percent(Math.exp(logprobs.at(scene.t, k)));
		return `${glyphs(scene.token(ids.at(scene.t, k)), 8)}\u00a0${p}`;
	}).join(", ");
}
