// Draws the plan in the nodes, and the verdict on a queued graph. Reads values that the pack sends; decides nothing.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const DRAWN = new Set(["OverflowMLOptimize", "OverflowMLPlanPreview", "OverflowMLLoadAndQuantize"]);
const COLOURS = { fixed_bytes: "#4f7fbf", resident_bytes: "#6fa8dc", streamed_bytes: "#d9a441", activation_bytes: "#8a8a8a" };
const WORDS = { fixed_bytes: "fixed", resident_bytes: "resident", streamed_bytes: "streamed", activation_bytes: "activations" };
const VERDICTS = { "fits": "success", "fits slower": "warn", "will not fit": "error" };

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let index = 0;
  while (count >= 1024 && index < units.length - 1) { count /= 1024; index += 1; }
  return `${count.toFixed(index > 2 ? 2 : index ? 1 : 0)} ${units[index]}`;
}

function seconds(time) {
  if (time === null || time === undefined) return null;
  return time < 1 ? `${(time * 1000).toPrecision(3)} ms` : `${time.toFixed(2)} s`;
}

const MEASURED = new Map(); // seconds of a step by the part's key: a cached node shows again what was known when it ran

function element(tag, text, style) {
  const made = document.createElement(tag);
  made.textContent = text ?? ""; // never HTML: names of files are strangers' text
  Object.assign(made.style, style ?? {});
  return made;
}

function bar(part) {
  const row = element("div", "", { display: "flex", height: "14px", borderRadius: "3px", overflow: "hidden", background: "#0006" });
  const sizes = Object.keys(COLOURS).filter((name) => part[name] > 0);
  const total = sizes.reduce((sum, name) => sum + part[name], 0) || 1;
  for (const name of sizes) {
    const piece = element("div", "", { width: `${(100 * part[name]) / total}%`, background: COLOURS[name] });
    piece.title = `${WORDS[name]} ${bytes(part[name])}`;
    row.append(piece);
  }
  return row;
}

function drawPart(part) {
  const box = element("div", "", { marginTop: "4px" });
  box.append(element("div", `${part.name}: ${part.verdict}`, { fontWeight: "bold" }));
  if (part.refusal) { box.append(element("div", part.refusal)); return box; }
  const sizes = Object.keys(COLOURS).filter((name) => part[name] > 0).map((name) => `${WORDS[name]} ${bytes(part[name])}`);
  box.append(bar(part), element("div", sizes.join(" · ")));
  box.append(element("div", `peak ${bytes(part.peak_bytes)} of ${bytes(part.budget_bytes)}`));
  const predicted = seconds(part.predicted_step_s) ?? "not predicted";
  if (part.measured_step_s) MEASURED.set(part.key, part.measured_step_s);
  const measured = seconds(part.measured_step_s ?? MEASURED.get(part.key)) ?? "not yet";
  box.append(element("div", `step: predicted ${predicted} · measured ${measured}`), element("div", part.limit));
  return box;
}

function draw(node, picture) {
  const box = node.overflowmlBox;
  if (!box || !picture) return;
  box.replaceChildren(element("div", picture.verdict, { fontWeight: "bold", fontSize: "13px" }), ...picture.parts.map(drawPart));
  box.dataset.verdict = picture.verdict;
}

function toast(picture) {
  const lines = picture.parts.map((part) => part.refusal || `${part.name}: ${part.verdict}, peak ${bytes(part.peak_bytes)}`);
  app.extensionManager?.toast?.add({
    severity: VERDICTS[picture.verdict] ?? "info",
    summary: `OverflowML: ${picture.verdict}`,
    detail: lines.join("\n"),
    life: picture.verdict === "fits" ? 4000 : 12000,
  });
}

app.registerExtension({
  name: "overflowml.plan",
  setup() {
    api.addEventListener("overflowml.verdict", (event) => toast(event.detail));
    api.addEventListener("overflowml.measured", (event) => {
      const node = app.graph.getNodeById(Number(event.detail.node));
      if (node?.overflowmlBox) draw(node, event.detail);
    });
  },
  beforeRegisterNodeDef(type, definition) {
    if (!DRAWN.has(definition.name)) return;
    const created = type.prototype.onNodeCreated;
    type.prototype.onNodeCreated = function (...args) {
      const result = created?.apply(this, args);
      this.overflowmlBox = element("div", "Queue the graph to see its plan.", { font: "12px sans-serif", padding: "4px", overflow: "auto" });
      this.overflowmlBox.className = "overflowml-plan";
      const widget = this.addDOMWidget("overflowml_plan", "overflowml", this.overflowmlBox, { serialize: false, hideOnZoom: false });
      widget.computeLayoutSize = () => ({ minHeight: 150, minWidth: 260 });
      return result;
    };
    const executed = type.prototype.onExecuted;
    type.prototype.onExecuted = function (output, ...rest) {
      executed?.apply(this, [output, ...rest]);
      draw(this, output?.overflowml?.[0]);
    };
  },
});
