// Lens: what the model would answer if it stopped after each part of each block.

import { alignedMatrix } from "../aligned_matrix.js";
import { textTint } from "../colour.js";
import { el } from "../dom.js";
import { cellText, legend, monospace, number, strong } from "../figure_parts.js";
import { placeName } from "../scene.js";
import { store } from "../state.js";
import { asTable } from "../table.js";
import { glyphs, percent, quoted, quotedWhole } from "../words.js";

const ASK = "lens";
const POWER = 0.9; // of a probability, which gives its alpha
const ROW_PX = 20;

/** @param {Scene} scene */
function lensOf(scene) {
	const answer = scene.answer(ASK);
	const { top_ids: ids, top_logprobs: logprobs, target_logprobs: target } = answer?.arrays ?? {};
	return { places: /** @type {string[]} */ (answer?.header.places ?? []), ids, logprobs, target };
}

/** @type {View} */
export const lens = {
	id: "lens",
	title: "Lens",
	purpose: "What the model would answer if it stopped after each layer.",
	sentenceAsks: () => [ASK],
	asks: () => [ASK],

	sentence(scene) {
		const { places, ids } = lensOf(scene);
		const best = ids.at(places.length - 1, scene.t);
		let first = places.length - 1;
		while (first > 0 && ids.at(first - 1, scene.t) === best) first--;
		const lead = ["Read out at every depth: ", strong(quoted(scene.token(best)))];
		if (first === 0) return [...lead, " leads from the embedding on."];
		return [
			...lead,
			" takes the lead ",
			number(placeName(places[first]).long, `lens.${first}.${scene.t}`),
			first === places.length - 1 ? ", the last thing that happens." : " and keeps it.",
		];
	},

	draw(scene) {
		const { places, ids, logprobs } = lensOf(scene);
		const names = places.map(placeName);
		const figure = alignedMatrix(scene, {
			id: "lens",
			label: `The most probable next ${scene.unit} at each depth and position`,
			rows: names.map(({ name, short, long }) => ({
				label: [scene.columns.isWide ? name : short],
				title: long,
			})),
			rowHeight: ROW_PX,
			shows: ids,
			gap: (i) => (startsLayer(places, i) ? 3 : 0),
			paint: (context, i, t, { x, y, width, height }) => {
				const id = ids.at(i, t);
				const colour = textTint("look", Math.exp(logprobs.at(i, t)) ** POWER);
				context.fillStyle = colour.background;
				context.fillRect(x, y, width - 1, height - 1);
				context.fillStyle = colour.text;
				context.font = monospace(12);
				const glyph = glyphs(scene.token(id));
				cellText(context, glyph, x + (width - 1) / 2, y + 14, width - 2);
				if (t + 1 < scene.length && id === scene.text.tokens[t + 1].id) {
					context.fillRect(x + 3, y + height - 4, width - 7, 1.6);
				}
			},
			describe: (i, t) => describe(scene, i, t),
			choose: (i, t) => store.set({ t, n: `lens.${i}.${t}` }),
		});
		const caption = el(
			"figcaption",
			{},
			legend("look", { low: "0", high: "1", what: "probability", power: POWER }),
			el("span", { class: "key under" }, el("i"), "it is what comes next"),
			"the last row is the output itself",
			scene.run.config.tied
				? "; the embedding repeats the token just read, because one matrix reads in and out"
				: null,
		);
		return [figure, caption, asTable(() => lens.rows(scene))];
	},

	rows(scene) {
		const { places, ids, logprobs, target } = lensOf(scene);
		/** @type {Rows} */
		const rows = [
			["after", "position", "token", "first choice", "its probability", "that of what comes"],
		];
		places.forEach((place, i) => {
			scene.text.tokens.forEach(({ text }, t) => {
				const choice = glyphs(scene.token(ids.at(i, t)));
				const [p, q] = [Math.exp(logprobs.at(i, t)), Math.exp(target.at(i, t))];
				rows.push([place, t, glyphs(text), choice, p, Number.isFinite(q) ? q : ""]);
			});
		});
		return rows;
	},

	origin(scene, key) {
		const [i, t] = key.map(Number);
		const { places, ids, logprobs } = lensOf(scene);
		if (!(i < places.length && t < scene.length)) return null;
		const layer = places[i].split(".")[1];
		const isInside = places[i].endsWith(".attention");
		const before = Number(layer) ? `blocks.${Number(layer) - 1}` : "embedding";
		const stream = isInside ? `: ${before} + ${places[i]}` : "";
		return {
			value: `${quoted(scene.token(ids.at(i, t)))} ${percent(Math.exp(logprobs.at(i, t)))}`,
			words: [
				`the last norm and the output matrix applied to the stream ${placeName(places[i]).long}, `,
				`position ${t}${stream}`,
			],
			name: places[i],
			python: (code) => {
				const model = code.slice(0, code.indexOf(".inspect("));
				const inside = isInside ? ` + ${code.replaceAll(places[i], before)}[${t}]` : "";
				return (
					`x = ${code}[${t}]${inside}\nx = ${model}.engine.readout(x[None])[0]\n` +
					`np.exp(x - np.logaddexp.reduce(x))[${ids.at(i, t)}]`
				);
			},
			shape: `(${scene.length}, ${scene.run.config.width})`,
		};
	},
};

/** Whether a row is the first one of its layer. @param {string[]} places @param {number} i */
const startsLayer = (places, i) => i > 0 && places[i].split(".")[1] !== places[i - 1].split(".")[1];

/** @param {Scene} scene @param {number} i @param {number} t @returns {[string, string?]} */
function describe(scene, i, t) {
	const { places, ids, logprobs, target } = lensOf(scene);
	const choice = `${quotedWhole(scene.token(ids.at(i, t)))} ${percent(Math.exp(logprobs.at(i, t)))}`;
	const next = scene.text.tokens[t + 1];
	const comes = next
		? `, what comes ${quotedWhole(next.text)} ${percent(Math.exp(target.at(i, t)))}`
		: "";
	return [`${choice}${comes}`, `${placeName(places[i]).long}, position ${t} · click: stand here`];
}
