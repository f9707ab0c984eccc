"""Everything about a source clip that does not depend on the speech.

An avatar is one entry per source frame: the face box, the region that blending may change with its soft mask, and the
UNet's input latents; None for a frame without a face. Entries are kept in half precision, in chunks, so a long clip
costs disk, not memory, and a fresh and a cached avatar give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from musetalk.errors import BadInput
from musetalk.geometry.box import Box, Region
from musetalk.geometry.place import Place

CHUNK_FRAMES = 32  # source frames
CHUNKS_IN_MEMORY = 4  # chunks kept in memory while reading
FORMAT = 13


@dataclass(frozen=True)
class Face:
    """One source frame's face."""

    place: Place  # with the chin margin
    region: Region  # what blending may change, with its soft mask
    latents: Tensor  # (8, h, w) float16
    lips: Tensor  # `mask.lips_map`
    weight: float = 1.0  # how strongly a generated mouth may cover it: less where the face comes or goes
    person: int = 0  # whose it is
    rests: float = 0.0  # how surely its own mouth is closed and still (0..1): shown where the speech is silent


class Avatar:
    """The entries of one clip: append while preparing, index at any time, close when done.

    The file is a run of safetensors blobs, one per CHUNK_FRAMES frames, then a JSON index with their lengths and sha256, and
    the index's own sha256 (32 bytes) and length (8).
    """

    def __init__(
        self, file: BinaryIO, index: list[tuple[int, int, str]], present: Iterable[bool] = (), complete: bool = False,
    ) -> None:
        self._file, self._index = file, index
        self.present = list(present)  # of each source frame, whether it holds a face
        self.frames: list[Tensor] = []  # the clip itself, where the library holds it; the streaming worker does not
        self._pending: list[Face | None] = []
        self._lock = threading.RLock()  # one thread may append while another reads
        self._chunks: OrderedDict[int, list[Face | None]] = OrderedDict()
        self.finished = bool(index)  # whether no more will be appended
        self.complete = complete  # whether the clip ends here; else only so much was prepared as a speech needed

    @classmethod
    def new(cls, folder: Path | None = None) -> Avatar:
        """An empty avatar, backed by an unnamed temporary file."""
        return cls(tempfile.TemporaryFile(dir=folder), [])

    def __len__(self) -> int:
        """Source frames so far."""
        return len(self.present)

    @property
    def first_face(self) -> int | None:
        """The first frame that holds a face."""
        return self.present.index(True) if True in self.present else None

    def check_frames(self) -> None:
        """Raise BadInput where the clip itself is not there, as in an avatar from a cache."""
        if not 0 < len(self) <= len(self.frames):
            raise BadInput(f"the avatar has {len(self)} entries and {len(self.frames)} frames: set avatar.frames to the clip's")

    def append(self, face: Face | None) -> None:
        """Add the next source frame."""
        with self._lock:
            self._pending.append(face)
            self.present.append(face is not None)
            if len(self._pending) == CHUNK_FRAMES:
                self._flush()

    def finish(self, complete: bool = True) -> None:
        """No more frames will come; `complete` when the clip has no more."""
        with self._lock:
            if self._pending:
                self._flush()
            self.finished, self.complete = True, complete

    def __getitem__(self, i: int) -> Face | None:
        """Source frame i."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        chunk, at = divmod(i, CHUNK_FRAMES)
        with self._lock:
            return self._pending[at] if chunk == len(self._index) else self._read_chunk(chunk)[at]

    def __iter__(self) -> Iterator[Face | None]:
        return (self[i] for i in range(len(self)))

    def close(self) -> None:
        """Release the file."""
        self._file.close()
        self._chunks.clear()

    # -- chunks --

    def _flush(self) -> None:
        blob = _pack(self._pending)
        start = self.size
        self._file.seek(start)
        self._file.write(blob)
        self._index.append((start, len(blob), hashlib.sha256(blob).hexdigest()))
        self._pending = []

    def _read_chunk(self, chunk: int) -> list[Face | None]:
        if chunk not in self._chunks:
            start, length, _ = self._index[chunk]
            self._chunks[chunk] = _unpack(_read(self._file, start, length))
            while len(self._chunks) > CHUNKS_IN_MEMORY:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(chunk)
        return self._chunks[chunk]

    # -- files --

    def save(self, path: Path, key: str) -> None:
        """Write the finished avatar under `path`, atomically: readers see all of it or nothing."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.part")
        try:
            with partial.open("wb") as out:
                self.write(out, key)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)

    def write(self, out: BinaryIO, key: str) -> None:
        """Write the finished avatar into a file."""
        for start, length, _ in self._index:
            out.write(_read(self._file, start, length))
        out.write(self._tail(key))

    def file_size(self, key: str) -> int:
        """Bytes that `write` writes."""
        return self.size + len(self._tail(key))

    def _tail(self, key: str) -> bytes:
        """The index and what verifies it."""
        index = json.dumps({
            "format": FORMAT, "key": key, "present": "".join("01"[p] for p in self.present), "complete": self.complete,
            "chunks": self._index,
        }).encode()
        return index + hashlib.sha256(index).digest() + len(index).to_bytes(8, "little")

    @property
    def size(self) -> int:
        """Bytes of the chunks written so far."""
        return self._index[-1][0] + self._index[-1][1] if self._index else 0

    @classmethod
    def open(cls, source: Path | BytesIO, key: str) -> Avatar | None:
        """The avatar in a file, or in one kept in memory; None when there is none, or it is damaged or not of `key`."""
        try:
            file = source.open("rb") if isinstance(source, Path) else source
        except OSError:
            return None
        try:
            size = file.seek(0, os.SEEK_END)
            digest, length = _read(file, size - 40, 32), int.from_bytes(file.read(8), "little")
            text = _read(file, size - 40 - length, length)
            if hashlib.sha256(text).digest() != digest:
                raise ValueError("corrupt")
            index = json.loads(text)
            chunks = [(int(a), int(b), str(c)) for a, b, c in index["chunks"]]
            if (index["format"], index["key"]) != (FORMAT, key) or not chunks:
                raise ValueError("foreign")
            for start, count, want in chunks:
                if hashlib.sha256(_read(file, start, count)).hexdigest() != want:
                    raise ValueError("corrupt")
            return cls(file, chunks, (p == "1" for p in index["present"]), bool(index["complete"]))
        except (ValueError, KeyError, TypeError, OSError, SafetensorError):
            file.close()
            return None


def _read(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def _pack(faces: list[Face | None]) -> bytes:
    """Places (K, 6), weights (K,) and rests (K,) float64, persons (K,) and regions (K, 4) int32 of the K frames with a face,
    their masks' bytes end to end, latents (K, 8, h, w), lips (K, L, L) uint8.
    """
    present = [f for f in faces if f is not None]
    tensors = {"present": torch.tensor([f is not None for f in faces])}
    if present:
        tensors["places"] = torch.tensor([astuple(f.place) for f in present], dtype=torch.float64)
        tensors["weights"] = torch.tensor([f.weight for f in present], dtype=torch.float64)
        tensors["persons"] = torch.tensor([f.person for f in present], dtype=torch.int32)
        tensors["rests"] = torch.tensor([f.rests for f in present], dtype=torch.float64)
        tensors["regions"] = torch.tensor([astuple(f.region.box) for f in present], dtype=torch.int32)
        tensors["masks"] = torch.cat([f.region.mask.cpu().flatten() for f in present])
        tensors["latents"] = torch.stack([f.latents.half().cpu().contiguous() for f in present])
        tensors["lips"] = torch.stack([f.lips.cpu() for f in present])
    return save_bytes(tensors)


def _unpack(blob: bytes) -> list[Face | None]:
    tensors = load_bytes(blob)
    out: list[Face | None] = []
    at = byte = 0
    for present in tensors["present"].tolist():
        if not present:
            out.append(None)
            continue
        region = Box(*tensors["regions"][at].tolist())
        size = region.width * region.height
        mask = tensors["masks"][byte : byte + size].view(region.height, region.width)
        place = Place(*tensors["places"][at].tolist())
        weight, person, rests = float(tensors["weights"][at]), int(tensors["persons"][at]), float(tensors["rests"][at])
        out.append(Face(place, Region(region, mask), tensors["latents"][at], tensors["lips"][at], weight, person, rests))
        at, byte = at + 1, byte + size
    return out
