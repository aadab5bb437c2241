// Parts of the page that are drawn again only when what they are drawn from has changed.

/** What each part was drawn from. @type {Map<string, string>} */
const drawn = new Map();

/** Whether a part has been drawn. @param {string} part */
export const isDrawn = (part) => drawn.has(part);

/**
 * @param {string} part
 * @param {unknown} inputs all that the part is drawn from, as JSON
 * @param {() => void} draw
 */
export function drawIfChanged(part, inputs, draw) {
	const signature = JSON.stringify(inputs);
	if (drawn.get(part) === signature) return;
	drawn.set(part, signature);
	draw();
}

/** Draws everything again at the next call: the theme has changed. */
export function forgetDrawn() {
	drawn.clear();
}
