"""Stand-in weights that depend on (seed, tensor name, shape) alone, for parity with the golden vectors.

Every tensor is a stream of its own: the first 16 bytes (big-endian) of sha256("seed:name") start numpy's PCG64, each
64-bit word gives its low then its high half, and the top 24 bits of a half become a float32 in [-1, 1). A tensor is
`centre + spread * u` in float32, where both follow from the name. `DIGESTS` pins the bytes of the seed-7 sets.
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

TABLES = Path(__file__).parent / "names_shapes"
DIGESTS = {
    "unet": "097253cca933ec9b098ac6b69834ad2e1c29310866afd2106fec143c6eb6ce8a",
    "vae_published": "232872f10e25c462be0658cd27a7fc53bf17be114d14c60cf74decb1b63c61a6",
    "whisper_encoder": "c93c23793caeab2ccea5bb7bc3c4926d2fb31d583c915d459798c3eb99709f2f",
    "bisenet": "8e2f4a6e302b809af5f8f1c48856e1c006c909c97c6082d9d3f52679d7017a3c",
    "s3fd": "0e03063bda1f2212a2e84bd0b8e21484c7f20dff84052c46becae0af435c11cd",
    "tiny": "b58fc8aa60504779a213597d51ba6f07332e87c7a724ca08517892afac45dde9",
    "dwpose": "2f3653576512980e1f3b5a76e078275285f59e4f70d11d792bdf0710f2aafa34",
}
L2_NORM_CENTRE = {"conv3_3_norm.weight": 10.0, "conv4_3_norm.weight": 8.0, "conv5_3_norm.weight": 5.0}
ROOT2 = math.sqrt(2)
# (pattern, gain) of the convolution and linear weights: standard deviation = gain / sqrt(fan-in); first match wins.
GAIN_RULES = [
    (r"^conv1_1\.weight$", ROOT2 / 64),
    (r"^decoder\.layers\.\d+\.conv\.4\.weight$", 0.3),
    (r"^decoder\.layers\.18\.weight$", 0.2),
    (r"_mbox_loc\.weight$", 0.25),
    (r"^cp\.resnet\..*\.conv2\.weight$", 0.5),
    (r"^backbone\.stem\.0\.", 3.0),
    (r"^backbone\..*\.pointwise_conv\.", 0.7),
    (r"^backbone\..*\.final_conv\.", 2.0),
    (r"^backbone\.", 1.4),
    (r"^head\.gau\.uv\.", 1.0),
    (r"^head\.gau\.o\.", 0.02),
    (r"^head\.cls_[xy]\.", 0.5),
    (r"(^|\.)(conv_in|conv_shortcut|proj_in|quant_conv|post_quant_conv)\.weight$", 1.0),
    (r"\.(downsamplers|upsamplers)\.", 1.0),
    (r"(^|\.)(conv2|to_out\.0|net\.2|proj_out|proj_attn|out_proj|fc2)\.weight$", 1.0),
    (r"^decoder\.conv_out\.weight$", 0.8),
]


def uniform(label: str, size: int, seed: int) -> NDArray[np.float32]:
    """`size` float32 values in [-1, 1) of the stream named `label`."""
    state = int.from_bytes(hashlib.sha256(f"{seed}:{label}".encode()).digest()[:16], "big")
    words = np.random.PCG64(state).random_raw(size // 2 + 1).astype("<u8", copy=False)
    halves = words.view("<u4")[:size] >> np.uint32(8)
    return halves.astype(np.float32) * np.float32(2.0**-23) - np.float32(1)


def seeded_uniform(
    label: str, shape: tuple[int, ...], seed: int, low: float = -1.0, high: float = 1.0
) -> NDArray[np.float32]:
    """A uniform test input in [low, high)."""
    spread, centre = np.float32((high - low) / 2), np.float32((low + high) / 2)
    return (uniform(label, math.prod(shape), seed) * spread + centre).reshape(shape)


def centre_and_spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """The rule that turns a tensor's name and shape into its distribution."""
    if name.endswith("running_mean"):
        return 0.0, 0.05
    if name.endswith("running_var"):
        return 1.0, 0.2
    if name in L2_NORM_CENTRE:
        return L2_NORM_CENTRE[name], 0.2 * L2_NORM_CENTRE[name]
    if name.endswith((".embed_positions.weight", ".bias", ".beta")):
        return 0.0, 0.1
    if len(shape) == 1 or name.endswith((".g", ".gamma", ".scale")):
        return 1.0, 0.2
    gain = next((gain for pattern, gain in GAIN_RULES if re.search(pattern, name)), ROOT2)
    return 0.0, gain * math.sqrt(3 / math.prod(shape[1:]))


def tensor(name: str, shape: tuple[int, ...], seed: int = 7) -> NDArray[np.generic]:
    """One weight."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    centre, spread = centre_and_spread(name, shape)
    values = uniform(name, math.prod(shape), seed) * np.float32(spread) + np.float32(centre)
    return values.reshape(shape)


def table(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one published checkpoint."""
    rows = (line.split("\t") for line in (TABLES / f"{name}.tsv").read_text().splitlines())
    return {row[0]: tuple(int(d) for d in row[1].split("x")) if row[1] else () for row in rows}


def state_dict(name: str, seed: int = 7) -> dict[str, torch.Tensor]:
    """All weights of a published checkpoint."""
    return {key: torch.from_numpy(np.ascontiguousarray(tensor(key, shape, seed))) if shape
            else torch.tensor(tensor(key, shape, seed).item()) for key, shape in table(name).items()}


def digest(state: dict[str, torch.Tensor]) -> str:
    """sha256 over sorted names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(state):
        value = np.ascontiguousarray(state[name].numpy())
        total.update(f"{name}|{value.dtype.str}|{value.shape}|".encode() + value.tobytes())
    return total.hexdigest()
