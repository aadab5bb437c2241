// The text, the key, the list of keys, and saving: what is asked in a dialog.

import { keepKey } from "./api.js";
import { byId, el, morph } from "./dom.js";
import { tool } from "./figure_parts.js";
import { KEYS } from "./keys.js";
import { count, plural } from "./words.js";

const FRAMED = { class: "tool framed" };

/** @param {string} title @param {Child[]} content */
function openDialog(title, ...content) {
	const dialog = byId("dialog");
	dialog.setAttribute("aria-label", title);
	morph(dialog, el("h2", {}, title), ...content);
	if (!dialog.open) dialog.showModal();
	return dialog;
}

const close = () => byId("dialog").close();

/** @param {string} words */
const closeButton = (words = "Close") => tool(words, close, FRAMED);

export function showKeys() {
	const rows = KEYS.flatMap(([keys, words]) => [
		el(
			"dt",
			{},
			keys.split(" ").map((key) => (key === "–" ? "–" : el("kbd", {}, key))),
		),
		el("dd", {}, words),
	]);
	openDialog("Keys", el("dl", {}, rows), closeButton());
}

/**
 * Edits the text. `use` takes it, or raises what the server said of it.
 * @param {object} given
 * @param {string} given.text
 * @param {number} given.most
 * @param {string} given.unit
 * @param {string} given.sample
 * @param {(text: string) => Promise<{tokens: {length: number}, cut: string | null}>} given.tokenize
 * @param {(text: string) => void} given.use
 */
export function editText({ text, most, unit, sample, tokenize, use }) {
	const area = el("textarea", {
		rows: 6,
		class: "mono",
		"aria-label": "The text",
		"aria-describedby": "text-status",
		dir: "auto",
		spellcheck: "false",
	});
	area.value = text;
	const status = el("p", { class: "soft", id: "text-status", role: "status" });
	const go = el("button", { type: "submit", class: "tool framed main" }, "Read it");
	let asked = 0;

	async function check() {
		const request = ++asked;
		go.disabled = true;
		try {
			if (area.value === "") throw new Error("The text is empty: write something to read.");
			const { tokens, cut } = await tokenize(area.value);
			if (request !== asked) return;
			const units = plural(tokens.length, unit);
			status.textContent = cut ?? `${units} of at most ${count(most)}`;
			go.disabled = false;
		} catch (error) {
			if (request === asked) status.textContent = error instanceof Error ? error.message : "";
		}
	}

	/** @type {ReturnType<typeof setTimeout> | undefined} */
	let timer;
	area.addEventListener("input", () => {
		clearTimeout(timer);
		timer = setTimeout(check, 120);
	});
	const useSample = () => {
		area.value = sample;
		void check();
	};
	const form = el(
		"form",
		{
			on: {
				submit: async (event) => {
					event.preventDefault();
					clearTimeout(timer);
					await check();
					if (go.disabled) return;
					close();
					use(area.value);
				},
				keydown: (/** @type {KeyboardEvent} */ event) => {
					if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
					/** @type {any} */ (event.currentTarget).requestSubmit();
					event.preventDefault();
				},
			},
		},
		area,
		status,
		el(
			"div",
			{ class: "buttons" },
			go,
			tool("The run’s own text", useSample, FRAMED),
			closeButton("Cancel"),
		),
	);
	byId("dialog").replaceChildren();
	openDialog("The text", form);
	area.focus();
	void check();
}

/** Asks for the API key of the server. @param {() => void} retry */
export function askForKey(retry) {
	const field = el("input", {
		type: "password",
		"aria-label": "API key",
		autocomplete: "off",
		required: true,
	});
	const submit = (/** @type {Event} */ event) => {
		event.preventDefault();
		keepKey(field.value);
		close();
		retry();
	};
	byId("dialog").replaceChildren();
	openDialog(
		"This server wants a key",
		el("p", { class: "soft" }, "It is the KEY of its --api-key, kept in this tab only."),
		el(
			"form",
			{ on: { submit } },
			field,
			el(
				"div",
				{ class: "buttons" },
				el("button", { type: "submit", class: "tool framed main" }, "Enter"),
			),
		),
	);
	field.focus();
}

/**
 * @param {object} given
 * @param {[string, string][]} given.views id and title of what can be saved
 * @param {string} given.chosen
 * @param {boolean} given.isSaved this page is a saved file itself
 * @param {(format: string, view: string, tell: (text: string) => void) => Promise<void>} given.save
 */
export function chooseSaving({ views, chosen, isSaved, save }) {
	const select = el(
		"select",
		{ "aria-label": "What to save" },
		el("option", { value: "", selected: chosen === "" }, "all open views"),
		views.map(([id, title]) => el("option", { value: id, selected: id === chosen }, title)),
	);
	const status = el("p", { class: "soft", role: "status" });
	const tell = (/** @type {string} */ text) => {
		status.textContent = text;
	};
	const saveIn = async (/** @type {string} */ format) => {
		tell("…");
		await save(format, select.value, tell).catch((error) => tell(String(error.message)));
	};
	const formats = [
		["HTML", "one file with this text’s numbers, which opens offline"],
		["SVG", "a drawing, with its text as text"],
		["PNG", "the same at twice the size"],
		["CSV", "the table of each view, in a file of its own"],
	].slice(isSaved ? 1 : 0);
	const buttons = formats.flatMap(([format, words]) => [
		el(
			"dt",
			{},
			tool(format, () => saveIn(format), FRAMED),
		),
		el("dd", {}, words),
	]);
	byId("dialog").replaceChildren();
	openDialog(
		"Save what is shown",
		el("label", { class: "line" }, "of ", select),
		el("dl", {}, buttons),
		status,
		closeButton(),
	);
}
