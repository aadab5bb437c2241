// What is selected. The locked selection is the address; a preview lasts as long as the pointer.

/** @type {Readonly<State>} */
export const DEFAULTS = Object.freeze({
	run: null,
	text: null,
	ids: null,
	t: null,
	layer: 0,
	head: 0,
	step: null,
	candidate: null,
	rival: null,
	off: null,
	n: null,
	open: ["write", "attention", "lens", "why"],
	look: "heads",
	temperature: 0.8,
	topK: 0,
	topP: 1,
	lr: 0.01,
	other: null,
	against: null,
	theme: null,
});

const NUMBERS = new Set("t layer head step candidate rival temperature topK topP lr".split(" "));
const LONGEST_IN_ADDRESS = 4000; // characters; the history has longer texts
const ADDRESS_DELAY_MS = 120; // browsers limit how often an address may change

/**
 * The state that the history has, or an address. What cannot be read is left at its default.
 * @param {string} hash "#t=37&head=3.2"
 * @returns {State}
 */
export function readAddress(hash) {
	const state = { ...DEFAULTS, open: [...DEFAULTS.open] };
	for (const [name, value] of new URLSearchParams(hash.replace(/^#/, ""))) {
		if (name === "head" && /^\d+\.\d+$/.test(value)) {
			[state.layer, state.head] = value.split(".").map(Number);
		} else if (name === "open") state.open = value ? value.split(",") : [];
		else if (NUMBERS.has(name)) {
			if (value !== "" && Number.isFinite(Number(value))) setField(state, name, Number(value));
		} else if (Object.hasOwn(DEFAULTS, name)) setField(state, name, value);
	}
	return { ...state, ...history.state };
}

/** @param {any} state @param {string} name @param {unknown} value */
function setField(state, name, value) {
	state[name] = value;
}

/**
 * The address of a state: what differs from the defaults, and where one stands.
 * @param {State} state
 * @param {number} [longest] a longer field is left out
 */
export function writeAddress(state, longest = LONGEST_IN_ADDRESS) {
	const query = new URLSearchParams();
	for (const [name, value] of Object.entries(state)) {
		if (name === "layer" || value === null) continue;
		if (name === "head") query.set("head", `${state.layer}.${state.head}`);
		else if (name === "open") query.set("open", state.open.join(","));
		else if (String(value).length > longest) continue;
		else if (value !== DEFAULTS[/** @type {keyof State} */ (name)]) query.set(name, String(value));
	}
	return `#${query}`;
}

/** The one state, and who is told of its changes. */
export const store = {
	/** @type {State} */
	state: { ...DEFAULTS },
	/** @type {Preview} */
	preview: {},
	/** @type {(isPreview: boolean) => void} */
	changed: () => {},

	/**
	 * Locks a change. A new place forgets the candidates of the old one; a new text or run also the
	 * place.
	 * @param {Partial<State>} change
	 */
	set(change) {
		const next = { ...this.state, ...change };
		if ("t" in change && !("candidate" in change)) next.candidate = next.rival = null;
		const isNewText = "text" in change || "ids" in change || "run" in change;
		if (isNewText) {
			if (!("ids" in change)) next.ids = null;
			if (!("t" in change)) next.t = null;
			next.n = next.candidate = next.rival = null;
		}
		if ("run" in change && change.run !== this.state.run) next.step = next.off = null;
		clearTimeout(addressTimer);
		if (isNewText) {
			history.replaceState(this.state, "", writeAddress(this.state));
			history.pushState(next, "", writeAddress(next)); // the browser goes back to the text before
		}
		this.state = next;
		this.preview = {};
		addressTimer = setTimeout(() => {
			history.replaceState(this.state, "", writeAddress(this.state));
		}, ADDRESS_DELAY_MS);
		this.changed(false);
	},

	/** Shows a change while the pointer rests. @param {Preview} change */
	look(change) {
		if (JSON.stringify(change) === JSON.stringify(this.preview)) return;
		this.preview = change;
		this.changed(true);
	},
};

/** @type {ReturnType<typeof setTimeout> | undefined} */
let addressTimer;
