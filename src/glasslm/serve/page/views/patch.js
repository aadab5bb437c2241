// Patch: what the loss and the next token become without a part, or with another text's stream.

import { alignedMatrix } from "../aligned_matrix.js";
import { diverging, palette, textTint, tint } from "../colour.js";
import { el } from "../dom.js";
import {
  cellText,
  divergingLegend,
  empty,
  monospace,
  number,
  strong,
  tool,
} from "../figure_parts.js";
import { partName } from "../scene.js";
import { store } from "../state.js";
import { asTable } from "../table.js";
import { fixed, glyphs, percent, quoted, signed } from "../words.js";

/** @typedef {import("../scene.js").Scene} Scene */

const CHEAP_FLOPS = 4e10; // of what is computed while the view is closed
const PORTION_FLOPS = 2e10; // of one answer about patches
const LEAST_RANGE = 0.2; // nats, that a full colour stands for
const CHANGED = 1e-4; // nats; smaller changes are rounding
const SHOWN = 6; // candidates
const ROW_PX = 22;
const LANE_PX = 44;
const MOST_LINES = 8; // of the field of the second text

/** The cost of reading the text up to the caret once, in floating-point operations. @param {Scene} scene */
const passFlops = (scene) => 2 * scene.run.parameters * (scene.t + 1);

/** @param {Scene} scene */
const ablateAsk = (scene) => `ablate?t=${scene.t}`;

/** Whether a view may be computed for its sentence alone. @param {Scene} scene @param {string} id @param {number} passes */
export function isWorthIt(scene, id, passes) {
  return scene.state.open.includes(id) || passes * passFlops(scene) < CHEAP_FLOPS;
}

/** The parts that are switched off. @param {Scene} scene */
const offParts = (scene) => (scene.state.off ? scene.state.off.split(",") : []);

/** @param {Scene} scene */
const offAsk = (scene) => `off?t=${scene.t}&parts=${offParts(scene).join(",")}`;

/** @param {string} part */
function toggle(part) {
  const parts = store.state.off ? store.state.off.split(",") : [];
  const rest = parts.filter((other) => other !== part);
  const next = rest.length < parts.length ? rest : [...parts, part];
  store.set({ off: next.length ? next.join(",") : null, n: `patch.off.${part.replace(".", "-")}` });
}

/** @type {import("../scene.js").View} */
export const patch = {
  id: "patch",
  title: "Patch",
  purpose: "Switch parts off, or copy what a second text computes.",
  sentenceAsks: (scene) =>
    isWorthIt(scene, "patch", scene.layers * (scene.heads + 2)) ? [ablateAsk(scene)] : [],
  asks: (scene) => [ablateAsk(scene), ...(offParts(scene).length ? [offAsk(scene)] : [])],
  wishes: (scene) => [neuronsAsk(scene), ...patchAsks(scene)].filter((ask) => ask !== null),
  extra: (scene) => [neuronsAsk(scene), ...patchAsks(scene)].map((ask) => ask && scene.has([ask])),

  sentence(scene) {
    if (!scene.answer(ablateAsk(scene))) return [patch.purpose];
    const { goal, parts, before, change } = ablations(scene);
    const single = parts.map((_, i) => i).filter((i) => !parts[i].endsWith(".attention"));
    const best = single.reduce((a, i) => (Math.abs(change(i)) > Math.abs(change(a)) ? i : a));
    return [
      "Without ",
      strong(partName(parts[best])),
      " the loss on ",
      strong(quoted(scene.token(goal))),
      change(best) > 0 ? " would rise from " : " would fall from ",
      number(fixed(before), "patch.before"),
      " to ",
      number(fixed(before + change(best)), `patch.off.${parts[best].replace(".", "-")}`),
      " nats; no other part matters as much here.",
    ];
  },

  draw(scene) {
    return [
      el(
        "div",
        { class: "two" },
        el("div", { class: "wide" }, switches(scene), neuronChips(scene)),
        candidateBars(scene),
      ),
      offLane(scene),
      secondText(scene),
      asTable(() => patch.rows(scene)),
    ].filter((x) => x !== null);
  },

  rows(scene) {
    const { ids, parts, logprobs, before } = ablations(scene);
    const tokens = Array.from(ids.data);
    const head = ["without", "change of the loss, nats"];
    const { change } = ablations(scene);
    return [
      [...head, ...tokens.map((id) => `probability of ${glyphs(scene.token(id))}`)],
      ["nothing", 0, ...tokens.map((_, c) => Math.exp(ablations(scene).beforeOf(c)))],
      ...parts.map((part, i) => [
        partName(part),
        change(i),
        ...tokens.map((_, c) => Math.exp(logprobs.at(i, c))),
      ]),
      ["loss before, nats", before, ...tokens.map(() => "")],
    ];
  },

  origin(scene, [kind, ...key]) {
    const { goal, before, parts, change } = ablations(scene);
    const loss = `the loss on ${quoted(scene.token(goal))}`;
    const logits = { name: "logits", index: `[${scene.t}]` };
    if (kind === "before") {
      const words = [`−log softmax of the logits after position ${scene.t}: ${loss}`];
      return { value: `${fixed(before, 4)} nats`, words, ...logits };
    }
    if (kind === "off") {
      const part = (key[0] ?? "").replace("-", ".");
      const i = parts.indexOf(part);
      const effect = i < 0 ? "" : ` is ${fixed(before + change(i), 4)}, not ${fixed(before, 4)},`;
      const words = [`${loss}${effect} when ${partName(part)} writes zeros`];
      const value = i < 0 ? "switched off" : `${signed(change(i), 4)} nats`;
      return { value, words, name: editedName(part), python: editPython(scene, part, goal) };
    }
    if (kind !== "copy") return null;
    const [place, p] = key.map(Number);
    const x = patched(scene, place, p);
    if (x === null) return null;
    const words = [`change of ${loss} when the stream `, placeWords(place), `, position ${p}, `];
    return {
      value: `${signed(x, 4)} nats`,
      words: [...words, "is that of the second text"],
      name: place ? `blocks.${place - 1}` : "embedding",
      python: () => "",
    };
  },
};

/** What each part that is off does to the goal: the token that comes, or the first choice. @param {Scene} scene */
function ablations(scene) {
  const answer = scene.answer(ablateAsk(scene));
  const { ids, before, logprobs } = answer?.arrays ?? {};
  const tokens = Array.from(ids?.data ?? []);
  const goal = scene.target ?? tokens[0];
  const place = Math.max(0, tokens.indexOf(goal));
  return {
    goal,
    ids,
    logprobs,
    parts: /** @type {string[]} */ (answer?.header.parts ?? []),
    before: -before?.at(place),
    beforeOf: (/** @type {number} */ c) => before.at(c),
    change: (/** @type {number} */ i) => before.at(place) - logprobs.at(i, place),
  };
}

/** @param {string} part the name of the activation that is overwritten by zeros */
function editedName(part) {
  const [layer, rest] = part.split(".");
  if (rest === undefined) return `blocks.${layer}.attention`;
  if (rest === "attention" || rest === "feedforward") return `blocks.${layer}.${rest}`;
  const inner = rest.startsWith("n") ? "feedforward.activation" : "attention.heads";
  return `blocks.${layer}.${inner}`;
}

/**
 * Python that gives the loss without a part.
 * @param {Scene} scene
 * @param {string} part
 * @param {number} goal
 * @returns {(code: string) => string}
 */
function editPython(scene, part, goal) {
  const [layer, rest] = part.split(".");
  const parts = rest === undefined ? [`${layer}.attention`, `${layer}.feedforward`] : [part];
  const edits = parts.map((one) => {
    const inner = /\.n?(\d+)$/.exec(one)?.[1];
    return `("${editedName(one)}", np.s_[:${inner ? `, :, ${inner}` : ""}], 0.0)`;
  });
  return (code) => {
    const call = code.slice(0, code.lastIndexOf(", ['"));
    const logits = `${call}, ["logits"], [${edits.join(", ")}])["logits"]`;
    return `x = ${logits}[${scene.t}]\nnp.logaddexp.reduce(x) - x[${goal}]`;
  };
}

/** The grid of all parts: the change of the loss without each; a click switches it off. @param {Scene} scene */
function switches(scene) {
  const { parts, change, goal } = ablations(scene);
  const { isWide } = scene.columns;
  const heads = Array.from({ length: scene.heads }, (_, h) => String(h));
  const most = Math.max(LEAST_RANGE, ...parts.map((_, i) => Math.abs(change(i))));
  const titles = [
    ...heads.map((h) => (isWide && scene.heads <= 6 ? `head ${h}` : `h${h}`)),
    isWide ? "all heads" : "all",
    isWide ? "feed-fwd" : "ff",
  ];
  const rows = Array.from({ length: scene.layers }, (_, layer) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, layerSwitch(scene, layer)),
      [...heads, "attention", "feedforward"].map((rest) => {
        const part = `${layer}.${rest}`;
        return el("td", {}, partSwitch(scene, part, change(parts.indexOf(part)), most));
      }),
    ),
  );
  const head = titles.map((title) => el("th", { scope: "col" }, title));
  return [
    el(
      "table",
      { class: "switches", style: { "min-width": `${60 + titles.length * 46}px` } },
      el("thead", {}, el("tr", {}, el("th", { class: "corner" }), head)),
      el("tbody", {}, rows),
    ),
    el(
      "p",
      { class: "cap" },
      divergingLegend(`−${fixed(most, 1)}`, `+${fixed(most, 1)} nats`),
      `change of the loss on ${quoted(scene.token(goal))} without the part; choose some to switch `,
      "them off together",
    ),
  ];
}

/** @param {Scene} scene @param {string} part @param {number} value @param {number} most */
function partSwitch(scene, part, value, most) {
  const { quantity, alpha } = diverging(value, most);
  const colour = textTint(quantity, alpha);
  return el(
    "button",
    {
      type: "button",
      "aria-pressed": String(offParts(scene).includes(part)),
      "aria-label": `${partName(part)} off: ${signed(value)} nats`,
      title: `without ${partName(part)}: ${signed(value, 3)} nats`,
      style: { background: colour.background, color: colour.text },
      on: { click: () => toggle(part) },
    },
    signed(value),
  );
}

/** @param {Scene} scene @param {number} layer */
function layerSwitch(scene, layer) {
  const part = String(layer);
  const props = {
    type: "button",
    class: "tool",
    "aria-pressed": String(offParts(scene).includes(part)),
    title: `switch the whole layer ${layer} off`,
    on: { click: () => toggle(part) },
  };
  return el("button", props, scene.columns.isWide ? `layer ${layer}` : part);
}

/** @param {Scene} scene */
function neuronsAsk(scene) {
  const ids = scene.answer(ablateAsk(scene))?.arrays.ids;
  if (!ids || scene.run.config.experts) return null;
  const tokens = Array.from(ids.data);
  const candidate = scene.target ?? tokens[0];
  const rival = tokens.find((id) => id !== candidate);
  if (rival === undefined) return null;
  const query = { t: scene.t, layer: scene.state.layer, candidate, rival };
  const words = Object.entries(query).map(([name, value]) => `${name}=${value}`);
  return `neurons?${words.join("&")}`;
}

/** The strongest neurons of the chosen layer, to switch off. @param {Scene} scene */
function neuronChips(scene) {
  const ask = neuronsAsk(scene);
  const { neurons, shares } = (ask && scene.answer(ask)?.arrays) || {};
  if (!neurons) return null;
  const { layer } = scene.state;
  const chips = Array.from(neurons.data)
    .slice(0, 8)
    .map((neuron, i) => {
      const part = `${layer}.n${neuron}`;
      const pressed = { "aria-pressed": String(offParts(scene).includes(part)) };
      const title = `its direct share in the difference of the logits: ${signed(shares.at(i), 3)}`;
      return tool(`${neuron} ${signed(shares.at(i))}`, () => toggle(part), { ...pressed, title });
    });
  const words = `neurons of layer ${layer} that push hardest`;
  return el(
    "p",
    { class: "chips indented", role: "group", "aria-label": words },
    `${words}: `,
    chips,
  );
}

/** The candidates with and without what is off. @param {Scene} scene */
function candidateBars(scene) {
  const parts = offParts(scene);
  const { ids, before, after } = scene.answer(offAsk(scene))?.arrays ?? {};
  const all = ablations(scene);
  const tokens = Array.from((ids ?? all.ids).data);
  const rows = tokens.map((id, c) => {
    const p = Math.exp(before ? before.at(c) : all.beforeOf(c));
    const q = after ? Math.exp(after.at(c)) : p;
    const words = after ? `${percent(p)} → ${percent(q)}` : percent(p);
    return el(
      "div",
      { class: "compared" },
      el("span", { class: id === scene.target ? "ch hit" : "ch" }, glyphs(scene.token(id), 8)),
      el(
        "span",
        { class: "bars" },
        el("i", { style: { width: `${p * 100}%` } }),
        after ? el("i", { style: { width: `${q * 100}%` } }) : null,
      ),
      el("span", {}, words),
    );
  });
  const shown = rows.slice(0, SHOWN);
  const next = tokens.findIndex((id) => id === scene.target);
  if (next >= SHOWN) shown.push(rows[next]);
  const heading = parts.length
    ? ["Without ", strong(parts.map(partName).join(", ")), ": "]
    : ["Choose parts to switch them off."];
  const letGo = parts.length
    ? tool("all on again", () => store.set({ off: null, n: null }), { class: "tool framed" })
    : null;
  return el("div", {}, el("p", { class: "soft small" }, heading, letGo), shown);
}

/** The change of every token's loss by what is off. @param {Scene} scene */
function offLane(scene) {
  const { nats_before: before, nats_after: after } = scene.answer(offAsk(scene))?.arrays ?? {};
  if (!offParts(scene).length || !before) return null;
  const change = (/** @type {number} */ t) => after.at(t) - before.at(t);
  const name = offParts(scene).map(partName).join(", ");
  return changeLane(scene, {
    id: "patch-off",
    label: `Change of every ${scene.unit}’s loss without ${name}`,
    short: "loss without",
    change,
    describe: (t) => [
      `${quoted(scene.text.tokens[t].text)}: ${fixed(before.at(t))} → ${fixed(after.at(t))} nats`,
      `without ${name}`,
    ],
  });
}

/**
 * A lane of changes: up is worse, down is better, on a square-root scale.
 * @param {Scene} scene
 * @param {{id: string, label: string, short: string, change: (t: number) => number,
 *   describe: (t: number) => [string, string?]}} lane
 */
export function changeLane(scene, { id, label, short, change, describe }) {
  let most = 0.05;
  for (let t = 1; t < scene.length; t++) most = Math.max(most, Math.abs(change(t)) || 0);
  const middle = LANE_PX / 2;
  return el(
    "div",
    { class: "lane-figure" },
    alignedMatrix(scene, {
      id,
      label,
      rows: [{ label: [scene.columns.isWide ? short : "Δ"] }],
      rowHeight: LANE_PX,
      paint: (context, _, t, { x, width }) => {
        context.fillStyle = palette.line;
        context.fillRect(x, middle - 0.5, width, 1);
        if (t === 0) return;
        const height = Math.sqrt(Math.abs(change(t)) / most) * (middle - 2);
        context.fillStyle = tint(change(t) > 0 ? "cost" : "look", 0.85);
        const top = change(t) > 0 ? middle - height : middle;
        context.fillRect(x + 2, top, width - 4, Math.max(0.6, height));
      },
      describe: (_, t) => (t === 0 ? [`nothing predicts the first ${scene.unit}`] : describe(t)),
      choose: (_, t) => store.set({ t: Math.max(0, t - 1) }),
    }),
    el(
      "figcaption",
      {},
      `nats; up: worse, down: better; the largest change is ${fixed(most)} (square-root scale)`,
    ),
  );
}

/** The field of the second text, and its figure. @param {Scene} scene */
function secondText(scene) {
  const field = el("textarea", {
    rows: Math.min(MOST_LINES, scene.text.text.split("\n").length + 1),
    value: scene.state.other ?? scene.text.text,
    spellcheck: "false",
    on: {
      input: (/** @type {any} */ event) => {
        const other = event.target.value;
        store.set({ other: other === scene.text.text ? null : other });
      },
      keydown: (/** @type {any} */ event) => event.stopPropagation(),
    },
  });
  const hint = "change some of it: its stream is copied into this text, one place at a time";
  const box = el(
    "div",
    { class: "second indented" },
    el("label", {}, "Second text: ", hint, field),
    scene.secondProblem ? el("p", { class: "note" }, scene.secondProblem) : null,
  );
  return el("div", {}, box, scene.second ? copies(scene, scene.second) : null);
}

/** The first position at which two texts differ. @param {Scene} scene @param {import("../scene.js").Text} second */
function firstDifference(scene, second) {
  const tokens = scene.text.tokens;
  const at = tokens.findIndex((token, t) => token.id !== second.tokens[t]?.id);
  return at < 0 ? tokens.length : at;
}

/** The positions that can be patched and are in sight. @param {Scene} scene */
function patchedRange(scene) {
  if (!scene.second) return null;
  const { first, count } = scene.columns;
  const from = Math.max(first, firstDifference(scene, scene.second));
  const to = Math.min(first + count - 1, scene.t, scene.second.tokens.length - 1);
  return from <= to ? { from, to } : null;
}

/** @param {Scene} scene */
const portion = (scene) => Math.max(2, Math.min(64, Math.floor(PORTION_FLOPS / passFlops(scene))));

/** The portion that holds a position of a place. @param {Scene} scene @param {number} place @param {number} p */
function patchAsk(scene, place, p) {
  const size = portion(scene);
  const first = Math.floor(p / size) * size;
  const last = Math.min(scene.t, first + size - 1);
  const other = scene.second?.id;
  return `patch?t=${scene.t}&other=${other}&place=${place}&first=${first}&last=${last}`;
}

/** @param {Scene} scene @returns {string[]} */
function patchAsks(scene) {
  const range = patchedRange(scene);
  if (!range || !scene.state.open.includes("patch")) return [];
  const asks = new Set();
  for (let p = range.to; p >= range.from; p = Math.floor(p / portion(scene)) * portion(scene) - 1) {
    for (let place = 0; place <= scene.layers; place++) asks.add(patchAsk(scene, place, p));
  }
  return [...asks];
}

/** The change of the goal's loss by a patch; null where it is not here. @param {Scene} scene @param {number} place @param {number} p */
function patched(scene, place, p) {
  if (!scene.second || p >= scene.second.tokens.length) return null;
  if (p < firstDifference(scene, scene.second)) return 0;
  const answer = scene.answer(patchAsk(scene, place, p));
  if (!answer?.arrays.ids) return null;
  const { positions, ids, before, logprobs } = answer.arrays;
  const row = Array.from(positions.data).indexOf(p);
  const tokens = Array.from(ids.data);
  const goal = Math.max(0, tokens.indexOf(scene.target ?? tokens[0]));
  return row < 0 ? null : before.at(goal) - logprobs.at(row, goal);
}

/** @param {number} place */
const placeWords = (place) => (place ? `after layer ${place - 1}` : "at the embedding");

/** @param {Scene} scene @param {import("../scene.js").Text} second */
function copies(scene, second) {
  const difference = firstDifference(scene, second);
  const tokens = secondTokens(scene, second);
  if (difference === scene.length) return empty("Both texts are the same.", "Change the second.");
  if (scene.t < difference) {
    const words = `Copying changes nothing. Go past position ${difference} to see a difference. `;
    const go = tool("Go there", () => store.set({ t: difference }), { class: "tool framed" });
    return el("div", {}, tokens, empty("The two texts are still the same here.", words, go));
  }
  const range = patchedRange(scene);
  let most = LEAST_RANGE;
  for (let place = 0; range && place <= scene.layers; place++) {
    for (let p = range.from; p <= range.to; p++) {
      most = Math.max(most, Math.abs(patched(scene, place, p) ?? 0));
    }
  }
  const goal = quoted(scene.token(ablations(scene).goal));
  const figure = alignedMatrix(scene, {
    id: "patch-copy",
    label: "Change of the loss when the stream of a place is copied from the second text",
    rows: Array.from({ length: scene.layers + 1 }, (_, place) => ({
      label: [copyLabel(place, scene.columns.isWide)],
    })),
    rowHeight: ROW_PX,
    paint: (context, place, p, { x, y, width, height }) => {
      const x0 = p > scene.t ? null : patched(scene, place, p);
      context.fillStyle = p > scene.t ? palette.sink : palette.card;
      context.fillRect(x, y, p > scene.t ? width : width - 1, height - 1);
      if (x0 === null || Math.abs(x0) < CHANGED) return;
      const { quantity, alpha } = diverging(x0, most);
      context.fillStyle = tint(quantity, alpha);
      context.fillRect(x, y, width - 1, height - 1);
    },
    describe: (place, p) => {
      if (p > scene.t) return ["after the caret: it cannot matter"];
      const change = patched(scene, place, p);
      const where = `stream ${placeWords(place)}, position ${p}, copied from the second text`;
      return [change === null ? "not here yet" : `${signed(change, 3)} nats on ${goal}`, where];
    },
    choose: (place, p) => {
      if (p <= scene.t) store.set({ n: `patch.copy.${place}.${p}` });
    },
  });
  const [low, high] = [`helps ${goal}, −${fixed(most, 1)}`, `+${fixed(most, 1)} nats, harms`];
  const caption = el("figcaption", {}, divergingLegend(low, high), "blank: no change");
  return el("div", {}, tokens, figure, caption);
}

/** @param {number} place @param {boolean} isWide */
function copyLabel(place, isWide) {
  if (!place) return isWide ? "embedding" : "emb";
  return isWide ? `after layer ${place - 1}` : String(place - 1);
}

/** The second text on the ruler's columns, its differences framed. @param {Scene} scene @param {import("../scene.js").Text} second */
function secondTokens(scene, second) {
  const isDifferent = (/** @type {number} */ t) => scene.text.tokens[t].id !== second.tokens[t]?.id;
  return alignedMatrix(scene, {
    id: "patch-second",
    label: "The second text",
    rows: [{ label: [scene.columns.isWide ? "second text" : "2nd"] }],
    rowHeight: 26,
    paint: (context, _, t, { x, y, width }) => {
      const token = second.tokens[t];
      if (!token) return;
      context.fillStyle = isDifferent(t) ? palette.ink : palette.soft;
      context.font = monospace(14, isDifferent(t) ? 700 : 400);
      cellText(context, glyphs(token.text), x + width / 2, y + 17, width - 3);
      if (!isDifferent(t)) return;
      context.strokeStyle = palette.ink;
      context.strokeRect(x + 1, y + 3, width - 3, 19);
    },
    describe: (_, t) => {
      const token = second.tokens[t];
      if (!token) return ["the second text has ended"];
      if (!isDifferent(t)) return ["the same in both texts"];
      return [`${quoted(scene.text.tokens[t].text)} is ${quoted(token.text)} in the second text`];
    },
    choose: (_, t) => store.set({ t }),
  });
}
