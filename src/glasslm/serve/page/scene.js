// What the views draw: the selection, the run, the text, its columns, and the answers that are here.

/** A moment of the page. */
export class Scene {
	/**
	 * @param {{shown: Shown, run: Run, checkpoint: Checkpoint, text: TokenizedText,
	 *   second: TokenizedText | null, secondProblem: string, columns: Columns,
	 *   answers: import("./api.js").Answers, names: Map<number, string>, runs: Run[]}} given
	 *   `second`: the second text of Patch; `names`: the texts of tokens
	 */
	constructor(given) {
		const { shown, run, text } = given;
		this.state = shown;
		this.run = run;
		this.runs = given.runs;
		this.checkpoint = given.checkpoint;
		this.text = text;
		this.second = given.second;
		/** Why the second text cannot be read; empty where it can. */
		this.secondProblem = given.secondProblem;
		this.columns = given.columns;
		this.answers = given.answers;
		this.names = given.names;
		this.length = text.tokens.length;
		this.layers = run.config.layers;
		this.heads = run.config.heads;
		/** The last position that is read. */
		this.t = shown.t ?? 0;
	}

	/**
	 * The address of an answer about this checkpoint and text: `attention?t=3`.
	 * @param {string} ask
	 */
	path(ask) {
		return this.pathAt(this.checkpoint, ask);
	}

	/** The same of another checkpoint. @param {Checkpoint} checkpoint @param {string} ask */
	pathAt(checkpoint, ask) {
		if (ask.startsWith("/")) return ask;
		const [view, query] = ask.split("?");
		const base = `/inside/${view}/${checkpoint.hash}/${this.text.id}`;
		return query ? `${base}?${query}` : base;
	}

	/** The answer, if it is here. @param {string} ask @returns {Answer | undefined} */
	answer(ask) {
		return this.answers.get(this.path(ask));
	}

	/** The first refusal or reason for having no numbers among these. @param {string[]} asks */
	problem(asks) {
		for (const ask of asks) {
			const refusal = this.answers.refused.get(this.path(ask));
			if (refusal) return refusal.message;
			const reason = this.answer(ask)?.header.reason;
			if (reason) return String(reason);
		}
		return null;
	}

	/** What everything is drawn from, beside the answers: the same inputs give the same picture. */
	get inputs() {
		const { run, checkpoint, text, second, secondProblem, columns, state } = this;
		return [run.name, checkpoint.hash, text.id, second?.id, secondProblem, columns, state];
	}

	/** Which of these answers are here. @param {string[]} asks */
	present(asks) {
		return asks.map((ask) => this.answers.kept.has(this.path(ask)));
	}

	/** Whether all these answers are here. @param {string[]} asks */
	has(asks) {
		return asks.every((ask) => this.answers.kept.has(this.path(ask)));
	}

	/** The text of a token. @param {number} id */
	token(id) {
		return this.names.get(id) ?? `#${id}`;
	}

	/** The token that the text has after the caret; null at its end. */
	get target() {
		return this.t + 1 < this.length ? this.text.tokens[this.t + 1].id : null;
	}

	/** Every head, layer by layer. */
	get allHeads() {
		return Array.from({ length: this.layers * this.heads }, (_, i) => ({
			layer: Math.floor(i / this.heads),
			head: i % this.heads,
		}));
	}

	/** What a token is called here. */
	get unit() {
		return { char: "character", byte: "byte" }[this.run.tokenizer] ?? "token";
	}
}

/**
 * A place of the residual stream, by its name: `embedding`, `blocks.0.attention` (after it) or
 * `blocks.0` (after its feed-forward).
 * @param {string} place
 * @returns {{name: string, short: string, long: string}}
 */
export function placeName(place) {
	const [, layer, part] = place.split(".");
	if (layer === undefined) return { name: "embedding", short: "emb", long: "at the embedding" };
	if (part === "attention") {
		const long = `after the attention of layer ${layer}`;
		return { name: `${layer} attention`, short: `${layer} a`, long };
	}
	const long = `after the feed-forward of layer ${layer}`;
	return { name: `${layer} feed-forward`, short: `${layer} f`, long };
}

/**
 * A part that writes into the stream: `embedding`, `3.2` (a head), `3.feedforward`, `3.attention`,
 * `3.bias`, `3.n17` (a neuron), `3` (a layer), `norm.bias` or `head.bias`.
 * @param {string} part
 */
export function partName(part) {
	const [layer, rest] = part.split(".");
	if (rest === undefined) return layer === "embedding" ? "the embedding" : `layer ${layer}`;
	if (rest === "feedforward") return `feed-forward ${layer}`;
	if (rest === "attention") return `attention ${layer}`;
	if (part === "norm.bias") return "the last norm’s bias";
	if (part === "head.bias") return "the output’s bias";
	if (rest === "bias") return `the bias of attention ${layer}`;
	return rest.startsWith("n")
		? `neuron ${rest.slice(1)} of layer ${layer}`
		: `head ${layer}.${rest}`;
}

const CHEAP_FLOPS = 4e10; // of what is computed for the sentence of a closed view

/**
 * Whether a view may be computed for its sentence alone: it is open, or `passes` over the text up to
 * the caret cost little.
 * @param {Scene} scene
 * @param {string} id
 * @param {number} passes
 */
export function isWorthIt(scene, id, passes) {
	const flops = 2 * scene.run.parameters * (scene.t + 1) * passes;
	return scene.state.open.includes(id) || flops < CHEAP_FLOPS;
}

/**
 * What the checkpoint is compared with, by the address: `RUN@STEP`.
 * @param {Scene} scene
 * @returns {Compared | null}
 */
export function comparedWith(scene) {
	if (scene.run.against) return scene.run.against;
	const [, name, step] = /^(.*)@(\d+)$/s.exec(scene.state.against ?? "") ?? [];
	const run = scene.runs.find((other) => other.name === name);
	const checkpoint = run?.checkpoints.find((other) => other.step === Number(step));
	const isAlike = run?.tokenizer_sha256 === scene.run.tokenizer_sha256;
	return run && checkpoint && isAlike ? { run, checkpoint } : null;
}
