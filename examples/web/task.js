// Classifies images with what `sep-peft export my-task task.onnx` wrote: task.onnx and task.onnx.json.
// onnxruntime-web lies in ort/ beside this file; see docs/serving.md.
import * as ort from "./ort/ort.wasm.bundle.min.mjs";

ort.env.wasm.numThreads = 1; // more need headers of the server (COOP, COEP)

export async function loadTask(address) {
  const { preprocessing, outputs: [{ name, labels }] } = await (await fetch(`${address}.json`)).json();
  const session = await ort.InferenceSession.create(address);
  return {
    labels,
    async classify(file) {
      const pixels = prepare(await read(file), preprocessing);
      const scores = (await session.run({ pixel_values: pixels }))[name].data;
      return labels.map((label, index) => ({ label, score: scores[index] })).sort((a, b) => b.score - a.score);
    },
  };
}

// An image file -> its pixels, upright, what is transparent on white.
async function read(file) {
  const image = await createImageBitmap(file, { colorSpaceConversion: "none" });
  const canvas = new OffscreenCanvas(image.width, image.height).getContext("2d");
  canvas.fillStyle = "white";
  canvas.fillRect(0, 0, image.width, image.height);
  canvas.drawImage(image, 0, 0);
  return canvas.getImageData(0, 0, image.width, image.height);
}

// Pixels -> what the model takes, (1, 3, height, width), by the steps that the file tells of.
function prepare({ data, width, height }, { resize, resample, crop, rescale, mean, std }) {
  if (resize) {
    const longer = (side, shorter) => Math.trunc((resize.shortest_edge * side) / shorter);
    const edge = resize.shortest_edge;
    const w = resize.width ?? (width <= height ? edge : longer(width, height));
    const h = resize.height ?? (width <= height ? longer(height, width) : edge);
    data = resized(resized(data, width, height, w, resample), height, w, h, resample);
    [width, height] = [w, h];
  }
  const cut = crop ?? { width, height };
  const left = Math.floor((width - cut.width) / 2), top = Math.floor((height - cut.height) / 2);
  const pixels = new Float32Array(3 * cut.height * cut.width);
  for (let c = 0, place = 0; c < 3; c++)
    for (let y = top; y < top + cut.height; y++)
      for (let x = left; x < left + cut.width; x++)
        pixels[place++] = (data[4 * (y * width + x) + c] * rescale - mean[c]) / std[c];
  return new ort.Tensor("float32", pixels, [1, 3, cut.height, cut.width]);
}

// How far Pillow's filters reach, and what they weigh at a distance; a canvas resizes by others.
const FILTERS = {
  bilinear: [1, (d) => Math.max(0, 1 - d)],
  bicubic: [2, (d) => (d < 1 ? (1.5 * d - 2.5) * d * d + 1 : d < 2 ? ((-0.5 * d + 2.5) * d - 4) * d + 2 : 0)],
};

// RGBA rows of `width` pixels become rows of `size` pixels, then rows and columns change places.
function resized(data, width, height, size, resample) {
  if (!FILTERS[resample]) throw new Error(`There is no filter ${resample} here.`);
  const [reach, weigh] = FILTERS[resample], scale = width / size, wide = Math.max(1, scale);
  const made = new Uint8ClampedArray(4 * size * height);
  for (let x = 0; x < size; x++) {
    const centre = (x + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach * wide + 0.5));
    const end = Math.min(width, Math.trunc(centre + reach * wide + 0.5));
    const weights = Array.from({ length: end - first }, (_, i) => weigh(Math.abs(first + i - centre + 0.5) / wide));
    const sum = weights.reduce((a, b) => a + b, 0);
    for (let y = 0; y < height; y++)
      for (let c = 0; c < 4; c++)
        made[4 * (x * height + y) + c] =
          weights.reduce((total, weight, i) => total + weight * data[4 * (y * width + first + i) + c], 0) / sum;
  }
  return made;
}
