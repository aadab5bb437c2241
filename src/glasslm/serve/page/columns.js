// The columns that the ruler and all figures with positions share: one a token.

const NARROWEST_PX = 16;
const WIDEST_PX = 72;
const MOST_SPACIOUS_PX = 23; // of a column that holds one character
const GLYPH_PX = 9.1; // of the ruler's monospaced type
const WIDE_PX = 600;

/**
 * The columns of a text of `total` tokens, of which the longest has `glyphs` characters, in `room`
 * pixels. A text that does not fit is seen through a window, which `caret` moves when it comes near
 * an end, a little further than it must.
 * @param {{room: number, gutter: number, total: number, glyphs: number, caret: number,
 *   first: number}} given
 * @returns {Columns}
 */
export function layColumns({ room, gutter, total, glyphs, caret, first }) {
	const space = Math.max(NARROWEST_PX, room - gutter);
	const needed = Math.min(WIDEST_PX, Math.max(NARROWEST_PX, Math.ceil(glyphs * GLYPH_PX + 6)));
	const spacious = Math.max(needed, MOST_SPACIOUS_PX);
	const width = Math.max(needed, Math.min(spacious, Math.floor(space / Math.max(1, total))));
	const inSight = Math.max(1, Math.min(total, Math.floor(space / width)));
	const isWide = room > WIDE_PX;
	if (inSight === total) return { gutter, width, first: 0, count: total, total, room, isWide };
	const before = Math.min(3, Math.floor(inSight / 4));
	const further = Math.max(0, Math.min(2, Math.floor(inSight / 2) - before - 1));
	let from = first;
	if (caret < from + before) from = caret - before - further;
	if (caret > from + inSight - before - 2) from = caret - inSight + before + 2 + further;
	from = Math.max(0, Math.min(total - inSight, from));
	return { gutter, width, first: from, count: inSight, total, room, isWide };
}

/**
 * The left edge of a position's column, from the first one in sight.
 * @param {Columns} c
 * @param {number} t
 */
export const columnX = (c, t) => (t - c.first) * c.width;

/** The positions in sight. @param {Columns} c @returns {number[]} */
export const positions = (c) => Array.from({ length: c.count }, (_, i) => c.first + i);
