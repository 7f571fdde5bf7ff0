// Arithmetic of the windows picture; knows nothing of the page.

const WIDTH = 300;
const ROW = 6;

// Frames of the clip, as far as the graph tells: the longest batch or length any node makes, else four windows.
export function clipLength(nodes, window) {
  const lengths = [];
  for (const node of nodes) {
    for (const widget of node.widgets ?? []) {
      if (["batch_size", "amount", "length"].includes(widget.name) && widget.value > 1) lengths.push(widget.value);
    }
  }
  const longest = Math.max(0, ...lengths);
  return longest > window ? longest : 4 * window;
}

export function queryOf(widgets, frames) {
  return new URLSearchParams(Object.entries({ ...widgets, frames }).map(([name, value]) => [name, String(value)])).toString();
}

export function svgOf(plan) {
  const cell = WIDTH / plan.frames;
  const rects = plan.windows.flatMap((row, y) =>
    row.map(([frame, weight]) => {
      const at = `x="${(frame * cell).toFixed(2)}" y="${y * ROW}" width="${Math.max(cell - 0.4, 0.4).toFixed(2)}" height="${ROW - 1}"`;
      return `<rect ${at} fill="#4a9eda" fill-opacity="${(0.15 + 0.85 * weight).toFixed(2)}"/>`;
    }),
  );
  const height = plan.windows.length * ROW;
  const more = plan.more ? ` and ${plan.more} more` : "";
  const label = `${plan.frames} frames, ${plan.windows.length}${more} windows`;
  return `<svg viewBox="0 0 ${WIDTH} ${height}" preserveAspectRatio="none" style="width:100%;height:70px">${rects.join("")}</svg><div>${label}</div>`;
}
