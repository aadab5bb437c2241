// Saving: a drawing, a table, or the page itself with its numbers in one file that opens offline.

import { post, request } from "./api.js";
import { byId, el } from "./dom.js";
import { drawingOf } from "./drawing.js";
import { headAsk, originOf, sourceAsk } from "./rail.js";
import { comparedWith, Scene } from "./scene.js";
import { writeAddress } from "./state.js";
import { toCsv } from "./table.js";
import { plural } from "./words.js";

/**
 * @typedef {object} Saving
 * @property {Scene} scene
 * @property {View[]} views
 * @property {import("./texts.js").Texts} texts
 * @property {(text: string) => void} tell
 * @property {(scene: Scene) => string[]} extraAsks what the ruler and the rail ask for
 */

const PNG_SCALE = 2;
const MOST_POSITIONS = 96; // of a text that is saved with all places of the caret
const NEAR_POSITIONS = 16; // on each side of the caret, of a longer one
const MOST_HEADS = 64; // saved at full size
// Of a saved page: it runs what it holds, and loads nothing.
const SAVED_POLICY =
	"default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; img-src data: blob:";
const PARALLEL_REQUESTS = 6; // that browsers send to one server
const ANSWERS_PER_REQUEST = 16; // the most that /inside/several takes
const PART = 0x8000; // bytes that are turned into characters at once

/** @param {string} format HTML, SVG, PNG or CSV @param {Saving} saving */
export async function saveAs(format, saving) {
	const { scene, views, tell } = saving;
	const names = views.length === 1 ? `-${views[0].id}` : "";
	const file = `${scene.run.name}-${scene.checkpoint.step}${names}`.replace(/[^\w.-]+/g, "_");
	let note = "";
	const saved = [];
	if (format === "CSV") {
		const left = [];
		for (const view of views) {
			const reason = whyNoNumbers(scene, view);
			if (reason !== null) {
				left.push(`${view.title} has no numbers: ${reason}`);
				continue;
			}
			const name = `${file}${views.length === 1 ? "" : `-${view.id}`}.csv`;
			download(name, "text/csv;charset=utf-8", toCsv(view.rows(scene)));
			saved.push(name);
		}
		if (left.length === views.length) throw new Error(left.join(". "));
		note = ["", ...left].join(". ");
	} else if (format === "HTML") {
		const { html, missing } = await savedPage(saving);
		download(`${file}.html`, "text/html;charset=utf-8", html);
		if (missing) note = `. ${plural(missing, "answer is", "answers are")} not in this file`;
	} else {
		const title = `${scene.run.name}, step ${scene.checkpoint.step}`;
		const blocks = [byId("title"), byId("tokens"), ...views.map((view) => byId(view.id))];
		const drawing = drawingOf(blocks, title);
		if (format === "SVG") download(`${file}.svg`, "image/svg+xml", drawing.source);
		else download(`${file}.png`, "image/png", await toPng(drawing));
	}
	tell(`Saved as ${saved.join(", ") || `${file}.${format.toLowerCase()}`}${note}`);
}

/** Why a view has no table; null where it has one. @param {Scene} scene @param {View} view */
function whyNoNumbers(scene, view) {
	const asks = view.asks(scene);
	return scene.problem(asks) ?? (scene.has(asks) ? null : "they are not here yet");
}

/** @param {string} name @param {string} type @param {BlobPart} content */
function download(name, type, content) {
	const url = URL.createObjectURL(new Blob([content], { type }));
	el("a", { href: url, download: name }).click();
	setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** @param {{source: string, width: number, height: number}} drawing @returns {Promise<Blob>} */
async function toPng({ source, width, height }) {
	const image = new Image();
	image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(source)}`;
	await image.decode();
	const canvas = el("canvas", { width: width * PNG_SCALE, height: height * PNG_SCALE });
	canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
	return new Promise((resolve, reject) => {
		canvas.toBlob((/** @type {Blob | null} */ blob) =>
			blob ? resolve(blob) : reject(new Error("the picture is too large for this browser")),
		);
	});
}

/**
 * This page with the answers that it needs, as HTML, and how many of them it could not get.
 * @param {Saving} saving
 */
async function savedPage(saving) {
	const { scene, tell } = saving;
	const { record, missing } = await recordAnswers(saving);
	tell("The page …");
	const modules = await loadModules();
	const style = await (await request("page/style.css")).text();
	const imports = Object.fromEntries(
		[...modules].map(([name, source]) => [
			`page/${name}`,
			`data:text/javascript;charset=utf-8,${encodeURIComponent(source)}`,
		]),
	);
	const index = await (await request("/")).text();
	const body = index.slice(index.indexOf("<body>") + 6, index.indexOf("</body>"));
	record["#"] = writeAddress({ ...scene.state, t: scene.t }, Infinity);
	const safe = (/** @type {object} */ value) => JSON.stringify(value).replaceAll("<", "\\u003c");
	const title = document.title.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
	const html = `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="${SAVED_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>${title}</title>
<style>${style}</style>
<script type="importmap">${safe({ imports })}</script>
</head>
<body>${body}
<script type="application/json" id="recorded">${safe(record)}</script>
<script type="module">import "page/main.js";</script>
</body>
</html>
`;
	return { html, missing };
}

/** The modules of the page by their path, importing each other by name. */
async function loadModules() {
	/** @type {Map<string, string>} */
	const modules = new Map();
	let names = ["main.js"];
	while (names.length) {
		/** @type {Set<string>} */
		const imported = new Set();
		for (const name of names) modules.set(name, "");
		await forEachAtOnce(names, async (name) => {
			const source = await (await request(`page/${name}`)).text();
			const named = source.replace(/(from|import) "(\.[^"]+)"/g, (_, word, path) => {
				const target = new URL(path, `http://page/${name}`).pathname.slice(1);
				imported.add(target);
				return `${word} "page/${target}"`;
			});
			modules.set(name, named);
		});
		names = [...imported].filter((name) => !modules.has(name)).sort();
	}
	return modules;
}

/**
 * Does something for each item, for several at once.
 * @param {string[]} items
 * @param {(item: string) => Promise<void>} act
 */
async function forEachAtOnce(items, act) {
	const queue = items.values(); // shared: each item is taken once
	const work = async () => {
		for (const item of queue) await act(item);
	};
	await Promise.all(Array.from({ length: PARALLEL_REQUESTS }, work));
}

/**
 * The answers for the places of the caret that are saved, by their address, and how many are missing.
 * @param {Saving} saving
 */
async function recordAnswers({ scene, views, texts, tell, extraAsks }) {
	/** @type {Record<string, string>} */
	const record = {};
	const paths = savedPaths(scene, views, extraAsks);
	// The browser has these in its cache, which only a request for one address reads.
	const cached = new Set(paths.filter((path) => scene.answers.kept.has(path)));
	const others = paths.filter((path) => !cached.has(path));
	await forEachAtOnce([...cached], async (path) => {
		const response = await request(path).catch(() => null);
		if (response) record[path] = toBase64(new Uint8Array(await response.arrayBuffer()));
	});
	for (let i = 0; i < others.length; i += ANSWERS_PER_REQUEST) {
		tell(`${cached.size + i} of ${plural(paths.length, "answer")} …`);
		await recordSeveral(record, others.slice(i, i + ANSWERS_PER_REQUEST)).catch(() => null);
	}
	const missing = paths.filter((path) => !(path in record)).length;
	const note = `saved from step ${scene.checkpoint.step} of this run`;
	const run = {
		...scene.run,
		checkpoints: [scene.checkpoint],
		kept: scene.run.checkpoints,
		against: comparedWith(scene),
		is_training: false,
		notes: [note],
	};
	record["/inside/runs"] = encode({ runs: [run] });
	for (const text of [scene.text, scene.second]) {
		if (!text) continue;
		const [name, answer] = texts.record(run, text);
		record[name] = encode(answer);
	}
	return { record, missing };
}

/**
 * Asks for answers in one request, and records those that are not refused.
 * @param {Record<string, string>} record
 * @param {string[]} addresses
 */
async function recordSeveral(record, addresses) {
	const buffer = await (await post("/inside/several", { addresses })).arrayBuffer();
	let start = 0;
	for (const address of addresses) {
		const length = new DataView(buffer).getUint32(start, true);
		start += 4 + length;
		if (length) record[address] = toBase64(new Uint8Array(buffer, start - length, length));
	}
}

/** @param {Scene} scene @param {View[]} views @param {(scene: Scene) => string[]} extraAsks */
function savedPaths(scene, views, extraAsks) {
	const near = scene.length <= MOST_POSITIONS ? scene.length : NEAR_POSITIONS;
	const from = Math.max(0, scene.t - near);
	const to = Math.min(scene.length - 1, scene.t + near);
	const wishes = views.flatMap((view) => view.wishes?.(scene) ?? []);
	const paths = new Set(wishes.filter((ask) => scene.has([ask])).map((ask) => scene.path(ask)));
	const origin = originOf(scene, Object.fromEntries(views.map((view) => [view.id, view])));
	if (origin) paths.add(sourceAsk(scene, origin.name));
	for (let t = from; t <= to; t++) {
		const there = new Scene({ ...scene, shown: { ...scene.state, t } });
		const asks = views.flatMap((view) => [...view.sentenceAsks(there), ...view.asks(there)]);
		for (const ask of [...extraAsks(there), ...asks]) paths.add(there.path(ask));
	}
	if (scene.allHeads.length <= MOST_HEADS && scene.length <= MOST_POSITIONS) {
		for (const place of scene.allHeads) {
			const there = new Scene({ ...scene, shown: { ...scene.state, ...place } });
			paths.add(there.path(headAsk(there)));
		}
	}
	return [...paths];
}

/** @param {object} value */
const encode = (value) => toBase64(new TextEncoder().encode(JSON.stringify(value)));

/** @param {Uint8Array} bytes */
function toBase64(bytes) {
	let text = "";
	for (let i = 0; i < bytes.length; i += PART) {
		text += String.fromCharCode(...bytes.subarray(i, i + PART));
	}
	return btoa(text);
}
