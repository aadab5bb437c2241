// Why: what each head and feed-forward adds to the logit of one token, rather than another.

import { palette } from "../colour.js";
import { el } from "../dom.js";
import { lineChart } from "../line_chart.js";
import { number, strong } from "../figure_parts.js";
import { partName, placeName } from "../scene.js";
import { store } from "../state.js";
import { asTable, numberGrid, slideHint } from "../table.js";
import { fixed, glyphs, percent, quoted, quotedWhole, signed } from "../words.js";

const MAX_GAP = 1e-4; // between the sum of the parts and the logits
const SMALL = 0.03; // of the largest share: what is below is drawn soft
const LINES = 4; // of the model's first choices in the chart, beside the token that comes

/** @param {Scene} scene */
const ask = (scene) => `why?t=${scene.t}`;

/** The probabilities of the candidates at every depth. @param {Scene} scene */
const depthAsk = (scene) => `lens-at?t=${scene.t}`;

/** @type {View} */
export const why = {
	id: "why",
	title: "Why",
	purpose: "Which heads and layers push the answer up or down.",
	sentenceAsks: (scene) => [ask(scene)],
	asks: (scene) => [ask(scene), depthAsk(scene)],

	sentence(scene) {
		const { candidate, rival, parts, share } = question(scene);
		let best = parts.findIndex((part) => part !== "embedding");
		parts.forEach((part, i) => {
			if (part !== "embedding" && Math.abs(share(i)) > Math.abs(share(best))) best = i;
		});
		const over = rival === null ? [] : [" over ", strong(quoted(scene.token(rival)))];
		return [
			strong(quoted(scene.token(candidate))),
			...over,
			": ",
			strong(partName(parts[best])),
			share(best) > 0 ? " speaks most for it, " : " speaks most against it, ",
			number(signed(share(best)), `why.${parts[best].replace(".", "-")}`),
			rival === null ? " in its logit." : " in the difference of the logits.",
		];
	},

	draw(scene) {
		const isWide = scene.columns.isWide;
		const hint = isWide
			? "Rest on a head, and the text shows which tokens it read to push that way. "
			: "";
		return [
			choices(scene),
			el(
				"div",
				{ class: "two" },
				el(
					"div",
					{},
					el("div", { class: "wide" }, shares(scene)),
					proof(scene),
					el(
						"p",
						{ class: "proof" },
						hint,
						"These are direct shares: later layers also read what a part writes. Patch shows its ",
						"whole effect.",
					),
				),
				depthChart(scene),
			),
			asTable(() => why.rows(scene)),
		];
	},

	rows(scene) {
		const { ids, parts, shares, logits } = answerOf(scene);
		const tokens = Array.from(ids.data);
		return [
			["part", ...tokens.map((id) => glyphs(scene.token(id)))],
			...parts.map((part, i) => [partName(part), ...tokens.map((_, c) => shares.at(i, c))]),
			["logit", ...tokens.map((_, c) => logits.at(c))],
		];
	},

	origin(scene, [key]) {
		const { candidate, rival, parts, share } = question(scene);
		const part = key?.replace("-", ".");
		const place = parts.indexOf(part);
		if (place < 0) return null;
		const less = rival === null ? "" : ` less that of ${quoted(scene.token(rival))}`;
		return {
			value: signed(share(place), 4),
			words: [
				`${partName(part)}: its direct part of the logit of ${quoted(scene.token(candidate))}`,
				`${less}, the last norm’s scale held`,
			],
			name: activationName(part),
			python: () => sharePython(scene, part),
		};
	},
};

/** @param {Scene} scene */
function answerOf(scene) {
	const answer = scene.answer(ask(scene));
	const { ids, shares, logits } = answer?.arrays ?? {};
	return { parts: /** @type {string[]} */ (answer?.header.parts ?? []), ids, shares, logits };
}

/**
 * What is asked: the candidate, its rival (null: none), and the share of each part.
 * @param {Scene} scene
 */
function question(scene) {
	const { parts, ids, shares, logits } = answerOf(scene);
	const tokens = Array.from(ids.data);
	const { candidate: wanted, rival: other } = scene.state;
	const first = wanted !== null && tokens.includes(wanted) ? wanted : (scene.target ?? tokens[0]);
	const candidate = tokens.includes(first) ? first : tokens[0];
	const usual = tokens.find((id) => id !== candidate) ?? null;
	const isKnown = other !== null && other !== candidate && tokens.includes(other);
	const rival = other === -1 ? null : isKnown ? other : usual;
	const [c, r] = [tokens.indexOf(candidate), rival === null ? -1 : tokens.indexOf(rival)];
	const share = (/** @type {number} */ i) => shares.at(i, c) - (r < 0 ? 0 : shares.at(i, r));
	const logit = logits.at(c) - (r < 0 ? 0 : logits.at(r));
	return { candidate, rival, tokens, parts, share, logit };
}

/** Python that gives the share of a part. @param {Scene} scene @param {string} part */
function sharePython(scene, part) {
	const { candidate, rival } = question(scene);
	const row = `shares[parts.index("${part}")]`;
	return [
		"from glasslm.inference.microscope import contributions, recorded_pass",
		"recorded = recorded_pass.RecordedPass(model, model.tokenizer.encode(text))",
		`tokens = np.array([${candidate}${rival === null ? "" : `, ${rival}`}])`,
		"weights = dict(model.engine.state())",
		`parts, shares, _ = contributions.contributions(recorded, weights, ${scene.t}, tokens)`,
		rival === null ? `${row}[0]` : `${row} @ [1, -1]`,
	].join("\n");
}

/** @param {Scene} scene */
function choices(scene) {
	const { candidate, rival, tokens } = question(scene);
	/**
	 * @param {string} label
	 * @param {number | null} chosen
	 * @param {boolean} withNone
	 * @param {(id: number) => void} choose
	 */
	const select = (label, chosen, withNone, choose) =>
		el(
			"label",
			{},
			label,
			el(
				"select",
				{
					on: { change: (event) => choose(Number(event.target.value)) },
				},
				withNone ? el("option", { value: "-1", selected: chosen === null }, "nothing") : null,
				tokens.map((id) =>
					el("option", { value: String(id), selected: id === chosen }, quoted(scene.token(id))),
				),
			),
		);
	return el(
		"div",
		{ class: "dials" },
		select("why", candidate, false, (id) => store.set({ candidate: id })),
		select("rather than", rival, true, (id) => store.set({ rival: id })),
	);
}

/** The table of shares: layers down, heads and the feed-forward across. @param {Scene} scene */
function shares(scene) {
	const { parts, share } = question(scene);
	const isWide = scene.columns.isWide;
	const hasBias = parts.some((part) => /^\d+\.bias$/.test(part));
	const heads = Array.from({ length: scene.heads }, (_, h) => h);
	const most = Math.max(...parts.map((_, i) => Math.abs(share(i))));
	const cell = (/** @type {string} */ part, across = 1) => shareCell(scene, part, most, across);
	const titles = [
		...heads.map((h) => (isWide && scene.heads <= 6 ? `head ${h}` : `h${h}`)),
		isWide ? "feed-fwd" : "ff",
		...(hasBias ? ["bias"] : []),
		"sum",
	];
	let sum = share(parts.indexOf("embedding"));
	const row = (/** @type {string} */ name, /** @type {any[]} */ cells, /** @type {number} */ own) =>
		el(
			"tr",
			{},
			el("th", { scope: "row" }, name),
			cells,
			el("td", { class: "sum" }, signed(own)),
			el("td", { class: "run" }, fixed(sum)),
		);
	const across = titles.length - 1;
	const rows = [row(isWide ? "embedding" : "emb", [cell("embedding", across)], sum)];
	for (let l = 0; l < scene.layers; l++) {
		const own = [...heads.map((h) => `${l}.${h}`), `${l}.feedforward`];
		if (hasBias) own.push(`${l}.bias`);
		const total = own.reduce((a, part) => a + (share(parts.indexOf(part)) || 0), 0);
		sum += total;
		const cells = own.map((part) => cell(part));
		rows.push(row(isWide ? `layer ${l}` : `${l}`, cells, total));
	}
	for (const part of ["norm.bias", "head.bias"]) {
		if (!parts.includes(part)) continue;
		const own = share(parts.indexOf(part));
		sum += own;
		rows.push(row(isWide ? part : part.slice(0, 4), [cell(part, across)], own));
	}
	const least = (isWide ? 74 : 34) + titles.length * 42;
	return numberGrid(
		{
			class: "con",
			"aria-label": "Shares of all parts",
			style: { "min-width": `${least}px` },
		},
		slideHint(least, scene.columns.room * (isWide ? 0.57 : 1)),
		el(
			"thead",
			{},
			el(
				"tr",
				{},
				el("th", { class: "corner" }),
				titles.map((title) => el("th", { scope: "col" }, title)),
				el("th", { scope: "col", class: "run" }, "so far"),
			),
		),
		el("tbody", {}, rows),
	);
}

/** @param {Scene} scene @param {string} part @param {number} most @param {number} across columns */
function shareCell(scene, part, most, across) {
	const { parts, share, candidate, rival } = question(scene);
	const place = parts.indexOf(part);
	if (place < 0) return el("td");
	const value = share(place);
	const [layer, head] = part.split(".").map(Number);
	const isHead = Number.isInteger(layer) && Number.isInteger(head);
	const key = `why.${part.replace(".", "-")}`;
	const side = value > 0 ? "left" : "right";
	const bar = {
		[side]: "50%",
		width: `${most > 0 ? (Math.abs(value) / most) * 46 : 0}%`,
		background: value > 0 ? "var(--look)" : "var(--cost)",
	};
	const look = () => {
		if (isHead && rival !== null) store.look({ layer, head, towards: [candidate, rival] });
	};
	const button = el(
		"button",
		{
			title: `${partName(part)}: ${signed(value, 4)}`,
			"aria-label": `${partName(part)} ${signed(value)}`,
			"aria-current": String(store.state.n === key),
			on: {
				click: () => store.set(isHead ? { n: key, layer, head } : { n: key }),
				pointerenter: look,
				focus: look,
				pointerleave: () => store.look({}),
				blur: () => store.look({}),
			},
		},
		el("span", { class: Math.abs(value) < most * SMALL ? "soft" : "" }, signed(value)),
		el("i", { style: bar }),
	);
	return el("td", across > 1 ? { colspan: across, class: "across" } : {}, button);
}

/** @param {Scene} scene */
function proof(scene) {
	const { parts, share, logit, rival } = question(scene);
	const sum = parts.reduce((total, _, i) => total + share(i), 0);
	const gap = sum - logit;
	return el(
		"p",
		{ class: "proof" },
		`${parts.length} parts sum to `,
		strong(fixed(sum, 4)),
		rival === null ? "; the logit is " : "; the logits differ by ",
		strong(fixed(logit, 4)),
		Math.abs(gap) < MAX_GAP ? " ✓" : ` (off by ${gap.toExponential(1)})`,
		".",
	);
}

/** How the answer forms with depth. @param {Scene} scene */
function depthChart(scene) {
	const answer = scene.answer(depthAsk(scene));
	const { tokens, candidate, rival } = question(scene);
	const asked = answer?.arrays.asked_logprobs;
	if (!answer || !asked) return null;
	const places = /** @type {string[]} */ (answer.header.places);
	const { room, isWide } = scene.columns;
	const shown = tokens.slice(0, LINES);
	for (const id of [scene.target, candidate, rival]) {
		if (id !== null && tokens.includes(id) && !shown.includes(id)) shown.push(id);
	}
	const probability = (/** @type {number} */ i, /** @type {number} */ id) =>
		Math.exp(asked.at(i, tokens.indexOf(id)));
	const highest = Math.max(...shown.flatMap((id) => places.map((_, i) => probability(i, id))));
	const top = [0.1, 0.2, 0.5].find((bound) => highest <= bound) ?? 1;
	const ticks = places.flatMap((place, i) => {
		if (i === 0) return [{ at: 0, text: "emb" }];
		return place.endsWith(".attention") ? [] : [{ at: i, text: place.split(".")[1] }];
	});
	const chart = lineChart({
		title: "How the answer forms with depth",
		width: isWide ? Math.floor((room - 28) * 0.4) : room,
		height: 206,
		xAxis: { most: places.length - 1, label: "read out after layer", ticks },
		yAxis: { least: 0, most: top, ticks: [0, top / 2, top], format: percent },
		lines: shown.map((id) => {
			const isAsked = id === candidate;
			return {
				name: glyphs(scene.token(id), 6),
				title: quotedWhole(scene.token(id)),
				points: places.map((_, i) => [i, probability(i, id)]),
				colour: isAsked ? `rgb(${palette.look})` : palette.soft,
				width: isAsked ? 2.6 : 1.4,
				dash: id === rival ? "4 3" : "",
				isStrong: isAsked,
			};
		}),
		describe: `Probability of ${shown.map((id) => quoted(scene.token(id))).join(", ")} from ${
			placeName(places[0]).long
		} to the output`,
	});
	const other = rival === null ? "" : `; dashed: ${quoted(scene.token(rival))}, its rival`;
	const legend = `bold: ${quoted(scene.token(candidate))}, asked for${other}; thin: other first choices`;
	return el("div", {}, chart, el("p", { class: "proof" }, legend));
}

/** @param {string} part the name in engines/inspection of what a part writes */
function activationName(part) {
	const [layer, rest] = part.split(".");
	if (rest === undefined) return "embedding";
	if (layer === "norm") return "norm";
	if (layer === "head") return "logits";
	if (rest === "feedforward") return `blocks.${layer}.feedforward`;
	return rest === "bias" ? `blocks.${layer}.attention` : `blocks.${layer}.attention.heads`;
}
