// The views: each has a title, a sentence with numbers, and a figure when it is open.

import { byId, el, morph } from "./dom.js";
import { drawIfChanged, isDrawn, markWaiting } from "./drawn.js";
import { empty, tool } from "./figure_parts.js";

/**
 * @param {Scene} scene with the locked selection
 * @param {View[]} views
 * @param {{toggle: (id: string) => void, save: (id: string) => void}} tools
 */
export function drawStory(scene, views, tools) {
	const story = byId("story");
	views.forEach((view, i) => {
		const section =
			document.getElementById(view.id) ?? story.appendChild(makeSection(view, i, tools));
		const isOpen = scene.state.open.includes(view.id);
		section.classList.toggle("open", isOpen);
		section.querySelector("h2 button")?.setAttribute("aria-expanded", String(isOpen));
		const sentence = /** @type {Element} */ (section.querySelector("header p"));
		const inner = /** @type {HTMLElement} */ (section.querySelector(".inner"));
		inner.hidden = !isOpen;
		drawViewPart(scene, view, sentence, isOpen);
		if (isOpen) drawViewPart(scene, view, inner, isOpen);
		else {
			inner.querySelector(".waiting-box")?.remove();
			markWaiting(inner, false);
		}
	});
}

/**
 * @param {Scene} scene
 * @param {View} view
 * @param {Element} part the sentence or the figure
 * @param {boolean} isOpen
 */
function drawViewPart(scene, view, part, isOpen) {
	const isSentence = part.nodeName === "P";
	const asks = isSentence ? view.sentenceAsks(scene) : view.asks(scene);
	const key = `${view.id} ${part.nodeName}`;
	const problem = scene.problem(asks);
	const isReady = scene.has(asks) || problem !== null;
	if (!isReady && !isDrawn(key)) {
		morph(part, isSentence ? view.purpose : el("div", { class: "waiting-box" }));
	}
	const { run, columns } = scene;
	const inputs = [
		[scene.inputs, columns.room, isOpen, problem],
		[run.checkpoints.length, run.curve.length, view.extra?.(scene)],
	];
	const fill = () => {
		if (problem === null) morph(part, ...(isSentence ? view.sentence(scene) : view.draw(scene)));
		else morph(part, isSentence ? view.purpose : empty("No numbers here.", asSentence(problem)));
	};
	// What is there stays until the new numbers come.
	markWaiting(part, !isReady || !drawIfChanged(key, inputs, fill));
}

/**
 * @param {View} view
 * @param {number} i
 * @param {{toggle: (id: string) => void, save: (id: string) => void}} tools
 */
function makeSection(view, i, tools) {
	const title = el(
		"button",
		{
			"aria-expanded": "false",
			"aria-controls": `${view.id}-figure`,
			title: `${view.title} (${i + 1})`,
			on: { click: () => tools.toggle(view.id) },
		},
		view.title,
	);
	const save = tool("⤓", () => tools.save(view.id), {
		"aria-label": `Save ${view.title}: HTML, SVG, PNG, CSV`,
		title: "Save this view: HTML, SVG, PNG, CSV",
	});
	return el(
		"section",
		{ class: "view", id: view.id, "aria-label": view.title },
		el("header", {}, el("h2", {}, title), el("p", {}), el("span", { class: "tools" }, save)),
		el("div", { class: "inner", id: `${view.id}-figure` }),
	);
}

/** A reason as a sentence. @param {string} reason */
function asSentence(reason) {
	const text = reason.charAt(0).toUpperCase() + reason.slice(1);
	return /[.!?…]$/.test(text) ? text : `${text}.`;
}
