// Who is looked at, and when: the run, and its loss curve, which is the slider of checkpoints.

import { recorded } from "./api.js";
import { palette } from "./colour.js";
import { announce, byId, el, morph } from "./dom.js";
import { hasValue } from "./line_chart.js";
import { store } from "./state.js";
import { count, fixed, glyphs, plural } from "./words.js";

/** @param {Run} run @param {Run[]} runs */
export function drawTitle(run, runs) {
	const { layers, heads, width } = run.config;
	const facts = [
		[run.preset, corpusName(run)].filter(Boolean).join(" on "),
		`${plural(layers, "layer")} × ${plural(heads, "head")}`,
		`width ${count(width)}`,
		`${inMillions(run.parameters)} weights`,
		{ char: "characters", byte: "bytes" }[run.tokenizer] ?? `${count(run.vocab_size)} tokens`,
		...(run.is_training ? ["training now"] : []),
	];
	const name =
		runs.length === 1
			? glyphs(run.name, 60).replaceAll("·", " ")
			: el(
					"select",
					{
						"aria-label": "Run",
						on: { change: (event) => store.set({ run: event.target.value }) },
					},
					runs.map((other) =>
						el("option", { value: other.name, selected: other === run }, other.name),
					),
				);
	morph(
		byId("title"),
		el("small", {}, "glasslm · see inside"),
		el("h1", {}, name),
		el("small", {}, facts.join(" · ")),
		(run.notes ?? []).map((note) => el("small", { class: "note" }, note)),
	);
	document.title = `${run.name} · see inside`;
}

/** @param {Run} run */
function corpusName(run) {
	if (run.corpus) return run.corpus;
	return run.files.length > 2 ? `${run.files[0]} and others` : run.files.join(" and ");
}

/** @param {number} n */
function inMillions(n) {
	return n >= 1e5 ? `${fixed(n / 1e6, 2)}M` : count(n);
}

/** Goes to the checkpoint that is `by` places further. @param {Scene} scene @param {number} by */
export function moveStep(scene, by) {
	const { checkpoints } = scene.run;
	const place = checkpoints.indexOf(scene.checkpoint) + by;
	const next = checkpoints[Math.max(0, Math.min(checkpoints.length - 1, place))];
	if (next !== scene.checkpoint) goTo(scene.run, next);
}

/** @param {Run} run @param {Checkpoint} checkpoint */
function goTo(run, checkpoint) {
	const isLatest = checkpoint === run.checkpoints.at(-1);
	store.set({ step: isLatest ? null : checkpoint.step });
	announce(`step ${checkpoint.step}`);
}

/** The curve with its checkpoints. @param {Scene} scene */
export function drawWhen(scene) {
	const { run, checkpoint } = scene;
	const box = byId("when");
	const width = box.clientWidth;
	const height = box.clientHeight - 16;
	const last = Math.max(1, run.checkpoints.at(-1)?.step ?? 1, run.curve.at(-1)?.[0] ?? 1);
	const x = (/** @type {number} */ step) => (step / last) * width;
	const here = x(checkpoint.step);
	const isRight = here > width * 0.6;
	const side = { "text-anchor": isRight ? "end" : "start", x: here + (isRight ? -8 : 8) };
	const loss = checkpoint.val_loss;
	const drawing = el(
		"svg",
		{ viewBox: `0 0 ${width} ${height + 16}`, "aria-hidden": "true" },
		curveLine(run, x, height),
		el("line", { x1: 0, x2: width, y1: height + 1, y2: height + 1, stroke: palette.line }),
		run.checkpoints.map((other) => mark(x(other.step), height + 1, other === checkpoint)),
		el("line", { x1: here, x2: here, y1: 2, y2: height, stroke: palette.ink, opacity: 0.5 }),
		el("text", { ...side, y: 12, class: "strong" }, `step ${count(checkpoint.step)}`),
		loss === null ? null : el("text", { ...side, y: 26 }, `validation ${fixed(loss, 3)} nats`),
		scene.columns.isWide ? el("text", { x: 10, y: height + 15 }, caption(run)) : null,
	);
	const slider = el("input", {
		type: "range",
		min: 0,
		max: run.checkpoints.length - 1,
		step: 1,
		value: String(run.checkpoints.indexOf(checkpoint)),
		disabled: run.checkpoints.length < 2,
		"aria-label": "Checkpoint",
		"aria-valuetext": `step ${checkpoint.step}`,
		on: {
			input: (event) => goTo(run, run.checkpoints[Number(event.target.value)]),
			pointerdown: (event) => {
				event.preventDefault(); // the stops are not as far apart as the slider's own
				event.target.focus();
				event.target.setPointerCapture(event.pointerId);
				goTo(run, nearest(run, event, last));
			},
			pointermove: (event) => {
				if (event.target.hasPointerCapture(event.pointerId)) goTo(run, nearest(run, event, last));
			},
		},
	});
	morph(box, drawing, slider, el("span", { class: "ring" }));
}

/** @param {Run} run */
function caption(run) {
	if (run.kept) return `1 of ${plural(run.kept.length, "checkpoint")} is in this file`;
	const kept = plural(run.checkpoints.length, "checkpoint");
	const more = run.checkpoints.length < 4 && !recorded ? ": --keep 100 keeps more" : "";
	return `loss while it ${run.is_training ? "trains" : "trained"} · ${kept} kept${more}`;
}

/** @param {number} x @param {number} y @param {boolean} isChosen */
function mark(x, y, isChosen) {
	const fill = isChosen ? palette.ink : palette.paper;
	const shape = { r: isChosen ? 6 : 3.5, stroke: palette.ink, "stroke-width": 1.5 };
	return el("circle", { cx: x, cy: y, fill, ...shape });
}

/** @param {Run} run @param {(step: number) => number} x @param {number} height */
function curveLine(run, x, height) {
	const curve = run.curve.filter(hasValue);
	if (curve.length < 2) return null;
	const losses = curve.map(([, loss]) => loss);
	const low = Math.min(...losses);
	const high = Math.max(...losses);
	const y = (/** @type {number} */ loss) =>
		6 + (height - 14) * (1 - (loss - low) / (high - low || 1));
	const points = curve.map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`);
	const stroke = `rgb(${palette.look})`;
	const line = { fill: "none", stroke, "stroke-width": 1.5, opacity: 0.6 };
	return el("polyline", { points: points.join(" "), ...line });
}

/** @param {Run} run @param {any} event @param {number} last */
function nearest(run, event, last) {
	const box = byId("when").getBoundingClientRect();
	const step = ((event.clientX - box.left) / box.width) * last;
	return run.checkpoints.reduce((best, other) =>
		Math.abs(other.step - step) < Math.abs(best.step - step) ? other : best,
	);
}
