// The curves of a report, drawn from their numbers: hover for values, drag to zoom, click a name in
// the legend to switch its curve off. Without this script the page shows the same figure as it is.
"use strict";
(() => {
  const NAMESPACE = "http://www.w3.org/2000/svg";
  const WIDTH = 520, HEIGHT = 290, LEFT = 58, RIGHT = 12, TOP = 10, BOTTOM = 38;
  const WIDTHS = { line: 1.8, raw: 0.8, points: 1.8, dashed: 1.2, star: 0 };

  const add = (parent, name, attributes = {}, text = "") => {
    const isHtml = ["div", "button", "p", "h4"].includes(name);
    const element = isHtml ? document.createElement(name) : document.createElementNS(NAMESPACE, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text) element.textContent = text;
    return parent.appendChild(element);
  };

  const format = (value) =>
    value === null ? "not finite"
      : value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(2)
      : Number(value.toPrecision(4)).toLocaleString("en-US", { maximumSignificantDigits: 4 });

  // About `count` round numbers inside [low, high].
  const ticks = (low, high, count) => {
    const rough = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((size) => size >= rough);
    const first = Math.ceil(low / step - 1e-9);
    const numbers = [];
    for (let i = first; i * step <= high + step * 1e-9; i++) numbers.push(i * step);
    return numbers;
  };

  // The index of the point of ascending `x` that is nearest to `step`.
  const nearest = (x, step) => {
    let low = 0, high = x.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (x[middle] < step) low = middle + 1; else high = middle;
    }
    return low > 0 && step - x[low - 1] < x[low] - step ? low - 1 : low;
  };

  class PanelView {
    constructor(parent, panel, shared) {
      this.panel = panel;
      this.shared = shared;
      this.hidden = new Set();
      this.box = add(parent, "div", { class: "panel" });
      add(this.box, "h4", {}, panel.title);
      this.svg = add(this.box, "svg", {
        viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: "0", role: "img",
        "aria-label": `${panel.title}, ${panel.unit}, by step. Arrow keys move the step, + zooms in, Escape shows all.`,
      });
      this.readout = add(this.box, "p", { class: "readout", "aria-live": "polite" });
      this.legend = add(this.box, "div", { class: "legend" });
      panel.curves.forEach((curve, index) => this.addLegendButton(curve, index));
      this.listen();
    }

    addLegendButton(curve, index) {
      const button = add(this.legend, "button", { type: "button", "aria-pressed": "true" }, curve.label);
      button.style.setProperty("--curve", `var(--${curve.colour})`);
      button.classList.add(curve.style);
      button.addEventListener("click", () => {
        if (!this.hidden.delete(index)) this.hidden.add(index);
        button.setAttribute("aria-pressed", String(!this.hidden.has(index)));
        this.draw();
      });
    }

    listen() {
      const stepAt = (event) => {
        const area = this.svg.getBoundingClientRect();
        const x = ((event.clientX - area.left) / area.width) * WIDTH;
        return this.from + ((x - LEFT) / (WIDTH - LEFT - RIGHT)) * (this.to - this.from);
      };
      this.svg.addEventListener("pointermove", (event) => {
        this.shared.show(stepAt(event));
        if (this.start !== undefined) this.select(this.start, stepAt(event));
      });
      this.svg.addEventListener("pointerleave", () => {
        this.start = undefined;
        this.select(0, 0);
        this.shared.show(null);
      });
      this.svg.addEventListener("pointerdown", (event) => { this.start = stepAt(event); });
      this.svg.addEventListener("pointerup", (event) => {
        const [start, end] = [this.start, stepAt(event)].sort((a, b) => a - b);
        this.start = undefined;
        this.select(0, 0);
        if (end - start > (this.to - this.from) / 50) this.shared.zoom(start, end);
      });
      this.svg.addEventListener("dblclick", () => this.shared.zoom(null, null));
      this.svg.addEventListener("keydown", (event) => this.onKey(event));
    }

    // Mark the steps that a drag will zoom into; none for an empty range.
    select(start, end) {
      this.selection.setAttribute("x", Math.min(this.x(start), this.x(end)));
      this.selection.setAttribute("width", Math.abs(this.x(end) - this.x(start)));
    }

    onKey(event) {
      const span = this.to - this.from;
      const step = this.shared.step ?? this.from + span / 2;
      const moves = { ArrowLeft: -0.02, ArrowRight: 0.02 };
      if (event.key in moves) {
        const target = step + moves[event.key] * span;
        this.shared.show(Math.min(this.to, Math.max(this.from, target)));
      } else if (event.key === "+") this.shared.zoom(step - span / 4, step + span / 4);
      else if (event.key === "Escape") this.shared.zoom(null, null);
      else return;
      event.preventDefault();
    }

    // The axes: the steps that all panels share, and the values that are visible.
    measure() {
      [this.from, this.to] = this.shared.range();
      const shown = this.panel.curves.filter((_, index) => !this.hidden.has(index));
      const values = shown.flatMap((curve) => curve.y.filter((y, i) => y !== null && curve.x[i] >= this.from && curve.x[i] <= this.to));
      let low = values.reduce((a, b) => Math.min(a, b), Infinity);
      let high = values.reduce((a, b) => Math.max(a, b), -Infinity);
      if (!values.length) [low, high] = [0, 1];
      const margin = (high - low || Math.abs(high) || 1) * 0.05;
      [this.low, this.high] = [this.panel.zero ? Math.min(0, low) : low - margin, high + margin];
      if (this.panel.bounds && !this.shared.isZoomed()) [this.low, this.high] = this.panel.bounds;
    }

    x(step) { return LEFT + ((step - this.from) / (this.to - this.from || 1)) * (WIDTH - LEFT - RIGHT); }
    y(value) { return HEIGHT - BOTTOM - ((value - this.low) / (this.high - this.low)) * (HEIGHT - TOP - BOTTOM); }

    draw() {
      this.measure();
      this.svg.replaceChildren();
      const id = `clip-${this.shared.id}-${this.panel.title.replace(/\W/g, "")}`;
      const clip = add(this.svg, "clipPath", { id });
      add(clip, "rect", { x: LEFT, y: TOP - 4, width: WIDTH - LEFT - RIGHT, height: HEIGHT - TOP - BOTTOM + 8 });
      for (const value of ticks(this.low, this.high, 5)) {
        add(this.svg, "line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: this.y(value), y2: this.y(value) });
        add(this.svg, "text", { x: LEFT - 6, y: this.y(value) + 4, "text-anchor": "end" }, format(value));
      }
      for (const step of ticks(this.from, this.to, 5))
        add(this.svg, "text", { x: this.x(step), y: HEIGHT - 20, "text-anchor": "middle" }, format(step));
      add(this.svg, "text", { x: WIDTH - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, "step");
      add(this.svg, "text", { x: 0, y: HEIGHT - 4 }, this.panel.unit);
      const area = add(this.svg, "g", { "clip-path": `url(#${id})` });
      this.panel.curves.forEach((curve, index) => { if (!this.hidden.has(index)) this.drawCurve(area, curve); });
      this.selection = add(this.svg, "rect", { class: "selection", y: TOP, width: 0, height: HEIGHT - TOP - BOTTOM });
      this.cursor = add(this.svg, "line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    }

    drawCurve(area, curve) {
      const points = curve.x.map((step, i) => (curve.y[i] === null ? null : [this.x(step), this.y(curve.y[i])]));
      const colour = `var(--${curve.colour})`;
      if (curve.style === "star") {
        for (const [x, y] of points) add(this.svg, "text", { x, y: y + 6, class: "star", "text-anchor": "middle" }, "\u2605").style.fill = colour;
        return;
      }
      // A number that is not finite is a gap in the line.
      const path = points.map((p, i) => (p ? `${i && points[i - 1] ? "L" : "M"}${p[0].toFixed(1)} ${p[1].toFixed(1)}` : "")).join("");
      const line = add(area, "path", { d: path, fill: "none", "stroke-width": WIDTHS[curve.style] });
      line.style.stroke = colour;
      if (curve.style === "raw") line.style.opacity = 0.5;
      if (curve.style === "dashed") line.style.strokeDasharray = "5 4";
      if (curve.style !== "points" || points.length > 120) return;
      for (const p of points) if (p) add(area, "circle", { cx: p[0], cy: p[1], r: 3 }).style.fill = colour;
    }

    show(step) {
      this.cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
      if (step === null) { this.readout.textContent = ""; return; }
      this.cursor.setAttribute("x1", this.x(step));
      this.cursor.setAttribute("x2", this.x(step));
      const parts = this.panel.curves
        .filter((curve, index) => !this.hidden.has(index) && curve.style !== "star" && curve.x.length)
        .map((curve) => { const i = nearest(curve.x, step); return `${curve.label} ${format(curve.y[i])} at ${format(curve.x[i])}`; });
      this.readout.textContent = parts.slice(0, 8).join(" \u00b7 ");
    }
  }

  document.querySelectorAll("figure.curves").forEach((figure, id) => {
    const panels = JSON.parse(figure.querySelector("script").textContent);
    const steps = panels.flatMap((panel) => panel.curves.flatMap((curve) => [curve.x[0], curve.x[curve.x.length - 1]])).filter((x) => x !== undefined);
    const ends = [Math.min(0, ...steps), Math.max(1, ...steps)];
    let zoomed = null;
    const live = add(figure, "div", { class: "live" });
    figure.prepend(live);
    const shared = {
      id, step: null,
      range: () => zoomed ?? ends,
      isZoomed: () => zoomed !== null,
      show(step) { shared.step = step; views.forEach((view) => view.show(step)); },
      zoom(from, to) {
        zoomed = from === null ? null : [Math.max(ends[0], from), Math.min(ends[1], to)];
        reset.hidden = zoomed === null;
        views.forEach((view) => view.draw());
      },
    };
    const views = panels.map((panel) => new PanelView(live, panel, shared));
    const reset = add(live, "button", { type: "button", class: "reset" }, "show all steps");
    reset.hidden = true;
    reset.addEventListener("click", () => shared.zoom(null, null));
    views.forEach((view) => view.draw());
    figure.classList.add("scripted");
  });
})();
