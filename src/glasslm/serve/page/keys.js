// The keyboard: what can be reached without a pointer, which is everything.

import { moveCaret, moveHead, moveLayer } from "./ruler.js";
import { store } from "./state.js";
import { moveStep } from "./top.js";

/** Keys and what they do, for the list of keys. @type {[string, string][]} */
export const KEYS = [
	["← →", "the caret, one token (with Shift: ten)"],
	["↑ ↓", "layer"],
	["[ ]", "head"],
	[", .", "checkpoint"],
	["1 – 8", "open or close a view, and go there"],
	["Tab", "into a figure or a table of numbers: arrows move a cell, Enter chooses it"],
	["Enter", "on a number: where it comes from"],
	["t", "the view under focus as a table"],
	["/", "edit the text"],
	["s", "save what is shown"],
	["Esc", "let go of the chosen number"],
	["?", "this list"],
];

/**
 * @param {object} given
 * @param {() => Scene | null} given.scene
 * @param {(id: string) => void} given.toggle opens or closes a view
 * @param {string[]} given.views their ids, in order
 * @param {Tools} given.tools
 */
export function listenToKeys({ scene, toggle, views, tools }) {
	document.addEventListener("keydown", (event) => {
		const { target } = event;
		const now = scene();
		if (event.ctrlKey || event.metaKey || event.altKey || !now) return;
		const field = target instanceof Element && target.closest("input, select, textarea, dialog");
		if (field && field.checkVisibility()) return; // a dialog keeps the focus for a moment once closed
		const act = actions(now, tools)[event.key];
		if (act) {
			event.preventDefault();
			act(event);
		} else if (event.key >= "1" && event.key <= String(views.length)) {
			toggle(views[Number(event.key) - 1]);
		}
	});
}

/**
 * @param {Scene} scene
 * @param {Tools} tools
 * @returns {Record<string, (event: KeyboardEvent) => void>}
 */
function actions(scene, tools) {
	return {
		ArrowLeft: (event) => moveCaret(scene, event.shiftKey ? -10 : -1),
		ArrowRight: (event) => moveCaret(scene, event.shiftKey ? 10 : 1),
		ArrowUp: () => moveLayer(scene, -1),
		ArrowDown: () => moveLayer(scene, 1),
		"[": () => moveHead(scene, -1),
		"]": () => moveHead(scene, 1),
		",": () => moveStep(scene, -1),
		".": () => moveStep(scene, 1),
		"?": tools.help,
		"/": tools.editText,
		s: tools.save,
		t: openTable,
		Escape: () => store.set({ n: null, off: null }),
	};
}

function openTable() {
	const view = document.activeElement?.closest(".view") ?? document.querySelector(".view.open");
	const table = /** @type {HTMLDetailsElement | null} */ (view?.querySelector(".astable") ?? null);
	if (table) table.open = !table.open;
}
