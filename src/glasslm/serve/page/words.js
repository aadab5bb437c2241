// Numbers and tokens as they are shown.

const MINUS = "−";
const THOUSANDS = new Intl.NumberFormat("en-US");
const MAX_GLYPHS = 24; // of a token in a sentence
const INVISIBLE = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cn}\p{Cs}]/u;

/** @param {any} x a number, or null as in JSON @param {number} [digits] */
export function fixed(x, digits = 2) {
	if (typeof x !== "number" || Number.isNaN(x)) return "–";
	if (!Number.isFinite(x)) return x > 0 ? "∞" : `${MINUS}∞`;
	const text = Math.abs(x).toFixed(digits);
	return (x < 0 && Number(text) !== 0 ? MINUS : "") + text;
}

/** With its sign; zero has none. @param {number} x @param {number} [digits] */
export function signed(x, digits = 2) {
	return (x > 0 && Number(x.toFixed(digits)) !== 0 ? "+" : "") + fixed(x, digits);
}

/** Two or three significant digits. @param {number} x */
export function significant(x) {
	if (!Number.isFinite(x)) return fixed(x);
	const size = Math.abs(x);
	if (size === 0) return "0";
	if (size >= 0.1) return fixed(x, size >= 100 ? 0 : 2);
	return size >= 0.001 ? fixed(x, 4) : x.toExponential(1).replaceAll("-", MINUS);
}

/** A probability. @param {number} p */
export function percent(p) {
	if (!Number.isFinite(p)) return "–";
	if (p >= 0.995) return p >= 1 ? "100%" : ">99%";
	if (p >= 0.1) return `${Math.round(100 * p)}%`;
	return p >= 0.001 ? `${(100 * p).toFixed(1)}%` : p > 0 ? "<0.1%" : "0%";
}

/** A count with its thousands. @param {number} n */
export const count = (n) => THOUSANDS.format(n);

/**
 * `one` or `many`, after the count.
 * @param {number} n
 * @param {string} one
 * @param {string} [many]
 */
export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

/** A short score, without its leading zero: .47. @param {number} x */
export const score = (x) => fixed(x, 2).replace(/^0/, "");

/**
 * One character as it is drawn: a space is ·, a line end ↵, a tab ⇥, what is invisible its code.
 * @param {string} character
 */
function visible(character) {
	if (character === " ") return "·";
	if (character === "\n") return "↵";
	if (character === "\t") return "⇥";
	if (INVISIBLE.test(character)) {
		return `⟨${(character.codePointAt(0) ?? 0).toString(16).padStart(2, "0")}⟩`;
	}
	return character;
}

/**
 * A text with its spaces, line ends and control characters made visible.
 * @param {string} text
 * @param {number} [most] characters
 */
export function glyphs(text, most = Infinity) {
	const characters = [...text];
	const shown = characters.slice(0, most).map(visible).join("");
	return characters.length > most ? `${shown}…` : shown;
}

/** A token in quotes. @param {string} text @param {number} [most] characters */
export const quoted = (text, most = MAX_GLYPHS) => `“${glyphs(text, most)}”`;

/** The same, however long it is. @param {string} text */
export const quotedWhole = (text) => quoted(text, Infinity);

/**
 * The name of a layer's head, as in Python: both count from 0.
 * @param {number} l
 * @param {number} h
 */
export const headName = (l, h) => `${l}.${h}`;
