// The texts that are looked at: the server cuts them into tokens, once for each run.

import { asRequestError, post, recorded, request } from "./api.js";
import { count, plural } from "./words.js";

/** @param {Run} run @param {Wanted} wanted */
const keyOf = (run, wanted) => `${run.name}\0${JSON.stringify(wanted)}`;

/** The texts of this page, by run. */
export class Texts {
	/** @param {() => void} arrived */
	constructor(arrived) {
		this.arrived = arrived;
		/** @type {Map<string, TokenizedText>} */
		this.known = new Map();
		/** @type {Map<string, string>} what the server said of a text; empty while it is on its way */
		this.refusals = new Map();
		/** @type {Map<string, Map<number, string>>} the texts of tokens, by run */
		this.namesByRun = new Map();
	}

	/** The text, if it is here; it is sent for otherwise. @param {Run} run @param {Wanted} wanted */
	find(run, wanted) {
		const key = keyOf(run, wanted);
		const known = this.known.get(key);
		if (known || this.refusals.has(key)) return known ?? null;
		this.refusals.set(key, "");
		this.post(run, wanted).then(
			() => {
				this.refusals.delete(key);
				this.arrived();
			},
			(error) => {
				this.refusals.set(key, asRequestError(error).message);
				this.arrived();
			},
		);
		return null;
	}

	/**
	 * What the server said of a text that it did not take; empty otherwise.
	 * @param {Run} run
	 * @param {Wanted} wanted
	 */
	refusal(run, wanted) {
		return this.refusals.get(keyOf(run, wanted)) ?? "";
	}

	/** Forgets what was refused, to ask again. */
	forgetRefusals() {
		this.refusals.clear();
	}

	/** The texts of a run's tokens, by id. @param {string} runName */
	names(runName) {
		const names = this.namesByRun.get(runName) ?? new Map();
		this.namesByRun.set(runName, names);
		return names;
	}

	/**
	 * Sends a text. Raises RequestError.
	 * @param {Run} run
	 * @param {Wanted} wanted
	 * @returns {Promise<TokenizedText>}
	 */
	async post(run, wanted) {
		const key = keyOf(run, wanted);
		const response = recorded
			? await request(`texts:${key}`)
			: await post("/inside/texts", { run: run.name, ...wanted });
		const answer = await response.json();
		const tokens = answer.ids.map((/** @type {number} */ id, /** @type {number} */ i) => ({
			id,
			text: answer.pieces[i].text,
			special: Boolean(answer.pieces[i].special),
		}));
		/** @type {TokenizedText} */
		const made = {
			id: answer.text,
			text: "text" in wanted ? wanted.text : answer.whole,
			wanted,
			tokens,
			left: answer.cut,
			cut: answer.cut ? cutWords(answer.cut, tokens.length) : null,
		};
		this.known.set(key, made);
		const names = this.names(run.name);
		for (const token of tokens) names.set(token.id, token.text);
		return made;
	}

	/**
	 * Sends again the texts with this id, which the server has forgotten.
	 * @param {string} id
	 * @param {Run[]} runs
	 */
	async postAgain(id, runs) {
		for (const [key, text] of this.known) {
			const run = runs.find(({ name }) => name === key.split("\0")[0]);
			if (text.id === id && run) await this.post(run, text.wanted);
		}
	}

	/**
	 * The answer that a saved page holds of a text, and its name there.
	 * @param {Run} run
	 * @param {TokenizedText} text
	 * @returns {[string, object]}
	 */
	record(run, text) {
		const ids = text.tokens.map(({ id }) => id);
		const { id, tokens, left, text: whole } = text;
		const answer = { text: id, ids, pieces: tokens, cut: left, whole };
		return [`texts:${keyOf(run, text.wanted)}`, answer];
	}
}

/** @param {number} cut @param {number} kept tokens */
const cutWords = (cut, kept) =>
	"The text is longer than what is read at once: " +
	`${plural(cut, "token is", "tokens are")} left out before the last ${count(kept)}.`;
