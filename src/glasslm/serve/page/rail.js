// Beside the views: the place, where the chosen number comes from, and the head.

import { byId, el, morph } from "./dom.js";
import { number } from "./figure_parts.js";
import { headDoes, headScore, KINDS, SCORES, scoredOn } from "./head_names.js";
import { headPattern } from "./pattern.js";
import { store } from "./state.js";
import { count, fixed, glyphs, headName, percent } from "./words.js";

const CONTEXT = 25; // tokens shown before the caret
const RAIL_PX = 300;

let isUp = false; // the sheet of a phone

/** @param {Scene} scene */
export const headAsk = (scene) => `head?layer=${scene.state.layer}&head=${scene.state.head}`;

/** The answer about the lines that computed a number. @param {Scene} scene @param {string} name */
export function sourceAsk(scene, name) {
	const t = /^(gradient|step)\//.test(name) ? `&t=${scene.t}` : "";
	return scene.path(`source?name=${encodeURIComponent(name)}${t}`);
}

/** @param {Scene} scene @param {Record<string, View>} views */
export function drawRail(scene, views) {
	const rail = byId("rail");
	rail.classList.toggle("up", isUp);
	morph(
		rail,
		sheetButton(scene, views),
		el("section", { class: "card", "aria-label": "The place" }, place(scene)),
		el(
			"section",
			{ class: "card where", "aria-label": "Where this number comes from" },
			el("h3", {}, "Where this number comes from"),
			originCard(scene, views),
		),
		el("section", { class: "card headcard", "aria-label": "The head" }, headCard(scene)),
	);
}

/** @param {Scene} scene @param {Record<string, View>} views */
function sheetButton(scene, views) {
	const { target } = scene;
	const before = scene.text.tokens.slice(Math.max(0, scene.t - 4), scene.t + 1);
	const read = before.map(({ text }) => glyphs(text)).join("");
	const { nats, rank } = scene.answer("read")?.arrays ?? {};
	const facts =
		target === null || !nats
			? "the end"
			: `${percent(Math.exp(-nats.at(scene.t + 1)))} · rank ${count(rank.at(scene.t + 1) + 1)}`;
	return el(
		"button",
		{
			class: "sheet",
			"aria-expanded": String(isUp),
			on: {
				click: () => {
					isUp = !isUp;
					drawRail(scene, views);
				},
			},
		},
		el("span", { class: "mono" }, `…${read}▏${target === null ? "" : glyphs(scene.token(target))}`),
		el("span", {}, facts, " · ", el("b", {}, headName(scene.state.layer, scene.state.head))),
	);
}

/** @param {Scene} scene @returns {Child[]} */
function place(scene) {
	const { t, target } = scene;
	const from = Math.max(0, t - CONTEXT);
	const before = scene.text.tokens.slice(from, t + 1).map(({ text }) => text);
	const read = `${from > 0 ? "…" : ""}${before.join("").replaceAll("\n", "↵\n")}`;
	const said = el("div", { class: "said", dir: "auto" }, el("u", {}, read));
	if (target === null) {
		const end = "The end of the text. Nothing comes to compare with: Write shows what could come.";
		return [said, el("p", { class: "soft" }, end)];
	}
	said.append(el("b", {}, glyphs(scene.token(target), 24)));
	const { nats, rank } = scene.answer("read")?.arrays ?? {};
	if (!nats) return [said];
	const ngram = scene.answer("ngram")?.arrays.nats;
	const order = scene.answer("ngram")?.header.order ?? 5;
	const key = `read.nats.${t + 1}`;
	const facts = el(
		"dl",
		{ class: "facts" },
		fact("probability of what comes", number(percent(Math.exp(-nats.at(t + 1))), key)),
		fact("surprise", number(`${fixed(nats.at(t + 1))} nats`, key)),
		fact(`rank among ${count(scene.run.vocab_size)}`, count(rank.at(t + 1) + 1)),
		ngram ? fact(`a ${order}-gram`, `${fixed(ngram.at(t + 1))} nats`) : [],
	);
	return [said, facts];
}

/** @param {string} name @param {Child} value */
const fact = (name, value) => [el("dt", {}, name), el("dd", {}, value)];

/**
 * @param {Scene} scene
 * @param {Record<string, View>} views
 * @returns {Child[]}
 */
function originCard(scene, views) {
	const hint =
		"Choose any number or cell: its name in the engine, the lines that computed it, and Python that " +
		"repeats it. Layers, heads and positions count from 0, as there. " +
		"A nat is 1.44 bits, a logit a score before softmax, the stream what all parts read and add to.";
	const origin = originOf(scene, views);
	if (!origin) return [el("p", {}, hint)];
	const source = scene.answers.get(sourceAsk(scene, origin.name))?.header;
	const refusal = scene.answers.refused.get(sourceAsk(scene, origin.name));
	return [
		el("div", { class: "big" }, origin.value),
		el("p", {}, origin.words),
		el("div", { class: "name" }, origin.name, origin.shape ? `  ${origin.shape}` : ""),
		...(source ? sourceLines(source, origin) : []),
		refusal ? el("p", {}, refusal.message) : null,
	];
}

/**
 * The origin of the chosen number; null where none is chosen, or its numbers are not here yet.
 * @param {Scene} scene
 * @param {Record<string, View>} views
 */
export function originOf(scene, views) {
	const [id, ...key] = (store.state.n ?? "").split(".");
	const view = views[id];
	if (!view || !scene.has(view.asks(scene)) || scene.problem(view.asks(scene))) return null;
	return view.origin(scene, key);
}

/**
 * @param {Record<string, any>} source
 * @param {Origin} origin
 * @returns {Child[]}
 */
function sourceLines(source, origin) {
	const places = source.places ?? [];
	const parts = places.flatMap((/** @type {any} */ place) => {
		const hot = new Set(place.computed);
		const line = (/** @type {string} */ text, /** @type {number} */ i) =>
			el(
				"span",
				{ class: hot.has(i) ? "hot" : "" },
				el("em", {}, String(place.first_line + i)),
				text || " ",
			);
		const lines = /** @type {string[]} */ (place.lines);
		const short = lines.flatMap((text, i) => (hot.has(i) ? [line(text.trim(), i)] : []));
		const whole = el(
			"details",
			{},
			el("summary", {}, `all ${lines.length} lines`),
			el("div", { class: "src", tabindex: 0 }, lines.map(line)),
		);
		const first = place.first_line + (place.computed[0] ?? 0);
		return [
			el("p", {}, el("b", {}, `${place.file}:${first}`), ` in ${place.function}`),
			el("div", { class: "src" }, short),
			hot.size < lines.length ? whole : null,
		];
	});
	const repeat = origin.python ?? ((code) => `${code}${origin.index ?? ""}`);
	const before = (source.python ?? "").split("\n");
	const repeated = repeat(before.pop());
	const python = source.python && repeated ? [...before, repeated].join("\n") : "";
	return [
		...parts,
		source.derivation ? el("p", {}, "derived in ", el("b", {}, source.derivation)) : null,
		python ? el("div", { class: "src python", tabindex: 0 }, python) : null,
	];
}

/** @param {Scene} scene @returns {Child[]} */
function headCard(scene) {
	const { layer, head } = scene.state;
	const does = headDoes(scene, layer, head);
	const isPreview = layer !== store.state.layer || head !== store.state.head;
	const title = el(
		"h3",
		{},
		el("b", {}, `Head ${headName(layer, head)}`),
		does ? does.long : scene.answer(SCORES) ? "no name fits" : "",
		isPreview ? el("span", { class: "preview" }, "preview") : null,
	);
	const problem = scene.problem([headAsk(scene)]);
	if (problem) return [title, el("p", { class: "soft" }, problem)];
	const weight = scene.answer(headAsk(scene))?.arrays.weights;
	const side = scene.columns.isWide ? RAIL_PX - 26 : Math.min(360, scene.columns.room - 24);
	const pattern = weight
		? headPattern(scene, { weight, layer, head, side, id: "head-card" })
		: el("div", { class: "waiting-box", style: { height: `${side}px` } });
	const facts = KINDS.flatMap((kind) => {
		const value = headScore(scene, kind, layer, head);
		const key = `attention.score.${kind.kind}.${layer}.${head}`;
		const words = `${kind.short} ${scoredOn(kind)}`;
		return fact(words, value === null ? "–" : number(fixed(value), key));
	});
	return [title, pattern, el("dl", { class: "facts scores" }, facts)];
}
