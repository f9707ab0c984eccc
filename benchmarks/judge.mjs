// The 68 landmarks of a face in every frame of a raw RGB stream on standard input, one JSON line a frame (null: no face).
// node judge.mjs NODE_MODULES WIDTH HEIGHT still|moving; "still": the face is looked for in the first frame only.
import fs from 'node:fs';
import path from 'node:path';
import { createRequire } from 'node:module';

const [folder, width, height, still] = [path.resolve(process.argv[2]), +process.argv[3], +process.argv[4], process.argv[5] === 'still'];
const require = createRequire(path.join(folder, 'judge.cjs'));
const tf = require('@tensorflow/tfjs');
require('@tensorflow/tfjs-backend-wasm').setWasmPaths(path.join(folder, '@tensorflow/tfjs-backend-wasm/dist/'));
const api = require('@vladmandic/face-api/dist/face-api.node-wasm.js');

await tf.setBackend('wasm');
await tf.ready();
const models = path.join(folder, '@vladmandic/face-api/model');
await api.nets.tinyFaceDetector.loadFromDisk(models);
await api.nets.faceLandmark68Net.loadFromDisk(models);

const size = width * height * 3, all = fs.readFileSync(0);
const options = new api.TinyFaceDetectorOptions({ inputSize: 416, scoreThreshold: 0.2 });
let crop = null;
for (let at = 0; at + size <= all.length; at += size) {
  const image = tf.tensor3d(new Uint8Array(all.buffer, all.byteOffset + at, size), [height, width, 3], 'int32');
  if (!crop || !still) {
    const found = await api.detectSingleFace(image, options);
    crop = found ? found.box : null;
  }
  if (crop) {
    const x = Math.max(0, Math.floor(crop.x)), y = Math.max(0, Math.floor(crop.y));
    const part = tf.slice3d(image, [y, x, 0], [Math.min(height - y, Math.ceil(crop.height)), Math.min(width - x, Math.ceil(crop.width)), 3]);
    const marks = await api.nets.faceLandmark68Net.detectLandmarks(part);
    console.log(JSON.stringify(marks.positions.map(p => [x + p.x, y + p.y])));
    tf.dispose(part);
  } else console.log('null');
  tf.dispose(image);
}
