// The page: it chooses the run and the text, asks for what the views need, and draws what has come.

import { Answers, asRequestError, recorded, request } from "./api.js";
import { DARK, readPalette, systemTheme } from "./colour.js";
import { layColumns } from "./columns.js";
import { byId, el, morph } from "./dom.js";
import { drawIfChanged, drawSlice, forgetDrawn, markWaiting } from "./drawn.js";
import { askForKey, chooseSaving, editText, showKeys } from "./dialogs.js";
import { SCORES } from "./head_names.js";
import { listenToKeys } from "./keys.js";
import { drawRail, headAsk, originOf, sourceAsk } from "./rail.js";
import { drawLane, drawRuler, towardsAsk } from "./ruler.js";
import { saveAs } from "./save.js";
import { Scene } from "./scene.js";
import { readAddress, store } from "./state.js";
import { drawStory } from "./story.js";
import { Texts } from "./texts.js";
import { drawTitle, drawWhen } from "./top.js";
import { attention } from "./views/attention.js";
import { backward } from "./views/backward.js";
import { learning } from "./views/learning.js";
import { lens } from "./views/lens.js";
import { patch } from "./views/patch.js";
import { NGRAM, read } from "./views/read.js";
import { why } from "./views/why.js";
import { write } from "./views/write.js";
import { glyphs } from "./words.js";

const VIEWS = [write, read, attention, lens, why, patch, backward, learning];
const POLL_MS = 3000; // while a run trains, or the server is away
const REST_MS = 20000; // between two looks for new checkpoints otherwise
const STARTING_SHARE = 0.84; // of the text is read at first
const AWAY = "The server does not answer. What is here stays; start it again to go on.";
const FAST_MS = 80; // what answers faster is asked for ahead, one token left and right

/** @type {Record<string, View>} */
const viewsById = Object.fromEntries(VIEWS.map((view) => [view.id, view]));

/** @type {Run[]} */
let runs = [];
/** @type {Scene | null} */
let scene = null;
let firstColumn = 0;
let frame = 0;
let isWhole = false; // the next frame draws all, not only what follows the pointer
let etag = '""';

const answers = new Answers({
	arrived: requestDraw,
	lost: () => {
		problem = AWAY;
		poll(POLL_MS);
		requestDraw();
	},
	unknownCheckpoint: () => poll(0), // a newer one may have taken its place
	unknownText: (path) => texts.postAgain(path.split("/")[4]?.split("?")[0] ?? "", runs),
});
const texts = new Texts(requestDraw);

/** @type {Tools} */
const tools = {
	editText: () => {
		const now = scene;
		if (!now || recorded) return;
		editText({
			text: now.text.text,
			most: now.run.config.text_limit,
			unit: now.unit,
			sample: now.run.sample_text,
			tokenize: (text) => texts.post(now.run, { text }),
			use: (text) => store.set({ text: text === now.run.sample_text ? null : text }),
		});
	},
	save: () => openSaving(""),
	help: showKeys,
};

/** @param {string} chosen */
function openSaving(chosen) {
	const open = VIEWS.filter((view) => store.state.open.includes(view.id));
	chooseSaving({
		views: open.map((view) => [view.id, view.title]),
		chosen: open.some((view) => view.id === chosen) ? chosen : "",
		isSaved: recorded !== null,
		save: async (format, id, tell) => {
			const views = open.filter((view) => !id || view.id === id);
			if (scene) await saveAs(format, { scene, views, texts, tell, extraAsks });
		},
	});
}

/** The text that is to be read; null while the run's own one is not known. @param {Run} run */
function wantedText(run) {
	const { text, ids } = store.state;
	if (ids) return { ids: ids.split(".").map(Number) };
	if (text) return { text };
	return run.sample_text ? { text: run.sample_text } : null;
}

/** Draws all at the next frame. */
function requestDraw() {
	isWhole = true;
	requestFrame();
}

/** Draws at the next frame what follows the pointer, or all if that is wanted or unfinished. */
function requestFrame() {
	cancelAnimationFrame(frame);
	frame = requestAnimationFrame(() => {
		const wasWhole = isWhole;
		isWhole = false;
		if (!drawSlice(wasWhole ? draw : drawPreview)) return;
		isWhole ||= wasWhole;
		requestFrame();
	});
}

const chosenRun = () => runs.find(({ name }) => name === store.state.run) ?? runs[0];

/** @returns {[Scene, Scene] | null} with the locked and with the previewed selection */
function makeScenes() {
	const run = chosenRun();
	const checkpoint =
		run?.checkpoints.find(({ step }) => step === store.state.step) ?? run?.checkpoints.at(-1);
	if (!checkpoint) return null;
	const wanted = wantedText(run);
	if (!wanted) return null;
	const isRefused = texts.refusal(run, wanted) !== "";
	const sample = { text: run.sample_text };
	const isFirst = !scene || scene.run.name !== run.name;
	const text =
		texts.find(run, wanted) ??
		(isFirst ? isRefused && run.sample_text && texts.find(run, sample) : scene?.text);
	if (!text) return null;
	const { other } = store.state;
	const second = other === null ? null : texts.find(run, { text: other });
	const secondProblem = other === null ? "" : texts.refusal(run, { text: other });
	const length = text.tokens.length;
	const startingT = Math.max(0, Math.min(length - 2, Math.round(STARTING_SHARE * length)));
	const t = Math.max(0, Math.min(length - 1, Math.round(store.state.t ?? startingT)));
	const layer = Math.min(store.state.layer, run.config.layers - 1);
	const head = Math.min(store.state.head, run.config.heads - 1);
	const columns = layColumns({
		room: byId("story").clientWidth,
		gutter: parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--gutter")),
		total: length,
		glyphs: Math.max(1, ...text.tokens.map((token) => [...glyphs(token.text)].length)),
		caret: t,
		first: firstColumn,
	});
	firstColumn = columns.first;
	const given = { run, runs, checkpoint, text, second, secondProblem, columns, answers };
	const names = texts.names(run.name);
	const locked = new Scene({ ...given, names, shown: { ...store.state, t, layer, head } });
	const shown = { ...locked.state, ...store.preview };
	return [locked, new Scene({ ...given, names, shown })];
}

/** What the ruler and the rail ask for, beside the views. @param {Scene} of */
function extraAsks(of) {
	return ["read", NGRAM, `attention?t=${of.t}`, SCORES, headAsk(of)];
}

/**
 * The addresses of all that is wanted, the most urgent first.
 * @param {Scene} locked
 * @param {Scene} shown
 */
function wantedPaths(locked, shown) {
	const open = VIEWS.filter((view) => locked.state.open.includes(view.id));
	const first = ["read", `attention?t=${locked.t}`];
	const asks = [
		...first,
		...[towardsAsk(shown)].filter((ask) => ask !== null),
		...open.flatMap((view) => [...view.sentenceAsks(locked), ...view.asks(locked)]),
		SCORES,
		headAsk(shown),
		...VIEWS.flatMap((view) => view.sentenceAsks(locked)),
		NGRAM,
		...open.flatMap((view) => view.wishes?.(locked) ?? []),
	];
	const paths = asks.map((ask) => locked.path(ask));
	const origin = originOf(locked, viewsById);
	if (origin) paths.push(sourceAsk(locked, origin.name));
	for (const by of [1, -1]) {
		const t = locked.t + by;
		if (t < 0 || t >= locked.length) continue;
		const beside = new Scene({ ...locked, shown: { ...locked.state, t } });
		const ahead = open.flatMap((view) => view.asks(beside)).map((ask) => beside.path(ask));
		paths.push(...ahead.filter((path) => answers.milliseconds(path) < FAST_MS));
	}
	return [...new Set(paths)];
}

function draw() {
	useTheme(store.state.theme ?? systemTheme());
	const scenes = makeScenes();
	drawNotice();
	if (!scenes) return;
	const [locked, shown] = scenes;
	scene = locked;
	answers.want(wantedPaths(locked, shown));
	learnNames(locked);
	document.documentElement.style.setProperty("--column", `${locked.columns.width}px`);
	const { run, checkpoint, columns } = locked;
	drawPart("title", [run, runs.map(({ name }) => name)], () => drawTitle(run, runs));
	drawPart("when", [run, checkpoint, columns], () => drawWhen(locked));
	const ruler = [locked.inputs, locked.present(["read", SCORES])];
	drawPart("ruler", ruler, () => drawRuler(locked, tools));
	drawStory(locked, VIEWS, { toggle, save: openSaving });
	drawBeside(shown);
}

/**
 * Draws an element of the page, or marks it as waiting where this frame is full.
 * @param {string} id
 * @param {unknown} inputs
 * @param {() => void} paint
 */
const drawPart = (id, inputs, paint) => markWaiting(byId(id), !drawIfChanged(id, inputs, paint));

/** The lane and the rail, which follow the pointer. @param {Scene} shown */
function drawBeside(shown) {
	const towards = towardsAsk(shown);
	const lane = [`attention?t=${shown.t}`, ...(towards ? [towards] : [])];
	drawPart("lane", [shown.inputs, shown.present(lane)], () => drawLane(shown));
	const origin = originOf(shown, viewsById);
	const asks = [...extraAsks(shown), ...(origin ? [sourceAsk(shown, origin.name)] : [])];
	const refused = asks.map((ask) => answers.refused.has(shown.path(ask)));
	const inputs = [shown.inputs, store.state, shown.present(asks), refused, origin?.value];
	drawPart("rail", inputs, () => drawRail(shown, viewsById));
}

/** @param {string} theme */
function useTheme(theme) {
	const { dataset } = document.documentElement;
	if (dataset.theme === theme) return;
	dataset.theme = theme;
	readPalette();
	forgetDrawn();
}

/** Keeps the texts of tokens that answers bring. @param {Scene} of */
function learnNames(of) {
	for (const answer of answers.kept.values()) {
		const { tokens } = answer.header;
		if (!tokens || answer.header.learned) continue;
		answer.header.learned = true;
		for (const [id, text] of Object.entries(tokens)) of.names.set(Number(id), String(text));
	}
}

/** Draws only what follows the pointer. */
function drawPreview() {
	const scenes = makeScenes();
	if (!scenes) return;
	answers.want(wantedPaths(...scenes));
	drawBeside(scenes[1]);
}

/** Opens a view and goes to it, or closes it. @param {string} id */
function toggle(id) {
	const { open } = store.state;
	const isOpen = open.includes(id);
	store.set({ open: isOpen ? open.filter((other) => other !== id) : [...open, id] });
	const button = /** @type {HTMLElement | null} */ (document.querySelector(`#${id} h2 button`));
	button?.focus({ preventScroll: isOpen });
}

function drawNotice() {
	const notice = byId("notice");
	const run = chosenRun();
	const words = [problem, ...unreadable].filter(Boolean);
	if (run && !run.checkpoints.length) {
		words.push(`${run.name} has no checkpoint yet. This page waits for the first one.`);
	}
	const wanted = run && wantedText(run);
	const refused = wanted ? texts.refusal(run, wanted) : "";
	if (run?.checkpoints.length && !wanted) words.push("A text of this run is being read …");
	if (refused) words.push(refused, "This page goes on with the text before it.");
	else if (scene?.text.cut) words.push(scene.text.cut);
	notice.hidden = !words.length;
	morph(
		notice,
		words.map((text) => el("p", {}, text)),
		problem && el("button", { class: "tool framed", on: { click: loadRuns } }, "Try again"),
	);
}

let problem = ""; // why there are no answers, or no list of runs

/** The runs that can be shown; of the others the reason is said. @param {{runs: any[]}} answer */
function readRuns(answer) {
	unreadable = answer.runs.filter((run) => run.error).map((run) => `${run.name}: ${run.error}`);
	return answer.runs.filter((run) => !run.error);
}

/** @type {string[]} */
let unreadable = [];

/** Looks for runs and checkpoints; what is new is drawn. */
async function loadRuns() {
	try {
		const response = await request("/inside/runs", { headers: { "If-None-Match": etag } }, 0);
		const wasAway = problem;
		problem = "";
		if (response.status !== 304) {
			etag = response.headers.get("ETag") ?? etag;
			runs = readRuns(await response.json());
			requestDraw();
		}
		if (wasAway) {
			texts.forgetRefusals();
			answers.resume();
			requestDraw();
		}
	} catch (error) {
		const { status, message } = asRequestError(error);
		problem = status ? message : AWAY;
		requestDraw();
		if (status === 401) return askForKey(loadRuns);
	}
	const isLive = runs.some((run) => run.is_training || !run.sample_text);
	poll(problem || isLive || !runs.length ? POLL_MS : REST_MS);
}

/** @type {ReturnType<typeof setTimeout> | undefined} */
let pollTimer;

/** Looks for runs and checkpoints after this time. @param {number} ms */
function poll(ms) {
	clearTimeout(pollTimer);
	if (!recorded) pollTimer = setTimeout(loadRuns, ms);
}

store.state = readAddress(location.hash || (recorded?.["#"] ?? ""));
store.changed = (isPreview) => (isPreview ? requestFrame() : requestDraw());
addEventListener("popstate", () => {
	store.state = readAddress(location.hash);
	requestDraw();
});
addEventListener("resize", requestDraw);
matchMedia(DARK).addEventListener("change", requestDraw);
new ResizeObserver(([{ target }]) => {
	const { offsetHeight } = /** @type {HTMLElement} */ (target);
	document.documentElement.style.setProperty("--ruler", `${offsetHeight}px`);
}).observe(byId("ruler"));
listenToKeys({ scene: () => scene, toggle, views: VIEWS.map((view) => view.id), tools });
void loadRuns();
