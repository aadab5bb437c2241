// One tab stop for many buttons: the arrow keys move the focus among them.

import { listen } from "./dom.js";

/** The button of each group that Tab reaches, by its place. @type {Map<string, number>} */
const stops = new Map();

/** @type {Record<string, number[]>} columns and rows */
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const CHOSEN = "[aria-pressed=true], [aria-current=true]";

/** @param {any} group @returns {HTMLButtonElement[]} */
const buttonsOf = (group) => [...group.querySelectorAll("button:not(:disabled)")];

/**
 * Leaves one of the buttons in `group` to Tab: the last one that had the focus, the chosen one or
 * the first.
 * @template {HTMLElement} T
 * @param {string} id unique on the page
 * @param {T} group
 * @returns {T}
 */
export function oneTabStop(id, group) {
	const buttons = buttonsOf(group);
	const chosen = buttons.findIndex((button) => button.matches(CHOSEN));
	const place = Math.min(stops.get(id) ?? Math.max(0, chosen), buttons.length - 1);
	setStop(buttons, buttons[place]);
	listen(group, {
		keydown: moveFocus,
		focusin: ({ currentTarget, target }) => {
			const all = buttonsOf(currentTarget);
			const focused = all.indexOf(target);
			if (focused < 0) return; // in something that is no enabled button
			stops.set(id, focused);
			setStop(all, target);
		},
	});
	return group;
}

/** @param {HTMLButtonElement[]} buttons @param {HTMLButtonElement | undefined} stop */
function setStop(buttons, stop) {
	for (const button of buttons) button.tabIndex = button === stop ? 0 : -1;
}

/** @param {any} event */
function moveFocus(event) {
	const [across, down] = ARROWS[event.key] ?? [0, 0];
	if (event.ctrlKey || event.metaKey || event.altKey || !(across || down)) return;
	event.preventDefault();
	event.stopPropagation();
	const buttons = buttonsOf(event.currentTarget);
	const next = down
		? nearestInNextRow(buttons, event.target, down)
		: buttons[buttons.indexOf(event.target) + across];
	next?.focus();
}

/** @param {HTMLButtonElement[]} buttons @param {Element} from @param {number} down 1 or -1 */
function nearestInNextRow(buttons, from, down) {
	const here = from.getBoundingClientRect();
	const distances = buttons.flatMap((button) => {
		const box = button.getBoundingClientRect();
		const y = down * (box.top - here.top);
		const x = Math.abs(box.left + box.width / 2 - here.left - here.width / 2);
		return y > here.height / 2 ? [{ button, y: Math.round(y), x }] : [];
	});
	return distances.sort((a, b) => a.y - b.y || a.x - b.x)[0]?.button;
}
