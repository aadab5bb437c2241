// Heads are named by what they measurably do, above a threshold only.

/** @typedef {import("./scene.js").Scene} Scene */

/** @typedef {{kind: string, short: string, long: string, threshold: number}} Kind */

/** The kinds of heads: names of inference/head_scores.py. @type {Kind[]} */
export const KINDS = [
  { kind: "previous_token", short: "previous", long: "previous token", threshold: 0.4 },
  { kind: "induction", short: "induction", long: "induction", threshold: 0.25 },
  { kind: "duplicate_token", short: "duplicate", long: "same token earlier", threshold: 0.25 },
  { kind: "first_token", short: "first", long: "first token", threshold: 0.4 },
];

export const SCORES = "scores";

/**
 * What a head does, if a score is above its threshold.
 * @param {Scene} scene
 * @param {number} layer
 * @param {number} head
 * @returns {{short: string, long: string, score: number, kind: string} | null}
 */
export function headDoes(scene, layer, head) {
  const arrays = scene.answer(SCORES)?.arrays;
  if (!arrays) return null;
  const fits = KINDS.filter(({ kind }) => arrays[kind])
    .map((kind) => ({ ...kind, score: arrays[kind.kind].at(layer, head) }))
    .filter(({ score, threshold }) => score >= threshold)
    .sort((a, b) => b.score - a.score);
  return fits[0] ?? null;
}
