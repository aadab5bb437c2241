// What is on the page as an SVG: texts as text, boxes and lines as shapes, canvases as images.

const NAMESPACE = "http://www.w3.org/2000/svg";
const LEFT_OUT = ".tools, .astable, .unseen, .cell, [hidden], select option";
const MARGIN = 12; // around the drawing, and between its blocks, in pixels

/**
 * The elements one below the other, as the source of an SVG.
 * @param {Element[]} blocks
 * @param {string} title
 * @returns {{source: string, width: number, height: number}}
 */
export function drawingOf(blocks, title) {
	const root = make("svg", {});
	const background = getComputedStyle(document.documentElement).getPropertyValue("--paper").trim();
	root.append(make("title", {}, title));
	const paper = root.appendChild(make("rect", { fill: background }));
	let top = MARGIN;
	let width = 0;
	const left = Math.min(...blocks.map((block) => block.getBoundingClientRect().left));
	for (const block of blocks) {
		const box = block.getBoundingClientRect();
		const group = make("g", { transform: `translate(${MARGIN - left} ${top - box.top})` });
		drawElement(block, group);
		root.append(group);
		top += box.height + MARGIN;
		width = Math.max(width, box.right - left + 2 * MARGIN);
	}
	const size = { width: Math.ceil(width), height: Math.ceil(top) };
	for (const element of [root, paper]) {
		for (const [name, value] of Object.entries(size)) element.setAttribute(name, `${value}`);
	}
	root.setAttribute("viewBox", `0 0 ${size.width} ${size.height}`);
	return { source: new XMLSerializer().serializeToString(root), ...size };
}

/**
 * @param {string} tag
 * @param {Record<string, string | number>} attributes
 * @param {string} [text]
 */
function make(tag, attributes, text) {
	const element = document.createElementNS(NAMESPACE, tag);
	for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, `${value}`);
	if (text !== undefined) element.textContent = text;
	return element;
}

/** @param {Element} element @param {Element} into */
function drawElement(element, into) {
	if (element.matches(LEFT_OUT)) return;
	const style = getComputedStyle(element);
	const box = element.getBoundingClientRect();
	if (style.visibility === "hidden") return;
	const isEmpty = box.width === 0 || box.height === 0; // its children may lie outside it
	if (element instanceof HTMLCanvasElement && !isEmpty) {
		const { left: x, top: y, width, height } = box;
		into.append(make("image", { x, y, width, height, href: element.toDataURL() }));
		return;
	}
	if (element instanceof SVGSVGElement) {
		into.append(cloneWithStyle(element, box));
		return;
	}
	if (!isEmpty) drawBox(style, box, into);
	if (element instanceof HTMLSelectElement) {
		drawWords(element.selectedOptions[0]?.text ?? "", style, box.left + 6, box.top, box, into);
		return;
	}
	for (const child of element.childNodes) {
		if (child instanceof Element) drawElement(child, into);
		else if (child instanceof Text) drawText(child, style, into);
	}
}

/** @param {CSSStyleDeclaration} style @param {DOMRect} box @param {Element} into */
function drawBox(style, { left: x, top: y, width, height }, into) {
	const rx = Math.min(height / 2, parseFloat(style.borderTopLeftRadius) || 0);
	const fill = gradientOf(style, into) ?? style.backgroundColor;
	const border = parseFloat(style.borderTopWidth);
	const isFramed = border > 0 && parseFloat(style.borderLeftWidth) > 0;
	const dash = { "stroke-dasharray": style.borderTopStyle === "dashed" ? "3 2" : "none" };
	const stroke = isFramed
		? { stroke: style.borderTopColor, "stroke-width": border, ...dash }
		: { stroke: "none" };
	if (!isClear(fill) || isFramed) {
		const paint = isClear(fill) ? "none" : fill;
		into.append(make("rect", { x, y, width, height, rx, fill: paint, ...stroke }));
	}
	if (isFramed) return;
	const sides = [
		["Top", x, y, x + width, y],
		["Bottom", x, y + height, x + width, y + height],
		["Left", x, y, x, y + height],
		["Right", x + width, y, x + width, y + height],
	];
	for (const [side, x1, y1, x2, y2] of sides) {
		const size = parseFloat(style.getPropertyValue(`border-${side}-width`.toLowerCase()));
		const colour = style.getPropertyValue(`border-${side}-color`.toLowerCase());
		const kind = style.getPropertyValue(`border-${side}-style`.toLowerCase());
		if (!(size > 0) || isClear(colour)) continue;
		const dots = { "stroke-dasharray": kind === "dotted" ? "1 2" : "none" };
		into.append(make("line", { x1, y1, x2, y2, stroke: colour, "stroke-width": size, ...dots }));
	}
}

/** @param {string} colour */
const isClear = (colour) => colour === "transparent" || /^rgba\(.*,\s*0\)$|\/ 0\)$/.test(colour);

let gradients = 0;

/**
 * The reference of a linear gradient from left to right.
 * @param {CSSStyleDeclaration} style
 * @param {Element} into
 */
function gradientOf(style, into) {
	if (!style.backgroundImage.startsWith("linear-gradient")) return null;
	const gradient = make("linearGradient", { id: `gradient-${++gradients}` });
	const stops = style.backgroundImage.matchAll(/(rgba?\([^)]*\)) ([\d.]+)%/g);
	for (const [, colour, offset] of stops) {
		gradient.append(make("stop", { offset: `${offset}%`, "stop-color": colour }));
	}
	into.append(gradient);
	return `url(#gradient-${gradients})`;
}

/**
 * The lines of a text node.
 * @param {Text} node
 * @param {CSSStyleDeclaration} style
 * @param {Element} into
 */
function drawText(node, style, into) {
	const range = document.createRange();
	/** @type {{text: string, box: DOMRect}[]} */
	const lines = [];
	let place = 0;
	for (const character of node.data) {
		range.setStart(node, place);
		range.setEnd(node, (place += character.length));
		const box = range.getClientRects()[0];
		if (!box || box.width === 0) continue;
		const line = lines.at(-1);
		if (line && Math.abs(line.box.top - box.top) < 2) line.text += character;
		else lines.push({ text: character, box });
	}
	for (const { text, box } of lines) drawWords(text, style, box.left, box.top, box, into);
}

/**
 * @param {string} text
 * @param {CSSStyleDeclaration} style
 * @param {number} x
 * @param {number} top
 * @param {DOMRect} box
 * @param {Element} into
 */
function drawWords(text, style, x, top, box, into) {
	if (!text.trim()) return;
	const size = parseFloat(style.fontSize);
	const y = top + box.height / 2 + size * 0.35;
	into.append(
		make(
			"text",
			{
				x,
				y,
				fill: style.color,
				"font-size": size,
				"font-weight": style.fontWeight,
				"font-family": style.fontFamily,
			},
			text.replaceAll(" ", "\u00a0"),
		),
	);
}

/**
 * A drawing of the page, with what the style sheet gives it.
 * @param {SVGSVGElement} drawing
 * @param {DOMRect} box
 */
function cloneWithStyle(drawing, box) {
	const clone = /** @type {SVGSVGElement} */ (drawing.cloneNode(true));
	const originals = [...drawing.querySelectorAll("text")];
	[...clone.querySelectorAll("text")].forEach((text, i) => {
		const style = getComputedStyle(originals[i]);
		text.setAttribute("fill", style.fill);
		for (const name of ["font-size", "font-weight", "font-family"]) {
			text.setAttribute(name, style.getPropertyValue(name));
		}
	});
	const { left: x, top: y, width, height } = box;
	for (const [name, value] of Object.entries({ x, y, width, height })) {
		clone.setAttribute(name, `${value}`);
	}
	return clone;
}
