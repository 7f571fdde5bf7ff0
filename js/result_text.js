// Shows on a node what its last run found out: the text that its result holds.
import { app } from "../../scripts/app.js";

const NODES = new Set([
  "LatentMotionDDIMInversion",
  "LatentMotionEvaluate",
  "LatentMotionTrainDomainAdapter",
  "LatentMotionTrainMotionLora",
  "LatentMotionTrainMotionModule",
  "LatentMotionTuneVideoModel",
]);

const LEAST = 48; // height without text, and of a line or two
const MOST = 160; // more than that is scrolled
const ROUND = 20; // the front end keeps this free above and below together

// What the node said while it worked goes where the result says it again.
function dropRepeated(node, text) {
  const told = node.widgets?.findIndex(({ name }) => name === "$$node-text-preview") ?? -1;
  if (told < 0 || !node.widgets[told].value || !text.includes(node.widgets[told].value)) return;
  node.widgets[told].onRemove?.();
  node.widgets.splice(told, 1);
}

app.registerExtension({
  name: "LatentMotion.ResultText",
  nodeCreated(node) {
    if (!NODES.has(node.comfyClass) || !node.addDOMWidget) return;
    const element = document.createElement("div");
    const lines = document.createElement("div");
    element.append(lines);
    element.className = "latentmotion-result";
    element.style.cssText =
      "overflow:auto;white-space:pre-wrap;overflow-wrap:anywhere;font-size:11px;color:var(--input-text);";
    let needed = 0; // of the text; it has no height while the view is far away and hides it
    const height = () => Math.min(MOST, Math.max(LEAST, needed + ROUND));
    new ResizeObserver(() => {
      needed = lines.offsetHeight || needed;
      node.setDirtyCanvas(true, true);
    }).observe(lines);
    const widget = node.addDOMWidget("result", "latentmotion_result", element, { serialize: false, getMinHeight: height });
    widget.serialize = false; // the option alone keeps it out of prompts only, not out of saved workflows
    const executed = node.onExecuted;
    node.onExecuted = function (output, ...rest) {
      executed?.apply(this, [output, ...rest]);
      lines.textContent = output?.text?.join("\n") ?? "";
      dropRepeated(node, lines.textContent);
      widget.options.getMaxHeight = output?.images ? height : undefined; // a picture below it has the rest
    };
  },
});
