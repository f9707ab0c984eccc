"""Hand-written turns: EXIF orientation in JPEG, PNG and WebP, and the picture that a viewer must see."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]


def exif(orientation: int) -> bytes:
    """A TIFF block that holds the orientation only."""
    return b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def turned(data: bytes, orientation: int) -> bytes:
    """A JPEG, PNG or (plain, lossy) WebP file with the orientation added."""
    block = exif(orientation)
    if data.startswith(b"\xff\xd8"):
        segment = b"Exif\0\0" + block
        return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]
    if data.startswith(b"\x89PNG"):
        chunk = b"eXIf" + block
        return data[:33] + struct.pack(">I", len(block)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    width, height = (n & 0x3FFF for n in struct.unpack("<HH", data[26:30]))
    head = b"VP8X" + struct.pack("<II", 10, 8) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBP" + head + data[12:] + b"EXIF" + struct.pack("<I", len(block)) + block
    return b"RIFF" + struct.pack("<I", len(body)) + body


def seen(stored: Picture, orientation: int) -> Picture:
    """What a viewer shows of a stored picture (H, W) or (H, W, C)."""
    turns = {1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
             5: lambda p: p.swapaxes(0, 1), 6: lambda p: p.swapaxes(0, 1)[:, ::-1],
             7: lambda p: p.swapaxes(0, 1)[::-1, ::-1], 8: lambda p: p.swapaxes(0, 1)[::-1]}
    return np.ascontiguousarray(turns[orientation](stored))
