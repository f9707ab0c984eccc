"""Weight files on disk -> loaded networks. Safe (no code from a pickle runs), strict and memory-mapped.

Official layout, relative to the weights' folder; a file of the converted form (`.safetensors`) wins:

    musetalkV15/unet.pth            or musetalk/pytorch_model.bin (MuseTalk 1.0), with musetalk.json beside it
    sd-vae/diffusion_pytorch_model.bin         config.json        (or sd-vae-ft-mse/)
    whisper/pytorch_model.bin                  config.json
    dwpose/dw-ll_ucoco_384.pth                 [config.json]
    face-parse-bisent/79999_iter.pth           [config.json]
    s3fd-619a316812.pth                        [s3fd.json]
    taesd/diffusion_pytorch_model.safetensors, or taesd/taesd_decoder.pth     [config.json]

The configs in brackets exist only for networks of another size than the published ones. Without `taesd/` there is no fast
lane; all else is needed. `manifest.json`, where there is one, lists every file's size and sha256 and is checked on load;
without one, torch's zip files are checked by the CRCs in them, which takes a third of the time (1.5 GB/s a core).
"""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from musetalk.errors import BadCheckpoint
from musetalk.nets.bisenet import BiSeNet, BiSeNetConfig
from musetalk.nets.fast import fold_batch_norm
from musetalk.nets.layers import config_from
from musetalk.nets.rtmpose import RtmPose, RtmPoseConfig
from musetalk.nets.s3fd import S3fd, S3fdConfig
from musetalk.nets.tiny import Tiny, TinyConfig
from musetalk.nets.unet import UNet, UNetConfig
from musetalk.nets.vae import Vae, VaeConfig
from musetalk.nets.whisper import WhisperConfig, WhisperEncoder
from musetalk.tensor_pickle import TensorPickle

State = dict[str, Tensor]
Net = TypeVar("Net", bound=nn.Module)
MANIFEST = "manifest.json"


def bad(path: Path, what: str, key: str = "") -> BadCheckpoint:
    """The error about a file of weights, with the remedy."""
    return BadCheckpoint(f"{path}: {what}; fetch the weights again: python -m pipeline.weights fetch --dir DIR",
                         file=str(path), key=key)


@dataclass(frozen=True)
class Part:
    """One network: where its files may lie, and how its published keys map to the module's."""

    name: str
    files: tuple[str, ...]
    configs: tuple[str, ...]
    needs_config: bool
    rename: Callable[[State], State] = dict
    optional: bool = False  # whether a folder may do without it


def _vae_names(state: State) -> State:
    """The newer attention names (to_q, ..., to_out.0) to the published ones; conv-shaped weights become linear."""
    table = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    out = {}
    for key, value in state.items():
        if ".attentions." in key:
            for new, old in table.items():
                key = key.replace(new, old)
            if key.endswith("weight") and value.ndim == 4:
                value = value[:, :, 0, 0]
        out[key] = value
    return out


def _whisper_names(state: State) -> State:
    """Keep the encoder and drop its prefix (`model.encoder.`, or `encoder.` of a bare model)."""
    for prefix in ("model.encoder.", "encoder."):
        if any(key.startswith(prefix) for key in state):
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return state


def _tiny_names(state: State) -> State:
    """The decoder alone; the original file's indices (`3.conv.0.weight`) count the clamp, which has no weights, as layer 0."""
    def named(key: str) -> str:
        index, _, rest = key.partition(".")
        return f"decoder.layers.{int(index) - 1}.{rest}" if index.isdecimal() else key

    return {named(k): v for k, v in state.items() if not k.startswith("encoder.")}


def _mmengine(state: Mapping[str, Any]) -> State:
    """The `state_dict` of an mmengine checkpoint."""
    return dict(state.get("state_dict", state))


SAFE = "model.safetensors"
UNET15 = Part("unet", ("musetalkV15/unet.safetensors", "musetalkV15/unet.pth"), ("musetalkV15/musetalk.json",), True)
UNET10 = Part("unet", ("musetalk/unet.safetensors", "musetalk/pytorch_model.bin"), ("musetalk/musetalk.json",), True)
VAE_FILES = tuple(f"{folder}/diffusion_pytorch_model.{kind}" for folder in ("sd-vae", "sd-vae-ft-mse")
                  for kind in ("safetensors", "bin"))
VAE = Part("vae", VAE_FILES, ("sd-vae/config.json", "sd-vae-ft-mse/config.json"), True, _vae_names)
WHISPER = Part("whisper", (f"whisper/{SAFE}", "whisper/pytorch_model.bin"), ("whisper/config.json",), True,
               _whisper_names)
POSE = Part("pose", (f"dwpose/{SAFE}", "dwpose/dw-ll_ucoco_384.pth"), ("dwpose/config.json",), False, _mmengine)
PARSER = Part("parser", (f"face-parse-bisent/{SAFE}", "face-parse-bisent/79999_iter.pth"),
              ("face-parse-bisent/config.json",), False)
DETECTOR = Part("detector", ("s3fd.safetensors", "s3fd-619a316812.pth", "s3fd.pth"), ("s3fd.json",), False)
TINY_FILES = ("taesd/diffusion_pytorch_model.safetensors", "taesd/diffusion_pytorch_model.bin", "taesd/taesd_decoder.pth")
TINY = Part("tiny", TINY_FILES, ("taesd/config.json",), False, _tiny_names, optional=True)
COMMON = (VAE, WHISPER, POSE, PARSER, DETECTOR, TINY)
UNSEEN = ("pose", "parser", "detector")  # parts whose NaN shows in no generated face: nothing would be found, or painted
PARTS = {"v15": (UNET15, *COMMON), "v1": (UNET10, *COMMON)}


@dataclass(frozen=True)
class Networks:
    """The networks of one weights' folder. `identity` names the weights' content."""

    unet: UNet
    vae: Vae
    whisper: WhisperEncoder
    pose: RtmPose
    parser: BiSeNet
    detector: S3fd
    tiny: Tiny | None  # the fast lane's decoder, where the folder has one
    version: str
    identity: str
    device: torch.device
    dtype: torch.dtype

    def modules(self) -> Iterator[nn.Module]:
        """Every module of all of them."""
        for net in (self.unet, self.vae, self.whisper, self.pose, self.parser, self.detector, self.tiny):
            if net is not None:
                yield from net.modules()


# -- reading files ---------------------------------------------------------------------------------------------------


def read_state(path: Path) -> Mapping[str, Any]:
    """All entries of a weight file, memory-mapped where the format allows; raises BadCheckpoint.

    safetensors, torch zip files and the older torch pickles are read. Files with foreign classes inside (mmengine)
    are read with those classes made inert.
    """
    if not path.is_file():
        raise bad(path, "no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = _read_torch(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError,
            AttributeError, TypeError, IndexError) as e:
        raise bad(path, f"damaged or not a weight file ({type(e).__name__}, {path.stat().st_size} bytes)") from e
    if not isinstance(state, Mapping):
        raise bad(path, f"holds a {type(state).__name__}, expected named tensors")
    return state


def _read_torch(path: Path) -> Any:
    mapped = _is_archive(path)  # only the zip format can be memory-mapped
    try:
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError:
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=False, pickle_module=TensorPickle())


def _is_archive(path: Path) -> bool:
    """Whether torch takes the file for a zip file: by its first bytes (zipfile.is_zipfile raises on some damaged ones)."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def find(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of `names` that exists under `folder`."""
    return next((folder / n for n in names if (folder / n).is_file()), None)


def read_config(folder: Path, part: Part) -> tuple[dict[str, Any], str]:
    """A part's config (empty when it may be absent) and its path for messages."""
    path = find(folder, part.configs) or folder / part.configs[0]
    if not path.is_file():
        if part.needs_config:
            raise bad(path, "no such file")
        return {}, str(path)
    try:
        value = json.loads(path.read_text())
    except ValueError as e:
        raise bad(path, f"not JSON ({e})") from e
    if not isinstance(value, dict):
        raise bad(path, "expected a JSON object")
    return value, str(path)


def check_state(net: nn.Module, state: Mapping[str, Any], path: Path) -> State:
    """The state when it has exactly the network's keys and shapes; otherwise BadCheckpoint names the first fault."""
    want = net.state_dict()
    state = {k: v for k, v in state.items() if k in want or not k.endswith("num_batches_tracked")}
    for key, value in want.items():
        got = state.get(key)
        if got is None and key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.int64)
        elif not isinstance(got, Tensor):
            raise bad(path, f"key '{key}' is missing", key)
        elif got.shape != value.shape:
            raise bad(path, f"key '{key}' has shape {tuple(got.shape)}, expected {tuple(value.shape)}: "
                            "another network or version", key)
    extra = next((k for k in state if k not in want), None)
    if extra is not None:
        raise bad(path, f"unknown key '{extra}': another network or version", extra)
    return dict(state)


def load_part(folder: Path, part: Part, build: Callable[[], Net]) -> Net:
    """Find, read and check a part's weights and put them into a network built without memory."""
    path = find(folder, part.files) or folder / part.files[-1]
    with torch.device("meta"):
        net = build()
    state = check_state(net, part.rename(dict(read_state(path))), path)
    if part.name in UNSEEN and (key := next((k for k, v in state.items() if not bool(v.isfinite().all())), None)):
        raise bad(path, f"key '{key}' holds NaN or infinity", key)
    net.load_state_dict(state, strict=True, assign=True)
    return net.eval().requires_grad_(False)


# -- loading ---------------------------------------------------------------------------------------------------------


def default_dtype(device: torch.device) -> torch.dtype:
    """float16 on CUDA; bfloat16 on CPUs with AVX-512 BF16, where it halves the time; else float32."""
    if device.type == "cuda":
        return torch.float16
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if fast else torch.float32


def device_named(name: str) -> torch.device:
    """`auto` is a GPU where torch sees one, else the CPU."""
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def dtype_named(name: str) -> torch.dtype | None:
    """None for `auto`: `default_dtype` of the device."""
    dtype: torch.dtype | None = None if name == "auto" else getattr(torch, name)
    return dtype


def version_of(folder: Path) -> str:
    """`v15` or `v1`, by which UNet lies in the folder."""
    return "v1" if find(folder, UNET15.files) is None and find(folder, UNET10.files) else "v15"


def builders(folder: Path, version: str) -> list[tuple[Part, Callable[[], nn.Module]]]:
    """Every part of a version with a function that builds its network from the folder's config; optional ones if there."""
    kinds: dict[str, tuple[type[nn.Module], type[Any]]] = {
        "unet": (UNet, UNetConfig), "vae": (Vae, VaeConfig), "whisper": (WhisperEncoder, WhisperConfig),
        "pose": (RtmPose, RtmPoseConfig), "parser": (BiSeNet, BiSeNetConfig), "detector": (S3fd, S3fdConfig),
        "tiny": (Tiny, TinyConfig),
    }

    def builder(part: Part) -> Callable[[], nn.Module]:
        net, config = kinds[part.name]
        return lambda: net(config_from(config, *read_config(folder, part)))

    return [(part, builder(part)) for part in PARTS[version] if not part.optional or find(folder, part.files)]


def load(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Networks:
    """All networks on `device`: UNet, decoders and parser in `dtype` (default_dtype if None), the others in float32.

    S3FD squares its features (half precision would overflow) and RTMPose's coordinates are its result.

    Raises BadCheckpoint naming file, key and remedy. Batch norms and the time embedding are folded in.
    """
    folder, device = Path(folder), torch.device(device)
    if not folder.is_dir():
        raise bad(folder, "no such folder of weights")
    dtype = dtype or default_dtype(device)
    version = version_of(folder)
    identity = verify(folder)

    def fast(net: Any, to: torch.dtype) -> Any:
        return net.to(device=device, dtype=to, memory_format=torch.channels_last)

    nets: dict[str, Any] = {part.name: load_part(folder, part, build) for part, build in builders(folder, version)}
    _check_latents(folder, nets["vae"].cfg, nets.setdefault("tiny", None))
    nets["unet"].fold_time()
    fold_batch_norm(nets["pose"].float())
    fold_batch_norm(nets["parser"].float())
    for name, net in nets.items():
        if net is not None:
            nets[name] = net.to(device, torch.float32) if name == "whisper" else fast(
                net, dtype if name in ("unet", "vae", "parser", "tiny") else torch.float32)
    return Networks(**nets, version=version, identity=identity, device=device, dtype=dtype)


def _check_latents(folder: Path, full: VaeConfig, tiny: Tiny | None) -> None:
    """Both decoders must take the same latents to pictures of the same size."""
    if tiny is not None and (tiny.cfg.latent_channels, tiny.cfg.stride) != (full.latent_channels, full.stride):
        raise bad(folder / TINY.configs[0], f"{tiny.cfg.latent_channels} channels of latents at {tiny.cfg.stride} pixels a "
                                            f"cell, where the VAE has {full.latent_channels} at {full.stride}")


# -- manifest --------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def used_files(folder: Path, version: str) -> set[str]:
    """Relative names of the folder's weight and config files that a version uses."""
    return {n for part in PARTS[version] for n in (*part.files, *part.configs) if (folder / n).is_file()}


def digests(folder: Path, version: str) -> dict[str, str]:
    """sha256 of every weight and config file of the folder that is used, by relative name."""
    return {name: sha256(folder / name) for name in sorted(used_files(folder, version))}


def write_manifest(folder: Path, version: str) -> None:
    """List every weight and config file of the folder with size and sha256."""
    files = {n: {"bytes": (folder / n).stat().st_size, "sha256": digest} for n, digest in digests(folder, version).items()}
    (folder / MANIFEST).write_text(json.dumps({"version": version, "files": files}, indent=2) + "\n")


def verify(folder: Path) -> str:
    """Check every file against the manifest; returns the identity of the weights, with those files that it does not list.

    Without a manifest the identity comes from names, sizes and the ends of the files, and only archives are checked.
    """
    if not (folder / MANIFEST).is_file():
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(check_archive, (folder / name for name in used_files(folder, version_of(folder)))))
        return _fingerprint(folder)
    try:
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        wanted = {str(n): (int(e["bytes"]), str(e["sha256"])) for n, e in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise bad(folder / MANIFEST, f"not a manifest ({e})") from e

    def check(item: tuple[str, tuple[int, str]]) -> None:
        path, (size, digest) = folder / item[0], item[1]
        if not path.is_file():
            raise bad(path, "no such file, though the manifest lists it")
        if path.stat().st_size != size:
            raise bad(path, f"{path.stat().st_size} bytes, expected {size}")
        if sha256(path) != digest:
            raise bad(path, "its sha256 is not the manifest's: changed since it was fetched")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, wanted.items()))
    version = version_of(folder)
    wanted |= {n: ((folder / n).stat().st_size, sha256(folder / n)) for n in used_files(folder, version) - wanted.keys()}
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()


def check_archive(path: Path) -> None:
    """Compare the entries of a torch zip file with their CRCs, which torch.load does not look at; raises BadCheckpoint.

    Files of other formats have none, nor has a file that torch was told to write without.
    """
    if not _is_archive(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            stated = any(entry.CRC for entry in archive.infolist())
            wrong = archive.testzip() if stated else None
    except (zipfile.BadZipFile, zlib.error, RuntimeError, OSError, EOFError, ValueError) as e:
        raise bad(path, f"damaged or not a weight file ({type(e).__name__}, {path.stat().st_size} bytes)") from e
    if wrong:
        raise bad(path, f"damaged: its entry {wrong} does not match the CRC beside it")


def _fingerprint(folder: Path) -> str:
    total = hashlib.sha256()
    for name in sorted({n for version in PARTS for n in used_files(folder, version)}):
        size = (folder / name).stat().st_size
        with (folder / name).open("rb") as file:
            head = file.read(1 << 16)
            file.seek(max(0, size - (1 << 16)))
            total.update(f"{name}|{size}|".encode() + head + file.read())
    return total.hexdigest()


if __name__ == "__main__":
    sys.exit("weights are fetched, verified and converted by: python -m pipeline.weights")
