// What axe-core calls color-contrast, button-name, select-name, duplicate-id, aria-hidden-focus and
// target-size, for the page as it is shown now.
() => {
  const faults = [];
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], [x, y, z]) => [r, g, b].map((c, i) => c * a + [x, y, z][i] * (1 - a));
  const light = (rgb) => {
    const [r, g, b] = rgb.map((x) => {
      x /= 255;
      return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => {
    if (!element) return [255, 255, 255];
    const own = rgba(getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, background(element.parentElement));
  };
  const isShown = (e) => e.checkVisibility({visibilityProperty: true, opacityProperty: true});
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (words.nextNode()) {
    const element = words.currentNode.parentElement;
    const text = words.currentNode.data.trim();
    if (!text || !isShown(element) || element.closest("svg, script, noscript, :disabled")) continue;
    const style = getComputedStyle(element);
    const behind = background(element);
    let opacity = 1;
    for (let e = element; e; e = e.parentElement) opacity *= Number(getComputedStyle(e).opacity);
    const own = rgba(style.color);
    const ink = over([...own.slice(0, 3), own[3] * opacity], behind);
    const [a, b] = [light(ink), light(behind)];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const isLarge = parseFloat(style.fontSize) >= 24;
    if (contrast < (isLarge ? 3 : 4.5)) {
      faults.push(`contrast ${contrast.toFixed(2)} of "${text.slice(0, 30)}" in ${element.outerHTML.slice(0, 90)}`);
    }
  }
  const name = (e) => e.getAttribute("aria-label") || e.labels?.[0]?.textContent
    || e.textContent.trim() || e.title;
  for (const e of document.querySelectorAll("button, select, input, textarea, [role=img], [role=application], [tabindex='0']")) {
    if (isShown(e) && !name(e)) faults.push(`no name: ${e.outerHTML.slice(0, 90)}`);
    if (isShown(e) && e.closest("[aria-hidden=true]")) faults.push(`hidden: ${e.outerHTML.slice(0, 90)}`);
  }
  for (const e of document.querySelectorAll("button, select, input")) {
    const box = e.getBoundingClientRect();
    const isInline = e.matches(".n, .txt button, .tok, .rows button, .con button, .when input");
    if (isShown(e) && !isInline && box.width && (box.height < 16 || box.width < 16)) {
      faults.push(`small: ${e.outerHTML.slice(0, 90)}`);
    }
  }
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) faults.push(`twice: #${id}`);
  const wide = document.documentElement.scrollWidth - innerWidth;
  if (wide > 0) faults.push(`the page is ${wide} px wider than the window`);
  return faults;
}
