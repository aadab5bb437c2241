// The note beside the pointer, or beside the cell that the keyboard stands on.

import { byId, el } from "./dom.js";

/** @param {{clientX: number, clientY: number}} at @param {string} text @param {string} [detail] */
export function showTip(at, text, detail) {
	const tip = byId("tip");
	tip.replaceChildren(text, ...(detail ? [el("small", {}, detail)] : []));
	tip.hidden = false;
	const box = tip.getBoundingClientRect();
	const below = at.clientY + 18;
	const top = below + box.height > innerHeight ? at.clientY - box.height - 10 : below;
	tip.style.left = `${Math.max(4, Math.min(innerWidth - box.width - 8, at.clientX + 14))}px`;
	tip.style.top = `${Math.max(4, top)}px`;
}

export function hideTip() {
	byId("tip").hidden = true;
}
