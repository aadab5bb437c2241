// The text: one ruler and one caret for all figures, with a lane for what a head reads from here.

import { columnX, positions } from "./columns.js";
import { palette, systemTheme, textTint, tint } from "./colour.js";
import { byId, el, morph } from "./dom.js";
import { keptCanvas } from "./drawn.js";
import { legend, makeCanvas, tool } from "./figure_parts.js";
import { headDoes } from "./head_names.js";
import { store } from "./state.js";
import { hideTip, showTip } from "./tip.js";
import { moveStep } from "./top.js";
import { count, fixed, glyphs, headName, quotedWhole, signed } from "./words.js";

const MOST_NATS = 5; // from which on the colour is full
const POWER = 0.8; // of the share of it, which gives the alpha
const LANE_PX = 22;

/** Moves the caret, within the text. @param {Scene} scene @param {number} by */
export function moveCaret(scene, by) {
	const t = Math.max(0, Math.min(scene.length - 1, (store.state.t ?? scene.t) + by));
	if (t !== store.state.t) store.set({ t });
}

/** Moves to another layer. @param {Scene} scene @param {number} by */
export const moveLayer = (scene, by) =>
	store.set({ layer: Math.max(0, Math.min(scene.layers - 1, store.state.layer + by)) });

/** Moves to another head of the layer. @param {Scene} scene @param {number} by */
export const moveHead = (scene, by) =>
	store.set({ head: (store.state.head + by + scene.heads) % scene.heads });

/** @param {Scene} scene @param {Tools} tools */
export function drawRuler(scene, tools) {
	morph(byId("crumbs"), crumbs(scene), toolbar(tools));
	drawTokens(scene);
	drawOverview(scene);
}

/** @param {Scene} scene */
function crumbs(scene) {
	const { layer, head, t, step } = { ...scene.state, t: scene.t, step: scene.checkpoint.step };
	const does = headDoes(scene, layer, head);
	const here = scene.text.tokens[t].text;
	return [
		crumb(
			"after",
			[`${t} `, el("code", { title: quotedWhole(here) }, glyphs(here, 8))],
			"position",
			(by) => moveCaret(scene, by),
			"caret after",
		),
		crumb("layer", `${layer}`, "layer", (by) => moveLayer(scene, by)),
		crumb("head", headName(layer, head) + (does ? ` ${does.long}` : ""), "head", (by) =>
			moveHead(scene, by),
		),
		crumb("step", count(step), "checkpoint", (by) => moveStep(scene, by)),
	];
}

/**
 * @param {string} name
 * @param {Children} value
 * @param {string} what
 * @param {(by: number) => void} move
 * @param {string} [label]
 */
function crumb(name, value, what, move, label = name) {
	const step = (/** @type {number} */ by, /** @type {string} */ sign) =>
		el(
			"button",
			{
				"aria-label": `${by < 0 ? "Previous" : "Next"} ${what}`,
				on: { click: () => move(by) },
			},
			sign,
		);
	return el(
		"span",
		{ class: `crumb ${name}` },
		el("span", {}, label),
		step(-1, "‹"),
		el("b", {}, value),
		step(1, "›"),
	);
}

/** Words where there is room, a sign on a phone. @param {string} text @param {string} sign */
const words = (text, sign) => [
	el("span", { class: "wide-only" }, text),
	el("span", { class: "phone-only", "aria-hidden": "true" }, sign),
];

/** @param {Tools} tools */
function toolbar(tools) {
	const surprise = legend("cost", {
		low: "0",
		high: `${MOST_NATS}+ nats`,
		what: "surprise",
		power: POWER,
	});
	return [
		el("span", { class: "grow" }),
		el("span", { class: "soft roomy" }, surprise),
		tool(words("Edit text", "✎"), tools.editText, {
			title: "Edit the text (/)",
			"aria-label": "Edit text",
		}),
		tool(words("Save", "⤓"), tools.save, { title: "Save what is shown (s)", "aria-label": "Save" }),
		tool("◐", changeTheme, { "aria-label": "Light or dark" }),
		tool("?", tools.help, { "aria-label": "Keys (?)" }),
	];
}

function changeTheme() {
	const next = (store.state.theme ?? systemTheme()) === "dark" ? "light" : "dark";
	store.set({ theme: next === systemTheme() ? null : next });
}

/** @param {Scene} scene */
function drawTokens(scene) {
	const nats = scene.answer("read")?.arrays.nats;
	const { columns } = scene;
	const buttons = positions(columns).map((t) => {
		const token = scene.text.tokens[t];
		const colour = nats && t > 0 ? textTint("cost", surpriseAlpha(nats.at(t))) : null;
		const isRead = t <= scene.t;
		const classes = [
			"tok",
			t === scene.t && "here",
			t === scene.t + 1 && "next",
			!isRead && "ahead",
		];
		const fits = Math.max(1, Math.floor((columns.width - 2) / 9));
		const shown = glyphs(token.text);
		const cut = [...shown].length > fits ? `${[...shown].slice(0, fits - 1).join("")}…` : shown;
		const surprise = nats && t > 0 ? `, surprise ${fixed(nats.at(t))} nats` : "";
		const say = `${t}: ${glyphs(token.text)}${surprise}`;
		return el(
			"button",
			{
				class: classes.filter(Boolean).join(" "),
				tabindex: t === scene.t ? 0 : -1,
				"aria-label": say,
				"aria-current": t === scene.t ? "true" : null,
				style: colour ? { background: colour.background, color: colour.text } : {},
				on: {
					click: () => store.set({ t }),
					pointerenter: (event) =>
						showTip(event, `${t} ${quotedWhole(token.text)}${surprise}`, "click: stand after it"),
					pointerleave: hideTip,
				},
			},
			token.text.trim() ? cut : el("i", {}, cut), // a sign for white space
		);
	});
	const box = byId("tokens");
	const hadFocus = box.contains(document.activeElement);
	morph(
		box,
		el("span", { class: "lab", "aria-hidden": "true" }, columns.isWide ? "surprise" : ""),
		buttons,
	);
	if (hadFocus) box.querySelector(".here")?.focus({ preventScroll: true });
}

/** @param {number} nats */
const surpriseAlpha = (nats) => Math.min(1, Math.max(0, nats) / MOST_NATS) ** POWER;

/** The lane: what the shown head reads from here. @param {Scene} scene */
export function drawLane(scene) {
	const { columns } = scene;
	const { layer, head, towards } = scene.state;
	const weights = scene.answer(`attention?t=${scene.t}`)?.arrays.weights;
	const ask = towards ? towardsAsk(scene) : null;
	const pushes = ask ? scene.answer(ask)?.arrays.shares : undefined;
	const [canvas, context] = makeCanvas(columns.count * columns.width, LANE_PX);
	let most = 0.02;
	for (let t = 0; pushes && t <= scene.t; t++) most = Math.max(most, Math.abs(pushes.at(t)));
	for (const t of positions(columns)) {
		if (t > scene.t) continue;
		const x = columnX(columns, t);
		context.fillStyle = palette.line;
		context.fillRect(x + 1, pushes ? LANE_PX / 2 : LANE_PX - 1, columns.width - 2, 1);
		if (pushes) {
			const height = (Math.abs(pushes.at(t)) / most) * (LANE_PX / 2 - 1);
			context.fillStyle = tint(pushes.at(t) > 0 ? "look" : "cost", 0.9);
			const top = pushes.at(t) > 0 ? LANE_PX / 2 - height : LANE_PX / 2;
			context.fillRect(x + 1, top, columns.width - 2, height);
		} else if (weights) {
			const height = weights.at(layer, head, t) * (LANE_PX - 3);
			context.fillStyle = tint("look", 0.9);
			context.fillRect(x + 1, LANE_PX - Math.max(0.5, height), columns.width - 2, height);
		}
	}
	const name = headName(layer, head);
	const label = pushes ? `${name} pushes, ±${signed(most).replace("+", "")}` : `${name} reads, 0–1`;
	morph(
		byId("lane"),
		el("span", { class: "lab" }, columns.isWide ? label : name),
		el("span", { class: "canvas", style: { "margin-left": `${columns.gutter}px` } }, canvas),
	);
}

/**
 * What a head's reading of each position adds to the difference of logits that Why explains; null
 * where it explains one logit alone.
 * @param {Scene} scene
 */
export function towardsAsk(scene) {
	const { layer, head, towards } = scene.state;
	if (!towards) return null;
	const [candidate, rival] = towards;
	const pair = `candidate=${candidate}&rival=${rival}`;
	return `why-source?t=${scene.t}&layer=${layer}&head=${head}&${pair}`;
}

/** A strip of the whole text where a window shows only part of it; to drag. @param {Scene} scene */
function drawOverview(scene) {
	const box = byId("overview");
	const { columns } = scene;
	box.hidden = columns.count === scene.length;
	if (box.hidden) return;
	const room = Math.max(40, columns.room - columns.gutter);
	const nats = scene.answer("read")?.arrays.nats;
	const z = room / scene.length;
	const canvas = keptCanvas("overview", [nats, scene.text, room], () => {
		const [strip, context] = makeCanvas(room, 8);
		for (let t = 0; t < scene.length; t++) {
			context.fillStyle = nats && t > 0 ? tint("cost", surpriseAlpha(nats.at(t))) : palette.sink;
			context.fillRect(t * z, 0, Math.max(1, z - 0.3), 8);
		}
		return strip;
	});
	const go = (/** @type {any} */ event) => {
		if (event.type === "pointermove" && !(event.buttons & 1)) return;
		const rect = event.currentTarget.getBoundingClientRect();
		const t = Math.floor(((event.clientX - rect.left) / rect.width) * scene.length);
		store.set({ t: Math.max(0, Math.min(scene.length - 1, t)) });
	};
	const slider = el(
		"div",
		{
			class: "strip",
			style: { "margin-left": `${columns.gutter}px`, width: `${room}px` },
			on: { pointerdown: go, pointermove: go },
		},
		canvas,
		el("i", {
			style: { left: `${columns.first * z}px`, width: `${Math.max(6, columns.count * z)}px` },
		}),
	);
	morph(box, slider);
}
