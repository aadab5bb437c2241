// Heads are named by what they measurably do, above a threshold only.

/**
 * A kind of head, named as in inference/head_scores.py. `on`: the text on which its score is taken.
 * Random tokens that are repeated once show induction, because nothing else could predict them.
 * @typedef {{kind: string, short: string, long: string, threshold: number,
 *   on: "text" | "repeated"}} Kind
 */

/** @type {Kind[]} */
export const KINDS = [
	{ kind: "previous_token", short: "previous", long: "previous token", threshold: 0.4, on: "text" },
	{ kind: "induction", short: "induction", long: "induction", threshold: 0.25, on: "repeated" },
	{
		kind: "duplicate_token",
		short: "duplicate",
		long: "same token earlier",
		threshold: 0.25,
		on: "repeated",
	},
	{ kind: "first_token", short: "first", long: "first token", threshold: 0.4, on: "text" },
];

/** Of what a score is the mean. @param {Kind} kind */
export const scoredOn = ({ on }) => (on === "text" ? "on this text" : "on random repeated tokens");

/** The name of a score, whose array is (kinds, layers, heads). @param {Kind} kind @param {Kind["on"]} [on] */
export const scoreName = ({ kind, on: usual }, on = usual) => `head_scores/${on}/${kind}`;

export const SCORES = "scores";

/**
 * The score of a head, of one kind; null where it is not here, or the text has no such positions.
 * @param {Scene} scene
 * @param {Kind} kind
 * @param {number} layer
 * @param {number} head
 */
export function headScore(scene, { kind, on }, layer, head) {
	const answer = scene.answer(SCORES);
	const place = answer?.header.kinds?.indexOf(kind) ?? -1;
	if (!answer || place < 0) return null;
	const value = answer.arrays[on].at(place, layer, head);
	return Number.isFinite(value) ? value : null;
}

/**
 * What a head does, if a score is above its threshold.
 * @param {Scene} scene
 * @param {number} layer
 * @param {number} head
 * @returns {(Kind & {score: number}) | null}
 */
export function headDoes(scene, layer, head) {
	const fits = KINDS.map((kind) => ({ ...kind, score: headScore(scene, kind, layer, head) ?? 0 }))
		.filter(({ score, threshold }) => score >= threshold)
		.sort((a, b) => b.score - a.score);
	return fits[0] ?? null;
}
