// Shows on a node what its last run found out: the text that its result holds.
import { app } from "../../scripts/app.js";

const NODES = new Set(["LatentMotionDDIMInversion", "LatentMotionEvaluate"]);

app.registerExtension({
  name: "LatentMotion.ResultText",
  nodeCreated(node) {
    if (!NODES.has(node.comfyClass) || !node.addDOMWidget) return;
    const element = document.createElement("div");
    element.className = "latentmotion-result";
    element.style.cssText = "overflow:auto;white-space:pre-wrap;font-size:11px;color:var(--input-text);";
    const widget = node.addDOMWidget("result", "latentmotion_result", element, { serialize: false, getMinHeight: () => 48 });
    widget.serialize = false; // the option alone keeps it out of prompts only, not out of saved workflows
    const executed = node.onExecuted;
    node.onExecuted = function (output, ...rest) {
      executed?.apply(this, [output, ...rest]);
      element.textContent = output?.text?.join("\n") ?? "";
    };
  },
});
