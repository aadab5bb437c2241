// Requests to the server: with the key, kept answers, and an end to what nobody waits for.

import { decode } from "./arrays.js";

const MOST_BYTES = 48 << 20; // of kept answers
const AT_ONCE = 4; // requests: answers come while the page draws
const RETRY_MS = 700;
const KEY_NAME = "glasslm-api-key"; // in the storage of this tab

/** A refusal of the server, in its own words. */
export class RequestError extends Error {
	/** @param {number} status @param {string} message @param {string | null} code */
	constructor(status, message, code) {
		super(message);
		this.status = status;
		this.code = code;
	}
}

/** The answers that a saved page holds, by their address; null on a served page. */
export const recorded = readRecorded();

/** @returns {Record<string, string> | null} */
function readRecorded() {
	const element = document.getElementById("recorded");
	return element ? JSON.parse(element.textContent ?? "{}") : null;
}

/** @param {string} key */
export function keepKey(key) {
	sessionStorage.setItem(KEY_NAME, key);
}

/**
 * The response of the server. Raises RequestError.
 * @param {string} path
 * @param {RequestInit} [options]
 * @param {number} [tries] more of them, while models load
 * @returns {Promise<Response>}
 */
export async function request(path, options = {}, tries = 99) {
	if (recorded) return answerFromFile(path);
	const key = sessionStorage.getItem(KEY_NAME);
	const headers = new Headers(options.headers);
	if (key) headers.set("Authorization", `Bearer ${key}`);
	const response = await fetch(path, { ...options, headers });
	if (response.ok || response.status === 304) return response;
	if (response.status === 503 && tries) {
		await pause(RETRY_MS);
		return request(path, options, tries - 1);
	}
	const body = await response.json().catch(() => ({}));
	const message = body.error?.message ?? `the server answered with status ${response.status}`;
	throw new RequestError(response.status, message, body.error?.code ?? null);
}

/** @param {string} path */
async function answerFromFile(path) {
	const bytes = recorded?.[path];
	if (bytes === undefined) throw new RequestError(404, notSaved(path), "not_saved");
	return new Response(Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0)));
}

/** What a saved file does not hold, and what to do. @param {string} path */
function notSaved(path) {
	const saved = new URLSearchParams(recorded?.["#"].slice(1)).get("t");
	const t = new URLSearchParams(path.split("?")[1]).get("t");
	const name = path.split("/")[2].replace(/-.*/, "");
	const view = VIEW_OF[name] ?? name.charAt(0).toUpperCase() + name.slice(1);
	const [where, back] = t && t !== saved ? [` for ${t}`, `go back to ${saved}, or `] : ["", ""];
	const what = `This file was saved at position ${saved}. ${view} was not saved${where}: `;
	return `${what}${back}open the run with \`glasslm look\`.`;
}

/** @type {Record<string, string>} the view that shows an answer of another name */
const VIEW_OF = {
	distribution: "Write",
	scores: "Attention",
	ablate: "Patch",
	off: "Patch",
	neurons: "Patch",
	step: "Backward",
	source: "The source of this number",
};

/**
 * The response to a POST of a JSON body. Raises RequestError.
 * @param {string} path
 * @param {object} body
 */
export function post(path, body) {
	const headers = { "Content-Type": "application/json" };
	return request(path, { method: "POST", headers, body: JSON.stringify(body) });
}

/** Answers by their path: kept, on their way, or refused. */
export class Answers {
	/**
	 * @param {{arrived: () => void, lost: () => void, unknownCheckpoint: () => void,
	 *   unknownText: (path: string) => Promise<void>}} owner `lost`: the server does not answer
	 */
	constructor(owner) {
		this.owner = owner;
		/** @type {Map<string, Answer>} in the order of their last use */
		this.kept = new Map();
		/** @type {Map<string, RequestError>} */
		this.refused = new Map();
		/** @type {Map<string, AbortController>} */
		this.underWay = new Map();
		/** @type {string[]} */
		this.wanted = [];
		/** @type {Map<string, number>} how long the last answer of each view took */
		this.durations = new Map();
		this.isAway = false;
		this.bytes = 0;
	}

	/** The answer, if it is here. @param {string} path */
	get(path) {
		const answer = this.kept.get(path);
		if (answer) {
			this.kept.delete(path);
			this.kept.set(path, answer);
		}
		return answer;
	}

	/**
	 * Gets what is wanted, in this order, and gives up what is on its way and no longer wanted.
	 * @param {string[]} paths
	 */
	want(paths) {
		this.wanted = paths;
		const wanted = new Set(paths);
		for (const [path, controller] of this.underWay) {
			if (!wanted.has(path)) {
				controller.abort();
				this.underWay.delete(path);
			}
		}
		this.sendNext();
	}

	/**
	 * How long the last answer of the same view took; Infinity before the first.
	 * @param {string} path
	 */
	milliseconds(path) {
		return this.durations.get(viewOf(path)) ?? Infinity;
	}

	/** Asks again for all that was refused, and for what the server was asked while it was away. */
	resume() {
		this.isAway = false;
		this.refused.clear();
		this.sendNext();
	}

	sendNext() {
		for (const path of this.wanted) {
			if (this.isAway || this.underWay.size >= AT_ONCE) return;
			const isKnown = this.kept.has(path) || this.refused.has(path) || this.underWay.has(path);
			if (!isKnown) void this.load(path);
		}
	}

	/** @param {string} path */
	async load(path) {
		const controller = new AbortController();
		this.underWay.set(path, controller);
		const start = performance.now();
		try {
			this.keep(path, await this.fetchAnswer(path, controller.signal));
			this.durations.set(viewOf(path), performance.now() - start);
		} catch (error) {
			if (controller.signal.aborted) return;
			const refusal = asRequestError(error);
			this.isAway = refusal.status === 0;
			if (this.isAway) this.owner.lost();
			else this.refused.set(path, refusal);
		} finally {
			if (this.underWay.get(path) === controller) this.underWay.delete(path);
		}
		this.owner.arrived();
		this.sendNext();
	}

	/** @param {string} path @param {AbortSignal} signal @returns {Promise<Answer>} */
	async fetchAnswer(path, signal) {
		for (let attempt = 0; ; attempt++) {
			try {
				return decode(await (await request(path, { signal })).arrayBuffer());
			} catch (error) {
				const { code } = asRequestError(error);
				if (code === "unknown_text" && attempt === 0) await this.owner.unknownText(path);
				else if (code === "unknown_checkpoint" && attempt === 0) {
					this.owner.unknownCheckpoint();
					await pause(RETRY_MS); // it is missing for a moment while it is saved again
				} else throw error;
			}
		}
	}

	/** @param {string} path @param {Answer} answer */
	keep(path, answer) {
		this.kept.set(path, answer);
		this.bytes += answer.bytes;
		for (const [oldest, { bytes }] of this.kept) {
			if (this.bytes <= MOST_BYTES || oldest === path) break;
			this.kept.delete(oldest);
			this.bytes -= bytes;
		}
	}
}

/** The view of `/inside/VIEW/CHECKPOINT/TEXT?...`. @param {string} path */
const viewOf = (path) => path.split("/")[2];

/** @param {unknown} error @returns {RequestError} */
export function asRequestError(error) {
	if (error instanceof RequestError) return error;
	const reason = error instanceof TypeError ? "the server does not answer" : String(error);
	return new RequestError(0, reason, null);
}

/** @param {number} ms */
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
