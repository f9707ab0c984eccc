"""Get, convert and check the published weights: python -m pipeline.weights fetch|verify|convert --dir DIR.

The only module that knows where weights come from. Files are downloaded in parallel, resumed where they broke off, checked
against their published size and sha256, and converted to half-precision safetensors with only what inference needs.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import requests
import torch
from safetensors.torch import save_file
from torch import Tensor
from urllib3.exceptions import HTTPError

from musetalk import checkpoints
from musetalk.checkpoints import PARTS, find, read_state, sha256, write_manifest
from musetalk.errors import BadCheckpoint

HUB = "https://huggingface.co"
CHUNK_BYTES = 1 << 20
TRIES = 5
WORKERS = 4


@dataclass(frozen=True)
class Published:
    """A published file: where it goes, where it comes from, and what it must be (sha256 may be a prefix)."""

    path: str
    url: str
    size: int
    sha256: str


FILES = (  # where size or digest are not pinned (0, ""), strict loading checks names and shapes
    Published("musetalkV15/musetalk.json", f"{HUB}/TMElyralab/MuseTalk/resolve/main/musetalkV15/musetalk.json", 748,
              "5b6923aee04d71692e0e9846c471e0a4ea07a4f686d39545e472bd4ba17e1b47"),
    Published("musetalkV15/unet.pth", f"{HUB}/TMElyralab/MuseTalk/resolve/main/musetalkV15/unet.pth", 3400074924,
              "7ebf6c98c181e20838e4c0054e96e944ac60d5d692cc01db42839fe11b787007"),
    Published("musetalk/musetalk.json", f"{HUB}/TMElyralab/MuseTalk/resolve/main/musetalk/musetalk.json", 0, ""),
    Published("musetalk/pytorch_model.bin", f"{HUB}/TMElyralab/MuseTalk/resolve/main/musetalk/pytorch_model.bin", 0, ""),
    Published("sd-vae/config.json", f"{HUB}/stabilityai/sd-vae-ft-mse/resolve/main/config.json", 547,
              "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e"),
    Published("sd-vae/diffusion_pytorch_model.bin",
              f"{HUB}/stabilityai/sd-vae-ft-mse/resolve/main/diffusion_pytorch_model.bin", 334707217,
              "1b4889b6b1d4ce7ae320a02dedaeff1780ad77d415ea0d744b476155c6377ddc"),
    Published("whisper/config.json", f"{HUB}/openai/whisper-tiny/resolve/main/config.json", 1983,
              "ffdccec4f3211f4c63310f2b7098f309fe70f3952cedc5e4d11e43f5b2379b98"),
    Published("whisper/pytorch_model.bin", f"{HUB}/openai/whisper-tiny/resolve/main/pytorch_model.bin", 151095027,
              "9607f98a2b22d9e229ae43c52ecea79dcede9e0c5cfae67e8da6eda86d8aac1d"),
    Published("dwpose/dw-ll_ucoco_384.pth", f"{HUB}/yzd-v/DWPose/resolve/main/dw-ll_ucoco_384.pth", 406878486,
              "0d9408b13cd863c4e95a149dd31232f88f2a12aa6cf8964ed74d7d97748c7a07"),
    Published("face-parse-bisent/79999_iter.pth",
              f"{HUB}/ManyOtherFunctions/face-parse-bisent/resolve/main/79999_iter.pth", 53289463,
              "468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567"),
    Published("taesd/diffusion_pytorch_model.safetensors",
              f"{HUB}/madebyollin/taesd/resolve/main/diffusion_pytorch_model.safetensors", 0, ""),
    Published("s3fd-619a316812.pth",
              "https://www.adrianbulat.com/downloads/python-fan/s3fd-619a316812.pth", 89843225, "619a316812"),
)
OF_ANOTHER = {"v15": "musetalk/", "v1": "musetalkV15/"}  # the folder that a version does without


def published(version: str, mirrors: Mapping[str, str] | None = None) -> list[Published]:
    """The files of a version. `mirrors` maps the start of a URL to its replacement."""
    wanted = [f for f in FILES if not f.path.startswith(OF_ANOTHER[version])]
    return [replace(f, url=_mirrored(f.url, mirrors or {})) for f in wanted]


def _mirrored(url: str, mirrors: Mapping[str, str]) -> str:
    for start, replacement in mirrors.items():
        if url.startswith(start):
            return replacement + url.removeprefix(start)
    return url


# -- downloading -----------------------------------------------------------------------------------------------------


def check(path: Path, file: Published) -> str | None:
    """What is wrong with a downloaded file; None when it is the published one."""
    size = path.stat().st_size
    if file.size and size != file.size:
        return f"{size} bytes, expected {file.size}"
    if file.sha256 and not (digest := sha256(path)).startswith(file.sha256):
        return f"sha256 {digest[:12]}..., expected {file.sha256[:12]}..."
    return None


class Ended(Exception):
    """Another download has failed, or Ctrl-C was pressed."""


def download(file: Published, folder: Path, tell: Callable[[int], None]) -> None:
    """Bring one file; resumes a partial one; raises BadCheckpoint when it is not the published file.

    `tell` is called with the bytes of each piece that has come, and before each try with 0; what it raises ends the download.
    """
    target = folder / file.path
    partial = target.with_name(target.name + ".part")
    if target.is_file() and check(target, file) is None:
        tell(file.size)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    problem: str | None = "no answer"
    for attempt in range(TRIES):
        tell(0)
        try:
            _resume(file, partial, tell)
        except (requests.RequestException, HTTPError, OSError) as e:
            problem = str(e) or type(e).__name__
            time.sleep(min(0.5 * 2**attempt, 10))
            continue
        if (problem := check(partial, file)) is None:
            partial.replace(target)
            return
        if not file.size or partial.stat().st_size >= file.size:
            partial.unlink()  # whole but wrong: start again
    raise BadCheckpoint(f"{file.url}: {problem}; try again, or set a mirror", file=str(target))


def _resume(file: Published, partial: Path, tell: Callable[[int], None]) -> None:
    """Append what is missing."""
    have = partial.stat().st_size if partial.exists() else 0
    if file.size and have >= file.size:
        return
    headers = {"Range": f"bytes={have}-"} if have else {}
    with requests.get(file.url, headers=headers, stream=True, timeout=(10, 60)) as response:
        if have and response.status_code == 416:  # nothing is left to send: the part is whole, or is of another file
            if response.headers.get("content-range") != f"bytes */{have}":
                partial.unlink()
                raise requests.RequestException("the partial file is not a part of the published one")
            return
        response.raise_for_status()
        appending = response.status_code == 206
        with partial.open("ab" if appending else "wb") as out:
            while chunk := response.raw.read1(CHUNK_BYTES):  # what has come, so that nothing is lost when it breaks off
                out.write(chunk)
                tell(len(chunk))


class Bar:
    """Bytes of all downloads together, on standard error."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self._lock, self._shown = total, 0, threading.Lock(), 0.0
        self.ended = False

    def __call__(self, count: int) -> None:
        """So many bytes more. Raises Ended once `ended` is set."""
        if self.ended:
            raise Ended
        with self._lock:
            self.done += count
            if time.monotonic() - self._shown > 0.2 or self.done >= self.total:
                self._shown = time.monotonic()
                print(f"\r{self.done / 1e6:8.0f} of {self.total / 1e6:.0f} MB", end="", file=sys.stderr, flush=True)


# -- converting ------------------------------------------------------------------------------------------------------


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Half precision for weights; running statistics and counters as they are."""
    return {k: (v if "running_" in k or not v.is_floating_point() else v.half()).contiguous() for k, v in state.items()}


def convert(folder: Path, version: str, keep: bool = False) -> None:
    """Official files -> half-precision safetensors beside them, which loading prefers; then the manifest.

    The official weight files are removed unless `keep`.
    """
    for part, build in checkpoints.builders(folder, version):
        source = find(folder, part.files)
        if source is None:
            raise BadCheckpoint(f"{folder / part.files[-1]}: no such file; run fetch first", file=str(folder / part.files[-1]))
        if source.suffix == ".safetensors":
            continue
        checkpoints.check_archive(source)
        with torch.device("meta"):
            net = build()
        state = checkpoints.check_state(net, part.rename(dict(read_state(source))), source)
        target = next(f for n in part.files if (f := folder / n).suffix == ".safetensors" and f.parent == source.parent)
        save_file(halved(state), target.with_suffix(".part"))
        target.with_suffix(".part").replace(target)
        if not keep:
            source.unlink()
    write_manifest(folder, version)


def fetch(folder: Path, version: str, mirrors: Mapping[str, str], keep: bool = False) -> None:
    """Download, check and convert everything a version needs."""
    if (folder / checkpoints.MANIFEST).is_file() and all(find(folder, part.files) for part in PARTS[version]):
        checkpoints.verify(folder)
        return
    files = [f for f in published(version, mirrors) if not is_converted(folder, version, f.path)]
    bar = Bar(sum(f.size for f in files))
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for done in [pool.submit(download, f, folder, bar) for f in files]:
                done.result()
        except BaseException:  # the other downloads end, too; what has come of them stays for the next call
            bar.ended = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print(file=sys.stderr)
    convert(folder, version, keep)


def is_converted(folder: Path, version: str, path: str) -> bool:
    """Whether the folder holds the converted form of a published weight file."""
    forms = next((part.files for part in PARTS[version] if path in part.files), ())
    return any(name.endswith(".safetensors") and (folder / name).is_file() for name in forms)


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 when all is well, 130 after Ctrl-C, 1 otherwise, with one clear line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.weights", description=__doc__)
    parser.add_argument("command", choices=("fetch", "verify", "convert"))
    parser.add_argument("--dir", type=Path, required=True, help="folder of weights")
    parser.add_argument("--version", choices=tuple(PARTS), default="v15", help="MuseTalk 1.5 or 1.0")
    parser.add_argument("--mirror", action="append", default=[], metavar="FROM=TO", help="replace the start of URLs")
    parser.add_argument("--keep", action="store_true", help="keep the official files beside the converted ones")
    options = parser.parse_args(argv)
    if wrong := [m for m in options.mirror if "=" not in m]:
        parser.error(f"--mirror {wrong[0]}: give FROM=TO, the start of a URL and what replaces it")
    mirrors = dict(m.split("=", 1) for m in options.mirror)
    try:
        if options.command == "fetch":
            fetch(options.dir, options.version, mirrors, options.keep)
        elif options.command == "convert":
            convert(options.dir, options.version, options.keep)
        else:
            if not (options.dir / checkpoints.MANIFEST).is_file():
                raise BadCheckpoint(f"{options.dir / checkpoints.MANIFEST}: no such file; run convert first")
            checkpoints.verify(options.dir)
    except (BadCheckpoint, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nerror: interrupted; what has come stays, and the next call goes on from there", file=sys.stderr)
        return 130
    size = sum(f.stat().st_size for f in options.dir.rglob("*") if f.is_file())
    print(json.dumps({"dir": str(options.dir), "version": options.version, "bytes": size}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
