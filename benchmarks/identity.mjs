// The 128 numbers that tell a person, of each picture of a face in a raw RGB stream on standard input, one JSON line each.
// node identity.mjs NODE_MODULES SIDE; pictures are SIDE x SIDE pixels.
import fs from 'node:fs';
import path from 'node:path';
import { createRequire } from 'node:module';

const [folder, side] = [path.resolve(process.argv[2]), +process.argv[3]];
const require = createRequire(path.join(folder, 'judge.cjs'));
const tf = require('@tensorflow/tfjs');
require('@tensorflow/tfjs-backend-wasm').setWasmPaths(path.join(folder, '@tensorflow/tfjs-backend-wasm/dist/'));
const api = require('@vladmandic/face-api/dist/face-api.node-wasm.js');

await tf.setBackend('wasm');
await tf.ready();
await api.nets.faceRecognitionNet.loadFromDisk(path.join(folder, '@vladmandic/face-api/model'));

const size = side * side * 3, all = fs.readFileSync(0);
for (let at = 0; at + size <= all.length; at += size) {
  const image = tf.tensor3d(new Uint8Array(all.buffer, all.byteOffset + at, size), [side, side, 3], 'int32');
  console.log(JSON.stringify(Array.from(await api.nets.faceRecognitionNet.computeFaceDescriptor(image))));
  tf.dispose(image);
}
