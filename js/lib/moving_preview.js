// Arithmetic of the moving preview; knows nothing of the page.

const LONG_SIDE = 384;

// Column and row of every picture on a sheet.
export function cellsOf(count, columns) {
  return Array.from({ length: count }, (_, number) => [number % columns, Math.floor(number / columns)]);
}

// Size to show a picture at: latents are small, and the canvas never enlarges a preview.
export function shownSize(width, height) {
  const factor = Math.max(1, LONG_SIDE / Math.max(width, height));
  return [Math.round(width * factor), Math.round(height * factor)];
}

// Whether a progress text is one of this pack's.
export function isClipText(text) {
  return /^((window|clip) \d+\/\d+, step \d+\/\d+|(decoding )?\d+ frames? at once)(, about \d+ MiB.*)?$/.test(text ?? "");
}
