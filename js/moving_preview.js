// Plays the clip that a sampling node works on, through the preview event the front end itself listens to.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { cellsOf, isClipText, shownSize } from "./lib/moving_preview.js";

const EVENT = "latentmotion.preview";
const SHOWN = "b_preview_with_metadata";
const ENDS = ["execution_success", "execution_error", "execution_interrupted", "reconnecting"];
const FRAMES_A_SECOND = 8;
const TEXT_WIDGET = "$$node-text-preview";
const players = new Map(); // by node: the pictures of its clip, which one is shown, the timer

async function picturesOf({ sheet, count, columns, rows }) {
  const bytes = Uint8Array.from(atob(sheet), (letter) => letter.charCodeAt(0));
  const whole = await createImageBitmap(new Blob([bytes], { type: "image/jpeg" }));
  const width = whole.width / columns;
  const height = whole.height / rows;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = shownSize(width, height);
  const context = canvas.getContext("2d");
  const pictures = [];
  for (const [column, row] of cellsOf(count, columns)) {
    context.drawImage(whole, column * width, row * height, width, height, 0, 0, canvas.width, canvas.height);
    pictures.push(await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.9)));
  }
  whole.close();
  return pictures;
}

function show(player) {
  const { place, pictures } = player;
  const blob = pictures[player.shown % pictures.length];
  const detail = {
    blob,
    nodeId: place.node_id,
    displayNodeId: place.display_node_id,
    parentNodeId: place.parent_node_id,
    realNodeId: place.real_node_id,
    promptId: place.prompt_id,
    jobId: place.prompt_id,
    latentmotion: true,
  };
  api.dispatchEvent(new CustomEvent(SHOWN, { detail }));
}

function start(place) {
  const player = { place, pictures: [], shown: 0 };
  player.timer = setInterval(() => {
    if (!player.pictures.length) return;
    player.shown += 1;
    show(player);
  }, 1000 / FRAMES_A_SECOND);
  players.set(place.node_id, player);
  return player;
}

function stop(node) {
  clearInterval(players.get(node)?.timer);
  players.delete(node);
}

function stopAll() {
  for (const node of [...players.keys()]) stop(node);
}

// The front end keeps progress text in a widget, which must not become a value of the saved workflow.
function keepOutOfFiles({ detail }) {
  if (!isClipText(detail.text)) return;
  setTimeout(() => {
    const node = app.graph.getNodeById(detail.nodeId) ?? app.graph.getNodeById(Number(detail.nodeId));
    const widget = node?.widgets?.find((found) => found.name === TEXT_WIDGET);
    if (widget) widget.serialize = false;
  }, 0);
}

app.registerExtension({
  name: "LatentMotion.MovingPreview",
  setup() {
    api.addEventListener(EVENT, async ({ detail }) => {
      const player = players.get(detail.node_id) ?? start(detail);
      player.pictures = await picturesOf(detail);
    });
    api.addEventListener(SHOWN, ({ detail }) => {
      const player = detail.latentmotion ? undefined : players.get(detail.nodeId);
      if (player?.pictures.length) show(player); // over the host's still, before the page is painted
    });
    api.addEventListener("progress_state", ({ detail }) => {
      for (const [node, { state }] of Object.entries(detail.nodes)) if (state !== "running") stop(node);
    });
    for (const end of ENDS) api.addEventListener(end, stopAll);
    api.addEventListener("progress_text", keepOutOfFiles);
  },
});
