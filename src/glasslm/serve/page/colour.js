// The colours of the style sheet, for canvases: one hue a quantity, its value the alpha.

const NAMES = ["ink", "soft", "line", "card", "sink", "on", "paper"];
const QUANTITIES = ["look", "cost", "slope"];

const TINTS = 200; // alphas that are told apart

/** @type {Map<string, {background: string, text: string}>} */
const textTints = new Map();

/** @type {Record<string, string>} */
export const palette = {};

export const DARK = "(prefers-color-scheme: dark)";

export const systemTheme = () => (matchMedia(DARK).matches ? "dark" : "light");

/** Reads the colours again, after the theme has changed. */
export function readPalette() {
	const style = getComputedStyle(document.documentElement);
	for (const name of NAMES) palette[name] = style.getPropertyValue(`--${name}`).trim();
	for (const name of QUANTITIES) palette[name] = style.getPropertyValue(`--${name}-rgb`).trim();
	textTints.clear();
}

/** @param {Quantity} quantity @param {number} alpha */
export function tint(quantity, alpha) {
	const bounded = Math.round(Math.max(0, Math.min(1, alpha || 0)) * TINTS) / TINTS;
	return `rgb(${palette[quantity]} / ${bounded})`;
}

/** @param {string} colour "#rrggbb" or "r g b" */
export function channels(colour) {
	if (colour[0] !== "#") return colour.split(" ").map(Number);
	return [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
}

/** Relative luminance (WCAG 2). @param {number[]} rgb */
function luminance(rgb) {
	const [r, g, b] = rgb.map((x) => {
		const share = x / 255;
		return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
	});
	return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** @param {number} a @param {number} b luminances */
const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);

/**
 * The colour of a tint on a card, opaque, and of text on it: ink or its opposite. A mid tint on
 * which both are hard to read is moved to the nearest one on which text has a contrast of 4.5.
 * @param {Quantity} quantity
 * @param {number} alpha
 * @returns {{background: string, text: string}}
 */
export function textTint(quantity, alpha) {
	const bounded = Math.round(Math.max(0, Math.min(1, alpha || 0)) * TINTS) / TINTS;
	const key = `${quantity} ${bounded}`;
	const known = textTints.get(key) ?? findTextTint(quantity, bounded);
	textTints.set(key, known);
	return known;
}

/** @param {Quantity} quantity @param {number} bounded */
function findTextTint(quantity, bounded) {
	for (let step = 0; step <= 50; step++) {
		for (const a of [bounded - step / 50, bounded + step / 50]) {
			if (a < 0 || a > 1) continue;
			const mixed = mix(quantity, a);
			const y = luminance(mixed);
			const [ink, on] = [palette.ink, palette.on].map((c) => contrast(y, luminance(channels(c))));
			if (Math.max(ink, on) < 4.5 && step < 50) continue;
			const background = `rgb(${mixed.map(Math.round).join(" ")})`;
			return { background, text: ink >= on ? palette.ink : palette.on };
		}
	}
	return { background: palette.card, text: palette.ink };
}

/** @param {Quantity} quantity @param {number} a */
function mix(quantity, a) {
	const hue = channels(palette[quantity]);
	return channels(palette.card).map((x, i) => hue[i] * a + x * (1 - a));
}

/**
 * What is above zero costs, what is below helps; the alpha is a power of the share of `most`.
 * @param {number} x
 * @param {number} most
 * @returns {{quantity: Quantity, alpha: number}}
 */
export function diverging(x, most) {
	const alpha = most > 0 ? Math.min(1, Math.abs(x) / most) ** 0.7 : 0;
	return { quantity: x > 0 ? "cost" : "look", alpha };
}
