// Read: how much each token surprises the model, against a 5-gram of the training text.

import { alignedMatrix } from "../aligned_matrix.js";
import { palette, tint } from "../colour.js";
import { el } from "../dom.js";
import { empty, number, strong } from "../figure_parts.js";
import { store } from "../state.js";
import { asTable } from "../table.js";
import { count, fixed, glyphs, quoted, quotedWhole } from "../words.js";

const ASK = "read";
export const NGRAM = "ngram"; // counted once, which takes seconds: what is here is drawn before it
const MARGIN_NATS = 0.05; // by which the 5-gram must be better to be marked
const HEIGHT = 92; // of the bars, in pixels

/** @param {Scene} scene */
function readings(scene) {
	const answer = scene.answer(ASK);
	const { nats, rank, entropy } = answer?.arrays ?? {};
	const ngram = scene.answer(NGRAM)?.arrays.nats;
	const order = scene.answer(NGRAM)?.header.order ?? 5;
	return { header: answer?.header ?? {}, nats, rank, entropy, ngram, order };
}

/** The positions at which the 5-gram is better. @param {Scene} scene */
function losses(scene) {
	const { nats, ngram } = readings(scene);
	if (!ngram) return [];
	return scene.text.tokens
		.map((_, t) => t)
		.filter((t) => t > 0 && nats.at(t) > ngram.at(t) + MARGIN_NATS);
}

/** Special tokens have no n-gram. @param {Tensor} [nats] */
const knownNats = (nats) => Array.from(nats?.data ?? []).filter((x) => !isNaN(x));

/** @param {number[]} numbers */
const meanOf = (numbers) => numbers.reduce((a, b) => a + b, 0) / numbers.length;

/** @type {View} */
export const read = {
	id: "read",
	title: "Read",
	purpose: "How much each token surprises the model.",
	sentenceAsks: () => [ASK],
	asks: () => [ASK],
	wishes: () => [NGRAM],
	extra: (scene) => scene.answers.kept.has(scene.path(NGRAM)),

	sentence(scene) {
		if (scene.length < 2) return ["One token alone is predicted by nothing: add more text."];
		const { header, nats, ngram, order } = readings(scene);
		const better = losses(scene).length;
		const others = knownNats(ngram);
		return [
			number(fixed(meanOf(knownNats(nats))), "read.mean"),
			` nats a ${scene.unit} here`,
			...(header.bytes
				? [", ", number(fixed(header.bits_per_byte), "read.bits"), " bits per byte. "]
				: [". "]),
			...(others.length
				? [
						`A ${order}-gram of bytes has ${fixed(meanOf(others))} nats, and does better at `,
						strong(`${count(better)} of ${count(others.length)}`),
						` ${scene.unit}s.`,
					]
				: []),
		];
	},

	draw(scene) {
		if (scene.length < 2) return [empty("Nothing is predicted yet.", "Edit the text to add more.")];
		const { nats, ngram, order } = readings(scene);
		const why = scene.problem([NGRAM]);
		const most = Math.max(6, Math.ceil(largest(scene)));
		const y = (/** @type {number} */ x) => HEIGHT - 2 - Math.min(1, x / most) * (HEIGHT - 14);
		const figure = alignedMatrix(scene, {
			id: "read",
			label: `Surprise of each ${scene.unit}, against a ${order}-gram`,
			rows: [{ label: [scene.columns.isWide ? `nats, up to ${most}` : "nats"] }],
			rowHeight: HEIGHT,
			extra: 12,
			paint: (context, _, t, { x, width }) => {
				if (t === 0) return;
				context.fillStyle = tint("cost", 0.75);
				context.fillRect(x + 2, y(nats.at(t)), width - 4, HEIGHT - y(nats.at(t)));
				if (!ngram) return;
				context.fillStyle = palette.ink;
				context.fillRect(x, y(ngram.at(t)) - 1, width, 2);
				if (nats.at(t) > ngram.at(t) + MARGIN_NATS) drawTriangle(context, x + width / 2);
			},
			describe: (_, t) => describe(scene, t),
			choose: (_, t) => store.set({ t: Math.max(0, t - 1), n: `read.nats.${t}` }),
		});
		const bar = { width: "9px", background: tint("cost", 0.75) };
		const caption = el(
			"figcaption",
			{},
			el("span", { class: "key" }, el("i", { style: bar }), `the model, up to ${most} nats`),
			...(ngram
				? [
						el(
							"span",
							{ class: "key under" },
							el("i", { style: { width: "18px" } }),
							`${order}-gram: what followed the last ${order - 1} bytes in the training text`,
						),
						`▲ where the ${order}-gram is better by ${MARGIN_NATS} nats or more`,
					]
				: [why ? `no 5-gram to compare with: ${why}` : "5-grams are being counted …"]),
		);
		return [figure, caption, asTable(() => read.rows(scene))];
	},

	rows(scene) {
		const { nats, rank, entropy, ngram } = readings(scene);
		const head = ["position", scene.unit, "surprise, nats", "rank", "entropy before, nats"];
		return [
			ngram ? [...head, "5-gram, nats"] : head,
			...scene.text.tokens.slice(1).map((token, i) => {
				const t = i + 1;
				const cells = [t, glyphs(token.text), nats.at(t), rank.at(t) + 1, entropy.at(t - 1)];
				return ngram ? [...cells, ngram.at(t)] : cells;
			}),
		];
	},

	origin(scene, [kind, at]) {
		const { header, nats } = readings(scene);
		const shape = `(${scene.length - 1},)`;
		if (kind === "mean") {
			const words = [`the mean surprise of the ${scene.unit}s after the first`];
			const value = `${fixed(meanOf(knownNats(nats)), 4)} nats`;
			return { value, words, name: "nats", index: ".mean()", shape };
		}
		if (kind === "bits" && header.bytes) {
			const words = [
				`surprise in bits over the ${count(header.bytes)} bytes after the first ${scene.unit}`,
			];
			const index = `.sum() / np.log(2) / ${header.bytes}`;
			return { value: fixed(header.bits_per_byte, 4), words, name: "nats", index, shape };
		}
		const t = Number(at);
		if (!(t > 0 && t < scene.length)) return null;
		const { text } = scene.text.tokens[t];
		return {
			value: `${fixed(nats.at(t), 4)} nats`,
			words: [`−log softmax of the logits after position ${t - 1}, for ${quoted(text)}`],
			name: "nats",
			index: `[${t - 1}]`,
			shape,
		};
	},
};

/** @param {Scene} scene */
function largest(scene) {
	const { nats } = readings(scene);
	let most = 0;
	for (let t = 1; t < scene.length; t++) most = Math.max(most, nats.at(t));
	return Number.isFinite(most) ? most : 6;
}

/** @param {Scene} scene @param {number} t @returns {[string, string?]} */
function describe(scene, t) {
	if (t === 0) return [`nothing predicts the first ${scene.unit}`];
	const { nats, rank, ngram } = readings(scene);
	const text = quotedWhole(scene.text.tokens[t].text);
	const other = ngram ? `, 5-gram ${fixed(ngram.at(t))}` : "";
	const detail = `rank ${count(rank.at(t) + 1)} of ${count(scene.run.vocab_size)}`;
	return [`${text}: model ${fixed(nats.at(t))}${other} nats`, detail];
}

/** @param {CanvasRenderingContext2D} context @param {number} x */
function drawTriangle(context, x) {
	context.beginPath();
	context.moveTo(x, HEIGHT + 3);
	context.lineTo(x + 4, HEIGHT + 10);
	context.lineTo(x - 4, HEIGHT + 10);
	context.fill();
}
