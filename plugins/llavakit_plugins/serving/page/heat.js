// Draws where an answer looked: a heat map over each image, for the whole answer or one word.

import { setUpright } from "./service.js";

const STOPS = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];

function colour(heat) {
  const place = Math.min(0.9999, Math.max(0, heat)) * (STOPS.length - 1);
  const low = Math.floor(place), part = place - low;
  return STOPS[low].map((level, n) => level + part * (STOPS[low + 1][n] - level));
}

// The grid as a small picture, a pixel for each visual token; the browser smooths it.
function picture(weights, grid) {
  const canvas = new OffscreenCanvas(grid, grid);
  const context = canvas.getContext("2d");
  const image = context.createImageData(grid, grid);
  const most = Math.max(...weights, 1e-9);
  weights.forEach((weight, n) => {
    const heat = weight / most;
    image.data.set([...colour(heat), 90 + 130 * heat], 4 * n);
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

function draw(canvas, image, weights, grid, region) {
  const scale = Math.min(3, Math.max(1, 360 / Math.max(image.width, image.height)));
  canvas.width = Math.round(image.width * scale);
  canvas.height = Math.round(image.height * scale);
  const context = canvas.getContext("2d");
  context.filter = "grayscale(0.6)";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  context.filter = "none";
  context.imageSmoothingQuality = "high";
  const [left, top, right, bottom] = region.map((edge) => edge * scale);
  context.drawImage(picture(weights, grid), left, top, right - left, bottom - top);
}

// The image as it is stored: the server's regions are of the pixels before any EXIF orientation.
async function loaded(url) {
  const [, type, data] = url.match(/^data:([^;,]*);base64,(.*)$/);
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  setUpright(bytes.buffer);  // as Chromium 150 ignores createImageBitmap's imageOrientation: "none"
  return createImageBitmap(new Blob([bytes], { type }));
}

// Fills the dialog with what the server found; `urls` are the images, in order.
export async function show(dialog, found, urls) {
  const images = await Promise.all(urls.map(loaded));
  const canvases = images.map((_, n) => {
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Heat map over image ${n + 1}`);
    return canvas;
  });
  dialog.querySelector("#heat-images").replaceChildren(...canvases);
  const words = [{ text: "the whole answer", maps: found.mean }, ...found.words];
  const buttons = words.map(({ text, maps }) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => choose(button, maps));
    return button;
  });
  function choose(chosen, maps) {
    for (const button of buttons) button.setAttribute("aria-pressed", button === chosen);
    images.forEach((image, n) => draw(canvases[n], image, maps[n], found.grid, found.regions[n]));
  }
  buttons[0].dir = "ltr";  // so that the answer's words alone set the direction
  dialog.querySelector("#heat-words").replaceChildren(...buttons);
  choose(buttons[0], words[0].maps);
  dialog.showModal();
}
