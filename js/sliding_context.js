// Draws the windows of a Sliding Context node: one row per window, one cell per frame, darker where it counts more.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { clipLength, queryOf, svgOf } from "./lib/windows_picture.js";

const NODE = "LatentMotionSlidingContext";

function framesOf(node) {
  const length = node.widgets.find((widget) => widget.name === "context_length").value;
  return clipLength(app.graph.nodes ?? app.graph._nodes, length);
}

async function draw(node, element) {
  const widgets = Object.fromEntries(node.widgets.filter((w) => w.type !== "latentmotion_windows").map((w) => [w.name, w.value]));
  const frames = framesOf(node);
  const response = await api.fetchApi(`/latentmotion/windows?${queryOf(widgets, frames)}`);
  const plan = await response.json();
  element.innerHTML = response.ok ? svgOf(plan) : "";
  if (!response.ok) element.textContent = plan.error;
}

app.registerExtension({
  name: "LatentMotion.SlidingContext",
  nodeCreated(node) {
    if (node.comfyClass !== NODE || !node.addDOMWidget) return;
    const element = document.createElement("div");
    element.className = "latentmotion-windows";
    element.style.cssText = "overflow:hidden;font-size:11px;color:var(--input-text);";
    let pending;
    const redraw = () => {
      clearTimeout(pending);
      pending = setTimeout(() => draw(node, element).catch(() => (element.textContent = "")), 150);
    };
    for (const widget of node.widgets) {
      const before = widget.callback;
      widget.callback = function (...args) {
        const result = before?.apply(this, args);
        redraw();
        return result;
      };
    }
    const widget = node.addDOMWidget("windows", "latentmotion_windows", element, { serialize: false, getMinHeight: () => 90 });
    widget.serialize = false; // the option alone keeps it out of prompts only, not out of saved workflows
    let frames = 0;
    const drawn = node.onDrawForeground;
    node.onDrawForeground = function (...args) {
      drawn?.apply(this, args);
      if (frames !== framesOf(node)) redraw(); // the length of the clip is set on another node
      frames = framesOf(node);
    };
    const configured = node.onConfigure;
    node.onConfigure = function (...args) {
      configured?.apply(this, args);
      redraw();
    };
    redraw();
  },
});
