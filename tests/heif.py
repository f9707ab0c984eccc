"""Hand-written HEIC and AVIF files: one picture or a grid of tiles, turned and mirrored as their properties say."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

# EXIF orientation -> (quarter turns against the clock, then the axis to mirror at: 0 left-right... as ISO 23008-12 counts)
TURNS: dict[int, tuple[int, int | None]] = {
    1: (0, None), 2: (0, 1), 3: (2, None), 4: (0, 0), 5: (1, 0), 6: (3, None), 7: (3, 0), 8: (1, None)}
KINDS = {"heic": ("hvc1", b"hvcC"), "avif": ("av01", b"av1C")}


def _box(kind: str, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I", len(body) + 8) + kind.encode() + body


def _full(kind: str, *parts: bytes, version: int = 0, flags: int = 0) -> bytes:
    return _box(kind, struct.pack(">I", version << 24 | flags), *parts)


def _find(data: bytes, name: bytes) -> bytes:
    """A whole box by its name, wherever it lies."""
    at = data.index(name) - 4
    return data[at : at + struct.unpack(">I", data[at : at + 4])[0]]


def picture(kind: str, films: Sequence[Path], columns: int, tile: tuple[int, int], size: tuple[int, int], orientation: int = 1,
            exif: bytes = b"") -> bytes:
    """A still of `films`, MP4 files of one coded frame each: the tiles, row by row, cut to `size` (width, height).

    One film makes a plain picture. `orientation` is EXIF's number, written as irot and imir. `exif` is a TIFF block that
    describes the picture: of a turn in it viewers take no notice.
    """
    codec, config = KINDS[kind]
    data = [film.read_bytes() for film in films]
    payloads = [_find(d, b"mdat")[8:] for d in data]
    quarter, axis = TURNS[orientation]
    turn = ([_box("irot", bytes([quarter]))] if quarter else []) + ([_box("imir", bytes([axis]))] if axis is not None else [])
    sized = [_full("ispe", struct.pack(">II", *s)) for s in (tile, size)]
    properties = [_find(data[0], config), *sized, *turn]
    ids = list(range(1, len(films) + 1))
    own, turns = [0x81, 2], [0x80 | n for n in range(4, 4 + len(turn))]
    items = [(i, codec, [*own, *(turns if len(films) == 1 else [])]) for i in ids]
    references = b""
    if len(films) > 1:
        rows = len(films) // columns
        payloads.append(struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, *size))
        items.append((len(films) + 1, "grid", [3, *turns]))
        references = _box("dimg", struct.pack(f">HH{len(ids)}H", len(films) + 1, len(ids), *ids))
    photo = items[-1][0]
    if exif:
        payloads.append(bytes(4) + exif)
        items.append((photo + 1, "Exif", []))
        references += _box("cdsc", struct.pack(">HHH", photo + 1, 1, photo))
    references = references and _full("iref", references)
    head = _box("ftyp", kind.encode(), bytes(4), b"mif1", kind.encode())
    meta = _meta(photo, items, payloads, references, properties, 0)
    return head + _meta(photo, items, payloads, references, properties, len(head) + len(meta) + 8) + _box("mdat", *payloads)


def _meta(photo: int, items: Sequence[tuple[int, str, list[int]]], payloads: Sequence[bytes], references: bytes,
          properties: Sequence[bytes], at: int) -> bytes:
    """The meta box of a file whose payloads begin at byte `at`; items are (number, type, its properties)."""
    places = b""
    for (number, _, _), payload in zip(items, payloads, strict=True):
        places += struct.pack(">HHHII", number, 0, 1, at, len(payload))
        at += len(payload)
    infos = [_full("infe", struct.pack(">HH", n, 0), kind.encode(), b"\0", version=2) for n, kind, _ in items]
    owners = [(n, own) for n, _, own in items if own]
    joined = b"".join(struct.pack(">HB", n, len(own)) + bytes(own) for n, own in owners)
    return _full(
        "meta", _full("hdlr", bytes(4), b"pict", bytes(13)), _full("pitm", struct.pack(">H", photo)),
        _full("iloc", b"\x44\0", struct.pack(">H", len(items)), places),
        _full("iinf", struct.pack(">H", len(items)), *infos), references,
        _box("iprp", _box("ipco", *properties), _full("ipma", struct.pack(">I", len(owners)), joined)))
