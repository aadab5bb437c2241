// Parts of the page that are drawn again only when what they are drawn from has changed.

const SLICE_MS = 10; // of a frame, after which other parts wait for the next one

/** What each part was drawn from. @type {Map<string, string>} */
const drawn = new Map();
let sliceEnd = 0;
let hasDrawn = false; // in this slice: each draws one part at least, so that all come to an end
let isCut = false;

/** Whether a part has been drawn. @param {string} part */
export const isDrawn = (part) => drawn.has(part);

/** Draws for one frame; true: parts are left for the next. @param {() => void} draw */
export function drawSlice(draw) {
	sliceEnd = performance.now() + SLICE_MS;
	hasDrawn = isCut = false;
	draw();
	return isCut;
}

/**
 * True: the part is up to date. False: this frame is full, and it waits for the next.
 * @param {string} part
 * @param {unknown} inputs all that the part is drawn from, as JSON
 * @param {() => void} draw
 */
export function drawIfChanged(part, inputs, draw) {
	const signature = JSON.stringify([inputs, devicePixelRatio]);
	if (drawn.get(part) === signature) return true;
	if (hasDrawn && performance.now() > sliceEnd) {
		isCut = true;
		return false;
	}
	hasDrawn = true;
	drawn.set(part, signature);
	draw();
	return true;
}

/** @param {Element} part @param {boolean} isWaiting */
export function markWaiting(part, isWaiting) {
	part.toggleAttribute("data-waiting", isWaiting);
	part.setAttribute("aria-busy", String(isWaiting));
}

/** @type {Map<string, {inputs: unknown[], canvas: HTMLCanvasElement}>} */
const canvases = new Map();

/**
 * A figure's canvas: the last one, if it shows the same.
 * @param {string} id of the figure
 * @param {unknown[]} shows all that it is drawn from
 * @param {() => HTMLCanvasElement} draw
 */
export function keptCanvas(id, shows, draw) {
	const inputs = [...shows, devicePixelRatio];
	const last = canvases.get(id);
	if (last?.inputs.every((x, i) => x === inputs[i])) return last.canvas;
	const canvas = draw();
	canvases.set(id, { inputs, canvas });
	return canvas;
}

/** Draws everything again at the next call: the theme has changed. */
export function forgetDrawn() {
	drawn.clear();
	canvases.clear();
}
