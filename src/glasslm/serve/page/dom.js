// Elements, and `morph`, which changes elements in place so that focus, drags and scrolling stay.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set([
	"svg",
	"path",
	"line",
	"circle",
	"text",
	"rect",
	"g",
	"polyline",
	"title",
]);
const PROPERTIES = new Set(["value", "checked", "selected"]);

/** @type {WeakMap<EventTarget, Handlers>} */
const handlers = new WeakMap();

/** @param {Event} event */
function dispatch(event) {
	const target = /** @type {EventTarget} */ (event.currentTarget);
	handlers.get(target)?.[event.type]?.(event);
}

/** Replaces the handlers. @param {EventTarget} target @param {Handlers} wanted */
export function listen(target, wanted) {
	for (const name of Object.keys(wanted)) target.addEventListener(name, dispatch); // once a name
	handlers.set(target, wanted);
}

/**
 * An element. Children are text or nodes: nothing is ever read as HTML.
 * @param {string} tag
 * @param {Props} [props] attributes; `on`: event handlers; `style`: CSS properties
 * @param {Children[]} children
 * @returns {any} an HTMLElement or SVGElement
 */
export function el(tag, props = {}, ...children) {
	const element = /** @type {any} */ (
		SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag)
	);
	if (tag === "button") element.type = tag; // no button submits unless it says so
	for (const [name, value] of Object.entries(props)) {
		if (value === null || value === undefined || value === false) continue;
		if (name === "on") listen(element, value);
		else if (name === "style") {
			for (const [property, x] of Object.entries(value)) element.style.setProperty(property, x);
		} else if (PROPERTIES.has(name)) element[name] = value;
		else element.setAttribute(name, value === true ? "" : String(value));
	}
	element.append(...nodes(children));
	return element;
}

/** @param {Children[]} children @returns {(Node | string)[]} */
function nodes(children) {
	const kept = children.flat().filter((x) => x !== null && x !== undefined && x !== false);
	return kept.map((x) => (x instanceof Node ? x : String(x)));
}

/**
 * Makes the children of `parent` like `children`. An element of the same kind at the same place (and
 * with the same data-key) stays and takes the attributes, handlers and children of the new one.
 * @param {Element} parent
 * @param {Children[]} children
 */
export function morph(parent, ...children) {
	const wanted = nodes(children).map((x) => (typeof x === "string" ? new Text(x) : x));
	wanted.forEach((fresh, i) => {
		const old = parent.childNodes[i];
		if (!old) parent.append(fresh);
		else if (isLike(old, fresh)) update(old, fresh);
		else old.replaceWith(fresh);
	});
	while (parent.childNodes.length > wanted.length) parent.lastChild?.remove();
}

/** @param {Node} old @param {Node} fresh */
function isLike(old, fresh) {
	if (old.nodeName !== fresh.nodeName || old.nodeName === "CANVAS") return false;
	if (!(old instanceof Element) || !(fresh instanceof Element)) return true;
	return old.getAttribute("data-key") === fresh.getAttribute("data-key");
}

/** @param {any} old @param {any} fresh */
function update(old, fresh) {
	if (old === fresh) return;
	if (old instanceof Text) {
		if (old.data !== fresh.data) old.data = fresh.data;
		return;
	}
	for (const { name } of [...old.attributes]) {
		const isUsersChoice = name === "open" && old.nodeName === "DETAILS";
		if (!fresh.hasAttribute(name) && name !== "style" && !isUsersChoice) old.removeAttribute(name);
	}
	for (const { name, value } of fresh.attributes) {
		if (name !== "style" && old.getAttribute(name) !== value) old.setAttribute(name, value);
	}
	if (old.style.cssText !== fresh.style.cssText) old.style.cssText = fresh.style.cssText;
	const isLive = handlers.has(old) || handlers.has(fresh);
	if (isLive) listen(old, handlers.get(fresh) ?? {});
	const { value } = fresh; // before its options move
	if (old.open) handlers.get(fresh)?.toggle?.({ target: fresh });
	morph(old, ...fresh.childNodes);
	if ("value" in old && old.value !== value) old.value = value;
}

/** The element of the page with this id. @param {string} id @returns {any} */
export function byId(id) {
	const element = document.getElementById(id);
	if (!element) throw new Error(`the page has no element #${id}`);
	return element;
}

/** Says something to a screen reader. @param {string} text */
export function announce(text) {
	byId("announcement").textContent = text;
}
