// The types that the page's modules share, for tsc alone: the server does not send this file.

// What the page is made of.

type Child = Node | string | number | null | undefined | false;
type Children = Child | Child[];
type Handlers = Record<string, (event: any) => void>;
type Props = { [name: string]: any; on?: Handlers; style?: Record<string, string | number> };
/** A colour: one hue a quantity. */
type Quantity = "look" | "cost" | "slope";
type Tensor = import("./arrays.js").Tensor;

interface Answer {
	/** Its plain fields; `reason` where there are no numbers. */
	header: Record<string, any>;
	arrays: Record<string, Tensor>;
	bytes: number;
}

// What is read: a run, its checkpoints, a text.

interface Checkpoint {
	step: number;
	hash: string;
	best: boolean;
	val_loss: number | null;
}

/** One of /inside/runs. */
interface Run {
	name: string;
	/** Its name; empty for files. */
	corpus: string;
	files: string[];
	preset: string;
	config: {
		layers: number;
		heads: number;
		width: number;
		/** Tokens of a text, at most. */
		text_limit: number;
		position: string;
	} & Record<string, any>;
	parameters: number;
	engine: string;
	vocab_size: number;
	/** char, byte or bpe. */
	tokenizer: string;
	/** By their step. */
	checkpoints: Checkpoint[];
	keep: number;
	max_steps?: number;
	/** Step and training loss. */
	curve: [number, number][];
	/** Step and validation loss. */
	val_curve: [number, number][];
	is_training: boolean;
	sample_text: string;
	tokenizer_sha256: string;
	notes?: string[];
	/** Of a saved run, which shows one: all that there were. */
	kept?: Checkpoint[];
	/** What a saved run is compared with. */
	against?: Compared | null;
}

interface Compared {
	run: Run;
	checkpoint: Checkpoint;
}

interface Token {
	id: number;
	text: string;
	special: boolean;
}

/**
 * What is to be read: a text, or the ids of its tokens. A text that was written by tokens is not
 * always cut into the same ones again.
 */
type Wanted = { text: string } | { ids: number[] };

interface TokenizedText {
	id: string;
	text: string;
	/** What was sent to the server. */
	wanted: Wanted;
	tokens: Token[];
	/** The tokens that it left out. */
	left: number;
	/** So in words. */
	cut: string | null;
}

// What is selected.

interface State {
	/** Name of the run; null: the first one. */
	run: string | null;
	/** null: the text that the run brings. */
	text: string | null;
	/** Tokens of a text that was written, as in `12.5.9`; instead of text. */
	ids: string | null;
	/** Caret: the last position that is read; null: a place near the end. */
	t: number | null;
	layer: number;
	head: number;
	/** Of the checkpoint; null: the latest one. */
	step: number | null;
	/** Token that Why explains; null: the one that comes. */
	candidate: number | null;
	/** Token that it is compared with; null: the model's other choice; -1: none. */
	rival: number | null;
	/** Parts that are switched off, as in `3.2,3.feedforward`. */
	off: string | null;
	/** The number whose origin is shown, as in `attention.3.2.24`. */
	n: string | null;
	/** Views. */
	open: string[];
	/** How Attention is shown: heads, layers, head or patterns. */
	look: string;
	temperature: number;
	/** 0: all. */
	topK: number;
	topP: number;
	/** Of the step in Backward. */
	lr: number;
	/** Second text of Patch; null: none yet. */
	other: string | null;
	/** What Learning compares with: `run@step`; null: nothing. */
	against: string | null;
	/** light or dark; null: the system's. */
	theme: string | null;
}

/** `towards`: candidate and rival whose logits a head pushes apart. */
type Preview = Partial<State> & { towards?: [number, number] };
type Shown = State & Preview;

// What is drawn.

interface Columns {
	/** Width of the labels left of the columns, in pixels. */
	gutter: number;
	/** Of a column, in pixels. */
	width: number;
	/** Position of the first column in sight. */
	first: number;
	/** Columns in sight. */
	count: number;
	/** Positions of the text. */
	total: number;
	/** Width of gutter and columns that is there. */
	room: number;
	/** No phone. */
	isWide: boolean;
}

type Scene = import("./scene.js").Scene;

/** The first row names the columns. */
type Rows = (string | number)[][];

/** Origin of a number: what the rail says of it. */
interface Origin {
	value: string;
	/** What the number is. */
	words: Child[];
	/** In engines/inspection. */
	name: string;
	/** Of the number in that array, as in Python: "[2, 37, 24]". */
	index?: string;
	/**
	 * Makes Python that gives the number of `code`, which gives the array; without it the index
	 * follows the code.
	 */
	python?: (code: string) => string;
	shape?: string;
}

interface View {
	id: string;
	title: string;
	/** Shown while its sentence has no numbers yet. */
	purpose: string;
	/** The answers that its sentence needs. */
	sentenceAsks(scene: Scene): string[];
	/** The answers that its figure needs, when open. */
	asks(scene: Scene): string[];
	sentence(scene: Scene): Child[];
	draw(scene: Scene): Child[];
	/** Its table, also for CSV. */
	rows(scene: Scene): Rows;
	/** Of its number with this key. */
	origin(scene: Scene, key: string[]): Origin | null;
	/** Answers that fill the figure in when they come. */
	wishes?(scene: Scene): string[];
	/** What it draws from beside the scene's state. */
	extra?(scene: Scene): unknown;
}

/** What the buttons beside the ruler do. */
interface Tools {
	editText(): void;
	save(): void;
	help(): void;
}

/** Where a cell is drawn, in pixels. */
interface Cell {
	x: number;
	y: number;
	width: number;
	height: number;
}

interface RowLabel {
	label: Child[];
	title?: string;
	isPressed?: boolean;
	choose?: () => void;
}

/** A figure of rows of cells on the ruler's columns. */
interface Matrix {
	/** Unique on the page. */
	id: string;
	/** What the figure shows, for a screen reader. */
	label: string;
	rows: RowLabel[];
	/** In pixels. */
	rowHeight: number;
	/** Pixels above a row. */
	gap?(row: number): number;
	/** Pixels below the last row. */
	extra?: number;
	/** Below its cells. */
	paintRow?(context: CanvasRenderingContext2D, row: number, y: number): void;
	paint(context: CanvasRenderingContext2D, row: number, t: number, cell: Cell): void;
	/** All that it paints from, where that is known. */
	shows?: unknown;
	/** Text and detail of the tip. */
	describe(row: number, t: number): [string, string?];
	preview?(row: number, t: number): Preview;
	choose?(row: number, t: number): void;
}

interface Line {
	name: string;
	/** Its whole name, for the pointer. */
	title?: string;
	/** x and y. */
	points: number[][];
	colour: string;
	width?: number;
	dash?: string;
	/** Its name is bold. */
	isStrong?: boolean;
	withDots?: boolean;
}

interface Chart {
	title: string;
	/** In pixels. */
	width: number;
	height: number;
	xAxis: { least?: number; most: number; label: string; ticks: { at: number; text: string }[] };
	yAxis: { least: number; most: number; ticks: number[]; format: (y: number) => string };
	lines: Line[];
	/** An x that is marked. */
	mark?: number | null;
	/** For a screen reader. */
	describe: string;
}
